//! Before fusion: ops that are written as others, which have kernels, or join those of others.
//!
//! - Operators on codes (QLinearAdd, QGemm) are float ops between DequantizeLinear and QuantizeLinear, which join other kernels.
//! - BatchNormalization with constant statistics is a factor and a term for each channel.
//! - A constant behind DequantizeLinear is a constant, but where a product of integers reads its codes.
//! - An op that only moves or picks values, between codes of one scale, moves the codes.

mod operators;

use crate::fuse::reader;
use crate::kernels::coded::Coded;
use crate::kernels::{conv, integer, pointwise};
use dialects::ir::{Elem, Module, Op, OpBuilder, Use, Uses, Value, ValueDef};
use dialects::tensor::Tensor;
use std::collections::HashSet;

/// Ops whose results are elements of their first operand, whatever these stand for.
const MOVES: &[&str] = &[
    "onnx.Flatten",
    "onnx.MaxPool",
    "onnx.Pad",
    "onnx.Reshape",
    "onnx.Slice",
    "onnx.Squeeze",
    "onnx.Transpose",
    "onnx.Unsqueeze",
];

/// Rewrites the top region of `m`. Values stay what they are, but for rounding; those of `keep` stay.
pub fn simplify(m: &mut Module, keep: &HashSet<Value>) {
    for op in m.regions[m.top].ops.clone() {
        operators::spell_out(m, op);
    }
    let ops = m.regions[m.top].ops.clone();
    for &op in &ops {
        if m.ops[op].is("onnx.BatchNormalization") {
            normalization(m, op);
        }
    }
    // Biases first: a product of integers is one by its bias too.
    for biases in [true, false] {
        let uses = m.uses();
        for &op in &ops {
            let codes = m.ops[op].operand(0).and_then(|v| m.ty(v).elem());
            if (codes == Some(Elem::I32)) == biases {
                fold(m, &uses, keep, op);
            }
        }
    }
    for &op in &ops {
        move_codes(m, keep, op);
    }
}

/// A constant in the place of one that is read from codes.
fn fold(m: &mut Module, uses: &Uses, keep: &HashSet<Value>, op: Op) -> Option<()> {
    let data = &m.ops[op];
    let v =
        data.result(0).filter(|v| data.name.as_str().ends_with(".DequantizeLinear") && !keep.contains(v))?;
    let axis = data.attrs.int("axis").unwrap_or(1);
    let rank = m.consts[m.const_of(data.operand(0)?)?].shape().len();
    let axis = usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok()?;
    let coded = Coded::constant(m, v, axis)?;
    let weight = |u: &Use| match *u {
        Use::Operand(op, 1) => {
            let top = m.ops[op].region == m.top;
            top && (conv::reads_codes(m, op) || integer::reads_codes(m, op))
        }
        _ => false,
    };
    let used = uses.of(v);
    if used.iter().any(weight) || used.iter().any(|u| matches!(u, Use::Result(..))) {
        return None;
    }
    let floats = coded.floats(m, axis)?;
    let name = m.values[v].name.clone();
    let folded = m.add_const(m.top, "", floats.to_const());
    m.replace_uses(v, folded);
    m.erase(op);
    m.values[folded].name = name;
    Some(())
}

/// `op` on codes, where it stands between DequantizeLinear and QuantizeLinear of the same constant parameters.
fn move_codes(m: &mut Module, keep: &HashSet<Value>, op: Op) -> Option<()> {
    let data = m.ops[op].clone();
    let [Some(result)] = data.results[..] else { return None };
    let moves = MOVES.contains(&data.name.as_str()) && !keep.contains(&result) && data.region == m.top;
    let read = data.operand(0).filter(|_| moves).and_then(|x| reader(m, x))?;
    let codes = m.ops[read].operand(0)?;
    let uses = m.uses();
    let bytes = |m: &Module, v: Option<Value>| -> Option<Tensor> {
        Tensor::from_const(&m.consts[m.const_of(v?)?]).ok()?.reshape(&[1]).ok()
    };
    let quantizer = |u: &Use| match *u {
        Use::Operand(q, 0) => {
            let (to, from) = (&m.ops[q], &m.ops[read]);
            let same = |i: usize| match (to.operand(i), from.operand(i)) {
                (None, None) => true,
                (a, b) => bytes(m, a).is_some() && bytes(m, a) == bytes(m, b),
            };
            let codes_of = pointwise::one_scale(m, q).map(|c| m.ty(c).elem());
            let makes = to.name.as_str().ends_with(".QuantizeLinear");
            (makes && codes_of == Some(m.ty(codes).elem()) && same(1) && same(2)).then_some(q)
        }
        _ => None,
    };
    let ends: Vec<Op> = uses.of(result).iter().map(quantizer).collect::<Option<_>>()?;
    let (&first, rest) = ends.split_first()?;
    let mut operands: Vec<Option<Value>> = data.operands.clone();
    operands[0] = Some(codes);
    if data.is("onnx.Pad") {
        // Around codes stands what zero is.
        let value = operands.get(2).copied().flatten().map(|v| pointwise::number(m, v));
        let zero = m.ops[read].operand(2);
        let scalar = zero.is_none_or(|z| m.ty(z).dims().is_some_and(<[_]>::is_empty));
        if value.is_some_and(|v| v != Some(0.0)) || !scalar || data.attrs.get("value").is_some() {
            return None;
        }
        operands.resize(operands.len().max(3), None);
        operands[2] = zero;
    }
    let at = m.ops[first].result(0)?;
    let moved = OpBuilder::named(data.name.clone(), &data.loc).node(data.node.clone());
    replace(m, first, moved.attrs(data.attrs.clone()).operands(operands));
    for &end in rest {
        replace(m, end, OpBuilder::new("onnx.Identity", &data.loc).operands([at]));
    }
    m.erase(op);
    Some(())
}

/// BatchNormalization with constant statistics as a factor and a term for each channel.
fn normalization(m: &mut Module, op: Op) -> Option<()> {
    let data = m.ops[op].clone();
    let flag = |name: &str| data.attrs.int(name);
    let (x, rank) = (data.operand(0)?, m.ty(data.operand(0)?).dims()?.len());
    let inference = flag("training_mode").unwrap_or(0) == 0
        && data.results.iter().flatten().count() == 1
        && (m.opset("onnx") >= 7 || flag("is_test").unwrap_or(0) != 0)
        && rank >= 2;
    if !inference || flag("spatial") == Some(0) {
        return None;
    }
    let list = |i: usize| Tensor::floats(&m.consts[m.const_of(data.operand(i)?)?]).ok();
    let (scale, bias, mean, variance) = (list(1)?, list(2)?, list(3)?, list(4)?);
    if [&bias, &mean, &variance].iter().any(|v| v.len() != scale.len()) {
        return None;
    }
    let epsilon = f64::from(data.attrs.float("epsilon").unwrap_or(1e-5));
    let factor = |c: usize| f64::from(scale[c]) / (f64::from(variance[c]) + epsilon).sqrt();
    let channels = 0..scale.len();
    let factors: Vec<f32> = channels.clone().map(|c| factor(c) as f32).collect();
    let terms: Vec<f32> =
        channels.map(|c| (f64::from(bias[c]) - f64::from(mean[c]) * factor(c)) as f32).collect();
    let mut shape = vec![1; rank - 1];
    shape[0] = scale.len();
    let number = |m: &mut Module, v: Vec<f32>| {
        let t = Tensor::new(&shape, v).expect("a number for each channel");
        m.add_const(m.top, "", t.to_const())
    };
    let (factors, terms) = (number(m, factors), number(m, terms));
    let ty = m.ty(data.result(0)?).clone();
    let scaled =
        OpBuilder::new("onnx.Mul", &data.loc).node(data.node.clone()).operands([x, factors]).result(ty);
    let scaled = m.insert_before(op, scaled);
    let scaled = m.ops[scaled].result(0)?;
    let sum = OpBuilder::new("onnx.Add", &data.loc).node(data.node.clone()).operands([scaled, terms]);
    replace(m, op, sum);
    Some(())
}

/// Puts an op in the place of another one: its results are those of that one.
fn replace(m: &mut Module, old: Op, new: OpBuilder) {
    let new = m.insert_before(old, new);
    let results: Vec<Option<Value>> = std::mem::take(&mut m.ops[old].results);
    m.erase(old);
    for (i, v) in results.iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?))) {
        m.values[v].def = ValueDef::Result(new, i);
    }
    m.ops[new].results = results;
}
