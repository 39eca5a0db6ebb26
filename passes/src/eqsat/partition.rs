//! Cutting a region into windows: runs of ops in program order, so that no window waits for a later one.
//!
//! A cut goes where the fewest values cross it. In a chain of blocks that is where a single value, the residual stream,
//! dominates what follows, beside values that all blocks read. Since each cut is found from the one before, equal blocks
//! are cut alike.

use dialects::ir::{Module, Op, Region, Use, Uses};
use std::collections::HashMap;

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
    let crossing = crossing(m, uses, region);
    let mut runs = Vec::new();
    let mut start = 0;
    while start < ops.len() {
        if alone(ops[start]) {
            start += 1;
            continue;
        }
        let limit = ops.len().min(start + LARGEST);
        let wall = (start..limit).find(|&i| alone(ops[i])).unwrap_or(limit);
        let candidates = (start + smallest).min(wall)..=wall;
        let end = candidates.min_by_key(|&p| (crossing[p], p)).expect("the run can end at the wall");
        runs.push(ops[start..end].to_vec());
        start = end;
    }
    runs
}

/// For each place between ops: how many values are computed before it and read after it.
fn crossing(m: &Module, uses: &Uses, region: Region) -> Vec<usize> {
    let ops = &m.regions[region].ops;
    let place: HashMap<Op, usize> = ops.iter().enumerate().map(|(i, &op)| (op, i)).collect();
    // An op of a nested region reads where the op that holds the region stands.
    let enclosing = |mut op: Op| loop {
        if let Some(&p) = place.get(&op) {
            return Some(p);
        }
        op = m.regions[m.ops[op].region].parent?;
    };
    let mut change = vec![0i64; ops.len() + 2];
    for (i, &op) in ops.iter().enumerate() {
        for &v in m.ops[op].results.iter().flatten().filter(|v| m.const_of(**v).is_none()) {
            let last = uses.of(v).iter().filter_map(|u| match u {
                Use::Operand(op, _) => enclosing(*op),
                Use::Result(..) => Some(ops.len()),
            });
            if let Some(last) = last.max().filter(|&l| l > i) {
                change[i + 1] += 1;
                change[last + 1] -= 1;
            }
        }
    }
    let mut held = 0;
    change
        .iter()
        .map(|c| {
            held += c;
            usize::try_from(held).unwrap_or(0)
        })
        .collect()
}
