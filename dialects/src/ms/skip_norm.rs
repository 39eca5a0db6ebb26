//! SkipLayerNormalization and SkipSimplifiedLayerNormalization: a residual sum and its normalization.

use super::part::{Part, add, add_opt};
use crate::ir::{Dim, Elem, Type};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef};

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    // input, skip, gain, offset, bias of the sum.
    OpDef {
        name: "com.microsoft.SkipLayerNormalization",
        operands: (3, 5),
        results: (1, 4),
        infer,
        eval: |cx| eval(cx, "LayerNormalization", Some(3), 4),
        ..OpDef::NEW
    },
    // input, skip, gain, bias of the sum.
    OpDef {
        name: "com.microsoft.SkipSimplifiedLayerNormalization",
        operands: (3, 4),
        results: (1, 4),
        infer,
        eval: |cx| eval(cx, "RMSNormalization", None, 3),
        ..OpDef::NEW
    },
];

/// The normalized sum, its mean and inverse deviation, and the sum.
fn infer(cx: &InferCx) -> Inferred {
    let same = cx.ty(0).clone();
    let statistics = match cx.dims(0) {
        Some([lead @ .., _]) => Type::tensor(Elem::F32, lead.iter().cloned().chain([Dim::Known(1)])),
        _ => Type::unranked(Elem::F32),
    };
    Ok(vec![same.clone().into(), statistics.clone().into(), statistics.into(), same.into()])
}

fn eval(cx: &EvalCx, norm: &str, offset: Option<usize>, bias: usize) -> Evaluated {
    let sum = add_opt(cx, add(cx, cx.input(0)?, cx.input(1)?)?, cx.opt(bias)?)?;
    let offset = offset.map(|i| cx.opt(i)).transpose()?.flatten();
    // This domain's default is smaller than that of the default domain.
    let part = Part::new(norm).with("epsilon", cx.float_or("epsilon", 1e-12));
    let mut out = part.eval_all(cx, &[Some(&sum), Some(cx.input(2)?), offset], cx.outputs.min(3))?;
    if cx.outputs > 3 {
        out.push(sum.into());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_skip_norm");
    }
}
