//! The e-graph's language and its analysis.
//!
//! An e-node is (op name, interned attributes, children). Leaves are values defined outside the window, constants
//! of the module (small ones by content), and symbolic scales. The analysis of a class is the [`Fact`] that type
//! inference gives, and whether the class is made only of constants: such a class costs nothing at run time, and
//! nothing in here reads or computes its elements.

use dialects::ir::{Attrs, ConstData, ConstId, Dim, Elem, Module, OpName, Region, Type, Value, infer};
use dialects::ops::{Fact, InferCx, OpError, Ops};
use dialects::tensor::Tensor;
use egg::{Analysis, DidMerge, Id, Language};
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Integers of up to this many elements are compared by content.
const LITERAL: u64 = 64;

/// Whether a constant is compared by content: a number, or a list of integers such as ops take for axes and sizes. Weights
/// of equal contents stay apart, since each may change on its own.
pub fn is_literal(c: &ConstData) -> bool {
    match c.elem {
        Elem::String => false,
        e if e.is_float() => c.count() == 1,
        _ => c.count() <= LITERAL,
    }
}

/// What an e-node does. Numbers are places in the tables of [`World`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Head {
    /// An operand that is left out.
    Absent,
    /// A value that the window does not define.
    Input(u32),
    /// A large constant.
    Const(u32),
    /// A small constant.
    Literal(u32),
    /// A symbolic scale: positive, finite, one number per channel.
    Scale(u32),
    /// Result number `result` of an op of which `wanted` results are wanted.
    Op {
        /// The op's name.
        name: u32,
        /// Its attributes.
        attrs: u32,
        /// Which result.
        result: u32,
        /// How many results of the op somebody wants.
        wanted: u32,
        /// How many results the op has, those that nobody wants included.
        outputs: u32,
    },
}

/// An e-node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// What it does.
    pub head: Head,
    /// On what.
    pub children: Vec<Id>,
}

impl Node {
    /// Another result of the same op.
    pub fn result(&self, result: u32) -> Node {
        let head = match self.head {
            Head::Op { name, attrs, wanted, outputs, .. } => {
                Head::Op { name, attrs, result, wanted, outputs }
            }
            leaf => leaf,
        };
        Node { head, children: self.children.clone() }
    }
}

impl Language for Node {
    type Discriminant = Head;

    fn discriminant(&self) -> Head {
        self.head
    }

    fn matches(&self, other: &Self) -> bool {
        self.head == other.head && self.children.len() == other.children.len()
    }

    fn children(&self) -> &[Id] {
        &self.children
    }

    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.children
    }
}

/// What is known of a class.
#[derive(Clone, Debug)]
pub struct Known {
    /// Type and small contents.
    pub fact: Fact,
    /// Whether the class is made only of constants.
    pub konst: bool,
}

/// A small constant and the value of the module that it came from, if it came from one.
#[derive(Clone, Debug)]
pub struct Literal {
    /// The elements.
    pub tensor: Tensor,
    /// A value of the module that holds it.
    pub value: Option<Value>,
}

/// A symbolic scale: channel `i` has the number of class `classes[i]`, which is positive and finite.
#[derive(Clone, Debug)]
pub struct Scale {
    /// The classes, `[K]`.
    pub classes: Arc<[u32]>,
    /// The element type.
    pub elem: Elem,
}

/// The analysis: the module under study and the tables that e-nodes point into.
pub struct World<'a> {
    /// The module.
    pub m: &'a Module,
    /// All known ops.
    pub ops: &'a Ops,
    names: Vec<OpName>,
    name_ids: HashMap<OpName, u32>,
    attrs: Vec<Attrs>,
    /// Inputs of the model, which are there from the start.
    pub args: &'a [Value],
    /// Constants that other ops of the module read too.
    pub shared: Arc<HashSet<ConstId>>,
    /// Large constants whose elements were asked for.
    pub looked: RefCell<BTreeSet<u32>>,
    /// Values defined outside the window.
    pub inputs: Vec<Value>,
    /// Large constants.
    pub consts: Vec<(ConstId, Value)>,
    /// Small constants.
    pub literals: Vec<Literal>,
    /// Symbolic scales.
    pub scales: Vec<Scale>,
}

impl<'a> World<'a> {
    /// Empty tables.
    pub fn new(m: &'a Module, ops: &'a Ops) -> Self {
        World {
            m,
            ops,
            names: Vec::new(),
            name_ids: HashMap::new(),
            attrs: vec![Attrs::default()],
            args: &m.regions[m.top].args,
            shared: Arc::default(),
            looked: RefCell::default(),
            inputs: Vec::new(),
            consts: Vec::new(),
            literals: Vec::new(),
            scales: Vec::new(),
        }
    }

    /// The number of a name.
    pub fn name_id(&mut self, name: &OpName) -> u32 {
        if let Some(&id) = self.name_ids.get(name) {
            return id;
        }
        let id = self.names.len() as u32;
        self.names.push(name.clone());
        self.name_ids.insert(name.clone(), id);
        id
    }

    /// The number of an attribute set; equal sets share one. Windows are small: a walk finds it.
    pub fn attrs_id(&mut self, attrs: &Attrs) -> u32 {
        let found = self.attrs.iter().position(|a| a == attrs);
        found.unwrap_or_else(|| {
            self.attrs.push(attrs.clone());
            self.attrs.len() - 1
        }) as u32
    }

    /// The name of an op's e-node; `None` for a leaf.
    pub fn name(&self, head: Head) -> Option<&OpName> {
        match head {
            Head::Op { name, .. } => Some(&self.names[name as usize]),
            _ => None,
        }
    }

    /// The attributes of an op's e-node; none for a leaf.
    pub fn attrs(&self, head: Head) -> &Attrs {
        match head {
            Head::Op { attrs, .. } => &self.attrs[attrs as usize],
            _ => &self.attrs[0],
        }
    }

    /// The number of a literal; equal ones share one.
    pub fn literal_id(&mut self, tensor: Tensor, value: Option<Value>) -> u32 {
        let found = self.literals.iter().position(|l| l.tensor == tensor);
        found.unwrap_or_else(|| {
            self.literals.push(Literal { tensor, value });
            self.literals.len() - 1
        }) as u32
    }

    fn leaf(&self, head: Head) -> Known {
        let m = self.m;
        match head {
            Head::Input(i) => {
                let data = &m.values[self.inputs[i as usize]];
                Known { fact: Fact { ty: data.ty.clone(), sym: data.sym.clone(), konst: None }, konst: false }
            }
            Head::Const(i) => {
                Known { fact: Fact::of_const(self.consts[i as usize].0, &m.consts), konst: true }
            }
            Head::Literal(i) => {
                let t = &self.literals[i as usize].tensor;
                let ints = (t.elem().is_int() && t.rank() <= 1).then(|| t.to_i64().ok()).flatten();
                let sym = ints.map(|v| v.iter().map(|&n| Dim::Known(n)).collect());
                let ty = Type::of_shape(t.elem(), t.shape());
                let konst = self.literals[i as usize].value.and_then(|v| m.const_of(v));
                Known { fact: Fact { ty, sym, konst }, konst: true }
            }
            Head::Scale(i) => {
                let s = &self.scales[i as usize];
                Known { fact: Type::of_shape(s.elem, &[s.classes.len()]).into(), konst: true }
            }
            Head::Absent | Head::Op { .. } => Known { fact: Fact::default(), konst: true },
        }
    }
}

impl Analysis<Node> for World<'_> {
    type Data = Known;

    fn make(egraph: &mut egg::EGraph<Node, Self>, node: &Node, _: Id) -> Known {
        let world = &egraph.analysis;
        let Head::Op { result, outputs, .. } = node.head else { return world.leaf(node.head) };
        let absent = |id: Id| egraph[id].nodes.iter().any(|n| n.head == Head::Absent);
        let inputs: Vec<Option<Fact>> =
            node.children.iter().map(|&c| (!absent(c)).then(|| egraph[c].data.fact.clone())).collect();
        let name = world.name(node.head).expect("an op has a name");
        // Quantized weights stay quantized, and with them whatever is computed from them.
        let konst =
            !crate::const_fold::is_quantization(name) && node.children.iter().all(|&c| egraph[c].data.konst);
        let region = |_: Region, _: &[Fact]| Err(OpError::Unsupported("a nested graph".into()));
        let cx = InferCx {
            name,
            attrs: world.attrs(node.head),
            opset: world.m.opset(name.dialect()),
            inputs: &inputs,
            outputs: outputs as usize,
            consts: &world.m.consts,
            region: &region,
        };
        // What cannot be inferred stays unknown, and rules that need it do not fire.
        let facts = infer::infer_op(world.ops, &cx).unwrap_or_default();
        Known { fact: facts.into_iter().nth(result as usize).unwrap_or_default(), konst }
    }

    fn merge(&mut self, a: &mut Known, b: Known) -> DidMerge {
        let before = (a.fact.ty.clone(), a.fact.sym.is_some(), a.konst);
        let ty = a.fact.ty.unify(&b.fact.ty).unwrap_or_else(|| a.fact.ty.clone());
        let b_differs = ty != b.fact.ty || a.konst != b.konst || a.fact.sym != b.fact.sym;
        a.fact.ty = ty;
        a.fact.sym = a.fact.sym.take().or(b.fact.sym);
        a.fact.konst = a.fact.konst.or(b.fact.konst);
        a.konst |= b.konst;
        DidMerge(before != (a.fact.ty.clone(), a.fact.sym.is_some(), a.konst), b_differs)
    }
}
