//! Calibration data: inputs on which passes watch a model's activations.
//!
//! It is tokens, arrays, noise, or, for a causal language model to which nothing was given, tokens sampled from the
//! model itself. It is fed in runs of bounded size, the same for every pass and every number of threads.

mod arrays;
mod noise;
mod sample;

pub use crate::data::Batch;
use crate::data::lm::{Lm, LmError};
use crate::data::tokens::{self, Rows, Take, TokenError};
use crate::driver::NEEDED;
use crate::files::{self, FileError};
use crate::term::Term;
use arrays::Arrays;
use dialects::exec::{ExecError, Executor};
use dialects::ir::Module;
use dialects::ir::interp::Interpreter;
use dialects::ops::Ops;
use noise::Noise;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Samples taken from a file when the user names no number.
const SAMPLES: usize = 128;

/// Tokens of a sample at most, when the user names no number.
const SEQ_LEN: usize = 2048;

/// Samples that are made when there is no file, and tokens in each.
const MADE: (usize, usize) = (32, 128);

/// Samples on which models are compared, when the user names no number.
const MEASURED: usize = 16;

/// Fewer tokens than this are not tried where a model fails on more.
const SHORTEST: usize = 8;

/// What the command line says about calibration data.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Calibration")]
pub struct Options {
    /// Calibration data: tokens.npy, inputs.npz (names are the model's inputs), text.txt (with --tokenizer), or `random`
    #[arg(long, value_name = "FILE")]
    pub calib: Option<PathBuf>,
    /// Tokenizer for calibration text (tokenizer.json)
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Calibration samples [default: those of the file, at most 128]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub calib_samples: Option<usize>,
    /// Tokens of a sample at most [default: 2048]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub seq_len: Option<usize>,
    /// Which rows of a file: its first ones, or random ones
    #[arg(long, value_name = "ORDER", value_enum, default_value_t)]
    pub calib_order: Order,
    /// Seed of everything that is random
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Samples on which the outputs of models are compared, by what measures them
    #[arg(long, visible_alias = "rows", value_name = "N", value_parser = positive, default_value_t = MEASURED)]
    pub measure_samples: usize,
}

/// In which order the rows of a file are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    /// As they stand.
    #[default]
    First,
    /// At random, by the seed.
    Random,
}

/// A number of things, at least one.
pub(crate) fn positive(s: &str) -> Result<usize, String> {
    s.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a number from 1".to_string())
}

/// Calibration data is missing or wrong.
#[derive(Clone, Debug, Error)]
#[error("{message}")]
pub struct CalibError {
    /// What is wrong: the file, the input, what was expected and found.
    pub message: String,
    /// What to give.
    pub help: Option<String>,
}

impl CalibError {
    fn new(message: impl Into<String>, help: impl Into<String>) -> CalibError {
        CalibError { message: message.into(), help: Some(help.into()) }
    }

    fn plain(message: impl ToString) -> CalibError {
        CalibError { message: message.to_string(), help: None }
    }
}

impl From<TokenError> for CalibError {
    fn from(e: TokenError) -> CalibError {
        CalibError::plain(e)
    }
}

impl From<FileError> for CalibError {
    fn from(e: FileError) -> CalibError {
        CalibError::plain(e)
    }
}

/// Where the values of a run come from.
enum Source {
    Tokens { lm: Lm, rows: Rows, per_run: usize },
    Arrays(Arrays),
    Noise(Noise),
}

/// Calibration data, ready to be fed.
pub struct Calibration {
    source: Source,
    /// What the data is, for the report: `64 x 256 tokens from calib_ids.npy`.
    pub description: String,
    /// What the user should know of it, such as fewer samples than asked.
    pub warnings: Vec<String>,
    /// What the user may want to know, such as inputs that were filled in.
    pub notes: Vec<String>,
    /// BLAKE3 of the data that is fed.
    pub hash: [u8; 32],
}

/// What every way of opening data needs.
struct Opening<'a> {
    options: &'a Options,
    m: &'a Module,
    exec: &'a dyn Executor,
    term: &'a Term,
}

impl Calibration {
    /// Opens the data that `options` name, or makes some by sampling from the model itself when it is a causal
    /// language model. `m` is the model before any pass.
    pub fn open(options: &Options, m: &Module, ops: &Ops, term: &Term) -> Result<Calibration, CalibError> {
        let exec = Interpreter::new(ops.clone());
        let opening = Opening { options, m, exec: &exec, term };
        let mut calibration = match &options.calib {
            None => opening.sampled()?,
            Some(path) if path.as_os_str() == "random" => opening.noise()?,
            Some(path) => opening.file(path)?,
        };
        calibration.hash = calibration.digest()?;
        Ok(calibration)
    }

    fn new(source: Source, description: String) -> Calibration {
        Calibration { source, description, warnings: Vec::new(), notes: Vec::new(), hash: [0; 32] }
    }

    fn runs(&self) -> usize {
        match &self.source {
            Source::Tokens { rows, per_run, .. } => rows.count().div_ceil(*per_run),
            Source::Arrays(arrays) => arrays.runs(),
            Source::Noise(noise) => noise.runs(),
        }
    }

    /// Samples in a run.
    fn per_run(&self) -> usize {
        match &self.source {
            Source::Tokens { per_run, .. } => *per_run,
            Source::Arrays(arrays) => arrays.per_run(),
            Source::Noise(_) => 1,
        }
    }

    /// The batches in order.
    pub fn batches(&self) -> impl ExactSizeIterator<Item = Result<Batch, CalibError>> + '_ {
        self.first(usize::MAX)
    }

    /// The batches of the first `samples` samples. Arrays, and models of a fixed batch, come in whole runs, so that it
    /// may be some more.
    pub fn first(&self, samples: usize) -> impl ExactSizeIterator<Item = Result<Batch, CalibError>> + '_ {
        let per_run = self.per_run();
        (0..self.runs().min(samples.div_ceil(per_run))).map(move |run| self.batch(run, samples))
    }

    /// One of the batches, counted from 0, of [`Calibration::first`] of `samples`.
    pub fn batch(&self, run: usize, samples: usize) -> Result<Batch, CalibError> {
        match &self.source {
            Source::Tokens { lm, rows, .. } => {
                let per_run = self.per_run();
                let ids = rows.chunks(per_run).nth(run).expect("runs are counted by the rows");
                let wanted = if lm.batch.is_some() { per_run } else { samples - run * per_run };
                Ok(lm.batch_of(&ids[..ids.len().min(wanted.saturating_mul(rows.len))], rows.len))
            }
            Source::Arrays(arrays) => Ok(arrays.batch(run)),
            Source::Noise(noise) => Ok(noise.batch(run)),
        }
    }

    /// Samples that there are.
    pub fn samples(&self) -> usize {
        match &self.source {
            Source::Tokens { rows, .. } => rows.count(),
            Source::Arrays(arrays) => arrays.samples(),
            Source::Noise(noise) => noise.runs(),
        }
    }

    /// The tokens of a row, where rows of tokens are fed.
    pub fn tokens(&self) -> Option<usize> {
        match &self.source {
            Source::Tokens { rows, .. } => Some(rows.len),
            _ => None,
        }
    }

    /// The hash of names, types, shapes and elements of all that is fed.
    fn digest(&self) -> Result<[u8; 32], CalibError> {
        let mut hasher = blake3::Hasher::new();
        for batch in self.batches() {
            for (name, tensor) in batch? {
                hasher.update(format!("{name}: {} {:?}\n", tensor.elem(), tensor.shape()).as_bytes());
                hasher.update(&tensor.to_const().read().map_err(CalibError::plain)?);
            }
        }
        Ok(*hasher.finalize().as_bytes())
    }
}

impl Opening<'_> {
    fn take(&self) -> Take {
        Take {
            rows: self.options.calib_samples.unwrap_or(SAMPLES),
            len: self.options.seq_len.unwrap_or(SEQ_LEN),
            random: self.options.calib_order == Order::Random,
            seed: self.options.seed,
        }
    }

    /// The language model, which tokens are to be fed to.
    fn lm(&self, path: &Path) -> Result<Lm, CalibError> {
        Lm::of(self.m).map_err(|e| {
            let message =
                format!("{} holds tokens, but the model cannot be fed with them: {e}", path.display());
            CalibError::new(message, "give --calib inputs.npz, with an array for each of the model's inputs")
        })
    }

    /// Tells by a file's first bytes what it is.
    fn file(&self, path: &Path) -> Result<Calibration, CalibError> {
        let bytes = files::map(path)?;
        if bytes.is_empty() {
            return Err(CalibError::plain(format!(
                "{}: expected calibration data, found an empty file",
                path.display()
            )));
        }
        if bytes.starts_with(b"PK") {
            return self.arrays(path);
        }
        let npy = bytes.starts_with(b"\x93NUMPY") || path.extension().is_some_and(|e| e == "npy");
        let lm = self.lm(path)?;
        let mut take = self.take();
        take.len = lm.len.unwrap_or(take.len);
        let rows = match &self.options.tokenizer {
            _ if npy => tokens::read(path, take)?,
            Some(tokenizer) => tokens::read_text(path, tokenizer, take)?,
            None => {
                return Err(CalibError::new(
                    format!("{} is neither .npy nor .npz, and text needs a tokenizer", path.display()),
                    "give --tokenizer tokenizer.json, the model's own",
                ));
            }
        };
        rows.check(path, lm.vocab)?;
        if let Some(len) = lm.len.filter(|&len| len != rows.len) {
            let found = format!("found rows of {}", rows.len);
            return Err(CalibError::plain(format!(
                "{}: the model takes {len} tokens, {found}",
                path.display()
            )));
        }
        let (count, len) = (rows.count(), rows.len);
        let mut c = self.tokens(lm, rows, format!("{count} x {len} tokens from {}", path.display()))?;
        self.short(&mut c, path, count, len);
        Ok(c)
    }

    /// Warns of less data than was asked for.
    fn short(&self, c: &mut Calibration, path: &Path, samples: usize, len: usize) {
        let path = path.display();
        if let Some(asked) = self.options.calib_samples.filter(|&asked| asked > samples) {
            c.warnings.push(format!("{path}: {samples} calibration samples, {asked} were asked for"));
        }
        if let Some(asked) = self.options.seq_len.filter(|&asked| asked > len) {
            c.warnings.push(format!("{path}: samples of {len} tokens, {asked} were asked for"));
        }
    }

    fn tokens(&self, lm: Lm, rows: Rows, description: String) -> Result<Calibration, CalibError> {
        let (per_run, why) = lm.probe(self.exec, self.m, rows.len).map_err(|e| self.cannot_run(e))?;
        let notes = lm.filled().into_iter().chain(why).collect();
        let source = Source::Tokens { lm, rows, per_run };
        Ok(Calibration { notes, ..Calibration::new(source, description) })
    }

    fn cannot_run(&self, e: ExecError) -> CalibError {
        match e {
            ExecError::UnknownOp { .. } => CalibError::new(format!("calibration: {e}"), NEEDED),
            e => CalibError::plain(format!("calibration: the model cannot be run: {e}")),
        }
    }

    /// Tokens that the model makes itself.
    fn sampled(&self) -> Result<Calibration, CalibError> {
        let help = "give --calib tokens.npy, inputs.npz or text.txt, or --calib random for noise";
        let refused = |e: LmError| CalibError::new(format!("calibration data is needed: {e}"), help);
        let lm = Lm::of(self.m).map_err(refused)?;
        lm.logits.clone().map_err(refused)?;
        let (count, len) =
            (self.options.calib_samples.unwrap_or(MADE.0), self.options.seq_len.unwrap_or(MADE.1));
        let mut len = lm.len.unwrap_or(len);
        let asked = lm.len.is_some() || self.options.seq_len.is_some();
        // A model of a short context fails on more tokens than it has positions.
        while !asked && len > SHORTEST && !lm.takes(self.exec, self.m, len) {
            len /= 2;
        }
        let seed = self.options.seed;
        let rows = sample::rows(&lm, self.m, self.exec, (count, len), seed, self.term)
            .map_err(|e| CalibError { help: Some(help.into()), ..self.cannot_run(e) })?;
        let description = format!("{count} x {len} tokens sampled from the model itself (seed {seed})");
        self.tokens(lm, rows, description)
    }

    fn arrays(&self, path: &Path) -> Result<Calibration, CalibError> {
        let take = self.take();
        let (arrays, notes) = Arrays::open(path, self.m, take)?;
        let (arrays, why) = arrays.probe(self.exec, self.m).map_err(|e| self.cannot_run(e))?;
        let samples = arrays.samples();
        let description = format!("{samples} samples from {}", path.display());
        let mut c = Calibration::new(Source::Arrays(arrays), description);
        c.notes = notes.into_iter().chain(why).collect();
        self.short(&mut c, path, samples, usize::MAX);
        Ok(c)
    }

    /// Noise: random tokens for a language model, for another what its inputs declare.
    fn noise(&self) -> Result<Calibration, CalibError> {
        let count = self.options.calib_samples.unwrap_or(MADE.0);
        let seed = self.options.seed;
        if let Ok(lm) = Lm::of(self.m)
            && let Some(vocab) = lm.vocab
        {
            let len = lm.len.or(self.options.seq_len).unwrap_or(MADE.1);
            let rows = noise::tokens(vocab, count, len, seed);
            return self.tokens(lm, rows, format!("{count} x {len} random tokens (seed {seed})"));
        }
        let noise = Noise::of(self.m, count, self.options.seq_len, seed)?;
        let description = format!("{} of noise (seed {seed})", crate::report::paint::count(count, "sample"));
        let mut c = Calibration::new(Source::Noise(noise), description);
        c.warnings.push("calibration data is noise: give real inputs where the result matters".into());
        Ok(c)
    }
}
