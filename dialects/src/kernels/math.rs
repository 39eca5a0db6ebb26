//! Functions of f32 slices that the compiler turns into SIMD loops, for each instruction set of the CPU.
//!
//! `tanh` follows the polynomial of Cephes (S. Moshier) near zero; `erf` uses Chebyshev fits of `erf(x)/x` on [0, 1]
//! and of `log erfc(x)` on [1, 4]. Errors are at most 2 units in the last place for `exp` and `tanh`, 3 for `sigmoid`
//! and `erf`. NaN and infinities come out as the functions' limits.

use super::row::exp as exp1;
use multiversion::multiversion;

#[inline(always)]
fn tanh1(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.704_989e-3;
    for c in [2.063_909e-2, -5.373_971_6e-2, 0.133_314_42, -0.333_332_8] {
        p = p * z + c;
    }
    let small = p * z * x + x;
    let large = 1.0 - 2.0 / (exp1(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 { small.copysign(x) } else { large.copysign(x) }
}

#[inline(always)]
fn sigmoid1(x: f32) -> f32 {
    1.0 / (1.0 + exp1(-x))
}

#[inline(always)]
fn erf1(x: f32) -> f32 {
    let z = x * x;
    let mut p = 7.882_497_4e-5;
    for c in [
        -8.018_855e-4,
        5.189_312e-3,
        -2.685_433e-2,
        0.112_835_97,
        -0.376_126_26,
        std::f32::consts::FRAC_2_SQRT_PI,
    ] {
        p = p * z + c;
    }
    let small = x * p;
    let a = if x.abs() > 4.0 { 4.0 } else { x.abs() };
    let mut q = 1.614_061_6e-6;
    for c in [
        -4.559_062_3e-5,
        5.927_696e-4,
        -4.740_222_4e-3,
        2.636_471_8e-2,
        -0.109_978_24,
        -0.631_937_1,
        -1.130_166_6,
        3.032_13e-4,
    ] {
        q = q * a + c;
    }
    let large = (1.0 - exp1(q)).copysign(x);
    if x.abs() < 1.0 { small } else { large }
}

macro_rules! slices {
    ($($(#[$doc:meta])* $name:ident = $one:ident;)*) => {$(
        $(#[$doc])*
        #[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2", "aarch64+neon"))]
        pub fn $name(x: &[f32], out: &mut [f32]) {
            for (o, &x) in out.iter_mut().zip(x) {
                *o = $one(x);
            }
        }
    )*};
}
slices! {
    /// `out = e^x`, of slices of one length.
    exp = exp1;
    /// `out = tanh x`, of slices of one length.
    tanh = tanh1;
    /// `out = 1 / (1 + e^-x)`, of slices of one length.
    sigmoid = sigmoid1;
    /// `out = erf x`, of slices of one length.
    erf = erf1;
}

/// The error function in double precision, to about 1e-15: its Maclaurin series with `e^(-x^2)` factored out,
/// and Laplace's continued fraction of the complement beyond 3.
pub fn erf64(x: f64) -> f64 {
    let a = x.abs();
    let scale = 2.0 / std::f64::consts::PI.sqrt() * (-a * a).exp();
    let y = if a.is_nan() {
        a
    } else if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 1.0);
        while term > 1e-17 * sum {
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
            n += 1.0;
        }
        scale * sum
    } else {
        let tail = (1..=60).rev().fold(a, |f, k| a + k as f64 / 2.0 / f);
        1.0 - scale / 2.0 / tail
    };
    y.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ulps(got: f32, want: f64) -> f64 {
        let w = want as f32;
        let unit = f64::from(f32::from_bits(w.abs().to_bits() + 1)) - f64::from(w.abs());
        (f64::from(got) - want).abs() / unit
    }

    fn check(f: fn(&[f32], &mut [f32]), exact: fn(f64) -> f64, limit: f64) {
        let x: Vec<f32> = (-20_000..20_000).map(|i| i as f32 * 0.0043).collect();
        let mut y = vec![0.0; x.len()];
        f(&x, &mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let e = ulps(y, exact(x.into()));
            assert!(e <= limit, "at {x}: {y}, {} expected, {e} units off", exact(x.into()));
        }
    }

    #[test]
    fn functions_are_within_their_stated_error() {
        check(exp, f64::exp, 2.0);
        check(tanh, f64::tanh, 2.0);
        check(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), 3.0);
        check(erf, erf64, 3.0);
    }

    #[test]
    fn limits_and_nan() {
        let x = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1000.0, -1000.0, -0.0];
        let mut y = [0.0; 6];
        exp(&x, &mut y);
        assert!(
            y[0] == f32::INFINITY && y[1] == 0.0 && y[2].is_nan() && y[3] == f32::INFINITY && y[4] == 0.0
        );
        assert_eq!(y[5], 1.0);
        for f in [tanh, erf] {
            f(&x, &mut y);
            assert!(y[0] == 1.0 && y[1] == -1.0 && y[2].is_nan() && y[3] == 1.0 && y[4] == -1.0);
            assert!(y[5] == 0.0 && y[5].is_sign_negative());
        }
        sigmoid(&x, &mut y);
        assert!(y[0] == 1.0 && y[1] == 0.0 && y[2].is_nan() && y[5] == 0.5);
    }

    #[test]
    fn erf64_agrees_with_tabulated_values() {
        // Python's math.erf.
        let table = [
            (0.5, 0.5204998778130465),
            (1.5, 0.9661051464753108),
            (2.9, 0.9999589021219005),
            (3.1, 0.9999883513426328),
            (6.5, 1.0),
        ];
        for (x, want) in table {
            assert!((erf64(x) - want).abs() < 2e-15, "erf({x}) = {}, expected {want}", erf64(x));
            assert_eq!(erf64(-x), -erf64(x));
        }
    }
}
