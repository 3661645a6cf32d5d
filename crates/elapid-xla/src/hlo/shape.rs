//! Element types and extents of values.

use elapid_tensor::DType;

use super::proto::{LayoutProto, ShapeProto, primitive};

/// Element type of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// 32-bit signed integers.
    S32,
    /// Truth values.
    Pred,
}

impl Type {
    /// XLA's number.
    pub fn primitive(self) -> i32 {
        match self {
            Self::F32 => primitive::F32,
            Self::Bf16 => primitive::BF16,
            Self::S32 => primitive::S32,
            Self::Pred => primitive::PRED,
        }
    }

    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::S32 => 4,
            Self::Bf16 => 2,
            Self::Pred => 1,
        }
    }
}

impl From<DType> for Type {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
            DType::I32 => Self::S32,
        }
    }
}

/// Element type and extents of an array, row-major.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Element type.
    pub ty: Type,
    /// Extents; none: a scalar.
    pub dims: Vec<usize>,
}

impl Shape {
    /// An array's shape.
    pub fn new(ty: Type, dims: &[usize]) -> Self {
        Self { ty, dims: dims.to_vec() }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.elements() * self.ty.size()
    }

    /// As XLA writes it, with a row-major layout.
    pub fn proto(&self) -> ShapeProto {
        ShapeProto {
            element_type: self.ty.primitive(),
            dimensions: self.dims.iter().map(|&d| d as i64).collect(),
            is_dynamic_dimension: vec![false; self.dims.len()],
            layout: Some(LayoutProto {
                minor_to_major: (0..self.dims.len() as i64).rev().collect(),
                tail_padding_alignment_in_elements: 1,
            }),
            ..ShapeProto::default()
        }
    }
}

/// The shape of a tuple.
pub(super) fn tuple_proto(parts: &[Shape]) -> ShapeProto {
    ShapeProto {
        element_type: primitive::TUPLE,
        tuple_shapes: parts.iter().map(Shape::proto).collect(),
        ..ShapeProto::default()
    }
}

/// Host values of one array.
#[derive(Clone, Debug, PartialEq)]
pub enum Literal {
    /// Of an F32 array.
    F32(Vec<f32>),
    /// Of a Bf16 array, widened; every value is a bf16 number.
    Bf16(Vec<f32>),
    /// Of an S32 array.
    S32(Vec<i32>),
}

impl Literal {
    /// Row-major little-endian bytes, as the device has them.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::F32(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Bf16(values) => {
                values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
            }
            Self::S32(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// The reverse of [`Self::to_bytes`].
    ///
    /// # Panics
    /// On an array of truth values: no module takes or gives any.
    pub fn from_bytes(ty: Type, bytes: &[u8]) -> Self {
        let word = |b: &[u8]| [b[0], b[1], b[2], b[3]];
        match ty {
            Type::F32 => Self::F32(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(word(b))).collect()),
            Type::S32 => Self::S32(bytes.chunks_exact(4).map(|b| i32::from_le_bytes(word(b))).collect()),
            Type::Bf16 => Self::Bf16(
                bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            ),
            Type::Pred => panic!("truth values stay on the device"),
        }
    }

    /// The values of a floating-point array.
    ///
    /// # Panics
    /// On integers.
    pub fn floats(&self) -> &[f32] {
        match self {
            Self::F32(values) | Self::Bf16(values) => values,
            Self::S32(_) => panic!("integers are not read as floats"),
        }
    }
}
