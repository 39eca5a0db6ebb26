//! Folds orthogonal rotations: products with a constant matrix `Q`, upstream into weights and tables, and products with its
//! inverse, downstream into the weights behind a norm.
//!
//! A rotation is honest at every moment: the caller puts `x' = x @ Q` and `x'' = x' @ Q^-1` into the module and has the
//! readers of `x` read `x''`. Each of the two products is then a question to the e-graph about the window around it, cut at
//! the rotated values, and the answer is taken where it makes the model cheaper.

use super::cost::CostModel;
use super::extract::{Extractor, STEPS};
use super::facts::Rotation;
use super::graph::Graph;
use super::lang::{Head, Node};
use super::rules::{self, RuleSet};
use super::saturate::{Fuel, saturate};
use super::window::{Scope, Window};
use super::{FoldOutcome, apply};
use dialects::ir::{Module, Op, Value};
use dialects::ops::Ops;
use std::collections::BTreeSet;

/// A window of a rotation is one norm, or what writes one value: it needs no more.
const FUEL: Fuel = Fuel { nodes: 4_000, matches: 10_000 };

/// Constants of a module, by their values.
#[derive(Clone, Copy, Debug)]
pub struct Rotate {
    /// The orthogonal matrix `[n, n]` that rows are multiplied by.
    pub matrix: Value,
    /// Its transpose.
    pub inverse: Value,
    /// The matrix with the mean of each of its columns subtracted.
    pub centered: Value,
}

impl Rotate {
    /// Whether an op multiplies by one of these.
    pub fn done_by(&self, m: &Module, op: Op) -> bool {
        [self.matrix, self.inverse, self.centered].iter().any(|&c| multiplies(m, op, c))
    }
}

/// Whether an op multiplies by a constant.
fn multiplies(m: &Module, op: Op, c: Value) -> bool {
    m.ops[op].is("onnx.MatMul") && m.ops[op].operand(1) == Some(c)
}

/// Moves the rotation that `op`, a product with `r.matrix` or `r.inverse`, is into constants, if that makes the model
/// cheaper. `absorbed` says whether no product with a rotation is left in its place; beside it comes how many are.
///
/// The types in `m` must be inferred. The error says what is wrong with the window.
pub fn fold_rotation(m: &mut Module, ops: &Ops, op: Op, r: &Rotate) -> Result<(FoldOutcome, usize), String> {
    let region = m.ops[op].region;
    let forward = multiplies(m, op, r.inverse);
    let (plan, (mut outcome, left)) = {
        let scope = Scope::new(m, region);
        let window = if forward { scope.behind_rotation(op) } else { scope.before_rotation(op, r) };
        if window.roots.is_empty() {
            return Err("nothing reads it".into());
        }
        let mut g = Graph::new(m, ops);
        let roots = window.build(&mut g);
        let [matrix, inverse, centered] = [r.matrix, r.inverse, r.centered].map(|v| g.leaf(v));
        g.rotations.push(Rotation { matrix, inverse, centered });
        let limit = saturate(&mut g, FUEL, RuleSet::rotations());
        let in_window: BTreeSet<Op> = window.ops.iter().copied().collect();
        let own =
            g.values.iter().filter(|(v, _, _)| m.def_op(*v).is_some_and(|(o, _)| in_window.contains(&o)));
        let before: u64 = own.map(|(_, id, node)| CostModel::BYTES.of(&g, *id, node)).sum();
        let best = Extractor::new(&g, &CostModel::BYTES)
            .best(&roots, None, STEPS)
            .ok_or("the window cannot be extracted")?;
        // Products that others put there are theirs to fold.
        let of_others: BTreeSet<_> = window.ops.iter().filter(|&&o| o != op && r.done_by(m, o)).collect();
        let theirs: BTreeSet<_> = g
            .values
            .iter()
            .filter(|(v, _, _)| m.def_op(*v).is_some_and(|(o, _)| of_others.contains(&o)))
            .map(|(_, id, _)| g.find(*id))
            .collect();
        // A rotation that met no weight, though it may have met a gain.
        let terms = apply::terms(&g);
        let weight = |v: &Value| m.ty(*v).dims().is_some_and(|d| d.len() >= 2);
        let bare = |n: &Node| {
            matches!(n.head, Head::Op { .. })
                && g.is(n, "onnx.MatMul")
                && g.is_const(n.children[1])
                && !apply::leaves(&g, &terms, n.children[1]).iter().any(weight)
        };
        let left = best.choice.iter().filter(|(id, n)| bare(n) && !theirs.contains(id)).count();
        let mut outcome = FoldOutcome { cost: (before, best.cost), ..FoldOutcome::default() };
        let label = m.ops[op].result(0).map(|v| m.value_label(v)).unwrap_or_default();
        outcome.limits.extend(limit.map(|l| format!("window of {label:?}: stopped at {l}")));
        outcome.absorbed = left == 0;
        if !outcome.absorbed {
            let why: Vec<String> = window.stops.iter().take(3).cloned().collect();
            outcome.why_not = Some(why.join("; "));
        }
        if best.cost >= before {
            outcome.cost.1 = before;
            outcome.absorbed = false;
            return Ok((outcome, left.max(1)));
        }
        (apply::plan(&g, &scope, &window, &roots, &best)?, (outcome, left))
    };
    outcome.sites = plan.apply(m, region).map_err(|e| e.to_string())?;
    Ok((outcome, left))
}

impl Scope<'_> {
    /// The window before the product `rotation` of a value with `r.matrix`: what its factor is computed by, up to weights
    /// and tables that can take the matrix. With it go the products of the same kind of values in the window, which stand
    /// for those values rotated.
    fn before_rotation(&self, rotation: Op, r: &Rotate) -> Window {
        let m = self.m;
        let mut w = Window::default();
        let width = m.ops[rotation].result(0).and_then(|v| m.ty(v).dims()?.last()?.known());
        let mut inside: BTreeSet<Op> = BTreeSet::from([rotation]);
        let mut values: BTreeSet<Value> = BTreeSet::new();
        let mut todo: Vec<Value> = m.ops[rotation].operand(0).into_iter().collect();
        while let Some(v) = todo.pop() {
            if self.constant(v, 8) || !values.insert(v) {
                continue;
            }
            let Some((op, _)) = m.def_op(v).filter(|(op, _)| self.here(*op)) else {
                w.stops.push(format!("{:?} is an input", m.value_label(v)));
                continue;
            };
            let data = &m.ops[op];
            let name = rules::short(data.name.as_str());
            let through = rules::rotation_operands(name, data.operands.len());
            let takes = rules::takes_rotation(name).and_then(|i| data.operand(i));
            let takes = takes.is_some_and(|c| self.constant(c, 8));
            if through.is_empty() && !takes {
                w.stops.push(format!("{} {:?} lets no rotation through", data.name.op(), &*data.loc));
                continue;
            }
            if inside.len() >= super::window::LARGEST {
                w.limited = true;
                continue;
            }
            inside.insert(op);
            let wide = |v: &Value| m.ty(*v).dims().and_then(|d| d.last()?.known()) == width;
            todo.extend(through.into_iter().filter_map(|i| data.operand(i)).filter(wide));
        }
        for &op in &m.regions[m.ops[rotation].region].ops {
            if op == rotation || !multiplies(m, op, r.matrix) {
                continue;
            }
            let Some(x) = m.ops[op].operand(0) else { continue };
            match self.mean_subtracted(x) {
                _ if values.contains(&x) => inside.extend([op]),
                Some((from, ops)) if values.contains(&from) => inside.extend(ops.into_iter().chain([op])),
                _ => {}
            }
        }
        // What subtracts the mean of the value itself.
        let own = m.ops[rotation].operand(0).and_then(|x| self.mean_subtracted(x));
        inside.extend(own.into_iter().flat_map(|(_, ops)| ops));
        w.roots = m.ops[rotation].result(0).into_iter().collect();
        self.finish(w, &inside)
    }

    /// The value that `x` is with the mean of each row subtracted, and the ops that do that.
    fn mean_subtracted(&self, x: Value) -> Option<(Value, [Op; 2])> {
        let m = self.m;
        let (sub, _) = m.def_op(x)?;
        let (from, mean) = (m.ops[sub].operand(0)?, m.ops[sub].operand(1)?);
        let (reduce, _) = m.def_op(mean)?;
        let fits = m.ops[sub].is("onnx.Sub") && m.ops[reduce].is("onnx.ReduceMean");
        (fits && m.ops[reduce].operand(0) == Some(from)).then_some((from, [reduce, sub]))
    }

    /// The window behind the product `rotation` with the inverse: what reads it, up to weights that can take the matrix.
    fn behind_rotation(&self, rotation: Op) -> Window {
        let m = self.m;
        let mut w = Window::default();
        let mut inside: BTreeSet<Op> = BTreeSet::from([rotation]);
        let mut todo: Vec<Value> = m.ops[rotation].result(0).into_iter().collect();
        while let Some(v) = todo.pop() {
            for op in self.readers(v) {
                let data = &m.ops[op];
                let name = rules::short(data.name.as_str());
                let weight = matches!(name, "MatMul" | "Gemm")
                    && data.operand(0) == Some(v)
                    && data.operand(1).is_some_and(|w| self.constant(w, 8));
                if !self.here(op) || inside.contains(&op) {
                    continue;
                }
                if !weight && !rules::follows_rotation(name) {
                    w.stops.push(format!(
                        "{} {:?} reads {:?} as it is",
                        data.name.op(),
                        &*data.loc,
                        m.value_label(v)
                    ));
                    continue;
                }
                if inside.len() >= super::window::LARGEST {
                    w.limited = true;
                    continue;
                }
                inside.insert(op);
                // The shape of a value is the same, rotated or not; what reads that is no matter.
                if !weight && !matches!(name, "Shape" | "Size") {
                    todo.extend(data.results.iter().flatten());
                }
            }
        }
        self.finish(w, &inside)
    }
}
