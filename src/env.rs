//! What passes get from the outside world: calibration data, scratch space, progress.

use crate::calibrate::{CalibError, Calibration};
use crate::data::lm::inputs_of;
use crate::files;
use crate::resume::Folder;
use crate::term::Term;
use bytes::Bytes;
use dialects::exec::{ExecError, Executor};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Module, TensorSource, Value};
use dialects::ops::Ops;
use dialects::tensor::Tensor;
use passes::{CalibSink, Env, PassError, Progress, Scratch};
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
    /// Calibration data, when a pass of the pipeline needs it.
    pub calibration: Option<Calibration>,
    /// Weights as they were before they were quantized, for `--check`; `None` keeps none.
    pub originals: Option<Mutex<Vec<(Value, Tensor)>>>,
}

impl Env for DriverEnv {
    fn calibrate(&self, m: &Module, wanted: &[Value], sink: &mut CalibSink) -> Result<(), PassError> {
        let data = self.calibration.as_ref();
        let data =
            data.ok_or_else(|| PassError::Env("no calibration data was opened for this pass".into()))?;
        let exec = Interpreter::new(self.ops.clone());
        let prepared = exec.prepare(m, wanted)?;
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
