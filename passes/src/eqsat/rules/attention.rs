//! Attention: the result is a mixture of the rows of V, so a scale that is constant over positions moves to V.
//!
//! With fewer key-value heads than query heads, V's head `i` serves query heads `i * r .. (i + 1) * r`, and the
//! scale must be the same for them.

use super::{Push, Scaled};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;

/// Rules that move a scale.
pub const PUSHES: &[Push] = &[
    Push { name: "scale-attention", through: &["Attention"], push: attention },
    Push {
        name: "scale-multi-head-attention",
        through: &["com.microsoft.MultiHeadAttention"],
        push: multi_head_attention,
    },
];

/// `attention(q, k, v) * s = attention(q, k, v * s)`.
fn attention(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    // The op's other results show V as it is: with one of them wanted, or with a cache, V must stay.
    let cached = f.children.iter().skip(4).any(|&c| !g.is_absent(c));
    if g.wanted(f) != 1 || cached {
        return None;
    }
    let v = f.children[2];
    let (heads, kv_heads, width) = match p.rank {
        4 => {
            let head = |g: &Graph, id: Id| usize::try_from(g.dims(id)?[1].known()?).ok();
            let width = usize::try_from(g.dims(v)?[3].known()?).ok()?;
            (head(g, f.children[0])?, head(g, v)?, width)
        }
        3 => {
            let attr = |g: &Graph, name| usize::try_from(g.attrs(f).int(name)?).ok();
            let (heads, kv_heads) = (attr(g, "q_num_heads")?, attr(g, "kv_num_heads")?);
            let all = usize::try_from(g.dims(v)?[2].known()?).ok()?;
            (heads, kv_heads, all.checked_div(kv_heads)?)
        }
        _ => return None,
    };
    let repeats = heads.checked_div(kv_heads).filter(|r| r * kv_heads == heads)?;
    // Seen as [kv_heads, repeats, width]: constant over positions and over repeats.
    let shape = g.padded_shape(p.s, p.rank)?;
    let s = match (p.rank, &shape[..]) {
        (4, [1, h, 1, w]) => {
            let s = if *h == 1 { p.s } else { g.reshaped(p.s, &[kv_heads, repeats, *w]) };
            if *h == 1 { g.reshaped(s, &[1, 1, *w]) } else { s }
        }
        (3, [1, 1, n]) if *n == heads * width => g.reshaped(p.s, &[kv_heads, repeats, width]),
        (3, [1, 1, 1]) => p.s,
        _ => return None,
    };
    let s = if g.shape(s)?.len() == 3 { g.constant_along(s, 1)? } else { s };
    let shape = g.shape(s)?;
    let s = match (p.rank, &shape[..]) {
        (4, [h, 1, w]) => g.reshaped(s, &[*h, 1, *w]),
        (3, [h, 1, w]) => g.reshaped(s, &[h * w]),
        _ => s,
    };
    let v = g.scaled(v, s)?;
    Some(g.with_child(f, 2, v))
}

/// The same for the op of ONNX Runtime, where every channel of V is one of the result's.
fn multi_head_attention(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let given = |i: usize| f.children.get(i).copied().filter(|&c| !g.is_absent(c));
    let v = given(2)?;
    // A bias is added to V before, and with a cache, or another result wanted, V is shown as it is.
    let seen = [3, 6, 7].into_iter().any(|i| given(i).is_some());
    if g.wanted(f) != 1 || seen || g.dims(v)?.len() != 3 {
        return None;
    }
    let [1, 1, _] = g.padded_shape(p.s, 3)?[..] else { return None };
    let v = g.scaled(v, p.s)?;
    Some(g.with_child(f, 2, v))
}
