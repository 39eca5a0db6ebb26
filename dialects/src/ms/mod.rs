//! The `com.microsoft` ops that exported models use, but for those that packed weights run on (`quant` has them).
//!
//! An op that is made of ops of the default domain is evaluated and inferred through them ([`part::Part`]), so that
//! each kernel exists once. Source: ONNX Runtime's operator specification and, where it is silent, what its CPU
//! kernels compute.

use crate::ops::OpDef;

mod attention;
mod embed;
mod fused;
mod gelu;
mod group_query;
mod integer;
mod mask;
mod multi_head;
mod part;
mod qlinear;
mod rotary;
mod skip_norm;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[
    attention::OPS,
    embed::OPS,
    fused::OPS,
    gelu::OPS,
    group_query::OPS,
    integer::OPS,
    multi_head::OPS,
    qlinear::OPS,
    rotary::OPS,
    skip_norm::OPS,
];
