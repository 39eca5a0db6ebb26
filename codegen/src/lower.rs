//! From `kernel.fused` to kernels: the table of what a kernel can be made around.

use crate::fuse::Fused;
use crate::kernels::{Lowered, copy, elementwise, matmul_nbits, norm, sizes};
use crate::target::Target;
use dialects::ir::{Module, Op};

/// An op that a kernel is made around, and how.
#[derive(Clone, Copy)]
pub struct Anchor {
    /// Whether this form of the op is compiled.
    supports: fn(&Module, Op) -> bool,
    /// Whether an operand that steps along these dims of the result can be read as results are finished.
    takes: fn(&[bool]) -> bool,
    /// How many of its operands, from the first on, it reads by layout: they may be views.
    views: usize,
    /// The kernels.
    lower: fn(&Fused, &Target) -> Option<Lowered>,
}

impl Anchor {
    /// Whether the kernel can take an elementwise op one of whose operands steps along these dims of the result.
    pub fn takes(&self, steps: &[bool]) -> bool {
        (self.takes)(steps)
    }

    /// Whether operand `i` may be a view.
    pub fn sees(&self, i: usize) -> bool {
        i < self.views
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

const NORM: Anchor = Anchor { supports: norm::supports, takes: nothing, views: 0, lower: norm::lower };
const COPY: Anchor = Anchor { supports: copy::supports, takes: nothing, views: 1, lower: copy::lower };
const CONCAT: Anchor = Anchor { views: usize::MAX, ..COPY };

/// What inference knows is never computed from operands.
const SIZES: Anchor = Anchor { supports: sizes::supports, takes: nothing, views: 0, lower: sizes::lower };

const ANCHORS: &[(&str, Anchor)] = &[
    (
        "com.microsoft.MatMulNBits",
        Anchor { supports: matmul_nbits::supports, takes: rows, views: 0, lower: matmul_nbits::lower },
    ),
    ("onnx.Concat", CONCAT),
    ("onnx.Expand", COPY),
    ("onnx.LayerNormalization", NORM),
    ("onnx.RMSNormalization", NORM),
    ("onnx.SimplifiedLayerNormalization", NORM),
    ("onnx.Slice", COPY),
    ("onnx.Split", COPY),
    ("onnx.Transpose", COPY),
];

/// How a kernel is made around `op`, if one can be.
pub fn anchor(m: &Module, op: Op) -> Option<Anchor> {
    if sizes::supports(m, op) {
        return Some(SIZES);
    }
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
