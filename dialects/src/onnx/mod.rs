//! The `onnx` dialect (the default ONNX domain): one file per op or family of siblings, and one line here.

use crate::ops::OpDef;

mod attention;
mod binary;
pub mod cast;
mod channel_norm;
mod compare;
mod constant;
mod control;
mod conv;
mod gather;
pub(crate) mod matmul;
mod movement;
mod normalization;
mod order;
mod pad;
mod pool;
mod recurrent;
mod reduce;
mod reshape;
pub(crate) mod rotary;
mod scatter;
mod select;
mod softmax;
mod unary;
pub mod util;
mod window;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[
    attention::OPS,
    binary::OPS,
    cast::OPS,
    channel_norm::OPS,
    compare::OPS,
    constant::OPS,
    control::OPS,
    conv::OPS,
    gather::OPS,
    matmul::OPS,
    movement::OPS,
    normalization::OPS,
    order::OPS,
    pad::OPS,
    pool::OPS,
    recurrent::OPS,
    reduce::OPS,
    reshape::OPS,
    rotary::OPS,
    scatter::OPS,
    select::OPS,
    softmax::OPS,
    unary::OPS,
];
