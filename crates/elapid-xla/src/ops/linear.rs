//! `linear`: products with fp32 sums.

use elapid_tensor::{Sink, Slot};

use crate::backend::XlaBackend;
use crate::hlo::Type;
use crate::hlo::graph::{DotAxes, Value};
use crate::tensor::XlaTensor;

/// `x [.., I] · weight [O, I]ᵀ`, fp32.
pub(crate) fn product<'g>(x: Value<'g>, weight: Value<'g>) -> Value<'g> {
    let last = x.dims().len() - 1;
    x.dot(weight, DotAxes { contract: [vec![last], vec![1]], ..DotAxes::default() })
}

pub(crate) fn forward(
    backend: &XlaBackend,
    x: &XlaTensor,
    weight: &XlaTensor,
    bias: Option<&XlaTensor>,
) -> XlaTensor {
    let x = backend.get(x);
    let mut y = product(x, backend.get(weight));
    if let Some(bias) = bias {
        y = y + row(backend, bias, y);
    }
    backend.keep(y.to(x.ty()))
}

/// `bias` `[O]` repeated to the shape of `y` `[.., O]`, fp32.
fn row<'g>(backend: &'g XlaBackend, bias: &XlaTensor, y: Value<'g>) -> Value<'g> {
    let dims = y.dims();
    backend.get(bias).to(Type::F32).expand(&dims, &[dims.len() - 1])
}

pub(crate) fn add_bias(backend: &XlaBackend, x: &XlaTensor, bias: &XlaTensor) -> XlaTensor {
    let x = backend.get(x);
    backend.keep((x.to(Type::F32) + row(backend, bias, x)).to(x.ty()))
}

/// Σ over all axes but the last of `a [.., O]` times `b [.., I]`: `[O, I]`, fp32.
pub(crate) fn outer<'g>(a: Value<'g>, b: Value<'g>) -> Value<'g> {
    let rows: Vec<usize> = (0..a.dims().len() - 1).collect();
    a.dot(b, DotAxes { contract: [rows.clone(), rows], ..DotAxes::default() })
}

pub(crate) fn adjoint(
    backend: &XlaBackend,
    x: &XlaTensor,
    weight: &XlaTensor,
    dy: &XlaTensor,
    d_weight: Sink<'_, XlaBackend>,
    d_bias: Option<&Slot>,
) -> XlaTensor {
    let (x, weight, dy) = (backend.get(x), backend.get(weight), backend.get(dy));
    let narrow = dy.to(x.ty());
    let last = dy.dims().len() - 1;
    let dx = narrow.dot(weight, DotAxes { contract: [vec![last], vec![0]], ..DotAxes::default() });
    backend.sink(d_weight.buffer, d_weight.slot, outer(narrow, x));
    if let Some(slot) = d_bias {
        let rows: Vec<usize> = (0..last).collect();
        backend.sink(d_weight.buffer, slot, dy.to(Type::F32).sum(&rows));
    }
    backend.keep(dx.to(x.ty()))
}
