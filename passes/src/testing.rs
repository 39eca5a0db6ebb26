//! What tests of passes share: an outside world without data.

use crate::{CalibSink, Distance, Env, PassError, Progress, Scratch};
use bytes::Bytes;
use dialects::ir::{Module, TensorSource, Value};
use std::sync::Arc;

/// Scratch space in memory, and nothing else.
pub struct NoData;

impl Env for NoData {
    fn calibrate(&self, _: &Module, _: &[Value], _: &mut CalibSink) -> Result<(), PassError> {
        Err(PassError::Env("no data".into()))
    }

    fn distance(&self, _: &Module) -> Result<Distance, PassError> {
        Err(PassError::Env("no data".into()))
    }

    fn scratch(&self, len: usize) -> Result<Box<dyn Scratch>, PassError> {
        Ok(Box::new(Buffer(vec![0; len])))
    }

    fn progress(&self, _: &str, _: u64) -> Box<dyn Progress> {
        Box::new(NoData)
    }
}

impl Progress for NoData {
    fn advance(&self, _: u64) -> bool {
        true
    }
}

struct Buffer(Vec<u8>);

impl Scratch for Buffer {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn freeze(self: Box<Self>) -> Arc<dyn TensorSource> {
        Arc::new(Bytes::from(self.0))
    }
}
