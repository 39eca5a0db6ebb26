//! The driver of qcc: the only place that touches files, terminals, clocks and users.

pub mod files;
pub mod onnx;
