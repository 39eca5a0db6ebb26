//! Quantized ops: qcc's own `quant` dialect and the `com.microsoft` ops that packed weights run on.

use crate::ops::OpDef;

/// Every family of ops in this dialect.
pub const FAMILIES: &[&[OpDef]] = &[];
