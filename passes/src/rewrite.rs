//! Directed rewriting: a rule looks at one op and returns a patch or nothing. A patch replaces one value by
//! another of the same type; one that would change the type its users see is refused.

use crate::PassError;
use dialects::ir::{Module, Op, OpBuilder, Value, infer::compatible};

/// Ops to put before an op, and what replaces one of its results.
#[derive(Debug)]
pub struct Patch {
    at: Op,
    replace: Vec<(Value, Value)>,
}

impl Patch {
    /// A patch at `at`. Ops added with [`Patch::op`] go before it.
    pub fn new(at: Op) -> Patch {
        Patch { at, replace: Vec::new() }
    }

    /// Adds an op before the patched one and returns its first result.
    pub fn op(&self, m: &mut Module, op: OpBuilder) -> Value {
        let op = m.insert_before(self.at, op);
        m.ops[op].result(0).expect("an op of a patch has a first result")
    }

    /// Makes the users of `old` use `new`.
    pub fn replace(mut self, old: Value, new: Value) -> Patch {
        self.replace.push((old, new));
        self
    }
}

/// Applies a patch: checks types, moves the users over, and erases the patched op when nobody uses it any more.
pub fn apply(m: &mut Module, pass: &'static str, patch: Patch) -> Result<(), PassError> {
    for &(old, new) in &patch.replace {
        if !compatible(m.ty(old), m.ty(new)) {
            return Err(PassError::At {
                pass,
                what: m.ops[patch.at].loc.to_string(),
                why: format!(
                    "this is a bug in the pass: a patch changes the type of {:?} from {} to {}",
                    m.value_label(old),
                    m.ty(old),
                    m.ty(new)
                ),
            });
        }
        m.replace_uses(old, new);
    }
    let uses = m.uses();
    if m.ops[patch.at].results.iter().flatten().all(|&v| uses.of(v).is_empty()) {
        m.erase(patch.at);
    }
    Ok(())
}

/// Runs `rule` on every op of every live region, in program order, once. Returns how many patches were applied.
pub fn each_op(
    m: &mut Module,
    pass: &'static str,
    mut rule: impl FnMut(&mut Module, Op) -> Result<Option<Patch>, PassError>,
) -> Result<u64, PassError> {
    let mut applied = 0;
    for op in m.live_ops() {
        if let Some(patch) = rule(m, op)? {
            apply(m, pass, patch)?;
            applied += 1;
        }
    }
    Ok(applied)
}
