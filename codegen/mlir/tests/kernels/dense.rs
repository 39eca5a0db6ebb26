//! Products of floats, against the interpreter.

use crate::models::{Here, check, model};
use codegen::Native;
use dialects::ir::{Attr, Module, OpBuilder, Type, Value, infer};
use dialects::ops::Ops;
use dialects::tensor::Tensor;
use half::{bf16, f16};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// How weights are rounded.
#[derive(Clone, Copy, Debug)]
enum Kind {
    F32,
    F16,
    Bf16,
}

fn weights(shape: &[usize], kind: Kind, rng: &mut impl Rng) -> Tensor {
    let n = shape.iter().product();
    let round = |v: f32| match kind {
        Kind::F32 => v,
        Kind::F16 => f16::from_f32(v).to_f32(),
        Kind::Bf16 => bf16::from_f32(v).to_f32(),
    };
    Tensor::new(shape, (0..n).map(|_| round(rng.random_range(-1f32..1.0))).collect::<Vec<f32>>()).unwrap()
}

fn push(m: &mut Module, name: &str, operands: Vec<Option<Value>>, attrs: &[(&str, Attr)]) -> Value {
    let mut b = OpBuilder::new(name, &"node".into()).operands(operands).result(Type::Unknown);
    for (name, v) in attrs {
        b = b.attr(name, v.clone());
    }
    let op = m.push(m.top, b);
    m.ops[op].results[0].unwrap()
}

fn finish(mut m: Module, results: Vec<Value>) -> Module {
    m.regions[m.top].results = results;
    let found = infer::infer(&mut m, &Ops::standard());
    assert!(found.is_empty(), "{found:?}");
    m
}

/// `x W`, a bias, an activation, a gate; the product itself comes out too.
fn linear(k: usize, n: usize, kind: Kind, rng: &mut impl Rng) -> Module {
    let mut m = model(&format!(
        "module ir_version=10 opsets {{onnx=21}}
graph @main(%x : tensor<b x s x {k}xf32>, %gate : tensor<b x s x {n}xf32>) {{
  return %x
}}
"
    ));
    let (x, gate) = (m.regions[m.top].args[0], m.regions[m.top].args[1]);
    let w = m.add_const(m.top, "", weights(&[k, n], kind, rng).to_const());
    let bias = m.add_const(m.top, "", weights(&[n], Kind::F32, rng).to_const());
    let p = push(&mut m, "onnx.MatMul", vec![Some(x), Some(w)], &[]);
    let q = push(&mut m, "onnx.Add", vec![Some(p), Some(bias)], &[]);
    let t = push(&mut m, "onnx.Sigmoid", vec![Some(q)], &[]);
    let y = push(&mut m, "onnx.Mul", vec![Some(t), Some(gate)], &[]);
    finish(m, vec![y, p])
}

#[test]
fn rows_by_constant_matrices() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (k, n, kind) in [
        (7, 5, Kind::F32),
        (300, 37, Kind::F32),
        (512, 64, Kind::Bf16),
        (65, 130, Kind::F16),
        (259, 1, Kind::Bf16),
        (1, 97, Kind::F16),
    ] {
        let m = linear(k, n, kind, &mut rng);
        let dims: &[&[(&str, usize)]] = &[
            &[("b", 1), ("s", 1)],
            &[("b", 2), ("s", 1)],
            &[("b", 1), ("s", 6)],
            &[("b", 3), ("s", 0)],
            &[("b", 1), ("s", 9)],
            &[("b", 2), ("s", 98)],
            &[("b", 2), ("s", 51)],
        ];
        check(&m, dims, 4, 1e-6 * (k as f64).sqrt());
    }
}

#[test]
fn the_weights_of_half_types_take_half_the_room() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let target = codegen::Target::parse("x86-64-v3").unwrap();
    for (kind, name, bytes) in
        [(Kind::F32, "matmul_f32", 4), (Kind::F16, "matmul_f16", 2), (Kind::Bf16, "matmul_bf16", 2)]
    {
        let m = linear(128, 64, kind, &mut rng);
        let plan =
            codegen::plan::plan(&m, &Ops::standard(), std::slice::from_ref(&target), &|_| Some(4)).unwrap();
        assert!(plan.versions[0].kernels.iter().any(|k| k.name.starts_with(name)), "{kind:?}");
        let most = plan.blobs.iter().map(|(_, b)| b.bytes.len()).max();
        assert_eq!(most, Some(128 * 64 * bytes), "{kind:?}");
    }
}

#[test]
fn every_form_of_gemm() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (i, (trans, bias)) in
        [(0, Some(vec![33])), (1, Some(vec![1, 33])), (1, Some(vec![])), (0, Some(vec![1])), (1, None)]
            .into_iter()
            .enumerate()
    {
        let mut m = model(
            "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 40xf32>, %c : tensor<s x 33xf32>, %d : tensor<s x 1xf32>) {
  return %x
}
",
        );
        let args = m.regions[m.top].args.clone();
        let shape = if trans == 1 { [33, 40] } else { [40, 33] };
        let w = m.add_const(m.top, "", weights(&shape, Kind::F32, &mut rng).to_const());
        let bias = bias.map(|shape| m.add_const(m.top, "", weights(&shape, Kind::F32, &mut rng).to_const()));
        let scales = [("transB", Attr::Int(trans)), ("alpha", Attr::Float(0.5)), ("beta", Attr::Float(-2.0))];
        let attrs = if i % 2 == 0 { &scales[..1] } else { &scales[..] };
        let mut results = Vec::new();
        for bias in [bias, Some(args[1]), Some(args[2])] {
            let operands: Vec<_> = [Some(args[0]), Some(w)].into_iter().chain(bias.map(Some)).collect();
            let p = push(&mut m, "onnx.Gemm", operands, attrs);
            results.push(push(&mut m, "onnx.Relu", vec![Some(p)], &[]));
        }
        check(&finish(m, results), &[&[("s", 1)], &[("s", 0)], &[("s", 13)]], 6, 2e-6);
    }
}

#[test]
fn products_of_two_computed_operands() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%q : tensor<b x 2 x s x 16xf32>, %k : tensor<b x 2 x 16 x t x f32>, %v : tensor<1 x 2 x t x 5xf32>,
    %w : tensor<16 x 11xf32>, %u : tensor<t x 3xf32>) {
  %a = onnx.MatMul(%q, %k)
  %c = onnx.MatMul(%a, %v)
  %d = onnx.MatMul(%q, %w)
  %e = onnx.MatMul(%a, %u)
  return %c, %d, %e
}
",
    );
    let dims: &[&[(&str, usize)]] = &[
        &[("b", 1), ("s", 1), ("t", 1)],
        &[("b", 2), ("s", 5), ("t", 39)],
        &[("b", 1), ("s", 16), ("t", 64)],
        &[("b", 2), ("s", 3), ("t", 0)],
        &[("b", 0), ("s", 3), ("t", 7)],
    ];
    check(&m, dims, 4, 5e-6);
}

#[test]
fn products_that_no_kernel_does() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 2xf64>, %y : tensor<2 x ? x f32>, %z : tensor<s x 2xf32>, %v : tensor<2xf32>) {
  const %w : tensor<2x2xf64> [1.0, 2.0, 3.0, 4.0]
  const %u : tensor<2x2xf32> [1.0, 2.0, 3.0, 4.0]
  %a = onnx.MatMul(%x, %w)
  %b = onnx.MatMul(%z, %y)
  %c = onnx.Gemm(%y, %u) {transA=1}
  %d = onnx.MatMul(%z, %v)
  return %a, %b, %c, %d
}
",
    );
    let native = Native::new(Ops::standard(), Arc::new(Here));
    let keep = m.regions[m.top].results.clone();
    let (_, _, summary) = native.compile(&m, &[], &keep).unwrap();
    assert_eq!((summary.compiled, summary.interpreted.len()), (0, 4), "{summary}");
}
