//! Language models: how one is recognized, and how it is fed with rows of tokens.
//!
//! One takes `input_ids`, integers `[batch, seq]`; its other inputs are filled in ([`super::feed`]). A causal one gives
//! `logits`, floats `[batch, seq, vocabulary]`.

use super::Batch;
use super::feed::{self, Feed};
use dialects::exec::{ExecError, Executor, run_once};
use dialects::ir::{Elem, Module, Symbol, Type, Value};
use dialects::ops::Item;
use thiserror::Error;

/// Logits of one run take at most this many bytes, where more than one row goes into it.
const LOGITS_BYTES: usize = 64 << 20;

/// More tokens than this in one run gain no speed, but take memory.
pub const RUN_TOKENS: usize = 2048;

/// Tokens in a row of the probe.
const PROBE_LEN: usize = 8;

/// Why a model cannot be fed with tokens.
#[derive(Clone, Debug, Error)]
pub enum LmError {
    /// It is another kind of model.
    #[error("this is not a language model: {0}")]
    NotOne(String),
    /// It gives no logits.
    #[error("this is not a causal language model: {0}")]
    NotCausal(String),
    /// It wants a cache whose shape is not known.
    #[error(
        "the key/value cache {name:?} of type {ty} cannot be made empty: expected floats [batch, heads, past, size] with \
         heads and size fixed"
    )]
    Cache {
        /// The input.
        name: Symbol,
        /// Its type.
        ty: Type,
    },
    /// It wants a cache of a fixed length, and has no way to be told that it holds nothing.
    #[error(
        "the key/value cache {name:?} always holds {past} positions, and neither attention_mask nor seqlens_k says that \
         they do not count: export the model with a past of any length"
    )]
    Unmasked {
        /// The input.
        name: Symbol,
        /// Positions of the cache.
        past: usize,
    },
    /// It wants caches of several lengths.
    #[error("the key/value cache {name:?} holds {past} positions, others hold {other}")]
    Lengths {
        /// The input.
        name: Symbol,
        /// Its positions.
        past: usize,
        /// Those of the others.
        other: usize,
    },
    /// It wants something that cannot be guessed.
    #[error(
        "the input {name:?} of type {ty} cannot be filled in from tokens: known are {}",
        feed::known_names()
    )]
    Input {
        /// The input.
        name: Symbol,
        /// Its type.
        ty: Type,
    },
}

/// A language model's inputs and output.
#[derive(Clone, Debug)]
pub struct Lm {
    /// `logits`, or why it is no causal model.
    pub logits: Result<Value, LmError>,
    /// Rows of the embedding, where they are known.
    pub vocab: Option<usize>,
    /// The rows that a run takes, where the model fixes them.
    pub batch: Option<usize>,
    /// The tokens in a row, where the model fixes them.
    pub len: Option<usize>,
    inputs: Vec<Feed>,
    /// Positions of the cache, which do not count.
    past: usize,
    /// Elements of logits per token, for the size of runs.
    logits_dim: usize,
}

/// The inputs of a model that must be given: those that are no initializers.
pub fn free_inputs(m: &Module) -> impl Iterator<Item = Value> + '_ {
    m.regions[m.top].args.iter().copied().filter(|&v| m.const_of(v).is_none())
}

/// A size of an input, where the model fixes it.
fn fixed(m: &Module, v: Value, dim: usize) -> Option<usize> {
    m.ty(v).dims()?.get(dim)?.known().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)
}

impl Lm {
    /// Recognizes a language model by its inputs and outputs.
    pub fn of(m: &Module) -> Result<Lm, LmError> {
        let not = |why: &str| LmError::NotOne(why.to_string());
        let ids = named(m, &m.regions[m.top].args, "input_ids");
        let ids = ids.ok_or_else(|| not("it has no input \"input_ids\""))?;
        if !matches!(m.ty(ids).elem(), Some(Elem::I64 | Elem::I32)) || !ranked(m, ids, 2) {
            return Err(not(&format!("its input_ids are {}, not int64 [batch, seq]", m.ty(ids))));
        }
        let inputs: Vec<Feed> = free_inputs(m).map(|v| Feed::of(m, v)).collect::<Result<_, _>>()?;
        let past = past(&inputs)?;
        let vocab = embedding_rows(m, ids);
        let logits = logits(m);
        let logits_dim = logits.as_ref().ok().and_then(|&v| fixed(m, v, 2)).or(vocab).unwrap_or(1);
        Ok(Lm { logits, vocab, batch: fixed(m, ids, 0), len: fixed(m, ids, 1), inputs, past, logits_dim })
    }

    /// What is fed beside the tokens, in words; `None` when nothing is.
    pub fn filled(&self) -> Option<String> {
        feed::in_words(&self.inputs, self.past)
    }

    /// Whether arrays of these names are enough: the tokens, and no cache, to which what is filled in would not fit.
    pub fn fills_beside(&self, given: &[String]) -> bool {
        let has = |name: &str| given.iter().any(|g| g == name);
        has("input_ids") && !self.inputs.iter().any(|f| f.past().is_some() && has(f.name()))
    }

    /// What is fed beside arrays of these names, in words.
    pub fn filled_beside(&self, given: &[String]) -> Option<String> {
        let rest = self.inputs.iter().filter(|f| !given.iter().any(|g| **g == **f.name()));
        feed::in_words(&rest.cloned().collect::<Vec<_>>(), self.past)
    }

    /// A run's inputs: those given, and the others as tokens ask for.
    pub fn filled_in(&self, given: Batch) -> Batch {
        let ids = given.iter().find(|(name, _)| &**name == "input_ids").map(|(_, t)| t);
        let (Some(ids), Some(&len)) = (ids, ids.and_then(|t| t.shape().last())) else { return given };
        let Ok(tokens) = ids.to_i64() else { return given };
        let mut batch = if len > 0 { self.batch_of(&tokens, len) } else { Batch::new() };
        for (name, tensor) in given {
            match batch.iter_mut().find(|(n, _)| *n == name) {
                Some(slot) => slot.1 = tensor,
                None => batch.push((name, tensor)),
            }
        }
        batch
    }

    /// Rows for one run of rows of `len` tokens, before [`Lm::probe`] is asked.
    fn rows_per_run(&self, len: usize) -> usize {
        let row = len.saturating_mul(self.logits_dim).saturating_mul(size_of::<f32>()).max(1);
        self.batch.unwrap_or((LOGITS_BYTES / row).min(RUN_TOKENS / len.max(1)).max(1))
    }

    /// A run's inputs for rows of `len` tokens, row after row in `ids`.
    pub fn batch_of(&self, ids: &[i64], len: usize) -> Batch {
        self.inputs.iter().map(|f| (f.name().clone(), f.tensor(ids, len, self.past))).collect()
    }

    /// The names of the caches, each with the positions that it holds whatever is fed.
    pub fn caches(&self) -> impl Iterator<Item = (&Symbol, usize)> {
        self.inputs.iter().filter_map(|f| Some((f.name(), f.past()?)))
    }

    /// A run's inputs, but for caches, for one row of tokens behind `start` others.
    pub fn step(&self, ids: &[i64], start: usize) -> Batch {
        self.inputs.iter().filter_map(|f| Some((f.name().clone(), f.after(ids, start)?))).collect()
    }

    /// Whether a run takes rows of `len` tokens.
    pub fn takes(&self, exec: &dyn Executor, m: &Module, len: usize) -> bool {
        let ids = vec![0; self.batch.unwrap_or(1) * len];
        run_once(exec, m, &inputs_of(m, self.batch_of(&ids, len)), &m.regions[m.top].results).is_ok()
    }

    /// How many rows of `len` tokens a run takes. Some models declare a symbolic batch and then fail on one, or compute
    /// something else for a row in company than for the row alone: those take one row, and the reason is returned.
    pub fn probe(
        &self,
        exec: &dyn Executor,
        m: &Module,
        len: usize,
    ) -> Result<(usize, Option<String>), ExecError> {
        let rows = self.rows_per_run(len);
        let Some(&watched) = self.logits.as_ref().ok().or(m.regions[m.top].results.first()) else {
            return Ok((rows, None));
        };
        if rows == 1 || self.batch.is_some() {
            return Ok((rows, None));
        }
        let len = self.len.unwrap_or(len.min(PROBE_LEN));
        let vocab = self.vocab.unwrap_or(2).max(1);
        let ids: Vec<i64> = (0..rows * len).map(|i| (i * 7 % vocab) as i64).collect();
        let run = |ids: &[i64]| -> Result<Vec<f32>, ExecError> {
            let got = run_once(exec, m, &inputs_of(m, self.batch_of(ids, len)), &[watched])?;
            let tensor = got[0].tensor().map_err(|e| ExecError::Sink(e.to_string()))?;
            Ok(tensor.to_f32().map_err(|e| ExecError::Sink(e.to_string()))?.into_owned())
        };
        let alone = run(&ids[(rows - 1) * len..])?;
        let why = match run(&ids) {
            Err(e) => format!("it fails on a batch of {rows}: {e}"),
            Ok(all) if all.len() == rows * alone.len() && close(&all[all.len() - alone.len()..], &alone) => {
                return Ok((rows, None));
            }
            Ok(_) => format!("a row comes out differently in a batch of {rows} than alone"),
        };
        Ok((1, Some(format!("the model is fed one row at a time: {why}"))))
    }
}

/// The value of `list` whose name is `name`.
fn named(m: &Module, list: &[Value], name: &str) -> Option<Value> {
    list.iter().copied().find(|&v| &*m.values[v].name == name)
}

/// Whether a value may have this rank.
fn ranked(m: &Module, v: Value, rank: usize) -> bool {
    m.ty(v).dims().is_none_or(|d| d.len() == rank)
}

/// The output of a causal model.
fn logits(m: &Module) -> Result<Value, LmError> {
    let v = named(m, &m.regions[m.top].results, "logits");
    let v = v.ok_or_else(|| LmError::NotCausal("it has no output \"logits\"".into()))?;
    if m.ty(v).elem().is_some_and(|e| !e.is_float()) || !ranked(m, v, 3) {
        let ty = m.ty(v);
        return Err(LmError::NotCausal(format!("its logits are {ty}, not floats [batch, seq, vocabulary]")));
    }
    Ok(v)
}

/// The positions that the caches hold, which must be told not to count.
fn past(inputs: &[Feed]) -> Result<usize, LmError> {
    let mut caches = inputs.iter().filter_map(|f| Some((f.name(), f.past()?)));
    let Some((name, past)) = caches.next() else { return Ok(0) };
    if let Some((name, other)) = caches.find(|&(_, n)| n != past) {
        return Err(LmError::Lengths { name: name.clone(), past: other, other: past });
    }
    match past == 0 || inputs.iter().any(Feed::masks) {
        true => Ok(past),
        false => Err(LmError::Unmasked { name: name.clone(), past }),
    }
}

/// Rows of the table that the ids look up.
fn embedding_rows(m: &Module, ids: Value) -> Option<usize> {
    let looked_up = m.regions[m.top].ops.iter().map(|&op| &m.ops[op]).find(|op| {
        let gather = op.is("onnx.Gather") || op.is("com.microsoft.GatherBlockQuantized");
        gather && op.operand(1) == Some(ids)
    })?;
    fixed(m, looked_up.operand(0)?, 0)
}

/// Whether logits agree but for rounding, with room for what quantized activations make of it.
fn close(a: &[f32], b: &[f32]) -> bool {
    let most = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 0.05 * most)
}

/// A batch as inputs of `m`, by their names; what `m` does not have is left out. A cache that a pass has added since the
/// batch was made is empty.
pub fn inputs_of(m: &Module, batch: Batch) -> Vec<(Value, Item)> {
    let rows = batch.first().and_then(|(_, t)| t.shape().first().copied()).unwrap_or(1);
    let args = &m.regions[m.top].args;
    let given = batch.into_iter().filter_map(|(name, t)| Some((named(m, args, &name)?, t.into())));
    let mut inputs: Vec<(Value, Item)> = given.collect();
    for v in free_inputs(m) {
        if inputs.iter().all(|(known, _)| *known != v)
            && let Ok(cache) = Feed::of(m, v)
            && cache.past() == Some(0)
        {
            inputs.push((v, cache.tensor(&vec![0; rows], 1, 0).into()));
        }
    }
    inputs
}

#[cfg(test)]
mod tests {
    use super::*;
    use dialects::ir::Dim;
    use dialects::tensor::Tensor;

    fn sym(name: &str) -> Dim {
        Dim::Sym(name.into())
    }

    /// A module with these inputs and a `logits` output that is its first input.
    fn model(inputs: &[(&str, Elem, usize)]) -> Module {
        let mut m = Module::default();
        let top = m.top;
        for &(name, elem, rank) in inputs {
            m.add_arg(top, name, Type::tensor(elem, ["b", "s", "x"][..rank].iter().map(|n| sym(n))));
        }
        let logits = Type::tensor(Elem::F32, [sym("b"), sym("s"), Dim::Known(7)]);
        let v = m.add_arg(top, "logits", logits);
        m.regions[top].args.pop();
        m.regions[top].results.push(v);
        m
    }

    #[test]
    fn inputs_are_filled_by_name_and_type() {
        let m = model(&[
            ("input_ids", Elem::I32, 2),
            ("attention_mask", Elem::F32, 2),
            ("position_ids", Elem::I64, 2),
            ("token_type_ids", Elem::I64, 2),
        ]);
        let lm = Lm::of(&m).unwrap();
        let batch = lm.batch_of(&[5, 6, 7, 8], 2);
        let names: Vec<&str> = batch.iter().map(|(n, _)| &**n).collect();
        assert_eq!(names, ["input_ids", "attention_mask", "position_ids", "token_type_ids"]);
        assert_eq!(batch[0].1, Tensor::new(&[2, 2], vec![5i32, 6, 7, 8]).unwrap());
        assert_eq!(batch[1].1, Tensor::new(&[2, 2], vec![1f32; 4]).unwrap());
        assert_eq!(batch[2].1, Tensor::new(&[2, 2], vec![0i64, 1, 0, 1]).unwrap());
        assert_eq!(batch[3].1, Tensor::new(&[2, 2], vec![0i64; 4]).unwrap());
        assert!(lm.filled().unwrap().contains("attention_mask with ones"));
        assert_eq!(inputs_of(&m, batch).len(), 4);
    }

    #[test]
    fn other_models_are_told_apart() {
        let why = |inputs: &[(&str, Elem, usize)]| Lm::of(&model(inputs)).unwrap_err().to_string();
        assert!(why(&[("image", Elem::F32, 3)]).contains("no input \"input_ids\""));
        assert!(why(&[("input_ids", Elem::F32, 2)]).contains("not int64"));
        assert!(why(&[("input_ids", Elem::I64, 1)]).contains("not int64"));
        let ids = ("input_ids", Elem::I64, 2);
        assert!(why(&[ids, ("past_key_values.0.key", Elem::F32, 3)]).contains("cache"));
        assert!(why(&[ids, ("temperature", Elem::F32, 1)]).contains("\"temperature\""));
        assert!(why(&[ids, ("attention_mask", Elem::I64, 3)]).contains("\"attention_mask\""));
        assert!(why(&[ids, ("position_ids", Elem::F32, 2)]).contains("\"position_ids\""));
        assert!(Lm::of(&model(&[ids])).unwrap().filled().is_none());
    }

    #[test]
    fn runs_are_bounded() {
        let lm = Lm::of(&model(&[("input_ids", Elem::I64, 2)])).unwrap();
        assert_eq!(lm.rows_per_run(8), RUN_TOKENS / 8);
        assert_eq!(Lm { logits_dim: LOGITS_BYTES / 32, ..lm.clone() }.rows_per_run(4), 2);
        assert_eq!(lm.rows_per_run(usize::MAX), 1);
    }
}
