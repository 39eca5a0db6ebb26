//! How far a model's outputs are from those that it had before: the measure by which quantized models are compared on
//! calibration data.
//!
//! A causal language model is compared by its next tokens, as `qcc eval` does it. Of any other model every float output
//! is compared, as the distribution that it is taken for ([`Kind`]). Positions are compared each by itself and summed in
//! their order, so that the figures do not depend on the number of threads.

use super::{Against, EvalError, Scores, Softmax, score, summary};
use crate::calibrate::{CalibError, Calibration};
use crate::data::Batch;
use crate::data::lm::{Lm, inputs_of};
use crate::files::{self, FileError};
use dialects::exec::{ExecError, Executor, Prepared};
use dialects::ir::{ConstData, Module, Value};
use dialects::tensor::{Tensor, TensorError};
use passes::{Distance, Progress};
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// Bytes of the baseline's outputs that are kept in files without a name; what does not fit is computed again.
const KEPT: u64 = 1 << 30;

/// Numbers that are compared as one piece of work, where the output has no rows.
const PIECE: usize = 4096;

/// Why a model cannot be compared with its baseline.
#[derive(Debug, Error)]
pub enum DistanceError {
    /// It cannot be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// Its next tokens cannot be scored.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The data cannot be read.
    #[error(transparent)]
    Data(#[from] CalibError),
    /// There is no room for the baseline's outputs.
    #[error(transparent)]
    File(#[from] FileError),
    /// An output cannot be read.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// Nothing to compare.
    #[error("the model has no float output to compare")]
    NoOutput,
    /// The outputs are others.
    #[error("the model has {found} outputs, the baseline {expected}")]
    Outputs {
        /// Those of the baseline.
        expected: usize,
        /// Those of the model.
        found: usize,
    },
    /// An output is of another shape.
    #[error("the output {name:?}: expected the shape {expected:?} of the baseline, found {found:?}")]
    Shape {
        /// The output.
        name: String,
        /// The baseline's shape.
        expected: Vec<usize>,
        /// The model's.
        found: Vec<usize>,
    },
}

/// What an output is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Logits of the last dim's classes; `log(p)` are some too.
    Logits,
    /// Probabilities, by a Softmax along this dim or, before operator set 13, along all dims from it on.
    Probabilities { axis: i64, flat: bool },
    /// The chance of each element by itself, by a Sigmoid.
    Chances,
    /// Numbers: one alone for each position, a vector without a batch, or a picture.
    Numbers,
}

/// The model that others are compared with, and what it gave.
pub struct Baseline {
    m: Module,
    samples: usize,
    limit: u64,
    kept: Mutex<Kept>,
}

/// The outputs of the first batches, in files without a name.
#[derive(Default)]
struct Kept {
    batches: HashMap<usize, Arc<Vec<ConstData>>>,
    bytes: u64,
}

/// Where and how to compare.
pub struct Comparing<'a> {
    /// Calibration data.
    pub data: &'a Calibration,
    /// Runs both models.
    pub exec: &'a dyn Executor,
    /// The folder for scratch files.
    pub scratch: &'a Path,
    /// A step for each batch.
    pub progress: &'a dyn Progress,
}

/// An output of the baseline that is compared.
struct Output {
    /// Its place among the model's outputs.
    at: usize,
    name: String,
    kind: Kind,
}

impl Baseline {
    /// Compares with `m`, on the first `samples` samples of the data.
    pub fn new(m: Module, samples: usize) -> Baseline {
        Baseline { m, samples, limit: KEPT, kept: Mutex::default() }
    }

    /// Batches that a comparison takes.
    pub fn batches(&self, data: &Calibration) -> usize {
        data.first(self.samples).len()
    }

    /// How far the outputs of `m` are from the baseline's.
    pub fn distance(&self, m: &Module, with: &Comparing) -> Result<Distance, DistanceError> {
        let tokens = with.data.tokens().filter(|_| Lm::of(&self.m).is_ok_and(|lm| lm.logits.is_ok()));
        let outputs = outputs(&self.m, tokens.is_some())?;
        let (expected, found) = (self.m.regions[self.m.top].results.len(), m.regions[m.top].results.len());
        if expected != found {
            return Err(DistanceError::Outputs { expected, found });
        }
        let mine = with.exec.prepare(m, &values(m, &outputs))?;
        let mut theirs = None;
        let mut positions = Vec::new();
        let mut sums = vec![Sums::default(); outputs.len()];
        for (i, batch) in with.data.first(self.samples).enumerate() {
            let batch = batch?;
            let ids = batch.iter().find(|(name, _)| &**name == "input_ids").map(|(_, t)| t.clone());
            let y = self.outputs_of(i, &batch, &outputs, &mut theirs, with)?;
            let x = run(m, &*mine, batch, &outputs)?;
            match (tokens, ids) {
                (Some(len), Some(ids)) => positions.extend(score(&ids.to_i64()?, len, &x, Some(&y))?),
                _ => {
                    for (((output, sums), x), y) in outputs.iter().zip(&mut sums).zip(&x).zip(&y) {
                        sums.add(output, x, y)?;
                    }
                }
            }
            if !with.progress.advance(1) {
                return Err(EvalError::Interrupted.into());
            }
        }
        let Some(len) = tokens else { return Ok(total(&outputs, &sums)) };
        if positions.is_empty() {
            return Err(EvalError::Short.into());
        }
        let Scores { perplexity, positions: n, against, .. } =
            summary(positions.len() / (len - 1), &positions, true);
        let Against { kl, baseline_perplexity, .. } = against.expect("it was scored against the baseline");
        let (perplexity, baseline_perplexity) = (Some(perplexity), Some(baseline_perplexity));
        Ok(Distance { kl, error: None, perplexity, baseline_perplexity, positions: n as u64 })
    }

    /// The baseline's outputs on a batch: those kept, or computed again.
    fn outputs_of<'m>(
        &'m self,
        i: usize,
        batch: &Batch,
        outputs: &[Output],
        prepared: &mut Option<Box<dyn Prepared + 'm>>,
        with: &Comparing<'m>,
    ) -> Result<Vec<Tensor>, DistanceError> {
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().batches.get(&i).cloned();
        if let Some(kept) = kept {
            return Ok(kept.iter().map(Tensor::from_const).collect::<Result<_, _>>()?);
        }
        let prepared = match prepared {
            Some(p) => p,
            None => prepared.insert(with.exec.prepare(&self.m, &values(&self.m, outputs))?),
        };
        let computed = run(&self.m, &**prepared, batch.clone(), outputs)?;
        let bytes = computed.iter().map(|t| t.data().byte_len() as u64).sum::<u64>();
        if lock().bytes + bytes <= self.limit {
            let stored = computed.iter().map(|t| store(t, with.scratch)).collect::<Result<_, _>>()?;
            let mut kept = lock();
            kept.bytes += bytes;
            kept.batches.insert(i, Arc::new(stored));
        }
        Ok(computed)
    }
}

/// A tensor in a file without a name.
fn store(t: &Tensor, folder: &Path) -> Result<ConstData, DistanceError> {
    let mut c = t.to_const();
    let bytes = c.read().map_err(TensorError::from)?;
    if !bytes.is_empty() {
        let mut map = files::scratch(folder, bytes.len())?;
        map.copy_from_slice(&bytes);
        c.source = Arc::new(bytes::Bytes::from_owner(map));
    }
    Ok(c)
}

fn values(m: &Module, outputs: &[Output]) -> Vec<Value> {
    outputs.iter().map(|o| m.regions[m.top].results[o.at]).collect()
}

/// The outputs of one run, in the order asked for.
fn run(
    m: &Module,
    prepared: &dyn Prepared,
    batch: Batch,
    outputs: &[Output],
) -> Result<Vec<Tensor>, DistanceError> {
    let wanted = values(m, outputs);
    let mut got: HashMap<Value, Tensor> = HashMap::new();
    prepared.run(&inputs_of(m, batch), &mut |v, item| {
        got.insert(v, item.tensor().map_err(|e| ExecError::Sink(e.to_string()))?.clone());
        Ok(())
    })?;
    Ok(wanted.iter().map(|v| got.get(v).cloned().expect("a prepared run gives every wanted value")).collect())
}

/// What of the baseline is compared: the logits of next tokens, or every float output.
fn outputs(m: &Module, next_tokens: bool) -> Result<Vec<Output>, DistanceError> {
    let results = m.regions[m.top].results.iter().copied().enumerate();
    let float = |v: Value| m.ty(v).elem().is_some_and(|e| e.is_float());
    let wanted = |v: Value| if next_tokens { &*m.values[v].name == "logits" } else { float(v) };
    let output = |(at, v): (usize, Value)| Output { at, name: m.value_label(v), kind: kind(m, v) };
    let found: Vec<Output> = results.filter(|&(_, v)| wanted(v)).map(output).collect();
    if found.is_empty() { Err(DistanceError::NoOutput) } else { Ok(found) }
}

/// What an output is taken for, by the op that makes it.
fn kind(m: &Module, v: Value) -> Kind {
    let mut maker = m.def_op(v).map(|(op, _)| &m.ops[op]);
    while let Some(op) = maker.filter(|op| op.is("onnx.Identity") || op.is("onnx.Cast")) {
        maker = op.operand(0).and_then(|v| m.def_op(v)).map(|(op, _)| &m.ops[op]);
    }
    let flat = m.opset("onnx") < 13;
    match maker {
        Some(op) if op.is("onnx.Softmax") => {
            let axis = op.attrs.int("axis").unwrap_or(if flat { 1 } else { -1 });
            Kind::Probabilities { axis, flat }
        }
        Some(op) if op.is("onnx.Sigmoid") => Kind::Chances,
        _ => match m.ty(v).dims().map(|d| (d.len(), d.last().and_then(|d| d.known()))) {
            Some((0 | 1, _) | (4.., _) | (_, Some(1))) => Kind::Numbers,
            _ => Kind::Logits,
        },
    }
}

/// What one output adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sums {
    kl: f64,
    positions: u64,
    /// |y - y'|^2
    off: f64,
    /// |y|^2
    norm: f64,
    count: u64,
}

impl Sums {
    /// Adds the output `x` of the model on one batch, and the baseline's `y`.
    fn add(&mut self, output: &Output, x: &Tensor, y: &Tensor) -> Result<(), DistanceError> {
        let shape = y.shape();
        if x.shape() != shape {
            let (expected, found) = (shape.to_vec(), x.shape().to_vec());
            return Err(DistanceError::Shape { name: output.name.clone(), expected, found });
        }
        let (q, p) = (x.to_f32()?, y.to_f32()?);
        let last = shape.last().copied().unwrap_or(1).max(1);
        let piece = if output.kind == Kind::Logits { last } else { PIECE };
        let pieces: Vec<(f64, f64, f64)> = p
            .par_chunks(piece)
            .zip(q.par_chunks(piece))
            .map(|(p, q)| {
                let squares = |f: fn(f64, f64) -> f64| {
                    p.iter().zip(q).map(|(&p, &q)| f(p.into(), q.into()).powi(2)).sum::<f64>()
                };
                (divergence(output.kind, p, q), squares(|p, q| p - q), squares(|p, _| p))
            })
            .collect();
        for (kl, off, norm) in pieces {
            self.kl += kl;
            self.off += off;
            self.norm += norm;
        }
        self.count += p.len() as u64;
        self.positions += match output.kind {
            Kind::Logits => p.len() / last,
            Kind::Probabilities { axis, flat } => {
                let rank = shape.len() as i64;
                let axis = usize::try_from(if axis < 0 { axis + rank } else { axis }).unwrap_or(0);
                let classes: usize = if flat {
                    shape.iter().skip(axis).product()
                } else {
                    shape.get(axis).copied().unwrap_or(1)
                };
                p.len() / classes.max(1)
            }
            Kind::Chances | Kind::Numbers => p.len(),
        } as u64;
        Ok(())
    }

    /// The mean divergence, and the relative squared error.
    fn result(&self, kind: Kind) -> (f64, f64) {
        let error = if self.off == 0.0 { 0.0 } else { self.off / self.norm };
        match kind {
            Kind::Numbers => (error / 2.0, error),
            _ => (self.kl / self.positions.max(1) as f64, error),
        }
    }
}

/// The summed divergence of all distributions in these numbers of the baseline, `p`, and of the model, `q`.
fn divergence(kind: Kind, p: &[f32], q: &[f32]) -> f64 {
    // A probability that vanished by rounding is the least that the type holds; what is no number stays none.
    let term = |p: f64, q: f64, least: f64| {
        let (p, q) = (if p < least { least } else { p }, if q < least { least } else { q });
        p * (p / q).ln()
    };
    let pairs = p.iter().zip(q).map(|(&p, &q)| (f64::from(p), f64::from(q)));
    match kind {
        Kind::Logits => Softmax::of(p).divergence(p, &Softmax::of(q), q),
        Kind::Probabilities { .. } => pairs.map(|(p, q)| term(p, q, f32::MIN_POSITIVE.into())).sum(),
        Kind::Chances => {
            let least = f64::from(f32::EPSILON) / 2.0;
            pairs.map(|(p, q)| term(p, q, least) + term(1.0 - p, 1.0 - q, least)).sum()
        }
        Kind::Numbers => 0.0,
    }
}

/// All outputs together.
fn total(outputs: &[Output], sums: &[Sums]) -> Distance {
    let results: Vec<(f64, f64)> = outputs.iter().zip(sums).map(|(o, s)| s.result(o.kind)).collect();
    Distance {
        kl: results.iter().map(|r| r.0).sum(),
        error: Some(results.iter().map(|r| r.1).sum::<f64>() / results.len() as f64),
        perplexity: None,
        baseline_perplexity: None,
        positions: sums.iter().map(|s| s.positions).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::{self, Calibration};
    use crate::data::tokens::{self, Take};
    use crate::eval::{Subject, evaluate};
    use crate::term::Term;
    use dialects::ir::interp::Interpreter;
    use dialects::ir::{infer, parse};
    use dialects::ops::Ops;
    use std::path::PathBuf;

    fn module(result: &str, body: &str) -> Module {
        let text = format!(
            "module ir_version=10 opsets {{onnx=17}}\ngraph @main(%x : tensor<2x3xf32>) {{\n{body}\n  return {result}\n}}\n"
        );
        let mut m = parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
        assert!(infer::infer(&mut m, &Ops::standard()).is_empty());
        m
    }

    fn open(m: &Module, options: calibrate::Options) -> Calibration {
        Calibration::open(&options, m, &Ops::standard(), &Term::new(true)).unwrap()
    }

    fn noise(m: &Module, samples: usize) -> Calibration {
        open(
            m,
            calibrate::Options {
                calib: Some("random".into()),
                calib_samples: Some(samples),
                ..Default::default()
            },
        )
    }

    fn distance(baseline: &Baseline, m: &Module, data: &Calibration) -> Result<Distance, DistanceError> {
        let (exec, progress) = (Interpreter::new(Ops::standard()), Term::new(true).task("", 0));
        let scratch = std::env::temp_dir();
        baseline.distance(m, &Comparing { data, exec: &exec, scratch: &scratch, progress: &*progress })
    }

    #[test]
    fn outputs_are_told_apart_by_what_makes_them() {
        let kind_of = |body: &str| {
            let m = module("%y", body);
            kind(&m, m.regions[m.top].results[0])
        };
        assert_eq!(kind_of("  %y = onnx.Relu(%x) : ?"), Kind::Logits);
        let softmax = Kind::Probabilities { axis: 0, flat: false };
        assert_eq!(kind_of("  %s = onnx.Softmax(%x) {axis=0} : ?\n  %y = onnx.Identity(%s) : ?"), softmax);
        assert_eq!(kind_of("  %y = onnx.Sigmoid(%x) : ?"), Kind::Chances);
        assert_eq!(kind_of("  %y = onnx.ReduceMean(%x) {axes=[1], keepdims=0} : ?"), Kind::Numbers);
        assert_eq!(kind_of("  %y = onnx.ReduceMean(%x) {axes=[1]} : ?"), Kind::Numbers);
    }

    #[test]
    fn divergences_worked_out_by_hand() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
        let probabilities = Kind::Probabilities { axis: -1, flat: false };
        // 3/4 ln 3 + 1/4 ln 1/3, and nothing for the second.
        near(divergence(probabilities, &[0.75, 0.25, 0.5, 0.5], &[0.25, 0.75, 0.5, 0.5]), 0.5 * 3f64.ln());
        near(divergence(Kind::Logits, &[3f32.ln(), 0.0], &[0.0, 3f32.ln()]), 0.5 * 3f64.ln());
        near(divergence(Kind::Chances, &[0.75], &[0.25]), 0.5 * 3f64.ln());
        // A probability of nothing costs much, but no infinity; nothing against nothing is nothing.
        let gone = divergence(probabilities, &[0.5, 0.5, 0.0], &[1.0, 0.0, 0.0]);
        assert!(gone > 40.0 && gone.is_finite(), "{gone}");
        assert!(divergence(Kind::Chances, &[1.0], &[1.0]).abs() < 1e-12);
        for kind in [probabilities, Kind::Logits, Kind::Chances] {
            assert!(divergence(kind, &[0.5, 0.5], &[f32::NAN, 0.5]).is_nan(), "{kind:?}");
        }
    }

    /// Twice the numbers against once: a relative squared error of one, a divergence of half of it.
    #[test]
    fn numbers_are_compared_by_their_error() {
        let by = |factor: &str| {
            module(
                "%y",
                &format!(
                    "  const %f : tensor<f32> [{factor}]\n  %s = onnx.Mul(%x, %f) : ?\n  \
                 %y = onnx.ReduceMean(%s) {{axes=[1]}} : ?"
                ),
            )
        };
        let (once, twice) = (by("1.0"), by("2.0"));
        let data = noise(&once, 3);
        let baseline = Baseline::new(once.clone(), usize::MAX);
        let got = distance(&baseline, &twice, &data).unwrap();
        assert_eq!((got.kl, got.error, got.positions, got.perplexity), (0.5, Some(1.0), 6, None));
        let none = distance(&baseline, &once, &data).unwrap();
        assert_eq!((none.kl, none.error), (0.0, Some(0.0)));
        // Fewer samples, and nothing kept, are fewer positions of the same kind.
        let less = Baseline { limit: 0, ..Baseline::new(once, 2) };
        assert_eq!(distance(&less, &twice, &data).unwrap().positions, 4);
    }

    /// Softmax in float64 by hand, over the columns.
    #[test]
    fn probabilities_count_by_their_axis() {
        let by = |factor: &str| {
            module(
                "%y",
                &format!(
                    "  const %f : tensor<f32> [{factor}]\n  %s = onnx.Mul(%x, %f) : ?\n  \
                 %y = onnx.Softmax(%s) {{axis=0}} : ?"
                ),
            )
        };
        let (a, b) = (by("1.0"), by("1.5"));
        let data = noise(&a, 2);
        let got = distance(&Baseline::new(a, usize::MAX), &b, &data).unwrap();
        let mut want = 0.0;
        for batch in data.batches() {
            let x = batch.unwrap()[0].1.f32s().unwrap().to_vec();
            for column in 0..3 {
                let (x, y) = (f64::from(x[column]), f64::from(x[column + 3]));
                let of = |f: f64| [1.0 / (1.0 + ((y - x) * f).exp()), 1.0 / (1.0 + ((x - y) * f).exp())];
                want += of(1.0).iter().zip(of(1.5)).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            }
        }
        assert_eq!(got.positions, 6);
        assert!((got.kl - want / 6.0).abs() < 1e-6, "{} {}", got.kl, want / 6.0);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let a = module("%y", "  %y = onnx.Relu(%x) : ?");
        let data = noise(&a, 1);
        let error = |a: &Module, b: &Module| {
            distance(&Baseline::new(a.clone(), 1), b, &data).unwrap_err().to_string()
        };
        let two = module("%y, %y", "  %y = onnx.Relu(%x) : ?");
        assert_eq!(error(&a, &two), "the model has 2 outputs, the baseline 1");
        let other = module("%y", "  %y = onnx.Transpose(%x) : ?");
        assert!(error(&a, &other).contains("expected the shape [2, 3] of the baseline, found [3, 2]"));
        let ints = module("%y", "  %y = onnx.Cast(%x) {to=7} : ?");
        assert_eq!(error(&ints, &ints), "the model has no float output to compare");
    }

    /// A language model on tokens: what `qcc eval` says of the same rows, whatever is kept.
    #[test]
    fn next_tokens_are_compared_as_they_are_evaluated() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models");
        let path: PathBuf = folder.join("calib_ids.npy");
        let mut m = crate::onnx::import::read(&folder.join("tinylm.onnx")).unwrap().module;
        assert!(infer::infer(&mut m, &Ops::standard()).is_empty());
        let mut other = m.clone();
        let head = passes::linear::linears(&m).pop().expect("the model has a head");
        let scaled = Tensor::from_const(&m.consts[head.konst]).unwrap();
        let scaled: Vec<f32> = scaled.f32s().unwrap().iter().map(|x| x * 1.1).collect();
        let shape = m.consts[head.konst].shape();
        let scaled = other.add_const(m.top, "", Tensor::new(&shape, scaled).unwrap().to_const());
        other.ops[head.op].operands[head.operand_index] = Some(scaled);

        let take = Take { rows: 3, len: 24, random: false, seed: 0 };
        let rows = tokens::read(&path, take).unwrap();
        let exec = Interpreter::new(Ops::standard());
        let subject = |m| Subject::new(m, &exec, rows.len).unwrap();
        let scores =
            evaluate(&subject(&other), Some(&subject(&m)), &rows, &*Term::new(true).task("", 0)).unwrap();
        let against = scores.against.unwrap();

        let options = calibrate::Options { calib: Some(path), seq_len: Some(24), ..Default::default() };
        let data = open(&m, options);
        let kept = Baseline::new(m.clone(), 3);
        let never = Baseline { limit: 0, ..Baseline::new(m, 3) };
        for baseline in [&kept, &kept, &never, &never] {
            let got = distance(baseline, &other, &data).unwrap();
            assert_eq!((got.kl, got.positions, got.error), (against.kl, 69, None));
            assert_eq!(got.perplexity, Some(scores.perplexity));
            assert_eq!(got.baseline_perplexity, Some(against.baseline_perplexity));
        }
        assert!(against.kl > 1e-4 && !kept.kept.lock().unwrap().batches.is_empty());
        assert!(never.kept.lock().unwrap().batches.is_empty());
    }
}
