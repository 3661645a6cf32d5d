//! The gated norm: `rms_norm(y · silu(z)) · weight`, gate first (trap T15), one mean a norm group (trap T1).

use elapid_tensor::Mamba2Inputs;

use super::{Dims, Params};
use crate::CpuBackend;
use crate::math;
use crate::memory::Block;
use crate::parallel::{ROWS, Shared};
use crate::tensor::Tensor;

/// `[B, L, E]` in the dtype of the projection, from the scan's output `y` `[B·L, E]`.
pub(super) fn forward(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    params: &Params,
    y: &Block,
) -> Tensor {
    let (e, rows) = (dims.e, dims.rows());
    let y = y.as_slice::<f32>(rows * e);
    backend.build(&[dims.batch, dims.len, e], inputs.projected.dtype(), e, |row, out, scratch| {
        out.copy_from_slice(&y[row * e..][..e]);
        one_row(dims, params, out, inputs.projected.floats().row(row * dims.proj, scratch));
    })
}

/// The gated norm of one row in place: `y` `[E]`, `z` `[E]`.
#[inline(always)]
pub(super) fn one_row(dims: &Dims, params: &Params, y: &mut [f32], z: &[f32]) {
    let width = dims.spec.norm_width();
    for (y, z) in y.iter_mut().zip(z) {
        *y *= math::silu(*z);
    }
    for (v, w) in y.chunks_exact_mut(width).zip(params.norm_weight.chunks_exact(width)) {
        let r = 1.0 / (math::dot(v, v) / width as f32 + dims.spec.norm_eps).sqrt();
        for (v, w) in v.iter_mut().zip(w) {
            *v *= r * w;
        }
    }
}

/// Adjoint: the cotangent of y `[B·L, E]` and, in the columns of `d_projected`, of z; the gradient of the weight `[E]`.
///
/// With v = y·silu(z), r = 1/√(mean v² + eps), u = dy·w: dv = r·u − v·r³·mean(u·v).
pub(super) fn adjoint(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    params: &Params,
    y: &[f32],
    dy: &Tensor,
    d_projected: &Shared<'_, f32>,
) -> (Block, Vec<f32>) {
    let (e, rows, width) = (dims.e, dims.rows(), dims.spec.norm_width());
    let pieces = rows.div_ceil(ROWS);
    let mut d_scan = backend.pool.take::<f32>(rows * e);
    let mut partial = backend.pool.zeros::<f32>(pieces * e);
    let partials = Shared::new(partial.as_mut_slice::<f32>(pieces * e));
    backend.workers.rows(d_scan.as_mut_slice::<f32>(rows * e), e, ROWS, |first, d_rows| {
        let mut scratch = backend.pool.take::<f32>(3 * e);
        let (z, rest) = scratch.as_mut_slice::<f32>(3 * e).split_at_mut(e);
        let (v, u) = rest.split_at_mut(e);
        // SAFETY: each piece has its own part.
        let d_weight = unsafe { partials.slice(first / ROWS * e, e) };
        backend.isa.run(|| {
            for (i, d_scan) in d_rows.chunks_exact_mut(e).enumerate() {
                let row = first + i;
                let y = &y[row * e..][..e];
                inputs.projected.floats().load(row * dims.proj, z);
                dy.floats().load(row * e, u);
                for ((v, y), z) in v.iter_mut().zip(y).zip(&*z) {
                    *v = y * math::silu(*z);
                }
                for from in (0..e).step_by(width) {
                    let to = from + width;
                    let (v, u) = (&mut v[from..to], &mut u[from..to]);
                    let r = 1.0 / (math::dot(v, v) / width as f32 + dims.spec.norm_eps).sqrt();
                    for (((g, v), u), w) in d_weight[from..to]
                        .iter_mut()
                        .zip(&*v)
                        .zip(u.iter_mut())
                        .zip(&params.norm_weight[from..to])
                    {
                        *g += *u * v * r;
                        *u *= w;
                    }
                    let slope = math::dot(u, v) / width as f32 * r * r * r;
                    for (v, u) in v.iter_mut().zip(&*u) {
                        *v = r * u - *v * slope;
                    }
                }
                // v is the cotangent of y·silu(z) now.
                // SAFETY: pieces cover disjoint rows.
                let dz = unsafe { d_projected.slice(row * dims.proj, e) };
                for ((((ds, dz), v), y), z) in d_scan.iter_mut().zip(dz.iter_mut()).zip(&*v).zip(y).zip(&*z) {
                    *ds = v * math::silu(*z);
                    *dz = v * y * math::silu_slope(*z);
                }
            }
        });
    });
    let mut d_weight = vec![0.0; e];
    for part in partial.as_slice::<f32>(pieces * e).chunks_exact(e) {
        d_weight.iter_mut().zip(part).for_each(|(g, p)| *g += p);
    }
    (d_scan, d_weight)
}
