//! What passes did and what they left: the material of the driver's table and of `--json`.

use crate::mixed::Mix;
use dialects::ir::{OpName, Symbol};
use serde::Serialize;
use std::collections::BTreeMap;

/// One weight that was quantized, filled in by the passes that work on it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WeightReport {
    /// The weight's name.
    pub weight: String,
    /// The source node of the op that uses it.
    pub node: String,
    /// Outputs.
    pub n: usize,
    /// Inputs; groups run along them.
    pub k: usize,
    /// The method, such as `rtn` or `awq`.
    pub method: String,
    /// Bits per code.
    pub bits: u32,
    /// Weights that share one scale.
    pub group_size: usize,
    /// Bytes of the weight before.
    pub bytes_before: u64,
    /// Bytes of codes, scales and zero points in the form that is written.
    pub bytes_after: u64,
    /// |W - Q(W)|, Frobenius.
    pub frobenius_error: f64,
    /// |W - Q(W)| / |W|, Frobenius.
    pub weight_error: f64,
    /// |XW - XQ(W)| / |XW| on the calibration data, Frobenius; `None` without calibration.
    pub output_error: Option<f64>,
    /// What else is to be known of it: where its scale went, that it was clipped.
    pub notes: Vec<String>,
}

/// A weight-bearing op that stays as it was.
#[derive(Clone, Debug, Serialize)]
pub struct Left {
    /// The source node.
    pub node: Symbol,
    /// The op.
    pub op: String,
    /// Why.
    pub why: String,
}

/// What a pipeline reports.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Quantized weights, in program order.
    pub weights: Vec<WeightReport>,
    /// What stays float, each node once with the last reason given.
    pub left: Vec<Left>,
    /// Things a user should know, in order.
    pub warnings: Vec<String>,
    /// Things a user may want to know, in order.
    pub notes: Vec<String>,
    /// What `mixed` found.
    pub mix: Option<Mix>,
    /// Counters, for `--stats`.
    pub counts: BTreeMap<String, u64>,
}

impl Report {
    /// Counts something.
    pub fn count(&mut self, what: &str, n: u64) {
        *self.counts.entry(what.to_string()).or_default() += n;
    }

    /// Notes an op that stays as it was.
    pub fn leave(&mut self, node: Symbol, op: OpName, why: String) {
        self.left.retain(|l| l.node != node || l.op != op.as_str());
        self.left.push(Left { node, op: op.to_string(), why });
    }

    /// Adds a warning, once.
    pub fn warn(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }

    /// Adds a note, once.
    pub fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// The entry of the weight used at `node`, to be filled in further.
    pub fn weight_at(&mut self, node: &str, weight: &str) -> Option<&mut WeightReport> {
        self.weights.iter_mut().find(|w| w.node == node && w.weight == weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_left_once_with_the_last_reason() {
        let mut r = Report::default();
        r.leave("n".into(), OpName::new("onnx", "MatMul"), "first".into());
        r.leave("n".into(), OpName::new("onnx", "MatMul"), "second".into());
        assert_eq!(r.left.len(), 1);
        assert_eq!(r.left[0].why, "second");
    }
}
