//! Arithmetic with broadcasting: Add, Sub, Mul, Div, Pow, Mod, the variadic Max, Min, Sum and Mean, and bits.
//!
//! Half types are computed in f32 and rounded once per op. Integers wrap around; division truncates towards zero.

use super::util::{broadcast, fact, same_type, sym2, wrong_elem};
use crate::ir::{Dim, Elem};
use crate::kernels::strided::{broadcast_shape, count, map2};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};

/// Arithmetic of one element type.
trait Num: Copy {
    fn add(self, o: Self) -> Self;
    fn sub(self, o: Self) -> Self;
    fn mul(self, o: Self) -> Self;
    fn div(self, o: Self) -> Self;
    /// The remainder with the divisor's sign.
    fn floor_mod(self, o: Self) -> Self;
    /// The remainder with the dividend's sign.
    fn fmod(self, o: Self) -> Self;
    /// The larger one; NaN if either is.
    fn larger(self, o: Self) -> Self;
    /// The smaller one; NaN if either is.
    fn smaller(self, o: Self) -> Self;
    fn is_zero(self) -> bool;
}

macro_rules! floats {
    ($($t:ty),*) => {$(impl Num for $t {
        fn add(self, o: Self) -> Self { self + o }
        fn sub(self, o: Self) -> Self { self - o }
        fn mul(self, o: Self) -> Self { self * o }
        fn div(self, o: Self) -> Self { self / o }
        fn floor_mod(self, o: Self) -> Self {
            let r = self % o;
            if r != 0.0 && (r < 0.0) != (o < 0.0) { r + o } else { r }
        }
        fn fmod(self, o: Self) -> Self { self % o }
        fn larger(self, o: Self) -> Self { if self > o || self.is_nan() { self } else { o } }
        fn smaller(self, o: Self) -> Self { if self < o || self.is_nan() { self } else { o } }
        fn is_zero(self) -> bool { false }
    })*};
}
floats!(f32, f64);

macro_rules! ints {
    ($($t:ty),*) => {$(impl Num for $t {
        fn add(self, o: Self) -> Self { self.wrapping_add(o) }
        fn sub(self, o: Self) -> Self { self.wrapping_sub(o) }
        fn mul(self, o: Self) -> Self { self.wrapping_mul(o) }
        fn div(self, o: Self) -> Self { self.wrapping_div(o) }
        #[allow(unused_comparisons)]
        fn floor_mod(self, o: Self) -> Self {
            let r = self.wrapping_rem(o);
            if r != 0 && (r < 0) != (o < 0) { r.wrapping_add(o) } else { r }
        }
        fn fmod(self, o: Self) -> Self { self.wrapping_rem(o) }
        fn larger(self, o: Self) -> Self { self.max(o) }
        fn smaller(self, o: Self) -> Self { self.min(o) }
        fn is_zero(self) -> bool { self == 0 }
    })*};
}
ints!(i64, i32, i16, i8, u64, u32, u16, u8);

/// `x op y` with broadcasting, in the operands' one element type, for the function `$f` of [`Num`].
macro_rules! arith {
    ($a:expr, $b:expr, $f:ident) => {{
        let (a, b): (&Tensor, &Tensor) = ($a, $b);
        let shape = broadcast_shape(&[a.shape(), b.shape()])?;
        count(&shape)?;
        macro_rules! zip {
            ($x:expr, $y:expr) => {
                map2(($x, a.shape()), ($y, b.shape()), &shape, |&x, &y| Num::$f(x, y)).into()
            };
        }
        let data: Data = match (a.data(), b.data()) {
            _ if a.elem() != b.elem() || a.elem() != a.data().elem() => return Err(mismatch(a, b)),
            (Data::F32(x), Data::F32(y)) => zip!(x, y),
            (Data::F64(x), Data::F64(y)) => zip!(x, y),
            (Data::I64(x), Data::I64(y)) => zip!(x, y),
            (Data::I32(x), Data::I32(y)) => zip!(x, y),
            (Data::I16(x), Data::I16(y)) => zip!(x, y),
            (Data::I8(x), Data::I8(y)) => zip!(x, y),
            (Data::U64(x), Data::U64(y)) => zip!(x, y),
            (Data::U32(x), Data::U32(y)) => zip!(x, y),
            (Data::U16(x), Data::U16(y)) => zip!(x, y),
            (Data::U8(x), Data::U8(y)) => zip!(x, y),
            (Data::F16(_) | Data::BF16(_), _) => {
                let values: Vec<f32> =
                    map2((&a.to_f32()?, a.shape()), (&b.to_f32()?, b.shape()), &shape, |&x, &y| {
                        Num::$f(x, y)
                    });
                return Ok(Tensor::from_f32(a.elem(), &shape, values)?);
            }
            _ => return Err(wrong_elem("a numeric type", a)),
        };
        Ok(Tensor::new(&shape, data)?)
    }};
}

fn mismatch(a: &Tensor, b: &Tensor) -> OpError {
    match a.elem() == b.elem() {
        true => wrong_elem("a numeric type", a),
        false => {
            OpError::Invalid(format!("operands of one type expected, found {} and {}", a.elem(), b.elem()))
        }
    }
}

fn add(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    arith!(a, b, add)
}

fn sub(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    arith!(a, b, sub)
}

fn mul(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    arith!(a, b, mul)
}

fn div(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    refuse_zero(b)?;
    arith!(a, b, div)
}

fn larger(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    arith!(a, b, larger)
}

fn smaller(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    arith!(a, b, smaller)
}

fn floor_mod(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    refuse_zero(b)?;
    arith!(a, b, floor_mod)
}

fn fmod(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    refuse_zero(b)?;
    arith!(a, b, fmod)
}

/// Integer division by zero has no result.
fn refuse_zero(b: &Tensor) -> Result<(), OpError> {
    let zero = match b.data() {
        Data::I64(v) => v.iter().any(|x| x.is_zero()),
        Data::I32(v) => v.iter().any(|x| x.is_zero()),
        Data::I16(v) => v.iter().any(|x| x.is_zero()),
        Data::I8(v) => v.iter().any(|x| x.is_zero()),
        Data::U64(v) => v.iter().any(|x| x.is_zero()),
        Data::U32(v) => v.iter().any(|x| x.is_zero()),
        Data::U16(v) => v.iter().any(|x| x.is_zero()),
        Data::U8(v) => v.iter().any(|x| x.is_zero()),
        _ => false,
    };
    if zero { Err(OpError::invalid("integer division by zero")) } else { Ok(()) }
}

/// The operands of a binary op. Before opset 7, `broadcast` and `axis` say where the second one's dims stand.
pub(super) fn operands(cx: &EvalCx) -> Result<(Tensor, Tensor), OpError> {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    let b = match cx.attrs.int("axis") {
        Some(axis) if cx.opset < 7 && cx.int_or("broadcast", 0) != 0 => {
            let axis = super::util::axis(axis, a.rank())?;
            let tail = (a.rank() - axis).checked_sub(b.rank());
            let tail =
                tail.ok_or_else(|| OpError::invalid("the second operand has too many dims for axis"))?;
            let shape: Vec<usize> = b.shape().iter().copied().chain(std::iter::repeat_n(1, tail)).collect();
            b.reshape(&shape)?
        }
        _ => b.clone(),
    };
    Ok((a.clone(), b))
}

fn binary(cx: &EvalCx, f: fn(&Tensor, &Tensor) -> Result<Tensor, OpError>) -> Evaluated {
    let (a, b) = operands(cx)?;
    cx.one(f(&a, &b)?)
}

fn variadic(cx: &EvalCx, f: fn(&Tensor, &Tensor) -> Result<Tensor, OpError>) -> Result<Tensor, OpError> {
    (1..cx.inputs.len()).try_fold(cx.input(0)?.clone(), |acc, i| f(&acc, cx.input(i)?))
}

fn mean(cx: &EvalCx) -> Evaluated {
    let sum = variadic(cx, add)?;
    let n = Tensor::from_f32(sum.elem(), &[], vec![cx.inputs.len() as f32])?;
    cx.one(div(&sum, &n)?)
}

fn modulo(cx: &EvalCx) -> Evaluated {
    binary(cx, if cx.int_or("fmod", 0) != 0 { fmod } else { floor_mod })
}

/// The exponent may have another type than the base, whose type the result has.
fn pow(cx: &EvalCx) -> Evaluated {
    let (a, b) = operands(cx)?;
    let shape = broadcast_shape(&[a.shape(), b.shape()])?;
    count(&shape)?;
    let float_exponent = |b: &Tensor| -> Result<Vec<f64>, OpError> {
        match b.data() {
            Data::F64(v) => Ok(v.clone()),
            Data::U64(v) => Ok(v.iter().map(|&x| x as f64).collect()),
            _ if b.elem().is_float() => Ok(b.to_f32()?.iter().map(|&x| x.into()).collect()),
            _ => Ok(b.to_i64()?.iter().map(|&x| x as f64).collect()),
        }
    };
    macro_rules! int {
        ($v:expr, $t:ty) => {
            if b.elem().is_float() {
                let e = float_exponent(&b)?;
                map2(($v, a.shape()), (&e, b.shape()), &shape, |&x, &e| (x as f64).powf(e) as $t).into()
            } else {
                let e = b.to_i64()?;
                map2(($v, a.shape()), (&e, b.shape()), &shape, |&x, &e| match u32::try_from(e) {
                    Ok(e) => x.wrapping_pow(e),
                    // 1 / x^n, rounded towards zero.
                    Err(_) => (x as f64).powf(e as f64) as $t,
                })
                .into()
            }
        };
    }
    let data: Data = match a.data() {
        Data::F64(v) => {
            map2((v, a.shape()), (&float_exponent(&b)?, b.shape()), &shape, |&x, &e| x.powf(e)).into()
        }
        Data::I64(v) => int!(v, i64),
        Data::I32(v) => int!(v, i32),
        Data::I16(v) => int!(v, i16),
        Data::I8(v) => int!(v, i8),
        Data::U64(v) => int!(v, u64),
        Data::U32(v) => int!(v, u32),
        Data::U16(v) => int!(v, u16),
        Data::U8(v) if a.elem() == Elem::U8 => int!(v, u8),
        _ => {
            let (x, e) = (a.to_f32()?, float_exponent(&b)?);
            let e: Vec<f32> = e.into_iter().map(|e| e as f32).collect();
            let whole = |f: fn(f32) -> f32| map2((&x, a.shape()), (&e, b.shape()), &shape, move |&x, _| f(x));
            // A square is what norms ask for: it must not cost a logarithm.
            let values = match e.first() {
                Some(2.0) if e.len() == 1 => whole(|x| x * x),
                Some(3.0) if e.len() == 1 => whole(|x| x * x * x),
                _ => map2((&x, a.shape()), (&e, b.shape()), &shape, |&x, &e| x.powf(e)),
            };
            return cx.one(Tensor::from_f32(a.elem(), &shape, values)?);
        }
    };
    cx.one(Tensor::new(&shape, data)?)
}

/// Bitwise ops and shifts of integers of one type.
macro_rules! bits {
    ($cx:ident, |$x:ident, $y:ident| $e:expr) => {{
        let (a, b) = ($cx.input(0)?, $cx.input(1)?);
        let shape = broadcast_shape(&[a.shape(), b.shape()])?;
        count(&shape)?;
        macro_rules! zip {
            ($v:expr, $w:expr) => {
                map2(($v, a.shape()), ($w, b.shape()), &shape, |&$x, &$y| $e).into()
            };
        }
        let data: Data = match (a.data(), b.data()) {
            _ if a.elem() != b.elem() || a.elem() != a.data().elem() => return Err(mismatch(a, b)),
            (Data::I64(v), Data::I64(w)) => zip!(v, w),
            (Data::I32(v), Data::I32(w)) => zip!(v, w),
            (Data::I16(v), Data::I16(w)) => zip!(v, w),
            (Data::I8(v), Data::I8(w)) => zip!(v, w),
            (Data::U64(v), Data::U64(w)) => zip!(v, w),
            (Data::U32(v), Data::U32(w)) => zip!(v, w),
            (Data::U16(v), Data::U16(w)) => zip!(v, w),
            (Data::U8(v), Data::U8(w)) => zip!(v, w),
            _ => return Err(wrong_elem("an integer type", a)),
        };
        $cx.one(Tensor::new(&shape, data)?)
    }};
}

fn shift(cx: &EvalCx) -> Evaluated {
    match cx.attrs.str("direction") {
        // A shift by the width or more leaves zero, or the sign where it goes right.
        Some("LEFT") => bits!(cx, |x, y| x.checked_shl(y as u32).unwrap_or(0)),
        Some("RIGHT") => bits!(cx, |x, y| {
            let half = size_of_val(&x) * 4;
            x.checked_shr(y as u32).unwrap_or(x >> half >> half)
        }),
        other => Err(OpError::Invalid(format!("direction is {other:?}, expected LEFT or RIGHT"))),
    }
}

fn infer_numbers(cx: &InferCx, f: fn(&Dim, &Dim) -> Dim) -> Inferred {
    let elem = cx.elem(0).or(cx.elem(1));
    if cx.opset < 7 && cx.attrs.int("broadcast").is_some() {
        return super::util::same_type(cx);
    }
    let mut facts = broadcast(cx, elem, 0..2)?;
    if let (Some(f0), Some(s)) = (facts.first_mut(), sym2(cx, f)) {
        *f0 = fact(elem.expect("a fact has a type"), f0.ty.dims().map(<[Dim]>::to_vec), Some(s));
    }
    Ok(facts)
}

fn unknown(_: &Dim, _: &Dim) -> Dim {
    Dim::Unknown
}

fn dim_mod(a: &Dim, b: &Dim) -> Dim {
    match (a, b) {
        (Dim::Known(a), Dim::Known(b)) if *b != 0 => Dim::Known(Num::floor_mod(*a, *b)),
        _ => Dim::Unknown,
    }
}

/// The larger of two; a symbol is a size, so it is never below zero.
fn dim_max(a: &Dim, b: &Dim) -> Dim {
    match (a, b) {
        (Dim::Known(a), Dim::Known(b)) => Dim::Known(*a.max(b)),
        (Dim::Known(n), d @ Dim::Sym(_)) | (d @ Dim::Sym(_), Dim::Known(n)) if *n <= 0 => d.clone(),
        (a, b) if a.same(b) => a.clone(),
        _ => Dim::Unknown,
    }
}

fn dim_min(a: &Dim, b: &Dim) -> Dim {
    match (a, b) {
        (Dim::Known(a), Dim::Known(b)) => Dim::Known(*a.min(b)),
        (Dim::Known(n), Dim::Sym(_)) | (Dim::Sym(_), Dim::Known(n)) if *n <= 0 => Dim::Known(*n),
        (d @ Dim::Sym(_), Dim::Known(i64::MAX)) | (Dim::Known(i64::MAX), d @ Dim::Sym(_)) => d.clone(),
        (a, b) if a.same(b) => a.clone(),
        _ => Dim::Unknown,
    }
}

fn infer_variadic(cx: &InferCx, f: fn(&Dim, &Dim) -> Dim) -> Inferred {
    match cx.inputs.len() {
        2 => infer_numbers(cx, f),
        n => broadcast(cx, (0..n).find_map(|i| cx.elem(i)), 0..n),
    }
}

const fn op(name: &'static str, infer: fn(&InferCx) -> Inferred, eval: fn(&EvalCx) -> Evaluated) -> OpDef {
    OpDef { name, operands: (2, 2), infer, eval, ..OpDef::NEW }
}

const fn many(name: &'static str, infer: fn(&InferCx) -> Inferred, eval: fn(&EvalCx) -> Evaluated) -> OpDef {
    OpDef { name, operands: (1, usize::MAX), infer, eval, ..OpDef::NEW }
}

/// Arithmetic with broadcasting.
pub const OPS: &[OpDef] = &[
    op("onnx.Add", |cx| infer_numbers(cx, Dim::add), |cx| binary(cx, add)),
    op("onnx.Sub", |cx| infer_numbers(cx, Dim::sub), |cx| binary(cx, sub)),
    op("onnx.Mul", |cx| infer_numbers(cx, Dim::mul), |cx| binary(cx, mul)),
    op("onnx.Div", |cx| infer_numbers(cx, Dim::div), |cx| binary(cx, div)),
    op("onnx.Pow", |cx| broadcast(cx, cx.elem(0), 0..2), pow),
    op(
        "onnx.Mod",
        |cx| infer_numbers(cx, if cx.attrs.int("fmod").unwrap_or(0) == 0 { dim_mod } else { unknown }),
        modulo,
    ),
    op("onnx.PRelu", |cx| if cx.opset < 7 { same_type(cx) } else { broadcast(cx, cx.elem(0), 0..2) }, prelu),
    op("onnx.BitShift", |cx| infer_numbers(cx, unknown), shift),
    op("onnx.BitwiseAnd", |cx| infer_numbers(cx, unknown), |cx| bits!(cx, |x, y| x & y)),
    op("onnx.BitwiseOr", |cx| infer_numbers(cx, unknown), |cx| bits!(cx, |x, y| x | y)),
    op("onnx.BitwiseXor", |cx| infer_numbers(cx, unknown), |cx| bits!(cx, |x, y| x ^ y)),
    many("onnx.Max", |cx| infer_variadic(cx, dim_max), |cx| cx.one(variadic(cx, larger)?)),
    many("onnx.Min", |cx| infer_variadic(cx, dim_min), |cx| cx.one(variadic(cx, smaller)?)),
    many("onnx.Sum", |cx| infer_variadic(cx, Dim::add), |cx| cx.one(variadic(cx, add)?)),
    many("onnx.Mean", |cx| infer_variadic(cx, unknown), mean),
];

/// `x` where it is not negative, and `slope * x` elsewhere; the slope broadcasts to `x`. Before opset 7 it has one
/// element, or one for each channel, which are dim 1.
fn prelu(cx: &EvalCx) -> Evaluated {
    let (x, slope) = operands(cx)?;
    // Before opset 7 there is one slope for all, or one for each channel.
    let slope = match (cx.opset < 7 && slope.len() > 1, x.rank()) {
        (true, 2..) => {
            let mut shape = vec![1; x.rank() - 1];
            shape[0] = slope.len();
            slope.reshape(&shape)?
        }
        _ => slope,
    };
    let zero = Tensor::from_f32(Elem::F32, &[], vec![0.0])?;
    let zero = super::cast::convert(&zero, x.elem(), true)?;
    cx.one(add(&larger(&x, &zero)?, &mul(&smaller(&x, &zero)?, &slope)?)?)
}
