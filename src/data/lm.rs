//! Causal language models: how one is recognized, and how it is fed with rows of tokens.
//!
//! One takes `input_ids`, integers `[batch, seq]`, and gives `logits`, floats `[batch, seq, vocabulary]`. Of its other
//! inputs, `attention_mask`, `position_ids` and `token_type_ids` are filled in.

use super::Batch;
use dialects::exec::{ExecError, Executor, run_once};
use dialects::ir::{Elem, Module, Symbol, Type, Value};
use dialects::ops::Item;
use dialects::tensor::Tensor;
use thiserror::Error;

/// Logits of one run take at most this many bytes, where more than one row goes into it.
const LOGITS_BYTES: usize = 64 << 20;

/// More rows than this in one run gain no speed.
const MAX_ROWS: usize = 16;

/// Tokens in a row of the probe.
const PROBE_LEN: usize = 8;

/// Why a model cannot be fed with tokens.
#[derive(Clone, Debug, Error)]
pub enum LmError {
    /// It is another kind of model.
    #[error("this is not a causal language model: {0}")]
    NotOne(String),
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

/// A causal language model's inputs and output.
#[derive(Clone, Debug)]
pub struct CausalLm {
    /// `logits`.
    pub logits: Value,
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

impl CausalLm {
    /// Recognizes a causal language model by its inputs and outputs.
    pub fn of(m: &Module) -> Result<CausalLm, LmError> {
        let not = |why: &str| LmError::NotOne(why.to_string());
        let named = |list: &[Value], name: &str| list.iter().copied().find(|&v| &*m.values[v].name == name);
        let top = &m.regions[m.top];
        let ids = named(&top.args, "input_ids").ok_or_else(|| not("it has no input \"input_ids\""))?;
        let rank = |v: Value| m.ty(v).dims().map(<[_]>::len);
        if !matches!(m.ty(ids).elem(), Some(Elem::I64 | Elem::I32)) || rank(ids).is_some_and(|r| r != 2) {
            return Err(not(&format!("its input_ids are {}, not int64 [batch, seq]", m.ty(ids))));
        }
        let logits = named(&top.results, "logits").ok_or_else(|| not("it has no output \"logits\""))?;
        if m.ty(logits).elem().is_some_and(|e| !e.is_float()) || rank(logits).is_some_and(|r| r != 3) {
            let ty = m.ty(logits);
            return Err(not(&format!("its logits are {ty}, not floats [batch, seq, vocabulary]")));
        }
        let inputs = free_inputs(m).map(|v| input(m, v)).collect::<Result<_, _>>()?;
        let vocab = embedding_rows(m, ids);
        let logits_dim = fixed(m, logits, 2).or(vocab).unwrap_or(1);
        Ok(CausalLm { logits, vocab, batch: fixed(m, ids, 0), len: fixed(m, ids, 1), inputs, logits_dim })
    }

    /// What is fed beside the tokens, in words; `None` when nothing is.
    pub fn filled(&self) -> Option<String> {
        let words = |name: &str| FILLS.iter().find(|f| f.0 == name).map(|f| format!("{name} with {}", f.2));
        let list: Vec<String> = self.inputs.iter().filter_map(|(name, ..)| words(name)).collect();
        (!list.is_empty()).then(|| format!("fed {}", list.join(", ")))
    }

    /// Rows for one run of rows of `len` tokens, before [`CausalLm::probe`] is asked.
    fn rows_per_run(&self, len: usize) -> usize {
        let row = len.saturating_mul(self.logits_dim).saturating_mul(size_of::<f32>()).max(1);
        self.batch.unwrap_or((LOGITS_BYTES / row).clamp(1, MAX_ROWS))
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
        if rows == 1 || self.batch.is_some() {
            return Ok((rows, None));
        }
        let len = self.len.unwrap_or(len.min(PROBE_LEN));
        let vocab = self.vocab.unwrap_or(2).max(1);
        let ids: Vec<i64> = (0..rows * len).map(|i| (i * 7 % vocab) as i64).collect();
        let logits = |ids: &[i64]| -> Result<Vec<f32>, ExecError> {
            let got = run_once(exec, m, &inputs_of(m, self.batch_of(ids, len)), &[self.logits])?;
            let tensor = got[0].tensor().map_err(|e| ExecError::Sink(e.to_string()))?;
            Ok(tensor.to_f32().map_err(|e| ExecError::Sink(e.to_string()))?.into_owned())
        };
        let alone = logits(&ids[(rows - 1) * len..])?;
        let why = match logits(&ids) {
            Err(e) => format!("it fails on a batch of {rows}: {e}"),
            Ok(all) if all.len() == rows * alone.len() && close(&all[all.len() - alone.len()..], &alone) => {
                return Ok((rows, None));
            }
            Ok(_) => format!("a row comes out differently in a batch of {rows} than alone"),
        };
        Ok((1, Some(format!("the model is fed one row at a time: {why}"))))
    }
}

/// The name and type of an input, and what fills it.
fn input(m: &Module, v: Value) -> Result<(Symbol, Elem, Option<Fill>), LmError> {
    let data = &m.values[v];
    let unknown = || LmError::Input { name: data.name.clone(), ty: data.ty.clone() };
    if data.name.starts_with("past_key_values") || data.name.starts_with("past_key") {
        return Err(LmError::Cache(data.name.clone()));
    }
    let elem = data.ty.elem().ok_or_else(unknown)?;
    if &*data.name == "input_ids" {
        return Ok((data.name.clone(), elem, None));
    }
    let fill = FILLS.iter().find(|f| *f.0 == *data.name).map(|f| f.1).ok_or_else(unknown)?;
    let legal = matches!(elem, Elem::I64 | Elem::I32)
        || fill == Fill::Ones && matches!(elem, Elem::Bool | Elem::F32 | Elem::F16 | Elem::BF16);
    if !legal || data.ty.dims().is_some_and(|d| d.len() != 2) {
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
    let find = |name: &str| args.iter().copied().find(|&v| *m.values[v].name == *name);
    batch.into_iter().filter_map(|(name, t)| Some((find(&name)?, t.into()))).collect()
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
        let lm = CausalLm::of(&m).unwrap();
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
        let why = |inputs: &[(&str, Elem, usize)]| CausalLm::of(&model(inputs)).unwrap_err().to_string();
        assert!(why(&[("image", Elem::F32, 3)]).contains("no input \"input_ids\""));
        assert!(why(&[("input_ids", Elem::F32, 2)]).contains("not int64"));
        assert!(why(&[("input_ids", Elem::I64, 1)]).contains("not int64"));
        let ids = ("input_ids", Elem::I64, 2);
        assert!(why(&[ids, ("past_key_values.0.key", Elem::F32, 3)]).contains("cache"));
        assert!(why(&[ids, ("temperature", Elem::F32, 1)]).contains("\"temperature\""));
        assert!(why(&[ids, ("attention_mask", Elem::I64, 3)]).contains("\"attention_mask\""));
        assert!(why(&[ids, ("position_ids", Elem::F32, 2)]).contains("\"position_ids\""));
        assert!(CausalLm::of(&model(&[ids])).unwrap().filled().is_none());
    }

    #[test]
    fn runs_are_bounded() {
        let lm = CausalLm::of(&model(&[("input_ids", Elem::I64, 2)])).unwrap();
        assert_eq!(lm.rows_per_run(8), MAX_ROWS);
        assert_eq!(lm.rows_per_run(LOGITS_BYTES / (7 * 4 * 3)), 3);
        assert_eq!(lm.rows_per_run(usize::MAX), 1);
    }
}
