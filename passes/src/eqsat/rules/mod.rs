//! Exact rewrites: equalities over the reals, grouped by topic, one small function each.
//!
//! Many say how a scale moves one op upstream: `Mul(F(x), s) = F(Mul(x, s'))` for a constant `s`. Those are
//! [`Push`] rules; the engine finds the product, in either operand order, and the op `F` behind it. Every other rule is
//! a [`Rule`] on one e-node: a [`Plain`] function here, or text. A rule gives classes that are equal to the class it
//! matched. Which rules saturate a window is a [`RuleSet`].
//!
//! A rule never makes a worse term on purpose, and none states commutativity or associativity. What is *not* an
//! equality has no rule: a scale does not pass Sigmoid, Softmax, Tanh or Gelu.

mod attention;
mod canonical;
#[cfg(test)]
mod cases;
mod contents;
mod elementwise;
#[cfg(test)]
mod fires;
mod heads;
mod linear;
mod movement;
mod norm;
mod rotation;
mod views;

use super::graph::{Graph, Id};
use super::lang::Node;
use super::qrw::{self, TextRule, UserRules};
use dialects::ops::Ops;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

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

/// An equality whose left side is one e-node and what is below it.
pub trait Rule: Send + Sync {
    /// The rule's name, as reports print it.
    fn name(&self) -> &str;
    /// The ops that the left side may be, without the `onnx.` in front.
    fn heads(&self) -> Vec<&str>;
    /// Gives terms equal to the e-node.
    fn apply(&self, g: &mut Graph, node: &Node) -> Vec<Id>;
}

/// A rule that is a function.
#[derive(Clone, Copy)]
pub struct Plain {
    /// The rule's name.
    pub name: &'static str,
    /// The ops it is about, without the `onnx.` in front.
    pub ops: &'static [&'static str],
    /// Gives terms equal to the e-node.
    pub apply: fn(&mut Graph, &Node) -> Vec<Id>,
}

impl Rule for Plain {
    fn name(&self) -> &str {
        self.name
    }

    fn heads(&self) -> Vec<&str> {
        self.ops.to_vec()
    }

    fn apply(&self, g: &mut Graph, node: &Node) -> Vec<Id> {
        (self.apply)(g, node)
    }
}

/// The rules that saturate a window.
#[derive(Clone, Default)]
pub struct RuleSet {
    pushes: Vec<&'static Push>,
    rules: Vec<Arc<dyn Rule>>,
    /// For each op, without the `onnx.` in front: the places in `rules` of those about it.
    heads: BTreeMap<String, Vec<usize>>,
}

impl RuleSet {
    /// Moves scales per channel into constants: for [`place`](super::place) and [`fold`](super::fold).
    pub fn scales() -> &'static RuleSet {
        static SET: LazyLock<RuleSet> = LazyLock::new(|| {
            let pushes =
                [elementwise::PUSHES, linear::PUSHES, movement::PUSHES, norm::PUSHES, attention::PUSHES];
            let pushes = pushes.into_iter().flatten().collect();
            let set = RuleSet { pushes, ..RuleSet::default() };
            set.with(plains(&[elementwise::PLAINS, linear::PLAINS, movement::PLAINS]))
        });
        &SET
    }

    /// Brings a graph into the form that other passes expect.
    pub fn canonical() -> &'static RuleSet {
        static SET: LazyLock<RuleSet> = LazyLock::new(|| {
            RuleSet::default().with(plains(&[canonical::PLAINS, contents::PLAINS, views::PLAINS]))
        });
        &SET
    }

    /// Replaces long forms by the ops that say the same, for models that run on `profile`. The canonical rules are part of
    /// it: what an op makes needless, views above all, goes with the long form.
    pub fn fuse(profile: &str) -> RuleSet {
        RuleSet::canonical().clone().with(plains(&[heads::PLAINS])).with(for_profile(fuse_rules(), profile))
    }

    /// These rules and those that a user gave, for models that run on `profile`.
    pub fn with_user(self, rules: &UserRules, profile: &str) -> RuleSet {
        self.with(for_profile(&rules.0, profile))
    }

    /// Moves orthogonal rotations, and what stands between them and weights, into constants: for
    /// [`rotate`](super::rotate).
    pub fn rotations() -> &'static RuleSet {
        static SET: LazyLock<RuleSet> = LazyLock::new(|| {
            let set = RuleSet { pushes: linear::PUSHES.iter().collect(), ..RuleSet::default() };
            set.with(plains(&[elementwise::PLAINS, linear::PLAINS, rotation::PLAINS]))
        });
        &SET
    }

    /// These rules and more of them.
    pub fn with(mut self, more: impl IntoIterator<Item = Arc<dyn Rule>>) -> RuleSet {
        for rule in more {
            for head in rule.heads() {
                self.heads.entry(short(head).to_string()).or_default().push(self.rules.len());
            }
            self.rules.push(rule);
        }
        self
    }

    /// The rules about the op `full`, each with its number.
    pub fn about(&self, full: &str) -> impl Iterator<Item = (usize, &dyn Rule)> {
        let numbers = self.heads.get(short(full)).into_iter().flatten();
        numbers.map(|&i| (i, &*self.rules[i]))
    }

    /// The rules that move a scale through the op `full`, each with its number.
    pub fn through<'s>(&'s self, full: &'s str) -> impl Iterator<Item = (usize, &'static Push)> + 's {
        let numbered = self.pushes.iter().copied().enumerate();
        numbered.filter(move |(_, p)| p.through.contains(&short(full)))
    }

    /// The names of all rules.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.pushes.iter().map(|p| p.name).chain(self.rules.iter().map(|r| r.name()))
    }

    /// The name of every rule, with the ops it is about.
    pub fn listed(&self) -> Vec<(String, Vec<String>)> {
        let text = |ops: &[&str]| ops.iter().map(|op| op.to_string()).collect();
        let pushes = self.pushes.iter().map(|p| (p.name.to_string(), text(p.through)));
        pushes.chain(self.rules.iter().map(|r| (r.name().to_string(), text(&r.heads())))).collect()
    }

    /// The rules of this name alone.
    #[cfg(test)]
    pub fn only(&self, name: &str) -> RuleSet {
        let pushes = self.pushes.iter().copied().filter(|p| p.name == name).collect();
        let rules: Vec<_> = self.rules.iter().filter(|r| r.name() == name).cloned().collect();
        RuleSet { pushes, ..RuleSet::default() }.with(rules)
    }

    /// Whether any rule moves scales.
    pub fn moves_scales(&self) -> bool {
        !self.pushes.is_empty()
    }
}

/// The rules of `fuse.qrw`.
pub fn fuse_rules() -> &'static [Arc<TextRule>] {
    static RULES: LazyLock<Vec<Arc<TextRule>>> = LazyLock::new(|| {
        let rules = qrw::parse::parse(include_str!("fuse.qrw"), &Ops::standard());
        rules.expect("a test reads the file").into_iter().map(Arc::new).collect()
    });
    &RULES
}

/// Those of some rules that are for models that run on `profile`.
pub fn for_profile<'r>(
    rules: &'r [Arc<TextRule>],
    profile: &'r str,
) -> impl Iterator<Item = Arc<dyn Rule>> + 'r {
    let fits = move |r: &&Arc<TextRule>| r.profiles.is_empty() || r.profiles.iter().any(|p| p == profile);
    rules.iter().filter(fits).map(|r| r.clone() as Arc<dyn Rule>)
}

fn plains(lists: &[&[Plain]]) -> Vec<Arc<dyn Rule>> {
    lists.iter().copied().flatten().map(|&p| Arc::new(p) as Arc<dyn Rule>).collect()
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
        "Attention" | "com.microsoft.MultiHeadAttention" => vec![2],
        "PRelu" | "AveragePool" | "GlobalAveragePool" | "MaxPool" | "GlobalMaxPool" => vec![0],
        "Neg" | "Relu" | "LeakyRelu" | "Abs" | "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze"
        | "Flatten" | "Transpose" | "Expand" | "Slice" | "Split" => vec![0],
        _ => Vec::new(),
    }
}

/// Which operands of an op a rotation of its result may move to; empty for an op that lets none through, or takes it.
pub fn rotation_operands(op: &str, operands: usize) -> Vec<usize> {
    match op {
        "Add" | "Sub" | "Mul" | "Concat" => (0..operands).collect(),
        "Div" | "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Expand"
        | "Slice" | "Transpose" => vec![0],
        _ => Vec::new(),
    }
}

/// Whether an op can take a rotation of its result into a constant of its own, its operand of the number given.
pub fn takes_rotation(op: &str) -> Option<usize> {
    match op {
        "MatMul" | "Gemm" => Some(1),
        "Gather" => Some(0),
        _ => None,
    }
}

/// Whether an op may stand between a rotated value and the weights that undo the rotation: it moves rows, scales them, or
/// needs only their length, or only the shape.
pub fn follows_rotation(op: &str) -> bool {
    let norm = [
        "Pow",
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL2",
        "Sqrt",
        "Reciprocal",
        "Shape",
        "Size",
    ];
    norm.contains(&op)
        || matches!(op, "RMSNormalization" | "SimplifiedLayerNormalization")
        || !rotation_operands(op, 1).is_empty()
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
