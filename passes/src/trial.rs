//! The outside world of passes that are only tried: they read the real data, and nothing that they do is kept.

use crate::ranges::Statistics;
use crate::{CalibSink, Distance, Env, PassError, Progress, Scratch, Store, Stream};
use dialects::ir::{Module, Value};
use dialects::tensor::Tensor;
use std::sync::Mutex;

/// Sees what passes quantize, as [`Env::quantized`] does.
type Quantized<'a> =
    dyn Fn(Value, &dyn Fn() -> Result<Tensor, PassError>) -> Result<(), PassError> + Sync + 'a;

/// Another world that stands before the real one.
pub struct Trial<'a> {
    env: &'a dyn Env,
    quantized: Option<&'a Quantized<'a>>,
    statistics: Mutex<Option<Statistics>>,
    silent: bool,
    resumes: bool,
}

impl<'a> Trial<'a> {
    /// One in which what is quantized is no part of any result.
    pub fn new(env: &'a dyn Env) -> Trial<'a> {
        Trial { env, quantized: None, statistics: Mutex::default(), silent: false, resumes: false }
    }

    /// The same, which shows `seen` what passes quantize.
    pub fn watched(self, seen: &'a Quantized<'a>) -> Trial<'a> {
        Trial { quantized: Some(seen), ..self }
    }

    /// The same without progress.
    pub fn silent(self) -> Trial<'a> {
        Trial { silent: true, ..self }
    }

    /// The same where finished work is found and kept as always.
    pub fn resuming(self) -> Trial<'a> {
        Trial { resumes: true, ..self }
    }
}

impl Env for Trial<'_> {
    fn calibrate(&self, m: &Module, wanted: &[Value], sink: &mut CalibSink) -> Result<(), PassError> {
        self.env.calibrate(m, wanted, sink)
    }

    fn stream(&self) -> Result<Box<dyn Stream + '_>, PassError> {
        self.env.stream()
    }

    fn statistics(&self) -> Option<&Mutex<Option<Statistics>>> {
        Some(&self.statistics)
    }

    fn distance(&self, m: &Module) -> Result<Distance, PassError> {
        self.env.distance(m)
    }

    fn file_bytes(&self, m: &Module) -> Result<u64, PassError> {
        self.env.file_bytes(m)
    }

    fn scratch(&self, len: usize) -> Result<Box<dyn Scratch>, PassError> {
        self.env.scratch(len)
    }

    fn progress(&self, task: &str, total: u64) -> Box<dyn Progress> {
        if self.silent { Box::new(Silent) } else { self.env.progress(task, total) }
    }

    fn quantized(
        &self,
        value: Value,
        weight: &dyn Fn() -> Result<Tensor, PassError>,
    ) -> Result<(), PassError> {
        self.quantized.map_or(Ok(()), |seen| seen(value, weight))
    }

    fn store(&self) -> Option<&dyn Store> {
        if self.resumes { self.env.store() } else { None }
    }
}

struct Silent;

impl Progress for Silent {
    fn advance(&self, _: u64) -> bool {
        true
    }
}
