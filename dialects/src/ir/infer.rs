//! Type, shape and small-value inference over a module: one walk in program order, nested regions included.
//!
//! Inference refines what the file declared and never refuses: an unknown op keeps its declared types, and a
//! size that cannot be expressed is unknown. What contradicts is collected.

use super::calls::{Callee, Callees, Frame, arguments, check_chain};
use super::verify::arity;
use super::{Attrs, Function, Module, Op, OpName, Region, Symbol, Type, Value};
use crate::onnx::{attributes, functions};
use crate::ops::{Fact, InferCx, Inferred, OpError, Ops};
use std::cell::{Cell, RefCell};
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
    let callees = Callees::new(m, ops);
    let specs = Callees::of_specs(ops);
    let walk = Walk {
        m,
        specs: &specs,
        verify,
        visits: Cell::new(0),
        chain: RefCell::default(),
        found: RefCell::default(),
    };
    // A function body is generic: it is inferred where it is called, with the types of the call.
    let frame = Frame::top(m);
    let scope = Scope { walk: &walk, m, callees: &callees, frame, call: None, facts: RefCell::default() };
    scope.region(m.top);
    let facts = scope.facts.into_inner();
    (facts.into_iter().filter_map(|(v, f)| Some((v, f?))).collect(), walk.found.into_inner())
}

/// Infers one op from facts of its operands, without a module around it: what the e-graph's analysis asks.
pub fn infer_op(ops: &Ops, cx: &InferCx) -> Inferred {
    let def = ops.get(cx.name).ok_or_else(|| OpError::Unsupported(format!("unknown op {}", cx.name)))?;
    (def.infer)(cx)
}

/// Ops that are looked at in calls, over one walk: functions that call each other twice would take for ever.
const MAX_VISITS: usize = 1 << 20;

struct Walk<'a> {
    m: &'a Module,
    specs: &'a Callees<'a>,
    /// Whether the ops' own verifiers run too.
    verify: bool,
    visits: Cell<usize>,
    /// The functions that are being looked at, each called by the one before; and whether it is of a specification.
    chain: RefCell<Vec<(bool, Region)>>,
    found: RefCell<Vec<Diagnostic>>,
}

/// The model's graph, or one call of a function.
struct Scope<'a> {
    walk: &'a Walk<'a>,
    m: &'a Module,
    callees: &'a Callees<'a>,
    frame: Frame<'a>,
    /// The op of the model that led here, and the function that this is.
    call: Option<(Op, &'a Function)>,
    /// `None` is an input that the call leaves out.
    facts: RefCell<HashMap<Value, Option<Fact>>>,
}

impl Scope<'_> {
    fn fact(&self, v: Value) -> Option<Fact> {
        if let Some(f) = self.facts.borrow().get(&v) {
            return f.clone();
        }
        let known = self.m.values[v].ty.clone();
        Some(match self.m.const_of(v) {
            Some(c) => Fact::of_const(c, &self.m.consts),
            None => known.into(),
        })
    }

    fn report(&self, op: Op, message: String) {
        let here = Diagnostic::at(self.m, op, message);
        let found = match self.call {
            None => here,
            Some((call, f)) => {
                Diagnostic::at(self.walk.m, call, format!("in the function {}: {here}", f.name))
            }
        };
        self.walk.found.borrow_mut().push(found);
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
        let Some(callee) = self.callees.of(data, self.frame.versions) else {
            for region in data.attrs.regions() {
                self.region(region);
            }
            return;
        };
        // Inference may count on the number of operands and on the attributes.
        if arity(self.m, callee, data).is_some() {
            return;
        }
        let attrs = match self.frame.attrs(&data.attrs) {
            Ok(attrs) => attrs,
            Err(e) => return self.report(op, e.to_string()),
        };
        let version = self.frame.version(data.name.dialect());
        if !matches!(callee, Callee::Function(_))
            && let Err(e) = attributes::check(&data.name, version, &attrs)
        {
            return self.report(op, e.to_string());
        }
        let inputs: Vec<Option<Fact>> = data.operands.iter().map(|v| v.and_then(|v| self.fact(v))).collect();
        let nested = |region: Region, args: &[Fact]| -> Inferred {
            let r = &self.m.regions[region];
            if r.args.len() != args.len() {
                let (found, expected) = (args.len(), r.args.len());
                let message = format!("the graph takes {expected} inputs, but is given {found}");
                return Err(OpError::invalid(message));
            }
            for (&arg, fact) in r.args.iter().zip(args) {
                self.merge(op, arg, fact.clone());
            }
            self.region(region);
            Ok(r.results.iter().map(|&v| self.fact(v).unwrap_or_default()).collect())
        };
        let facts = match callee {
            Callee::Native(def) => {
                let cx = InferCx {
                    name: &data.name,
                    attrs: &attrs,
                    opset: version,
                    inputs: &inputs,
                    outputs: data.results.len(),
                    consts: &self.m.consts,
                    region: &nested,
                };
                if self.walk.verify
                    && let Err(e) = (def.verify)(&cx)
                {
                    self.report(op, e.to_string());
                }
                (def.infer)(&cx)
            }
            Callee::Function(f) => self.call(op, f, self.m, self.callees, &inputs, &attrs),
            Callee::Spec(f) => self.call(op, f, functions::module(), self.walk.specs, &inputs, &attrs),
        };
        match facts {
            Ok(facts) => {
                for (v, fact) in data.results.iter().zip(facts) {
                    if let Some(v) = *v {
                        self.merge(op, v, fact);
                    }
                }
            }
            Err(e) => self.report(op, e.to_string()),
        }
    }

    /// What a call gives: its body is inferred with the types of the call.
    fn call(
        &self,
        op: Op,
        f: &Function,
        m: &Module,
        callees: &Callees,
        inputs: &[Option<Fact>],
        attrs: &Attrs,
    ) -> Inferred {
        let (walk, body) = (self.walk, &m.regions[f.body]);
        let here = (!std::ptr::eq(m, walk.m), f.body);
        check_chain(&walk.chain.borrow(), &here, f)?;
        walk.visits.set(walk.visits.get() + body.ops.len());
        if walk.visits.get() > MAX_VISITS {
            return Ok(Vec::new());
        }
        let arguments = arguments(f, attrs);
        // A constant of another module means nothing here.
        let near = std::ptr::eq(m, self.m);
        let passed = |f: Fact| Fact { konst: f.konst.filter(|_| near), ..f };
        let args = body.args.iter().enumerate();
        let facts = args.map(|(i, &v)| (v, inputs.get(i).cloned().flatten().map(passed))).collect();
        let call = self.call.map_or(op, |(call, _)| call);
        let frame = Frame::call(f, &arguments);
        let scope = Scope { walk, m, callees, frame, call: Some((call, f)), facts: RefCell::new(facts) };
        walk.chain.borrow_mut().push(here);
        scope.region(f.body);
        walk.chain.borrow_mut().pop();
        Ok(body.results.iter().map(|&v| passed(scope.fact(v).unwrap_or_default())).collect())
    }

    fn merge(&self, op: Op, v: Value, fact: Fact) {
        let known = &self.m.values[v].ty;
        let ty = known.unify(&fact.ty).unwrap_or_else(|| {
            // What a function declares of its values is a hint: one body serves calls of other types.
            if self.call.is_some() {
                return fact.ty.clone();
            }
            let label = self.m.value_label(v);
            self.report(op, format!("{label:?} is declared {known}, but inference finds {}", fact.ty));
            known.clone()
        });
        self.facts.borrow_mut().insert(v, Some(Fact { ty, ..fact }));
    }
}

/// Whether two types describe the same tensors as far as either knows.
pub fn compatible(a: &Type, b: &Type) -> bool {
    a.unify(b).is_some()
}
