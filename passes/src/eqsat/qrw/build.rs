//! Builds the right side of a rule: in the e-graph where it is applied, by evaluation where it is checked.

use super::expr::{Value, eval};
use super::matching::{Binding, Found};
use super::term::{OpTerm, Term, TextRule};
use crate::eqsat::graph::{Graph, Id};
use dialects::ir::{Attrs, Elem, OpName};
use dialects::onnx::attributes;
use dialects::tensor::{Data, Tensor};

/// Where terms are built.
pub trait Build<'a> {
    /// A value there.
    type Ref: Clone;
    /// The e-graph that the rule matched in.
    fn graph(&self) -> &Graph<'a>;
    /// A value that the rule matched.
    fn class(&mut self, id: Id) -> Result<Self::Ref, String>;
    /// An operand that is left out.
    fn absent(&mut self) -> Self::Ref;
    /// A constant.
    fn constant(&mut self, t: Tensor) -> Self::Ref;
    /// The element type of a value.
    fn elem(&self, r: &Self::Ref) -> Option<Elem>;
    /// Result number `result` of an op of `outputs` results.
    fn op(
        &mut self,
        name: &str,
        attrs: Attrs,
        result: u32,
        outputs: u32,
        operands: Vec<Self::Ref>,
    ) -> Result<Self::Ref, String>;
}

/// Builds in the e-graph.
pub struct InGraph<'g, 'a>(pub &'g mut Graph<'a>);

impl<'a> Build<'a> for InGraph<'_, 'a> {
    type Ref = Id;

    fn graph(&self) -> &Graph<'a> {
        self.0
    }

    fn class(&mut self, id: Id) -> Result<Id, String> {
        Ok(self.0.find(id))
    }

    fn absent(&mut self) -> Id {
        self.0.absent()
    }

    fn constant(&mut self, t: Tensor) -> Id {
        self.0.literal(t)
    }

    fn elem(&self, r: &Id) -> Option<Elem> {
        self.0.elem(*r)
    }

    fn op(
        &mut self,
        name: &str,
        attrs: Attrs,
        result: u32,
        outputs: u32,
        operands: Vec<Id>,
    ) -> Result<Id, String> {
        Ok(self.0.op_result(name, &attrs, &operands, result, outputs))
    }
}

/// The right side of `rule` where it matched as `found`; an error says what it lacks.
pub fn term<'a, B: Build<'a>>(b: &mut B, rule: &TextRule, found: &Found) -> Result<B::Ref, String> {
    build(b, rule, found, &rule.right, None)
}

/// Builds a term. A number takes the element type `elem`, or else that of the value that the rule matched.
fn build<'a, B: Build<'a>>(
    b: &mut B,
    rule: &TextRule,
    found: &Found,
    term: &Term,
    elem: Option<Elem>,
) -> Result<B::Ref, String> {
    match term {
        Term::Var(v) => match found.of(*v) {
            Some(Binding::Class(id)) => b.class(*id),
            _ => Err(format!("?{} stands for no value", rule.vars[*v])),
        },
        Term::Absent => Ok(b.absent()),
        Term::Number(n) => {
            let elem = elem.or_else(|| b.graph().elem(found.class));
            let elem = elem.ok_or("the element type of a number is not known")?;
            Ok(b.constant(number(*n, elem).ok_or_else(|| format!("{n} is no {elem}"))?))
        }
        Term::Ints(items) => {
            let int = |e| eval(b.graph(), found, e)?.int();
            let items: Option<Vec<i64>> = items.iter().map(int).collect();
            let items = items.ok_or("an integer of a list is not known")?;
            let t = Tensor::new(&[items.len()], items).map_err(|e| e.to_string())?;
            Ok(b.constant(t))
        }
        Term::Op(op) => build_op(b, rule, found, op),
        Term::Named(..) | Term::Any(_) => Err("the right side is one term".into()),
    }
}

fn build_op<'a, B: Build<'a>>(
    b: &mut B,
    rule: &TextRule,
    found: &Found,
    op: &OpTerm,
) -> Result<B::Ref, String> {
    // Values first: numbers beside them take their element type.
    let mut operands: Vec<Option<B::Ref>> = Vec::new();
    let mut elem = None;
    for t in &op.operands {
        operands.push(match t {
            Term::Number(_) => None,
            t => {
                let r = build(b, rule, found, t, None)?;
                let float = matches!(t, Term::Var(_) | Term::Op(_));
                // A condition is of another type than what is chosen by it.
                elem = elem.or_else(|| b.elem(&r).filter(|&e| float && e != Elem::Bool));
                Some(r)
            }
        });
    }
    for (slot, t) in operands.iter_mut().zip(&op.operands).filter(|(s, _)| s.is_none()) {
        *slot = Some(build(b, rule, found, t, elem)?);
    }
    let name = OpName::parse(&op.name).expect("the parser asks for a dialect");
    let version = b.graph().world().m.opset(name.dialect());
    let mut attrs = Attrs::default();
    for (attr, e) in &op.attrs {
        let value = eval(b.graph(), found, e);
        let value = value.as_ref().and_then(|v: &Value| v.attr(attributes::kind(&name, version, attr)));
        attrs.set(attr.as_str(), value.ok_or_else(|| format!("the attribute {attr} has no value"))?);
    }
    let operands = operands.into_iter().map(|o| o.expect("every operand was built")).collect();
    b.op(&op.name, attrs, op.result, op.outputs.unwrap_or(op.result + 1), operands)
}

/// A scalar, if the element type has the number.
pub fn number(n: f64, elem: Elem) -> Option<Tensor> {
    let whole = n.fract() == 0.0 && n.abs() < 2f64.powi(53);
    match elem {
        Elem::F64 => Tensor::new(&[], Data::F64(vec![n])).ok(),
        Elem::I64 if whole => Some(Tensor::scalar(n as i64)),
        Elem::I32 if whole => i32::try_from(n as i64).ok().map(Tensor::scalar),
        e if e.is_float() => Tensor::from_f32(e, &[], vec![n as f32]).ok(),
        _ => None,
    }
}
