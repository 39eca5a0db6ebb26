//! Saturation: applies every rule until nothing is new or the fuel is spent.
//!
//! The fuel is counted in e-nodes and matches, never in time, and everything is visited in order of ids, so that the
//! same window gives the same graph every time.

use super::graph::Graph;
use super::lang::Node;
use super::rules;
use egg::Id;
use std::collections::HashSet;

/// How far a window may grow.
#[derive(Clone, Copy, Debug)]
pub struct Fuel {
    /// E-nodes.
    pub nodes: usize,
    /// Rule applications.
    pub matches: usize,
}

impl Default for Fuel {
    fn default() -> Self {
        Fuel { nodes: 20_000, matches: 50_000 }
    }
}

/// Applies all rules. Returns what ran out, if anything did.
pub fn saturate(g: &mut Graph, fuel: Fuel) -> Option<String> {
    let mut done: HashSet<(&'static str, Id, Node, Option<Node>)> = HashSet::new();
    let mut matches = 0;
    loop {
        g.eg.rebuild();
        g.patterns.borrow_mut().clear();
        let before = g.eg.total_number_of_nodes();
        let mut news = false;
        let mut classes: Vec<Id> = g.eg.classes().map(|c| c.id).collect();
        classes.sort();
        for class in classes {
            if g.known(class).konst {
                continue;
            }
            for node in g.nodes(class) {
                news |= plain(g, class, &node, &mut done, &mut matches);
                news |= pushes(g, class, &node, &mut done, &mut matches);
                if g.eg.total_number_of_nodes() > fuel.nodes {
                    g.eg.rebuild();
                    return Some(format!("{} e-nodes", fuel.nodes));
                }
                if matches > fuel.matches {
                    g.eg.rebuild();
                    return Some(format!("{} matches", fuel.matches));
                }
            }
        }
        if !news && g.eg.total_number_of_nodes() == before {
            g.eg.rebuild();
            g.patterns.borrow_mut().clear();
            return None;
        }
    }
}

type Done = HashSet<(&'static str, Id, Node, Option<Node>)>;

fn plain(g: &mut Graph, class: Id, node: &Node, done: &mut Done, matches: &mut usize) -> bool {
    let mut news = false;
    let name = rules::short(g.name(node)).to_string();
    for rule in rules::plains().filter(|r| r.ops.contains(&name.as_str())) {
        // These look at parents and at children's other forms, so they are asked in every round.
        for equal in (rule.apply)(g, node) {
            if done.insert((rule.name, class, node.clone(), g.nodes(equal).first().cloned())) {
                *matches += 1;
            }
            news |= g.union(class, equal);
        }
    }
    news
}

fn pushes(g: &mut Graph, class: Id, node: &Node, done: &mut Done, matches: &mut usize) -> bool {
    let mut news = false;
    for p in rules::products(g, node) {
        for f in g.nodes(p.x) {
            let name = rules::short(g.name(&f)).to_string();
            for rule in rules::pushes().filter(|r| r.through.contains(&name.as_str())) {
                // The key holds the scale through `node`'s children; the class keeps it apart per product.
                let key = (rule.name, g.find(class), node.clone(), Some(f.clone()));
                if !done.insert(key) {
                    continue;
                }
                *matches += 1;
                if let Some(equal) = (rule.push)(g, &p, &f) {
                    news |= g.union(class, equal);
                }
            }
        }
    }
    news
}
