//! Reductions, against the interpreter.

use crate::models::{Here, check, check_on, model};
use codegen::Native;
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use std::sync::Arc;

#[test]
fn reductions_over_every_run_of_dims() {
    let m = model(
        "module ir_version=10 opsets {onnx=18}
graph @main(%x : tensor<b x 3 x s x 37xf32>, %i : tensor<b x s x i64>) {
  const %last : tensor<1xi64> [-1]
  const %middle : tensor<2xi64> [1, 2]
  const %first : tensor<1xi64> [0]
  const %tail : tensor<2xi64> [3, 2]
  %a = onnx.ReduceSum(%x, %last)
  %b = onnx.ReduceMean(%x, %middle) {keepdims=0}
  %c = onnx.ReduceMax(%x, %first)
  %d = onnx.ReduceMin(%x, %tail)
  %e = onnx.ReduceL2(%x, %last) {keepdims=0}
  %f = onnx.ReduceL1(%x)
  %g = onnx.ReduceSumSquare(%x, %middle)
  %h = onnx.ReduceSum(%i, %last)
  %j = onnx.ReduceMax(%i, %first)
  %k = onnx.Cast(%i) {to=6}
  %l = onnx.ReduceMin(%k, %last)
  %n = onnx.ReduceSum(%k, %first)
  return %a, %b, %c, %d, %e, %f, %g, %h, %j, %l, %n
}
",
    );
    let dims: &[&[(&str, usize)]] = &[&[("b", 1), ("s", 1)], &[("b", 2), ("s", 9)], &[("b", 3), ("s", 41)]];
    check(&m, dims, 12, 2e-6);
    // Of nothing.
    check(&m, &[&[("b", 2), ("s", 0)]], 12, 2e-6);
}

#[test]
fn extremes_keep_what_is_no_number() {
    let m = model(
        "module ir_version=10 opsets {onnx=18}
graph @main(%x : tensor<2 x n x f32>) {
  const %last : tensor<1xi64> [1]
  %a = onnx.ReduceMax(%x, %last)
  %b = onnx.ReduceMin(%x, %last)
  return %a, %b
}
",
    );
    let input = m.regions[m.top].args[0];
    for at in [0, 7, 40] {
        let mut x: Vec<f32> = (0..82).map(|i| i as f32 - 30.0).collect();
        x[at] = f32::NAN;
        x[60] = f32::NEG_INFINITY;
        let run = vec![(input, Item::from(Tensor::new(&[2, 41], x).unwrap()))];
        check_on(&m, &[run], &|_| Some(41), 2, 0.0);
    }
}

#[test]
fn what_is_scattered_or_unknown_is_left_alone() {
    let m = model(
        "module ir_version=10 opsets {onnx=18}
graph @main(%x : tensor<s x 3 x 4xf32>, %axes : tensor<1xi64>) {
  const %apart : tensor<2xi64> [0, 2]
  %a = onnx.ReduceSum(%x, %apart)
  %b = onnx.ReduceSum(%x, %axes)
  %c = onnx.ReduceSum(%x) {noop_with_empty_axes=1}
  %d = onnx.ReduceLogSumExp(%x)
  return %a, %b, %c, %d
}
",
    );
    let native = Native::new(Ops::standard(), Arc::new(Here));
    let keep = m.regions[m.top].results.clone();
    let (_, _, summary) = native.compile(&m, &[], &keep).unwrap();
    assert_eq!(summary.compiled, 0, "{summary}");
}
