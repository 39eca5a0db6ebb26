//! The e-graph as rules see it: questions about classes, and ways to build terms.

use super::facts::{Pattern, Rotation, Wish};
use super::lang::{Head, Known, Node, Scale, World};
use dialects::ir::{Attrs, ConstId, Dim, Elem, Module, Op, OpName, Type, Value};
use dialects::ops::Ops;
use dialects::tensor::Tensor;
pub use egg::Id;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// An e-graph over one window.
pub struct Graph<'a> {
    pub(super) eg: egg::EGraph<Node, World<'a>>,
    pub(super) patterns: RefCell<HashMap<Id, Option<Arc<Pattern>>>>,
    pub(super) wishes: RefCell<Vec<Wish>>,
    /// Constants that are known to be orthogonal.
    pub(super) rotations: Vec<Rotation>,
    /// Each value of the module that is in the graph, in the order they were added: its class and its e-node.
    pub(super) values: Vec<(Value, Id, Node)>,
    /// The rule that is being applied.
    pub(super) rule: String,
    /// Every equality that was news, in order.
    pub(super) unions: Vec<Union>,
    /// The e-node that was added last.
    last: Option<Node>,
    /// Values that are given together with the op that computes them.
    context: Vec<Id>,
}

/// An equality that a rule stated.
#[derive(Clone, Debug)]
pub struct Union {
    /// The rule's name.
    pub rule: String,
    /// The e-node that it matched.
    pub from: Node,
    /// An e-node of the class that it gave.
    pub to: Node,
}

impl<'a> Graph<'a> {
    /// An empty graph over `m`.
    pub fn new(m: &'a Module, ops: &'a Ops) -> Self {
        Graph {
            eg: egg::EGraph::new(World::new(m, ops)),
            patterns: RefCell::default(),
            wishes: RefCell::default(),
            rotations: Vec::new(),
            values: Vec::new(),
            rule: String::new(),
            unions: Vec::new(),
            last: None,
            context: Vec::new(),
        }
    }

    fn add(&mut self, node: Node) -> Id {
        self.last = Some(node.clone());
        self.eg.add(node)
    }

    /// The tables behind the e-nodes.
    pub fn world(&self) -> &World<'a> {
        &self.eg.analysis
    }

    /// The class that `id` belongs to now.
    pub fn find(&self, id: Id) -> Id {
        self.eg.find(id)
    }

    /// The e-nodes of a class, in an order that does not depend on hashing.
    pub fn nodes(&self, id: Id) -> Vec<Node> {
        let mut nodes = self.eg[id].nodes.clone();
        nodes.sort();
        nodes
    }

    /// The e-nodes of a class that are the op `full`.
    pub fn nodes_of(&self, id: Id, full: &str) -> Vec<Node> {
        self.nodes(id).into_iter().filter(|n| self.is(n, full)).collect()
    }

    /// The classes with an e-node that has `id` as a child, in order.
    pub fn parents(&self, id: Id) -> Vec<Id> {
        let mut parents: Vec<Id> = self.eg[id].parents().map(|p| self.find(p)).collect();
        parents.sort();
        parents.dedup();
        parents
    }

    /// Whether the e-node is the op `full`.
    pub fn is(&self, node: &Node, full: &str) -> bool {
        self.world().name(node.head).is_some_and(|n| n.as_str() == full)
    }

    /// The op's name; empty for a leaf.
    pub fn name(&self, node: &Node) -> &str {
        self.world().name(node.head).map_or("", OpName::as_str)
    }

    /// The attributes of an e-node.
    pub fn attrs(&self, node: &Node) -> &Attrs {
        self.world().attrs(node.head)
    }

    /// How many results of the e-node's op are wanted.
    pub fn wanted(&self, node: &Node) -> u32 {
        match node.head {
            Head::Op { wanted, .. } => wanted,
            _ => 1,
        }
    }

    /// How many results the e-node's op has.
    pub fn outputs(&self, node: &Node) -> u32 {
        match node.head {
            Head::Op { outputs, .. } => outputs,
            _ => 1,
        }
    }

    /// The classes of all results of the e-node's op, `None` for one that is not in the graph.
    pub fn results(&self, node: &Node) -> Vec<Option<Id>> {
        (0..self.outputs(node)).map(|i| self.eg.lookup(node.result(i))).collect()
    }

    /// The class of an e-node that is in the graph.
    pub fn class(&self, node: &Node) -> Option<Id> {
        self.eg.lookup(node.clone()).map(|id| self.find(id))
    }

    /// Says which constants other ops of the module read too.
    pub fn shared(&mut self, scope: &super::window::Scope) {
        self.eg.analysis.shared = scope.shared();
    }

    /// Large constants whose elements were asked for.
    pub fn looked(&self) -> Vec<(ConstId, Value)> {
        self.world().looked.borrow().iter().map(|&i| self.world().consts[i as usize]).collect()
    }

    /// Whether a constant is one of the module that nothing else reads, or a few numbers: what is computed from it
    /// takes its place, and the model does not grow.
    pub fn may_change(&self, id: Id) -> bool {
        self.nodes(id).iter().any(|n| match n.head {
            Head::Literal(_) => true,
            Head::Const(i) => !self.world().shared.contains(&self.world().consts[i as usize].0),
            _ => false,
        })
    }

    /// What is known of a class.
    pub fn known(&self, id: Id) -> &Known {
        &self.eg[id].data
    }

    /// Whether a class is made only of constants.
    pub fn is_const(&self, id: Id) -> bool {
        self.known(id).konst && !self.is_absent(id)
    }

    /// Whether this is an operand left out.
    pub fn is_absent(&self, id: Id) -> bool {
        self.eg[id].nodes.iter().any(|n| n.head == Head::Absent)
    }

    /// The type of a class.
    pub fn ty(&self, id: Id) -> &Type {
        &self.known(id).fact.ty
    }

    /// The element type, if known.
    pub fn elem(&self, id: Id) -> Option<Elem> {
        self.ty(id).elem()
    }

    /// The dims, if the rank is known.
    pub fn dims(&self, id: Id) -> Option<Vec<Dim>> {
        self.ty(id).dims().map(<[Dim]>::to_vec)
    }

    /// The shape, if all of it is numbers.
    pub fn shape(&self, id: Id) -> Option<Vec<usize>> {
        self.ty(id).as_tensor()?.known_shape()
    }

    /// Small integer contents, if all are numbers.
    pub fn ints(&self, id: Id) -> Option<Vec<i64>> {
        self.known(id).fact.sym.as_ref()?.iter().map(Dim::known).collect()
    }

    /// Adds `full(children)` without attributes.
    pub fn op(&mut self, full: &str, children: &[Id]) -> Id {
        self.op_with(full, &Attrs::default(), children)
    }

    /// Adds `full(children) {attrs}`, an op with one result.
    pub fn op_with(&mut self, full: &str, attrs: &Attrs, children: &[Id]) -> Id {
        self.op_result(full, attrs, children, 0, 1)
    }

    /// Adds result number `result` of an op of which all `outputs` results are wanted.
    pub fn op_result(&mut self, full: &str, attrs: &Attrs, children: &[Id], result: u32, outputs: u32) -> Id {
        let name = OpName::parse(full).expect("an op name has a dialect");
        let name = self.eg.analysis.name_id(&name);
        let attrs = self.eg.analysis.attrs_id(attrs);
        let head = Head::Op { name, attrs, result, wanted: outputs, outputs };
        self.add(Node { head, children: children.to_vec() })
    }

    /// Adds the e-node `node` with other children.
    pub fn with(&mut self, node: &Node, children: Vec<Id>) -> Id {
        self.add(Node { head: node.head, children })
    }

    /// Adds the e-node `node` with child `i` replaced.
    pub fn with_child(&mut self, node: &Node, i: usize, child: Id) -> Id {
        let mut children = node.children.clone();
        children[i] = child;
        self.with(node, children)
    }

    /// Adds a small constant.
    pub fn literal(&mut self, tensor: Tensor) -> Id {
        let i = self.eg.analysis.literal_id(tensor, None);
        self.add(Node { head: Head::Literal(i), children: Vec::new() })
    }

    /// Adds the integers `values`, as `[n]` of i64.
    pub fn int_literal(&mut self, values: &[i64]) -> Id {
        let t = Tensor::new(&[values.len()], values.to_vec()).expect("as many elements as the shape says");
        self.literal(t)
    }

    /// Adds a symbolic scale whose channel `i` has the number of class `classes[i]`.
    pub fn scale(&mut self, classes: &[u32], elem: Elem) -> Id {
        let scales = &mut self.eg.analysis.scales;
        scales.push(Scale { classes: classes.into(), elem });
        let head = Head::Scale((scales.len() - 1) as u32);
        self.add(Node { head, children: Vec::new() })
    }

    /// Adds the operand that is left out.
    pub fn absent(&mut self) -> Id {
        self.add(Node { head: Head::Absent, children: Vec::new() })
    }

    /// Adds a value of the module as a leaf: a constant, or an input of the window.
    pub fn leaf(&mut self, v: Value) -> Id {
        let m = self.world().m;
        let world = &mut self.eg.analysis;
        let head = match m.const_of(v) {
            Some(c) => {
                let data = &m.consts[c];
                let small = super::lang::is_literal(data);
                match small.then(|| Tensor::from_const(data).ok()).flatten() {
                    Some(t) => Head::Literal(world.literal_id(t, Some(v))),
                    None => {
                        let found = world.consts.iter().position(|(id, _)| *id == c);
                        Head::Const(found.unwrap_or_else(|| {
                            world.consts.push((c, v));
                            world.consts.len() - 1
                        }) as u32)
                    }
                }
            }
            None => {
                let found = world.inputs.iter().position(|&i| i == v);
                Head::Input(found.unwrap_or_else(|| {
                    world.inputs.push(v);
                    world.inputs.len() - 1
                }) as u32)
            }
        };
        let node = Node { head, children: Vec::new() };
        let id = self.add(node.clone());
        self.values.push((v, id, node));
        id
    }

    /// Adds an op of the module whose operands have the classes `children`; its results get classes of their own.
    pub fn op_of(&mut self, op: Op, children: Vec<Id>) {
        let m = self.world().m;
        let data = &m.ops[op];
        let name = self.eg.analysis.name_id(&data.name);
        let attrs = self.eg.analysis.attrs_id(&data.attrs);
        let wanted = data.results.iter().flatten().count() as u32;
        let outputs = data.results.len() as u32;
        for (i, v) in data.results.iter().enumerate() {
            let Some(v) = *v else { continue };
            let head = Head::Op { name, attrs, result: i as u32, wanted, outputs };
            let node = Node { head, children: children.clone() };
            let id = self.add(node.clone());
            // The module may know more than inference from this window does: what the file declared.
            let mut known = self.eg[id].data.clone();
            known.fact.ty = m.ty(v).unify(&known.fact.ty).unwrap_or_else(|| m.ty(v).clone());
            known.fact.sym = m.values[v].sym.clone().or(known.fact.sym);
            self.eg.set_analysis_data(id, known);
            self.values.push((v, id, node));
        }
    }

    /// Adds ops of the module, in program order. `classes` has the classes of values that are there, and gets those of
    /// what the ops read and compute.
    pub fn add_ops(&mut self, ops: &[Op], classes: &mut HashMap<Value, Id>) {
        let m = self.world().m;
        for &op in ops {
            let mut children = Vec::new();
            for operand in &m.ops[op].operands {
                children.push(match *operand {
                    None => self.absent(),
                    Some(v) => *classes.entry(v).or_insert_with(|| self.leaf(v)),
                });
            }
            let before = self.values.len();
            self.op_of(op, children);
            classes.extend(self.values[before..].iter().map(|(v, id, _)| (*v, *id)));
        }
    }

    /// Adds an op whose results are there already: rules see how they are computed, and reading them is free.
    pub fn given(&mut self, op: Op, classes: &mut HashMap<Value, Id>) {
        self.add_ops(&[op], classes);
        for v in self.world().m.ops[op].results.iter().flatten() {
            let (leaf, class) = (self.leaf(*v), classes[v]);
            self.eg.union(leaf, class);
            self.context.push(leaf);
        }
    }

    /// The classes of values that are given, with the ops that compute them.
    pub fn context(&self) -> HashSet<Id> {
        self.context.iter().map(|&id| self.find(id)).collect()
    }

    /// Says that the class `class`, by its e-node `from`, equals the class `to`. Returns whether that was news. All
    /// equalities are stated here, under the name of the rule that is being applied.
    pub fn union(&mut self, class: Id, from: &Node, to: Id) -> bool {
        if self.find(class) == self.find(to) {
            return false;
        }
        let added = self.last.take().filter(|n| self.eg.lookup(n.clone()) == Some(self.find(to)));
        let node = added.or_else(|| self.nodes(to).into_iter().next());
        if let Some(node) = node {
            self.unions.push(Union { rule: self.rule.clone(), from: from.clone(), to: node });
        }
        self.eg.union(class, to)
    }

    // ---- constants: what a scale becomes on its way ----

    /// The product of two constants.
    pub fn times(&mut self, a: Id, b: Id) -> Id {
        self.op("onnx.Mul", &[a, b])
    }

    /// A constant in another shape of as many elements; a reshape of a reshape is one reshape.
    pub fn reshaped(&mut self, s: Id, dims: &[usize]) -> Id {
        let mut source = s;
        while let Some(inner) = self.nodes_of(source, "onnx.Reshape").first().map(|n| n.children[0]) {
            source = inner;
        }
        if self.shape(source).as_deref() == Some(dims) {
            return source;
        }
        let to: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        let to = self.int_literal(&to);
        self.op("onnx.Reshape", &[source, to])
    }

    /// A constant with its leading dims of size one dropped.
    pub fn trimmed(&mut self, s: Id) -> Option<Id> {
        let shape = self.shape(s)?;
        let lead = shape.iter().take_while(|&&d| d == 1).count();
        Some(self.reshaped(s, &shape[lead..]))
    }

    /// A constant with its dims permuted: dim `i` of the result is dim `perm[i]`.
    pub fn transposed(&mut self, s: Id, perm: &[usize]) -> Option<Id> {
        let shape = self.shape(s)?;
        let dims: Vec<usize> = perm.iter().map(|&p| shape[p]).collect();
        let moved: Vec<usize> = perm.iter().copied().filter(|&p| shape[p] != 1).collect();
        if moved.is_sorted() {
            return Some(self.reshaped(s, &dims));
        }
        let attr = dialects::ir::Attr::Ints(perm.iter().map(|&p| p as i64).collect());
        Some(self.op_with("onnx.Transpose", &[("perm", attr)].into_iter().collect(), &[s]))
    }

    /// A constant broadcast to `dims`.
    pub fn expanded(&mut self, s: Id, dims: &[usize]) -> Option<Id> {
        if self.shape(s)? == dims {
            return Some(s);
        }
        let to: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        let to = self.int_literal(&to);
        Some(self.op("onnx.Expand", &[s, to]))
    }

    /// Elements `from..to` of a constant along `axis`; the dim stays.
    pub fn sliced(&mut self, s: Id, axis: usize, from: usize, to: usize) -> Option<Id> {
        if self.shape(s)?[axis] == to - from {
            return Some(s);
        }
        let index: Vec<i64> = (from as i64..to as i64).collect();
        let index = self.int_literal(&index);
        let attr = dialects::ir::Attr::Int(axis as i64);
        Some(self.op_with("onnx.Gather", &[("axis", attr)].into_iter().collect(), &[s, index]))
    }

    /// The shape of constant `s` as it broadcasts against `rank` dims: padded with ones in front.
    pub fn padded_shape(&self, s: Id, rank: usize) -> Option<Vec<usize>> {
        let shape = self.shape(s)?;
        let mut out = vec![1; rank.checked_sub(shape.len())?];
        out.extend(shape);
        Some(out)
    }

    /// Whether multiplying `x` by the constant `s` keeps the shape of `x`.
    pub fn fits(&self, s: Id, x: Id) -> bool {
        let Some(dims) = self.dims(x) else { return false };
        let Some(shape) = self.padded_shape(s, dims.len()) else { return false };
        shape.iter().zip(&dims).all(|(&n, d)| n == 1 || *d == Dim::from(n))
    }

    /// `x * s`, where `s` is trimmed first; `None` when that would change the shape of `x`.
    pub fn scaled(&mut self, x: Id, s: Id) -> Option<Id> {
        let s = self.trimmed(s)?;
        self.fits(s, x).then(|| self.op("onnx.Mul", &[x, s]))
    }
}
