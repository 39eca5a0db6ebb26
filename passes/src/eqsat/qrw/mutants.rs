//! Wrong variants of the project's own rules, made mechanically: the check must refuse them.

use super::check::check;
use super::term::{Expr, OpTerm, Term, TextRule};
use crate::eqsat::rules::fuse_rules;
use dialects::ops::Ops;
use rayon::prelude::*;

/// Ops that take the place of each other in a mistake.
const SIBLINGS: &[(&str, &str)] = &[
    ("onnx.Mul", "onnx.Div"),
    ("onnx.Add", "onnx.Sub"),
    ("onnx.Gelu", "onnx.Mish"),
    ("com.microsoft.FastGelu", "com.microsoft.QuickGelu"),
    ("onnx.Softmax", "onnx.LogSoftmax"),
];

const COMMUTATIVE: &[&str] = &["onnx.Add", "onnx.Mul"];

/// Wrong variants of a term, each with what was done.
fn wrong(term: &Term) -> Vec<(String, Term)> {
    let mut out = Vec::new();
    match term {
        // A bias of -1e38 for a lower one is a matter of kernels, and none of the reals.
        Term::Op(op) if op.name == "onnx.Max" => {}
        Term::Op(op) => {
            let put = |op: OpTerm| Term::Op(Box::new(op));
            if op.operands.len() >= 2 && op.operands[0] != op.operands[1] && !COMMUTATIVE.contains(&&*op.name)
            {
                let mut swapped = (**op).clone();
                swapped.operands.swap(0, 1);
                out.push((format!("operands of {} swapped", op.name), put(swapped)));
            }
            for &(a, b) in SIBLINGS {
                let other = if op.name == a { b } else { a };
                if op.name == a || op.name == b {
                    out.push((
                        format!("{other} for {}", op.name),
                        put(OpTerm { name: other.into(), ..(**op).clone() }),
                    ));
                }
            }
            if let Some(first) = op.operands.first() {
                out.push((format!("{} left out", op.name), first.clone()));
            }
            // `stash_type` says how precise sums are, which is no matter over the reals.
            let named = op.attrs.iter().enumerate().filter(|(_, (name, _))| name != "stash_type");
            for (i, (name, value)) in named {
                // Of a float, another size; of an integer, the one after it.
                let other = match value {
                    Expr::Int(n) => Expr::Int(n + 1),
                    Expr::Float(x) => Expr::Float(x * 2.0 + 0.5),
                    Expr::Str(_) => Expr::Str("none".into()),
                    Expr::Call(..) if name == "epsilon" => {
                        Expr::Arithmetic('+', Box::new(value.clone()), Box::new(Expr::Float(0.5)))
                    }
                    _ => continue,
                };
                let mut changed = (**op).clone();
                changed.attrs[i].1 = other;
                out.push((format!("another {name} of {}", op.name), put(changed)));
            }
            for i in 0..op.operands.len() {
                for (what, operand) in wrong(&op.operands[i]) {
                    let mut changed = (**op).clone();
                    changed.operands[i] = operand;
                    out.push((what, put(changed)));
                }
            }
        }
        Term::Number(n) => out.push((format!("{} for {n}", n + 1.0), Term::Number(n + 1.0))),
        Term::Named(var, inner) => {
            out.extend(wrong(inner).into_iter().map(|(what, t)| (what, Term::Named(*var, Box::new(t)))));
        }
        _ => {}
    }
    out
}

/// The rule with something wrong on its right side.
fn variants(rule: &TextRule) -> Vec<(String, TextRule)> {
    let mut out: Vec<(String, TextRule)> = wrong(&rule.right)
        .into_iter()
        .map(|(what, right)| (what, TextRule { right, ..rule.clone() }))
        .collect();
    let neg = |operand: Term| {
        let op = OpTerm {
            name: "onnx.Neg".into(),
            operands: vec![operand],
            attrs: vec![],
            result: 0,
            outputs: None,
        };
        Term::Op(Box::new(op))
    };
    out.push(("the sign turned".into(), TextRule { right: neg(rule.right.clone()), ..rule.clone() }));
    out
}

#[test]
fn wrong_variants_of_rules_are_refused() {
    let ops = Ops::standard();
    let all: Vec<(String, TextRule)> = fuse_rules()
        .iter()
        .flat_map(|rule| variants(rule).into_iter().map(|(what, v)| (format!("{}: {what}", rule.name), v)))
        .collect();
    let accepted: Vec<&String> =
        all.par_iter().filter(|(_, rule)| check(rule, &ops).is_ok()).map(|(what, _)| what).collect();
    let refused = all.len() - accepted.len();
    println!("{refused} of {} wrong variants refused; accepted: {accepted:?}", all.len());
    assert!(all.len() >= 30, "only {}: the test has lost its point", all.len());
    assert!(refused * 100 >= all.len() * 98, "{refused} of {}; accepted: {accepted:#?}", all.len());
}
