//! Numbers in the compute dtype that several pieces write.

use elapid_tensor::DType;
use half::bf16;

use crate::CpuBackend;
use crate::memory::Block;
use crate::parallel::Shared;
use crate::tensor::narrow;

pub(super) enum Target<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
}

/// A block of `len` numbers.
pub(super) fn take(backend: &CpuBackend, dtype: DType, len: usize) -> Block {
    match dtype {
        DType::Bf16 => backend.pool.take::<bf16>(len),
        _ => backend.pool.take::<f32>(len),
    }
}

impl<'a> Target<'a> {
    /// The first `len` numbers of a block that [`take`] gave.
    pub(super) fn new(block: &'a mut Block, dtype: DType, len: usize) -> Self {
        match dtype {
            DType::Bf16 => Self::Bf16(Shared::new(block.as_mut_slice(len))),
            _ => Self::F32(Shared::new(block.as_mut_slice(len))),
        }
    }

    /// Where to put as many numbers from `at` on as `spare` has: there, or in `spare` while they are to be rounded; then call [`Self::done`].
    ///
    /// # Safety
    /// No other piece may touch this range meanwhile.
    #[inline(always)]
    pub(super) unsafe fn row<'r>(&'r self, at: usize, spare: &'r mut [f32]) -> &'r mut [f32] {
        match self {
            // SAFETY: the caller's promise.
            Self::F32(shared) => unsafe { shared.slice(at, spare.len()) },
            Self::Bf16(_) => spare,
        }
    }

    /// Rounds what [`Self::row`] gave.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(super) unsafe fn done(&self, at: usize, row: &[f32]) {
        if let Self::Bf16(shared) = self {
            // SAFETY: the caller's promise.
            narrow(row, unsafe { shared.slice(at, row.len()) });
        }
    }

    /// Puts numbers from `at` on.
    ///
    /// # Safety
    /// As for [`Self::row`].
    #[inline(always)]
    pub(super) unsafe fn put(&self, at: usize, row: &[f32]) {
        match self {
            // SAFETY: the caller's promise.
            Self::F32(shared) => unsafe { shared.slice(at, row.len()) }.copy_from_slice(row),
            // SAFETY: the caller's promise.
            Self::Bf16(_) => unsafe { self.done(at, row) },
        }
    }
}
