//! Tests of the language: what is read, what matches, what is refuted.

use super::check::{Refused, check};
use super::parse::parse;
use super::{RuleError, TextRule};
use crate::eqsat::rules;
use dialects::ops::Ops;

fn rule(text: &str) -> TextRule {
    let rules = parse(text, &Ops::standard()).unwrap_or_else(|e| panic!("{e} {:?}\n{text}", e.label));
    assert_eq!(rules.len(), 1);
    rules.into_iter().next().unwrap()
}

fn wrong(text: &str) -> (RuleError, String) {
    let e = parse(text, &Ops::standard()).expect_err("it was read");
    let at = text[e.span.clone()].to_string();
    (e, at)
}

#[test]
fn mistakes_are_named_where_they_are() {
    for (text, message, at) in [
        (r#"rewrite "a" (onnx.Mull ?a ?b) => ?a"#, "unknown op onnx.Mull", "onnx.Mull"),
        (r#"rewrite "a" (onnx.Mul ?a ?b) => ?c"#, "the left side has no ?c", "?c"),
        (r#"rewrite "a" (onnx.Mul ?a ?b) => (onnx.Mul ?a ?b)"#, "both sides are the same", ""),
        (r#"rewrite "a" (onnx.Mul ?a) => ?a"#, "onnx.Mul has 1 operands, expected 2 to 2", "(onnx.Mul ?a)"),
        (r#"rewrite "a" (onnx.Neg ?a) => ?a if flat(?a)"#, "unknown function \"flat\"", "flat"),
        (r#"rewrite "a" (onnx.Neg ?a) => ?a if rank(?a)"#, "this is no condition", "rank(?a)"),
        (
            r#"rewrite "a" (onnx.Neg ?a) => ?a if rank(?a, 1) == 2"#,
            "rank takes 1 arguments, found 2",
            "rank(?a, 1)",
        ),
        (r#"rewrite "a" (onnx.Neg ?a) = ?a"#, "the rules cannot be read: unexpected '='", "="),
        (r#"rewrite "a" (onnx.Neg ?a)"#, "the rules cannot be read: the text ends too early", ")"),
        (r#"rewrite "a" (onnx.Neg ?a) => <?a | 1>"#, "the right side is one term, not one of several", ""),
        (
            r#"rewrite "a" (onnx.Cast ?a {to=?a}) => ?a"#,
            "?a is a value, and stands for an attribute here",
            "?a",
        ),
        (r#"rewrite "a" (onnx.Cast ?a {to=rank(?a)}) => ?a"#, "on the left, an attribute is", "rank(?a)"),
        (r#"rewrite "a" (onnx.Split ?a)#2/2 => ?a"#, "the op has no such result", "#2/2"),
    ] {
        let (e, found) = wrong(text);
        assert!(e.message.starts_with(message), "{text}: {}", e.message);
        assert!(at.is_empty() || found == at, "{text}: {found:?}");
    }
    let twice = "rewrite \"a\" (onnx.Neg (onnx.Neg ?a)) => ?a ".repeat(2);
    assert_eq!(wrong(&twice).0.message, "two rules have the name \"a\"");
    let deep = format!("rewrite \"a\" {}", "(onnx.Neg ".repeat(5000));
    assert!(wrong(&deep).0.message.contains("at most 100 deep"));
    let deep = format!("rewrite \"a\" {}", "<".repeat(5000));
    assert!(wrong(&deep).0.message.contains("at most 100 deep"));
}

#[test]
fn equalities_pass_the_check() {
    for text in [
        r#"rewrite "a" (onnx.Mul ?a (onnx.Reciprocal ?b)) => (onnx.Div ?a ?b) if float(?a)"#,
        r#"rewrite "a" (onnx.Neg (onnx.Neg ?x)) => ?x with infinities"#,
        r#"rewrite "a" (onnx.Transpose (onnx.Transpose ?x {perm=?p}) {perm=?q})
           => (onnx.Transpose ?x {perm=compose(?p, ?q)}) with infinities"#,
        r#"rewrite "a" (onnx.Transpose (onnx.Transpose ?x {perm=?p}) {perm=?q}) => ?x if inverse(?p) == ?q"#,
        r#"rewrite "a" (onnx.Mul ?x 1) => ?x"#,
        r#"rewrite "a" (onnx.Sub (onnx.Mul ?x 2) ?x) => ?x"#,
        r#"rewrite "a" (onnx.Add ?x 0) => ?x"#,
        r#"rewrite "a" (onnx.MatMul (onnx.Mul ?x ?s) ?w) => (onnx.MatMul ?x (onnx.Mul ?w ?s))
           if scalar(?s), rank(?s) <= 1, rank(?x) >= 2, rank(?w) >= 2"#,
        r#"rewrite "a" (onnx.Relu (onnx.Mul ?x ?s)) => (onnx.Mul (onnx.Relu ?x) ?s) if positive(?s)"#,
        r#"rewrite "a" (onnx.Softmax (onnx.Add ?x ?c) {axis=-1}) => (onnx.Softmax ?x)
           if opset >= 13, scalar(?c), fits(?c, ?x)"#,
        r#"rewrite "a" (onnx.Squeeze (onnx.Unsqueeze ?x ?a) ?a) => ?x if opset >= 13"#,
        r#"rewrite "a" (onnx.Cast (onnx.Cast ?x {to=f32}) {to=?t}) => (onnx.Cast ?x {to=?t})
           if elem(?x) == f16, ?t == f16"#,
    ] {
        let agreed = check(&rule(text), &Ops::standard());
        assert!(agreed.is_ok(), "{text}\n{}", agreed.unwrap_err());
    }
}

#[test]
fn what_is_no_equality_is_refuted() {
    for (text, why) in [
        // A sign.
        (r#"rewrite "a" (onnx.Sub ?a ?b) => (onnx.Add ?a ?b)"#, "element"),
        // Operands exchanged.
        (r#"rewrite "a" (onnx.Sub ?a ?b) => (onnx.Sub ?b ?a)"#, "element"),
        // Right but where the divisor is zero.
        (r#"rewrite "a" (onnx.Div (onnx.Mul ?a ?b) ?b) => ?a if float(?a), shape(?a) == shape(?b)"#, "NaN"),
        // Right but where b is larger than a.
        (r#"rewrite "a" (onnx.Sub (onnx.Add ?a ?b) ?b) => ?a"#, "shape"),
        // Not of a negative scale.
        (
            r#"rewrite "a" (onnx.Relu (onnx.Mul ?x ?s)) => (onnx.Mul (onnx.Relu ?x) ?s) if constant(?s)"#,
            "element",
        ),
        // The product of transpositions in the other order.
        (
            r#"rewrite "a" (onnx.Transpose (onnx.Transpose ?x {perm=?p}) {perm=?q})
            => (onnx.Transpose ?x {perm=compose(?q, ?p)})"#,
            "",
        ),
        // An axis off by one.
        (r#"rewrite "a" (onnx.Squeeze (onnx.Unsqueeze ?x [0]) [-1]) => ?x if opset >= 13"#, ""),
        // A scale per row is none per column.
        (
            r#"rewrite "a" (onnx.MatMul (onnx.Mul ?x ?s) ?w) => (onnx.MatMul ?x (onnx.Mul ?w ?s))
            if constant(?s), rank(?s) == 1, rank(?x) >= 2, rank(?w) >= 2"#,
            "",
        ),
        // Integer division rounds.
        (r#"rewrite "a" (onnx.Mul (onnx.Div ?a 2) 2) => ?a"#, "element"),
        // The mean is not taken away.
        (
            r#"rewrite "a" (onnx.ReduceMean (onnx.Sub ?x (onnx.ReduceMean ?x [-1])) [-1]) => (onnx.ReduceMean ?x [-1])
            if opset >= 18, float(?x)"#,
            "element",
        ),
        // Without a condition on the version.
        (
            r#"rewrite "a" (onnx.Mul (onnx.Sigmoid ?x) (onnx.Sigmoid ?x)) => (onnx.Pow (onnx.Gelu ?x) 2)"#,
            "opset",
        ),
        // A dropped epsilon.
        (
            r#"rewrite "a" (onnx.Div ?x (onnx.Sqrt (onnx.Add (onnx.ReduceMean (onnx.Mul ?x ?x) [-1]) ?e)))
            => (onnx.Div ?x (onnx.Sqrt (onnx.ReduceMean (onnx.Mul ?x ?x) [-1])))
            if opset >= 18, float(?x), splat(?e), value(?e) > 0, rank(?e) == 0"#,
            "element",
        ),
        // A precision that is lost.
        (
            r#"rewrite "a" (onnx.Cast (onnx.Cast ?x {to=f16}) {to=?t}) => (onnx.Cast ?x {to=?t}) if elem(?x) == ?t"#,
            "",
        ),
        // It claims too much.
        (r#"rewrite "a" (onnx.Sub (onnx.Mul ?x 2) ?x) => ?x with infinities"#, ""),
    ] {
        match check(&rule(text), &Ops::standard()) {
            Err(Refused::Counterexample { why: found, example, .. }) => {
                assert!(found.contains(why), "{text}: {found}");
                assert!(example.contains("opset"), "{example}");
            }
            other => panic!("{text}\n{other:?}"),
        }
    }
}

#[test]
fn a_rule_that_never_matches_is_not_used() {
    let never = rule(r#"rewrite "a" (onnx.Neg (onnx.Neg ?x)) => ?x if rank(?x) == 9"#);
    assert!(matches!(check(&never, &Ops::standard()), Err(Refused::Untested { found: 0, .. })));
}

#[test]
fn the_check_says_the_same_every_time() {
    let text = r#"rewrite "a" (onnx.Sub ?a ?b) => (onnx.Sub ?b ?a)"#;
    let (a, b) = (check(&rule(text), &Ops::standard()), check(&rule(text), &Ops::standard()));
    assert_eq!(a, b);
}

#[test]
fn the_rules_of_fuse_pass_the_check() {
    for rule in rules::fuse_rules() {
        let agreed = check(rule, &Ops::standard());
        match agreed {
            Ok(n) => println!("{}: {n}", rule.name),
            Err(e) => panic!("{e}"),
        }
    }
}
