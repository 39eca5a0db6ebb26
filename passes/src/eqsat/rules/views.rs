//! Ops that give the same elements other dims, and ops that repeat, permute or cut them: chains of them merge, and what
//! a shape operand says is taken from types wherever they know it.
//!
//! A target of Reshape is written as numbers: a size that stays where it is becomes 0 and one that is left becomes -1,
//! so that no shape is computed at run time. A symbolic size that is copied beside a -1 is taken to be at least one:
//! no runtime can tell what -1 is in a tensor without elements.

use super::{Plain, contents};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;
use dialects::ir::{Attr, Attrs, Dim};

/// Ops that keep the elements in order.
const VIEWS: [&str; 4] = ["Reshape", "Squeeze", "Unsqueeze", "Flatten"];

/// Elementwise ops of which every operand broadcasts to the result.
const BROADCASTING: &[&str] = &[
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Mod",
    "And",
    "Or",
    "Xor",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Min",
    "Max",
    "Where",
];

/// Rules.
pub const PLAINS: &[Plain] = &[
    Plain { name: "view", ops: &VIEWS, apply: view },
    Plain { name: "transpose-between-views", ops: &VIEWS, apply: transpose_between_views },
    Plain { name: "transpose-of-transpose", ops: &["Transpose"], apply: transpose_of_transpose },
    Plain { name: "transpose-of-ones", ops: &["Transpose"], apply: transpose_of_ones },
    Plain { name: "expand", ops: &["Expand"], apply: expand },
    Plain { name: "broadcast-operand", ops: BROADCASTING, apply: broadcast_operand },
    Plain { name: "slice", ops: &["Slice"], apply: slice },
    Plain { name: "concat-of-one", ops: &["Concat"], apply: concat_of_one },
];

/// Whether two shapes are surely the same.
pub fn same_dims(a: &[Dim], b: &[Dim]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same(b))
}

/// Whether `id` surely has the shape of the e-node's result.
pub fn keeps_shape(g: &Graph, node: &Node, id: Id) -> bool {
    let dims = g.class(node).and_then(|c| g.dims(c));
    dims.zip(g.dims(id)).is_some_and(|(a, b)| same_dims(&a, &b))
}

fn is_view(g: &Graph, node: &Node) -> bool {
    VIEWS.contains(&super::short(g.name(node)))
}

/// What the views of a class look at, the class itself first.
fn sources(g: &Graph, x: Id) -> Vec<Id> {
    let inner = g.nodes(x).into_iter().filter(|n| is_view(g, n)).map(|n| g.find(n.children[0]));
    let mut out = vec![g.find(x)];
    out.extend(inner);
    out
}

/// A view is one op, and none where the dims stay: `view(view(x)) = view(x)`.
fn view(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some(to) = g.class(f).and_then(|c| g.dims(c)) else { return Vec::new() };
    let sources = sources(g, f.children[0]);
    sources.into_iter().filter_map(|x| viewed(g, x, &to)).collect()
}

/// The elements of `x` with the dims `to`, which hold as many; `None` where that needs a size that is not known.
fn viewed(g: &mut Graph, x: Id, to: &[Dim]) -> Option<Id> {
    let from = g.dims(x)?;
    if same_dims(&from, to) {
        return Some(x);
    }
    if let Some(axes) = inserted(&from, to) {
        return Some(with_axes(g, "onnx.Unsqueeze", x, &axes));
    }
    if let Some(axes) = inserted(to, &from) {
        return Some(with_axes(g, "onnx.Squeeze", x, &axes));
    }
    let target = g.int_literal(&target(&from, to)?);
    Some(g.op("onnx.Reshape", &[x, target]))
}

/// An op whose axes are an operand since opset 13 and were an attribute before.
pub fn with_axes(g: &mut Graph, full: &str, x: Id, axes: &[i64]) -> Id {
    if g.world().m.opset("onnx") < 13 {
        let attrs: Attrs = [("axes", Attr::Ints(axes.to_vec()))].into_iter().collect();
        return g.op_with(full, &attrs, &[x]);
    }
    let axes = g.int_literal(axes);
    g.op(full, &[x, axes])
}

/// The axes of ones that make `to` of `from`.
fn inserted(from: &[Dim], to: &[Dim]) -> Option<Vec<i64>> {
    let mut i = 0;
    let mut axes = Vec::new();
    for (j, d) in to.iter().enumerate() {
        if from.get(i).is_some_and(|f| f.same(d)) {
            i += 1;
        } else if *d == Dim::Known(1) {
            axes.push(j as i64);
        } else {
            return None;
        }
    }
    (i == from.len()).then_some(axes)
}

/// The target of a Reshape from `from` to `to`.
fn target(from: &[Dim], to: &[Dim]) -> Option<Vec<i64>> {
    let mut rest = false;
    let one = |(j, d): (usize, &Dim)| match d {
        Dim::Known(n) if *n > 0 => Some(*n),
        Dim::Known(_) => None,
        d if from.get(j).is_some_and(|f| f.same(d)) => Some(0),
        _ if rest => None,
        _ => {
            rest = true;
            Some(-1)
        }
    };
    to.iter().enumerate().map(one).collect()
}

/// For a view from `from` to `to` that only merges neighbouring dims: how many of `from` each of `to` holds.
fn merged(from: &[Dim], to: &[Dim]) -> Option<Vec<usize>> {
    let left = from.iter().zip(to).take_while(|(a, b)| a.same(b)).count();
    let most = from.len().min(to.len()) - left;
    let right = from.iter().rev().zip(to.iter().rev()).take(most).take_while(|(a, b)| a.same(b)).count();
    let (run, into) = (&from[left..from.len() - right], &to[left..to.len() - right]);
    let mut counts = vec![1; left];
    match into {
        [] if run.is_empty() => {}
        [_] => counts.push(run.len()),
        _ => {
            // Several runs: numbers tell where each ends.
            let mut run = run.iter();
            for d in into {
                let (size, mut held, mut n) = (d.known().filter(|&n| n > 1)?, 1i64, 0);
                while held < size {
                    held = held.checked_mul(run.next()?.known()?)?;
                    n += 1;
                }
                (held == size).then(|| counts.push(n))?;
            }
            run.next().is_none().then_some(())?;
        }
    }
    counts.extend(vec![1; right]);
    Some(counts)
}

/// `split(transpose(merge(x))) = transpose(x)`: dims that move together need not be one.
fn transpose_between_views(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some(to) = g.class(f).and_then(|c| g.dims(c)) else { return Vec::new() };
    let mut out = Vec::new();
    for t in g.nodes_of(f.children[0], "onnx.Transpose") {
        let y = t.children[0];
        let Some(mid) = g.dims(y) else { continue };
        let Some(perm) = g.perm(&t, mid.len()) else { continue };
        let views: Vec<Node> = g.nodes(y).into_iter().filter(|n| is_view(g, n)).collect();
        for v in views {
            let x = v.children[0];
            let Some(from) = g.dims(x) else { continue };
            let Some(counts) = merged(&from, &mid) else { continue };
            let start = |i: usize| counts[..i].iter().sum::<usize>();
            let Some(order) = perm
                .iter()
                .map(|&p| Some(start(p)..start(p) + counts.get(p)?))
                .collect::<Option<Vec<_>>>()
                .map(|runs| runs.into_iter().flatten().collect::<Vec<usize>>())
            else {
                continue;
            };
            let moved: Vec<Dim> = order.iter().map(|&i| from[i].clone()).collect();
            if same_dims(&moved, &to) {
                out.push(transpose(g, x, &order));
            }
        }
    }
    out
}

fn transpose(g: &mut Graph, x: Id, perm: &[usize]) -> Id {
    if perm.is_sorted() {
        return x;
    }
    let attr = Attr::Ints(perm.iter().map(|&p| p as i64).collect());
    g.op_with("onnx.Transpose", &[("perm", attr)].into_iter().collect(), &[x])
}

/// `transpose(transpose(x)) = transpose(x)`, and one that moves nothing is nothing.
fn transpose_of_transpose(g: &mut Graph, f: &Node) -> Vec<Id> {
    let x = f.children[0];
    let Some(rank) = g.dims(x).map(|d| d.len()) else { return Vec::new() };
    let Some(perm) = g.perm(f, rank) else { return Vec::new() };
    let mut out = vec![transpose(g, x, &perm)];
    for t in g.nodes_of(x, "onnx.Transpose") {
        let Some(inner) = g.perm(&t, rank) else { continue };
        let Some(both) = perm.iter().map(|&p| inner.get(p).copied()).collect::<Option<Vec<_>>>() else {
            continue;
        };
        out.push(transpose(g, t.children[0], &both));
    }
    out
}

/// A transpose that moves only dims of one element is a view.
fn transpose_of_ones(g: &mut Graph, f: &Node) -> Vec<Id> {
    let x = f.children[0];
    let Some(dims) = g.dims(x) else { return Vec::new() };
    let Some(perm) = g.perm(f, dims.len()) else { return Vec::new() };
    if perm.iter().any(|&p| p >= dims.len()) {
        return Vec::new();
    }
    let moving: Vec<usize> = perm.iter().copied().filter(|&p| dims[p] != Dim::Known(1)).collect();
    let to: Vec<Dim> = perm.iter().map(|&p| dims[p].clone()).collect();
    if moving.is_sorted() { viewed(g, x, &to).into_iter().collect() } else { Vec::new() }
}

/// An Expand asks for ones where sizes stay: `expand(x, [n, 4, 8]) = expand(x, [1, 4, 1])` for `x` of `[n, 1, 8]`. It is
/// a view where nothing is repeated, and an Expand of an Expand is one.
fn expand(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some(to) = g.class(f).and_then(|c| g.dims(c)) else { return Vec::new() };
    let mut sources = vec![f.children[0]];
    sources.extend(g.nodes_of(f.children[0], "onnx.Expand").iter().map(|n| n.children[0]));
    let mut out = Vec::new();
    for x in sources {
        let Some(from) = g.dims(x) else { continue };
        let Some(lead) = to.len().checked_sub(from.len()) else { continue };
        let stays = |i: usize| i >= lead && from[i - lead].same(&to[i]);
        let sizes: Vec<Dim> =
            to.iter().enumerate().map(|(i, d)| if stays(i) { Dim::Known(1) } else { d.clone() }).collect();
        if sizes.iter().all(|d| *d == Dim::Known(1)) {
            out.extend(viewed(g, x, &to));
        } else if let Some(sizes) = contents::vector(g, &sizes) {
            out.push(g.op("onnx.Expand", &[x, sizes]));
        }
    }
    out
}

/// An operand that broadcasts need not be expanded, nor have ones in front, where the other operands give the result
/// its dims.
fn broadcast_operand(g: &mut Graph, f: &Node) -> Vec<Id> {
    let mut out = Vec::new();
    for (i, &c) in f.children.iter().enumerate() {
        if g.is_const(c) || g.is_absent(c) {
            continue;
        }
        for inner in g.nodes(c) {
            let name = super::short(g.name(&inner));
            let x = match name {
                "Expand" => inner.children[0],
                name if VIEWS.contains(&name) => {
                    let x = inner.children[0];
                    let Some((from, to)) = g.dims(x).zip(g.dims(c)) else { continue };
                    let Some(lead) = to.len().checked_sub(from.len()) else { continue };
                    let ones = to[..lead].iter().all(|d| *d == Dim::Known(1));
                    if lead == 0 || !ones || !same_dims(&to[lead..], &from) {
                        continue;
                    }
                    x
                }
                _ => continue,
            };
            let other = g.with_child(f, i, x);
            if keeps_shape(g, f, other) {
                out.push(other);
            }
        }
    }
    out
}

/// A Slice with axes counted from the front, ends inside the tensor and no axis that it does not cut; one that cuts
/// nothing is nothing.
fn slice(g: &mut Graph, f: &Node) -> Vec<Id> {
    let x = f.children[0];
    let Some(dims) = g.dims(x) else { return Vec::new() };
    let given = |i: usize| f.children.get(i).copied().filter(|&c| !g.is_absent(c));
    let (Some(starts), Some(ends)) = (given(1).and_then(|c| g.ints(c)), given(2).and_then(|c| g.ints(c)))
    else {
        return Vec::new();
    };
    let default: Vec<i64> = (0..starts.len() as i64).collect();
    let Some(axes) = given(3).map_or(Some(default), |c| g.ints(c)) else { return Vec::new() };
    let Some(steps) = given(4).map_or(Some(vec![1; starts.len()]), |c| g.ints(c)) else { return Vec::new() };
    if [ends.len(), axes.len(), steps.len()].iter().any(|&n| n != starts.len()) {
        return Vec::new();
    }
    let mut cuts = Vec::new();
    for i in 0..starts.len() {
        let axis = if axes[i] < 0 { axes[i] + dims.len() as i64 } else { axes[i] };
        let Some(size) = usize::try_from(axis).ok().and_then(|a| dims.get(a)) else { return Vec::new() };
        let (start, end) = match size.known() {
            // Backwards and strided cuts are left as they are.
            _ if steps[i] != 1 => return Vec::new(),
            Some(n) => {
                let clip = |at: i64| (if at < 0 { at.saturating_add(n) } else { at }).clamp(0, n);
                (clip(starts[i]), clip(ends[i]))
            }
            None => (starts[i], ends[i]),
        };
        let end = if size.known().is_none() && end >= i64::from(i32::MAX) { i64::MAX } else { end };
        let whole = start == 0 && (size.known() == Some(end) || end == i64::MAX);
        if !whole {
            cuts.push((axis, start, end));
        }
    }
    if cuts.is_empty() {
        return vec![x];
    }
    cuts.sort();
    let part = |k: fn(&(i64, i64, i64)) -> i64| cuts.iter().map(k).collect::<Vec<i64>>();
    let operands = [part(|c| c.1), part(|c| c.2), part(|c| c.0)];
    let mut children = vec![x];
    children.extend(operands.map(|values| g.int_literal(&values)));
    vec![g.op("onnx.Slice", &children)]
}

/// A join of one tensor is that tensor.
fn concat_of_one(_: &mut Graph, f: &Node) -> Vec<Id> {
    if f.children.len() == 1 { f.children.clone() } else { Vec::new() }
}
