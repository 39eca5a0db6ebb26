//! From `kernel.fused` to kernels: the table of what a kernel can be made around.

use crate::fuse::Fused;
use crate::kernels::{
    Lowered, batched, dense, elementwise, gather, gather_packed, integer, matmul_nbits, norm, quantize, range,
};
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

const NORM: Anchor = Anchor { supports: norm::supports, takes: nothing, lower: norm::lower };
const DYNAMIC: Anchor =
    Anchor { supports: quantize::supports_dynamic, takes: nothing, lower: quantize::lower_dynamic };
const QUANTIZE: Anchor = Anchor { supports: quantize::supports, takes: nothing, lower: quantize::lower };
const DENSE: Anchor = Anchor { supports: dense::supports, takes: rows, lower: dense::lower };

const GATHER: Anchor = Anchor { supports: gather::supports, takes: nothing, lower: gather::lower };

const ANCHORS: &[(&str, Anchor)] = &[
    (
        "com.microsoft.GatherBlockQuantized",
        Anchor { supports: gather_packed::supports, takes: nothing, lower: gather_packed::lower },
    ),
    (
        "com.microsoft.MatMulNBits",
        Anchor { supports: matmul_nbits::supports, takes: rows, lower: matmul_nbits::lower },
    ),
    ("com.microsoft.DequantizeLinear", QUANTIZE),
    ("com.microsoft.QuantizeLinear", QUANTIZE),
    ("onnx.DequantizeLinear", QUANTIZE),
    ("onnx.DynamicQuantizeLinear", DYNAMIC),
    ("onnx.MatMulInteger", Anchor { supports: integer::supports, takes: rows, lower: integer::lower }),
    ("onnx.QuantizeLinear", QUANTIZE),
    ("onnx.Gemm", DENSE),
    ("onnx.MatMul", DENSE),
    ("onnx.MatMul", Anchor { supports: batched::supports, takes: nothing, lower: batched::lower }),
    ("onnx.Gather", GATHER),
    ("onnx.GatherElements", GATHER),
    ("onnx.GatherND", GATHER),
    ("onnx.LayerNormalization", NORM),
    ("onnx.RMSNormalization", NORM),
    ("onnx.Range", Anchor { supports: range::supports, takes: nothing, lower: range::lower }),
    ("onnx.SimplifiedLayerNormalization", NORM),
];

/// How a kernel is made around `op`, if one can be.
pub fn anchor(m: &Module, op: Op) -> Option<Anchor> {
    let name = m.ops[op].name.as_str();
    ANCHORS.iter().find(|a| a.0 == name && (a.1.supports)(m, op)).map(|a| a.1)
}

/// The kernels of a `kernel.fused`.
pub fn lower(m: &Module, op: Op, target: &Target) -> Option<Lowered> {
    let fused = Fused::of(m, op)?;
    match fused.anchor() {
        None => elementwise::lower(&fused, target),
        Some(a) => (anchor(m, a)?.lower)(&fused, target),
    }
}
