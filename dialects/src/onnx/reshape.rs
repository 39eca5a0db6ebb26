//! Ops that give the same elements another shape: Reshape, Squeeze, Unsqueeze, Flatten. They copy nothing.

use super::util::{Ints, axes, axis, fact, infer_ints, ints_or, known_shape, one, show};
use crate::ir::{Dim, Elem};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};

/// One result: the operand's elements and small contents, with other dims.
fn reshaped(cx: &InferCx, dims: Option<Vec<Dim>>) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    Ok(vec![fact(elem, dims, cx.sym(0).map(<[Dim]>::to_vec))])
}

/// The target of a Reshape: an operand from opset 5 on, an attribute before.
fn eval_reshape(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let target = ints_or(cx, "shape", 1)?.ok_or_else(|| OpError::invalid("the target shape is missing"))?;
    let keep_zero = cx.int_or("allowzero", 0) != 0;
    let fail = || OpError::Invalid(format!("{:?} cannot be reshaped to {target:?}", t.shape()));
    let mut shape = Vec::with_capacity(target.len());
    let mut rest = None;
    for (i, &n) in target.iter().enumerate() {
        shape.push(match n {
            0 if !keep_zero => *t.shape().get(i).ok_or_else(fail)?,
            -1 if rest.is_none() => {
                rest = Some(i);
                1
            }
            n => usize::try_from(n).map_err(|_| fail())?,
        });
    }
    if let Some(i) = rest {
        let others = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(fail)?;
        shape[i] = t.len().checked_div(others).ok_or_else(fail)?;
    }
    Ok(vec![t.reshape(&shape).map_err(|_| fail())?.into()])
}

/// Both sides have the same product. The one size that is not known (`-1`, or one that inference lost) is what is
/// left after equal symbols, and dims copied by a zero, cancel.
fn infer_reshape(cx: &InferCx) -> Inferred {
    let from = cx.dims(0);
    let target: Vec<Dim> = match cx.attrs.ints("shape") {
        Some(v) => v.iter().map(|&n| Dim::Known(n)).collect(),
        None => match (cx.sym(1), known_shape(cx, 1).as_deref()) {
            (Some(s), _) => s.to_vec(),
            (None, Some(&[rank])) if rank <= 64 => vec![Dim::Unknown; rank],
            _ => return reshaped(cx, None),
        },
    };
    let copies = cx.attrs.int("allowzero").unwrap_or(0) == 0;
    let fail = || {
        let from = from.map_or("a tensor".into(), show);
        OpError::Invalid(format!("{from} cannot be reshaped to {}", show(&target)))
    };
    let mut dims = Vec::with_capacity(target.len());
    let mut lost = Vec::new();
    // Sizes to be divided out, and those of the operand that a zero has not copied.
    let mut divisors = Vec::new();
    let mut left: Vec<Dim> = from.map(<[Dim]>::to_vec).unwrap_or_default();
    for (i, d) in target.iter().enumerate() {
        match (d, from) {
            (Dim::Known(0), Some(from)) if copies => {
                dims.push(from.get(i).ok_or_else(fail)?.clone());
                left[i] = Dim::Known(1);
            }
            (Dim::Known(0), None) if copies => dims.push(Dim::Unknown),
            (Dim::Known(-1) | Dim::Unknown, _) => {
                lost.push(i);
                dims.push(Dim::Unknown);
            }
            (Dim::Known(n), _) if *n < 0 => return Err(fail()),
            (d, _) => {
                divisors.push(d.clone());
                dims.push(d.clone());
            }
        }
    }
    if let (Some(_), &[i]) = (from, lost.as_slice()) {
        if let Some(size) = quotient(left, divisors).ok_or_else(fail)? {
            dims[i] = size;
        }
    } else if from.is_some() && lost.is_empty() {
        // A symbol left over may be one at run time; a number may not.
        match quotient(left, divisors) {
            None => return Err(fail()),
            Some(Some(Dim::Known(n))) if n != 1 => return Err(fail()),
            _ => {}
        }
    }
    reshaped(cx, Some(dims))
}

/// `product(of) / product(by)`: `None` when it is no whole number, `Some(None)` when it cannot be expressed.
fn quotient(mut of: Vec<Dim>, by: Vec<Dim>) -> Option<Option<Dim>> {
    let mut number = 1i64;
    for d in by {
        match d {
            Dim::Known(n) => match number.checked_mul(n) {
                Some(n) => number = n,
                None => return Some(None),
            },
            d => match of.iter().position(|o| o.same(&d)) {
                Some(i) => {
                    of.swap_remove(i);
                }
                None => return Some(None),
            },
        }
    }
    let product = of.iter().fold(Dim::Known(1), |n, d| n.mul(d));
    match product {
        // An empty tensor says nothing about a size.
        _ if number == 0 => Some(None),
        Dim::Known(n) => (n % number == 0).then_some(Some(Dim::Known(n / number))),
        product => Some(Some(product.div(&Dim::Known(number))).filter(|d| *d != Dim::Unknown)),
    }
}

fn eval_squeeze(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let drop = match ints_or(cx, "axes", 1)? {
        Some(v) => axes(&v, t.rank())?,
        None => (0..t.rank()).filter(|&i| t.shape()[i] == 1).collect(),
    };
    if let Some(i) = drop.iter().find(|&&i| t.shape()[i] != 1) {
        return Err(OpError::Invalid(format!("dim {i} of {:?} is not 1", t.shape())));
    }
    let kept: Vec<usize> = (0..t.rank()).filter(|i| !drop.contains(i)).map(|i| t.shape()[i]).collect();
    cx.one(t.reshape(&kept)?)
}

fn infer_squeeze(cx: &InferCx) -> Inferred {
    let Some(from) = cx.dims(0) else { return reshaped(cx, None) };
    let drop = match infer_ints(cx, "axes", 1) {
        Ints::Known(v) => axes(&v, from.len())?,
        Ints::Absent if from.iter().all(|d| d.known().is_some()) => {
            (0..from.len()).filter(|&i| from[i] == Dim::Known(1)).collect()
        }
        _ => return reshaped(cx, None),
    };
    if let Some(&i) = drop.iter().find(|&&i| from[i].known().is_some_and(|n| n != 1)) {
        return Err(OpError::Invalid(format!("dim {i} of {} is not 1", show(from))));
    }
    let kept = (0..from.len()).filter(|i| !drop.contains(i)).map(|i| from[i].clone());
    reshaped(cx, Some(kept.collect()))
}

/// `dims` with ones put in, so that they stand at `axes` of the result.
fn unsqueezed<T: Clone>(dims: &[T], at: &[i64], one: T) -> Result<Vec<T>, OpError> {
    let rank = dims.len() + at.len();
    let at = axes(at, rank)?;
    let mut rest = dims.iter().cloned();
    let mut next = || rest.next().expect("there are as many dims as places left");
    Ok((0..rank).map(|i| if at.contains(&i) { one.clone() } else { next() }).collect())
}

fn eval_unsqueeze(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let at = ints_or(cx, "axes", 1)?.ok_or_else(|| OpError::invalid("axes are missing"))?;
    cx.one(t.reshape(&unsqueezed(t.shape(), &at, 1)?)?)
}

fn infer_unsqueeze(cx: &InferCx) -> Inferred {
    match (cx.dims(0), infer_ints(cx, "axes", 1)) {
        (Some(from), Ints::Known(at)) => reshaped(cx, Some(unsqueezed(from, &at, Dim::Known(1))?)),
        (Some(from), Ints::Unknown) => {
            let more = known_shape(cx, 1).and_then(|s| s.first().copied()).filter(|&n| n <= 64);
            reshaped(cx, more.map(|n| vec![Dim::Unknown; from.len() + n]))
        }
        _ => reshaped(cx, None),
    }
}

/// Where Flatten cuts: the rank itself is allowed.
fn cut(at: i64, rank: usize) -> Result<usize, OpError> {
    if at == rank as i64 { Ok(rank) } else { axis(at, rank) }
}

fn eval_flatten(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let at = cut(cx.int_or("axis", 1), t.rank())?;
    let (rows, cols) = t.shape().split_at(at);
    cx.one(t.reshape(&[rows.iter().product(), cols.iter().product()])?)
}

fn infer_flatten(cx: &InferCx) -> Inferred {
    let product = |d: &[Dim]| d.iter().fold(Dim::Known(1), |n, d| n.mul(d));
    match cx.dims(0) {
        Some(from) => {
            let (rows, cols) = from.split_at(cut(cx.attrs.int("axis").unwrap_or(1), from.len())?);
            reshaped(cx, Some(vec![product(rows), product(cols)]))
        }
        None => one(cx.elem(0), Some(vec![Dim::Unknown; 2])),
    }
}

fn verify_reshape(cx: &InferCx) -> Result<(), OpError> {
    match cx.elem(1) {
        Some(e) if e != Elem::I64 => Err(OpError::Invalid(format!("the target shape is {e}, expected i64"))),
        _ => Ok(()),
    }
}

/// Ops that give the same elements another shape.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.Reshape",
        operands: (1, 2),
        infer: infer_reshape,
        verify: verify_reshape,
        eval: eval_reshape,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Squeeze", operands: (1, 2), infer: infer_squeeze, eval: eval_squeeze, ..OpDef::NEW },
    OpDef {
        name: "onnx.Unsqueeze",
        operands: (1, 2),
        infer: infer_unsqueeze,
        eval: eval_unsqueeze,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Flatten", infer: infer_flatten, eval: eval_flatten, ..OpDef::NEW },
];
