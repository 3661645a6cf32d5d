//! Arrays as plain vectors.

use half::bf16;

use elapid_xla::{Literal, Shape, Type};

/// Elements. Those of a bf16 array are fp32 numbers that bf16 holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Of F32 and Bf16.
    Floats(Vec<f32>),
    /// Of S32.
    Ints(Vec<i32>),
    /// Of Pred.
    Truths(Vec<bool>),
}

/// An array, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Element type and extents.
    pub shape: Shape,
    /// Elements.
    pub data: Data,
}

/// Calls `$f!(vector, constructor)` for whichever kind of elements there is.
macro_rules! each_kind {
    ($data:expr, $values:ident => $result:expr) => {
        match $data {
            Data::Floats($values) => Data::Floats($result),
            Data::Ints($values) => Data::Ints($result),
            Data::Truths($values) => Data::Truths($result),
        }
    };
}
pub(crate) use each_kind;

impl Array {
    /// Numbers, rounded to what the element type holds.
    pub(crate) fn floats(shape: Shape, mut values: Vec<f32>) -> Self {
        if shape.ty == Type::Bf16 {
            values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
        Self { shape, data: Data::Floats(values) }
    }

    /// From the device's bytes.
    pub fn from_bytes(shape: Shape, bytes: &[u8]) -> Self {
        let data = match shape.ty {
            Type::Pred => Data::Truths(bytes.iter().map(|&b| b != 0).collect()),
            ty => match Literal::from_bytes(ty, bytes) {
                Literal::F32(values) | Literal::Bf16(values) => Data::Floats(values),
                Literal::S32(values) => Data::Ints(values),
            },
        };
        Self { shape, data }
    }

    /// The device's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match &self.data {
            Data::Floats(values) if self.shape.ty == Type::Bf16 => {
                values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
            }
            Data::Floats(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::Ints(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::Truths(values) => values.iter().map(|&b| u8::from(b)).collect(),
        }
    }

    /// A scalar that counts.
    pub(crate) fn index(&self) -> i64 {
        match &self.data {
            Data::Ints(values) => i64::from(values[0]),
            _ => 0,
        }
    }
}

/// Elements from one of the next to one of the same axis, row-major.
pub(crate) fn strides(dims: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; dims.len()];
    for axis in (1..dims.len()).rev() {
        strides[axis - 1] = strides[axis] * dims[axis];
    }
    strides
}

/// For every element of an array of extents `dims`, in order: `start` + Σ index · stride.
pub(crate) fn walk(dims: &[usize], strides: &[usize], start: usize) -> Vec<usize> {
    let mut out = Vec::with_capacity(dims.iter().product());
    if dims.contains(&0) {
        return out;
    }
    let (mut index, mut at) = (vec![0; dims.len()], start);
    loop {
        out.push(at);
        let mut axis = dims.len();
        loop {
            if axis == 0 {
                return out;
            }
            axis -= 1;
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < dims[axis] {
                break;
            }
            at -= dims[axis] * strides[axis];
            index[axis] = 0;
        }
    }
}
