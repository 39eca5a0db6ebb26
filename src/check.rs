//! `--check`: runs the model before and after a pass, and tells a wiring error from a quantization error.
//!
//! An exact pass must agree to rounding. A lossy one is taken apart: the quantized weights are replaced by the float
//! weights that they stand for, and what is left must agree with the model before the pass to rounding; a difference
//! there is a wiring error. The difference that remains is the quantization error, which is reported. Where a pass does
//! not say what its weights stand for, they are dequantized and put into the graph as it was before the pass, and that
//! graph must agree with the pass's result. Int8 activations (`accuracy_level` 4) are an error term of their own.

mod locate;

use crate::calibrate::{Batch, Calibration};
use crate::data::lm::inputs_of;
use crate::env::DriverEnv;
use dialects::exec::run_once;
use dialects::ir::graph::reads;
use dialects::ir::interp::Interpreter;
use dialects::ir::{ConstData, Elem, Module, Op, Value, infer::compatible};
use dialects::ops::Item;
use dialects::tensor::{Data, Tensor};
use passes::{Exactness, Pass};
use serde::Serialize;
use std::collections::HashSet;

/// Samples that both models are run on: a row of activations that saturate hides what is wrong before them.
const SAMPLES: usize = 8;

/// What inputs of small floats are multiplied by.
const SMALL: f32 = 1.0 / 1024.0;

/// What `--check` found, as relative errors of the model's outputs (Frobenius, the worst output).
#[derive(Clone, Debug, Default, Serialize)]
pub struct Checked {
    /// By rewiring alone; rounding when all is well. `None` where it cannot be told apart.
    pub wiring: Option<f64>,
    /// By quantized weights.
    pub quantization: Option<f64>,
    /// By int8 activations in the ops that the pass left.
    pub activations: Option<f64>,
}

/// Checks one pass on the first calibration samples. The error says what was expected and what was found, and at which
/// node the difference begins.
pub fn pass(before: &Module, after: &Module, pass: &dyn Pass, env: &DriverEnv) -> Result<Checked, String> {
    let exact = pass.exactness() == Exactness::Exact;
    let values = |m: &Module, wanted: &[Value]| values(m, env, true, exact, wanted);
    let run = |m: &Module| values(m, &m.regions[m.top].results);
    let (a, b) = (run(before)?, run(after)?);
    // Of the first batches alone: the small one behind them has no partner.
    let rounded = self::values(after, env, false, false, &after.regions[after.top].results)?;
    let activations = error(&b, &rounded).0;
    let activations = (activations != 0.0).then_some(activations);
    let tolerance = tolerance(before, after);
    // Whether two models agree, of which `found` are the outputs.
    let agree = |what: &str, models: (&Module, &Module), found: (&[Item], &[Item])| -> Result<f64, String> {
        let (e, output) = error(found.0, found.1);
        // Written so that a NaN fails.
        if e <= tolerance {
            return Ok(e);
        }
        let results = &before.regions[before.top].results;
        let output = output % results.len();
        let name = before.value_label(results[output]);
        let at = locate::locate(models.0, models.1, output, tolerance, &values);
        let at = at.map(|at| format!("; it begins at {at}")).unwrap_or_default();
        Err(format!(
            "{what}: output {name:?} differs by {e:.2e} (relative), where rounding allows {tolerance:.0e}{at}"
        ))
    };
    if exact {
        let wiring = agree("wiring error of an exact pass", (before, after), (&a, &b))?;
        return Ok(Checked { wiring: Some(wiring), quantization: None, activations });
    }
    if pass.rounds_activations() {
        let float = without_rounding(before, after);
        let outputs = run(&float)?;
        let wiring = agree("wiring error beside rounded activations", (before, &float), (&a, &outputs))?;
        return Ok(Checked { wiring: Some(wiring), quantization: Some(error(&a, &b).0), activations });
    }
    let what = "wiring error beside the quantized weights";
    let originals = env.originals.as_ref();
    let originals: Vec<(Value, Tensor)> = originals
        .map(|o| std::mem::take(&mut *o.lock().unwrap_or_else(|e| e.into_inner())))
        .unwrap_or_default();
    if !originals.is_empty() {
        let floats = with_floats(after.clone(), originals)?;
        let float = run(&floats)?;
        let wiring = agree(what, (before, &floats), (&a, &float))?;
        return Ok(Checked { wiring: Some(wiring), quantization: Some(error(&float, &b).0), activations });
    }
    let Some(dequantized) = with_weights_of(before.clone(), after, env)? else {
        return Ok(Checked { wiring: None, quantization: Some(error(&a, &b).0), activations });
    };
    let d = run(&dequantized)?;
    let wiring = agree(what, (&dequantized, after), (&d, &b))?;
    Ok(Checked { wiring: Some(wiring), quantization: Some(error(&a, &d).0), activations })
}

/// `after` without the roundings of activations that `before` does not have, nor of biases, whose steps are those of the
/// activations.
fn without_rounding(before: &Module, after: &Module) -> Module {
    let mut m = after.clone();
    let old: HashSet<Op> = before.live_ops().into_iter().collect();
    for op in after.live_ops().into_iter().filter(|op| !old.contains(op)) {
        let from = |op: Op, name: &str| after.ops[op].operand(0).filter(|_| after.ops[op].is(name));
        let quantize = from(op, "onnx.DequantizeLinear").and_then(|codes| after.def_op(codes));
        let x = quantize.and_then(|(quantize, _)| {
            let dynamic = from(quantize, "onnx.DynamicQuantizeLinear");
            from(quantize, "onnx.QuantizeLinear").or(dynamic)
        });
        if let (Some(x), Some(y)) = (x, after.ops[op].result(0)) {
            m.replace_uses(y, x);
        }
    }
    for op in after
        .live_ops()
        .into_iter()
        .filter(|&op| after.ops[op].is("onnx.Conv") || after.ops[op].is("onnx.Gemm"))
    {
        if let Some(float) = after.ops[op].operand(2).and_then(|bias| rounded_from(before, after, bias)) {
            let float = m.add_const(m.top, "", float);
            m.ops[op].operands[2] = Some(float);
        }
    }
    m
}

/// The constant of `before` that is at most half a step from a bias in 32-bit integers.
fn rounded_from(before: &Module, after: &Module, bias: Value) -> Option<ConstData> {
    let (op, _) = after.def_op(bias).filter(|(op, _)| after.ops[*op].is("onnx.DequantizeLinear"))?;
    let konst = |i: usize| after.ops[op].operand(i).and_then(|v| after.const_of(v)).map(|c| &after.consts[c]);
    let (codes, scales) = (konst(0).filter(|c| c.elem == Elem::I32)?, Tensor::floats(konst(1)?).ok()?);
    let codes = Tensor::from_const(codes).ok()?.to_i64().ok()?.into_owned();
    let near = |float: &[f32]| {
        let step = |i: usize| f64::from(scales[i % scales.len()]).abs();
        let error =
            |i: usize| (codes[i] as f64 * f64::from(scales[i % scales.len()]) - f64::from(float[i])).abs();
        // The float itself was rounded when it was divided by the step.
        float.len() == codes.len()
            && (0..codes.len()).all(|i| error(i) <= 0.5 * step(i) + 1e-6 * f64::from(float[i].abs()))
    };
    let floats = before.consts.values().filter(|c| c.elem.is_float() && c.dims.len() == 1);
    floats.into_iter().find(|c| Tensor::floats(c).is_ok_and(|float| near(&float))).cloned()
}

/// `m` with float weights in the place of quantized ones.
fn with_floats(mut m: Module, weights: Vec<(Value, Tensor)>) -> Result<Module, String> {
    for (v, weight) in weights {
        let ty = m.ty(v).as_tensor().cloned();
        let shape = ty.as_ref().and_then(|t| t.known_shape());
        let (Some(ty), Some(shape)) = (ty, shape) else { continue };
        let values = weight.to_f32().map_err(|e| e.to_string())?.into_owned();
        let float = Tensor::from_f32(ty.elem, &shape, values).map_err(|e| e.to_string())?;
        let konst = m.add_const(m.top, "", float.to_const());
        m.replace_uses(v, konst);
    }
    Ok(m)
}

/// What rounding may do, relative. Where a pass has made operators on codes, a value near the middle of two codes may fall
/// to the other side.
fn tolerance(before: &Module, after: &Module) -> f64 {
    let narrow = |v: &dialects::ir::ValueData| matches!(v.ty.elem(), Some(Elem::F16 | Elem::BF16));
    let on_codes = |m: &Module| {
        let named =
            |op: Op| m.ops[op].name.op().starts_with("QLinear") || m.ops[op].is("com.microsoft.QGemm");
        m.live_ops().into_iter().filter(|&op| named(op)).count()
    };
    if before.values.values().any(narrow) {
        2e-2
    } else if on_codes(after) > on_codes(before) {
        1e-2
    } else {
        1e-4
    }
}

/// Values of a model on each of the first calibration batches, one batch after the other, and on a [`small`] one behind them
/// where that is wanted; `exact` leaves out int8 activations.
fn values(
    m: &Module,
    env: &DriverEnv,
    exact: bool,
    and_small: bool,
    wanted: &[Value],
) -> Result<Vec<Item>, String> {
    let data = env.calibration.as_ref().ok_or("there are no sample inputs")?;
    let exec = Interpreter::new(env.ops.clone()).exact(exact);
    let mut out = Vec::new();
    let last = if and_small { small(data)? } else { None };
    for batch in data.first(SAMPLES).chain(last.map(Ok)) {
        let inputs = inputs_of(m, batch.map_err(|e| e.message)?);
        out.extend(run_once(&exec, m, &inputs, wanted).map_err(|e| e.to_string())?);
    }
    Ok(out)
}

/// The first batch with floats made small: what is added to keep a norm from dividing by zero shows there. `None` where no
/// input is a float.
fn small(data: &Calibration) -> Result<Option<Batch>, String> {
    let Some(first) = data.first(1).next() else { return Ok(None) };
    let mut batch = first.map_err(|e| e.message)?;
    let mut any = false;
    for (_, t) in batch.iter_mut().filter(|(_, t)| t.elem().is_float()) {
        let x = t.to_f32().map_err(|e| e.to_string())?.iter().map(|x| x * SMALL).collect();
        *t = Tensor::from_f32(t.elem(), t.shape(), x).map_err(|e| e.to_string())?;
        any = true;
    }
    Ok(any.then_some(batch))
}

/// `m` with every operand that `after` computes from constants, and `m` does not have so, in its place: the
/// weights of `after`, dequantized. `None` when there is no such operand.
fn with_weights_of(mut m: Module, after: &Module, env: &DriverEnv) -> Result<Option<Module>, String> {
    let exec = Interpreter::new(env.ops.clone());
    let (in_m, in_after) = (constants(&m), constants(after));
    let live: HashSet<Op> = after.live_ops().into_iter().collect();
    let mut any = false;
    for op in m.live_ops() {
        if !live.contains(&op) || after.ops[op].name != m.ops[op].name {
            continue;
        }
        for (i, b) in after.ops[op].operands.iter().enumerate() {
            let (Some(a), Some(b)) = (m.ops[op].operand(i), *b) else { continue };
            let both = in_m.contains(&a) && in_after.contains(&b);
            if a == b || !both || !compatible(m.ty(a), after.ty(b)) {
                continue;
            }
            let item = run_once(&exec, after, &[], &[b]).map_err(|e| e.to_string())?.remove(0);
            let tensor = item.tensor().map_err(|e| e.to_string())?;
            let region = m.ops[op].region;
            let v = m.add_const(region, "", tensor.to_const());
            m.ops[op].operands[i] = Some(v);
            any = true;
        }
    }
    Ok(any.then_some(m))
}

/// Every value that depends on constants alone.
fn constants(m: &Module) -> HashSet<Value> {
    let mut out: HashSet<Value> = HashSet::new();
    for region in m.live_regions() {
        out.extend(m.regions[region].consts.iter().copied());
        for &op in &m.regions[region].ops {
            let results = m.ops[op].results.iter().copied().flatten();
            let reads = reads(m, op);
            if m.ops[op].is("onnx.Constant") || !reads.is_empty() && reads.iter().all(|v| out.contains(v)) {
                out.extend(results);
            }
        }
    }
    out
}

/// The worst relative error over all outputs, and which output has it.
pub(crate) fn error(a: &[Item], b: &[Item]) -> (f64, usize) {
    let each = a.iter().zip(b).enumerate().map(|(i, (a, b))| (item_error(a, b), i));
    // A NaN counts as the worst.
    each.max_by(|x, y| x.0.total_cmp(&y.0)).unwrap_or((0.0, 0))
}

fn item_error(a: &Item, b: &Item) -> f64 {
    match (a, b) {
        (Item::Tensor(a), Item::Tensor(b)) => tensor_error(a, b),
        (Item::Sequence(a), Item::Sequence(b)) if a.len() == b.len() => error(a, b).0,
        (Item::Optional(a), Item::Optional(b)) => match (a, b) {
            (Some(a), Some(b)) => item_error(a, b),
            (None, None) => 0.0,
            _ => f64::INFINITY,
        },
        _ => f64::INFINITY,
    }
}

fn tensor_error(a: &Tensor, b: &Tensor) -> f64 {
    if a.shape() != b.shape() {
        return f64::INFINITY;
    }
    if let (Data::F64(a), Data::F64(b)) = (a.data(), b.data()) {
        return relative(a.iter().copied().zip(b.iter().copied()));
    }
    match (a.to_f32(), b.to_f32()) {
        (Ok(a), Ok(b)) => relative(a.iter().map(|&x| x.into()).zip(b.iter().map(|&x| x.into()))),
        // Integers, booleans and strings are equal or not.
        _ if a == b => 0.0,
        _ => f64::INFINITY,
    }
}

/// |a - b| / |a|. Equal infinities and NaN in both count as equal.
pub(crate) fn relative(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (mut off, mut norm) = (0.0f64, 0.0f64);
    for (a, b) in pairs {
        if a == b || (a.is_nan() && b.is_nan()) {
            norm += if a.is_finite() { a * a } else { 0.0 };
            continue;
        }
        off += (a - b) * (a - b);
        norm += a * a;
    }
    if off == 0.0 { 0.0 } else { (off / norm).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_errors() {
        let of = |a: &[f64], b: &[f64]| relative(a.iter().copied().zip(b.iter().copied()));
        assert_eq!(of(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(of(&[3.0, 4.0], &[3.0, 5.0]), 0.2);
        assert_eq!(of(&[0.0], &[0.0]), 0.0);
        assert_eq!(of(&[0.0], &[1.0]), f64::INFINITY);
        assert_eq!(of(&[f64::NEG_INFINITY, f64::NAN, 1.0], &[f64::NEG_INFINITY, f64::NAN, 1.0]), 0.0);
        assert!(of(&[1.0], &[f64::NAN]).is_nan());
        assert!(of(&[1.0, f64::INFINITY], &[1.0, 0.0]).is_nan());
    }

    #[test]
    fn shapes_and_kinds_must_agree() {
        let t = |shape: &[usize]| Item::from(Tensor::new(shape, vec![1.0f32, 2.0]).unwrap());
        let ints = |x: i64| Item::from(Tensor::scalar(x));
        assert_eq!(error(&[t(&[2])], &[t(&[2])]), (0.0, 0));
        assert_eq!(error(&[ints(1), t(&[2])], &[ints(1), t(&[1, 2])]), (f64::INFINITY, 1));
        assert_eq!(error(&[ints(1)], &[ints(2)]), (f64::INFINITY, 0));
    }
}
