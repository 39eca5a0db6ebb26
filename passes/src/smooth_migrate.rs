//! `smooth-migrate`: moves what is large in activations into weights, so that 8 bits hold both (Xiao et al., "SmoothQuant",
//! ICML 2023, section 4).
//!
//! Linears that read one value `X` share a scale per channel: `X W = (X / s) (s W)`, `s = max|X|^alpha / max|W|^(1 - alpha)`.
//! What is upstream takes `1 / s` where the e-graph finds a place for it; a value without one stays as it is, and is named.
//! With `alpha=auto` each value has its own: that for which the outputs of its linears err least on calibration data when
//! both factors are rounded. Of the data the greatest and least value of each channel is kept, and a few rows.

use crate::eqsat::{self, Channels};
use crate::extremes::{self, Extremes};
use crate::grid::{self, Float, Spec};
use crate::group::{self, Group, Rows};
use crate::report::Said;
use crate::scale;
use crate::store::{Finished, Key, Work};
use crate::{Changed, Exactness, Filter, Pass, PassCx, PassError, report};
use dialects::ir::{Module, Value, infer};
use dialects::kernels::gemm::{self, Mat};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;

const NAME: &str = "smooth-migrate";

/// Steps of `alpha` between 0 and 1 that `auto` tries.
const STEPS: u32 = 20;

/// Rows of the activations that `auto` compares outputs on at least, where there are as many; they are evenly spaced.
const ROWS: usize = 128;

/// Rows of each weight that `auto` looks at, evenly spaced.
const OUTPUTS: usize = 512;

/// An alpha is taken where the error is below this share of what it is without a scale.
const WORTH: f64 = 0.99;

/// No channel is scaled by more than this, or its inverse.
const MOST: f32 = 1e5;

/// How much of the difficulty goes into the weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "Json", try_from = "Json")]
pub enum Alpha {
    /// Searched for each value.
    Auto,
    /// 0 makes all weights of one size, 1 all activations.
    Fixed(f32),
}

impl From<Alpha> for Json {
    fn from(alpha: Alpha) -> Json {
        match alpha {
            Alpha::Auto => "auto".into(),
            // The digits that were given, not those of the wider type.
            Alpha::Fixed(x) => x.to_string().parse::<f64>().unwrap_or(x.into()).into(),
        }
    }
}

impl TryFrom<Json> for Alpha {
    type Error = String;
    fn try_from(value: Json) -> Result<Alpha, String> {
        match (value.as_str(), value.as_f64()) {
            (Some("auto"), _) => Ok(Alpha::Auto),
            (_, Some(x)) if (0.0..=1.0).contains(&x) => Ok(Alpha::Fixed(x as f32)),
            _ => Err(format!("alpha: expected auto or a number from 0 to 1, found {value}")),
        }
    }
}

/// The options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct SmoothMigrate {
    /// The exponent.
    pub alpha: Alpha,
    /// Bits of the weights that follow, which `alpha=auto` rounds them to.
    pub bits: u32,
    /// Before which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Default for SmoothMigrate {
    fn default() -> SmoothMigrate {
        SmoothMigrate { alpha: Alpha::Fixed(0.5), bits: 8, filter: Filter::default() }
    }
}

impl Pass for SmoothMigrate {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "move outliers of activations into the weights that multiply them, before both are rounded to 8 bits"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        if !(2..=8).contains(&self.bits) {
            let why = format!("expected 2 to 8, found {}", self.bits);
            return Err(PassError::Option { pass: NAME, option: "bits", why });
        }
        // Contradictions are the verifier's to report.
        infer::infer(m, cx.ops);
        let groups = scale::found(m, cx, &self.filter);
        if groups.is_empty() {
            let why = "no MatMul or Gemm with a constant float weight reads an activation".into();
            return match cx.settings.allow_noop {
                true => Ok(Changed::No),
                false => Err(PassError::Nothing { pass: NAME, why }),
            };
        }
        let work = Work::begin(m, cx, NAME, self)?;
        let keys: Vec<Key> = groups.iter().map(|g| work.key(m, &g.weights)).collect();
        let find = |(g, key): (&Group, &Key)| work.finished(m, cx, key, &g.weights);
        let mut finished: Vec<Option<Finished>> =
            groups.iter().zip(&keys).map(find).collect::<Result<_, _>>()?;
        let constants = m.consts.len();
        let nodes: Vec<_> = groups.iter().map(|g| scale::nodes(m, g)).collect();
        let rows = if self.alpha == Alpha::Auto { ROWS } else { 0 };
        let open = groups.iter().zip(&finished).filter(|(_, done)| done.is_none()).map(|(g, _)| g.x);
        let values: Vec<(Value, Channels)> =
            open.filter(|&x| Channels::Last.of(m.ty(x)).is_some()).map(|x| (x, Channels::Last)).collect();
        let seen = extremes::collect(m, cx, &values, rows, NAME)?;
        let mut said: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut smoothed = 0;
        let progress = cx.env.progress(NAME, groups.len() as u64);
        // Backwards: the weights that a scale lands in are then looked at as they will be.
        for (i, found) in groups.iter().enumerate().rev() {
            let group = scale::current(m, cx, NAME, &self.filter, found, &nodes[i])?;
            let done = match finished[i].take() {
                Some(done) => done,
                None => {
                    let (scale, what) = match self.scale(m, cx, &group, seen.get(&found.x))? {
                        Ok((alpha, s)) => (Some(s), format!("scaled with alpha {alpha}")),
                        Err(why) => (None, format!("left as it is: {why}")),
                    };
                    let said = Said { notes: vec![what], ..Said::default() };
                    let done = Finished { scale, weights: Vec::new(), said };
                    work.keep(&keys[i], &done)?;
                    done
                }
            };
            if let Some(s) = &done.scale {
                scale::apply(m, cx, NAME, &group, s)?;
                smoothed += 1;
            }
            // Values of which the same is said are named together.
            let what = done.said.notes.into_iter().next().unwrap_or_default();
            said.entry(what).or_default().push(m.value_label(group.x));
            if !progress.advance(1) {
                return Err(PassError::Env("interrupted".into()));
            }
        }
        cx.count("smooth-migrate.values", smoothed);
        cx.report.note(format!("{NAME}: {smoothed} of {} inputs of linears are scaled", groups.len()));
        for (what, values) in said {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            cx.report.note(format!("{NAME}: {}: {what}", report::listed(&values)));
        }
        eqsat::settle(m, cx, NAME, constants)?;
        Ok(if smoothed > 0 { Changed::Yes } else { Changed::No })
    }
}

impl SmoothMigrate {
    /// The scale of a group and its alpha, or why it has none.
    fn scale(
        &self,
        m: &Module,
        cx: &PassCx,
        group: &Group,
        seen: Option<&Extremes>,
    ) -> Result<Result<(f32, Vec<f32>), String>, PassError> {
        let place = match scale::placement(m, cx, group) {
            Ok(place) => place,
            Err(why) => return Ok(Err(why)),
        };
        let Some(seen) = seen.filter(|s| s.rows > 0) else {
            return Ok(Err("no calibration data reached it".into()));
        };
        let weights: Vec<Rows> =
            group.weights.iter().map(|w| group::rows(m, NAME, w)).collect::<Result<_, _>>()?;
        let mut x = seen.largest();
        let mut w = vec![0f32; group.k];
        for row in weights.iter().flat_map(|w| w.values.chunks_exact(group.k)) {
            w.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(x.abs()));
        }
        if let Some(classes) = &place.freedom {
            pool(classes, &mut x);
            pool(classes, &mut w);
        }
        let bits = self.bits;
        match self.alpha {
            Alpha::Fixed(alpha) => Ok(Ok((alpha, scales(&x, &w, alpha)))),
            Alpha::Auto => Ok(search(seen, &weights, bits, |alpha| scales(&x, &w, alpha))),
        }
    }
}

/// Gives every channel the largest of its class.
fn pool(classes: &[u32], x: &mut [f32]) {
    let mut most = vec![0f32; classes.iter().max().map_or(0, |&c| c as usize + 1)];
    classes.iter().zip(&*x).for_each(|(&c, &x)| most[c as usize] = most[c as usize].max(x));
    classes.iter().zip(x).for_each(|(&c, x)| *x = most[c as usize]);
}

/// `x^alpha / w^(1 - alpha)` for the largest magnitudes `x` of each channel and `w` of its weights; 1 where either is zero.
fn scales(x: &[f32], w: &[f32], alpha: f32) -> Vec<f32> {
    let one = |(&x, &w): (&f32, &f32)| match x > 0.0 && w > 0.0 {
        true => (x.powf(alpha) / w.powf(1.0 - alpha)).clamp(1.0 / MOST, MOST),
        false => 1.0,
    };
    x.iter().zip(w).map(one).collect()
}

/// The alpha of least output error among those that are tried, with its scale, where it is worth it.
fn search(
    seen: &Extremes,
    weights: &[Rows],
    bits: u32,
    scale: impl Fn(f32) -> Vec<f32> + Sync,
) -> Result<(f32, Vec<f32>), String> {
    let k = seen.min.len();
    let sampled: Vec<Rows> = weights.iter().map(|w| w.sample(k, OUTPUTS)).collect();
    let ones = vec![1.0; k];
    let exact: Vec<Vec<f32>> = sampled.iter().map(|w| product(&seen.sample, &w.values, k)).collect();
    let error = |s: &[f32]| -> f64 {
        let x = activations(seen, s);
        let each = sampled.iter().zip(&exact).map(|(w, exact)| {
            let spec = Spec { bits, group_size: k, symmetric: true, narrow: true, scales: Float::F32 };
            let mut scaled = w.values.clone();
            scaled.chunks_exact_mut(k).for_each(|row| row.iter_mut().zip(s).for_each(|(w, s)| *w *= s));
            grid::fake_quantize(&mut scaled, k, &spec);
            let found = product(&x, &scaled, k);
            found.iter().zip(exact).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        });
        each.sum()
    };
    let alphas: Vec<f32> = (0..=STEPS).map(|i| i as f32 / STEPS as f32).collect();
    let tried: Vec<f64> = alphas.par_iter().map(|&alpha| error(&scale(alpha))).collect();
    let best = (0..tried.len()).min_by(|&a, &b| tried[a].total_cmp(&tried[b])).expect("some are tried");
    match tried[best] < WORTH * error(&ones) {
        true => Ok((alphas[best], scale(alphas[best]))),
        false => Err("no alpha lowers the error of its linears".into()),
    }
}

/// The sampled rows divided by `s` and rounded to 8 bits, of which one code is zero. The range holds all that was seen.
fn activations(seen: &Extremes, s: &[f32]) -> Vec<f32> {
    let low = seen.min.iter().zip(s).fold(0f32, |low, (x, s)| low.min(x / s));
    let high = seen.max.iter().zip(s).fold(0f32, |high, (x, s)| high.max(x / s));
    let step = (high - low) / 255.0;
    let zero = (-low / step).round_ties_even();
    let one = |(i, x): (usize, &f32)| {
        let x = x / s[i % s.len()];
        let code = ((x / step).round_ties_even() + zero).clamp(0.0, 255.0);
        if step > 0.0 { (code - zero) * step } else { x }
    };
    seen.sample.iter().enumerate().map(one).collect()
}

/// `x w'`: `[rows, K]` by `[N, K]`, on this thread.
fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (rows, n) = (x.len() / k, w.len() / k);
    let mut y = vec![0f32; rows * n];
    gemm::tile(Mat::new(x, rows, k), Mat::new(w, n, k).t(), &mut y);
    y
}
