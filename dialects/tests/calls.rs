//! Calls of functions: what the body sees of the call, in inference and in evaluation, and which calls are refused.

use dialects::exec::{ExecError, run_once};
use dialects::ir::infer::infer;
use dialects::ir::interp::Interpreter;
use dialects::ir::{Elem, Meta, Module, OpBuilder, OpName, Type, parse};
use dialects::onnx::cast::convert;
use dialects::onnx::functions;
use dialects::ops::{Item, Ops};
use dialects::tensor::{Data, Tensor};

fn module(text: &str) -> Module {
    parse::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}")).module
}

fn floats(shape: &[usize], v: &[f32]) -> Item {
    Tensor::new(shape, v.to_vec()).unwrap().into()
}

fn run(m: &Module, inputs: &[Item]) -> Result<Vec<Item>, ExecError> {
    let top = &m.regions[m.top];
    let inputs: Vec<_> = top.args.iter().copied().zip(inputs.iter().cloned()).collect();
    run_once(&Interpreter::new(Ops::standard()), m, &inputs, &top.results)
}

fn types(m: &mut Module) -> Vec<String> {
    let found = infer(m, &Ops::standard());
    assert!(found.is_empty(), "{found:?}");
    m.regions[m.top].results.iter().map(|&v| m.ty(v).to_string()).collect()
}

#[test]
fn attributes_are_bound_and_defaults_hold_through_nested_calls() {
    // g(x) = leaky(x, alpha) with alpha 0.5 unless given; f passes its own beta on.
    let mut m = module(
        "module ir_version=10 opsets {onnx=21, my=1}
        graph @main(%x : tensor<2xf32>) {
          %a = my.f(%x) {beta=0.25}
          %b = my.f(%x)
          %c = my.g(%x) {alpha=2.0}
          return %a, %b, %c
        }
        function my.f opsets {my=1} attributes {beta} = graph(%p) {
          %q = my.g(%p) {alpha=ref(beta, 1)}
          return %q
        }
        function my.g opsets {onnx=21} attributes {alpha=0.5} = graph(%p) {
          %q = onnx.LeakyRelu(%p) {alpha=ref(alpha, 1)}
          return %q
        }",
    );
    assert_eq!(types(&mut m), ["tensor<2xf32>"; 3]);
    let got = run(&m, &[floats(&[2], &[-4.0, 3.0])]).unwrap();
    assert_eq!(got, [floats(&[2], &[-1.0, 3.0]), floats(&[2], &[-2.0, 3.0]), floats(&[2], &[-8.0, 3.0])]);
}

#[test]
fn a_body_has_the_versions_that_its_function_imports() {
    // Softmax over all dims from 1 on in opset 11, over the last one alone in 13.
    let m = module(
        "module ir_version=10 opsets {onnx=13, my=1}
        graph @main(%x : tensor<1x2x2xf32>) {
          %a = my.old(%x)
          %b = onnx.Softmax(%x)
          return %a, %b
        }
        function my.old opsets {onnx=11} = graph(%p) {
          %q = onnx.Softmax(%p)
          return %q
        }",
    );
    let got = run(&m, &[floats(&[1, 2, 2], &[0.0; 4])]).unwrap();
    assert_eq!(got, [floats(&[1, 2, 2], &[0.25; 4]), floats(&[1, 2, 2], &[0.5; 4])]);
}

#[test]
fn operands_and_results_may_be_left_out() {
    let mut m = module(
        "module ir_version=10 opsets {my=1}
        graph @main(%x : tensor<3xf32>) {
          %a = my.clip(%x)
          _, %b = my.two(%x)
          return %a, %b
        }
        function my.clip opsets {onnx=21} = graph(%p, %low, %high) {
          %q = onnx.Clip(%p, %low, %high)
          return %q
        }
        function my.two opsets {onnx=21} = graph(%p) {
          %q = onnx.Neg(%p)
          %r = onnx.Abs(%p)
          return %q, %r
        }",
    );
    assert_eq!(types(&mut m), ["tensor<3xf32>"; 2]);
    let x = floats(&[3], &[-1.0, 0.0, 2.0]);
    assert_eq!(run(&m, std::slice::from_ref(&x)).unwrap(), [x, floats(&[3], &[1.0, 0.0, 2.0])]);
}

#[test]
fn a_function_is_generic_and_its_nested_graphs_see_its_values() {
    let mut m = module(
        "module ir_version=10 opsets {my=1}
        graph @main(%x : tensor<2xf32>, %n : tensor<2x3xi64>, %c : tensor<bool>) {
          %a = my.pick(%c, %x)
          %b = my.pick(%c, %n)
          return %a, %b
        }
        function my.pick opsets {onnx=21} = graph(%c, %p) {
          %r = onnx.If(%c) {then_branch=graph @yes() {
            %s = onnx.Add(%p, %p)
            return %s
          }, else_branch=graph @no() {
            %t = onnx.Sub(%p, %p)
            return %t
          }}
          return %r
        }",
    );
    assert_eq!(types(&mut m), ["tensor<2xf32>", "tensor<2x3xi64>"]);
    let n: Item = Tensor::new(&[2, 3], vec![1i64, 2, 3, 4, 5, 6]).unwrap().into();
    let got = run(&m, &[floats(&[2], &[1.0, 2.0]), n, Tensor::scalar(true).into()]).unwrap();
    let doubled: Item = Tensor::new(&[2, 3], vec![2i64, 4, 6, 8, 10, 12]).unwrap().into();
    assert_eq!(got, [floats(&[2], &[2.0, 4.0]), doubled]);
}

#[test]
fn an_op_without_code_falls_back_on_the_body_of_its_specification() {
    let mut m = module(
        "module ir_version=10 opsets {onnx=21}
        graph @main(%x : tensor<2x3x4x5xf32>) {
          %y = onnx.MeanVarianceNormalization(%x)
          return %y
        }",
    );
    assert_eq!(types(&mut m), ["tensor<2x3x4x5xf32>"]);
    let x: Vec<f32> = (0..120).map(|i| ((i * 37) % 11) as f32).collect();
    let got = run(&m, &[floats(&[2, 3, 4, 5], &x)]).unwrap();
    // Each channel has mean 0 and variance 1 over batch and space.
    let y = got[0].tensor().unwrap().f32s().unwrap().to_vec();
    for c in 0..3 {
        let of = (0..120).filter(|i| i / 20 % 3 == c).map(|i| f64::from(y[i]));
        let (sum, squares) = of.fold((0.0, 0.0), |(s, q), v| (s + v, q + v * v));
        assert!(sum.abs() < 1e-4 && (squares / 40.0 - 1.0).abs() < 1e-4, "{sum} {squares}");
    }
    // Before the op was there, it is unknown.
    m.opsets.insert("onnx".into(), 8);
    assert!(matches!(run(&m, &[floats(&[2, 3, 4, 5], &x)]), Err(ExecError::UnknownOp { .. })));
}

#[test]
fn the_table_wins_over_a_function_of_the_model_and_that_over_a_specification() {
    // As in ONNX Runtime, asked with this model.
    let m = module(
        "module ir_version=10 opsets {onnx=21}
        graph @main(%x : tensor<2xf32>) {
          %y = onnx.Relu(%x)
          %z = onnx.MeanVarianceNormalization(%x)
          return %y, %z
        }
        function onnx.Relu opsets {onnx=21} = graph(%p) {
          %q = onnx.Neg(%p)
          return %q
        }
        function onnx.MeanVarianceNormalization opsets {onnx=21} = graph(%p) {
          %q = onnx.Neg(%p)
          return %q
        }",
    );
    let got = run(&m, &[floats(&[2], &[1.0, 2.0])]).unwrap();
    assert_eq!(got, [floats(&[2], &[1.0, 2.0]), floats(&[2], &[-1.0, -2.0])]);
}

#[test]
fn overloads_are_told_apart() {
    let m = module(
        "module ir_version=10 opsets {my=1}
        graph @main(%x : tensor<1xf32>) {
          %a = my.f(%x)
          %b = my.f(%a)
          return %b
          notes { op %b {overload=\"b\"} }
        }
        function my.f opsets {onnx=21} = graph(%p) {
          %q = onnx.Neg(%p)
          return %q
        }
        function my.f overload \"b\" opsets {onnx=21} = graph(%p) {
          %q = onnx.Exp(%p)
          return %q
        }",
    );
    assert_eq!(run(&m, &[floats(&[1], &[0.0])]).unwrap(), [floats(&[1], &[1.0])]);
}

/// The bodies of ONNX's specifications and the code here say the same.
#[test]
fn bodies_of_specifications_agree_with_the_code() {
    let spec = functions::module();
    let x: Vec<f32> = (0..60).map(|i| (i as f32 - 30.0) * 0.23).collect();
    let y: Vec<f32> = (0..60).map(|i| ((i * 7) % 13) as f32 * 0.5 - 3.0).collect();
    let mut compared = Vec::new();
    for f in &spec.functions {
        // Defined natively, and of tensors of any shape.
        let operands = spec.regions[f.body].args.len();
        if Ops::standard().get(&f.name).is_none() || ["Range", "DynamicQuantizeLinear"].contains(&f.name.op())
        {
            continue;
        }
        let mut m = spec.clone();
        let version = f.overload.parse().unwrap();
        m.opsets = [("onnx".into(), version), ("spec".into(), 1)].into();
        let own = m.functions.iter_mut().find(|g| (&g.name, &g.overload) == (&f.name, &f.overload)).unwrap();
        own.name = OpName::new("spec", f.name.op());
        let called = own.name.clone();
        let top = m.top;
        let arg = |m: &mut Module, name: &str| m.add_arg(top, name, Type::of_shape(Elem::F32, &[3, 4, 5]));
        let mut args = vec![arg(&mut m, "x")];
        if operands == 2 && !f.name.op().starts_with("Reduce") {
            args.push(arg(&mut m, "y"));
        }
        let mut results = Vec::new();
        for name in [f.name.clone(), called] {
            let meta = Meta(vec![("overload".into(), f.overload.clone())]);
            let op = OpBuilder::named(name, &"n".into()).operands(args.clone()).meta(meta);
            let op = m.push(top, op.result(Type::Unknown));
            results.push(m.ops[op].result(0).unwrap());
        }
        m.regions[top].results = results;
        let inputs = [floats(&[3, 4, 5], &x), floats(&[3, 4, 5], &y)];
        let got = run(&m, &inputs[..args.len()]).unwrap_or_else(|e| panic!("{} {}: {e}", f.name, f.overload));
        let numbers = |i: &Item| convert(i.tensor().unwrap(), Elem::F64, true).unwrap();
        let (a, b) = (numbers(&got[0]), numbers(&got[1]));
        assert_eq!(a.shape(), b.shape(), "{}", f.name);
        let (Data::F64(a), Data::F64(b)) = (a.data(), b.data()) else { unreachable!() };
        for (a, b) in a.iter().zip(b) {
            let close = (a - b).abs() <= 1e-6 + 1e-5 * b.abs() || (a.is_nan() && b.is_nan());
            assert!(close, "{} {}: {a}, the body gives {b}", f.name, f.overload);
        }
        compared.push(f.name.op());
    }
    assert!(compared.len() > 25, "{compared:?}");
}

/// What inference and evaluation say of a call that is wrong.
fn refused(main: &str, functions: &str) -> [String; 2] {
    let text = format!(
        "module ir_version=10 opsets {{onnx=21, my=1}}
        graph @main(%x : tensor<2xf32>) {{
          {main}
          return %y
        }}
        {functions}"
    );
    let mut m = module(&text);
    let found = infer(&mut m, &Ops::standard());
    let e = run(&m, &[floats(&[2], &[1.0, 2.0])]).unwrap_err();
    [found.first().map_or(String::new(), |d| d.to_string()), e.to_string()]
}

#[test]
fn wrong_calls_are_refused_by_name() {
    let itself = "function my.f opsets {my=1} = graph(%p) { %q = my.g(%p) return %q }
        function my.g opsets {my=1} = graph(%p) { %r = my.f(%p) return %r }";
    for message in refused("%y = my.f(%x)", itself) {
        assert!(message.contains("my.f at node \"r\": the function my.f calls itself"), "{message}");
    }
    let kind = "function my.f opsets {onnx=21} attributes {a} = graph(%p) {
        %q = onnx.LeakyRelu(%p) {alpha=ref(a, 1)} return %q }";
    for message in refused("%y = my.f(%x) {a=3}", kind) {
        let expected =
            "onnx.LeakyRelu at node \"q\": the attribute \"a\" of the call is of kind int, expected float";
        assert!(message.contains(expected), "{message}");
    }
    let one = "function my.f opsets {onnx=21} = graph(%p) { %q = onnx.Neg(%p) return %q }";
    let [_, message] = refused("%y = my.f(%x, %x)", one);
    assert!(message.contains("my.f at node \"y\": expected at most 1 operands, found 2"), "{message}");
    let deep =
        "function my.f opsets {onnx=21} = graph(%p) { %q = onnx.Transpose(%p) {perm=[0, 7]} return %q }";
    let [found, message] = refused("%y = my.f(%x)", deep);
    assert!(
        found.contains("my.f at node \"y\": in the function my.f: onnx.Transpose at node \"q\""),
        "{found}"
    );
    assert!(message.contains("my.f at node \"y\": onnx.Transpose at node \"q\""), "{message}");
    let unknown = "function my.f opsets {com.acme=1} = graph(%p) { %q = com.acme.Foo(%p) return %q }";
    let [found, message] = refused("%y = my.f(%x)", unknown);
    assert_eq!((found.as_str(), message.as_str()), ("", "unsupported op com.acme.Foo at node \"q\""));
}

#[test]
fn chains_of_calls_are_bounded() {
    // Each function calls the next one twice: 2^40 calls, which inference must not make.
    let mut functions = String::new();
    for i in 0..40 {
        let next = i + 1;
        functions += &format!(
            "function my.f{i} opsets {{my=1, onnx=21}} = graph(%p) {{
              %a{i} = my.f{next}(%p) %b{i} = my.f{next}(%p) %c{i} = onnx.Add(%a{i}, %b{i}) return %c{i} }}\n"
        );
    }
    functions += "function my.f40 opsets {onnx=21} = graph(%p) { %z = onnx.Neg(%p) return %z }\n";
    let text = |calls: &str| {
        format!(
            "module ir_version=10 opsets {{onnx=21, my=1}} graph(%x : tensor<2xf32>) {{ {calls} }} {functions}"
        )
    };
    let mut m = module(&text("%y = my.f0(%x) return %y"));
    assert!(infer(&mut m, &Ops::standard()).is_empty());
    // A chain that is merely long is refused before it exhausts the stack.
    let mut functions = String::new();
    for i in 0..5000 {
        let next = i + 1;
        functions += &format!(
            "function my.f{i} opsets {{my=1}} = graph(%p) {{ %a{i} = my.f{next}(%p) return %a{i} }}\n"
        );
    }
    functions += "function my.f5000 opsets {onnx=21} = graph(%p) { %z = onnx.Neg(%p) return %z }\n";
    for message in refused("%y = my.f0(%x)", &functions) {
        assert!(message.contains("calls nested more than 64 deep"), "{message}");
    }
}
