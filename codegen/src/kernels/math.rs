//! Elementary functions of f32, in the formulas of the interpreter (`dialects::kernels`): within a few units in the last
//! place, with the functions' limits for infinities and NaN.

use crate::text::{Body, Cmp, Scalar, Val};

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

/// ln x of a positive normal x, or infinity, or NaN: x = 2^e (1 + f) with 1 + f between the roots of 1/2 and 2, and Cephes'
/// polynomial (`logf`) in f.
pub fn log(b: &mut Body, x: Val) -> Val {
    let ints = x.ty.of(Scalar::I32);
    let bits = b.bitcast(x, ints);
    let root = b.splat(ints, f64::from(0x3f35_04f3));
    let above = b.sub(bits, root);
    let e = b.shr_signed(above, 23);
    let exponent = b.shl(e, 23);
    let fraction = b.sub(bits, exponent);
    let fraction = b.bitcast(fraction, x.ty);
    let one = b.splat(x.ty, 1.0);
    let f = b.sub(fraction, one);
    let e = b.cast(e, Scalar::F32);
    let coefficients = [
        7.037_683_6e-2,
        -0.115_146_1,
        0.116_769_99,
        -0.124_201_41,
        0.142_493_23,
        -0.166_680_58,
        0.200_007_15,
        -0.249_999_94,
        0.333_333_3,
    ];
    let p = polynomial(b, f, &coefficients);
    let square = b.mul(f, f);
    let cube = b.mul(square, f);
    let (low_part, half) = (b.splat(x.ty, -2.121_944_4e-4), b.splat(x.ty, -0.5));
    let low = b.mul(e, low_part);
    let y = b.fma(p, cube, low);
    let y = b.fma(square, half, y);
    let y = b.add(y, f);
    let high_part = b.splat(x.ty, 355.0 / 512.0);
    let y = b.fma(e, high_part, y);
    let infinity = b.splat(x.ty, f64::INFINITY);
    let finite = b.cmp(Cmp::Lt, x, infinity);
    b.select(finite, y, x)
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
