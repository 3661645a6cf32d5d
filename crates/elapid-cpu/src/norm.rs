//! `rms_norm`.

use elapid_tensor::{DType, Sink};

use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::parallel::{ROWS, Shared};
use crate::tensor::Tensor;

pub(crate) fn forward(backend: &CpuBackend, x: &Tensor, weight: &Tensor, eps: f32, out: DType) -> Tensor {
    let d = x.last();
    let weight = weight.f32();
    backend.build(x.shape(), out, d, |row, out, scratch| {
        vectorize!(backend.isa, || {
            let x = x.floats().row(row * d, scratch);
            let r = scale(x, eps);
            for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                *o = x * r * w;
            }
        })
    })
}

/// 1 / √(mean x² + eps).
#[inline(always)]
fn scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (math::dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// With r the scale and u = dy·w: dx = r·u − x·r³·mean(u·x).
pub(crate) fn adjoint(
    backend: &CpuBackend,
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    dy: &Tensor,
    d_weight: Sink<'_, CpuBackend>,
) -> Tensor {
    let d = x.last();
    let weight = weight.f32();
    let rows = x.len() / d;
    let pieces = rows.div_ceil(ROWS);
    let mut partial = backend.pool.zeros::<f32>(pieces * d);
    let partials = Shared::new(partial.as_mut_slice::<f32>(pieces * d));
    let dx = backend.build(x.shape(), x.dtype(), 2 * d, |row, dx, scratch| {
        vectorize!(backend.isa, || {
            let (x_scratch, dy_scratch) = scratch.split_at_mut(d);
            let x = x.floats().row(row * d, x_scratch);
            let dy = dy.floats().row(row * d, dy_scratch);
            let r = scale(x, eps);
            // SAFETY: the rows of one piece run one after the other, and each piece has its own part.
            let d_weight = unsafe { partials.slice(row / ROWS * d, d) };
            for ((g, x), dy) in d_weight.iter_mut().zip(x).zip(dy) {
                *g += dy * x * r;
            }
            let slope = math::sum_map([dy, weight, x], |[dy, w, x]| dy * w * x) / d as f32 * r * r * r;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx = r * dy * w - x * slope;
            }
        })
    });
    let Sink { buffer, slot } = d_weight;
    let grads = buffer.slot_mut(slot);
    for part in partial.as_slice::<f32>(pieces * d).chunks_exact(d) {
        grads.iter_mut().zip(part).for_each(|(g, p)| *g += p);
    }
    dx
}
