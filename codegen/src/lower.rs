//! From `kernel.fused` to kernels: the table of what a kernel can be made around.

use crate::fuse::Fused;
use crate::kernels::{
    Lowered, attention, batched, copy, dense, elementwise, gather, gather_packed, integer, matmul_nbits,
    norm, quantize, range, reduce, rotary, sizes, softmax,
};
use crate::layout::View;
use crate::target::Target;
use dialects::ir::{Module, Op};

/// An op that a kernel is made around, and how.
#[derive(Clone, Copy)]
pub struct Anchor {
    /// Whether this form of the op is compiled.
    supports: fn(&Module, Op) -> bool,
    /// Whether an operand that steps along these dims of the result can be read as results are finished.
    takes: fn(&[bool]) -> bool,
    /// The views that it reads its operands through.
    views: fn(&Module, Op) -> Vec<View>,
    /// The kernels.
    lower: fn(&Fused, &Target) -> Option<Lowered>,
}

impl Anchor {
    /// Whether the kernel can take an elementwise op one of whose operands steps along these dims of the result.
    pub fn takes(&self, steps: &[bool]) -> bool {
        (self.takes)(steps)
    }

    /// The views that it reads its operands through.
    pub fn views(&self, m: &Module, op: Op) -> Vec<View> {
        (self.views)(m, op)
    }
}

/// Rows of the result, whole, or one row for all of them, or one element for all.
fn rows(steps: &[bool]) -> bool {
    let Some((_, lead)) = steps.split_last() else { return true };
    lead.iter().all(|&s| s) || lead.iter().all(|&s| !s)
}

/// A kernel that reads its operands as they are.
fn none(_: &Module, _: Op) -> Vec<View> {
    Vec::new()
}

/// A kernel that takes nothing else.
fn nothing(_: &[bool]) -> bool {
    false
}

impl Anchor {
    /// One that takes nothing else, and reads its operands as they are.
    const fn alone(
        supports: fn(&Module, Op) -> bool,
        lower: fn(&Fused, &Target) -> Option<Lowered>,
    ) -> Anchor {
        Anchor { supports, takes: nothing, views: none, lower }
    }

    /// The same, which can take what comes after it.
    const fn rows(self) -> Anchor {
        Anchor { takes: rows, ..self }
    }

    /// The same, which reads its operands through views.
    const fn through(self, views: fn(&Module, Op) -> Vec<View>) -> Anchor {
        Anchor { views, ..self }
    }
}

const ATTENTION: Anchor = Anchor::alone(attention::supports, attention::lower).through(attention::views);
const BATCHED: Anchor = Anchor::alone(batched::supports, batched::lower);
const COPY: Anchor = Anchor::alone(copy::supports, copy::lower).through(copy::views);
const DENSE: Anchor = Anchor::alone(dense::supports, dense::lower).rows();
const DYNAMIC: Anchor = Anchor::alone(quantize::supports_dynamic, quantize::lower_dynamic);
const GATHER: Anchor = Anchor::alone(gather::supports, gather::lower);
const GATHER_PACKED: Anchor = Anchor::alone(gather_packed::supports, gather_packed::lower);
const INTEGER: Anchor = Anchor::alone(integer::supports, integer::lower).rows();
const MATMUL_NBITS: Anchor = Anchor::alone(matmul_nbits::supports, matmul_nbits::lower).rows();
const NORM: Anchor = Anchor::alone(norm::supports, norm::lower);
const QUANTIZE: Anchor = Anchor::alone(quantize::supports, quantize::lower);
const RANGE: Anchor = Anchor::alone(range::supports, range::lower);
const REDUCE: Anchor = Anchor::alone(reduce::supports, reduce::lower);
const ROTARY: Anchor = Anchor::alone(rotary::supports, rotary::lower);
const SOFTMAX: Anchor = Anchor::alone(softmax::supports, softmax::lower);

/// What inference knows is never computed from operands.
const SIZES: Anchor = Anchor::alone(sizes::supports, sizes::lower);

/// Of several for an op, the first that does its form.
const ANCHORS: &[(&str, Anchor)] = &[
    ("com.microsoft.DequantizeLinear", QUANTIZE),
    ("com.microsoft.GatherBlockQuantized", GATHER_PACKED),
    ("com.microsoft.MatMulIntegerToFloat", INTEGER),
    ("com.microsoft.MatMulNBits", MATMUL_NBITS),
    ("com.microsoft.MultiHeadAttention", ATTENTION),
    ("com.microsoft.QuantizeLinear", QUANTIZE),
    ("com.microsoft.RotaryEmbedding", ROTARY),
    ("onnx.Attention", ATTENTION),
    ("onnx.Concat", COPY),
    ("onnx.DequantizeLinear", QUANTIZE),
    ("onnx.DynamicQuantizeLinear", DYNAMIC),
    ("onnx.Expand", COPY),
    ("onnx.Gather", GATHER),
    ("onnx.GatherElements", GATHER),
    ("onnx.GatherND", GATHER),
    ("onnx.Gemm", DENSE),
    ("onnx.LayerNormalization", NORM),
    ("onnx.LogSoftmax", SOFTMAX),
    ("onnx.MatMul", DENSE),
    ("onnx.MatMul", BATCHED),
    ("onnx.MatMulInteger", INTEGER),
    ("onnx.QLinearMatMul", INTEGER),
    ("onnx.QuantizeLinear", QUANTIZE),
    ("onnx.RMSNormalization", NORM),
    ("onnx.Range", RANGE),
    ("onnx.ReduceL1", REDUCE),
    ("onnx.ReduceL2", REDUCE),
    ("onnx.ReduceMax", REDUCE),
    ("onnx.ReduceMean", REDUCE),
    ("onnx.ReduceMin", REDUCE),
    ("onnx.ReduceSum", REDUCE),
    ("onnx.ReduceSumSquare", REDUCE),
    ("onnx.RotaryEmbedding", ROTARY),
    ("onnx.SimplifiedLayerNormalization", NORM),
    ("onnx.Slice", COPY),
    ("onnx.Softmax", SOFTMAX),
    ("onnx.Split", COPY),
    ("onnx.Transpose", COPY),
];

/// How a kernel is made around `op`, if one can be.
pub fn anchor(m: &Module, op: Op) -> Option<Anchor> {
    if sizes::supports(m, op) {
        return Some(SIZES);
    }
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
