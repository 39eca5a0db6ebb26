//! Calibration data: inputs on which passes watch a model's activations.

use crate::term::Term;
use dialects::ir::{Module, Symbol};
use dialects::ops::Ops;
use dialects::tensor::Tensor;
use std::path::PathBuf;
use thiserror::Error;

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
    /// Calibration samples [default: all rows of a file, at most 128]
    #[arg(long, value_name = "N")]
    pub calib_samples: Option<usize>,
    /// Tokens per sample
    #[arg(long, value_name = "N")]
    pub seq_len: Option<usize>,
    /// Which rows of a token file: its first ones, or random ones
    #[arg(long, value_name = "ORDER", value_enum, default_value_t)]
    pub calib_order: Order,
    /// Seed of everything that is random
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
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

/// Calibration data is missing or wrong.
#[derive(Clone, Debug, Error)]
#[error("{message}")]
pub struct CalibError {
    /// What is wrong: the file, the input, what was expected and found.
    pub message: String,
    /// What to give.
    pub help: Option<String>,
}

/// Values of the model's inputs for one run, by name.
pub type Batch = Vec<(Symbol, Tensor)>;

/// Calibration data, ready to be fed.
pub struct Calibration {
    batches: Vec<Batch>,
    /// What the data is, for the report: `64 x 256 tokens from calib_ids.npy`.
    pub description: String,
    /// What the user should know of it, such as fewer samples than asked.
    pub warnings: Vec<String>,
    /// BLAKE3 of the data that is fed.
    pub hash: [u8; 32],
}

impl Calibration {
    /// Opens the data that `options` name, or makes some by sampling from the model itself when it is a causal
    /// language model. `m` is the model before any pass.
    pub fn open(options: &Options, _m: &Module, _ops: &Ops, _term: &Term) -> Result<Calibration, CalibError> {
        let message = match &options.calib {
            Some(path) => format!("calibration data cannot be read yet: {}", path.display()),
            None => "calibration data is needed, and none can be made yet".into(),
        };
        Err(CalibError { message, help: None })
    }

    /// The batches in order.
    pub fn batches(&self) -> impl ExactSizeIterator<Item = Result<Batch, CalibError>> + '_ {
        self.batches.iter().cloned().map(Ok)
    }
}
