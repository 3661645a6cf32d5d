//! Matrix products on AVX-512: packed panels and a tile of sums that stays in registers.
//!
//! A panel holds some rows of the left operand, or some columns of the right one, k by k, in units of four bytes: one
//! fp32 number, or two bf16 numbers that follow each other along k. So one kernel serves both: only the instruction
//! that adds the product of two units to a sum differs. Sums are fp32, over k in its order.

mod pack;

use std::arch::x86_64::*;

use self::pack::{Number, mask, pack};
use super::{Into, Mat, Triangle};
use crate::CpuBackend;
use crate::isa::Isa;
use crate::tensor::Floats;

/// Rows of a tile.
const ROWS: usize = 8;
/// Columns of a tile: three vectors, so that each broadcast serves three sums (docs/lab.md).
const COLS: usize = 48;
const LANES: usize = 16;
/// Units along k of one pass: a panel of the right operand (24 KiB) stays in the first cache, and one tile's sums are
/// carried to and from memory seldom.
const DEPTH: usize = 128;

/// `dst [m, n]` (rows `stride` apart) = or += `lhs · rhs`.
///
/// # Safety
/// The CPU must have the instructions of the backend's path; the places of `dst` must be valid and this thread's own.
pub(super) unsafe fn product(
    backend: &CpuBackend,
    triangle: Triangle,
    into: Into,
    dst: *mut f32,
    stride: usize,
    lhs: Mat,
    rhs: Mat,
) {
    let any_bf16 = matches!(lhs.data, Floats::Bf16(_)) || matches!(rhs.data, Floats::Bf16(_));
    // SAFETY: the caller's promises; this path was chosen for a CPU that has these instructions.
    unsafe {
        if any_bf16 && backend.isa == Isa::Avx512Bf16 {
            passes::<Pairs>(backend, triangle, into, dst, stride, lhs, rhs);
        } else {
            passes::<Single>(backend, triangle, into, dst, stride, lhs, rhs);
        }
    }
}

/// What a unit is.
trait Unit {
    /// Numbers of a unit.
    const NUMBERS: usize;

    /// A left operand that needs no panels, and how many units its rows are apart: its numbers are units, and follow each other along k.
    /// Rows whole pages apart would drive each other out of the first cache.
    fn in_place(lhs: &Mat) -> Option<(*const f32, usize)> {
        /// fp32 numbers.
        const PAGE: usize = 1024;
        let data = match lhs.data {
            Floats::F32(data) if Self::NUMBERS == 1 => data.as_ptr(),
            Floats::Bf16(data) if Self::NUMBERS == 2 => data.as_ptr().cast(),
            _ => return None,
        };
        // A unit must not reach over the end of a row.
        let whole = lhs.cols.is_multiple_of(Self::NUMBERS) && lhs.row_stride.is_multiple_of(Self::NUMBERS);
        let apart = lhs.row_stride / Self::NUMBERS;
        let fits = lhs.col_stride == 1 && whole && data.is_aligned();
        (fits && !apart.is_multiple_of(PAGE)).then_some((data, apart))
    }

    /// Sums of one tile.
    ///
    /// # Safety
    /// The CPU must have the instructions; every place that the tile names must be valid.
    unsafe fn tile<const VECTORS: usize>(tile: &Tile);
}

/// One fp32 number.
struct Single;
/// Two bf16 numbers.
struct Pairs;

/// Rows of the left operand.
#[derive(Clone, Copy)]
enum Left {
    /// A panel.
    Packed(*const f32),
    /// Where they lie, so many numbers apart.
    InPlace(*const f32, usize),
}

/// One tile of the destination and what it comes from.
struct Tile {
    units: usize,
    a: Left,
    b: *const f32,
    dst: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    into: Into,
}

macro_rules! tile {
    ($name:ident, $features:literal, $multiply_add:expr) => {
        /// # Safety
        /// The CPU must have these instructions; `a` must hold `units · ROWS` units, or `rows` rows of `units`, and `b`
        /// `units · COLS`, and `dst` rows `stride` apart.
        #[target_feature(enable = $features)]
        unsafe fn $name<const VECTORS: usize>(t: &Tile) {
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            for r in 0..t.rows {
                for v in 0..VECTORS {
                    _mm_prefetch::<_MM_HINT_T0>(t.dst.wrapping_add(r * t.stride + v * LANES).cast());
                }
            }
            let mut add = |unit: usize, a: [*const f32; ROWS]| {
                // SAFETY: inside the panels, or the rows.
                unsafe {
                    let b = t.b.add(unit * COLS);
                    let mut lanes = [_mm512_setzero_ps(); VECTORS];
                    for (v, lanes) in lanes.iter_mut().enumerate() {
                        *lanes = _mm512_loadu_ps(b.add(v * LANES));
                    }
                    for (sums, a) in sums.iter_mut().zip(a) {
                        let x = _mm512_set1_ps(*a);
                        for (sum, lanes) in sums.iter_mut().zip(&lanes) {
                            *sum = $multiply_add(*sum, x, *lanes);
                        }
                    }
                }
            };
            match t.a {
                Left::Packed(a) => {
                    for unit in 0..t.units {
                        add(unit, std::array::from_fn(|r| a.wrapping_add(unit * ROWS + r)));
                    }
                }
                // Where rows are missing, the last one stands for them.
                Left::InPlace(a, apart) => {
                    let rows: [_; ROWS] = std::array::from_fn(|r| a.wrapping_add(r.min(t.rows - 1) * apart));
                    for unit in 0..t.units {
                        add(unit, rows.map(|row| row.wrapping_add(unit)));
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                if r < t.rows {
                    for (v, sum) in sums.iter().enumerate() {
                        let mask = mask(t.cols.saturating_sub(v * LANES));
                        // SAFETY: the mask keeps to the columns of the tile.
                        unsafe {
                            let at = t.dst.add(r * t.stride + v * LANES);
                            let sum = match t.into {
                                Into::Set => *sum,
                                Into::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), *sum),
                            };
                            _mm512_mask_storeu_ps(at, mask, sum);
                        }
                    }
                }
            }
        }
    };
}

tile!(tile_fp32, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum));
tile!(tile_bf16, "avx512f,avx512bf16", |sum, a, b| _mm512_dpbf16_ps(
    sum,
    std::mem::transmute::<__m512, __m512bh>(a),
    std::mem::transmute::<__m512, __m512bh>(b)
));

impl Unit for Single {
    const NUMBERS: usize = 1;

    unsafe fn tile<const VECTORS: usize>(tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile_fp32::<VECTORS>(tile) }
    }
}

impl Unit for Pairs {
    const NUMBERS: usize = 2;

    unsafe fn tile<const VECTORS: usize>(tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile_bf16::<VECTORS>(tile) }
    }
}

/// [`super::dots`], four rows at a time, one from each quarter of the weight: each quarter is a stream of its own, which the CPU
/// fetches ahead faster than four rows that take turns in one (docs/lab.md).
///
/// # Safety
/// The CPU must have AVX-512; `weight` must hold a row for every place of `out`.
pub(super) unsafe fn dots(x: &[f32], weight: Floats, once: bool, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match (weight, once) {
            (Floats::F32(weight), false) => dots_of::<_, _MM_HINT_T0>(x, weight, out),
            (Floats::F32(weight), true) => dots_of::<_, _MM_HINT_NTA>(x, weight, out),
            (Floats::Bf16(weight), false) => dots_of::<_, _MM_HINT_T0>(x, weight, out),
            (Floats::Bf16(weight), true) => dots_of::<_, _MM_HINT_NTA>(x, weight, out),
        }
    }
}

/// # Safety
/// As for [`dots`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dots_of<T: Number, const HINT: i32>(x: &[f32], weight: &[T], out: &mut [f32]) {
    const FEW: usize = 4;
    /// Bytes ahead of their use that numbers are asked for: what arrives while one line of memory is waited for.
    const AHEAD: usize = 2048;
    let (len, quarter) = (x.len(), out.len().div_ceil(FEW));
    for first in 0..quarter {
        // Where the last quarter is shorter, its last row is computed again and forgotten.
        let row = |r: usize| weight.as_ptr().wrapping_add((r * quarter + first).min(out.len() - 1) * len);
        let rows = [row(0), row(1), row(2), row(3)];
        let mut sums = [[_mm512_setzero_ps(); 2]; FEW];
        for from in (0..len).step_by(2 * LANES) {
            for row in rows {
                _mm_prefetch::<HINT>(row.wrapping_add(from).cast::<i8>().wrapping_add(AHEAD));
            }
            for half in 0..2 {
                let at = from + half * LANES;
                let mask = mask(len.saturating_sub(at));
                // SAFETY: the mask keeps to the row.
                unsafe {
                    let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().wrapping_add(at));
                    for (sums, row) in sums.iter_mut().zip(rows) {
                        let w = _mm512_castsi512_ps(T::wide(row.wrapping_add(at), mask));
                        sums[half] = _mm512_fmadd_ps(x, w, sums[half]);
                    }
                }
            }
        }
        for (out, [even, odd]) in out[first..].iter_mut().step_by(quarter).zip(sums) {
            *out = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
        }
    }
}

/// One pass over the destination for each [`DEPTH`] of k.
///
/// # Safety
/// As for [`product`].
unsafe fn passes<U: Unit>(
    backend: &CpuBackend,
    triangle: Triangle,
    into: Into,
    dst: *mut f32,
    stride: usize,
    lhs: Mat,
    rhs: Mat,
) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    let depth = DEPTH * U::NUMBERS;
    let panels = m.div_ceil(ROWS);
    let units = DEPTH.min(k.div_ceil(U::NUMBERS));
    let packed = if U::in_place(&lhs).is_some() { 0 } else { panels };
    let (a_len, b_len) = (packed * ROWS * units, COLS * units);
    let mut scratch = backend.pool.take::<f32>(a_len + b_len);
    let (b, a) = scratch.as_mut_slice::<f32>(a_len + b_len).split_at_mut(b_len);
    for first in (0..k.max(1)).step_by(depth) {
        let k = depth.min(k - first);
        let units = k.div_ceil(U::NUMBERS);
        let (lhs, rhs) = (lhs.cols(first, k), rhs.rows(first, k));
        let into = if first == 0 { into } else { Into::Add };
        // The units of a panel that may be other than zeros.
        let live = |panel: usize| {
            let inside = |row: usize| row.saturating_sub(first);
            match triangle {
                Triangle::LeftLower => 0..units.min(inside((panel + 1) * ROWS).div_ceil(U::NUMBERS)),
                Triangle::LeftUpper => units.min(inside(panel * ROWS) / U::NUMBERS)..units,
                _ => 0..units,
            }
        };
        let in_place = U::in_place(&lhs);
        // Two panels make a vector.
        for panel in (0..packed).step_by(2) {
            let (from, to) = (live(panel).start, live(panels.min(panel + 2) - 1).end);
            if from < to {
                let rows = lhs.rows(panel * ROWS, (2 * ROWS).min(m - panel * ROWS));
                let rows = rows.cols(from * U::NUMBERS, k.min(to * U::NUMBERS) - from * U::NUMBERS);
                let a = &mut a[(panel * units + from) * ROWS..];
                // SAFETY: the CPU has AVX-512; panels are as long as their units.
                unsafe { pack::<U, ROWS>(rows, a.as_mut_ptr(), ROWS * units) };
            }
        }
        for j in (0..n).step_by(COLS) {
            let cols = COLS.min(n - j);
            // SAFETY: as above.
            unsafe { pack::<U, COLS>(rhs.cols(j, cols).t(), b.as_mut_ptr(), 0) };
            for panel in 0..panels {
                let i = panel * ROWS;
                let live = live(panel);
                match triangle {
                    Triangle::ResultLower if j >= i + ROWS => continue,
                    // Zeros are set once and added never.
                    _ if live.is_empty() && into == Into::Add => continue,
                    _ => {}
                }
                let tile = Tile {
                    units: live.len(),
                    a: match in_place {
                        Some((data, apart)) => {
                            Left::InPlace(data.wrapping_add(i * apart + live.start), apart)
                        }
                        None => Left::Packed(a[panel * ROWS * units + live.start * ROWS..].as_ptr()),
                    },
                    b: b[live.start * COLS..].as_ptr(),
                    dst: dst.wrapping_add(i * stride + j),
                    stride,
                    rows: ROWS.min(m - i),
                    cols,
                    into,
                };
                // SAFETY: both panels are packed, or the rows of the left one lie in its slice, as `Mat` checked; the destination
                // is the caller's.
                unsafe {
                    match cols.div_ceil(LANES) {
                        1 => U::tile::<1>(&tile),
                        2 => U::tile::<2>(&tile),
                        _ => U::tile::<3>(&tile),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::CpuOptions;

    /// [`Pairs`] on a CPU that has no instruction for it.
    struct SlowPairs;

    #[target_feature(enable = "avx512f")]
    fn dot_pairs(sum: __m512, a: __m512, b: __m512) -> __m512 {
        let [a, b] = [a, b].map(|x| _mm512_castps_si512(x));
        let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
        let [a_low, b_low] = [a, b].map(|x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)));
        let [a_high, b_high] = [a, b].map(|x| _mm512_castsi512_ps(_mm512_and_si512(x, high)));
        _mm512_fmadd_ps(a_high, b_high, _mm512_fmadd_ps(a_low, b_low, sum))
    }

    tile!(tile_slow, "avx512f", |sum, a, b| dot_pairs(sum, a, b));

    impl Unit for SlowPairs {
        const NUMBERS: usize = 2;

        unsafe fn tile<const VECTORS: usize>(tile: &Tile) {
            // SAFETY: the caller's promise.
            unsafe { tile_slow::<VECTORS>(tile) }
        }
    }

    /// A matrix in memory, row-major with gaps or its transpose, in either dtype.
    struct Operand {
        wide: Vec<f32>,
        narrow: Vec<bf16>,
        rows: usize,
        cols: usize,
        /// Numbers between rows. Pairs of bf16 are multiplied in place where rows are an even number apart.
        gap: usize,
        transposed: bool,
        bf16: bool,
    }

    impl Operand {
        fn new(
            rng: &mut impl RngExt,
            (rows, cols): (usize, usize),
            gap: usize,
            transposed: bool,
            bf16: bool,
        ) -> Self {
            let len = rows * cols + gap * rows.max(cols);
            let wide: Vec<f32> = (0..len).map(|_| rng.random_range(-1.0..1.0)).collect();
            let mut narrow = vec![half::bf16::ZERO; len];
            crate::tensor::narrow(&wide, &mut narrow);
            Self { wide, narrow, rows, cols, gap, transposed, bf16 }
        }

        fn mat(&self) -> Mat<'_> {
            let data = if self.bf16 { Floats::Bf16(&self.narrow) } else { Floats::F32(&self.wide) };
            if self.transposed {
                Mat::strided(data, self.cols, self.rows, self.rows + self.gap).t()
            } else {
                Mat::strided(data, self.rows, self.cols, self.cols + self.gap)
            }
        }

        fn at(&self, i: usize, j: usize, rounded: bool) -> f64 {
            let at =
                if self.transposed { j * (self.rows + self.gap) + i } else { i * (self.cols + self.gap) + j };
            f64::from(if rounded || self.bf16 { self.narrow[at].to_f32() } else { self.wide[at] })
        }
    }

    type Product = unsafe fn(&CpuBackend, Triangle, Into, *mut f32, usize, Mat, Mat);

    fn check(product: Product, backend: &CpuBackend, rounded: bool) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        // With its gap, a row of 1021 is as long as a page.
        let sizes =
            [(1, 1, 1), (8, 48, 16), (7, 33, 15), (9, 15, 257), (40, 110, 600), (13, 49, 1021), (65, 1, 31)];
        for (m, n, k) in sizes {
            for case in 0..64 {
                let bit = |bit: usize| case >> bit & 1 == 1;
                let gap = if bit(5) { 4 } else { 3 };
                let (lhs, rhs) = (
                    Operand::new(&mut rng, (m, k), gap, bit(0), bit(1)),
                    Operand::new(&mut rng, (k, n), gap, bit(2), bit(3)),
                );
                let into = if bit(4) { Into::Add } else { Into::Set };
                let stride = n + 2;
                // What must not be touched, or only added to.
                let mut dst = vec![if bit(4) { 0.5 } else { f32::NAN }; m * stride];
                // SAFETY: the tests below ask the CPU; the destination is as large as it must be.
                unsafe {
                    product(backend, Triangle::None, into, dst.as_mut_ptr(), stride, lhs.mat(), rhs.mat())
                };
                for i in 0..m {
                    for j in 0..stride {
                        let got = dst[i * stride + j];
                        if j >= n {
                            assert!(
                                if bit(4) { got == 0.5 } else { got.is_nan() },
                                "{m} {n} {k}: gap written"
                            );
                            continue;
                        }
                        let sum = (0..k).map(|l| lhs.at(i, l, rounded) * rhs.at(l, j, rounded)).sum::<f64>();
                        let want = sum + if bit(4) { 0.5 } else { 0.0 };
                        let error = (f64::from(got) - want).abs();
                        assert!(
                            error < 1e-6 * (k as f64 + 10.0),
                            "{m} {n} {k}, case {case}: {got} for {want}"
                        );
                    }
                }
            }
        }
    }

    /// A triangle spares work and changes no number that is asked for.
    fn check_triangles(product: Product, backend: &CpuBackend) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(6);
        let (mut full, mut spared) = (Vec::new(), Vec::new());
        for (n, width) in [(1, 3), (17, 70), (128, 64), (300, 5)] {
            for case in 0..64 {
                let bit = |bit: usize| case >> bit & 1 == 1;
                let gap = if bit(5) { 4 } else { 3 };
                let (left, lower) = (bit(0), bit(1));
                let (k, cols) = if left { (n, width) } else { (width, n) };
                let mut lhs = Operand::new(&mut rng, (n, k), gap, bit(2), bit(3));
                let rhs = Operand::new(&mut rng, (k, cols), gap, bit(4), false);
                let zero = |i: usize, j: usize| if lower { j > i } else { j < i };
                if left {
                    for (i, j) in
                        (0..n).flat_map(|i| (0..n).map(move |j| (i, j))).filter(|&(i, j)| zero(i, j))
                    {
                        let at = if lhs.transposed { j * (n + gap) + i } else { i * (n + gap) + j };
                        (lhs.wide[at], lhs.narrow[at]) = (0.0, half::bf16::ZERO);
                    }
                }
                let triangle = match (left, lower) {
                    (true, true) => Triangle::LeftLower,
                    (true, false) => Triangle::LeftUpper,
                    (false, true) => Triangle::ResultLower,
                    (false, false) => continue,
                };
                for into in [Into::Set, Into::Add] {
                    for (dst, triangle) in [(&mut full, Triangle::None), (&mut spared, triangle)] {
                        dst.clear();
                        dst.resize(n * cols, if into == Into::Set { f32::NAN } else { 0.5 });
                        // SAFETY: the test below asks the CPU; the destination is as large as it must be.
                        unsafe {
                            product(backend, triangle, into, dst.as_mut_ptr(), cols, lhs.mat(), rhs.mat());
                        }
                    }
                    for (at, (full, spared)) in full.iter().zip(&spared).enumerate() {
                        if left || !zero(at / cols, at % cols) {
                            assert_eq!(full, spared, "{n} {width}, case {case}, at {at}");
                        }
                    }
                    let unread = (0..n * cols).filter(|at| spared[*at].is_nan()).count();
                    assert!(unread == 0 || !left);
                    // A tile may reach over the diagonal, but most of a triangle is spared.
                    assert!(left || into == Into::Add || n < 128 || 4 * unread > n * n);
                }
            }
        }
    }

    #[test]
    fn products_of_either_dtype_in_every_layout() {
        let backend = CpuBackend::new(&CpuOptions { poison: true, ..CpuOptions::default() }).unwrap();
        // SAFETY: the promise of the caller, `check`, is the same.
        let portable: Product = |b, _, i, d, s, l, r| unsafe { super::super::portable(b, i, d, s, l, r) };
        check(portable, &backend, false);
        if Isa::available().contains(&Isa::Avx512) {
            check(passes::<Single>, &backend, false);
            check(passes::<SlowPairs>, &backend, true);
            check_triangles(passes::<Single>, &backend);
            check_triangles(passes::<SlowPairs>, &backend);
        }
        if Isa::available().contains(&Isa::Avx512Bf16) {
            check(passes::<Pairs>, &backend, true);
        }
    }
}
