//! What running an op costs, from the types of what it reads and writes: one model per target.
//!
//! Constants cost nothing to make; what an op reads of them counts. A symbolic or unknown dim counts as [`NOMINAL`].

use super::graph::{Graph, Id};
use super::lang::{Head, Node};
use dialects::ir::Dim;
use serde::{Deserialize, Serialize};

/// What a symbolic or unknown dim counts as: a sequence of a few sentences, a small batch.
pub const NOMINAL: u64 = 64;

/// What a model is made cheap for: an option of the passes that rewrite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// ONNX Runtime on a CPU, as measured.
    #[default]
    OrtCpu,
    /// The memory that is moved.
    Bytes,
}

/// The prices of one target. The unit is the target's own; only ratios matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostModel {
    /// Running an op at all.
    pub launch: u64,
    /// A byte that is read or written.
    pub byte: u64,
    /// A multiplication of a matrix product or a convolution.
    pub multiplication: u64,
    /// A constant operand, and half the price of any other one: what breaks ties between equal ops.
    pub operand: u64,
    /// An element of the result, beyond its bytes, of ops that are slower than memory.
    pub elements: &'static [(&'static str, u64)],
}

impl CostModel {
    /// Bytes, and 1024 of them for an op: for questions about scales, where no target is known.
    pub const BYTES: CostModel =
        CostModel { launch: 1024, byte: 1, multiplication: 0, operand: 0, elements: &[] };

    /// ONNX Runtime 1.31 on one core of a CPU, in picoseconds: the times of ops on 8, 32 k and 512 k floats, without its
    /// graph optimizations. An Add of two tensors takes 1.2 us and 0.3 ns an element.
    pub const ORT_CPU: CostModel = CostModel {
        launch: 1_200_000,
        byte: 30,
        multiplication: 40,
        operand: 10_000,
        elements: &[
            ("Softmax", 500),
            ("Erf", 500),
            ("Gelu", 500),
            ("QuickGelu", 200),
            ("Swish", 200),
            ("RotaryEmbedding", 300),
            ("Exp", 200),
            ("Tanh", 200),
            ("Sigmoid", 150),
            ("Sqrt", 150),
            ("Pow", 200),
            ("Transpose", 400),
            ("Expand", 500),
            ("Concat", 600),
        ],
    };

    /// The model of a target.
    pub fn of_target(target: Target) -> CostModel {
        match target {
            Target::OrtCpu => CostModel::ORT_CPU,
            Target::Bytes => CostModel::BYTES,
        }
    }

    /// What running the e-node costs, its children not counted.
    pub fn of(&self, g: &Graph, class: Id, node: &Node) -> u64 {
        if !matches!(node.head, Head::Op { .. }) || g.is_const(class) {
            return 0;
        }
        let name = g.name(node).rsplit('.').next().unwrap_or("");
        let operands: u64 = node.children.iter().map(|&c| if g.is_const(c) { 1 } else { 2 }).sum();
        let launch = self.launch.saturating_add(self.operand.saturating_mul(operands));
        if matches!(name, "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" | "Shape" | "Size") {
            return launch;
        }
        let result = bytes(g, class);
        let moved = node.children.iter().map(|&c| bytes(g, c)).fold(result, u64::saturating_add);
        let mut cost = launch.saturating_add(moved.saturating_mul(self.byte));
        if matches!(name, "Attention" | "MultiHeadAttention") {
            return cost.saturating_add(self.attention(g, node));
        }
        if matches!(name, "MatMul" | "Gemm" | "Conv") {
            // Every element of the result is a sum over as many products as the weight has rows, or a filter elements.
            let inner = match name {
                "Conv" => node
                    .children
                    .get(1)
                    .and_then(|&w| g.shape(w))
                    .and_then(|s| Some(s.get(1..)?.iter().product::<usize>() as u64)),
                _ => g.dims(node.children[0]).and_then(|d| Some(d.last()?.known()?.unsigned_abs())),
            };
            let inner = inner.unwrap_or(NOMINAL);
            let products = result.saturating_mul(inner);
            // Where no price is known, a product of floats is half a byte.
            cost = cost.saturating_add(match self.multiplication {
                0 => products / 8,
                price => (products / 4).saturating_mul(price),
            });
        }
        cost.saturating_add(elements(g, class, 0).saturating_mul(self.slow(name)))
    }

    /// What an element of an op's result costs beyond its bytes.
    fn slow(&self, name: &str) -> u64 {
        self.elements.iter().find(|(op, _)| *op == name).map_or(0, |e| e.1)
    }

    /// What an attention computes: two products for each pair of a row and a key, and a Softmax of the scores.
    fn attention(&self, g: &Graph, node: &Node) -> u64 {
        let size = |d: Option<&Dim>| d.and_then(Dim::known).map_or(NOMINAL, i64::unsigned_abs).max(1);
        let (q, k) = (node.children[0], g.dims(node.children[1]).unwrap_or_default());
        let width = size(g.dims(q).unwrap_or_default().last());
        let keys = size(k.get(k.len().saturating_sub(2)));
        let heads = g.attrs(node).int("q_num_heads").or(g.attrs(node).int("num_heads"));
        let heads = if k.len() == 3 { heads.map_or(1, i64::unsigned_abs) } else { 1 };
        let products = elements(g, q, 0).saturating_mul(keys).saturating_mul(2);
        let scores = (elements(g, q, 0) / width).saturating_mul(heads).saturating_mul(keys);
        let price = if self.multiplication == 0 {
            products / 2
        } else {
            products.saturating_mul(self.multiplication)
        };
        // A score is written by the product, and read and written by the Softmax.
        let moved = scores.saturating_mul(12 * self.byte + self.slow("Softmax"));
        price.saturating_add(moved)
    }
}

/// The elements of a class. One whose dims are not all known holds as many as what it is a view of.
fn elements(g: &Graph, id: Id, depth: u32) -> u64 {
    let Some(dims) = g.ty(id).dims() else { return NOMINAL * NOMINAL };
    if depth < 8 && dims.contains(&Dim::Unknown) {
        let same = |n: &Node| {
            matches!(g.name(n), "onnx.Reshape" | "onnx.Transpose" | "onnx.Unsqueeze" | "onnx.Squeeze")
        };
        if let Some(n) = g.nodes(id).iter().find(|n| same(n)) {
            return elements(g, n.children[0], depth + 1);
        }
    }
    dims.iter().map(nominal).fold(1, u64::saturating_mul)
}

/// A size, each named one taken as [`NOMINAL`].
fn nominal(d: &Dim) -> u64 {
    let Some(sum) = d.poly() else { return NOMINAL };
    let products = sum.terms().map(|(names, factor)| {
        let factor = u64::try_from(factor).unwrap_or(0);
        names.iter().fold(factor, |n, _| n.saturating_mul(NOMINAL))
    });
    products.fold(0, u64::saturating_add)
}

fn bytes(g: &Graph, id: Id) -> u64 {
    let Some(t) = g.ty(id).as_tensor() else { return NOMINAL };
    match t.dims {
        None => NOMINAL * NOMINAL,
        Some(_) => elements(g, id, 0).saturating_mul(t.elem.bits() as u64) / 8,
    }
}
