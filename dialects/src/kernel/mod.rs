//! The `kernel` dialect: what code generation lowers.
//!
//! It has one op, `kernel.fused(operands...) {kind, body}`: ops that one compiled kernel does together. The body holds the
//! ops as they were, and may read constants around it; so its types, and its reference evaluation, are the body's own.

use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[OPS];

/// The name of the op.
pub const FUSED: &str = "kernel.fused";

const OPS: &[OpDef] =
    &[OpDef { name: FUSED, operands: (0, usize::MAX), results: (1, usize::MAX), infer, eval, ..OpDef::NEW }];

fn missing() -> OpError {
    OpError::invalid("the graph body is missing")
}

fn infer(cx: &InferCx) -> Inferred {
    let facts: Vec<_> = (0..cx.inputs.len()).map(|i| cx.fact(i).cloned().unwrap_or_default()).collect();
    (cx.region)(cx.attrs.graph("body").ok_or_else(missing)?, &facts)
}

fn eval(cx: &EvalCx) -> Evaluated {
    let items = (0..cx.inputs.len()).map(|i| cx.item(i).cloned()).collect::<Result<_, _>>()?;
    (cx.region)(cx.attrs.graph("body").ok_or_else(missing)?, items)
}
