//! NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss. Computed in double precision, whatever the float type.
//!
//! Scores are `[batch, classes, ..]`, targets `[batch, ..]`, weights `[classes]`. A target that is `ignore_index` counts
//! for nothing.

use super::cast::convert;
use super::order::around;
use super::util::{fact, one};
use crate::ir::{Dim, Elem};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The loss of log-probabilities `logs`, and its shape.
fn loss(cx: &EvalCx, logs: &[f64]) -> Result<(Vec<f64>, Vec<usize>), OpError> {
    let (x, target) = (cx.input(0)?, cx.input(1)?);
    let (outer, classes, inner) = sizes(x)?;
    let shape = [&x.shape()[..1], &x.shape()[2..]].concat();
    if target.shape() != shape {
        let (a, b) = (target.shape(), x.shape());
        return Err(OpError::Invalid(format!("targets of shape {a:?} do not fit scores of shape {b:?}")));
    }
    let weights = cx.opt(2)?.map(|t| convert(t, Elem::F64, true)).transpose()?;
    let weights = weights.as_ref().map(f64s);
    if weights.is_some_and(|w| w.len() != classes) {
        return Err(OpError::Invalid(format!("expected {classes} weights")));
    }
    let ignored = cx.attrs.int("ignore_index");
    let (mut losses, mut total) = (Vec::with_capacity(outer * inner), 0.0);
    for (i, &class) in target.to_i64()?.iter().enumerate() {
        if ignored == Some(class) {
            losses.push(0.0);
            continue;
        }
        let class = super::gather::place(class, classes).ok().filter(|_| class >= 0).ok_or_else(|| {
            OpError::Invalid(format!("the target {class} is out of range for {classes} classes"))
        })?;
        let weight = weights.map_or(1.0, |w| w[class]);
        losses.push(-logs[(i / inner * classes + class) * inner + i % inner] * weight);
        total += weight;
    }
    match cx.attrs.str("reduction").unwrap_or("mean") {
        "none" => Ok((losses, shape)),
        "sum" => Ok((vec![losses.iter().sum()], Vec::new())),
        "mean" => Ok((vec![losses.iter().sum::<f64>() / total], Vec::new())),
        other => Err(OpError::Invalid(format!("reduction is {other:?}, expected none, sum or mean"))),
    }
}

/// The sizes before, along and after the classes.
fn sizes(x: &Tensor) -> Result<(usize, usize, usize), OpError> {
    match x.rank() {
        0 | 1 => Err(OpError::invalid("expected scores of two dims or more")),
        _ => Ok(around(x.shape(), 1)),
    }
}

fn f64s(t: &Tensor) -> &[f64] {
    match t.data() {
        crate::tensor::Data::F64(v) => v,
        _ => &[],
    }
}

fn narrow(elem: Elem, shape: &[usize], values: Vec<f64>) -> Result<Tensor, OpError> {
    convert(&Tensor::new(shape, values)?, elem, true)
}

fn eval_nll(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (values, shape) = loss(cx, f64s(&convert(x, Elem::F64, true)?))?;
    cx.one(narrow(x.elem(), &shape, values)?)
}

fn eval_cross_entropy(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (outer, classes, inner) = sizes(x)?;
    let scores = convert(x, Elem::F64, true)?;
    let mut logs = f64s(&scores).to_vec();
    for o in 0..outer {
        for i in 0..inner {
            let at = |c: usize| (o * classes + c) * inner + i;
            let most = (0..classes).map(|c| logs[at(c)]).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (0..classes).map(|c| (logs[at(c)] - most).exp()).sum();
            let shift = most + sum.ln();
            (0..classes).for_each(|c| logs[at(c)] -= shift);
        }
    }
    let (values, shape) = loss(cx, &logs)?;
    Ok(vec![narrow(x.elem(), &shape, values)?.into(), narrow(x.elem(), x.shape(), logs)?.into()])
}

fn infer(cx: &InferCx) -> Inferred {
    let dims = match cx.attrs.str("reduction").unwrap_or("mean") {
        "none" => match (cx.dims(1), cx.dims(0)) {
            (Some(d), _) => Some(d.to_vec()),
            (None, Some([n, _, rest @ ..])) => Some([std::slice::from_ref(n), rest].concat()),
            _ => None,
        },
        _ => Some(Vec::new()),
    };
    let mut facts = one(cx.elem(0), dims)?;
    facts.extend(cx.elem(0).map(|e| fact(e, cx.dims(0).map(<[Dim]>::to_vec), None)));
    Ok(facts)
}

/// Losses.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.NegativeLogLikelihoodLoss", operands: (2, 3), infer, eval: eval_nll, ..OpDef::NEW },
    OpDef {
        name: "onnx.SoftmaxCrossEntropyLoss",
        operands: (2, 3),
        results: (1, 2),
        infer,
        eval: eval_cross_entropy,
        ..OpDef::NEW
    },
];
