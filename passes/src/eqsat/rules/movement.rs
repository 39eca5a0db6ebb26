//! Ops that move elements without computing: reshapes, transposes, broadcasts, slices, splits, joins.

use super::{Plain, Push, Scaled};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::{Head, Node};
use dialects::ir::{Attr, Dim};
use dialects::tensor::Tensor;

/// Rules that move a scale.
pub const PUSHES: &[Push] = &[
    Push { name: "scale-reshape", through: &["Reshape", "Squeeze", "Unsqueeze", "Flatten"], push: reshape },
    Push { name: "scale-transpose", through: &["Transpose"], push: transpose },
    Push { name: "scale-expand", through: &["Expand"], push: expand },
    Push { name: "scale-slice", through: &["Slice"], push: slice },
    Push { name: "scale-split", through: &["Split"], push: split },
    Push { name: "scale-concat", through: &["Concat"], push: concat },
    Push { name: "scale-pool", through: &["AveragePool", "GlobalAveragePool"], push: pool },
    Push {
        name: "positive-scale-pool",
        through: &["MaxPool", "GlobalMaxPool"],
        push: |g, p, f| if g.positive(p.s) && g.wanted(f) == 1 { pool(g, p, f) } else { None },
    },
];

/// Other rules.
pub const PLAINS: &[Plain] = &[Plain { name: "split-of-part", ops: &["Split"], apply: split_of_part }];

/// How a constant that broadcasts against `from` must look to broadcast against `to`, where both are shapes of the
/// same elements, row-major: the dims to expand it to first, and the dims to reshape it to then. Both align right.
/// `None` when a dim along which `s` varies cannot be traced.
fn regroup(from: &[Dim], to: &[Dim], s: &[usize]) -> Option<(Vec<usize>, Vec<usize>)> {
    let (mut i, mut j) = (from.len(), to.len());
    let (mut expand, mut reshape) = (Vec::new(), Vec::new());
    let size = |d: &Dim| d.known().and_then(|n| usize::try_from(n).ok());
    while i > 0 || j > 0 {
        let (f, t) = (i.checked_sub(1).map(|i| &from[i]), j.checked_sub(1).map(|j| &to[j]));
        match (f, t) {
            (Some(f), Some(t)) if f.same(t) => {
                expand.push(s[i - 1]);
                reshape.push(s[i - 1]);
                (i, j) = (i - 1, j - 1);
                continue;
            }
            (Some(Dim::Known(1)), _) => {
                expand.push(1);
                i -= 1;
                continue;
            }
            (_, Some(Dim::Known(1))) => {
                reshape.push(1);
                j -= 1;
                continue;
            }
            _ => {}
        }
        // A run of dims on one side that holds as many elements as a run on the other.
        let (i0, j0) = (i, j);
        let (mut p, mut q) = (1usize, 1usize);
        let closed = loop {
            let step = if p <= q && i > 0 {
                i -= 1;
                size(&from[i]).and_then(|n| p.checked_mul(n)).map(|n| p = n)
            } else if j > 0 {
                j -= 1;
                size(&to[j]).and_then(|n| q.checked_mul(n)).map(|n| q = n)
            } else {
                None
            };
            match step {
                None => break false,
                Some(()) if p == q && i < i0 && j < j0 => break true,
                Some(()) => {}
            }
        };
        if !closed {
            // Everything further left is one run that cannot be told apart; it must not matter.
            return s[..i0].iter().all(|&n| n == 1).then(|| finish(expand, reshape));
        }
        let varies = s[i..i0].iter().any(|&n| n != 1);
        let sizes = |dims: &[Dim]| -> Vec<usize> {
            dims.iter().rev().map(|d| if varies { size(d).unwrap_or(1) } else { 1 }).collect()
        };
        expand.extend(sizes(&from[i..i0]));
        reshape.extend(sizes(&to[j..j0]));
    }
    Some(finish(expand, reshape))
}

fn finish(mut expand: Vec<usize>, mut reshape: Vec<usize>) -> (Vec<usize>, Vec<usize>) {
    expand.reverse();
    reshape.reverse();
    (expand, reshape)
}

/// `reshape(x) * s = reshape(x * s')` where the dims along which `s` varies can be traced through.
fn reshape(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let x = f.children[0];
    let s = g.padded_shape(p.s, p.rank)?;
    let (mid, new) = regroup(&g.dims(p.x)?, &g.dims(x)?, &s)?;
    let padded = g.reshaped(p.s, &s[s.len() - mid.len()..]);
    let wide = g.expanded(padded, &mid)?;
    let moved = g.reshaped(wide, &new);
    let x = g.scaled(x, moved)?;
    Some(g.with_child(f, 0, x))
}

/// `pool(x) * s = pool(x * s)` for `s` along the channels, which a pool keeps apart.
fn pool(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let shape = g.padded_shape(p.s, p.rank)?;
    if shape.iter().enumerate().any(|(axis, &n)| axis > 1 && n != 1) {
        return None;
    }
    let x = g.scaled(f.children[0], p.s)?;
    Some(g.with_child(f, 0, x))
}

/// `transpose(x) * s = transpose(x * transpose'(s))`.
fn transpose(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let perm = g.perm(f, p.rank)?;
    let mut inverse = vec![0; perm.len()];
    for (i, &j) in perm.iter().enumerate() {
        *inverse.get_mut(j)? = i;
    }
    let shape = g.padded_shape(p.s, p.rank)?;
    let s = g.reshaped(p.s, &shape);
    let s = g.transposed(s, &inverse)?;
    let x = g.scaled(f.children[0], s)?;
    Some(g.with_child(f, 0, x))
}

/// `expand(x) * s = expand(x * s')` for `s` constant along the dims that are repeated.
fn expand(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let x = f.children[0];
    let dims = g.dims(x)?;
    let lead = p.rank.checked_sub(dims.len())?;
    let shape = g.padded_shape(p.s, p.rank)?;
    let mut s = g.reshaped(p.s, &shape);
    for axis in 0..p.rank {
        // A symbolic dim that stays itself is not repeated, and `s` does not vary along it.
        if axis < lead || dims[axis - lead] == Dim::Known(1) {
            s = g.constant_along(s, axis)?;
        }
    }
    let x = g.scaled(x, s)?;
    Some(g.with_child(f, 0, x))
}

/// `slice(x) * s = slice(x * s)` for `s` constant along the dims that are cut.
fn slice(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let shape = g.padded_shape(p.s, p.rank)?;
    // Without axes, all dims may be cut.
    let axes = f.children.get(3).and_then(|&a| g.ints(a)).unwrap_or((0..p.rank as i64).collect());
    let cut = |a: &i64| usize::try_from(if *a < 0 { a + p.rank as i64 } else { *a }).ok();
    if axes.iter().any(|a| cut(a).and_then(|a| shape.get(a)).is_none_or(|&n| n != 1)) {
        return None;
    }
    let x = g.scaled(f.children[0], p.s)?;
    Some(g.with_child(f, 0, x))
}

/// The axis of a Split, and where each part starts and ends.
fn parts(g: &Graph, f: &Node, rank: usize) -> Option<(usize, Vec<usize>)> {
    let axis = g.attrs(f).int("axis").unwrap_or(0);
    let axis = usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok()?;
    let n = usize::try_from(g.dims(f.children[0])?.get(axis)?.known()?).ok()?;
    let sizes: Vec<usize> = match f.children.get(1).and_then(|&s| g.ints(s)) {
        Some(sizes) => sizes.iter().map(|&s| usize::try_from(s).ok()).collect::<Option<_>>()?,
        None => {
            let count = g.attrs(f).int("num_outputs").unwrap_or(i64::from(g.outputs(f)));
            let count = usize::try_from(count).ok().filter(|&c| c > 0)?;
            let size = n.div_ceil(count);
            (0..count).map(|i| size.min(n.saturating_sub(i * size))).collect()
        }
    };
    let mut bounds = vec![0];
    for s in sizes {
        bounds.push(bounds.last()? + s);
    }
    (bounds.last() == Some(&n)).then_some((axis, bounds))
}

/// `split(x)[i] * s = split(x * [1 .. s .. 1])[i]`.
fn split(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let (axis, bounds) = parts(g, f, p.rank)?;
    let Head::Op { result, .. } = f.head else { return None };
    let (from, to) = (*bounds.get(result as usize)?, *bounds.get(result as usize + 1)?);
    let n = *bounds.last()?;
    let elem = g.elem(p.s)?;
    let shape = g.padded_shape(p.s, p.rank)?;
    let mut full = shape.clone();
    full[axis] = to - from;
    let s = g.reshaped(p.s, &shape);
    let s = g.expanded(s, &full)?;
    let mut run = Vec::new();
    for (len, s) in [(from, None), (to - from, Some(s)), (n - to, None)] {
        let mut dims = full.clone();
        dims[axis] = len;
        match s {
            _ if len == 0 => {}
            Some(s) => run.push(s),
            None => {
                let ones = vec![1.0; dims.iter().product()];
                run.push(g.literal(Tensor::from_f32(elem, &dims, ones).ok()?));
            }
        }
    }
    let attrs = [("axis", Attr::Int(axis as i64))].into_iter().collect();
    let s = g.op_with("onnx.Concat", &attrs, &run);
    let x = g.scaled(f.children[0], s)?;
    Some(g.with_child(f, 0, x))
}

/// `split(x)[j] = split(x * [1 .. s .. 1])[j]` for a part that is scaled by ones.
fn split_of_part(g: &mut Graph, f: &Node) -> Vec<Id> {
    let mut out = Vec::new();
    let x = f.children[0];
    let Some(rank) = g.dims(x).map(|d| d.len()) else { return out };
    let Some((axis, bounds)) = parts(g, f, rank) else { return out };
    let Head::Op { result, .. } = f.head else { return out };
    let Some((&from, &to)) = bounds.get(result as usize).zip(bounds.get(result as usize + 1)) else {
        return out;
    };
    for parent in g.parents(x) {
        for node in g.nodes_of(parent, "onnx.Mul") {
            for p in super::products(g, &node) {
                if g.find(p.x) == g.find(x) && ones_between(g, p.s, rank, axis, from, to) {
                    out.push(g.with_child(f, 0, parent));
                }
            }
        }
    }
    out
}

/// Whether a constant is a join along `axis` whose pieces from `from` to `to` are ones.
fn ones_between(g: &mut Graph, s: Id, rank: usize, axis: usize, from: usize, to: usize) -> bool {
    let Some(shape) = g.shape(s) else { return false };
    let mut candidates = vec![s];
    for node in g.nodes_of(s, "onnx.Reshape") {
        candidates.push(node.children[0]);
    }
    candidates.into_iter().any(|c| {
        g.nodes_of(c, "onnx.Concat").iter().any(|join| {
            let Some(dims) = g.shape(c) else { return false };
            // The same axis, counted from the right.
            let along = g.attrs(join).int("axis").and_then(|a| usize::try_from(a).ok());
            if along.map(|a| dims.len() - a) != Some(rank - axis) || shape.len() < rank - axis {
                return false;
            }
            let mut at = 0;
            join.children.iter().all(|&piece| {
                let len = g.shape(piece).and_then(|d| d.get(along?).copied()).unwrap_or(0);
                let (a, b) = (at, at + len);
                at = b;
                b <= from || a >= to || g.ones(piece)
            })
        })
    })
}

/// `concat(a, b) * s = concat(a * s_a, b * s_b)`.
fn concat(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let axis = g.attrs(f).int("axis")?;
    let axis = usize::try_from(if axis < 0 { axis + p.rank as i64 } else { axis }).ok()?;
    let shape = g.padded_shape(p.s, p.rank)?;
    let s = g.reshaped(p.s, &shape);
    let mut at = 0;
    let mut children = Vec::new();
    for &c in &f.children {
        let part = if shape[axis] == 1 {
            s
        } else {
            let n = usize::try_from(g.dims(c)?[axis].known()?).ok()?;
            at += n;
            g.sliced(s, axis, at - n, at)?
        };
        children.push(if g.is_const(c) { g.times(c, part) } else { g.scaled(c, part)? });
    }
    Some(g.with(f, children))
}
