//! Weights that a model computes from constants become constants, so that they are quantized like any other: the Slice
//! and Concat by which an exporter puts the gates of an LSTM in order, a Mul that nobody folded.
//!
//! Equal contents become one constant. `const-fold` does not see to this, since one op at a time it would only make the
//! model larger.

use crate::linear::{Form, Weighted, find};
use crate::{Filter, PassCx};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Module, Op, Value};
use dialects::ops::Item;
use dialects::tensor::Tensor;
use std::collections::{HashMap, HashSet};

/// Ops of one weight's computation, at most.
const OPS: usize = 1000;

/// Bytes that a step of it may take beyond four times the constants that go in.
const SPARE: u64 = 1 << 20;

/// Ops that make nothing larger than what they read, whether or not its type was inferred: inference leaves out the
/// branch of an If that is never taken.
const SMALL: &[&str] = &[
    "onnx.Identity",
    "onnx.Slice",
    "onnx.Split",
    "onnx.Concat",
    "onnx.Transpose",
    "onnx.Reshape",
    "onnx.Flatten",
    "onnx.Squeeze",
    "onnx.Unsqueeze",
];

/// Makes constants of the computed weights that `filter` admits and whose ops read them in one of `forms`.
pub fn fold(m: &mut Module, cx: &mut PassCx, filter: &Filter, forms: &[Form]) {
    let exec = Interpreter::new(cx.ops.clone()).exact(true);
    let mut made: HashMap<([u8; 32], Vec<u64>), Value> = HashMap::new();
    for weighted in find(m) {
        let Weighted::Other { op, weight, computed: Some((i, form)), .. } = weighted else { continue };
        let data = &m.ops[op];
        let names: [&str; 3] = [&data.node, &data.loc, &m.value_label(weight)];
        if !forms.contains(&form) || filter.refuses(&names, &data.name).is_some() {
            continue;
        }
        let Some(operand) = data.operand(i) else { continue };
        let Some(konst) = evaluate(m, &exec, operand).map(|t| t.to_const()) else { continue };
        let Ok(hash) = konst.hash() else { continue };
        let key = (hash, konst.dims.clone());
        let value = match made.get(&key) {
            Some(&value) => value,
            None => {
                let name = m.fresh_name(&format!("{}.folded", m.value_label(operand)));
                let value = m.add_const(m.top, name, konst);
                made.insert(key, value);
                value
            }
        };
        m.ops[op].operands[i] = Some(value);
    }
    cx.count("computed weights", made.len() as u64);
}

/// What a value is that depends on constants alone; `None` where that cannot be found, or would take too much.
fn evaluate(m: &Module, exec: &Interpreter, v: Value) -> Option<Tensor> {
    let (order, leaves) = cone(m, v)?;
    let limit = leaves.iter().filter_map(|&v| Some(m.consts[m.const_of(v)?].byte_len())).sum::<u64>();
    let limit = limit.checked_mul(4)?.checked_add(SPARE)?;
    let mut known: HashMap<Value, Item> = HashMap::new();
    for &v in &leaves {
        known.insert(v, Tensor::from_const(&m.consts[m.const_of(v)?]).ok()?.into());
    }
    for op in order {
        let data = &m.ops[op];
        let small = SMALL.contains(&data.name.as_str());
        for &v in data.results.iter().flatten().filter(|_| !small) {
            // Sizes are asked of the types first, so that nothing large is made.
            let t = m.ty(v).as_tensor()?;
            let count = t.known_shape()?.into_iter().try_fold(1u64, |n, d| n.checked_mul(d as u64))?;
            t.elem.byte_len(count).filter(|&b| b <= limit)?;
        }
        let input = |v: &Option<Value>| match v {
            None => Some(None),
            Some(v) => Some(Some(known.get(v)?.clone())),
        };
        let inputs: Vec<Option<Item>> = data.operands.iter().map(input).collect::<Option<_>>()?;
        let results = exec.evaluate(m, op, &inputs).ok()?;
        known.extend(data.results.iter().zip(results).filter_map(|(v, item)| Some(((*v)?, item))));
    }
    Some(known.get(&v)?.tensor().ok()?.clone())
}

/// The ops that compute a value, each after those it reads from, and the constants that go in.
fn cone(m: &Module, v: Value) -> Option<(Vec<Op>, HashSet<Value>)> {
    let (mut order, mut leaves) = (Vec::new(), HashSet::new());
    let mut seen: HashSet<Op> = HashSet::new();
    // An op is visited once to push what it reads, and once more when all of that is done.
    let mut todo = vec![(v, false)];
    while let Some((v, done)) = todo.pop() {
        if m.const_of(v).is_some() {
            leaves.insert(v);
            continue;
        }
        let (op, _) = m.def_op(v)?;
        if m.ops[op].attrs.regions().next().is_some() {
            return None;
        }
        if done {
            order.push(op);
        } else if seen.insert(op) {
            if seen.len() > OPS {
                return None;
            }
            todo.push((v, true));
            todo.extend(m.ops[op].operands.iter().flatten().map(|&v| (v, false)));
        }
    }
    Some((order, leaves))
}
