//! Scales per channel between a value and the linears that read it: `x W = (x / s) (s W)`. The weights are multiplied
//! here; that what is upstream takes `1 / s` at no cost is up to the e-graph, which is asked before.

use crate::eqsat::{self, Placement};
use crate::group::{Group, groups};
use crate::quantize::{Shared, candidates};
use crate::store::original;
use crate::{Filter, PassCx, PassError, Report};
use dialects::ir::{Elem, Module, Op, OpBuilder, Symbol, Use};
use dialects::tensor::Tensor;

/// The float weights that a filter lets through, by the value that they multiply. What it leaves out is not reported: a
/// pass that only scales quantizes nothing.
pub fn found(m: &Module, cx: &PassCx, filter: &Filter) -> Vec<Group> {
    let mut unsaid = Report::default();
    let mut quiet =
        PassCx { ops: cx.ops, env: cx.env, settings: cx.settings, report: &mut unsaid, rest: &[] };
    groups(m, candidates(m, &mut quiet, filter, false))
}

/// The nodes of a group's weights, which stay when ops change.
pub fn nodes(m: &Module, group: &Group) -> Vec<Symbol> {
    group.weights.iter().map(|w| m.ops[w.first().op].loc.clone()).collect()
}

/// The group as it is now: folding a later group's scale may have put new ops in the place of its linears. `nodes` are
/// those of its weights in their order, which new ops do not keep.
pub fn current(
    m: &Module,
    cx: &mut PassCx,
    pass: &'static str,
    filter: &Filter,
    group: &Group,
    nodes: &[Symbol],
) -> Result<Group, PassError> {
    let now = found(m, cx, filter).into_iter().find(|g| g.x == group.x && g.k == group.k);
    let in_order = |mut g: Group| {
        g.weights.sort_by_key(|w| nodes.iter().position(|n| *n == m.ops[w.first().op].loc));
        g
    };
    now.map(in_order).ok_or_else(|| {
        let why = "this is a bug: the linears that read it are gone".into();
        PassError::At { pass, what: m.value_label(group.x), why }
    })
}

/// Where a scale on the group's value may go, or why it may not.
pub fn placement(m: &Module, cx: &PassCx, group: &Group) -> Result<Placement, String> {
    if group.mixed {
        return Err("a weight is multiplied with several values".into());
    }
    if cx.settings.tied_shared && group.weights.iter().any(|w| is_tied(m, w)) {
        return Err("the weight is shared with an embedding".into());
    }
    let p = eqsat::place(m, cx.ops, group.x, &linears(group));
    match &p.why_not {
        Some(_) if cx.settings.allow_mul => {
            Ok(Placement { sites: vec!["a Mul that stays".into()], ..Placement::default() })
        }
        Some(why) => Err(why.clone()),
        None => Ok(p),
    }
}

fn linears(group: &Group) -> Vec<Op> {
    group.weights.iter().flat_map(|w| w.uses.iter().map(|l| l.op)).collect()
}

/// Whether the weight is also what a Gather reads.
pub fn is_tied(m: &Module, w: &Shared) -> bool {
    let konst = w.first().konst;
    let gather = |u: &Use| matches!(u, Use::Operand(op, 0) if m.ops[*op].is("onnx.Gather"));
    let uses = m.uses();
    m.values.keys().any(|v| m.const_of(v) == Some(konst) && uses.of(v).iter().any(gather))
}

/// Multiplies the group's weights by `s`, one number per channel, and divides what they multiply by it.
pub fn apply(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    group: &Group,
    s: &[f32],
) -> Result<(), PassError> {
    group.weights.iter().try_for_each(|w| multiply(m, pass, w, s))?;
    divide(m, cx, pass, group, s)
}

/// Inserts `x / s` before the group's linears and has it folded away.
pub fn divide(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    group: &Group,
    s: &[f32],
) -> Result<(), PassError> {
    let mut ops = linears(group);
    ops.sort_by_key(|op| m.regions[m.ops[*op].region].ops.iter().position(|o| o == op));
    let (first, ty) = (ops[0], m.ty(group.x).clone());
    let (region, loc) = (m.ops[first].region, m.ops[first].loc.clone());
    let what = m.value_label(group.x);
    let inverse: Vec<f32> = s.iter().map(|s| 1.0 / s).collect();
    let inverse = Tensor::from_f32(ty.elem().unwrap_or(Elem::F32), &[s.len()], inverse)
        .map_err(|e| PassError::At { pass, what: what.clone(), why: e.to_string() })?;
    let inverse = m.add_const(region, m.fresh_name(&format!("{what}.{pass}")), inverse.to_const());
    let mul =
        m.insert_before(first, OpBuilder::new("onnx.Mul", &loc).operands([group.x, inverse]).result(ty));
    let scaled = m.ops[mul].result(0).expect("a Mul has a result");
    for op in ops {
        for operand in m.ops[op].operands.iter_mut().filter(|v| **v == Some(group.x)) {
            *operand = Some(scaled);
        }
    }
    eqsat::fold(m, cx, mul, pass)
}

/// Puts the weight with every channel multiplied by its entry of `s` in its place.
fn multiply(m: &mut Module, pass: &'static str, shared: &Shared, s: &[f32]) -> Result<(), PassError> {
    let fail = |why: String| PassError::At { pass, what: shared.label(m), why };
    let l = shared.first();
    let scaled = original(m, pass, shared, Some(s))?;
    let dims = m.ty(l.operand).as_tensor().and_then(|t| t.known_shape());
    let dims = dims.unwrap_or_else(|| scaled.shape().to_vec());
    let elem = m.ty(l.operand).elem().unwrap_or(l.elem);
    let values = scaled.to_f32().map_err(|e| fail(e.to_string()))?.into_owned();
    let scaled = Tensor::from_f32(elem, &dims, values).map_err(|e| fail(e.to_string()))?;
    let label = shared.label(m);
    let weight = m.add_const(m.ops[l.op].region, m.fresh_name(&format!("{label}.scaled")), scaled.to_const());
    for l in &shared.uses {
        m.ops[l.op].operands[l.operand_index] = Some(weight);
    }
    if m.uses().of(l.weight).is_empty() {
        // Filters and reports know it by the name that it has in the file.
        let name = m.values[l.weight].name.clone();
        m.values[l.weight].name = std::mem::replace(&mut m.values[weight].name, name);
    }
    Ok(())
}
