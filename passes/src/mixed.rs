//! `mixed`: bits where they matter. Each layer gets one of several choices (bits, group, method), so that the KL
//! divergence of the model's output is least within a budget of real bytes.
//!
//! What a choice does to a layer is measured once, with that layer alone quantized, and costs of layers are taken to add
//! up. On that model the answer is exact ([`solver`]); how far the model is true is in the report, which has the
//! prediction beside what was measured of the result.
//!
//! Sizes are those of the written form: the passes that follow run on copies ([`finish`]).

mod amount;
mod apply;
mod choice;
mod costs;
mod finish;
mod recipe;
mod report;
mod search;
pub mod solver;

pub use amount::{Bits, Growth, Size};
pub use choice::{Choice, Method};
pub use recipe::{Line, Recipe};
pub use report::{Cost, LayerCosts, Mix, Point, Points, Taken, Uniform};

use crate::linear::{Form, KERNEL_HINT};
use crate::quantize::{Shared, candidates};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError, Report, computed};
use costs::Question;
use dialects::ir::Module;
use search::{Layers, Target};
use serde::{Deserialize, Serialize};

/// The pass and its options. One of `budget`, `size` and `ppl` says how much may be used.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Mixed {
    /// Bits for each weight that has choices: codes, scales and zero points.
    pub budget: Option<Bits>,
    /// Bytes of the whole output file.
    pub size: Option<Size>,
    /// What perplexity may grow by.
    pub ppl: Option<Growth>,
    /// What a layer may become.
    pub choices: Vec<Choice>,
    /// How codes are found, where a choice does not say it.
    pub method: Method,
    /// How one choice for each layer is found.
    pub solver: Solver,
    /// How costs are found.
    pub measure: Measure,
    /// Whether layers that multiply one value, such as q, k and v, have one choice together.
    pub fused: bool,
    /// Which weights.
    #[serde(flatten)]
    pub filter: Filter,
    /// What each layer becomes, instead of a search. The command line reads it from a file (`--recipe`).
    #[serde(skip_serializing)]
    pub recipe: Option<Recipe>,
}

/// How one choice for each layer is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Solver {
    /// Dynamic programming: nothing within the budget is predicted to be better.
    #[default]
    Dp,
    /// What saves the most for a byte, step by step.
    Greedy,
}

/// How costs are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// The model runs with each layer quantized alone, for each choice.
    #[default]
    Kl,
    /// The model runs for each choice alone; layers share what that costs by the errors of their outputs. Fast, and
    /// rough: it does not know which layers the output depends on.
    Gram,
}

/// The pass's name.
pub const NAME: &str = "mixed";

impl Default for Mixed {
    fn default() -> Mixed {
        let choices = ["2/32", "4/128", "4/32", "4/16", "8/128", "16"];
        let choice = |text: &str| Choice::parse(text).expect("the default choices are some");
        Mixed {
            budget: None,
            size: None,
            ppl: None,
            choices: choices.map(choice).into(),
            method: Method::default(),
            solver: Solver::default(),
            measure: Measure::default(),
            fused: false,
            filter: Filter::default(),
            recipe: None,
        }
    }
}

impl Pass for Mixed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "quantizes each weight with the bits that it needs, within a budget of bytes"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn consumes(&self) -> OpSet {
        crate::rtn::Rtn::default().consumes()
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["quant.dequantize", "onnx.Cast"])
    }

    fn compensates(&self) -> bool {
        true
    }

    fn needs_calibration(&self) -> bool {
        self.recipe.as_ref().is_none_or(|r| r.needs_data(self.method))
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        computed::fold(m, cx, &self.filter, &[Form::Rows, Form::Columns, Form::Kernel]);
        let weights = candidates(m, cx, &self.filter, true);
        if weights.is_empty() && cx.settings.allow_noop {
            return Ok(Changed::No);
        }
        if weights.is_empty() {
            let why = "no weight of a MatMul, Gemm, Conv or recurrent op is left to quantize".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        match &self.recipe {
            Some(recipe) => self.replay(m, cx, &weights, recipe)?,
            None => self.search(m, cx, &weights)?,
        }
        Ok(Changed::Yes)
    }
}

impl Mixed {
    /// What is asked for: one of three options.
    fn target(&self) -> Result<Target, PassError> {
        let given =
            [self.budget.map(Target::Bits), self.size.map(Target::Size), self.ppl.map(Target::Growth)];
        let mut given = given.into_iter().flatten();
        let wrong = |why: &str| PassError::Option { pass: NAME, option: "budget", why: why.into() };
        match (given.next(), given.next()) {
            (Some(target), None) => Ok(target),
            (None, _) => Err(wrong("expected budget=5.2bits, size=35MB or ppl=+1%, found none of them")),
            _ => Err(wrong("expected one of budget, size and ppl, found several")),
        }
    }

    /// Does what a recipe says.
    fn replay(
        &self,
        m: &mut Module,
        cx: &mut PassCx,
        weights: &[Shared],
        recipe: &Recipe,
    ) -> Result<(), PassError> {
        if self.target().is_ok() {
            let option = if self.budget.is_some() {
                "budget"
            } else if self.size.is_some() {
                "size"
            } else {
                "ppl"
            };
            let why = "a recipe leaves nothing to choose".into();
            return Err(PassError::Option { pass: NAME, option, why });
        }
        let mut report = Report::default();
        let mut all = PassCx { report: &mut report, rest: &[], ..*cx };
        let every = candidates(m, &mut all, &Filter::default(), true);
        let chosen = recipe.choices(m, &every)?;
        // What the filter excludes stays float, whatever the recipe says.
        let of = |w: &Shared| {
            let at = every.iter().position(|e| e.first().op == w.first().op && e.label(m) == w.label(m));
            let choice = at.and_then(|at| chosen[at].clone());
            choice.map(|c| c.with(self.method)).ok_or_else(|| "the recipe leaves it out".to_string())
        };
        let chosen: Vec<Result<Choice, String>> = weights.iter().map(of).collect();
        if let n @ 1.. = chosen.iter().filter(|c| c.is_err()).count() {
            let layers = if n == 1 { "weight that stays" } else { "weights that stay" };
            cx.report.warn(format!("the recipe leaves out {n} {layers} float"));
        }
        apply::apply(m, cx, weights, &chosen)
    }

    /// Measures, chooses, and quantizes.
    fn search(&self, m: &mut Module, cx: &mut PassCx, weights: &[Shared]) -> Result<(), PassError> {
        let target = self.target()?;
        let mut choices: Vec<Choice> = Vec::new();
        for choice in self.choices.iter().map(|c| c.with(self.method)) {
            if !choices.contains(&choice) {
                choices.push(choice);
            }
        }
        if choices.is_empty() {
            let why = "expected at least one, such as 4/32".into();
            return Err(PassError::Option { pass: NAME, option: "choices", why });
        }
        let question = Question {
            weights,
            choices: &choices,
            filter: &self.filter,
            measure: self.measure,
            files: matches!(target, Target::Size(_)),
        };
        let table = question.answer(m, cx)?;
        let layers = Layers::new(m, weights, &choices, table, self.fused);
        let found = layers.search(m, cx, target, self.solver, self.measure)?;
        let chosen: Vec<Result<Choice, String>> = (0..weights.len())
            .map(|w| layers.choice(&found.taken.picks, w).ok_or_else(|| none_fits(m, &weights[w])))
            .collect();
        apply::apply(m, cx, weights, &chosen)?;
        let mut found = found;
        found.taken.measured = Some(cx.env.distance(m)?);
        if let Target::Size(size) = target {
            let reports = cx.report.weights.clone();
            let bytes = finish::finished(m, cx, reports)?.bytes(cx)?;
            if bytes > size.0 {
                let why = format!("this is a bug: the file would take {bytes} bytes, more than {}", size.0);
                return Err(PassError::Env(why));
            }
            found.taken.file_bytes = Some(bytes);
        }
        found.notes().into_iter().for_each(|n| cx.report.note(n));
        cx.report.mix = Some(found);
        Ok(())
    }
}

/// Why a weight has none of the choices.
fn none_fits(m: &Module, w: &Shared) -> String {
    match w.first().form {
        Form::Kernel => format!("{} {KERNEL_HINT}; no choice is of that kind", m.ops[w.first().op].name.op()),
        _ => "none of the choices can be had for it".into(),
    }
}

#[cfg(test)]
mod tests;
