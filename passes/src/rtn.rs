//! `rtn`: every weight to the nearest point of a grid, without data.
//!
//! The grid spans its group as that of ONNX Runtime's own quantizer does (see [`crate::grid`]), so that the two agree bit
//! for bit. `clip` and `hqq` choose grids that lose less of the weights, from the weights alone. With 8 bits the kernels of Conv and the gates of LSTM, GRU and RNN are quantized too, one scale for each of their rows.

use crate::errors::Judge;
use crate::gram::{self, Gram};
use crate::grid::{self, Ranges};
use crate::group::{rows, watched};
use crate::linear::Form;
use crate::qtensor::QTensor;
use crate::quantize::{GridOptions, Notes, Shared, dequantize, each, quantize};
use crate::store::Work;
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError};
use dialects::ir::{Module, Value};
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
        let float = cx.settings.measure.then(|| m.clone());
        let first = cx.report.weights.len();
        let mut done = Vec::new();
        let size = |w: &Shared| (w.first().n * w.first().k) as u64;
        let progress = cx.env.progress(NAME, weights.iter().map(size).sum());
        for shared in weights {
            let notes = Notes { method: NAME.into(), ..Notes::default() };
            // The runtime takes one scale for each channel of a kernel.
            let row = GridOptions { group: -1, ..self.grid.clone() };
            let grid = if shared.first().form == Form::Kernel { &row } else { &self.grid };
            let q = |m: &mut Module, cx: &mut PassCx| quantize(m, cx, NAME, shared, grid, notes);
            done.push(work.once(m, cx, shared, q)?);
            if !progress.advance(size(shared)) {
                return Err(PassError::Env("interrupted".into()));
            }
        }
        let Some(float) = float else { return Ok(()) };
        match self.outputs(&float, cx, weights, &done, first) {
            // The weights are what they are; only what is said of them lacks something.
            Err(e) if progress.advance(0) => {
                cx.report.warn(format!("the errors of outputs were not measured: {e}"));
                Ok(())
            }
            result => result,
        }
    }

    /// Says what became of outputs on the calibration data, which runs through `float`, the model before; the report of
    /// the weights begins at its entry `first`.
    fn outputs(
        &self,
        float: &Module,
        cx: &mut PassCx,
        weights: &[Shared],
        quantized: &[QTensor],
        first: usize,
    ) -> Result<(), PassError> {
        let watched = |w: &Shared| watched(float, w);
        let mut values: Vec<(Value, usize)> = Vec::new();
        for l in weights.iter().filter(|w| watched(w)).map(Shared::first) {
            if !values.contains(&(l.x, l.k)) {
                values.push((l.x, l.k));
            }
        }
        for run in gram::runs(values, |&(_, k)| k, gram::BUDGET) {
            let grams = gram::collect(float, cx, &run, NAME)?;
            for (i, shared) in weights.iter().enumerate().filter(|(_, w)| watched(w)) {
                let l = shared.first();
                let Some(gram) = grams.get(&l.x).map(Gram::to_f32) else { continue };
                let w = rows(float, NAME, shared)?.values;
                let mut judge = Judge::new(&w, l.n, l.k, Some(&gram[..]));
                let ranges = self.grid.ranges();
                if ranges != Ranges::Span {
                    judge.step("rtn", &grid::nearest(w.clone(), l.k, &shared.spec(float, cx, &self.grid)));
                }
                judge.step(ranges.name(), &dequantize(&quantized[i])?);
                judge.finish(&mut cx.report.weights[first + i]);
            }
        }
        Ok(())
    }
}
