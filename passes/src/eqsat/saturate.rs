//! Saturation: applies every rule until nothing is new or the fuel is spent.
//!
//! The fuel is counted in e-nodes and matches, never in time, and everything is visited in order of ids, so that the
//! same window gives the same graph every time.

use super::graph::Graph;
use super::lang::Node;
use super::rules::{self, RuleSet};
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

/// What was applied already: the number of a rule, the class and the e-node it matched, and the other e-node that it
/// looked at or gave.
type Done = HashSet<(usize, Id, Node, Option<Node>)>;

#[derive(Default)]
struct Run {
    rules: Done,
    pushes: Done,
    matches: usize,
}

/// Applies all rules. Returns what ran out, if anything did.
pub fn saturate(g: &mut Graph, fuel: Fuel, rules: &RuleSet) -> Option<String> {
    let mut run = Run::default();
    loop {
        g.eg.rebuild();
        g.patterns.borrow_mut().clear();
        let before = g.eg.total_number_of_nodes();
        let mut news = false;
        let mut classes: Vec<Id> = g.eg.classes().map(|c| c.id).collect();
        classes.sort();
        // What is there already needs no better form.
        let context = g.context();
        for class in classes {
            if g.known(class).konst || context.contains(&class) {
                continue;
            }
            for node in g.nodes(class) {
                news |= run.rules(g, rules, class, &node);
                news |= run.pushes(g, rules, class, &node);
                if g.eg.total_number_of_nodes() > fuel.nodes {
                    g.eg.rebuild();
                    return Some(format!("{} e-nodes", fuel.nodes));
                }
                if run.matches > fuel.matches {
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

impl Run {
    /// Asks the rules about an e-node. They look at parents and at children's other forms, so they are asked in every
    /// round.
    fn rules(&mut self, g: &mut Graph, rules: &RuleSet, class: Id, node: &Node) -> bool {
        let mut news = false;
        let name = g.name(node).to_string();
        for (i, rule) in rules.about(&name) {
            rule.name().clone_into(&mut g.rule);
            for equal in rule.apply(g, node) {
                if self.rules.insert((i, class, node.clone(), g.nodes(equal).first().cloned())) {
                    self.matches += 1;
                }
                news |= g.union(class, node, equal);
            }
        }
        news
    }

    fn pushes(&mut self, g: &mut Graph, rules: &RuleSet, class: Id, node: &Node) -> bool {
        let mut news = false;
        if !rules.moves_scales() {
            return news;
        }
        for p in rules::products(g, node) {
            for f in g.nodes(p.x) {
                let name = g.name(&f).to_string();
                for (i, rule) in rules.through(&name) {
                    // The key holds the scale through `node`'s children; the class keeps it apart per product.
                    let key = (i, g.find(class), node.clone(), Some(f.clone()));
                    if !self.pushes.insert(key) {
                        continue;
                    }
                    self.matches += 1;
                    rule.name.clone_into(&mut g.rule);
                    if let Some(equal) = (rule.push)(g, &p, &f) {
                        news |= g.union(class, node, equal);
                    }
                }
            }
        }
        news
    }
}
