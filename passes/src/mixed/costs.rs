//! What every choice costs every weight: bytes as they will be written, and KL divergence of the model's output, measured
//! with that weight alone quantized or estimated from the errors of the layers' outputs.

use super::Measure;
use super::choice::Choice;
use super::finish::finished;
use super::report::Cost;
use crate::errors::Judge;
use crate::gram::{self, Gram};
use crate::group::{rows, watched};
use crate::qtensor::QTensor;
use crate::quantize::{Shared, dequantize};
use crate::sensitivity::Variant;
use crate::{Filter, PassCx, PassError, Report, WeightReport};
use dialects::ir::{Module, Value};

/// The costs.
pub(super) struct Table {
    /// By weight and choice; `None` for a choice that cannot be had.
    pub costs: Vec<Vec<Option<Cost>>>,
    /// By choice: the KL divergence of the model whose weights all have it.
    pub uniform: Vec<Option<f64>>,
    /// Bytes of the output file with float weights, where files are measured.
    pub base: Option<u64>,
}

/// What costs are asked for.
pub(super) struct Question<'a> {
    pub weights: &'a [Shared],
    pub choices: &'a [Choice],
    pub filter: &'a Filter,
    pub measure: Measure,
    /// Whether bytes of the output file are wanted.
    pub files: bool,
}

/// A model with one choice made for all weights.
struct Candidate {
    choice: usize,
    variant: Variant,
    /// By switch of the variant, which weight it is.
    weights: Vec<usize>,
}

impl Question<'_> {
    /// Finds all costs: one measurement of the model's output for each weight and choice, or by [`Measure::Gram`] for
    /// each choice.
    pub(super) fn answer(&self, m: &Module, cx: &mut PassCx) -> Result<Table, PassError> {
        let float = |w: &Shared| Cost { bytes: m.consts[w.first().konst].byte_len(), ..Cost::default() };
        let stays = |c: &Choice, w| (*c == Choice::Float).then(|| float(w));
        let costs = self.weights.iter().map(|w| self.choices.iter().map(|c| stays(c, w)).collect()).collect();
        let mut table = Table { costs, uniform: vec![None; self.choices.len()], base: None };
        if self.files {
            table.base = Some(finished(m, cx, Vec::new())?.bytes(cx)?);
        }
        match self.measure {
            Measure::Kl => self.by_output(m, cx, &mut table)?,
            Measure::Gram => self.by_gram(m, cx, &mut table)?,
        }
        let mut lost = 0;
        for cost in table.costs.iter_mut().flatten() {
            if cost.is_some_and(|c| !c.kl.is_finite()) {
                *cost = None;
                lost += 1;
            }
        }
        if lost > 0 {
            cx.report.warn(format!(
                "{lost} choices for single weights make the model's output NaN or infinite; they are not taken"
            ));
        }
        Ok(table)
    }

    fn by_output(&self, m: &Module, cx: &mut PassCx, table: &mut Table) -> Result<(), PassError> {
        let total = (self.weights.len() + 1) * self.choices.iter().filter(|c| **c != Choice::Float).count();
        let progress = cx.env.progress("measuring choices", total as u64);
        let step = || if progress.advance(1) { Ok(()) } else { Err(PassError::Env("interrupted".into())) };
        for choice in 0..self.choices.len() {
            let Some(mut c) = self.candidate(m, cx, choice, table)? else { continue };
            table.uniform[choice] = Some(cx.env.distance(c.variant.all())?.kl);
            step()?;
            for (i, &w) in c.weights.iter().enumerate() {
                let kl = cx.env.distance(c.variant.only(i))?.kl;
                table.costs[w][choice].get_or_insert_default().kl = kl;
                step()?;
            }
        }
        Ok(())
    }

    /// The KL divergence of the model whose weights all have one choice is shared out over them by the squares of their
    /// outputs' relative errors, so that it is predicted as it was measured.
    fn by_gram(&self, m: &Module, cx: &mut PassCx, table: &mut Table) -> Result<(), PassError> {
        let mut candidates = Vec::new();
        for choice in 0..self.choices.len() {
            candidates.extend(self.candidate(m, cx, choice, table)?);
        }
        let mut values: Vec<(Value, usize)> = Vec::new();
        for w in self.weights.iter().filter(|w| watched(m, w)) {
            let value = (w.first().x, w.first().k);
            if !values.contains(&value) {
                values.push(value);
            }
        }
        let mut errors: Vec<Vec<Option<f64>>> =
            candidates.iter().map(|c| vec![None; c.weights.len()]).collect();
        for run in gram::runs(values, |&(_, k)| k, gram::BUDGET) {
            let grams = gram::collect(m, cx, &run, super::NAME)?;
            for (c, errors) in candidates.iter_mut().zip(&mut errors) {
                for (i, &w) in c.weights.iter().enumerate() {
                    let w = &self.weights[w];
                    if watched(m, w)
                        && let Some(gram) = grams.get(&w.first().x)
                    {
                        errors[i] = output_error2(m, w, c.variant.all(), gram)?;
                    }
                }
            }
        }
        for (mut c, errors) in candidates.into_iter().zip(errors) {
            let of_weight = |(e, w): (&Option<f64>, &WeightReport)| e.unwrap_or(w.weight_error.powi(2));
            let errors: Vec<f64> = errors.iter().zip(c.variant.weights()).map(of_weight).collect();
            let sum: f64 = errors.iter().sum();
            let kl = cx.env.distance(c.variant.all())?.kl;
            table.uniform[c.choice] = Some(kl);
            for (&w, error) in c.weights.iter().zip(errors) {
                let share = if sum > 0.0 { error / sum } else { 0.0 };
                table.costs[w][c.choice].get_or_insert_default().kl = kl * share;
            }
        }
        Ok(())
    }

    /// The model with a choice made for all weights, whose bytes go into the table; `None` when no weight can have it.
    fn candidate(
        &self,
        m: &Module,
        cx: &mut PassCx,
        choice: usize,
        table: &mut Table,
    ) -> Result<Option<Candidate>, PassError> {
        let made = self.choices[choice].pass(self.filter);
        let Some(pass) = made.map_err(PassError::Env)? else { return Ok(None) };
        let mut report = Report::default();
        let mut inner = PassCx { report: &mut report, rest: &[], ..*cx };
        let mut variant = match Variant::new(m, &mut inner, &*pass) {
            Err(PassError::Nothing { .. }) => return Ok(None),
            other => other?,
        };
        let is = |w: &Shared, r: &WeightReport| w.label(m) == r.weight && *m.ops[w.first().op].loc == *r.node;
        let find = |r: &WeightReport| self.weights.iter().position(|w| is(w, r));
        let weights: Option<Vec<usize>> = variant.weights().iter().map(find).collect();
        let Some(weights) = weights else {
            let why = format!("this is a bug: {} quantizes a weight that was not found before", pass.name());
            return Err(PassError::Env(why));
        };
        let reports = variant.weights().to_vec();
        let written = finished(variant.all(), cx, reports)?.report.weights;
        for (&w, r) in weights.iter().zip(&written) {
            table.costs[w][choice] = Some(Cost { bytes: r.bytes_after, ..Cost::default() });
        }
        if let Some(base) = table.base {
            for (i, &w) in weights.iter().enumerate() {
                let file = finished(variant.only(i), cx, Vec::new())?.bytes(cx)?;
                let grown = i64::try_from(file).unwrap_or(i64::MAX) - i64::try_from(base).unwrap_or(i64::MAX);
                table.costs[w][choice].get_or_insert_default().file = Some(grown);
            }
        }
        Ok(Some(Candidate { choice, variant, weights }))
    }
}

/// |X E^T|^2 / |X W^T|^2 of a weight that `quantized` holds in codes; `None` where it holds no codes, or X is zero.
fn output_error2(m: &Module, w: &Shared, quantized: &Module, gram: &Gram) -> Result<Option<f64>, PassError> {
    let l = w.first();
    let Some((q, _)) = quantized.ops[l.op].operand(l.operand_index).and_then(|v| QTensor::of(quantized, v))
    else {
        return Ok(None);
    };
    let float = rows(m, super::NAME, w)?;
    let g = gram.to_f32();
    let mut judge = Judge::new(&float.values, float.n, l.k, Some(&g));
    judge.step("", &dequantize(&q)?);
    Ok(judge.output_error().map(|e| e * e))
}
