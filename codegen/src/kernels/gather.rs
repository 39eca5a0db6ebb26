//! What indices pick: Gather, GatherND and GatherElements.
//!
//! A negative index counts from the end. One that is out of range is reported, and nothing is read or written for it.

use super::{Buffer, Kernel, Lowered, Step, elementwise, pointwise, report};
use crate::fuse::Fused;
use crate::memory;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Val, scalar, vector};
use dialects::ir::{Module, Op, Value};
use runtime::Fault;

/// Known or named dims throughout, elements that kernels move, indices of i64 or i32.
pub fn supports(m: &Module, op: Op) -> bool {
    shapes(m, op).is_some_and(|(data, indices)| match m.ops[op].name.as_str() {
        "onnx.Gather" => axis(m, op, data.len()).is_some(),
        "onnx.GatherND" => tuple(m, op, &data, &indices).is_some(),
        _ => axis(m, op, data.len()).is_some_and(|i| within(&data, &indices, i)),
    })
}

/// The elements of `v` as words of their size.
pub fn word(m: &Module, v: Value) -> Option<Scalar> {
    Some(match memory::size(m.ty(v).elem()?)? {
        8 => Scalar::I64,
        4 => Scalar::I32,
        1 => Scalar::I8,
        _ => return None,
    })
}

/// The type of indices.
pub(super) fn index_type(m: &Module, v: Value) -> Option<Scalar> {
    let elem = m.ty(v).elem().and_then(pointwise::register)?;
    matches!(elem, Scalar::I64 | Scalar::I32).then_some(elem)
}

/// The shapes of the data and of the indices.
fn shapes(m: &Module, op: Op) -> Option<(Vec<Size>, Vec<Size>)> {
    let (data, indices) = (m.ops[op].operand(0)?, m.ops[op].operand(1)?);
    word(m, data)?;
    index_type(m, indices)?;
    Some((Size::shape(m.ty(data))?, Size::shape(m.ty(indices))?))
}

fn axis(m: &Module, op: Op, rank: usize) -> Option<usize> {
    let axis = m.ops[op].attrs.int("axis").unwrap_or(0);
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|&a| a < rank)
}

/// The leading dims that data and indices share, and the number of indices that pick one block.
fn tuple(m: &Module, op: Op, data: &[Size], indices: &[Size]) -> Option<(usize, usize)> {
    let batch = usize::try_from(m.ops[op].attrs.int("batch_dims").unwrap_or(0)).ok()?;
    let tuple = indices.last()?.known()? as usize;
    let fits = batch < indices.len() && batch + tuple <= data.len() && data[..batch] == indices[..batch];
    (fits && tuple > 0).then_some((batch, tuple))
}

/// Whether indices are nowhere beyond the data but along `axis`.
fn within(data: &[Size], indices: &[Size], axis: usize) -> bool {
    let below = |i: &Size, d: &Size| i == d || i.known().zip(d.known()).is_some_and(|(i, d)| i <= d);
    data.len() == indices.len()
        && indices.iter().zip(data).enumerate().all(|(at, (i, d))| at == axis || below(i, d))
}

/// The kernel. Buffers: data, indices, result, and the word for faults.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let (data, indices) = shapes(m, op)?;
    let of = |i: usize| m.ops[op].operand(i);
    let (elem, index) = (word(m, of(0)?)?, index_type(m, of(1)?)?);
    let (kernel, dims, units, work) = match m.ops[op].name.as_str() {
        "onnx.Gather" => {
            let i = axis(m, op, data.len())?;
            let (outer, inner) = (Size::product(&data[..i]), Size::product(&data[i + 1..]));
            let count = Size::product(&indices);
            let units = outer * count.clone();
            let rows = Rows { elem, index, single: inner == Size::Known(1) };
            (rows.gather(target), vec![inner.clone(), count, data[i].clone()], units, inner)
        }
        "onnx.GatherND" => {
            let (batch, tuple) = tuple(m, op, &data, &indices)?;
            let inner = Size::product(&data[batch + tuple..]);
            let lead = &indices[..indices.len() - 1];
            let dims =
                [&[inner.clone(), Size::product(&lead[batch..])][..], &data[batch..batch + tuple]].concat();
            let rows = Rows { elem, index, single: inner == Size::Known(1) };
            (rows.gather_nd(target, batch > 0, tuple), dims, Size::product(lead), inner)
        }
        _ => {
            let (line, lead) = indices.split_last()?;
            let kernel = elements(target, elem, index, axis(m, op, data.len())?, data.len());
            (kernel, [&indices[..], &data].concat(), Size::product(lead), line.clone() * 4.into())
        }
    };
    let mut lowered = Lowered::default();
    let buffers = vec![
        fused.buffer(of(0)?, &mut lowered.blobs)?,
        fused.buffer(of(1)?, &mut lowered.blobs)?,
        Buffer::Result(0),
        Buffer::Fault,
    ];
    let work = (work + 8.into()).div_up(4);
    lowered.steps.push(Step { kernel, buffers, dims, units, work });
    Some(lowered)
}

/// The index number `at`, counted from the front of a dim of `size`, and whether it is within.
pub(super) fn place(b: &mut Body, indices: Val, at: Val, elem: Scalar, size: Val) -> (Val, Val) {
    let p = b.element(indices, at, elem);
    let index = b.load(p, scalar(elem));
    let index = b.cast(index, Scalar::I64);
    let zero = b.size(0);
    let from_end = b.add(index, size);
    let negative = b.cmp(Cmp::Lt, index, zero);
    let index = b.select(negative, from_end, index);
    let (low, high) = (b.cmp(Cmp::Ge, index, zero), b.cmp(Cmp::Lt, index, size));
    (index, b.and(low, high))
}

/// Copies of rows. The first size is the elements of a row; a unit is a row.
struct Rows {
    elem: Scalar,
    index: Scalar,
    /// Whether a row is one element.
    single: bool,
}

impl Rows {
    /// Sizes: a row, indices, the dim that they pick from.
    fn gather(&self, target: &Target) -> Kernel {
        Kernel::new(target, "gather", |b, a| {
            let (indices, count, size) = (a.buffer(b, 1), a.dim(b, 1), a.dim(b, 2));
            self.each(b, a, |b, unit| {
                let (outer, i) = (b.div(unit, count), b.rem(unit, count));
                let (at, fine) = place(b, indices, i, self.index, size);
                let start = b.mul(outer, size);
                (b.add(start, at), fine)
            });
        })
    }

    /// Sizes: a row, tuples of indices to an element of the shared dims, the dims that a tuple picks from.
    fn gather_nd(&self, target: &Target, batch: bool, tuple: usize) -> Kernel {
        Kernel::new(target, "gather_nd", |b, a| {
            let (indices, per_batch) = (a.buffer(b, 1), a.dim(b, 1));
            let sizes: Vec<Val> = (0..tuple).map(|i| a.dim(b, 2 + i)).collect();
            self.each(b, a, |b, unit| {
                let mut row = if batch { b.div(unit, per_batch) } else { b.size(0) };
                let width = b.size(tuple);
                let first = b.mul(unit, width);
                let mut all = b.flag(scalar(Scalar::I1), true);
                for (i, &size) in sizes.iter().enumerate() {
                    let i = b.size(i);
                    let i = b.add(first, i);
                    let (at, fine) = place(b, indices, i, self.index, size);
                    row = b.mul(row, size);
                    row = b.add(row, at);
                    all = b.and(all, fine);
                }
                (row, all)
            });
        })
    }

    /// Copies to each unit the row that `pick` gives, if it is one.
    fn each(&self, b: &mut Body, a: &super::Args, pick: impl Fn(&mut Body, Val) -> (Val, Val)) {
        let (data, out, fault, inner) = (a.buffer(b, 0), a.buffer(b, 2), a.buffer(b, 3), a.dim(b, 0));
        let lanes = 4 * b.target.lanes() / self.elem.bytes();
        b.each(a.begin, a.end, 1, |b, unit| {
            let (row, fine) = pick(b, unit);
            let copy = |b: &mut Body| {
                let (from, to) = (b.mul(row, inner), b.mul(unit, inner));
                let (from, to) = (b.element(data, from, self.elem), b.element(out, to, self.elem));
                if self.single {
                    return self.copy(b, from, to, 0);
                }
                let zero = b.size(0);
                elementwise::vector_loop(b, zero, inner, lanes, |b, i, lanes| {
                    let (from, to) = (b.element(from, i, self.elem), b.element(to, i, self.elem));
                    self.copy(b, from, to, lanes);
                });
            };
            b.when_else(fine, copy, |b| report(b, fault, Fault::Index));
        });
    }

    fn copy(&self, b: &mut Body, from: Val, to: Val, lanes: usize) {
        let ty = if lanes == 0 { scalar(self.elem) } else { vector(lanes, self.elem) };
        let v = b.load(from, ty);
        b.store(v, to);
    }
}

/// GatherElements. Sizes: the dims of the indices, then those of the data. A unit is a line of the last dim.
fn elements(target: &Target, elem: Scalar, index: Scalar, axis: usize, rank: usize) -> Kernel {
    Kernel::new(target, "gather_elements", |b, a| {
        let (data, indices, out, fault) = (a.buffer(b, 0), a.buffer(b, 1), a.buffer(b, 2), a.buffer(b, 3));
        let own: Vec<Val> = (0..rank).map(|i| a.dim(b, i)).collect();
        let sizes: Vec<Val> = (0..rank).map(|i| a.dim(b, rank + i)).collect();
        let mut strides = vec![b.size(1)];
        for &size in sizes[1..].iter().rev() {
            strides.push(b.mul(strides[strides.len() - 1], size));
        }
        strides.reverse();
        let last = rank - 1;
        b.each(a.begin, a.end, 1, |b, unit| {
            let (mut left, mut base) = (unit, b.size(0));
            for d in (0..last).rev() {
                let at = b.rem(left, own[d]);
                left = b.div(left, own[d]);
                if d != axis {
                    let step = b.mul(at, strides[d]);
                    base = b.add(base, step);
                }
            }
            let first = b.mul(unit, own[last]);
            let zero = b.size(0);
            b.each(zero, own[last], 1, |b, i| {
                let to = b.add(first, i);
                let (at, fine) = place(b, indices, to, index, sizes[axis]);
                let copy = |b: &mut Body| {
                    let step = b.mul(at, strides[axis]);
                    let mut from = b.add(base, step);
                    if axis != last {
                        from = b.add(from, i);
                    }
                    let (from, to) = (b.element(data, from, elem), b.element(out, to, elem));
                    let v = b.load(from, scalar(elem));
                    b.store(v, to);
                };
                b.when_else(fine, copy, |b| report(b, fault, Fault::Index));
            });
        });
    })
}
