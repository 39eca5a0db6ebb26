//! Heads: attention and rotary embedding read heads as `[batch, heads, rows, width]`, or side by side in
//! `[batch, rows, heads * width]`, which is how linears write and read them. Side by side nothing is transposed. Fewer
//! heads of keys and values than of queries are repeated by the op itself.
//!
//! The rules write the ops on heads that lie side by side; that the views and transposes around them then cancel is for
//! those of [`views`](super::views).

use super::{Plain, views};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;
use dialects::ir::{Attr, Attrs, Dim};

/// Rules.
pub const PLAINS: &[Plain] = &[
    Plain { name: "attention-side-by-side", ops: &["Reshape"], apply: attention_side_by_side },
    Plain { name: "attention-repeats-heads", ops: &["Attention"], apply: attention_repeats_heads },
    Plain { name: "repeated-side-by-side", ops: &["Reshape"], apply: repeated_side_by_side },
    Plain {
        name: "rotary-side-by-side",
        ops: &["RotaryEmbedding", "com.microsoft.RotaryEmbedding"],
        apply: rotary_side_by_side,
    },
];

/// Which dims change places between the two ways in which heads lie.
const SWAP: [i64; 4] = [0, 2, 1, 3];

fn swapped(g: &mut Graph, x: Id) -> Id {
    let attrs: Attrs = [("perm", Attr::Ints(SWAP.to_vec()))].into_iter().collect();
    g.op_with("onnx.Transpose", &attrs, &[x])
}

/// Heads and width of `[batch, heads, rows, width]`.
fn heads(g: &Graph, x: Id) -> Option<(i64, i64)> {
    match &g.dims(x)?[..] {
        [_, Dim::Known(heads), _, Dim::Known(width)] => Some((*heads, *width)),
        _ => None,
    }
}

/// `[batch, heads, rows, width]` as `[batch, rows, heads * width]`.
fn joined(g: &mut Graph, x: Id) -> Option<Id> {
    let (heads, width) = heads(g, x)?;
    let x = swapped(g, x);
    let to = g.int_literal(&[0, 0, heads.checked_mul(width)?]);
    Some(g.op("onnx.Reshape", &[x, to]))
}

/// The e-nodes of which a Reshape to `[batch, rows, all]` joins the heads: what is transposed, and what `all` is.
fn joins(g: &Graph, f: &Node) -> Option<(Vec<Id>, i64)> {
    let Dim::Known(all) = *g.dims(g.class(f)?)?.get(2)? else { return None };
    let is_swap = |t: &Node| g.attrs(t).ints("perm") == Some(&SWAP[..]);
    let transposes = g.nodes_of(f.children[0], "onnx.Transpose").into_iter().filter(is_swap);
    let found = transposes.map(|t| t.children[0]).filter(|&x| {
        let whole = heads(g, x).is_some_and(|(n, width)| n.checked_mul(width) == Some(all));
        let dims = g.class(f).and_then(|c| g.dims(c)).zip(g.dims(x));
        whole && dims.is_some_and(|(to, x)| to.len() == 3 && to[0].same(&x[0]) && to[1].same(&x[2]))
    });
    Some((found.collect(), all))
}

/// `join(attention(q, k, v)) = attention(join(q), join(k), join(v))`.
fn attention_side_by_side(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some((found, _)) = joins(g, f) else { return Vec::new() };
    let attentions: Vec<Node> = found.into_iter().flat_map(|x| g.nodes_of(x, "onnx.Attention")).collect();
    let mut out = Vec::new();
    for a in attentions {
        let cached = a.children.iter().skip(4).any(|&c| !g.is_absent(c));
        let counts = [a.children[0], a.children[1]].map(|x| heads(g, x).map(|h| h.0));
        let ([Some(q), Some(kv)], 1, false) = (counts, g.wanted(&a), cached) else { continue };
        let mut attrs = g.attrs(&a).clone();
        attrs.set("q_num_heads", Attr::Int(q));
        attrs.set("kv_num_heads", Attr::Int(kv));
        let rows: Option<Vec<Id>> = a.children[..3].iter().map(|&x| joined(g, x)).collect();
        let Some(mut children) = rows else { continue };
        children.extend(&a.children[3..]);
        out.push(g.op_with("onnx.Attention", &attrs, &children));
    }
    out
}

/// What `[batch, heads * times, rows, width]` repeats each head of, and how often.
fn repeated(g: &mut Graph, x: Id) -> Option<(Id, i64)> {
    let (all, width) = heads(g, x)?;
    let rows = g.dims(x)?;
    for view in g.nodes_of(x, "onnx.Reshape") {
        for e in g.nodes_of(view.children[0], "onnx.Expand") {
            let (Some(to), Some(from)) = (g.dims(view.children[0]), g.dims(e.children[0])) else { continue };
            let [batch, Dim::Known(heads), Dim::Known(times), t, Dim::Known(w)] = &to[..] else { continue };
            let source = [batch.clone(), Dim::Known(*heads), Dim::Known(1), t.clone(), Dim::Known(*w)];
            let same = views::same_dims(&from, &source) && batch.same(&rows[0]) && t.same(&rows[2]);
            if same && heads.checked_mul(*times) == Some(all) && *w == width {
                return Some((views::with_axes(g, "onnx.Squeeze", e.children[0], &[2]), *times));
            }
        }
    }
    None
}

/// Keys and values of which each head is repeated as often need not be.
fn attention_repeats_heads(g: &mut Graph, f: &Node) -> Vec<Id> {
    // The op's other results show keys and values as they are.
    if g.wanted(f) != 1 || f.children.iter().skip(4).any(|&c| !g.is_absent(c)) {
        return Vec::new();
    }
    let (Some(k), Some(v)) = (repeated(g, f.children[1]), repeated(g, f.children[2])) else {
        return Vec::new();
    };
    if k.1 != v.1 {
        return Vec::new();
    }
    let mut children = f.children.clone();
    (children[1], children[2]) = (k.0, v.0);
    vec![g.with(f, children)]
}

/// Heads that are repeated and then joined are joined and then repeated: rows need not be moved as often.
fn repeated_side_by_side(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some((found, all)) = joins(g, f) else { return Vec::new() };
    let mut out = Vec::new();
    for x in found {
        let Some((source, times)) = repeated(g, x) else { continue };
        let rows = swapped(g, source);
        let one = views::with_axes(g, "onnx.Unsqueeze", rows, &[3]);
        let sizes = g.int_literal(&[1, 1, 1, times, 1]);
        let each = g.op("onnx.Expand", &[one, sizes]);
        let to = g.int_literal(&[0, 0, all]);
        out.push(g.op("onnx.Reshape", &[each, to]));
    }
    out
}

/// `join(rotary(x)) = rotary(join(x))`, seen from the heads.
fn rotary_side_by_side(g: &mut Graph, f: &Node) -> Vec<Id> {
    let x = f.children[0];
    let Some((count, width)) = heads(g, x) else { return Vec::new() };
    let Some(rows) = joined(g, x) else { return Vec::new() };
    let mut attrs = g.attrs(f).clone();
    attrs.set("num_heads", Attr::Int(count));
    let mut children = f.children.clone();
    children[0] = rows;
    let name = g.name(f).to_string();
    let turned = g.op_with(&name, &attrs, &children);
    let to = g.int_literal(&[0, 0, count, width]);
    let apart = g.op("onnx.Reshape", &[turned, to]);
    vec![swapped(g, apart)]
}
