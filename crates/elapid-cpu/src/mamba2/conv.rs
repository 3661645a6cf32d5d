//! Causal depthwise convolution with SiLU, Δt, and their adjoints.

use elapid_tensor::{DType, Mamba2Inputs, State};

use super::{Dims, Documents, Front, Params};
use crate::CpuBackend;
use crate::math;
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::Tensor;

/// Copies the conv inputs of positions `from..to` of sequence `b` into `dst` `[to − from, C]`; `from` may reach K−1
/// positions back before the sequence, into the initial state.
#[inline(always)]
fn load_inputs(
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    b: usize,
    from: isize,
    to: isize,
    dst: &mut [f32],
) {
    let (c, before) = (dims.c, dims.spec.conv_kernel - 1);
    for (l, row) in (from..to).zip(dst.chunks_exact_mut(c)) {
        if l >= 0 {
            inputs.projected.floats().load((b * dims.len + l as usize) * dims.proj + dims.e, row);
        } else if let Some(state) = &inputs.initial {
            let at = (b * before + (l + before as isize) as usize) * c;
            row.copy_from_slice(&state.conv.f32()[at..at + c]);
        } else {
            row.fill(0.0);
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
    keep_pre: bool,
) -> Front {
    let (c, k, heads) = (dims.c, dims.spec.conv_kernel, dims.spec.heads);
    let rows = dims.rows();
    let mut pre = backend.pool.take::<f32>(if keep_pre { rows * c } else { 0 });
    let mut act = backend.pool.take::<f32>(rows * c);
    let mut dt = backend.pool.take::<f32>(heads * rows);
    let mut cum = backend.pool.take::<f32>(heads * rows);
    let shared_pre = Shared::new(pre.as_mut_slice::<f32>(if keep_pre { rows * c } else { 0 }));
    let shared_act = Shared::new(act.as_mut_slice::<f32>(rows * c));
    let shared_dt = Shared::new(dt.as_mut_slice::<f32>(heads * rows));
    let shared_cum = Shared::new(cum.as_mut_slice::<f32>(heads * rows));

    backend.workers.each(dims.batch * dims.chunks, |piece| {
        let (b, first) = (piece / dims.chunks, piece % dims.chunks * dims.q);
        let n = dims.q.min(dims.len - first);
        let mut scratch = backend.pool.take::<f32>((n + k - 1) * c + c);
        let (rows_in, row_pre) =
            scratch.as_mut_slice::<f32>((n + k - 1) * c + c).split_at_mut((n + k - 1) * c);
        backend.isa.run(|| {
            load_inputs(dims, inputs, b, first as isize - (k as isize - 1), (first + n) as isize, rows_in);
            for i in 0..n {
                let l = first + i;
                row_pre.copy_from_slice(&params.conv_bias);
                for tap in 0..k {
                    if documents.sees(b, l, (l + tap) as isize - (k as isize - 1)) {
                        let taps = &params.conv_weight[tap * c..][..c];
                        let input = &rows_in[(i + tap) * c..][..c];
                        for ((p, w), x) in row_pre.iter_mut().zip(taps).zip(input) {
                            *p += w * x;
                        }
                    }
                }
                let at = (b * dims.len + l) * c;
                // SAFETY: pieces cover disjoint rows.
                let row_act = unsafe { shared_act.slice(at, c) };
                for (a, p) in row_act.iter_mut().zip(&*row_pre) {
                    *a = math::silu(*p);
                }
                if keep_pre {
                    // SAFETY: as above.
                    unsafe { shared_pre.slice(at, c) }.copy_from_slice(row_pre);
                }
            }
        });
        let mut raw = vec![0.0; heads];
        let mut sum = vec![0.0f32; heads];
        for l in first..first + n {
            load_dt(dims, inputs, b * dims.len + l, 0, &mut raw);
            for h in 0..heads {
                let at = (b * heads + h) * dims.len + l;
                let step = clamped(math::softplus(raw[h] + params.dt_bias[h]), dims.spec.dt_limit);
                sum[h] += step * params.a[h];
                // SAFETY: pieces cover disjoint positions.
                unsafe {
                    shared_dt.slice(at, 1)[0] = step;
                    shared_cum.slice(at, 1)[0] = sum[h];
                }
            }
        }
    });
    Front { pre: keep_pre.then_some(pre), act, dt, cum }
}

/// Δt clamped to its limits; NaN stays NaN.
pub(super) fn clamped(dt: f32, (low, high): (f32, f32)) -> f32 {
    dt.clamp(low, high)
}

/// The dt of heads from `head` on in the projection at one row, before bias and softplus.
pub(super) fn load_dt(dims: &Dims, inputs: &Mamba2Inputs<Tensor>, row: usize, head: usize, dst: &mut [f32]) {
    inputs.projected.floats().load(row * dims.proj + dims.e + dims.c + head, dst);
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
        load_inputs(dims, inputs, b, from, len as isize, rows);
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

/// Adjoint of the convolution. `d_act` `[B·L, C]` is the cotangent of its output after SiLU and is overwritten; the
/// cotangent of its input goes to the columns of `d_projected` `[B·L, E + C + H]`, that of the initial conv state is
/// returned as `[B, K−1, C]`.
pub(super) fn adjoint(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    params: &Params,
    documents: &Documents,
    pre: &Block,
    d_act: &mut [f32],
    d_state: Option<&State<Tensor>>,
    d_projected: &Shared<'_, f32>,
) -> (ConvGrads, Block) {
    let (c, k, len, rows) = (dims.c, dims.spec.conv_kernel, dims.len, dims.rows());
    let before = k - 1;
    let pre = pre.as_slice::<f32>(rows * c);
    backend.workers.rows(d_act, c, 16, |first, chunk| {
        backend.isa.run(|| {
            for (d, p) in chunk.iter_mut().zip(&pre[first * c..]) {
                *d *= math::silu_slope(*p);
            }
        });
    });
    let d_pre = &*d_act;

    // Cotangent of the input at position s (from −(K−1) on): Σ over taps of w · d_pre at the position that tap serves.
    let gather = |b: usize, s: isize, row: &mut [f32]| {
        for tap in 0..k {
            let l = s + (before - tap) as isize;
            if l >= 0 && (l as usize) < len && documents.sees(b, l as usize, s) {
                let d = &d_pre[(b * len + l as usize) * c..][..c];
                let taps = &params.conv_weight[tap * c..][..c];
                for ((r, w), d) in row.iter_mut().zip(taps).zip(d) {
                    *r += w * d;
                }
            }
        }
        // The final state holds the inputs of the last K−1 positions, as far as the last document reaches.
        if let Some(state) = d_state
            && s >= len as isize - before as isize
            && documents.sees(b, len - 1, s)
        {
            let at = (b * before + (s + before as isize) as usize - len) * c;
            for (r, d) in row.iter_mut().zip(&state.conv.f32()[at..at + c]) {
                *r += d;
            }
        }
    };

    let pieces = dims.batch * dims.chunks;
    let mut partial = backend.pool.zeros::<f32>(pieces * (k + 1) * c);
    let partials = Shared::new(partial.as_mut_slice::<f32>(pieces * (k + 1) * c));
    backend.workers.each(pieces, |piece| {
        let (b, first) = (piece / dims.chunks, piece % dims.chunks * dims.q);
        let n = dims.q.min(len - first);
        let mut scratch = backend.pool.take::<f32>((n + before) * c);
        let rows_in = scratch.as_mut_slice::<f32>((n + before) * c);
        // SAFETY: each piece has its own part.
        let (weight, bias) = unsafe { partials.slice(piece * (k + 1) * c, (k + 1) * c) }.split_at_mut(k * c);
        backend.isa.run(|| {
            load_inputs(dims, inputs, b, first as isize - before as isize, (first + n) as isize, rows_in);
            for i in 0..n {
                let l = first + i;
                let row = b * len + l;
                // SAFETY: pieces cover disjoint rows.
                let d_input = unsafe { d_projected.slice(row * dims.proj + dims.e, c) };
                d_input.fill(0.0);
                gather(b, l as isize, d_input);
                let d = &d_pre[row * c..][..c];
                for (g, d) in bias.iter_mut().zip(d) {
                    *g += d;
                }
                for tap in 0..k {
                    if documents.sees(b, l, (l + tap) as isize - before as isize) {
                        let x = &rows_in[(i + tap) * c..][..c];
                        for ((g, d), x) in weight[tap * c..][..c].iter_mut().zip(d).zip(x) {
                            *g += d * x;
                        }
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

    let mut d_initial = backend.pool.zeros::<f32>(dims.batch * before * c);
    for (i, row) in d_initial.as_mut_slice::<f32>(dims.batch * before * c).chunks_exact_mut(c).enumerate() {
        gather(i / before, (i % before) as isize - before as isize, row);
    }
    (grads, d_initial)
}
