//! `head_loss`: vocabulary projection and cross entropy in blocks of positions.

use elapid_tensor::{DType, IGNORE_LABEL, Sink};
use half::bf16;

use crate::CpuBackend;
use crate::comm::bytes_mut;
use crate::isa::vectorize;
use crate::math;
use crate::matmul::{Into, Mat, matmul};
use crate::parallel::Shared;
use crate::tensor::{Buffer, Floats, Tensor, narrow};

/// Logits of one block hold at most this many numbers (64 MiB), but never less than 16 positions.
const BLOCK: usize = 16 << 20;
/// A block has no more positions than these, or than a multiple of them: a product over positions takes as many in one pass in bf16.
const POSITIONS: usize = 256;

pub(crate) fn forward(
    backend: &CpuBackend,
    x: &Tensor,
    weight: &Tensor,
    labels: &Tensor,
    vocab: usize,
) -> Tensor {
    blocks(backend, x, weight, labels, vocab, None).0
}

pub(crate) fn adjoint(
    backend: &CpuBackend,
    x: &Tensor,
    weight: &Tensor,
    labels: &Tensor,
    vocab: usize,
    d_weight: Sink<'_, CpuBackend>,
) -> (Tensor, Tensor) {
    let (loss, dx) = blocks(backend, x, weight, labels, vocab, Some(d_weight));
    (loss, dx.expect("asked for"))
}

fn blocks(
    backend: &CpuBackend,
    x: &Tensor,
    weight: &Tensor,
    labels: &Tensor,
    vocab: usize,
    mut d_weight: Option<Sink<'_, CpuBackend>>,
) -> (Tensor, Option<Tensor>) {
    let &[width, d] = weight.shape() else { panic!("the head must be [V, D]") };
    let labels = labels.i32();
    let rows = labels.len();
    assert_eq!(x.len(), rows * d);
    let weight = Mat::new(weight.floats(), width, d);
    let mut dx = d_weight.is_some().then(|| backend.pool.take::<f32>(rows * d));

    let tp = &backend.groups.tp;
    let first_token = tp.rank() * width;
    // Rows beyond the vocabulary are padding.
    let valid = vocab.saturating_sub(first_token).min(width);
    // The place of a label among this rank's logits: none where another rank has it.
    let place = |label: i32| (label as usize).checked_sub(first_token).filter(|place| *place < valid);
    let adjoint = d_weight.is_some();

    let most = match (BLOCK / width).max(16) {
        most if most > POSITIONS => most / POSITIONS * POSITIONS,
        most => most,
    };
    // Even shares: a short last block would read the whole head for a few positions.
    let most = rows.div_ceil(rows.div_ceil(most).max(1));
    let mut logits = backend.pool.take::<f32>(most * width);
    // The logits' cotangents, rounded once for both products.
    let rounds = adjoint && x.dtype() == DType::Bf16;
    let mut rounded = rounds.then(|| backend.pool.take::<bf16>(most * width));
    let mut loss = 0.0f64;
    let mut first = 0;
    while first < rows {
        let n = most.min(rows - first);
        let labels = &labels[first..first + n];
        let x = Mat::new(x.floats().starting_at(first * d), n, d);
        let logits = logits.as_mut_slice::<f32>(n * width);
        matmul(backend, Into::Set, logits, width, x, weight.t());
        let mut parts = vec![Part::default(); n];
        let mut losses = vec![0.0f32; n];
        let shared_parts = Shared::new(&mut parts);
        let mut rounded = rounded.as_mut().map(|block| block.as_mut_slice::<bf16>(n * width));
        let results = Results {
            losses: Shared::new(&mut losses),
            adjoint,
            rounded: rounded.as_mut().map(|rounded| Shared::new(rounded)),
        };
        backend.workers.rows(logits, width, 4, |from, chunk| {
            for (i, row) in (from..).zip(chunk.chunks_exact_mut(width)) {
                vectorize!(backend.isa, || {
                    row[valid..].fill(0.0);
                    let part = Part::of(&mut row[..valid], labels[i], place(labels[i]));
                    // SAFETY: each position belongs to one piece.
                    unsafe { shared_parts.slice(i, 1)[0] = part };
                    if tp.size() == 1 {
                        // SAFETY: as above.
                        unsafe { results.put(i, part, part, row, valid, labels[i], place(labels[i])) };
                    }
                });
            }
        });
        if tp.size() > 1 {
            let wholes = Part::over_ranks(backend, &parts);
            backend.workers.rows(logits, width, 4, |from, chunk| {
                for (i, row) in (from..).zip(chunk.chunks_exact_mut(width)) {
                    let (label, place) = (labels[i], place(labels[i]));
                    // SAFETY: each position belongs to one piece.
                    vectorize!(backend.isa, || unsafe {
                        results.put(i, parts[i], wholes[i], row, valid, label, place)
                    });
                }
            });
        }
        loss += losses.iter().map(|&l| f64::from(l)).sum::<f64>();
        if let (Some(Sink { buffer, slot }), Some(dx)) = (&mut d_weight, &mut dx) {
            let buffer: &mut Buffer = buffer;
            let d_logits = rounded.as_deref().map_or(Floats::F32(logits), Floats::Bf16);
            let d_logits = Mat::new(d_logits, n, width);
            let dx = &mut dx.as_mut_slice::<f32>(rows * d)[first * d..][..n * d];
            matmul(backend, Into::Set, dx, d, d_logits, weight);
            matmul(backend, Into::Add, buffer.slot_mut(slot), d, d_logits.t(), x);
        }
        first += n;
    }
    drop((logits, rounded));
    let loss = backend.scalars(&[loss as f32], &[]);
    (loss, dx.map(|dx| backend.cast_to(&Tensor::new(dx, x.shape(), DType::F32), x.dtype())))
}

/// Where the results of a block go.
struct Results<'a> {
    /// `[n]`.
    losses: Shared<'a, f32>,
    /// Whether the logits' cotangents are wanted, and where they are rounded to, `[n, width]`, if at all.
    adjoint: bool,
    rounded: Option<Shared<'a, bf16>>,
}

impl Results<'_> {
    /// The loss of position `i`, from its part and the whole of all ranks, and, in place of `row`, of which only the `valid` first count,
    /// the cotangents.
    ///
    /// # Safety
    /// No other piece may have this position.
    #[inline(always)]
    unsafe fn put(
        &self,
        i: usize,
        part: Part,
        whole: Part,
        row: &mut [f32],
        valid: usize,
        label: i32,
        place: Option<usize>,
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.losses.slice(i, 1)[0] = whole.loss(label) };
        if self.adjoint {
            part.derive(whole, &mut row[..valid], label, place);
        }
        if let Some(rounded) = &self.rounded {
            // SAFETY: as above.
            narrow(row, unsafe { rounded.slice(i * row.len(), row.len()) });
        }
    }
}

/// What the cross entropy of a position needs to know of its logits, of one rank or of all.
#[derive(Clone, Copy, Default)]
struct Part {
    max: f32,
    /// Σ e^(logit − max).
    sum: f32,
    /// That of the label; 0 where it is another rank's.
    logit: f32,
}

impl Part {
    /// Replaces the logits by e^(logit − max), unless the label is ignored.
    #[inline(always)]
    fn of(row: &mut [f32], label: i32, place: Option<usize>) -> Self {
        if label == IGNORE_LABEL {
            return Self::default();
        }
        // Lanes, since a running maximum would be a chain of compares; a NaN goes to the sum below.
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (parts, rest) = row.as_chunks::<16>();
        for part in parts {
            lanes.iter_mut().zip(part).for_each(|(m, x)| *m = if *x > *m { *x } else { *m });
        }
        let max = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        let logit = place.map_or(0.0, |place| row[place]);
        Self { max, sum: math::map_sum(row, |x| math::exp(x - max)), logit }
    }

    /// The parts of all tensor-parallel ranks in one, position by position.
    fn over_ranks(backend: &CpuBackend, parts: &[Self]) -> Vec<Self> {
        let (n, tp) = (parts.len(), &backend.groups.tp);
        // `[tp, n, 3]`
        let mut all = vec![0.0f32; tp.size() * n * 3];
        for (to, part) in all[tp.rank() * n * 3..].chunks_exact_mut(3).zip(parts) {
            to.copy_from_slice(&[part.max, part.sum, part.logit]);
        }
        tp.all_gather(bytes_mut(&mut all));
        let of = |rank: usize, i: usize| &all[(rank * n + i) * 3..][..3];
        let whole = |i| {
            let ranks = || (0..tp.size()).map(|rank| of(rank, i));
            let max = ranks().map(|part| part[0]).fold(f32::NEG_INFINITY, f32::max);
            // A rank that holds nothing but padding has a sum of 0.
            let sum =
                ranks().filter(|part| part[1] != 0.0).map(|part| part[1] * math::exp(part[0] - max)).sum();
            Self { max, sum, logit: ranks().map(|part| part[2]).sum() }
        };
        (0..n).map(whole).collect()
    }

    /// −log softmax(row)[label], of all ranks' logits; 0 for an ignored label.
    #[inline(always)]
    fn loss(self, label: i32) -> f32 {
        // The difference first: ln + max would round to the digits of max.
        if label == IGNORE_LABEL { 0.0 } else { self.sum.ln() + (self.max - self.logit) }
    }

    /// Overwrites the row, as [`Self::of`] left it, by the derivative of the loss: softmax(row) − onehot(label) with the logits of all
    /// ranks in `whole`, zeros for an ignored label.
    #[inline(always)]
    fn derive(self, whole: Self, row: &mut [f32], label: i32, place: Option<usize>) {
        if label == IGNORE_LABEL {
            return row.fill(0.0);
        }
        let shrink = if self.max == whole.max { 1.0 } else { math::exp(self.max - whole.max) };
        let scale = shrink / whole.sum;
        row.iter_mut().for_each(|x| *x *= scale);
        if let Some(place) = place {
            row[place] -= 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use elapid_tensor::{Backend, FlatShape, Row, Slot};

    use super::*;
    use crate::CpuOptions;

    #[test]
    fn memory_does_not_grow_with_positions_times_vocabulary() {
        let backend = CpuBackend::new(&CpuOptions::default()).unwrap();
        let (rows, vocab, d) = (4096, 8192, 4);
        let x = backend.tensor(&vec![0.1; rows * d], &[1, rows, d], DType::F32);
        let labels = backend.tensor_i32(&vec![1; rows], &[1, rows]);
        let slot = Slot { row: Row::Shared, offset: 0, shape: vec![vocab, d] };
        let shape = FlatShape { layers: 0, row: 0, shared: slot.len() };
        let weight = backend.view(&backend.buffer(shape, DType::F32), &slot);
        let mut grads = backend.buffer(shape, DType::F32);
        backend.head_loss(&x, &weight, &labels, vocab);
        backend.head_loss_adjoint(&x, &weight, &labels, vocab, Sink { buffer: &mut grads, slot: &slot });
        // All blocks came back, so what is idle is at least what was ever held at once; a MiB a thread for panels.
        let idle = backend.pool.idle_bytes();
        assert!(idle < 4 * (BLOCK + 4 * rows * d) + (backend.threads() << 20), "{idle} bytes");
    }

    fn cross_entropy(row: &mut [f32], label: i32) -> f32 {
        let place = Some(label as usize);
        Part::of(row, label, place).loss(label)
    }

    #[test]
    fn a_small_loss_beside_large_logits_keeps_its_digits() {
        // ln(1 + e⁻⁵) + 1000 − 1000
        let loss = cross_entropy(&mut [1000.0, 995.0], 0);
        let want = (-5.0f64).exp().ln_1p();
        assert!((f64::from(loss) - want).abs() < 1e-4 * want, "{loss} instead of {want}");
    }

    #[test]
    fn what_is_not_finite_shows_in_the_loss() {
        for (row, label) in [
            ([f32::NAN, 0.0, 1.0], 1),
            ([0.0, 1.0, f32::NAN], 0),
            ([f32::INFINITY, 0.0, 1.0], 0),
            ([f32::INFINITY, 0.0, 1.0], 1),
            ([f32::NEG_INFINITY; 3], 2),
            ([f32::NEG_INFINITY, 0.0, 1.0], 0),
        ] {
            assert!(!cross_entropy(&mut row.clone(), label).is_finite(), "{row:?} {label}");
        }
        // A masked logit is none of these.
        let loss = cross_entropy(&mut [f32::NEG_INFINITY, 0.0, 0.0], 1);
        assert!((loss - 2f32.ln()).abs() < 1e-6, "{loss}");
    }
}
