//! Products of 8-bit integers with float results: DynamicQuantizeMatMul, MatMulIntegerToFloat and QGemm.

use super::part::{Part, add, add_opt};
use super::qlinear;
use crate::ir::{Elem, Type};
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    // A, B, scale and zero point of B, bias.
    OpDef {
        name: "com.microsoft.DynamicQuantizeMatMul",
        operands: (3, 5),
        infer: |cx| infer(cx, 2),
        eval: eval_dynamic,
        ..OpDef::NEW
    },
    // A, B, scales of A and B, zero points of A and B, bias.
    OpDef {
        name: "com.microsoft.MatMulIntegerToFloat",
        operands: (4, 7),
        infer: |cx| infer(cx, 3),
        eval: |cx| {
            let (a_scale, b_scale) = (cx.input(2)?, cx.input(3)?);
            let (a, b) = ((cx.input(0)?, a_scale, cx.opt(4)?), (cx.input(1)?, b_scale, cx.opt(5)?));
            cx.one(add_opt(cx, product(cx, a, b)?, cx.opt(6)?)?)
        },
        ..OpDef::NEW
    },
    // A with scale and zero point, B with its, C, scale and zero point of Y.
    OpDef { name: "com.microsoft.QGemm", operands: (6, 9), infer: infer_gemm, eval: eval_gemm, ..OpDef::NEW },
];

/// A matrix of codes with its scale and its zero point.
type Quantized<'a> = (&'a Tensor, &'a Tensor, Option<&'a Tensor>);

fn infer(cx: &InferCx, scale: usize) -> Inferred {
    let elem = cx.elem(scale).unwrap_or(Elem::F32);
    let float = |i: usize| -> Option<Fact> {
        Some(match cx.dims(i) {
            Some(dims) => Type::tensor(elem, dims.iter().cloned()).into(),
            None => Type::unranked(elem).into(),
        })
    };
    Part::new("MatMul").infer(cx, &[float(0), float(1)], 1)
}

/// `(a - zero_a) (b - zero_b) * a_scale * b_scale`: one scale for all of A, and one for all of B or for each column.
pub(super) fn product(
    cx: &EvalCx,
    (a, a_scale, a_zero): Quantized,
    (b, b_scale, b_zero): Quantized,
) -> Result<Tensor, OpError> {
    if a_scale.len() != 1 {
        return Err(OpError::Unsupported(format!("a scale of A of shape {:?}", a_scale.shape())));
    }
    let sum = Part::new("MatMulInteger").eval(cx, &[Some(a), Some(b), a_zero, b_zero])?;
    scaled(cx, &sum, a_scale, b_scale)
}

/// Integers times two scales that broadcast.
fn scaled(cx: &EvalCx, sum: &Tensor, a_scale: &Tensor, b_scale: &Tensor) -> Result<Tensor, OpError> {
    let elem = b_scale.elem();
    let sum = Part::new("Cast").with("to", i64::from(elem.onnx())).of(cx, &[sum])?;
    let scale = Part::new("Mul").of(cx, &[a_scale, b_scale])?;
    Part::new("Mul").of(cx, &[&sum, &scale])
}

fn eval_dynamic(cx: &EvalCx) -> Evaluated {
    let coded = Part::new("DynamicQuantizeLinear").eval_all(cx, &[Some(cx.input(0)?)], 3)?;
    let [codes, scale, zero] = &coded[..] else {
        return Err(OpError::invalid("DynamicQuantizeLinear has three results"));
    };
    let a = (codes.tensor()?, scale.tensor()?, Some(zero.tensor()?));
    let y = product(cx, a, (cx.input(1)?, cx.input(2)?, cx.opt(3)?))?;
    cx.one(add_opt(cx, y, cx.opt(4)?)?)
}

fn infer_gemm(cx: &InferCx) -> Inferred {
    let elem = if cx.has(8) { cx.elem(8) } else { Some(Elem::F32) };
    let part = Part::new("Gemm").taking(cx.attrs, &["transA", "transB"]);
    let as_elem = |i: usize| -> Option<Fact> {
        Some(match cx.dims(i) {
            Some(dims) => Type::tensor(elem?, dims.iter().cloned()).into(),
            None => Type::unranked(elem?).into(),
        })
    };
    part.infer(cx, &[as_elem(0), as_elem(3)], 1)
}

/// `alpha * a_scale * b_scale * ((A - zero_a) (B - zero_b) + C)`, in float or quantized.
fn eval_gemm(cx: &EvalCx) -> Evaluated {
    let side = |i: usize, flag: &str| match cx.int_or(flag, 0) {
        0 => Ok(cx.input(i)?.clone()),
        _ => Part::new("Transpose").of(cx, &[cx.input(i)?]),
    };
    let (a, b) = (side(0, "transA")?, side(3, "transB")?);
    if a.rank() != 2 || b.rank() != 2 || cx.input(1)?.len() != 1 {
        let (a, b, s) = (a.shape(), b.shape(), cx.input(1)?.shape());
        return Err(OpError::invalid(format!(
            "expected matrices and one scale of A, found {a:?}, {b:?}, {s:?}"
        )));
    }
    let mut sum = Part::new("MatMulInteger").eval(cx, &[Some(&a), Some(&b), cx.opt(2)?, cx.opt(5)?])?;
    if let Some(c) = cx.opt(6)? {
        sum = add(cx, &sum, c)?;
    }
    let mut y = scaled(cx, &sum, cx.input(1)?, cx.input(4)?)?;
    let alpha = cx.float_or("alpha", 1.0);
    if alpha != 1.0 {
        y = Part::new("Mul").of(cx, &[&y, &Tensor::scalar(alpha)])?;
    }
    match (cx.opt(7)?, cx.opt(8)?) {
        (Some(scale), Some(zero)) => cx.one(qlinear::quantize(cx, &y, scale, Some(zero), zero.elem())?),
        _ => cx.one(y),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_integer");
    }
}
