//! Range: numbers in equal steps, as many as the model declares. That they are as many as the operands say is checked.

use super::report;
use super::{Buffer, Kernel, Lowered, Step, elementwise, pointwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar};
use dialects::ir::{Module, Op};
use runtime::Fault;

/// Elements that a unit makes.
const CHUNK: usize = 1024;

/// Operands of one element of f32, i64 or i32; a result of known or named length.
pub fn supports(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let one = |i: usize| {
        let shape = data.operand(i).and_then(|v| Size::shape(m.ty(v)));
        shape.is_some_and(|s| Size::product(&s) == Size::Known(1))
    };
    elem(m, op).is_some_and(|e| (0..3).all(one) && e.bytes() >= 4)
        && data.result(0).is_some_and(|v| Size::shape(m.ty(v)).is_some())
}

fn elem(m: &Module, op: Op) -> Option<Scalar> {
    let elem = m.ty(m.ops[op].operand(0)?).elem().and_then(pointwise::register)?;
    (elem != Scalar::I1).then_some(elem)
}

/// The kernel. Buffers: start, limit, delta, result, and the word for faults. Sizes: the length.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let elem = elem(m, op)?;
    let [length] = <[Size; 1]>::try_from(fused.domain()?).ok()?;
    let mut lowered = Lowered::default();
    let mut buffers = Vec::new();
    for i in 0..3 {
        buffers.push(fused.buffer(m.ops[op].operand(i)?, &mut lowered.blobs)?);
    }
    buffers.extend([Buffer::Result(0), Buffer::Fault]);
    let kernel = Kernel::new(target, "range", |b, a| {
        let load = |b: &mut Body, i: usize| {
            let p = a.buffer(b, i);
            b.load(p, scalar(elem))
        };
        let (start, limit, delta) = (load(b, 0), load(b, 1), load(b, 2));
        let (out, fault, length) = (a.buffer(b, 3), a.buffer(b, 4), a.dim(b, 0));
        let zero = b.size(0);
        let first = b.cmp(Cmp::Eq, a.begin, zero);
        b.when(first, |b| {
            let fine = match elem {
                Scalar::F32 => as_many_floats(b, start, limit, delta, length),
                _ => as_many_integers(b, start, limit, delta, length),
            };
            let yes = b.flag(fine.ty, true);
            let wrong = b.xor(fine, yes);
            b.when(wrong, |b| report(b, fault, Fault::Length));
        });
        let chunk = b.size(CHUNK);
        let (from, to) = (b.mul(a.begin, chunk), b.mul(a.end, chunk));
        let to = b.min(to, length);
        elementwise::vector_loop(b, from, to, b.target.lanes(), |b, i, lanes| {
            let mut index = b.spread(i, lanes);
            if lanes > 0 {
                let order: Vec<i64> = (0..lanes as i64).collect();
                let order = b.lanes_of(Scalar::I64, &order);
                index = b.add(index, order);
            }
            let index = b.cast(index, elem);
            let (start, delta) = (b.spread(start, lanes), b.spread(delta, lanes));
            let step = b.mul(index, delta);
            let value = b.add(start, step);
            let at = b.element(out, i, elem);
            b.store(value, at);
        });
    });
    // A unit at least, which checks the length.
    let units = (length.clone() + 1.into()).div_up(CHUNK as u64);
    lowered.steps.push(Step { kernel, buffers, dims: vec![length], units, work: CHUNK.into() });
    Some(lowered)
}

/// Whether ceil((limit - start) / delta) is `length`, none where that is negative or NaN.
fn as_many_floats(b: &mut Body, start: Val, limit: Val, delta: Val, length: Val) -> Val {
    let wide = Ty { elem: Scalar::F64, lanes: 0 };
    let span = b.sub(limit, start);
    let (span, delta) = (b.cast(span, Scalar::F64), b.cast(delta, Scalar::F64));
    let steps = b.div(span, delta);
    let (n, one, zero) = (b.cast(length, Scalar::F64), b.splat(wide, 1.0), b.splat(wide, 0.0));
    let before = b.sub(n, one);
    let (more, most) = (b.cmp(Cmp::Gt, steps, before), b.cmp(Cmp::Le, steps, n));
    let some = b.and(more, most);
    let any = b.cmp(Cmp::Gt, steps, zero);
    let yes = b.flag(any.ty, true);
    let none = b.xor(any, yes);
    let empty = b.cmp(Cmp::Eq, n, zero);
    b.select(empty, none, some)
}

/// Whether `length` steps lead from `start` to `limit` or beyond, and one step less does not.
fn as_many_integers(b: &mut Body, start: Val, limit: Val, delta: Val, length: Val) -> Val {
    let [start, limit, delta] = [start, limit, delta].map(|v| b.cast(v, Scalar::I64));
    let (zero, one) = (b.size(0), b.size(1));
    let forward = b.cmp(Cmp::Gt, delta, zero);
    let back = b.sub(zero, delta);
    let size = b.select(forward, delta, back);
    let distance = |b: &mut Body, from: Val| {
        let (ahead, behind) = (b.sub(limit, from), b.sub(from, limit));
        b.select(forward, ahead, behind)
    };
    let before = b.sub(length, one);
    let step = b.mul(before, delta);
    let last = b.add(start, step);
    let left = distance(b, last);
    let (more, most) = (b.cmp(Cmp::Gt, left, zero), b.cmp(Cmp::Le, left, size));
    let some = b.and(more, most);
    let whole = distance(b, start);
    let none = b.cmp(Cmp::Le, whole, zero);
    let empty = b.cmp(Cmp::Eq, length, zero);
    let fine = b.select(empty, none, some);
    let steps = b.cmp(Cmp::Ne, delta, zero);
    b.and(fine, steps)
}
