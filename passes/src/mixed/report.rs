//! What `mixed` found: the costs it measured, the frontier, and the recipe it took.

use super::choice::Choice;
use super::recipe::{Line, Recipe};
use super::solver::{Frontier, Sum};
use crate::Distance;
use serde::Serialize;

/// Points of a frontier that are kept for the report; of more, as many at equal distances.
const MAX_POINTS: usize = 2000;

/// What a search found. Costs are KL divergences from the float model, in nats; sums of them are predictions.
#[derive(Clone, Debug, Serialize)]
pub struct Mix {
    /// What was asked for, such as `budget=5.2bits`.
    pub asked: String,
    /// How the recipe was chosen: `dp` or `greedy`.
    pub solver: String,
    /// How costs were found: `kl` or `gram`.
    pub measure: String,
    /// Whether it is certain that no other recipe within the budget has a lower prediction.
    pub exact: bool,
    /// Weights (elements) of all layers.
    pub weights: u64,
    /// The choices, in the order of `layers[..].costs` and of the frontier's `picks`.
    pub choices: Vec<Choice>,
    /// The layers, in program order.
    pub layers: Vec<LayerCosts>,
    /// The recipe that was taken.
    pub taken: Taken,
    /// What the other solver would have taken.
    pub other: Option<Taken>,
    /// All layers with one choice.
    pub uniform: Vec<Uniform>,
    /// Recipes that no other one beats.
    pub frontier: Points,
    /// Recipes whose distance was measured before one was taken.
    pub measured_recipes: usize,
}

/// A layer: a weight, or weights that share a choice.
#[derive(Clone, Debug, Serialize)]
pub struct LayerCosts {
    /// Weights and the nodes that use them first.
    pub weights: Vec<(String, String)>,
    /// Bytes and costs of the choices; `None` for one that cannot be had.
    pub costs: Vec<Option<Cost>>,
}

/// What a choice means for a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Codes, scales and zero points, or the float weight.
    pub bytes: u64,
    /// What the output file grows by, from that of the float model; only where a size of the file was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<i64>,
    /// What it adds to the KL divergence.
    pub kl: f64,
}

/// A choice for every layer.
#[derive(Clone, Debug, Serialize)]
pub struct Taken {
    /// Bytes of all layers.
    pub bytes: u64,
    /// The same for each weight, in bits.
    pub bits: f64,
    /// Bytes of the output file, where a size was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_bytes: Option<u64>,
    /// The predicted KL divergence: the sum of the layers'.
    pub predicted: f64,
    /// What was measured of the model.
    pub measured: Option<Distance>,
    /// The index of each layer's choice.
    pub picks: Vec<usize>,
}

/// All layers with one choice.
#[derive(Clone, Debug, Serialize)]
pub struct Uniform {
    /// The choice.
    pub choice: Choice,
    /// Bits of each weight.
    pub bits: f64,
    /// The sum of the layers' costs.
    pub predicted: f64,
    /// The KL divergence that was measured.
    pub measured: f64,
}

/// The frontier, from the fewest bytes to the least cost.
#[derive(Clone, Debug, Serialize)]
pub struct Points {
    /// How many points it has; more than are listed when it is long.
    pub total: usize,
    /// Whether all of them were found.
    pub exact: bool,
    /// What their bytes are: of the `weights`, or of the output `file`.
    pub of: &'static str,
    /// The points.
    pub points: Vec<Point>,
}

/// A point of the frontier.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// Bytes.
    pub bytes: u64,
    /// The predicted KL divergence.
    pub predicted: f64,
    /// The index of each layer's choice.
    pub picks: Vec<usize>,
}

impl Points {
    /// The points of a frontier, whose bytes are `base` more than its sums say.
    pub(super) fn new(frontier: &Frontier, base: i64, of: &'static str) -> Points {
        let total = frontier.points.len();
        let shown = total.min(MAX_POINTS);
        let index = |i: usize| if shown < 2 { 0 } else { i * (total - 1) / (shown - 1) };
        let point = |i: usize| {
            let s = frontier.solution(i);
            Point { bytes: bytes(s.sum, base), predicted: s.sum.cost, picks: s.picks }
        };
        let points = (0..shown).map(|i| point(index(i))).collect();
        Points { total, exact: frontier.exact, of, points }
    }
}

/// The bytes of a sum, `base` added.
pub(super) fn bytes(sum: Sum, base: i64) -> u64 {
    u64::try_from(sum.bytes + base).unwrap_or(0)
}

impl Mix {
    /// The recipe that was taken.
    pub fn recipe(&self) -> Recipe {
        let lines = self.layers.iter().zip(&self.taken.picks).flat_map(|(layer, &pick)| {
            let cost = layer.costs[pick].unwrap_or_default();
            let several = layer.weights.len() > 1;
            layer.weights.iter().map(move |(weight, node)| Line {
                weight: weight.clone(),
                node: node.clone(),
                choice: self.choices[pick].clone(),
                // The costs of layers that share a choice are those of all of them.
                bytes: (!several).then_some(cost.bytes),
                kl: (!several).then_some(cost.kl),
            })
        });
        Recipe { layers: lines.collect() }
    }
}
