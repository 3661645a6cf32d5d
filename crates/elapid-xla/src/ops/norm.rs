//! `rms_norm`, and the norm inside of the mixer.

use elapid_tensor::{DType, Sink};

use crate::backend::XlaBackend;
use crate::hlo::Type;
use crate::hlo::graph::{Ranks, Value};
use crate::tensor::XlaTensor;

/// Over what a mean is taken: numbers of the last axis, and so many neighbouring ranks.
#[derive(Clone, Copy)]
pub(crate) struct Over {
    pub(crate) width: usize,
    pub(crate) ranks: usize,
}

/// x / sqrt(mean(x²) + eps) of `x` `[.., D]`, fp32, with its root: both `[.., D]`.
pub(crate) fn unit(x: Value<'_>, over: Over, eps: f32) -> (Value<'_>, Value<'_>) {
    let scale = (mean(x * x, over) + eps).unary("rsqrt");
    (x * scale, scale)
}

/// The mean, repeated.
fn mean(x: Value<'_>, Over { width, ranks }: Over) -> Value<'_> {
    let dims = x.dims();
    let last = dims.len() - 1;
    let mut parts = dims.clone();
    parts[last] /= width;
    parts.push(width);
    let axes: Vec<usize> = (0..=last).collect();
    let sum = x.reshape(&parts).sum(&[last + 1]).sum_over(Ranks::Neighbours(ranks));
    let mean = sum * (1.0 / (width * ranks) as f32);
    mean.expand(&parts, &axes).reshape(&dims)
}

/// (cotangent of x, gradient of the weight), both fp32, from what [`unit`] gave and the cotangent of its product with
/// `weight` `[D]`.
pub(crate) fn pull<'g>(
    (unit, scale): (Value<'g>, Value<'g>),
    over: Over,
    weight: Value<'g>,
    dy: Value<'g>,
) -> (Value<'g>, Value<'g>) {
    let dims = dy.dims();
    let last = dims.len() - 1;
    let g = dy * weight.expand(&dims, &[last]);
    let rows: Vec<usize> = (0..last).collect();
    (scale * (g - unit * mean(g * unit, over)), (dy * unit).sum(&rows))
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
    let (unit, _) = unit(x, Over { width: dims[dims.len() - 1], ranks: 1 }, eps);
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
    let over = Over { width: weight.dims()[0], ranks: 1 };
    let (dx, dw) = pull(unit(wide, over, eps), over, weight.to(Type::F32), dy.to(Type::F32));
    backend.sink(d_weight.buffer, d_weight.slot, dw);
    backend.keep(dx.to(x.ty()))
}
