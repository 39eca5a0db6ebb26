//! Text generation: a causal language model with a key/value cache, fed with one row of tokens step by step.

pub mod sample;
pub mod text;

use crate::data::lm::{Lm, LmError, inputs_of};
use crate::env::DriverEnv;
use crate::pipeline::Pipeline;
use crate::{Error, Registry, driver, term::Term};
use dialects::exec::{ExecError, Executor, Prepared};
use dialects::ir::{Module, Symbol, Type, Value};
use dialects::ops::Item;
use dialects::tensor::Tensor;
use std::collections::{HashMap, HashSet};
use thiserror::Error;

/// Why a model cannot be fed step by step.
#[derive(Debug, Error)]
pub enum StepError {
    /// It is not fed with tokens, or gives no logits.
    #[error(transparent)]
    Lm(#[from] LmError),
    /// It cannot be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// It has no cache at all.
    #[error("the model has no inputs for past keys and values; the pass add-kv-cache makes some")]
    NoCache,
    /// A past that no output continues.
    #[error("the cache {name:?} of type {ty}: expected an output {expected:?} that continues it, found none")]
    NoPresent {
        /// The input.
        name: Symbol,
        /// Its type.
        ty: Type,
        /// The output's name.
        expected: String,
    },
    /// A past whose length does not grow.
    #[error("the cache {name:?} of type {ty}: expected a past of any length, found a fixed one")]
    Fixed {
        /// The input.
        name: Symbol,
        /// Its type.
        ty: Type,
    },
    /// Logits of another shape.
    #[error("expected logits of shape [1, {new}, vocabulary], found {found:?}")]
    Logits {
        /// Tokens that were fed.
        new: usize,
        /// The shape that came.
        found: Vec<usize>,
    },
    /// More positions than the model has.
    #[error("position {at} is beyond the model's context of {bound}")]
    Context {
        /// The position, from 0.
        at: usize,
        /// Positions that the model has.
        bound: usize,
    },
}

/// A model with its cache, at some position of a text.
pub struct Decoder<'m> {
    m: &'m Module,
    lm: Lm,
    logits: Value,
    prepared: Box<dyn Prepared + 'm>,
    /// The input that each output of the cache continues.
    continues: HashMap<Value, Value>,
    past: Vec<(Value, Item)>,
    empty: Vec<(Value, Item)>,
    at: usize,
    bound: Option<usize>,
}

impl<'m> Decoder<'m> {
    /// Makes `m` ready, with an empty cache.
    pub fn new(m: &'m Module, exec: &'m dyn Executor) -> Result<Decoder<'m>, StepError> {
        let lm = Lm::of(m)?;
        let logits = lm.logits.clone()?;
        let top = &m.regions[m.top];
        let named = |list: &[Value], name: &str| list.iter().copied().find(|&v| *m.values[v].name == *name);
        let mut continues = HashMap::new();
        for (name, len) in lm.caches() {
            let input = named(&top.args, name).ok_or(StepError::NoCache)?;
            let ty = m.ty(input).clone();
            if len > 0 {
                return Err(StepError::Fixed { name: name.clone(), ty });
            }
            let expected = name.replace("past_key_values", "present").replace("past", "present");
            let present = named(&top.results, &expected);
            let present = present.ok_or_else(|| StepError::NoPresent { name: name.clone(), ty, expected })?;
            continues.insert(present, input);
        }
        if continues.is_empty() {
            return Err(StepError::NoCache);
        }
        let caches: HashSet<Value> = continues.values().copied().collect();
        let empty = inputs_of(m, lm.batch_of(&[0], 1)).into_iter().filter(|(v, _)| caches.contains(v));
        let empty: Vec<(Value, Item)> = empty.collect();
        let wanted: Vec<Value> =
            top.results.iter().copied().filter(|v| *v == logits || continues.contains_key(v)).collect();
        let prepared = exec.prepare(m, &wanted)?;
        let (past, bound) = (empty.clone(), context(m));
        Ok(Decoder { m, lm, logits, prepared, continues, past, empty, at: 0, bound })
    }

    /// Rows of the embedding, where they are known.
    pub fn vocab(&self) -> Option<usize> {
        self.lm.vocab
    }

    /// Positions that the model has, where a table of positions bounds them.
    pub fn bound(&self) -> Option<usize> {
        self.bound
    }

    /// Positions that were fed.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Forgets what was fed.
    pub fn restart(&mut self) {
        self.past = self.empty.clone();
        self.at = 0;
    }

    /// Feeds `ids` behind what was fed; gives the logits `[vocabulary]` of what follows the last of them. After an error
    /// the decoder is to be restarted.
    pub fn feed(&mut self, ids: &[i64]) -> Result<Vec<f32>, StepError> {
        let new = ids.len();
        if let Some(bound) = self.bound.filter(|&b| self.at + new > b) {
            return Err(StepError::Context { at: self.at + new - 1, bound });
        }
        // The old cache is handed over: no copy of it is kept beside the one that the model makes.
        let mut inputs = std::mem::take(&mut self.past);
        let caches: HashSet<Value> = inputs.iter().map(|(v, _)| *v).collect();
        inputs.extend(
            inputs_of(self.m, self.lm.step(ids, self.at)).into_iter().filter(|(v, _)| !caches.contains(v)),
        );
        let (mut past, mut logits) = (Vec::with_capacity(self.continues.len()), None);
        self.prepared.run(&inputs, &mut |v, item| {
            match self.continues.get(&v) {
                Some(&input) => past.push((input, item.clone())),
                None if v == self.logits => logits = item.tensor().ok().cloned(),
                None => {}
            }
            Ok(())
        })?;
        self.past = past;
        self.at += new;
        last(logits.as_ref(), new)
    }
}

/// The logits of the last of `new` positions.
fn last(logits: Option<&Tensor>, new: usize) -> Result<Vec<f32>, StepError> {
    let shape = logits.map(|t| t.shape().to_vec()).unwrap_or_default();
    let wrong = || StepError::Logits { new, found: shape.clone() };
    match (logits, &shape[..]) {
        (Some(t), [1, n, vocab]) if *n == new && new > 0 && *vocab > 0 => {
            let all = t.to_f32().map_err(|_| wrong())?;
            Ok(all[(n - 1) * vocab..].to_vec())
        }
        _ => Err(wrong()),
    }
}

/// Positions that a model has: rows of the smallest table that is looked up by position, not by token.
fn context(m: &Module) -> Option<usize> {
    let top = &m.regions[m.top];
    let mut main: HashSet<Value> =
        top.args.iter().copied().filter(|&v| &*m.values[v].name == "input_ids").collect();
    let mut bound = None;
    for &op in &top.ops {
        let data = &m.ops[op];
        if data.is("onnx.Shape") || data.is("onnx.Size") {
            continue;
        }
        let (tables, index): (&[usize], usize) = match data.name.as_str() {
            "onnx.Gather" => (&[0], 1),
            "onnx.RotaryEmbedding" => (&[1, 2], 3),
            "com.microsoft.RotaryEmbedding" => (&[2, 3], 1),
            _ => (&[], 0),
        };
        let position = |v: Value| !main.contains(&v) && m.const_of(v).is_none();
        if data.operand(index).is_some_and(position) {
            for table in tables.iter().filter_map(|&i| data.operand(i)) {
                let table = m.const_of(table).map(|c| &m.consts[c]);
                let rows = table.filter(|c| c.elem.is_float() && c.dims.len() == 2).map(|c| c.shape()[0]);
                bound = bound.into_iter().chain(rows).min();
            }
        }
        if dialects::ir::graph::reads(m, op).iter().any(|v| main.contains(v)) {
            main.extend(data.results.iter().flatten());
        }
    }
    bound
}

/// The model with a key/value cache: as it is when it has one, and else as the pass add-kv-cache makes it.
pub fn cached(mut m: Module, registry: &Registry, term: Term) -> Result<Module, Error> {
    if !passes::add_kv_cache::has_cache(&m) {
        let pipeline = Pipeline::parse("add-kv-cache", registry, &[], &[])?;
        let env = DriverEnv::without_data(registry.ops(), term);
        driver::run(&mut m, &pipeline, registry, &env, &driver::Options::default())?;
    }
    Ok(m)
}
