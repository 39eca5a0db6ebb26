//! What computes nothing goes, and constants after a linear or a convolution go into it.
//!
//! A constant in *front* of a linear stays: there it is the gain of a norm, which has uses of its own. So does one that
//! is applied to a product of two activations, which runtimes look for when they recognize attention.

use super::views::keeps_shape;
use super::{Plain, elementwise, linear, products};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::{Head, Node};
use dialects::ir::{Dim, Elem};
use dialects::tensor::Tensor;

/// Rules.
pub const PLAINS: &[Plain] = &[
    Plain { name: "identity", ops: &["Identity"], apply: |_, f| vec![f.children[0]] },
    Plain { name: "cast-to-same", ops: &["Cast"], apply: elementwise::cast_to_same },
    Plain { name: "cast-and-back", ops: &["Cast"], apply: cast_and_back },
    Plain { name: "neutral-element", ops: &["Add", "Sub", "Mul", "Div", "Pow", "And", "Or"], apply: neutral },
    Plain { name: "where-known", ops: &["Where"], apply: where_known },
    Plain { name: "twice-is-nothing", ops: &["Neg", "Not", "Reciprocal"], apply: twice },
    Plain { name: "one-over", ops: &["Div"], apply: one_over },
    Plain { name: "times-reciprocal", ops: &["Mul"], apply: times_reciprocal },
    Plain { name: "constant-sums", ops: &["Add"], apply: constant_sums },
    Plain { name: "constant-products", ops: &["Mul"], apply: constant_products },
    Plain { name: "constant-after-linear", ops: &["Mul", "Div"], apply: scaled_linear },
    Plain { name: "bias", ops: &["Add"], apply: bias },
    Plain { name: "batch-norm", ops: &["BatchNormalization"], apply: batch_norm },
];

/// Types that hold every value of another.
fn holds(wide: Elem, narrow: Elem) -> bool {
    use Elem::*;
    match narrow {
        Bool => wide.is_int() || wide.is_float(),
        F16 | BF16 => matches!(wide, F32 | F64),
        F32 => wide == F64,
        I8 => matches!(wide, I16 | I32 | I64 | F16 | F32 | F64),
        U8 => matches!(wide, U16 | U32 | U64 | I16 | I32 | I64 | F16 | F32 | F64),
        I16 => matches!(wide, I32 | I64 | F32 | F64),
        U16 => matches!(wide, U32 | U64 | I32 | I64 | F32 | F64),
        I32 => matches!(wide, I64 | F64),
        U32 => matches!(wide, U64 | I64 | F64),
        _ => false,
    }
}

/// `cast(cast(x)) = x` where the type between holds every value of `x`.
fn cast_and_back(g: &mut Graph, f: &Node) -> Vec<Id> {
    let to = g.attrs(f).int("to");
    let mut out = Vec::new();
    for inner in g.nodes_of(f.children[0], "onnx.Cast") {
        let x = inner.children[0];
        let (Some(from), Some(mid)) = (g.elem(x), g.elem(f.children[0])) else { continue };
        if Some(i64::from(from.onnx())) == to && holds(mid, from) {
            out.push(x);
        }
    }
    out
}

/// `x + 0`, `x - 0`, `x * 1`, `x / 1`, `x ^ 1`, `x and true`, `x or false` are `x`, if its shape stays.
fn neutral(g: &mut Graph, f: &Node) -> Vec<Id> {
    let [a, b] = f.children[..] else { return Vec::new() };
    let name = super::short(g.name(f));
    let (unit, either) = match name {
        "Add" | "Or" => (0.0, true),
        "Sub" => (0.0, false),
        "Mul" | "And" => (1.0, true),
        _ => (1.0, false),
    };
    let mut sides = vec![(a, b)];
    if either {
        sides.push((b, a));
    }
    let neutral = |c: Id| filled(g, c, unit);
    let fits =
        |x: &Id| !g.is_const(*x) && g.elem(*x) == g.class(f).and_then(|c| g.elem(c)) && keeps_shape(g, f, *x);
    sides.into_iter().filter(|(_, c)| neutral(*c)).map(|(x, _)| x).filter(fits).collect()
}

/// Whether a class is a small constant, all elements of which are `x`.
fn filled(g: &Graph, id: Id, x: f64) -> bool {
    g.nodes(id).into_iter().filter(|n| matches!(n.head, Head::Literal(_))).any(|n| {
        let Some(t) = g.tensor(n.head) else { return false };
        let ints = t.to_i64().map(|v| v.iter().all(|&y| y as f64 == x));
        let floats = || t.to_f32().map(|v| v.iter().all(|&y| f64::from(y) == x));
        !t.is_empty() && ints.unwrap_or_else(|_| floats().unwrap_or(false))
    })
}

/// A choice that is always the same, or between two equal values.
fn where_known(g: &mut Graph, f: &Node) -> Vec<Id> {
    let [c, a, b] = f.children[..] else { return Vec::new() };
    let same = if filled(g, c, 1.0) || g.find(a) == g.find(b) {
        a
    } else if filled(g, c, 0.0) {
        b
    } else {
        return Vec::new();
    };
    if keeps_shape(g, f, same) { vec![same] } else { Vec::new() }
}

/// `-(-x)`, `not(not x)` and `1 / (1 / x)` are `x`.
fn twice(g: &mut Graph, f: &Node) -> Vec<Id> {
    let name = g.name(f).to_string();
    g.nodes_of(f.children[0], &name).iter().map(|n| n.children[0]).collect()
}

/// `1 / x = reciprocal(x)`.
fn one_over(g: &mut Graph, f: &Node) -> Vec<Id> {
    let (one, x) = (f.children[0], f.children[1]);
    if g.is_const(x)
        || !g.elem(x).is_some_and(Elem::is_float)
        || !filled(g, one, 1.0)
        || !keeps_shape(g, f, x)
    {
        return Vec::new();
    }
    vec![g.op("onnx.Reciprocal", &[x])]
}

/// `x * (1 / y) = x / y`.
fn times_reciprocal(g: &mut Graph, f: &Node) -> Vec<Id> {
    let [a, b] = f.children[..] else { return Vec::new() };
    let mut out = Vec::new();
    for (x, r) in [(a, b), (b, a)] {
        if g.is_const(r) {
            continue;
        }
        for inner in g.nodes_of(r, "onnx.Reciprocal") {
            out.push(g.op("onnx.Div", &[x, inner.children[0]]));
        }
    }
    out
}

/// The constant operand of a sum or product and the other one.
fn with_constant(g: &Graph, f: &Node) -> Option<(Id, Id)> {
    match f.children[..] {
        [x, c] if !g.is_const(x) && g.is_const(c) => Some((x, c)),
        [c, x] if !g.is_const(x) && g.is_const(c) => Some((x, c)),
        _ => None,
    }
}

/// `(x . c) . d = x . (c . d)` for a sum or a product, if that broadcasts to the same shape.
fn two_constants(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some((inner, d)) = with_constant(g, f) else { return Vec::new() };
    let name = g.name(f).to_string();
    let mut out = Vec::new();
    for n in g.nodes_of(inner, &name) {
        let Some((x, c)) = with_constant(g, &n) else { continue };
        // A neutral constant makes a class its own operand: constants of it would have no end.
        if g.find(x) == g.find(inner) {
            continue;
        }
        let both = g.op(&name, &[c, d]);
        let sum = g.op(&name, &[x, both]);
        if keeps_shape(g, f, sum) {
            out.push(sum);
        }
    }
    out
}

/// `(x + c) + d = x + (c + d)`.
fn constant_sums(g: &mut Graph, f: &Node) -> Vec<Id> {
    two_constants(g, f)
}

/// `(x * c) * d = x * (c * d)`, for floats.
fn constant_products(g: &mut Graph, f: &Node) -> Vec<Id> {
    let float = g.class(f).and_then(|c| g.elem(c)).is_some_and(Elem::is_float);
    if float { two_constants(g, f) } else { Vec::new() }
}

/// A scale per column or channel of a linear's result goes into its weight and bias.
fn scaled_linear(g: &mut Graph, f: &Node) -> Vec<Id> {
    let mut product = f.clone();
    if g.is(f, "onnx.Div") {
        let (x, c) = (f.children[0], f.children[1]);
        if g.is_const(x) || !g.is_const(c) || !g.elem(c).is_some_and(Elem::is_float) {
            return Vec::new();
        }
        let inverse = g.op("onnx.Reciprocal", &[c]);
        let class = g.op("onnx.Mul", &[x, inverse]);
        let Some(mul) = g.nodes_of(class, "onnx.Mul").into_iter().next() else { return Vec::new() };
        product = mul;
    }
    let mut out = Vec::new();
    for p in products(g, &product) {
        if g.class(f) == Some(g.find(p.x)) {
            continue;
        }
        for inner in g.nodes(p.x) {
            // The weight and the bias must be there to take it.
            if inner.children.len() < 2
                || !inner.children[1..].iter().all(|&c| g.may_change(c) || g.is_absent(c))
            {
                continue;
            }
            out.extend(match super::short(g.name(&inner)) {
                "MatMul" => linear::columns(g, &p, &inner),
                "Gemm" => linear::gemm(g, &p, &inner),
                "Conv" => linear::conv(g, &p, &inner),
                _ => None,
            });
        }
    }
    out
}

/// A constant sum after a Gemm or a Conv is its bias.
fn bias(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some((x, c)) = with_constant(g, f).filter(|(x, _)| g.class(f) != Some(g.find(*x))) else {
        return Vec::new();
    };
    let mut out = Vec::new();
    let (Some(shape), Some(rank)) = (g.shape(c), g.dims(x).map(|d| d.len())) else { return out };
    for inner in g.nodes(x) {
        let name = super::short(g.name(&inner)).to_string();
        let channel = match name.as_str() {
            "Gemm" if g.attrs(&inner).float("beta").unwrap_or(1.0) == 1.0 => 1,
            "Conv" => 1,
            _ => continue,
        };
        let Some(channels) = g.dims(x).and_then(|d| d.get(channel)?.known()) else { continue };
        let Some(padded) = g.padded_shape(c, rank).filter(|_| shape.len() <= rank) else { continue };
        let per_channel = |(i, &n): (usize, &usize)| n == 1 || (i == channel && n as i64 == channels);
        if !padded.iter().enumerate().all(per_channel) || inner.children.len() < 2 {
            continue;
        }
        let n = channels as usize;
        let one = g.reshaped(c, &[padded[channel]]);
        let Some(own) = g.expanded(one, &[n]) else { continue };
        let sum = match inner.children.get(2).copied().filter(|&b| !g.is_absent(b)) {
            None => own,
            // Only a bias of one number per channel is surely one that adds up.
            Some(b) if g.is_const(b) && g.shape(b).is_some_and(|s| s == [n]) => g.op("onnx.Add", &[b, own]),
            Some(_) => continue,
        };
        let children = vec![inner.children[0], inner.children[1], sum];
        out.push(g.with(&inner, children));
    }
    out
}

/// `bn(x) = (x - mean) * gain / sqrt(var + epsilon) + offset`, whose product and sum a convolution in front takes.
fn batch_norm(g: &mut Graph, f: &Node) -> Vec<Id> {
    let [x, gain, offset, mean, var] = f.children[..] else { return Vec::new() };
    let constant = [gain, offset, mean, var].iter().all(|&c| g.is_const(c));
    let training = g.attrs(f).int("training_mode").unwrap_or(0) != 0 || g.outputs(f) != 1;
    let feeds = g.nodes(x).iter().any(|n| matches!(super::short(g.name(n)), "Conv" | "Gemm"));
    let (Some(elem), Some(dims)) = (g.elem(var), g.dims(x)) else { return Vec::new() };
    let Some(n) = dims.get(1).and_then(Dim::known).and_then(|n| usize::try_from(n).ok()) else {
        return Vec::new();
    };
    if !constant || training || !feeds || g.elem(x) != Some(elem) || g.shape(gain).is_none_or(|s| s != [n]) {
        return Vec::new();
    }
    let epsilon = g.attrs(f).float("epsilon").unwrap_or(1e-5);
    let Ok(epsilon) = Tensor::from_f32(elem, &[], vec![epsilon]) else { return Vec::new() };
    let epsilon = g.literal(epsilon);
    let sum = g.op("onnx.Add", &[var, epsilon]);
    let root = g.op("onnx.Sqrt", &[sum]);
    let scale = g.op("onnx.Div", &[gain, root]);
    let at_mean = g.op("onnx.Mul", &[mean, scale]);
    let shift = g.op("onnx.Sub", &[offset, at_mean]);
    let mut shape = vec![1; dims.len() - 1];
    shape[0] = n;
    let (scale, shift) = (g.reshaped(scale, &shape), g.reshaped(shift, &shape));
    let product = g.op("onnx.Mul", &[x, scale]);
    vec![g.op("onnx.Add", &[product, shift])]
}
