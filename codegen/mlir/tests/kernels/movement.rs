//! Values that are moved, looked at another way, or sizes.

use crate::harness::targets;
use crate::models::{Here, built, check, inputs, model, outside};
use codegen::Native;
use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use rand::SeedableRng;
use std::sync::Arc;

#[test]
fn a_cache_grows_and_is_read_for_grouped_queries() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%past : tensor<b x 2xpast x 4xf32>, %x : tensor<b x s x 8xf32>) {
  const %heads : tensor<5xi64> [0, 0, 2, 1, 4]
  const %third : tensor<1xi64> [3]
  const %three : tensor<5xi64> [1, 1, 1, 3, 1]
  const %rows : tensor<3xi64> [0, 0, 24]
  %r = onnx.Reshape(%x, %heads)
  %q = onnx.Squeeze(%r, %third)
  %t = onnx.Transpose(%q) {perm=[0, 2, 1, 3]}
  %present = onnx.Concat(%past, %t) {axis=2}
  %u = onnx.Transpose(%present) {perm=[0, 2, 1, 3]}
  %v = onnx.Unsqueeze(%u, %third)
  %w = onnx.Expand(%v, %three)
  %y = onnx.Reshape(%w, %rows)
  %z = onnx.Neg(%y)
  return %present, %z
}
",
    );
    let dims: &[&[(&str, usize)]] = &[
        &[("b", 1), ("past", 0), ("s", 3)],
        &[("b", 2), ("past", 7), ("s", 1)],
        &[("b", 3), ("past", 300), ("s", 20)],
        &[("b", 0), ("past", 2), ("s", 2)],
    ];
    check(&m, dims, 4, 0.0);
}

#[test]
fn positions_are_counted_from_sizes() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%ids : tensor<b x s xi64>, %past : tensor<b x past x 2xf32>) {
  const %zero : tensor<1xi64> [0]
  const %minus : tensor<1xi64> [-1]
  const %one : tensor<1xi64> [1]
  const %two : tensor<i64> 2
  %s = onnx.Shape(%ids) {start=1, end=2}
  %p = onnx.Shape(%past) {start=1, end=2}
  %n = onnx.Add(%s, %p)
  %twice = onnx.Mul(%n, %two)
  %all = onnx.Concat(%minus, %n, %twice) {axis=0}
  %both = onnx.Concat(%past, %past) {axis=1}
  %last = onnx.Slice(%both, %p, %twice, %one)
  %to = onnx.Concat(%n, %n) {axis=0}
  %y = onnx.Slice(%both, %zero, %p, %one)
  return %all, %y
}
",
    );
    let dims: &[&[(&str, usize)]] = &[
        &[("b", 2), ("s", 3), ("past", 4)],
        &[("b", 1), ("s", 1), ("past", 0)],
        &[("b", 5), ("s", 9), ("past", 1)],
    ];
    check(&m, dims, 4, 0.0);
}

#[test]
fn elements_of_every_width_are_moved() {
    for elem in ["f32", "i64", "i32", "bool"] {
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x s x 5x{elem}>, %y : tensor<b x 1x1x{elem}>) {{
  const %at : tensor<2xi64> [1, -3]
  const %to : tensor<2xi64> [2147483647, 9223372036854775807]
  const %axes : tensor<2xi64> [-1, 0]
  const %shape : tensor<3xi64> [1, 3, 7]
  const %parts : tensor<2xi64> [2, 3]
  %t = onnx.Transpose(%x)
  %f = onnx.Slice(%x, %at, %to, %axes)
  %e = onnx.Expand(%y, %shape)
  %a, %c = onnx.Split(%x, %parts) {{axis=-1}}
  %j = onnx.Concat(%c, %x, %a) {{axis=2}}
  return %t, %e, %j, %a, %c
}}
"
        ));
        let dims: &[&[(&str, usize)]] =
            &[&[("b", 1), ("s", 1)], &[("b", 4), ("s", 33)], &[("b", 3), ("s", 0)], &[("b", 70), ("s", 3)]];
        check(&m, dims, 4, 0.0);
    }
}

#[test]
fn every_second_element() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 5x9xf32>) {
  const %from : tensor<2xi64> [1, 0]
  const %to : tensor<2xi64> [9223372036854775807, 8]
  const %axes : tensor<2xi64> [1, 2]
  const %two : tensor<2xi64> [3, 2]
  %y = onnx.Slice(%x, %from, %to, %axes, %two)
  %z = onnx.Transpose(%y) {perm=[0, 2, 1]}
  return %y, %z
}
",
    );
    check(&m, &[&[("b", 1)], &[("b", 3)], &[("b", 0)]], 2, 0.0);
}

#[test]
fn a_slice_whose_length_depends_on_more_than_sizes_is_left() {
    // From the third to the last: of a dim of one element nothing is left, and no sum of products says so.
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 4xf32>) {
  const %from : tensor<1xi64> [2]
  const %to : tensor<1xi64> [9223372036854775807]
  %y = onnx.Slice(%x, %from, %to)
  return %y
}
",
    );
    check(&m, &[&[("s", 1)], &[("s", 5)]], 0, 0.0);
}

/// `past + new` keys under a mask of `total`, which the cache is declared to be as long as.
fn masked() -> dialects::ir::Module {
    model(
        "module ir_version=10 opsets {onnx=23}
graph @main(%mask : tensor<b x total x i64>, %past : tensor<b x past x 4xf32>, %x : tensor<b x s x 4xf32>) {
  const %zero : tensor<i64> 0
  const %last : tensor<1xi64> [2]
  %present = onnx.Concat(%past, %x) {axis=1} : tensor<b x total x 4xf32>
  %sum = onnx.ReduceSum(%present, %last) {keepdims=0}
  %seen = onnx.Greater(%mask, %zero)
  %numbers = onnx.Cast(%seen) {to=1}
  %y = onnx.Mul(%sum, %numbers)
  return %present, %y
}
",
    )
}

#[test]
fn an_input_as_long_as_a_cache_grows() {
    let dims: &[&[(&str, usize)]] =
        &[&[("b", 2), ("past", 3), ("s", 1), ("total", 4)], &[("b", 1), ("past", 0), ("s", 5), ("total", 5)]];
    check(&masked(), dims, 5, 1e-6);
}

#[test]
fn a_mask_of_another_length_is_left_to_the_interpreter_and_refused_by_a_library() {
    let m = masked();
    let ops = dialects::ops::Ops::standard();
    let wanted = m.regions[m.top].results.clone();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    // One number for all keys is broadcast.
    let given = inputs(&m, &[("b", 2), ("past", 3), ("s", 2), ("total", 1)], &mut rng);
    let expected = run_once(&Interpreter::new(ops.clone()), &m, &given, &wanted).unwrap();
    let native = Native::new(ops.clone(), Arc::new(Here));
    assert_eq!(run_once(&native, &m, &given, &wanted).unwrap(), expected);
    let target = targets().pop().unwrap();
    let library = built(&m, &ops, &target, &|_| Some(8));
    let given: Vec<_> = given.iter().map(|(_, item)| outside(item.tensor().unwrap())).collect();
    let e = library.run(&given).unwrap_err().to_string();
    assert_eq!(e, "the input \"mask\" is i64[2, 1] in 16 bytes, expected i64[b, past + s]");
}
