//! `gptq`: rounding that makes up for its own errors (Frantar et al., "GPTQ", ICLR 2023).
//!
//! The Gram matrix of each linear's activations is gathered over the calibration data, which is not kept. Weights are
//! rounded one input after the other, and those not yet rounded take up the error ([`crate::grid::compensate`]).

mod sequential;

use crate::errors::Judge;
use crate::gram;
use crate::grid::compensate::{self, Method};
use crate::grid::{self, Cost, Float, Layout, Matrix};
use crate::group::{self, Group, groups};
use crate::quantize::{Clipping, GridOptions, Notes, Shared, dequantize, each, quantize, quantize_matrix};
use crate::store::{Finished, Key, Work};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError, WeightReport};
use dialects::ir::Module;
use sequential::{Pair, Seen};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// The pass and its options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Gptq {
    /// The grid.
    #[serde(flatten)]
    pub options: GridOptions,
    /// Inputs with large activations are rounded first.
    pub act_order: bool,
    /// Grids are chosen before any rounding. Without it a group's grid is chosen when its turn comes, which needs the
    /// order of the inputs (`act_order=false`): no runtime reads another.
    pub static_groups: bool,
    /// What is added to the diagonal of the Gram matrix, in means of it.
    pub damp: f64,
    /// Inputs that are rounded between two updates of all others; no more than a matter of speed.
    pub block: usize,
    /// Whether the calibration data is led through what is quantized already.
    pub sequential: Sequential,
    /// Turns of the descent after rounding.
    pub sweeps: u32,
    /// Which weights.
    #[serde(flatten)]
    pub filter: Filter,
    /// Grids of single weights, by name, in the place of `options`.
    #[serde(skip_deserializing, skip_serializing_if = "BTreeMap::is_empty")]
    pub each: BTreeMap<String, GridOptions>,
}

/// How much of the model is quantized before activations are computed anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sequential {
    /// The linears that read one value.
    #[default]
    Layer,
    /// All linears up to the next place where a single value passes, such as half a transformer layer.
    Block,
    /// All: activations are those of the float model.
    Off,
}

impl Default for Gptq {
    fn default() -> Gptq {
        Gptq {
            options: GridOptions { clip: Clipping::Search, ..GridOptions::default() },
            act_order: true,
            static_groups: true,
            damp: 0.01,
            block: 128,
            sequential: Sequential::Layer,
            sweeps: 2,
            filter: Filter::default(),
            each: BTreeMap::new(),
        }
    }
}

const NAME: &str = "gptq";

/// Beyond this nothing is gained: turns end when nothing moves.
const MOST_SWEEPS: u32 = 100;

impl Pass for Gptq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "quantizes weights one input after the other, the rest making up for the error"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["onnx.MatMul", "onnx.Gemm"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn compensates(&self) -> bool {
        true
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        self.check()?;
        let work = Work::begin(m, cx, NAME, self)?;
        each(m, cx, NAME, &self.filter, false, |m, cx, weights| self.all(m, cx, weights, &work))
    }
}

/// What is to be said of weights whose inputs are more than the rows of data that reached them.
fn few_rows(weights: &[WeightReport]) -> Option<String> {
    let few: Vec<(&WeightReport, u64)> = weights
        .iter()
        .filter_map(|w| Some((w, w.rows?)))
        .filter(|&(w, rows)| (1..w.k as u64).contains(&rows))
        .collect();
    // The one that is determined the least stands for all.
    let (worst, rows) = few.iter().min_by(|a, b| (a.1 * b.0.k as u64).cmp(&(b.1 * a.0.k as u64)))?;
    let others = match few.len() {
        1 => String::new(),
        n => format!(", nor those of {} other weights", n - 1),
    };
    let WeightReport { weight, k, .. } = worst;
    Some(format!(
        "gptq: {rows} rows of calibration data do not determine the {k} inputs of {weight:?}{others}"
    ))
}

impl Gptq {
    fn check(&self) -> Result<(), PassError> {
        self.options.check(NAME)?;
        let fail = |option, why: &str| Err(PassError::Option { pass: NAME, option, why: why.into() });
        if !(self.damp >= 0.0 && self.damp <= 1.0) {
            return fail("damp", &format!("expected 0 to 1, found {}", self.damp));
        }
        if !(1..=4096).contains(&self.block) {
            return fail("block", &format!("expected 1 to 4096, found {}", self.block));
        }
        if self.sweeps > MOST_SWEEPS {
            return fail("sweeps", &format!("expected up to {MOST_SWEEPS}, found {}", self.sweeps));
        }
        if self.act_order && !self.static_groups {
            let why = "with act_order=true groups are static: no runtime reads weights whose groups are out of order";
            return fail("static_groups", why);
        }
        Ok(())
    }

    fn all(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        weights: Vec<Shared>,
        work: &Work,
    ) -> Result<(), PassError> {
        let first = cx.report.weights.len();
        let groups = groups(m, weights);
        let keyed: Vec<Key> = groups.iter().map(|g| work.key(m, &g.weights)).collect();
        let progress = cx.env.progress(NAME, groups.len() as u64);
        let steps = self.steps(m, &groups);
        // The float model, whose activations are watched however much of the other is quantized by then.
        let float = m.clone();
        let mut pair = match self.sequential {
            Sequential::Off => None,
            _ => Some(Pair::new(m, cx)?),
        };
        for step in steps {
            let (groups, keys) = (&groups[step.clone()], &keyed[step]);
            let find = |(key, g): (&Key, &Group)| work.finished(m, cx, key, &g.weights);
            let finished: Vec<Option<Finished>> =
                keys.iter().zip(groups).map(find).collect::<Result<_, _>>()?;
            let open: Vec<&Group> =
                groups.iter().zip(&finished).filter(|(_, done)| done.is_none()).map(|(g, _)| g).collect();
            let mut seen = match &mut pair {
                _ if open.is_empty() => Vec::new(),
                Some(pair) => pair.see(m, groups[0].x, &open)?,
                None => self.watch(&float, cx, &open)?,
            }
            .into_iter();
            for ((group, key), done) in groups.iter().zip(keys).zip(finished) {
                match done {
                    Some(done) => drop(done.install(m, cx, NAME, &group.weights)?),
                    None => {
                        let seen = seen.next().expect("every open group was watched");
                        work.keep(key, &self.group(m, cx, group, seen)?)?;
                    }
                }
                if !progress.advance(1) {
                    return Err(PassError::Env("interrupted".into()));
                }
            }
            pair.iter_mut().for_each(|pair| pair.differ = true);
        }
        group::finish(m, cx, NAME, work, &self.filter, &self.options, first)?;
        let few = few_rows(&cx.report.weights[first..]);
        few.into_iter().for_each(|warning| cx.report.warn(warning));
        Ok(())
    }

    /// Which groups are watched together, in program order.
    fn steps(&self, m: &Module, groups: &[Group]) -> Vec<Range<usize>> {
        let cut = |starts: Vec<usize>| -> Vec<Range<usize>> {
            let ends = starts.iter().skip(1).copied().chain([groups.len()]);
            starts.iter().copied().zip(ends).map(|(a, b)| a..b).collect()
        };
        match self.sequential {
            _ if groups.is_empty() => Vec::new(),
            Sequential::Layer => cut((0..groups.len()).collect()),
            Sequential::Block => cut(sequential::blocks(m, groups)),
            Sequential::Off => {
                let runs = gram::runs((0..groups.len()).collect(), |&g| groups[g].k, gram::BUDGET);
                cut(runs.iter().map(|run| run[0]).collect())
            }
        }
    }

    /// The Gram matrices of groups in the model as it is.
    fn watch(&self, m: &Module, cx: &PassCx, groups: &[&Group]) -> Result<Vec<Seen>, PassError> {
        let wanted: Vec<_> = groups.iter().map(|g| (g.x, g.k)).collect();
        let mut grams = gram::collect(m, cx, &wanted, NAME)?;
        let seen = |g: &&Group| Seen {
            gram: grams.remove(&g.x).expect("every wanted value was collected"),
            pull: g.weights.iter().map(|_| None).collect(),
        };
        Ok(groups.iter().map(seen).collect())
    }

    fn group(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        group: &Group,
        seen: Seen,
    ) -> Result<Finished, PassError> {
        let k = group.k;
        let mark = cx.report.mark();
        let first = cx.report.weights.len();
        let (rows, mut done) = (seen.gram.rows, Vec::new());
        let cost = Cost::new(seen.gram, self.damp, self.act_order);
        let asked = self.damp as f32;
        if let Some(cost) = cost.as_ref().filter(|c| c.damp > asked) {
            let what = m.value_label(group.x);
            let why = "its Gram matrix has no Cholesky factor with less";
            cx.report.warn(format!("gptq: {what}: damp raised from {asked} to {}: {why}", cost.damp));
        }
        let pull = cost.as_ref().filter(|_| seen.pull.iter().any(Option::is_some)).and_then(Cost::pull);
        for (shared, difference) in group.weights.iter().zip(seen.pull) {
            let w = group::rows(m, NAME, shared)?;
            let options = self.each.get(&*shared.label(m)).unwrap_or(&self.options);
            let bytes = bytemuck::cast_slice(&w.values);
            let matrix = Matrix { bytes, float: Float::F32, layout: Layout::Nk, n: w.n, k };
            let Some(cost) = &cost else {
                let why = match rows {
                    0 => "no calibration data reached it",
                    _ => "its activations are zero on the calibration data",
                };
                let notes = vec![format!("rounded to nearest: {why}")];
                cx.report.warn(format!("gptq: {}: {why}; rounded to nearest", shared.label(m)));
                let notes = Notes { method: "rtn".into(), notes, ..Notes::default() };
                done.push(quantize(m, cx, NAME, shared, options, notes)?);
                cx.report.weights[first + done.len() - 1].rows = Some(rows);
                continue;
            };
            let method = Method {
                block: self.block,
                static_groups: self.static_groups,
                ranges: options.ranges(),
                sweeps: self.sweeps,
            };
            let target = pull.as_ref().zip(difference).map(|(pull, d)| pull.add(&w.values, d));
            let spec = shared.spec(m, cx, options);
            let given = compensate::quantize(target.as_deref().unwrap_or(&w.values), cost, &spec, &method);
            let notes = Notes { method: NAME.into(), ..Notes::default() };
            let (q, _) = quantize_matrix(m, cx, NAME, shared, &matrix, options, &given, notes)?;
            let mut judge = Judge::new(&w.values, w.n, k, Some(&cost.h));
            judge.step("rtn", &grid::nearest(w.values.clone(), k, &spec));
            judge.step(NAME, &dequantize(&q)?);
            let report = &mut cx.report.weights[first + done.len()];
            judge.finish(report);
            report.rows = Some(rows);
            done.push(q);
        }
        Ok(Finished { scale: None, weights: done, said: cx.report.since(&mark) })
    }
}
