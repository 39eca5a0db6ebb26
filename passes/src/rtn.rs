//! `rtn`: every weight to the nearest point of a grid that spans its group, without data.
//!
//! The grid is the one of ONNX Runtime's own quantizer (see [`crate::grid`]), so that the two agree bit for bit. With 8
//! bits the kernels of Conv and the gates of LSTM, GRU and RNN are quantized too, one scale for each of their rows.

use crate::grid;
use crate::linear::Form;
use crate::quantize::{GridOptions, Notes, Shared, each, quantize};
use crate::store::Work;
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
        OpSet::from([
            "onnx.MatMul",
            "onnx.Gemm",
            "onnx.Conv",
            "onnx.ConvTranspose",
            "onnx.LSTM",
            "onnx.GRU",
            "onnx.RNN",
        ])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        self.grid.check(NAME)?;
        let work = Work::begin(m, cx, NAME, self)?;
        each(m, cx, NAME, &self.filter, self.grid.kernels(), |m, cx, weights| {
            self.quantize(m, cx, &weights, &work)
        })
    }
}

impl Rtn {
    fn quantize(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        weights: &[Shared],
        work: &Work,
    ) -> Result<(), PassError> {
        let size = |w: &Shared| (w.first().n * w.first().k) as u64;
        let progress = cx.env.progress(NAME, weights.iter().map(size).sum());
        for shared in weights {
            let notes = Notes { method: NAME.into(), ..Notes::default() };
            // The runtime takes one scale for each channel of a kernel.
            let row = GridOptions { group: -1, ..self.grid.clone() };
            let grid = if shared.first().form == Form::Kernel { &row } else { &self.grid };
            work.once(m, cx, shared, |m, cx| {
                quantize(m, cx, NAME, shared, grid, &grid::Rtn, notes).map(|(q, _)| q)
            })?;
            if !progress.advance(size(shared)) {
                return Err(PassError::Env("interrupted".into()));
            }
        }
        Ok(())
    }
}
