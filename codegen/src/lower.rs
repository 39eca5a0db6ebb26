//! From `kernel.fused` to kernels: the table of what a kernel can be made around.

use crate::fuse::Fused;
use crate::kernels::{Lowered, attention, elementwise, matmul_nbits, norm, rotary, softmax};
use crate::target::Target;
use dialects::ir::{Module, Op};

/// An op that a kernel is made around, and how.
#[derive(Clone, Copy)]
pub struct Anchor {
    /// Whether this form of the op is compiled.
    supports: fn(&Module, Op) -> bool,
    /// Whether an operand that steps along these dims of the result can be read as results are finished.
    takes: fn(&[bool]) -> bool,
    /// The kernels.
    lower: fn(&Fused, &Target) -> Option<Lowered>,
}

impl Anchor {
    /// Whether the kernel can take an elementwise op one of whose operands steps along these dims of the result.
    pub fn takes(&self, steps: &[bool]) -> bool {
        (self.takes)(steps)
    }
}

/// Rows of the result, whole, or one row for all of them, or one element for all.
fn rows(steps: &[bool]) -> bool {
    let Some((_, lead)) = steps.split_last() else { return true };
    lead.iter().all(|&s| s) || lead.iter().all(|&s| !s)
}

/// A kernel that takes nothing else.
fn nothing(_: &[bool]) -> bool {
    false
}

const ATTENTION: Anchor = Anchor { supports: attention::supports, takes: nothing, lower: attention::lower };
const ROTARY: Anchor = Anchor { supports: rotary::supports, takes: nothing, lower: rotary::lower };
const SOFTMAX: Anchor = Anchor { supports: softmax::supports, takes: nothing, lower: softmax::lower };
const NORM: Anchor = Anchor { supports: norm::supports, takes: nothing, lower: norm::lower };

const ANCHORS: &[(&str, Anchor)] = &[
    (
        "com.microsoft.MatMulNBits",
        Anchor { supports: matmul_nbits::supports, takes: rows, lower: matmul_nbits::lower },
    ),
    ("com.microsoft.MultiHeadAttention", ATTENTION),
    ("com.microsoft.RotaryEmbedding", ROTARY),
    ("onnx.Attention", ATTENTION),
    ("onnx.LayerNormalization", NORM),
    ("onnx.LogSoftmax", SOFTMAX),
    ("onnx.RMSNormalization", NORM),
    ("onnx.RotaryEmbedding", ROTARY),
    ("onnx.SimplifiedLayerNormalization", NORM),
    ("onnx.Softmax", SOFTMAX),
];

/// How a kernel is made around `op`, if one can be.
pub fn anchor(m: &Module, op: Op) -> Option<Anchor> {
    let name = m.ops[op].name.as_str();
    let (_, anchor) = ANCHORS.iter().find(|a| a.0 == name)?;
    (anchor.supports)(m, op).then_some(*anchor)
}

/// The kernels of a `kernel.fused`.
pub fn lower(m: &Module, op: Op, target: &Target) -> Option<Lowered> {
    let fused = Fused::of(m, op)?;
    match fused.anchor() {
        None => elementwise::lower(&fused, target),
        Some(a) => (anchor(m, a)?.lower)(&fused, target),
    }
}
