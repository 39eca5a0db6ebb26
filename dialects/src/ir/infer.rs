//! Type, shape and small-value inference over a module: one walk in program order, nested regions included.
//!
//! Inference refines what the file declared and never refuses: an unknown op keeps its declared types, and a
//! size that cannot be expressed is unknown. What contradicts is collected.

use super::verify::arity;
use super::{Module, Op, OpName, Region, Symbol, Type, Value};
use crate::ops::{Fact, InferCx, Inferred, OpError, Ops};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;

/// Something wrong at an op or a value, found by inference or by the verifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The op, when it is about one.
    pub op: Option<Op>,
    /// The op's name.
    pub name: Option<OpName>,
    /// The source node.
    pub loc: Symbol,
    /// What was expected and what was found.
    pub message: String,
}

impl Diagnostic {
    /// A diagnostic at `op`.
    pub fn at(m: &Module, op: Op, message: impl Into<String>) -> Diagnostic {
        let data = &m.ops[op];
        Diagnostic {
            op: Some(op),
            name: Some(data.name.clone()),
            loc: data.loc.clone(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} at node {:?}: {}", &*self.loc, self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Infers the whole module and stores what is found in its values. Returns what contradicts.
pub fn infer(m: &mut Module, ops: &Ops) -> Vec<Diagnostic> {
    let (facts, found) = walk(m, ops, false);
    for (v, fact) in facts {
        let data = &mut m.values[v];
        data.ty = fact.ty;
        data.sym = fact.sym;
    }
    found
}

/// What contradicts in a module, and what the verifiers of its ops find, without changing it.
pub fn check(m: &Module, ops: &Ops) -> Vec<Diagnostic> {
    walk(m, ops, true).1
}

fn walk(m: &Module, ops: &Ops, verify: bool) -> (HashMap<Value, Fact>, Vec<Diagnostic>) {
    let walk = Walk { m, ops, verify, facts: RefCell::default(), found: RefCell::default() };
    // A function body is generic: it is inferred where it is called, with the types of the call.
    walk.region(m.top);
    (walk.facts.into_inner(), walk.found.into_inner())
}

/// Infers one op from facts of its operands, without a module around it: what the e-graph's analysis asks.
pub fn infer_op(ops: &Ops, cx: &InferCx) -> Inferred {
    let def = ops.get(cx.name).ok_or_else(|| OpError::Unsupported(format!("unknown op {}", cx.name)))?;
    (def.infer)(cx)
}

struct Walk<'a> {
    m: &'a Module,
    ops: &'a Ops,
    /// Whether the ops' own verifiers run too.
    verify: bool,
    facts: RefCell<HashMap<Value, Fact>>,
    found: RefCell<Vec<Diagnostic>>,
}

impl Walk<'_> {
    fn fact(&self, v: Value) -> Fact {
        if let Some(f) = self.facts.borrow().get(&v) {
            return f.clone();
        }
        let known = self.m.values[v].ty.clone();
        match self.m.const_of(v) {
            Some(c) => Fact::of_const(c, &self.m.consts),
            None => known.into(),
        }
    }

    fn region(&self, region: Region) {
        let data = &self.m.regions[region];
        // Constants get their facts stored, so that the module's values carry small contents too.
        for &v in &data.consts {
            let fact = self.fact(v);
            self.facts.borrow_mut().insert(v, fact);
        }
        for &op in &data.ops {
            self.op(op);
        }
    }

    fn op(&self, op: Op) {
        let data = &self.m.ops[op];
        let Some(def) = self.ops.get(&data.name) else {
            for region in data.attrs.regions() {
                self.region(region);
            }
            return;
        };
        // Inference may count on the number of operands: the verifier reports it.
        if arity(def, data).is_some() {
            return;
        }
        let inputs: Vec<Option<Fact>> = data.operands.iter().map(|v| v.map(|v| self.fact(v))).collect();
        let nested = |region: Region, args: &[Fact]| -> Inferred {
            let r = &self.m.regions[region];
            for (&arg, fact) in r.args.iter().zip(args) {
                self.merge(op, arg, fact.clone());
            }
            self.region(region);
            Ok(r.results.iter().map(|&v| self.fact(v)).collect())
        };
        let cx = InferCx {
            name: &data.name,
            attrs: &data.attrs,
            opset: self.m.opset(data.name.dialect()),
            inputs: &inputs,
            outputs: data.results.len(),
            consts: &self.m.consts,
            region: &nested,
        };
        if self.verify
            && let Err(e) = (def.verify)(&cx)
        {
            self.found.borrow_mut().push(Diagnostic::at(self.m, op, e.to_string()));
        }
        match (def.infer)(&cx) {
            Ok(facts) => {
                for (v, fact) in data.results.iter().zip(facts) {
                    if let Some(v) = *v {
                        self.merge(op, v, fact);
                    }
                }
            }
            Err(e) => self.found.borrow_mut().push(Diagnostic::at(self.m, op, e.to_string())),
        }
    }

    fn merge(&self, op: Op, v: Value, fact: Fact) {
        let known = &self.m.values[v].ty;
        let ty = known.unify(&fact.ty).unwrap_or_else(|| {
            let label = self.m.value_label(v);
            let message = format!("{label:?} is declared {known}, but inference finds {}", fact.ty);
            self.found.borrow_mut().push(Diagnostic::at(self.m, op, message));
            known.clone()
        });
        self.facts.borrow_mut().insert(v, Fact { ty, ..fact });
    }
}

/// Whether two types describe the same tensors as far as either knows.
pub fn compatible(a: &Type, b: &Type) -> bool {
    a.unify(b).is_some()
}
