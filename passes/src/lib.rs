//! The passes of qcc: one file per pass, `awq.rs` is `--pass awq`.
//!
//! A pass is either exact (the same function over the reals) or lossy, and says which. It sees the outside
//! world only through [`Env`], which the driver implements: calibration data, scratch space, progress.

pub mod add_kv_cache;
pub mod awq;
pub mod bias_correct;
pub mod calibrate;
pub mod canonicalize;
pub mod computed;
pub mod const_fold;
pub mod dce;
pub mod eqsat;
pub mod equalize;
pub mod errors;
pub mod extremes;
pub mod f16_weights;
pub mod fold_scales;
pub mod fuse;
pub mod gemm;
pub mod gptq;
pub mod gram;
pub mod grid;
pub mod group;
pub mod inject_outliers;
pub mod insert_fake_quant;
pub mod islands;
pub mod linear;
pub mod linears;
pub mod llm_int8;
pub mod mixed;
pub mod operators;
pub mod outliers;
pub mod pack_int4;
pub mod pack_operators;
pub mod pack_qdq;
pub mod qtensor;
pub mod quantize;
pub mod raise_opset;
pub mod ranges;
pub mod reduce_range;
pub mod report;
pub mod rewrite;
pub mod rotate;
pub mod rtn;
pub mod scale;
pub mod sensitivity;
pub mod smooth_migrate;
pub mod store;
#[cfg(test)]
pub mod testing;
pub mod tied;
pub mod trial;

use dialects::exec::ExecError;
use dialects::ir::{Module, Op, OpName, Value};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
pub use report::{Report, WeightReport};
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::sync::Mutex;
pub use store::Store;
use thiserror::Error;

/// Whether a pass keeps the function that a model computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exactness {
    /// The same function over the reals; floats may round differently.
    Exact,
    /// Another function, close to the first; the pass reports how close.
    Lossy,
}

/// Whether a pass changed the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It did.
    Yes,
    /// It did not.
    No,
}

/// Ops that a pass works on or leaves behind, by full name, such as `onnx.MatMul`.
pub type OpSet = BTreeSet<&'static str>;

/// Why a pass gave up. The module is then not to be used.
#[derive(Debug, Error)]
pub enum PassError {
    /// The pass found nothing to work on.
    #[error("{pass} matched nothing: {why}")]
    Nothing {
        /// The pass.
        pass: &'static str,
        /// Why, and what to do about it.
        why: String,
    },
    /// An op or tensor that the pass cannot work with.
    #[error("{pass}: {what:?}: {why}")]
    At {
        /// The pass.
        pass: &'static str,
        /// The node or tensor.
        what: String,
        /// What was expected and what was found.
        why: String,
    },
    /// An option with a value that makes no sense.
    #[error("{pass}: option {option}: {why}")]
    Option {
        /// The pass.
        pass: &'static str,
        /// The option.
        option: &'static str,
        /// What was expected and what was found.
        why: String,
    },
    /// What the model is to run on has no such form.
    #[error("{pass}: {why}")]
    Profile {
        /// The pass.
        pass: &'static str,
        /// What it has no form for, and what to do instead.
        why: String,
    },
    /// Running the model on calibration data failed.
    #[error("calibration: {0}")]
    Exec(#[from] ExecError),
    /// The outside world failed: scratch space, calibration data, an interrupt.
    #[error("{0}")]
    Env(String),
}

/// What the outside world gives to passes.
pub trait Env: Sync {
    /// Runs the model on every calibration sample, in order, and streams the values `wanted` of the top region.
    /// Fails when there is no calibration data, and says what to give.
    fn calibrate(&self, m: &Module, wanted: &[Value], sink: &mut CalibSink) -> Result<(), PassError>;

    /// The calibration data before the first op, to be led through the model. Fails as [`Env::calibrate`] does.
    fn stream(&self) -> Result<Box<dyn Stream + '_>, PassError> {
        Err(PassError::Env("data cannot be led through a model step by step here".into()))
    }

    /// Where a pass leaves statistics of activations for those after it.
    fn statistics(&self) -> Option<&Mutex<Option<ranges::Statistics>>> {
        None
    }

    /// Statistics that the user gave, to be taken in place of those of a run over calibration data.
    fn given_statistics(&self) -> Option<&ranges::Statistics> {
        None
    }

    /// Whether those that a pass leaves are saved: they must say then of which model they are.
    fn saves_statistics(&self) -> bool {
        false
    }

    /// How far the outputs of `m` are from those of the model before the pipeline, over the calibration data, or as much
    /// of it as the user wants to measure on. Fails when there is no such data.
    fn distance(&self, _m: &Module) -> Result<Distance, PassError> {
        Err(PassError::Env("the outputs of models cannot be compared here".into()))
    }

    /// Bytes of the output, all files together, if the pipeline ended with `m`. Fails where no model of a form that can be
    /// measured is written.
    fn file_bytes(&self, _m: &Module) -> Result<u64, PassError> {
        Err(PassError::Env("the size of the output is only known where an .onnx file is written".into()))
    }

    /// A zeroed buffer of `len` bytes that does not count as anonymous memory when it is large.
    fn scratch(&self, len: usize) -> Result<Box<dyn Scratch>, PassError>;

    /// Starts a task of `total` steps that the user may want to watch.
    fn progress(&self, task: &str, total: u64) -> Box<dyn Progress>;

    /// A quantizing pass put `value` in the place of a float weight that `weight` makes, of as many elements in the
    /// same order. By it the driver tells what a pass rewired from what it rounded.
    fn quantized(
        &self,
        _value: Value,
        _weight: &dyn Fn() -> Result<Tensor, PassError>,
    ) -> Result<(), PassError> {
        Ok(())
    }

    /// Where finished work is kept between runs, if the user gave a place.
    fn store(&self) -> Option<&dyn Store> {
        None
    }
}

/// Calibration data on its way through a model.
pub trait Stream {
    /// Leads the data from where it stands to the values `to` of the top region. The values `peek` are computed too, but
    /// left behind: what leads from `to` to them is computed again by the next leg, and the module may be changed there
    /// until then. The leg must be run to its end.
    fn advance<'s>(
        &'s mut self,
        m: &'s Module,
        to: &[Value],
        peek: &[Value],
    ) -> Result<Box<dyn Leg + 's>, PassError>;
}

/// One leg of that way.
pub trait Leg {
    /// Leads the next batch, and gives each of the values asked for to the sink. `false` when there is none left.
    fn step(&mut self, sink: &mut CalibSink) -> Result<bool, PassError>;
}

/// How far a model's outputs are from those of another, the baseline.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Distance {
    /// Mean Kullback-Leibler divergence of the model's distributions from the baseline's, in nats for each position. Of
    /// several outputs it is the sum. Where an output is no distribution it is taken for the mean of one: a normal
    /// distribution whose variance is the mean square of the baseline's output, which gives half of `error`.
    pub kl: f64,
    /// |y - y'|^2 / |y|^2 of the outputs `y` of the baseline, averaged over outputs; `None` of next tokens.
    pub error: Option<f64>,
    /// exp of the mean negative log-likelihood of the next token, of a causal language model on tokens.
    pub perplexity: Option<f64>,
    /// The baseline's.
    pub baseline_perplexity: Option<f64>,
    /// Distributions that were compared: predicting tokens, rows of classes, single numbers.
    pub positions: u64,
}

/// Receives each wanted value of each calibration batch.
pub type CalibSink<'a> = dyn FnMut(Value, &Item) -> Result<(), ExecError> + 'a;

/// A buffer to fill once and then share.
pub trait Scratch: Send {
    /// The bytes, to be written.
    fn bytes(&mut self) -> &mut [u8];

    /// Makes it a tensor source.
    fn freeze(self: Box<Self>) -> std::sync::Arc<dyn dialects::ir::TensorSource>;
}

/// A task under way.
pub trait Progress: Send + Sync {
    /// `steps` more are done. Returns whether to go on; `false` after an interrupt.
    fn advance(&self, steps: u64) -> bool;
}

/// Settings that hold for the whole pipeline.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Go on when a quantizing pass finds nothing to work on.
    pub allow_noop: bool,
    /// Keep a scale that has no place as a `Mul`.
    pub allow_mul: bool,
    /// The int8-activation level written into packed ops (`accuracy_level`), from the profile.
    pub accuracy_level: i64,
    /// Write scales as f16 behind a Cast.
    pub f16_scales: bool,
    /// One quantized blob for a tied embedding and head.
    pub tied_shared: bool,
    /// Raise no opset; a form that needs a newer one is an error.
    pub keep_opset: bool,
    /// There is calibration data: passes that need none say with it what they did to outputs.
    pub measure: bool,
    /// What the model is to run on: a profile's name. Empty when it is not known.
    pub profile: String,
    /// Rewrite rules that the user gave.
    pub rules: eqsat::qrw::UserRules,
    /// Whether passes that rewrite by rules report by which ones.
    pub explain: bool,
}

/// What a pass sees beside the module.
pub struct PassCx<'a> {
    /// All known ops.
    pub ops: &'a Ops,
    /// The outside world.
    pub env: &'a dyn Env,
    /// Settings of the pipeline.
    pub settings: &'a Settings,
    /// What the pass says it did, and left.
    pub report: &'a mut Report,
    /// The passes that run after this one, in order.
    pub rest: &'a [&'a dyn Pass],
}

/// A pass. The struct that implements it *is* its option set: see [`PassDef`].
pub trait Pass: Send + Sync {
    /// The name, in kebab-case.
    fn name(&self) -> &'static str;
    /// One line for `--list-passes`.
    fn summary(&self) -> &'static str;
    /// Whether it keeps the function.
    fn exactness(&self) -> Exactness;
    /// Ops that it works on.
    fn consumes(&self) -> OpSet {
        OpSet::new()
    }
    /// Ops that it leaves behind.
    fn produces(&self) -> OpSet {
        OpSet::new()
    }
    /// Whether it rounds with more care than one weight at a time: it makes up for errors, or spreads a budget. Passes before it that scale weights first, and have an option
    /// `round`, then leave the rounding to it.
    fn compensates(&self) -> bool {
        false
    }
    /// Whether it rounds activations: what it does to the model's output is no matter of its weights alone.
    fn rounds_activations(&self) -> bool {
        false
    }
    /// Whether it rewrites by rules, those that the user gave among them.
    fn rewrites(&self) -> bool {
        false
    }
    /// Why the passes before it are not to quantize a weight, where this one gains nothing from its codes.
    fn leaves_float(&self, _m: &Module, _weight: &linear::Linear) -> Option<String> {
        None
    }
    /// Whether it runs the model on calibration data.
    fn needs_calibration(&self) -> bool {
        false
    }
    /// Changes the module.
    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError>;
}

/// A registered pass: its name and summary, its options with their defaults, and how to make one.
#[derive(Clone, Copy)]
pub struct PassDef {
    /// The name, in kebab-case.
    pub name: &'static str,
    /// The options with their default values, as JSON.
    pub defaults: fn() -> serde_json::Value,
    /// Makes the pass from options that are given (a JSON object); the rest take their defaults.
    pub make: fn(serde_json::Value) -> Result<Box<dyn Pass>, String>,
}

impl PassDef {
    /// The definition of `P`, whose fields are its options.
    pub fn of<P: Pass + Default + serde::Serialize + DeserializeOwned + 'static>(
        name: &'static str,
    ) -> PassDef {
        PassDef {
            name,
            defaults: || serde_json::to_value(P::default()).expect("options are plain data"),
            make: |given| {
                // Flattened groups of options would take their own defaults rather than those of the pass.
                let mut options = serde_json::to_value(P::default()).map_err(|e| e.to_string())?;
                match (options.as_object_mut(), given) {
                    (Some(options), serde_json::Value::Object(given)) => options.extend(given),
                    _ => return Err("options are names with values".into()),
                }
                let pass = serde_json::from_value::<P>(options).map_err(|e| e.to_string())?;
                Ok(Box::new(pass))
            },
        }
    }
}

/// Every pass of this crate, in the order of `--list-passes`.
pub const PASSES: &[fn() -> PassDef] = &[
    || PassDef::of::<canonicalize::Canonicalize>("canonicalize"),
    || PassDef::of::<const_fold::ConstFold>("const-fold"),
    || PassDef::of::<dce::Dce>("dce"),
    || PassDef::of::<fuse::Fuse>("fuse"),
    || PassDef::of::<linears::Linears>("linears"),
    || PassDef::of::<fold_scales::FoldScales>("fold-scales"),
    || PassDef::of::<equalize::Equalize>("equalize"),
    || PassDef::of::<rotate::Rotate>("rotate"),
    || PassDef::of::<inject_outliers::InjectOutliers>("inject-outliers"),
    || PassDef::of::<smooth_migrate::SmoothMigrate>("smooth-migrate"),
    || PassDef::of::<bias_correct::BiasCorrect>("bias-correct"),
    || PassDef::of::<rtn::Rtn>("rtn"),
    || PassDef::of::<awq::Awq>("awq"),
    || PassDef::of::<gptq::Gptq>("gptq"),
    || PassDef::of::<mixed::Mixed>(mixed::NAME),
    || PassDef::of::<llm_int8::LlmInt8>("llm-int8"),
    || PassDef::of::<reduce_range::ReduceRange>("reduce-range"),
    || PassDef::of::<calibrate::Calibrate>(calibrate::NAME),
    || PassDef::of::<insert_fake_quant::InsertFakeQuant>("insert-fake-quant"),
    || PassDef::of::<f16_weights::F16Weights>(f16_weights::NAME),
    || PassDef::of::<pack_int4::PackInt4>("pack-int4"),
    || PassDef::of::<pack_qdq::PackQdq>("pack-qdq"),
    || PassDef::of::<pack_operators::PackOperators>("pack-operators"),
    || PassDef::of::<raise_opset::RaiseOpset>("raise-opset"),
    || PassDef::of::<add_kv_cache::AddKvCache>("add-kv-cache"),
];

/// Which ops a quantizing pass may touch: `only` and `skip`, patterns with `*` matched against the node's name, the
/// weight's name and the op type. Part of every quantizing pass's options (`#[serde(flatten)]` it).
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Filter {
    /// When not empty, only what matches one of these.
    pub only: Vec<String>,
    /// Never what matches one of these.
    pub skip: Vec<String>,
}

impl Filter {
    /// Why an op with these names is not to be touched; `None` when it is.
    pub fn refuses(&self, names: &[&str], op: &OpName) -> Option<String> {
        let hit = |p: &&String| names.iter().copied().chain([op.op(), op.as_str()]).any(|n| glob(p, n));
        if let Some(p) = self.skip.iter().find(hit) {
            return Some(format!("skipped by the pattern {p:?}"));
        }
        if !self.only.is_empty() && !self.only.iter().any(|p| hit(&p)) {
            return Some("not among the patterns of `only`".into());
        }
        None
    }
}

/// Whether `text` matches `pattern`, where `*` stands for any run of characters.
pub fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(i) => rest = &rest[i + part.len()..],
            None => return false,
        }
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

impl PassCx<'_> {
    /// Counts something that the pass did, for `--stats`.
    pub fn count(&mut self, what: &str, n: u64) {
        self.report.count(what, n);
    }

    /// Whether a pass may find nothing to work on: the user allows it, or all weights stay float for the speed of it.
    pub fn may_find_nothing(&self) -> bool {
        self.settings.allow_noop || self.report.counts.contains_key(quantize::NONE_GAINS)
    }

    /// Reports a weight-bearing op that stays as it is, and why.
    pub fn left(&mut self, m: &Module, op: Op, why: impl Into<String>) {
        let data = &m.ops[op];
        self.report.leave(data.loc.clone(), data.name.clone(), why.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (pattern, text, want) in [
            ("*", "", true),
            ("a*c", "abc", true),
            ("a*c", "ab", false),
            ("abc", "abcd", false),
            ("*layers.1*", "/model/layers.1/q", true),
            ("a*a", "a", false),
            ("*b*b", "abb", true),
        ] {
            assert_eq!(glob(pattern, text), want, "{pattern} {text}");
        }
    }

    #[test]
    fn skip_beats_only() {
        let f = Filter { only: vec!["MatMul".into()], skip: vec!["*head*".into()] };
        let op = OpName::new("onnx", "MatMul");
        assert!(f.refuses(&["/layer/q"], &op).is_none());
        assert!(f.refuses(&["/lm_head"], &op).is_some());
        assert!(f.refuses(&["/layer/q"], &OpName::new("onnx", "Gemm")).is_some());
    }
}
