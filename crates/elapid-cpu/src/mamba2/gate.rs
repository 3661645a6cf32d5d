//! The gated norm: `rms_norm(y · silu(z)) · weight`, gate first (trap T15), one mean a norm group (trap T1).

use std::ops::Range;

use super::{Call, Dims, Target};
use crate::CpuBackend;
use crate::isa::vectorize;
use crate::math;
use crate::memory::Block;
use crate::parallel::{ROWS, Shared};
use crate::tensor::{Floats, Tensor};

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

/// Positions that are one piece of work: at most [`ROWS`] of a chunk.
struct Piece {
    /// Among all of the call.
    index: usize,
    /// In B·L; none where the last chunk is short.
    rows: Range<usize>,
}

/// Calls `f` for the pieces of some chunks of all sequences.
fn each_piece(backend: &CpuBackend, dims: &Dims, part: Range<usize>, f: impl Fn(Piece) + Sync) {
    let subs = dims.q.div_ceil(ROWS);
    backend.workers.each(dims.batch * part.len() * subs, |piece| {
        let (piece, sub) = (piece / subs, piece % subs);
        let (b, chunk) = (piece / part.len(), part.start + piece % part.len());
        let end = dims.len.min((chunk + 1) * dims.q);
        let first = end.min(chunk * dims.q + sub * ROWS);
        let rows = b * dims.len + first..b * dims.len + end.min(first + ROWS);
        f(Piece { index: (b * dims.chunks + chunk) * subs + sub, rows });
    });
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

/// `[B·L, E]` into `out`, from the scan's output `y` `[B·L, E]` and `z` in the first columns of the projection, for some chunks of all
/// sequences.
pub(super) fn forward(
    backend: &CpuBackend,
    dims: &Dims,
    z: Floats<'_>,
    norm_weight: &[f32],
    part: Range<usize>,
    y: &Shared<'_, f32>,
    out: &Target<'_>,
) {
    let (e, width) = (dims.e, dims.spec.norm_width());
    let groups = e / width;
    let channels = (width * dims.spec.norm_ranks) as f32;
    let squares = over_ranks(backend, dims, groups, |row, sums, scratch| {
        vectorize!(backend.isa, || {
            let (v, scratch) = scratch.split_at_mut(e);
            // SAFETY: each row belongs to one piece, and the scan is done.
            v.copy_from_slice(unsafe { y.slice(row * e, e) });
            gate(v, z.row(row * dims.proj, scratch));
            sums.iter_mut().zip(v.chunks_exact(width)).for_each(|(sum, v)| *sum = math::dot(v, v));
        })
    });
    each_piece(backend, dims, part, |piece| {
        let mut scratch = backend.pool.take::<f32>(2 * e);
        let (scratch, spare) = scratch.as_mut_slice::<f32>(2 * e).split_at_mut(e);
        vectorize!(backend.isa, || for row in piece.rows.clone() {
            // SAFETY: pieces cover disjoint rows, and the scan has written y.
            let (v, y) = unsafe { (out.row(row * e, spare), y.slice(row * e, e)) };
            v.copy_from_slice(y);
            gate(v, z.row(row * dims.proj, scratch));
            for (group, (v, w)) in v.chunks_exact_mut(width).zip(norm_weight.chunks_exact(width)).enumerate()
            {
                let square = squares.as_ref().map_or_else(|| math::dot(v, v), |s| s[row * groups + group]);
                let r = 1.0 / (square / channels + dims.spec.norm_eps).sqrt();
                for (v, w) in v.iter_mut().zip(w) {
                    *v *= r * w;
                }
            }
            // SAFETY: as above.
            unsafe { out.done(row * e, v) };
        });
    });
}

/// The adjoint of the gated norm, part by part.
///
/// With v = y·silu(z), r = 1/√(mean v² + eps), u = dy·w: dv = r·u − v·r³·mean(u·v).
pub(super) struct Adjoint<'a> {
    call: &'a Call<'a>,
    y: &'a [f32],
    dy: Floats<'a>,
    /// Σ v² and Σ u·v of each group, where ranks share a mean: `[B·L, groups, 2]`.
    sums: Option<Vec<f32>>,
    /// `[pieces, E]`: of the weight's gradient.
    partial: Block,
}

impl<'a> Adjoint<'a> {
    pub(super) fn new(call: &'a Call<'a>, y: &'a [f32], dy: &'a Tensor) -> Self {
        let Call { backend, ref dims, inputs, ref params, .. } = *call;
        let (e, width) = (dims.e, dims.spec.norm_width());
        let dy = dy.floats();
        let sums = over_ranks(backend, dims, 2 * (e / width), |row, sums, scratch| {
            vectorize!(backend.isa, || {
                let (v, scratch) = scratch.split_at_mut(e);
                v.copy_from_slice(&y[row * e..][..e]);
                gate(v, inputs.projected.floats().row(row * dims.proj, scratch));
                let dy = dy.row(row * e, scratch);
                for (group, sums) in sums.chunks_exact_mut(2).enumerate() {
                    let range = group * width..(group + 1) * width;
                    let (v, dy, w) = (&v[range.clone()], &dy[range.clone()], &params.norm_weight[range]);
                    sums[0] = math::dot(v, v);
                    sums[1] = math::sum_map([dy, w, v], |[dy, w, v]| dy * w * v);
                }
            })
        });
        let partial = backend.pool.take::<f32>(Self::pieces(dims) * e);
        Self { call, y, dy, sums, partial }
    }

    fn pieces(dims: &Dims) -> usize {
        dims.batch * dims.chunks * dims.q.div_ceil(ROWS)
    }

    /// For some chunks: the cotangent of y, row by row, into `d_scan`, which begins with the first of them in each sequence, `span` rows
    /// of E a sequence; and, in the columns of `d_projected`, of z.
    pub(super) fn part(
        &mut self,
        part: Range<usize>,
        d_scan: &mut [f32],
        span: usize,
        d_projected: &Target<'_>,
    ) {
        let Self { call, y, dy, ref sums, ref mut partial } = *self;
        let Call { backend, ref dims, inputs, ref params, .. } = *call;
        let (e, width) = (dims.e, dims.spec.norm_width());
        let groups = e / width;
        let channels = (width * dims.spec.norm_ranks) as f32;
        let pieces = Self::pieces(dims);
        let partials = Shared::new(partial.as_mut_slice::<f32>(pieces * e));
        let d_scan = Shared::new(d_scan);
        let from = part.start * dims.q;
        each_piece(backend, dims, part, |piece| {
            let mut scratch = backend.pool.take::<f32>(5 * e);
            let (z, rest) = scratch.as_mut_slice::<f32>(5 * e).split_at_mut(e);
            let (s, rest) = rest.split_at_mut(e);
            let (v, rest) = rest.split_at_mut(e);
            let (u, spare) = rest.split_at_mut(e);
            // SAFETY: each piece has its own part.
            let d_weight = unsafe { partials.slice(piece.index * e, e) };
            d_weight.fill(0.0);
            vectorize!(backend.isa, || {
                for row in piece.rows.clone() {
                    let y = &y[row * e..][..e];
                    inputs.projected.floats().load(row * dims.proj, z);
                    dy.load(row * e, u);
                    for (((v, s), y), z) in v.iter_mut().zip(&mut *s).zip(y).zip(&*z) {
                        *s = math::sigmoid(*z);
                        *v = y * z * *s;
                    }
                    let at = row * dims.proj;
                    let (b, l) = (row / dims.len, row % dims.len);
                    // SAFETY: pieces cover disjoint rows.
                    let (dz, d_scan) =
                        unsafe { (d_projected.row(at, spare), d_scan.slice((b * span + l - from) * e, e)) };
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
    }

    /// The gradient of the weight, `[E]`, after all parts.
    pub(super) fn finish(self) -> Vec<f32> {
        let dims = &self.call.dims;
        let mut d_weight = vec![0.0; dims.e];
        for part in self.partial.as_slice::<f32>(Self::pieces(dims) * dims.e).chunks_exact(dims.e) {
            d_weight.iter_mut().zip(part).for_each(|(g, p)| *g += p);
        }
        d_weight
    }
}
