//! Every rule of the project fires where it should, states only equalities there, and leaves alone what it must.
//!
//! `cases.txt` has a graph of each kind for each rule; a rule without one fails the test (those of `canonicalize` may have theirs in `fires.rs` alone). Alone in its rule set, the rule
//! saturates the graph, and every e-node of every class is evaluated: all of a class must be equal.

use super::RuleSet;
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Head;
use crate::eqsat::qrw::check::{agree, evaluate, graph_of};
use crate::eqsat::saturate::{Fuel, saturate};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Elem, Module, OpBuilder, Type, Value, infer, parse};
use dialects::ops::{Item, Ops};
use dialects::random::Rng;
use dialects::tensor::{Data, Tensor};
use std::collections::{BTreeMap, HashMap};

const INPUTS: &str = "%x : tensor<2x3xf32>, %y : tensor<2x3xf32>";

const CONSTS: &str = "
  const %s2 : tensor<2xf32> [0.5, 3]
  const %s3 : tensor<3xf32> [0.5, 2, 3]
  const %s4 : tensor<4xf32> [0.5, 2, 3, 4]
  const %c3 : tensor<3xf32> [1.5, 2, 4]
  const %n3 : tensor<3xf32> [0.5, -2, 3]
  const %h3 : tensor<3xf16> [0.5, -2, 3]
  const %ones3 : tensor<3xf32> splat(1)
  const %s21 : tensor<2x1xf32> [2, 3]
  const %s31 : tensor<3x1xf32> [2, 3, 5]
  const %w33 : tensor<3x3xf32> random(1)
  const %w22 : tensor<2x2xf32> random(2)
  const %k322 : tensor<3x2x2xf32> random(3)
  const %true : tensor<bool> true
  const %one : tensor<f32> splat(1)
  const %two : tensor<f32> splat(2)
  const %three : tensor<f32> splat(3)
  const %half : tensor<f32> splat(0.5)
  const %eps : tensor<f32> splat(0.00001)
  const %root2 : tensor<f32> splat(1.4142135)
  const %root2pi : tensor<f32> splat(0.7978846)
  const %cube : tensor<f32> splat(0.044715)
  const %last : tensor<1xi64> [-1]
  const %zero1 : tensor<1xi64> [0]
  const %one1 : tensor<1xi64> [1]
  const %two1 : tensor<1xi64> [2]
  const %minf : tensor<f32> splat(-inf)
  const %zero : tensor<f32> splat(0)
  const %three1 : tensor<1xi64> [3]
  const %four1 : tensor<1xi64> [4]
  const %twice : tensor<5xi64> [1, 1, 2, 1, 1]
  const %twice1 : tensor<5xi64> [1, 2, 1, 1, 1]
  const %apart : tensor<4xi64> [1, 4, 3, 2]
  const %beside : tensor<3xi64> [0, 0, 8]
  const %three3 : tensor<2xi64> [3, 3]
  const %to4 : tensor<2xi64> [-1, 4]
  const %to13 : tensor<2xi64> [1, 3]
  const %to23 : tensor<2xi64> [2, 3]
  const %to64 : tensor<2xi64> [6, 4]
  const %to223 : tensor<3xi64> [2, 2, 3]
  const %to423 : tensor<3xi64> [4, 2, 3]
  const %to432 : tensor<3xi64> [4, 3, 2]
";

#[derive(Default)]
struct Case {
    inputs: Option<String>,
    opset: Option<String>,
    fires: String,
    refuses: String,
}

fn cases() -> BTreeMap<String, Case> {
    let mut cases: BTreeMap<String, Case> = BTreeMap::new();
    let (mut name, mut fires) = (String::new(), true);
    for line in include_str!("cases.txt").lines().filter(|l| !l.starts_with(';') && !l.trim().is_empty()) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let case = cases.entry(if word == "rule" { rest } else { &name }.to_string()).or_default();
        match word {
            "rule" => name = rest.to_string(),
            "inputs" => case.inputs = Some(rest.to_string()),
            "opset" => case.opset = Some(rest.to_string()),
            "fires" => fires = true,
            "refuses" => fires = false,
            _ => {
                let body = if fires { &mut case.fires } else { &mut case.refuses };
                body.push_str(line);
                body.push('\n');
            }
        }
    }
    cases
}

fn module(case: &Case, body: &str) -> Module {
    let (inputs, opset) = (case.inputs.as_deref().unwrap_or(INPUTS), case.opset.as_deref().unwrap_or("23"));
    let text = format!(
        "module ir_version=10 opsets {{onnx={opset}, com.microsoft=1}}\ngraph @main({inputs}) {{{CONSTS}{body}  return %z\n}}\n"
    );
    let mut m = parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
    let wrong = infer::infer(&mut m, &Ops::standard());
    assert!(wrong.is_empty(), "{wrong:?}\n{text}");
    m
}

/// Every rule by name, alone. Two sets may have a rule in common.
fn alone() -> BTreeMap<String, RuleSet> {
    let fuse = RuleSet::fuse("ort-cpu");
    let sets = [RuleSet::scales(), RuleSet::canonical(), &fuse];
    let one = |set: &RuleSet, name: String| (name.clone(), set.only(&name));
    sets.iter().flat_map(|s| s.names().map(|n| one(s, n.to_string()))).collect()
}

fn noise(m: &Module) -> Vec<(Value, Item)> {
    let mut rng = Rng(7);
    let args = m.regions[m.top].args.clone();
    args.into_iter()
        .filter(|v| m.const_of(*v).is_none())
        .map(|v| {
            let t = m.ty(v).as_tensor().unwrap();
            // A symbolic size is six: that is what the cases' shapes need.
            let shape: Vec<usize> =
                t.dims.as_ref().unwrap().iter().map(|d| d.known().map_or(6, |n| n as usize)).collect();
            let values = rng.floats(shape.iter().product());
            let t = match t.elem {
                Elem::I64 => Tensor::new(&shape, values.iter().map(|x| (x * 5.0) as i64).collect::<Vec<_>>()),
                e => Tensor::from_f32(e, &shape, values),
            };
            (v, t.unwrap().into())
        })
        .collect()
}

/// Evaluates every e-node whose operands have values; all e-nodes of a class must agree.
fn assert_sound(rule: &str, m: &Module, g: &Graph, classes: &HashMap<Value, Id>) {
    let exec = Interpreter::new(Ops::standard()).exact(true);
    let values = evaluate(m, &exec, &noise(m)).unwrap_or_else(|| panic!("{rule}: the case cannot be run"));
    let mut items: HashMap<Id, Tensor> = HashMap::new();
    for (v, id) in classes {
        if let Some(Item::Tensor(t)) = values.get(v) {
            items.insert(g.find(*id), t.clone());
        }
    }
    let mut ids: Vec<Id> = g.eg.classes().map(|c| c.id).collect();
    ids.sort();
    let mut compared = 0;
    // Twice as many rounds as terms are deep.
    for _ in 0..12 {
        for &id in &ids {
            for node in g.nodes(id) {
                let made = match node.head {
                    Head::Op { result, outputs, .. } => {
                        let operands: Option<Vec<Option<Item>>> = node
                            .children
                            .iter()
                            .map(|&c| match g.is_absent(c) {
                                true => Some(None),
                                false => Some(Some(items.get(&g.find(c))?.clone().into())),
                            })
                            .collect();
                        let Some(operands) = operands else { continue };
                        let mut m = m.clone();
                        let top = m.top;
                        let slots: Vec<Option<Value>> =
                            operands.iter().map(|o| o.as_ref().map(|i| m.add_arg(top, "", i.ty()))).collect();
                        let name = g.world().name(node.head).unwrap().clone();
                        let mut build = OpBuilder::named(name, &"e-node".into())
                            .operands(slots)
                            .attrs(g.attrs(&node).clone());
                        for _ in 0..outputs {
                            build = build.result(Type::Unknown);
                        }
                        let op = m.push(top, build);
                        let made = exec.evaluate(&m, op, &operands);
                        let made =
                            made.unwrap_or_else(|e| panic!("{rule}: {} cannot be run: {e}", g.name(&node)));
                        made[result as usize].tensor().unwrap().clone()
                    }
                    head => match g.tensor(head) {
                        Some(t) => t,
                        None => continue,
                    },
                };
                match items.get(&id) {
                    None => {
                        items.insert(id, made);
                    }
                    Some(other) => {
                        let elem = if made.elem().is_float() { Elem::F32 } else { made.elem() };
                        let same = agree(other, &made, elem);
                        assert!(same.is_ok(), "{rule}: {}: {same:?}", g.name(&node));
                        let zero = matches!(made.data(), Data::F32(v) if v.iter().all(|x| *x == 0.0));
                        compared += usize::from(!zero);
                    }
                }
            }
        }
    }
    assert!(compared > 1, "{rule}: nothing was compared");
}

#[test]
fn every_rule_fires_and_refuses() {
    let mut cases = cases();
    let mut wrong = Vec::new();
    for (name, set) in alone() {
        let Some(case) = cases.remove(&name) else {
            // Cases of their own, in the whole set, are in `fires.rs`.
            assert!(
                RuleSet::canonical().names().any(|n| n == name),
                "cases.txt has no case for the rule {name:?}"
            );
            continue;
        };
        for (body, fires) in [(&case.fires, true), (&case.refuses, false)] {
            assert!(!body.is_empty(), "{name}: a case is missing");
            let m = module(&case, body);
            let ops = Ops::standard();
            let (mut g, classes) = graph_of(&m, &ops);
            let limit = saturate(&mut g, Fuel::default(), &set);
            assert_eq!(limit, None, "{name}");
            assert!(g.unions.iter().all(|u| u.rule == name));
            match (fires, g.unions.is_empty()) {
                (true, true) => wrong.push(format!("{name} does not fire")),
                (true, false) => assert_sound(&name, &m, &g, &classes),
                (false, true) => {}
                (false, false) => wrong.push(format!("{name} fires where it must not: {:?}", g.unions)),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let left: Vec<&String> = cases.keys().collect();
    assert!(left.is_empty(), "cases of no rule: {left:?}");
}
