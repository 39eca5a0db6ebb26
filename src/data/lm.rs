//! Language models: how one is recognized, and how it is fed with rows of tokens.
//!
//! One takes `input_ids`, integers `[batch, seq]`; of its other inputs, `attention_mask`, `position_ids` and
//! `token_type_ids` are filled in. A causal one gives `logits`, floats `[batch, seq, vocabulary]`.

use super::Batch;
use dialects::exec::{ExecError, Executor, run_once};
use dialects::ir::{Elem, Module, Symbol, Type, Value};
use dialects::ops::Item;
use dialects::tensor::Tensor;
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
    /// It wants a cache.
    #[error(
        "the input {0:?} is a key/value cache, which is not supported yet: export the model without a cache"
    )]
    Cache(Symbol),
    /// It wants something that cannot be guessed.
    #[error("the input {name:?} of type {ty} cannot be filled in from tokens")]
    Input {
        /// The input.
        name: Symbol,
        /// Its type.
        ty: Type,
    },
}

/// What fills an input beside the tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    /// Ones: every token counts.
    Ones,
    /// 0, 1, 2, ... along the row.
    Positions,
    /// Zeros: one segment.
    Zeros,
}

/// The inputs that are filled in.
const FILLS: [(&str, Fill, &str); 3] = [
    ("attention_mask", Fill::Ones, "ones"),
    ("position_ids", Fill::Positions, "0, 1, 2, ..."),
    ("token_type_ids", Fill::Zeros, "zeros"),
];

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
    inputs: Vec<(Symbol, Elem, Option<Fill>)>,
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
        let inputs = free_inputs(m).map(|v| input(m, v)).collect::<Result<_, _>>()?;
        let vocab = embedding_rows(m, ids);
        let logits = logits(m);
        let logits_dim = logits.as_ref().ok().and_then(|&v| fixed(m, v, 2)).or(vocab).unwrap_or(1);
        Ok(Lm { logits, vocab, batch: fixed(m, ids, 0), len: fixed(m, ids, 1), inputs, logits_dim })
    }

    /// What is fed beside the tokens, in words; `None` when nothing is.
    pub fn filled(&self) -> Option<String> {
        let words = |name: &str| FILLS.iter().find(|f| f.0 == name).map(|f| format!("{name} with {}", f.2));
        let list: Vec<String> = self.inputs.iter().filter_map(|(name, ..)| words(name)).collect();
        (!list.is_empty()).then(|| format!("fed {}", list.join(", ")))
    }

    /// Rows for one run of rows of `len` tokens, before [`Lm::probe`] is asked.
    fn rows_per_run(&self, len: usize) -> usize {
        let row = len.saturating_mul(self.logits_dim).saturating_mul(size_of::<f32>()).max(1);
        self.batch.unwrap_or((LOGITS_BYTES / row).min(RUN_TOKENS / len.max(1)).max(1))
    }

    /// A run's inputs for rows of `len` tokens, row after row in `ids`.
    pub fn batch_of(&self, ids: &[i64], len: usize) -> Batch {
        let shape = [ids.len() / len, len];
        let make = |(name, elem, fill): &(Symbol, Elem, Option<Fill>)| {
            let values: Vec<i64> = match fill {
                None => ids.to_vec(),
                Some(Fill::Ones) => vec![1; ids.len()],
                Some(Fill::Zeros) => vec![0; ids.len()],
                Some(Fill::Positions) => (0..ids.len()).map(|i| (i % len) as i64).collect(),
            };
            (name.clone(), cast(*elem, &shape, values))
        };
        self.inputs.iter().map(make).collect()
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

/// The name and type of an input, and what fills it.
fn input(m: &Module, v: Value) -> Result<(Symbol, Elem, Option<Fill>), LmError> {
    let data = &m.values[v];
    let unknown = || LmError::Input { name: data.name.clone(), ty: data.ty.clone() };
    if data.name.starts_with("past_key") {
        return Err(LmError::Cache(data.name.clone()));
    }
    let elem = data.ty.elem().ok_or_else(unknown)?;
    if &*data.name == "input_ids" {
        return Ok((data.name.clone(), elem, None));
    }
    let fill = FILLS.iter().find(|f| *f.0 == *data.name).map(|f| f.1).ok_or_else(unknown)?;
    let legal = matches!(elem, Elem::I64 | Elem::I32)
        || fill == Fill::Ones && matches!(elem, Elem::Bool | Elem::F32 | Elem::F16 | Elem::BF16);
    if !legal || !ranked(m, v, 2) {
        return Err(unknown());
    }
    Ok((data.name.clone(), elem, Some(fill)))
}

/// Rows of the table that the ids look up.
fn embedding_rows(m: &Module, ids: Value) -> Option<usize> {
    let looked_up = m.regions[m.top].ops.iter().map(|&op| &m.ops[op]).find(|op| {
        let gather = op.is("onnx.Gather") || op.is("com.microsoft.GatherBlockQuantized");
        gather && op.operand(1) == Some(ids)
    })?;
    fixed(m, looked_up.operand(0)?, 0)
}

fn cast(elem: Elem, shape: &[usize], values: Vec<i64>) -> Tensor {
    let made = match elem {
        Elem::I64 => Tensor::new(shape, values),
        Elem::I32 => Tensor::new(shape, values.iter().map(|&v| v as i32).collect::<Vec<_>>()),
        Elem::Bool => Tensor::new(shape, values.iter().map(|&v| v != 0).collect::<Vec<_>>()),
        _ => Tensor::from_f32(elem, shape, values.iter().map(|&v| v as f32).collect()),
    };
    made.expect("the element type was checked when the model was recognized")
}

/// Whether logits agree but for rounding, with room for what quantized activations make of it.
fn close(a: &[f32], b: &[f32]) -> bool {
    let most = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 0.05 * most)
}

/// A batch as inputs of `m`, by their names; what `m` does not have is left out.
pub fn inputs_of(m: &Module, batch: Batch) -> Vec<(Value, Item)> {
    let args = &m.regions[m.top].args;
    batch.into_iter().filter_map(|(name, t)| Some((named(m, args, &name)?, t.into()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dialects::ir::Dim;

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
