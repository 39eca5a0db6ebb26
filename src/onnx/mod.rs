//! ONNX files, in and out.
//!
//! [`import`] maps a file and makes a [`dialects::ir::Module`] of it without copying weights; [`export`] writes one.
//! A module that no pass has touched is written as the same model, field for field.

mod proto;
mod rope;
mod scan;
