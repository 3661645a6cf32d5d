//! Scalar functions that the compiler can vectorise: no branches, no calls, no tables.

/// eˣ within 2 units in the last place; 0 below −87.3 (no subnormals), +∞ above 88.7, NaN stays NaN.
///
/// Range reduction to |r| ≤ ln 2 / 2, then the Taylor series to r⁷, whose remainder there is below 1e-8.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
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
    // 2ⁿ in two factors, so that n = 128 does not overflow before the small factor applies.
    let half = (shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32) >> 1;
    let rest = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32 - half;
    let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let y = (p + 1.0) * scale(half) * scale(rest);
    let y = if x < -87.3 { 0.0 } else { y };
    if x > 88.7 { f32::INFINITY } else { y }
}

/// eˣ of a difference x ≤ 0 of cumulative sums, as [`exp`]; 0 below −44, where it is less than 2⁻⁶³.
///
/// Beside the newest position's weight of 1, no fp32 sum could tell. But products with smaller numbers would be subnormal, and
/// each of those costs the CPU a hundred cycles.
#[inline(always)]
pub(crate) fn decay(x: f32) -> f32 {
    if x < -44.0 { 0.0 } else { exp(x) }
}

/// 1 / (1 + e⁻ˣ); the derivative of [`softplus`].
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x).
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Derivative of [`silu`].
#[inline(always)]
pub(crate) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// ln(1 + eˣ) within 4 units in the last place; 0 below −87.3 (no subnormals), NaN stays NaN.
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
    let mut acc = [0.0f32; SUMS];
    let whole = len / SUMS * SUMS;
    let inputs = inputs.map(|s| &s[..len]);
    for i in (0..whole).step_by(SUMS) {
        let block: [&[f32]; N] = std::array::from_fn(|n| &inputs[n][i..i + SUMS]);
        for (lane, a) in acc.iter_mut().enumerate() {
            *a += f(std::array::from_fn(|n| block[n][lane]));
        }
    }
    for j in whole..len {
        acc[j - whole] += f(std::array::from_fn(|n| inputs[n][j]));
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

#[inline(always)]
fn sum_of_sums(mut acc: [f32; SUMS]) -> f32 {
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

    /// Worst relative error of [`exp`] over its range, in units of f32 epsilon.
    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        let mut x = -87.29f32;
        while x < 88.7 {
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
            x += 0.000_37;
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
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
    fn dot_takes_every_length() {
        for n in [0, 1, 15, 16, 17, 47] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(dot(&a, &a), (0..n).map(|i| (i * i) as f32).sum::<f32>());
        }
    }
}
