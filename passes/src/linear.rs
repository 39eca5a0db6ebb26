//! Finds the weights of a model: which ops multiply an activation by a constant matrix, through whatever
//! stands between the constant and the op, which weights are quantized already, and why the others cannot be.

use dialects::ir::{ConstId, Encoding, Module, Op, OpData, Region, Value};
use std::collections::HashSet;

/// How an op reads its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A product with rows of the activation, `[.., K]`.
    Rows,
    /// A product with columns of the activation, `[K, M]`: Gemm with `transA`.
    Columns,
    /// The kernels of a Conv, the gates of an LSTM, GRU or RNN: the constant holds a row for each of its channels or
    /// gates.
    Kernel,
}

/// An op that multiplies an activation by a constant weight.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The op: `onnx.MatMul` or `onnx.Gemm`; for a kernel `onnx.Conv`, `onnx.LSTM` and their like.
    pub op: Op,
    /// How it reads the weight.
    pub form: Form,
    /// The activation, `[.., K]` for [`Form::Rows`].
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
    /// Whether the *operand* is read as `[N, K]` (Gemm with `transB`, kernels) rather than `[K, N]`.
    pub operand_is_nk: bool,
    /// The element type of the weight.
    pub elem: dialects::ir::Elem,
}

/// A weight-bearing op: one that can be quantized, one that is, or one that cannot be, with the reason.
#[derive(Clone, Debug)]
pub enum Weighted {
    /// It multiplies a matrix.
    Linear(Linear),
    /// Its weight can be stored in 8 bits, but no runtime multiplies it without unpacking.
    Kernel(Linear),
    /// Its weight is quantized already.
    Kept {
        /// The op.
        op: Op,
        /// The codes.
        weight: Value,
    },
    /// It cannot be quantized.
    Other {
        /// The op.
        op: Op,
        /// The weight.
        weight: Value,
        /// Why not.
        why: String,
        /// Where it is computed from constants: the operand, and how the op reads it.
        computed: Option<(usize, Form)>,
    },
}

/// What to do about the weight of a kernel that is float.
pub const KERNEL_HINT: &str = "has no packed form; `rtn{bits=8}` stores it in 8 bits, as DequantizeLinear";

/// Ops of [`Form::Kernel`]: their weights, and how many leading dims of those count rows.
const KERNELS: &[(&str, &[usize], usize)] = &[
    ("onnx.Conv", &[1], 1),
    ("onnx.ConvTranspose", &[1], 1),
    ("onnx.DeformConv", &[1], 1),
    ("onnx.LSTM", &[1, 2], 2),
    ("onnx.GRU", &[1, 2], 2),
    ("onnx.RNN", &[1, 2], 2),
];

/// Ops on quantized weights, and which operands are codes.
const QUANTIZED: &[(&str, &[usize])] = &[
    ("quant.dequantize", &[0]),
    ("onnx.DequantizeLinear", &[0]),
    ("onnx.MatMulInteger", &[1]),
    ("onnx.QLinearMatMul", &[3]),
    ("onnx.ConvInteger", &[1]),
    ("onnx.QLinearConv", &[3]),
    ("com.microsoft.DequantizeLinear", &[0]),
    ("com.microsoft.MatMulNBits", &[1]),
    ("com.microsoft.MatMulBnb4", &[1]),
    ("com.microsoft.GatherBlockQuantized", &[0]),
    ("com.microsoft.MatMulIntegerToFloat", &[1]),
    ("com.microsoft.DynamicQuantizeMatMul", &[1]),
    ("com.microsoft.DynamicQuantizeLSTM", &[1, 2]),
    ("com.microsoft.QGemm", &[3]),
    ("com.microsoft.QLinearConv", &[3]),
    ("com.microsoft.QAttention", &[1]),
    ("com.microsoft.QOrderedMatMul", &[2]),
    ("com.microsoft.QMoE", &[2, 5]),
];

/// Ops outside of ONNX that read large constants, but multiply no activation by a matrix of them.
const TABLES: &[&str] = &["com.microsoft.RotaryEmbedding", "com.microsoft.GroupQueryAttention"];

/// A constant of an op that qcc does not know counts as a weight from this many elements on.
const LARGE: u64 = 1024;

/// Every weight-bearing op in live regions, in program order.
///
/// A weight is a float constant of two or more dims that an op multiplies by, or gathers from.
pub fn find(m: &Module) -> Vec<Weighted> {
    let mut out = Vec::new();
    for region in m.live_regions() {
        let from = out.len();
        m.regions[region].ops.iter().for_each(|&op| classify(m, op, &mut out));
        if root(m, region) != m.top {
            // What a pass makes of constants stands in the model's graph, which a function does not see.
            for w in &mut out[from..] {
                if let Weighted::Other { computed, .. } = w {
                    *computed = None;
                }
            }
        }
    }
    out
}

/// The linears among them.
pub fn linears(m: &Module) -> Vec<Linear> {
    let pick = |w| match w {
        Weighted::Linear(l) => Some(l),
        _ => None,
    };
    find(m).into_iter().filter_map(pick).collect()
}

/// How many weights are quantized already, each counted once.
pub fn kept(m: &Module) -> usize {
    let codes = |w| match w {
        Weighted::Kept { weight, .. } => Some(weight),
        _ => None,
    };
    find(m).into_iter().filter_map(codes).collect::<HashSet<Value>>().len()
}

/// The shape and bytes of a weight, as far as they are known: a weight that is computed has those of its type.
pub fn size(m: &Module, weight: Value) -> (Vec<u64>, u64) {
    if let Some(id) = m.const_of(weight) {
        return (m.consts[id].dims.clone(), m.consts[id].byte_len());
    }
    let ty = m.ty(weight).as_tensor();
    let shape: Vec<u64> =
        ty.and_then(|t| t.known_shape()).unwrap_or_default().iter().map(|&d| d as u64).collect();
    let count = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|_| !shape.is_empty());
    (shape, ty.zip(count).and_then(|(t, n)| t.elem.byte_len(n)).unwrap_or(0))
}

/// The graph that a region is nested in: the model's, or a function's.
pub fn root(m: &Module, mut region: Region) -> Region {
    while let Some(op) = m.regions[region].parent {
        region = m.ops[op].region;
    }
    region
}

/// A constant seen through ops that only rearrange it: its value, and whether its two dims are swapped.
struct View {
    weight: Value,
    konst: ConstId,
    /// Dims as the user sees them.
    dims: Vec<usize>,
    transposed: bool,
}

/// What an operand is.
enum Operand {
    /// A float constant.
    Weight(View),
    /// One that cannot be read as a weight, and why.
    Refused(Value, String),
    /// A float tensor that ops make of constants, and by what.
    Computed(Value, String),
    /// An activation, a constant that is no float, or codes.
    None,
}

const VIEWS: &[&str] = &[
    "onnx.Identity",
    "onnx.Cast",
    "onnx.Transpose",
    "onnx.Reshape",
    "onnx.Flatten",
    "onnx.Squeeze",
    "onnx.Unsqueeze",
];

/// Follows `v` to a constant through ops that only rearrange it.
fn operand(m: &Module, v: Value) -> Operand {
    let mut chain = Vec::new();
    let mut at = v;
    let konst = loop {
        if let Some(konst) = m.const_of(at) {
            break konst;
        }
        let Some((op, 0)) = m.def_op(at) else { return Operand::None };
        match m.ops[op].operand(0) {
            Some(inner) if VIEWS.contains(&m.ops[op].name.as_str()) => at = inner,
            _ => return computed(m, v, op),
        }
        chain.push(op);
    };
    let float = |v: Value| m.ty(v).elem().is_none_or(|e| e.is_float());
    let konst_data = &m.consts[konst];
    if !float(v) || konst_data.dims.len() < 2 && m.ty(v).dims().is_none_or(|d| d.len() < 2) {
        return Operand::None;
    }
    if !konst_data.elem.is_float() {
        return Operand::Refused(at, format!("the weight is {} behind a Cast", konst_data.elem));
    }
    if konst_data.encoding == Encoding::Sparse {
        return Operand::Refused(at, "the weight is a sparse tensor".into());
    }
    let mut view = View { weight: at, konst, dims: konst_data.shape(), transposed: false };
    for &op in chain.iter().rev() {
        if rearrange(m, &m.ops[op], &mut view).is_none() {
            let (name, node) = (&m.ops[op].name, &m.ops[op].loc);
            return Operand::Computed(at, format!("{name} at node {node:?}"));
        }
    }
    Operand::Weight(view)
}

/// The view behind one more op; `None` where it is no matrix any more.
fn rearrange(m: &Module, data: &OpData, view: &mut View) -> Option<()> {
    match data.name.as_str() {
        "onnx.Transpose" => {
            let rank = view.dims.len();
            let reversed: Vec<i64> = (0..rank as i64).rev().collect();
            let perm = data.attrs.ints("perm").unwrap_or(&reversed);
            let kept: Vec<usize> =
                perm.iter().map(|&p| p as usize).filter(|&p| view.dims.get(p) != Some(&1)).collect();
            view.dims = perm.iter().map(|&p| view.dims.get(p as usize).copied()).collect::<Option<_>>()?;
            match kept[..] {
                [a, b] if a > b => view.transposed = !view.transposed,
                [_, _] | [_] | [] => {}
                _ => return None,
            }
        }
        "onnx.Reshape" | "onnx.Flatten" | "onnx.Squeeze" | "onnx.Unsqueeze" => {
            let dims = m.ty(data.result(0)?).as_tensor()?.known_shape()?;
            let big = |d: &[usize]| d.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
            // Elements stay in order; only of a swapped matrix would other dims cut across its rows.
            if view.transposed && big(&dims) != big(&view.dims) {
                return None;
            }
            view.dims = dims;
        }
        _ => {}
    }
    Some(())
}

/// What an operand is that ends at an op which does more than rearrange.
fn computed(m: &Module, v: Value, end: Op) -> Operand {
    let ty = m.ty(v);
    let matrix = ty.elem().is_none_or(|e| e.is_float()) && ty.dims().is_none_or(|d| d.len() >= 2);
    let mut whole = true;
    let mut todo = vec![end];
    let mut seen: HashSet<Op> = todo.iter().copied().collect();
    while let Some(op) = todo.pop() {
        let data = &m.ops[op];
        let plain = data.name.dialect() == "onnx" && data.attrs.regions().next().is_none();
        let codes = QUANTIZED.iter().any(|(name, _)| data.is(name));
        if !matrix || !plain || codes || data.operands.iter().flatten().next().is_none() {
            return Operand::None;
        }
        for &v in data.operands.iter().flatten() {
            if let Some(c) = m.const_of(v) {
                // Codes and scales in a form of someone's own: they are quantized already.
                whole &= m.consts[c].elem.is_float() || m.consts[c].dims.len() < 2;
                continue;
            }
            match m.def_op(v) {
                Some((op, _)) if seen.insert(op) => todo.push(op),
                Some(_) => {}
                None => return Operand::None,
            }
        }
    }
    match whole {
        true => Operand::Computed(v, format!("{} at node {:?}", m.ops[end].name, m.ops[end].loc)),
        false => Operand::Refused(v, "the weight is computed from integers".into()),
    }
}

fn classify(m: &Module, op: Op, out: &mut Vec<Weighted>) {
    let data = &m.ops[op];
    let name = data.name.as_str();
    let look = |i: usize| data.operand(i).map_or(Operand::None, |v| operand(m, v));
    let other = |weight, why: &str| Weighted::Other { op, weight, why: why.to_string(), computed: None };
    let unread = |operand: Operand, read: Option<(usize, Form)>| match operand {
        Operand::Refused(weight, why) => Some(other(weight, &why)),
        Operand::Computed(weight, by) => {
            let why = format!("the weight is computed from constants by {by}");
            Some(Weighted::Other { op, weight, why, computed: read })
        }
        Operand::Weight(_) | Operand::None => None,
    };
    match name {
        "onnx.MatMul" | "onnx.Gemm" => match look(1) {
            Operand::Weight(w) => out.push(linear(m, op, w)),
            Operand::None => match look(0) {
                Operand::Weight(w) => {
                    let why =
                        "the weight is the left operand; packed forms multiply by a weight on the right";
                    out.push(other(w.weight, why));
                }
                unreadable => out.extend(unread(unreadable, None)),
            },
            unreadable => {
                let columns = name == "onnx.Gemm" && data.attrs.int("transA").unwrap_or(0) != 0;
                out.extend(unread(unreadable, Some((1, if columns { Form::Columns } else { Form::Rows }))));
            }
        },
        "onnx.Gather" => out.extend(match look(0) {
            Operand::Weight(w) => {
                Some(other(w.weight, "an embedding: Gather stays float unless a pass quantizes embeddings"))
            }
            unreadable => unread(unreadable, None),
        }),
        "onnx.Einsum" => out.extend((0..data.operands.len()).filter_map(|i| match look(i) {
            Operand::Weight(w) => Some(other(w.weight, "Einsum has no packed form")),
            unreadable => unread(unreadable, None),
        })),
        _ => {
            if let Some(&(_, operands, rows)) = KERNELS.iter().find(|k| k.0 == name) {
                out.extend(operands.iter().filter_map(|&i| match look(i) {
                    Operand::Weight(w) => Some(kernel(m, op, i, w, rows)),
                    unreadable => unread(unreadable, Some((i, Form::Kernel))),
                }));
            } else if let Some(&(_, operands)) = QUANTIZED.iter().find(|q| q.0 == name) {
                let codes = operands.iter().filter_map(|&i| codes(m, data.operand(i)?));
                out.extend(codes.map(|weight| Weighted::Kept { op, weight }));
            } else if data.name.dialect() != "onnx" && !TABLES.contains(&name) {
                out.extend((0..data.operands.len()).filter_map(|i| match look(i) {
                    Operand::Weight(w) if m.consts[w.konst].count() >= LARGE => {
                        Some(other(w.weight, &format!("{name} has no packed form")))
                    }
                    _ => None,
                }));
            }
        }
    }
}

/// The constant of two or more dims that codes come from.
fn codes(m: &Module, mut v: Value) -> Option<Value> {
    loop {
        if let Some(konst) = m.const_of(v) {
            return (m.consts[konst].dims.len() >= 2).then_some(v);
        }
        let (op, _) = m.def_op(v)?;
        v = m.ops[op].operand(0).filter(|_| VIEWS.contains(&m.ops[op].name.as_str()))?;
    }
}

fn kernel(m: &Module, op: Op, operand_index: usize, w: View, rows: usize) -> Weighted {
    let data = &m.ops[op];
    let other = |why: &str| Weighted::Other { op, weight: w.weight, why: why.to_string(), computed: None };
    let Some(x) = data.operand(0) else { return other("the activation is missing") };
    if w.transposed {
        let why = "the weight is computed from constants by a Transpose".into();
        let computed = Some((operand_index, Form::Kernel));
        return Weighted::Other { op, weight: w.weight, why, computed };
    }
    if w.dims.len() < 3 {
        return other("the weight has too few dims");
    }
    let (n, k) = (w.dims[..rows].iter().product(), w.dims[rows..].iter().product());
    if n == 0 || k == 0 {
        return other("the weight is empty");
    }
    Weighted::Kernel(Linear {
        op,
        form: Form::Kernel,
        x,
        operand: data.operand(operand_index).expect("the caller looked at this operand"),
        operand_index,
        weight: w.weight,
        konst: w.konst,
        k,
        n,
        rows_are_outputs: true,
        operand_is_nk: true,
        elem: m.consts[w.konst].elem,
    })
}

fn linear(m: &Module, op: Op, w: View) -> Weighted {
    let data = &m.ops[op];
    let flag = |name: &str| data.is("onnx.Gemm") && data.attrs.int(name).unwrap_or(0) != 0;
    let operand_is_nk = flag("transB");
    let operand = data.operand(1).expect("the caller looked at this operand");
    let other = |why: &str| Weighted::Other { op, weight: w.weight, why: why.to_string(), computed: None };
    let Some(x) = data.operand(0) else { return other("the activation is missing") };
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
        form: if flag("transA") { Form::Columns } else { Form::Rows },
        x,
        operand,
        operand_index: 1,
        weight: w.weight,
        konst: w.konst,
        k,
        n,
        rows_are_outputs: operand_is_nk != w.transposed,
        operand_is_nk,
        elem: m.consts[w.konst].elem,
    })
}
