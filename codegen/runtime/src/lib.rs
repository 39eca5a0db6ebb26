//! Runs what qcc compiled: loads a shared library and calls its kernels, on as many threads as rayon has.

mod kernels;
pub use kernels::{Call, KernelError, Kernels};
