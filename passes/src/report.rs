//! What passes did and what they left: the material of the driver's table and of `--json`.

use crate::eqsat::explain::Chain;
use crate::errors::{StepErrors, WeightErrors};
use crate::mixed::Mix;
use dialects::ir::{OpName, Symbol};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One weight that was quantized, filled in by the passes that work on it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
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
    /// The largest |w - q|.
    pub max_error: f64,
    /// The mean of |w - q|.
    pub mean_error: f64,
    /// |XW - XQ(W)| / |XW| on the calibration data, Frobenius; `None` without calibration.
    pub output_error: Option<f64>,
    /// Rows of calibration data that reached its inputs; `None` without calibration.
    pub rows: Option<u64>,
    /// The errors after each step of the method, in order; the last are those above.
    pub steps: Vec<StepErrors>,
    /// The constant that holds it now, where another pass may take that for a weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
    /// What else is to be known of it: where its scale went, that it was clipped.
    pub notes: Vec<String>,
}

impl WeightReport {
    /// Puts the errors of the weight itself into it.
    pub fn set_errors(&mut self, e: &WeightErrors) {
        self.frobenius_error = e.frobenius;
        self.weight_error = e.relative;
        self.max_error = e.max;
        self.mean_error = e.mean;
    }
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
    /// By which rules values came to be computed as they are, if that was asked for.
    pub chains: Vec<Chain>,
    /// Counters, for `--stats`.
    pub counts: BTreeMap<String, u64>,
}

/// How much a [`Report`] said at some point.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    weights: usize,
    warnings: usize,
    notes: usize,
}

/// What a [`Report`] said of some work, to be said again when the work is not.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Said {
    /// Quantized weights.
    pub weights: Vec<WeightReport>,
    /// Things a user should know.
    pub warnings: Vec<String>,
    /// Things a user may want to know.
    pub notes: Vec<String>,
}

impl Report {
    /// How much was said until now.
    pub fn mark(&self) -> Mark {
        Mark { weights: self.weights.len(), warnings: self.warnings.len(), notes: self.notes.len() }
    }

    /// What was said since.
    pub fn since(&self, mark: &Mark) -> Said {
        Said {
            weights: self.weights[mark.weights..].to_vec(),
            warnings: self.warnings[mark.warnings..].to_vec(),
            notes: self.notes[mark.notes..].to_vec(),
        }
    }

    /// Says it again.
    pub fn say(&mut self, said: Said) {
        self.weights.extend(said.weights);
        said.warnings.into_iter().for_each(|w| self.warn(w));
        said.notes.into_iter().for_each(|n| self.note(n));
    }

    /// Counts something.
    pub fn count(&mut self, what: &str, n: u64) {
        *self.counts.entry(what.to_string()).or_default() += n;
    }

    /// Notes an op that stays as it was.
    pub fn leave(&mut self, node: Symbol, op: OpName, why: String) {
        self.left.retain(|l| l.node != node || l.op != op.as_str());
        self.left.push(Left { node, op: op.to_string(), why });
    }

    /// Counts a weight once: what a pass made of a constant that another had made of a weight, it made of that weight.
    pub fn merge(&mut self) {
        for mut w in std::mem::take(&mut self.weights) {
            let became_it = |old: &WeightReport| old.node == w.node && old.stored.as_ref() == Some(&w.weight);
            if let Some(at) = self.weights.iter().position(became_it) {
                let before = self.weights.remove(at);
                w.bytes_before = before.bytes_before;
                w.notes.push(format!("{} of {}", before.method, before.weight));
            }
            self.weights.push(w);
        }
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

/// The first of a list of names, and how many more there are.
pub fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => format!("{one:?}"),
        [one, more @ ..] => format!("{one:?} and {} more", more.len()),
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
