//! Adjoint of the `mamba2` op.
//!
//! Saved is the scan's output; conv, Δt and chunk states are computed again. With R_ij = (C_i·B_j) e^{c_i − c_j} inside
//! a chunk, S the state that enters it, Ŝ the cotangent of the state that leaves it, and Y the cotangent of y:
//!
//! - cotangent of Δt_j x_j: u_j = Σ_i R_ij Y_i + e^{c_n − c_j} Ŝ B_j, so dx_j = Δt_j u_j + D Y_j and dΔt_j = x_j·u_j;
//! - cotangent of C_i·B_j: (Y_i·x_j) e^{c_i − c_j} Δt_j, summed over the heads of the group before it meets B and C;
//! - C_i gets e^{c_i} Sᵀ Y_i, B_j gets e^{c_n − c_j} Δt_j Ŝᵀ x_j;
//! - c_i gets what flows through each exponential it stands in. The diagonal, whose exponent is 0, is left out, since
//!   adding and subtracting it would cost digits.

use elapid_tensor::{DType, Mamba2Grads, Mamba2Inputs, Mamba2Sinks, Mamba2Spec, Mamba2Weights, State};
use half::bf16;

use super::scan::{self, Decays, Span, Views, weigh};
use super::{Dims, Direction, Documents, Front, Params, conv, gate};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math::{self, LANES};
use crate::matmul::{Into, Mat, Triangle, small, triangular};
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::{Buffer, Tensor, narrow};

pub(crate) fn adjoint(
    backend: &CpuBackend,
    spec: &Mamba2Spec,
    inputs: &Mamba2Inputs<Tensor>,
    weights: &Mamba2Weights<Tensor>,
    saved: &[Tensor],
    dy: &Tensor,
    d_state: Option<&State<Tensor>>,
    grads: &mut Buffer,
    sinks: &Mamba2Sinks<'_>,
) -> Mamba2Grads<Tensor> {
    let dims = Dims::new(spec, &inputs.projected);
    let params = Params::new(&dims, weights);
    let documents = Documents::new(&dims, inputs.documents.as_ref());
    let front = conv::front(backend, &dims, inputs, &params, &documents);
    // Nothing here follows the last chunk.
    let mut states = scan::local_states(backend, &dims, &front, &documents, 0..dims.chunks - 1);
    let initial = inputs.initial.as_ref().map(|s| s.ssm.f32());
    scan::pass_states(backend, &dims, &front, &documents, Direction::Forwards, initial, &mut states);

    let len = dims.rows() * dims.proj;
    let dtype = inputs.projected.dtype();
    let mut projected = match dtype {
        DType::Bf16 => backend.pool.take::<bf16>(len),
        _ => backend.pool.take::<f32>(len),
    };
    let d_projected = match dtype {
        DType::Bf16 => Projected::Bf16(Shared::new(projected.as_mut_slice(len))),
        _ => Projected::F32(Shared::new(projected.as_mut_slice(len))),
    };
    let (d_scan, d_norm) = gate::adjoint(backend, &dims, inputs, &params, saved[0].f32(), dy, &d_projected);
    let pass = Pass {
        backend,
        dims: &dims,
        front: &front,
        documents: &documents,
        params: &params,
        initial: initial.is_some(),
        last: d_state.is_some(),
    };
    let d_last = d_state.map(|s| s.ssm.f32());
    let (d_states, d_ssm) = pass.state_cotangents(&d_scan, d_last);
    let mut out = pass.scan(&d_scan, &states, &d_states);
    drop((d_scan, states, d_states));
    pass.sum_groups(&mut out);
    let heads = pass.steps(inputs, &out, &d_projected);

    let d_act = out.act.as_slice::<f32>(dims.rows() * dims.c);
    let (d_conv, d_conv_state) =
        conv::adjoint(backend, &dims, inputs, &params, &documents, d_act, d_state, &d_projected);

    let mut add = |slot, gradient: &[f32]| {
        grads.slot_mut(slot).iter_mut().zip(gradient).for_each(|(g, d)| *g += d);
    };
    let k = spec.conv_kernel;
    let taps: Vec<f32> = (0..dims.c * k).map(|i| d_conv.weight[i % k * dims.c + i / k]).collect();
    add(sinks.conv_weight, &taps);
    if let Some(bias) = sinks.conv_bias {
        add(bias, &d_conv.bias);
    }
    add(sinks.dt_bias, &heads.dt_bias);
    add(sinks.a_log, &heads.a_log);
    add(sinks.d, &heads.d);
    add(sinks.norm_weight, &d_norm);

    let shape = [dims.batch, dims.len, dims.proj];
    Mamba2Grads {
        projected: Tensor::new(projected, &shape, dtype),
        initial: inputs.initial.as_ref().map(|s| State {
            conv: Tensor::new(d_conv_state, s.conv.shape(), DType::F32),
            ssm: Tensor::new(d_ssm, s.ssm.shape(), DType::F32),
        }),
    }
}

/// The cotangent of the projection `[B·L, E + C + H]`, whose columns several phases write.
pub(super) enum Projected<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
}

impl Projected<'_> {
    /// Writes as many numbers from `at` on as `spare` has: `fill` gives them in fp32, in `spare` where they are still to be rounded.
    ///
    /// # Safety
    /// No other piece may touch this range meanwhile.
    #[inline(always)]
    pub(super) unsafe fn write(&self, at: usize, spare: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        let len = spare.len();
        // SAFETY: the caller's promise.
        let row = match self {
            Self::F32(shared) => unsafe { shared.slice(at, len) },
            Self::Bf16(_) => spare,
        };
        fill(row);
        if let Self::Bf16(shared) = self {
            // SAFETY: the caller's promise.
            narrow(row, unsafe { shared.slice(at, len) });
        }
    }
}

/// What every phase reads.
struct Pass<'a> {
    backend: &'a CpuBackend,
    dims: &'a Dims,
    front: &'a Front,
    documents: &'a Documents,
    params: &'a Params,
    /// Whether a state enters the first chunk.
    initial: bool,
    /// Whether the state that leaves the last chunk has a cotangent.
    last: bool,
}

/// What the scan's adjoint gives before heads, blocks and chunks are put together.
struct ScanGrads {
    /// `[B·L, C]`: x complete; B and C still to be summed from `blocks`.
    act: Block,
    /// `[blocks, B·L, 2·N]`: `[B|C]` of one block of heads.
    blocks: Block,
    /// `[B, H, L]`: cotangent of Δt, the part through A not included.
    dt: Block,
    /// `[B, H, L]`: cotangent of Δt·A.
    da: Block,
    /// `[B, chunks, H]`.
    d: Block,
}

/// Gradients of the parameters of single heads, `[H]` each.
struct HeadGrads {
    dt_bias: Vec<f32>,
    a_log: Vec<f32>,
    d: Vec<f32>,
}

impl Pass<'_> {
    fn states_len(&self) -> usize {
        self.dims.batch * self.dims.chunks * self.dims.spec.heads * self.dims.state()
    }

    /// Cotangents of the states that *leave* the chunks `[B, chunks, H, P, N]`, and that of the initial state.
    fn state_cotangents(&self, d_scan: &Block, d_last: Option<&[f32]>) -> (Block, Block) {
        let Pass { backend, dims, front, documents, .. } = *self;
        let (p, e) = (dims.spec.head_dim, dims.e);
        let d_scan = d_scan.as_slice::<f32>(dims.rows() * e);
        // What each chunk's outputs ask of the state that enters it: Σ_i e^{c_i} Y_i C_iᵀ.
        let chunks = usize::from(!self.initial)..dims.chunks;
        let mut states = scan::chunk_products(backend, dims, chunks, |unit, weighted, weights| {
            let span = Span::new(documents, unit);
            for (h, head) in unit.heads.clone().enumerate() {
                let decays = Decays::new(dims, front, span, unit, head);
                let at = (unit.b * dims.len + unit.row) * e + head * p;
                vectorize!(backend.isa, || {
                    decays.entering(weights);
                    weigh(weighted, unit.heads.len() * p, h, weights, |i| &d_scan[at + i * e..][..p]);
                });
            }
            Views::new(dims, front, unit).c()
        });
        let first =
            scan::pass_states(backend, dims, front, documents, Direction::Backwards, d_last, &mut states);
        (states, first)
    }

    /// The chunks' own adjoints.
    fn scan(&self, d_scan: &Block, states: &Block, d_states: &Block) -> ScanGrads {
        let Pass { backend, dims, front, .. } = *self;
        let (rows, heads) = (dims.rows(), dims.spec.heads);
        let d_scan = d_scan.as_slice::<f32>(rows * dims.e);
        let states = states.as_slice::<f32>(self.states_len());
        let d_states = d_states.as_slice::<f32>(self.states_len());
        let width = 2 * dims.spec.state;
        let block_count = dims.spec.groups * dims.blocks;
        let mut out = ScanGrads {
            act: backend.pool.take::<f32>(rows * dims.c),
            blocks: backend.pool.take::<f32>(block_count * rows * width),
            dt: backend.pool.take::<f32>(heads * rows),
            da: backend.pool.take::<f32>(heads * rows),
            d: backend.pool.take::<f32>(dims.batch * dims.chunks * heads),
        };
        let act = Shared::new(out.act.as_mut_slice::<f32>(rows * dims.c));
        let blocks = Shared::new(out.blocks.as_mut_slice::<f32>(block_count * rows * width));
        let dt = Shared::new(out.dt.as_mut_slice::<f32>(heads * rows));
        let da = Shared::new(out.da.as_mut_slice::<f32>(heads * rows));
        let d = Shared::new(out.d.as_mut_slice::<f32>(dims.batch * dims.chunks * heads));

        backend.workers.each(dims.units(), |index| {
            let unit = dims.unit(index);
            let (n, width, n_state) = (unit.n, unit.heads.len() * dims.spec.head_dim, dims.spec.state);
            let views = Views::new(dims, front, &unit);
            let (span, firsts) = (Span::new(self.documents, &unit), scan::firsts(self.documents, &unit));
            let len = UnitScratch::len(dims, n, width);
            let mut block = backend.pool.take::<f32>(len);
            let mut s = UnitScratch::new(dims, n, width, block.as_mut_slice(len));
            // SAFETY: each (block, position) belongs to one unit.
            let d_bc = unsafe {
                blocks
                    .slice((unit.block * rows + unit.b * dims.len + unit.row) * 2 * n_state, n * 2 * n_state)
            };
            d_bc.fill(0.0);
            s.d_scores.fill(0.0);
            triangular(backend, Triangle::ResultLower, Into::Set, s.scores, n, views.c(), views.b().t());
            let (enters, leaves) =
                (self.initial || unit.chunk > 0, self.last || unit.chunk + 1 < dims.chunks);
            let leaving = dims.state_at(unit.b, unit.chunk, unit.heads.start);
            let leaving = Mat::new(&d_states[leaving..], width, n_state);
            if leaves {
                small(backend, Into::Set, s.from_end, width, views.b(), leaving.t());
            } else {
                s.from_end.fill(0.0);
            }
            for (h, head) in unit.heads.clone().enumerate() {
                let decays = Decays::new(dims, front, span, &unit, head);
                let at = dims.state_at(unit.b, unit.chunk, head);
                let io = HeadIo {
                    head,
                    h,
                    firsts: &firsts,
                    dy: &d_scan[(unit.b * dims.len + unit.row) * dims.e + head * dims.spec.head_dim..],
                    state: enters.then(|| &states[at..][..dims.state()]),
                    d_state: &d_states[at..][..dims.state()],
                    skip: self.params.d[head],
                };
                let per_head = (unit.b * heads + head) * dims.len + unit.row;
                // SAFETY: each (position, head), and each (chunk, head), belongs to one unit.
                let (dt, da, d) = unsafe {
                    let d = &mut d.slice((unit.b * dims.chunks + unit.chunk) * heads + head, 1)[0];
                    (dt.slice(per_head, n), da.slice(per_head, n), d)
                };
                let x_at = (unit.b * dims.len + unit.row) * dims.c + head * dims.spec.head_dim;
                // SAFETY: as above.
                let dx = |i: usize| unsafe { act.slice(x_at + i * dims.c, dims.spec.head_dim) };
                *d = head_adjoint(backend, dims, &views, &decays, &io, &mut s, d_bc, dt, da, dx);
            }
            // B_j gets Σ_heads e^{c_n − c_j} Δt_j Ŝᵀ x_j; then both what the scores give.
            let stride = 2 * n_state;
            if leaves {
                let weighted = Mat::new(&*s.from_end, n, width);
                small(backend, Into::Add, d_bc, stride, weighted, leaving);
            }
            let d_scores = Mat::new(&*s.d_scores, n, n);
            triangular(backend, Triangle::LeftUpper, Into::Add, d_bc, stride, d_scores.t(), views.c());
            let d_c = &mut d_bc[n_state..];
            triangular(backend, Triangle::LeftLower, Into::Add, d_c, stride, d_scores, views.b());
        });
        out
    }

    /// Sums the blocks of heads of each group into the B and C channels of `act`.
    fn sum_groups(&self, out: &mut ScanGrads) {
        let Pass { backend, dims, .. } = *self;
        let (rows, n_state) = (dims.rows(), dims.spec.state);
        let width = 2 * n_state;
        let ScanGrads { act, blocks, .. } = out;
        let blocks = blocks.as_slice::<f32>(dims.spec.groups * dims.blocks * rows * width);
        backend.workers.rows(act.as_mut_slice::<f32>(rows * dims.c), dims.c, 16, |first, chunk| {
            vectorize!(backend.isa, || {
                for (row, act) in (first..).zip(chunk.chunks_exact_mut(dims.c)) {
                    for group in 0..dims.spec.groups {
                        for (from, channel) in [(0, dims.b_channel(group)), (n_state, dims.c_channel(group))]
                        {
                            let to = &mut act[channel..channel + n_state];
                            to.fill(0.0);
                            for block in group * dims.blocks..(group + 1) * dims.blocks {
                                let part = &blocks[(block * rows + row) * width + from..][..n_state];
                                to.iter_mut().zip(part).for_each(|(t, p)| *t += p);
                            }
                        }
                    }
                }
            });
        });
    }

    /// Through Δt = clamp(softplus(dt + dt_bias)) and A: the dt columns of `d_projected` and the per-head parameters.
    fn steps(
        &self,
        inputs: &Mamba2Inputs<Tensor>,
        out: &ScanGrads,
        d_projected: &Projected<'_>,
    ) -> HeadGrads {
        let Pass { backend, dims, front, params, .. } = *self;
        let heads = dims.spec.heads;
        let len = heads * dims.rows();
        let (ddt, da) = (out.dt.as_slice::<f32>(len), out.da.as_slice::<f32>(len));
        let dt = front.dt.as_slice::<f32>(len);
        let d = out.d.as_slice::<f32>(dims.batch * dims.chunks * heads);
        let (low, high) = dims.spec.dt_limit;
        let pieces = dims.batch * dims.chunks;
        let mut partial = vec![0.0f64; pieces * 2 * heads];
        backend.workers.rows(&mut partial, 2 * heads, 1, |piece, sums| {
            let (b, first) = (piece / dims.chunks, piece % dims.chunks * dims.q);
            let (dt_bias, a_log) = sums.split_at_mut(heads);
            let mut scratch = backend.pool.take::<f32>(2 * heads);
            let (raw, spare) = scratch.as_mut_slice::<f32>(2 * heads).split_at_mut(heads);
            vectorize!(backend.isa, || {
                for l in first..dims.len.min(first + dims.q) {
                    let row = b * dims.len + l;
                    conv::load_dt(dims, inputs, row, raw);
                    let fill = |to: &mut [f32]| {
                        for ((d_raw, raw), bias) in to.iter_mut().zip(&*raw).zip(&params.dt_bias) {
                            let x = raw + bias;
                            let step = math::softplus(x);
                            *d_raw = if (low <= step) & (step <= high) { math::sigmoid(x) } else { 0.0 };
                        }
                        for (h, d_raw) in to.iter_mut().enumerate() {
                            let at = (b * heads + h) * dims.len + l;
                            *d_raw *= ddt[at] + params.a[h] * da[at];
                            dt_bias[h] += f64::from(*d_raw);
                            a_log[h] += f64::from(dt[at] * da[at]) * f64::from(params.a[h]);
                        }
                    };
                    // SAFETY: pieces cover disjoint rows.
                    unsafe { d_projected.write(row * dims.proj + dims.e + dims.c, spare, fill) };
                }
            });
        });
        let sum = |from: usize, h: usize| {
            let of_pieces = partial.iter().skip(from * heads + h).step_by(2 * heads);
            of_pieces.sum::<f64>() as f32
        };
        HeadGrads {
            dt_bias: (0..heads).map(|h| sum(0, h)).collect(),
            a_log: (0..heads).map(|h| sum(1, h)).collect(),
            d: (0..heads)
                .map(|h| d.iter().skip(h).step_by(heads).map(|&d| f64::from(d)).sum::<f64>() as f32)
                .collect(),
        }
    }
}

/// Scratch of one unit, n positions, `width` = heads·P.
struct UnitScratch<'a> {
    /// `[n, n]`, C·Bᵀ on and below the diagonal.
    scores: &'a mut [f32],
    /// `[n, n]`, its cotangent.
    d_scores: &'a mut [f32],
    /// `[n, n]`, Y·xᵀ on and below the diagonal, and then R.
    kernel: &'a mut [f32],
    /// `[n, heads·P]`: Ŝ·B_j, and, once a head has read its own, e^{c_n − c_j} Δt_j x_j.
    from_end: &'a mut [f32],
    /// `[n, P]`, u without what comes from the end of the chunk.
    u: &'a mut [f32],
    /// `[n, P]`, e^{c_i} Y_i.
    weighted: &'a mut [f32],
    /// `[n, N]`.
    from_state: &'a mut [f32],
    /// `[n]`, e^{c_i}.
    entering: &'a mut [f32],
    /// `[n]`, e^{c_n − c_j}.
    leaving: &'a mut [f32],
    /// `[n]`: what flows through the exponentials of one row.
    flow: &'a mut [f32],
    /// `[n]`: its sums.
    rows: &'a mut [f32],
}

impl<'a> UnitScratch<'a> {
    fn len(dims: &Dims, n: usize, width: usize) -> usize {
        3 * n * n + n * width + 2 * n * dims.spec.head_dim + n * dims.spec.state + 4 * n
    }

    fn new(dims: &Dims, n: usize, width: usize, block: &'a mut [f32]) -> Self {
        let (scores, rest) = block.split_at_mut(n * n);
        let (d_scores, rest) = rest.split_at_mut(n * n);
        let (kernel, rest) = rest.split_at_mut(n * n);
        let (from_end, rest) = rest.split_at_mut(n * width);
        let (u, rest) = rest.split_at_mut(n * dims.spec.head_dim);
        let (weighted, rest) = rest.split_at_mut(n * dims.spec.head_dim);
        let (from_state, rest) = rest.split_at_mut(n * dims.spec.state);
        let (entering, rest) = rest.split_at_mut(n);
        let (leaving, rest) = rest.split_at_mut(n);
        let (flow, rows) = rest.split_at_mut(n);
        Self { scores, d_scores, kernel, from_end, u, weighted, from_state, entering, leaving, flow, rows }
    }
}

/// What belongs to one head of one unit.
struct HeadIo<'a> {
    head: usize,
    /// Its number inside the unit.
    h: usize,
    /// `[n]`: the first position of each position's document.
    firsts: &'a [usize],
    /// Y `[n, P]`, rows E apart.
    dy: &'a [f32],
    /// S `[P, N]`, if a state enters the chunk.
    state: Option<&'a [f32]>,
    /// Ŝ `[P, N]`.
    d_state: &'a [f32],
    /// D.
    skip: f32,
}

/// The adjoint of one head in one chunk. Writes the cotangents of Δt `[n]` and of Δt·A `[n]`, gives rows of dx through
/// `dx`, adds to those of C in `[B|C]` `[n, 2·N]` and to `d_scores`, leaves in `from_end` what those of B need; returns the
/// gradient of D.
#[inline(never)]
fn head_adjoint<'x>(
    backend: &CpuBackend,
    dims: &Dims,
    views: &Views<'_>,
    decays: &Decays<'_>,
    io: &HeadIo<'_>,
    s: &mut UnitScratch<'_>,
    d_bc: &mut [f32],
    d_dt: &mut [f32],
    d_cum: &mut [f32],
    dx: impl Fn(usize) -> &'x mut [f32],
) -> f32 {
    let (p, n_state, e, n) = (dims.spec.head_dim, dims.spec.state, dims.e, d_dt.len());
    let (head, last, width) = (io.head, n - 1, s.from_end.len() / n);
    let dy = Mat::strided(io.dy, n, p, e);
    let dy_row = |i: usize| &io.dy[i * e..][..p];

    triangular(backend, Triangle::ResultLower, Into::Set, s.kernel, n, dy, views.x(head).t());
    d_cum.fill(0.0);
    let mut d_skip = 0.0;
    vectorize!(backend.isa, || {
        for i in 0..n {
            let first = io.firsts[i];
            let (from, to) = (first / LANES * LANES, n.min((i + 1).next_multiple_of(LANES)));
            let kernel = &mut s.kernel[i * n..][..n];
            // The diagonal, where the decay is 1.
            d_skip += kernel[i];
            d_dt[i] = kernel[i] * s.scores[i * n + i];
            kernel[..from].fill(0.0);
            kernel[to..].fill(0.0);
            let cum = decays.cum[i];
            let (first, diagonal) = ((first - from) as u32, (i - from) as u32);
            let dt = &decays.dt[from..to];
            let flow = &mut s.flow[..to - from];
            let inputs = s.scores[i * n..][from..to].iter().zip(&decays.cum[from..to]).zip(dt);
            let outputs = kernel[from..to].iter_mut().zip(&mut s.d_scores[i * n..][from..to]);
            let flows = flow.iter_mut().zip(&mut d_cum[from..to]);
            for (j, (((kernel, d_score), (flow, column)), ((score, c), dt))) in
                outputs.zip(flows).zip(inputs).enumerate()
            {
                let live = (first <= j as u32) & (j as u32 <= diagonal);
                let decay = math::decay(cum - c);
                let weight = math::only(live, *kernel * decay);
                *kernel = math::only(live, score * decay);
                *d_score += weight * dt;
                // What flows through Δt_j e^{c_i − c_j}, j < i, over Δt_j.
                *flow = math::only(live & (j as u32 != diagonal), weight * score);
                *column += *flow;
            }
            s.rows[i] = math::dot(flow, dt);
        }
    });

    let kernel = Mat::new(&*s.kernel, n, n).t();
    triangular(backend, Triangle::LeftUpper, Into::Set, s.u, p, kernel, dy);
    vectorize!(backend.isa, || {
        decays.leaving(s.leaving);
        let mut through_end = 0.0;
        for j in 0..n {
            let (x, dy, leaving, dt) = (views.x_row(head, j), dy_row(j), s.leaving[j], decays.dt[j]);
            let (u, from_end) = (&s.u[j * p..][..p], &mut s.from_end[j * width + io.h * p..][..p]);
            let end = leaving * math::dot(x, from_end);
            d_dt[j] += d_cum[j] + end;
            d_cum[j] = s.rows[j] - dt * d_cum[j];
            if j < last {
                d_cum[j] -= dt * end;
                through_end += dt * end;
            }
            for (((dx, from), dy), u) in dx(j).iter_mut().zip(&*from_end).zip(dy).zip(u) {
                *dx = dt * (u + leaving * from) + io.skip * dy;
            }
            for (from, x) in from_end.iter_mut().zip(x) {
                *from = leaving * dt * x;
            }
        }
        d_cum[last] += through_end;
    });

    if let Some(state) = io.state {
        vectorize!(backend.isa, || {
            decays.entering(s.entering);
            weigh(s.weighted, p, 0, s.entering, dy_row);
        });
        let weighted = Mat::new(&*s.weighted, n, p);
        small(backend, Into::Set, s.from_state, n_state, weighted, Mat::new(state, p, n_state));
        vectorize!(backend.isa, || {
            d_cum[last] += decays.whole() * math::dot(state, io.d_state);
            for (i, dc) in s.from_state.chunks_exact(n_state).enumerate() {
                d_cum[i] += math::dot(dc, views.c_row(i));
                let to = &mut d_bc[i * 2 * n_state + n_state..][..n_state];
                to.iter_mut().zip(dc).for_each(|(t, d)| *t += d);
            }
        });
    }

    // c_i = Σ_{l ≤ i} Δt_l A, so the cotangent of Δt_l·A is the sum of those of c_i from l on.
    for l in (0..last).rev() {
        d_cum[l] += d_cum[l + 1];
    }
    d_skip
}
