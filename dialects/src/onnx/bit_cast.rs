//! BitCast: the same bits under another element type of the same width.

use super::cast::target;
use super::util::one;
use crate::ir::{ConstData, Dim, Elem};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

fn check(from: Elem, to: Elem) -> Result<(), OpError> {
    match from.bits() == to.bits() && from != Elem::String {
        true => Ok(()),
        false => Err(OpError::Invalid(format!("{from} and {to} are not of the same width"))),
    }
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (x, to) = (cx.input(0)?, target(cx.attrs)?);
    check(x.elem(), to)?;
    let c = x.to_const();
    let c = ConstData::new(to, c.dims, c.source).map_err(crate::tensor::TensorError::from)?;
    cx.one(Tensor::from_const(&c)?)
}

fn infer(cx: &InferCx) -> Inferred {
    let to = target(cx.attrs)?;
    cx.elem(0).map_or(Ok(()), |from| check(from, to))?;
    one(Some(to), cx.dims(0).map(<[Dim]>::to_vec))
}

/// The op.
pub const OPS: &[OpDef] = &[OpDef { name: "onnx.BitCast", infer, eval, ..OpDef::NEW }];
