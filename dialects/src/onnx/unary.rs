//! Elementwise ops of one operand. Half types are computed in f32 and rounded to nearest even.

use super::util::{one, same_type, wrong_elem};
use crate::ir::{Dim, Elem};
use crate::kernels::{math, strided};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use half::{bf16, f16};

/// `f` of slices of f32, with `g` for f64.
fn float(cx: &EvalCx, f: impl Fn(&[f32], &mut [f32]) + Sync, g: impl Fn(f64) -> f64 + Sync) -> Evaluated {
    let t = cx.input(0)?;
    macro_rules! half {
        ($v:expr, $h:ident) => {
            strided::build($v.len(), |start, out| {
                // A fixed buffer keeps the widened copy in cache.
                let (mut x, mut y) = ([0f32; 256], [0f32; 256]);
                for (o, v) in out.chunks_mut(256).zip($v[start..].chunks(256)) {
                    let n = o.len();
                    x[..n].iter_mut().zip(v).for_each(|(x, v)| *x = v.to_f32());
                    f(&x[..n], &mut y[..n]);
                    o.iter_mut().zip(&y).for_each(|(o, &y)| *o = $h::from_f32(y));
                }
            })
            .into()
        };
    }
    let data: Data = match t.data() {
        Data::F32(v) => strided::build(v.len(), |start, out| f(&v[start..start + out.len()], out)).into(),
        Data::F64(v) => strided::map(v, |&x| g(x)).into(),
        Data::F16(v) => half!(v, f16),
        Data::BF16(v) => half!(v, bf16),
        _ => return Err(wrong_elem("a float type", t)),
    };
    cx.one(Tensor::new(t.shape(), data)?)
}

/// One formula for f32 and f64: `each!(cx, x => x.sqrt())`; float attributes come first, with their defaults:
/// `each!(cx, [alpha = 1.0] x => ..)`.
macro_rules! each {
    ($cx:ident, $([$($a:ident = $d:expr),*])? $x:ident => $e:expr) => {{
        #[allow(unused_imports)]
        use std::f32::consts as _;
        let single = {
            $($(let $a: f32 = $cx.float_or(stringify!($a), $d);)*)?
            move |$x: f32| -> f32 { $e }
        };
        let double = {
            $($(let $a: f64 = $cx.float_or(stringify!($a), $d).into();)*)?
            move |$x: f64| -> f64 { $e }
        };
        float($cx, |x, out| out.iter_mut().zip(x).for_each(|(o, &x)| *o = single(x)), double)
    }};
}

/// One formula for floats and another for signed and unsigned integers.
macro_rules! number {
    ($cx:ident, $x:ident, $float:expr, $signed:expr, $unsigned:expr) => {{
        let t = $cx.input(0)?;
        if t.elem() != t.data().elem() {
            return Err(wrong_elem("a numeric type", t));
        }
        let data: Data = match t.data() {
            Data::I64(v) => strided::map(v, |&$x| $signed).into(),
            Data::I32(v) => strided::map(v, |&$x| $signed).into(),
            Data::I16(v) => strided::map(v, |&$x| $signed).into(),
            Data::I8(v) => strided::map(v, |&$x| $signed).into(),
            Data::U64(v) => strided::map(v, |&$x| $unsigned).into(),
            Data::U32(v) => strided::map(v, |&$x| $unsigned).into(),
            Data::U16(v) => strided::map(v, |&$x| $unsigned).into(),
            Data::U8(v) => strided::map(v, |&$x| $unsigned).into(),
            _ => return each!($cx, $x => $float),
        };
        $cx.one(Tensor::new(t.shape(), data)?)
    }};
}

/// The sign, which is 0 for zero and NaN for NaN.
fn sign<T: Default + PartialOrd + Copy>(x: T, plus: T, minus: T) -> T {
    let zero = T::default();
    if x > zero {
        plus
    } else if x < zero {
        minus
    } else {
        x
    }
}

fn is_nan(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let data = match t.data() {
        Data::F32(v) => strided::map(v, |x| x.is_nan()),
        Data::F64(v) => strided::map(v, |x| x.is_nan()),
        Data::F16(v) => strided::map(v, |x| x.is_nan()),
        Data::BF16(v) => strided::map(v, |x| x.is_nan()),
        Data::U8(v) if t.elem().is_float() => {
            let codec = crate::kernels::minifloat::Codec::of(t.elem());
            let codec = codec.ok_or_else(|| wrong_elem("a float type", t))?;
            strided::map(v, |&x| codec.decode(x).is_nan())
        }
        _ => return Err(wrong_elem("a float type", t)),
    };
    cx.one(Tensor::new(t.shape(), data)?)
}

fn is_inf(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let (neg, pos) = (cx.int_or("detect_negative", 1) != 0, cx.int_or("detect_positive", 1) != 0);
    let test = |x: f64| x.is_infinite() && if x > 0.0 { pos } else { neg };
    let data = match t.data() {
        Data::F64(v) => strided::map(v, |&x| test(x)),
        Data::U8(v) if t.elem().is_float() => {
            let codec = crate::kernels::minifloat::Codec::of(t.elem());
            let codec = codec.ok_or_else(|| wrong_elem("a float type", t))?;
            strided::map(v, |&x| test(codec.decode(x).into()))
        }
        _ => strided::map(&t.to_f32()?, |&x| test(x.into())),
    };
    cx.one(Tensor::new(t.shape(), data)?)
}

fn bitwise_not(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    if t.elem().is_float() {
        return Err(wrong_elem("an integer type", t));
    }
    number!(cx, x, x, !x, !x)
}

fn not(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    cx.one(Tensor::new(t.shape(), strided::map(t.bools()?, |&x| !x))?)
}

fn gelu(cx: &EvalCx) -> Evaluated {
    let exact = |x: f64| 0.5 * x * (1.0 + math::erf64(x * std::f64::consts::FRAC_1_SQRT_2));
    // sqrt(2 / pi)
    const C: f64 = 0.797_884_560_802_865_4;
    let approximate = |x: f64| 0.5 * x * (1.0 + (C * (x + 0.044715 * x * x * x)).tanh());
    let scaled = |x: &[f32], out: &mut [f32], f: fn(&[f32], &mut [f32]), g: fn(f32) -> f32| {
        let mut buffer = [0f32; 256];
        for (o, x) in out.chunks_mut(256).zip(x.chunks(256)) {
            let n = o.len();
            buffer[..n].iter_mut().zip(x).for_each(|(b, &x)| *b = g(x));
            f(&buffer[..n], o);
            o.iter_mut().zip(x).for_each(|(o, &x)| *o = 0.5 * x * (1.0 + *o));
        }
    };
    match cx.attrs.str("approximate").unwrap_or("none") {
        "none" => float(cx, |x, o| scaled(x, o, math::erf, |x| x * std::f32::consts::FRAC_1_SQRT_2), exact),
        "tanh" => {
            float(cx, |x, o| scaled(x, o, math::tanh, |x| C as f32 * (x + 0.044715 * x * x * x)), approximate)
        }
        other => Err(OpError::Invalid(format!("approximate is {other:?}, expected \"none\" or \"tanh\""))),
    }
}

fn boolean(cx: &InferCx) -> Inferred {
    one(cx.elem(0).map(|_| Elem::Bool), cx.dims(0).map(<[Dim]>::to_vec))
}

/// The type of the operand, and small contents mapped.
fn followed(cx: &InferCx, f: fn(&Dim) -> Dim) -> Inferred {
    let mut facts = same_type(cx)?;
    facts[0].sym = cx.sym(0).map(|s| s.iter().map(f).collect());
    Ok(facts)
}

fn infer_not(cx: &InferCx) -> Inferred {
    followed(cx, |d| d.known().map_or(Dim::Unknown, |n| Dim::Known((n == 0).into())))
}

fn infer_neg(cx: &InferCx) -> Inferred {
    followed(cx, |d| Dim::Known(0).sub(d))
}

fn infer_abs(cx: &InferCx) -> Inferred {
    // A symbol is a size, which is never negative.
    followed(cx, |d| d.known().map_or(d.clone(), |n| Dim::Known(n.saturating_abs())))
}

const fn op(name: &'static str, eval: fn(&EvalCx) -> Evaluated) -> OpDef {
    OpDef { name, infer: same_type, eval, ..OpDef::NEW }
}

/// Elementwise ops of one operand.
pub const OPS: &[OpDef] = &[
    op("onnx.Sqrt", |cx| each!(cx, x => x.sqrt())),
    op("onnx.Reciprocal", |cx| each!(cx, x => 1.0 / x)),
    op("onnx.Exp", |cx| float(cx, math::exp, f64::exp)),
    op("onnx.Log", |cx| each!(cx, x => x.ln())),
    op("onnx.Tanh", |cx| float(cx, math::tanh, f64::tanh)),
    op("onnx.Sigmoid", |cx| float(cx, math::sigmoid, |x| 1.0 / (1.0 + (-x).exp()))),
    op("onnx.Erf", |cx| float(cx, math::erf, math::erf64)),
    op("onnx.Gelu", gelu),
    op("onnx.Sin", |cx| each!(cx, x => x.sin())),
    op("onnx.Cos", |cx| each!(cx, x => x.cos())),
    op("onnx.Tan", |cx| each!(cx, x => x.tan())),
    op("onnx.Asin", |cx| each!(cx, x => x.asin())),
    op("onnx.Acos", |cx| each!(cx, x => x.acos())),
    op("onnx.Atan", |cx| each!(cx, x => x.atan())),
    op("onnx.Sinh", |cx| each!(cx, x => x.sinh())),
    op("onnx.Cosh", |cx| each!(cx, x => x.cosh())),
    op("onnx.Asinh", |cx| each!(cx, x => x.asinh())),
    op("onnx.Acosh", |cx| each!(cx, x => x.acosh())),
    op("onnx.Atanh", |cx| each!(cx, x => x.atanh())),
    op("onnx.Floor", |cx| each!(cx, x => x.floor())),
    op("onnx.Ceil", |cx| each!(cx, x => x.ceil())),
    op("onnx.Round", |cx| each!(cx, x => x.round_ties_even())),
    op("onnx.Softplus", |cx| each!(cx, x => x.max(0.0) + (-x.abs()).exp().ln_1p())),
    op("onnx.Softsign", |cx| each!(cx, x => x / (1.0 + x.abs()))),
    op("onnx.Elu", |cx| each!(cx, [alpha = 1.0] x => if x < 0.0 { alpha * x.exp_m1() } else { x })),
    op(
        "onnx.Celu",
        |cx| each!(cx, [alpha = 1.0] x => if x < 0.0 { alpha * (x / alpha).exp_m1() } else { x }),
    ),
    op("onnx.Selu", |cx| {
        // The first version rounded its constants to four places.
        let (a, g) = if cx.opset < 6 { (1.6732, 1.0507) } else { (1.673_263_2, 1.050_701) };
        each!(cx, [alpha = a, gamma = g] x => {
            gamma * if x > 0.0 { x } else { alpha * x.exp_m1() }
        })
    }),
    op("onnx.LeakyRelu", |cx| each!(cx, [alpha = 0.01] x => if x < 0.0 { alpha * x } else { x })),
    op("onnx.ThresholdedRelu", |cx| each!(cx, [alpha = 1.0] x => if x > alpha { x } else { 0.0 })),
    op("onnx.HardSigmoid", |cx| each!(cx, [alpha = 0.2, beta = 0.5] x => (alpha * x + beta).clamp(0.0, 1.0))),
    op("onnx.HardSwish", |cx| each!(cx, x => x * (x / 6.0 + 0.5).clamp(0.0, 1.0))),
    op("onnx.Swish", |cx| each!(cx, [alpha = 1.0] x => x / (1.0 + (-alpha * x).exp()))),
    op("onnx.Mish", |cx| each!(cx, x => x * (x.max(0.0) + (-x.abs()).exp().ln_1p()).tanh())),
    op("onnx.Shrink", |cx| {
        each!(cx, [lambd = 0.5, bias = 0.0] x => {
            if x < -lambd { x + bias } else if x > lambd { x - bias } else { 0.0 }
        })
    }),
    op("onnx.Relu", |cx| number!(cx, x, if x < 0.0 { 0.0 } else { x }, x.max(0), x)),
    op("onnx.Sign", |cx| number!(cx, x, sign(x, 1.0, -1.0), sign(x, 1, -1), x.min(1))),
    OpDef { infer: infer_neg, ..op("onnx.Neg", |cx| number!(cx, x, -x, x.wrapping_neg(), x.wrapping_neg())) },
    OpDef { infer: infer_abs, ..op("onnx.Abs", |cx| number!(cx, x, x.abs(), x.wrapping_abs(), x)) },
    OpDef { infer: infer_not, ..op("onnx.Not", not) },
    op("onnx.BitwiseNot", bitwise_not),
    OpDef { infer: boolean, ..op("onnx.IsNaN", is_nan) },
    OpDef { infer: boolean, ..op("onnx.IsInf", is_inf) },
];
