//! ONNX files, in and out.
//!
//! [`import`] maps a file and makes a [`dialects::ir::Module`] of it without copying weights; [`export`] writes one.
//! A module that no pass has touched is written as the same model, field for field.

mod attributes;
pub mod error;
pub mod export;
pub mod external;
pub mod import;
mod order;
mod proto;
mod rest;
mod rope;
mod scan;
mod tensors;
mod types;
pub mod values;

/// The newest operator set of ONNX that is known here.
pub const MAX_OPSET: i64 = 28;

/// The newest IR version of ONNX that is known here.
pub const MAX_IR: i64 = 14;
