//! The gated norm: `rms_norm(y · silu(z)) · weight`, gate first (trap T15), one mean a norm group (trap T1).

use elapid_tensor::Mamba2Inputs;

use super::{Dims, Params, Projected};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::memory::Block;
use crate::parallel::{ROWS, Shared};
use crate::tensor::Tensor;

/// Sums that the ranks which share a mean come to together: `count` a row, of which `local(row, sums, scratch of 2·E)`
/// gives this rank's share. None where no mean is shared.
fn over_ranks(
    backend: &CpuBackend,
    dims: &Dims,
    count: usize,
    local: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) -> Option<Vec<f32>> {
    let ranks = dims.spec.norm_ranks;
    (ranks > 1).then(|| {
        let mut sums = vec![0.0; dims.rows() * count];
        backend.workers.rows(&mut sums, count, ROWS, |first, part| {
            let mut scratch = backend.pool.take::<f32>(2 * dims.e);
            let scratch = scratch.as_mut_slice::<f32>(2 * dims.e);
            for (row, sums) in (first..).zip(part.chunks_exact_mut(count)) {
                local(row, sums, scratch);
            }
        });
        backend.sum_over_neighbours(&mut sums, ranks);
        sums
    })
}

/// y·silu(z), in place of y.
#[inline(always)]
fn gate(y: &mut [f32], z: &[f32]) {
    for (y, z) in y.iter_mut().zip(z) {
        *y *= math::silu(*z);
    }
}

/// From v = y·silu(z), u = dy·w and s = sigmoid(z): the cotangents of y and z. (Only of arguments does the compiler know that they do
/// not overlap.)
#[inline(always)]
fn gate_adjoint(dy: &mut [f32], dz: &mut [f32], [v, u, y, z, s]: [&[f32]; 5], (r, slope): (f32, f32)) {
    let len = dy.len();
    let (dz, v, u, y, z, s) = (&mut dz[..len], &v[..len], &u[..len], &y[..len], &z[..len], &s[..len]);
    for (i, dy) in dy.iter_mut().enumerate() {
        let dv = r * u[i] - v[i] * slope;
        *dy = dv * z[i] * s[i];
        dz[i] = dv * y[i] * math::slope_at(z[i], s[i]);
    }
}

/// `[B, L, E]` in the dtype of the projection, from the scan's output `y` `[B·L, E]`.
pub(super) fn forward(
    backend: &CpuBackend,
    dims: &Dims,
    inputs: &Mamba2Inputs<Tensor>,
    norm_weight: &[f32],
    y: &Block,
) -> Tensor {
    let (e, rows, width) = (dims.e, dims.rows(), dims.spec.norm_width());
    let groups = e / width;
    let channels = (width * dims.spec.norm_ranks) as f32;
    let y = y.as_slice::<f32>(rows * e);
    let z = inputs.projected.floats();
    let squares = over_ranks(backend, dims, groups, |row, sums, scratch| {
        vectorize!(backend.isa, || {
            let (v, scratch) = scratch.split_at_mut(e);
            v.copy_from_slice(&y[row * e..][..e]);
            gate(v, z.row(row * dims.proj, scratch));
            sums.iter_mut().zip(v.chunks_exact(width)).for_each(|(sum, v)| *sum = math::dot(v, v));
        })
    });
    backend.build(&[dims.batch, dims.len, e], inputs.projected.dtype(), e, |row, out, scratch| {
        vectorize!(backend.isa, || {
            out.copy_from_slice(&y[row * e..][..e]);
            gate(out, z.row(row * dims.proj, scratch));
            for (group, (v, w)) in
                out.chunks_exact_mut(width).zip(norm_weight.chunks_exact(width)).enumerate()
            {
                let square = squares.as_ref().map_or_else(|| math::dot(v, v), |s| s[row * groups + group]);
                let r = 1.0 / (square / channels + dims.spec.norm_eps).sqrt();
                for (v, w) in v.iter_mut().zip(w) {
                    *v *= r * w;
                }
            }
        })
    })
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
    d_projected: &Projected<'_>,
) -> (Block, Vec<f32>) {
    let (e, rows, width) = (dims.e, dims.rows(), dims.spec.norm_width());
    let groups = e / width;
    let channels = (width * dims.spec.norm_ranks) as f32;
    // Σ v² and Σ u·v of each group.
    let sums = over_ranks(backend, dims, 2 * groups, |row, sums, scratch| {
        vectorize!(backend.isa, || {
            let (v, scratch) = scratch.split_at_mut(e);
            v.copy_from_slice(&y[row * e..][..e]);
            gate(v, inputs.projected.floats().row(row * dims.proj, scratch));
            let dy = dy.floats().row(row * e, scratch);
            for (group, sums) in sums.chunks_exact_mut(2).enumerate() {
                let range = group * width..(group + 1) * width;
                let (v, dy, w) = (&v[range.clone()], &dy[range.clone()], &params.norm_weight[range]);
                sums[0] = math::dot(v, v);
                sums[1] = math::sum_map([dy, w, v], |[dy, w, v]| dy * w * v);
            }
        })
    });
    let pieces = rows.div_ceil(ROWS);
    let mut d_scan = backend.pool.take::<f32>(rows * e);
    let mut partial = backend.pool.take::<f32>(pieces * e);
    let partials = Shared::new(partial.as_mut_slice::<f32>(pieces * e));
    backend.workers.rows(d_scan.as_mut_slice::<f32>(rows * e), e, ROWS, |first, d_rows| {
        let mut scratch = backend.pool.take::<f32>(5 * e);
        let (z, rest) = scratch.as_mut_slice::<f32>(5 * e).split_at_mut(e);
        let (s, rest) = rest.split_at_mut(e);
        let (v, rest) = rest.split_at_mut(e);
        let (u, spare) = rest.split_at_mut(e);
        // SAFETY: each piece has its own part.
        let d_weight = unsafe { partials.slice(first / ROWS * e, e) };
        d_weight.fill(0.0);
        vectorize!(backend.isa, || {
            for (i, d_scan) in d_rows.chunks_exact_mut(e).enumerate() {
                let row = first + i;
                let y = &y[row * e..][..e];
                inputs.projected.floats().load(row * dims.proj, z);
                dy.floats().load(row * e, u);
                for (((v, s), y), z) in v.iter_mut().zip(&mut *s).zip(y).zip(&*z) {
                    *s = math::sigmoid(*z);
                    *v = y * z * *s;
                }
                let at = row * dims.proj;
                // SAFETY: pieces cover disjoint rows.
                let dz = unsafe { d_projected.row(at, spare) };
                for group in 0..groups {
                    let (from, to) = (group * width, (group + 1) * width);
                    let (v, u) = (&v[from..to], &mut u[from..to]);
                    let sums = sums.as_ref().map(|sums| &sums[(row * groups + group) * 2..][..2]);
                    let square = sums.map_or_else(|| math::dot(v, v), |sums| sums[0]);
                    let r = 1.0 / (square / channels + dims.spec.norm_eps).sqrt();
                    let weights = d_weight[from..to].iter_mut().zip(&params.norm_weight[from..to]);
                    for ((u, v), (g, w)) in u.iter_mut().zip(v).zip(weights) {
                        *g += *u * v * r;
                        *u *= w;
                    }
                    let product = sums.map_or_else(|| math::dot(u, v), |sums| sums[1]);
                    let slope = product / channels * r * r * r;
                    let (dy, dz) = (&mut d_scan[from..to], &mut dz[from..to]);
                    gate_adjoint(dy, dz, [v, u, &y[from..to], &z[from..to], &s[from..to]], (r, slope));
                }
                // SAFETY: as above.
                unsafe { d_projected.done(at, dz) };
            }
        });
    });
    let mut d_weight = vec![0.0; e];
    for part in partial.as_slice::<f32>(pieces * e).chunks_exact(e) {
        d_weight.iter_mut().zip(part).for_each(|(g, p)| *g += p);
    }
    (d_scan, d_weight)
}
