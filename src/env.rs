//! What passes get from the outside world: calibration data, scratch space, progress.

use crate::calibrate::{CalibError, Calibration};
use crate::data::lm::inputs_of;
use crate::eval::distance::{Baseline, Comparing, DistanceError};
use crate::files;
use crate::onnx::export;
use crate::resume::Folder;
use crate::stream::DataStream;
use crate::term::Term;
use bytes::Bytes;
use dialects::exec::{ExecError, Executor};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Module, TensorSource, Value};
use dialects::ops::Ops;
use dialects::tensor::Tensor;
use passes::ranges::Statistics;
use passes::{CalibSink, Distance, Env, PassError, Progress, Scratch, Stream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Buffers up to this many bytes live in memory; larger ones in a mapped file without a name.
const IN_MEMORY: usize = 8 << 20;

/// The outside world as the driver gives it to passes.
pub struct DriverEnv {
    /// Ops, for running the model.
    pub ops: Ops,
    /// Where progress is shown.
    pub term: Term,
    /// The folder for scratch files; the output's, so that they share its disk.
    pub scratch: PathBuf,
    /// Where finished work is kept, if the user named a folder.
    pub store: Option<Folder>,
    /// What runs the model when activations are gathered from the whole of it.
    pub executor: Box<dyn Executor>,
    /// Calibration data, when a pass of the pipeline needs it.
    pub calibration: Option<Calibration>,
    /// What is written at the end, if that is an ONNX model; for its size.
    pub output: Option<Output>,
    /// The model before the pipeline, to measure distances from.
    pub baseline: Option<Baseline>,
    /// Statistics of activations that a pass left for those after it.
    pub statistics: Mutex<Option<Statistics>>,
    /// Statistics that the user gave in place of a run over calibration data.
    pub given_statistics: Option<Statistics>,
    /// Whether the statistics that a pass leaves are saved.
    pub saves_statistics: bool,
    /// Weights as they were before they were quantized, for `--check`; `None` keeps none.
    pub originals: Option<Mutex<Vec<(Value, Tensor)>>>,
}

/// How the output is written.
#[derive(Clone, Debug)]
pub struct Output {
    /// Where.
    pub path: PathBuf,
    /// Whether weights go into a file beside it.
    pub external_data: bool,
    /// Metadata that it gets.
    pub meta: Vec<(String, String)>,
}

impl DriverEnv {
    /// For passes that need no calibration data and write no file.
    pub fn without_data(ops: &Ops, term: Term) -> DriverEnv {
        DriverEnv {
            ops: ops.clone(),
            term,
            scratch: std::env::temp_dir(),
            store: None,
            executor: Box::new(Interpreter::new(ops.clone())),
            calibration: None,
            output: None,
            baseline: None,
            statistics: Mutex::default(),
            given_statistics: None,
            saves_statistics: false,
            originals: None,
        }
    }

    /// The calibration data.
    pub fn data(&self) -> Result<&Calibration, PassError> {
        let data = self.calibration.as_ref();
        data.ok_or_else(|| PassError::Env("no calibration data was opened for this pass".into()))
    }
}

impl Env for DriverEnv {
    fn calibrate(&self, m: &Module, wanted: &[Value], sink: &mut CalibSink) -> Result<(), PassError> {
        let data = self.data()?;
        let prepared = self.executor.prepare(m, wanted)?;
        let batches = data.batches();
        let bar = self.term.task("calibrating", batches.len() as u64);
        for batch in batches {
            let batch = batch.map_err(|e: CalibError| PassError::Env(e.message))?;
            prepared.run(&inputs_of(m, batch), sink)?;
            if !bar.advance(1) {
                return Err(ExecError::Sink("interrupted".into()).into());
            }
        }
        Ok(())
    }

    fn stream(&self) -> Result<Box<dyn Stream + '_>, PassError> {
        Ok(Box::new(DataStream::new(self)?))
    }

    fn distance(&self, m: &Module) -> Result<Distance, PassError> {
        let data = self.data()?;
        let baseline = self.baseline.as_ref();
        let baseline =
            baseline.ok_or_else(|| PassError::Env("the model before this pass was not kept".into()))?;
        let exec = Interpreter::new(self.ops.clone()).exact(true);
        let bar = self.term.task("comparing", baseline.batches(data) as u64);
        let with = Comparing { data, exec: &exec, scratch: &self.scratch, progress: &*bar };
        baseline.distance(m, &with).map_err(|e| match e {
            DistanceError::Exec(e) => e.into(),
            e => PassError::Env(format!("comparing with the model before the pipeline: {e}")),
        })
    }

    fn statistics(&self) -> Option<&Mutex<Option<Statistics>>> {
        Some(&self.statistics)
    }

    fn given_statistics(&self) -> Option<&Statistics> {
        self.given_statistics.as_ref()
    }

    fn saves_statistics(&self) -> bool {
        self.saves_statistics
    }

    fn file_bytes(&self, m: &Module) -> Result<u64, PassError> {
        let output = self.output.as_ref().ok_or_else(|| {
            PassError::Env("the size of the output is only known where an .onnx file is written".into())
        })?;
        let mut m = m.clone();
        output.meta.iter().for_each(|(key, value)| m.meta.set(key.clone(), value.clone()));
        let options = export::Options { external_data: output.external_data, ..export::Options::default() };
        export::len(&m, &output.path, &options).map_err(|e| PassError::Env(e.to_string()))
    }

    fn scratch(&self, len: usize) -> Result<Box<dyn Scratch>, PassError> {
        if len <= IN_MEMORY {
            return Ok(Box::new(InMemory(vec![0; len])));
        }
        let map = files::scratch(&self.scratch, len).map_err(|e| PassError::Env(e.to_string()))?;
        Ok(Box::new(Mapped(map)))
    }

    fn progress(&self, task: &str, total: u64) -> Box<dyn Progress> {
        self.term.task(task, total)
    }

    fn quantized(
        &self,
        value: Value,
        weight: &dyn Fn() -> Result<Tensor, PassError>,
    ) -> Result<(), PassError> {
        if let Some(kept) = &self.originals {
            let weight = weight()?;
            kept.lock().unwrap_or_else(|e| e.into_inner()).push((value, weight));
        }
        Ok(())
    }

    fn store(&self) -> Option<&dyn passes::Store> {
        self.store.as_ref().map(|s| s as &dyn passes::Store)
    }
}

struct InMemory(Vec<u8>);

impl Scratch for InMemory {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn freeze(self: Box<Self>) -> Arc<dyn TensorSource> {
        Arc::new(Bytes::from(self.0))
    }
}

struct Mapped(memmap2::MmapMut);

impl Scratch for Mapped {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn freeze(self: Box<Self>) -> Arc<dyn TensorSource> {
        Arc::new(Bytes::from_owner(self.0))
    }
}
