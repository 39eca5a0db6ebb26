//! Cutting a region into windows: runs of ops in program order, so that no window waits for a later one.
//!
//! A run ends where the fewest of its values are read behind it. In a chain of blocks that is where one value, the
//! residual stream, carries all that the run computed. Since each cut is found from the one before, equal blocks are cut
//! alike.

use dialects::ir::{Module, Op, Region, Use, Uses, Value};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// At most this many ops.
pub const LARGEST: usize = 256;

/// Cuts the ops of a region into runs of at least `smallest` ops where there are so many, and at most [`LARGEST`]. Ops
/// that `alone` names are in no run, and end the run before them.
pub fn partition(
    m: &Module,
    uses: &Uses,
    region: Region,
    smallest: usize,
    alone: impl Fn(Op) -> bool,
) -> Vec<Vec<Op>> {
    let ops = &m.regions[region].ops;
    let last = last_readers(m, uses, region);
    let mut runs = Vec::new();
    let mut start = 0;
    while start < ops.len() {
        if alone(ops[start]) {
            start += 1;
            continue;
        }
        // For each place that the run may end at: how many values of the run are read behind it.
        let mut behind: BinaryHeap<Reverse<usize>> = BinaryHeap::new();
        let mut best = None;
        for end in start + 1..=ops.len().min(start + LARGEST) {
            behind.extend(last[end - 1].iter().map(|&l| Reverse(l)));
            while behind.peek().is_some_and(|l| l.0 < end) {
                behind.pop();
            }
            let wall = end == ops.len() || alone(ops[end]);
            if best.is_none_or(|(n, _)| behind.len() < n) && (wall || end - start >= smallest) {
                best = Some((behind.len(), end));
            }
            if wall {
                break;
            }
        }
        let end = best.map_or(start + 1, |b| b.1);
        runs.push(ops[start..end].to_vec());
        start = end;
    }
    runs
}

/// For each op: the place of the last reader of each of its results.
fn last_readers(m: &Module, uses: &Uses, region: Region) -> Vec<Vec<usize>> {
    let ops = &m.regions[region].ops;
    let place: HashMap<Op, usize> = ops.iter().enumerate().map(|(i, &op)| (op, i)).collect();
    // An op of a nested region reads where the op that holds the region stands.
    let enclosing = |mut op: Op| loop {
        if let Some(&p) = place.get(&op) {
            return Some(p);
        }
        op = m.regions[m.ops[op].region].parent?;
    };
    let reader = |u: &Use| match u {
        Use::Operand(op, _) => enclosing(*op),
        Use::Result(..) => Some(ops.len()),
    };
    let last = |v: &Value| uses.of(*v).iter().filter_map(reader).max();
    ops.iter().map(|&op| m.ops[op].results.iter().flatten().filter_map(last).collect()).collect()
}
