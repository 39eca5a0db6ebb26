//! Unique: the different elements, or slices along an axis, with where each was first, which one each is, and counts.

use super::gather::rows;
use super::order::{around, total};
use super::util::{axis, fact};
use crate::ir::{Dim, Elem};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use crate::{each_data, map_data};
use std::cmp::Ordering;

/// The groups of equal slices, in the order asked for: the places of each, in order.
fn groups<T: PartialOrd>(x: &[T], (outer, n, inner): (usize, usize, usize), sorted: bool) -> Vec<Vec<usize>> {
    let slice = |j: usize| (0..outer).flat_map(move |o| &x[(o * n + j) * inner..][..inner]);
    let compare = |a: usize, b: usize| {
        let unequal = slice(a).zip(slice(b)).map(|(p, q)| total(p, q)).find(|o| o.is_ne());
        unequal.unwrap_or(Ordering::Equal)
    };
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| compare(a, b));
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for j in order {
        match groups.last_mut() {
            Some(group) if compare(group[0], j).is_eq() => group.push(j),
            _ => groups.push(vec![j]),
        }
    }
    if !sorted {
        groups.sort_unstable_by_key(|g| g[0]);
    }
    groups
}

fn eval(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (x, i) = match cx.attrs.int("axis") {
        Some(a) => (x.clone(), axis(a, x.rank())?),
        None => (x.reshape(&[x.len()])?, 0),
    };
    let dims @ (outer, n, inner) = around(x.shape(), i);
    let groups = each_data!(x.data(), v => groups(v, dims, cx.int_or("sorted", 1) != 0));
    let first: Vec<usize> = groups.iter().map(|g| g[0]).collect();
    let mut which = vec![0i64; n];
    for (g, group) in groups.iter().enumerate() {
        group.iter().for_each(|&j| which[j] = g as i64);
    }
    let mut shape = x.shape().to_vec();
    shape[i] = first.len();
    let y = Tensor::with_elem(x.elem(), &shape, map_data!(x.data(), v => rows(v, outer, n, inner, &first)))?;
    let ints = |v: Vec<i64>| Ok::<_, OpError>(Tensor::new(&[v.len()], v)?.into());
    Ok(vec![
        y.into(),
        ints(first.iter().map(|&p| p as i64).collect())?,
        ints(which)?,
        ints(groups.iter().map(|g| g.len() as i64).collect())?,
    ])
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let (dims, n) = match (cx.attrs.int("axis"), cx.dims(0)) {
        (None, d) => {
            let n = d.map(|d| d.iter().fold(Dim::Known(1), |n, d| n.mul(d)));
            (Some(vec![Dim::Unknown]), n.unwrap_or_default())
        }
        (Some(a), Some(d)) => {
            let (mut dims, i) = (d.to_vec(), axis(a, d.len())?);
            let n = std::mem::take(&mut dims[i]);
            (Some(dims), n)
        }
        (Some(_), None) => (None, Dim::Unknown),
    };
    let ints = |n| fact(Elem::I64, Some(vec![n]), None);
    Ok(vec![fact(elem, dims, None), ints(Dim::Unknown), ints(n), ints(Dim::Unknown)])
}

/// The op.
pub const OPS: &[OpDef] = &[OpDef { name: "onnx.Unique", results: (1, 4), infer, eval, ..OpDef::NEW }];
