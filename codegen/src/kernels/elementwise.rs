//! Chains of elementwise ops as one loop over their common shape.
//!
//! Dims that all operands step through alike are taken together. The innermost one is the vector loop, in which an
//! operand advances by one element or stays; the others are counted by units of work.

use super::{Buffer, Kernel, Lowered, Step, pointwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, vector};
use dialects::ir::Value;
use std::collections::HashMap;

/// Elements of a whole contiguous loop that a unit takes.
const CHUNK: usize = 2048;

/// How an operand meets the loop: for each dim of the loop, whether it steps along it.
pub fn steps(shape: &[Size], domain: &[Size]) -> Option<Vec<bool>> {
    let lead = domain.len().checked_sub(shape.len())?;
    let one = Size::Known(1);
    let inner = shape.iter().zip(&domain[lead..]).map(|(s, d)| match (s == d, *s == one) {
        // A dim of one element: it steps or stays, whichever.
        (true, _) => Some(*d != one),
        (false, true) => Some(false),
        (false, false) => None,
    });
    std::iter::repeat_n(Some(false), lead).chain(inner).collect()
}

/// The loop over dims that are taken together, and how each operand steps through them.
struct Nest {
    sizes: Vec<Size>,
    steps: Vec<Vec<bool>>,
}

impl Nest {
    fn new(domain: &[Size], operands: &[Vec<bool>]) -> Nest {
        let mut nest = Nest { sizes: Vec::new(), steps: vec![Vec::new(); operands.len()] };
        let mut last: Option<Vec<bool>> = None;
        for (i, size) in domain.iter().enumerate() {
            if *size == Size::Known(1) {
                continue;
            }
            let column: Vec<bool> = operands.iter().map(|o| o[i]).collect();
            if last.as_ref() == Some(&column) {
                let tail = nest.sizes.pop().expect("a dim before");
                nest.sizes.push(tail * size.clone());
            } else {
                nest.sizes.push(size.clone());
                nest.steps.iter_mut().zip(&column).for_each(|(s, &c)| s.push(c));
                last = Some(column);
            }
        }
        nest
    }
}

/// Lowers a body of elementwise ops only.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let domain = fused.domain()?;
    let operands = fused.operands();
    let mut accesses: Vec<Vec<bool>> = Vec::new();
    for &v in &operands {
        accesses.push(steps(&fused.shape(v)?, &domain)?);
    }
    // Results have the whole shape.
    if !fused.results().iter().all(|&v| fused.shape(v).is_some_and(|s| s == domain)) {
        return None;
    }
    let nest = Nest::new(&domain, &accesses);
    let contiguous = nest.sizes.len() <= 1 && nest.steps.iter().all(|s| s.iter().all(|&s| s));
    let lanes = target.lanes();
    let kernel = Kernel::new(target, "elementwise", |b, a| {
        let bufs: Vec<Val> = (0..operands.len() + fused.results().len()).map(|i| a.buffer(b, i)).collect();
        let sizes: Vec<Val> = (0..nest.sizes.len()).map(|i| a.dim(b, i)).collect();
        let (zero, one) = (b.size(0), b.size(1));
        let inner = sizes.last().copied().unwrap_or(one);
        let line = |b: &mut Body, from: Val, to: Val, at: &[Val], base: Val| {
            vector_loop(b, from, to, lanes, |b, i, lanes| {
                let along = |b: &mut Body, (&o, s): (&Val, &Vec<bool>)| match s.last() {
                    Some(true) => b.add(o, i),
                    _ => o,
                };
                let at: Vec<Val> = at.iter().zip(&nest.steps).map(|o| along(b, o)).collect();
                let out = b.add(base, i);
                emit_at(b, fused, &operands, &bufs, &nest, &at, out, lanes);
            });
        };
        if contiguous {
            let chunk = b.size(CHUNK);
            let (from, to) = (b.mul(a.begin, chunk), b.mul(a.end, chunk));
            let to = b.min(to, inner);
            return line(b, from, to, &vec![zero; operands.len()], zero);
        }
        b.each(a.begin, a.end, 1, |b, unit| {
            let at = offsets(b, &nest, &sizes, unit);
            let base = b.mul(unit, inner);
            line(b, zero, inner, &at, base);
        });
    });
    let units = match contiguous {
        true => Size::product(&nest.sizes).div_up(CHUNK as u64),
        false => Size::product(&nest.sizes[..nest.sizes.len().saturating_sub(1)]),
    };
    let mut lowered = Lowered::default();
    let mut buffers = Vec::new();
    for &v in &operands {
        buffers.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    buffers.extend((0..fused.results().len()).map(Buffer::Result));
    let length = if contiguous { CHUNK.into() } else { nest.sizes.last().cloned().unwrap_or(Size::Known(1)) };
    let work = (length * (1 + fused.pointwise().len()).into()).div_up(4);
    lowered.steps.push(Step { kernel, buffers, dims: nest.sizes.clone(), units, work });
    Some(lowered)
}

/// A vector loop and what is left over one by one.
pub fn vector_loop(b: &mut Body, from: Val, to: Val, lanes: usize, body: impl Fn(&mut Body, Val, usize)) {
    let middle = b.whole_steps(from, to, lanes);
    b.each(from, middle, lanes, |b, i| body(b, i, lanes));
    b.each(middle, to, 1, |b, i| body(b, i, 0));
}

/// Where each operand stands at the start of line `unit`.
fn offsets(b: &mut Body, nest: &Nest, sizes: &[Val], unit: Val) -> Vec<Val> {
    let outer = sizes.len().saturating_sub(1);
    let mut left = unit;
    let mut index = vec![unit; outer];
    for i in (0..outer).rev() {
        match i {
            0 => index[0] = left,
            _ => {
                index[i] = b.rem(left, sizes[i]);
                left = b.div(left, sizes[i]);
            }
        }
    }
    nest.steps
        .iter()
        .map(|steps| {
            let zero = b.size(0);
            let mut at = zero;
            let mut stride = b.size(1);
            for i in (0..sizes.len()).rev() {
                if !steps[i] {
                    continue;
                }
                if i < outer {
                    let step = b.mul(index[i], stride);
                    at = b.add(at, step);
                }
                stride = b.mul(stride, sizes[i]);
            }
            at
        })
        .collect()
}

/// The ops on `lanes` elements (0: one, as a scalar), operands at element `at`, results at `out`.
#[allow(clippy::too_many_arguments)]
fn emit_at(
    b: &mut Body,
    fused: &Fused,
    operands: &[Value],
    bufs: &[Val],
    nest: &Nest,
    at: &[Val],
    out: Val,
    lanes: usize,
) {
    let mut values = HashMap::new();
    for (i, &v) in operands.iter().enumerate() {
        let elem = fused.register(v);
        let p = element(b, bufs[i], at[i], elem);
        let steps = nest.steps[i].last() == Some(&true);
        let loaded = match lanes {
            0 => pointwise::load(b, p, scalar(elem)),
            n if steps => pointwise::load(b, p, vector(n, elem)),
            n => {
                let one = pointwise::load(b, p, scalar(elem));
                b.broadcast(one, n)
            }
        };
        values.insert(v, loaded);
    }
    chain(b, fused, &mut values, lanes);
    for (i, &v) in fused.results().iter().enumerate() {
        let p = element(b, bufs[operands.len() + i], out, fused.register(v));
        pointwise::store(b, values[&v], p);
    }
}

/// The address of an element in memory.
pub fn element(b: &mut Body, ptr: Val, at: Val, elem: Scalar) -> Val {
    b.element(ptr, at, if elem == Scalar::I1 { Scalar::I8 } else { elem })
}

/// The elementwise ops of a body, on the values that are there.
pub fn chain(b: &mut Body, fused: &Fused, values: &mut HashMap<Value, Val>, lanes: usize) {
    for &op in fused.pointwise() {
        let data = &fused.module.ops[op];
        let result = data.result(0).expect("an elementwise op has a result");
        let x: Vec<Val> = data
            .operands
            .iter()
            .flatten()
            .map(|&v| match values.get(&v) {
                Some(&x) => x,
                None => {
                    let number = fused.number(v).expect("an operand is loaded or a number");
                    let elem = fused.register(v);
                    let ty = if lanes == 0 { scalar(elem) } else { vector(lanes, elem) };
                    if elem == Scalar::I1 { b.flag(ty, number != 0.0) } else { b.splat(ty, number) }
                }
            })
            .collect();
        let numbers: Vec<Option<f64>> = data.operands.iter().flatten().map(|&v| fused.number(v)).collect();
        let out = pointwise::emit(b, data, &x, &numbers, fused.register(result))
            .expect("checked when it was fused");
        values.insert(result, out);
    }
}
