//! Tensors and flat buffers in main memory.

use std::sync::Arc;

use elapid_tensor::{DType, FlatShape, Slot};
use half::bf16;

use crate::memory::{Block, Plain};

/// A row-major tensor; cloning shares its memory.
#[derive(Clone)]
pub struct Tensor {
    block: Arc<Block>,
    /// First element inside the block.
    offset: usize,
    shape: Vec<usize>,
    dtype: DType,
}

impl Tensor {
    pub(crate) fn new(block: Block, shape: &[usize], dtype: DType) -> Self {
        Self { block: Arc::new(block), offset: 0, shape: shape.to_vec(), dtype }
    }

    /// Its memory, if nobody else has a part in it.
    pub(crate) fn into_block(self) -> Result<Block, Self> {
        if self.offset > 0 {
            return Err(self);
        }
        Arc::try_unwrap(self.block).map_err(|block| Self { block, ..self })
    }

    /// Extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The same numbers with other extents.
    pub(crate) fn reshaped(self, shape: &[usize]) -> Self {
        assert_eq!(self.len(), shape.iter().product::<usize>());
        Self { shape: shape.to_vec(), ..self }
    }

    /// Extent of the last axis; 1 for a scalar.
    #[inline(always)]
    pub(crate) fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    #[inline(always)]
    pub(crate) fn slice<T: Plain>(&self) -> &[T] {
        &self.block.as_slice(self.offset + self.len())[self.offset..]
    }

    #[inline(always)]
    pub(crate) fn f32(&self) -> &[f32] {
        assert_eq!(self.dtype, DType::F32);
        self.slice()
    }

    #[inline(always)]
    pub(crate) fn i32(&self) -> &[i32] {
        assert_eq!(self.dtype, DType::I32);
        self.slice()
    }

    /// The numbers of an F32 or Bf16 tensor.
    #[inline(always)]
    pub(crate) fn floats(&self) -> Floats<'_> {
        match self.dtype {
            DType::F32 => Floats::F32(self.slice()),
            DType::Bf16 => Floats::Bf16(self.slice()),
            DType::I32 => panic!("an integer tensor where floats are needed"),
        }
    }
}

impl<'a> From<&'a [f32]> for Floats<'a> {
    fn from(values: &'a [f32]) -> Self {
        Floats::F32(values)
    }
}

/// Borrowed floats of either compute dtype.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Floats<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Floats::F32(values) => values.len(),
            Floats::Bf16(values) => values.len(),
        }
    }

    /// The numbers from `first` on.
    #[inline(always)]
    pub(crate) fn starting_at(self, first: usize) -> Self {
        match self {
            Floats::F32(values) => Floats::F32(&values[first..]),
            Floats::Bf16(values) => Floats::Bf16(&values[first..]),
        }
    }

    /// `len` numbers from `from` on.
    pub(crate) fn part(self, from: usize, len: usize) -> Self {
        match self {
            Floats::F32(values) => Floats::F32(&values[from..from + len]),
            Floats::Bf16(values) => Floats::Bf16(&values[from..from + len]),
        }
    }

    /// `scratch.len()` numbers from `from` on, in place where they are fp32 and through `scratch` where not.
    #[inline(always)]
    pub(crate) fn row<'s>(&self, from: usize, scratch: &'s mut [f32]) -> &'s [f32]
    where
        'a: 's,
    {
        match self {
            Floats::F32(values) => &values[from..from + scratch.len()],
            Floats::Bf16(values) => {
                widen(&values[from..from + scratch.len()], scratch);
                scratch
            }
        }
    }

    /// Copies `from..from + dst.len()` into `dst`, rounded to bf16.
    #[inline(always)]
    pub(crate) fn load_bf16(&self, from: usize, dst: &mut [bf16]) {
        match self {
            Floats::F32(values) => narrow(&values[from..from + dst.len()], dst),
            Floats::Bf16(values) => dst.copy_from_slice(&values[from..from + dst.len()]),
        }
    }

    /// Copies `from..from + dst.len()` into `dst`.
    #[inline(always)]
    pub(crate) fn load(&self, from: usize, dst: &mut [f32]) {
        match self {
            Floats::F32(values) => dst.copy_from_slice(&values[from..from + dst.len()]),
            Floats::Bf16(values) => widen(&values[from..from + dst.len()], dst),
        }
    }
}

/// bf16 → f32, exact.
#[inline(always)]
pub(crate) fn widen(src: &[bf16], dst: &mut [f32]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d = f32::from_bits(u32::from(s.to_bits()) << 16);
    }
}

/// f32 → bf16, to nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn narrow(src: &[f32], dst: &mut [bf16]) {
    for (d, s) in dst.iter_mut().zip(src) {
        let bits = s.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let bits = if s.is_nan() { bits | 0x0040_0000 } else { rounded };
        *d = bf16::from_bits((bits >> 16) as u16);
    }
}

/// Flat parameters, gradients or moments.
pub struct Buffer {
    block: Arc<Block>,
    shape: FlatShape,
    dtype: DType,
}

impl Buffer {
    pub(crate) fn new(block: Block, shape: FlatShape, dtype: DType) -> Self {
        Self { block: Arc::new(block), shape, dtype }
    }

    /// Extents.
    pub fn shape(&self) -> FlatShape {
        self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn view(&self, slot: &Slot) -> Tensor {
        let range = self.shape.range(slot);
        assert!(range.end <= self.shape.len(), "{slot:?} outside of {:?}", self.shape);
        Tensor {
            block: self.block.clone(),
            offset: range.start,
            shape: slot.shape.clone(),
            dtype: self.dtype,
        }
    }

    #[inline(always)]
    pub(crate) fn slice<T: Plain>(&self) -> &[T] {
        self.block.as_slice(self.shape.len())
    }

    /// The whole buffer, to write. Views of it must be gone, since a tensor never changes.
    pub(crate) fn slice_mut<T: Plain>(&mut self) -> &mut [T] {
        let len = self.shape.len();
        Arc::get_mut(&mut self.block)
            .expect("a buffer is written while a view of it is alive")
            .as_mut_slice(len)
    }

    #[inline(always)]
    pub(crate) fn floats(&self) -> Floats<'_> {
        match self.dtype {
            DType::Bf16 => Floats::Bf16(self.slice()),
            _ => Floats::F32(self.slice()),
        }
    }

    #[inline(always)]
    pub(crate) fn f32(&self) -> &[f32] {
        assert_eq!(self.dtype, DType::F32);
        self.slice()
    }

    pub(crate) fn f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.dtype, DType::F32);
        self.slice_mut()
    }

    /// The place of one parameter, to write.
    pub(crate) fn slot_mut(&mut self, slot: &Slot) -> &mut [f32] {
        let range = self.shape.range(slot);
        &mut self.f32_mut()[range]
    }
}
