//! Rules that bring a graph into the form that other passes expect.

use super::Plain;

/// Rules.
pub const PLAINS: &[Plain] = &[];
