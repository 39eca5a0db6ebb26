//! Graph questions, asked of a `petgraph` view of one region: order, cycles, reachability, dominance.

use super::{Module, Op, Region, Value};
use petgraph::algo::dominators::{Dominators, simple_fast};
use petgraph::graphmap::DiGraphMap;
use petgraph::visit::{Dfs, Reversed};
use std::collections::{BTreeSet, HashSet};

/// Values that `op` reads: its operands, and what its nested regions take from outside of them.
pub fn reads(m: &Module, op: Op) -> Vec<Value> {
    let mut out: Vec<Value> = m.ops[op].operands.iter().copied().flatten().collect();
    for region in m.ops[op].attrs.regions() {
        out.extend(captures(m, region));
    }
    out
}

/// Values that a region reads but does not define, each once, in the order of first use.
pub fn captures(m: &Module, region: Region) -> Vec<Value> {
    let data = &m.regions[region];
    let mut own: HashSet<Value> = data.args.iter().chain(&data.consts).copied().collect();
    own.extend(data.ops.iter().flat_map(|&op| m.ops[op].results.iter().copied().flatten()));
    let mut seen = HashSet::new();
    let used = data.ops.iter().flat_map(|&op| reads(m, op)).chain(data.results.iter().copied());
    used.filter(|v| !own.contains(v)).filter(|v| seen.insert(*v)).collect()
}

/// The ops of one region, with an edge from each op to every op that reads one of its results.
pub fn view(m: &Module, region: Region) -> DiGraphMap<Op, ()> {
    let mut g = DiGraphMap::new();
    for &op in &m.regions[region].ops {
        g.add_node(op);
    }
    for &op in &m.regions[region].ops {
        for v in reads(m, op) {
            if let Some((def, _)) = m.def_op(v)
                && m.ops[def].region == region
            {
                g.add_edge(def, op, ());
            }
        }
    }
    g
}

/// The region's ops in an order that respects definitions, and is the present one wherever that does; or an op
/// on a cycle.
pub fn topological(m: &Module, region: Region) -> Result<Vec<Op>, Op> {
    let g = view(m, region);
    let ops = &m.regions[region].ops;
    let place: std::collections::HashMap<Op, usize> = ops.iter().enumerate().map(|(i, &o)| (o, i)).collect();
    let mut waiting: std::collections::HashMap<Op, usize> =
        ops.iter().map(|&o| (o, g.neighbors_directed(o, petgraph::Incoming).count())).collect();
    let mut ready: BTreeSet<usize> = ops.iter().filter(|o| waiting[o] == 0).map(|o| place[o]).collect();
    let mut out = Vec::with_capacity(ops.len());
    while let Some(i) = ready.pop_first() {
        let op = ops[i];
        out.push(op);
        for next in g.neighbors(op) {
            let n = waiting.get_mut(&next).expect("a neighbour is an op of the region");
            *n -= 1;
            if *n == 0 {
                ready.insert(place[&next]);
            }
        }
    }
    if out.len() == ops.len() {
        return Ok(out);
    }
    // What is left either stands on a cycle or behind one: walking to waiting predecessors ends on it.
    let done: HashSet<Op> = out.into_iter().collect();
    let mut op = *ops.iter().find(|o| !done.contains(o)).expect("an op is left over");
    for _ in 0..ops.len() {
        let back = g.neighbors_directed(op, petgraph::Incoming).find(|o| !done.contains(o));
        op = back.expect("a waiting op waits for a waiting op");
    }
    Err(op)
}

/// All ops of the region from which `op` can be reached, itself included.
pub fn ancestors(m: &Module, op: Op) -> HashSet<Op> {
    let g = view(m, m.ops[op].region);
    let mut dfs = Dfs::new(Reversed(&g), op);
    let mut out = HashSet::new();
    while let Some(o) = dfs.next(Reversed(&g)) {
        out.insert(o);
    }
    out
}

/// Dominators of the region's ops, seen from `root`.
pub fn dominators(m: &Module, root: Op) -> Dominators<Op> {
    simple_fast(&view(m, m.ops[root].region), root)
}
