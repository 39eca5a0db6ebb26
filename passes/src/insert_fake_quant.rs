//! `insert-fake-quant`: activations in 8 bits, as QuantizeLinear and DequantizeLinear around what a runtime fuses into
//! products, convolutions, sums and pools of integers.
//!
//! It works on products whose weights have 8 bits and one scale for each output (`rtn{bits=8, group=-1, symmetric=true, narrow=true}`),
//! with the ranges that `calibrate` found, or (`dynamic`) with those that DynamicQuantizeLinear finds as the model runs.
//! Biases of convolutions and Gemms become 32-bit integers, whose scale is the product of the activation's and the weight's.

use crate::calibrate::{quantized, weight};
use crate::islands::{Place, bias_of, places};
use crate::linear::Linear;
use crate::operators::{MOVED, operator};
use crate::qtensor::{QTensor, constant, read};
use crate::ranges::{Form, Range, Statistics, range};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError};
use dialects::ir::{ConstData, Elem, Module, Op, OpBuilder, Symbol, Type, Value, infer};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};

const NAME: &str = "insert-fake-quant";

const SATURATES: &str = "x86 CPUs without VNNI add pairs of products of u8 and i8 in 16 bits, which 8-bit weights can \
     overflow: for these quantize weights with rtn{bits=7}, or put reduce-range behind rtn";

/// The default of [`InsertFakeQuant::min_size`]. In ONNX Runtime on one thread (AMD, AVX2), chains of products take this
/// share of the float model's time with 1, 16 and 256 rows: 64 x 64 1.37, 1.21, 0.88; 128 x 128 1.17, 1.01, 0.76; 192 x 192
/// 0.84, 0.74, 0.71.
pub const MIN_SIZE: usize = 1 << 15;

/// Chains of convolutions hand codes on. With kernels of 3 x 3 and as many inputs as outputs, on 28 x 28 and 8 x 8 values: 8
/// channels take 1.75 and 1.62, 16 take 0.80 and 1.20, 64 take 0.73 and 0.85 of the float model's time.
const CONVOLUTIONS: usize = 16;

/// The profile of TensorRT.
const TENSORRT: &str = "tensorrt";

/// The integers that activations become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Integer {
    /// Unsigned: what ONNX Runtime multiplies fastest on x86.
    #[default]
    Uint8,
    /// Signed.
    Int8,
    /// Unsigned, in 16 bits: what accelerators take where 8 bits are too few. ONNX Runtime computes in floats with them.
    Uint16,
    /// Signed, in 16 bits.
    Int16,
    /// Unsigned, in 4 bits.
    Uint4,
    /// Signed, in 4 bits.
    Int4,
}

impl Integer {
    fn elem(self) -> Elem {
        match self {
            Integer::Uint8 => Elem::U8,
            Integer::Int8 => Elem::I8,
            Integer::Uint16 => Elem::U16,
            Integer::Int16 => Elem::I16,
            Integer::Uint4 => Elem::U4,
            Integer::Int4 => Elem::I4,
        }
    }

    fn signed(self) -> bool {
        matches!(self, Integer::Int8 | Integer::Int16 | Integer::Int4)
    }

    /// How many codes there are.
    fn levels(self) -> u32 {
        1 << self.elem().bits()
    }

    /// The code, counted from the least one, as a constant.
    fn code(self, code: u32) -> ConstData {
        let code = if self.signed() { code.wrapping_sub(self.levels() / 2) } else { code };
        let bytes = &code.to_le_bytes()[..self.elem().bits().div_ceil(8)];
        let mask = if self.elem().bits() < 8 { 0x0f } else { 0xff };
        constant(self.elem(), Vec::new(), bytes.iter().map(|b| b & mask).collect::<Vec<u8>>())
    }
}

/// Which values of an activation share a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Per {
    /// All of them.
    #[default]
    Tensor,
    /// Those of a channel. Refused: see [`InsertFakeQuant::check`].
    Channel,
    /// Those of a group of channels. Refused.
    Group,
}

/// Products that are to stay more exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// The first one of the graph.
    First,
    /// The last one.
    Last,
}

/// The options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct InsertFakeQuant {
    /// The integers.
    pub activations: Integer,
    /// Ranges reach as far below zero as above, and zero has the middle code.
    pub symmetric: bool,
    /// Which values share a scale.
    pub per: Per,
    /// Ranges are found as the model runs, for the operands of products; nothing is calibrated.
    pub dynamic: bool,
    /// Products whose activation stays float, whatever the filter says.
    pub keep: Vec<Keep>,
    /// Products with a float weight of fewer elements (K x N) stay float, and convolutions whose kernels have fewer than a
    /// sixteenth of that: rounding activations takes longer than integers save. See [`MIN_SIZE`].
    pub min_size: usize,
    /// Which products.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Default for InsertFakeQuant {
    fn default() -> InsertFakeQuant {
        InsertFakeQuant {
            activations: Integer::default(),
            symmetric: false,
            per: Per::default(),
            dynamic: false,
            keep: Vec::new(),
            min_size: MIN_SIZE,
            filter: Filter::default(),
        }
    }
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
        OpSet::from(["onnx.QuantizeLinear", "onnx.DynamicQuantizeLinear", "onnx.DequantizeLinear"])
    }

    fn leaves_float(&self, m: &Module, weight: &Linear) -> Option<String> {
        let op = &m.ops[weight.op];
        let (size, least) = match op.name.as_str() {
            "onnx.MatMul" | "onnx.Gemm" => (weight.k * weight.n, self.min_size),
            "onnx.Conv" => (weight.k * weight.n, self.min_size / CONVOLUTIONS),
            _ => return None,
        };
        let Linear { k, n, .. } = weight;
        (size < least).then(|| {
            format!("{k} x {n} weights are fewer than {least}, and slower in 8 bits: {NAME}{{min_size=0}} quantizes them")
        })
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        self.check()?;
        let tensorrt = cx.settings.profile == TENSORRT;
        match tensorrt {
            true => self.for_tensorrt(cx)?.insert(m, cx, false),
            false => self.insert(m, cx, true),
        }
    }
}

impl InsertFakeQuant {
    /// Refuses what no runtime computes.
    fn check(&self) -> Result<(), PassError> {
        let fail = |option, why: &str| Err(PassError::Option { pass: NAME, option, why: why.into() });
        if self.per != Per::Tensor {
            // A sum over channels of different scales is no sum of integers.
            return fail(
                "per",
                "expected tensor: a product adds up channels, and integers of different scales cannot be added; \
                 smooth-migrate and equalize move such scales into the weights",
            );
        }
        if self.dynamic && (self.activations != Integer::Uint8 || self.symmetric) {
            return fail("dynamic", "DynamicQuantizeLinear gives uint8 with a zero point, and nothing else");
        }
        Ok(())
    }

    /// The same for TensorRT, which takes signed codes whose zero point is zero.
    fn for_tensorrt(&self, cx: &mut PassCx) -> Result<InsertFakeQuant, PassError> {
        let fail = |option, why: &str| Err(PassError::Option { pass: NAME, option, why: why.into() });
        if self.dynamic {
            return fail("dynamic", "TensorRT wants ranges that are known beforehand");
        }
        if !matches!(self.activations, Integer::Uint8 | Integer::Int8) {
            return fail("activations", "TensorRT multiplies integers of 8 bits");
        }
        cx.report.note("for TensorRT: signed 8-bit activations whose zero point is zero, and float biases");
        Ok(InsertFakeQuant { activations: Integer::Int8, symmetric: true, ..self.clone() })
    }

    /// Puts the ops in; biases become integers where that is asked for.
    fn insert(&self, m: &mut Module, cx: &mut PassCx, biases: bool) -> Result<Changed, PassError> {
        let statistics =
            cx.env.statistics().and_then(|s| s.lock().unwrap_or_else(|e| e.into_inner()).clone());
        let nothing = |why: &str| PassError::Nothing { pass: NAME, why: why.into() };
        if statistics.is_none() && !self.dynamic {
            return Err(nothing(
                "no ranges of activations are known; calibrate first, as in `calibrate,insert-fake-quant`",
            ));
        }
        let statistics = statistics.unwrap_or_default();
        infer::infer(m, cx.ops);
        let mut products = self.products(m, cx);
        if biases && !self.dynamic {
            take_biases(m, &mut products);
        }
        let mut places = places(m, |op| products.contains(&op));
        if self.dynamic {
            places.iter_mut().for_each(|p| p.readers.retain(|(op, i)| products.contains(op) && *i == 0));
            places.retain(|p| !p.readers.is_empty());
        }
        if places.is_empty() {
            if cx.may_find_nothing() {
                return Ok(Changed::No);
            }
            return Err(nothing(
                "no product has a weight of 8 bits with one scale for each output; quantize weights first, as in \
                 `rtn{bits=8, group=-1, symmetric=true, narrow=true},calibrate,insert-fake-quant`",
            ));
        }
        let needed = match self.activations.elem() {
            Elem::U8 | Elem::I8 if self.dynamic => 11,
            Elem::U8 | Elem::I8 => 10,
            _ => 21,
        };
        crate::raise_opset::raise(m, cx, needed, NAME)?;
        let mut scales: HashMap<Value, f32> = HashMap::new();
        for place in &places {
            if self.dynamic {
                dynamic(m, place)?;
                continue;
            }
            let scale = self.place(m, cx, place, &statistics)?;
            scales.extend(place.readers.iter().filter_map(|&(op, i)| Some((m.ops[op].operand(i)?, scale))));
        }
        let one = |op: Op, name| m.ops[op].attrs.float(name).unwrap_or(1.0) == 1.0;
        let biased = |op: &Op| m.ops[*op].is("onnx.Conv") || one(*op, "alpha") && one(*op, "beta");
        let mut biased: Vec<Op> = products.iter().copied().filter(|op| biases && biased(op)).collect();
        biased.sort();
        for op in biased {
            let scale = m.ops[op].operand(0).and_then(|x| scales.get(&x).copied());
            if let Some(scale) = scale {
                bias(m, cx, op, scale)?;
            }
        }
        let full =
            |op: &Op| m.ops[*op].operand(1).and_then(|w| weight(m, w)).is_some_and(|(q, _)| q.bits == 8);
        if self.activations == Integer::Uint8 && products.iter().any(full) && !reduced(cx) {
            cx.report.note(SATURATES);
        }
        cx.count("activations in 8 bits", places.len() as u64);
        cx.report.note(format!(
            "{} activations in {} bits, {} products of integers",
            places.len(),
            self.activations.elem().bits(),
            products.len()
        ));
        if !self.dynamic && biases {
            fused(m, cx);
        }
        Ok(Changed::Yes)
    }

    /// The products whose activations are to be held in codes; the others are reported.
    fn products(&self, m: &Module, cx: &mut PassCx) -> HashSet<Op> {
        let found = quantized(m);
        let mut kept: HashMap<Op, &str> = HashMap::new();
        for keep in &self.keep {
            let (op, why) = match keep {
                Keep::First => (found.first(), "keep=[first]"),
                Keep::Last => (found.last(), "keep=[last]"),
            };
            kept.extend(op.map(|op| (*op, why)));
        }
        let mut products = HashSet::new();
        for op in found {
            let data = &m.ops[op];
            let weight = data
                .operand(1)
                .map(|v| weight(m, v).map_or_else(|| m.value_label(v), |(_, placed)| placed.label));
            let weight = weight.unwrap_or_default();
            let refused = self.filter.refuses(&[&data.node, &data.loc, &weight], &data.name);
            match refused.or(kept.get(&op).map(|why| why.to_string())) {
                Some(why) => cx.left(m, op, format!("its activation stays float: {why}")),
                None => drop(products.insert(op)),
            }
        }
        products
    }

    fn form(&self) -> Form {
        let levels = self.activations.levels();
        Form { symmetric: self.symmetric, levels: if self.symmetric { levels - 1 } else { levels } }
    }

    /// Scale and zero point of a range, as a code counted from the least one. A range of nothing but zero has steps of
    /// one.
    fn grid(&self, r: Range) -> (f32, u32) {
        let levels = self.activations.levels();
        let (middle, most) = (levels / 2, levels - 1);
        // Ends far apart must not overflow on the way.
        let scale = match self.symmetric {
            true => r.max / (middle - 1) as f32,
            false => r.max / most as f32 - r.min / most as f32,
        };
        if scale.is_nan() || scale < f32::MIN_POSITIVE {
            return (1.0, if self.symmetric { middle } else { 0 });
        }
        match self.symmetric {
            true => (scale, middle),
            false => (scale, (-r.min / scale).round_ties_even().clamp(0.0, most as f32) as u32),
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
        let float = m.ty(place.value).elem().unwrap_or(Elem::F32);
        let codes = codes_type(m, place.value, self.activations.elem());
        let values = Tensor::from_f32(float, &[], vec![scale]).map_err(|e| fail(&e.to_string()))?;
        let (region, scale_name) = (m.top, m.fresh_name(&format!("{label}.scale")));
        let scale_value = m.add_const(region, scale_name, values.to_const());
        let zero_name = m.fresh_name(&format!("{label}.zero_point"));
        let zero_value = m.add_const(region, zero_name, self.activations.code(zero));
        let codes_name = m.fresh_name(&format!("{label}.codes"));
        let quantize = behind(m, place.value, |loc| {
            OpBuilder::new("onnx.QuantizeLinear", loc)
                .operands([place.value, scale_value, zero_value])
                .named_result(codes_name, codes)
        });
        dequantize(m, quantize, place, [scale_value, zero_value]);
        Ok(scale)
    }
}

/// Whether `reduce-range` ran before.
fn reduced(cx: &PassCx) -> bool {
    cx.report.counts.contains_key(crate::reduce_range::COUNTER)
}

/// The type of the codes of a value.
fn codes_type(m: &Module, v: Value, elem: Elem) -> Type {
    match m.ty(v).as_tensor().and_then(|t| t.dims.clone()) {
        Some(dims) => Type::tensor(elem, dims),
        None => Type::unranked(elem),
    }
}

/// Puts an op right behind where a value of the top graph comes from: the op that computes it, or the graph's inputs.
fn behind(m: &mut Module, v: Value, build: impl FnOnce(&Symbol) -> OpBuilder) -> Op {
    match m.def_op(v) {
        Some((op, _)) => {
            let loc = m.ops[op].loc.clone();
            m.insert_after(op, build(&loc))
        }
        None => {
            let first = m.regions[m.top].ops[0];
            let loc = m.ops[first].loc.clone();
            m.insert_before(first, build(&loc))
        }
    }
}

/// Has the readers of a place read it through the codes that `quantize` gives.
fn dequantize(m: &mut Module, quantize: Op, place: &Place, [scale, zero]: [Value; 2]) {
    let codes = m.ops[quantize].result(0).expect("the op was built with a result");
    let loc = m.ops[quantize].loc.clone();
    let name = m.fresh_name(&format!("{}.dequantized", m.value_label(place.value)));
    let dequantize = OpBuilder::new("onnx.DequantizeLinear", &loc)
        .operands([codes, scale, zero])
        .named_result(name, m.ty(place.value).clone());
    let dequantize = m.insert_after(quantize, dequantize);
    let back = m.ops[dequantize].result(0).expect("the op was built with a result");
    for &(op, i) in &place.readers {
        m.ops[op].operands[i] = Some(back);
    }
}

/// Has the readers of a place read it in codes whose range is found as the model runs.
fn dynamic(m: &mut Module, place: &Place) -> Result<(), PassError> {
    let label = m.value_label(place.value);
    let elem = m.ty(place.value).elem();
    if elem != Some(Elem::F32) {
        let why = format!("DynamicQuantizeLinear takes f32, found {}", m.ty(place.value));
        return Err(PassError::At { pass: NAME, what: label, why });
    }
    let codes = codes_type(m, place.value, Elem::U8);
    let [codes_name, scale_name, zero_name] =
        ["codes", "scale", "zero_point"].map(|part| m.fresh_name(&format!("{label}.{part}")));
    let quantize = behind(m, place.value, |loc| {
        OpBuilder::new("onnx.DynamicQuantizeLinear", loc)
            .operands([place.value])
            .named_result(codes_name, codes)
            .named_result(scale_name, Type::of_shape(Elem::F32, &[]))
            .named_result(zero_name, Type::of_shape(Elem::U8, &[]))
    });
    let parts = [1, 2].map(|i| m.ops[quantize].result(i).expect("the op was built with three results"));
    dequantize(m, quantize, place, parts);
    Ok(())
}

/// Says what the runtime will make of the islands, and names the ops that it leaves in floats.
fn fused(m: &Module, cx: &mut PassCx) {
    let uses = m.uses();
    let mut found: BTreeMap<&str, u64> = BTreeMap::new();
    for &op in &m.regions[m.top].ops {
        match operator(m, &uses, op) {
            Some(Ok(name)) => *found.entry(name.rsplit('.').next().unwrap_or(name)).or_default() += 1,
            Some(Err(why)) => {
                let data = &m.ops[op];
                cx.report.note(format!("{NAME}: {} at {:?} stays float: {why}", data.name.op(), data.loc));
            }
            None => {}
        }
    }
    let found: Vec<String> = found
        .iter()
        .map(|(name, n)| match *name {
            MOVED => format!("{n} ops that move codes"),
            name => format!("{n} x {name}"),
        })
        .collect();
    cx.report.note(format!("ONNX Runtime fuses the islands into {}", found.join(", ")));
}

/// The largest code of a bias: half of what 32 bits hold, so that sums of products have room beside it.
const MOST: f64 = (1u32 << 30) as f64;

/// Writes a MatMul of matrices and the Add of a constant bias as one Gemm. The runtime does so in any case, and with a bias
/// in floats it multiplies in floats.
fn take_biases(m: &mut Module, products: &mut HashSet<Op>) {
    let uses = m.uses();
    let mut found: Vec<(Op, Op, usize)> = Vec::new();
    for &op in products.iter() {
        found.extend(bias_of(m, &uses, op).map(|(add, i)| (op, add, i)));
    }
    found.sort();
    for (op, add, bias) in found {
        let data = m.ops[op].clone();
        let (y, c) = (m.ops[add].result(0).expect("an Add has a result"), m.ops[add].operand(bias));
        let operands = [data.operand(0), data.operand(1), c].into_iter().flatten();
        let gemm = OpBuilder::new("onnx.Gemm", &data.loc).operands(operands).node(data.node.clone());
        let gemm = m.insert_before(add, gemm.result(m.ty(y).clone()));
        let sum = m.ops[gemm].result(0).expect("it was given one");
        m.replace_uses(y, sum);
        if m.values[sum].name.is_empty() {
            m.values[sum].name = std::mem::replace(&mut m.values[y].name, "".into());
        }
        m.erase(add);
        m.erase(op);
        products.remove(&op);
        products.insert(gemm);
    }
}

/// Makes the constant bias of a convolution or a Gemm one of 32-bit integers with the scale of the sums of products. Where a
/// channel's bias is too large for that, its weights are given a larger scale: they are small beside it.
fn bias(m: &mut Module, cx: &mut PassCx, op: Op, scale: f32) -> Result<(), PassError> {
    let fail = |m: &Module, why: String| PassError::At { pass: NAME, what: m.ops[op].loc.to_string(), why };
    let Some(konst) = m.ops[op].operand(2).and_then(|b| m.const_of(b)) else { return Ok(()) };
    let float = Tensor::floats(&m.consts[konst]).map_err(|e| fail(m, e.to_string()))?;
    let weight = m.ops[op].operand(1).and_then(|w| weight(m, w));
    let Some((q, placed)) = weight.filter(|(q, _)| q.n == float.len()) else {
        return Err(fail(m, "this is a bug: a bias without quantized weights".into()));
    };
    let mut weights = Tensor::floats(&q.scales).map_err(|e| fail(m, e.to_string()))?;
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
pub fn widen(
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
