//! Codes of 8 bits: made, read, and multiplied, against the interpreter.

use crate::models::{Here, check, check_on, codes, model};
use codegen::Native;
use dialects::ir::{Elem, Module, OpBuilder, Type, Value, infer};
use dialects::ops::{Item, Ops};
use dialects::tensor::{Data, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

fn push(m: &mut Module, name: &str, operands: &[Value]) -> Value {
    let operands = operands.iter().copied().map(Some);
    let op = m.push(m.top, OpBuilder::new(name, &"node".into()).operands(operands).result(Type::Unknown));
    m.ops[op].results[0].unwrap()
}

#[test]
fn codes_are_made_and_read() {
    let m = model(
        "module ir_version=10 opsets {com.microsoft=1, onnx=21}
graph @main(%x : tensor<b x 3 x s x 9xf32>, %s : tensor<f32>) {
  const %scale : tensor<f32> 0.013
  const %zero : tensor<u8> 131
  const %three : tensor<3xf32> [0.02, 0.3, 0.001]
  const %zeros : tensor<3xi8> [-5, 0, 100]
  const %nine : tensor<9xf32> [0.02, 0.3, 0.001, 0.01, 0.5, 2.0, 0.1, 0.2, 0.3]
  const %points : tensor<9xu8> [1, 20, 128, 255, 0, 7, 8, 9, 10]
  %a = onnx.QuantizeLinear(%x, %scale, %zero)
  %b = onnx.DequantizeLinear(%a, %scale, %zero)
  %c = onnx.QuantizeLinear(%x, %three, %zeros) {axis=1}
  %d = onnx.DequantizeLinear(%c, %three, %zeros) {axis=1}
  %e = com.microsoft.QuantizeLinear(%x, %nine, %points) {axis=-1}
  %f = com.microsoft.DequantizeLinear(%e, %nine, %points) {axis=-1}
  %g = onnx.QuantizeLinear(%x, %s)
  %h = onnx.DequantizeLinear(%g, %scale)
  return %a, %b, %c, %d, %e, %f, %g, %h
}
",
    );
    let dims: &[&[(&str, usize)]] =
        &[&[("b", 1), ("s", 1)], &[("b", 2), ("s", 5)], &[("b", 1), ("s", 0)], &[("b", 1), ("s", 67)]];
    check(&m, dims, 8, 0.0);
}

#[test]
fn the_range_of_a_tensor_becomes_its_scale() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x f32>) {
  %a, %s, %z = onnx.DynamicQuantizeLinear(%x)
  %t = onnx.Sqrt(%s)
  return %a, %s, %z, %t
}
",
    );
    let input = m.regions[m.top].args[0];
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut random =
        |n: usize, low: f32, high: f32| (0..n).map(|_| rng.random_range(low..high)).collect::<Vec<f32>>();
    let runs = [
        random(1, 0.5, 1.0),
        random(0, 0.0, 1.0),
        vec![0.0; 7],
        random(19, -3.0, -1.0),
        random(5000, -1.0, 7.0),
        random(9001, -100.0, 0.01),
        [random(30, -1.0, 1.0), vec![f32::NAN, 2.0]].concat(),
    ];
    let runs = runs.map(|x| vec![(input, Item::from(Tensor::new(&[x.len()], x).unwrap()))]);
    check_on(&m, &runs, &|_| Some(9001), 2, 0.0);
}

#[test]
fn products_of_codes_and_what_comes_after_them() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for (k, n, x, w, zero) in [
        (7, 5, Elem::U8, Elem::I8, None),
        (64, 33, Elem::U8, Elem::U8, Some(1)),
        (601, 16, Elem::I8, Elem::I8, Some(16)),
        (1, 70, Elem::U8, Elem::I8, Some(1)),
        (512, 65, Elem::I8, Elem::U8, Some(65)),
    ] {
        let mut m = model(&format!(
            "module ir_version=10 opsets {{com.microsoft=1, onnx=21}}
graph @main(%x : tensor<b x s x {k}x{0}>, %z : tensor<{0}>, %scale : tensor<f32>, %u : tensor<1x{1}>) {{
  return %x
}}
",
            x.name(),
            w.name()
        ));
        let args = m.regions[m.top].args.clone();
        let table = m.add_const(m.top, "", codes(w, &[k, n], &mut rng).to_const());
        let mut operands = vec![args[0], table, args[1]];
        if let Some(count) = zero {
            let shape: &[usize] = if count == 1 { &[] } else { &[count] };
            operands.push(m.add_const(m.top, "", codes(w, shape, &mut rng).to_const()));
        }
        let bias = Tensor::new(&[n], (0..n).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
        let bias = m.add_const(m.top, "", bias.to_const());
        let sum = push(&mut m, "onnx.MatMulInteger", &operands);
        let bare = push(&mut m, "onnx.MatMulInteger", &operands[..2]);
        let to = dialects::ir::Attr::Int(1);
        let b = OpBuilder::new("onnx.Cast", &"node".into()).operands([Some(sum)]).attr("to", to);
        let float = m.push(m.top, b.result(Type::Unknown));
        let float = m.ops[float].results[0].unwrap();
        let scaled = push(&mut m, "onnx.Mul", &[float, args[2]]);
        let y = push(&mut m, "onnx.Add", &[scaled, bias]);
        let scales: Vec<f32> = (0..n).map(|_| rng.random_range(0.001f32..0.1)).collect();
        let scales = m.add_const(m.top, "", Tensor::new(&[n], scales).unwrap().to_const());
        let mut given = vec![args[0], table, args[2], scales, args[1]];
        given.extend(operands.get(3));
        let f = push(&mut m, "com.microsoft.MatMulIntegerToFloat", &given);
        let t = push(&mut m, "onnx.Tanh", &[f]);
        let w_zero = operands.get(3).copied();
        let w_zero = w_zero.unwrap_or_else(|| {
            let zero = Tensor::new(&[1], Data::I8(vec![0])).unwrap();
            m.add_const(m.top, "", zero.to_const())
        });
        let third = m.add_const(m.top, "", Tensor::scalar(0.3f32).to_const());
        let given = [args[0], args[2], args[1], table, scales, w_zero, third, args[3]];
        let q = push(&mut m, "onnx.QLinearMatMul", &given);
        m.regions[m.top].results = vec![y, bare, t, q];
        assert!(infer::infer(&mut m, &Ops::standard()).is_empty());
        let mut run = |b: usize, s: usize| {
            let scale = Tensor::scalar(0.01f32);
            let given =
                [codes(x, &[b, s, k], &mut rng), codes(x, &[], &mut rng), scale, codes(w, &[1], &mut rng)];
            args.iter().copied().zip(given.map(Item::from)).collect::<Vec<_>>()
        };
        let runs = [run(1, 1), run(2, 7), run(1, 0), run(1, 100)];
        check_on(&m, &runs, &|_| Some(100), 8, 1e-7);
    }
}

#[test]
fn codes_that_no_kernel_reads() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 4xf32>, %c : tensor<s x 4xu8>, %d : tensor<4 x 4xi8>, %z : tensor<s x u8>) {
  const %scale : tensor<f32> 0.1
  const %zero : tensor<i16> 3
  const %w : tensor<4x2xi8> [1, 2, 3, 4, 5, 6, 7, 8]
  %a = onnx.QuantizeLinear(%x, %scale, %zero)
  %e = onnx.MatMulInteger(%c, %d)
  %f = onnx.MatMulInteger(%c, %w, %z)
  return %a, %e, %f
}
",
    );
    let native = Native::new(Ops::standard(), Arc::new(Here));
    let keep = m.regions[m.top].results.clone();
    let (_, _, summary) = native.compile(&m, &[], &keep).unwrap();
    assert_eq!(summary.compiled, 0, "{summary}");
}
