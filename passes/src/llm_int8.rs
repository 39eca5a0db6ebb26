//! `llm-int8`: products of 8-bit integers, but for a few channels of the activations that stay in floating point (Dettmers et
//! al., "LLM.int8()", NeurIPS 2022, sections 2 and 3).
//!
//! A channel whose magnitude reaches the threshold on the calibration data is an outlier: its column of the activation and its
//! row of the weight are multiplied as they are. The others are vector-wise int8: each row of the activation has a scale of its
//! own, found when the model runs, each output of the weight one that is fixed. With `x` the activation and `s` its rows' scales:
//!
//! ```text
//! y = MatMulInteger(QuantizeLinear(x' / s), codes) * s * scales + Gather(x, outliers) outlier_rows
//! ```
//!
//! where `x'` is `x` with zeros for outliers, and `s` the largest magnitude of a row of `x'` over 127. Both factors are unsigned
//! with the zero point 128, so that no runtime adds pairs of products in 16 bits. The paper looks for outliers anew in every
//! batch; a graph has them fixed.

use crate::eqsat::Channels;
use crate::errors::Judge;
use crate::extremes::{self, Extremes};
use crate::gemm::Gemm;
use crate::grid::{self, Float, Layout, Matrix, Parts, Ranges, Spec};
use crate::group::{self, Group, groups, unwatched};
use crate::qtensor::constant;
use crate::quantize::{Shared, each};
use crate::raise_opset::raise;
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError, WeightReport};
use dialects::ir::{Attr, Dim, Elem, Module, Op, OpBuilder, Symbol, Type, Value};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};

const NAME: &str = "llm-int8";

/// The code of zero, of activations and of weights.
const ZERO: u8 = 128;

/// The options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LlmInt8 {
    /// A channel with a value of this magnitude, or a larger one, stays in floating point.
    pub threshold: f32,
    /// Which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Default for LlmInt8 {
    fn default() -> LlmInt8 {
        LlmInt8 { threshold: 6.0, filter: Filter::default() }
    }
}

impl Pass for LlmInt8 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "multiply in 8-bit integers, scaled row by row, but for outlier channels, which stay in floating point"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["onnx.MatMul", "onnx.Gemm"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["onnx.MatMulInteger"])
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        if !(self.threshold > 0.0 && self.threshold.is_finite()) {
            let why = format!("expected a positive number, found {}", self.threshold);
            return Err(PassError::Option { pass: NAME, option: "threshold", why });
        }
        each(m, cx, NAME, &self.filter, false, |m, cx, weights| self.all(m, cx, weights))
    }
}

impl LlmInt8 {
    fn all(&self, m: &mut Module, cx: &mut PassCx, weights: Vec<Shared>) -> Result<(), PassError> {
        for w in &weights {
            if let Some(why) = unwatched(m, w) {
                w.uses.iter().for_each(|l| cx.left(m, l.op, why));
            }
        }
        let mut groups = groups(m, weights);
        groups.retain(|g| match inexpressible(m, g) {
            None => true,
            Some(why) => {
                let ops = g.weights.iter().flat_map(|w| &w.uses);
                ops.for_each(|l| cx.left(m, l.op, why));
                false
            }
        });
        if groups.is_empty() {
            let why = "no activation is of f32, with channels whose number is known".into();
            return match cx.settings.allow_noop {
                true => Ok(()),
                false => Err(PassError::Nothing { pass: NAME, why }),
            };
        }
        raise(m, cx, 10, NAME)?;
        let values: Vec<(Value, Channels)> = groups.iter().map(|g| (g.x, Channels::Last)).collect();
        let seen = extremes::collect(m, cx, &values, 0, NAME)?;
        let (mut float, mut all) = (0, 0);
        for group in &groups {
            let outliers = self.outliers(&seen[&group.x]);
            if seen[&group.x].rows == 0 || outliers.len() == group.k {
                let why = match seen[&group.x].rows {
                    0 => "no calibration data reached its activation".to_string(),
                    _ => format!("all its channels reach {}", self.threshold),
                };
                let ops = group.weights.iter().flat_map(|w| &w.uses);
                ops.for_each(|l| cx.left(m, l.op, why.clone()));
                continue;
            }
            (float, all) = (float + outliers.len(), all + group.k);
            let mut split: Option<Split> = None;
            for shared in &group.weights {
                let weight = Weight::round(m, cx, shared, &outliers)?;
                for l in &shared.uses {
                    if l.x != group.x {
                        cx.left(m, l.op, "its weight is multiplied with several values");
                        continue;
                    }
                    if split.is_none() {
                        split = Some(Split::new(m, group.x, l.op, &outliers)?);
                    }
                    let split = split.as_ref().expect("it was made just now");
                    weight.multiply(m, cx, l.op, split)?;
                }
            }
        }
        cx.report.note(format!("{NAME}: {float} of {all} channels of activations stay float"));
        Ok(())
    }

    fn outliers(&self, seen: &Extremes) -> Vec<usize> {
        let largest = seen.largest();
        (0..largest.len()).filter(|&c| largest[c] >= self.threshold).collect()
    }
}

/// Why products of a value cannot be ones of integers.
fn inexpressible(m: &Module, g: &Group) -> Option<&'static str> {
    match m.ty(g.x).elem() {
        Some(Elem::F32) => match m.ty(g.x).dims().and_then(|d| d.last()?.known()) {
            Some(_) => None,
            None => Some("the number of channels of its activation is unknown"),
        },
        _ => Some("QuantizeLinear takes activations of f32 alone before opset 19"),
    }
}

/// A value as its products read it: rows of codes with their scales, and the columns that stay float.
struct Split {
    /// u8 `[.., K]`.
    codes: Value,
    /// f32 `[.., 1]`.
    scales: Value,
    /// u8, a scalar.
    zero: Value,
    /// f32 `[.., outliers]`, if there are any.
    outliers: Option<Value>,
}

impl Split {
    /// Puts it before `at`, the first op that needs it.
    fn new(m: &mut Module, x: Value, at: Op, outliers: &[usize]) -> Result<Split, PassError> {
        let ty = m.ty(x).clone();
        let label = m.value_label(x);
        let dims = ty.dims().unwrap_or_default().to_vec();
        let k = dims.last().and_then(|d| usize::try_from(d.known()?).ok()).unwrap_or(0);
        let with_last = |elem, last: Dim| {
            let mut dims = dims.clone();
            dims.last_mut().into_iter().for_each(|d| *d = last.clone());
            Type::tensor(elem, dims)
        };
        let row = with_last(Elem::F32, Dim::Known(1));
        let region = m.ops[at].region;
        let loc: Symbol = m.ops[at].loc.clone();
        let konst = |m: &mut Module, name: &str, t: Tensor| {
            let name = m.fresh_name(&format!("{label}.{name}"));
            m.add_const(region, name, t.to_const())
        };
        let push = |m: &mut Module, build: OpBuilder, ty: Type| {
            let op = m.insert_before(at, build.result(ty));
            m.ops[op].result(0).expect("it was given one")
        };
        let op =
            |name: &str, operands: &[Value]| OpBuilder::new(name, &loc).operands(operands.iter().copied());
        let mut regular = x;
        let mut kept = None;
        if !outliers.is_empty() {
            let mask: Vec<f32> = (0..k).map(|c| f32::from(u8::from(!outliers.contains(&c)))).collect();
            let mask = konst(m, "regular", Tensor::new(&[k], mask).expect("one entry per channel"));
            regular = push(m, op("onnx.Mul", &[x, mask]), ty.clone());
            let places: Vec<i64> = outliers.iter().map(|&c| c as i64).collect();
            let n = places.len();
            let places = konst(m, "outliers", Tensor::new(&[n], places).expect("one entry per outlier"));
            let gather = op("onnx.Gather", &[x, places]).attr("axis", -1);
            kept = Some(push(m, gather, with_last(Elem::F32, Dim::from(n))));
        }
        let magnitude = push(m, op("onnx.Abs", &[regular]), ty.clone());
        let reduce = match m.opset("onnx") >= 18 {
            true => {
                let axes = konst(m, "axes", Tensor::new(&[1], vec![-1i64]).expect("one axis"));
                op("onnx.ReduceMax", &[magnitude, axes])
            }
            false => op("onnx.ReduceMax", &[magnitude]).attr("axes", Attr::Ints(vec![-1])),
        };
        let most = push(m, reduce.attr("keepdims", 1), row.clone());
        // A row of zeros is divided by something.
        let least = konst(m, "least", Tensor::scalar(f32::MIN_POSITIVE * 127.0));
        let most = push(m, op("onnx.Max", &[most, least]), row.clone());
        let step = konst(m, "steps", Tensor::scalar(127f32));
        let scales = push(m, op("onnx.Div", &[most, step]), row);
        let steps = push(m, op("onnx.Div", &[regular, scales]), ty);
        let (one, zero) =
            (konst(m, "one", Tensor::scalar(1f32)), konst(m, "zero_point", Tensor::scalar(ZERO)));
        let codes =
            push(m, op("onnx.QuantizeLinear", &[steps, one, zero]), Type::tensor(Elem::U8, dims.clone()));
        Ok(Split { codes, scales, zero, outliers: kept })
    }
}

/// A weight as products read it.
struct Weight {
    /// Outputs.
    n: usize,
    label: String,
    /// u8 `[K, N]`, in constants of the module.
    codes: Value,
    /// f32 `[N]`.
    scales: Value,
    /// f32 `[outliers, N]`, if there are any.
    outliers: Option<Value>,
}

impl Weight {
    /// Rounds a weight, but for the rows `outliers`, and reports it.
    fn round(
        m: &mut Module,
        cx: &mut PassCx,
        shared: &Shared,
        outliers: &[usize],
    ) -> Result<Weight, PassError> {
        let l = shared.first().clone();
        let label = shared.label(m);
        let fail = |why: String| PassError::At { pass: NAME, what: label.clone(), why };
        let (n, k) = (l.n, l.k);
        let mut float = group::rows(m, NAME, shared)?.values;
        let kept: Vec<f32> =
            outliers.iter().flat_map(|&c| float.iter().skip(c).step_by(k).copied()).collect();
        let exact = float.clone();
        for row in float.chunks_exact_mut(k) {
            outliers.iter().for_each(|&c| row[c] = 0.0);
        }
        // One scale for each output, zero in the middle of the codes.
        let spec = Spec { bits: 8, group_size: k, symmetric: true, narrow: true, scales: Float::F32 };
        let (mut codes, mut scales) = (vec![0u8; n * k], vec![0f32; n]);
        let parts = Parts { codes: &mut codes, scales: &mut scales, zero_points: None };
        let bytes = bytemuck::cast_slice(&float);
        let matrix = Matrix { bytes, float: Float::F32, layout: Layout::Nk, n, k };
        grid::quantize(&matrix, &spec, &Ranges::Span, parts).map_err(|e| fail(e.to_string()))?;

        let mut scratch = cx.env.scratch(n * k)?;
        for (i, row) in scratch.bytes().chunks_exact_mut(n).enumerate() {
            row.iter_mut().enumerate().for_each(|(j, code)| *code = codes[j * k + i]);
        }
        let transposed = dialects::ir::ConstData::new(Elem::U8, vec![k as u64, n as u64], scratch.freeze())
            .map_err(|e| fail(e.to_string()))?;
        let rounded: Vec<f32> = codes
            .iter()
            .zip(&exact)
            .enumerate()
            .map(|(i, (&code, &x))| match outliers.binary_search(&(i % k)) {
                Ok(_) => x,
                Err(_) => (f32::from(code) - f32::from(ZERO)) * scales[i / k],
            })
            .collect();
        let mut report = WeightReport {
            weight: label.clone(),
            node: m.ops[l.op].loc.to_string(),
            n,
            k,
            method: NAME.into(),
            bits: 8,
            group_size: k,
            bytes_before: m.consts[l.konst].byte_len(),
            bytes_after: (n * k + size_of::<f32>() * (n + kept.len())) as u64,
            notes: vec![match outliers.len() {
                0 => "no channel stays float".into(),
                some => format!("{some} channels stay float"),
            }],
            ..WeightReport::default()
        };
        let mut judge = Judge::new(&exact, n, k, None);
        judge.step(NAME, &rounded);
        judge.finish(&mut report);
        cx.report.weights.push(report);

        let region = m.ops[l.op].region;
        let mut add = |what: &str, data| {
            let name = m.fresh_name(&format!("{label}.{what}"));
            m.add_const(region, name, data)
        };
        let floats = |dims: Vec<u64>, x: &[f32]| constant(Elem::F32, dims, bytemuck::cast_slice(x).to_vec());
        let codes = add("codes", transposed);
        let outlier_dims = vec![outliers.len() as u64, n as u64];
        let outliers = (!kept.is_empty()).then(|| add("outliers", floats(outlier_dims, &kept)));
        let scales = add("scales", floats(vec![n as u64], &scales));
        Ok(Weight { n, label, codes, scales, outliers })
    }

    /// Puts the products in the place of `op`.
    fn multiply(&self, m: &mut Module, cx: &mut PassCx, op: Op, x: &Split) -> Result<(), PassError> {
        let gemm = Gemm::new(m, NAME, op, self.n)?;
        let loc: Symbol = gemm.data.loc.clone();
        let product = m.ty(x.codes).dims().map(|d| {
            let mut dims = d.to_vec();
            dims.last_mut().into_iter().for_each(|d| *d = Dim::from(self.n));
            dims
        });
        let ty = |elem| match &product {
            Some(dims) => Type::tensor(elem, dims.clone()),
            None => Type::unranked(elem),
        };
        let build =
            |name: &str, operands: &[Value]| OpBuilder::new(name, &loc).operands(operands.iter().copied());
        let mut push = |build: OpBuilder, elem| {
            let op = m.insert_before(op, build.result(ty(elem)));
            m.ops[op].result(0).expect("it was given one")
        };
        let sums = push(build("onnx.MatMulInteger", &[x.codes, self.codes, x.zero, x.zero]), Elem::I32);
        let to = i64::from(Elem::F32.onnx());
        let sums = push(build("onnx.Cast", &[sums]).attr("to", to), Elem::F32);
        let by_row = push(build("onnx.Mul", &[sums, x.scales]), Elem::F32);
        let last = match (x.outliers, self.outliers) {
            (Some(columns), Some(rows)) => {
                let scaled = push(build("onnx.Mul", &[by_row, self.scales]), Elem::F32);
                let float = push(build("onnx.MatMul", &[columns, rows]), Elem::F32);
                if let Some((product, _)) = m.def_op(float) {
                    cx.left(m, product, "outlier channels stay in floating point");
                }
                build("onnx.Add", &[scaled, float])
            }
            (None, None) => build("onnx.Mul", &[by_row, self.scales]),
            _ => {
                let why = "this is a bug: outliers of a weight, or of what it multiplies, alone".into();
                return Err(PassError::At { pass: NAME, what: self.label.clone(), why });
            }
        };
        gemm.finish(m, NAME, last)
    }
}
