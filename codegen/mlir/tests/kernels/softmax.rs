//! Softmax and LogSoftmax, against the interpreter.

use crate::models::{check, check_on, model};
use dialects::ops::Item;
use dialects::tensor::Tensor;

#[test]
fn rows_of_any_length() {
    for axis in ["", " {axis=2}", " {axis=-1}"] {
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x s x n xf32>) {{
  %y = onnx.Softmax(%x){axis}
  %z = onnx.LogSoftmax(%x){axis}
  return %y, %z
}}
"
        ));
        let lengths = [1, 3, 8, 16, 37, 200];
        let sizes: Vec<_> = lengths.map(|n| [("b", 2), ("s", 3), ("n", n)]).to_vec();
        let mut dims: Vec<&[(&str, usize)]> = sizes.iter().map(|s| &s[..]).collect();
        dims.extend([&[("b", 2), ("s", 0), ("n", 5)][..], &[("b", 1), ("s", 2), ("n", 0)]]);
        check(&m, &dims, 2, 1e-6);
    }
}

#[test]
fn infinities_and_nan() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 19 xf32>) {
  %y = onnx.Softmax(%x)
  %z = onnx.LogSoftmax(%x)
  return %y, %z
}
",
    );
    let mut x = vec![0f32; 6 * 19];
    x.iter_mut().enumerate().for_each(|(i, v)| *v = (i * 7 % 23) as f32 * 9.0 - 100.0);
    x[0..19].fill(f32::NEG_INFINITY);
    x[19 + 3] = f32::NEG_INFINITY;
    x[2 * 19 + 18] = f32::NAN;
    x[3 * 19 + 1] = f32::NAN;
    x[4 * 19 + 17] = f32::INFINITY;
    let given = Item::from(Tensor::new(&[6, 19], x).unwrap());
    let x = m.regions[m.top].args[0];
    check_on(&m, &[vec![(x, given)]], &|_| Some(6), 2, 1e-6);
}

#[test]
fn other_axes_are_left_to_the_interpreter() {
    for (opset, x, axis) in [(21, "4x5x6", " {axis=1}"), (21, "4x5x6", " {axis=-3}"), (11, "4x5x6", "")] {
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx={opset}}}
graph @main(%x : tensor<{x} xf32>) {{
  %y = onnx.Softmax(%x){axis}
  return %y
}}
"
        ));
        crate::models::check_left(&m, "onnx.Softmax");
    }
}
