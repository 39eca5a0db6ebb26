//! Exact rewrites: equalities over the reals, grouped by topic, one small function each.
//!
//! Most say how a scale moves one op upstream: `Mul(F(x), s) = F(Mul(x, s'))` for a constant `s`. Those are
//! [`Push`] rules; the engine finds the product, in either operand order, and the op `F` behind it. The rest are
//! [`Plain`] rules on one e-node. A rule gives classes that are equal to the class it matched.
//!
//! A rule never makes a worse term on purpose, and none states commutativity or associativity. What is *not* an
//! equality has no rule: a scale does not pass Sigmoid, Softmax, Tanh or Gelu.

mod attention;
mod elementwise;
mod linear;
mod movement;
mod norm;

use super::graph::{Graph, Id};
use super::lang::Node;

/// A product `out = Mul(x, s)` with a constant `s` that keeps the shape of `x`.
pub struct Scaled {
    /// What is scaled.
    pub x: Id,
    /// The scale, leading ones trimmed.
    pub s: Id,
    /// The dims of the product.
    pub rank: usize,
}

/// How a scale moves upstream through an op.
pub struct Push {
    /// The rule's name.
    pub name: &'static str,
    /// The ops it moves through, without the `onnx.` in front.
    pub through: &'static [&'static str],
    /// Gives terms equal to the product, where the product's `x` is the e-node.
    pub push: fn(&mut Graph, &Scaled, &Node) -> Option<Id>,
}

/// An equality of one e-node.
pub struct Plain {
    /// The rule's name.
    pub name: &'static str,
    /// The ops it is about, without the `onnx.` in front.
    pub ops: &'static [&'static str],
    /// Gives terms equal to the e-node.
    pub apply: fn(&mut Graph, &Node) -> Vec<Id>,
}

/// All rules that move scales.
pub fn pushes() -> impl Iterator<Item = &'static Push> {
    [elementwise::PUSHES, linear::PUSHES, movement::PUSHES, norm::PUSHES, attention::PUSHES]
        .into_iter()
        .flatten()
}

/// All other rules.
pub fn plains() -> impl Iterator<Item = &'static Plain> {
    [elementwise::PLAINS, linear::PLAINS, movement::PLAINS].into_iter().flatten()
}

/// An op's name as rules write it: without the `onnx.` in front.
pub fn short(name: &str) -> &str {
    name.strip_prefix("onnx.").unwrap_or(name)
}

/// Which operands of an op a scale on its result may move to; empty for an op that lets none through.
pub fn scale_operands(op: &str, operands: usize) -> Vec<usize> {
    match op {
        "Mul" | "Add" | "Sub" | "Concat" => (0..operands).collect(),
        "Div" => vec![0],
        "Where" => vec![1, 2],
        "MatMul" => vec![0, 1],
        "Gemm" => vec![2],
        "Attention" => vec![2],
        "PRelu" | "AveragePool" | "GlobalAveragePool" | "MaxPool" | "GlobalMaxPool" => vec![0],
        "Neg" | "Relu" | "LeakyRelu" | "Abs" | "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze"
        | "Flatten" | "Transpose" | "Expand" | "Slice" | "Split" => vec![0],
        _ => Vec::new(),
    }
}

/// Whether an op can take a scale into a constant of its own.
pub fn takes_scale(op: &str) -> bool {
    matches!(
        op,
        "Mul"
            | "Div"
            | "MatMul"
            | "Gemm"
            | "Conv"
            | "LayerNormalization"
            | "RMSNormalization"
            | "SimplifiedLayerNormalization"
            | "BatchNormalization"
            | "com.microsoft.SkipLayerNormalization"
            | "com.microsoft.SkipSimplifiedLayerNormalization"
    )
}

/// The products with a constant that an e-node is, in either operand order.
pub fn products(g: &mut Graph, node: &Node) -> Vec<Scaled> {
    if !g.is(node, "onnx.Mul") || node.children.len() != 2 {
        return Vec::new();
    }
    let (a, b) = (node.children[0], node.children[1]);
    [(a, b), (b, a)]
        .into_iter()
        .filter_map(|(x, s)| {
            if !g.is_const(s) || g.is_const(x) || !g.fits(s, x) {
                return None;
            }
            let rank = g.dims(x)?.len();
            Some(Scaled { x, s: g.trimmed(s)?, rank })
        })
        .collect()
}
