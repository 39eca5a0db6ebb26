//! Rotations: what they move through, what takes them, and where they must stay.

use super::*;
use crate::rotate::orthogonal::{Kind, orthogonal};

/// The module with `name` rotated and rotated back, whose readers read that.
fn rotated(m: &Module, name: &str) -> (Module, super::Rotate, [Op; 2]) {
    let mut m = m.clone();
    let v = value(&m, name);
    let n = m.ty(v).dims().unwrap().last().unwrap().known().unwrap() as usize;
    let q = orthogonal(Kind::Random, n, 3);
    let top = m.top;
    let mut add = |name: &str, f: &dyn Fn(usize, usize) -> f64| {
        let values: Vec<f32> = (0..n * n).map(|i| f(i / n, i % n) as f32).collect();
        m.add_const(top, name, Tensor::new(&[n, n], values).unwrap().to_const())
    };
    let mean = |j: usize| (0..n).map(|i| q[i * n + j]).sum::<f64>() / n as f64;
    let r = super::Rotate {
        matrix: add("q", &|i, j| q[i * n + j]),
        inverse: add("qt", &|i, j| q[j * n + i]),
        centered: add("qc", &|i, j| q[i * n + j] - mean(j)),
    };
    let ty = m.ty(v).clone();
    let product =
        |x, c| OpBuilder::new("onnx.MatMul", &"rotation".into()).operands([x, c]).result(ty.clone());
    let first = match m.def_op(v) {
        Some((op, _)) => m.insert_after(op, product(v, r.matrix)),
        None => m.insert_before(m.regions[top].ops[0], product(v, r.matrix)),
    };
    let there = m.ops[first].result(0).unwrap();
    let second = m.insert_after(first, product(there, r.inverse));
    let back = m.ops[second].result(0).unwrap();
    m.replace_uses(v, back);
    m.ops[first].operands[0] = Some(v);
    (m, r, [first, second])
}

/// Folds a rotation of `name` before and behind, checks that the function stays, and says which of the two are absorbed.
fn folds_rotation(inputs: &str, body: &str, name: &str) -> [bool; 2] {
    let plain = module(inputs, body);
    let want = run(&plain);
    let (mut m, r, ops) = rotated(&plain, name);
    assert_close(&want, &run(&m));
    let mut absorbed = [false; 2];
    for (side, op) in ops.into_iter().enumerate() {
        let (outcome, left) = fold_rotation(&mut m, &Ops::standard(), op, &r).unwrap();
        absorbed[side] = outcome.absorbed;
        assert_eq!(left == 0, outcome.absorbed);
        assert!(outcome.cost.1 <= outcome.cost.0);
        assert_close(&want, &run(&m));
        let wrong = infer::infer(&mut m, &Ops::standard());
        assert!(wrong.is_empty(), "{wrong:?}");
        let order = dialects::ir::graph::topological(&m, m.top).unwrap();
        assert_eq!(order, m.regions[m.top].ops, "definitions come before uses");
    }
    let left = m.live_ops().into_iter().filter(|&op| r.done_by(&m, op)).count();
    assert_eq!(left == 0, absorbed == [true; 2]);
    absorbed
}

const CONSTS: &str = "const %w : tensor<6x8xf32> random(1)
  const %bias : tensor<8xf32> random(2)
  const %wt : tensor<8x6xf32> random(3)
  const %g : tensor<8xf32> random(4)
  const %b : tensor<8xf32> random(5)
  const %v : tensor<8x5xf32> random(6)
  const %c : tensor<5xf32> random(7)
  const %vt : tensor<5x8xf32> random(8)
  const %half : tensor<f32> splat(0.5)
  const %two : tensor<f32> splat(2)
  const %axis : tensor<1xi64> [-1]
  const %eps : tensor<f32> splat(0.00001)
  const %flat : tensor<2xi64> [-1, 8]
  const %deep : tensor<3xi64> [2, 3, 8]";

const NORM: &str = "%h = onnx.RMSNormalization(%x, %g)\n  %y = onnx.MatMul(%h, %v)\n  return %y";

#[test]
fn what_is_upstream_takes_a_rotation() {
    for (inputs, made) in [
        ("%i : tensor<2x3x6xf32>", "%x = onnx.MatMul(%i, %w)"),
        ("%i : tensor<2x3x6xf32>", "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Add(%bias, %l)"),
        ("%i : tensor<2x3x6xf32>", "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Sub(%l, %half)"),
        ("%i : tensor<2x3x6xf32>", "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Mul(%l, %half)"),
        ("%i : tensor<2x3x6xf32>", "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Mul(%g, %l)"),
        (
            "%i : tensor<2x3x6xf32>, %r : tensor<2x3x1xf32>",
            "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Mul(%r, %l)",
        ),
        (
            "%i : tensor<2x3x6xf32>, %r : tensor<2x3x1xf32>",
            "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Div(%l, %r)",
        ),
        ("%i : tensor<6x6xf32>", "%l = onnx.Gemm(%i, %w, %bias)\n  %x = onnx.Reshape(%l, %deep)"),
        ("%i : tensor<6x6xf32>", "%x = onnx.Gemm(%i, %wt, %bias) {transB = 1, alpha = 0.5, beta = 2.0}"),
        ("%i : tensor<2x3x6xf32>", "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Transpose(%l) {perm = [1, 0, 2]}"),
        (
            "%i : tensor<2x3x6xf32>",
            "%l = onnx.MatMul(%i, %w)\n  %m = onnx.MatMul(%i, %w)\n  %x = onnx.Concat(%l, %m) {axis = 1}",
        ),
        (
            "%i : tensor<2x3x6xf32>",
            "%k = onnx.ArgMax(%i) {axis = 2, keepdims = 0}\n  %x = onnx.Gather(%vtable, %k)",
        ),
    ] {
        let body = format!("{CONSTS}\n  const %vtable : tensor<9x8xf32> random(11)\n  {made}\n  {NORM}");
        assert_eq!(folds_rotation(inputs, &body, "x"), [true, true], "{made}");
    }
}

#[test]
fn what_is_behind_takes_the_inverse() {
    let long = "%sq = onnx.Pow(%x, %two)
  %mean = onnx.ReduceMean(%sq, %axis)
  %safe = onnx.Add(%mean, %eps)
  %root = onnx.Sqrt(%safe)";
    for behind in [
        format!("{long}\n  %n = onnx.Div(%x, %root)\n  %h = onnx.Mul(%n, %g)\n  %y = onnx.MatMul(%h, %v)"),
        format!("{long}\n  %r = onnx.Reciprocal(%root)\n  %n = onnx.Mul(%x, %r)\n  %h = onnx.Mul(%g, %n)\n  %z = onnx.MatMul(%h, %v)\n  %y = onnx.Add(%z, %c)"),
        format!("{long}\n  %n = onnx.Div(%x, %root)\n  %s = onnx.Mul(%n, %g)\n  %h = onnx.Add(%s, %b)\n  %z = onnx.MatMul(%h, %v)\n  %y = onnx.Add(%c, %z)"),
        "%h = onnx.SimplifiedLayerNormalization(%x, %g)\n  %f = onnx.Reshape(%h, %flat)\n  %y = onnx.Gemm(%f, %vt, %c) {transB = 1}".into(),
        "%sq = onnx.Mul(%x, %x)\n  %mean = onnx.ReduceMean(%sq, %axis)\n  %root = onnx.Sqrt(%mean)\n  %n = onnx.Div(%x, %root)\n  %h = onnx.Add(%n, %b)\n  %f = onnx.Reshape(%h, %flat)\n  %y = onnx.Gemm(%f, %v, %c)".into(),
        "%len = onnx.ReduceL2(%x, %axis)\n  %n = onnx.Div(%x, %len)\n  %y = onnx.MatMul(%n, %v)".into(),
    ] {
        let body = format!("{CONSTS}\n  %x = onnx.MatMul(%i, %w)\n  {behind}\n  return %y");
        assert_eq!(folds_rotation("%i : tensor<2x3x6xf32>", &body, "x"), [true, true], "{behind}");
    }
}

#[test]
fn what_treats_channels_apart_lets_no_rotation_through() {
    // Upstream.
    for made in [
        "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Relu(%l)",
        "%l = onnx.MatMul(%i, %w)\n  %s = onnx.Sigmoid(%l)\n  %x = onnx.Mul(%l, %s)",
        "%x = onnx.Tanh(%j)",
        // The rows of the result are no rows of the operand.
        "%l = onnx.MatMul(%i, %w)\n  %x = onnx.Reshape(%l, %cut)",
    ] {
        let body = format!(
            "{CONSTS}\n  const %cut : tensor<3xi64> [2, 6, 4]\n  const %g4 : tensor<4xf32> random(9)\n  const %v4 : tensor<4x5xf32> random(10)\n  {made}\n  {}",
            if made.contains("cut") { NORM.replace("%g", "%g4").replace("%v", "%v4") } else { NORM.into() }
        );
        let inputs = "%i : tensor<2x3x6xf32>, %j : tensor<2x3x8xf32>";
        assert_eq!(folds_rotation(inputs, &body, "x"), [false, true], "{made}");
    }
    // Behind.
    for behind in [
        // A length over other rows, and a power that is no square.
        "%axis0 = onnx.Identity(%first)\n  %len = onnx.ReduceL2(%x, %axis0)\n  %n = onnx.Div(%x, %len)\n  %y = onnx.MatMul(%n, %v)",
        "%sq = onnx.Pow(%x, %three)\n  %mean = onnx.ReduceMean(%sq, %axis)\n  %n = onnx.Div(%x, %mean)\n  %y = onnx.MatMul(%n, %v)",
        "%h = onnx.RMSNormalization(%x, %g)\n  %r = onnx.Relu(%h)\n  %y = onnx.MatMul(%r, %v)",
        // Something reads the norm's output beside the weight.
        "%h = onnx.RMSNormalization(%x, %g)\n  %z = onnx.MatMul(%h, %v)\n  %t = onnx.Tanh(%h)\n  %m = onnx.ReduceMean(%t, %axis)\n  %y = onnx.Add(%z, %m)",
    ] {
        let body = format!(
            "{CONSTS}\n  const %first : tensor<1xi64> [1]\n  const %three : tensor<f32> splat(3)\n  %x = onnx.MatMul(%i, %w)\n  {behind}\n  return %y"
        );
        assert_eq!(folds_rotation("%i : tensor<2x3x6xf32>", &body, "x"), [true, false], "{behind}");
    }
}
