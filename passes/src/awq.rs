//! `awq`: activation-aware weight quantization (Lin et al., "AWQ", MLSys 2024, section 3).
//!
//! Linears that read one value `x` share a scale `s` per channel: `x W = (x / s) (s W)`. Channels with large
//! activations get large scales, so that their weights lose less. Whether and where `x / s` costs nothing is asked of
//! the e-graph first; a scale with no place is not searched for. Of the scales `rms(x)^alpha` the one is taken whose
//! rounded weights have the least error of the group's *output* over the calibration data, which the Gram matrix of
//! the activations gives exactly. Then each group of weights is clipped for the same error, or refined without data (hqq).

use crate::eqsat::Placement;
use crate::errors::Judge;
use crate::gram::{self, Gram, quadratic_of};
use crate::grid::{self, Clip, Float, Layout, Matrix, Ranges};
use crate::group::{self, Group, Rows, groups};
use crate::qtensor::QTensor;
use crate::quantize::{Clipping, GridOptions, Notes, Shared, dequantize, each, quantize_matrix};
use crate::scale;
use crate::store::{Finished, Key, Work};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError};
use dialects::ir::{Module, Symbol, Value};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// The pass and its options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Awq {
    /// The grid.
    #[serde(flatten)]
    pub options: GridOptions,
    /// Whether weights are rounded, or only scaled, for a pass that rounds them; in a pipeline where one follows that makes
    /// up for the errors of rounding, they are left to it unless this is given.
    pub round: bool,
    /// Steps of the scale's exponent between 0 and 1; 0 searches for no scale.
    pub grid: u32,
    /// Which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Default for Awq {
    fn default() -> Awq {
        let options = GridOptions { clip: Clipping::Search, ..GridOptions::default() };
        Awq { options, round: true, grid: 20, filter: Filter::default() }
    }
}

const NAME: &str = "awq";

/// Rows of each weight that the search looks at, evenly spaced; more would not change which scale wins.
const SEARCH_ROWS: usize = 512;

/// A scale must bring the error of rounding below this share of what it is without one: clipping afterwards finds most
/// of what a small gain promises, and a scale that promises no more only moves error around.
const WORTH: f64 = 0.9;

impl Pass for Awq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "quantizes weights after scaling their channels by what the activations need, and clipping"
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

    fn needs_calibration(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        self.options.check(NAME)?;
        let work = Work::begin(m, cx, NAME, self)?;
        each(m, cx, NAME, &self.filter, false, |m, cx, weights| self.all(m, cx, weights, &work))
    }
}

impl Awq {
    fn all(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        weights: Vec<Shared>,
        work: &Work,
    ) -> Result<(), PassError> {
        let keyed = |g: Group| {
            let nodes = scale::nodes(m, &g);
            (work.key(m, &g.weights), g, nodes)
        };
        let groups: Vec<(Key, Group, Vec<Symbol>)> = groups(m, weights).into_iter().map(keyed).collect();
        let first = cx.report.weights.len();
        let (count, mut scaled) = (groups.len(), 0);
        let progress = cx.env.progress(NAME, count as u64);
        // Backwards: a scale lands in weights before its linear, which must be float still, and leaves the
        // activations before them as they were.
        let backwards = groups.into_iter().rev().collect();
        for run in gram::runs(backwards, |(_, g, _)| g.k, gram::BUDGET) {
            // Finished groups change the module only once the data of the others is gathered, as if none were finished.
            let find = |(key, g, _): &(Key, Group, Vec<Symbol>)| work.finished(m, cx, key, &g.weights);
            let finished: Vec<Option<Finished>> = run.iter().map(find).collect::<Result<_, _>>()?;
            let open = run.iter().zip(&finished).filter(|(_, done)| done.is_none());
            let open: Vec<(Value, usize)> = open.map(|((_, g, _), _)| (g.x, g.k)).collect();
            let mut grams = gram::collect(m, cx, &open, NAME)?;
            for ((key, g, nodes), done) in run.iter().zip(finished) {
                let group = scale::current(m, cx, NAME, &self.filter, g, nodes)?;
                let scale = match done {
                    Some(done) => done.install(m, cx, NAME, &group.weights)?,
                    None => {
                        let gram = grams.remove(&g.x).expect("every wanted value was collected");
                        let done = self.group(m, cx, &group, &gram)?;
                        work.keep(key, &done)?;
                        done.scale
                    }
                };
                scaled += u64::from(scale.is_some());
                match scale {
                    Some(s) if self.round => scale::divide(m, cx, NAME, &group, &s)?,
                    Some(s) => scale::apply(m, cx, NAME, &group, &s)?,
                    None => {}
                }
                if !progress.advance(1) {
                    return Err(PassError::Env("interrupted".into()));
                }
            }
        }
        if self.round {
            return group::finish(m, cx, NAME, work, &self.filter, &self.options, first);
        }
        cx.report.note(format!("awq: {scaled} of {count} inputs of linears are scaled, nothing is rounded"));
        Ok(())
    }
}

impl Awq {
    /// Quantizes the weights of a group, under a scale if one is worth it.
    fn group(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        group: &Group,
        gram: &Gram,
    ) -> Result<Finished, PassError> {
        let mark = cx.report.mark();
        let weights: Vec<Rows> =
            group.weights.iter().map(|w| group::rows(m, NAME, w)).collect::<Result<_, _>>()?;
        let placement = self.placement(m, cx, group);
        let (scale, notes) = match &placement {
            Err(why) => (None, vec![format!("no scale: {why}")]),
            Ok(p) => {
                let spec = group.weights[0].spec(m, cx, &self.options);
                match self.search(&weights, gram, p.freedom.as_deref(), &spec) {
                    Some(scale) => (Some(scale), vec![format!("scale in {}", p.sites.join(", "))]),
                    None => {
                        (None, vec!["no scale: none lowers the error of rounding by a tenth".to_string()])
                    }
                }
            }
        };
        if !self.round {
            return Ok(Finished { scale, ..Finished::default() });
        }
        let ones = vec![1.0; group.k];
        let s = scale.as_deref().unwrap_or(&ones);
        let exact = gram.to_f32();
        let mut done = Vec::new();
        for (shared, w) in group.weights.iter().zip(weights) {
            let spec = shared.spec(m, cx, &self.options);
            let mut judge = Judge::new(&w.values, w.n, group.k, Some(&exact[..]));
            judge.step("rtn", &grid::nearest(w.values.clone(), group.k, &spec));
            if scale.is_some() && self.options.ranges() != Ranges::Span {
                judge.step("scale", &divided(grid::nearest(scaled(&w, s), group.k, &spec), s));
            }
            let at = cx.report.weights.len();
            let tensor = self.quantize(m, cx, shared, &w, s, gram, notes.clone())?;
            let q = divided(dequantize(&tensor)?, s);
            done.push(tensor);
            match self.options.ranges() {
                Ranges::Span if scale.is_none() => {}
                Ranges::Span => judge.step("scale", &q),
                ranges => judge.step(ranges.name(), &q),
            }
            judge.finish(&mut cx.report.weights[at]);
        }
        Ok(Finished { scale, weights: done, said: cx.report.since(&mark) })
    }

    /// Where a scale on the group's value may go, or why it may not.
    fn placement(&self, m: &Module, cx: &PassCx, group: &Group) -> Result<Placement, String> {
        if self.grid == 0 {
            return Err("the search is off (grid=0)".into());
        }
        scale::placement(m, cx, group)
    }

    /// The scale of least output error, when it is worth it. `freedom` ties channels of equal class.
    fn search(
        &self,
        weights: &[Rows],
        gram: &Gram,
        freedom: Option<&[u32]>,
        spec: &grid::Spec,
    ) -> Option<Vec<f32>> {
        let sampled: Vec<Rows> = weights.iter().map(|w| w.sample(gram.k, SEARCH_ROWS)).collect();
        let exact = gram.to_f32();
        let rms = rms(gram, freedom);
        let error = |i: u32| {
            let s = power(&rms, i as f32 / self.grid as f32);
            (rounding_error(&sampled, &exact, &s, spec), s)
        };
        let mut tried: Vec<(f64, Vec<f32>)> = (0..=self.grid).into_par_iter().map(error).collect();
        let best = (0..tried.len()).min_by(|&a, &b| tried[a].0.total_cmp(&tried[b].0))?;
        (tried[best].0 < WORTH * tried[0].0).then(|| tried.swap_remove(best).1)
    }

    /// Quantizes one weight under the scale `s`.
    #[allow(clippy::too_many_arguments)]
    fn quantize(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        shared: &Shared,
        w: &Rows,
        s: &[f32],
        gram: &Gram,
        notes: Vec<String>,
    ) -> Result<QTensor, PassError> {
        let scaled = scaled(w, s);
        let bytes = bytemuck::cast_slice(&scaled);
        let matrix = Matrix { bytes, float: Float::F32, layout: Layout::Nk, n: w.n, k: gram.k };
        let notes = Notes { method: NAME.into(), output_error: None, notes };
        let q =
            match self.options.ranges() {
                Ranges::Clip => {
                    let spec = shared.spec(m, cx, &self.options);
                    let clip = Clip::new(&gram.divided(s).sums, gram.k, &spec).map_err(|e| {
                        PassError::At { pass: NAME, what: shared.label(m), why: e.to_string() }
                    })?;
                    quantize_matrix(m, cx, NAME, shared, &matrix, &self.options, &clip, notes)?
                }
                ranges => quantize_matrix(m, cx, NAME, shared, &matrix, &self.options, &ranges, notes)?,
            };
        Ok(q.0)
    }
}

/// The root mean square of each channel of the activations; tied channels share theirs.
fn rms(gram: &Gram, freedom: Option<&[u32]>) -> Vec<f32> {
    let mut squares: Vec<f64> = gram.diagonal().into_iter().map(|x| x / gram.rows.max(1) as f64).collect();
    if let Some(classes) = freedom {
        let mut pool = vec![(0f64, 0usize); classes.iter().max().map_or(0, |&c| c as usize + 1)];
        for (&c, x) in classes.iter().zip(&squares) {
            pool[c as usize].0 += x;
            pool[c as usize].1 += 1;
        }
        for (&c, x) in classes.iter().zip(&mut squares) {
            *x = pool[c as usize].0 / pool[c as usize].1 as f64;
        }
    }
    squares.iter().map(|x| x.sqrt() as f32).collect()
}

/// `rms^alpha`, with the geometric middle of its range at 1. A channel without activations has 1.
fn power(rms: &[f32], alpha: f32) -> Vec<f32> {
    let raw: Vec<Option<f32>> = rms.iter().map(|&r| (r > 0.0).then(|| r.powf(alpha))).collect();
    let (least, most) = raw.iter().flatten().fold((f32::MAX, 0f32), |(a, b), &x| (a.min(x), b.max(x)));
    let middle = least.sqrt() * most.sqrt();
    // Beyond these bounds a channel would vanish from its group, or take it over.
    let entry = |x: &Option<f32>| x.map_or(1.0, |x| (x / middle).clamp(1e-4, 1e4));
    if middle.is_finite() && middle > 0.0 { raw.iter().map(entry).collect() } else { vec![1.0; raw.len()] }
}

/// The output error of weights rounded to nearest under the scale `s`; `gram` is that of the activations before it.
fn rounding_error(weights: &[Rows], gram: &[f32], s: &[f32], spec: &grid::Spec) -> f64 {
    let k = s.len();
    let error = |w: &Rows| {
        let scaled = scaled(w, s);
        let mut e = grid::nearest(scaled.clone(), k, spec);
        for (i, (e, x)) in e.iter_mut().zip(&scaled).enumerate() {
            *e = (*e - x) / s[i % k];
        }
        quadratic_of(w.n, k, gram, |from, out| out.copy_from_slice(&e[from * k..][..out.len()]))
    };
    weights.iter().map(error).sum()
}

/// The weight with every channel multiplied by its entry of `s`.
fn scaled(w: &Rows, s: &[f32]) -> Vec<f32> {
    w.values.chunks_exact(s.len()).flat_map(|row| row.iter().zip(s).map(|(x, s)| x * s)).collect()
}

/// The weight with every channel divided by its entry of `s`.
fn divided(mut q: Vec<f32>, s: &[f32]) -> Vec<f32> {
    for row in q.chunks_exact_mut(s.len()) {
        row.iter_mut().zip(s).for_each(|(x, s)| *x /= s);
    }
    q
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gram(squares: [f64; 4]) -> Gram {
        let mut g = Gram::new(4);
        g.rows = 1;
        squares.iter().enumerate().for_each(|(i, x)| g.sums[i * 5] = *x);
        g
    }

    #[test]
    fn scales_follow_activations() {
        let r = rms(&gram([1.0, 1.0, 16.0, 0.0]), None);
        assert_eq!(r, [1.0, 1.0, 4.0, 0.0]);
        // With alpha 1 the middle of the range 1..4 is 2. The dead channel keeps 1.
        assert_eq!(power(&r, 1.0), [0.5, 0.5, 2.0, 1.0]);
        assert_eq!(power(&r, 0.0), [1.0; 4]);
        assert_eq!(power(&[0.0; 3], 1.0), [1.0; 3]);
    }

    #[test]
    fn tied_channels_have_one_scale() {
        let r = rms(&gram([1.0, 7.0, 9.0, 9.0]), Some(&[0, 1, 0, 1]));
        assert_eq!((r[0], r[1]), (5f32.sqrt(), 8f32.sqrt()));
        assert_eq!((r[0], r[1]), (r[2], r[3]));
    }
}
