//! The `onnx` dialect (the default ONNX domain): one file per op or family of siblings, and one line here.

use crate::ops::OpDef;

mod attention;
mod channel_norm;
mod conv;
mod matmul;
mod normalization;
mod pool;
mod recurrent;
mod rotary;
mod softmax;
mod window;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[
    attention::OPS,
    channel_norm::OPS,
    conv::OPS,
    pool::OPS,
    matmul::OPS,
    normalization::OPS,
    recurrent::OPS,
    rotary::OPS,
    softmax::OPS,
];
