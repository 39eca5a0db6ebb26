//! Gelu, FastGelu, BiasGelu and QuickGelu: one activation in four forms.

use super::part::{Part, add_opt};
use crate::onnx::util;
use crate::ops::{EvalCx, Evaluated, OpDef};

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    op("com.microsoft.Gelu", 1, |cx| activated(cx, Part::new("Gelu"))),
    op("com.microsoft.BiasGelu", 2, |cx| activated(cx, Part::new("Gelu"))),
    op("com.microsoft.FastGelu", 2, |cx| activated(cx, Part::new("Gelu").with("approximate", "tanh"))),
    op("com.microsoft.QuickGelu", 1, |cx| {
        activated(cx, Part::new("Swish").with("alpha", cx.float_or("alpha", 1.702)))
    }),
];

const fn op(name: &'static str, operands: usize, eval: fn(&EvalCx) -> Evaluated) -> OpDef {
    OpDef { name, operands: (1, operands), infer: util::same_type, eval, ..OpDef::NEW }
}

fn activated(cx: &EvalCx, part: Part) -> Evaluated {
    let x = add_opt(cx, cx.input(0)?.clone(), cx.opt(1)?)?;
    cx.one(part.of(cx, &[&x])?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_gelu");
    }
}
