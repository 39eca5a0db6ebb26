//! How good a language model is: perplexity and accuracy on rows of tokens, and its distance from another model.
//!
//! Every position of a row but the last predicts the next token; there is no stride, and rows are independent.
//! Log-softmax is computed in float64, each position by itself, and sums are taken in the order of the positions, so
//! the figures do not depend on the number of threads.

pub mod distance;

use crate::data::lm::{Lm, LmError, inputs_of};
use crate::data::tokens::Rows;
use dialects::exec::{ExecError, Executor, Prepared};
use dialects::ir::Module;
use dialects::tensor::Tensor;
use passes::Progress;
use rayon::prelude::*;
use serde::Serialize;
use thiserror::Error;

/// Why a model cannot be evaluated.
#[derive(Debug, Error)]
pub enum EvalError {
    /// It is not fed with tokens, or gives no logits.
    #[error(transparent)]
    Lm(#[from] LmError),
    /// It cannot be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// Nothing to predict.
    #[error("rows of one token leave nothing to predict")]
    Short,
    /// Its logits are of another shape.
    #[error("expected logits of shape [{rows}, {len}, vocabulary], found {found:?}")]
    Logits {
        /// Rows that were fed.
        rows: usize,
        /// Tokens in each.
        len: usize,
        /// The shape that came.
        found: Vec<usize>,
    },
    /// A token beyond the logits.
    #[error("the token id {id} has no logit: the model gives {vocab}")]
    Token {
        /// The token.
        id: i64,
        /// Logits of a position.
        vocab: usize,
    },
    /// The two models speak different languages.
    #[error("the model gives {model} logits, the baseline {baseline}")]
    Vocabularies {
        /// Logits of a position, of the model.
        model: usize,
        /// Logits of a position, of the baseline.
        baseline: usize,
    },
    /// The baseline cannot be evaluated.
    #[error("the baseline: {0}")]
    Baseline(Box<EvalError>),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// A model to evaluate.
pub struct Subject<'m> {
    m: &'m Module,
    lm: Lm,
    prepared: Box<dyn Prepared + 'm>,
    per_run: usize,
    /// What the user may want to know: inputs that were filled in, that it is fed one row at a time.
    pub notes: Vec<String>,
}

impl<'m> Subject<'m> {
    /// Makes `m` ready for rows of `len` tokens.
    pub fn new(m: &'m Module, exec: &'m dyn Executor, len: usize) -> Result<Subject<'m>, EvalError> {
        let lm = Lm::of(m)?;
        let logits = lm.logits.clone()?;
        let (per_run, why) = lm.probe(exec, m, len)?;
        let notes = lm.filled().into_iter().chain(why).collect();
        let prepared = exec.prepare(m, &[logits])?;
        Ok(Subject { m, lm, prepared, per_run, notes })
    }

    /// Rows of the embedding, where they are known.
    pub fn vocab(&self) -> Option<usize> {
        self.lm.vocab
    }

    /// The logits `[rows, len, vocabulary]` of these ids, in as many runs as it takes.
    fn logits(&self, ids: &[i64], len: usize) -> Result<Vec<Tensor>, EvalError> {
        ids.chunks(self.per_run * len)
            .map(|ids| {
                let mut got = None;
                self.prepared.run(&inputs_of(self.m, self.lm.batch_of(ids, len)), &mut |_, item| {
                    got = item.tensor().ok().cloned();
                    Ok(())
                })?;
                let rows = ids.len() / len;
                got.ok_or(EvalError::Logits { rows, len, found: Vec::new() })
            })
            .collect()
    }
}

/// What a model scores.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Rows of tokens.
    pub rows: usize,
    /// Tokens that were predicted.
    pub positions: usize,
    /// exp of the mean negative log-likelihood of the next token.
    pub perplexity: f64,
    /// How often the likeliest token was the next one.
    pub top1: f64,
    /// Against the baseline, if there is one.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
}

/// How far a model is from its baseline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Against {
    /// The baseline's perplexity.
    pub baseline_perplexity: f64,
    /// The baseline's accuracy.
    pub baseline_top1: f64,
    /// Mean Kullback-Leibler divergence of the model's distribution from the baseline's, in nats: the mean over the
    /// predicting positions of sum p log(p / q), where p is the baseline's.
    pub kl: f64,
    /// How often both hold the same token the likeliest.
    pub agreement: f64,
}

/// What one position contributes.
#[derive(Clone, Copy)]
struct Position {
    nll: f64,
    hit: bool,
    baseline_nll: f64,
    baseline_hit: bool,
    kl: f64,
    agree: bool,
}

/// Evaluates a model on rows of tokens, a bounded number of rows at a time.
pub fn evaluate(
    model: &Subject,
    baseline: Option<&Subject>,
    rows: &Rows,
    progress: &dyn Progress,
) -> Result<Scores, EvalError> {
    let len = rows.len;
    if len < 2 {
        return Err(EvalError::Short);
    }
    let mut positions: Vec<Position> = Vec::with_capacity(rows.count() * (len - 1));
    for ids in rows.chunks(model.per_run) {
        let mine = model.logits(ids, len)?;
        let theirs = baseline.map(|b| b.logits(ids, len)).transpose();
        let theirs = theirs.map_err(|e| EvalError::Baseline(Box::new(e)))?;
        positions.extend(score(ids, len, &mine, theirs.as_deref())?);
        if !progress.advance((ids.len() / len) as u64) {
            return Err(EvalError::Interrupted);
        }
    }
    Ok(summary(rows.count(), &positions, baseline.is_some()))
}

/// What the positions of `rows` rows come to.
fn summary(rows: usize, positions: &[Position], against: bool) -> Scores {
    let n = positions.len() as f64;
    let mean = |f: fn(&Position) -> f64| positions.iter().map(f).sum::<f64>() / n;
    let against = against.then(|| Against {
        baseline_perplexity: mean(|p| p.baseline_nll).exp(),
        baseline_top1: mean(|p| f64::from(p.baseline_hit)),
        kl: mean(|p| p.kl),
        agreement: mean(|p| f64::from(p.agree)),
    });
    Scores {
        rows,
        positions: positions.len(),
        perplexity: mean(|p| p.nll).exp(),
        top1: mean(|p| f64::from(p.hit)),
        against,
    }
}

/// The logits of one position of rows that may lie in several tensors.
struct Logits<'a> {
    parts: Vec<std::borrow::Cow<'a, [f32]>>,
    /// Positions in a part.
    per_part: usize,
    vocab: usize,
}

impl<'a> Logits<'a> {
    /// Those of `rows` rows of `len` tokens.
    fn of(tensors: &'a [Tensor], rows: usize, len: usize) -> Result<Logits<'a>, EvalError> {
        let mut left = rows;
        for t in tensors {
            match t.shape() {
                [r, l, v] if *r <= left && *l == len && *v > 0 => left -= r,
                other => return Err(EvalError::Logits { rows: left, len, found: other.to_vec() }),
            }
        }
        if left > 0 || rows == 0 {
            return Err(EvalError::Logits { rows: left, len, found: Vec::new() });
        }
        let as_f32 = |t: &'a Tensor| t.to_f32().map_err(|e| ExecError::Sink(e.to_string()));
        let parts = tensors.iter().map(as_f32).collect::<Result<Vec<_>, _>>()?;
        let shape = tensors[0].shape();
        Ok(Logits { parts, per_part: shape[0] * shape[1], vocab: shape[2] })
    }

    fn at(&self, position: usize) -> &[f32] {
        &self.parts[position / self.per_part][position % self.per_part * self.vocab..][..self.vocab]
    }
}

fn score(
    ids: &[i64],
    len: usize,
    mine: &[Tensor],
    theirs: Option<&[Tensor]>,
) -> Result<Vec<Position>, EvalError> {
    let of = |tensors| Logits::of(tensors, ids.len() / len, len);
    let mine = of(mine)?;
    let theirs = theirs.map(of).transpose().map_err(|e| EvalError::Baseline(Box::new(e)))?;
    let vocab = mine.vocab;
    if let Some(baseline) = theirs.as_ref().map(|t| t.vocab).filter(|&b| b != vocab) {
        return Err(EvalError::Vocabularies { model: vocab, baseline });
    }
    let beyond = |id: &&i64| usize::try_from(**id).is_ok_and(|id| id >= vocab) || **id < 0;
    if let Some(&id) = ids.iter().find(beyond) {
        return Err(EvalError::Token { id, vocab });
    }
    let predicting: Vec<usize> = (0..ids.len()).filter(|i| i % len != len - 1).collect();
    Ok(predicting
        .par_iter()
        .map(|&i| {
            let next = ids[i + 1] as usize;
            let q = Softmax::of(mine.at(i));
            let p = theirs.as_ref().map_or(q, |t| Softmax::of(t.at(i)));
            let kl = theirs.as_ref().map_or(0.0, |t| p.divergence(t.at(i), &q, mine.at(i)));
            let nll = |s: &Softmax, logits: &[f32]| s.log_sum - f64::from(logits[next]);
            Position {
                nll: nll(&q, mine.at(i)),
                hit: q.best == next,
                baseline_nll: theirs.as_ref().map_or(0.0, |t| nll(&p, t.at(i))),
                baseline_hit: p.best == next,
                kl,
                agree: p.best == q.best,
            }
        })
        .collect())
}

/// What is to be known of one position's logits.
#[derive(Clone, Copy)]
struct Softmax {
    /// log sum exp.
    log_sum: f64,
    /// The likeliest token; the first of equals.
    best: usize,
}

impl Softmax {
    fn of(logits: &[f32]) -> Softmax {
        let mut best = 0;
        for (i, &x) in logits.iter().enumerate() {
            if x > logits[best] {
                best = i;
            }
        }
        let most = f64::from(logits[best]);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - most).exp()).sum();
        Softmax { log_sum: sum.ln() + most, best }
    }

    /// sum p log(p / q) of these logits `p` and others `q`.
    fn divergence(&self, p: &[f32], other: &Softmax, q: &[f32]) -> f64 {
        let term = |(&a, &b): (&f32, &f32)| {
            let (log_p, log_q) = (f64::from(a) - self.log_sum, f64::from(b) - other.log_sum);
            // Where p vanishes its term does, whatever q is.
            let weight = log_p.exp();
            if weight > 0.0 { weight * (log_p - log_q) } else { 0.0 }
        };
        p.iter().zip(q).map(term).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: usize, len: usize, values: &[f32]) -> Tensor {
        Tensor::new(&[rows, len, values.len() / rows / len], values.to_vec()).unwrap()
    }

    #[test]
    fn perplexity_of_known_probabilities() {
        // Position 0 gives the next token probability 3/4, position 1 gives 1/4; position 2 predicts nothing.
        let l = logits(1, 3, &[0.0, 3f32.ln(), 3f32.ln(), 0.0, 9.0, 9.0]);
        let got = score(&[0, 1, 1], 3, &[l], None).unwrap();
        let nll: Vec<f64> = got.iter().map(|p| p.nll).collect();
        assert!((nll[0] - (4f64 / 3.0).ln()).abs() < 1e-7 && (nll[1] - 4f64.ln()).abs() < 1e-7, "{nll:?}");
        assert_eq!(got.iter().map(|p| p.hit).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn divergence_of_known_distributions() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - ln(3)/2 ... = 0.5 ln(2) + 0.5 ln(2/3).
        let p = logits(1, 2, &[0.0, 0.0, 0.0, 0.0]);
        let q = logits(1, 2, &[0.0, 3f32.ln(), 0.0, 0.0]);
        let got = score(&[0, 1], 2, std::slice::from_ref(&q), Some(std::slice::from_ref(&p))).unwrap()[0];
        let want = 0.5 * 2f64.ln() + 0.5 * (2f64 / 3.0).ln();
        assert!((got.kl - want).abs() < 1e-7, "{} {want}", got.kl);
        assert!((got.baseline_nll - 2f64.ln()).abs() < 1e-7);
        assert!(!got.agree);
        let same = score(&[0, 1], 2, std::slice::from_ref(&q), Some(std::slice::from_ref(&q))).unwrap()[0];
        assert_eq!((same.kl, same.agree), (0.0, true));
    }

    #[test]
    fn rows_may_lie_in_several_tensors() {
        let whole = logits(2, 2, &[0.0, 1.0, 2.0, 3.0, 5.0, 4.0, 6.0, 7.0]);
        let halves = [logits(1, 2, &[0.0, 1.0, 2.0, 3.0]), logits(1, 2, &[5.0, 4.0, 6.0, 7.0])];
        let nll = |t: &[Tensor]| {
            score(&[0, 1, 1, 1], 2, t, None).unwrap().iter().map(|p| p.nll).collect::<Vec<_>>()
        };
        assert_eq!(nll(&[whole]), nll(&halves));
    }

    #[test]
    fn tokens_and_vocabularies_are_checked() {
        let l = || logits(1, 2, &[0.0; 4]);
        let error = |ids: &[i64], b: Option<&[Tensor]>| score(ids, 2, &[l()], b).err().unwrap().to_string();
        assert!(error(&[0, 2], None).contains("token id 2") && error(&[-1, 0], None).contains("-1"));
        let wide = logits(1, 2, &[0.0; 6]);
        assert!(error(&[0, 1], Some(&[wide])).contains("the baseline 3"));
    }
}
