//! How large the weights before and behind a value are, channel by channel: what equalization trades.
//!
//! The value is multiplied by a symbolic scale twice: once as what is upstream makes it, once as its readers take it. Each
//! weight that absorbs the scale is then a product whose other factor says which channel each of its elements belongs to.

use super::apply::{self, Terms, leaves};
use super::extract::Extraction;
use super::graph::{Graph, Id};
use super::window::Scope;
use super::{Channels, place_along, solve};
use dialects::ir::{Module, Op, Value};
use dialects::ops::Ops;
use std::collections::HashMap;

/// The weights on both sides of a value that its channels can be scaled between.
#[derive(Clone, Debug, PartialEq)]
pub struct Between {
    /// For each channel its class: channels of one class must have one number.
    pub classes: Vec<u32>,
    /// For each class the largest magnitude among the elements of the weights that make it.
    pub before: Vec<f32>,
    /// For each class the largest magnitude among the elements of the weights that multiply it.
    pub behind: Vec<f32>,
    /// All those weights.
    pub weights: Vec<Value>,
}

/// Looks for the weights between which the channels of `value` can be scaled at no cost at run time; `readers` are all ops
/// that read it. Constants of one dim, biases and gains of norms, take a scale without being weights. The error says why
/// there are none.
///
/// The types in `m` must be inferred.
pub fn between(
    m: &Module,
    ops: &Ops,
    value: Value,
    along: Channels,
    readers: &[Op],
) -> Result<Between, String> {
    let place = place_along(m, ops, value, along, readers);
    if let Some(why) = place.why_not {
        return Err(why);
    }
    let label = m.value_label(value);
    let (channels, _) = along.of(m.ty(value)).ok_or("the number of channels is unknown")?;
    let classes = place.freedom.unwrap_or_else(|| (0..channels as u32).collect());
    let (op, _) = m.def_op(value).ok_or_else(|| format!("{label:?} is an input"))?;
    let scope = Scope::new(m, m.ops[op].region);

    let solved = solve(m, ops, &scope.upstream(value, readers), value, along, &classes);
    let made = solved.with.ok_or_else(|| format!("nothing upstream of {label:?} takes a scale"))?;
    let (before, mut weights) = largest(&solved.g, &made, &classes)?;
    if weights.is_empty() {
        return Err(format!("its scale would go into {}, and no weight", place.sites.join(" and ")));
    }
    let solved = solve(m, ops, &scope.of_readers(readers), value, along, &classes);
    let read =
        solved.with.ok_or_else(|| format!("what reads {label:?} cannot take a scale on its inputs"))?;
    let (behind, more) = largest(&solved.g, &read, &classes)?;
    weights.extend(more);
    Ok(Between { classes, before, behind, weights })
}

/// The largest magnitude of each class of symbolic scale 0 among the weights that an extraction multiplies by it, and those
/// weights.
fn largest(g: &Graph, x: &Extraction, classes: &[u32]) -> Result<(Vec<f32>, Vec<Value>), String> {
    let m = g.world().m;
    let terms = apply::terms(g);
    let mut most = vec![0f32; classes.iter().max().map_or(0, |&c| c as usize + 1)];
    let mut weights = Vec::new();
    let matrix = |v: &Value| m.ty(*v).dims().is_some_and(|d| d.len() >= 2);
    let mut constants: Vec<Id> =
        x.choice.values().flat_map(|n| n.children.iter().map(|&c| g.find(c))).collect();
    constants.sort();
    constants.dedup();
    for class in constants.into_iter().filter(|&c| g.is_const(c) && apply::scaled(g, &terms, c)) {
        let made_of: Vec<Value> = leaves(g, &terms, class).into_iter().filter(matrix).collect();
        if made_of.is_empty() {
            continue;
        }
        let names = || made_of.iter().map(|v| m.value_label(*v)).collect::<Vec<_>>().join(" and ");
        let (base, factor) = factors(g, &terms, class)
            .ok_or_else(|| format!("{} takes the scale in more than one product", names()))?;
        let pattern = g.pattern(factor).ok_or("the channels of a weight cannot be told apart")?;
        let scales: Vec<Option<u32>> = pattern.scales().collect();
        let t = apply::expr(g, &terms, base, &mut HashMap::new())?.eval().map_err(|e| e.to_string())?;
        let values = t.to_f32().map_err(|e| e.to_string())?;
        broadcast(&pattern.shape, t.shape(), |i, j| {
            if let Some(c) = scales[j] {
                most[c as usize] = most[c as usize].max(values[i].abs());
            }
        })
        .ok_or("the factor of a weight does not broadcast")?;
        weights.extend(made_of);
    }
    weights.sort();
    weights.dedup();
    Ok((most, weights))
}

/// The weight and the factor of it that holds the scale, of a product of these.
fn factors(g: &Graph, terms: &Terms, class: Id) -> Option<(Id, Id)> {
    let (_, node) = terms.get(&g.find(class))?;
    if !g.is(node, "onnx.Mul") {
        return None;
    }
    match (apply::scaled(g, terms, node.children[0]), apply::scaled(g, terms, node.children[1])) {
        (false, true) => Some((node.children[0], node.children[1])),
        (true, false) => Some((node.children[1], node.children[0])),
        _ => None,
    }
}

/// Calls `f(i, j)` for each element `i` of `shape`, row-major, where `j` is the element of `from` that broadcasts to it.
/// `None` when `from` does not broadcast to `shape`.
fn broadcast(from: &[usize], shape: &[usize], mut f: impl FnMut(usize, usize)) -> Option<()> {
    let lead = shape.len().checked_sub(from.len())?;
    let mut strides = vec![0; shape.len()];
    let mut stride = 1;
    for axis in (0..from.len()).rev() {
        if from[axis] != 1 {
            (from[axis] == shape[lead + axis]).then_some(())?;
            strides[lead + axis] = stride;
        }
        stride *= from[axis];
    }
    let mut at = vec![0; shape.len()];
    let mut j = 0;
    for i in 0..shape.iter().product() {
        f(i, j);
        for axis in (0..shape.len()).rev() {
            at[axis] += 1;
            j += strides[axis];
            if at[axis] < shape[axis] {
                break;
            }
            j -= strides[axis] * shape[axis];
            at[axis] = 0;
        }
    }
    Some(())
}
