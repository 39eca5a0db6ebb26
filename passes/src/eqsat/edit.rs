//! Carries out plans: puts in new ops and computed constants, moves the readers over, and erases what nobody reads.
//!
//! An op that changes only its operands is edited in place, and so is a constant that nothing else reads; a shared one
//! stays, and the new one is called `<name>.scaled`. Plans of disjoint windows are carried out together, in one walk
//! over the module each for what they do, so that time grows with the module and not with its square.

use super::apply::{Expr, Plan, Source};
use crate::{PassCx, PassError};
use dialects::ir::{
    ConstData, ConstError, ConstId, Elem, Module, Op, OpBuilder, Region, TensorSource, Value, ValueDef, infer,
};
use dialects::ops::OpError;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Computed constants of more bytes than this stay expressions, evaluated whenever they are read.
const LAZY: u64 = 1 << 20;

/// A large computed constant, evaluated when it is read.
#[derive(Debug)]
struct Lazy {
    expr: Arc<Expr>,
    elem: Elem,
    len: u64,
}

impl TensorSource for Lazy {
    fn byte_len(&self) -> u64 {
        self.len
    }

    fn read(&self) -> Result<bytes::Bytes, ConstError> {
        let c = self.expr.constant(self.elem).map_err(|e| ConstError::Unavailable(e.to_string()))?;
        c.read()
    }
}

/// Computes the large constants that folding left as expressions, those from number `from` on, once and for all, in buffers
/// that do not count as memory.
pub fn settle(m: &mut Module, cx: &PassCx, pass: &'static str, from: usize) -> Result<(), PassError> {
    let values = m.live_regions().into_iter().flat_map(|r| m.regions[r].consts.clone());
    let ids: BTreeSet<ConstId> =
        values.filter_map(|v| m.const_of(v)).filter(|c| c.as_u32() as usize >= from).collect();
    for id in ids {
        if m.consts[id].byte_len() <= LAZY {
            continue;
        }
        let fail = |e: ConstError| PassError::At { pass, what: "a weight".into(), why: e.to_string() };
        let bytes = m.consts[id].read().map_err(fail)?;
        let mut scratch = cx.env.scratch(bytes.len())?;
        scratch.bytes().copy_from_slice(&bytes);
        let (elem, dims) = (m.consts[id].elem, m.consts[id].dims.clone());
        m.consts[id] = ConstData::new(elem, dims, scratch.freeze()).map_err(fail)?;
    }
    Ok(())
}

impl Plan {
    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.replace.is_empty()
    }

    /// Edits the module. Returns the names of the constants it computed.
    pub fn apply(self, m: &mut Module, region: Region) -> Result<Vec<String>, OpError> {
        apply_all(&[self], m, region)
    }

    /// The contents of its constants.
    pub(super) fn data(&self) -> Result<Vec<ConstData>, OpError> {
        let one = |c: &super::apply::Computed| {
            let count = c.dims.iter().product();
            let len =
                c.elem.byte_len(count).ok_or_else(|| OpError::invalid("a computed constant is too large"))?;
            if len <= LAZY {
                return c.expr.constant(c.elem);
            }
            let lazy = Lazy { expr: c.expr.clone(), elem: c.elem, len };
            ConstData::new(c.elem, c.dims.clone(), Arc::new(lazy))
                .map_err(|e| OpError::invalid(e.to_string()))
        };
        self.consts.iter().map(one).collect()
    }

    /// The same plan for another window, whose values and ops stand for those of this one. `None` where a constant of
    /// the other window is missing.
    pub fn replay(&self, m: &Module, values: &HashMap<Value, Value>, ops: &HashMap<Op, Op>) -> Option<Plan> {
        let value = |v: Value| values.get(&v).copied().unwrap_or(v);
        let source = |s: &Source| match *s {
            Source::Value(v) => Source::Value(value(v)),
            s => s,
        };
        let mut plan = self.clone();
        for step in &mut plan.steps {
            step.operands = step.operands.iter().map(source).collect();
            step.like = step.like.and_then(|op| ops.get(&op).copied());
        }
        for c in &mut plan.consts {
            c.expr = c.expr.replay(m, &value)?;
            c.base = c.base.map(value);
        }
        plan.replace = self.replace.iter().map(|(v, s)| (value(*v), source(s))).collect();
        plan.window = self.window.iter().map(|op| ops.get(op).copied()).collect::<Option<_>>()?;
        plan.loc = plan.replace.first().and_then(|(v, _)| Some(m.ops[m.def_op(*v)?.0].loc.clone()));
        Some(plan)
    }
}

impl Expr {
    /// The same expression on other constants of the same type.
    fn replay(self: &Arc<Expr>, m: &Module, value: &impl Fn(Value) -> Value) -> Option<Arc<Expr>> {
        Some(match &**self {
            Expr::Literal(_) => self.clone(),
            Expr::Leaf(v, _) => {
                let v = value(*v);
                Arc::new(Expr::Leaf(v, m.consts[m.const_of(v)?].clone()))
            }
            Expr::Op { name, attrs, opset, def, operands } => {
                let mut replayed = Vec::with_capacity(operands.len());
                for o in operands {
                    replayed.push(match o {
                        None => None,
                        Some(o) => Some(o.replay(m, value)?),
                    });
                }
                let (name, attrs) = (name.clone(), attrs.clone());
                Arc::new(Expr::Op { name, attrs, opset: *opset, def, operands: replayed })
            }
        })
    }
}

/// What a plan made.
struct Made {
    ops: Vec<Op>,
    consts: Vec<Value>,
}

/// Carries out plans of windows that share no op. Returns the names of the constants that were computed anew.
pub fn apply_all(plans: &[Plan], m: &mut Module, region: Region) -> Result<Vec<String>, OpError> {
    // Everything that can fail comes before the first edit.
    let data: Vec<Vec<ConstData>> = plans.iter().map(Plan::data).collect::<Result<_, _>>()?;
    let order = m.regions[region].ops.clone();
    let place: HashMap<Op, usize> = order.iter().enumerate().map(|(i, &op)| (op, i + 1)).collect();
    // New ops by the number of old ones that they follow.
    let mut after: Vec<Vec<Op>> = vec![Vec::new(); order.len() + 1];
    let mut made = Vec::new();
    let mut replaced: HashMap<Value, Value> = HashMap::new();
    for (plan, data) in plans.iter().zip(data) {
        let consts: Vec<Value> = data.into_iter().map(|d| m.add_const(region, "", d)).collect();
        let mut ops: Vec<Op> = Vec::new();
        let mut places: Vec<usize> = Vec::new();
        let resolve = |m: &Module, ops: &[Op], s: Source| match s {
            Source::Absent => None,
            Source::Value(v) => Some(v),
            Source::Const(i) => Some(consts[i]),
            Source::New(i, r) => m.ops[ops[i]].result(r as usize),
        };
        for step in &plan.steps {
            let from = |s: &Source| match *s {
                Source::Value(v) => m.def_op(v).and_then(|(op, _)| place.get(&op)).copied().unwrap_or(0),
                Source::New(i, _) => places[i],
                Source::Absent | Source::Const(_) => 0,
            };
            let at = step.operands.iter().map(from).max().unwrap_or(0);
            let loc =
                step.like.map_or_else(|| plan.loc.clone().unwrap_or_default(), |op| m.ops[op].loc.clone());
            let operands: Vec<Option<Value>> = step.operands.iter().map(|&s| resolve(m, &ops, s)).collect();
            let mut build =
                OpBuilder::named(step.name.clone(), &loc).operands(operands).attrs(step.attrs.clone());
            for r in 0..step.outputs {
                build = match step.facts.get(&r) {
                    Some(fact) => build.result(fact.ty.clone()),
                    None => build.no_result(),
                };
            }
            let op = m.push(region, build);
            for (&r, fact) in &step.facts {
                let v = m.ops[op].result(r as usize).expect("a result that has a fact is wanted");
                m.values[v].sym = fact.sym.clone();
            }
            after[at].push(op);
            places.push(at);
            ops.push(op);
        }
        for &(old, new) in &plan.replace {
            let new = resolve(m, &ops, new).ok_or_else(|| OpError::invalid("a root has no replacement"))?;
            replaced.insert(old, new);
        }
        made.push(Made { ops, consts });
    }
    move_readers(m, &replaced);
    Ok(sweep(plans, &made, m, region, &order, after))
}

/// Makes every reader of a replaced value read what replaces it, which may be replaced itself.
fn move_readers(m: &mut Module, replaced: &HashMap<Value, Value>) {
    let last = |mut v: Value| {
        while let Some(&next) = replaced.get(&v) {
            v = next;
        }
        v
    };
    for operand in m.ops.values_mut().flat_map(|op| op.operands.iter_mut().flatten()) {
        *operand = last(*operand);
    }
    let outputs: Vec<Value> = m.regions.values().flat_map(|r| r.results.clone()).collect();
    for old in outputs.into_iter().filter(|v| replaced.contains_key(v)) {
        let new = last(old);
        m.replace_uses(old, new);
        // An output of the graph goes by its name.
        if m.values[new].name.is_empty() {
            m.values[new].name = std::mem::replace(&mut m.values[old].name, "".into());
        }
    }
}

/// Erases what the windows no longer need, and puts the ops in order. An op that only reads other operands now stays the
/// op it was, and a constant that only has other elements stays the value it was, so that whoever holds them need not
/// notice.
fn sweep(
    plans: &[Plan],
    made: &[Made],
    m: &mut Module,
    region: Region,
    order: &[Op],
    after: Vec<Vec<Op>>,
) -> Vec<String> {
    let mut reads: HashMap<Value, usize> = HashMap::new();
    let mut live = HashSet::new();
    for r in m.live_regions() {
        for v in &m.regions[r].results {
            *reads.entry(*v).or_default() += 1;
        }
        for &op in &m.regions[r].ops {
            live.insert(op);
            for v in m.ops[op].operands.iter().flatten() {
                *reads.entry(*v).or_default() += 1;
            }
        }
    }
    let mut gone = HashSet::new();
    let mut unread: HashSet<Value> = HashSet::new();
    for &op in plans.iter().rev().flat_map(|p| p.window.iter().rev()).filter(|op| live.contains(op)) {
        if m.ops[op].results.iter().flatten().any(|v| reads.get(v).is_some_and(|&n| n > 0)) {
            continue;
        }
        for v in m.ops[op].operands.iter().flatten() {
            let n = reads.get_mut(v).expect("an operand is read");
            *n -= 1;
            if *n == 0 && matches!(m.values[*v].def, ValueDef::Const(_)) {
                unread.insert(*v);
            }
        }
        gone.insert(op);
    }
    unread.retain(|v| !m.regions.values().any(|r| r.args.contains(v)));
    let mut merged: HashMap<Value, Value> = HashMap::new();
    // Old ops that stay, by the new ones whose places they take.
    let mut kept: HashMap<Op, Op> = HashMap::new();
    for (plan, made) in plans.iter().zip(made) {
        for (step, &new) in plan.steps.iter().zip(&made.ops) {
            let Some(old) = step.like.filter(|old| gone.contains(old) && m.ops[*old].name == step.name)
            else {
                continue;
            };
            let pairs: Vec<_> = m.ops[new].results.iter().copied().zip(m.ops[old].results.clone()).collect();
            let fits = |(n, o): &(Option<Value>, Option<Value>)| match (n, o) {
                (Some(n), Some(o)) => infer::compatible(m.ty(*n), m.ty(*o)),
                (n, _) => n.is_none(),
            };
            if m.ops[new].attrs != m.ops[old].attrs || !pairs.iter().all(fits) {
                continue;
            }
            gone.remove(&old);
            m.ops[old].operands = m.ops[new].operands.clone();
            for (n, o) in pairs.iter().filter_map(|(n, o)| n.zip(*o)) {
                m.values[o].ty = m.values[n].ty.clone();
                m.values[o].sym = m.values[n].sym.clone();
            }
            merged.extend(pairs.into_iter().filter_map(|(n, o)| n.zip(o)));
            kept.insert(new, old);
            gone.insert(new);
        }
    }
    for &op in &gone {
        for v in m.ops[op].results.iter().flatten() {
            m.values[*v].def = ValueDef::Erased;
        }
    }
    let moved: HashSet<Op> = kept.values().copied().collect();
    let mut after = after.into_iter();
    let mut ops = Vec::new();
    for old in std::iter::once(None).chain(order.iter().map(Some)) {
        ops.extend(old.filter(|op| !gone.contains(op) && !moved.contains(op)));
        for new in after.next().into_iter().flatten() {
            ops.push(kept.get(&new).copied().unwrap_or(new));
        }
    }
    m.regions[region].ops = ops;
    let mut names = Vec::new();
    for (c, &new) in plans.iter().zip(made).flat_map(|(p, made)| p.consts.iter().zip(&made.consts)) {
        let Some(base) = c.base else { continue };
        let label = m.value_label(base);
        if unread.remove(&base) {
            m.values[base].def = m.values[new].def;
            m.values[base].ty = m.values[new].ty.clone();
            m.values[base].sym = None;
            m.values[new].def = ValueDef::Erased;
            merged.insert(new, base);
        } else {
            m.values[new].name = m.fresh_name(&format!("{label}.scaled"));
        }
        names.push(label);
    }
    move_readers(m, &merged);
    for r in m.regions.values_mut() {
        r.consts.retain(|v| !unread.contains(v) && !merged.contains_key(v));
    }
    names
}
