//! The `onnx` dialect (the default ONNX domain): one file per op or family of siblings, and one line here.

use crate::ops::OpDef;

mod attention;
mod binary;
mod blocks;
mod boxes;
pub mod cast;
mod causal_conv;
mod channel_norm;
mod compare;
mod constant;
mod control;
pub(crate) mod conv;
mod conv_transpose;
mod det;
mod einsum;
mod fourier;
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
mod resize;
mod rotary;
mod sample;
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
    blocks::OPS,
    boxes::OPS,
    causal_conv::OPS,
    cast::OPS,
    channel_norm::OPS,
    compare::OPS,
    constant::OPS,
    control::OPS,
    conv::OPS,
    conv_transpose::OPS,
    det::OPS,
    einsum::OPS,
    fourier::OPS,
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
    resize::OPS,
    rotary::OPS,
    sample::OPS,
    scatter::OPS,
    select::OPS,
    softmax::OPS,
    unary::OPS,
];
