//! Tries to refute a rule: makes up models that its left side is in, applies it as saturation does, and evaluates both
//! sides with the reference interpreter.
//!
//! Both sides must have the same element type, shape and elements. A left side that is infinite or no number must be
//! matched by the right side. Inputs are finite, unless the rule says `with infinities`. The same rule is always tried
//! with the same models.

use super::build::{self, Build};
use super::instance::{Instance, instance};
use super::matching::Found;
use super::term::{OpTerm, Term, TextRule};
use crate::eqsat::graph::{Graph, Id};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Attrs, Elem, Module, OpBuilder, OpName, TensorType, Type, Value, ValueDef, infer};
use dialects::onnx::attributes;
use dialects::ops::{Item, Ops};
use dialects::random::Rng;
use dialects::tensor::{Data, Tensor};
use std::collections::HashMap;
use std::fmt::Write;
use thiserror::Error;

/// Models on which both sides must agree.
const WANTED: usize = 150;
/// Fewer than this say too little.
const LEAST: usize = 12;
/// Models that are made up at most. Most are none that the rule is about.
const TRIES: usize = 12_000;
/// Elements that a counterexample prints.
const SHOWN: usize = 16;

/// Why a rule is not used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// The sides differ.
    #[error("rule {rule:?} is no equality: {why}\n{example}")]
    Counterexample {
        /// The rule.
        rule: String,
        /// How they differ.
        why: String,
        /// Where they differ.
        example: String,
    },
    /// Nothing is known for it.
    #[error(
        "rule {rule:?} cannot be checked: of {TRIES} models made up for it, {found} compute its left side where its \
         conditions hold; at least {LEAST} are needed"
    )]
    Untested {
        /// The rule.
        rule: String,
        /// How many models were found.
        found: usize,
    },
}

/// On how many models both sides of a rule agree; an error says why it must not be used.
pub fn check(rule: &TextRule, ops: &Ops) -> Result<usize, Refused> {
    let exec = Interpreter::new(ops.clone()).exact(true);
    let seed = rule
        .text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut rng = Rng(seed);
    let mut agreed = 0;
    for _ in 0..TRIES {
        let Some(made) = instance(rule, &mut rng) else { continue };
        agreed += usize::from(compare(rule, ops, &exec, made)?);
        if agreed >= WANTED {
            return Ok(agreed);
        }
    }
    match agreed {
        LEAST.. => Ok(agreed),
        found => Err(Refused::Untested { rule: rule.name.clone(), found }),
    }
}

/// Whether the sides were compared on a model.
fn compare(rule: &TextRule, ops: &Ops, exec: &Interpreter, made: Instance) -> Result<bool, Refused> {
    let Instance { mut m, inputs, root, elem } = made;
    if !infer::infer(&mut m, ops).is_empty() {
        return Ok(false);
    }
    let Some(values) = evaluate(&m, exec, &inputs) else { return Ok(false) };
    let Some(left) = values.get(&root).and_then(|i| i.tensor().ok()).cloned() else { return Ok(false) };
    let (g, classes) = graph_of(&m, ops);
    let Some(&class) = classes.get(&root) else { return Ok(false) };
    let items: HashMap<Id, Item> =
        values.iter().filter_map(|(v, item)| Some((g.find(*classes.get(v)?), item.clone()))).collect();
    let nodes = g.nodes(class);
    let found: Vec<Found> = nodes.iter().flat_map(|n| rule.matches(&g, n)).collect();
    let refuse = |why: String, right: Option<&Tensor>| Refused::Counterexample {
        rule: rule.name.clone(),
        why,
        example: example(&m, &inputs, &left, right),
    };
    for f in &found {
        let mut side = Evaluated { g: &g, m: m.clone(), exec, items: &items };
        if let Err(why) = too_new(&rule.right, &m) {
            return Err(refuse(why, None));
        }
        let right = build::term(&mut side, rule, f)
            .and_then(|item| item.ok_or("it is no value".to_string()))
            .and_then(|item| item.tensor().cloned().map_err(|e| e.to_string()));
        let right = right.map_err(|e| refuse(format!("the right side cannot be computed: {e}"), None))?;
        if let Err(why) = agree(&left, &right, elem) {
            // With few bits what is large on the way hides what is small: the same model with more bits decides.
            if elem == Elem::F16
                && let Some(wide) = widened(&m, &inputs, root)
                && compare(rule, ops, exec, wide)?
            {
                return Ok(true);
            }
            return Err(refuse(why, Some(&right)));
        }
    }
    Ok(!found.is_empty())
}

/// The model with 32 bits for 16, in inputs and in constants.
fn widened(m: &Module, inputs: &[(Value, Item)], root: Value) -> Option<Instance> {
    let mut m = m.clone();
    let wide = |t: &Tensor| Tensor::from_f32(Elem::F32, t.shape(), t.to_f32().ok()?.into_owned()).ok();
    for v in m.regions[m.top].consts.clone() {
        let t = Tensor::from_const(&m.consts[m.const_of(v)?]).ok()?;
        if t.elem() == Elem::F16 {
            let c = m.consts.push(wide(&t)?.to_const());
            m.values[v].def = ValueDef::Const(c);
            m.values[v].ty = Type::of_shape(Elem::F32, t.shape());
        }
    }
    let mut wider = Vec::new();
    for (v, item) in inputs {
        let t = item.tensor().ok()?;
        let t = if t.elem() == Elem::F16 { wide(t)? } else { t.clone() };
        m.values[*v].ty =
            m.ty(*v).as_tensor().map(|old| Type::Tensor(TensorType { elem: t.elem(), ..old.clone() }))?;
        wider.push((*v, t.into()));
    }
    for op in m.regions[m.top].ops.clone() {
        for v in m.ops[op].results.iter().flatten() {
            m.values[*v].ty = Type::Unknown;
        }
    }
    Some(Instance { m, inputs: wider, root, elem: Elem::F32 })
}

/// The graph of a model, with the class of every value.
pub(in crate::eqsat) fn graph_of<'a>(m: &'a Module, ops: &'a Ops) -> (Graph<'a>, HashMap<Value, Id>) {
    let mut g = Graph::new(m, ops);
    let mut classes: HashMap<Value, Id> = HashMap::new();
    g.add_ops(&m.regions[m.top].ops, &mut classes);
    g.eg.rebuild();
    (g, classes)
}

/// The values of a model, op by op; `None` where one cannot be computed.
pub(in crate::eqsat) fn evaluate(
    m: &Module,
    exec: &Interpreter,
    inputs: &[(Value, Item)],
) -> Option<HashMap<Value, Item>> {
    let mut values: HashMap<Value, Item> = inputs.iter().cloned().collect();
    for &v in &m.regions[m.top].consts {
        let t = Tensor::from_const(&m.consts[m.const_of(v)?]).ok()?;
        values.insert(v, t.into());
    }
    for &op in &m.regions[m.top].ops {
        let operands: Vec<Option<Item>> =
            m.ops[op].operands.iter().map(|o| o.and_then(|v| values.get(&v).cloned())).collect();
        let items = exec.evaluate(m, op, &operands).ok()?;
        for (v, item) in m.ops[op].results.iter().zip(items) {
            values.extend(v.map(|v| (v, item)));
        }
    }
    Some(values)
}

/// An op that the model's version of ONNX does not have yet.
fn too_new(term: &Term, m: &Module) -> Result<(), String> {
    let Some(OpTerm { name, operands, .. }) = term.op() else { return Ok(()) };
    operands.iter().try_for_each(|t| too_new(t, m))?;
    let since = OpName::parse(name).and_then(|n| attributes::since(&n));
    match since.filter(|&since| since > m.opset("onnx")) {
        None => Ok(()),
        Some(since) => {
            let have = m.opset("onnx");
            Err(format!("it makes {name} in a model of opset {have}; write `if opset >= {since}`"))
        }
    }
}

/// Evaluates the right side as it is built.
struct Evaluated<'c, 'a> {
    g: &'c Graph<'a>,
    m: Module,
    exec: &'c Interpreter,
    items: &'c HashMap<Id, Item>,
}

impl<'a> Build<'a> for Evaluated<'_, 'a> {
    type Ref = Option<Item>;

    fn graph(&self) -> &Graph<'a> {
        self.g
    }

    fn class(&mut self, id: Id) -> Result<Option<Item>, String> {
        let item = self.items.get(&self.g.find(id));
        item.cloned().map(Some).ok_or_else(|| "a variable has no value".into())
    }

    fn absent(&mut self) -> Option<Item> {
        None
    }

    fn constant(&mut self, t: Tensor) -> Option<Item> {
        Some(t.into())
    }

    fn elem(&self, r: &Option<Item>) -> Option<Elem> {
        r.as_ref()?.tensor().ok().map(Tensor::elem)
    }

    fn op(
        &mut self,
        name: &str,
        attrs: Attrs,
        result: u32,
        outputs: u32,
        operands: Vec<Option<Item>>,
    ) -> Result<Option<Item>, String> {
        let top = self.m.top;
        // An op's operands are values: what they hold is given when it is evaluated.
        let mut slots = Vec::new();
        for o in &operands {
            slots.push(o.as_ref().map(|item| self.m.add_arg(top, "", item.ty())));
        }
        let mut build = OpBuilder::new(name, &"right".into()).operands(slots).attrs(attrs);
        for i in 0..outputs {
            build = if i == result { build.result(Type::Unknown) } else { build.no_result() };
        }
        let op = self.m.push(top, build);
        let items = self.exec.evaluate(&self.m, op, &operands).map_err(|e| e.to_string())?;
        let item = items.into_iter().nth(result as usize);
        item.map(Some).ok_or_else(|| format!("{name} has no result {result}"))
    }
}

fn numbers(t: &Tensor) -> Option<Vec<f64>> {
    Some(match t.data() {
        Data::F64(v) => v.clone(),
        Data::Bool(v) => v.iter().map(|&b| f64::from(u8::from(b))).collect(),
        _ if t.elem().is_float() => t.to_f32().ok()?.iter().map(|&x| x.into()).collect(),
        _ => t.to_i64().ok()?.iter().map(|&x| x as f64).collect(),
    })
}

/// How far apart elements may be that only roundings tell apart, relative to the largest. Statistics of normalizations
/// are computed with 32 bits even of wider inputs.
fn tolerance(elem: Elem) -> f64 {
    match elem {
        Elem::F64 => 1e-5,
        Elem::F32 => 2e-4,
        Elem::F16 | Elem::BF16 => 2e-2,
        _ => 0.0,
    }
}

/// Whether two tensors are equal but for rounding; an error says how they differ.
pub(in crate::eqsat) fn agree(left: &Tensor, right: &Tensor, elem: Elem) -> Result<(), String> {
    if left.elem() != right.elem() {
        return Err(format!("the left side is of {}, the right side of {}", left.elem(), right.elem()));
    }
    if left.shape() != right.shape() {
        return Err(format!(
            "the left side has shape {:?}, the right side {:?}",
            left.shape(),
            right.shape()
        ));
    }
    let (Some(a), Some(b)) = (numbers(left), numbers(right)) else {
        return if left == right { Ok(()) } else { Err("the sides differ".into()) };
    };
    let largest = a.iter().chain(&b).filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
    // A type of fewer bits on the way rounds more.
    let within = tolerance(elem).max(tolerance(left.elem())) * largest;
    for (i, (&x, &y)) in a.iter().zip(&b).enumerate() {
        let same = x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= within;
        if !same {
            return Err(format!("element {i} of {} is {x} on the left and {y} on the right", a.len()));
        }
    }
    Ok(())
}

/// The model that refutes a rule, for people.
fn example(m: &Module, inputs: &[(Value, Item)], left: &Tensor, right: Option<&Tensor>) -> String {
    let mut out = format!("  opset {}\n", m.opset("onnx"));
    let mut line = |name: &str, what: &str, t: &Tensor| {
        let shown = numbers(t).unwrap_or_default();
        let mut list: Vec<String> = shown.iter().take(SHOWN).map(f64::to_string).collect();
        if shown.len() > SHOWN {
            list.push("..".into());
        }
        let _ = writeln!(out, "  {name}: {what}{:?} {} = [{}]", t.shape(), t.elem(), list.join(", "));
    };
    for &v in &m.regions[m.top].consts {
        let t = m.const_of(v).and_then(|c| Tensor::from_const(&m.consts[c]).ok());
        if let Some(t) = t {
            line(&m.values[v].name, "constant ", &t);
        }
    }
    for (v, item) in inputs {
        if let Ok(t) = item.tensor() {
            line(&m.values[*v].name, "", t);
        }
    }
    line("left side", "", left);
    if let Some(right) = right {
        line("right side", "", right);
    }
    for &op in &m.regions[m.top].ops {
        let data = &m.ops[op];
        if !data.attrs.is_empty() {
            let list: Vec<String> = data.attrs.iter().map(|(n, a)| format!("{n}={a:?}")).collect();
            let _ = writeln!(out, "  {} {{{}}}", data.name, list.join(", "));
        }
    }
    out.trim_end().to_string()
}
