//! The `onnx` dialect (the default ONNX domain): one file per op or family of siblings, and one line here.

use crate::ops::OpDef;

mod matmul;
mod normalization;
mod softmax;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[matmul::OPS, normalization::OPS, softmax::OPS];
