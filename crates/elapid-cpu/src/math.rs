//! Scalar functions that the compiler can vectorise: no branches, no calls, no tables. ε is 2⁻²³; the bounds are those of the tests, which
//! go over the whole range of f32.

/// eˣ as m · 2ⁿ, for x of which n fits: (m, n).
///
/// Range reduction to |r| ≤ ln 2 / 2, then the Taylor series to r⁷, whose remainder there is below 1e-8.
#[inline(always)]
fn split_exp(x: f32) -> (f32, i32) {
    // Adding 1.5·2²³ leaves round(x·log₂e) in the low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = (p * r) * r + r;
    (p + 1.0, shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32)
}

/// 2ᵉ for e from −126 to 127; ∞ for 128.
#[inline(always)]
fn power_of_two(e: i32) -> f32 {
    f32::from_bits(((e + 127) << 23) as u32)
}

/// eˣ within 2 ε; 0 below −87.3 (no subnormals), +∞ above 88.7, NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (m, n) = split_exp(x);
    // In two factors, so that n = 128 does not overflow before the small factor applies.
    let half = n >> 1;
    let y = m * power_of_two(half) * power_of_two(n - half);
    let y = if x < -87.3 { 0.0 } else { y };
    if x > 88.7 { f32::INFINITY } else { y }
}

/// eˣ of a difference x ≤ 0 of cumulative sums, as [`exp`]; 0 below −43.6, where it is less than 2⁻⁶². Of x > 0 it gives anything.
///
/// Beside the newest position's weight of 1, no fp32 sum could tell. But products with smaller numbers would be subnormal, and
/// each of those costs the CPU a hundred cycles. (The product of two decays is not.)
#[inline(always)]
pub(crate) fn decay(x: f32) -> f32 {
    let (m, n) = split_exp(x);
    if x < -43.6 { 0.0 } else { m * power_of_two(n) }
}

/// The product of two decays, 0 where [`decay`] would give 0.
#[inline(always)]
pub(crate) fn joined(a: f32, b: f32) -> f32 {
    // e^−43.6.
    const LEAST: f32 = 1.161e-19;
    let both = a * b;
    if both < LEAST { 0.0 } else { both }
}

/// `x` if `live`, else 0. Said with bits, since the compiler makes of an `if` around an assignment stores and loads under a mask, and
/// such a load waits until the store before it has reached the cache.
#[inline(always)]
pub(crate) fn only(live: bool, x: f32) -> f32 {
    f32::from_bits(x.to_bits() & u32::from(live).wrapping_neg())
}

/// 1 / (1 + e⁻ˣ) within 2.5 ε; 0 below −88.4. The derivative of [`softplus`].
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    // Beyond these ends the result is 0 or 1 all the same.
    let (m, n) = split_exp((-x).clamp(-87.0, 89.0));
    1.0 / (1.0 + m * power_of_two(n))
}

/// x · sigmoid(x) within 3 ε; −0 below −88.4, where it is less than 3e-37. −∞ gives NaN.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Derivative of [`silu`] where s = [`sigmoid`]`(x)` is at hand, within 5 ε of itself and 5 ε more (it passes through 0). ±∞ give NaN.
#[inline(always)]
pub(crate) fn slope_at(x: f32, s: f32) -> f32 {
    s * (1.0 + x * (1.0 - s))
}

/// ln(1 + eˣ) within 4 ε; 0 below −87.3 (no subnormals), NaN stays NaN.
///
/// max(x, 0) + ln(1 + t) with t = e^−|x| ≤ 1, and ln(1 + t) = 2 artanh z with z = t / (2 + t) ≤ ⅓ by the series to z¹³, whose
/// remainder is below 1e-8 of it.
#[inline(always)]
pub(crate) fn softplus(x: f32) -> f32 {
    let t = exp(-x.abs());
    let z = t / (2.0 + t);
    let w = z * z;
    let mut p = 2.0 / 13.0;
    p = p * w + 2.0 / 11.0;
    p = p * w + 2.0 / 9.0;
    p = p * w + 2.0 / 7.0;
    p = p * w + 2.0 / 5.0;
    p = p * w + 2.0 / 3.0;
    p = p * w + 2.0;
    (if x > 0.0 { x } else { 0.0 }) + z * p
}

/// Numbers of one vector of the widest path.
pub(crate) const LANES: usize = 16;
/// Partial sums: four vectors of the widest path, which hide the latency of an addition. (With one vector's worth, the compiler
/// unrolls the loop over them and then finds no vectors.)
const SUMS: usize = 4 * LANES;

/// Σ f(aᵢ, …) in interleaved partial sums: an order that does not depend on the instruction set.
#[inline(always)]
pub(crate) fn sum_map<const N: usize>(inputs: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let len = inputs[0].len();
    let inputs = inputs.map(|input| input[..len].as_chunks::<SUMS>());
    let mut acc = [0.0f32; SUMS];
    for block in 0..len / SUMS {
        let block = inputs.map(|(blocks, _)| &blocks[block]);
        for (lane, a) in acc.iter_mut().enumerate() {
            *a += f(block.map(|numbers| numbers[lane]));
        }
    }
    for (lane, a) in acc.iter_mut().enumerate().take(len % SUMS) {
        *a += f(inputs.map(|(_, rest)| rest[lane]));
    }
    sum_of_sums(acc)
}

/// Replaces every number by its `f` and gives the sum, in the order of [`sum_map`].
#[inline(always)]
pub(crate) fn map_sum(values: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut acc = [0.0f32; SUMS];
    let (blocks, rest) = values.as_chunks_mut::<SUMS>();
    for block in blocks {
        for (a, x) in acc.iter_mut().zip(block) {
            *x = f(*x);
            *a += *x;
        }
    }
    for (a, x) in acc.iter_mut().zip(rest) {
        *x = f(*x);
        *a += *x;
    }
    sum_of_sums(acc)
}

/// The sum of partial sums, by halves: lane + 32, + 16, + 8, …
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn sum_of_sums(acc: [f32; SUMS]) -> f32 {
    by_halves(acc)
}

/// The same, four by four. (On its own the compiler adds the 64 numbers one by one.)
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn sum_of_sums(acc: [f32; SUMS]) -> f32 {
    use std::arch::x86_64::*;
    // SAFETY: every x86-64 CPU has SSE; each load is inside its quad.
    unsafe {
        let quads: [__m128; 16] = std::array::from_fn(|q| _mm_loadu_ps(acc.as_chunks::<4>().0[q].as_ptr()));
        let quads: [__m128; 8] = std::array::from_fn(|q| _mm_add_ps(quads[q], quads[q + 8]));
        let quads: [__m128; 4] = std::array::from_fn(|q| _mm_add_ps(quads[q], quads[q + 4]));
        let quad = _mm_add_ps(_mm_add_ps(quads[0], quads[2]), _mm_add_ps(quads[1], quads[3]));
        let pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline(always)]
fn by_halves(mut acc: [f32; SUMS]) -> f32 {
    let mut width = SUMS / 2;
    while width > 0 {
        for lane in 0..width {
            acc[lane] += acc[lane + width];
        }
        width /= 2;
    }
    acc[0]
}

/// Σ aᵢ bᵢ.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_map([a, b], |[a, b]| a * b)
}

/// Σ aᵢ² in f64, where the square of no finite fp32 number overflows or vanishes.
#[inline(always)]
pub(crate) fn sum_of_squares(a: &[f32]) -> f64 {
    let mut acc = [0.0f64; LANES];
    let (parts, rest) = a.as_chunks::<LANES>();
    for part in parts.iter().map(|part| &part[..]).chain([rest]) {
        for (acc, a) in acc.iter_mut().zip(part) {
            *acc += f64::from(*a) * f64::from(*a);
        }
    }
    acc.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silu_slope(x: f32) -> f32 {
        slope_at(x, sigmoid(x))
    }

    /// Every 199th f32, subnormals and both signs with it, and all of the stretches where functions change over to their limits.
    fn everywhere() -> impl Iterator<Item = f32> {
        let every = (0..=u32::MAX).step_by(199);
        let ends = [20.0f32, 43.6, 87.3, 88.7].map(|end| (0.999 * end).to_bits()..(1.001 * end).to_bits());
        let ends = ends.into_iter().flatten().flat_map(|bits| [bits, bits | 1 << 31]);
        every.chain(ends).map(f32::from_bits).filter(|x| x.is_finite())
    }

    /// The worst |f(x) − exact(x)| over `inside`, in units of ε·|exact(x)| + `floor`.
    fn worst(
        f: impl Fn(f32) -> f32,
        exact: impl Fn(f64) -> f64,
        floor: f64,
        inside: impl Fn(f32) -> bool,
    ) -> (f64, f32) {
        let mut worst = (0.0, 0.0);
        for x in everywhere().filter(|x| inside(*x)) {
            let want = exact(f64::from(x));
            let error = (f64::from(f(x)) - want).abs() / (f64::from(f32::EPSILON) * want.abs() + floor);
            assert!(!error.is_nan(), "{x:e}: {} for {want:e}", f(x));
            if error > worst.0 {
                worst = (error, x);
            }
        }
        worst
    }

    /// Far below the smallest normal number: nothing divides by zero, and nothing is forgiven.
    const NO_FLOOR: f64 = 1e-60;

    #[test]
    fn exp_over_the_whole_range() {
        let (error, x) = worst(exp, f64::exp, NO_FLOOR, |x| (-87.3..=88.7).contains(&x));
        assert!(error < 2.0, "{error} at {x:e}");
        let (error, x) = worst(decay, f64::exp, NO_FLOOR, |x| (-43.6..=0.0).contains(&x));
        assert!(error < 2.0, "{error} at {x:e}");
        for x in everywhere() {
            assert!(x >= -87.3 || exp(x) == 0.0, "{x:e}");
            assert!(x <= 88.7 || exp(x) == f32::INFINITY, "{x:e}");
            assert!(x >= -43.6 || decay(x) == 0.0, "{x:e}");
        }
    }

    #[test]
    fn sigmoid_and_silu_over_the_whole_range() {
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        // Below −88.4 both are 0: less than 1e-38, and for silu 88.4 times as much.
        let (error, x) = worst(sigmoid, sigma, 1e-38, |_| true);
        assert!(error < 2.5, "{error} at {x:e}");
        let (error, x) = worst(silu, |x| x * sigma(x), 3e-37, |_| true);
        assert!(error < 3.0, "{error} at {x:e}");
        // The slope has a zero at −1.28, so that its error is measured against 1.
        let slope = |x: f64| sigma(x) * (1.0 + x * sigma(-x));
        let (error, x) = worst(silu_slope, slope, f64::from(f32::EPSILON), |_| true);
        assert!(error < 5.0, "{error} at {x:e}");
    }

    #[test]
    fn t6_softplus_over_the_whole_range() {
        let exact = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        let (error, x) = worst(softplus, exact, NO_FLOOR, |x| x >= -87.3);
        assert!(error < 4.0, "{error} at {x:e}");
        assert!(everywhere().all(|x| x >= -87.3 || softplus(x) == 0.0));
    }

    #[test]
    fn what_is_not_finite() {
        for f in [exp, decay, sigmoid, silu, silu_slope, softplus] {
            assert!(f(f32::NAN).is_nan());
        }
        assert_eq!(
            [exp, sigmoid, silu, softplus].map(|f| f(f32::INFINITY)),
            [f32::INFINITY, 1.0, f32::INFINITY, f32::INFINITY]
        );
        assert_eq!([exp, decay, sigmoid, softplus].map(|f| f(f32::NEG_INFINITY)), [0.0; 4]);
        assert!(silu(f32::NEG_INFINITY).is_nan() && silu_slope(f32::NEG_INFINITY).is_nan());
        assert!(silu_slope(f32::INFINITY).is_nan());
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e4), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(1e4), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(sigmoid(f32::NAN).is_nan());
        assert_eq!(silu(-200.0), 0.0);
        assert_eq!(silu(200.0), 200.0);
    }

    #[test]
    fn t6_softplus_is_linear_where_exp_overflows() {
        assert_eq!(softplus(1000.0), 1000.0);
        assert_eq!(softplus(20.5), 20.5);
        assert!((softplus(20.0) - 20.0).abs() < 1e-6);
    }

    #[test]
    fn a_sum_of_what_is_replaced_is_the_sum_of_what_is_there() {
        for n in [0, 1, 63, 64, 65, 200] {
            let before: Vec<f32> = (0..n).map(|i| (i as f32).sin()).collect();
            let mut after = before.clone();
            let sum = map_sum(&mut after, |x| 2.0 * x);
            assert!(after.iter().zip(&before).all(|(a, b)| *a == 2.0 * b));
            assert_eq!(sum, sum_map([&after], |[x]| x));
        }
    }

    #[test]
    fn partial_sums_are_added_in_one_order_everywhere() {
        let numbers: [f32; SUMS] = std::array::from_fn(|i| (i as f32 * 1.7).sin());
        assert_eq!(sum_of_sums(numbers), by_halves(numbers));
    }

    #[test]
    fn dot_takes_every_length() {
        for n in [0, 1, 15, 63, 64, 65, 191] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(dot(&a, &a), (0..n).map(|i| (i * i) as f32).sum::<f32>());
        }
    }
}
