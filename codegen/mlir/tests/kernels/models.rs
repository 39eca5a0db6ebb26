//! Small models as text, through the compiled executor and through a library that is built and loaded, against the
//! interpreter.

use crate::harness::{check_instructions, emulated, targets};
use codegen::plan::plan;
use codegen::target::Arch;
use codegen::{CompileError, Compiler, Native, Request, Target, artifact};
use dialects::exec::{Executor, run_once};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Attr, ConstData, Elem, Module, OpBuilder, Type, Value, infer, parse::parse};
use dialects::ops::{Item, Ops};
use dialects::tensor::{Data, Tensor};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Compiles in this process.
pub struct Here;

impl Compiler for Here {
    fn compile(&self, request: &Request) -> Result<Vec<u8>, CompileError> {
        codegen_mlir::compile(request)
    }
}

/// A model whose text this is.
pub fn model(text: &str) -> Module {
    let mut m = parse(text).unwrap_or_else(|e| panic!("{e:?}\n{text}")).module;
    let found = infer::infer(&mut m, &Ops::standard());
    assert!(found.is_empty(), "{found:?}");
    m
}

/// Random inputs of a model whose named dims have these sizes.
pub fn inputs(m: &Module, dims: &[(&str, usize)], rng: &mut impl Rng) -> Vec<(Value, Item)> {
    let args = m.regions[m.top].args.iter().filter(|&&v| m.const_of(v).is_none());
    args.map(|&v| {
        let ty = m.ty(v);
        let shape: Vec<usize> = ty
            .dims()
            .unwrap()
            .iter()
            .map(|d| match d.known() {
                Some(n) => n as usize,
                None => dims.iter().find(|(n, _)| *n == d.to_string()).unwrap().1,
            })
            .collect();
        let n = shape.iter().product();
        let t = match ty.elem().unwrap().to_string().as_str() {
            "i64" => Tensor::new(&shape, (0..n).map(|_| rng.random_range(0i64..4)).collect::<Vec<_>>()),
            "i32" => Tensor::new(&shape, (0..n).map(|_| rng.random_range(-9i32..9)).collect::<Vec<_>>()),
            "bool" => Tensor::new(&shape, (0..n).map(|_| rng.random()).collect::<Vec<bool>>()),
            _ => Tensor::new(&shape, (0..n).map(|_| rng.random_range(-3f32..3.0)).collect::<Vec<_>>()),
        };
        (v, t.unwrap().into())
    })
    .collect()
}

/// Random codes of 8 bits.
pub fn codes(elem: Elem, shape: &[usize], rng: &mut impl Rng) -> Tensor {
    let n = shape.iter().product();
    let data: Data = match elem {
        Elem::I8 => Data::I8((0..n).map(|_| rng.random()).collect()),
        _ => Data::U8((0..n).map(|_| rng.random()).collect()),
    };
    Tensor::new(shape, data).unwrap()
}

/// Checks that floats are within `tolerance` of the largest, and all else is the same.
pub fn close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!((found.shape(), found.elem()), (expected.shape(), expected.elem()), "{what}");
    let (Ok(f), Ok(e)) = (found.f32s(), expected.f32s()) else {
        assert_eq!(found, expected, "{what}");
        return;
    };
    let top = e.iter().fold(1e-6f64, |a, v| if v.is_finite() { a.max(f64::from(v.abs())) } else { a });
    for (i, (f, e)) in f.iter().zip(e).enumerate() {
        let same = f == e || (f.is_nan() && e.is_nan()) || f64::from((f - e).abs()) <= tolerance * top;
        assert!(same, "{what}: element {i} is {f}, expected {e}");
    }
}

/// Checks a model on random inputs; at least `compiled` of its ops must be.
pub fn check(m: &Module, dims: &[&[(&str, usize)]], compiled: usize, tolerance: f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let runs: Vec<_> = dims.iter().map(|sizes| inputs(m, sizes, &mut rng)).collect();
    let most = |name: &str| {
        let sizes = dims.iter().flat_map(|d| d.iter()).filter(|(n, _)| *n == name);
        sizes.map(|(_, s)| *s as u64).max()
    };
    check_on(m, &runs, &most, compiled, tolerance);
}

/// Checks a model on these inputs, whose named dims are at most `most`: by the executor, and by libraries for every target
/// that this machine runs or is made to stand in for.
pub fn check_on(
    m: &Module,
    runs: &[Vec<(Value, Item)>],
    most: &dyn Fn(&str) -> Option<u64>,
    compiled: usize,
    tolerance: f64,
) {
    let ops = Ops::standard();
    let wanted = m.regions[m.top].results.clone();
    let native = Native::new(ops.clone(), Arc::new(Here));
    let (_, _, summary) = native.compile(m, &[], &wanted).unwrap();
    assert!(summary.compiled >= compiled, "{summary:?}");
    let interpreter = Interpreter::new(ops.clone());
    let ready = native.prepare(m, &wanted).unwrap();
    let whole = summary.interpreted.is_empty();
    let code = |target: &Target| {
        let plan = plan(m, &ops, std::slice::from_ref(target), most).unwrap();
        codegen::kernels::module(&plan.versions[0].kernels)
    };
    let mut libraries = Vec::new();
    if whole {
        // Of those stood in for the one with the widest registers, and others that ask for instructions of their own.
        let mut seen = std::collections::HashSet::new();
        let mut others = emulated(&["avx512-vnni", "sapphire-rapids", "aarch64-i8mm"]);
        others.retain(|t| {
            let text = code(t);
            (t.lanes() == 16 || text.contains("@emulated_")) && seen.insert(text)
        });
        libraries.extend(targets().into_iter().chain(others).map(|t| (built(m, &ops, &t, most), t)));
        for name in [Arch::X86_64, Arch::Aarch64].into_iter().flat_map(Target::names) {
            let target = Target::parse(name).unwrap();
            check_instructions(&code(&target), &target);
        }
    }
    for given in runs {
        let shapes: Vec<_> = given.iter().map(|(_, i)| i.tensor().unwrap().shape()).collect();
        let expected = run_once(&interpreter, m, given, &wanted).unwrap();
        let mut came = std::collections::HashMap::new();
        ready
            .run(given, &mut |v, item| {
                came.insert(v, item.clone());
                Ok(())
            })
            .unwrap();
        let found: Vec<Item> = wanted.iter().map(|v| came.remove(v).unwrap()).collect();
        for (f, e) in found.iter().zip(&expected) {
            close(&format!("{shapes:?}"), f.tensor().unwrap(), e.tensor().unwrap(), tolerance);
        }
        let given: Vec<runtime::Tensor> = given.iter().map(|(_, i)| outside(i.tensor().unwrap())).collect();
        for (model, target) in &libraries {
            let out = model.run(&given).unwrap();
            for ((f, e), n) in out.iter().zip(&expected).zip(&found) {
                let what = format!("{shapes:?}: built for {target}");
                close(&what, &inside(f), e.tensor().unwrap(), tolerance);
                // The same kernels, elsewhere in memory.
                let same = !target.is_emulated() && target.features == Target::native().features;
                assert!(!same || *f == outside(n.tensor().unwrap()), "{what}: other bits");
            }
        }
    }
}

/// What a library gave.
pub fn inside(t: &runtime::Tensor) -> Tensor {
    let words = || t.bytes.chunks_exact(4).map(|b| i32::from_ne_bytes(b.try_into().unwrap()));
    match t.elem {
        runtime::Elem::F32 => Tensor::new(&t.shape, t.to_f32().unwrap()),
        runtime::Elem::I64 => Tensor::new(&t.shape, t.to_i64().unwrap()),
        runtime::Elem::I32 => Tensor::new(&t.shape, words().collect::<Vec<_>>()),
        runtime::Elem::Bool => Tensor::new(&t.shape, t.bytes.iter().map(|&b| b != 0).collect::<Vec<_>>()),
        runtime::Elem::U8 => Tensor::new(&t.shape, t.bytes.clone()),
        runtime::Elem::I8 => Tensor::new(&t.shape, t.bytes.iter().map(|&b| b as i8).collect::<Vec<_>>()),
    }
    .unwrap()
}

/// Checks that `op`, and no other, is left to the interpreter.
pub fn check_left(m: &Module, op: &str) {
    let native = Native::new(Ops::standard(), Arc::new(Here));
    let (_, _, summary) = native.compile(m, &[], &m.regions[m.top].results).unwrap();
    let left: Vec<&str> = summary.interpreted.iter().map(|(op, _)| op.as_str()).collect();
    assert_eq!(left, [op], "{summary:?}");
}

/// A tensor for a library.
pub fn outside(t: &Tensor) -> runtime::Tensor {
    let elem = match t.elem().to_string().as_str() {
        "i64" => runtime::Elem::I64,
        "i32" => runtime::Elem::I32,
        "bool" => runtime::Elem::Bool,
        "u8" => runtime::Elem::U8,
        "i8" => runtime::Elem::I8,
        _ => runtime::Elem::F32,
    };
    let bytes = codegen::memory::bytes(t).unwrap().to_vec();
    runtime::Tensor { elem, shape: t.shape().to_vec(), bytes }
}

/// The library of a model for `target`.
pub fn built(m: &Module, ops: &Ops, target: &Target, most: &dyn Fn(&str) -> Option<u64>) -> runtime::Model {
    let plan = plan(m, ops, std::slice::from_ref(target), most).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let name = Some("model.weights".to_owned());
    let built = artifact::build(&plan, &Here, dir.path(), name).unwrap();
    std::fs::write(dir.path().join("model.weights"), built.weights.unwrap()).unwrap();
    runtime::Model::load(&built.library).unwrap()
}

#[test]
fn chains_of_elementwise_ops() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<b x s x 5xf32>, %y : tensor<s x 1xf32>, %z : tensor<5xf32>, %k : tensor<b x s x 5xbool>) {
  const %half : tensor<f32> 0.5
  const %row : tensor<5xf32> [1.0, -2.0, 3.0, 0.25, 7.0]
  %a = onnx.Add(%x, %y)
  %e = onnx.Sigmoid(%a)
  %c = onnx.Mul(%e, %row)
  %d = onnx.Div(%c, %half)
  %t = onnx.Tanh(%d)
  %u = onnx.Sub(%t, %z)
  %w = onnx.Where(%k, %u, %x)
  %g = onnx.Gelu(%w)
  %q = onnx.Erf(%a)
  %n = onnx.Not(%k)
  return %g, %q, %n
}
",
    );
    let dims: &[&[(&str, usize)]] =
        &[&[("b", 2), ("s", 3)], &[("b", 1), ("s", 1)], &[("b", 0), ("s", 4)], &[("b", 3), ("s", 117)]];
    check(&m, dims, 10, 1e-6);
}

#[test]
fn a_chain_that_would_leave_its_kernel_and_come_back() {
    // The sum needs the product's other reader, which is no kernel's: both must not become one.
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 8xf32>) {
  const %axis : tensor<i64> 0
  %a = onnx.Abs(%x)
  %c = onnx.CumSum(%a, %axis)
  %b = onnx.Add(%a, %c)
  %d = onnx.Sqrt(%b)
  return %d
}
",
    );
    check(&m, &[&[("s", 9)]], 3, 1e-6);
}

#[test]
fn comparisons_and_integers() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%i : tensor<1 x s xi64>, %j : tensor<s x 1xi64>) {
  const %one : tensor<i64> 1
  %n = onnx.Add(%i, %one)
  %c = onnx.LessOrEqual(%i, %j)
  %f = onnx.Cast(%c) {to=1}
  %p = onnx.Mul(%n, %j)
  return %c, %f, %p
}
",
    );
    check(&m, &[&[("s", 1)], &[("s", 19)]], 4, 0.0);
}

/// `x` through a packed product with bias, an activation, a gate and a residual connection, and through a second one.
fn perceptron(accuracy_level: i64, zeros: bool, rng: &mut impl Rng) -> Module {
    let mut m = model(
        "module ir_version=10 opsets {com.microsoft=1, onnx=21}
graph @main(%x : tensor<b x s x 48xf32>, %gate : tensor<b x s x 37xf32>) {
  return %x
}
",
    );
    let top = m.top;
    let (x, gate) = (m.regions[top].args[0], m.regions[top].args[1]);
    let loc: std::sync::Arc<str> = "node".into();
    let mut linear = |m: &mut Module, x: Value, k: usize, n: usize, bias: bool| -> Value {
        let groups = k.div_ceil(32);
        let codes: Vec<u8> = (0..n * groups * 16).map(|_| rng.random()).collect();
        let scales: Vec<f32> = (0..n * groups).map(|_| rng.random_range(0.01f32..0.1)).collect();
        let points: Vec<u8> = (0..n * groups.div_ceil(2)).map(|_| rng.random()).collect();
        let biases: Vec<f32> = (0..n).map(|_| rng.random_range(-1f32..1.0)).collect();
        let mut add = |t: Tensor| -> Value {
            let data: ConstData = t.to_const();
            m.add_const(top, "", data)
        };
        let codes = add(Tensor::new(&[n, groups, 16], codes).unwrap());
        let scales = add(Tensor::new(&[n * groups], scales).unwrap());
        let points = zeros.then(|| add(Tensor::new(&[points.len()], points).unwrap()));
        let biases = bias.then(|| add(Tensor::new(&[n], biases).unwrap()));
        let mut operands = vec![Some(x), Some(codes), Some(scales), points, None, biases];
        while operands.last() == Some(&None) {
            operands.pop();
        }
        let mut b = OpBuilder::new("com.microsoft.MatMulNBits", &loc).operands(operands);
        for (name, v) in [("K", k), ("N", n), ("bits", 4), ("block_size", 32)] {
            b = b.attr(name, Attr::Int(v as i64));
        }
        let op = m.push(top, b.attr("accuracy_level", Attr::Int(accuracy_level)).result(Type::Unknown));
        m.ops[op].results[0].unwrap()
    };
    let a = linear(&mut m, x, 48, 37, true);
    let op = |m: &mut Module, name: &str, operands: Vec<Value>| -> Value {
        let op = m.push(top, OpBuilder::new(name, &loc).operands(operands).result(Type::Unknown));
        m.ops[op].results[0].unwrap()
    };
    let g = op(&mut m, "onnx.Gelu", vec![a]);
    let h = op(&mut m, "onnx.Mul", vec![g, gate]);
    let b = linear(&mut m, h, 37, 48, false);
    let r = op(&mut m, "onnx.Add", vec![b, x]);
    m.values[r].name = "y".into();
    m.regions[top].results = vec![r];
    infer::infer(&mut m, &Ops::standard());
    m
}

#[test]
fn packed_products_with_what_comes_after_them() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (level, zeros, tolerance) in [(0, false, 1e-5), (0, true, 1e-5), (4, false, 1e-5), (4, true, 1e-5)] {
        let m = perceptron(level, zeros, &mut rng);
        let dims: &[&[(&str, usize)]] =
            &[&[("b", 1), ("s", 1)], &[("b", 2), ("s", 5)], &[("b", 1), ("s", 0)]];
        check(&m, dims, 5, tolerance);
    }
}

#[test]
fn a_library_refuses_what_it_was_not_built_for() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 8xf32>) {
  const %w : tensor<8xf32> [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
  %y = onnx.Mul(%x, %w)
  return %y
}
",
    );
    let target = targets().pop().unwrap();
    let plan = plan(&m, &Ops::standard(), std::slice::from_ref(&target), &|_| Some(4)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let built = artifact::build(&plan, &Here, dir.path(), Some("w.bin".into())).unwrap();
    let mut weights = built.weights.unwrap();
    let file = dir.path().join("w.bin");
    let message = |r: Result<runtime::Model, runtime::ModelError>| r.err().unwrap().to_string();

    assert!(message(runtime::Model::load(&built.library)).contains("w.bin"));
    std::fs::write(&file, &weights).unwrap();
    let loaded = runtime::Model::load(&built.library).unwrap();
    let x = runtime::Tensor::f32(&[5, 8], &[1.0; 40]);
    let e = loaded.run(&[x]).unwrap_err().to_string();
    assert_eq!(e, "the dim \"s\" is 5, but the model was built for at most 4");
    let e = loaded.run(&[runtime::Tensor::f32(&[4, 7], &[1.0; 28])]).unwrap_err().to_string();
    assert_eq!(e, "the input \"x\" is f32[4, 7] in 112 bytes, expected f32[s, 8]");
    let y = loaded.run(&[runtime::Tensor::f32(&[1, 8], &[2.0; 8])]).unwrap();
    assert_eq!(y[0].to_f32().unwrap(), [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0]);
    drop(loaded);

    *weights.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &weights).unwrap();
    assert!(message(runtime::Model::load(&built.library)).contains("hash"));
    std::fs::write(&file, &weights[1..]).unwrap();
    assert!(message(runtime::Model::load(&built.library)).contains("bytes, expected"));

    let inside = artifact::build(&plan, &Here, dir.path(), None).unwrap();
    assert!(inside.weights.is_none() && inside.header.contains("qcc_weights"));
    let y =
        runtime::Model::load(&inside.library).unwrap().run(&[runtime::Tensor::f32(&[0, 8], &[])]).unwrap();
    assert_eq!(y[0].shape, [0, 8]);
}

#[test]
fn what_has_no_kernel_is_named() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 8xf32>, %y : tensor<8x3x3xf32>) {
  const %axis : tensor<i64> 0
  %t = onnx.Det(%y)
  %a = onnx.Abs(%t)
  %s = onnx.Add(%x, %a)
  %c = onnx.CumSum(%s, %axis)
  return %c
}
",
    );
    let refused =
        |m: &Module| plan(m, &Ops::standard(), &targets()[..1], &|_| Some(4)).err().unwrap().to_string();
    let e = refused(&m);
    assert_eq!(e, "no kernel for onnx.Det at node \"t\", onnx.CumSum at node \"c\"");
    // The input itself comes out.
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x 8xf32>) {
  %y = onnx.Abs(%x)
  return %y, %x
}
",
    );
    assert_eq!(refused(&m), "the output \"x\" is an input, a constant, or another output");
}

#[test]
fn normalizations_of_rows() {
    for n in [1, 5, 8, 67, 128] {
        let list = |f: fn(usize) -> f64| (0..n).map(|i| format!("{:?}", f(i))).collect::<Vec<_>>().join(", ");
        let (w, c) = (list(|i| 1.0 + i as f64 * 0.25), list(|i| i as f64 * 0.5 - 2.0));
        let m = model(&format!(
            "module ir_version=10 opsets {{onnx=23}}
graph @main(%x : tensor<b x s x {n}xf32>, %g : tensor<{n}xf32>) {{
  const %w : tensor<{n}xf32> [{w}]
  const %c : tensor<{n}xf32> [{c}]
  %l = onnx.LayerNormalization(%x, %w, %c)
  %r = onnx.RMSNormalization(%x, %g) {{epsilon=0.001}}
  %p = onnx.LayerNormalization(%x, %g) {{axis=2}}
  %y = onnx.Add(%l, %r)
  return %y, %p
}}
"
        ));
        check(&m, &[&[("b", 2), ("s", 3)], &[("b", 1), ("s", 0)], &[("b", 1), ("s", 40)]], 4, 2e-6);
    }
}

/// The assembly of a model's kernels.
fn assembly(m: &Module, target: &Target) -> String {
    let plan = plan(m, &Ops::standard(), std::slice::from_ref(target), &|_| Some(4)).unwrap();
    let mlir = codegen::kernels::module(&plan.versions[0].kernels);
    let request = Request { mlir, target: target.clone(), form: codegen::Form::Asm };
    String::from_utf8(codegen_mlir::compile(&request).unwrap()).unwrap()
}

#[test]
fn every_target_takes_what_is_emitted_for_it() {
    let packed = perceptron(4, true, &mut ChaCha8Rng::seed_from_u64(5));
    let others = model(
        "module ir_version=10 opsets {com.microsoft=1, onnx=23}
graph @main(%x : tensor<b x s x 48xf32>, %past : tensor<b x 3x3x8xf32>, %ids : tensor<b x s x i64>, %q : tensor<s x 20xu8>,
    %image : tensor<b x 3x8x12xf32>) {
  const %w : tensor<48x24xf32> random(1)
  const %codes : tensor<20x9xi8> random(2)
  const %table : tensor<64x48xf32> random(3)
  const %cos : tensor<9x4xf32> random(4)
  const %sin : tensor<9x4xf32> random(5)
  const %scale : tensor<f32> 0.1
  const %zero : tensor<u8> 7
  const %norm : tensor<48xf32> random(6)
  %p = onnx.MatMul(%x, %w)
  %rows = onnx.Gather(%table, %ids)
  %both = onnx.Add(%x, %rows)
  %n = onnx.LayerNormalization(%both, %norm)
  %r = onnx.RotaryEmbedding(%p, %cos, %sin, %ids) {num_heads=3}
  %y, %k, %v = onnx.Attention(%x, %p, %p, _, %past, %past) {q_num_heads=6, kv_num_heads=3, is_causal=1}
  %soft = onnx.Softmax(%n)
  %waves = onnx.Sin(%r)
  %product = onnx.MatMulInteger(%q, %codes, %zero)
  %floats = onnx.DequantizeLinear(%q, %scale, %zero)
  %code, %by, %at = onnx.DynamicQuantizeLinear(%x)
  const %filters : tensor<6x3x3x3xf32> random(7)
  const %coded : tensor<5x6x3x3xi8> random(8)
  const %one : tensor<i8> 0
  %seen = onnx.Conv(%image, %filters) {pads=[1, 1, 1, 1]}
  %pooled = onnx.MaxPool(%seen) {kernel_shape=[2, 2], strides=[2, 2]}
  %in_codes = onnx.QuantizeLinear(%pooled, %scale, %zero)
  %next = onnx.QLinearConv(%in_codes, %scale, %zero, %coded, %scale, %one, %scale, %zero)
  return %soft, %waves, %y, %product, %floats, %code, %next
}
",
    );
    let expected = [
        ("x86-64-v3", "vpmaddubsw"),
        ("avx512-vnni", "vpdpbusd"),
        ("sapphire-rapids", "tdpbsud"),
        ("aarch64-dotprod", "sdot"),
        ("aarch64-i8mm", "usmmla"),
    ];
    let codes = [("avx512-vnni", "vpdpbusd"), ("sapphire-rapids", "tdpbusd"), ("aarch64-i8mm", "usdot")];
    for name in [Arch::X86_64, Arch::Aarch64].into_iter().flat_map(Target::names) {
        let target = Target::parse(name).unwrap();
        let text = assembly(&packed, &target);
        for (_, instruction) in expected.iter().filter(|(n, _)| *n == name) {
            assert!(text.contains(instruction), "{name} without {instruction}");
        }
        let text = assembly(&others, &target);
        for (_, instruction) in codes.iter().filter(|(n, _)| *n == name) {
            assert!(text.contains(instruction), "{name} without {instruction}");
        }
    }
}
