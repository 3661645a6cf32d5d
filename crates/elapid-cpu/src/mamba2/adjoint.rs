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

use super::scan::{self, Decays, Views};
use super::{Dims, Documents, Front, Params, conv, gate};
use crate::CpuBackend;
use crate::math;
use crate::matmul::{Into, Mat, small};
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::{Buffer, Tensor};

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
    let front = conv::front(backend, &dims, inputs, &params, &documents, true);
    let mut states = scan::local_states(backend, &dims, &front, &documents);
    let initial = inputs.initial.as_ref().map(|s| s.ssm.f32());
    scan::pass_states(backend, &dims, &front, &documents, initial, &mut states);

    let len = dims.rows() * dims.proj;
    let mut projected = backend.pool.take::<f32>(len);
    let d_projected = Shared::new(projected.as_mut_slice::<f32>(len));
    let (d_scan, d_norm) = gate::adjoint(backend, &dims, inputs, &params, saved[0].f32(), dy, &d_projected);
    let pass = Pass { backend, dims: &dims, front: &front, documents: &documents, params: &params };
    let d_last = d_state.map(|s| s.ssm.f32());
    let (d_states, d_ssm) = pass.state_cotangents(&d_scan, d_last);
    let mut out = pass.scan(&d_scan, &states, &d_states);
    drop((d_scan, states, d_states));
    pass.sum_groups(&mut out);
    let heads = pass.steps(inputs, &out, &d_projected);

    let d_act = out.act.as_mut_slice::<f32>(dims.rows() * dims.c);
    let pre = front.pre.as_ref().expect("asked for");
    let (d_conv, d_conv_state) =
        conv::adjoint(backend, &dims, inputs, &params, &documents, pre, d_act, d_state, &d_projected);

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
    let projected = Tensor::new(projected, &shape, DType::F32);
    Mamba2Grads {
        projected: backend.cast_to(&projected, inputs.projected.dtype()),
        initial: inputs.initial.as_ref().map(|s| State {
            conv: Tensor::new(d_conv_state, s.conv.shape(), DType::F32),
            ssm: Tensor::new(d_ssm, s.ssm.shape(), DType::F32),
        }),
    }
}

/// What every phase reads.
struct Pass<'a> {
    backend: &'a CpuBackend,
    dims: &'a Dims,
    front: &'a Front,
    documents: &'a Documents,
    params: &'a Params,
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
        let (p, n_state, heads, e) = (dims.spec.head_dim, dims.spec.state, dims.spec.heads, dims.e);
        let d_scan = d_scan.as_slice::<f32>(dims.rows() * e);
        let mut states = backend.pool.take::<f32>(self.states_len());
        let shared = Shared::new(states.as_mut_slice::<f32>(self.states_len()));
        // What each chunk's outputs ask of the state that enters it: Σ_i e^{c_i} Y_i C_iᵀ.
        backend.workers.each(dims.units(), |index| {
            let unit = dims.unit(index);
            let views = Views::new(dims, front, &unit);
            let mut scratch = backend.pool.take::<f32>(unit.n * p);
            let weighted = scratch.as_mut_slice::<f32>(unit.n * p);
            for head in unit.heads.clone() {
                let decays = Decays::new(dims, front, documents, &unit, head);
                let at = (unit.b * dims.len + unit.row) * e + head * p;
                backend
                    .isa
                    .run(|| weigh(weighted, p, |i| decays.entering(i), |i| &d_scan[at + i * e..][..p]));
                // SAFETY: each (sequence, chunk, head) belongs to one unit.
                let local = unsafe { shared.slice(dims.state_at(unit.b, unit.chunk, head), dims.state()) };
                small(backend, Into::Set, local, n_state, Mat::new(&*weighted, unit.n, p).t(), views.c());
            }
        });
        // The recurrence, backwards; in place, as in the forward direction.
        let count = dims.batch * heads * dims.state();
        let mut first = backend.pool.zeros::<f32>(count);
        if let Some(d_last) = d_last {
            first.as_mut_slice::<f32>(count).copy_from_slice(d_last);
        }
        backend.workers.rows(first.as_mut_slice::<f32>(count), dims.state(), 1, |index, running| {
            let (b, head) = (index / heads, index % heads);
            for chunk in (0..dims.chunks).rev() {
                let decay = scan::chunk_decay(dims, front, documents, b, chunk, head);
                // SAFETY: each (sequence, head) is one piece.
                let slot = unsafe { shared.slice(dims.state_at(b, chunk, head), dims.state()) };
                backend.isa.run(|| {
                    for (r, s) in running.iter_mut().zip(slot) {
                        let local = *s;
                        *s = *r;
                        *r = decay * *r + local;
                    }
                });
            }
        });
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
            let n = unit.n;
            let views = Views::new(dims, front, &unit);
            let mut block = backend.pool.take::<f32>(UnitScratch::len(dims, n));
            let mut s = UnitScratch::new(dims, n, block.as_mut_slice(UnitScratch::len(dims, n)));
            // SAFETY: each (block, position) belongs to one unit.
            let d_bc = unsafe {
                blocks.slice((unit.block * rows + unit.b * dims.len + unit.row) * width, n * width)
            };
            d_bc.fill(0.0);
            s.d_scores.fill(0.0);
            small(backend, Into::Set, s.scores, n, views.c(), views.b().t());
            for head in unit.heads.clone() {
                let decays = Decays::new(dims, front, self.documents, &unit, head);
                let at = dims.state_at(unit.b, unit.chunk, head);
                let io = HeadIo {
                    head,
                    dy: &d_scan[(unit.b * dims.len + unit.row) * dims.e + head * dims.spec.head_dim..],
                    state: &states[at..][..dims.state()],
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
            small(backend, Into::Add, d_bc, width, Mat::new(&*s.d_scores, n, n).t(), views.c());
            small(
                backend,
                Into::Add,
                &mut d_bc[dims.spec.state..],
                width,
                Mat::new(&*s.d_scores, n, n),
                views.b(),
            );
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
            backend.isa.run(|| {
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
        d_projected: &Shared<'_, f32>,
    ) -> HeadGrads {
        let Pass { backend, dims, front, params, .. } = *self;
        let heads = dims.spec.heads;
        let len = heads * dims.rows();
        let (ddt, da) = (out.dt.as_slice::<f32>(len), out.da.as_slice::<f32>(len));
        let dt = front.dt.as_slice::<f32>(len);
        let d = out.d.as_slice::<f32>(dims.batch * dims.chunks * heads);
        let (low, high) = dims.spec.dt_limit;
        let mut sums = vec![[0.0f64; 3]; heads];
        backend.workers.rows(&mut sums, 1, 1, |head, sums| {
            let [dt_bias, a_log, skip] = &mut sums[0];
            for row in 0..dims.rows() {
                let at = (row / dims.len * heads + head) * dims.len + row % dims.len;
                let mut raw = [0.0];
                conv::load_dt(dims, inputs, row, head, &mut raw);
                let x = raw[0] + params.dt_bias[head];
                let step = math::softplus(x);
                let inside = low <= step && step <= high;
                let d_step = ddt[at] + params.a[head] * da[at];
                let d_raw = if inside { d_step * math::softplus_slope(x) } else { 0.0 };
                // SAFETY: each head has its own column.
                unsafe { d_projected.slice(row * dims.proj + dims.e + dims.c + head, 1)[0] = d_raw };
                *dt_bias += f64::from(d_raw);
                *a_log += f64::from(dt[at] * da[at]) * f64::from(params.a[head]);
            }
            *skip = d.iter().skip(head).step_by(heads).map(|&d| f64::from(d)).sum();
        });
        HeadGrads {
            dt_bias: sums.iter().map(|s| s[0] as f32).collect(),
            a_log: sums.iter().map(|s| s[1] as f32).collect(),
            d: sums.iter().map(|s| s[2] as f32).collect(),
        }
    }
}

/// Scratch of one unit, n positions.
struct UnitScratch<'a> {
    /// `[n, n]`, C·Bᵀ.
    scores: &'a mut [f32],
    /// `[n, n]`, its cotangent.
    d_scores: &'a mut [f32],
    /// `[n, n]`, R.
    kernel: &'a mut [f32],
    /// `[n, n]`, Y·xᵀ.
    d_kernel: &'a mut [f32],
    /// `[n, P]`, u.
    u: &'a mut [f32],
    /// `[n, P]`.
    weighted: &'a mut [f32],
    /// `[n, N]`.
    from_state: &'a mut [f32],
}

impl<'a> UnitScratch<'a> {
    fn len(dims: &Dims, n: usize) -> usize {
        4 * n * n + 2 * n * dims.spec.head_dim + n * dims.spec.state
    }

    fn new(dims: &Dims, n: usize, block: &'a mut [f32]) -> Self {
        let (scores, rest) = block.split_at_mut(n * n);
        let (d_scores, rest) = rest.split_at_mut(n * n);
        let (kernel, rest) = rest.split_at_mut(n * n);
        let (d_kernel, rest) = rest.split_at_mut(n * n);
        let (u, rest) = rest.split_at_mut(n * dims.spec.head_dim);
        let (weighted, from_state) = rest.split_at_mut(n * dims.spec.head_dim);
        Self { scores, d_scores, kernel, d_kernel, u, weighted, from_state }
    }
}

/// What belongs to one head of one unit.
struct HeadIo<'a> {
    head: usize,
    /// Y `[n, P]`, rows E apart.
    dy: &'a [f32],
    /// S `[P, N]`.
    state: &'a [f32],
    /// Ŝ `[P, N]`.
    d_state: &'a [f32],
    /// D.
    skip: f32,
}

/// Row i of `dst` `[n, width]` = weight(i) · row(i).
#[inline(always)]
fn weigh<'r>(dst: &mut [f32], width: usize, weight: impl Fn(usize) -> f32, row: impl Fn(usize) -> &'r [f32]) {
    for (i, dst) in dst.chunks_exact_mut(width).enumerate() {
        let w = weight(i);
        for (d, r) in dst.iter_mut().zip(row(i)) {
            *d = w * r;
        }
    }
}

/// The adjoint of one head in one chunk. Writes the cotangents of Δt `[n]` and of Δt·A `[n]`, gives rows of dx through
/// `dx`, adds to those of `[B|C]` `[n, 2·N]` and to `d_scores`; returns the gradient of D.
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
    let (head, last) = (io.head, n - 1);
    let dy = Mat::strided(io.dy, n, p, e);
    let dy_row = |i: usize| &io.dy[i * e..][..p];
    let (state, d_state) = (Mat::new(io.state, p, n_state), Mat::new(io.d_state, p, n_state));

    small(backend, Into::Set, s.d_kernel, n, dy, views.x(head).t());
    d_cum.fill(0.0);
    backend.isa.run(|| {
        for i in 0..n {
            let first = decays.first(i);
            let kernel = &mut s.kernel[i * n..][..n];
            kernel[..first].fill(0.0);
            kernel[i + 1..].fill(0.0);
            let live = first..i + 1;
            let cum = decays.cum[i];
            let flow = &mut s.d_kernel[i * n..][live.clone()];
            for (((((flow, kernel), d_score), score), c), dt) in flow
                .iter_mut()
                .zip(&mut kernel[live.clone()])
                .zip(&mut s.d_scores[i * n..][live.clone()])
                .zip(&s.scores[i * n..][live.clone()])
                .zip(&decays.cum[live.clone()])
                .zip(&decays.dt[live])
            {
                let decay = math::exp(cum - c);
                let weight = *flow * decay * dt;
                *kernel = score * decay;
                *d_score += weight;
                *flow = weight * score;
            }
            // What flows through e^{c_i − c_j}, j < i.
            let flow = &flow[..i - first];
            for (d, f) in d_cum[first..i].iter_mut().zip(flow) {
                *d -= f;
            }
            d_cum[i] += math::sum_map([flow], |[f]| f);
        }
    });

    small(backend, Into::Set, s.u, p, Mat::new(&*s.kernel, n, n).t(), dy);
    small(backend, Into::Set, s.weighted, p, views.b(), d_state.t());
    let mut d_skip = 0.0;
    backend.isa.run(|| {
        let mut through_end = 0.0;
        for j in 0..n {
            let (x, dy, leaving) = (views.x_row(head, j), dy_row(j), decays.leaving(j));
            let (u, from_end) = (&mut s.u[j * p..][..p], &s.weighted[j * p..][..p]);
            if j < last {
                let flow = decays.dt[j] * leaving * math::dot(x, from_end);
                d_cum[j] -= flow;
                through_end += flow;
            }
            for (u, f) in u.iter_mut().zip(from_end) {
                *u += leaving * f;
            }
            d_dt[j] = math::dot(x, u);
            d_skip += math::dot(x, dy);
            for ((dx, u), dy) in dx(j).iter_mut().zip(&*u).zip(dy) {
                *dx = decays.dt[j] * u + io.skip * dy;
            }
        }
        d_cum[last] += through_end + decays.whole() * math::dot(io.state, io.d_state);
        weigh(s.weighted, p, |i| decays.entering(i), dy_row);
    });

    small(backend, Into::Set, s.from_state, n_state, Mat::new(&*s.weighted, n, p), state);
    backend.isa.run(|| {
        for (i, dc) in s.from_state.chunks_exact(n_state).enumerate() {
            d_cum[i] += math::dot(dc, views.c_row(i));
            let to = &mut d_bc[i * 2 * n_state + n_state..][..n_state];
            to.iter_mut().zip(dc).for_each(|(t, d)| *t += d);
        }
        weigh(s.weighted, p, |j| decays.leaving(j) * decays.dt[j], |j| views.x_row(head, j));
    });
    small(backend, Into::Add, d_bc, 2 * n_state, Mat::new(&*s.weighted, n, p), d_state);

    // c_i = Σ_{l ≤ i} Δt_l A, so the cotangent of Δt_l·A is the sum of those of c_i from l on.
    for l in (0..last).rev() {
        d_cum[l] += d_cum[l + 1];
    }
    d_skip
}
