//! Convolutions, against the interpreter.

use crate::models::{check, check_left, model};

/// Sizes of a convolution: spatial dims, channels, filters, the kernel, and attributes.
type Sizes = (&'static [usize], usize, usize, &'static [usize], &'static str);

const CONVOLUTIONS: &[Sizes] = &[
    (&[8, 8], 3, 8, &[3, 3], "pads=[1, 1, 1, 1]"),
    (&[9, 7], 5, 6, &[3, 3], ""),
    (&[16, 33], 2, 5, &[3, 3], "pads=[1, 0, 2, 1], strides=[1, 2]"),
    (&[17, 20], 4, 4, &[5, 3], "pads=[2, 1, 2, 1], strides=[2, 3], dilations=[1, 2]"),
    (&[11, 13], 3, 7, &[1, 1], "strides=[2, 2]"),
    (&[6, 5], 9, 10, &[1, 1], ""),
    (&[12, 12], 6, 6, &[3, 3], "group=6, pads=[1, 1, 1, 1]"),
    (&[12, 31], 6, 12, &[3, 3], "group=3, pads=[0, 1, 0, 1], strides=[2, 1]"),
    (&[20, 19], 3, 5, &[7, 7], "pads=[3, 3, 3, 3], strides=[2, 2]"),
    (&[5, 5], 3, 2, &[3, 3], "auto_pad=\"SAME_UPPER\", strides=[2, 2]"),
    (&[6, 6], 2, 3, &[4, 2], "auto_pad=\"SAME_LOWER\""),
    (&[40], 4, 9, &[5], "pads=[2, 2]"),
    (&[30, 1], 7, 3, &[5, 1], ""),
    (&[1, 1], 7, 3, &[1, 1], ""),
    (&[3, 2], 1, 1, &[3, 2], ""),
    (&[2, 3], 3, 2, &[2, 2], "pads=[1, 1, 1, 1]"),
    (&[50], 2, 3, &[25], "pads=[12, 12], strides=[4]"),
    (&[2, 3, 4], 3, 5, &[1, 1, 1], ""),
];

fn dims(sizes: &[usize]) -> String {
    sizes.iter().map(|n| n.to_string()).collect::<Vec<_>>().join("x")
}

#[test]
fn windows_of_every_form() {
    for (i, &(spatial, channels, filters, kernel, attrs)) in CONVOLUTIONS.iter().enumerate() {
        let bias = if i % 3 == 0 { "" } else { ", %bias" };
        let depth = attrs.find("group=").map_or(1, |at| attrs[at + 6..][..1].parse::<usize>().unwrap());
        let depth = channels / depth;
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x {channels}x{0}xf32>) {{
  const %w : tensor<{filters}x{depth}x{1}xf32> random(1)
  const %bias : tensor<{filters}xf32> random(2)
  %y = onnx.Conv(%x, %w{bias}) {{{attrs}}}
  return %y
}}
",
            dims(spatial),
            dims(kernel),
        ));
        check(&m, &[&[("b", 1)], &[("b", 3)], &[("b", 0)]], 1, 2e-6);
    }
}

#[test]
fn what_comes_after_a_convolution() {
    // A bias by channel, a normalization, a residual connection, a gate for each channel of each image, an activation.
    for size in ["8x8", "7x13", "1x3"] {
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x 4x{size}xf32>, %r : tensor<b x 6x{size}xf32>, %gate : tensor<b x 6x1x1xf32>, %one : tensor<6x{size}xf32>) {{
  const %w : tensor<6x4x3x3xf32> random(1)
  const %c : tensor<6x1x1xf32> random(2)
  const %scale : tensor<6xf32> [1.0, 2.0, 0.5, -1.0, 0.1, 3.0]
  const %shift : tensor<6xf32> random(3)
  const %mean : tensor<6xf32> random(4)
  const %variance : tensor<6xf32> [1.0, 2.0, 0.5, 0.25, 0.1, 3.0]
  %p = onnx.Conv(%x, %w) {{pads=[1, 1, 1, 1]}}
  %q = onnx.Add(%p, %c)
  %n = onnx.BatchNormalization(%q, %scale, %shift, %mean, %variance)
  %s = onnx.Add(%r, %n)
  %t = onnx.Mul(%s, %gate)
  %u = onnx.Sub(%t, %one)
  %y = onnx.Relu(%u)
  return %y, %p
}}
"
        ));
        check(&m, &[&[("b", 1)], &[("b", 3)], &[("b", 0)]], 7, 4e-6);
    }
}

#[test]
fn a_normalization_by_itself() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 3x5x7xf32>, %v : tensor<b x 3xf32>, %own : tensor<3xf32>) {
  const %scale : tensor<3xf32> [1.0, 2.0, -0.5]
  const %shift : tensor<3xf32> random(3)
  const %mean : tensor<3xf32> random(4)
  const %variance : tensor<3xf32> [1.0, 2.0, 0.5]
  %a = onnx.BatchNormalization(%x, %scale, %shift, %mean, %variance) {epsilon=0.01}
  %c = onnx.BatchNormalization(%v, %scale, %shift, %mean, %variance)
  return %a, %c
}
",
    );
    check(&m, &[&[("b", 1)], &[("b", 4)], &[("b", 0)]], 2, 2e-6);
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 3x5x7xf32>, %v : tensor<3xf32>) {
  const %c : tensor<3xf32> [1.0, 2.0, 0.5]
  %a = onnx.BatchNormalization(%x, %v, %c, %c, %c)
  return %a
}
",
    );
    check_left(&m, "onnx.BatchNormalization");
}

#[test]
fn convolutions_that_no_kernel_does() {
    for (x, w, attrs) in [
        ("b x 2x6x h xf32", "3x2x3x3xf32", ""),
        ("b x 2x5x5x5xf32", "3x2x3x3x3xf32", ""),
        ("b x 2x6x6xf64", "3x2x3x3xf64", ""),
    ] {
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<{x}>) {{
  const %w : tensor<{w}> random(1)
  %y = onnx.Conv(%x, %w) {{{attrs}}}
  return %y
}}
"
        ));
        check_left(&m, "onnx.Conv");
    }
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 2x6x6xf32>, %w : tensor<3x2x3x3xf32>) {
  %y = onnx.Conv(%x, %w)
  return %y
}
",
    );
    check_left(&m, "onnx.Conv");
}
