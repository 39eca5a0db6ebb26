//! Ranges of a length that is known before, against the interpreter; and of another one, which must be refused.

use crate::gather::refuse;
use crate::harness::{Loaded, load, targets};
use crate::models::{built, check_on, model, outside};
use codegen::kernels::Buffer;
use codegen::{Target, fuse, lower};
use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::{Dim, Elem, Module, Type};
use dialects::ops::Ops;
use dialects::tensor::Tensor;
use runtime::{Fault, ModelError};
use std::collections::HashMap;

/// A Range of three inputs.
fn range(elem: Elem) -> Module {
    let name = elem.name();
    model(&format!(
        "module ir_version=10 opsets {{onnx=21}}
graph @main(%a : tensor<{name}>, %b : tensor<{name}>, %c : tensor<1x{name}>) {{
  %r = onnx.Range(%a, %b, %c)
  return %r
}}
"
    ))
}

/// Kernels that were compiled, by name: they do not depend on the length.
type Cache = HashMap<String, Loaded>;

/// The bytes of a range of `length`, and the fault that was found.
fn run(cache: &mut Cache, target: &Target, given: &[Tensor; 3], length: usize) -> (Vec<u8>, Option<Fault>) {
    let mut m = range(given[0].elem());
    let r = m.regions[m.top].results[0];
    m.values[r].ty = Type::tensor(given[0].elem(), [Dim::Known(length as i64)]);
    fuse::fuse(&mut m, target, &Default::default());
    let op = *m.regions[m.top].ops.last().unwrap();
    let lowered = lower::lower(&m, op, target).unwrap();
    let step = &lowered.steps[0];
    let mut operands: Vec<Vec<u8>> =
        given.iter().map(|t| codegen::memory::bytes(t).unwrap().to_vec()).collect();
    let size = codegen::memory::size(given[0].elem()).unwrap() as usize;
    let (mut out, mut fault) = (vec![0xa5u8; length * size + 8], 0i32);
    let buffers: Vec<*mut u8> = step
        .buffers
        .iter()
        .map(|b| match b {
            Buffer::Operand(i) => operands[*i].as_mut_ptr(),
            Buffer::Result(_) => out.as_mut_ptr(),
            Buffer::Fault => (&raw mut fault).cast(),
            other => panic!("{other:?}"),
        })
        .collect();
    let none = |_: &str| None;
    let dims: Vec<i64> = step.dims.iter().map(|d| d.eval(&none).unwrap() as i64).collect();
    let name = format!("{target} {}", step.kernel.name);
    let loaded = cache.entry(name).or_insert_with(|| load(target, &[&step.kernel]));
    loaded.call(0, &buffers, &dims, step.units.eval(&none).unwrap() as usize);
    assert_eq!(out.split_off(length * size), [0xa5; 8], "written past the end");
    (out, Fault::of(fault))
}

fn check(cache: &mut Cache, given: [Tensor; 3]) {
    let m = range(given[0].elem());
    let args = m.regions[m.top].args.iter().copied();
    let inputs: Vec<_> = args.zip(given.iter().map(|t| t.clone().into())).collect();
    let results = &m.regions[m.top].results;
    let expected = run_once(&Interpreter::new(Ops::standard()), &m, &inputs, results).unwrap();
    let expected = expected[0].tensor().unwrap();
    let n = expected.len();
    for target in targets() {
        let (found, fault) = run(cache, &target, &given, n);
        assert_eq!(fault, None, "{target} {given:?}");
        assert_eq!(found, codegen::memory::bytes(expected).unwrap(), "{target} {given:?}");
        for other in [n + 1, n.saturating_sub(1), 0, n + 2000].into_iter().filter(|&l| l != n) {
            assert_eq!(
                run(cache, &target, &given, other).1,
                Some(Fault::Length),
                "{target} {given:?}: {other}"
            );
        }
    }
}

#[test]
fn ranges_are_as_long_as_they_say() {
    let mut cache = Cache::new();
    let last = |t: Tensor| t.reshape(&[1]).unwrap();
    for (start, limit, delta) in [(0i64, 5, 1), (10, 1, -3), (4, 4, 1), (3, 9, -2), (-7, 2052, 2)] {
        check(&mut cache, [Tensor::scalar(start), Tensor::scalar(limit), last(Tensor::scalar(delta))]);
        let [start, limit, delta] = [start, limit, delta].map(|v| Tensor::scalar(v as i32));
        check(&mut cache, [start, limit, last(delta)]);
    }
    for (start, limit, delta) in
        [(0.5f32, 4.1f32, 1.0f32), (0.0, 150.0, 0.1), (1.0, 0.0, 0.25), (2.0, -1.0, -0.5)]
    {
        check(&mut cache, [Tensor::scalar(start), Tensor::scalar(limit), last(Tensor::scalar(delta))]);
    }
    // No interpreter takes a step of nothing; a limit that is no number is no length.
    let zero = [Tensor::scalar(0i64), Tensor::scalar(5i64), last(Tensor::scalar(0i64))];
    let nan = [Tensor::scalar(0f32), Tensor::scalar(f32::NAN), last(Tensor::scalar(1f32))];
    for target in targets() {
        assert_eq!(run(&mut cache, &target, &zero, 5).1, Some(Fault::Length));
        assert_eq!(run(&mut cache, &target, &nan, 5).1, Some(Fault::Length));
    }
}

/// A Range of three inputs whose length the model declares to be the dim `s` of another one.
fn declared(length: Dim) -> Module {
    let mut m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 1xf32>, %a : tensor<i64>, %b : tensor<i64>, %c : tensor<i64>) {
  %r = onnx.Range(%a, %b, %c)
  %y = onnx.Abs(%x)
  return %r, %y
}
",
    );
    let r = m.regions[m.top].results[0];
    m.values[r].ty = Type::tensor(Elem::I64, [length]);
    m
}

#[test]
fn a_declared_length_is_checked() {
    let of = |s: usize, limit: i64| {
        let x = Tensor::new(&[s, 1], vec![1f32; s]).unwrap();
        [x, Tensor::scalar(0i64), Tensor::scalar(limit), Tensor::scalar(1i64)]
    };
    let m = declared(Dim::Known(5));
    let args = m.regions[m.top].args.clone();
    let given = |limit: i64| args.iter().copied().zip(of(2, limit)).collect::<Vec<_>>();
    let items = given(5).into_iter().map(|(v, t)| (v, t.into())).collect();
    check_on(&m, &[items], &|_| Some(2), 2, 0.0);
    refuse(&m, &[given(6), given(0), given(-5)], Fault::Length, 2);
    // The executor knows no dim of a Range's operands: only a library takes one of the inputs'.
    let m = declared(Dim::Sym("s".into()));
    for target in targets() {
        let model = built(&m, &Ops::standard(), &target, &|_| Some(5000));
        for s in [0, 1, 7, 3001] {
            let out = model.run(&of(s, s as i64).each_ref().map(outside)).unwrap();
            assert_eq!(out[0].to_i64().unwrap(), (0..s as i64).collect::<Vec<_>>());
            let e = model.run(&of(s, s as i64 + 1).each_ref().map(outside)).unwrap_err();
            assert!(matches!(e, ModelError::Fault(Fault::Length)), "{e}");
        }
    }
}
