//! From qcc's graph to machine code for CPUs: fusion, MLIR text, memory plans.
//!
//! Everything here is pure Rust and works without LLVM: kernels are emitted as text by pure functions, and a
//! [`Compiler`] (the crate `codegen-mlir`, in a process of its own) turns that text into machine code.

pub mod artifact;
pub mod build;
pub mod compile;
pub mod driver;
pub mod fuse;
pub mod header;
pub mod jit;
pub mod kernels;
pub mod layout;
pub mod link;
pub mod lower;
pub mod memory;
pub mod plan;
pub mod simplify;
pub mod size;
pub mod target;
pub mod text;

pub use compile::{CompileError, Compiler, Form, Request};
pub use jit::Native;
pub use size::Size;
pub use target::{Feature, Target};
