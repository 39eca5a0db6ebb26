//! Elementwise ops at the ends of their ranges, against the interpreter, and sines against float64.

use crate::harness::targets;
use crate::models::{built, check_on, inside, model, outside};
use codegen::Native;
use dialects::ir::{Module, Value};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use std::sync::Arc;

/// Floats around zero, at halves, near powers of two, at the ends, and a tail after the last whole vector.
fn floats() -> Vec<f32> {
    let mut x: Vec<f32> = (-60..=60).map(|i| i as f32 * 0.25).collect();
    for e in [-149, -130, -126, -60, -24, -12, 1, 10, 22, 23, 24, 30, 31, 32, 62, 63, 64, 100, 127] {
        let p = 2f64.powi(e) as f32;
        x.extend([p, -p, p * 1.25, -p * 0.75, f32::from_bits(p.to_bits() + 1)]);
    }
    x.extend([
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        -0.0,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        0.3499,
        0.3501,
    ]);
    x
}

fn one(m: &Module, t: Tensor) -> Vec<(Value, Item)> {
    vec![(m.regions[m.top].args[0], t.into())]
}

/// These ops of `%x`, each an output of one model.
fn each(elem: &str, x: &Tensor, ops: &[&str], tolerance: f64) {
    let lines: String = ops.iter().enumerate().map(|(i, op)| format!("  %y{i} = onnx.{op}\n")).collect();
    let results: Vec<String> = (0..ops.len()).map(|i| format!("%y{i}")).collect();
    let m = model(&format!(
        "module ir_version=10 opsets {{onnx=22}}
graph @main(%x : tensor<n x {elem}>) {{
  const %two : tensor<{elem}> 2
  const %three : tensor<{elem}> 3
  const %minus : tensor<{elem}> -1
  const %five : tensor<{elem}> -5
  const %power : tensor<i64> 3
  const %half : tensor<f32> 0.5
  const %inverse : tensor<f32> -0.5
{lines}  return {}
}}
",
        results.join(", ")
    ));
    check_on(&m, &[one(&m, x.clone())], &|_| Some(4096), ops.len(), tolerance);
}

#[test]
fn ops_of_floats_at_the_ends_of_their_ranges() {
    let x = floats();
    let exact = [
        "Ceil(%x)",
        "Floor(%x)",
        "Round(%x)",
        "Sign(%x)",
        "IsNaN(%x)",
        "Cast(%x) {to=6}",
        "Cast(%x) {to=7}",
        "Cast(%x) {to=9}",
        "Clip(%x, %minus, %three)",
        "Clip(%x, _, %three)",
        "Clip(%x, %two)",
        "Clip(%x, %three, %minus)",
        "Pow(%x, %two)",
        "Pow(%x, %power)",
        "Pow(%x, %minus)",
        "HardSigmoid(%x) {alpha=0.3}",
        "HardSwish(%x)",
        "LeakyRelu(%x)",
        "Softsign(%x)",
        "Neg(%x)",
        "Abs(%x)",
    ];
    each("f32", &Tensor::new(&[x.len()], x.clone()).unwrap(), &exact, 0.0);
    // What is huge would hide what is not.
    let small: Vec<f32> = x.into_iter().filter(|v| !(v.abs() > 60.0 && v.is_finite())).collect();
    let small = Tensor::new(&[small.len()], small).unwrap();
    each("f32", &small, &["Elu(%x) {alpha=1.5}", "Softplus(%x)", "Log(%x)", "Pow(%x, %half)"], 2e-7);
    for step in [1e-6, 2e-3] {
        let near: Vec<f32> = (-1000..10).map(|i| i as f32 * step).collect();
        each("f32", &Tensor::new(&[near.len()], near).unwrap(), &["Elu(%x)", "Softplus(%x)"], 2e-7);
    }
    let positive: Vec<f32> = (1..2000).map(|i| 1.0 + i as f32 * 1e-5).collect();
    let positive = Tensor::new(&[positive.len()], positive).unwrap();
    each("f32", &positive, &["Log(%x)", "Pow(%x, %inverse)"], 2e-7);
}

#[test]
fn integers_are_divided_without_a_trap() {
    let x: Vec<i64> = (-21..21).chain([i64::MIN, i64::MAX, i64::MIN + 1, 1 << 40]).collect();
    let ops = [
        "Div(%x, %two)",
        "Div(%x, %five)",
        "Div(%x, %minus)",
        "Mod(%x, %three)",
        "Mod(%x, %five)",
        "Mod(%x, %minus)",
        "Mod(%x, %five) {fmod=1}",
        "Mod(%x, %three) {fmod=1}",
        "Neg(%x)",
        "Abs(%x)",
        "Sign(%x)",
        "Relu(%x)",
        "Clip(%x, %minus, %three)",
        "Cast(%x) {to=6}",
        "Cast(%x) {to=1}",
    ];
    each("i64", &Tensor::new(&[x.len()], x.clone()).unwrap(), &ops, 0.0);
    let x: Vec<i32> = x.into_iter().map(|v| v as i32).chain([i32::MIN, i32::MAX]).collect();
    each("i32", &Tensor::new(&[x.len()], x).unwrap(), &ops, 0.0);
}

#[test]
fn sines_are_right_to_the_last_place() {
    let mut x: Vec<f32> = (-100_000..100_000).map(|i| i as f32 * 1.000_1).collect();
    x.extend((-20_000..20_000).map(|i| i as f32 * 0.000_37));
    // The floats next to multiples of pi / 2, where the results are smallest.
    x.extend((0..63_000).map(|i| (f64::from(i) * std::f64::consts::FRAC_PI_2) as f32));
    x.extend([1e-30, -1e-42, 0.0, -0.0, 1e8]);
    let m = model(
        "module ir_version=10 opsets {onnx=22}
graph @main(%x : tensor<n x f32>) {
  %s = onnx.Sin(%x)
  %c = onnx.Cos(%x)
  return %s, %c
}
",
    );
    let t = Tensor::new(&[x.len()], x.clone()).unwrap();
    for target in targets() {
        let out = built(&m, &Ops::standard(), &target, &|_| Some(1 << 20)).run(&[outside(&t)]).unwrap();
        for (y, exact) in out.iter().zip([f64::sin, f64::cos]) {
            for (&x, &y) in x.iter().zip(inside(y).f32s().unwrap()) {
                let want = exact(x.into());
                let unit = f64::from(f32::from_bits((want.abs() as f32).to_bits() + 1))
                    - f64::from(want.abs() as f32);
                assert!((f64::from(y) - want).abs() <= 0.51 * unit, "{target}: of {x}: {y}, expected {want}");
            }
        }
    }
    let ends = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, -1e30, 1e10];
    let ready = built(&m, &Ops::standard(), &targets()[0], &|_| Some(8));
    let out = ready.run(&[runtime::Tensor::f32(&[6], &ends)]).unwrap();
    for y in out {
        let y = y.to_f32().unwrap();
        assert!(y[..3].iter().all(|v| v.is_nan()) && y[3..].iter().all(|v| v.abs() <= 1.0), "{y:?}");
    }
}

#[test]
fn what_could_trap_or_takes_a_logarithm_is_left_alone() {
    let m = model(
        "module ir_version=10 opsets {onnx=22}
graph @main(%x : tensor<n x i64>, %f : tensor<n x f32>) {
  const %none : tensor<i64> 0
  const %power : tensor<f32> 1.7
  %a = onnx.Div(%x, %x)
  %b = onnx.Mod(%x, %none)
  %c = onnx.Pow(%f, %power)
  %d = onnx.Pow(%f, %f)
  %e = onnx.Mod(%f, %f) {fmod=1}
  return %a, %b, %c, %d, %e
}
",
    );
    let native = Native::new(Ops::standard(), Arc::new(crate::models::Here));
    let keep = m.regions[m.top].results.clone();
    let (_, _, summary) = native.compile(&m, &[], &keep).unwrap();
    assert_eq!((summary.compiled, summary.interpreted.len()), (0, 5), "{summary}");
}
