//! Collectives over host memory: what ranks of a group do together.
//!
//! Sums are in fp32 and in the order of the ranks, whatever the engine, so every rank gets the same bits and every
//! engine too. Collectives work in place; gathers and broadcasts move bytes and compute nothing.
//!
//! A collective returns no `Result`, because backend ops do not: where a rank fails or does not come in time, the
//! others leave by unwinding with a [`CommFailure`], which says why, and which the function that started the ranks
//! catches.

#[cfg(feature = "mpi")]
pub mod mpi;
pub mod sockets;
mod threads;
mod trade;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use half::bf16;

pub use threads::threads;

use crate::isa::Isa;
use crate::isa::vectorize;
pub use crate::memory::Plain;
use crate::tensor::{narrow, widen};

/// How numbers of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum, in fp32 and in rank order; rounded once where the numbers are bf16.
    Sum,
    /// The largest. fp32 only.
    Max,
}

/// Numbers that a collective replaces.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// fp32.
    F32(&'a mut [f32]),
    /// bf16.
    Bf16(&'a mut [bf16]),
}

impl FloatsMut<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }

    /// True where there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One rank of a group. All ranks call the same collectives in the same order, with data of the same size.
///
/// # Panics
/// Every collective unwinds with a [`CommFailure`] where a rank has failed, is late, or calls another collective.
pub trait Communicator: Send + Sync + std::fmt::Debug {
    /// This rank's number, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Replaces `data` by what its numbers come to over all ranks.
    fn all_reduce(&self, data: FloatsMut<'_>, reduce: Reduce);

    /// `data` is cut into `size` equal pieces; that of this rank becomes the sum over all ranks. What the other pieces
    /// hold afterwards is not specified.
    fn reduce_scatter(&self, data: FloatsMut<'_>);

    /// `data` is cut into `size` equal pieces, of which this rank brings its own and gets the others.
    fn all_gather(&self, data: &mut [u8]);

    /// Replaces `data` by that of rank `root`.
    fn broadcast(&self, data: &mut [u8], root: usize);

    /// Returns when all ranks have called it.
    fn barrier(&self);
}

/// A rank alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _: FloatsMut<'_>, _: Reduce) {}

    fn reduce_scatter(&self, _: FloatsMut<'_>) {}

    fn all_gather(&self, _: &mut [u8]) {}

    fn broadcast(&self, _: &mut [u8], _: usize) {}

    fn barrier(&self) {}
}

/// The groups that a backend works in.
#[derive(Clone, Debug)]
pub struct Groups {
    /// Ranks that share a batch and cut the parameters among themselves.
    pub tp: Arc<dyn Communicator>,
    /// Ranks that hold the same parameters and share the samples.
    pub dp: Arc<dyn Communicator>,
}

impl Default for Groups {
    fn default() -> Self {
        Self { tp: Arc::new(Single), dp: Arc::new(Single) }
    }
}

/// Why a collective was left: the payload of its unwinding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommFailure {
    /// The rank at fault, or the one that noticed, in the numbers of the whole run.
    pub rank: usize,
    /// What is wrong.
    pub message: String,
}

impl CommFailure {
    /// Unwinds without the message of a panic.
    pub fn leave(self) -> ! {
        std::panic::resume_unwind(Box::new(self))
    }
}

/// The failure that all ranks of one process end with; cloning shares it. The first one counts.
#[derive(Clone, Debug, Default)]
pub struct Abort(Arc<OnceLock<CommFailure>>);

impl Abort {
    /// Makes all other ranks leave their collectives, with this failure unless there was one before.
    pub fn raise(&self, failure: CommFailure) {
        let _ = self.0.set(failure);
    }

    /// The failure, if there is one.
    pub fn failure(&self) -> Option<&CommFailure> {
        self.0.get()
    }
}

/// The bytes of numbers.
fn bytes<T: Plain>(data: &[T]) -> &[u8] {
    // SAFETY: as below.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// The bytes of numbers, for collectives that only move them.
pub fn bytes_mut<T: Plain>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: `Plain` numbers have no padding and no invalid bit pattern; u8 has no alignment.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}

/// Σ of `x` over the ranks, in rank order.
pub(crate) fn sum(comm: &dyn Communicator, x: f64) -> f64 {
    if comm.size() == 1 {
        return x;
    }
    let mut all = vec![0; 8 * comm.size()];
    all.as_chunks_mut().0[comm.rank()] = x.to_le_bytes();
    comm.all_gather(&mut all);
    all.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).sum()
}

/// Piece `rank` of `len` numbers dealt out to `size` ranks; the last ones may be shorter.
fn piece(len: usize, size: usize, rank: usize) -> Range<usize> {
    let each = len.div_ceil(size);
    (rank * each).min(len)..((rank + 1) * each).min(len)
}

/// A number that ranks reduce.
trait Number: Plain + Send + Sync {
    fn widen(from: &[Self], to: &mut [f32]);
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Number for f32 {
    fn widen(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn widen(from: &[bf16], to: &mut [f32]) {
        widen(from, to);
    }

    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [bf16]) {
        narrow(from, to);
    }
}

/// Numbers that fit a first-level cache, twice.
const BLOCK: usize = 2048;

/// `out` = the ranks' numbers reduced in rank order; `source(rank, place, n)` gives `n` of a rank's from `place` on.
/// `out` itself may be where one rank's numbers came from: a place is written after all ranks' were read.
fn reduce<'a, T: Number + 'a>(
    size: usize,
    len: usize,
    reduce: Reduce,
    source: impl Fn(usize, usize, usize) -> &'a [T],
    mut write: impl FnMut(usize, &[f32]),
) {
    let isa = Isa::best();
    let (mut sum, mut term) = ([0.0; BLOCK], [0.0; BLOCK]);
    for start in (0..len).step_by(BLOCK) {
        let n = BLOCK.min(len - start);
        let (sum, term) = (&mut sum[..n], &mut term[..n]);
        let first = source(0, start, n);
        vectorize!(isa, || T::widen(first, sum));
        for rank in 1..size {
            let theirs = source(rank, start, n);
            vectorize!(isa, || {
                T::widen(theirs, term);
                match reduce {
                    Reduce::Sum => sum.iter_mut().zip(&*term).for_each(|(sum, x)| *sum += x),
                    // A NaN stays: `f32::max` would drop it.
                    Reduce::Max => sum.iter_mut().zip(&*term).for_each(|(max, &x)| {
                        if x > *max || x.is_nan() {
                            *max = x;
                        }
                    }),
                }
            });
        }
        vectorize!(isa, || write(start, sum));
    }
}
