//! Where a difference between two models begins.
//!
//! Values that a pass did not redefine are there in both models. An exact pass may change some of them all the same: a
//! norm whose gain takes a scale gives scaled values. Such a difference heals before the outputs. What does not heal has
//! a path of differing values to an output, and its beginning is an op of which no operand differs.

use super::item_error;
use dialects::ir::graph::reads;
use dialects::ir::infer::compatible;
use dialects::ir::{Module, Op, Value};
use dialects::ops::Item;
use std::collections::{HashMap, HashSet};

/// Values that are held of each model at once.
const HELD: usize = 64;

/// Gives values of a model.
pub(super) type Run<'a> = dyn Fn(&Module, &[Value]) -> Result<Vec<Item>, String> + 'a;

/// The first op of `after` from which a difference runs to output number `output`, as `MatMul "/layer/q"`; `None` where
/// the models have too little in common. `run` gives values of a model for
/// one batch after the other.
pub(super) fn locate(
    before: &Module,
    after: &Module,
    output: usize,
    tolerance: f64,
    run: &Run,
) -> Option<String> {
    let computed = |m: &Module| -> HashSet<Value> {
        m.regions[m.top].ops.iter().flat_map(|&op| m.ops[op].results.iter().flatten().copied()).collect()
    };
    let (ours, theirs) = (computed(after), computed(before));
    let same = |v: &Value| theirs.contains(v) && compatible(before.ty(*v), after.ty(*v));
    let mut shared: Vec<Value> = ours.into_iter().filter(same).collect();
    shared.sort();

    // Whether a shared value differs; the output does.
    let mut differs: HashMap<Value, bool> = HashMap::new();
    for chunk in shared.chunks(HELD) {
        let (a, b) = (run(before, chunk).ok()?, run(after, chunk).ok()?);
        // Each value comes once for every batch.
        for (&v, (a, b)) in chunk.iter().cycle().zip(a.iter().zip(&b)) {
            let agree = item_error(a, b) <= tolerance;
            *differs.entry(v).or_default() |= !agree;
        }
    }
    let result = after.regions[after.top].results[output];
    differs.insert(result, true);

    let tainted = tainted(after, &differs);
    let mut begins: Vec<Op> = Vec::new();
    let (mut seen, mut open) = (HashSet::new(), vec![result]);
    while let Some(v) = open.pop() {
        let Some((op, _)) = after.def_op(v).filter(|_| seen.insert(v)) else { continue };
        let bad: Vec<Value> = reads(after, op).into_iter().filter(|v| tainted.contains(v)).collect();
        match bad.is_empty() {
            true => begins.push(op),
            false => open.extend(bad),
        }
    }
    let first = after.regions[after.top].ops.iter().find(|op| begins.contains(op))?;
    let data = &after.ops[*first];
    Some(format!("{} {:?}", data.name.op(), &*data.loc))
}

/// Values that differ, or are new and computed from what differs.
fn tainted(m: &Module, differs: &HashMap<Value, bool>) -> HashSet<Value> {
    let mut out = HashSet::new();
    for &op in &m.regions[m.top].ops {
        let through = reads(m, op).iter().any(|v| out.contains(v));
        let bad = |v: &&Value| differs.get(v).copied().unwrap_or(through);
        out.extend(m.ops[op].results.iter().flatten().filter(bad));
    }
    out
}
