//! Clipping and AdamW over flat buffers.

use elapid_tensor::{AdamW, Clipping};

use crate::CpuBackend;
use crate::comm;
use crate::math;
use crate::tensor::{Buffer, Tensor};

/// Numbers of one piece.
const PIECE: usize = 1 << 16;

/// `[norm, factor, finite]`; see the contract.
pub(crate) fn clip(backend: &CpuBackend, grads: &Buffer, loss: &Tensor, clipping: &Clipping<'_>) -> Tensor {
    let &Clipping { scale, max_norm, uncounted, over } = clipping;
    let grads = grads.f32();
    let mut squares = vec![0.0f64; grads.len().div_ceil(PIECE)];
    backend.workers.rows(&mut squares, 1, 1, |piece, sum| {
        let (mut from, to) = (piece * PIECE, grads.len().min((piece + 1) * PIECE));
        let gaps = uncounted.iter().map(|range| (range.start, range.end));
        for (gap, after) in gaps.chain([(to, to)]) {
            let part = &grads[from..gap.clamp(from, to)];
            sum[0] += backend.isa.run(|| math::sum_of_squares(part));
            from = after.clamp(from, to);
        }
    });
    let own = squares.iter().sum();
    let squares = over.iter().fold(own, |sum, &group| comm::sum(&**backend.group(group), sum));
    let norm = (squares.sqrt() * f64::from(scale)) as f32;
    let clip = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
    let finite = norm.is_finite() && loss.f32()[0].is_finite();
    backend.scalars(&[norm, scale * clip, f32::from(u8::from(finite))], &[3])
}

pub(crate) fn adamw(
    backend: &CpuBackend,
    hyper: &AdamW,
    decayed: (usize, usize),
    clip: &Tensor,
    grads: &Buffer,
    params: &mut Buffer,
    m: &mut Buffer,
    v: &mut Buffer,
) {
    let &[_, factor, finite] = clip.f32() else { panic!("clip must be [norm, factor, finite]") };
    if finite == 0.0 {
        return;
    }
    let shape = params.shape();
    let step = hyper.step as f64;
    let bias1 = (1.0 - f64::from(hyper.beta1).powf(step)) as f32;
    let bias2_root = (1.0 - f64::from(hyper.beta2).powf(step)).sqrt() as f32;
    let (AdamW { lr, beta1, beta2, eps, .. }, keep) = (*hyper, 1.0 - hyper.lr * hyper.weight_decay);

    // Ranges of one kind, decayed or not, cut into pieces.
    let mut pieces = Vec::new();
    let mut cut = |from: usize, to: usize, keep: f32| {
        pieces.extend((from..to).step_by(PIECE).map(|at| (at, to.min(at + PIECE), keep)));
    };
    for layer in 0..shape.layers {
        let start = layer * shape.row;
        cut(start, start + decayed.0, keep);
        cut(start + decayed.0, start + shape.row, 1.0);
    }
    let start = shape.layers * shape.row;
    cut(start, start + decayed.1, keep);
    cut(start + decayed.1, start + shape.shared, 1.0);

    let grads = grads.f32();
    let [params, m, v] = [params, m, v].map(|b| crate::parallel::Shared::new(b.f32_mut()));
    backend.workers.each(pieces.len(), |piece| {
        let (from, to, keep) = pieces[piece];
        // SAFETY: the pieces are disjoint.
        let (params, m, v) =
            unsafe { (params.slice(from, to - from), m.slice(from, to - from), v.slice(from, to - from)) };
        backend.isa.run(|| {
            for (((p, m), v), g) in params.iter_mut().zip(m).zip(v).zip(&grads[from..to]) {
                let g = g * factor;
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                *p = *p * keep - lr * (*m / bias1) / (v.sqrt() / bias2_root + eps);
            }
        });
    });
}
