//! If, Loop, Scan and sequences: bounds, and graphs and attributes that are wrong. What they compute is judged by
//! ONNX's own tests and by ONNX Runtime.

use dialects::exec::{ExecError, run_once};
use dialects::ir::infer::infer;
use dialects::ir::interp::Interpreter;
use dialects::ir::verify::verify;
use dialects::ir::{Module, parse};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;

fn module(main: &str) -> Module {
    let text = format!(
        "module ir_version=10 opsets {{onnx=21}} graph @main(%x : tensor<2xf32>) {{ {main} return %y }}"
    );
    parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module
}

fn run(m: &Module) -> Result<Vec<Item>, ExecError> {
    let top = &m.regions[m.top];
    let x: Item = Tensor::new(&[2], vec![1f32, 2.0]).unwrap().into();
    let exec = Interpreter::new(Ops::standard()).max_iterations(1000);
    run_once(&exec, m, &[(top.args[0], x)], &top.results)
}

/// What the verifier and evaluation say; empty where one finds nothing.
fn refused(main: &str) -> [String; 2] {
    let m = module(main);
    let found = verify(&m, &Ops::standard()).first().map_or(String::new(), |d| d.to_string());
    [found, run(&m).err().map_or(String::new(), |e| e.to_string())]
}

#[test]
fn a_loop_that_does_not_end_is_an_error_that_names_it() {
    let body =
        "%y = onnx.Loop(_, _, %x) {body=graph(%i, %c, %v) { %w = onnx.Add(%v, %v) %d = onnx.Identity(%c)
        return %d, %w }} loc(\"/model/loop\")";
    let [found, message] = refused(body);
    assert_eq!(found, "");
    assert_eq!(message, "onnx.Loop at node \"/model/loop\": the loop has not ended after 1000 iterations");
}

#[test]
fn attributes_are_checked_before_anything_runs() {
    let cases = [
        (
            "%y = onnx.Transpose(%x) {perm=1.5} loc(\"n\")",
            "the attribute perm is of kind float, expected ints",
        ),
        (
            "%y = onnx.Softmax(%x) {axis=\"0\"} loc(\"n\")",
            "the attribute axis is of kind string, expected int",
        ),
        ("%y = onnx.Concat(%x, %x) loc(\"n\")", "the attribute axis is missing, expected int"),
        ("%y = onnx.Cast(%x) loc(\"n\")", "the attribute to is missing, expected int"),
        ("%y = onnx.HannWindow(%x) {periodic=1.0} loc(\"n\")", "the attribute periodic is of kind float"),
        (
            "%c = onnx.Constant() {value_int=1} %b = onnx.Cast(%c) {to=9} %y = onnx.If(%b) loc(\"n\")",
            "the attribute else_branch is missing, expected graph",
        ),
    ];
    for (main, expected) in cases {
        for message in refused(main) {
            assert!(message.contains("at node \"n\"") && message.contains(expected), "{main}: {message}");
        }
    }
}

#[test]
fn ranges_are_checked() {
    let both = [
        ("%y = onnx.Softmax(%x) {axis=3} loc(\"n\")", "axis 3 is out of range for rank 1"),
        ("%y = onnx.Concat(%x, %x) {axis=-2} loc(\"n\")", "axis -2 is out of range for rank 1"),
        (
            "%i = onnx.Constant() {value_ints=[0]} %y = onnx.Gather(%x, %i) {axis=1} loc(\"n\")",
            "axis 1 is out of range for rank 1",
        ),
    ];
    for (main, expected) in both {
        for message in refused(main) {
            assert!(message.contains("at node \"n\"") && message.contains(expected), "{main}: {message}");
        }
    }
    let run_time = [
        (
            "%i = onnx.Constant() {value_ints=[0, 2]} %y = onnx.Gather(%x, %i) loc(\"n\")",
            "onnx.Gather at node \"n\": the index 2 is out of range for a dim of 2",
        ),
        (
            "%s = onnx.SequenceConstruct(%x) %i = onnx.Constant() {value_int=1} %y = onnx.SequenceAt(%s, %i) loc(\"n\")",
            "onnx.SequenceAt at node \"n\": the index 1 is out of range for a dim of 1",
        ),
        (
            "%s = onnx.SequenceEmpty() %y = onnx.ConcatFromSequence(%s) {axis=0} loc(\"n\")",
            "onnx.ConcatFromSequence at node \"n\": the sequence is empty",
        ),
        (
            "%s = onnx.SequenceConstruct(%x) %y = onnx.Neg(%s) loc(\"n\")",
            "onnx.Neg at node \"n\": expected a tensor, found a sequence",
        ),
        (
            "%o = onnx.Optional() {type=!tensor<f32>} %y = onnx.OptionalGetElement(%o) loc(\"n\")",
            "onnx.OptionalGetElement at node \"n\": the optional is empty",
        ),
    ];
    for (main, expected) in run_time {
        assert_eq!(refused(main)[1], expected);
    }
}

#[test]
fn bodies_that_do_not_fit_are_refused() {
    let few = "%n = onnx.Constant() {value_int=3}
        %y = onnx.Loop(%n, _, %x) {body=graph(%i, %c) { return %c, %x }} loc(\"n\")";
    for message in refused(few) {
        assert!(message.contains("\"n\": the graph takes 2 inputs, but is given 3"), "{message}");
    }
    let none = "%n = onnx.Constant() {value_int=3}
        %y = onnx.Loop(%n, _, %x) {body=graph(%i, %c, %v) { return %c }} loc(\"n\")";
    assert!(refused(none)[1].contains("\"n\": the body gives too few results"));
    let shapes = "%n = onnx.Constant() {value_int=3}
        %y = onnx.Loop(%n, _) {body=graph(%i, %c) { %e = onnx.Range(%i, %n, %n) %k = onnx.Constant() {value_ints=[-1]}
        %s = onnx.Slice(%x, %k, %k) %one = onnx.Constant() {value_ints=[1]} %j = onnx.Reshape(%i, %one)
        %r = onnx.ConstantOfShape(%j) return %c, %r }} loc(\"n\")";
    let [_, message] = refused(shapes);
    assert!(message.contains("changes") || message.contains("in a later iteration"), "{message}");
}

#[test]
fn a_graph_sees_only_what_is_around_it() {
    // The value %h of the first body is not in scope in the second.
    let main = "%c = onnx.Constant() {value_int=1} %b = onnx.Cast(%c) {to=9}
        %y = onnx.If(%b) {then_branch=graph() { %h = onnx.Neg(%x) return %h }, else_branch=graph() { %k = onnx.Neg(%h)
        return %k }} loc(\"n\")";
    let [found, _] = refused(main);
    assert!(found.contains("which is defined in a graph that is not visible here"), "{found}");
}

#[test]
fn loops_that_run_no_iteration_have_the_declared_shape() {
    let main = "%n = onnx.Constant() {value_int=0}
        %y = onnx.Loop(%n, _) {body=graph(%i : tensor<i64>, %c : tensor<bool>) {
        %r = onnx.Neg(%x) : tensor<2xf32> return %c, %r }}";
    let mut m = module(main);
    assert!(infer(&mut m, &Ops::standard()).is_empty());
    assert_eq!(run(&m).unwrap()[0].tensor().unwrap().shape(), [0, 2]);
}

#[test]
fn a_loop_collects_a_sequence() {
    let main = "%n = onnx.Constant() {value_int=3} %s = onnx.SequenceEmpty() {dtype=1}
        %t = onnx.Loop(%n, _, %s, %x) {body=graph(%i, %c, %a, %v) { %w = onnx.Add(%v, %v)
        %b = onnx.SequenceInsert(%a, %w) return %c, %b, %w }}, %last = onnx.Identity(%x)";
    let main =
        main.replace("%t = onnx.Loop", "%t, %u = onnx.Loop").replace(", %last = onnx.Identity(%x)", "");
    let main = main + " %y = onnx.ConcatFromSequence(%t) {axis=0, new_axis=1}";
    let mut m = module(&main);
    assert!(infer(&mut m, &Ops::standard()).is_empty());
    let ty = m.ty(m.regions[m.top].results[0]).to_string();
    assert_eq!(ty, "tensor<*xf32>");
    let got = run(&m).unwrap();
    let want: Item = Tensor::new(&[3, 2], vec![2f32, 4.0, 4.0, 8.0, 8.0, 16.0]).unwrap().into();
    assert_eq!(got[0], want);
}
