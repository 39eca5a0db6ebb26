//! `insert-fake-quant`: activations in 8 bits, as QuantizeLinear and DequantizeLinear around what a runtime fuses into
//! products, convolutions, sums and pools of integers.
//!
//! It works on products whose weights have 8 bits and one scale for each output (`rtn{bits=8, group=-1, symmetric=true, narrow=true}`),
//! with the ranges that `calibrate` found. Biases of convolutions and Gemms become 32-bit integers, whose scale is the product of
//! the activation's and the weight's.

use crate::calibrate::{quantized, weight};
use crate::islands::{Place, places};
use crate::qtensor::{QTensor, constant, read};
use crate::ranges::{Form, Range, Statistics, range};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError};
use dialects::ir::{ConstData, Elem, Module, Op, OpBuilder, Type, Value, infer};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};

const NAME: &str = "insert-fake-quant";

const SATURATES: &str = "x86 CPUs without VNNI add pairs of products of u8 and i8 in 16 bits, which 8-bit weights can \
     overflow: for these quantize weights with rtn{bits=7}";

/// The integers that activations become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Integer {
    /// Unsigned: what ONNX Runtime multiplies fastest on x86.
    #[default]
    Uint8,
    /// Signed.
    Int8,
}

/// The options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct InsertFakeQuant {
    /// The integers.
    pub activations: Integer,
    /// Ranges reach as far below zero as above, and zero has the middle code.
    pub symmetric: bool,
    /// Which products.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Pass for InsertFakeQuant {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "holds the activations of 8-bit products and convolutions in 8 bits, in the ranges that calibrate found"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn rounds_activations(&self) -> bool {
        true
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["onnx.QuantizeLinear", "onnx.DequantizeLinear"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let statistics =
            cx.env.statistics().and_then(|s| s.lock().unwrap_or_else(|e| e.into_inner()).clone());
        let nothing = |why: &str| PassError::Nothing { pass: NAME, why: why.into() };
        let Some(statistics) = statistics else {
            return Err(nothing(
                "no ranges of activations are known; calibrate first, as in `calibrate,insert-fake-quant`",
            ));
        };
        infer::infer(m, cx.ops);
        let mut products: HashSet<Op> = HashSet::new();
        for op in quantized(m) {
            let data = &m.ops[op];
            let weight = data.operand(1).map(|v| m.value_label(v)).unwrap_or_default();
            match self.filter.refuses(&[&data.node, &data.loc, &weight], &data.name) {
                Some(why) => cx.left(m, op, format!("its activation stays float: {why}")),
                None => drop(products.insert(op)),
            }
        }
        let places = places(m, |op| products.contains(&op));
        if places.is_empty() {
            if cx.settings.allow_noop {
                return Ok(Changed::No);
            }
            return Err(nothing(
                "no product has a weight of 8 bits with one scale for each output; quantize weights first, as in \
                 `rtn{bits=8, group=-1, symmetric=true, narrow=true},calibrate,insert-fake-quant`",
            ));
        }
        let mut scales: HashMap<Value, f32> = HashMap::new();
        for place in &places {
            let scale = self.place(m, cx, place, &statistics)?;
            scales.extend(place.readers.iter().filter_map(|&(op, i)| Some((m.ops[op].operand(i)?, scale))));
        }
        let one = |op: Op, name| m.ops[op].attrs.float(name).unwrap_or(1.0) == 1.0;
        let biased = |op: &Op| m.ops[*op].is("onnx.Conv") || one(*op, "alpha") && one(*op, "beta");
        let mut biased: Vec<Op> = products.iter().copied().filter(biased).collect();
        biased.sort();
        for op in biased {
            let scale = m.ops[op].operand(0).and_then(|x| scales.get(&x).copied());
            if let Some(scale) = scale {
                bias(m, cx, op, scale)?;
            }
        }
        let full =
            |op: &Op| m.ops[*op].operand(1).and_then(|w| weight(m, w)).is_some_and(|(q, _)| q.bits == 8);
        if self.activations == Integer::Uint8 && products.iter().any(full) {
            cx.report.note(SATURATES);
        }
        cx.count("activations in 8 bits", places.len() as u64);
        cx.report.note(format!(
            "{} activations in 8 bits, {} products of integers",
            places.len(),
            products.len()
        ));
        Ok(Changed::Yes)
    }
}

impl InsertFakeQuant {
    fn form(&self) -> Form {
        Form { symmetric: self.symmetric, levels: if self.symmetric { 255 } else { 256 } }
    }

    /// The integers' type, and the code that is taken off: signed codes are unsigned ones less 128.
    fn integer(&self) -> (Elem, i32) {
        match self.activations {
            Integer::Uint8 => (Elem::U8, 0),
            Integer::Int8 => (Elem::I8, 128),
        }
    }

    /// Scale and zero point of a range, as a code of 0 to 255. A range of nothing but zero has steps of one.
    fn grid(&self, r: Range) -> (f32, i32) {
        // Ends far apart must not overflow on the way.
        let step = |span: f32, steps: f32| span / steps;
        let scale = match self.symmetric {
            true => step(r.max, 127.0),
            false => step(r.max, 255.0) - step(r.min, 255.0),
        };
        if scale.is_nan() || scale < f32::MIN_POSITIVE {
            return (1.0, if self.symmetric { 128 } else { 0 });
        }
        match self.symmetric {
            true => (scale, 128),
            false => (scale, ((-r.min / scale).round_ties_even() as i32).clamp(0, 255)),
        }
    }

    /// Puts the two ops behind a value. Returns its scale.
    fn place(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        place: &Place,
        statistics: &Statistics,
    ) -> Result<f32, PassError> {
        let label = m.value_label(place.value);
        let source = m.value_label(place.like.unwrap_or(place.value));
        let fail = |why: &str| PassError::At { pass: NAME, what: label.clone(), why: why.into() };
        let histogram = statistics.tensors.get(&source);
        let found = histogram.and_then(|h| range(h, statistics.method, statistics.percentile, self.form()));
        let (scale, zero) = match found {
            Some(r) => {
                if r.min == r.max {
                    cx.report.warn(format!("{NAME}: {label:?} is zero on all calibration data"));
                }
                self.grid(r)
            }
            None if histogram.is_none() => {
                return Err(fail("calibrate did not see it: it must run right before"));
            }
            None => return Err(fail("no calibration data reached it, so that it has no range")),
        };
        let ty = m.ty(place.value).clone();
        let float = ty.elem().unwrap_or(Elem::F32);
        let (elem, shift) = self.integer();
        let region = m.top;
        let values = Tensor::from_f32(float, &[], vec![scale]).map_err(|e| fail(&e.to_string()))?;
        let scale_name = m.fresh_name(&format!("{label}.scale"));
        let scale_value = m.add_const(region, scale_name, values.to_const());
        let zero = constant(elem, Vec::new(), vec![(zero - shift) as u8]);
        let zero_name = m.fresh_name(&format!("{label}.zero_point"));
        let zero_value = m.add_const(region, zero_name, zero);
        let codes = match ty.as_tensor().and_then(|t| t.dims.clone()) {
            Some(dims) => Type::tensor(elem, dims),
            None => Type::unranked(elem),
        };
        let (loc, before) = match m.def_op(place.value) {
            Some((op, _)) => (m.ops[op].loc.clone(), None),
            None => {
                let first = m.regions[region].ops[0];
                (m.ops[first].loc.clone(), Some(first))
            }
        };
        let quantize = OpBuilder::new("onnx.QuantizeLinear", &loc)
            .operands([place.value, scale_value, zero_value])
            .named_result(m.fresh_name(&format!("{label}.codes")), codes);
        let quantize = match (before, m.def_op(place.value)) {
            (None, Some((op, _))) => m.insert_after(op, quantize),
            (Some(first), _) => m.insert_before(first, quantize),
            (None, None) => return Err(fail("this is a bug: it is neither computed nor an input")),
        };
        let codes = m.ops[quantize].result(0).expect("the op was built with a result");
        let dequantize = OpBuilder::new("onnx.DequantizeLinear", &loc)
            .operands([codes, scale_value, zero_value])
            .named_result(m.fresh_name(&format!("{label}.dequantized")), ty);
        let dequantize = m.insert_after(quantize, dequantize);
        let back = m.ops[dequantize].result(0).expect("the op was built with a result");
        for &(op, i) in &place.readers {
            m.ops[op].operands[i] = Some(back);
        }
        Ok(scale)
    }
}

/// The largest code of a bias: half of what 32 bits hold, so that sums of products have room beside it.
const MOST: f64 = (1u32 << 30) as f64;

/// Makes the constant bias of a convolution or a Gemm one of 32-bit integers with the scale of the sums of products. Where a
/// channel's bias is too large for that, its weights are given a larger scale: they are small beside it.
fn bias(m: &mut Module, cx: &mut PassCx, op: Op, scale: f32) -> Result<(), PassError> {
    let fail = |m: &Module, why: String| PassError::At { pass: NAME, what: m.ops[op].loc.to_string(), why };
    let Some(konst) = m.ops[op].operand(2).and_then(|b| m.const_of(b)) else { return Ok(()) };
    let float = Tensor::from_const(&m.consts[konst]).and_then(|t| t.to_f32().map(|x| x.into_owned()));
    let float = float.map_err(|e| fail(m, e.to_string()))?;
    let weight = m.ops[op].operand(1).and_then(|w| weight(m, w));
    let Some((q, placed)) = weight.filter(|(q, _)| q.n == float.len()) else {
        return Err(fail(m, "this is a bug: a bias without quantized weights".into()));
    };
    let mut weights = Tensor::from_const(&q.scales)
        .and_then(|t| t.to_f32().map(|x| x.into_owned()))
        .map_err(|e| fail(m, e.to_string()))?;
    let mut widened = Vec::new();
    for (c, (&b, w)) in float.iter().zip(&mut weights).enumerate() {
        let needed = (f64::from(b).abs() / (f64::from(scale) * MOST)) as f32;
        if w.abs() < needed || *w == 0.0 {
            widened.push((c, *w / needed.max(f32::MIN_POSITIVE)));
            *w = needed.max(f32::MIN_POSITIVE);
        }
    }
    if !widened.is_empty() {
        widen(m, &q, placed.op, &weights, &widened)?;
        let what = &m.ops[op].loc;
        cx.report.note(format!(
            "{NAME}: {what:?}: the scale of {} channels is widened, so that their bias fits 32 bits",
            widened.len()
        ));
    }
    let code =
        |(&b, &w): (&f32, &f32)| (f64::from(b) / (f64::from(scale) * f64::from(w))).round_ties_even() as i32;
    let codes: Vec<u8> = float.iter().zip(&weights).flat_map(|p| code(p).to_le_bytes()).collect();
    let scales: Vec<f32> = weights.iter().map(|w| scale * w).collect();
    let n = vec![float.len() as u64];
    let region = m.ops[op].region;
    let label = m.ops[op].operand(2).map(|b| m.value_label(b)).unwrap_or_default();
    let codes = constant(Elem::I32, n.clone(), codes);
    let scales = constant(Elem::F32, n, bytemuck::cast_slice(&scales).to_vec());
    let names = [m.fresh_name(&format!("{label}.codes")), m.fresh_name(&format!("{label}.scales"))];
    let [codes_name, scales_name] = names;
    let operands = [m.add_const(region, codes_name, codes), m.add_const(region, scales_name, scales)];
    let ty = Type::of_shape(Elem::F32, &[float.len()]);
    let loc = m.ops[op].loc.clone();
    let build = OpBuilder::new("onnx.DequantizeLinear", &loc).operands(operands).attr("axis", 0).result(ty);
    let dequantize = m.insert_before(op, build);
    m.ops[op].operands[2] = m.ops[dequantize].result(0);
    Ok(())
}

/// Gives channels of a weight other scales: `scales` are those of all, and each of `channels` comes with the share that its
/// old scale is of the new one.
fn widen(
    m: &mut Module,
    q: &QTensor,
    dequantize: Op,
    scales: &[f32],
    channels: &[(usize, f32)],
) -> Result<(), PassError> {
    let mut codes = read(&q.codes)?.to_vec();
    let row = q.blob() * q.groups();
    let zeros = q.zero_point_bytes()?;
    for &(c, share) in channels {
        let (zero, top) = (f32::from(zeros[c]), ((1u32 << q.bits) - 1) as f32);
        for code in &mut codes[c * row..(c + 1) * row] {
            *code = ((f32::from(*code) - zero) * share + zero).round_ties_even().clamp(0.0, top) as u8;
        }
    }
    let replace = |m: &mut Module, i: usize, data: ConstData| {
        let old = m.ops[dequantize].operand(i).expect("a dequantize has codes and scales");
        let name = m.fresh_name(&m.value_label(old));
        let region = m.ops[dequantize].region;
        m.ops[dequantize].operands[i] = Some(m.add_const(region, name, data));
    };
    replace(m, 0, constant(Elem::U8, q.codes.dims.clone(), codes));
    let values = Tensor::from_f32(
        q.scales.elem,
        &q.scales.dims.iter().map(|&d| d as usize).collect::<Vec<_>>(),
        scales.to_vec(),
    );
    let values = values.map_err(|e| PassError::Env(e.to_string()))?;
    replace(m, 1, values.to_const());
    Ok(())
}
