//! The `onnx` dialect (the default ONNX domain): one file per op or family of siblings, and one line here.

use crate::ops::OpDef;

mod attention;
pub mod attributes;
mod binary;
mod bit_cast;
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
mod dropout;
mod einsum;
mod flex_attention;
mod fourier;
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
mod resize;
mod reverse_sequence;
pub(crate) mod rotary;
mod sample;
mod scatter;
mod select;
mod sequence;
mod softmax;
mod unary;
mod unique;
pub mod util;
mod window;

pub use conv::Conv;
pub use movement::cut;
pub use window::{Sliding, Window};

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[
    attention::OPS,
    binary::OPS,
    bit_cast::OPS,
    blocks::OPS,
    boxes::OPS,
    cast::OPS,
    causal_conv::OPS,
    channel_norm::OPS,
    compare::OPS,
    constant::OPS,
    control::OPS,
    conv::OPS,
    conv_transpose::OPS,
    det::OPS,
    dropout::OPS,
    einsum::OPS,
    flex_attention::OPS,
    fourier::OPS,
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
    resize::OPS,
    reverse_sequence::OPS,
    rotary::OPS,
    sample::OPS,
    scatter::OPS,
    select::OPS,
    sequence::OPS,
    softmax::OPS,
    unary::OPS,
    unique::OPS,
];
