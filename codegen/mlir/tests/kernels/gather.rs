//! What indices pick, against the interpreter; and indices that must be refused.

use crate::harness::targets;
use crate::models::{Here, built, check, check_on, model, outside};
use codegen::Native;
use dialects::exec::Executor;
use dialects::ir::{Attr, Module, OpBuilder, Type, Value, infer};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use runtime::{Fault, ModelError};
use std::sync::Arc;

#[test]
fn rows_along_every_axis() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<5 x s x 37xf32>, %i : tensor<b x 3xi64>, %k : tensor<s x 4xbool>) {
  const %five : tensor<i64> 5
  const %four : tensor<i64> 4
  const %table : tensor<4 x 2xi64> [1, -1, 2, -2, 3, -3, 4, -4]
  const %picks : tensor<3xi64> [1, -1, 0]
  %a = onnx.Gather(%x, %i)
  %n = onnx.Sub(%i, %five)
  %c = onnx.Gather(%x, %n)
  %j = onnx.Cast(%n) {to=6}
  %d = onnx.Gather(%x, %j) {axis=2}
  %e = onnx.Gather(%table, %i)
  %o = onnx.Sub(%i, %four)
  %f = onnx.Gather(%k, %o) {axis=-1}
  %g = onnx.Gather(%x, %picks) {axis=-1}
  return %a, %c, %d, %e, %f, %g
}
",
    );
    let dims: &[&[(&str, usize)]] =
        &[&[("b", 2), ("s", 3)], &[("b", 1), ("s", 1)], &[("b", 0), ("s", 4)], &[("b", 7), ("s", 0)]];
    check(&m, dims, 9, 0.0);
}

#[test]
fn tuples_and_single_elements() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x 4 x 5 x 9xf32>, %k : tensor<4 x 5xbool>, %i : tensor<b x s x 2xi64>,
    %e : tensor<b x 4 x 2 x 9xi64>) {
  const %four : tensor<i64> 4
  %n = onnx.Sub(%i, %four)
  %p = onnx.GatherND(%x, %i) {batch_dims=1}
  %q = onnx.GatherND(%k, %n)
  %t = onnx.GatherElements(%x, %e) {axis=2}
  return %p, %q, %t
}
",
    );
    let dims: &[&[(&str, usize)]] = &[&[("b", 2), ("s", 3)], &[("b", 1), ("s", 40)], &[("b", 3), ("s", 0)]];
    check(&m, dims, 4, 0.0);
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 6xf32>, %e : tensor<s x 5xi64>, %f : tensor<s x 6xi64>) {
  const %one : tensor<i64> 1
  const %four : tensor<i64> 4
  %n = onnx.Sub(%e, %four)
  %t = onnx.GatherElements(%x, %n) {axis=-1}
  %c = onnx.LessOrEqual(%f, %one)
  %z = onnx.Cast(%c) {to=6}
  %u = onnx.GatherElements(%x, %z)
  return %t, %u
}
",
    );
    check(&m, &[&[("s", 2)], &[("s", 19)]], 5, 0.0);
}

/// A table of 11 rows of `k` codes, gathered by 2-dimensional indices.
fn table(k: usize, block: usize, bits: usize, zeros: bool, rng: &mut ChaCha8Rng) -> Module {
    let mut m = model(
        "module ir_version=10 opsets {com.microsoft=1, onnx=21}
graph @main(%i : tensor<b x s x i64>) {
  return %i
}
",
    );
    let (top, indices) = (m.top, m.regions[m.top].args[0]);
    let groups = k.div_ceil(block);
    let bytes = |n: usize, rng: &mut ChaCha8Rng| (0..n).map(|_| rng.random()).collect::<Vec<u8>>();
    let row = (groups * bits).div_ceil(8);
    let codes = Tensor::new(&[11, k * bits / 8], bytes(11 * k * bits / 8, rng)).unwrap();
    let scales = (0..11 * groups).map(|_| rng.random_range(0.01f32..0.1)).collect::<Vec<_>>();
    let scales = Tensor::new(&[11, groups], scales).unwrap();
    let points = Tensor::new(&[11, row], bytes(11 * row, rng)).unwrap();
    let mut operands = vec![m.add_const(top, "", codes.to_const()), indices];
    operands.push(m.add_const(top, "", scales.to_const()));
    if zeros {
        operands.push(m.add_const(top, "", points.to_const()));
    }
    let mut b = OpBuilder::new("com.microsoft.GatherBlockQuantized", &"node".into());
    for (name, v) in [("bits", bits), ("block_size", block), ("quantize_axis", 1)] {
        b = b.attr(name, Attr::Int(v as i64));
    }
    let op = m.push(top, b.operands(operands.into_iter().map(Some)).result(Type::Unknown));
    m.regions[top].results = vec![m.ops[op].results[0].unwrap()];
    assert!(infer::infer(&mut m, &Ops::standard()).is_empty());
    m
}

#[test]
fn rows_of_quantized_tables() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for (k, block, bits, zeros) in [
        (64, 32, 4, false),
        (80, 32, 4, true),
        (38, 16, 4, true),
        (48, 16, 8, true),
        (33, 32, 8, false),
        (72, 32, 2, true),
    ] {
        let m = table(k, block, bits, zeros, &mut rng);
        let input = m.regions[m.top].args[0];
        let run =
            |shape: [usize; 2], ids: Vec<i64>| vec![(input, Item::from(Tensor::new(&shape, ids).unwrap()))];
        // The last of these are out of range, which gives zeros.
        let runs = [
            run([1, 1], vec![10]),
            run([2, 3], vec![0, -1, 5, -11, 11, -12]),
            run([1, 2], vec![i64::MIN, i64::MAX]),
            run([0, 4], Vec::new()),
        ];
        check_on(&m, &runs, &|_| Some(4), 1, 0.0);
    }
}

/// Whether the executor, and libraries for every target, find `fault` in each of these inputs.
pub fn refuse(m: &Module, inputs: &[Vec<(Value, Tensor)>], fault: Fault, most: u64) {
    let ops = Ops::standard();
    let wanted = m.regions[m.top].results.clone();
    let native = Native::new(ops.clone(), Arc::new(Here));
    let ready = native.prepare(m, &wanted).unwrap();
    let libraries: Vec<_> = targets().iter().map(|target| built(m, &ops, target, &|_| Some(most))).collect();
    for given in inputs {
        let items: Vec<(Value, Item)> = given.iter().map(|(v, t)| (*v, t.clone().into())).collect();
        let e = ready.run(&items, &mut |_, _| Ok(())).unwrap_err().to_string();
        assert!(e.contains(&fault.to_string()), "{e}");
        let given: Vec<_> = given.iter().map(|(_, t)| outside(t)).collect();
        for library in &libraries {
            let e = library.run(&given).unwrap_err();
            assert!(matches!(e, ModelError::Fault(f) if f == fault), "{e}");
        }
    }
}

#[test]
fn an_index_out_of_range_is_refused() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 8xf32>, %i : tensor<3xi64>, %j : tensor<1 x 2xi64>, %k : tensor<s x 1xi64>) {
  %a = onnx.Gather(%x, %i)
  %b = onnx.GatherND(%x, %j)
  %c = onnx.GatherElements(%x, %k) {axis=1}
  return %a, %b, %c
}
",
    );
    let args = m.regions[m.top].args.clone();
    let ids = |shape: &[usize], ids: &[i64]| Tensor::new(shape, ids.to_vec()).unwrap();
    let given = |i: &[i64], j: &[i64], k: &[i64]| {
        let x = Tensor::new(&[4, 8], vec![1f32; 32]).unwrap();
        let ids = [x, ids(&[3], i), ids(&[1, 2], j), ids(&[4, 1], k)];
        args.iter().copied().zip(ids).collect::<Vec<_>>()
    };
    let fine = given(&[0, 3, -4], &[3, 7], &[0, 7, -8, 1]);
    let items = fine.into_iter().map(|(v, t)| (v, t.into())).collect();
    check_on(&m, &[items], &|_| Some(4), 3, 0.0);
    let bad = [
        given(&[0, 4, 0], &[0, 0], &[0; 4]),
        given(&[0, 0, -5], &[0, 0], &[0; 4]),
        given(&[i64::MAX, 0, 0], &[0, 0], &[0; 4]),
        given(&[0; 3], &[0, 8], &[0; 4]),
        given(&[0; 3], &[-5, 0], &[0; 4]),
        given(&[0; 3], &[0, 0], &[0, 0, 8, 0]),
    ];
    // Nothing can be picked of nothing.
    let none = Tensor::new(&[0, 8], Vec::<f32>::new()).unwrap();
    let empty = [none, ids(&[3], &[0; 3]), ids(&[1, 2], &[0; 2]), ids(&[0, 1], &[])];
    let empty = args.iter().copied().zip(empty).collect();
    refuse(&m, &bad.into_iter().chain([empty]).collect::<Vec<_>>(), Fault::Index, 4);
}

#[test]
fn what_gathers_cannot_know_is_left_alone() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 8xf64>, %y : tensor<?x8xf32>, %i : tensor<3xi64>, %e : tensor<t x 8xi64>, %z : tensor<s x 8xf32>) {
  %a = onnx.Gather(%x, %i)
  %b = onnx.Gather(%y, %i)
  %c = onnx.GatherElements(%z, %e) {axis=1}
  return %a, %b, %c
}
",
    );
    let native = Native::new(Ops::standard(), Arc::new(Here));
    let keep = m.regions[m.top].results.clone();
    let (_, _, summary) = native.compile(&m, &[], &keep).unwrap();
    assert_eq!((summary.compiled, summary.interpreted.len()), (0, 3), "{summary}");
}
