//! Runs what qcc compiled, without any compiler: loads a shared library, maps its weights, and calls its kernels on as many
//! threads as rayon has.
//!
//! ```no_run
//! use qcc_runtime::{Model, Tensor};
//! let model = Model::load("model.so")?;
//! let ids = Tensor::i64(&[1, 3], &[5, 6, 7]);
//! let outputs = model.run(&[ids])?;
//! # Ok::<(), qcc_runtime::ModelError>(())
//! ```

mod about;
pub mod cpu;
mod fault;
mod kernels;
mod model;
mod parallel;
mod tensor;

pub use about::{About, Dim, Elem, NO_VERSION, Port, VERSION, Version};
pub use fault::Fault;
pub use kernels::{Call, KernelError, Kernels};
pub use model::{Model, ModelError};
pub use parallel::Team;
pub use tensor::Tensor;
