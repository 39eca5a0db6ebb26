//! Every kernel, compiled and run on random shapes, against the interpreter or arithmetic in float64.
#![allow(unsafe_code)]

mod attention;
mod conv;
mod dense;
mod gather;
mod harness;
mod instructions;
mod integer;
mod models;
mod movement;
mod packed;
mod pointwise;
mod pool;
mod range;
mod reduce;
mod rotary;
mod softmax;
mod versions;
