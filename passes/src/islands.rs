//! Islands of integers: which activations a runtime can hold in 8 bits, and which ops read them so.
//!
//! A product with a constant weight reads its activation in 8 bits; what it gives stays float, as products of integers
//! can end in floats. A convolution cannot, nor can a Gemm in front of a Relu or Clip, which ONNX Runtime makes one op of
//! floats: their results are held in 8 bits too, behind the activation function that ranges of integers can take in (Relu,
//! Clip). From there the island goes on through sums, pools, views and concatenations
//! whose operands are all in it.

use crate::operators::{COMPUTES, MOVES, scalar};
use dialects::ir::{Module, Op, Use, Uses, Value};
use std::collections::{BTreeMap, BTreeSet};

/// An activation to be held in 8 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The value.
    pub value: Value,
    /// Operands that read it in 8 bits; the others keep reading it as it is.
    pub readers: Vec<(Op, usize)>,
    /// The place whose range it has, where an op between the two only moves values.
    pub like: Option<Value>,
}

/// The places in the top graph of `m`, in program order. `product` says of a MatMul, Gemm or Conv whether its weight is
/// one that is multiplied in 8 bits. The types in `m` must be inferred.
pub fn places(m: &Module, product: impl Fn(Op) -> bool) -> Vec<Place> {
    let uses = m.uses();
    let mut found =
        Islands { m, uses: &uses, places: BTreeMap::new(), inner: BTreeSet::new(), order: Vec::new() };
    for &op in &m.regions[m.top].ops {
        let data = &m.ops[op];
        let convolution = data.is("onnx.Conv");
        if (convolution || data.is("onnx.MatMul") || data.is("onnx.Gemm")) && product(op) {
            found.read(op, 0);
            // A MatMul whose bias is added behind it will be a Gemm.
            let end = bias_of(m, &uses, op).map_or(op, |(add, _)| add);
            let gemm = end != op || data.is("onnx.Gemm");
            if convolution || gemm && found.clipped(end).is_some() {
                found.give(end, None);
            }
            continue;
        }
        found.pass_on(op);
    }
    let Islands { mut places, order, .. } = found;
    let mut out: Vec<Place> = order.iter().filter_map(|v| places.remove(v)).collect();
    out.retain(|p| !p.readers.is_empty());
    out
}

/// The Add of a constant bias behind a product of matrices, and which operand of it the bias is. The runtime makes one Gemm
/// of the two.
pub fn bias_of(m: &Module, uses: &Uses, op: Op) -> Option<(Op, usize)> {
    let data = &m.ops[op];
    let matrix = |v: Value| m.ty(v).dims().filter(|d| d.len() == 2);
    let n = matrix(data.operand(1)?)?[1].known()?;
    if !data.is("onnx.MatMul") || matrix(data.operand(0)?).is_none() {
        return None;
    }
    let [Use::Operand(add, i @ (0 | 1))] = uses.of(data.result(0)?) else { return None };
    let bias =
        m.ops[*add].operand(1 - i).filter(|b| m.ops[*add].is("onnx.Add") && m.const_of(*b).is_some())?;
    let fits = m.ty(bias).as_tensor().and_then(|t| t.known_shape()).is_some_and(|s| s == [n as usize]);
    fits.then_some((*add, 1 - i))
}

struct Islands<'m> {
    m: &'m Module,
    uses: &'m Uses,
    places: BTreeMap<Value, Place>,
    /// Values that ops of an island give.
    inner: BTreeSet<Value>,
    order: Vec<Value>,
}

impl Islands<'_> {
    fn float(&self, v: Value) -> bool {
        self.m.ty(v).elem().is_some_and(|e| e.is_float()) && self.m.const_of(v).is_none()
    }

    /// Has an operand read in 8 bits.
    fn read(&mut self, op: Op, index: usize) {
        let Some(v) = self.m.ops[op].operand(index).filter(|v| self.float(*v)) else { return };
        if !self.places.contains_key(&v) {
            self.order.push(v);
        }
        let place =
            self.places.entry(v).or_insert_with(|| Place { value: v, readers: Vec::new(), like: None });
        if !place.readers.contains(&(op, index)) {
            place.readers.push((op, index));
        }
    }

    /// What the Relu or Clip gives that is the only reader of an op's result.
    fn clipped(&self, op: Op) -> Option<Value> {
        let [Use::Operand(next, 0)] = self.uses.of(self.m.ops[op].result(0)?) else { return None };
        let next = &self.m.ops[*next];
        (next.is("onnx.Relu") || next.is("onnx.Clip")).then(|| next.result(0))?
    }

    /// Who reads a float value, unless the graph gives it out.
    fn readers(&self, v: Value) -> Option<Vec<(Op, usize)>> {
        let reader = |u: &Use| match u {
            Use::Operand(op, i) => Some((*op, *i)),
            Use::Result(..) => None,
        };
        let readers: Vec<(Op, usize)> = self.uses.of(v).iter().map(reader).collect::<Option<_>>()?;
        (!readers.is_empty() && self.float(v)).then_some(readers)
    }

    /// Has what an op gives held in 8 bits, behind the activation function that is its only reader if that is possible. All
    /// readers get it so; but an output of the graph stays what it is.
    fn give(&mut self, op: Op, like: Option<Value>) {
        let clipped = if like.is_none() { self.clipped(op) } else { None };
        let ends = clipped.into_iter().chain(self.m.ops[op].result(0));
        let Some((y, readers)) = ends.into_iter().find_map(|y| Some((y, self.readers(y)?))) else { return };
        self.inner.insert(y);
        if !self.places.contains_key(&y) {
            self.order.push(y);
        }
        self.places.insert(y, Place { value: y, readers, like });
    }

    /// Goes on through an op that can read all its operands in 8 bits, if one of them comes from an island.
    fn pass_on(&mut self, op: Op) {
        let data = &self.m.ops[op];
        let moves = MOVES.contains(&data.name.as_str());
        if !moves && !COMPUTES.iter().any(|(float, _)| *float == data.name.as_str()) || self.fills(op) {
            return;
        }
        let read = if moves { 1 } else { data.operands.len() };
        let operands: Vec<Value> = data.operands.iter().take(read).flatten().copied().collect();
        let held = |v: &Value| self.places.contains_key(v);
        if operands.len() != read
            || !operands.iter().all(held)
            || !operands.iter().any(|v| self.inner.contains(v))
        {
            return;
        }
        let joins = data.is("onnx.Concat");
        (0..read).for_each(|i| self.read(op, i));
        self.give(op, moves.then(|| self.places[&operands[0]].like.unwrap_or(operands[0])));
        if joins && let Some(y) = self.m.ops[op].result(0) {
            self.share(op, &operands, y);
        }
    }

    /// Whether an op puts in values other than zero, which a range need not hold.
    fn fills(&self, op: Op) -> bool {
        let data = &self.m.ops[op];
        let zero = |v| scalar(self.m, v) == Some(0.0);
        let filled =
            data.operand(2).is_some_and(|v| !zero(v)) || data.attrs.float("value").unwrap_or(0.0) != 0.0;
        data.is("onnx.Pad") && filled
    }

    /// Gives the operands of a Concat the range of its result, where nobody else reads them: their codes are moved then,
    /// and none is computed anew.
    fn share(&mut self, op: Op, operands: &[Value], y: Value) {
        if !self.places.contains_key(&y) {
            return;
        }
        for v in operands {
            let alone =
                self.uses.of(*v).iter().all(|u| matches!(u, Use::Operand(reader, _) if *reader == op));
            if let Some(place) = self.places.get_mut(v).filter(|p| alone && p.like.is_none()) {
                place.like = Some(y);
            }
        }
    }
}
