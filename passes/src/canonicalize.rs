//! `canonicalize`: the shortest form of the same function, the same one for every exporter.
//!
//! Shape arithmetic becomes constants, views and transposes merge, what computes nothing goes, equal computations are
//! shared, and constants behind convolutions and linears go into them. The rules are equalities that saturate an
//! e-graph window by window ([`eqsat::rewrite`]); what is extracted is the cheapest by a cost model of the target.
//!
//! A symbolic size that a Reshape copies beside a size it infers is taken to be at least one.

use crate::const_fold::{self, ConstFold};
use crate::eqsat::explain::Chain;
use crate::eqsat::{self, CostModel, Rewrite, Rules, Target};
use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::ir::{Module, Op, Region, Use, Value, ValueDef, infer};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

const NAME: &str = "canonicalize";

/// Walks over the model: what one changes may let windows that are cut elsewhere change more.
const ROUNDS: usize = 6;

/// The options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Canonicalize {
    /// What ops cost: `ort-cpu`, as measured in ONNX Runtime, or `bytes`, the memory they move.
    pub target: Target,
}

impl Pass for Canonicalize {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "fold shape arithmetic, merge views and transposes, share and drop what is computed for nothing"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let rules = Rules::canonical().clone().with_user(&cx.settings.rules, &cx.settings.profile);
        rewrite(m, cx, NAME, &Rewrite::new(&rules, CostModel::of_target(self.target)))
    }
}

/// Rewrites every graph of a module until nothing changes, for the pass `pass`.
pub fn rewrite(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    with: &Rewrite,
) -> Result<Changed, PassError> {
    let mut changed = false;
    for round in 0..ROUNDS {
        // Contradictions are the verifier's to report.
        infer::infer(m, cx.ops);
        let before = m.live_ops().len();
        let mut again = constants(m) > 0;
        again |= ConstFold::default().run(m, cx)? == Changed::Yes;
        again |= share(m) > 0;
        let mut limits = Vec::new();
        for region in graphs(m) {
            // The second round cuts elsewhere.
            let explain = cx.settings.explain;
            let with =
                Rewrite { explain, smallest: with.smallest + with.smallest / 3 * (round % 2), ..*with };
            let outcome = eqsat::rewrite(m, cx.ops, region, &with).map_err(|why| PassError::At {
                pass,
                what: m.regions[region].name.to_string(),
                why,
            })?;
            again |= outcome.changed > 0;
            limits.extend(outcome.limits);
            let named = |c| Chain { pass: pass.to_string(), ..c };
            cx.report.chains.extend(outcome.chains.into_iter().map(named));
            if round == 0 {
                cx.count(&format!("{pass}.windows"), outcome.windows);
                cx.count(&format!("{pass}.windows-solved"), outcome.solved);
            }
        }
        crate::dce::sweep(m);
        changed |= again;
        cx.count(&format!("{pass}.ops-removed"), before.saturating_sub(m.live_ops().len()) as u64);
        if !again || round + 1 == ROUNDS {
            for limit in limits {
                cx.report.note(limit);
            }
            break;
        }
    }
    Ok(if changed { Changed::Yes } else { Changed::No })
}

/// The model's graph and those nested in it. Functions are left alone: what they are called with is not known, and they
/// hold no initializers.
fn graphs(m: &Module) -> Vec<Region> {
    let mut out = vec![m.top];
    let mut i = 0;
    while i < out.len() {
        out.extend(m.regions[out[i]].ops.iter().flat_map(|&op| m.ops[op].attrs.regions()));
        i += 1;
    }
    out
}

/// Makes initializers of Constant ops. Returns how many there were.
fn constants(m: &mut Module) -> u64 {
    let uses = m.uses();
    let mut made = 0;
    for region in graphs(m) {
        let mut ops = m.regions[region].ops.clone();
        ops.retain(|&op| {
            let result = m.ops[op].result(0).filter(|_| m.ops[op].is("onnx.Constant"));
            let Some((v, c)) = result.and_then(|v| Some((v, m.const_of(v)?))) else { return true };
            if uses.of(v).iter().any(|u| matches!(u, Use::Result(..))) {
                return true;
            }
            m.values[v].def = ValueDef::Const(c);
            m.regions[region].consts.push(v);
            made += 1;
            false
        });
        m.regions[region].ops = ops;
    }
    made
}

/// Shares equal small constants and equal computations of a graph. Returns how many values went.
fn share(m: &mut Module) -> u64 {
    let uses = m.uses();
    let mut same: HashMap<Value, Value> = HashMap::new();
    for region in graphs(m) {
        let mut numbers: HashMap<String, Value> = HashMap::new();
        for &v in &m.regions[region].consts {
            let Some(c) = m.const_of(v).filter(|c| eqsat::is_literal(&m.consts[*c])) else { continue };
            if m.regions[region].args.contains(&v) || output(&uses, v) {
                continue;
            }
            let first = *numbers.entry(eqsat::const_text(m, c)).or_insert(v);
            if first != v {
                same.insert(v, first);
            }
        }
        let mut computed: HashMap<String, Op> = HashMap::new();
        for op in m.regions[region].ops.clone() {
            for v in m.ops[op].operands.iter_mut().flatten() {
                *v = *same.get(v).unwrap_or(v);
            }
            let data = &m.ops[op];
            if data.attrs.regions().next().is_some()
                || const_fold::is_random(data)
                || data.results.iter().flatten().any(|v| output(&uses, *v))
            {
                continue;
            }
            let shape: Vec<bool> = data.results.iter().map(Option::is_some).collect();
            let attrs = eqsat::attrs_text(m, &data.attrs);
            let key = format!("{}{attrs}{:?}{shape:?}", data.name, data.operands);
            let first = *computed.entry(key).or_insert(op);
            if first != op {
                let pairs = m.ops[op].results.iter().zip(&m.ops[first].results);
                same.extend(pairs.filter_map(|(v, w)| v.zip(*w)));
            }
        }
    }
    for operand in m.ops.values_mut().flat_map(|op| op.operands.iter_mut().flatten()) {
        *operand = *same.get(operand).unwrap_or(operand);
    }
    same.len() as u64
}

fn output(uses: &dialects::ir::Uses, v: Value) -> bool {
    uses.of(v).iter().any(|u| matches!(u, Use::Result(..)))
}
