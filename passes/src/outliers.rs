//! What stands out in a model: weights far beyond the others of their tensor, and channels of activations whose values are
//! large beside the other channels'. Both cost 8-bit codes, whose range they span, most of their steps. `qcc outliers` shows it.

use crate::eqsat::{self, Channels};
use crate::extremes::{self, Extremes};
use crate::linear::{Form, Linear, Weighted, find};
use crate::ranges::Histogram;
use crate::{PassCx, PassError};
use dialects::ir::{ConstId, Module, Op, Value, infer};
use dialects::tensor::Tensor;
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeSet;

const NAME: &str = "outliers";

/// The share of a weight's elements whose range its whole range is compared with.
const MIDDLE: f64 = 0.999;

/// Codes of 8 bits.
const CODES: usize = 256;

/// A weight is worth a word whose range is this many times that of its middle.
const WIDE: f64 = 2.0;

/// An activation without outlier channels is worth a word whose largest magnitude is this many times the mean.
const PEAKED: f64 = 100.0;

/// The share of wasted codes that is worth a word.
const WASTED: f64 = 0.5;

/// From where on something stands out.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Standard deviations of a weight from the mean of its tensor.
    pub sigma: f64,
    /// The largest magnitude of a channel beside that of the median channel.
    pub channel: f64,
}

/// A weight, with one range for all of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WeightFound {
    /// Its name.
    pub weight: String,
    /// The first node that multiplies by it.
    pub node: String,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// The largest magnitude.
    pub max: f64,
    /// The standard deviation.
    pub deviation: f64,
    /// Elements further from the mean than so many standard deviations.
    pub beyond: u64,
    /// The range of all elements beside that of the middle 99.9 % of them.
    pub range_ratio: f64,
    /// The share of 256 codes, evenly spaced over the range of all elements, to which none is rounded.
    pub wasted: f64,
    /// What to do about it.
    pub alerts: Vec<String>,
}

/// An activation that linears or convolutions read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ActivationFound {
    /// The value's name.
    pub value: String,
    /// The nodes that multiply it.
    pub nodes: Vec<String>,
    /// Channels.
    pub channels: usize,
    /// The largest magnitude.
    pub max: f64,
    /// The mean magnitude.
    pub mean: f64,
    /// The one beside the other.
    pub ratio: f64,
    /// Channels that stand out, those of the largest magnitude first.
    pub outliers: Vec<OutlierChannel>,
    /// What to do about it.
    pub alerts: Vec<String>,
}

/// A channel that stands out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OutlierChannel {
    /// Which.
    pub channel: usize,
    /// The largest magnitude in it.
    pub max: f64,
}

/// What stands out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// Float weights, each once, in program order.
    pub weights: Vec<WeightFound>,
    /// Activations, in program order of the first op that reads them.
    pub activations: Vec<ActivationFound>,
}

/// Looks at every float weight, and at the activations that they multiply, over the calibration data.
pub fn look(m: &mut Module, cx: &PassCx, limits: &Limits) -> Result<Found, PassError> {
    infer::infer(m, cx.ops);
    let mut weights = Vec::new();
    let mut read: Vec<Read> = Vec::new();
    let mut seen: BTreeSet<ConstId> = BTreeSet::new();
    for weighted in find(m) {
        let (Weighted::Linear(l) | Weighted::Kernel(l)) = weighted else { continue };
        if seen.insert(l.konst) {
            weights.push(weight(m, &l, limits)?);
        }
        let Some(along) = channels(m, &l) else { continue };
        match read.iter_mut().find(|r| r.value == l.x && r.along == along) {
            Some(r) => r.readers.push(l.op),
            None => read.push(Read { value: l.x, along, readers: vec![l.op] }),
        }
    }
    if weights.is_empty() {
        let why = "no op multiplies by a float weight".into();
        return Err(PassError::Nothing { pass: NAME, why });
    }
    let values: Vec<(Value, Channels)> = read.iter().map(|r| (r.value, r.along)).collect();
    let extremes = extremes::collect(m, cx, &values, 0, NAME)?;
    let activations = read.iter().map(|r| r.found(m, cx, &extremes[&r.value], limits)).collect();
    Ok(Found { weights, activations })
}

fn weight(m: &Module, l: &Linear, limits: &Limits) -> Result<WeightFound, PassError> {
    let label = m.value_label(l.weight);
    let fail = |why: String| PassError::At { pass: NAME, what: label.clone(), why };
    let t = Tensor::from_const(&m.consts[l.konst]).map_err(|e| fail(e.to_string()))?;
    let x = t.to_f32().map_err(|e| fail(e.to_string()))?;
    let mut h = Histogram::default();
    h.add(&x);
    if h.not_finite() > 0 {
        return Err(fail(format!("{} of {} weights are NaN or infinite", h.not_finite(), x.len())));
    }
    let (min, max) = (f64::from(h.min().unwrap_or(0.0)), f64::from(h.max().unwrap_or(0.0)));
    let count = x.len().max(1) as f64;
    let mean = sum(&x, |x| x) / count;
    let deviation = (sum(&x, |x| (x - mean) * (x - mean)) / count).sqrt();
    let beyond = sum(&x, |x| f64::from(u8::from((x - mean).abs() > limits.sigma * deviation))) as u64;
    let outside = (1.0 - MIDDLE) / 2.0;
    let middle = f64::from(h.quantile(1.0 - outside)) - f64::from(h.quantile(outside));
    let range_ratio = if middle > 0.0 { (max - min) / middle } else { 1.0 };
    let step = (max - min) / (CODES - 1) as f64;
    let mut used = [false; CODES];
    for &x in x.iter().filter(|_| step > 0.0) {
        used[(((f64::from(x) - min) / step).round() as usize).min(CODES - 1)] = true;
    }
    let possible = CODES.min(x.len());
    let wasted = match step > 0.0 {
        true => 1.0 - used.iter().filter(|u| **u).count() as f64 / possible as f64,
        false => 0.0,
    };
    let mut alerts = Vec::new();
    if beyond > 0 && range_ratio >= WIDE {
        alerts.push(format!(
            "{beyond} weights beyond {} sigma widen its range {range_ratio:.1} times: clip them, as in rtn{{clip=true}} \
             or awq, or give it smaller groups",
            limits.sigma
        ));
    }
    if wasted > WASTED && x.len() >= CODES {
        alerts.push(format!(
            "{:.0} % of 256 codes are unused with one scale for all of it: give each output its own (group=-1), or smaller \
             groups",
            wasted * 100.0
        ));
    }
    let node = m.ops[l.op].loc.to_string();
    let max = max.max(-min);
    Ok(WeightFound {
        weight: label,
        node,
        n: l.n,
        k: l.k,
        max,
        deviation,
        beyond,
        range_ratio,
        wasted,
        alerts,
    })
}

/// The sum of `f` over all elements, the same for any number of threads.
fn sum(x: &[f32], f: impl Fn(f64) -> f64 + Sync) -> f64 {
    const CHUNK: usize = 1 << 16;
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(|x| x.iter().map(|&x| f(f64::from(x))).sum()).collect();
    parts.iter().sum()
}

/// The channels of what a weight multiplies, where they can be told and gathered.
fn channels(m: &Module, l: &Linear) -> Option<Channels> {
    let along = match l.form {
        _ if m.ops[l.op].region != m.top => return None,
        Form::Rows => Channels::Last,
        Form::Kernel if m.ops[l.op].is("onnx.Conv") => Channels::Second,
        Form::Columns | Form::Kernel => return None,
    };
    along.of(m.ty(l.x)).is_some().then_some(along)
}

/// An activation and what reads it.
struct Read {
    value: Value,
    along: Channels,
    readers: Vec<Op>,
}

impl Read {
    fn found(&self, m: &Module, cx: &PassCx, seen: &Extremes, limits: &Limits) -> ActivationFound {
        let largest = seen.largest();
        let channels = largest.len();
        let max = f64::from(largest.iter().fold(0f32, |most, &x| most.max(x)));
        let mean = seen.magnitudes.iter().sum::<f64>() / (seen.rows.max(1) as f64 * channels as f64);
        let ratio = if mean > 0.0 { max / mean } else { 1.0 };
        let mut sorted = largest.clone();
        sorted.sort_by(f32::total_cmp);
        let median = f64::from(sorted[channels / 2]);
        let out = |&c: &usize| median > 0.0 && f64::from(largest[c]) > limits.channel * median;
        let mut outliers: Vec<OutlierChannel> = (0..channels)
            .filter(out)
            .map(|channel| OutlierChannel { channel, max: f64::from(largest[channel]) })
            .collect();
        outliers.sort_by(|a, b| b.max.total_cmp(&a.max));
        let alerts = match (seen.rows, outliers.len()) {
            (0, _) => vec!["no calibration data reached it".to_string()],
            (_, 0) if ratio > PEAKED => {
                vec!["single values stand out, in no channel of their own: calibrate{method=percentile} cuts them off".into()]
            }
            (_, 0) => Vec::new(),
            (_, n) => vec![self.advice(m, cx, n)],
        };
        let nodes = self.readers.iter().map(|&op| m.ops[op].loc.to_string()).collect();
        ActivationFound {
            value: m.value_label(self.value),
            nodes,
            channels,
            max,
            mean,
            ratio,
            outliers,
            alerts,
        }
    }

    /// What to do about `n` outlier channels.
    fn advice(&self, m: &Module, cx: &PassCx, n: usize) -> String {
        let (what, them) = match n {
            1 => ("1 channel stands out".to_string(), "it"),
            _ => (format!("{n} channels stand out"), "them"),
        };
        let place = eqsat::place_along(m, cx.ops, self.value, self.along, &self.readers);
        let linear = self.along == Channels::Last;
        match place.why_not {
            None if linear => format!("{what}: smooth-migrate moves {them} into {}", place.sites.join(", ")),
            None => format!("{what}: equalize moves {them} into {}", place.sites.join(", ")),
            Some(why) if linear => {
                format!("{what}, and cannot be moved ({why}): llm-int8 keeps {them} in floating point")
            }
            Some(why) => format!("{what}, and cannot be moved ({why}): keep the layer float, with skip=[..]"),
        }
    }
}
