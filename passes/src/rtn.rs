//! `rtn`: every weight to the nearest point of a grid that spans its group, without data.
//!
//! The grid is the one of ONNX Runtime's own quantizer (see [`crate::grid`]), so that the two agree bit for bit.

use crate::grid;
use crate::quantize::{GridOptions, Notes, candidates, quantize};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError};
use dialects::ir::Module;
use serde::{Deserialize, Serialize};

/// The pass and its options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rtn {
    /// The grid.
    #[serde(flatten)]
    pub grid: GridOptions,
    /// Which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

const NAME: &str = "rtn";

impl Pass for Rtn {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "quantizes weights by rounding to nearest, without data"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["onnx.MatMul", "onnx.Gemm"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        self.grid.check(NAME)?;
        let weights = candidates(m, cx, &self.filter);
        if weights.is_empty() {
            if cx.settings.allow_noop {
                return Ok(Changed::No);
            }
            let why = "no MatMul or Gemm with a constant float weight is left to quantize".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        let total = weights.iter().map(|w| (w.first().n * w.first().k) as u64).sum();
        let progress = cx.env.progress(NAME, total);
        for shared in &weights {
            let notes = Notes { method: NAME.into(), ..Notes::default() };
            quantize(m, cx, NAME, shared, &self.grid, &grid::Rtn, notes)?;
            if !progress.advance((shared.first().n * shared.first().k) as u64) {
                return Err(PassError::Env("interrupted".into()));
            }
        }
        cx.count("quantized weights", weights.len() as u64);
        Ok(Changed::Yes)
    }
}
