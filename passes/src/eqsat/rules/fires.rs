//! Every rule of `canonicalize` fires on one graph and does not on another that looks like it.

use super::RuleSet;
use crate::eqsat::graph::Graph;
use crate::eqsat::saturate::{Fuel, saturate};
use crate::eqsat::window::Scope;
use dialects::ir::{infer, parse};
use dialects::ops::Ops;
use std::collections::BTreeSet;

/// A rule, a body on which it fires, and one on which it does not. The result is `%r`.
const CASES: &[(&str, &str, &str)] = &[
    ("identity", "%r = onnx.Identity(%x)", "%r = onnx.Neg(%x)"),
    ("cast-to-same", "%r = onnx.Cast(%x) {to=1}", "%r = onnx.Cast(%x) {to=10}"),
    (
        "cast-and-back",
        "%d = onnx.Cast(%x) {to=11}\n%r = onnx.Cast(%d) {to=1}",
        "%d = onnx.Cast(%x) {to=10}\n%r = onnx.Cast(%d) {to=1}",
    ),
    (
        "neutral-element",
        "const %c : tensor<1xf32> [0.0]\n%r = onnx.Add(%x, %c)",
        "const %c : tensor<1x1x1x1xf32> [0.0]\n%r = onnx.Add(%x, %c)",
    ),
    (
        "neutral-element",
        "const %c : tensor<f32> 1.0\n%r = onnx.Pow(%x, %c)",
        "const %c : tensor<f32> 1.0\n%r = onnx.Pow(%c, %x)",
    ),
    (
        "where-known",
        "%c = onnx.Greater(%x, %y)\n%r = onnx.Where(%c, %x, %x)",
        "%c = onnx.Greater(%x, %y)\n%r = onnx.Where(%c, %x, %y)",
    ),
    ("twice-is-nothing", "%n = onnx.Neg(%x)\n%r = onnx.Neg(%n)", "%n = onnx.Abs(%x)\n%r = onnx.Neg(%n)"),
    (
        "one-over",
        "const %c : tensor<f32> 1.0\n%r = onnx.Div(%c, %x)",
        "const %c : tensor<f32> 1.0\n%r = onnx.Div(%x, %c)",
    ),
    (
        "times-reciprocal",
        "%n = onnx.Reciprocal(%y)\n%r = onnx.Mul(%x, %n)",
        "%n = onnx.Reciprocal(%y)\n%r = onnx.Add(%x, %n)",
    ),
    (
        "constant-sums",
        "const %c : tensor<8xf32> random(1)\n%a = onnx.Add(%x, %c)\n%r = onnx.Add(%c, %a)",
        "const %c : tensor<8xf32> random(1)\n%a = onnx.Add(%x, %y)\n%r = onnx.Add(%c, %a)",
    ),
    (
        "constant-products",
        "const %c : tensor<8xf32> random(1)\n%a = onnx.Mul(%x, %c)\n%r = onnx.Mul(%a, %c)",
        "const %c : tensor<8xi64> [1, 2, 3, 4, 5, 6, 7, 8]\n%a = onnx.Mul(%i, %c)\n%r = onnx.Mul(%a, %c)",
    ),
    (
        "constant-after-linear",
        "const %w : tensor<8x8xf32> random(1)\nconst %c : tensor<f32> 0.5\n%a = onnx.MatMul(%x, %w)\n%r = onnx.Mul(%a, %c)",
        "const %w : tensor<8x8xf32> random(1)\nconst %c : tensor<f32> 0.5\n%e = onnx.Gather(%w, %i)\n\
         %s = onnx.ReduceSum(%e)\n%a = onnx.MatMul(%x, %w)\n%b = onnx.Mul(%a, %c)\n%r = onnx.Add(%b, %s)",
    ),
    (
        "bias",
        "const %w : tensor<8x8xf32> random(1)\nconst %c : tensor<8xf32> random(2)\n%a = onnx.Gemm(%m, %w)\n%r = onnx.Add(%a, %c)",
        "const %w : tensor<8x8xf32> random(1)\nconst %c : tensor<8xf32> random(2)\n%a = onnx.MatMul(%m, %w)\n%r = onnx.Add(%a, %c)",
    ),
    (
        "bias",
        "const %w : tensor<4x8x1xf32> random(1)\nconst %c : tensor<4x1xf32> random(2)\n%a = onnx.Conv(%z, %w)\n%r = onnx.Add(%a, %c)",
        "const %w : tensor<4x8x1xf32> random(1)\nconst %c : tensor<4x5xf32> random(2)\n%a = onnx.Conv(%z, %w)\n%r = onnx.Add(%a, %c)",
    ),
    (
        "batch-norm",
        "const %w : tensor<8x8x1xf32> random(1)\nconst %c : tensor<8xf32> splat(2.0)\n%a = onnx.Conv(%z, %w)\n\
         %r = onnx.BatchNormalization(%a, %c, %c, %c, %c)",
        "const %c : tensor<8xf32> splat(2.0)\n%r = onnx.BatchNormalization(%z, %c, %c, %c, %c)",
    ),
    ("contents", "%r = onnx.Shape(%z)", "%r = onnx.Add(%i, %i)"),
    (
        "view",
        "const %c : tensor<1xi64> [0]\n%a = onnx.Unsqueeze(%x, %c)\n%r = onnx.Squeeze(%a, %c)",
        "const %c : tensor<2xi64> [5, 8]\n%r = onnx.Reshape(%z, %c)",
    ),
    (
        "transpose-between-views",
        "const %c : tensor<3xi64> [-1, 5, 1]\nconst %d : tensor<4xi64> [2, 4, 1, 5]\nconst %e : tensor<4xi64> [2, 4, 5, 1]\n\
         %v = onnx.Reshape(%z, %e)\n%n = onnx.Neg(%v)\n%a = onnx.Reshape(%n, %c)\n\
         %t = onnx.Transpose(%a) {perm=[0, 2, 1]}\n%r = onnx.Reshape(%t, %d)",
        "const %c : tensor<2xi64> [10, 4]\nconst %d : tensor<2xi64> [8, 5]\n%a = onnx.Reshape(%z, %c)\n\
         %t = onnx.Transpose(%a) {perm=[1, 0]}\n%r = onnx.Reshape(%t, %d)",
    ),
    (
        "transpose-of-transpose",
        "%t = onnx.Transpose(%x) {perm=[1, 0, 2]}\n%r = onnx.Transpose(%t) {perm=[1, 2, 0]}",
        "%t = onnx.Neg(%x)\n%r = onnx.Transpose(%t) {perm=[1, 2, 0]}",
    ),
    (
        "transpose-of-ones",
        "const %c : tensor<1xi64> [0]\n%a = onnx.Unsqueeze(%x, %c)\n%r = onnx.Transpose(%a) {perm=[1, 0, 2, 3]}",
        "const %c : tensor<1xi64> [0]\n%a = onnx.Unsqueeze(%x, %c)\n%r = onnx.Transpose(%a) {perm=[0, 2, 1, 3]}",
    ),
    (
        "expand",
        "%s = onnx.Shape(%x)\n%r = onnx.Expand(%x, %s)",
        "const %c : tensor<2xi64> [4, 1]\n%r = onnx.Expand(%i, %c)",
    ),
    (
        "broadcast-operand",
        "%s = onnx.Shape(%x)\n%o = onnx.ReduceSum(%x) {keepdims=1}\n%e = onnx.Expand(%o, %s)\n%r = onnx.Mul(%x, %e)",
        "%s = onnx.Shape(%x)\n%o = onnx.ReduceSum(%x) {keepdims=1}\n%e = onnx.Expand(%o, %s)\n%r = onnx.Mul(%o, %e)",
    ),
    (
        "slice",
        "const %c : tensor<1xi64> [0]\nconst %e : tensor<1xi64> [100]\nconst %a : tensor<1xi64> [-1]\n%r = onnx.Slice(%x, %c, %e, %a)",
        "const %c : tensor<1xi64> [7]\nconst %e : tensor<1xi64> [-9]\nconst %a : tensor<1xi64> [-1]\n%r = onnx.Slice(%x, %c, %e, %a, %a)",
    ),
    ("concat-of-one", "%r = onnx.Concat(%x) {axis=0}", "%r = onnx.Concat(%x, %x) {axis=0}"),
];

/// The rules that say something new about a graph.
fn fired(body: &str) -> BTreeSet<String> {
    let text = format!(
        "module ir_version=10 opsets {{onnx=21}}\ngraph @main(%x : tensor<b x s x 8xf32>, %y : tensor<b x s x 8xf32>, \
         %m : tensor<b x 8xf32>, %z : tensor<1x8x5xf32>, %i : tensor<8xi64>) {{\n{body}\nreturn %r\n}}\n"
    );
    let mut m = parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
    let ops = Ops::standard();
    let wrong = infer::infer(&mut m, &ops);
    assert!(wrong.is_empty(), "{wrong:?}\n{text}");
    let scope = Scope::new(&m, m.top);
    let mut g = Graph::new(&m, &ops);
    g.shared(&scope);
    scope.run(&m.regions[m.top].ops).build(&mut g);
    assert_eq!(saturate(&mut g, Fuel::default(), RuleSet::canonical()), None);
    g.unions.iter().map(|u| u.rule.clone()).collect()
}

#[test]
fn every_rule_fires_and_refuses() {
    for (rule, fires, refuses) in CASES {
        assert!(fired(fires).contains(*rule), "{rule} does not fire on\n{fires}");
        assert!(!fired(refuses).contains(*rule), "{rule} fires on\n{refuses}");
    }
    let tested: BTreeSet<String> = CASES.iter().map(|c| c.0.to_string()).collect();
    let all: BTreeSet<String> = RuleSet::canonical().names().map(str::to_string).collect();
    assert_eq!(tested, all, "each rule has a case, and each case a rule");
}
