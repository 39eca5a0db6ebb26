//! Ops on quantized tensors: the float op on dequantized operands, quantized again.
//!
//! Runtimes compute the same with tables and fixed-point factors, which moves a result that lies near the middle of two
//! codes to the other one. Operands are triples of codes, scale and zero point; so is what the result is given by.

use super::part::Part;
use crate::ir::{Elem, Type};
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    op("com.microsoft.QLinearAdd", 7, 8),
    op("com.microsoft.QLinearMul", 7, 8),
    op("com.microsoft.QLinearSigmoid", 4, 5),
    op("com.microsoft.QLinearLeakyRelu", 4, 5),
    op("com.microsoft.QLinearSoftmax", 4, 5),
    op("com.microsoft.QLinearAveragePool", 4, 5),
    op("com.microsoft.QLinearGlobalAveragePool", 4, 5),
    op("com.microsoft.QLinearReduceMean", 4, 5),
    op("com.microsoft.QLinearWhere", 8, 9),
    op("com.microsoft.QLinearConcat", 5, usize::MAX),
];

const fn op(name: &'static str, least: usize, most: usize) -> OpDef {
    OpDef { name, operands: (least, most), infer, eval, ..OpDef::NEW }
}

/// How an op is made of a float one.
struct Form {
    part: Part,
    /// Where each operand's codes are; its scale and zero point follow.
    operands: Vec<usize>,
    /// An operand that is not quantized, and goes first.
    plain: Option<usize>,
    /// Where the result's scale is; its zero point follows.
    result: usize,
}

impl Form {
    fn of(name: &str, attrs: &crate::ir::Attrs, given: usize) -> Result<Form, OpError> {
        if attrs.int("channels_last").unwrap_or(0) != 0 {
            return Err(OpError::Unsupported("channels in the last dim (channels_last)".into()));
        }
        let op = name.rsplit_once("QLinear").map_or("", |(_, op)| op);
        let names: Vec<&str> = attrs.iter().map(|(n, _)| &**n).filter(|n| *n != "opset").collect();
        let opset = match op {
            "Softmax" => attrs.int("opset").unwrap_or(13),
            // The last opset in which the axes are an attribute.
            "ReduceMean" => 13,
            _ => 21,
        };
        let part = Part::new(op).taking(attrs, &names).opset(opset);
        Ok(match op {
            "Concat" => Form { part, operands: (2..given).step_by(3).collect(), plain: None, result: 0 },
            "Where" => Form { part, operands: vec![1, 4], plain: Some(0), result: 7 },
            "Add" | "Mul" => Form { part, operands: vec![0, 3], plain: None, result: 6 },
            _ => Form { part, operands: vec![0], plain: None, result: 3 },
        })
    }
}

/// The fact of a tensor with another element type.
fn as_elem(ty: &Type, elem: Elem) -> Fact {
    match ty.dims() {
        Some(dims) => Type::tensor(elem, dims.iter().cloned()).into(),
        None => Type::unranked(elem).into(),
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let form = Form::of(cx.name.as_str(), cx.attrs, cx.inputs.len())?;
    let codes = form.operands.iter().find_map(|&i| cx.elem(i)).or(cx.elem(form.result + 1));
    let Some(codes) = codes else { return Ok(Vec::new()) };
    let plain = form.plain.map(|i| cx.fact(i).cloned());
    let float = form.operands.iter().map(|&i| Some(as_elem(cx.ty(i), Elem::F32)));
    let facts = form.part.infer(cx, &plain.into_iter().chain(float).collect::<Vec<_>>(), 1)?;
    Ok(facts.into_iter().map(|f| as_elem(&f.ty, codes)).collect())
}

fn eval(cx: &EvalCx) -> Evaluated {
    let form = Form::of(cx.name.as_str(), cx.attrs, cx.inputs.len())?;
    let dequantize = |&i: &usize| -> Result<Tensor, OpError> {
        Part::new("DequantizeLinear").eval(cx, &[Some(cx.input(i)?), Some(cx.input(i + 1)?), cx.opt(i + 2)?])
    };
    let float: Vec<Tensor> = form.operands.iter().map(dequantize).collect::<Result<_, _>>()?;
    let plain = form.plain.map(|i| cx.input(i)).transpose()?;
    let y = form.part.of(cx, &plain.into_iter().chain(&float).collect::<Vec<_>>())?;
    let first = form.operands.first().ok_or_else(|| OpError::invalid("there are no operands"))?;
    let elem = cx.input(*first)?.elem();
    cx.one(quantize(cx, &y, cx.input(form.result)?, cx.opt(form.result + 1)?, elem)?)
}

/// The codes of `x`, with no zero point as codes of `elem`.
pub(super) fn quantize(
    cx: &EvalCx,
    x: &Tensor,
    scale: &Tensor,
    zero: Option<&Tensor>,
    elem: Elem,
) -> Result<Tensor, OpError> {
    let part = Part::new("QuantizeLinear").with("output_dtype", i64::from(elem.onnx()));
    part.eval(cx, &[Some(x), Some(scale), zero])
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_qlinear");
    }
}
