//! `rotate`: an orthogonal rotation of the residual stream, folded into every weight that reads or writes it (Ashkboos et
//! al., "SliceGPT", ICLR 2024, section 3; "QuaRot", NeurIPS 2024, section 3).
//!
//! A norm that divides each row by its root mean square does not mind a rotation `Q` of the rows, since that keeps their
//! length: `norm(x) = norm(x Q) Q'`. So what norms read is rotated and rotated back, `x' = x Q` and `x'' = x' Q'`, and the
//! e-graph is asked to move the first into the embedding and the weights that write `x`, the second, with the norm's gain
//! and offset, into the weights behind the norm. A Hadamard rotation mixes every channel into every other, so that no
//! channel or weight stands out any more for a grid to span.
//!
//! Nothing is listed by architecture: the values are those whose mean square is taken, what moves through what is stated by
//! rules. A LayerNorm subtracts the mean of each row first; the rotation takes that with it into the weights, so that
//! the stream itself carries no mean any more. What a rotation cannot move into stays as a product with it and is reported,
//! and a value that it moves into neither before nor behind is not rotated.

pub mod orthogonal;

use crate::eqsat::{self, Rotate as Matrices};
use crate::{Changed, Exactness, Pass, PassCx, PassError, dce, report};
use dialects::ir::{Attr, Dim, Elem, Module, Op, OpBuilder, Symbol, Type, Value, infer};
use dialects::tensor::Tensor;
use orthogonal::{Kind, orthogonal};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

const NAME: &str = "rotate";

/// How often the windows are asked again because others have changed.
const ROUNDS: usize = 6;

/// The options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rotate {
    /// The rotation.
    pub kind: Kind,
    /// What its random numbers are drawn with.
    pub seed: u64,
}

impl Pass for Rotate {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "rotate the residual stream, folded into the weights that read and write it"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        // Contradictions are the verifier's to report.
        infer::infer(m, cx.ops);
        let constants = m.consts.len();
        let mut left_out: BTreeMap<String, String> = BTreeMap::new();
        loop {
            let mut trial = m.clone();
            let outcome = self.attempt(&mut trial, cx, &left_out)?;
            if !outcome.rejected.is_empty() {
                left_out.extend(outcome.rejected);
                continue;
            }
            let mut by_reason: BTreeMap<&String, Vec<&str>> = BTreeMap::new();
            left_out.iter().for_each(|(value, why)| by_reason.entry(why).or_default().push(value));
            for (why, values) in by_reason {
                cx.report.note(format!("rotate: {} is not rotated: {why}", report::listed(&values)));
            }
            cx.count("rotate.values", outcome.rotated as u64);
            if outcome.rotated == 0 {
                if left_out.is_empty() {
                    cx.report
                        .note("rotate: no value's mean square is taken: there is no norm to rotate before");
                }
                return Ok(Changed::No);
            }
            outcome.report(cx, dce::bytes(m), dce::bytes(&trial));
            *m = trial;
            eqsat::settle(m, cx, NAME, constants)?;
            return Ok(Changed::Yes);
        }
    }
}

/// A value that is rotated.
struct Site {
    label: String,
    width: usize,
    /// What its readers read.
    back: Value,
    /// The products with the rotation and with its inverse.
    ops: [Op; 2],
    /// How many products with a rotation are left in the place of each.
    left: [usize; 2],
    /// Why.
    why: [Option<String>; 2],
}

/// What an attempt came to.
#[derive(Default)]
struct Outcome {
    rotated: usize,
    /// Values that are better left out, with the reason; with any, the rest is of no interest.
    rejected: Vec<(String, String)>,
    /// Constants that took the rotation.
    sites: BTreeSet<String>,
    /// Products with a rotation that stay.
    stay: usize,
    /// The values that they are made for, and why.
    remaining: Vec<(String, String)>,
    limits: Vec<String>,
}

impl Outcome {
    fn report(&self, cx: &mut PassCx, before: u64, after: u64) {
        cx.report.note(format!(
            "rotate: {} values are rotated, {} constants took that; {} products with a rotation stay",
            self.rotated,
            self.sites.len(),
            self.stay
        ));
        for (value, why) in &self.remaining {
            cx.report.note(format!("rotate: a product with the rotation of {value:?} stays: {why}"));
        }
        if after > before {
            cx.report.note(format!(
                "rotate: constants grow by {} bytes: a table that was shared is rotated differently for each reader",
                after - before
            ));
        }
        for limit in &self.limits {
            cx.report.note(limit.clone());
        }
    }
}

impl Rotate {
    /// Rotates what every norm reads, but for the values in `left_out`.
    fn attempt(
        &self,
        m: &mut Module,
        cx: &PassCx,
        left_out: &BTreeMap<String, String>,
    ) -> Result<Outcome, PassError> {
        let mut outcome = Outcome::default();
        let mut matrices: BTreeMap<usize, Matrices> = BTreeMap::new();
        let mut sites: Vec<Site> = Vec::new();
        let mut centered: BTreeMap<Value, Value> = BTreeMap::new();
        for op in m.regions[m.top].ops.clone() {
            let Some((v, width)) = norm_input(m, op) else { continue };
            // Norms of one value share what they divide.
            let layer_norm = m.ops[op].is("onnx.LayerNormalization");
            let label = if layer_norm { centered_name(&m.value_label(v)) } else { m.value_label(v) };
            if left_out.contains_key(&label) || sites.iter().any(|s| s.back == v) {
                continue;
            }
            let there = centered.get(&v).copied();
            let (x, v) = (v, if layer_norm { spell_out(m, op, v, there)? } else { v });
            if there.is_some() && layer_norm {
                continue;
            }
            let elem = m.ty(v).elem();
            if elem != Some(Elem::F32) {
                let why = "rotations of 16-bit values would round the model's weights once more".to_string();
                outcome.rejected.push((label, why));
                continue;
            }
            let r = match matrices.get(&width) {
                Some(r) => *r,
                None => *matrices.entry(width).or_insert(self.matrices(m, width)?),
            };
            sites.push(rotated(m, v, label, width, &r));
            centered.extend(sites.last().filter(|_| layer_norm).map(|s| (x, s.back)));
        }
        fold(m, cx, &mut sites, &matrices, &mut outcome);
        outcome.rotated = sites.len();
        let mut by_width: BTreeMap<usize, Vec<&Site>> = BTreeMap::new();
        for site in &sites {
            by_width.entry(site.width).or_default().push(site);
            if let [Some(before), Some(behind)] = &site.why {
                let both = if before == behind { before.clone() } else { format!("{before}; {behind}") };
                outcome.rejected.push((site.label.clone(), both));
            }
        }
        if !outcome.rejected.is_empty() {
            return Ok(outcome);
        }
        for sites in by_width.values() {
            let stay: usize = sites.iter().flat_map(|s| s.left).sum();
            let into = outcome.sites.len();
            if stay >= into {
                let why =
                    format!("{stay} products with a rotation would stay for {into} that go into weights");
                outcome.rejected.extend(sites.iter().map(|s| (s.label.clone(), why.clone())));
            }
            outcome.stay += stay;
            for site in sites {
                outcome
                    .remaining
                    .extend(site.why.iter().flatten().map(|why| (site.label.clone(), why.clone())));
            }
        }
        drop_unused(m, matrices.values());
        Ok(outcome)
    }

    /// The rotation of rows of `n`, as constants of the module.
    fn matrices(&self, m: &mut Module, n: usize) -> Result<Matrices, PassError> {
        let q = orthogonal(self.kind, n, self.seed);
        let means: Vec<f64> = (0..n).map(|j| (0..n).map(|i| q[i * n + j]).sum::<f64>() / n as f64).collect();
        let mut add = |name: &str, entry: &dyn Fn(usize, usize) -> f64| -> Result<Value, PassError> {
            let values: Vec<f32> = (0..n * n).map(|at| entry(at / n, at % n) as f32).collect();
            let t = Tensor::new(&[n, n], values).map_err(|e| PassError::At {
                pass: NAME,
                what: format!("{n} x {n}"),
                why: e.to_string(),
            })?;
            let name = m.fresh_name(&format!("rotation.{n}{name}"));
            Ok(m.add_const(m.top, name, t.to_const()))
        };
        Ok(Matrices {
            matrix: add("", &|i, j| q[i * n + j])?,
            inverse: add(".inverse", &|i, j| q[j * n + i])?,
            centered: add(".centered", &|i, j| q[i * n + j] - means[j])?,
        })
    }
}

fn centered_name(label: &str) -> String {
    format!("{label}.centered")
}

/// The value whose rows an op normalizes or takes the mean square of, and how long they are.
fn norm_input(m: &Module, op: Op) -> Option<(Value, usize)> {
    let data = &m.ops[op];
    let x = data.operand(0)?;
    let rank = m.ty(x).dims()?.len() as i64;
    let last = |axis: i64| axis == -1 || axis == rank - 1;
    let axes = || match data.operand(1).and_then(|a| m.const_of(a)) {
        Some(c) => Tensor::from_const(&m.consts[c]).ok()?.to_i64().ok().map(|a| a.to_vec()),
        None => data.attrs.ints("axes").map(<[i64]>::to_vec),
    };
    let over_rows = || axes().is_some_and(|a| matches!(a[..], [axis] if last(axis)));
    let v = match data.name.as_str() {
        "onnx.RMSNormalization" | "onnx.SimplifiedLayerNormalization" | "onnx.LayerNormalization" => {
            let alone = data.results.iter().skip(1).all(Option::is_none);
            (alone && last(data.attrs.int("axis").unwrap_or(-1))).then_some(x)?
        }
        "onnx.ReduceSumSquare" | "onnx.ReduceL2" if over_rows() => x,
        "onnx.ReduceMean" | "onnx.ReduceSum" if over_rows() => {
            let (square, _) = m.def_op(x)?;
            let (a, b) = (m.ops[square].operand(0)?, m.ops[square].operand(1)?);
            let two = || {
                let t = Tensor::from_const(&m.consts[m.const_of(b)?]).ok()?;
                Some(matches!(t.to_f32().ok()?[..], [e] if e == 2.0))
            };
            match m.ops[square].name.as_str() {
                "onnx.Mul" if a == b => a,
                "onnx.Pow" if two() == Some(true) => a,
                _ => return None,
            }
        }
        _ => return None,
    };
    let v = source(m, v);
    let width = usize::try_from(m.ty(v).dims()?.last()?.known()?).ok()?;
    (width > 1 && m.const_of(v).is_none()).then_some((v, width))
}

/// What a value is a copy of: some exporters convert to the type that is there already.
fn source(m: &Module, mut v: Value) -> Value {
    loop {
        let copied = m.def_op(v).and_then(|(op, _)| {
            let data = &m.ops[op];
            let copy = data.is("onnx.Identity") || data.is("onnx.Cast");
            data.operand(0).filter(|x| copy && m.ty(*x).elem().is_some() && m.ty(*x).elem() == m.ty(v).elem())
        });
        match copied {
            Some(x) => v = x,
            None => return v,
        }
    }
}

/// Writes a LayerNormalization out by its definition. Returns what it divides by its root mean square: `x` with the mean
/// of each row subtracted, which may be `there` already.
fn spell_out(m: &mut Module, op: Op, x: Value, there: Option<Value>) -> Result<Value, PassError> {
    let data = m.ops[op].clone();
    let at = |why: &str| PassError::At { pass: NAME, what: data.loc.to_string(), why: why.into() };
    let (whole, out) = (m.ty(x).clone(), data.result(0).ok_or_else(|| at("it has no result"))?);
    let elem = whole.elem().ok_or_else(|| at("the type of its operand is unknown"))?;
    let mut dims = whole.dims().ok_or_else(|| at("the rank of its operand is unknown"))?.to_vec();
    dims.last_mut().into_iter().for_each(|d| *d = Dim::Known(1));
    let row = Type::tensor(elem, dims);
    let label = m.value_label(x);
    let konst = |m: &mut Module, name: &str, t: Tensor| {
        let name = m.fresh_name(&format!("{}.{name}", m.value_label(out)));
        m.add_const(m.top, name, t.to_const())
    };
    let epsilon = vec![data.attrs.float("epsilon").unwrap_or(1e-5)];
    let epsilon = Tensor::from_f32(elem, &[], epsilon).map_err(|e| at(&e.to_string()))?;
    let epsilon = konst(m, "epsilon", epsilon);
    let axes =
        (m.opset("onnx") >= 18).then(|| konst(m, "axes", Tensor::new(&[1], vec![-1i64]).expect("one axis")));
    let push = |m: &mut Module, name: &str, operands: &[Value], ty: &Type| {
        let mut build = OpBuilder::new(name, &data.loc).operands(operands.iter().copied());
        if name == "onnx.ReduceMean" {
            build = match axes {
                Some(axes) => build.operands([axes]),
                None => build.attr("axes", Attr::Ints(vec![-1])),
            };
        }
        let op = m.insert_before(op, build.result(ty.clone()));
        m.ops[op].result(0).expect("it was given one")
    };
    let centered = match there {
        Some(centered) => centered,
        None => {
            let mean = push(m, "onnx.ReduceMean", &[x], &row);
            let centered = push(m, "onnx.Sub", &[x, mean], &whole);
            m.values[centered].name = m.fresh_name(&centered_name(&label));
            centered
        }
    };
    let square = push(m, "onnx.Mul", &[centered, centered], &whole);
    let variance = push(m, "onnx.ReduceMean", &[square], &row);
    let safe = push(m, "onnx.Add", &[variance, epsilon], &row);
    let root = push(m, "onnx.Sqrt", &[safe], &row);
    let mut y = push(m, "onnx.Div", &[centered, root], &whole);
    for (name, c) in [("onnx.Mul", data.operand(1)), ("onnx.Add", data.operand(2))] {
        if let Some(c) = c {
            y = push(m, name, &[y, c], &whole);
        }
    }
    stand_in(m, out, y);
    m.erase(op);
    Ok(centered)
}

/// Makes `new` what the readers of `old` read, under the name of `old`. (An output's name moves with its use, and that of
/// another value does not: it is taken first.)
fn stand_in(m: &mut Module, old: Value, new: Value) {
    let name = std::mem::replace(&mut m.values[old].name, "".into());
    m.replace_uses(old, new);
    m.values[new].name = name;
}

/// Rotates a value and rotates it back for its readers. The name goes to what they read.
fn rotated(m: &mut Module, v: Value, label: String, width: usize, r: &Matrices) -> Site {
    let ty = m.ty(v).clone();
    let loc: Symbol = m.def_op(v).map_or_else(|| label.as_str().into(), |(op, _)| m.ops[op].loc.clone());
    let product =
        |x: Value, by: Value| OpBuilder::new("onnx.MatMul", &loc).operands([x, by]).result(ty.clone());
    let first = match m.def_op(v) {
        Some((def, _)) => m.insert_after(def, product(v, r.matrix)),
        None => m.insert_before(m.regions[m.top].ops[0], product(v, r.matrix)),
    };
    let there = m.ops[first].result(0).expect("it was given one");
    let second = m.insert_after(first, product(there, r.inverse));
    let back = m.ops[second].result(0).expect("it was given one");
    if m.def_op(v).is_some() {
        stand_in(m, v, back);
    } else {
        // An input of the model keeps its name.
        m.replace_uses(v, back);
        m.values[back].name = m.fresh_name(&format!("{label}.unrotated"));
    }
    m.ops[first].operands[0] = Some(v);
    // Shapes are the same, and asking for them must not keep anything alive.
    for op in m.regions[m.top].ops.clone() {
        if (m.ops[op].is("onnx.Shape") || m.ops[op].is("onnx.Size")) && m.ops[op].operand(0) == Some(back) {
            m.ops[op].operands[0] = Some(there);
        }
    }
    m.values[there].name = m.fresh_name(&format!("{label}.rotated"));
    Site { label, width, back, ops: [first, second], left: [0, 0], why: [None, None] }
}

/// Folds every product with a rotation, later ones first: what is rotated before them is then still there.
fn fold(
    m: &mut Module,
    cx: &PassCx,
    sites: &mut [Site],
    matrices: &BTreeMap<usize, Matrices>,
    outcome: &mut Outcome,
) {
    for _ in 0..ROUNDS {
        let mut changed = false;
        for side in [0, 1] {
            for site in sites.iter_mut().rev() {
                let (op, r) = (site.ops[side], matrices[&site.width]);
                if !m.regions[m.top].ops.contains(&op) || !r.done_by(m, op) {
                    continue;
                }
                match eqsat::fold_rotation(m, cx.ops, op, &r) {
                    Ok((found, left)) => {
                        site.left[side] = left;
                        changed |= found.cost.1 < found.cost.0;
                        let reason = || found.why_not.clone().filter(|w| !w.is_empty());
                        site.why[side] = (!found.absorbed)
                            .then(|| reason().unwrap_or_else(|| "no constant takes the rotation".into()));
                        outcome.sites.extend(found.sites);
                        outcome.limits.extend(found.limits);
                    }
                    Err(why) => (site.left[side], site.why[side]) = (1, Some(why)),
                }
                keep(m, &r);
            }
        }
        if !changed {
            break;
        }
    }
}

/// Folding drops constants that nothing reads; a later window may need the rotation again.
fn keep(m: &mut Module, r: &Matrices) {
    let top = m.top;
    for c in [r.matrix, r.inverse, r.centered] {
        if !m.regions[top].consts.contains(&c) {
            m.regions[top].consts.push(c);
        }
    }
}

fn drop_unused<'a>(m: &mut Module, matrices: impl Iterator<Item = &'a Matrices>) {
    let uses = m.uses();
    let unused: Vec<Value> =
        matrices.flat_map(|r| [r.matrix, r.inverse, r.centered]).filter(|c| uses.of(*c).is_empty()).collect();
    let top = m.top;
    m.regions[top].consts.retain(|c| !unused.contains(c));
}
