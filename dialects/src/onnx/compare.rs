//! Comparisons and logic with broadcasting. The results are bool.

use super::binary::operands;
use super::util::{broadcast, fact, sym2, wrong_elem};
use crate::ir::{Dim, Elem};
use crate::kernels::strided::{broadcast_shape, count, map2};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use std::cmp::Ordering;

fn same_elem(a: &Tensor, b: &Tensor) -> Result<(), OpError> {
    if a.elem() == b.elem() {
        return Ok(());
    }
    Err(OpError::Invalid(format!("operands of one type expected, found {} and {}", a.elem(), b.elem())))
}

fn equal(cx: &EvalCx) -> Evaluated {
    let (a, b) = operands(cx)?;
    same_elem(&a, &b)?;
    let shape = broadcast_shape(&[a.shape(), b.shape()])?;
    count(&shape)?;
    macro_rules! zip {
        ($($v:ident)*) => {
            match (a.data(), b.data()) {
                $((Data::$v(x), Data::$v(y)) => map2((x, a.shape()), (y, b.shape()), &shape, |x, y| x == y),)*
                _ => return Err(wrong_elem(a.elem().name(), &b)),
            }
        };
    }
    let out = zip!(F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 Bool C64 C128 Str);
    cx.one(Tensor::new(&shape, out)?)
}

fn order(cx: &EvalCx, test: fn(Option<Ordering>) -> bool) -> Evaluated {
    let (a, b) = operands(cx)?;
    same_elem(&a, &b)?;
    let shape = broadcast_shape(&[a.shape(), b.shape()])?;
    count(&shape)?;
    macro_rules! zip {
        ($x:expr, $y:expr) => {
            map2(($x, a.shape()), ($y, b.shape()), &shape, |x, y| test(x.partial_cmp(y)))
        };
    }
    let out = match (a.data(), b.data()) {
        (Data::F64(x), Data::F64(y)) => zip!(x, y),
        (Data::F32(x), Data::F32(y)) => zip!(x, y),
        (Data::F16(x), Data::F16(y)) => zip!(x, y),
        (Data::BF16(x), Data::BF16(y)) => zip!(x, y),
        (Data::I64(x), Data::I64(y)) => zip!(x, y),
        (Data::I32(x), Data::I32(y)) => zip!(x, y),
        (Data::I16(x), Data::I16(y)) => zip!(x, y),
        (Data::I8(x), Data::I8(y)) => zip!(x, y),
        (Data::U64(x), Data::U64(y)) => zip!(x, y),
        (Data::U32(x), Data::U32(y)) => zip!(x, y),
        (Data::U16(x), Data::U16(y)) => zip!(x, y),
        (Data::U8(x), Data::U8(y)) if !a.elem().is_float() => zip!(x, y),
        _ => return Err(wrong_elem("a numeric type", &a)),
    };
    cx.one(Tensor::new(&shape, out)?)
}

fn logic(cx: &EvalCx, f: fn(bool, bool) -> bool) -> Evaluated {
    let (a, b) = operands(cx)?;
    let shape = broadcast_shape(&[a.shape(), b.shape()])?;
    count(&shape)?;
    let out = map2((a.bools()?, a.shape()), (b.bools()?, b.shape()), &shape, |&x, &y| f(x, y));
    cx.one(Tensor::new(&shape, out)?)
}

/// A bool, 0 or 1, of two small values. A symbol is a size: it is never negative.
fn truth(a: &Dim, b: &Dim, test: fn(Ordering) -> bool) -> Dim {
    let order = match (a, b) {
        (Dim::Known(a), Dim::Known(b)) => a.cmp(b),
        (a, b) if a.same(b) => Ordering::Equal,
        (Dim::Sym(_), Dim::Known(n)) if *n < 0 => Ordering::Greater,
        (Dim::Known(n), Dim::Sym(_)) if *n < 0 => Ordering::Less,
        _ => return Dim::Unknown,
    };
    Dim::Known(test(order).into())
}

fn infer(cx: &InferCx, f: fn(&Dim, &Dim) -> Dim) -> Inferred {
    if cx.opset < 7 && cx.attrs.int("broadcast").is_some() {
        return super::util::one(Some(Elem::Bool), cx.dims(0).map(<[Dim]>::to_vec));
    }
    let mut facts = broadcast(cx, Some(Elem::Bool), 0..2)?;
    if let (Some(f0), Some(s)) = (facts.first_mut(), sym2(cx, f)) {
        *f0 = fact(Elem::Bool, f0.ty.dims().map(<[Dim]>::to_vec), Some(s));
    }
    Ok(facts)
}

fn both(a: &Dim, b: &Dim) -> Dim {
    match (a.known(), b.known()) {
        (Some(0), _) | (_, Some(0)) => Dim::Known(0),
        (Some(_), Some(_)) => Dim::Known(1),
        _ => Dim::Unknown,
    }
}

fn either(a: &Dim, b: &Dim) -> Dim {
    match (a.known(), b.known()) {
        (Some(0), Some(0)) => Dim::Known(0),
        (Some(n), _) | (_, Some(n)) if n != 0 => Dim::Known(1),
        _ => Dim::Unknown,
    }
}

fn one_of(a: &Dim, b: &Dim) -> Dim {
    match (a.known(), b.known()) {
        (Some(a), Some(b)) => Dim::Known(((a != 0) != (b != 0)).into()),
        _ => Dim::Unknown,
    }
}

const fn op(name: &'static str, infer: fn(&InferCx) -> Inferred, eval: fn(&EvalCx) -> Evaluated) -> OpDef {
    OpDef { name, operands: (2, 2), infer, eval, ..OpDef::NEW }
}

/// Comparisons and logic.
pub const OPS: &[OpDef] = &[
    op("onnx.Equal", |cx| infer(cx, |a, b| truth(a, b, Ordering::is_eq)), equal),
    op(
        "onnx.Less",
        |cx| infer(cx, |a, b| truth(a, b, Ordering::is_lt)),
        |cx| order(cx, |o| o == Some(Ordering::Less)),
    ),
    op(
        "onnx.LessOrEqual",
        |cx| infer(cx, |a, b| truth(a, b, Ordering::is_le)),
        |cx| order(cx, |o| o.is_some_and(Ordering::is_le)),
    ),
    op(
        "onnx.Greater",
        |cx| infer(cx, |a, b| truth(a, b, Ordering::is_gt)),
        |cx| order(cx, |o| o == Some(Ordering::Greater)),
    ),
    op(
        "onnx.GreaterOrEqual",
        |cx| infer(cx, |a, b| truth(a, b, Ordering::is_ge)),
        |cx| order(cx, |o| o.is_some_and(Ordering::is_ge)),
    ),
    op("onnx.And", |cx| infer(cx, both), |cx| logic(cx, |a, b| a && b)),
    op("onnx.Or", |cx| infer(cx, either), |cx| logic(cx, |a, b| a || b)),
    op("onnx.Xor", |cx| infer(cx, one_of), |cx| logic(cx, |a, b| a != b)),
];
