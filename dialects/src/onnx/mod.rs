//! The `onnx` dialect (the default ONNX domain): one file per op or family of siblings, and one line here.

use crate::ops::OpDef;

mod attention;
pub mod attributes;
mod binary;
mod bit_cast;
pub mod cast;
mod channel_norm;
mod compare;
mod constant;
mod control;
mod conv;
mod dropout;
mod flex_attention;
pub mod functions;
mod gather;
mod linear_attention;
mod loss;
mod lp_normalization;
pub(crate) mod matmul;
mod movement;
mod normalization;
mod order;
mod pad;
mod pool;
mod recurrent;
mod reduce;
mod reshape;
mod reverse_sequence;
mod rotary;
mod scatter;
mod select;
mod sequence;
mod softmax;
mod unary;
mod unique;
pub mod util;
mod window;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[
    attention::OPS,
    binary::OPS,
    bit_cast::OPS,
    cast::OPS,
    channel_norm::OPS,
    compare::OPS,
    constant::OPS,
    control::OPS,
    conv::OPS,
    dropout::OPS,
    flex_attention::OPS,
    gather::OPS,
    linear_attention::OPS,
    loss::OPS,
    lp_normalization::OPS,
    matmul::OPS,
    movement::OPS,
    normalization::OPS,
    order::OPS,
    pad::OPS,
    pool::OPS,
    recurrent::OPS,
    reduce::OPS,
    reshape::OPS,
    reverse_sequence::OPS,
    rotary::OPS,
    scatter::OPS,
    select::OPS,
    sequence::OPS,
    softmax::OPS,
    unary::OPS,
    unique::OPS,
];
