//! Quantized ops: qcc's own `quant` dialect and the `com.microsoft` ops that packed weights run on.
//!
//! A lossy pass computes a quantized weight once, as constants in one canonical layout, and replaces the float
//! weight by `quant.dequantize`, so that the consumers stay what they were and the interpreter evaluates the
//! very weights that will ship. Packing passes then turn dequantize and consumer into what a runtime executes.
//!
//! `quant.dequantize(codes, scales, zero_points?) {bits, group_size, axis, shape, to}`:
//! - The weight is seen as rows: `[N, K]`, one row per output, groups of `group_size` along K, `kb = ceil(K / group_size)`.
//! - `codes`: u8 `[N, kb, ceil(group_size * container / 8)]`, where the container is 2, 4 or 8 bits, the least that
//!   holds `bits` (3-bit codes live in 4, 5- to 7-bit codes in 8); low-first along K; the last group is padded.
//! - `scales`: float `[N, kb]`. `zero_points`: u8 `[N, kb]`, one code per byte; left out: `2^(bits-1)`.
//! - `W[n, k] = (code - zero_point) * scale`.
//! - `shape` is the result's shape and `axis` the dim of it along which K runs; all dims but those of K and N are 1.
//!   `axis = 0` of `[K, N]` is a MatMul weight, `axis = 1` of `[N, K]` a Gemm weight with `transB` or an embedding.
//! - `to` is the result's element type, as ONNX numbers it.

use crate::ops::OpDef;

mod dequantize;
mod gather_block;
mod integer;
mod integer_conv;
mod matmul_nbits;
mod qdq;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] =
    &[dequantize::OPS, gather_block::OPS, integer::OPS, integer_conv::OPS, matmul_nbits::OPS, qdq::OPS];
