//! Finds the weights of a model: which ops multiply an activation by a constant matrix, through whatever
//! stands between the constant and the op, and why the others cannot be quantized.

use dialects::ir::{ConstId, Elem, Module, Op, Value};

/// A matrix product of an activation with a constant weight.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The op: `onnx.MatMul` or `onnx.Gemm`.
    pub op: Op,
    /// The activation, `[.., K]`.
    pub x: Value,
    /// The operand that holds the weight (the end of the chain below).
    pub operand: Value,
    /// Which operand of the op that is.
    pub operand_index: usize,
    /// The value of the constant that the weight comes from.
    pub weight: Value,
    /// The constant.
    pub konst: ConstId,
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
    /// Whether the *constant* holds `[N, K]` rows (`true`) or `[K, N]` (`false`), whatever views lie between.
    pub rows_are_outputs: bool,
    /// Whether the *operand* is read as `[N, K]` (Gemm with `transB`) rather than `[K, N]`.
    pub operand_is_nk: bool,
    /// The element type of the weight.
    pub elem: Elem,
}

/// A weight-bearing op: one that can be quantized, or one that cannot, with the reason.
#[derive(Clone, Debug)]
pub enum Weighted {
    /// It can.
    Linear(Linear),
    /// It cannot.
    Other {
        /// The op.
        op: Op,
        /// The weight.
        weight: Value,
        /// Why not.
        why: String,
    },
}

/// Every weight-bearing op in live regions, in program order.
///
/// A weight is a float constant of two or more dims that an op multiplies by, or gathers from.
pub fn find(m: &Module) -> Vec<Weighted> {
    m.live_ops().into_iter().filter_map(|op| classify(m, op)).collect()
}

/// The linears among them.
pub fn linears(m: &Module) -> Vec<Linear> {
    let pick = |w| match w {
        Weighted::Linear(l) => Some(l),
        Weighted::Other { .. } => None,
    };
    find(m).into_iter().filter_map(pick).collect()
}

/// A constant seen through ops that only rearrange it: its value, and whether its two dims are swapped.
struct View {
    weight: Value,
    konst: ConstId,
    /// Dims as the user sees them.
    dims: Vec<usize>,
    transposed: bool,
}

/// Follows `v` through Identity, Cast, Transpose, and Reshape, Squeeze or Unsqueeze of dims of size one.
fn view(m: &Module, v: Value) -> Option<View> {
    if let Some(konst) = m.const_of(v) {
        let dims = m.consts[konst].shape();
        return Some(View { weight: v, konst, dims, transposed: false });
    }
    let (op, 0) = m.def_op(v)? else { return None };
    let data = &m.ops[op];
    let mut inner = view(m, data.operand(0)?)?;
    match data.name.as_str() {
        "onnx.Identity" => {}
        "onnx.Cast" => {
            m.ty(v).elem().filter(|e| e.is_float())?;
        }
        "onnx.Transpose" => {
            let rank = inner.dims.len();
            let reversed: Vec<i64> = (0..rank as i64).rev().collect();
            let perm = data.attrs.ints("perm").unwrap_or(&reversed);
            let kept: Vec<usize> =
                perm.iter().map(|&p| p as usize).filter(|&p| inner.dims.get(p) != Some(&1)).collect();
            inner.dims = perm.iter().map(|&p| inner.dims.get(p as usize).copied()).collect::<Option<_>>()?;
            match kept[..] {
                [a, b] if a > b => inner.transposed = !inner.transposed,
                [_, _] | [_] | [] => {}
                _ => return None,
            }
        }
        "onnx.Reshape" | "onnx.Squeeze" | "onnx.Unsqueeze" => {
            let dims = m.ty(v).as_tensor()?.known_shape()?;
            let big = |d: &[usize]| d.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
            if big(&dims) != big(&inner.dims) {
                return None;
            }
            inner.dims = dims;
        }
        _ => return None,
    }
    Some(inner)
}

fn classify(m: &Module, op: Op) -> Option<Weighted> {
    let data = &m.ops[op];
    let name = data.name.as_str();
    let other = |weight, why: &str| Some(Weighted::Other { op, weight, why: why.to_string() });
    let float = |v: &View| m.consts[v.konst].elem.is_float();
    match name {
        "onnx.MatMul" => {
            if let Some(w) = data.operand(1).and_then(|v| view(m, v)).filter(float) {
                return Some(linear(m, op, 0, 1, w, false));
            }
            let w = data.operand(0).and_then(|v| view(m, v)).filter(float)?;
            (w.dims.len() >= 2).then_some(())?;
            other(w.weight, "the weight is the left operand; packed forms multiply by a weight on the right")
        }
        "onnx.Gemm" => {
            let w = data.operand(1).and_then(|v| view(m, v)).filter(float)?;
            if data.attrs.int("transA").unwrap_or(0) != 0 {
                return other(w.weight, "Gemm with transA has no packed form");
            }
            if data.attrs.float("alpha").unwrap_or(1.0) != 1.0
                || data.attrs.float("beta").unwrap_or(1.0) != 1.0
            {
                return other(w.weight, "Gemm with alpha or beta other than 1 has no packed form");
            }
            Some(linear(m, op, 0, 1, w, data.attrs.int("transB").unwrap_or(0) != 0))
        }
        "onnx.Gather" => {
            let w = data.operand(0).and_then(|v| view(m, v)).filter(float)?;
            (w.dims.len() >= 2).then_some(())?;
            other(w.weight, "an embedding: Gather stays float unless a pass quantizes embeddings")
        }
        "onnx.Conv" | "onnx.ConvTranspose" | "onnx.LSTM" | "onnx.GRU" | "onnx.RNN" => {
            let w = data.operand(1).and_then(|v| view(m, v)).filter(float)?;
            let op_type = data.name.op().to_string();
            other(w.weight, &format!("{op_type} has no weight-only packed form in ONNX Runtime"))
        }
        "onnx.Einsum" => {
            let operands = data.operands.iter().flatten();
            let w = operands.filter_map(|&v| view(m, v)).find(|w| float(w) && w.dims.len() >= 2)?;
            other(w.weight, "Einsum has no packed form")
        }
        _ => None,
    }
}

fn linear(m: &Module, op: Op, x: usize, operand_index: usize, w: View, operand_is_nk: bool) -> Weighted {
    let data = &m.ops[op];
    let operand = data.operand(operand_index).expect("the caller looked at this operand");
    let other = |why: &str| Weighted::Other { op, weight: w.weight, why: why.to_string() };
    let Some(x) = data.operand(x) else { return other("the activation is missing") };
    if m.const_of(x).is_some() {
        return other("both operands are constants: fold it first");
    }
    let lead = w.dims.len().saturating_sub(2);
    if w.dims.len() < 2 {
        return other("the weight is a vector");
    }
    if w.dims[..lead].iter().any(|&d| d != 1) {
        return other("a batch of weights has no packed form");
    }
    let (rows, cols) = (w.dims[lead], w.dims[lead + 1]);
    let (n, k) = if operand_is_nk { (rows, cols) } else { (cols, rows) };
    if n == 0 || k == 0 {
        return other("the weight is empty");
    }
    // A leading dim of one can only be dropped where it adds no dim to the result.
    if lead > 0 && m.ty(x).dims().is_none_or(|d| d.len() < w.dims.len()) {
        return other("the weight has more dims than the activation");
    }
    Weighted::Linear(Linear {
        op,
        x,
        operand,
        operand_index,
        weight: w.weight,
        konst: w.konst,
        k,
        n,
        rows_are_outputs: operand_is_nk != w.transposed,
        operand_is_nk,
        elem: m.consts[w.konst].elem,
    })
}
