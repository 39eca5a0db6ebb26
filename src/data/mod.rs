//! Arrays and tokens from outside, and what a language model is fed with: the ground of calibration and evaluation.

pub mod feed;
pub mod inputs;
pub mod lm;
pub mod npy;
pub mod npz;
pub mod tokens;

use dialects::ir::Symbol;
use dialects::tensor::Tensor;

/// Values of a model's inputs for one run, by name.
pub type Batch = Vec<(Symbol, Tensor)>;
