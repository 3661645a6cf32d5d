//! Clipping and AdamW over flat buffers.

use std::ops::Range;

use elapid_tensor::{AdamW, Clipping, Decayed, FlatShape, Group, Row};

use half::bf16;

use crate::CpuBackend;
use crate::comm;
use crate::isa::vectorize;
use crate::math;
use crate::parallel::Shared;
use crate::tensor::{Buffer, Tensor, narrow};

/// `[norm, factor, finite]`; see the contract.
pub(crate) fn clip(backend: &CpuBackend, grads: &Buffer, loss: &Tensor, clipping: &Clipping<'_>) -> Tensor {
    /// Numbers of one piece.
    const PIECE: usize = 1 << 16;
    let &Clipping { scale, max_norm, over, .. } = clipping;
    let uncounted = uncounted(backend, grads.shape(), clipping);
    let grads = grads.f32();
    let mut squares = vec![0.0f64; grads.len().div_ceil(PIECE)];
    backend.workers.rows(&mut squares, 1, 1, |piece, sum| {
        let (mut from, to) = (piece * PIECE, grads.len().min((piece + 1) * PIECE));
        let gaps = uncounted.iter().map(|range| (range.start, range.end));
        for (gap, after) in gaps.chain([(to, to)]) {
            let part = &grads[from..gap.clamp(from, to)];
            sum[0] += vectorize!(backend.isa, || math::sum_of_squares(part));
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

/// Elements of the buffer that a rank before this one counts, in order.
fn uncounted(backend: &CpuBackend, shape: FlatShape, clipping: &Clipping<'_>) -> Vec<Range<usize>> {
    let dealt = clipping.over.contains(&Group::Dp);
    let (part, tp) = (part(backend, dealt), backend.group(Group::Tp).rank());
    let of_row = |row| {
        let (start, len) = (shape.start(row), shape.whole(row).len());
        let copies = if row == Row::Shared { clipping.copies.1 } else { clipping.copies.0 };
        let ranges = copies.iter().filter(|copies| !tp.is_multiple_of(copies.ranks)).map(|c| &c.range);
        ranges.map(move |range| {
            let [from, to] = [range.start, range.end].map(|end| FlatShape::in_part(end, len, part));
            start + from..start + to
        })
    };
    shape.rows().flat_map(of_row).filter(|range| !range.is_empty()).collect()
}

/// The number of this rank's part of every row, among all data-parallel ranks' parts if rows are `dealt` to them.
fn part(backend: &CpuBackend, dealt: bool) -> usize {
    if dealt { backend.group(Group::Dp).rank() } else { 0 }
}

pub(crate) fn adamw(
    backend: &CpuBackend,
    hyper: &AdamW,
    decayed: Decayed,
    clip: &Tensor,
    grads: &mut Buffer,
    params: &mut Buffer,
    m: &mut Buffer,
    v: &mut Buffer,
    copy: Option<&mut Buffer>,
) {
    /// Numbers of one piece: what there is of them stays in a core's own cache until the copy is made.
    const PIECE: usize = 1 << 14;
    let &[_, factor, finite] = clip.f32() else { panic!("clip must be [norm, factor, finite]") };
    if finite == 0.0 {
        return;
    }
    let shape = params.shape();
    let step = hyper.step as f64;
    let bias1 = (1.0 - f64::from(hyper.beta1).powf(step)) as f32;
    let bias2_root = (1.0 - f64::from(hyper.beta2).powf(step)).sqrt() as f32;
    let (AdamW { lr, beta1, beta2, eps, .. }, keep) = (*hyper, 1.0 - hyper.lr * hyper.weight_decay);

    let part = part(backend, decayed.dealt);
    let [layer, shared] = [(decayed.layer, shape.row), (decayed.shared, shape.shared)]
        .map(|(end, len)| FlatShape::in_part(end, len, part));

    // Ranges of one kind, decayed or not, cut into pieces.
    let mut pieces = Vec::new();
    let mut cut = |from: usize, to: usize, keep: f32| {
        pieces.extend((from..to).step_by(PIECE).map(|at| (at, to.min(at + PIECE), keep)));
    };
    for number in 0..shape.layers {
        let start = number * shape.row;
        cut(start, start + layer, keep);
        cut(start + layer, start + shape.row, 1.0);
    }
    let start = shape.layers * shape.row;
    cut(start, start + shared, keep);
    cut(start + shared, start + shape.shared, 1.0);

    let buffers = [grads, params, m, v].map(|buffer| Shared::new(buffer.f32_mut()));
    let copy = copy.map(|copy| {
        assert_eq!(copy.shape(), shape);
        Shared::new(copy.slice_mut::<bf16>())
    });
    backend.workers.each(pieces.len(), |piece| {
        let (from, to, keep) = pieces[piece];
        // SAFETY: the pieces are disjoint.
        let [grads, params, m, v] = buffers.each_ref().map(|buffer| unsafe { buffer.slice(from, to - from) });
        // SAFETY: as above.
        let copy = copy.as_ref().map(|copy| unsafe { copy.slice(from, to - from) });
        vectorize!(backend.isa, || {
            for (((p, m), v), grad) in params.iter_mut().zip(m).zip(v).zip(grads) {
                let g = std::mem::take(grad) * factor;
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                *p = *p * keep - lr * (*m / bias1) / (v.sqrt() / bias2_root + eps);
            }
            if let Some(copy) = copy {
                narrow(params, copy);
            }
        });
    });
}
