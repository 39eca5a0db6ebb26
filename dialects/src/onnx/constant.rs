//! Ops that make tensors out of attributes and shapes: Constant, ConstantOfShape, Identity, Shape, Size, Range, EyeLike.

use super::util::{fact, known_shape, one, shape_of, small_count, sym, wrong_elem};
use crate::ir::{Attr, Dim, Elem};
use crate::kernels::strided::{build, count, gather};
use crate::map_data;
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};

/// The tensor of a Constant that is not given as one.
fn literal(attrs: &crate::ir::Attrs) -> Result<Tensor, OpError> {
    let found = attrs.iter().find(|(name, _)| name.starts_with("value"));
    let tensor = |n: usize, data: Data| Tensor::new(&[n], data);
    Ok(match found {
        Some((_, Attr::Int(x))) => Tensor::scalar(*x),
        Some((_, Attr::Float(x))) => Tensor::scalar(*x),
        Some((_, Attr::Str(x))) => Tensor::scalar(x.clone()),
        Some((_, Attr::Ints(v))) => tensor(v.len(), v.clone().into())?,
        Some((_, Attr::Floats(v))) => tensor(v.len(), v.clone().into())?,
        Some((_, Attr::Strs(v))) => tensor(v.len(), v.clone().into())?,
        _ => return Err(OpError::Unsupported("a constant that is not a dense tensor".into())),
    })
}

fn eval_constant(cx: &EvalCx) -> Evaluated {
    match cx.attrs.tensor("value") {
        Some(id) => cx.one(Tensor::from_const(&cx.consts[id])?),
        None => cx.one(literal(cx.attrs)?),
    }
}

fn infer_constant(cx: &InferCx) -> Inferred {
    match (cx.attrs.tensor("value"), cx.attrs.tensor("sparse_value")) {
        (Some(id), _) => Ok(vec![Fact::of_const(id, cx.consts)]),
        (None, Some(id)) => Ok(vec![cx.consts[id].ty().into()]),
        (None, None) => {
            let t = literal(cx.attrs)?;
            let few = t.elem() == Elem::I64 && small_count(t.shape()).is_some();
            let sym =
                few.then(|| t.i64s().map(|v| v.iter().map(|&n| Dim::Known(n)).collect())).transpose()?;
            Ok(vec![fact(t.elem(), Some(t.shape().iter().map(|&n| Dim::from(n)).collect()), sym)])
        }
    }
}

fn eval_filled(cx: &EvalCx) -> Evaluated {
    let shape = shape_of(&cx.input(0)?.to_i64()?)?;
    let n = count(&shape)?;
    match cx.attrs.tensor("value") {
        None => cx.one(Tensor::new(&shape, vec![0f32; n])?),
        Some(id) => {
            let value = Tensor::from_const(&cx.consts[id])?;
            if value.len() != 1 {
                return Err(OpError::Invalid(format!("value has {} elements, expected one", value.len())));
            }
            let data = map_data!(value.data(), v => gather(v, &[n], &[0], 0));
            super::util::moved(&value, &shape, data)
        }
    }
}

fn infer_filled(cx: &InferCx) -> Inferred {
    let dims = match (cx.sym(0), known_shape(cx, 0).as_deref()) {
        (Some(s), _) => Some(s.to_vec()),
        (None, Some(&[rank])) if rank <= 64 => Some(vec![Dim::Unknown; rank]),
        _ => None,
    };
    let Some(id) = cx.attrs.tensor("value") else { return one(Some(Elem::F32), dims) };
    let value = Fact::of_const(id, cx.consts);
    let shape: Option<Vec<usize>> = dims.iter().flatten().map(|d| usize::try_from(d.known()?).ok()).collect();
    let n = dims.as_ref().and(shape).and_then(|s| small_count(&s));
    let sym = n.and_then(|n| Some(vec![value.sym.as_ref()?.first()?.clone(); n]));
    Ok(vec![fact(cx.consts[id].elem, dims, sym)])
}

/// `start` and `end` of Shape, clamped to the rank.
fn range(attrs: &crate::ir::Attrs, rank: usize) -> std::ops::Range<usize> {
    let r = rank as i64;
    let clamp = |n: i64| if n < 0 { n.saturating_add(r) } else { n }.clamp(0, r) as usize;
    let start = clamp(attrs.int("start").unwrap_or(0));
    start..clamp(attrs.int("end").unwrap_or(r)).max(start)
}

fn eval_shape(cx: &EvalCx) -> Evaluated {
    let shape = cx.input(0)?.shape();
    let dims: Vec<i64> = shape[range(cx.attrs, shape.len())].iter().map(|&d| d as i64).collect();
    cx.one(Tensor::new(&[dims.len()], dims)?)
}

fn infer_shape(cx: &InferCx) -> Inferred {
    let dims = cx.dims(0).map(|d| d[range(cx.attrs, d.len())].to_vec());
    let rank = dims.as_ref().map_or(Dim::Unknown, |d| Dim::from(d.len()));
    Ok(vec![fact(Elem::I64, Some(vec![rank]), dims)])
}

fn infer_size(cx: &InferCx) -> Inferred {
    let n = cx.dims(0).map(|d| vec![d.iter().fold(Dim::Known(1), |n, d| n.mul(d))]);
    Ok(vec![fact(Elem::I64, Some(Vec::new()), n)])
}

/// `start, start + delta, ..` up to but without `limit`.
fn eval_range(cx: &EvalCx) -> Evaluated {
    let (start, limit, delta) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    if [start, limit, delta].iter().any(|t| t.len() != 1 || t.elem() != start.elem()) {
        return Err(OpError::invalid("start, limit and delta must be scalars of one type"));
    }
    macro_rules! float {
        ($s:expr, $l:expr, $d:expr, $t:ty) => {{
            let n = (f64::from($l - $s) / f64::from($d)).ceil().max(0.0);
            // A NaN length is zero, an infinite one is too many.
            let n = count(&[n as usize])?;
            (
                n,
                build(n, |at, out| {
                    out.iter_mut().enumerate().for_each(|(i, o)| *o = $s + (at + i) as $t * $d)
                })
                .into(),
            )
        }};
    }
    macro_rules! int {
        ($s:expr, $l:expr, $d:expr, $t:ty) => {{
            let (s, l, d) = (i128::from($s), i128::from($l), i128::from($d));
            if d == 0 {
                return Err(OpError::invalid("delta is zero"));
            }
            let n = if (l > s) == (d > 0) && l != s { ((l - s).abs() + d.abs() - 1) / d.abs() } else { 0 };
            let n = count(&[usize::try_from(n).unwrap_or(usize::MAX)])?;
            let values: Vec<$t> = (0..n as i128).map(|i| (s + i * d) as $t).collect();
            (n, values.into())
        }};
    }
    let (n, data): (usize, Data) = match (start.data(), limit.data(), delta.data()) {
        (Data::F32(s), Data::F32(l), Data::F32(d)) => float!(s[0], l[0], d[0], f32),
        (Data::F64(s), Data::F64(l), Data::F64(d)) => float!(s[0], l[0], d[0], f64),
        (Data::I64(s), Data::I64(l), Data::I64(d)) => int!(s[0], l[0], d[0], i64),
        (Data::I32(s), Data::I32(l), Data::I32(d)) => int!(s[0], l[0], d[0], i32),
        (Data::I16(s), Data::I16(l), Data::I16(d)) => int!(s[0], l[0], d[0], i16),
        _ if matches!(start.elem(), Elem::F16 | Elem::BF16) => {
            let (s, l, d) = (start.to_f32()?[0], limit.to_f32()?[0], delta.to_f32()?[0]);
            let n = count(&[(f64::from(l - s) / f64::from(d)).ceil().max(0.0) as usize])?;
            let values = (0..n).map(|i| s + i as f32 * d).collect();
            return cx.one(Tensor::from_f32(start.elem(), &[n], values)?);
        }
        _ => return Err(wrong_elem("a numeric type", start)),
    };
    cx.one(Tensor::new(&[n], data)?)
}

fn infer_range(cx: &InferCx) -> Inferred {
    let value = |i| sym(cx, i).and_then(|(s, _)| s.first().cloned());
    let (mut len, mut contents) = (Dim::Unknown, None);
    if let (Some(s), Some(l), Some(d)) = (value(0), value(1), value(2)) {
        len = match (&s, &l, &d) {
            (Dim::Known(s), Dim::Known(l), Dim::Known(d)) if *d != 0 => {
                let (s, l, d) = (i128::from(*s), i128::from(*l), i128::from(*d));
                let n =
                    if (l > s) == (d > 0) && l != s { ((l - s).abs() + d.abs() - 1) / d.abs() } else { 0 };
                contents = (n <= 64).then(|| (0..n).map(|i| Dim::Known((s + i * d) as i64)).collect());
                i64::try_from(n).map_or(Dim::Unknown, Dim::Known)
            }
            // In steps of one there are as many as lie between, if that is surely no negative number.
            (s, l, Dim::Known(1)) if l.sub(s).nonnegative() => l.sub(s),
            _ => Dim::Unknown,
        };
    }
    Ok(cx.elem(0).map(|e| fact(e, Some(vec![len]), contents)).into_iter().collect())
}

/// The type that the attribute `dtype` names, if it is there.
fn eye_type(attrs: &crate::ir::Attrs) -> Option<Option<Elem>> {
    attrs.int("dtype").map(|code| i32::try_from(code).ok().and_then(Elem::from_onnx))
}

/// A matrix with ones on a diagonal.
fn eval_eye(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let &[rows, cols] = t.shape() else { return Err(OpError::invalid("expected a matrix")) };
    let k = cx.int_or("k", 0);
    let on = |i: usize| k.saturating_add((i / cols) as i64) == (i % cols) as i64;
    let ones: Vec<u8> = (0..rows * cols).map(|i| on(i).into()).collect();
    let to = eye_type(cx.attrs).unwrap_or(Some(t.elem()));
    let to = to.ok_or_else(|| OpError::invalid("dtype is no element type"))?;
    cx.one(super::cast::convert(&Tensor::new(&[rows, cols], ones)?, to, true)?)
}

fn infer_eye(cx: &InferCx) -> Inferred {
    let elem = eye_type(cx.attrs).unwrap_or(cx.elem(0));
    one(elem, cx.dims(0).map(<[Dim]>::to_vec))
}

/// Ops that make tensors.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.Constant",
        operands: (0, 0),
        infer: infer_constant,
        eval: eval_constant,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.ConstantOfShape", infer: infer_filled, eval: eval_filled, ..OpDef::NEW },
    OpDef {
        name: "onnx.Identity",
        infer: |cx| Ok(cx.fact(0).cloned().into_iter().collect()),
        eval: |cx| Ok(vec![cx.item(0)?.clone()]),
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Shape", infer: infer_shape, eval: eval_shape, ..OpDef::NEW },
    OpDef {
        name: "onnx.Size",
        infer: infer_size,
        eval: |cx| cx.one(Tensor::scalar(cx.input(0)?.len() as i64)),
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Range", operands: (3, 3), infer: infer_range, eval: eval_range, ..OpDef::NEW },
    OpDef { name: "onnx.EyeLike", infer: infer_eye, eval: eval_eye, ..OpDef::NEW },
];
