//! Numbers from memory into panels.

use std::arch::x86_64::*;

use half::bf16;

use super::super::Mat;
use super::{LANES, Unit};
use crate::tensor::Floats;

/// The first `lanes` of a vector.
#[inline(always)]
pub(super) fn mask(lanes: usize) -> __mmask16 {
    if lanes >= LANES { !0 } else { (1 << lanes) - 1 }
}

/// Copies the rows of `mat`, up to `WIDTH` or twice 8, into panels `[units, WIDTH]` that begin `apart` from each other; rows
/// that are missing in a panel become zeros, and so does the second number of a last unit that has but one.
///
/// # Safety
/// The CPU must have AVX-512; `to` must hold the units of as many panels as the rows need.
pub(super) unsafe fn pack<U: Unit, const WIDTH: usize>(mat: Mat, to: *mut f32, apart: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match mat.data {
            Floats::F32(data) => pack_from::<f32, U, WIDTH>(data, mat, to, apart),
            Floats::Bf16(data) => pack_from::<bf16, U, WIDTH>(data, mat, to, apart),
        }
    }
}

/// A number in memory.
pub(super) trait Number {
    /// The numbers at `from` that the mask selects, as the bits of fp32; zeros elsewhere.
    ///
    /// # Safety
    /// The CPU must have AVX-512; the selected places must be valid.
    unsafe fn wide(from: *const Self, mask: __mmask16) -> __m512i;

    /// The same as bf16, in the lower half of each lane.
    ///
    /// # Safety
    /// As above.
    unsafe fn narrow(from: *const Self, mask: __mmask16) -> __m512i;

    /// The `count` numbers from `from` on as sixteen units of two bf16; zeros for what they lack of 32.
    ///
    /// # Safety
    /// As above, of `count` places.
    unsafe fn pairs(from: *const Self, count: usize) -> __m512i;
}

impl Number for f32 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn wide(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_epi32(mask, from.cast()) }
    }

    /// To nearest, ties to even; NaN stays NaN.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn narrow(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's promise.
        let bits = unsafe { Self::wide(from, mask) };
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let x = _mm512_castsi512_ps(bits);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let quiet = _mm512_set1_epi32(0x0040_0000);
        _mm512_srli_epi32::<16>(_mm512_mask_or_epi32(rounded, nan, bits, quiet))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn pairs(from: *const Self, count: usize) -> __m512i {
        // SAFETY: the masks keep to `count` places.
        unsafe {
            let low = Self::narrow(from, mask(count));
            let high = Self::narrow(from.wrapping_add(LANES), mask(count.saturating_sub(LANES)));
            let low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(low));
            _mm512_inserti64x4::<1>(low, _mm512_cvtepi32_epi16(high))
        }
    }
}

impl Number for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn wide(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's promise.
        _mm512_slli_epi32::<16>(unsafe { Self::narrow(from, mask) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn narrow(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's promise.
        _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
    }

    /// Two that follow each other are a unit as they are.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn pairs(from: *const Self, count: usize) -> __m512i {
        let mask = if count >= 2 * LANES { !0 } else { (1 << count) - 1 };
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) }
    }
}

/// [`pack`] from memory of one type.
///
/// # Safety
/// As for [`pack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_from<T: Number, U: Unit, const WIDTH: usize>(
    data: &[T],
    mat: Mat,
    to: *mut f32,
    apart: usize,
) {
    const { assert!(WIDTH == LANES / 2 || WIDTH.is_multiple_of(LANES)) };
    let (rows, k, stride) = (mat.rows, mat.cols, mat.row_stride.max(mat.col_stride));
    let units = k.div_ceil(U::NUMBERS);
    let data = data.as_ptr();
    // A vector fills a part of one panel, or of a panel of 8 rows all; then its other half goes to the next one, if any.
    let width = WIDTH.max(LANES);
    let half = WIDTH < LANES;
    // What the next call will want lies this far away, where no hardware looks for it ahead of time: in other pages, mostly.
    let next = width * mat.row_stride;
    let put = |at: *mut f32, vector: __m512i| {
        // SAFETY: inside the panels.
        unsafe {
            if half {
                _mm256_storeu_si256(at.cast(), _mm512_castsi512_si256(vector));
                if rows > WIDTH {
                    _mm256_storeu_si256(at.add(apart).cast(), _mm512_extracti64x4_epi64::<1>(vector));
                }
            } else {
                _mm512_storeu_epi32(at.cast(), vector);
            }
        }
    };
    if mat.row_stride == 1 {
        // The numbers of one k lie side by side.
        for unit in 0..units {
            for v in (0..width).step_by(LANES) {
                let keep = mask(rows.saturating_sub(v));
                let at = data.wrapping_add(unit * U::NUMBERS * stride + v);
                for number in 0..U::NUMBERS {
                    _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(number * stride + next).cast());
                }
                // SAFETY: the mask keeps to the rows of the matrix, `k` to its columns.
                unsafe {
                    let vector = if U::NUMBERS == 1 {
                        T::wide(at, keep)
                    } else {
                        let odd = if 2 * unit + 1 < k { keep } else { 0 };
                        let odd = T::narrow(at.wrapping_add(stride), odd);
                        _mm512_or_si512(T::narrow(at, keep), _mm512_slli_epi32::<16>(odd))
                    };
                    put(to.add(unit * WIDTH + v), vector);
                }
            }
        }
        return;
    }
    // The numbers of one row lie side by side: sixteen by sixteen units are transposed.
    for v in (0..width).step_by(LANES) {
        for from in (0..units).step_by(LANES) {
            let mut block = [_mm512_setzero_si512(); LANES];
            for (i, row) in block.iter_mut().enumerate() {
                if v + i < rows {
                    let first = from * U::NUMBERS;
                    let at = data.wrapping_add((v + i) * stride + first);
                    _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(next).cast());
                    // SAFETY: the masks keep to the columns of the matrix.
                    unsafe {
                        *row = if U::NUMBERS == 1 {
                            T::wide(at, mask(k - first))
                        } else {
                            T::pairs(at, k - first)
                        };
                    }
                }
            }
            transpose(&mut block);
            for (i, column) in block.iter().enumerate() {
                if from + i < units {
                    // SAFETY: inside the panels.
                    unsafe { put(to.add((from + i) * WIDTH + v), *column) };
                }
            }
        }
    }
}

/// Transposes sixteen by sixteen lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(block: &mut [__m512i; LANES]) {
    // Pairs of rows, then of pairs: afterwards vector 4·a + b holds, in its four parts of four lanes, rows 4·a … 4·a + 3
    // of columns b, b + 4, b + 8 and b + 12.
    for quad in block.chunks_exact_mut(4) {
        let (low, high) = (_mm512_unpacklo_epi32(quad[0], quad[1]), _mm512_unpackhi_epi32(quad[0], quad[1]));
        let (low2, high2) =
            (_mm512_unpacklo_epi32(quad[2], quad[3]), _mm512_unpackhi_epi32(quad[2], quad[3]));
        quad[0] = _mm512_unpacklo_epi64(low, low2);
        quad[1] = _mm512_unpackhi_epi64(low, low2);
        quad[2] = _mm512_unpacklo_epi64(high, high2);
        quad[3] = _mm512_unpackhi_epi64(high, high2);
    }
    let quads = *block;
    for b in 0..4 {
        let [q0, q1, q2, q3] = [quads[b], quads[4 + b], quads[8 + b], quads[12 + b]];
        // Parts 0 and 2, respectively 1 and 3, of two vectors each.
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(q0, q1), _mm512_shuffle_i32x4::<0xdd>(q0, q1));
        let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(q2, q3), _mm512_shuffle_i32x4::<0xdd>(q2, q3));
        block[b] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        block[b + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        block[b + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        block[b + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
}
