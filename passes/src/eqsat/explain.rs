//! Why a value is computed as it is: the rules that lead from the op that computed it to the one that was extracted.
//!
//! Every equality that a rule states is recorded with the e-node that it matched and the one that it gave
//! ([`Union`](super::graph::Union)). Within a class these are the edges of a graph, and the shortest path from the old
//! e-node to the new one is the chain. An e-node names its operands by class: how those changed is their own chain.

use super::extract::Extraction;
use super::graph::{Graph, Id};
use super::lang::{Head, Node};
use super::window::Window;
use dialects::ir::Op;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};

/// How deep the terms of a chain are written out.
const DEPTH: usize = 2;

/// One rule that was applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Link {
    /// The rule's name.
    pub rule: String,
    /// The term that it was applied to.
    pub from: String,
    /// The term that it gave; either may be the left side, since an equality can be read both ways.
    pub to: String,
}

/// What became of one value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chain {
    /// The pass.
    pub pass: String,
    /// The source node that computed it.
    pub node: String,
    /// Its name.
    pub value: String,
    /// The term that computed it.
    pub before: String,
    /// The term that computes it now; `None` when nothing needs it any more.
    pub after: Option<String>,
    /// The rules, in order. Empty where only operands changed.
    pub links: Vec<Link>,
}

/// The chain of every value of the window that an extraction computes in another way, or not at all.
pub fn chains(g: &Graph, w: &Window, x: &Extraction) -> Vec<Chain> {
    let canonical =
        |n: &Node| Node { head: n.head, children: n.children.iter().map(|&c| g.find(c)).collect() };
    let mut edges: BTreeMap<Node, Vec<(Node, usize)>> = BTreeMap::new();
    for (i, u) in g.unions.iter().enumerate() {
        let (from, to) = (canonical(&u.from), canonical(&u.to));
        edges.entry(from.clone()).or_default().push((to.clone(), i));
        edges.entry(to).or_default().push((from, i));
    }
    let mut out = Vec::new();
    for (v, id, node) in &g.values {
        let m = g.world().m;
        let inside = |op: &Op| matches!(node.head, Head::Op { .. }) && w.ops.contains(op);
        let Some((op, _)) = m.def_op(*v).filter(|(op, _)| inside(op)) else { continue };
        let (old, class) = (canonical(node), g.find(*id));
        let new = x.choice.get(&class);
        if new == Some(&old) || g.is_const(class) && node.children.iter().all(|&c| g.is_const(c)) {
            continue;
        }
        let links = new.map(|new| path(&edges, &old, new)).unwrap_or_default();
        out.push(Chain {
            pass: String::new(),
            node: m.ops[op].loc.to_string(),
            value: m.value_label(*v),
            before: show(g, &old, DEPTH),
            after: match (new, g.is_const(class)) {
                (Some(new), _) => Some(show(g, new, DEPTH)),
                (None, true) => Some("a constant".into()),
                (None, false) => None,
            },
            links: links
                .into_iter()
                .map(|i| {
                    let u = &g.unions[i];
                    let rule = u.rule.clone();
                    Link { rule, from: show(g, &u.from, DEPTH), to: show(g, &u.to, DEPTH) }
                })
                .collect(),
        });
    }
    out
}

/// The shortest path between two e-nodes, as the numbers of equalities.
fn path(edges: &BTreeMap<Node, Vec<(Node, usize)>>, from: &Node, to: &Node) -> Vec<usize> {
    let mut came: BTreeMap<&Node, (&Node, usize)> = BTreeMap::new();
    let mut todo = VecDeque::from([from]);
    while let Some(n) = todo.pop_front() {
        if n == to {
            break;
        }
        for (next, i) in edges.get(n).into_iter().flatten() {
            if next != from && !came.contains_key(next) {
                came.insert(next, (n, *i));
                todo.push_back(next);
            }
        }
    }
    let mut links = Vec::new();
    let mut at = to;
    while let Some(&(before, i)) = came.get(at) {
        links.push(i);
        at = before;
    }
    links.reverse();
    links
}

/// A term, for people: values of the module by name, others by the op that computes them.
fn show(g: &Graph, node: &Node, depth: usize) -> String {
    let m = g.world().m;
    match node.head {
        Head::Absent => "_".into(),
        Head::Input(i) => m.value_label(g.world().inputs[i as usize]),
        Head::Const(i) => m.value_label(g.world().consts[i as usize].1),
        Head::Literal(i) => {
            let t = &g.world().literals[i as usize].tensor;
            let numbers = t.to_f32().map(|v| v.iter().take(5).map(f32::to_string).collect::<Vec<_>>());
            let numbers = numbers
                .or_else(|_| t.to_i64().map(|v| v.iter().take(5).map(i64::to_string).collect::<Vec<_>>()));
            match numbers {
                Ok(n) if t.len() == 1 => n.concat(),
                Ok(n) if t.len() <= 5 => format!("[{}]", n.join(", ")),
                _ => format!("{}{:?}", t.elem(), t.shape()),
            }
        }
        Head::Scale(_) => "scale".into(),
        Head::Op { result, .. } => {
            let operands: Vec<String> = node.children.iter().map(|&c| operand(g, c, depth)).collect();
            let result = if result > 0 { format!("#{result}") } else { String::new() };
            format!("{}({}){result}", g.name(node), operands.join(", "))
        }
    }
}

fn operand(g: &Graph, class: Id, depth: usize) -> String {
    let class = g.find(class);
    let named = g.values.iter().find(|(_, id, _)| g.find(*id) == class);
    match (named, g.nodes(class).first()) {
        (Some((v, _, node)), _) if !matches!(node.head, Head::Literal(_)) => g.world().m.value_label(*v),
        (_, Some(leaf)) if leaf.children.is_empty() => show(g, leaf, 0),
        (_, Some(node)) if depth > 0 => show(g, node, depth - 1),
        _ => "..".into(),
    }
}
