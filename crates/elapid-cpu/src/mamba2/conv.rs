//! Causal depthwise convolution with SiLU, Δt, and their adjoints.

use elapid_tensor::{DType, Mamba2Inputs, State};

use super::{Dims, Documents, Front, Params, Projected};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::Tensor;

/// Copies the conv inputs of positions `from..` of sequence `b` into the rows of `dst`, as many channels from `channel` on as a
/// row of `width` holds; `from` may reach K−1 positions back before the sequence, into the initial state.
#[inline(always)]
fn load_inputs(
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    b: usize,
    from: isize,
    (channel, width): (usize, usize),
    dst: &mut [f32],
) {
    let before = dims.spec.conv_kernel - 1;
    for (l, row) in (from..).zip(dst.chunks_exact_mut(width)) {
        if l >= 0 {
            let at = (b * dims.len + l as usize) * dims.proj + dims.e;
            inputs.projected.floats().load(at + channel, row);
        } else if let Some(state) = &inputs.initial {
            let at = (b * before + (l + before as isize) as usize) * dims.c;
            row.copy_from_slice(&state.conv.f32()[at + channel..][..width]);
        } else {
            row.fill(0.0);
        }
    }
}

/// The convolution at position `l` of sequence `b`, before SiLU; `input(tap)` gives the inputs that a tap sees.
#[inline(always)]
fn convolve<'x>(
    dims: &Dims,
    params: &Params,
    documents: &Documents,
    (b, l): (usize, usize),
    (channel, width): (usize, usize),
    input: impl Fn(usize) -> &'x [f32],
    dst: &mut [f32],
) {
    let before = dims.spec.conv_kernel - 1;
    dst.copy_from_slice(&params.conv_bias[channel..][..width]);
    for tap in 0..=before {
        if documents.sees(b, l, (l + tap) as isize - before as isize) {
            let taps = &params.conv_weight[tap * dims.c + channel..][..width];
            for ((p, w), x) in dst.iter_mut().zip(taps).zip(input(tap)) {
                *p += w * x;
            }
        }
    }
}

/// Convolution, SiLU and Δt of all positions.
pub(super) fn front(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    params: &Params,
    documents: &Documents,
) -> Front {
    let (c, k, heads) = (dims.c, dims.spec.conv_kernel, dims.spec.heads);
    let rows = dims.rows();
    let mut act = backend.pool.take::<f32>(rows * c);
    let mut dt = backend.pool.take::<f32>(heads * rows);
    let mut cum = backend.pool.take::<f32>(heads * rows);
    let shared_act = Shared::new(act.as_mut_slice::<f32>(rows * c));
    let shared_dt = Shared::new(dt.as_mut_slice::<f32>(heads * rows));
    let shared_cum = Shared::new(cum.as_mut_slice::<f32>(heads * rows));

    backend.workers.each(dims.batch * dims.chunks, |piece| {
        let (b, first) = (piece / dims.chunks, piece % dims.chunks * dims.q);
        let n = dims.q.min(dims.len - first);
        let mut scratch = backend.pool.take::<f32>((k + 1) * c + 3 * heads);
        let (ring, rest) = scratch.as_mut_slice::<f32>((k + 1) * c + 3 * heads).split_at_mut(k * c);
        let (pre, rest) = rest.split_at_mut(c);
        let (raw, rest) = rest.split_at_mut(heads);
        let (step, sum) = rest.split_at_mut(heads);
        sum.fill(0.0);
        vectorize!(backend.isa, || {
            // Inputs of the last K positions: that of position s in place (s + K) mod K.
            let before = first as isize - (k as isize - 1);
            for s in before..first as isize {
                let place = (s + k as isize) as usize % k * c;
                load_inputs(dims, inputs, b, s, (0, c), &mut ring[place..place + c]);
            }
            for l in first..first + n {
                let place = l % k * c;
                load_inputs(dims, inputs, b, l as isize, (0, c), &mut ring[place..place + c]);
                let input = |tap: usize| &ring[(l + 1 + tap) % k * c..][..c];
                convolve(dims, params, documents, (b, l), (0, c), input, pre);
                // SAFETY: pieces cover disjoint rows.
                let act = unsafe { shared_act.slice((b * dims.len + l) * c, c) };
                for (a, p) in act.iter_mut().zip(&*pre) {
                    *a = math::silu(*p);
                }

                load_dt(dims, inputs, b * dims.len + l, raw);
                for (((step, sum), raw), (bias, a)) in
                    step.iter_mut().zip(&mut *sum).zip(&*raw).zip(params.dt_bias.iter().zip(&params.a))
                {
                    *step = clamped(math::softplus(raw + bias), dims.spec.dt_limit);
                    *sum += *step * a;
                }
                for (h, (step, sum)) in step.iter().zip(&*sum).enumerate() {
                    let at = (b * heads + h) * dims.len + l;
                    // SAFETY: pieces cover disjoint positions.
                    unsafe {
                        shared_dt.slice(at, 1)[0] = *step;
                        shared_cum.slice(at, 1)[0] = *sum;
                    }
                }
            }
        });
    });
    Front { act, dt, cum }
}

/// Δt clamped to its limits; NaN stays NaN.
#[inline(always)]
pub(super) fn clamped(dt: f32, (low, high): (f32, f32)) -> f32 {
    dt.clamp(low, high)
}

/// The dt `[H]` of the projection at one row, before bias and softplus.
#[inline(always)]
pub(super) fn load_dt(dims: &Dims, inputs: &Mamba2Inputs<Tensor>, row: usize, dst: &mut [f32]) {
    inputs.projected.floats().load(row * dims.proj + dims.e + dims.c, dst);
}

/// The last K−1 conv inputs `[B, K−1, C]`, zeros where they belong to a document before the last position's.
pub(super) fn last_inputs(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    documents: &Documents,
) -> Tensor {
    let (c, before, len) = (dims.c, dims.spec.conv_kernel - 1, dims.len);
    let mut last = backend.pool.take::<f32>(dims.batch * before * c);
    let rows = last.as_mut_slice::<f32>(dims.batch * before * c);
    for b in 0..dims.batch {
        let rows = &mut rows[b * before * c..][..before * c];
        let from = len as isize - before as isize;
        load_inputs(dims, inputs, b, from, (0, c), rows);
        for (l, row) in (from..).zip(rows.chunks_exact_mut(c)) {
            if !documents.sees(b, len - 1, l) {
                row.fill(0.0);
            }
        }
    }
    Tensor::new(last, &[dims.batch, before, c], DType::F32)
}

/// Gradients of the convolution's parameters.
pub(super) struct ConvGrads {
    /// `[K, C]`.
    pub(super) weight: Vec<f32>,
    /// `[C]`.
    pub(super) bias: Vec<f32>,
}

/// Channels that an adjoint takes at a time: what it needs of a chunk's positions stays in the second cache.
const CHANNELS: usize = 256;

/// Adjoint of the convolution. `d_act` `[B·L, C]` is the cotangent of its output after SiLU; the convolution itself is computed
/// again. The cotangent of its input goes to the columns of `d_projected` `[B·L, E + C + H]`, that of the initial conv state is
/// returned as `[B, K−1, C]`.
pub(super) fn adjoint(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    params: &Params,
    documents: &Documents,
    d_act: &[f32],
    d_state: Option<&State<Tensor>>,
    d_projected: &Projected<'_>,
) -> (ConvGrads, Block) {
    let (c, k, len) = (dims.c, dims.spec.conv_kernel, dims.len);
    let before = k - 1;
    let mut d_initial = backend.pool.take::<f32>(dims.batch * before * c);
    let initial = Shared::new(d_initial.as_mut_slice::<f32>(dims.batch * before * c));
    let pieces = dims.batch * dims.chunks;
    let mut partial = backend.pool.zeros::<f32>(pieces * (k + 1) * c);
    let partials = Shared::new(partial.as_mut_slice::<f32>(pieces * (k + 1) * c));
    backend.workers.each(pieces, |piece| {
        let (b, first) = (piece / dims.chunks, piece % dims.chunks * dims.q);
        let n = dims.q.min(len - first);
        // Outputs that see an input of this piece.
        let seeing = len.min(first + n + before) - first;
        let size = (before + 2 * seeing + 1) * CHANNELS.min(c);
        let mut scratch = backend.pool.take::<f32>(size);
        let (row, scratch) = scratch.as_mut_slice::<f32>(size).split_at_mut(CHANNELS.min(c));
        // SAFETY: each piece has its own part.
        let (weight, bias) = unsafe { partials.slice(piece * (k + 1) * c, (k + 1) * c) }.split_at_mut(k * c);
        vectorize!(backend.isa, || {
            for channel in (0..c).step_by(CHANNELS) {
                let width = CHANNELS.min(c - channel);
                let (x, rest) = scratch.split_at_mut((before + seeing) * width);
                let d_pre = &mut rest[..seeing * width];
                load_inputs(dims, inputs, b, first as isize - before as isize, (channel, width), x);
                for (i, d) in d_pre.chunks_exact_mut(width).enumerate() {
                    let l = first + i;
                    let input = |tap: usize| &x[(i + tap) * width..][..width];
                    convolve(dims, params, documents, (b, l), (channel, width), input, d);
                    for (d, d_act) in d.iter_mut().zip(&d_act[(b * len + l) * c + channel..]) {
                        *d = math::silu_slope(*d) * d_act;
                    }
                }
                let side = Side { dims, params, documents, d_state, d_pre, b, first, channel, width };
                for i in 0..n {
                    let l = first + i;
                    let at = (b * len + l) * dims.proj + dims.e + channel;
                    // SAFETY: pieces cover disjoint rows.
                    unsafe { d_projected.write(at, &mut row[..width], |row| side.input(l as isize, row)) };
                    let d = &d_pre[i * width..][..width];
                    for (g, d) in bias[channel..].iter_mut().zip(d) {
                        *g += d;
                    }
                    for tap in 0..k {
                        if documents.sees(b, l, (l + tap) as isize - before as isize) {
                            let x = &x[(i + tap) * width..][..width];
                            for ((g, d), x) in weight[tap * c + channel..].iter_mut().zip(d).zip(x) {
                                *g += d * x;
                            }
                        }
                    }
                }
                if first == 0 {
                    for s in 0..before {
                        let at = (b * before + s) * c + channel;
                        // SAFETY: a sequence has one first piece.
                        side.input(s as isize - before as isize, unsafe { initial.slice(at, width) });
                    }
                }
            }
        });
    });

    let mut grads = ConvGrads { weight: vec![0.0; k * c], bias: vec![0.0; c] };
    for part in partial.as_slice::<f32>(pieces * (k + 1) * c).chunks_exact((k + 1) * c) {
        grads.weight.iter_mut().zip(part).for_each(|(g, p)| *g += p);
        grads.bias.iter_mut().zip(&part[k * c..]).for_each(|(g, p)| *g += p);
    }
    (grads, d_initial)
}

/// What the cotangents of the inputs of one piece, in some channels, come from.
struct Side<'a> {
    dims: &'a Dims,
    params: &'a Params,
    documents: &'a Documents,
    d_state: Option<&'a State<Tensor>>,
    /// `[positions from first on, width]`: cotangent of the convolution before SiLU.
    d_pre: &'a [f32],
    b: usize,
    first: usize,
    channel: usize,
    width: usize,
}

impl Side<'_> {
    /// The cotangent of the input at position `s`, from −(K−1) on: Σ over taps of w · d_pre at the position that a tap serves.
    #[inline(always)]
    fn input(&self, s: isize, row: &mut [f32]) {
        let Self { dims, b, first, channel, width, .. } = *self;
        let (before, len) = (dims.spec.conv_kernel - 1, dims.len);
        row.fill(0.0);
        for tap in 0..=before {
            let l = s + (before - tap) as isize;
            if l >= 0 && (l as usize) < len && self.documents.sees(b, l as usize, s) {
                let d = &self.d_pre[(l as usize - first) * width..][..width];
                let taps = &self.params.conv_weight[tap * dims.c + channel..][..width];
                for ((r, w), d) in row.iter_mut().zip(taps).zip(d) {
                    *r += w * d;
                }
            }
        }
        // The final state holds the inputs of the last K−1 positions, as far as the last document reaches.
        if let Some(state) = self.d_state
            && s >= len as isize - before as isize
            && self.documents.sees(b, len - 1, s)
        {
            let at = (b * before + (s + before as isize) as usize - len) * dims.c + channel;
            for (r, d) in row.iter_mut().zip(&state.conv.f32()[at..at + width]) {
                *r += d;
            }
        }
    }
}
