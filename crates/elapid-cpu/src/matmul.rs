//! Matrix products: `gemm` on one thread a tile, tiles cut by us.

use crate::parallel::{Shared, Workers};

/// A strided view of a matrix in `data`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major, rows `stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len());
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Row-major without gaps.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
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
}

/// What happens to the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// dst = lhs · rhs.
    Set,
    /// dst += lhs · rhs.
    Add,
}

/// Largest tile of a destination. Tiles are what threads share out; their extents decide how often `gemm` packs the
/// same operand again.
const TILE_ROWS: usize = 256;
const TILE_COLS: usize = 512;

/// `dst [rows, cols]` (row-major, rows `stride` apart) = or += `lhs · rhs`, over all workers.
pub(crate) fn matmul(workers: &Workers, into: Into, dst: &mut [f32], stride: usize, lhs: Mat, rhs: Mat) {
    let (m, n) = (lhs.rows, rhs.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * stride + n <= dst.len());
    let (tile_m, tile_n) = tile(m, n);
    let (down, across) = (m.div_ceil(tile_m), n.div_ceil(tile_n));
    let shared = Shared::new(dst);
    workers.each(down * across, |piece| {
        let (i, j) = (piece / across * tile_m, piece % across * tile_n);
        let (rows, cols) = (tile_m.min(m - i), tile_n.min(n - j));
        let lhs = Mat { data: &lhs.data[i * lhs.row_stride..], rows, ..lhs };
        let rhs = Mat { data: &rhs.data[j * rhs.col_stride..], cols, ..rhs };
        // SAFETY: tiles of one destination are disjoint.
        unsafe { product(into, &shared, i * stride + j, stride, lhs, rhs) };
    });
}

/// Extents of a tile: even shares, no larger than the constants above.
fn tile(m: usize, n: usize) -> (usize, usize) {
    let even = |len: usize, most: usize| len.div_ceil(len.div_ceil(most));
    (even(m, TILE_ROWS), even(n, TILE_COLS))
}

/// One product on the calling thread.
pub(crate) fn small(into: Into, dst: &mut [f32], stride: usize, lhs: Mat, rhs: Mat) {
    // SAFETY: the borrow of `dst` is unique.
    unsafe { product(into, &Shared::new(dst), 0, stride, lhs, rhs) };
}

/// One product into the places `from + i·stride + j` of `dst`.
///
/// # Safety
/// No other thread may touch those places meanwhile.
pub(crate) unsafe fn product(
    into: Into,
    dst: &Shared<'_, f32>,
    from: usize,
    stride: usize,
    lhs: Mat,
    rhs: Mat,
) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(k, rhs.rows);
    if m == 0 || n == 0 {
        return;
    }
    let dst = dst.pointer(from, (m - 1) * stride + n);
    // SAFETY: `Mat` checked that both operands lie inside their slices, the line above that the destination
    // does; the caller owns its places.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            stride as isize,
            into == Into::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
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
