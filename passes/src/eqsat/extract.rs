//! Extraction: the cheapest set of e-nodes that computes all roots, shared values paid once.
//!
//! Greedy first (the cheapest tree of each class), then an exact search over the DAG, depth first with a lower bound,
//! within a number of steps. The cost is what runs: bytes moved and multiplications, with a nominal size for symbolic
//! dims; constants cost nothing to make, and what an op reads of them counts.

use super::graph::Graph;
use super::lang::{Head, Node};
use dialects::ir::Type;
use egg::Id;
use std::collections::{BTreeMap, BTreeSet};

/// What a symbolic or unknown dim counts as.
const NOMINAL: u64 = 64;
/// The cost of running an op at all.
const PER_OP: u64 = 1024;
/// Steps of the exact search.
const STEPS: u64 = 50_000;

/// A choice of one e-node per class that is needed at run time.
#[derive(Clone, Debug)]
pub struct Extraction {
    /// The e-nodes, constants left out.
    pub choice: BTreeMap<Id, Node>,
    /// Their cost.
    pub cost: u64,
    /// Whether nothing cheaper exists in the graph.
    pub optimal: bool,
}

/// Extracts from one graph.
pub struct Extractor<'g, 'a> {
    g: &'g Graph<'a>,
    /// For each class: its e-nodes with their own cost, cheapest tree first.
    options: BTreeMap<Id, Vec<(u64, Node)>>,
}

fn bytes(ty: &Type) -> u64 {
    let Some(t) = ty.as_tensor() else { return NOMINAL };
    let Some(dims) = &t.dims else { return NOMINAL * NOMINAL };
    let size = |d: &dialects::ir::Dim| d.known().and_then(|n| u64::try_from(n).ok()).unwrap_or(NOMINAL);
    let count = dims.iter().map(size).fold(1, u64::saturating_mul);
    count.saturating_mul(t.elem.bits() as u64) / 8
}

/// What running the e-node costs, its children not counted.
pub fn cost(g: &Graph, class: Id, node: &Node) -> u64 {
    if !matches!(node.head, Head::Op { .. }) || g.is_const(class) {
        return 0;
    }
    let name = g.name(node).strip_prefix("onnx.").unwrap_or("");
    if matches!(name, "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" | "Shape" | "Size") {
        return PER_OP;
    }
    let read: u64 = node.children.iter().map(|&c| bytes(g.ty(c))).fold(0, u64::saturating_add);
    let mut cost = PER_OP.saturating_add(read).saturating_add(bytes(g.ty(class)));
    if matches!(name, "MatMul" | "Gemm" | "Conv" | "Attention") {
        // Every element of the result is a sum over as many products as the weight or V has rows.
        let inner = g.dims(node.children[0]).and_then(|d| d.last()?.known()).unwrap_or(64).unsigned_abs();
        cost = cost.saturating_add(bytes(g.ty(class)).saturating_mul(inner) / 8);
    }
    cost
}

impl<'g, 'a> Extractor<'g, 'a> {
    /// Prepares the graph, which must be rebuilt.
    pub fn new(g: &'g Graph<'a>) -> Self {
        let mut all: BTreeMap<Id, Vec<(u64, Node)>> = BTreeMap::new();
        for class in g.eg.classes() {
            if !g.is_const(class.id) && !g.is_absent(class.id) {
                let nodes = g.nodes(class.id).into_iter().map(|n| (cost(g, class.id, &n), n)).collect();
                all.insert(class.id, nodes);
            }
        }
        let mut this = Extractor { g, options: all };
        let tree = this.trees();
        for (_, options) in this.options.iter_mut() {
            let total = |o: &(u64, Node)| {
                let below =
                    o.1.children.iter().map(|c| tree.get(&g.find(*c)).copied().unwrap_or(u64::MAX / 4));
                let runs =
                    o.1.children.iter().zip(below).filter(|(c, _)| !g.is_const(**c) && !g.is_absent(**c));
                runs.map(|(_, t)| t).fold(o.0, u64::saturating_add)
            };
            options.sort_by_cached_key(|o| (total(o), o.1.clone()));
        }
        this
    }

    /// The cost of the cheapest tree of every class.
    fn trees(&self) -> BTreeMap<Id, u64> {
        let mut tree: BTreeMap<Id, u64> = BTreeMap::new();
        loop {
            let mut changed = false;
            for (&class, options) in &self.options {
                let total = |(own, node): &(u64, Node)| {
                    self.needs(node).try_fold(*own, |sum, c| Some(sum.saturating_add(*tree.get(&c)?)))
                };
                let Some(best) = options.iter().filter_map(total).min() else { continue };
                if tree.get(&class).is_none_or(|&t| best < t) {
                    tree.insert(class, best);
                    changed = true;
                }
            }
            if !changed {
                return tree;
            }
        }
    }

    /// The classes that must be computed before an e-node runs.
    fn needs<'n>(&'n self, node: &'n Node) -> impl Iterator<Item = Id> + 'n {
        let g = self.g;
        node.children.iter().map(|&c| g.find(c)).filter(|&c| !g.is_const(c) && !g.is_absent(c))
    }

    /// The cheapest choice that computes `roots`. A choice that costs no more than `enough` ends the search, and one
    /// that costs more is of no interest then.
    pub fn best(&self, roots: &[Id], enough: Option<u64>) -> Option<Extraction> {
        let roots: BTreeSet<Id> =
            roots.iter().map(|&r| self.g.find(r)).filter(|&r| !self.g.is_const(r)).collect();
        let mut search = Search {
            x: self,
            chosen: BTreeMap::new(),
            best: None,
            bound: enough.map_or(u64::MAX, |e| e.saturating_add(1)),
            enough: enough.unwrap_or(0),
            steps: STEPS,
        };
        let least = roots.iter().map(|r| self.least(*r)).sum();
        search.go(&roots, 0, least);
        let (choice, cost) = search.best?;
        Some(Extraction { choice, cost, optimal: search.steps > 0 })
    }

    fn least(&self, class: Id) -> u64 {
        self.options.get(&class).and_then(|o| o.iter().map(|o| o.0).min()).unwrap_or(0)
    }

    /// Whether a complete choice computes everything before it is used.
    fn acyclic(&self, choice: &BTreeMap<Id, Node>) -> bool {
        let mut waiting: BTreeMap<Id, usize> = BTreeMap::new();
        let mut readers: BTreeMap<Id, Vec<Id>> = BTreeMap::new();
        for (&class, node) in choice {
            let needs: BTreeSet<Id> = self.needs(node).collect();
            waiting.insert(class, needs.len());
            for n in needs {
                readers.entry(n).or_default().push(class);
            }
        }
        let mut ready: Vec<Id> = waiting.iter().filter(|w| *w.1 == 0).map(|w| *w.0).collect();
        let mut done = 0;
        while let Some(class) = ready.pop() {
            done += 1;
            for r in readers.get(&class).into_iter().flatten() {
                let w = waiting.get_mut(r).expect("a reader was chosen");
                *w -= 1;
                if *w == 0 {
                    ready.push(*r);
                }
            }
        }
        done == choice.len()
    }
}

struct Search<'x, 'g, 'a> {
    x: &'x Extractor<'g, 'a>,
    chosen: BTreeMap<Id, Node>,
    best: Option<(BTreeMap<Id, Node>, u64)>,
    bound: u64,
    enough: u64,
    steps: u64,
}

impl Search<'_, '_, '_> {
    /// Decides the classes `open`, where `cost` is paid already and `least` is the least that `open` costs.
    fn go(&mut self, open: &BTreeSet<Id>, cost: u64, least: u64) {
        if self.steps == 0 || cost.saturating_add(least) >= self.bound {
            return;
        }
        self.steps -= 1;
        let x = self.x;
        // The class with the fewest ways first: what is forced is paid early, and the bound bites.
        let count = |c: &Id| x.options.get(c).map_or(0, Vec::len);
        let Some(&class) = open.iter().min_by_key(|c| (count(c), **c)) else {
            if x.acyclic(&self.chosen) {
                self.bound = cost;
                self.best = Some((self.chosen.clone(), cost));
            }
            return;
        };
        let least = least - x.least(class);
        for (own, node) in x.options.get(&class).into_iter().flatten() {
            let mut next = open.clone();
            next.remove(&class);
            self.chosen.insert(class, node.clone());
            let mut more = least;
            for n in x.needs(node) {
                if !self.chosen.contains_key(&n) && next.insert(n) {
                    more += x.least(n);
                }
            }
            self.go(&next, cost.saturating_add(*own), more);
            if self.best.as_ref().is_some_and(|b| b.1 <= self.enough) {
                return;
            }
        }
        self.chosen.remove(&class);
    }
}
