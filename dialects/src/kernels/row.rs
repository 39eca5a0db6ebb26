//! Sums, maxima and exponentials over contiguous rows of f32.
//!
//! Each is compiled for several instruction sets and picks one at run time. All give the same bits: a sum is
//! always kept in [`LANES`] partial sums, folded in the same order, and nothing is contracted to fused multiply-adds.

use multiversion::multiversion;

/// Partial sums of a row.
const LANES: usize = 16;

/// `e^x`, within 2 units in the last place: `x = n ln 2 + r`, a polynomial for `e^r`, and `n` added to the exponent.
/// Below the smallest normal result it is zero.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// ln 2 in two parts, the first with few enough bits that `n * LN2_HIGH` is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding and taking away 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    // Taylor's series to degree 7 on |r| <= ln(2)/2: the next term is below 6e-9.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // In two halves, so that n = 128 does not overflow before the product does.
    let half = (n * 0.5) as i32;
    let power = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let y = p * power(half) * power(n as i32 - half);
    let y = if x < -87.336_54 { 0.0 } else { y };
    let y = if x > 88.722_83 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

/// Folds a row into lanes with `by`, and the lanes pairwise with `join`.
#[inline(always)]
fn fold(x: &[f32], start: f32, by: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for c in whole {
        for l in 0..LANES {
            lanes[l] = by(lanes[l], c[l]);
        }
    }
    for (l, &v) in rest.iter().enumerate() {
        lanes[l] = by(lanes[l], v);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = join(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn sum(x: &[f32]) -> f32 {
    fold(x, 0.0, |a, v| a + v, |a, b| a + b)
}

/// The sum of `(x - center)^2`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn sum_of_squares(x: &[f32], center: f32) -> f32 {
    fold(x, 0.0, |a, v| a + (v - center) * (v - center), |a, b| a + b)
}

/// The largest element, negative infinity for none. A NaN is passed over.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn max(x: &[f32]) -> f32 {
    fold(x, f32::NEG_INFINITY, |a, v| if v > a { v } else { a }, f32::max)
}

/// The sum of `e^(x - shift)`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn sum_exp(x: &[f32], shift: f32) -> f32 {
    fold(x, 0.0, |a, v| a + exp(v - shift), |a, b| a + b)
}

/// Replaces each element by its exponential.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn exp_all(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = exp(*v));
}

/// Replaces each element `x` by `(x - shift) * scale`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn shift_scale(x: &mut [f32], shift: f32, scale: f32) {
    x.iter_mut().for_each(|v| *v = (*v - shift) * scale);
}

/// Replaces each element `x` by `(x - shift) * factor * scale`, with one scale per element.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn normalize(x: &mut [f32], shift: f32, factor: f32, scale: &[f32]) {
    x.iter_mut().zip(scale).for_each(|(v, s)| *v = (*v - shift) * factor * s);
}

/// Adds `y` element by element.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(v, w)| *v += w);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn exp_shifted(x: &mut [f32], shift: f32) {
    x.iter_mut().for_each(|v| *v = exp(*v - shift));
}

/// Rounds a row to int8 and back: to multiples of `absmax / 127`, halves to even.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn round_to_int8(x: &mut [f32]) {
    let top = fold(x, 0.0, |a, v| if v.abs() > a { v.abs() } else { a }, f32::max);
    let (scale, inverse) = (top / 127.0, if top == 0.0 { 0.0 } else { 127.0 / top });
    x.iter_mut().for_each(|v| *v = (*v * inverse).round_ties_even() * scale);
}

/// The softmax of a row, in place. A row that is all negative infinity gives NaN, as dividing zero by zero does.
pub fn softmax(x: &mut [f32]) {
    let top = max(x);
    exp_shifted(x, top);
    let total = sum(x);
    shift_scale(x, 0.0, 1.0 / total);
}

/// The softmax of a row and one more element, without that element's share.
pub fn softmax_beside(x: &mut [f32], other: f32) {
    let top = max(x).max(other);
    exp_shifted(x, top);
    let total = sum(x) + exp(other - top);
    shift_scale(x, 0.0, 1.0 / total);
}

/// The logarithm of the softmax of a row, in place.
pub fn log_softmax(x: &mut [f32]) {
    let top = max(x);
    let log = sum_exp(x, top).ln();
    shift_scale(x, top, 1.0);
    shift_scale(x, log, 1.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_double_precision_one() {
        for i in -87_000..88_700 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!((got - want).abs() <= 2.4e-7 * want, "exp({x}) = {got}, expected {want}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn rows_of_every_length_are_summed_whole() {
        for n in 0..70usize {
            let x: Vec<f32> = (0..n).map(|i| i as f32 + 1.0).collect();
            assert_eq!(sum(&x), (n * (n + 1) / 2) as f32);
            assert_eq!(sum_of_squares(&x, 1.0), x.iter().map(|v| (v - 1.0) * (v - 1.0)).sum::<f32>());
            assert_eq!(max(&x), if n == 0 { f32::NEG_INFINITY } else { n as f32 });
        }
    }

    #[test]
    fn softmax_sums_to_one_and_a_masked_row_is_nan() {
        let mut x = vec![1000.0, 1001.0, f32::NEG_INFINITY];
        softmax(&mut x);
        // 1 / (1 + e), computed by hand.
        assert!((x[0] - 0.268_941_43).abs() < 1e-7 && (x[1] - 0.731_058_6).abs() < 1e-7 && x[2] == 0.0);
        let mut x = vec![f32::NEG_INFINITY; 3];
        softmax(&mut x);
        assert!(x.iter().all(|v| v.is_nan()));
        // 1 / (1 + e + 1) beside a third element like the first.
        let mut x = vec![1000.0, 1001.0];
        softmax_beside(&mut x, 1000.0);
        assert!((x[0] - 0.211_941_55).abs() < 1e-7 && (x[1] - 0.576_116_9).abs() < 1e-7);
        let mut x = vec![0.0, 0.0];
        log_softmax(&mut x);
        assert!((x[0] + std::f32::consts::LN_2).abs() < 1e-7);
    }
}
