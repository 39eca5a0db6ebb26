//! Rewrites a whole region, window by window.
//!
//! The region is cut into windows ([`partition`]); each is saturated, its cheapest form extracted, and the difference put
//! back. Windows that are the same ([`signature`](super::signature)) are solved once and the plan is replayed, so that a
//! model of many equal layers takes the time of one, and of a walk over the rest.

use super::apply::{self, Plan};
use super::cost::CostModel;
use super::edit;
use super::explain::{self, Chain};
use super::extract::Extractor;
use super::graph::Graph;
use super::partition::partition;
use super::rules::RuleSet;
use super::saturate::{Fuel, saturate};
use super::signature::Signature;
use super::window::{Scope, Window};
use crate::const_fold;
use dialects::ir::{Module, Op, Region, Value};
use dialects::ops::Ops;
use std::collections::{BTreeSet, HashMap};

/// How a region is rewritten.
#[derive(Clone, Copy)]
pub struct Rewrite<'a> {
    /// The rules.
    pub rules: &'a RuleSet,
    /// What ops cost.
    pub model: CostModel,
    /// Windows have at least this many ops where the region has.
    pub smallest: usize,
    /// How far a window may grow.
    pub fuel: Fuel,
    /// Steps of the exact search in a window.
    pub steps: u64,
    /// Whether to tell by which rules values came to be computed as they are; every window is solved then.
    pub explain: bool,
}

impl<'a> Rewrite<'a> {
    /// With the limits that models of any size bear.
    pub fn new(rules: &'a RuleSet, model: CostModel) -> Rewrite<'a> {
        Rewrite { rules, model, smallest: 24, fuel: Fuel::default(), steps: 2_000, explain: false }
    }
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Rewritten {
    /// Windows.
    pub windows: u64,
    /// Windows that were solved; the others are the same as one of these.
    pub solved: u64,
    /// Windows that changed.
    pub changed: u64,
    /// The cost of all windows before and after.
    pub cost: (u64, u64),
    /// Limits that were hit: in which window, and what was lost.
    pub limits: Vec<String>,
    /// By which rules, if that was asked for.
    pub chains: Vec<Chain>,
}

/// What was found for a window.
struct Solution {
    signature: Signature,
    /// Large constants whose elements rules asked for, by their hash: these must be the same too.
    looked: Vec<(Value, [u8; 32])>,
    plan: Plan,
    cost: (u64, u64),
}

/// Rewrites the ops of `region` into the cheapest form that the rules give.
///
/// The types in `m` must be inferred. An error names the window, and says what could not be put back.
pub fn rewrite(m: &mut Module, ops: &Ops, region: Region, with: &Rewrite) -> Result<Rewritten, String> {
    let mut out = Rewritten::default();
    let mut plans = Vec::new();
    {
        let scope = Scope::new(m, region);
        let mut known: HashMap<String, Vec<Solution>> = HashMap::new();
        for run in partition(m, scope.uses(), region, with.smallest, |op| alone(m, ops, op)) {
            let window = scope.run(&run);
            let signature = Signature::new(m, &scope, &window);
            out.windows += 1;
            let found = known.get(&signature.text).filter(|_| !with.explain).into_iter().flatten();
            let found = found.filter_map(|s| Some((s.replay(m, &signature)?, s.cost))).next();
            let (plan, cost) = match found {
                Some(replayed) => replayed,
                None => {
                    out.solved += 1;
                    let solution = solve(m, ops, &scope, &window, with, signature, &mut out)?;
                    let (plan, cost) = (solution.plan.clone(), solution.cost);
                    known.entry(solution.signature.text.clone()).or_default().push(solution);
                    (plan, cost)
                }
            };
            out.cost = (out.cost.0.saturating_add(cost.0), out.cost.1.saturating_add(cost.1));
            if !plan.is_empty() {
                out.changed += 1;
                plans.push(plan);
            }
        }
    }
    edit::apply_all(&plans, m, region).map_err(|e| e.to_string())?;
    Ok(out)
}

/// Whether an op stays out of windows: it holds a graph, is not known, or gives something else every time.
fn alone(m: &Module, ops: &Ops, op: Op) -> bool {
    let data = &m.ops[op];
    data.attrs.regions().next().is_some() || ops.get(&data.name).is_none() || const_fold::is_random(data)
}

impl Solution {
    /// The plan for another window with the same signature; `None` where constants that rules looked at differ.
    fn replay(&self, m: &Module, other: &Signature) -> Option<Plan> {
        let values: HashMap<Value, Value> =
            self.signature.values.iter().copied().zip(other.values.iter().copied()).collect();
        let same = |(v, hash): &(Value, [u8; 32])| {
            values.get(v).and_then(|v| m.consts[m.const_of(*v)?].hash().ok()).as_ref() == Some(hash)
        };
        if !self.looked.iter().all(same) {
            return None;
        }
        let ops = self.signature.ops.iter().copied().zip(other.ops.iter().copied()).collect();
        self.plan.replay(m, &values, &ops)
    }
}

fn solve(
    m: &Module,
    ops: &Ops,
    scope: &Scope,
    window: &Window,
    with: &Rewrite,
    signature: Signature,
    out: &mut Rewritten,
) -> Result<Solution, String> {
    let mut g = Graph::new(m, ops);
    g.shared(scope);
    let roots = window.build(&mut g);
    let inside: BTreeSet<Op> = window.ops.iter().copied().collect();
    let own = g.values.iter().filter(|(v, _, _)| m.def_op(*v).is_some_and(|(o, _)| inside.contains(&o)));
    let before = own.map(|(_, id, node)| with.model.of(&g, *id, node)).fold(0, u64::saturating_add);
    let name = || match (window.ops.first(), window.ops.last()) {
        (Some(a), Some(b)) => {
            format!("window from {:?} to {:?} ({} ops)", &*m.ops[*a].loc, &*m.ops[*b].loc, window.ops.len())
        }
        _ => "empty window".into(),
    };
    if let Some(limit) = saturate(&mut g, with.fuel, with.rules) {
        out.limits.push(format!("{}: rules stopped at {limit}; what they would have given is lost", name()));
    }
    let extractor = Extractor::new(&g, &with.model);
    let best = extractor.best(&roots, None, with.steps);
    let best = best.ok_or_else(|| format!("{}: it cannot be extracted", name()))?;
    if !best.optimal && best.least < best.cost {
        let lost = (best.cost - best.least) as f64 / best.cost as f64 * 100.0;
        out.limits.push(format!(
            "{}: the search for the cheapest form stopped at {} steps; at most {lost:.1} % is lost",
            name(),
            with.steps
        ));
    }
    let planned = match best.cost < before {
        // Constants are computed once here, so that one that cannot be leaves only this window as it is.
        true => apply::plan(&g, scope, window, &roots, &best)
            .and_then(|p| p.data().map(|_| p).map_err(|e| e.to_string())),
        false => Ok(Plan::default()),
    };
    let plan = planned.unwrap_or_else(|why| {
        out.limits.push(format!("{}: left as it is: {why}", name()));
        Plan::default()
    });
    // A plan that was dropped led nowhere.
    if with.explain && !plan.is_empty() {
        out.chains.extend(explain::chains(&g, window, &best));
    }
    let looked = g.looked().into_iter().filter_map(|(c, v)| Some((v, m.consts[c].hash().ok()?))).collect();
    let after = if plan.is_empty() { before } else { best.cost };
    Ok(Solution { signature, looked, plan, cost: (before, after) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dialects::ir::{infer, parse};

    fn module(body: &str) -> Module {
        let text = format!(
            "module ir_version=10 opsets {{onnx=21}}\ngraph @main(%x0 : tensor<n x 64xf32>) {{\n{body}\n}}\n"
        );
        let mut m = parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
        let wrong = infer::infer(&mut m, &Ops::standard());
        assert!(wrong.is_empty(), "{wrong:?}");
        m
    }

    /// Blocks of a residual stream, each with a pair of transposes that do nothing.
    fn blocks(n: usize, activation: impl Fn(usize) -> &'static str) -> Module {
        let mut body = String::new();
        for i in 0..n {
            let (j, f) = (i + 1, activation(i));
            body += &format!(
                "  const %w{i} : tensor<64x64xf32> random({i})\n\
                 \x20 %a{i} = onnx.Transpose(%x{i}) {{perm=[1, 0]}}\n\
                 \x20 %b{i} = onnx.Transpose(%a{i}) {{perm=[1, 0]}}\n\
                 \x20 %c{i} = onnx.MatMul(%b{i}, %w{i})\n\
                 \x20 %d{i} = onnx.{f}(%c{i})\n\
                 \x20 %x{j} = onnx.Add(%x{i}, %d{i})\n"
            );
        }
        module(&format!("{body}  return %x{n}"))
    }

    fn small(fuel: Fuel) -> Rewrite<'static> {
        Rewrite { smallest: 5, fuel, ..Rewrite::new(RuleSet::canonical(), CostModel::ORT_CPU) }
    }

    #[test]
    fn a_run_ends_where_one_value_leaves_it() {
        let m = blocks(4, |_| "Relu");
        let scope = Scope::new(&m, m.top);
        let runs = partition(&m, scope.uses(), m.top, 5, |_| false);
        assert_eq!(runs.iter().map(Vec::len).collect::<Vec<_>>(), [5, 5, 5, 5]);
        let relu = |op: Op| m.ops[op].is("onnx.Relu");
        let runs = partition(&m, scope.uses(), m.top, 5, relu);
        assert!(runs.iter().flatten().all(|&op| !relu(op)));
        assert_eq!(runs.iter().map(Vec::len).sum::<usize>(), 16);
    }

    #[test]
    fn equal_windows_are_solved_once_and_others_are_not() {
        for (activation, solved) in
            [((|_| "Relu") as fn(usize) -> &'static str, 1), (|i| if i == 2 { "Sigmoid" } else { "Relu" }, 2)]
        {
            let mut m = blocks(6, activation);
            let top = m.top;
            let found = rewrite(&mut m, &Ops::standard(), top, &small(Fuel::default())).unwrap();
            // The last window differs in that its value is the output.
            assert_eq!((found.windows, found.solved, found.changed), (6, solved + 1, 6));
            assert_eq!(m.regions[m.top].ops.len(), 18);
            for i in 0..6 {
                let op = m.regions[m.top].ops[3 * i];
                let weight = m.ops[op].operand(1).unwrap();
                assert_eq!(m.value_label(weight), format!("w{i}"), "each window keeps its own constants");
            }
            assert!(found.cost.1 < found.cost.0 && found.limits.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn a_limit_names_the_window_and_leaves_a_sound_module() {
        let mut m = blocks(1, |_| "Relu");
        let top = m.top;
        let found = rewrite(&mut m, &Ops::standard(), top, &small(Fuel { nodes: 1, matches: 1 })).unwrap();
        assert_eq!(found.limits.len(), 1);
        assert!(found.limits[0].contains("window from \"a0\" to \"x1\" (5 ops)"), "{found:?}");
        assert!(infer::check(&m, &Ops::standard()).is_empty());
    }
}
