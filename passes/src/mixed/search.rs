//! From costs to a recipe: layers as items of the [`solver`], and the three ways to say how much may be used.

use super::apply::apply;
use super::choice::Choice;
use super::costs::Table;
use super::finish::finished;
use super::report::{Cost, LayerCosts, Mix, Points, Taken, Uniform, bytes};
use super::solver::{self, Frontier, Offer, Solution, Sum};
use super::{Bits, Growth, Measure, NAME, Size, Solver};
use crate::linear::Form;
use crate::quantize::Shared;
use crate::trial::Trial;
use crate::{Distance, PassCx, PassError, Report};
use dialects::ir::Module;
use std::collections::BTreeMap;

/// How much may be used.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// Bits for each weight.
    Bits(Bits),
    /// Bytes of the output file.
    Size(Size),
    /// What perplexity may grow by.
    Growth(Growth),
}

/// Two recipes whose bytes differ by no more than this share are one to the search by perplexity.
const SAME: f64 = 0.001;

/// Layers and their choices.
pub(super) struct Layers<'a> {
    weights: &'a [Shared],
    choices: &'a [Choice],
    /// Which weights make a layer.
    layers: Vec<Vec<usize>>,
    costs: Vec<LayerCosts>,
    uniform: Vec<Option<f64>>,
    base: Option<u64>,
    /// Weights (elements) of all layers.
    elements: u64,
}

impl<'a> Layers<'a> {
    /// The layers of weights that have a choice at all; with `fused`, weights that multiply one value are one.
    pub(super) fn new(
        m: &Module,
        weights: &'a [Shared],
        choices: &'a [Choice],
        table: Table,
        fused: bool,
    ) -> Layers<'a> {
        let mut layers: Vec<Vec<usize>> = Vec::new();
        let joins = |a: &Shared, b: &Shared| {
            let rows = |w: &Shared| w.uses.iter().all(|l| l.form == Form::Rows && l.x == a.first().x);
            fused && rows(a) && rows(b)
        };
        for (i, w) in weights.iter().enumerate() {
            if table.costs[i].iter().all(Option::is_none) {
                continue;
            }
            match layers.iter_mut().find(|l| joins(&weights[l[0]], w)) {
                Some(layer) => layer.push(i),
                None => layers.push(vec![i]),
            }
        }
        let sum = |layer: &Vec<usize>, c: usize| {
            layer.iter().try_fold(Cost::default(), |sum, &w| {
                let cost = table.costs[w][c]?;
                let file = table.base.map(|_| sum.file.unwrap_or(0) + cost.file.unwrap_or(0));
                Some(Cost { bytes: sum.bytes + cost.bytes, file, kl: sum.kl + cost.kl })
            })
        };
        let name = |&w: &usize| (weights[w].label(m), m.ops[weights[w].first().op].loc.to_string());
        let of = |layer: &Vec<usize>| LayerCosts {
            weights: layer.iter().map(name).collect(),
            costs: (0..choices.len()).map(|c| sum(layer, c)).collect(),
        };
        let mut costs: Vec<LayerCosts> = layers.iter().map(of).collect();
        // Weights of one layer may have no choice in common.
        let mut i = 0;
        layers.retain(|_| {
            i += 1;
            costs[i - 1].costs.iter().any(Option::is_some)
        });
        costs.retain(|l| l.costs.iter().any(Option::is_some));
        let size = |w: &usize| weights[*w].first().n as u64 * weights[*w].first().k as u64;
        let elements = layers.iter().flatten().map(size).sum();
        Layers { weights, choices, layers, costs, uniform: table.uniform, base: table.base, elements }
    }

    /// The choice for weight `w`, of the choices for all layers.
    pub(super) fn choice(&self, picks: &[usize], w: usize) -> Option<Choice> {
        let layer = self.layers.iter().position(|l| l.contains(&w))?;
        Some(self.choices[picks[layer]].clone())
    }

    /// Chooses.
    pub(super) fn search(
        &self,
        m: &Module,
        cx: &mut PassCx,
        target: Target,
        solver: Solver,
        measure: Measure,
    ) -> Result<Mix, PassError> {
        if self.layers.is_empty() {
            let why = "none of the choices can be had for any weight".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        let of_file = matches!(target, Target::Size(_));
        let offer = |(id, cost): (usize, &Option<Cost>)| {
            let cost = cost.as_ref()?;
            let bytes =
                if of_file { cost.file.unwrap_or(0) } else { i64::try_from(cost.bytes).unwrap_or(i64::MAX) };
            Some(Offer { id, bytes, cost: cost.kl })
        };
        let items: Vec<Vec<Offer>> =
            self.costs.iter().map(|l| l.costs.iter().enumerate().filter_map(offer).collect()).collect();
        let frontier = solver::frontier(&items);
        let base = if of_file { self.base.unwrap_or(0) as i64 } else { 0 };
        let mut work = Work { layers: self, m, items: &items, frontier: &frontier, solver, measured: 0 };
        let (asked, taken, other) = match target {
            Target::Bits(bits) => work.within_bits(cx, bits)?,
            Target::Size(size) => work.within_size(cx, size, base)?,
            Target::Growth(growth) => work.within_growth(cx, growth)?,
        };
        Ok(Mix {
            asked,
            solver: if solver == Solver::Dp { "dp" } else { "greedy" }.into(),
            measure: if measure == Measure::Kl { "kl" } else { "gram" }.into(),
            exact: taken.exact,
            weights: self.elements,
            choices: self.choices.to_vec(),
            taken: self.taken(&taken),
            other: other.map(|s| self.taken(&s)),
            uniform: self.uniforms(),
            frontier: Points::new(&frontier, base, if of_file { "file" } else { "weights" }),
            layers: self.costs.clone(),
            measured_recipes: work.measured,
        })
    }

    fn taken(&self, s: &Solution) -> Taken {
        let cost = |(layer, &pick): (&LayerCosts, &usize)| layer.costs[pick].unwrap_or_default().bytes;
        let bytes = self.costs.iter().zip(&s.picks).map(cost).sum();
        let picks = s.picks.clone();
        Taken {
            bytes,
            bits: self.bits(bytes),
            file_bytes: None,
            predicted: s.sum.cost,
            measured: None,
            picks,
        }
    }

    fn bits(&self, bytes: u64) -> f64 {
        bytes as f64 * 8.0 / self.elements as f64
    }

    /// The choices that all layers can have.
    fn uniforms(&self) -> Vec<Uniform> {
        let all = |c: usize| {
            let costs: Vec<Cost> = self.costs.iter().map(|l| l.costs[c]).collect::<Option<_>>()?;
            Some(Uniform {
                choice: self.choices[c].clone(),
                bits: self.bits(costs.iter().map(|c| c.bytes).sum()),
                predicted: costs.iter().map(|c| c.kl).sum(),
                measured: self.uniform[c].unwrap_or(0.0),
            })
        };
        (0..self.choices.len()).filter_map(all).collect()
    }
}

/// What is asked for in words, what is taken, and what the other solver would have taken.
type Found = (String, Solution, Option<Solution>);

/// One search.
struct Work<'a> {
    layers: &'a Layers<'a>,
    m: &'a Module,
    items: &'a solver::Items,
    frontier: &'a Frontier,
    solver: Solver,
    /// Recipes whose distance was measured.
    measured: usize,
}

impl Work<'_> {
    /// The answers of the solver that is asked for and of the other one.
    fn solve(&self, budget: i64) -> Option<(Solution, Option<Solution>)> {
        let dp = solver::solve(self.items, budget, self.frontier);
        let greedy = solver::greedy(self.items, budget);
        match self.solver {
            Solver::Dp => Some((dp?, greedy)),
            Solver::Greedy => Some((greedy?, dp)),
        }
    }

    fn within_bits(&mut self, cx: &mut PassCx, bits: Bits) -> Result<Found, PassError> {
        let budget = (bits.0 * self.layers.elements as f64 / 8.0).floor();
        let budget = if budget < i64::MAX as f64 { budget as i64 } else { i64::MAX };
        let Some((taken, other)) = self.solve(budget) else {
            let least = self.layers.bits(solver::smallest(self.items).unsigned_abs());
            // Rounded up, so that it can be asked for.
            let least = (least * 1000.0).ceil() / 1000.0;
            let why = format!("the smallest choices take {least} bits for each weight, found {bits}");
            return Err(PassError::Option { pass: NAME, option: "budget", why });
        };
        let taken = self.or_uniform(cx, taken, budget)?;
        Ok((format!("budget={bits}"), taken, other))
    }

    /// What was predicted to be the best, unless a model with one choice for all layers, which was measured anyway, is
    /// measured to be better.
    fn or_uniform(&mut self, cx: &mut PassCx, taken: Solution, budget: i64) -> Result<Solution, PassError> {
        let uniform = |id: usize| {
            let offers = self.items.iter().map(|offers| offers.iter().find(|o| o.id == id));
            let sum =
                offers.collect::<Option<Vec<&Offer>>>()?.into_iter().fold(Sum::default(), |s, o| s.plus(o));
            let kl = self.layers.uniform[id].filter(|_| sum.bytes <= budget)?;
            Some((kl, id, Solution { sum, picks: vec![id; self.items.len()], exact: false }))
        };
        let all = (0..self.layers.choices.len()).filter_map(uniform);
        let Some((kl, id, other)) = all.min_by(|a, b| a.0.total_cmp(&b.0)) else { return Ok(taken) };
        self.measured += 1;
        let measured = self.trial(cx, &taken, |m, cx, _| cx.env.distance(m))?.kl;
        if measured <= kl {
            return Ok(taken);
        }
        let choice = &self.layers.choices[id];
        cx.report.warn(format!(
            "mixed: the recipe of the best prediction, {:.6} nats, measures {measured:.6}; {choice} for all layers \
             measures {kl:.6} and is taken instead",
            taken.sum.cost
        ));
        Ok(other)
    }

    /// What files take is nearly the sum of what layers add. The rest is found out by making the file: as long as it is
    /// too large, the budget shrinks by what is too much.
    fn within_size(&mut self, cx: &mut PassCx, size: Size, base: i64) -> Result<Found, PassError> {
        let size_limit = i64::try_from(size.0).unwrap_or(i64::MAX);
        let smallest = solver::smallest(self.items);
        let mut budget = (size_limit - base).max(smallest);
        loop {
            let Some((taken, other)) = self.solve(budget) else {
                let why = "no choice for every layer fits".into();
                return Err(PassError::Option { pass: NAME, option: "size", why });
            };
            let file = self.trial(cx, &taken, |m, cx, report| finished(m, cx, report.weights)?.bytes(cx))?;
            let over = i64::try_from(file).unwrap_or(i64::MAX).saturating_sub(size_limit);
            if over <= 0 {
                return Ok((format!("size={size}"), taken, other));
            }
            if taken.sum.bytes <= smallest {
                let why = format!("the smallest choices make a file of {}, found {size}", Size(file));
                return Err(PassError::Option { pass: NAME, option: "size", why });
            }
            budget = (budget - over).min(taken.sum.bytes - 1).max(smallest);
        }
    }

    /// The first point of the frontier whose perplexity, as measured, has grown by no more than is allowed. The search
    /// halves the frontier, so it takes perplexity to fall along it.
    fn within_growth(&mut self, cx: &mut PassCx, growth: Growth) -> Result<Found, PassError> {
        let frontier = self.frontier;
        let points = &frontier.points;
        let (mut low, mut high) = (0, points.len() - 1);
        let at_most = self.growth_at(cx, high)?;
        if at_most > growth.0 {
            let bits = self.layers.bits(bytes(points[high], 0));
            let why = format!(
                "it cannot be met: with the best choice for every layer, {bits:.3} bits for each weight, perplexity \
                 grows by {:.2} %",
                at_most * 100.0
            );
            return Err(PassError::Option { pass: NAME, option: "ppl", why });
        }
        if self.growth_at(cx, low)? <= growth.0 {
            high = low;
        }
        let same = |low: usize, high: usize| {
            (points[high].bytes - points[low].bytes) as f64 <= SAME * points[high].bytes as f64
        };
        while high - low > 1 && !same(low, high) {
            // Halved by bytes: most points lie close together, where there are many ways to choose.
            let bytes = points[low].bytes + (points[high].bytes - points[low].bytes) / 2;
            let middle = points.partition_point(|p| p.bytes < bytes).clamp(low + 1, high - 1);
            match self.growth_at(cx, middle)? <= growth.0 {
                true => high = middle,
                false => low = middle,
            }
        }
        let taken = frontier.solution(high);
        let other = solver::greedy(self.items, taken.sum.bytes);
        Ok((format!("ppl={growth}"), taken, other))
    }

    /// What perplexity grows by at a point of the frontier.
    fn growth_at(&mut self, cx: &mut PassCx, point: usize) -> Result<f64, PassError> {
        self.measured += 1;
        let distance = self.trial(cx, &self.frontier.solution(point), |m, cx, _| cx.env.distance(m))?;
        let Distance { perplexity: Some(after), baseline_perplexity: Some(before), .. } = distance else {
            let why = "the data predicts no tokens, so that there is no perplexity".into();
            return Err(PassError::Option { pass: NAME, option: "ppl", why });
        };
        // Written so that a NaN is too much.
        let growth = after / before - 1.0;
        Ok(if growth.is_nan() { f64::INFINITY } else { growth })
    }

    /// Makes a recipe on a copy, and looks at it.
    fn trial<T>(
        &self,
        cx: &PassCx,
        solution: &Solution,
        look: impl FnOnce(&Module, &PassCx, Report) -> Result<T, PassError>,
    ) -> Result<T, PassError> {
        let mut m = self.m.clone();
        let mut report = Report::default();
        let env = Trial::new(cx.env).silent();
        let of = |w| self.layers.choice(&solution.picks, w).ok_or_else(String::new);
        let chosen: Vec<Result<Choice, String>> = (0..self.layers.weights.len()).map(of).collect();
        let mut inner = PassCx { env: &env, report: &mut report, ..*cx };
        apply(&mut m, &mut inner, self.layers.weights, &chosen)?;
        let mut empty = Report::default();
        look(&m, &PassCx { report: &mut empty, ..*cx }, report)
    }
}

impl Mix {
    /// What was found, in words.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        for (layer, &pick) in self.layers.iter().zip(&self.taken.picks) {
            *counts.entry(pick).or_default() += layer.weights.len();
        }
        let counts: Vec<String> = counts.iter().map(|(&c, n)| format!("{n} x {}", self.choices[c])).collect();
        let t = &self.taken;
        let measured = t.measured.map(|d| format!(", measured {:.6}", d.kl)).unwrap_or_default();
        let mut out = vec![
            format!("mixed for {}: {}", self.asked, counts.join(", ")),
            format!(
                "mixed: {:.3} bits for each weight; KL divergence predicted {:.6}{measured} nats",
                t.bits, t.predicted
            ),
        ];
        if let Some(file) = t.file_bytes {
            out.push(format!("mixed: a file of {}", Size(file)));
        }
        if let Some(other) = &self.other {
            let name = if self.solver == "dp" { "greedy" } else { "dp" };
            out.push(format!(
                "mixed: solver={name} would be predicted {:.6} at {:.3} bits",
                other.predicted, other.bits
            ));
        }
        if !self.frontier.exact && !self.exact && self.solver == "dp" {
            out.push("mixed: there were more sums than fit in memory; a better recipe may exist".into());
        }
        out
    }
}
