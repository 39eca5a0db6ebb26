//! What a run reports: the table of weights, what stayed float and why, totals, warnings; or all of it as JSON.

pub mod frontier;
pub mod paint;
mod table;

use paint::Painter;

use crate::driver::Ran;
use crate::pipeline::Pipeline;
use dialects::ir::Module;
use passes::linear::{KERNEL_HINT, Weighted, find, size};
use passes::{Report, WeightReport};
use serde::Serialize;

/// A weight-bearing op that is float in the end.
#[derive(Clone, Debug, Serialize)]
pub struct Float {
    /// The source node.
    pub node: String,
    /// The op.
    pub op: String,
    /// The weight's name.
    pub weight: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its bytes.
    pub bytes: u64,
    /// Why it stays.
    pub why: String,
    /// Whether the user asked for it (`only`, `skip`).
    pub asked: bool,
}

/// Sizes and times of a whole run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Totals {
    /// Bytes of all input files.
    pub input_bytes: u64,
    /// Bytes of all output files; `None` when nothing was written.
    pub output_bytes: Option<u64>,
    /// Weights that were quantized.
    pub quantized_weights: u64,
    /// Their bytes * 8 / their number, codes, scales and zero points together.
    pub bits_per_weight: Option<f64>,
    /// Wall time of the run, from start to the renamed output.
    pub seconds: f64,
}

/// Everything that a run reports.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// The model.
    pub input: String,
    /// What was written.
    pub output: Option<String>,
    /// The pipeline with every option.
    pub recipe: String,
    /// The calibration data.
    pub calibration: Option<String>,
    /// Quantized weights.
    pub weights: Vec<WeightReport>,
    /// Weight-bearing ops that are float in the end.
    pub float: Vec<Float>,
    /// Totals.
    pub totals: Totals,
    /// The passes that ran.
    pub passes: Vec<Ran>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// What the user may want to know.
    pub notes: Vec<String>,
}

/// Which optional parts of the text to show.
#[derive(Clone, Copy, Debug, Default)]
pub struct Show {
    /// Time per pass.
    pub timing: bool,
    /// What passes counted.
    pub stats: bool,
    /// The errors of every weight after each step, in place of its bytes.
    pub layers: bool,
}

impl Totals {
    /// Counts the quantized weights.
    pub fn weights(&mut self, report: &Report) {
        self.quantized_weights = report.weights.iter().map(|w| w.n as u64 * w.k as u64).sum();
        let bytes: u64 = report.weights.iter().map(|w| w.bytes_after).sum();
        let per = bytes as f64 * 8.0 / self.quantized_weights as f64;
        self.bits_per_weight = (self.quantized_weights > 0).then_some(per);
    }
}

/// Every weight-bearing op of `m` that is float, with the reason that a pass gave or that its form gives.
pub fn float(m: &Module, pipeline: &Pipeline, report: &Report) -> Vec<Float> {
    let filters: Vec<_> = pipeline.steps.iter().filter_map(|s| s.filter()).collect();
    let row = |w: Weighted| {
        let (op, weight, reason) = match w {
            Weighted::Linear(l) => (l.op, l.weight, "no pass of the pipeline quantizes it".to_string()),
            Weighted::Kernel(l) => (l.op, l.weight, format!("{} {KERNEL_HINT}", m.ops[l.op].name.op())),
            Weighted::Other { op, weight, why, .. } => (op, weight, why),
            Weighted::Kept { .. } => return None,
        };
        let data = &m.ops[op];
        let (shape, bytes) = size(m, weight);
        let name = m.value_label(weight);
        // Stored in fewer bits, but float: it stands among the quantized weights.
        let stored = |w: &WeightReport| name.strip_prefix(&*w.weight).is_some_and(|s| s.starts_with(".f16"));
        if report.weights.iter().any(|w| w.bits >= 16 && stored(w)) {
            return None;
        }
        let said = report.left.iter().find(|l| l.node == data.loc && l.op == data.name.as_str());
        let asked = filters.iter().find_map(|f| f.refuses(&[&data.loc, &name], &data.name));
        Some(Float {
            node: data.loc.to_string(),
            op: data.name.to_string(),
            weight: name,
            shape,
            bytes,
            asked: asked.is_some(),
            why: asked.or(said.map(|l| l.why.clone())).unwrap_or(reason),
        })
    };
    find(m).into_iter().filter_map(row).collect()
}

impl Summary {
    /// As text.
    pub fn text(&self, show: Show, painter: &Painter) -> String {
        table::render(self, show, painter)
    }

    /// As JSON.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a summary is plain data")
    }
}
