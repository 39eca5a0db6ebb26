//! Tokens sampled from a causal language model itself: calibration data that needs no file.
//!
//! Sampling is at temperature 1, from the model's own distribution, as LLM-QAT (arXiv:2305.17888) makes its data.
//! Without a key/value cache every step runs the whole prefix again, so a row is sampled as passages of a few tokens
//! side by side, all of them in the same steps: each begins with a random token and continues by itself. A row is then
//! fed whole, so that every position is reached. The head is run for the last position alone where the graph allows.

use crate::data::lm::{Lm, RUN_TOKENS, inputs_of};
use crate::data::tokens::Rows;
use crate::term::Term;
use dialects::exec::{ExecError, Executor};
use dialects::ir::{Module, OpBuilder, Type, Value};
use dialects::ops::Item;
use dialects::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens in a passage, where a row has as many.
const PASSAGE: usize = 16;

/// Samples `count` rows of `len` tokens.
pub(super) fn rows(
    lm: &Lm,
    m: &Module,
    exec: &dyn Executor,
    (count, len): (usize, usize),
    seed: u64,
    term: &Term,
) -> Result<Rows, ExecError> {
    let logits = lm.logits.clone().map_err(|e| ExecError::Sink(e.to_string()))?;
    let passage = PASSAGE.min(len.max(1));
    let per_row = len.div_ceil(passage);
    let (batch, _) = lm.probe(exec, m, passage)?;
    let batch = if batch == 1 || lm.batch.is_some() { batch } else { RUN_TOKENS / passage };
    let short = last_position(m, logits).filter(|_| lm.len.is_none());
    let m = short.as_ref().unwrap_or(m);
    let prepared = exec.prepare(m, &[logits])?;
    // A fixed batch must be filled; what is sampled beyond the rows is dropped.
    let passages = (count * per_row).next_multiple_of(lm.batch.unwrap_or(1));
    let task = term.task("sampling", passages.div_ceil(batch) as u64 * passage as u64);
    let vocab = lm.vocab.unwrap_or(1).max(1);
    let mut out = Vec::with_capacity(passages * passage);
    for first in (0..passages).step_by(batch) {
        let group = batch.min(passages - first);
        let mut rngs: Vec<ChaCha8Rng> = (first..first + group).map(|p| stream(seed, p)).collect();
        let mut texts: Vec<Vec<i64>> =
            rngs.iter_mut().map(|r| vec![r.random_range(0..vocab) as i64]).collect();
        for done in 1..passage {
            // A model of a fixed length is fed with zeros after the passage: it does not look ahead.
            let fed = lm.len.unwrap_or(done);
            let ids: Vec<i64> = texts
                .iter()
                .flat_map(|t| t.iter().copied().chain([0].into_iter().cycle()).take(fed))
                .collect();
            let mut next = Vec::new();
            prepared.run(&inputs_of(m, lm.batch_of(&ids, fed)), &mut |_, item| {
                next = draw(item, done - 1, &mut rngs)?;
                Ok(())
            })?;
            texts.iter_mut().zip(next).for_each(|(t, id)| t.push(id));
            if !task.advance(1) {
                return Err(ExecError::Sink("interrupted".into()));
            }
        }
        out.extend(texts.into_iter().flatten());
    }
    let mut ids = Vec::with_capacity(count * len);
    for row in out.chunks(per_row * passage).take(count) {
        ids.extend_from_slice(&row[..len]);
    }
    Ok(Rows::new(len, ids))
}

/// The random numbers of one passage: they do not depend on how passages are grouped into runs.
fn stream(seed: u64, passage: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(passage as u64);
    rng
}

/// The module with its head run for the last position alone, when the logits come straight from a product with the
/// hidden state `[batch, seq, hidden]`.
fn last_position(m: &Module, logits: Value) -> Option<Module> {
    let (op, _) = m.def_op(logits)?;
    let data = &m.ops[op];
    let hidden =
        data.operand(0).filter(|_| data.is("onnx.MatMul") || data.is("com.microsoft.MatMulNBits"))?;
    m.ty(hidden).dims().filter(|d| d.len() == 3)?;
    let mut short = m.clone();
    let last = Tensor::new(&[1], vec![-1i64]).ok()?.to_const();
    let (top, loc) = (m.top, data.loc.clone());
    let last = short.add_const(top, "", last);
    let gather = OpBuilder::new("onnx.Gather", &loc).operands([hidden, last]).attr("axis", 1);
    let gather = short.insert_before(op, gather.result(Type::Unknown));
    let one = short.ops[gather].result(0)?;
    short.ops[op].operands[0] = Some(one);
    Some(short)
}

/// Draws a token for each row from the logits `[rows, positions, vocabulary]` at `position`, or at the last one.
fn draw(item: &Item, position: usize, rngs: &mut [ChaCha8Rng]) -> Result<Vec<i64>, ExecError> {
    let wrong = |what: String| ExecError::Sink(format!("logits: {what}"));
    let tensor = item.tensor().map_err(|e| wrong(e.to_string()))?;
    let values = tensor.to_f32().map_err(|e| wrong(e.to_string()))?;
    let [rows, positions, vocab] = tensor.shape()[..] else {
        return Err(wrong(format!("expected three dims, found the shape {:?}", tensor.shape())));
    };
    if rows != rngs.len() || positions == 0 || vocab == 0 {
        let expected = rngs.len();
        return Err(wrong(format!(
            "expected {expected} rows of logits, found the shape {:?}",
            tensor.shape()
        )));
    }
    let at = position.min(positions - 1);
    let row = |r: usize| &values[(r * positions + at) * vocab..][..vocab];
    Ok(rngs.iter_mut().enumerate().map(|(r, rng)| choose(row(r), rng.random())).collect())
}

/// The token at which the distribution function first exceeds `u`, which lies in [0, 1).
fn choose(logits: &[f32], u: f64) -> i64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l - most).exp()).collect();
    let mut left = u * weights.iter().sum::<f64>();
    for (i, w) in weights.iter().enumerate() {
        left -= w;
        if left < 0.0 {
            return i as i64;
        }
    }
    weights.len() as i64 - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{Subject, evaluate};
    use dialects::ir::interp::Interpreter;
    use dialects::ops::Ops;
    use std::path::Path;

    /// The likelihood that the model gives to its own text: near its entropy for what it samples (perplexity 91 by an
    /// independent sampler that runs the whole prefix), far from it for random tokens.
    #[test]
    fn the_model_finds_its_own_tokens_likely() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models/tinylm.onnx");
        let mut m = crate::onnx::import::read(&path).unwrap().module;
        let errors = dialects::ir::infer::infer(&mut m, &Ops::standard());
        assert!(errors.is_empty(), "{errors:?}");
        let exec = Interpreter::new(Ops::standard());
        let (lm, term) = (Lm::of(&m).unwrap(), Term::new(true));
        let perplexity = |rows: &Rows| {
            let rows = Rows::new(PASSAGE, rows.ids().to_vec());
            let subject = Subject::new(&m, &exec, PASSAGE).unwrap();
            evaluate(&subject, None, &rows, &*term.task("", 0)).unwrap().perplexity
        };
        assert!(last_position(&m, lm.logits.clone().unwrap()).is_some());
        let sample = |seed| rows(&lm, &m, &exec, (6, 2 * PASSAGE), seed, &term).unwrap();
        let sampled = sample(1);
        assert_eq!((sampled.count(), sampled.len), (6, 2 * PASSAGE));
        assert_eq!(sampled, sample(1));
        assert_ne!(sampled, sample(2));
        let (own, random) = (perplexity(&sampled), perplexity(&super::super::noise::tokens(4096, 6, 32, 0)));
        assert!(own < 250.0 && random > 2000.0, "{own} {random}");
    }

    #[test]
    fn tokens_are_drawn_by_their_probability() {
        // Probabilities 1/2, 1/4, 1/4.
        let logits = [2f32.ln(), 0.0, 0.0];
        for (u, want) in [(0.0, 0), (0.499, 0), (0.501, 1), (0.749, 1), (0.751, 2), (0.999999, 2)] {
            assert_eq!(choose(&logits, u), want, "{u}");
        }
        assert_eq!(choose(&[f32::NEG_INFINITY, 5.0, f32::NEG_INFINITY], 0.7), 1);
    }

    #[test]
    fn logits_of_another_shape_are_refused() {
        let rngs = &mut [stream(0, 0), stream(0, 1)];
        let item = |shape: &[usize]| {
            let count = shape.iter().product();
            Item::Tensor(Tensor::new(shape, vec![0f32; count]).unwrap())
        };
        assert_eq!(draw(&item(&[2, 3, 4]), 2, rngs).unwrap().len(), 2);
        assert!(draw(&item(&[1, 3, 4]), 2, rngs).is_err());
        assert!(draw(&item(&[2, 12]), 2, rngs).is_err());
        assert!(draw(&item(&[2, 3, 0]), 2, rngs).is_err());
    }
}
