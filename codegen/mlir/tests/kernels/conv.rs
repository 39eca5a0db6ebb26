//! Convolutions, against the interpreter.

use crate::models::{Here, check, check_left, check_on, close, codes, model};
use codegen::Native;
use dialects::exec::{Executor, run_once};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Elem, Module, Value};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;
use std::sync::Arc;

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

/// Two convolutions of codes: QLinearConv, and ConvInteger whose zero point is an input.
fn coded(sizes: &Sizes, x: Elem, w: Elem, rng: &mut ChaCha8Rng) -> Module {
    let &(spatial, channels, filters, kernel, attrs) = sizes;
    let groups = attrs.find("group=").map_or(1, |at| attrs[at + 6..][..1].parse::<usize>().unwrap());
    let shape: Vec<usize> = [filters, channels / groups].iter().chain(kernel).copied().collect();
    let list = |t: &Tensor| t.to_i64().unwrap().iter().map(|n| n.to_string()).collect::<Vec<_>>().join(", ");
    let table = codes(w, &shape, rng);
    let scales: Vec<String> =
        (0..filters).map(|_| format!("{:?}", rng.random_range(0.001f32..0.02))).collect();
    model(&format!(
        "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x {channels}x{0}x{1}>, %z : tensor<{1}>) {{
  const %w : tensor<{2}x{3}> [{4}]
  const %wz : tensor<{3}> {5}
  const %xs : tensor<f32> 0.1
  const %xz : tensor<{1}> 3
  const %ws : tensor<{filters}xf32> [{6}]
  const %ys : tensor<f32> 0.37
  const %yz : tensor<{1}> 11
  const %bias : tensor<{filters}xi32> [{7}]
  %y = onnx.QLinearConv(%x, %xs, %xz, %w, %ws, %wz, %ys, %yz, %bias) {{{attrs}}}
  %i = onnx.ConvInteger(%x, %w, %z) {{{attrs}}}
  %f = onnx.Cast(%i) {{to=1}}
  %s = onnx.Mul(%f, %xs)
  return %y, %i, %s
}}
",
        dims(spatial),
        x.name(),
        dims(&shape),
        w.name(),
        list(&table),
        if w == Elem::I8 { 0 } else { 121 },
        scales.join(", "),
        (0..filters).map(|i| (i as i64 * 1000 - 900).to_string()).collect::<Vec<_>>().join(", "),
    ))
}

#[test]
fn codes_of_every_form() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for (i, sizes) in CONVOLUTIONS.iter().enumerate().filter(|(i, _)| i % 2 == 0 || *i == 7) {
        let (x, w) = [(Elem::U8, Elem::I8), (Elem::I8, Elem::I8), (Elem::U8, Elem::U8)][i % 3];
        let m = coded(sizes, x, w, &mut rng);
        let args = m.regions[m.top].args.clone();
        let mut run = |b: usize| {
            let shape: Vec<usize> = [b, sizes.1].iter().chain(sizes.0).copied().collect();
            let given = [codes(x, &shape, &mut rng), codes(x, &[], &mut rng)];
            args.iter().copied().zip(given.map(Item::from)).collect::<Vec<_>>()
        };
        check_on(&m, &[run(1), run(2), run(0)], &|_| Some(2), 4, 1e-7);
    }
}

/// An island of codes: two convolutions, the second with a residual connection, a pool that moves codes, and a Gemm.
fn island(signed: bool) -> Module {
    let (elem, zero, low) = if signed { ("i8", "3", "-128") } else { ("u8", "131", "0") };
    model(&format!(
        "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x 3x8x8xf32>) {{
  const %s : tensor<f32> 0.05
  const %z : tensor<{elem}> {zero}
  const %low : tensor<{elem}> {low}
  const %t : tensor<f32> 0.11
  const %w : tensor<4x3x3x3xi8> random(1)
  const %v : tensor<4x4x3x3xi8> random(2)
  const %u : tensor<5x64xi8> random(3)
  const %ws : tensor<4xf32> [0.01, 0.02, 0.005, 0.015]
  const %us : tensor<5xf32> [0.01, 0.02, 0.005, 0.015, 0.001]
  const %bias : tensor<4xi32> [100, -2000, 3, 0]
  const %bs : tensor<4xf32> [0.0005, 0.001, 0.00025, 0.00075]
  const %c : tensor<5xf32> [0.5, -0.25, 1.0, 0.0, 2.0]
  %q0 = onnx.QuantizeLinear(%x, %s, %z)
  %d0 = onnx.DequantizeLinear(%q0, %s, %z)
  %dw = onnx.DequantizeLinear(%w, %ws) {{axis=0}}
  %db = onnx.DequantizeLinear(%bias, %bs) {{axis=0}}
  %c1 = onnx.Conv(%d0, %dw, %db) {{pads=[1, 1, 1, 1]}}
  %r1 = onnx.Relu(%c1)
  %q1 = onnx.QuantizeLinear(%r1, %t, %low)
  %d1 = onnx.DequantizeLinear(%q1, %t, %low)
  %dv = onnx.DequantizeLinear(%v, %ws) {{axis=0}}
  %c2 = onnx.Conv(%d1, %dv) {{pads=[1, 1, 1, 1]}}
  %q2 = onnx.QuantizeLinear(%c2, %t, %z)
  %d2 = onnx.DequantizeLinear(%q2, %t, %z)
  %a = onnx.Add(%d2, %d1)
  %r2 = onnx.Relu(%a)
  %q3 = onnx.QuantizeLinear(%r2, %t, %low)
  %d3 = onnx.DequantizeLinear(%q3, %t, %low)
  %m = onnx.MaxPool(%d3) {{kernel_shape=[2, 2], strides=[2, 2]}}
  %q4 = onnx.QuantizeLinear(%m, %t, %low)
  %d4 = onnx.DequantizeLinear(%q4, %t, %low)
  %f = onnx.Flatten(%d4)
  %q5 = onnx.QuantizeLinear(%f, %t, %low)
  %d5 = onnx.DequantizeLinear(%q5, %t, %low)
  %du = onnx.DequantizeLinear(%u, %us) {{axis=0}}
  %y = onnx.Gemm(%d5, %du, %c) {{transB=1}}
  return %q1, %q2, %q3, %q4, %y
}}
"
    ))
}

/// The same with QLinearConv: products and biases of integers, and one factor.
fn as_operators(signed: bool) -> Module {
    let (elem, zero, low) = if signed { ("i8", "3", "-128") } else { ("u8", "131", "0") };
    model(&format!(
        "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x 3x8x8xf32>) {{
  const %s : tensor<f32> 0.05
  const %z : tensor<{elem}> {zero}
  const %low : tensor<{elem}> {low}
  const %t : tensor<f32> 0.11
  const %none : tensor<i8> 0
  const %w : tensor<4x3x3x3xi8> random(1)
  const %ws : tensor<4xf32> [0.01, 0.02, 0.005, 0.015]
  const %bias : tensor<4xi32> [100, -2000, 3, 0]
  %q0 = onnx.QuantizeLinear(%x, %s, %z)
  %q1 = onnx.QLinearConv(%q0, %s, %z, %w, %ws, %none, %t, %low, %bias) {{pads=[1, 1, 1, 1]}}
  return %q1
}}
"
    ))
}

/// Codes that differ, all by one.
fn off_by_one(found: &Tensor, expected: &Tensor) -> usize {
    let (f, e) = (found.to_i64().unwrap(), expected.to_i64().unwrap());
    assert_eq!(f.len(), e.len());
    assert!(f.iter().zip(e.iter()).all(|(f, e)| (f - e).abs() <= 1));
    f.iter().zip(e.iter()).filter(|(f, e)| f != e).count()
}

/// What the interpreter computes of the inputs and of values on the way.
fn from_there(m: &Module, inputs: &[(Value, Item)], known: &[(Value, Item)], wanted: Value) -> Tensor {
    let interpreter = Interpreter::new(Ops::standard());
    let values: Vec<Value> = known.iter().map(|k| k.0).collect();
    let mut out = None;
    let ready = interpreter.prepare_from(m, &values, &[wanted]).unwrap();
    let given: Vec<(Value, Item)> = inputs.iter().chain(known).cloned().collect();
    ready
        .run(&given, &mut |_, item| {
            out = Some(item.tensor().unwrap().clone());
            Ok(())
        })
        .unwrap();
    out.unwrap()
}

#[test]
fn islands_are_products_of_integers() {
    let ops = Ops::standard();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for signed in [false, true] {
        let m = island(signed);
        let wanted = m.regions[m.top].results.clone();
        let native = Native::new(ops.clone(), Arc::new(Here));
        let (_, _, summary) = native.compile(&m, &[], &wanted).unwrap();
        assert_eq!(summary.interpreted.len(), 0, "{summary}");
        let target = codegen::Target::parse("x86-64-v3").unwrap();
        let plan = codegen::plan::plan(&m, &ops, std::slice::from_ref(&target), &|_| Some(4)).unwrap();
        let steps: Vec<&str> =
            plan.versions[0].steps.iter().map(|s| s.kernel.rsplit_once('_').unwrap().0).collect();
        let expected = ["elementwise", "planes", "conv_int16", "planes", "conv_int16", "planes", "pool"];
        assert_eq!(steps[..7], expected);
        assert_eq!(steps[7..], ["centre_rows", "tile_rows", "matmul_int8"]);
        // Codes alone go from kernel to kernel; floats come out of the Gemm.
        let mut fused = m.clone();
        codegen::fuse::fuse(&mut fused, &target, &HashSet::new());
        let made = fused.regions[fused.top].ops.iter().filter(|&&op| !fused.is_const(op));
        let made = made.flat_map(|&op| fused.ops[op].results.iter().flatten());
        assert_eq!(made.filter(|&&v| fused.ty(v).elem() == Some(Elem::F32)).count(), 1);
        let x: Vec<f32> = (0..3 * 192).map(|_| rng.random_range(-6f32..6.0)).collect();
        let given = [(m.regions[m.top].args[0], Item::from(Tensor::new(&[3, 3, 8, 8], x).unwrap()))];
        let found = run_once(&native, &m, &given, &wanted).unwrap();
        let found: Vec<&Tensor> = found.iter().map(|f| f.tensor().unwrap()).collect();
        // Floats that the interpreter adds up round otherwise near the middle between two codes; what comes after is compared
        // on the same codes.
        for (i, f) in found.iter().enumerate() {
            let known = wanted[..i.min(4)].iter().copied().zip(found.iter().map(|&f| Item::from(f.clone())));
            let expected = from_there(&m, &given, &known.collect::<Vec<_>>(), wanted[i]);
            match i {
                0..4 => assert!(off_by_one(f, &expected) <= f.len() / 200, "{signed}: {i}"),
                _ => close("the product", f, &expected, 1e-6),
            }
        }
        let q = as_operators(signed);
        let given = [(q.regions[q.top].args[0], given[0].1.clone())];
        let wanted = q.regions[q.top].results.clone();
        let expected = run_once(&Interpreter::new(ops.clone()), &q, &given, &wanted).unwrap();
        assert!(off_by_one(found[0], expected[0].tensor().unwrap()) <= 1, "{signed}");
        let expected = found[3].to_i64().unwrap().iter().max().copied();
        assert_eq!(found[2].to_i64().unwrap().iter().max().copied(), expected);
    }
}

#[test]
fn operators_on_codes() {
    let m = model(
        "module ir_version=10 opsets {com.microsoft=1, onnx=21}
graph @main(%x : tensor<b x 4x6x6xu8>, %y : tensor<b x 4x6x6xu8>, %v : tensor<b x 8xu8>) {
  const %s : tensor<f32> 0.05
  const %t : tensor<f32> 0.11
  const %z : tensor<u8> 128
  const %a : tensor<u8> 7
  const %w : tensor<5x8xi8> random(3)
  const %ws : tensor<5xf32> [0.01, 0.02, 0.005, 0.015, 0.001]
  const %wz : tensor<5xi8> [0, 0, 0, 0, 0]
  const %bias : tensor<5xi32> [100, -2000, 3, 0, 70]
  %sum = com.microsoft.QLinearAdd(%x, %s, %z, %y, %t, %a, %t, %z)
  %product = com.microsoft.QLinearMul(%sum, %t, %z, %y, %t, %a, %s, %a)
  %pool = com.microsoft.QLinearAveragePool(%x, %s, %z, %t, %a) {kernel_shape=[2, 2], strides=[2, 2]}
  %all = com.microsoft.QLinearGlobalAveragePool(%product, %s, %a, %s, %z) {channels_last=0}
  %both = com.microsoft.QLinearConcat(%t, %z, %x, %s, %z, %y, %t, %a) {axis=1}
  %leaky = com.microsoft.QLinearLeakyRelu(%x, %s, %z, %t, %z) {alpha=0.25}
  %g = com.microsoft.QGemm(%v, %s, %z, %w, %ws, %wz, %bias) {transB=1}
  %h = com.microsoft.QGemm(%v, %s, %z, %w, %ws, %wz, %bias, %t, %z) {transB=1}
  return %sum, %product, %pool, %all, %both, %leaky, %g, %h
}
",
    );
    let ops = Ops::standard();
    let native = Native::new(ops.clone(), Arc::new(Here));
    let wanted = m.regions[m.top].results.clone();
    let (_, _, summary) = native.compile(&m, &[], &wanted).unwrap();
    assert_eq!(summary.interpreted.len(), 0, "{summary}");
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for images in [1, 3, 0] {
        let shapes: [&[usize]; 3] = [&[images, 4, 6, 6], &[images, 4, 6, 6], &[images, 8]];
        let args = m.regions[m.top].args.iter().copied();
        let given: Vec<_> = args.zip(shapes.map(|s| Item::from(codes(Elem::U8, s, &mut rng)))).collect();
        let found = run_once(&native, &m, &given, &wanted).unwrap();
        let expected = run_once(&Interpreter::new(ops.clone()), &m, &given, &wanted).unwrap();
        for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
            let (f, e) = (f.tensor().unwrap(), e.tensor().unwrap());
            assert_eq!(f.shape(), e.shape());
            match i {
                6 => close("the sums in floats", f, e, 1e-6),
                // The mean of many is added up in another order, and so is the bias of a Gemm.
                3 | 7 => assert!(off_by_one(f, e) <= 1 + f.len() / 100, "{i}"),
                _ => assert_eq!(f, e, "{i}"),
            }
        }
    }
}

#[test]
fn weights_alone_in_codes_are_floats() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 3x6x6xf32>, %r : tensor<b x 5xf32>) {
  const %w : tensor<4x3x3x3xi8> random(1)
  const %ws : tensor<4xf32> [0.01, 0.02, 0.005, 0.015]
  const %v : tensor<5x7xu8> random(2)
  const %vs : tensor<7xf32> [0.01, 0.02, 0.005, 0.015, 1.0, 2.0, 3.0]
  const %vz : tensor<7xu8> [1, 2, 3, 4, 5, 6, 128]
  %dw = onnx.DequantizeLinear(%w, %ws) {axis=0}
  %y = onnx.Conv(%x, %dw)
  %dv = onnx.DequantizeLinear(%v, %vs, %vz) {axis=-1}
  %z = onnx.MatMul(%r, %dv)
  return %y, %z
}
",
    );
    check(&m, &[&[("b", 1)], &[("b", 3)]], 2, 2e-6);
    let target = codegen::Target::parse("x86-64-v3").unwrap();
    let plan =
        codegen::plan::plan(&m, &Ops::standard(), std::slice::from_ref(&target), &|_| Some(4)).unwrap();
    let steps: Vec<&str> =
        plan.versions[0].steps.iter().map(|s| s.kernel.rsplit_once('_').unwrap().0).collect();
    assert_eq!(steps, ["conv_f32", "tile_rows", "matmul_f32"]);
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
