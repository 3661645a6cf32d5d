//! `rms_norm`, and the norm inside of the mixer.

use elapid_tensor::{DType, Sink};

use crate::backend::XlaBackend;
use crate::hlo::Type;
use crate::hlo::graph::Value;
use crate::tensor::XlaTensor;

/// x / sqrt(mean(x²) + eps) over each `width` numbers of the last axis of `x` `[.., D]`, fp32, with its root: both
/// `[.., D]`.
pub(crate) fn unit(x: Value<'_>, width: usize, eps: f32) -> (Value<'_>, Value<'_>) {
    let scale = (mean(x * x, width) + eps).unary("rsqrt");
    (x * scale, scale)
}

/// Mean over each `width` numbers of the last axis, repeated.
fn mean(x: Value<'_>, width: usize) -> Value<'_> {
    let dims = x.dims();
    let last = dims.len() - 1;
    let mut parts = dims.clone();
    parts[last] /= width;
    parts.push(width);
    let axes: Vec<usize> = (0..=last).collect();
    let mean = x.reshape(&parts).sum(&[last + 1]) * (1.0 / width as f32);
    mean.expand(&parts, &axes).reshape(&dims)
}

/// (cotangent of x, gradient of the weight), both fp32, from what [`unit`] gave and the cotangent of its product with
/// `weight` `[D]`.
pub(crate) fn pull<'g>(
    (unit, scale): (Value<'g>, Value<'g>),
    width: usize,
    weight: Value<'g>,
    dy: Value<'g>,
) -> (Value<'g>, Value<'g>) {
    let dims = dy.dims();
    let last = dims.len() - 1;
    let g = dy * weight.expand(&dims, &[last]);
    let rows: Vec<usize> = (0..last).collect();
    (scale * (g - unit * mean(g * unit, width)), (dy * unit).sum(&rows))
}

pub(crate) fn forward(
    backend: &XlaBackend,
    x: &XlaTensor,
    weight: &XlaTensor,
    eps: f32,
    out: DType,
) -> XlaTensor {
    let x = backend.get(x).to(Type::F32);
    let dims = x.dims();
    let weight = backend.get(weight).to(Type::F32).expand(&dims, &[dims.len() - 1]);
    let (unit, _) = unit(x, dims[dims.len() - 1], eps);
    backend.keep((unit * weight).to(out.into()))
}

pub(crate) fn adjoint(
    backend: &XlaBackend,
    x: &XlaTensor,
    weight: &XlaTensor,
    eps: f32,
    dy: &XlaTensor,
    d_weight: Sink<'_, XlaBackend>,
) -> XlaTensor {
    let (x, weight, dy) = (backend.get(x), backend.get(weight), backend.get(dy));
    let wide = x.to(Type::F32);
    let width = weight.dims()[0];
    let (dx, dw) = pull(unit(wide, width, eps), width, weight.to(Type::F32), dy.to(Type::F32));
    backend.sink(d_weight.buffer, d_weight.slot, dw);
    backend.keep(dx.to(x.ty()))
}
