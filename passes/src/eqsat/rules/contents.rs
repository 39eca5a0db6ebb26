//! Shape arithmetic: integers that type inference follows, whichever ops compute them.
//!
//! Two values with the same contents are equal. Each is brought to one form: what is known becomes a constant, and a
//! symbolic size is read off the first input that has it, which merges every chain of Shape, Gather, Concat, Where
//! that an exporter wrote for it.

use super::Plain;
use crate::eqsat::graph::{Graph, Id};
use crate::eqsat::lang::Node;
use dialects::ir::{Attr, Attrs, Dim, Elem, Value};
use dialects::tensor::Tensor;

/// Rules.
pub const PLAINS: &[Plain] = &[Plain { name: "contents", ops: ARITHMETIC, apply: contents }];

/// Ops whose contents inference follows.
const ARITHMETIC: &[&str] = &[
    "Shape",
    "Size",
    "Gather",
    "Slice",
    "Concat",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Flatten",
    "Identity",
    "Cast",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mod",
    "Neg",
    "Abs",
    "Min",
    "Max",
    "Equal",
    "Where",
    "ConstantOfShape",
    "Expand",
    "Range",
    "Transpose",
    "ReduceProd",
    "ReduceMax",
    "ReduceMin",
    "ReduceSum",
    "Not",
    "And",
    "Or",
];

/// The value of an e-node, written anew from its contents.
fn contents(g: &mut Graph, f: &Node) -> Vec<Id> {
    let Some(class) = g.class(f) else { return Vec::new() };
    let (Some(elem), Some(shape)) = (g.elem(class), g.shape(class)) else { return Vec::new() };
    let Some(sym) = g.known(class).fact.sym.clone() else { return Vec::new() };
    if shape.iter().product::<usize>() != sym.len() {
        return Vec::new();
    }
    let numbers: Option<Vec<i64>> = sym.iter().map(Dim::known).collect();
    let made = match numbers {
        Some(values) => number(elem, &shape, values).map(|t| g.literal(t)),
        None if elem == Elem::I64 && shape.is_empty() => size(g, &sym[0]),
        None if elem == Elem::I64 && shape.len() == 1 => vector(g, &sym),
        None => None,
    };
    made.into_iter().collect()
}

fn number(elem: Elem, shape: &[usize], values: Vec<i64>) -> Option<Tensor> {
    match elem {
        Elem::I64 => Tensor::new(shape, values).ok(),
        Elem::I32 => {
            let values: Option<Vec<i32>> = values.into_iter().map(|n| i32::try_from(n).ok()).collect();
            Tensor::new(shape, values?).ok()
        }
        Elem::Bool => Tensor::new(shape, values.into_iter().map(|n| n != 0).collect::<Vec<bool>>()).ok(),
        _ => None,
    }
}

/// Where a symbolic size is read off: an input of the region before one of the window, and its axis.
fn source(g: &Graph, d: &Dim) -> Option<(Value, usize)> {
    let world = g.world();
    let axis = |v: Value| world.m.ty(v).dims()?.iter().position(|x| x.same(d)).map(|axis| (v, axis));
    let args = world.args.iter().copied().filter(|v| world.m.const_of(*v).is_none());
    args.chain(world.inputs.iter().copied()).find_map(axis)
}

/// A size as `[1]` of i64.
fn entry(g: &mut Graph, d: &Dim) -> Option<Id> {
    if let Dim::Known(n) = d {
        return Some(g.int_literal(&[*n]));
    }
    let (v, axis) = source(g, d)?;
    let x = g.leaf(v);
    if g.world().m.opset("onnx") < 15 {
        let shape = g.op("onnx.Shape", &[x]);
        let at = g.int_literal(&[axis as i64]);
        let attrs: Attrs = [("axis", Attr::Int(0))].into_iter().collect();
        return Some(g.op_with("onnx.Gather", &attrs, &[shape, at]));
    }
    let axis = axis as i64;
    let attrs: Attrs = [("start", Attr::Int(axis)), ("end", Attr::Int(axis + 1))].into_iter().collect();
    Some(g.op_with("onnx.Shape", &attrs, &[x]))
}

/// A symbolic size as a scalar.
fn size(g: &mut Graph, d: &Dim) -> Option<Id> {
    let (v, axis) = source(g, d)?;
    let x = g.leaf(v);
    if g.world().m.opset("onnx") < 15 {
        let shape = g.op("onnx.Shape", &[x]);
        let at = g.literal(Tensor::scalar(axis as i64));
        let attrs: Attrs = [("axis", Attr::Int(0))].into_iter().collect();
        return Some(g.op_with("onnx.Gather", &attrs, &[shape, at]));
    }
    let one = entry(g, d)?;
    Some(super::views::with_axes(g, "onnx.Squeeze", one, &[0]))
}

/// Sizes as a vector of i64; runs of numbers are one constant.
pub fn vector(g: &mut Graph, sizes: &[Dim]) -> Option<Id> {
    let mut parts = Vec::new();
    for run in sizes.chunk_by(|a, b| a.known().is_some() && b.known().is_some()) {
        let numbers: Option<Vec<i64>> = run.iter().map(Dim::known).collect();
        parts.push(match numbers {
            Some(numbers) => g.int_literal(&numbers),
            None => entry(g, &run[0])?,
        });
    }
    match parts[..] {
        [] => Some(g.int_literal(&[])),
        [one] => Some(one),
        _ => {
            let attrs: Attrs = [("axis", Attr::Int(0))].into_iter().collect();
            Some(g.op_with("onnx.Concat", &attrs, &parts))
        }
    }
}
