//! Elementwise ops.

use super::{Plain, Push, Scaled};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;

/// Rules that move a scale.
pub const PUSHES: &[Push] = &[
    Push { name: "scale-of-scale", through: &["Mul"], push: scale_of_scale },
    Push { name: "scale-left-factor", through: &["Mul", "Div"], push: |g, p, f| factor(g, p, f, 0) },
    Push { name: "scale-right-factor", through: &["Mul"], push: |g, p, f| factor(g, p, f, 1) },
    Push { name: "scale-sum", through: &["Add", "Sub"], push: sum },
    Push { name: "scale-odd", through: &["Neg"], push: unary },
    Push {
        name: "positive-scale",
        through: &["Relu", "LeakyRelu", "PRelu", "Abs"],
        push: |g, p, f| if g.positive(p.s) { unary(g, p, f) } else { None },
    },
    Push { name: "scale-cast", through: &["Cast"], push: cast },
    Push { name: "scale-where", through: &["Where"], push: choice },
];

/// Other rules.
pub const PLAINS: &[Plain] = &[
    Plain { name: "divide-by-constant", ops: &["Div"], apply: divide },
    Plain { name: "identity", ops: &["Identity"], apply: |_, f| vec![f.children[0]] },
    Plain { name: "cast-to-same", ops: &["Cast"], apply: cast_to_same },
    Plain { name: "shape-of-product", ops: &["Shape", "Size"], apply: shape_of_product },
];

/// `(a * c) * s = a * (c * s)`.
fn scale_of_scale(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let (a, c) = match (g.is_const(f.children[0]), g.is_const(f.children[1])) {
        (false, true) => (f.children[0], f.children[1]),
        (true, false) => (f.children[1], f.children[0]),
        _ => return None,
    };
    let c = g.trimmed(c)?;
    let c = g.times(c, p.s);
    Some(g.op("onnx.Mul", &[a, c]))
}

/// `(a * b) * s = (a * s) * b`, and the same for the other factor and for a quotient's dividend.
fn factor(g: &mut Graph, p: &Scaled, f: &Node, i: usize) -> Option<Id> {
    let other = f.children[1 - i];
    if g.is_const(other) {
        return None;
    }
    let factor = if g.is_const(f.children[i]) {
        // A constant dividend takes the scale whole.
        let c = g.trimmed(f.children[i])?;
        g.is(f, "onnx.Div").then(|| g.times(c, p.s))?
    } else {
        g.scaled(f.children[i], p.s)?
    };
    Some(g.with_child(f, i, factor))
}

/// `(a + b) * s = a * s + b * s`.
fn sum(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let mut terms = Vec::new();
    for &t in &f.children {
        terms.push(if g.is_const(t) {
            let t = g.trimmed(t)?;
            g.times(t, p.s)
        } else {
            g.scaled(t, p.s)?
        });
    }
    Some(g.with(f, terms))
}

/// `f(x) * s = f(x * s)`.
fn unary(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let x = g.scaled(f.children[0], p.s)?;
    Some(g.with_child(f, 0, x))
}

/// `cast(x) * s = cast(x * cast(s))` between float types.
fn cast(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let x = f.children[0];
    let (from, to) = (g.elem(x)?, g.elem(p.x)?);
    if !from.is_float() || !to.is_float() || from == to {
        return None;
    }
    let attr = dialects::ir::Attr::Int(from.onnx().into());
    let s = g.op_with("onnx.Cast", &[("to", attr)].into_iter().collect(), &[p.s]);
    let x = g.scaled(x, s)?;
    Some(g.with_child(f, 0, x))
}

/// `where(c, a, b) * s = where(c, a * s, b * s)`; a zero stays the zero it is.
fn choice(g: &mut Graph, p: &Scaled, f: &Node) -> Option<Id> {
    let mut children = vec![f.children[0]];
    for &branch in &f.children[1..] {
        children.push(if g.is_const(branch) {
            if g.zero(branch) && g.finite(p.s) {
                branch
            } else {
                let c = g.trimmed(branch)?;
                g.times(c, p.s)
            }
        } else {
            g.scaled(branch, p.s)?
        });
    }
    Some(g.with(f, children))
}

/// `x / c = x * (1 / c)`.
fn divide(g: &mut Graph, f: &Node) -> Vec<Id> {
    let (x, c) = (f.children[0], f.children[1]);
    if g.is_const(x) || !g.is_const(c) || !g.elem(c).is_some_and(|e| e.is_float()) {
        return Vec::new();
    }
    let c = g.op("onnx.Reciprocal", &[c]);
    vec![g.op("onnx.Mul", &[x, c])]
}

/// A cast to the type that is there already is nothing.
pub(super) fn cast_to_same(g: &mut Graph, f: &Node) -> Vec<Id> {
    let to = g.attrs(f).int("to");
    let same = g.elem(f.children[0]).is_some_and(|e| Some(i64::from(e.onnx())) == to);
    if same { vec![f.children[0]] } else { Vec::new() }
}

/// `shape(x) = shape(x * s)` for every product that keeps the shape of `x`.
fn shape_of_product(g: &mut Graph, f: &Node) -> Vec<Id> {
    let x = g.find(f.children[0]);
    let parents: Vec<Id> = g.parents(x);
    let mut out = Vec::new();
    for p in parents {
        for node in g.nodes_of(p, "onnx.Mul") {
            let keeps = super::products(g, &node).iter().any(|s| g.find(s.x) == x);
            if keeps {
                out.push(g.with_child(f, 0, p));
            }
        }
    }
    out
}
