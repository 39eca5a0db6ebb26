//! Plans how an extraction is put back into the module: new ops where the choice differs from what is there, and
//! constants computed from the constant expressions that the choice reads. [`edit`](super::edit) does it.
//!
//! Ops and constants that stay as they are keep their values. A plan names values of the window that it was made for; it
//! can be replayed on a window that is the same in all that rules see.

use super::extract::Extraction;
use super::graph::Graph;
use super::lang::{Head, Node};
use super::window::{Scope, Window};
use dialects::ir::{Attrs, ConstData, ConstPool, Elem, Op, OpName, Region, Symbol, Value};
use dialects::ops::{EvalCx, Fact, Item, OpDef, OpError};
use dialects::tensor::Tensor;
use egg::Id;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// What an op of the plan reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    Absent,
    /// A value that is there.
    Value(Value),
    /// Result `.1` of a new op.
    New(usize, u32),
    /// A computed constant.
    Const(usize),
}

/// A new op.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) name: OpName,
    pub(super) attrs: Attrs,
    pub(super) operands: Vec<Source>,
    pub(super) outputs: u32,
    pub(super) facts: BTreeMap<u32, Fact>,
    /// The op that it stands for.
    pub(super) like: Option<Op>,
}

/// A constant to compute.
#[derive(Clone, Debug)]
pub(super) struct Computed {
    pub(super) expr: Arc<Expr>,
    pub(super) elem: Elem,
    pub(super) dims: Vec<u64>,
    /// The constant of the module that it is made from.
    pub(super) base: Option<Value>,
}

/// A constant expression. It owns what it needs, so that it can outlive the module's edits.
pub(super) enum Expr {
    Leaf(Value, ConstData),
    Literal(Tensor),
    Op { name: OpName, attrs: Attrs, opset: i64, def: &'static OpDef, operands: Vec<Option<Arc<Expr>>> },
}

impl std::fmt::Debug for Expr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Expr::Leaf(_, c) => write!(f, "{}{:?}", c.elem, c.dims),
            Expr::Literal(t) => write!(f, "{}{:?}", t.elem(), t.shape()),
            Expr::Op { name, operands, .. } => write!(f, "{name}{operands:?}"),
        }
    }
}

impl Expr {
    /// The value, with 16-bit floats computed in 32 bits.
    pub(super) fn eval(&self) -> Result<Tensor, OpError> {
        let wide = |t: Tensor| -> Result<Tensor, OpError> {
            match t.elem() {
                Elem::F16 | Elem::BF16 => {
                    let values = t.to_f32()?.into_owned();
                    Ok(Tensor::from_f32(Elem::F32, t.shape(), values)?)
                }
                _ => Ok(t),
            }
        };
        match self {
            Expr::Leaf(_, c) => wide(Tensor::from_const(c)?),
            Expr::Literal(t) => wide(t.clone()),
            Expr::Op { name, attrs, opset, def, operands } => {
                if name.as_str() == "onnx.Cast" {
                    // Between float types; the result is rounded once, at the end.
                    let x = operands.first().and_then(Option::as_ref);
                    return x.ok_or_else(|| OpError::invalid("Cast has no operand"))?.eval();
                }
                let inputs: Vec<Option<Item>> = operands
                    .iter()
                    .map(|o| o.as_ref().map(|o| o.eval().map(Item::from)).transpose())
                    .collect::<Result<_, _>>()?;
                let region = |_: Region, _: Vec<Item>| Err(OpError::Unsupported("a nested graph".into()));
                let consts = ConstPool::new();
                let cx = EvalCx {
                    name,
                    attrs,
                    opset: *opset,
                    inputs: &inputs,
                    outputs: 1,
                    consts: &consts,
                    region: &region,
                    exact: true,
                    max_iterations: 0,
                    results_of: &|_| Vec::new(),
                };
                let items = (def.eval)(&cx)?;
                let first = items.into_iter().next();
                Ok(first
                    .ok_or_else(|| OpError::invalid(format!("{name} gives no result")))?
                    .tensor()?
                    .clone())
            }
        }
    }

    /// The value as a constant of type `elem`.
    pub(super) fn constant(&self, elem: Elem) -> Result<ConstData, OpError> {
        let t = self.eval()?;
        let t = match elem == t.elem() {
            true => t,
            false => Tensor::from_f32(elem, t.shape(), t.to_f32()?.into_owned())?,
        };
        Ok(t.to_const())
    }
}

/// The edits that turn the module's window into an extraction. It no longer borrows the graph.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) consts: Vec<Computed>,
    /// A value and what replaces it.
    pub(super) replace: Vec<(Value, Source)>,
    pub(super) window: Vec<Op>,
    pub(super) loc: Option<Symbol>,
}

struct Planner<'g, 'a, 's> {
    g: &'g Graph<'a>,
    scope: &'g Scope<'s>,
    choice: &'g BTreeMap<Id, Node>,
    values: HashMap<Id, Vec<(Value, Node)>>,
    plan: Plan,
    /// For each step: after how many ops of the region it can run.
    places: Vec<usize>,
    done: HashMap<Id, Source>,
    made: HashMap<(OpName, u32, Vec<Source>), usize>,
    terms: Terms,
    exprs: HashMap<Id, Arc<Expr>>,
}

/// Plans the edits; an error says why the extraction cannot be put back.
pub fn plan(g: &Graph, scope: &Scope, w: &Window, roots: &[Id], x: &Extraction) -> Result<Plan, String> {
    let mut values: HashMap<Id, Vec<(Value, Node)>> = HashMap::new();
    for (v, id, node) in &g.values {
        let node = Node { head: node.head, children: node.children.iter().map(|&c| g.find(c)).collect() };
        values.entry(g.find(*id)).or_default().push((*v, node));
    }
    let mut p = Planner {
        g,
        scope,
        choice: &x.choice,
        values,
        plan: Plan { window: w.ops.clone(), ..Plan::default() },
        places: Vec::new(),
        done: HashMap::new(),
        made: HashMap::new(),
        terms: terms(g),
        exprs: HashMap::new(),
    };
    let seed = w.roots.first().and_then(|&v| g.world().m.def_op(v));
    p.plan.loc = seed.map(|(op, _)| g.world().m.ops[op].loc.clone());
    let inside: HashSet<Op> = w.ops.iter().copied().collect();
    let mut named: HashSet<Source> = HashSet::new();
    for (&v, &class) in w.roots.iter().zip(roots) {
        let mut source = p.source(class)?;
        if source == Source::Value(v) {
            continue;
        }
        // An output of the graph is a value of its own, which an op computes.
        let computed = match source {
            Source::New(..) => true,
            Source::Value(w) => {
                !scope.is_output(w) && g.world().m.def_op(w).is_some_and(|(op, _)| inside.contains(&op))
            }
            _ => false,
        };
        if scope.is_output(v) && !(computed && named.insert(source)) {
            let Some(identity) = p.identity(v, class, source) else { continue };
            source = identity;
        }
        let place = p.place(source);
        if scope.first_reader(v, &inside).is_some_and(|reader| place > reader) {
            return Err("what replaces a value would be computed after its first use".into());
        }
        p.plan.replace.push((v, source));
    }
    Ok(p.plan)
}

/// The smallest term of every constant class, with its size.
pub(super) type Terms = BTreeMap<Id, (u64, Node)>;

/// The smallest term of every constant class.
pub(super) fn terms(g: &Graph) -> Terms {
    let mut classes: Vec<Id> = g.eg.classes().map(|c| c.id).filter(|&c| g.is_const(c)).collect();
    classes.sort();
    let mut best: BTreeMap<Id, (u64, Node)> = BTreeMap::new();
    loop {
        let mut changed = false;
        for &class in &classes {
            for node in g.nodes(class) {
                let below = node.children.iter().filter(|c| !g.is_absent(**c));
                let size = below.map(|c| Some(best.get(&g.find(*c))?.0)).try_fold(1u64, |s, n| Some(s + n?));
                let Some(size) = size else { continue };
                if best.get(&class).is_none_or(|b| (size, &node) < (b.0, &b.1)) {
                    best.insert(class, (size, node));
                    changed = true;
                }
            }
        }
        if !changed {
            return best;
        }
    }
}

impl Planner<'_, '_, '_> {
    /// After which op a source is there; zero for the start.
    fn place(&self, s: Source) -> usize {
        match s {
            Source::Value(v) => self.scope.place_of(v),
            Source::New(i, _) => self.places[i],
            Source::Absent | Source::Const(_) => 0,
        }
    }

    fn source(&mut self, class: Id) -> Result<Source, String> {
        let class = self.g.find(class);
        if let Some(&s) = self.done.get(&class) {
            return Ok(s);
        }
        let s = self.make(class)?;
        self.done.insert(class, s);
        Ok(s)
    }

    fn make(&mut self, class: Id) -> Result<Source, String> {
        if self.g.is_absent(class) {
            return Ok(Source::Absent);
        }
        let known = self.values.get(&class).cloned().unwrap_or_default();
        if self.g.is_const(class) {
            // A constant of the module before one that an op computes, unless that is a few numbers.
            let literal = self.terms.get(&class).is_some_and(|t| matches!(t.1.head, Head::Literal(_)));
            let op = known.first().filter(|_| !literal);
            let leaf = known.iter().find(|(_, n)| matches!(n.head, Head::Const(_) | Head::Literal(_)));
            return match leaf.or(op) {
                Some((v, _)) => Ok(Source::Value(*v)),
                None => self.computed(class),
            };
        }
        if let Some((i, result)) = self.made_beside(class) {
            self.plan.steps[i].facts.insert(result, self.g.known(class).fact.clone());
            return Ok(Source::New(i, result));
        }
        let node = self.choice.get(&class).ok_or("a value is missing from the extraction")?.clone();
        let operands: Vec<Source> =
            node.children.iter().map(|&c| self.source(c)).collect::<Result<_, _>>()?;
        if node.children.is_empty() {
            let input = known.iter().find(|(_, n)| n.head == node.head);
            return Ok(Source::Value(input.ok_or("an input of the window has no value")?.0));
        }
        let m = self.g.world().m;
        let old = |v: Value| m.def_op(v).map(|(op, _)| op);
        for (v, n) in &known {
            let same = n.head == node.head
                && old(*v).is_some_and(|op| {
                    let now = m.ops[op].operands.iter().map(|o| o.map_or(Source::Absent, Source::Value));
                    now.eq(operands.iter().copied())
                });
            if same {
                return Ok(Source::Value(*v));
            }
        }
        let Head::Op { result, outputs, attrs, .. } = node.head else {
            return Err("a leaf cannot be computed".into());
        };
        let name = self.g.world().name(node.head).expect("an op has a name").clone();
        let key = (name.clone(), attrs, operands.clone());
        let i = match self.made.get(&key) {
            Some(&i) => i,
            None => {
                self.places.push(operands.iter().map(|&o| self.place(o)).max().unwrap_or(0));
                let like = self.like(class, &node).or_else(|| known.first().and_then(|k| old(k.0)));
                let attrs = self.g.attrs(&node).clone();
                self.plan.steps.push(Step { name, attrs, operands, outputs, facts: BTreeMap::new(), like });
                self.made.insert(key, self.plan.steps.len() - 1);
                self.plan.steps.len() - 1
            }
        };
        self.plan.steps[i].facts.insert(result, self.g.known(class).fact.clone());
        Ok(Source::New(i, result))
    }

    /// A step that gives `source` to the output `v`; `None` where an op does that already.
    fn identity(&mut self, v: Value, class: Id, source: Source) -> Option<Source> {
        let m = self.g.world().m;
        let op = m.def_op(v).map(|(op, _)| op);
        let data = op.map(|op| &m.ops[op]);
        if data.is_some_and(|d| d.is("onnx.Identity") && d.operand(0).map(Source::Value) == Some(source)) {
            return None;
        }
        let facts = [(0, self.g.known(class).fact.clone())].into();
        let name = OpName::new("onnx", "Identity");
        self.places.push(self.place(source));
        let step =
            Step { name, attrs: Attrs::default(), operands: vec![source], outputs: 1, facts, like: op };
        self.plan.steps.push(step);
        Some(Source::New(self.plan.steps.len() - 1, 0))
    }

    /// The step that has a class among its results, where an op of several results is made anew for another of them: it
    /// need not run twice.
    fn made_beside(&self, class: Id) -> Option<(usize, u32)> {
        self.g.nodes(class).into_iter().filter(|n| self.g.outputs(n) > 1).find_map(|node| {
            let Head::Op { result, attrs, .. } = node.head else { return None };
            let known = |c: &Id| self.done.get(&self.g.find(*c)).copied();
            let operands: Vec<Source> = node.children.iter().map(known).collect::<Option<_>>()?;
            let name = self.g.world().name(node.head)?.clone();
            Some((*self.made.get(&(name, attrs, operands))?, result))
        })
    }

    /// The op of the window that an e-node stands for: one with the same result, or the same op on as many of the same
    /// operands as possible, where constants made from one another count as the same.
    fn like(&self, class: Id, node: &Node) -> Option<Op> {
        let made_from = |c: Id| self.leaves(self.g.find(c));
        let same = |a: Id, b: Id| {
            self.g.find(a) == self.g.find(b)
                || self.g.is_const(a) && made_from(a).iter().any(|v| made_from(b).contains(v))
        };
        let score = |id: Id, n: &Node| {
            let operands = n.children.iter().zip(&node.children).filter(|(a, b)| same(**a, **b)).count();
            (self.g.find(id) == self.g.find(class), operands)
        };
        let candidates =
            self.g.values.iter().filter(|(_, _, n)| n.head == node.head && !n.children.is_empty());
        let best = candidates.max_by_key(|(v, id, n)| (score(*id, n), std::cmp::Reverse(*v)))?;
        self.g.world().m.def_op(best.0).map(|(op, _)| op)
    }

    fn computed(&mut self, class: Id) -> Result<Source, String> {
        let ty = self.g.ty(class).as_tensor().ok_or("the type of a computed constant is unknown")?;
        let shape = ty.known_shape().ok_or("the shape of a computed constant is unknown")?;
        let elem = ty.elem;
        let expr = expr(self.g, &self.terms, class, &mut self.exprs)?;
        let base = self.leaves(class).into_iter().max_by_key(|v| {
            let bytes = self.g.world().m.const_of(*v).map_or(0, |c| self.g.world().m.consts[c].byte_len());
            (bytes, std::cmp::Reverse(*v))
        });
        let dims = shape.into_iter().map(|d| d as u64).collect();
        self.plan.consts.push(Computed { expr, elem, dims, base });
        Ok(Source::Const(self.plan.consts.len() - 1))
    }

    /// The constants of the module that a constant class is made from.
    fn leaves(&self, class: Id) -> Vec<Value> {
        leaves(self.g, &self.terms, class)
    }
}

/// The expression of a constant class; those in `done` are shared.
pub(super) fn expr(
    g: &Graph,
    terms: &Terms,
    class: Id,
    done: &mut HashMap<Id, Arc<Expr>>,
) -> Result<Arc<Expr>, String> {
    let class = g.find(class);
    if let Some(e) = done.get(&class) {
        return Ok(e.clone());
    }
    let world = g.world();
    let node = &terms.get(&class).ok_or("a constant has no finite term")?.1;
    let made = match node.head {
        Head::Const(i) => {
            let (konst, v) = world.consts[i as usize];
            Expr::Leaf(v, world.m.consts[konst].clone())
        }
        Head::Literal(i) => Expr::Literal(world.literals[i as usize].tensor.clone()),
        Head::Op { result: 0, .. } => {
            let name = world.name(node.head).expect("an op has a name").clone();
            let def = world.ops.get(&name).ok_or_else(|| format!("{name} has no evaluation"))?;
            let (attrs, opset) = (g.attrs(node).clone(), world.m.opset(name.dialect()));
            let mut operands = Vec::new();
            for &c in &node.children {
                operands.push(if g.is_absent(c) { None } else { Some(expr(g, terms, c, done)?) });
            }
            Expr::Op { name, attrs, opset, def, operands }
        }
        _ => return Err("a symbolic scale cannot be computed".into()),
    };
    let made = Arc::new(made);
    done.insert(class, made.clone());
    Ok(made)
}

/// The constants of the module that a constant class is made from.
pub(super) fn leaves(g: &Graph, terms: &Terms, class: Id) -> Vec<Value> {
    let world = g.world();
    let Some((_, node)) = terms.get(&g.find(class)) else { return Vec::new() };
    match node.head {
        // What is rotated is named after itself.
        _ if g.moves(class) => Vec::new(),
        Head::Const(i) => vec![world.consts[i as usize].1],
        Head::Literal(i) => world.literals[i as usize].value.into_iter().collect(),
        _ => node.children.iter().flat_map(|&c| leaves(g, terms, c)).collect(),
    }
}

/// Whether a symbolic scale is part of a constant.
pub(super) fn scaled(g: &Graph, terms: &Terms, class: Id) -> bool {
    let Some((_, node)) = terms.get(&g.find(class)) else { return false };
    matches!(node.head, Head::Scale(_)) || node.children.iter().any(|&c| scaled(g, terms, c))
}

/// The names of the constants that an extraction multiplies by symbolic scale 0.
pub fn sites(g: &Graph, x: &Extraction) -> Vec<String> {
    let terms = terms(g);
    let m = g.world().m;
    let mut out: Vec<Value> = Vec::new();
    for node in x.choice.values() {
        for &c in node.children.iter().filter(|&&c| g.is_const(c) && scaled(g, &terms, c)) {
            let float = |v: &Value| m.ty(*v).elem().is_some_and(|e| e.is_float());
            let size = |v: &Value| m.const_of(*v).map_or(0, |c| m.consts[c].byte_len());
            let base = leaves(g, &terms, c)
                .into_iter()
                .filter(float)
                .max_by_key(|v| (size(v), std::cmp::Reverse(*v)));
            out.extend(base);
        }
    }
    out.sort();
    out.dedup();
    out.into_iter().map(|v| m.value_label(v)).collect()
}
