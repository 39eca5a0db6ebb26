//! Finds where the left side of a rule is in the e-graph.

use super::expr::{self, eval, is_attr};
use super::term::{Expr, OpTerm, Term, TextRule, Var};
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::{Head, Node};
use dialects::ir::{Attr, OpName};
use dialects::onnx::attributes;

/// At most this many ways to match one e-node are looked at.
const WAYS: usize = 64;

/// What a variable stands for.
#[derive(Clone, Debug, PartialEq)]
pub enum Binding {
    /// A value.
    Class(Id),
    /// An attribute.
    Attr(Attr),
}

/// What the variables of a rule stand for where it matched.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    vars: Vec<Option<Binding>>,
    /// The class that the left side is.
    pub class: Id,
}

impl Found {
    /// What a variable stands for.
    pub fn of(&self, v: Var) -> Option<&Binding> {
        self.vars.get(v)?.as_ref()
    }

    fn with(&self, v: Var, b: Binding) -> Found {
        let mut new = self.clone();
        new.vars[v] = Some(b);
        new
    }
}

/// Ops whose operands can be exchanged. That is how they match; it is no rule.
fn commutes(name: &str) -> bool {
    matches!(name, "onnx.Add" | "onnx.Mul")
}

/// Ops that broadcast their operands against each other.
fn broadcasts(name: &str) -> bool {
    matches!(name, "onnx.Add" | "onnx.Sub" | "onnx.Mul" | "onnx.Div" | "onnx.Pow" | "onnx.Max" | "onnx.Min")
}

impl TextRule {
    /// Every way in which the rule matches an e-node, its conditions met.
    pub fn matches(&self, g: &Graph, node: &Node) -> Vec<Found> {
        let Some(class) = g.eg.lookup(node.clone()) else { return Vec::new() };
        let empty = Found { vars: vec![None; self.vars.len()], class };
        let found = self.left.iter().flat_map(|op| match_op(g, op, node, empty.clone()));
        let met = |f: &Found| self.conditions.iter().all(|c| expr::condition(g, f, c));
        found.filter(met).collect()
    }
}

fn match_term(g: &Graph, term: &Term, class: Id, f: Found) -> Vec<Found> {
    let yes = |holds: bool| if holds { vec![f.clone()] } else { Vec::new() };
    match term {
        Term::Absent => yes(g.is_absent(class)),
        _ if g.is_absent(class) => Vec::new(),
        Term::Var(v) => match f.of(*v) {
            Some(Binding::Class(id)) => yes(g.find(*id) == g.find(class)),
            Some(Binding::Attr(_)) => Vec::new(),
            None => vec![f.with(*v, Binding::Class(g.find(class)))],
        },
        Term::Named(v, term) => match f.of(*v) {
            Some(Binding::Class(id)) => yes(g.find(*id) == g.find(class)),
            _ => {
                let f = f.with(*v, Binding::Class(g.find(class)));
                match_term(g, term, class, f)
            }
        },
        Term::Any(terms) => {
            let all = terms.iter().flat_map(|t| match_term(g, t, class, f.clone()));
            all.take(WAYS).collect()
        }
        Term::Number(n) => yes(g
            .splat(class)
            .is_some_and(|(x, within)| x == *n || n.is_finite() && (x - n).abs() <= within * n.abs())),
        Term::Ints(items) => {
            let want: Option<Vec<i64>> = items.iter().map(|e| eval(g, &f, e)?.int()).collect();
            yes(want.is_some() && g.ints(class) == want)
        }
        Term::Op(op) => {
            let mut out = Vec::new();
            for node in g.nodes_of(class, &op.name) {
                out.extend(match_op(g, op, &node, f.clone()));
                if out.len() >= WAYS {
                    out.truncate(WAYS);
                    break;
                }
            }
            out
        }
    }
}

fn match_op(g: &Graph, op: &OpTerm, node: &Node, f: Found) -> Vec<Found> {
    let Head::Op { result, outputs, .. } = node.head else { return Vec::new() };
    if !g.is(node, &op.name) || result != op.result || op.outputs.is_some_and(|n| n != outputs) {
        return Vec::new();
    }
    let Some(f) = match_attrs(g, op, node, f) else { return Vec::new() };
    let mut out = ordered(g, op, &node.children, f.clone());
    if commutes(&op.name) && node.children.len() == 2 && op.operands.len() == 2 {
        let swapped = [node.children[1], node.children[0]];
        for other in ordered(g, op, &swapped, f) {
            if !out.contains(&other) {
                out.push(other);
            }
        }
    }
    out
}

fn ordered(g: &Graph, op: &OpTerm, children: &[Id], f: Found) -> Vec<Found> {
    if children.iter().skip(op.operands.len()).any(|&c| !g.is_absent(c)) {
        return Vec::new();
    }
    let mut all = vec![f];
    for (i, term) in op.operands.iter().enumerate() {
        let Some(&child) = children.get(i) else {
            // An operand behind the last is left out.
            if *term == Term::Absent {
                continue;
            }
            return Vec::new();
        };
        if matches!(term, Term::Number(_)) && broadcasts(&op.name) && children.len() == 2 {
            // A number changes no shape.
            if !expr::fits(g, child, children[1 - i]) {
                return Vec::new();
            }
        }
        all = all.into_iter().flat_map(|f| match_term(g, term, child, f)).take(WAYS).collect();
        if all.is_empty() {
            break;
        }
    }
    all
}

/// The attributes named by the rule match, and the others have their defaults.
fn match_attrs(g: &Graph, op: &OpTerm, node: &Node, mut f: Found) -> Option<Found> {
    let name = OpName::parse(&op.name)?;
    let version = g.world().m.opset(name.dialect());
    let attrs = g.attrs(node);
    for (attr, e) in &op.attrs {
        let found = attrs.get(attr).cloned().or_else(|| default(g, &name, version, attr, node))?;
        match e {
            Expr::Var(v) => match f.of(*v) {
                Some(Binding::Attr(a)) if *a == found => {}
                Some(_) => return None,
                None => f = f.with(*v, Binding::Attr(found)),
            },
            e if is_attr(&found, &eval(g, &f, e)?) => {}
            _ => return None,
        }
    }
    let named = |n: &str| op.attrs.iter().any(|(a, _)| a == n);
    let usual = |n: &str, a: &Attr| default(g, &name, version, n, node).is_some_and(|d| d == *a);
    attrs.iter().all(|(n, a)| named(n) || usual(n, a)).then_some(f)
}

/// What an attribute is when it is left out.
fn default(g: &Graph, name: &OpName, version: i64, attr: &str, node: &Node) -> Option<Attr> {
    if name.as_str() == "onnx.Transpose" && attr == "perm" {
        let rank = g.dims(*node.children.first()?)?.len() as i64;
        return Some(Attr::Ints((0..rank).rev().collect()));
    }
    attributes::default(name, version, attr)
}
