//! What a program is in qcc, and what each op means.
//!
//! `ir` holds the typed graph: module, types, attributes, lazily read constants, text form, verifier and
//! interpreter. `onnx`, `ms` and `quant` hold one file per op or op family; each op is one [`ops::OpDef`].
//! Nothing here touches files, terminals or clocks, and nothing here rewrites a graph on its own behalf.

pub mod exec;
pub mod ir;
pub mod kernel;
pub mod kernels;
pub mod ms;
pub mod onnx;
pub mod ops;
pub mod quant;
pub mod random;
pub mod tensor;

#[cfg(test)]
mod malformed;
#[cfg(test)]
mod testing;
