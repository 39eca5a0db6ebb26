//! Extraction: the cheapest set of e-nodes that computes all roots, shared values paid once.
//!
//! Greedy first (the cheapest tree of each class); then one class at a time is computed another way, for as long as
//! that makes the whole cheaper; then an exact search over the DAG, depth first with a lower bound, within a number of
//! steps. Of equal ways the module's own is taken.

use super::cost::CostModel;
use super::graph::Graph;
use super::lang::Node;
use egg::Id;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Steps of the exact search for questions about one value.
pub const STEPS: u64 = 50_000;

/// A choice of one e-node per class that is needed at run time.
#[derive(Clone, Debug)]
pub struct Extraction {
    /// The e-nodes, constants left out.
    pub choice: BTreeMap<Id, Node>,
    /// Their cost.
    pub cost: u64,
    /// Whether nothing cheaper exists in the graph.
    pub optimal: bool,
    /// What every choice costs at least.
    pub least: u64,
}

/// Extracts from one graph.
pub struct Extractor<'g, 'a> {
    g: &'g Graph<'a>,
    /// For each class: its e-nodes with their own cost, cheapest tree first.
    options: BTreeMap<Id, Vec<(u64, Node)>>,
}

impl<'g, 'a> Extractor<'g, 'a> {
    /// Prepares the graph, which must be rebuilt.
    pub fn new(g: &'g Graph<'a>, model: &CostModel) -> Self {
        let mut all: BTreeMap<Id, Vec<(u64, Node)>> = BTreeMap::new();
        for class in g.eg.classes() {
            if !g.is_const(class.id) && !g.is_absent(class.id) {
                let nodes = g.nodes(class.id).into_iter().map(|n| (model.of(g, class.id, &n), n)).collect();
                all.insert(class.id, nodes);
            }
        }
        let canonical =
            |n: &Node| Node { head: n.head, children: n.children.iter().map(|&c| g.find(c)).collect() };
        let own: HashSet<Node> = g.values.iter().map(|(_, _, n)| canonical(n)).collect();
        let mut this = Extractor { g, options: all };
        let tree = this.trees();
        for (&class, options) in this.options.iter_mut() {
            let needs = |o: &(u64, Node)| -> BTreeSet<Id> { runs(g, &o.1).collect() };
            let total = |o: &(u64, Node)| {
                let below = needs(o).into_iter().map(|c| tree.get(&c).copied().unwrap_or(u64::MAX / 4));
                below.fold(o.0, u64::saturating_add)
            };
            options.sort_by_cached_key(|o| (total(o), !own.contains(&o.1), o.1.clone()));
            // A way that needs all that another one needs, and costs as much, is never wanted; nor one that needs itself.
            let mut kept: Vec<(BTreeSet<Id>, (u64, Node))> = Vec::new();
            for o in std::mem::take(options) {
                let needs = needs(&o);
                let worse = kept.iter().any(|(n, k)| k.0 <= o.0 && n.is_subset(&needs));
                if !needs.contains(&class) && !worse {
                    kept.push((needs, o));
                }
            }
            *options = kept.into_iter().map(|k| k.1).collect();
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
        runs(self.g, node)
    }

    /// The cheapest choice that computes `roots`, searched for in `steps`. A choice that costs no more than `enough` ends
    /// the search, and one that costs more is of no interest then.
    pub fn best(&self, roots: &[Id], enough: Option<u64>, steps: u64) -> Option<Extraction> {
        let roots: BTreeSet<Id> =
            roots.iter().map(|&r| self.g.find(r)).filter(|&r| !self.g.is_const(r)).collect();
        let bound = enough.map_or(u64::MAX, |e| e.saturating_add(1));
        let first = self.improved(&roots).filter(|b| b.1 < bound);
        let forced = self.forced(&roots);
        let mut search = Search {
            x: self,
            chosen: BTreeMap::new(),
            bound: first.as_ref().map_or(bound, |b| b.1),
            best: first,
            enough: enough.unwrap_or(0),
            steps,
        };
        if search.best.as_ref().is_none_or(|b| b.1 > search.enough.max(forced)) {
            let least = roots.iter().map(|r| self.least(*r)).sum();
            search.go(&roots, 0, least);
        }
        let (choice, cost) = search.best?;
        Some(Extraction { choice, cost, optimal: search.steps > 0 || cost <= forced, least: forced })
    }

    /// What is paid whatever is chosen: for the classes that every way to compute `roots` needs.
    fn forced(&self, roots: &BTreeSet<Id>) -> u64 {
        let mut forced = roots.clone();
        let mut todo: Vec<Id> = roots.iter().copied().collect();
        while let Some(class) = todo.pop() {
            let mut ways =
                self.options.get(&class).into_iter().flatten().map(|(_, n)| self.needs(n).collect());
            let Some(first): Option<BTreeSet<Id>> = ways.next() else { continue };
            let all = ways.fold(first, |all, way| all.intersection(&way).copied().collect());
            todo.extend(all.into_iter().filter(|&c| forced.insert(c)));
        }
        forced.into_iter().map(|c| self.least(c)).fold(0, u64::saturating_add)
    }

    /// The choice that takes the way `picks` names for a class, and the first one elsewhere.
    fn choice(&self, roots: &BTreeSet<Id>, picks: &HashMap<Id, usize>) -> Option<(BTreeMap<Id, Node>, u64)> {
        let mut choice = BTreeMap::new();
        let mut cost = 0u64;
        let mut todo: Vec<Id> = roots.iter().copied().collect();
        while let Some(class) = todo.pop() {
            if choice.contains_key(&class) {
                continue;
            }
            let (own, node) = self.options.get(&class)?.get(picks.get(&class).copied().unwrap_or(0))?;
            cost = cost.saturating_add(*own);
            todo.extend(self.needs(node));
            choice.insert(class, node.clone());
        }
        Some((choice, cost))
    }

    /// The cheapest trees, and from there one class at a time computed another way while that makes the whole cheaper.
    fn improved(&self, roots: &BTreeSet<Id>) -> Option<(BTreeMap<Id, Node>, u64)> {
        let mut picks: HashMap<Id, usize> = HashMap::new();
        let mut best = self.choice(roots, &picks).filter(|b| self.acyclic(&b.0))?;
        loop {
            let before = best.1;
            let classes: Vec<Id> = best.0.keys().copied().collect();
            for class in classes {
                let ways = self.options.get(&class).map_or(0, Vec::len);
                for way in (0..ways).filter(|_| ways > 1) {
                    let old = picks.insert(class, way);
                    match self.choice(roots, &picks) {
                        Some(c) if c.1 < best.1 && self.acyclic(&c.0) => best = c,
                        _ => {
                            picks.remove(&class);
                            picks.extend(old.map(|o| (class, o)));
                        }
                    }
                }
            }
            if best.1 == before {
                return Some(best);
            }
        }
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

/// The classes that must be computed before an e-node runs.
fn runs<'n>(g: &'n Graph, node: &'n Node) -> impl Iterator<Item = Id> + 'n {
    node.children.iter().map(|&c| g.find(c)).filter(|&c| !g.is_const(c) && !g.is_absent(c))
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
