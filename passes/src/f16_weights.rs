//! `f16-weights`: float weights are stored as f16 behind a Cast, which a runtime folds when it loads the model. The file
//! is half as large, the model computes in f32 as before.
//!
//! A weight of which some element is beyond f16 (65504) stays as it is.

use crate::quantize::{Shared, before_all, each, matrix};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError, WeightReport};
use dialects::ir::{ConstData, Elem, Module, OpBuilder, Type};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// The pass and its options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct F16Weights {
    /// Which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

/// The pass's name.
pub const NAME: &str = "f16-weights";

impl Pass for F16Weights {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "stores float weights as f16 behind a Cast"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn consumes(&self) -> OpSet {
        crate::rtn::Rtn::default().consumes()
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["onnx.Cast"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        each(m, cx, NAME, &self.filter, true, |m, cx, weights| {
            weights.iter().try_for_each(|shared| store(m, cx, shared))
        })
    }
}

/// What rounding did to a run of weights.
#[derive(Clone, Copy, Default)]
struct Rounded {
    error2: f64,
    weight2: f64,
    beyond: u64,
    not_finite: u64,
}

/// Puts one weight behind a Cast, at every use.
fn store(m: &mut Module, cx: &mut PassCx, shared: &Shared) -> Result<(), PassError> {
    let label = shared.label(m);
    let l = shared.first().clone();
    let at = |why: String| PassError::At { pass: NAME, what: label.clone(), why };
    if l.elem != Elem::F32 || m.ty(l.operand).elem().is_some_and(|e| e != Elem::F32) {
        shared.uses.iter().for_each(|l| cx.left(m, l.op, "the weight is in half precision already"));
        return Ok(());
    }
    let bytes = m.consts[l.konst].read().map_err(|e| at(e.to_string()))?;
    let w = matrix(&l, &bytes);
    let flat = if l.operand_is_nk { [l.n, l.k] } else { [l.k, l.n] };
    let mut stored = cx.env.scratch(l.n * l.k * size_of::<f16>())?;
    let round = |(row, out): (usize, &mut [u8])| {
        let mut sums = Rounded::default();
        for (column, out) in out.chunks_exact_mut(2).enumerate() {
            let (n, k) = if l.operand_is_nk { (row, column) } else { (column, row) };
            let x = w.at(n, k);
            let y = f16::from_f32(x);
            out.copy_from_slice(&y.to_le_bytes());
            sums.not_finite += u64::from(!x.is_finite());
            sums.beyond += u64::from(y.is_infinite());
            sums.error2 += f64::from(y.to_f32() - x).powi(2);
            sums.weight2 += f64::from(x).powi(2);
        }
        sums
    };
    let rows: Vec<Rounded> = stored.bytes().par_chunks_mut(flat[1] * 2).enumerate().map(round).collect();
    let sums = rows.iter().fold(Rounded::default(), |a, b| Rounded {
        error2: a.error2 + b.error2,
        weight2: a.weight2 + b.weight2,
        beyond: a.beyond + b.beyond,
        not_finite: a.not_finite + b.not_finite,
    });
    let total = l.n * l.k;
    if sums.not_finite > 0 {
        return Err(at(format!("{} of {total} weights are NaN or infinite", sums.not_finite)));
    }
    if sums.beyond > 0 {
        let why = format!("{} of its {total} weights are beyond what f16 holds, {}", sums.beyond, f16::MAX);
        shared.uses.iter().for_each(|l| cx.left(m, l.op, why.clone()));
        return Ok(());
    }

    let operand = m.ty(l.operand).as_tensor().and_then(|t| t.known_shape());
    let shape = operand.unwrap_or_else(|| flat.to_vec());
    if shape.iter().product::<usize>() != total {
        return Err(at(format!("this is a bug: {total} weights in the shape {shape:?}")));
    }
    let dims = shape.iter().map(|&d| d as u64).collect();
    let half = ConstData::new(Elem::F16, dims, stored.freeze()).map_err(|e| at(e.to_string()))?;
    let bytes_after = half.byte_len();
    let before = before_all(m, &shared.uses);
    let (region, loc) = (m.ops[before].region, m.ops[before].loc.clone());
    let half = m.add_const(region, m.fresh_name(&format!("{label}.f16")), half);
    let cast = OpBuilder::new("onnx.Cast", &loc).operands([half]).attr("to", i64::from(Elem::F32.onnx()));
    let cast = m.insert_before(before, cast.result(Type::of_shape(Elem::F32, &shape)));
    let value = m.ops[cast].result(0).expect("a Cast has a result");
    for l in &shared.uses {
        m.ops[l.op].operands[l.operand_index] = Some(value);
    }
    cx.env.quantized(value, &|| Ok(w.tensor(l.operand_is_nk)))?;
    let stored = Some(m.value_label(half));
    cx.report.weights.push(WeightReport {
        weight: label,
        node: m.ops[l.op].loc.to_string(),
        n: l.n,
        k: l.k,
        method: "f16".into(),
        bits: 16,
        group_size: l.k,
        bytes_before: m.consts[l.konst].byte_len(),
        bytes_after,
        stored,
        frobenius_error: sums.error2.sqrt(),
        weight_error: if sums.weight2 > 0.0 { (sums.error2 / sums.weight2).sqrt() } else { 0.0 },
        ..WeightReport::default()
    });
    Ok(())
}
