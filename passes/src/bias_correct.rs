//! `bias-correct`: takes off each bias what rounding adds to the mean of its layer's output (Nagel et al., "Data-Free
//! Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with the expectation taken over
//! calibration data).
//!
//! It stands before the passes that round, and runs them on a copy. There each layer is computed a second time on the inputs
//! that it has, those that the rounded layers before it make, but with its float weight and its input as it is:
//!
//! ```text
//! correction = mean(W x + b) - mean(Q(W) Q(x) + b)
//! ```
//!
//! for each output, over the calibration data. It is added to the bias of the float layer, which is rounded afterwards like
//! any other. What layers before add to the mean is left to their own biases.

use crate::eqsat::Channels;
use crate::extremes;
use crate::linear::{Form, Linear, Weighted, find};
use crate::trial::Trial;
use crate::{Changed, Exactness, Filter, Pass, PassCx, PassError, Report, report};
use dialects::ir::{Elem, Module, Op, OpBuilder, Use, Value, infer};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

const NAME: &str = "bias-correct";

/// The options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BiasCorrect {
    /// The layers of which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Pass for BiasCorrect {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "take off biases what the passes after this one add to the means of outputs by rounding"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let Some(last) = cx.rest.iter().rposition(|p| p.exactness() == Exactness::Lossy) else {
            let why =
                "no pass after it rounds; it stands before those that do, as in `bias-correct,rtn{bits=8}`";
            return Err(PassError::Nothing { pass: NAME, why: why.into() });
        };
        infer::infer(m, cx.ops);
        let floats = Mutex::new(HashMap::new());
        let seen = |value: Value, weight: &dyn Fn() -> Result<Tensor, PassError>| {
            floats.lock().unwrap_or_else(|e| e.into_inner()).insert(value, weight()?);
            Ok(())
        };
        let env = Trial::new(cx.env).watched(&seen);
        let mut trial = m.clone();
        let mut unsaid = Report::default();
        for (i, pass) in cx.rest[..=last].iter().enumerate() {
            let (ops, settings, rest) = (cx.ops, cx.settings, &cx.rest[i + 1..]);
            pass.run(&mut trial, &mut PassCx { ops, env: &env, settings, report: &mut unsaid, rest })?;
        }
        infer::infer(&mut trial, cx.ops);
        let floats = floats.into_inner().unwrap_or_else(|e| e.into_inner());
        let (layers, left) = self.layers(m, &mut trial, &floats);
        for (op, why) in left {
            cx.report.note(format!("{NAME}: {:?} is left as it is: {why}", &*m.ops[op].loc));
        }
        if layers.is_empty() {
            return match cx.settings.allow_noop {
                true => Ok(Changed::No),
                false => Err(PassError::Nothing {
                    pass: NAME,
                    why: "no product has a weight that is rounded".into(),
                }),
            };
        }
        let values: Vec<(Value, Channels)> =
            layers.iter().flat_map(|l| [(l.rounded, l.along), (l.float, l.along)]).collect();
        let seen = extremes::collect(&trial, cx, &values, 0, NAME)?;
        let mut unseen: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let mut corrected = 0;
        for l in &layers {
            let (rounded, float) = (&seen[&l.rounded], &seen[&l.float]);
            if float.rows == 0 {
                unseen.entry("no calibration data reached it").or_default().push(m.ops[l.op].loc.to_string());
                continue;
            }
            let mean = |(r, f): (&f64, &f64)| ((f - r) / float.rows as f64) as f32;
            let by: Vec<f32> = rounded.sums.iter().zip(&float.sums).map(mean).collect();
            add(m, cx, l.op, &by)?;
            corrected += 1;
        }
        for (why, nodes) in unseen {
            let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
            cx.report.note(format!("{NAME}: {} is left as it is: {why}", report::listed(&nodes)));
        }
        cx.count("bias-correct.layers", corrected);
        cx.report.note(format!("{NAME}: the biases of {corrected} layers are corrected"));
        Ok(if corrected > 0 { Changed::Yes } else { Changed::No })
    }
}

/// A layer of the copy.
struct Layer {
    op: Op,
    along: Channels,
    /// Its output.
    rounded: Value,
    /// What that would be without rounding in this layer.
    float: Value,
}

impl BiasCorrect {
    /// The layers whose weights were rounded, each of which is computed a second time in `trial`; and those left, with the
    /// reason. `floats` are the weights that rounded ones stand for.
    fn layers(
        &self,
        m: &Module,
        trial: &mut Module,
        floats: &HashMap<Value, Tensor>,
    ) -> (Vec<Layer>, Vec<(Op, String)>) {
        let (mut layers, mut left) = (Vec::new(), Vec::new());
        for weighted in find(m) {
            let (Weighted::Linear(l) | Weighted::Kernel(l)) = weighted else { continue };
            let data = &m.ops[l.op];
            let name = m.value_label(l.weight);
            let why = match self.filter.refuses(&[&data.node, &data.loc, &name], &data.name) {
                Some(why) => Some(why),
                None => match layer(m, trial, &l, floats) {
                    Ok(Some(layer)) => {
                        layers.push(layer);
                        None
                    }
                    Ok(None) => None,
                    Err(why) => Some(why.to_string()),
                },
            };
            left.extend(why.map(|why| (l.op, why)));
        }
        (layers, left)
    }
}

/// Computes one layer a second time. `None` for one whose weight was not rounded.
fn layer(
    m: &Module,
    trial: &mut Module,
    l: &Linear,
    floats: &HashMap<Value, Tensor>,
) -> Result<Option<Layer>, &'static str> {
    if !trial.regions[trial.top].ops.contains(&l.op) {
        return Err(match m.ops[l.op].region == m.top {
            true => "another op stands in its place once it is rounded",
            false => "activations inside the graphs of If, Loop and Scan are not gathered",
        });
    }
    let data = trial.ops[l.op].clone();
    let along = match data.name.as_str() {
        "onnx.MatMul" | "onnx.Gemm" if l.form == Form::Rows => Channels::Last,
        "onnx.Conv" | "onnx.ConvTranspose" => Channels::Second,
        _ => return Err("its output is no sum with a bias for each channel"),
    };
    let (Some(x), Some(operand), Some(y)) = (data.operand(0), data.operand(l.operand_index), data.result(0))
    else {
        return Err("an operand is missing");
    };
    // A view may stand between the codes and the op.
    let viewed = trial.def_op(operand).and_then(|(op, _)| trial.ops[op].operand(0));
    let Some(float) = floats.get(&operand).or_else(|| floats.get(&viewed?)) else { return Ok(None) };
    let own = Tensor::from_const(&m.consts[l.konst]).ok().and_then(|t| Some(t.to_f32().ok()?.into_owned()));
    // In whatever order the constant has them.
    let sorted = |x: &[f32]| {
        let mut x = x.to_vec();
        x.sort_unstable_by(f32::total_cmp);
        x
    };
    let stands_for = float.to_f32().map(|x| x.into_owned()).unwrap_or_default();
    if own.is_none_or(|own| sorted(&own) != sorted(&stands_for)) {
        return Err("its weight was scaled before it was rounded");
    }
    if along.of(trial.ty(y)).is_none() {
        return Err("the number of its outputs is unknown");
    }
    let Some(shape) = m.ty(l.operand).as_tensor().and_then(|t| t.known_shape()) else {
        return Err("the shape of its weight is unknown");
    };
    let elem = m.ty(l.operand).elem().unwrap_or(l.elem);
    let weight = Tensor::from_f32(elem, &shape, stands_for).map_err(|_| "its weight has another shape")?;
    let mut operands = data.operands.clone();
    operands[0] = Some(unrounded(trial, x));
    operands[l.operand_index] = Some(trial.add_const(trial.top, "", weight.to_const()));
    if let Some(bias) = m.ops[l.op].operand(2) {
        // Constants have the same ids in a copy.
        operands[2] = Some(match m.const_of(bias) {
            Some(c) => trial.add_const(trial.top, "", m.consts[c].clone()),
            None => bias,
        });
    }
    let again = OpBuilder::named(data.name.clone(), &data.loc).operands(operands).attrs(data.attrs.clone());
    let again = trial.insert_after(l.op, again.result(trial.ty(y).clone()));
    let float = trial.ops[again].result(0).expect("it was given one");
    Ok(Some(Layer { op: l.op, along, rounded: y, float }))
}

/// What a value is before it is rounded.
fn unrounded(m: &Module, v: Value) -> Value {
    let from = |v: Value, name: &str| {
        m.def_op(v).and_then(|(op, _)| m.ops[op].operand(0).filter(|_| m.ops[op].is(name)))
    };
    from(v, "onnx.DequantizeLinear").and_then(|codes| from(codes, "onnx.QuantizeLinear")).unwrap_or(v)
}

/// Adds a number for each output to what a layer computes: to its constant bias, or to a new one.
fn add(m: &mut Module, cx: &PassCx, op: Op, by: &[f32]) -> Result<(), PassError> {
    let data = m.ops[op].clone();
    let beta = data.attrs.float("beta").unwrap_or(1.0);
    if data.is("onnx.MatMul") || data.is("onnx.Gemm") && beta != 1.0 {
        return add_behind(m, cx, op, by);
    }
    match data.operand(2) {
        None => {
            let bias = constant(m, cx, op, by, &vec![0.0; by.len()], &[by.len()], "bias")?;
            m.ops[op].operands.resize(2, None);
            m.ops[op].operands.push(Some(bias));
            Ok(())
        }
        Some(old) => match corrected(m, cx, op, old, by)? {
            Some(bias) => {
                m.ops[op].operands[2] = Some(bias);
                Ok(())
            }
            None => add_behind(m, cx, op, by),
        },
    }
}

/// Adds to the constant of the Add that alone reads the op's result, or inserts one.
fn add_behind(m: &mut Module, cx: &PassCx, op: Op, by: &[f32]) -> Result<(), PassError> {
    let y = m.ops[op].result(0).expect("its output was looked at");
    if let [Use::Operand(sum, i)] = *m.uses().of(y)
        && m.ops[sum].is("onnx.Add")
        && let Some(old) = m.ops[sum].operand(1 - i)
        && let Some(bias) = corrected(m, cx, op, old, by)?
    {
        m.ops[sum].operands[1 - i] = Some(bias);
        return Ok(());
    }
    let bias = constant(m, cx, op, by, &vec![0.0; by.len()], &[by.len()], "bias")?;
    let loc = m.ops[op].loc.clone();
    let sum = OpBuilder::new("onnx.Add", &loc).operands([y, bias]).result(m.ty(y).clone());
    let sum = m.insert_after(op, sum);
    let out = m.ops[sum].result(0).expect("it was given one");
    m.replace_uses(y, out);
    m.ops[sum].operands[0] = Some(y);
    // The sum is what the layer gives now, by its name; that of an output went over to it already.
    if m.values[out].name.is_empty() {
        m.values[out].name = std::mem::replace(&mut m.values[y].name, "".into());
    }
    Ok(())
}

/// The constant `old`, one number for each output along the last dim, with `by` added; `None` if it is no such constant.
fn corrected(
    m: &mut Module,
    cx: &PassCx,
    op: Op,
    old: Value,
    by: &[f32],
) -> Result<Option<Value>, PassError> {
    let Some(konst) = m.const_of(old) else { return Ok(None) };
    let shape = m.consts[konst].shape();
    if shape.last() != Some(&by.len()) || shape.iter().product::<usize>() != by.len() {
        return Ok(None);
    }
    let at = |m: &Module, why: String| PassError::At { pass: NAME, what: m.value_label(old), why };
    let tensor = Tensor::from_const(&m.consts[konst]).map_err(|e| at(m, e.to_string()))?;
    let Ok(values) = tensor.to_f32() else { return Ok(None) };
    let name = m.value_label(old);
    constant(m, cx, op, by, &values, &shape, &name).map(Some)
}

/// A constant of `old + by`, of the type of the op's result. The driver is told that it stands for `old`.
fn constant(
    m: &mut Module,
    cx: &PassCx,
    op: Op,
    by: &[f32],
    old: &[f32],
    shape: &[usize],
    name: &str,
) -> Result<Value, PassError> {
    let loc = m.ops[op].loc.to_string();
    let fail = |e: dialects::tensor::TensorError| PassError::At {
        pass: NAME,
        what: loc.clone(),
        why: e.to_string(),
    };
    let elem = m.ops[op].result(0).and_then(|y| m.ty(y).elem()).unwrap_or(Elem::F32);
    let sum = old.iter().zip(by).map(|(old, by)| old + by).collect();
    let sum = Tensor::from_f32(elem, shape, sum).map_err(fail)?;
    let value = m.add_const(m.ops[op].region, m.fresh_name(&format!("{name}.corrected")), sum.to_const());
    cx.env.quantized(value, &|| Tensor::from_f32(elem, shape, old.to_vec()).map_err(fail))?;
    Ok(value)
}
