//! `reduce-range`: 8-bit weights whose products with 8-bit activations no CPU adds up wrong.
//!
//! x86 CPUs without VNNI multiply u8 by i8 with an instruction (vpmaddubsw) that adds two neighbouring products in 16 bits and
//! saturates: 255 * (a + b) overflows where two neighbouring weights of one sign come to more than 128. Weights of 7 bits
//! cannot; most rows lose less, since large weights are rarely neighbours. A row of which two do gets the scale at which
//! they no longer do, and the others stay as they are.

use crate::calibrate::{quantized, weight};
use crate::insert_fake_quant::widen;
use crate::qtensor::{QTensor, read};
use crate::{Changed, Exactness, OpSet, Pass, PassCx, PassError};
use dialects::ir::{Module, Op};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The pass; it has no options of its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ReduceRange {}

const NAME: &str = "reduce-range";

/// The counter of rows that got a larger scale; it is there once the pass has run.
pub const COUNTER: &str = "rows in a reduced range";

/// The sum of two neighbours that 16 bits still hold times 255, and one less, since both may be rounded up.
const MOST: u32 = 128 - 1;

impl Pass for ReduceRange {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "keeps 8-bit weights from overflowing the 16-bit sums of CPUs without VNNI"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        cx.count(COUNTER, 0);
        if cx.settings.profile == "tensorrt" {
            cx.report.note(format!("{NAME}: nothing to do for TensorRT, which adds up products in 32 bits"));
            return Ok(Changed::No);
        }
        let (mut seen, mut reduced, mut rows) = (HashSet::new(), 0, 0);
        for op in quantized(m) {
            let found = m.ops[op].operand(1).and_then(|w| weight(m, w));
            let Some((q, placed)) = found.filter(|(_, placed)| seen.insert(placed.op)) else { continue };
            rows += q.n;
            if q.zero_points.is_some() {
                let why = "reduce-range leaves its weight as it is: it has zero points; rtn{symmetric=true} gives none";
                cx.left(m, op, why);
                continue;
            }
            reduced += reduce(m, op, &q, placed.op)?;
        }
        if rows == 0 && !cx.may_find_nothing() {
            let why =
                "no product has a weight of 8 bits with one scale for each output; quantize weights first"
                    .into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        cx.count(COUNTER, reduced as u64);
        cx.report.note(format!(
            "{NAME}: {reduced} of {rows} rows of weights have a larger scale: neighbours that come to more than 128 would \
             overflow 16 bits on x86 CPUs without VNNI"
        ));
        Ok(if reduced > 0 { Changed::Yes } else { Changed::No })
    }
}

/// Gives rows larger scales where that is needed. Returns how many.
fn reduce(m: &mut Module, op: Op, q: &QTensor, dequantize: Op) -> Result<usize, PassError> {
    let codes = read(&q.codes)?;
    let (row, middle) = (q.blob() * q.groups(), q.middle());
    // The runtime lays the inputs of a kernel out as they are, or with channels last.
    let kernel = m.ops[op].operand(1).filter(|_| m.ops[op].is("onnx.Conv"));
    let shape = kernel.and_then(|w| m.ty(w).as_tensor()?.known_shape()).unwrap_or_default();
    let inner = shape.get(2..).unwrap_or_default().iter().product::<usize>().clamp(1, q.k.max(1));
    let channels: Vec<(usize, f32)> = codes
        .chunks_exact(row)
        .enumerate()
        .filter_map(|(i, row)| {
            let codes: Vec<i32> = row[..q.k].iter().map(|&c| i32::from(c) - i32::from(middle)).collect();
            let turned =
                (0..inner).flat_map(|at| codes[at..].iter().step_by(inner).copied()).collect::<Vec<_>>();
            let most = neighbours(&codes).max(neighbours(&turned));
            (most > MOST + 1).then(|| (i, MOST as f32 / most as f32))
        })
        .collect();
    if channels.is_empty() {
        return Ok(0);
    }
    let fail = |why: String| PassError::At { pass: NAME, what: m.ops[op].loc.to_string(), why };
    let mut scales = Tensor::floats(&q.scales).map_err(|e| fail(e.to_string()))?;
    channels.iter().for_each(|&(i, share)| scales[i] /= share);
    widen(m, q, dequantize, &scales, &channels)?;
    Ok(channels.len())
}

/// The largest sum of two neighbours of one sign, in magnitude.
fn neighbours(codes: &[i32]) -> u32 {
    let pairs = codes.windows(2).filter(|p| (p[0] < 0) == (p[1] < 0));
    pairs.map(|p| (p[0] + p[1]).unsigned_abs()).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_sign_count() {
        assert_eq!(neighbours(&[100, -100, 27, 90, 5]), 117);
        assert_eq!(neighbours(&[1, -60, -70]), 130);
        assert_eq!(neighbours(&[127]), 0);
    }
}
