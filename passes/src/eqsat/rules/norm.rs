//! Normalizations: a scale on the result is a scale on gain and bias.
//!
//! The long forms (Pow, ReduceMean, Sqrt, Div, Mul) need no rule of their own: their last Mul is the gain.

use super::{Push, Scaled};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;

const SKIP: &str = "com.microsoft.SkipLayerNormalization";
const SKIP_SIMPLIFIED: &str = "com.microsoft.SkipSimplifiedLayerNormalization";

/// Rules that move a scale.
pub const PUSHES: &[Push] = &[
    Push {
        name: "scale-norm",
        through: &["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"],
        push: norm,
    },
    Push { name: "scale-skip-norm", through: &[SKIP, SKIP_SIMPLIFIED], push: skip_norm },
    Push { name: "scale-batch-norm", through: &["BatchNormalization"], push: batch_norm },
];

/// `norm(x, g, b) * s = norm(x, g * s, b * s)` for `s` along the normalized dims.
fn norm(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let children = scaled_from(g, p, f, 1, f.children.len())?;
    Some(g.with(f, children))
}

/// The children of `f` with `from..to` scaled, the first of which `s` must fit.
fn scaled_from(g: &mut Graph, p: &Scaled, f: &Node, from: usize, to: usize) -> Option<Vec<Id>> {
    if !g.fits(p.s, *f.children.get(from)?) {
        return None;
    }
    let mut children = f.children.clone();
    for c in children.iter_mut().take(to).skip(from) {
        if g.is_absent(*c) {
            continue;
        }
        *c = if g.is_const(*c) { g.times(*c, p.s) } else { g.scaled(*c, p.s)? };
    }
    Some(children)
}

/// `norm(x + y, g, b) * s = norm(x + y, g * s, b * s)`. The op's other results, the sum and its statistics, do not depend
/// on gain and offset.
fn skip_norm(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let results = g.results(f);
    if results.first() != Some(&Some(g.find(p.x))) {
        return None;
    }
    // The gain, and the offset of the form that has one; the last operand is a bias of the sum.
    let end = if g.is(f, SKIP) { 4 } else { 3 };
    let children = scaled_from(g, p, f, 2, end)?;
    let scaled = g.with(f, children.clone());
    for (i, old) in results.into_iter().enumerate().skip(1) {
        if let Some(old) = old {
            let same = g.with(&f.result(i as u32), children.clone());
            g.union(old, &f.result(i as u32), same);
        }
    }
    Some(scaled)
}

/// `bn(x, g, b, mean, var) * s = bn(x, g * s, b * s, mean, var)` for `s` along the channels.
fn batch_norm(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let shape = g.padded_shape(p.s, p.rank)?;
    if shape.len() < 2 || shape.iter().enumerate().any(|(i, &n)| i != 1 && n != 1) || f.children.len() != 5 {
        return None;
    }
    let s = g.reshaped(p.s, &[shape[1]]);
    let gain = g.times(f.children[1], s);
    let bias = g.times(f.children[2], s);
    (g.is_const(f.children[1]) && g.is_const(f.children[2]))
        .then(|| g.with(f, vec![f.children[0], gain, bias, f.children[3], f.children[4]]))
}
