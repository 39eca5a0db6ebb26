//! `calibrate`: runs the calibration data once, and keeps a histogram of every activation that could be held in 8 bits.
//! No activation is kept. `insert-fake-quant` reads the ranges from the histograms. Statistics that were saved before are
//! taken in place of a run, if they are those of the same model at the same place of a pipeline.

use crate::extremes::Extremes;
use crate::islands::places;
use crate::linear::{Form, Linear, Weighted, find};
use crate::qtensor::{Placed, QTensor, container};
use crate::ranges::{Channels, Histogram, Method, Statistics};
use crate::store::content;
use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::exec::ExecError;
use dialects::ir::{Module, Op, Value, infer};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};

/// The name of the pass, whose statistics the command line saves and gives.
pub const NAME: &str = "calibrate";

/// The options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Calibrate {
    /// How ranges are chosen.
    pub method: Method,
    /// How much of a tensor's values is within its range, in percent, where `method` is `percentile`.
    pub percentile: f64,
    /// Whether the least, the greatest and the mean magnitude of each channel are kept beside the histogram.
    pub per: Per,
    /// The dim of the channels; a negative one counts from the last.
    pub axis: i64,
}

/// What statistics are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Per {
    /// Whole tensors.
    #[default]
    Tensor,
    /// These, and each of their channels.
    Channel,
}

impl Default for Calibrate {
    fn default() -> Calibrate {
        Calibrate { method: Method::Minmax, percentile: 99.99, per: Per::Tensor, axis: -1 }
    }
}

impl Pass for Calibrate {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "finds the ranges of activations, for insert-fake-quant"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        if !(self.percentile > 50.0 && self.percentile <= 100.0) {
            let why = format!("expected above 50 and up to 100, found {}", self.percentile);
            return Err(PassError::Option { pass: NAME, option: "percentile", why });
        }
        infer::infer(m, cx.ops);
        let products = products(m);
        let wanted: Vec<Value> = places(m, |op| products.contains(&op)).iter().map(|p| p.value).collect();
        if wanted.is_empty() {
            let why = "no MatMul, Gemm or Conv with a constant weight reads an activation".into();
            return match cx.may_find_nothing() {
                true => Ok(Changed::No),
                false => Err(PassError::Nothing { pass: NAME, why }),
            };
        }
        let given = cx.env.given_statistics();
        let named = given.is_some() || cx.env.saves_statistics();
        let model = if named { blake3::Hash::from(content(m)).to_hex().to_string() } else { String::new() };
        let channels = match self.per {
            Per::Tensor => HashMap::new(),
            Per::Channel => self.channels(m, cx, &wanted)?,
        };
        let (tensors, channels) = match given {
            Some(given) => {
                cx.report.note("ranges of activations are those of statistics that were given");
                given_for(m, &wanted, &channels, given, &model)?
            }
            None => gathered(m, cx, &wanted, &channels)?,
        };
        for (name, h) in &tensors {
            if h.not_finite() > 0 {
                let why =
                    format!("{} of its values are NaN or infinite on the calibration data", h.not_finite());
                return Err(PassError::At { pass: NAME, what: name.clone(), why });
            }
        }
        cx.count("calibrated activations", wanted.len() as u64);
        let kept =
            cx.env.statistics().ok_or_else(|| PassError::Env("statistics cannot be kept here".into()))?;
        *kept.lock().unwrap_or_else(|e| e.into_inner()) =
            Some(Statistics { model, method: self.method, percentile: self.percentile, tensors, channels });
        Ok(Changed::No)
    }
}

impl Calibrate {
    /// The dim and the number of the channels of each value.
    fn channels(
        &self,
        m: &Module,
        cx: &mut PassCx,
        wanted: &[Value],
    ) -> Result<HashMap<Value, Axis>, PassError> {
        let mut found = HashMap::new();
        for &v in wanted {
            let dims = m.ty(v).dims().unwrap_or_default();
            let axis = if self.axis < 0 { self.axis + dims.len() as i64 } else { self.axis };
            let axis = usize::try_from(axis).ok();
            match axis.and_then(|axis| Some(Axis { axis, count: dims.get(axis)?.known()? as usize })) {
                Some(axis) => drop(found.insert(v, axis)),
                None => cx.report.warn(format!(
                    "{NAME}: the number of channels of {:?} along axis {} is unknown: {}",
                    m.value_label(v),
                    self.axis,
                    m.ty(v)
                )),
            }
        }
        if found.is_empty() {
            let why = format!("no activation has a known number of channels along {}", self.axis);
            return Err(PassError::Option { pass: NAME, option: "axis", why });
        }
        Ok(found)
    }
}

/// The dim of the channels of a value, and its size.
struct Axis {
    axis: usize,
    count: usize,
}

/// Histograms by name, and what was seen of channels.
type Gathered = (BTreeMap<String, Histogram>, BTreeMap<String, Channels>);

/// Statistics of `wanted` over the calibration data.
fn gathered(
    m: &Module,
    cx: &PassCx,
    wanted: &[Value],
    channels: &HashMap<Value, Axis>,
) -> Result<Gathered, PassError> {
    let mut found: HashMap<Value, Histogram> = wanted.iter().map(|&v| (v, Histogram::default())).collect();
    let mut each: HashMap<Value, Extremes> =
        channels.iter().map(|(&v, a)| (v, Extremes::new(a.count, 0))).collect();
    cx.env.calibrate(m, wanted, &mut |v, item| {
        let refuse = |e: &dyn std::fmt::Display| ExecError::Sink(format!("{:?}: {e}", m.value_label(v)));
        let t = item.tensor().map_err(|e| refuse(&e))?;
        let x = t.to_f32().map_err(|e| refuse(&e))?;
        found.get_mut(&v).ok_or_else(|| refuse(&"was not asked for"))?.add(&x);
        if let (Some(each), Some(Axis { axis, count })) = (each.get_mut(&v), channels.get(&v)) {
            if t.shape().get(*axis) != Some(count) {
                let found = t.shape();
                return Err(refuse(&format!(
                    "expected {count} channels in dim {axis}, found the shape {found:?}"
                )));
            }
            each.add(&x, t.shape()[axis + 1..].iter().product());
        }
        Ok(())
    })?;
    let seen = |(v, e): (Value, Extremes)| {
        let mean = |sum: &f64| (sum / e.rows.max(1) as f64) as f32;
        let magnitude = e.magnitudes.iter().map(mean).collect();
        (m.value_label(v), Channels { axis: channels[&v].axis, min: e.min, max: e.max, magnitude })
    };
    let channels = each.into_iter().map(seen).collect();
    Ok((found.into_iter().map(|(v, h)| (m.value_label(v), h)).collect(), channels))
}

/// Statistics of `wanted` from those that were saved.
fn given_for(
    m: &Module,
    wanted: &[Value],
    channels: &HashMap<Value, Axis>,
    given: &Statistics,
    model: &str,
) -> Result<Gathered, PassError> {
    if given.model != model {
        let why = format!(
            "they are of another model: expected blake3 {model}, found {}; the hash is that of the model as calibrate \
             sees it, behind the passes before it",
            given.model
        );
        return Err(PassError::At { pass: NAME, what: "statistics".into(), why });
    }
    let missing = |name: &str, what: &str| PassError::At {
        pass: NAME,
        what: name.to_string(),
        why: format!("the statistics that were given do not have {what}"),
    };
    let one = |&v: &Value| {
        let name = m.value_label(v);
        let h = given.tensors.get(&name).ok_or_else(|| missing(&name, "it"))?.clone();
        Ok::<_, PassError>((name, h))
    };
    let each = |(&v, Axis { axis, count }): (&Value, &Axis)| {
        let name = m.value_label(v);
        let found = given.channels.get(&name).filter(|c| c.axis == *axis && c.min.len() == *count);
        let found =
            found.ok_or_else(|| missing(&name, &format!("its {count} channels along dim {axis}")))?.clone();
        Ok::<_, PassError>((name, found))
    };
    let tensors = wanted.iter().map(one).collect::<Result<_, _>>()?;
    // In order, so that the same tensor is missed in every run.
    let channels = wanted.iter().filter_map(|v| Some((v, channels.get(v)?)));
    Ok((tensors, channels.map(each).collect::<Result<_, _>>()?))
}

/// Products with weights, whether these are quantized already or not.
fn products(m: &Module) -> HashSet<Op> {
    let of = |w: Weighted| match w {
        Weighted::Linear(Linear { op, form: Form::Rows, .. }) | Weighted::Kernel(Linear { op, .. }) => {
            Some(op)
        }
        _ => None,
    };
    find(m).into_iter().filter_map(of).chain(quantized(m)).collect()
}

/// The quantized weight that an op reads as `v`, which may give it another shape.
pub fn weight(m: &Module, v: Value) -> Option<(QTensor, Placed)> {
    let reshaped = m.def_op(v).filter(|(op, _)| m.ops[*op].is("onnx.Reshape"));
    QTensor::of(m, reshaped.and_then(|(op, _)| m.ops[op].operand(0)).unwrap_or(v))
}

/// Products with weights of which every row of 8-bit codes has one scale.
pub fn quantized(m: &Module) -> Vec<Op> {
    let whole = |v| weight(m, v).is_some_and(|(q, _)| container(q.bits) == 8 && q.group_size >= q.k);
    let product = |op: &Op| {
        let data = &m.ops[*op];
        let kind = match data.name.as_str() {
            "onnx.MatMul" | "onnx.Conv" => true,
            "onnx.Gemm" => data.attrs.int("transA").unwrap_or(0) == 0,
            _ => false,
        };
        kind && data.operand(1).is_some_and(whole)
    };
    m.regions[m.top].ops.iter().copied().filter(product).collect()
}
