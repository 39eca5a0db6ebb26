//! Dropout in inference, where it drops nothing. Training is not done here.

use super::util::{fact, same_type};
use crate::ir::{Dim, Elem};
use crate::kernels::strided::count;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

fn eval(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let ratio = match cx.opt(1)? {
        Some(r) => super::cast::convert(r, Elem::F32, true)?.f32s()?.first().copied().unwrap_or(0.5),
        None => cx.float_or("ratio", 0.5),
    };
    let training = match cx.opt(2)? {
        Some(t) => t.bools()?.first().copied().unwrap_or(false),
        // Before opset 7 the op trains unless it is told that this is a test.
        None => cx.opset < 7 && cx.int_or("is_test", 0) == 0,
    };
    if training && ratio != 0.0 {
        return Err(OpError::Unsupported("dropout in training mode, whose result is random".into()));
    }
    // The mask says what is kept since opset 12; ONNX Runtime fills the older one with zeros.
    let mask = match cx.opset {
        12.. => Tensor::new(x.shape(), vec![true; count(x.shape())?])?,
        10.. => Tensor::zeros(Elem::Bool, x.shape())?,
        _ => Tensor::zeros(x.elem(), x.shape())?,
    };
    Ok(vec![x.clone().into(), mask.into()])
}

fn infer(cx: &InferCx) -> Inferred {
    let mut facts = same_type(cx)?;
    let elem = if cx.opset < 10 { cx.elem(0) } else { Some(Elem::Bool) };
    facts.extend(elem.map(|e| fact(e, cx.dims(0).map(<[Dim]>::to_vec), None)));
    Ok(facts)
}

/// The op.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.Dropout", operands: (1, 3), results: (1, 2), infer, eval, ..OpDef::NEW }];
