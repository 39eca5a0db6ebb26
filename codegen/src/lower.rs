//! From `kernel.fused` to kernels: the table of what a kernel can be made around.

use crate::fuse::Fused;
use crate::kernels::epilogue::meets;
use crate::kernels::{
    Lowered, attention, batched, conv, copy, dense, elementwise, gather, gather_packed, integer,
    matmul_nbits, norm, pool, quantize, range, reduce, rotary, sizes, softmax,
};
use crate::layout::View;
use crate::size::Size;
use crate::target::Target;
use dialects::ir::{Module, Op};

/// An op that a kernel is made around, and how.
#[derive(Clone, Copy)]
pub struct Anchor {
    /// Whether this form of the op is compiled.
    supports: fn(&Module, Op) -> bool,
    /// Whether an operand that steps along these dims of the result can be read as results are finished.
    takes: fn(&[Size], &[bool]) -> bool,
    /// The views that it reads its operands through.
    views: fn(&Module, Op) -> Vec<View>,
    /// The kernels.
    lower: fn(&Fused, &Target) -> Option<Lowered>,
}

impl Anchor {
    /// Whether the kernel can take an elementwise op one of whose operands steps along these of the dims of the result.
    pub fn takes(&self, domain: &[Size], steps: &[bool]) -> bool {
        (self.takes)(domain, steps)
    }

    /// The views that it reads its operands through.
    pub fn views(&self, m: &Module, op: Op) -> Vec<View> {
        (self.views)(m, op)
    }
}

/// Rows of the result, whole, or one row for all of them, or one element for all.
fn rows(domain: &[Size], steps: &[bool]) -> bool {
    steps.is_empty() || meets(domain, steps, 1).is_some()
}

/// Channels of the result, whole, or one element for each or for all.
fn channels(domain: &[Size], steps: &[bool]) -> bool {
    meets(domain, steps, domain.len().saturating_sub(2)).is_some()
}

/// A kernel that reads its operands as they are.
fn none(_: &Module, _: Op) -> Vec<View> {
    Vec::new()
}

/// A kernel that takes nothing else.
fn nothing(_: &[Size], _: &[bool]) -> bool {
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

    /// The same, whose results are channels.
    const fn channels(self) -> Anchor {
        Anchor { takes: channels, ..self }
    }

    /// The same, which reads its operands through views.
    const fn through(self, views: fn(&Module, Op) -> Vec<View>) -> Anchor {
        Anchor { views, ..self }
    }
}

const ATTENTION: Anchor = Anchor::alone(attention::supports, attention::lower).through(attention::views);
const BATCHED: Anchor = Anchor::alone(batched::supports, batched::lower);
const CONV: Anchor = Anchor::alone(conv::supports, conv::lower).channels().through(conv::views);
const COPY: Anchor = Anchor::alone(copy::supports, copy::lower).through(copy::views);
const DENSE: Anchor = Anchor::alone(dense::supports, dense::lower).rows();
const DYNAMIC: Anchor = Anchor::alone(quantize::supports_dynamic, quantize::lower_dynamic);
const GATHER: Anchor = Anchor::alone(gather::supports, gather::lower);
const GATHER_PACKED: Anchor = Anchor::alone(gather_packed::supports, gather_packed::lower);
const INTEGER: Anchor = Anchor::alone(integer::supports, integer::lower).rows().through(integer::views);
const MATMUL_NBITS: Anchor = Anchor::alone(matmul_nbits::supports, matmul_nbits::lower).rows();
const NORM: Anchor = Anchor::alone(norm::supports, norm::lower);
const POOL: Anchor = Anchor::alone(pool::supports, pool::lower).channels();
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
    ("onnx.AveragePool", REDUCE),
    ("onnx.AveragePool", POOL),
    ("onnx.Concat", COPY),
    ("onnx.ConstantOfShape", COPY),
    ("onnx.Conv", CONV),
    ("onnx.ConvInteger", CONV),
    ("onnx.DequantizeLinear", QUANTIZE),
    ("onnx.DynamicQuantizeLinear", DYNAMIC),
    ("onnx.Expand", COPY),
    ("onnx.Gather", GATHER),
    ("onnx.GatherElements", GATHER),
    ("onnx.GatherND", GATHER),
    ("onnx.Gemm", INTEGER),
    ("onnx.Gemm", DENSE),
    ("onnx.GlobalAveragePool", REDUCE),
    ("onnx.GlobalMaxPool", REDUCE),
    ("onnx.LayerNormalization", NORM),
    ("onnx.LogSoftmax", SOFTMAX),
    ("onnx.MatMul", INTEGER),
    ("onnx.MatMul", DENSE),
    ("onnx.MatMul", BATCHED),
    ("onnx.MatMulInteger", INTEGER),
    ("onnx.MaxPool", POOL),
    ("onnx.Pad", COPY),
    ("onnx.QLinearConv", CONV),
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
