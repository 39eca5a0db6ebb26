//! Products that a runtime has fused with what stood around them: FusedMatMul with transpositions and a factor,
//! FusedGemm and FusedConv with an activation.

use super::part::{Part, add_opt};
use crate::ir::{Attr, Dim, Type};
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "com.microsoft.FusedMatMul",
        operands: (2, 2),
        infer: infer_matmul,
        eval: eval_matmul,
        ..OpDef::NEW
    },
    // The older name, without transposed batches.
    OpDef {
        name: "com.microsoft.TransposeMatMul",
        operands: (2, 2),
        infer: infer_matmul,
        eval: eval_matmul,
        ..OpDef::NEW
    },
    OpDef {
        name: "com.microsoft.FusedGemm",
        operands: (2, 3),
        infer: |cx| part_of(cx.attrs, "Gemm").infer(cx, cx.inputs, 1),
        eval: eval_gemm,
        ..OpDef::NEW
    },
    OpDef {
        name: "com.microsoft.FusedConv",
        operands: (2, 4),
        infer: |cx| part_of(cx.attrs, "Conv").infer(cx, &cx.inputs[..cx.inputs.len().min(3)], 1),
        eval: eval_conv,
        ..OpDef::NEW
    },
];

/// The part `op` with all of the whole's attributes: those of the activation mean nothing to it.
fn part_of(attrs: &crate::ir::Attrs, op: &str) -> Part {
    let names: Vec<&str> = attrs.iter().map(|(n, _)| &**n).filter(|n| !n.starts_with("activation")).collect();
    Part::new(op).taking(attrs, &names)
}

/// The order of the dims of operand A or B in which its matrices are those of a plain product; `None` when it is one.
fn order(attrs: &crate::ir::Attrs, which: &str, rank: usize) -> Option<Vec<usize>> {
    let flag = |name: &str| attrs.int(&format!("{name}{which}")).unwrap_or(0) != 0;
    let (turned, batch) = (flag("trans"), flag("transBatch"));
    if rank < 2 || !(turned || batch) {
        return None;
    }
    let mut order: Vec<usize> = (0..rank).collect();
    if batch {
        // The first dim becomes the rows, behind those of the batch.
        let first = order.remove(0);
        order.insert(rank - 2, first);
    }
    if turned {
        order.swap(rank - 2, rank - 1);
    }
    Some(order)
}

fn infer_matmul(cx: &InferCx) -> Inferred {
    let side = |i: usize, which: &str| -> Option<Fact> {
        let (elem, Some(dims)) = (cx.elem(i)?, cx.dims(i)) else { return cx.fact(i).cloned() };
        let dims: Vec<Dim> = match order(cx.attrs, which, dims.len()) {
            Some(order) => order.into_iter().map(|d| dims[d].clone()).collect(),
            None => dims.to_vec(),
        };
        Some(Type::tensor(elem, dims).into())
    };
    let facts: Vec<Option<Fact>> =
        [(0, "A"), (1, "B")].map(|(i, w)| side(i, w).or_else(|| cx.fact(i).cloned())).into();
    Part::new("MatMul").infer(cx, &facts, 1)
}

fn eval_matmul(cx: &EvalCx) -> Evaluated {
    let side = |i: usize, which: &str| -> Result<Tensor, OpError> {
        let t = cx.input(i)?;
        match order(cx.attrs, which, t.rank()) {
            Some(order) => {
                let perm: Vec<i64> = order.into_iter().map(|d| d as i64).collect();
                Part::new("Transpose").with("perm", perm).of(cx, &[t])
            }
            None => Ok(t.clone()),
        }
    };
    let y = Part::new("MatMul").of(cx, &[&side(0, "A")?, &side(1, "B")?])?;
    let alpha = cx.float_or("alpha", 1.0);
    if alpha == 1.0 {
        return cx.one(y);
    }
    let factor = Tensor::from_f32(y.elem(), &[], vec![alpha])?;
    cx.one(Part::new("Mul").of(cx, &[&y, &factor])?)
}

/// The activation with these parameters.
fn activated(cx: &EvalCx, y: Tensor, parameters: &[f32]) -> Evaluated {
    let name = cx.attrs.str("activation").unwrap_or("");
    let parameter = |i: usize| {
        let missing = || OpError::invalid(format!("the activation {name} needs {} parameters", i + 1));
        parameters.get(i).copied().ok_or_else(missing)
    };
    let scalar = |x: f32| Tensor::from_f32(y.elem(), &[], vec![x]);
    cx.one(match name {
        "" => y,
        "Relu" | "Tanh" | "Sigmoid" | "HardSwish" => Part::new(name).of(cx, &[&y])?,
        "LeakyRelu" => Part::new(name).with("alpha", parameter(0)?).of(cx, &[&y])?,
        "HardSigmoid" => {
            Part::new(name).with("alpha", parameter(0)?).with("beta", parameter(1)?).of(cx, &[&y])?
        }
        "Clip" => Part::new(name).of(cx, &[&y, &scalar(parameter(0)?)?, &scalar(parameter(1)?)?])?,
        other => return Err(OpError::Unsupported(format!("the activation {other:?}"))),
    })
}

fn eval_gemm(cx: &EvalCx) -> Evaluated {
    let y = part_of(cx.attrs, "Gemm").eval(cx, &[Some(cx.input(0)?), Some(cx.input(1)?), cx.opt(2)?])?;
    let given = ["activation_alpha", "activation_beta", "activation_gamma"];
    let parameters: Vec<f32> = given.iter().map_while(|name| cx.attrs.float(name)).collect();
    activated(cx, y, &parameters)
}

fn eval_conv(cx: &EvalCx) -> Evaluated {
    let y = part_of(cx.attrs, "Conv").eval(cx, &[Some(cx.input(0)?), Some(cx.input(1)?), cx.opt(2)?])?;
    let y = add_opt(cx, y, cx.opt(3)?)?;
    let parameters = match cx.attrs.get("activation_params") {
        Some(Attr::Floats(given)) => given.clone(),
        _ => Vec::new(),
    };
    activated(cx, y, &parameters)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_fused");
    }
}
