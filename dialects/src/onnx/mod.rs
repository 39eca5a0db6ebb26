//! The `onnx` dialect (the default ONNX domain): one file per op or family of siblings, and one line here.

use crate::ops::OpDef;

mod attention;
mod matmul;
mod normalization;
mod rotary;
mod softmax;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] =
    &[attention::OPS, matmul::OPS, normalization::OPS, rotary::OPS, softmax::OPS];
