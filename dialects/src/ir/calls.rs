//! Calls: what defines an op, and what the ops of a body see of the op that calls it.
//!
//! An op is defined by the table of ops (which wins, as it does in ONNX Runtime), by a function of the model, or by
//! the body that its specification gives. A body sees its inputs, some of which the call may leave out; the
//! attributes of the call, through references; and the operator versions that the function itself imports. It sees
//! no values of the caller.

use super::attrs::kind_name;
use super::{Attr, Attrs, Function, Module, OpData, Symbol};
use crate::ops::{OpDef, OpError, Ops};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

/// Calls may be nested this deep: a chain of functions must not exhaust the stack.
pub const MAX_DEPTH: usize = 64;

/// What defines an op.
#[derive(Clone, Copy)]
pub enum Callee<'a> {
    /// An entry of the table of ops.
    Native(&'static OpDef),
    /// A function of the same module.
    Function(&'a Function),
    /// A body of [`crate::onnx::functions`], which is a module of its own.
    Spec(&'static Function),
}

impl<'a> Callee<'a> {
    /// The function that is called, if it is one.
    pub fn function(self) -> Option<&'a Function> {
        match self {
            Callee::Native(_) => None,
            Callee::Function(f) | Callee::Spec(f) => Some(f),
        }
    }
}

/// Finds what defines the ops of one module.
pub struct Callees<'a> {
    ops: &'a Ops,
    functions: HashMap<(&'a str, &'a str), &'a Function>,
}

impl<'a> Callees<'a> {
    /// Of the ops of `m`.
    pub fn new(m: &'a Module, ops: &'a Ops) -> Callees<'a> {
        let functions = m.functions.iter().map(|f| ((f.name.as_str(), &*f.overload), f)).collect();
        Callees { ops, functions }
    }

    /// Of the ops in the bodies of specifications, which call no functions but each other.
    pub fn of_specs(ops: &'a Ops) -> Callees<'a> {
        Callees { ops, functions: HashMap::new() }
    }

    /// What defines `op` in a graph written against `versions`; `None` when nothing does.
    pub fn of(&self, op: &OpData, versions: &BTreeMap<Symbol, i64>) -> Option<Callee<'a>> {
        if let Some(def) = self.ops.get(&op.name) {
            return Some(Callee::Native(def));
        }
        let overload = op.meta.get(OVERLOAD).map_or("", |s| s);
        match self.functions.get(&(op.name.as_str(), overload)) {
            Some(f) => Some(Callee::Function(f)),
            None => self.ops.body(&op.name, version(versions, op.name.dialect())).map(Callee::Spec),
        }
    }
}

/// The entry of an op that says which of the functions of one name it calls.
pub const OVERLOAD: &str = "overload";

fn version(versions: &BTreeMap<Symbol, i64>, dialect: &str) -> i64 {
    versions.get(dialect).copied().unwrap_or(1)
}

/// What the ops of a graph see from outside of it, values apart.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// Operator versions by dialect.
    pub versions: &'a BTreeMap<Symbol, i64>,
    /// In the body of a function: the attributes of the call.
    attrs: Option<&'a Attrs>,
}

impl<'a> Frame<'a> {
    /// The frame of a model's own graph.
    pub fn top(m: &'a Module) -> Frame<'a> {
        Frame { versions: &m.opsets, attrs: None }
    }

    /// The frame of the body of `f`, called with `arguments`.
    pub fn call(f: &'a Function, arguments: &'a Attrs) -> Frame<'a> {
        Frame { versions: &f.opsets, attrs: Some(arguments) }
    }

    /// The operator version of a dialect, 1 when it is not imported.
    pub fn version(&self, dialect: &str) -> i64 {
        version(self.versions, dialect)
    }

    /// The attributes of an op, with references replaced by what they mean. A reference to an attribute that the
    /// call does not give, and that has no default, stands for none.
    pub fn attrs<'d>(&self, own: &'d Attrs) -> Result<Cow<'d, Attrs>, OpError> {
        if !own.iter().any(|(_, a)| matches!(a, Attr::Ref { .. })) {
            return Ok(Cow::Borrowed(own));
        }
        let mut bound = Attrs::default();
        for (name, attr) in own.iter() {
            match attr {
                Attr::Ref { name: meant, kind } => match self.attrs.and_then(|a| a.get(meant)) {
                    Some(Attr::Graph(_) | Attr::Graphs(_)) => {
                        return Err(OpError::Unsupported(format!(
                            "the graph {meant:?}, given to a function as an attribute"
                        )));
                    }
                    Some(given) if !given.is_kind(kind_name(*kind)) => {
                        return Err(OpError::invalid(format!(
                            "the attribute {meant:?} of the call is of kind {}, expected {}",
                            given.kind(),
                            kind_name(*kind)
                        )));
                    }
                    Some(given) => bound.set(name.clone(), given.clone()),
                    None => {}
                },
                _ => bound.set(name.clone(), attr.clone()),
            }
        }
        Ok(Cow::Owned(bound))
    }
}

/// The attributes that the body of `f` can refer to in a call with the attributes `given`.
pub fn arguments(f: &Function, given: &Attrs) -> Attrs {
    let mut all = f.defaults.clone();
    for (name, attr) in given.iter() {
        all.set(name.clone(), attr.clone());
    }
    all
}

/// The error for a call that leads back to itself, or too deep.
pub fn check_chain<T: PartialEq>(chain: &[T], next: &T, f: &Function) -> Result<(), OpError> {
    if chain.contains(next) {
        return Err(OpError::invalid(format!("the function {} calls itself", f.name)));
    }
    if chain.len() >= MAX_DEPTH {
        return Err(OpError::Unsupported(format!("calls nested more than {MAX_DEPTH} deep")));
    }
    Ok(())
}
