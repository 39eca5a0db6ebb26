//! Every kernel, compiled and run on random shapes, against the interpreter or arithmetic in float64.
#![allow(unsafe_code)]

mod attention;
mod harness;
mod models;
mod packed;
mod rotary;
mod softmax;
