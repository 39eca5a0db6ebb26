//! Pools and padding, against the interpreter.

use crate::models::{check, check_left, check_on, model};
use dialects::ops::Item;
use dialects::tensor::Tensor;

#[test]
fn pools_of_every_form() {
    for (size, attrs) in [
        ("8x8", "kernel_shape=[2, 2], strides=[2, 2]"),
        ("9x7", "kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]"),
        ("9x20", "kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 1], ceil_mode=1"),
        ("5x6", "kernel_shape=[5, 6]"),
        ("5x6", "kernel_shape=[5, 5]"),
        ("17", "kernel_shape=[5], dilations=[2], pads=[2, 2]"),
        ("11x1", "kernel_shape=[4, 1], auto_pad=\"SAME_UPPER\""),
        ("3x2", "kernel_shape=[2, 2]"),
    ] {
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x 3x{size}xf32>) {{
  %a = onnx.MaxPool(%x) {{{attrs}}}
  %c = onnx.AveragePool(%x) {{{attrs}}}
  %d = onnx.AveragePool(%x) {{count_include_pad=1, {attrs}}}
  %e = onnx.Neg(%a)
  %f = onnx.Add(%c, %d)
  %g = onnx.GlobalAveragePool(%x)
  %h = onnx.GlobalMaxPool(%x)
  return %e, %a, %f, %d, %g, %h
}}
"
        ));
        check(&m, &[&[("b", 1)], &[("b", 2)], &[("b", 0)]], 7, 2e-6);
    }
}

#[test]
fn the_greatest_of_nothing_and_of_no_number() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<1x1x12xf32>) {
  %y = onnx.MaxPool(%x) {kernel_shape=[3], pads=[2, 2]}
  return %y
}
",
    );
    let mut x = vec![f32::NEG_INFINITY; 12];
    (x[4], x[11]) = (f32::NAN, 3.0);
    let run = vec![(m.regions[m.top].args[0], Item::from(Tensor::new(&[1, 1, 12], x).unwrap()))];
    check_on(&m, &[run], &|_| None, 1, 0.0);
}

#[test]
fn padding_of_any_dims() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 4x s x 3xf32>, %i : tensor<b x 5xi64>) {
  const %channels : tensor<8xi64> [0, 2, 0, 0, 0, 3, 0, 0]
  const %around : tensor<8xi64> [1, 0, 2, 1, 0, 1, 3, 2]
  const %last : tensor<2xi64> [1, 4]
  const %axis : tensor<1xi64> [-1]
  const %value : tensor<f32> 1.5
  const %seven : tensor<i64> 7
  %a = onnx.Pad(%x, %channels)
  %c = onnx.Pad(%x, %around, %value)
  %d = onnx.Pad(%i, %last, %seven, %axis)
  return %a, %c, %d
}
",
    );
    let dims: &[&[(&str, usize)]] =
        &[&[("b", 1), ("s", 1)], &[("b", 3), ("s", 9)], &[("b", 2), ("s", 0)], &[("b", 0), ("s", 2)]];
    check(&m, dims, 3, 0.0);
    for (pads, attrs) in [("[0, 0, 0, -1, 0, 0, 0, 0]", ""), ("[0, 0, 0, 1, 0, 0, 0, 1]", "mode=\"reflect\"")]
    {
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x 4x s x 3xf32>) {{
  const %pads : tensor<8xi64> {pads}
  %a = onnx.Pad(%x, %pads) {{{attrs}}}
  return %a
}}
"
        ));
        check_left(&m, "onnx.Pad");
    }
}

#[test]
fn one_number_in_every_place() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x s xf32>) {
  const %none : tensor<0xi64> []
  %shape = onnx.Shape(%x)
  %f = onnx.ConstantOfShape(%shape)
  %y = onnx.Add(%f, %x)
  %t = onnx.ConstantOfShape(%none) {value=tensor<1xbool> [true]}
  %n = onnx.Not(%t)
  %i = onnx.ConstantOfShape(%shape) {value=tensor<1xi32> [-7]}
  return %y, %n, %i, %f
}
",
    );
    check(&m, &[&[("b", 1), ("s", 1)], &[("b", 3), ("s", 9)], &[("b", 2), ("s", 0)]], 4, 0.0);
}

#[test]
fn pools_that_no_kernel_does() {
    for (op, size) in [("MaxPool", "b x 2x s"), ("AveragePool", "b x 2x s"), ("MaxPool", "b x 2x5x5x5")] {
        let ones = if size.ends_with('s') { "2" } else { "2, 2, 2" };
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<{size} x f32>) {{
  %y = onnx.{op}(%x) {{kernel_shape=[{ones}]}}
  return %y
}}
"
        ));
        check_left(&m, &format!("onnx.{op}"));
    }
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 2x9xf32>) {
  %y, %at = onnx.MaxPool(%x) {kernel_shape=[2]}
  return %y, %at
}
",
    );
    check_left(&m, "onnx.MaxPool");
}
