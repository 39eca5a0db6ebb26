//! Matrix products and convolutions: a scale on the columns of the result is a scale on the columns of the weight,
//! a scale on the activation's channels is one on the rows of the weight.

use super::{Plain, Push, Scaled};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;

/// Rules that move a scale.
pub const PUSHES: &[Push] = &[
    Push { name: "scale-columns", through: &["MatMul"], push: columns },
    Push { name: "scale-rows", through: &["MatMul"], push: rows },
    Push { name: "scale-gemm", through: &["Gemm"], push: gemm },
    Push { name: "scale-conv", through: &["Conv"], push: conv },
];

/// Other rules.
pub const PLAINS: &[Plain] = &[
    Plain { name: "matmul-of-scaled", ops: &["MatMul"], apply: |g, f| of_scaled(g, f, "onnx.MatMul") },
    Plain { name: "gemm-of-scaled", ops: &["Gemm"], apply: |g, f| of_scaled(g, f, "onnx.Gemm") },
    Plain { name: "conv-of-scaled", ops: &["Conv"], apply: |g, f| of_scaled(g, f, "onnx.Conv") },
];

/// `x * s` for a constant or any other `x`: the product is folded when it is constant.
fn scale_operand(g: &mut Graph, x: Id, s: Id) -> Option<Id> {
    if g.is_const(x) {
        return g.fits(s, x).then(|| g.times(x, s));
    }
    g.scaled(x, s)
}

/// `(a @ b) * s = a @ (b * s)` for `s` constant over the rows of the result.
pub(super) fn columns(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let (a, b) = (f.children[0], f.children[1]);
    if g.dims(a)?.len() < 2 || g.dims(b)?.len() < 2 {
        return None;
    }
    let s = if g.shape(p.s)?.len() < 2 {
        p.s
    } else {
        let row = g.shape(p.s)?.len() - 2;
        let s = g.constant_along(p.s, row)?;
        g.trimmed(s)?
    };
    let b = scale_operand(g, b, s)?;
    Some(g.with(f, vec![a, b]))
}

/// `(a @ b) * s = (a * s) @ b` for `s` constant over the columns of the result.
fn rows(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let (a, b) = (f.children[0], f.children[1]);
    let shape = g.shape(p.s)?;
    if g.dims(a)?.len() < 2 || g.dims(b)?.len() < 2 || shape.last().is_some_and(|&n| n != 1) {
        return None;
    }
    let a = scale_operand(g, a, p.s)?;
    Some(g.with(f, vec![a, b]))
}

/// `gemm(x, w, c) * s = gemm(x, w * s, c * s)` for `s` along the columns of the result.
pub(super) fn gemm(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let shape = g.shape(p.s)?;
    if shape.len() > 1 {
        return None;
    }
    let s = match shape[..] {
        [n] if g.attrs(f).int("transB").unwrap_or(0) != 0 => g.reshaped(p.s, &[n, 1]),
        _ => p.s,
    };
    let w = scale_operand(g, f.children[1], s)?;
    let mut children = vec![f.children[0], w];
    if let Some(&c) = f.children.get(2) {
        let absent = g.is_absent(c);
        children.push(if absent {
            c
        } else if g.is_const(c) {
            g.times(c, p.s)
        } else {
            g.scaled(c, p.s)?
        });
    }
    Some(g.with(f, children))
}

/// `conv(x, w, b) * s = conv(x, w * s, b * s)` for `s` along the channels.
pub(super) fn conv(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let s = g.padded_shape(p.s, p.rank)?;
    if s.len() < 3 || s.iter().enumerate().any(|(i, &n)| i != 1 && n != 1) {
        return None;
    }
    let n = s[1];
    let mut dims = vec![1; p.rank];
    dims[0] = n;
    let on_weight = g.reshaped(p.s, &dims);
    let w = scale_operand(g, f.children[1], on_weight)?;
    let mut children = vec![f.children[0], w];
    if let Some(&b) = f.children.get(2) {
        let on_bias = g.reshaped(p.s, &[n]);
        let absent = g.is_absent(b);
        children.push(if absent { b } else { scale_operand(g, b, on_bias)? });
    }
    Some(g.with(f, children))
}

/// `op(x * s, w) = op(x, s * w)` for `s` along the channels of `x`.
fn of_scaled(g: &mut Graph, f: &Node, full: &str) -> Vec<Id> {
    let (x, w) = (f.children[0], f.children[1]);
    let mut out = Vec::new();
    if !g.is_const(w) {
        return out;
    }
    for node in g.nodes_of(x, "onnx.Mul") {
        for p in super::products(g, &node) {
            if let Some(scaled) = into_weight(g, f, full, &p, w) {
                let mut children = f.children.clone();
                children[0] = p.x;
                children[1] = scaled;
                out.push(g.with(f, children));
            }
        }
    }
    out
}

/// The weight times the scale of the activation's channels.
fn into_weight(g: &mut Graph, f: &Node, full: &str, p: &Scaled, w: Id) -> Option<Id> {
    let shape = g.padded_shape(p.s, p.rank)?;
    let channel = if full == "onnx.Conv" { 1 } else { p.rank.checked_sub(1)? };
    if shape.iter().enumerate().any(|(i, &n)| i != channel && n != 1) {
        return None;
    }
    let k = shape[channel];
    let dims = match full {
        "onnx.MatMul" if g.dims(w)?.len() >= 2 => vec![k, 1],
        "onnx.MatMul" => vec![k],
        "onnx.Gemm" if g.attrs(f).int("transA").unwrap_or(0) != 0 => return None,
        "onnx.Gemm" if g.attrs(f).int("transB").unwrap_or(0) != 0 => vec![k],
        "onnx.Gemm" => vec![k, 1],
        _ if k == 1 || g.attrs(f).int("group").unwrap_or(1) == 1 => {
            let mut dims = vec![1; p.rank];
            dims[1] = k;
            dims
        }
        _ => return into_groups(g, f, p.s, k, w),
    };
    let s = g.reshaped(p.s, &dims);
    let s = if k == 1 { g.trimmed(s)? } else { s };
    g.fits(s, w).then(|| g.times(w, s))
}

/// The weight of a Conv with groups, `[O, C / groups, ..]`, times the scale of the activation's `k` channels: each group of
/// outputs reads its own.
fn into_groups(g: &mut Graph, f: &Node, s: Id, k: usize, w: Id) -> Option<Id> {
    let groups = usize::try_from(g.attrs(f).int("group")?).ok().filter(|&n| n > 0)?;
    let shape = g.shape(w)?;
    let (&outputs, &inputs) = (shape.first()?, shape.get(1)?);
    if inputs * groups != k || outputs % groups != 0 {
        return None;
    }
    let s = g.reshaped(s, &[groups, 1, inputs]);
    let s = g.expanded(s, &[groups, outputs / groups, inputs])?;
    let mut dims = vec![1; shape.len()];
    (dims[0], dims[1]) = (outputs, inputs);
    let s = g.reshaped(s, &dims);
    Some(g.times(w, s))
}
