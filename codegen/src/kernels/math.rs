//! Elementary functions of f32, most in the formulas of the interpreter (`dialects::kernels`): within a few units in the last
//! place, with the functions' limits for infinities and NaN.

use crate::text::{Body, Cmp, Scalar, Val};
use std::f64::consts::FRAC_2_PI;

fn polynomial(b: &mut Body, x: Val, coefficients: &[f64]) -> Val {
    let (first, rest) = coefficients.split_first().expect("a coefficient");
    let start = b.splat(x.ty, *first);
    rest.iter().fold(start, |p, &c| {
        let c = b.splat(x.ty, c);
        b.fma(p, x, c)
    })
}

/// e^x: x = n ln 2 + r, Taylor's series for e^r, and n added to the exponent in two halves.
pub fn exp(b: &mut Body, x: Val) -> Val {
    let ints = x.ty.of(Scalar::I32);
    let (low, high) = (b.splat(x.ty, -87.336_54), b.splat(x.ty, 88.722_83));
    let clamped = b.max_finite(x, low);
    let clamped = b.min_finite(clamped, high);
    let (log2e, round) = (b.splat(x.ty, std::f64::consts::LOG2_E), b.splat(x.ty, 12_582_912.0));
    let n = b.mul(clamped, log2e);
    let n = b.add(n, round);
    let n = b.sub(n, round);
    let (high_part, low_part) = (b.splat(x.ty, -355.0 / 512.0), b.splat(x.ty, 2.121_944_4e-4));
    let r = b.fma(n, high_part, clamped);
    let r = b.fma(n, low_part, r);
    let p = polynomial(b, r, &[1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5]);
    let one = b.splat(x.ty, 1.0);
    let square = b.mul(r, r);
    let tail = b.add(r, one);
    let p = b.fma(p, square, tail);
    let half = b.splat(x.ty, 0.5);
    let first = b.mul(n, half);
    let first = b.cast(first, Scalar::I32);
    let whole = b.cast(n, Scalar::I32);
    let second = b.sub(whole, first);
    let bias = b.splat(ints, 127.0);
    let power = |b: &mut Body, e: Val| {
        let e = b.add(e, bias);
        let bits = b.shl(e, 23);
        b.bitcast(bits, x.ty)
    };
    let (first, second) = (power(b, first), power(b, second));
    let y = b.mul(p, first);
    let y = b.mul(y, second);
    let (zero, infinity) = (b.splat(x.ty, 0.0), b.splat(x.ty, f64::INFINITY));
    let under = b.cmp(Cmp::Lt, x, low);
    let y = b.select(under, zero, y);
    let over = b.cmp(Cmp::Gt, x, high);
    let y = b.select(over, infinity, y);
    let number = b.cmp(Cmp::Eq, x, x);
    b.select(number, y, x)
}

/// e^x of an x that is not above 0, or NaN: [`exp`] with neither overflow nor the second half of the exponent to see to.
pub fn exp_below(b: &mut Body, x: Val) -> Val {
    let low = b.splat(x.ty, -87.336_54);
    let under = b.cmp(Cmp::Lt, x, low);
    let clamped = b.select(under, low, x);
    let (log2e, round) = (b.splat(x.ty, std::f64::consts::LOG2_E), b.splat(x.ty, 12_582_912.0));
    // The last bits of t are n.
    let t = b.fma(clamped, log2e, round);
    let n = b.sub(t, round);
    let (high_part, low_part) = (b.splat(x.ty, -355.0 / 512.0), b.splat(x.ty, 2.121_944_4e-4));
    let r = b.fma(n, high_part, clamped);
    let r = b.fma(n, low_part, r);
    let p = polynomial(b, r, &[1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5]);
    let one = b.splat(x.ty, 1.0);
    let square = b.mul(r, r);
    let tail = b.add(r, one);
    let p = b.fma(p, square, tail);
    let bits = b.bitcast(t, x.ty.of(Scalar::I32));
    let bias = b.splat(bits.ty, 127.0);
    let bits = b.add(bits, bias);
    let bits = b.shl(bits, 23);
    let power = b.bitcast(bits, x.ty);
    let y = b.mul(p, power);
    let zero = b.splat(x.ty, 0.0);
    b.select(under, zero, y)
}

/// 1 / (1 + e^-x).
pub fn sigmoid(b: &mut Body, x: Val) -> Val {
    let negative = b.unary("arith.negf", x);
    let e = exp(b, negative);
    let one = b.splat(x.ty, 1.0);
    let below = b.add(one, e);
    b.div(one, below)
}

fn copysign(b: &mut Body, size: Val, sign: Val) -> Val {
    b.op(size.ty, format_args!("math.copysign {size}, {sign} : {}", size.ty))
}

/// tanh x.
pub fn tanh(b: &mut Body, x: Val) -> Val {
    let z = b.mul(x, x);
    let p = polynomial(b, z, &[-5.704_989e-3, 2.063_909e-2, -5.373_971_6e-2, 0.133_314_42, -0.333_332_8]);
    let p = b.mul(p, z);
    let small = b.fma(p, x, x);
    let size = b.unary("math.absf", x);
    let twice = b.add(size, size);
    let e = exp(b, twice);
    let (one, two) = (b.splat(x.ty, 1.0), b.splat(x.ty, 2.0));
    let below = b.add(e, one);
    let q = b.div(two, below);
    let large = b.sub(one, q);
    let near = b.splat(x.ty, 0.625);
    let near = b.cmp(Cmp::Lt, size, near);
    let y = b.select(near, small, large);
    copysign(b, y, x)
}

/// erf x.
pub fn erf(b: &mut Body, x: Val) -> Val {
    let z = b.mul(x, x);
    let near = [
        7.882_497_4e-5,
        -8.018_855e-4,
        5.189_312e-3,
        -2.685_433e-2,
        0.112_835_97,
        -0.376_126_26,
        std::f64::consts::FRAC_2_SQRT_PI,
    ];
    let p = polynomial(b, z, &near);
    let small = b.mul(x, p);
    let size = b.unary("math.absf", x);
    let (four, one) = (b.splat(x.ty, 4.0), b.splat(x.ty, 1.0));
    // NaN stays: it is not above 4.
    let over = b.cmp(Cmp::Gt, size, four);
    let a = b.select(over, four, size);
    let far = [
        1.614_061_6e-6,
        -4.559_062_3e-5,
        5.927_696e-4,
        -4.740_222_4e-3,
        2.636_471_8e-2,
        -0.109_978_24,
        -0.631_937_1,
        -1.130_166_6,
        3.032_13e-4,
    ];
    let q = polynomial(b, a, &far);
    let e = exp(b, q);
    let large = b.sub(one, e);
    let large = copysign(b, large, x);
    let near = b.cmp(Cmp::Lt, size, one);
    b.select(near, small, large)
}

/// Rounded to an integer, halves to even. Arithmetic alone: not every target has an instruction.
pub fn round(b: &mut Body, x: Val) -> Val {
    let size = b.unary("math.absf", x);
    // From 2^23 on all numbers are integers.
    let magic = b.splat(x.ty, 8_388_608.0);
    let r = b.add(size, magic);
    let r = b.sub(r, magic);
    let r = copysign(b, r, x);
    let whole = b.cmp(Cmp::Ge, size, magic);
    b.select(whole, x, r)
}

/// The largest integer that is not above x.
pub fn floor(b: &mut Body, x: Val) -> Val {
    let r = round(b, x);
    let one = b.splat(x.ty, 1.0);
    let less = b.sub(r, one);
    let above = b.cmp(Cmp::Gt, r, x);
    b.select(above, less, r)
}

/// The smallest integer that is not below x.
pub fn ceil(b: &mut Body, x: Val) -> Val {
    let r = round(b, x);
    let one = b.splat(x.ty, 1.0);
    let more = b.add(r, one);
    let below = b.cmp(Cmp::Lt, r, x);
    let r = b.select(below, more, r);
    copysign(b, r, x)
}

/// ln x: x = 2^k (1 + f) with f around 0, and ln (1 + f) by the series of (2 + f) / (2 - f) as in fdlibm, to 1 unit in the
/// last place.
pub fn log(b: &mut Body, x: Val) -> Val {
    let ints = x.ty.of(Scalar::I32);
    let (tiny, zero) = (b.splat(x.ty, f64::from(f32::MIN_POSITIVE)), b.splat(x.ty, 0.0));
    let denormal = b.cmp(Cmp::Lt, x, tiny);
    let up = b.splat(x.ty, 8_388_608.0);
    let scaled = b.mul(x, up);
    let y = b.select(denormal, scaled, x);
    // The bits of 1 and of sqrt(1/2): what is left of the exponent is that of the nearest power.
    let (one_bits, root_bits) = (0x3f80_0000, 0x3f35_04f3);
    let bits = b.bitcast(y, ints);
    let offset = b.splat(ints, f64::from(one_bits - root_bits));
    let bits = b.add(bits, offset);
    let k = b.shr_signed(bits, 23);
    let (bias, more) = (b.splat(ints, -127.0), b.splat(ints, -127.0 - 23.0));
    let bias = b.select(denormal, more, bias);
    let k = b.add(k, bias);
    let k = b.cast(k, Scalar::F32);
    let mask = b.splat(ints, f64::from(0x007f_ffff));
    let root = b.splat(ints, f64::from(root_bits));
    let bits = b.and(bits, mask);
    let bits = b.add(bits, root);
    let (one, two, half) = (b.splat(x.ty, 1.0), b.splat(x.ty, 2.0), b.splat(x.ty, 0.5));
    let m = b.bitcast(bits, x.ty);
    let f = b.sub(m, one);
    let below = b.add(two, f);
    let s = b.div(f, below);
    let z = b.mul(s, s);
    let p = polynomial(b, z, &[0.242_790_79, 0.284_987_87, 0.400_009_72, 0.666_666_6]);
    let series = b.mul(p, z);
    let square = b.mul(f, f);
    let square = b.mul(square, half);
    // ln 2 in two parts, the first with few enough bits that k times it is exact.
    let (high, low) = (b.splat(x.ty, 0.693_138_1), b.splat(x.ty, 9.058_001e-6));
    let tail = b.add(square, series);
    let tail = b.mul(s, tail);
    let tail = b.fma(k, low, tail);
    let tail = b.sub(tail, square);
    let y = b.add(tail, f);
    let y = b.fma(k, high, y);
    let (infinity, nan) = (b.splat(x.ty, f64::INFINITY), b.splat(x.ty, f64::NAN));
    let minus = b.splat(x.ty, f64::NEG_INFINITY);
    let none = b.cmp(Cmp::Eq, x, zero);
    let y = b.select(none, minus, y);
    let negative = b.cmp(Cmp::Lt, x, zero);
    let y = b.select(negative, nan, y);
    let endless = b.cmp(Cmp::Eq, x, infinity);
    let y = b.select(endless, x, y);
    let number = b.cmp(Cmp::Eq, x, x);
    b.select(number, y, x)
}

/// ln (1 + e) of e in [0, 1]: what rounding 1 + e loses is made up for by a factor.
pub fn log_1p(b: &mut Body, e: Val) -> Val {
    let (one, zero) = (b.splat(e.ty, 1.0), b.splat(e.ty, 0.0));
    let u = b.add(one, e);
    let rounded = b.sub(u, one);
    let l = log(b, u);
    let factor = b.div(e, rounded);
    let y = b.mul(l, factor);
    let small = b.cmp(Cmp::Eq, rounded, zero);
    b.select(small, e, y)
}

/// e^x - 1: Taylor's series around 0, where the difference would lose what there is.
pub fn exp_m1(b: &mut Body, x: Val) -> Val {
    let terms: Vec<f64> = (2..=8).rev().map(|n| 1.0 / factorial(n)).collect();
    let p = polynomial(b, x, &terms);
    let square = b.mul(x, x);
    let near = b.fma(p, square, x);
    let one = b.splat(x.ty, 1.0);
    let e = exp(b, x);
    let far = b.sub(e, one);
    let size = b.unary("math.absf", x);
    let limit = b.splat(x.ty, 0.35);
    let small = b.cmp(Cmp::Lt, size, limit);
    b.select(small, near, far)
}

fn factorial(n: u32) -> f64 {
    (1..=n).map(f64::from).product()
}

/// sin x.
pub fn sin(b: &mut Body, x: Val) -> Val {
    quarters(b, x, 0)
}

/// cos x.
pub fn cos(b: &mut Body, x: Val) -> Val {
    quarters(b, x, 1)
}

/// sin (x + n pi / 2), in double precision: the nearest multiple of pi / 2 is taken away in two parts, the first of so few bits
/// that its product is exact, and Taylor's series take the rest, at most pi / 4. Right to the last place but for the rarest
/// roundings for |x| up to 2^28; beyond, where floats are further apart than periods, some number of [-1, 1].
fn quarters(b: &mut Body, x: Val, n: i64) -> Val {
    let wide = b.cast(x, Scalar::F64);
    let ty = wide.ty;
    let (inverse, round) = (b.splat(ty, FRAC_2_PI), b.splat(ty, 6_755_399_441_055_744.0));
    // Adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits.
    let shifted = b.mul(wide, inverse);
    let shifted = b.add(shifted, round);
    let turns = b.sub(shifted, round);
    let (high, low) = (b.splat(ty, 1.570_796_310_901_641_8), b.splat(ty, 1.589_325_477_352_819_6e-8));
    let step = b.mul(turns, high);
    let r = b.sub(wide, step);
    let step = b.mul(turns, low);
    let r = b.sub(r, step);
    // Only for arguments beyond all reason; NaN stays.
    let (top, bottom) = (b.splat(ty, 0.8), b.splat(ty, -0.8));
    let r = b.min_finite(top, r);
    let r = b.max_finite(bottom, r);
    let z = b.mul(r, r);
    let series = |b: &mut Body, first: u32| {
        let terms = (1..=6).rev().map(|i| (if i % 2 == 1 { -1.0 } else { 1.0 }) / factorial(2 * i + first));
        polynomial(b, z, &terms.collect::<Vec<_>>())
    };
    let sin = series(b, 1);
    let cube = b.mul(z, r);
    let sin = b.fma(cube, sin, r);
    let cos = series(b, 0);
    let one = b.splat(ty, 1.0);
    let cos = b.fma(z, cos, one);
    let bits = b.bitcast(shifted, ty.of(Scalar::I64));
    let more = b.splat(bits.ty, n as f64);
    let quarter = b.add(bits, more);
    let bit = |b: &mut Body, of: f64| {
        let of = b.splat(bits.ty, of);
        let found = b.and(quarter, of);
        b.cmp(Cmp::Eq, found, of)
    };
    let (odd, behind) = (bit(b, 1.0), bit(b, 2.0));
    let y = b.select(odd, cos, sin);
    let minus = b.unary("arith.negf", y);
    let y = b.select(behind, minus, y);
    b.cast(y, Scalar::F32)
}

/// A float as a signed integer, towards zero: the nearest there is where it is out of range, and 0 for NaN.
pub fn to_integer(b: &mut Body, x: Val, to: Scalar) -> Val {
    let bits = 8 * to.bytes() as i32;
    let (low, high) = (-(2f64.powi(bits - 1)), 2f64.powi(bits - 1));
    let (low, high, zero) = (b.splat(x.ty, low), b.splat(x.ty, high), b.splat(x.ty, 0.0));
    let (below, above) = (b.cmp(Cmp::Lt, x, low), b.cmp(Cmp::Ge, x, high));
    let (from, until) = (b.cmp(Cmp::Ge, x, low), b.cmp(Cmp::Lt, x, high));
    let inside = b.and(from, until);
    // Outside of the type the conversion has no meaning.
    let some = b.select(inside, x, zero);
    let n = b.cast(some, to);
    let (least, most) = match to {
        Scalar::I32 => (i64::from(i32::MIN), i64::from(i32::MAX)),
        _ => (i64::MIN, i64::MAX),
    };
    let (least, most) = (b.integers(n.ty, least), b.integers(n.ty, most));
    let n = b.select(below, least, n);
    b.select(above, most, n)
}
