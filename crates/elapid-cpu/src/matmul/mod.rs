//! Matrix products: tiles cut by us, each computed on one thread; on AVX-512 by a kernel of our own, elsewhere by `gemm`.

#[cfg(target_arch = "x86_64")]
mod avx512;

use half::bf16;

use crate::CpuBackend;
use crate::isa::{Isa, vectorize};
use crate::math;
use crate::parallel::Shared;
use crate::tensor::{Floats, narrow, widen};

/// A view of a matrix, of which one axis or the other lies without gaps in memory.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: Floats<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major, rows `stride` apart.
    pub(crate) fn strided(
        data: impl std::convert::Into<Floats<'a>>,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Self {
        let data = data.into();
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len());
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Row-major without gaps.
    pub(crate) fn new(data: impl std::convert::Into<Floats<'a>>, rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// `rows` rows from `first` on.
    fn rows(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows);
        Self { data: self.data.starting_at(first * self.row_stride), rows, ..self }
    }

    /// The same in fp32: itself, or a copy in `scratch` without gaps.
    fn widened<'s>(self, scratch: &'s mut [f32]) -> Mat<'s>
    where
        'a: 's,
    {
        let Floats::Bf16(data) = self.data else { return self };
        if self.col_stride != 1 {
            return self.t().widened(scratch).t();
        }
        let Self { rows, cols, row_stride, .. } = self;
        for (row, to) in scratch.chunks_exact_mut(cols.max(1)).enumerate().take(rows) {
            widen(&data[row * row_stride..][..cols], to);
        }
        Mat::new(&scratch[..rows * cols], rows, cols)
    }

    /// `cols` columns from `first` on.
    fn cols(self, first: usize, cols: usize) -> Self {
        self.t().rows(first, cols).t()
    }
}

/// What happens to the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// dst = lhs · rhs.
    Set,
    /// dst += lhs · rhs.
    Add,
}

/// What of a product of square extents is known to be zero, or is not asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Triangle {
    /// Nothing.
    None,
    /// The left operand holds zeros above its diagonal.
    LeftLower,
    /// The left operand holds zeros below its diagonal.
    LeftUpper,
    /// Of the destination, what lies above the diagonal is never read: it holds anything.
    ResultLower,
}

/// `dst [rows, cols]` (row-major, rows `stride` apart) = or += `lhs · rhs`, over all workers. Sums are fp32. Where one
/// operand is bf16 and the CPU multiplies pairs of bf16, the other is rounded to it.
pub(crate) fn matmul(backend: &CpuBackend, into: Into, dst: &mut [f32], stride: usize, lhs: Mat, rhs: Mat) {
    let (m, n) = (lhs.rows, rhs.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * stride + n <= dst.len());
    let shared = Shared::new(dst);
    let extents = tile_extents(backend.isa, m, n, backend.workers.threads());
    tiles(backend, extents, lhs, rhs, |i, j, lhs, rhs| {
        // SAFETY: tiles of one destination are disjoint.
        unsafe { product(backend, Triangle::None, into, &shared, i * stride + j, stride, lhs, rhs) };
    });
}

/// `dst [rows, cols]` (row-major without gaps) = `lhs · rhs` as [`matmul`] sums it, with `bias` added to every row, rounded once.
pub(crate) fn rounded(backend: &CpuBackend, dst: &mut [bf16], lhs: Mat, rhs: Mat, bias: Option<&[f32]>) {
    let width = rhs.cols;
    assert_eq!(dst.len(), lhs.rows * width);
    // The same block for every tile, also for smaller ones at the edges.
    let (rows, cols) = tile_extents(backend.isa, lhs.rows, width, backend.workers.threads());
    let shared = Shared::new(dst);
    tiles(backend, (rows, cols), lhs, rhs, |i, j, lhs, rhs| {
        let n = rhs.cols;
        let mut sums = backend.pool.take::<f32>(rows * cols);
        let sums = &mut sums.as_mut_slice::<f32>(rows * cols)[..lhs.rows * n];
        small(backend, Into::Set, sums, n, lhs, rhs);
        vectorize!(backend.isa, || {
            for (row, sums) in (i..).zip(sums.chunks_exact_mut(n)) {
                if let Some(bias) = bias {
                    sums.iter_mut().zip(&bias[j..]).for_each(|(y, b)| *y += b);
                }
                // SAFETY: tiles of one destination are disjoint.
                narrow(sums, unsafe { shared.slice(row * width + j, n) });
            }
        });
    });
}

/// Calls `f(row, column, rows of lhs, columns of rhs)` for every tile of a product, on all workers.
fn tiles(
    backend: &CpuBackend,
    (tile_m, tile_n): (usize, usize),
    lhs: Mat,
    rhs: Mat,
    f: impl Fn(usize, usize, Mat, Mat) + Sync,
) {
    let (m, n) = (lhs.rows, rhs.cols);
    if m == 0 || n == 0 {
        return;
    }
    let (down, across) = (m.div_ceil(tile_m), n.div_ceil(tile_n));
    backend.workers.each(down * across, |piece| {
        let (i, j) = (piece / across * tile_m, piece % across * tile_n);
        f(i, j, lhs.rows(i, tile_m.min(m - i)), rhs.cols(j, tile_n.min(n - j)));
    });
}

/// Extents of the tiles of a product `[m, n]`: those with which so many threads are done first. No sum of the kernels here depends on them.
/// `gemm` may sum in another order in a tile of other extents, so there they are the same for any number of threads.
pub fn tile_extents(isa: Isa, m: usize, n: usize, threads: usize) -> (usize, usize) {
    if !isa.multiplies() {
        let even = |len: usize, most: usize| len.div_ceil(len.div_ceil(most).max(1));
        return (even(m, 256), even(n, 512));
    }
    /// Multiply-adds that take as long as packing a number.
    const PACKING: usize = 16;
    /// Most numbers of a tile: its sums stay in the second cache.
    const LARGEST: usize = 1 << 18;
    let all = (64..=512).step_by(32).flat_map(|rows| (96..=768).step_by(48).map(move |cols| (rows, cols)));
    let time = |&(rows, cols): &(usize, usize)| {
        let tiles = m.div_ceil(rows).saturating_mul(n.div_ceil(cols));
        tiles.div_ceil(threads).saturating_mul(rows * cols + PACKING * (rows + cols))
    };
    let (rows, cols) = all
        .filter(|(rows, cols)| rows * cols <= LARGEST)
        .min_by_key(time)
        .expect("the smallest ones are small enough");
    (rows.min(m), cols.min(n))
}

/// One product on the calling thread.
pub(crate) fn small(backend: &CpuBackend, into: Into, dst: &mut [f32], stride: usize, lhs: Mat, rhs: Mat) {
    triangular(backend, Triangle::None, into, dst, stride, lhs, rhs);
}

/// One product on the calling thread, of which a part is spared.
pub(crate) fn triangular(
    backend: &CpuBackend,
    triangle: Triangle,
    into: Into,
    dst: &mut [f32],
    stride: usize,
    lhs: Mat,
    rhs: Mat,
) {
    // SAFETY: the borrow of `dst` is unique.
    unsafe { product(backend, triangle, into, &Shared::new(dst), 0, stride, lhs, rhs) };
}

/// `out[o]` = x · row o of `weight`, whose rows follow each other, on the calling thread. With `once`, nobody will read `weight` again soon: it
/// need not stay in the caches.
pub(crate) fn dots(backend: &CpuBackend, x: &[f32], weight: Floats, once: bool, out: &mut [f32]) {
    assert_eq!(weight.len(), x.len() * out.len());
    match backend.isa {
        // SAFETY: the backend runs no path that the CPU does not have; the lengths agree (above).
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512::dots(x, weight, once, out) },
        isa => {
            let mut scratch = vec![0.0; x.len()];
            vectorize!(isa, || for (o, out) in out.iter_mut().enumerate() {
                *out = math::dot(x, weight.row(o * x.len(), &mut scratch));
            });
        }
    }
}

/// One product on the calling thread into the places `from + i·stride + j` of `dst`.
///
/// # Safety
/// No other thread may touch those places meanwhile.
pub(crate) unsafe fn product(
    backend: &CpuBackend,
    triangle: Triangle,
    into: Into,
    dst: &Shared<'_, f32>,
    from: usize,
    stride: usize,
    lhs: Mat,
    rhs: Mat,
) {
    let (m, n) = (lhs.rows, rhs.cols);
    assert_eq!(lhs.cols, rhs.rows);
    if m == 0 || n == 0 {
        return;
    }
    let dst = dst.pointer(from, (m - 1) * stride + n);
    match backend.isa {
        // SAFETY: the destination lies inside its slice (the line above), its places are the caller's, and the backend
        // runs no path that the CPU does not have.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe {
            avx512::product(backend, triangle, into, dst, stride, lhs, rhs);
        },
        // SAFETY: as above.
        _ => unsafe { portable(backend, into, dst, stride, lhs, rhs) },
    }
}

/// [`product`] by `gemm`, which knows fp32: bf16 operands are widened, some of k at a time; all of it is computed.
///
/// # Safety
/// The places of `dst` must be valid and this thread's own.
unsafe fn portable(backend: &CpuBackend, into: Into, dst: *mut f32, stride: usize, lhs: Mat, rhs: Mat) {
    const DEPTH: usize = 512;
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    // Of thin operands `gemm` adds one term after the other to the destination, of others the sum of all, as everywhere else.
    if into == Into::Add && (m == 1 || n == 1 || k <= 2) {
        let mut sums = backend.pool.take::<f32>(m * n);
        let sums = sums.as_mut_slice::<f32>(m * n);
        // SAFETY: the scratch has a place for every sum; those of `dst` are the caller's.
        unsafe {
            portable(backend, Into::Set, sums.as_mut_ptr(), n, lhs, rhs);
            for (i, row) in sums.chunks_exact(n).enumerate() {
                let to = std::slice::from_raw_parts_mut(dst.add(i * stride), n);
                to.iter_mut().zip(row).for_each(|(to, sum)| *to += sum);
            }
        }
        return;
    }
    let fp32 = matches!((lhs.data, rhs.data), (Floats::F32(_), Floats::F32(_)));
    let (depth, copied) =
        if fp32 { (k.max(1), [0, 0]) } else { (DEPTH, [m, n].map(|len| len * DEPTH.min(k))) };
    let mut scratch = backend.pool.take::<f32>(copied[0] + copied[1]);
    let (left, right) = scratch.as_mut_slice::<f32>(copied[0] + copied[1]).split_at_mut(copied[0]);
    for first in (0..k.max(1)).step_by(depth) {
        let k = depth.min(k - first);
        let (lhs, rhs) = (lhs.cols(first, k).widened(left), rhs.rows(first, k).widened(right));
        let (Floats::F32(a), Floats::F32(b)) = (lhs.data, rhs.data) else { unreachable!("widened above") };
        // SAFETY: `Mat` checked that both operands lie inside their slices; the destination is the caller's.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                dst,
                1,
                stride as isize,
                into == Into::Add || first > 0,
                a.as_ptr(),
                lhs.col_stride as isize,
                lhs.row_stride as isize,
                b.as_ptr(),
                rhs.col_stride as isize,
                rhs.row_stride as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::CpuOptions;

    #[test]
    fn dot_products_of_every_length_on_every_path() {
        for isa in Isa::available() {
            let backend = CpuBackend::new(&CpuOptions { isa: Some(isa), ..CpuOptions::default() }).unwrap();
            for (len, outputs) in [(0, 3), (1, 1), (15, 4), (33, 5), (64, 9), (771, 2)] {
                let number = |i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0;
                let x: Vec<f32> = (0..len).map(number).collect();
                let wide: Vec<f32> = (7..7 + len * outputs).map(number).collect();
                let narrow: Vec<bf16> = wide.iter().map(|&w| bf16::from_f32(w)).collect();
                for weight in [Floats::F32(&wide), Floats::Bf16(&narrow)] {
                    let mut out = vec![f32::NAN; outputs];
                    dots(&backend, &x, weight, len % 2 == 0, &mut out);
                    for (o, out) in out.iter().enumerate() {
                        let row = o * len..(o + 1) * len;
                        let terms = x.iter().zip(row).map(|(x, at)| {
                            let w = if let Floats::F32(w) = weight { w[at] } else { narrow[at].to_f32() };
                            f64::from(*x) * f64::from(w)
                        });
                        let want: f64 = terms.sum();
                        assert!((f64::from(*out) - want).abs() < 1e-4, "{isa:?} {len} {o}: {out} for {want}");
                    }
                }
            }
        }
    }
}
