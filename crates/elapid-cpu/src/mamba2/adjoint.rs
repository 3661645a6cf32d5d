//! Adjoint of the `mamba2` op.
//!
//! Saved are the scan's output and the states that enter chunks; conv and Δt are computed again. With R_ij = (C_i·B_j) e^{c_i − c_j} inside
//! a chunk, S the state that enters it, Ŝ the cotangent of the state that leaves it, and Y the cotangent of y:
//!
//! - cotangent of Δt_j x_j: u_j = Σ_i R_ij Y_i + e^{c_n − c_j} Ŝ B_j, so dx_j = Δt_j u_j + D Y_j and dΔt_j = x_j·u_j;
//! - cotangent of C_i·B_j: (Y_i·x_j) e^{c_i − c_j} Δt_j, summed over the heads of the group before it meets B and C;
//! - C_i gets e^{c_i} Sᵀ Y_i, B_j gets e^{c_n − c_j} Δt_j Ŝᵀ x_j;
//! - c_i gets what flows through each exponential it stands in. The diagonal, whose exponent is 0, is left out, since
//!   adding and subtracting it would cost digits.

mod unit;

use std::ops::Range;

use elapid_tensor::{DType, Mamba2Grads, Mamba2Inputs, Mamba2Sinks, Mamba2Spec, Mamba2Weights, State};

use self::unit::UnitScratch;
use super::conv::{self, ConvSums, Tile, add};
use super::scan::{self, Decays, Direction, Span, Views, weigh};
use super::target::{self, Target};
use super::{Call, Dims, Front, Unit, gate};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::matmul::{Into, Mat, small};
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::{Buffer, Floats, Tensor};

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
    let call = Call::new(backend, Dims::new(spec, &inputs.projected), inputs, weights);
    let dims = &call.dims;
    let front = conv::front(&call);

    let dtype = inputs.projected.dtype();
    let len = dims.rows() * dims.proj;
    let mut projected = target::take(backend, dtype, len);
    let d_projected = Target::new(&mut projected, dtype, len);
    let [y, states] = saved else { panic!("the forward op saves two tensors") };
    let mut gate = gate::Adjoint::new(&call, y.f32(), dy);
    let mut out = ScanGrads::new(&call);
    let threads = backend.workers.threads();
    let span = dims.len.min(dims.part(threads) * dims.q);
    let mut d_scan = backend.pool.take::<f32>(dims.batch * span * dims.e);
    let d_scan = d_scan.as_mut_slice::<f32>(dims.batch * span * dims.e);
    let d_last = d_state.map(|state| state.ssm.f32());
    let outputs = out.shared(dims);
    let mut d_ssm = scan::starting_states(backend, dims, d_last);
    for part in dims.parts(threads).rev() {
        gate.part(part.clone(), d_scan, span, &d_projected);
        let pass = Pass {
            call: &call,
            front: &front,
            states: states.floats(),
            d_scan,
            span,
            first: part.start * dims.q,
            d_projected: &d_projected,
            asked: d_last.is_some(),
            out: &outputs,
        };
        if dims.in_one_pass(threads) {
            pass.lanes(part, &mut d_ssm);
        } else {
            pass.phases(&mut d_ssm);
        }
    }
    let d_norm = gate.finish();
    groups(&call, &d_projected, &mut out);
    let heads = steps(&call, &front, &d_projected, &out);
    let (d_conv, d_conv_state) = out.conv.finish(&call, d_state, &d_projected);

    let mut accumulate = |slot, gradient: &[f32]| add(grads.slot_mut(slot), gradient);
    let k = spec.conv_kernel;
    let taps: Vec<f32> = (0..dims.c * k).map(|i| d_conv.weight[i % k * dims.c + i / k]).collect();
    accumulate(sinks.conv_weight, &taps);
    if let Some(bias) = sinks.conv_bias {
        accumulate(bias, &d_conv.bias);
    }
    accumulate(sinks.dt_bias, &heads.dt_bias);
    accumulate(sinks.a_log, &heads.a_log);
    accumulate(sinks.d, &heads.d);
    accumulate(sinks.norm_weight, &d_norm);

    let shape = [dims.batch, dims.len, dims.proj];
    Mamba2Grads {
        projected: Tensor::new(projected, &shape, dtype),
        initial: inputs.initial.as_ref().map(|s| State {
            conv: Tensor::new(d_conv_state, s.conv.shape(), DType::F32),
            ssm: Tensor::new(d_ssm, s.ssm.shape(), DType::F32),
        }),
    }
}

/// What the units of some chunks read, and where they write.
struct Pass<'a> {
    call: &'a Call<'a>,
    front: &'a Front,
    /// The states that enter chunks, `[B, chunks, H, P, N]`.
    states: Floats<'a>,
    /// Y `[B, span, E]`, from position `first` of each sequence on.
    d_scan: &'a [f32],
    span: usize,
    first: usize,
    d_projected: &'a Target<'a>,
    /// Whether the state that leaves the last chunk has a cotangent.
    asked: bool,
    out: &'a Outputs<'a>,
}

/// What the units give before heads, blocks and chunks are put together.
struct ScanGrads {
    /// `[blocks, B·L, 2·N]`: cotangents of `[B|C]` from one block of heads.
    blocks: Block,
    /// `[B, H, L]`: cotangent of Δt, the part through A not included.
    dt: Block,
    /// `[B, H, L]`: cotangent of Δt·A.
    da: Block,
    /// `[B, chunks, H]`.
    d: Block,
    conv: ConvSums,
}

/// [`ScanGrads`] as units write it.
struct Outputs<'a> {
    blocks: Shared<'a, f32>,
    dt: Shared<'a, f32>,
    da: Shared<'a, f32>,
    d: Shared<'a, f32>,
    conv: (Shared<'a, f32>, Shared<'a, f32>),
}

impl ScanGrads {
    fn new(call: &Call<'_>) -> Self {
        let [blocks, dt, d] = Self::lens(&call.dims);
        let take = |len| call.backend.pool.take::<f32>(len);
        Self { blocks: take(blocks), dt: take(dt), da: take(dt), d: take(d), conv: ConvSums::new(call) }
    }

    fn lens(dims: &Dims) -> [usize; 3] {
        let (rows, heads) = (dims.rows(), dims.spec.heads);
        let blocks = dims.spec.groups * dims.blocks;
        [blocks * rows * 2 * dims.spec.state, heads * rows, dims.batch * dims.chunks * heads]
    }

    fn shared(&mut self, dims: &Dims) -> Outputs<'_> {
        let [blocks, dt, d] = Self::lens(dims);
        Outputs {
            blocks: Shared::new(self.blocks.as_mut_slice(blocks)),
            dt: Shared::new(self.dt.as_mut_slice(dt)),
            da: Shared::new(self.da.as_mut_slice(dt)),
            d: Shared::new(self.d.as_mut_slice(d)),
            conv: self.conv.shared(dims),
        }
    }
}

/// Gradients of the parameters of single heads, `[H]` each.
struct HeadGrads {
    dt_bias: Vec<f32>,
    a_log: Vec<f32>,
    d: Vec<f32>,
}

impl Pass<'_> {
    /// The adjoints of all units, whose chunks go to all threads, from the cotangents of the final states to those of the initial ones,
    /// `[B, H, P, N]`.
    fn phases(&self, d_running: &mut Block) {
        let Pass { call, front, .. } = *self;
        let Call { backend, ref dims, .. } = *call;
        let asking = usize::from(call.initial().is_none())..dims.chunks;
        let mut d_states = scan::chunk_products(call, asking, |unit, d_states, s| {
            let span = Span::new(&call.documents, unit);
            for (h, head) in unit.heads.clone().enumerate() {
                let decays = Decays::new(dims, front, span, unit, head);
                vectorize!(backend.isa, || {
                    decays.entering(s.entering);
                    weigh(s.weighted, unit.width, h, s.entering, |i| self.dy_row(unit, head, i));
                });
            }
            self.ask(unit, Into::Set, s.weighted, d_states);
        });
        scan::pass_states(call, front, Direction::Backwards, d_running, &mut d_states);
        let d_states = d_states.as_slice::<f32>(dims.states());
        backend.workers.each(dims.units(), |index| {
            let unit = dims.unit(index);
            let mut block = backend.pool.take::<f32>(UnitScratch::len(dims));
            let mut s = UnitScratch::new(dims, &unit, block.as_mut_slice(UnitScratch::len(dims)));
            self.unit(&unit, &d_states[dims.first_state(&unit)..], &mut s);
        });
    }

    /// The same for some chunks, one block of heads of a sequence after the other on each thread, from the cotangents of the states that
    /// leave them to those of the states that enter them, `[B, H, P, N]`.
    fn lanes(&self, chunks: Range<usize>, d_states: &mut Block) {
        let Pass { call, front, .. } = *self;
        let Call { backend, ref dims, .. } = *call;
        let d_states = Shared::new(d_states.as_mut_slice::<f32>(dims.batch * dims.e * dims.spec.state));
        backend.workers.each(dims.lanes(), |lane| {
            let mut block = backend.pool.take::<f32>(UnitScratch::len(dims));
            let block = block.as_mut_slice(UnitScratch::len(dims));
            for chunk in chunks.clone().rev() {
                let unit = dims.unit_of(chunk, lane);
                let mut s = UnitScratch::new(dims, &unit, block);
                // SAFETY: each (sequence, head) belongs to one lane.
                let d_state = unsafe { d_states.slice(dims.running_at(&unit), unit.width * dims.spec.state) };
                self.unit(&unit, d_state, &mut s);
                if call.enters(&unit) {
                    scan::decay_states(call, front, &unit, d_state);
                    self.ask(&unit, Into::Add, s.heads.weighted, d_state);
                }
            }
        });
    }

    /// Whether the state that leaves the chunk has a cotangent.
    fn leaves(&self, unit: &Unit) -> bool {
        self.asked || unit.chunk + 1 < self.call.dims.chunks
    }

    /// Place of Y of a head at the first position of the chunk.
    #[inline(always)]
    fn dy_at(&self, unit: &Unit, head: usize) -> usize {
        let dims = &self.call.dims;
        (unit.b * self.span + unit.row - self.first) * dims.e + head * dims.spec.head_dim
    }

    /// Y of a head at position `i` of the chunk, `[P]`.
    #[inline(always)]
    fn dy_row(&self, unit: &Unit, head: usize, i: usize) -> &[f32] {
        let dims = &self.call.dims;
        let at = self.dy_at(unit, head) + i * dims.e;
        &self.d_scan[at..at + dims.spec.head_dim]
    }

    /// What a chunk's outputs ask of the state that enters it, Σ_i e^{c_i} Y_i C_iᵀ, from `weighted` `[n, heads·P]`, e^{c_i} Y_i.
    fn ask(&self, unit: &Unit, into: Into, weighted: &[f32], d_states: &mut [f32]) {
        let Pass { call, front, .. } = *self;
        let c = Views::new(&call.dims, front, unit, &[]).c();
        let weighted = Mat::new(weighted, unit.n, unit.width).t();
        small(call.backend, into, d_states, call.dims.spec.state, weighted, c);
    }
}

/// The adjoint of the convolution in the channels of B and C, from the sums over the blocks of heads of each group.
fn groups(call: &Call<'_>, d_projected: &Target<'_>, out: &mut ScanGrads) {
    let Call { backend, ref dims, .. } = *call;
    let (rows, width, groups) = (dims.rows(), dims.spec.state, dims.spec.groups);
    let ScanGrads { blocks, conv, .. } = out;
    let blocks = blocks.as_slice::<f32>(groups * dims.blocks * rows * 2 * width);
    let conv = conv.shared(dims);
    backend.workers.each(dims.batch * dims.chunks * 2 * groups, |piece| {
        let (piece, part) = (piece / (2 * groups), piece % (2 * groups));
        let (b, chunk, group) = (piece / dims.chunks, piece % dims.chunks, part / 2);
        let (from, channel) =
            if part % 2 == 0 { (0, dims.b_channel(group)) } else { (width, dims.c_channel(group)) };
        let tile = Tile::new(call, b, chunk, channel, width);
        let (first, n) = (tile.first, tile.n);
        let len = tile.inputs_len() + (2 * n + 1) * width;
        let mut block = backend.pool.take::<f32>(len);
        let (inputs, rest) = block.as_mut_slice::<f32>(len).split_at_mut(tile.inputs_len());
        let (act, rest) = rest.split_at_mut(n * width);
        let (d, sum) = rest.split_at_mut(n * width);
        vectorize!(backend.isa, || {
            tile.forward_with_slope(inputs, act, d);
            for (i, d) in d.chunks_exact_mut(width).enumerate() {
                sum.fill(0.0);
                for block in group * dims.blocks..(group + 1) * dims.blocks {
                    let row = block * rows + b * dims.len + first + i;
                    add(sum, &blocks[row * 2 * width + from..][..width]);
                }
                d.iter_mut().zip(&*sum).for_each(|(d, sum)| *d *= sum);
            }
        });
        vectorize!(backend.isa, || tile.adjoint(inputs, d, sum, d_projected, &conv));
    });
}

/// Through Δt = clamp(softplus(dt + dt_bias)) and A: the dt columns of `d_projected` and the per-head parameters.
fn steps(call: &Call<'_>, front: &Front, d_projected: &Target<'_>, out: &ScanGrads) -> HeadGrads {
    let Call { backend, ref dims, inputs, ref params, .. } = *call;
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
        let padded = params.dt_bias.len();
        let mut scratch = backend.pool.take::<f32>(2 * padded + heads);
        let (raw, rest) = scratch.as_mut_slice::<f32>(2 * padded + heads).split_at_mut(padded);
        let (slope, spare) = rest.split_at_mut(padded);
        raw.fill(0.0);
        vectorize!(backend.isa, || {
            for l in first..dims.len.min(first + dims.q) {
                let row = b * dims.len + l;
                conv::load_dt(dims, inputs, row, &mut raw[..heads]);
                for ((slope, raw), bias) in slope.iter_mut().zip(&*raw).zip(&params.dt_bias) {
                    let x = raw + bias;
                    let step = math::softplus(x);
                    *slope = if (low <= step) & (step <= high) { math::sigmoid(x) } else { 0.0 };
                }
                let at = row * dims.proj + dims.e + dims.c;
                // SAFETY: pieces cover disjoint rows.
                let to = unsafe { d_projected.row(at, spare) };
                for (h, (d_raw, slope)) in to.iter_mut().zip(&*slope).enumerate() {
                    let at = (b * heads + h) * dims.len + l;
                    *d_raw = slope * (ddt[at] + params.a[h] * da[at]);
                    dt_bias[h] += f64::from(*d_raw);
                    a_log[h] += f64::from(dt[at] * da[at]) * f64::from(params.a[h]);
                }
                // SAFETY: as above.
                unsafe { d_projected.done(at, to) };
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
