//! Normalizations: a scale on the result is a scale on gain and bias.
//!
//! The long forms (Pow, ReduceMean, Sqrt, Div, Mul) need no rule of their own: their last Mul is the gain.

use super::{Push, Scaled};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;

/// Rules that move a scale.
pub const PUSHES: &[Push] = &[
    Push {
        name: "scale-norm",
        through: &["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"],
        push: norm,
    },
    Push { name: "scale-batch-norm", through: &["BatchNormalization"], push: batch_norm },
];

/// `norm(x, g, b) * s = norm(x, g * s, b * s)` for `s` along the normalized dims.
fn norm(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    if !g.fits(p.s, *f.children.get(1)?) {
        return None;
    }
    let mut children = vec![f.children[0]];
    for &c in &f.children[1..] {
        children.push(if g.is_absent(c) {
            c
        } else if g.is_const(c) {
            g.times(c, p.s)
        } else {
            g.scaled(c, p.s)?
        });
    }
    Some(g.with(f, children))
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
