//! Orthogonal rotations: `MatMul(F(x), Q)` with a constant `Q` whose inverse is its transpose.
//!
//! A rotation moves upstream through whatever treats all channels alike, until a weight or a table takes it. Downstream the
//! inverse rotation of a rotated value moves through what needs only the length of each row, or scales rows, until a weight
//! takes it. Which constants rotate is a fact that the graph is told ([`Graph::rotation`]). `Q` with the mean of each of its
//! columns subtracted is what remains of it behind a value whose rows have their mean subtracted: it moves upstream as well.

use super::{Plain, short};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;
use dialects::tensor::Tensor;

/// Ops that move elements and may keep rows whole.
const MOVES: &[&str] = &["Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Transpose"];

/// The rules.
pub const PLAINS: &[Plain] = &[
    Plain { name: "rotation-upstream", ops: &["MatMul"], apply: upstream },
    Plain {
        name: "rotation-downstream",
        ops: &["Mul", "Div", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Transpose"],
        apply: downstream,
    },
    Plain { name: "rotated-linear", ops: &["MatMul", "Gemm"], apply: rotated_linear },
    Plain {
        name: "length-of-rotated",
        ops: &["ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"],
        apply: length,
    },
    Plain {
        name: "norm-of-rotated",
        ops: &["RMSNormalization", "SimplifiedLayerNormalization"],
        apply: norm,
    },
    Plain { name: "linear-of-shifted", ops: &["MatMul", "Gemm"], apply: of_shifted },
    Plain { name: "rows-of-shifted", ops: MOVES, apply: rows_of_shifted },
    Plain { name: "shape-of-rotated", ops: &["Shape", "Size"], apply: shape },
    Plain { name: "sum-of-constants", ops: &["Add"], apply: constants },
];

/// `f(x) @ a = f'(x @ a)` for a rotation `a`, one step upstream.
fn upstream(g: &mut Graph, node: &Node) -> Vec<Id> {
    let (y, a) = (node.children[0], node.children[1]);
    if !g.moves(a) || g.is_const(y) {
        return Vec::new();
    }
    g.nodes(y).iter().filter_map(|f| through(g, f, y, a)).collect()
}

fn through(g: &mut Graph, f: &Node, y: Id, a: Id) -> Option<Id> {
    let name = short(g.name(f)).to_string();
    match name.as_str() {
        "MatMul" => {
            let (x, w) = (f.children[0], f.children[1]);
            if g.inverse(w).is_some_and(|i| g.find(i) == g.find(a)) {
                return Some(x);
            }
            if !g.is_const(w) || g.moves(w) || g.is_const(x) || g.shape(w)?.len() != 2 {
                return None;
            }
            let w = product(g, w, a);
            Some(g.with(f, vec![x, w]))
        }
        "Gemm" => {
            let (w, flipped) = (f.children[1], g.attrs(f).int("transB").unwrap_or(0) != 0);
            if !g.is_const(w) {
                return None;
            }
            let w = match flipped {
                true => {
                    let a = transpose(g, a)?;
                    product(g, a, w)
                }
                false => product(g, w, a),
            };
            let mut children = vec![f.children[0], w];
            if let Some(&c) = f.children.get(2) {
                children.push(if g.is_absent(c) { c } else { rotated(g, c, a)? });
            }
            Some(g.with(f, children))
        }
        "Sub" if is_mean(g, f.children[1], f.children[0]) => {
            let a = g.centered(a)?;
            Some(g.op("onnx.MatMul", &[f.children[0], a]))
        }
        "Add" | "Sub" => {
            let terms = f.children.iter().map(|&t| rotated(g, t, a)).collect::<Option<_>>()?;
            Some(g.with(f, terms))
        }
        "Concat" => {
            let rank = g.dims(y)?.len();
            let axis = g.attrs(f).int("axis")?;
            if axis == -1 || axis == rank as i64 - 1 {
                return None;
            }
            let terms = f.children.iter().map(|&t| rotated(g, t, a)).collect::<Option<_>>()?;
            Some(g.with(f, terms))
        }
        "Gather" => {
            let table = f.children[0];
            let rank = g.dims(table)?.len();
            let axis = g.attrs(f).int("axis").unwrap_or(0);
            if rank < 2 || axis == -1 || axis == rank as i64 - 1 || !g.is_const(table) {
                return None;
            }
            let table = rotated(g, table, a)?;
            Some(g.with_child(f, 0, table))
        }
        "Mul" | "Div" => {
            let i = rows(g, f)?;
            let x = rotated(g, f.children[i], a)?;
            Some(g.with_child(f, i, x))
        }
        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Expand" | "Slice" | "Transpose" => {
            let x = f.children[0];
            if g.is_const(x) || !keeps_rows(g, f, x, y) {
                return None;
            }
            let x = rotated(g, x, a)?;
            Some(g.with_child(f, 0, x))
        }
        _ => None,
    }
}

/// `x @ a`. A constant that is the same for all channels is written out for each first.
fn rotated(g: &mut Graph, x: Id, a: Id) -> Option<Id> {
    let n = g.shape(a)?[0];
    if !g.is_const(x) {
        let same = g.dims(x)?.last()?.known() == Some(n as i64);
        return same.then(|| g.op("onnx.MatMul", &[x, a]));
    }
    let mut shape = g.shape(x)?;
    match shape.last_mut() {
        Some(last) if *last == n => {}
        Some(last) if *last == 1 => *last = n,
        Some(_) => return None,
        None => shape.push(n),
    }
    let x = g.expanded(x, &shape)?;
    Some(product(g, x, a))
}

/// The product of two constants, where a rotation undoes its inverse: otherwise there would be no end of products.
fn product(g: &mut Graph, a: Id, b: Id) -> Id {
    for n in g.nodes_of(a, "onnx.MatMul") {
        if g.inverse(b).is_some_and(|i| g.find(i) == g.find(n.children[1])) {
            return n.children[0];
        }
    }
    for n in g.nodes_of(b, "onnx.MatMul") {
        if g.inverse(a).is_some_and(|i| g.find(i) == g.find(n.children[0])) {
            return n.children[1];
        }
    }
    g.op("onnx.MatMul", &[a, b])
}

/// The transpose of a rotation is its inverse.
fn transpose(g: &mut Graph, a: Id) -> Option<Id> {
    match g.inverse(a) {
        Some(inverse) => Some(inverse),
        None => g.transposed(a, &[1, 0]),
    }
}

/// The operand of a product or quotient that is scaled by one number for each row, if it is one.
fn rows(g: &Graph, f: &Node) -> Option<usize> {
    let one = |id: Id| g.dims(id).is_some_and(|d| d.last().is_none_or(|n| n.known() == Some(1)));
    let whole = |i: usize| g.dims(f.children[i]).map(|d| d.len());
    let fits = |i: usize| whole(i) >= whole(1 - i) && !one(f.children[i]) && one(f.children[1 - i]);
    let operands = if g.is(f, "onnx.Mul") { 0..2 } else { 0..1 };
    operands.into_iter().find(|&i| fits(i))
}

/// Whether an op that moves elements from `x` to `y` keeps each row, along the last dim, whole.
fn keeps_rows(g: &Graph, f: &Node, x: Id, y: Id) -> bool {
    let (Some(from), Some(to)) = (g.dims(x), g.dims(y)) else { return false };
    let same = matches!((from.last(), to.last()), (Some(a), Some(b)) if a.same(b) && a.known() != Some(1));
    match short(g.name(f)) {
        "Transpose" => g.perm(f, from.len()).is_some_and(|p| p.last() == Some(&(from.len() - 1))),
        "Slice" => {
            let axes = f.children.get(3).and_then(|&a| g.ints(a));
            let last = |&a: &i64| a == -1 || a == from.len() as i64 - 1;
            same && axes.is_some_and(|a| !a.iter().any(last))
        }
        // Row-major with the same last dim: rows are the same runs of elements.
        _ => same,
    }
}

/// Whether `mean` is the mean of each row of `x`.
fn is_mean(g: &Graph, mean: Id, x: Id) -> bool {
    let of = |n: &Node| {
        g.find(n.children[0]) == g.find(x) && over_rows(g, n) && g.attrs(n).int("keepdims").unwrap_or(1) != 0
    };
    g.nodes_of(mean, "onnx.ReduceMean").iter().any(of)
}

/// Whether a reduction is over the last dim alone.
fn over_rows(g: &Graph, f: &Node) -> bool {
    let Some(rank) = g.dims(f.children[0]).map(|d| d.len() as i64) else { return false };
    let axes = match f.children.get(1) {
        Some(&axes) => g.ints(axes),
        None => g.attrs(f).ints("axes").map(<[i64]>::to_vec),
    };
    axes.is_some_and(|a| a == [-1] || a == [rank - 1])
}

/// The values that are rotated to give `y`, each with the rotation.
fn unrotated(g: &Graph, y: Id) -> Vec<(Id, Id)> {
    let found = g.nodes_of(y, "onnx.MatMul").into_iter().map(|n| (n.children[0], n.children[1]));
    found.filter(|&(x, a)| !g.is_const(x) && g.inverse(a).is_some()).collect()
}

/// `f(x @ q) = f(x) @ q` for what scales rows or moves them.
fn downstream(g: &mut Graph, f: &Node) -> Vec<Id> {
    let i = match short(g.name(f)) {
        "Mul" | "Div" => rows(g, f),
        _ => Some(0),
    };
    let Some(i) = i else { return Vec::new() };
    let mut out = Vec::new();
    for (x, q) in unrotated(g, f.children[i]) {
        let moved = g.with_child(f, i, x);
        let whole = matches!(short(g.name(f)), "Mul" | "Div") || keeps_rows(g, f, x, moved);
        if whole {
            out.push(g.op("onnx.MatMul", &[moved, q]));
        }
    }
    out
}

/// `(x @ q) @ w = x @ (q @ w)`.
fn rotated_linear(g: &mut Graph, f: &Node) -> Vec<Id> {
    let w = f.children[1];
    let gemm = g.is(f, "onnx.Gemm");
    let columns = gemm && g.attrs(f).int("transA").unwrap_or(0) != 0;
    if !g.is_const(w) || g.moves(w) || columns || g.shape(w).is_none_or(|s| s.len() != 2) {
        return Vec::new();
    }
    let flipped = gemm && g.attrs(f).int("transB").unwrap_or(0) != 0;
    let mut out = Vec::new();
    for (x, q) in unrotated(g, f.children[0]) {
        let w = match flipped {
            true => transpose(g, q).map(|q| product(g, w, q)),
            false => Some(product(g, q, w)),
        };
        let Some(w) = w else { continue };
        let mut children = f.children.clone();
        (children[0], children[1]) = (x, w);
        out.push(g.with(f, children));
    }
    out
}

/// `mean((x @ q)^2) = mean(x^2)` over rows, and the same for a sum and a length: a rotation keeps lengths.
fn length(g: &mut Graph, f: &Node) -> Vec<Id> {
    let mut out = Vec::new();
    let y = f.children[0];
    if !over_rows(g, f) {
        return out;
    }
    if matches!(short(g.name(f)), "ReduceSumSquare" | "ReduceL2") {
        for (x, _) in unrotated(g, y) {
            out.push(g.with_child(f, 0, x));
        }
        return out;
    }
    for square in g.nodes(y) {
        let base = match short(g.name(&square)) {
            "Pow" if g.all(square.children[1], 2.0) => square.children[0],
            "Mul" if g.find(square.children[0]) == g.find(square.children[1]) => square.children[0],
            _ => continue,
        };
        for (x, _) in unrotated(g, base) {
            let children = if g.is(&square, "onnx.Pow") { vec![x, square.children[1]] } else { vec![x, x] };
            let square = g.with(&square, children);
            out.push(g.with_child(f, 0, square));
        }
    }
    out
}

/// `norm(x @ q, gain) = (norm(x, 1) @ q) * gain`.
fn norm(g: &mut Graph, f: &Node) -> Vec<Id> {
    let (y, gain) = (f.children[0], f.children[1]);
    let rank = g.dims(y).map_or(0, |d| d.len() as i64);
    let axis = g.attrs(f).int("axis").unwrap_or(-1);
    if g.wanted(f) != 1 || (axis != -1 && axis != rank - 1) || !g.is_const(gain) {
        return Vec::new();
    }
    let (Some(elem), Some(shape)) = (g.elem(gain), g.shape(gain)) else { return Vec::new() };
    let mut out = Vec::new();
    for (x, q) in unrotated(g, y) {
        let mut children = f.children.clone();
        children[0] = x;
        if g.ones(gain) {
            let n = g.with(f, children);
            out.push(g.op("onnx.MatMul", &[n, q]));
            continue;
        }
        let ones = vec![1.0; shape.iter().product()];
        let Ok(ones) = Tensor::from_f32(elem, &shape, ones) else { continue };
        children[1] = g.literal(ones);
        let n = g.with(f, children);
        let n = g.op("onnx.MatMul", &[n, q]);
        out.push(g.op("onnx.Mul", &[n, gain]));
    }
    out
}

/// `(x + b) @ w = x @ w + b @ w` for one constant row `b`.
fn of_shifted(g: &mut Graph, f: &Node) -> Vec<Id> {
    let w = f.children[1];
    let gemm = g.is(f, "onnx.Gemm");
    let int = |g: &Graph, name| g.attrs(f).int(name).unwrap_or(0);
    let plain = |g: &Graph, name| g.attrs(f).float(name).is_none_or(|x| x == 1.0);
    if !g.is_const(w) || g.moves(w) || g.shape(w).is_none_or(|s| s.len() != 2) {
        return Vec::new();
    }
    if gemm && (int(g, "transA") != 0 || !plain(g, "alpha") || !plain(g, "beta")) {
        return Vec::new();
    }
    let flipped = gemm && int(g, "transB") != 0;
    let mut out = Vec::new();
    for sum in g.nodes_of(f.children[0], "onnx.Add") {
        for (x, b) in [(0, 1), (1, 0)].map(|(i, j)| (sum.children[i], sum.children[j])) {
            let fits = !g.is_const(x) && g.is_const(b) && g.fits(b, x);
            let row = g.shape(b).is_some_and(|s| s.iter().rev().skip(1).all(|&d| d == 1));
            if !fits || !row {
                continue;
            }
            let by = if flipped { g.transposed(w, &[1, 0]) } else { Some(w) };
            let Some(shift) = by.and_then(|w| {
                let b = g.trimmed(b)?;
                let k = g.shape(w)?[0];
                let b = g.expanded(b, &[k])?;
                Some(g.op("onnx.MatMul", &[b, w]))
            }) else {
                continue;
            };
            out.push(if gemm {
                let shift = match f.children.get(2) {
                    Some(&c) if !g.is_absent(c) => g.op("onnx.Add", &[c, shift]),
                    _ => shift,
                };
                g.with(f, vec![x, w, shift])
            } else {
                let y = g.with_child(f, 0, x);
                g.op("onnx.Add", &[y, shift])
            });
        }
    }
    out
}

/// `shape(x @ q) = shape(x)`, and the same for what scales or shifts `x` without changing its shape.
fn shape(g: &mut Graph, f: &Node) -> Vec<Id> {
    let y = f.children[0];
    let mut out = Vec::new();
    for inner in g.nodes(y) {
        let operands = match short(g.name(&inner)) {
            "MatMul" if g.inverse(inner.children[1]).is_some() => 0..1,
            "Mul" | "Div" | "Add" | "Sub" => 0..2,
            _ => continue,
        };
        for i in operands {
            let x = inner.children[i];
            let same = match (g.dims(x), g.dims(y)) {
                (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a.same(b)),
                _ => false,
            };
            if same && !g.is_const(x) {
                out.push(g.with_child(f, 0, x));
            }
        }
    }
    out
}

/// `f(x * c) = f(x) * c` and `f(x + c) = f(x) + c` for what moves rows, and a constant row.
fn rows_of_shifted(g: &mut Graph, f: &Node) -> Vec<Id> {
    let mut out = Vec::new();
    for inner in g.nodes(f.children[0]) {
        if !g.is(&inner, "onnx.Mul") && !g.is(&inner, "onnx.Add") {
            continue;
        }
        for (x, c) in [(0, 1), (1, 0)].map(|(i, j)| (inner.children[i], inner.children[j])) {
            if g.is_const(x) || !g.is_const(c) || !g.fits(c, x) {
                continue;
            }
            let Some(c) = g.trimmed(c).filter(|&c| g.shape(c).is_some_and(|s| s.len() <= 1)) else {
                continue;
            };
            let moved = g.with_child(f, 0, x);
            if keeps_rows(g, f, x, moved) && g.fits(c, moved) {
                out.push(g.with(&inner, vec![moved, c]));
            }
        }
    }
    out
}

/// `(x + b) + c = x + (b + c)`.
fn constants(g: &mut Graph, f: &Node) -> Vec<Id> {
    let mut out = Vec::new();
    for (inner, c) in [(0, 1), (1, 0)].map(|(i, j)| (f.children[i], f.children[j])) {
        if !g.is_const(c) || g.is_const(inner) {
            continue;
        }
        for sum in g.nodes_of(inner, "onnx.Add") {
            for (x, b) in [(0, 1), (1, 0)].map(|(i, j)| (sum.children[i], sum.children[j])) {
                if g.is_const(b) && !g.is_const(x) && g.fits(b, x) && g.fits(c, x) {
                    let both = g.op("onnx.Add", &[b, c]);
                    out.push(g.op("onnx.Add", &[x, both]));
                }
            }
        }
    }
    out
}
