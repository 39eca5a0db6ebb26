//! Softmax and LogSoftmax of f32 over the last dim, of any length. A unit is a row.
//!
//! A row is read three times: for its largest element, for the sum of exponentials, and to divide by it.

use super::{Buffer, Kernel, Lowered, Step, elementwise, math};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op};

/// f32, over the last dim alone.
pub fn supports(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let Some(ty) = data.operand(0).map(|v| m.ty(v)) else { return false };
    let Some(rank) = ty.dims().map(<[_]>::len) else { return false };
    let axis = data.attrs.int("axis").unwrap_or(if m.opset("onnx") < 13 { 1 } else { -1 });
    ty.elem() == Some(Elem::F32) && rank > 0 && (axis == -1 || axis == rank as i64 - 1)
}

/// The kernel. Buffers: X, Y. Sizes: the length of a row.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let data = &fused.module.ops[fused.anchor()?];
    let domain = fused.domain()?;
    let (length, lead) = domain.split_last()?;
    let mut lowered = Lowered::default();
    let buffers = vec![fused.buffer(data.operand(0)?, &mut lowered.blobs)?, Buffer::Result(0)];
    let kernel = softmax(target, data.is("onnx.LogSoftmax"));
    lowered.steps.push(Step {
        kernel,
        buffers,
        dims: vec![length.clone()],
        units: Size::product(lead),
        work: length.clone() * 2.into(),
    });
    Some(lowered)
}

fn softmax(target: &Target, log: bool) -> Kernel {
    let lanes = target.lanes();
    Kernel::new(target, if log { "log_softmax" } else { "softmax" }, |b, a| {
        let (x, y, length) = (a.buffer(b, 0), a.buffer(b, 1), a.dim(b, 0));
        b.each(a.begin, a.end, 1, |b, unit| {
            let at = b.mul(unit, length);
            let (x, y) = (b.element(x, at, Scalar::F32), b.element(y, at, Scalar::F32));
            // A NaN is passed over, and makes the sum NaN.
            let top = reduce(
                b,
                length,
                lanes,
                f64::NEG_INFINITY,
                |b, s, t| b.max_finite(s, t),
                |b, i, lanes| load(b, x, i, lanes),
            );
            let sum = reduce(
                b,
                length,
                lanes,
                0.0,
                |b, s, t| b.add(s, t),
                |b, i, lanes| {
                    let v = load(b, x, i, lanes);
                    let top = b.spread(top, lanes);
                    let v = b.sub(v, top);
                    let e = math::exp_below(b, v);
                    if !log {
                        let at = b.element(y, i, Scalar::F32);
                        b.store(e, at);
                    }
                    e
                },
            );
            let one = b.splat(scalar(Scalar::F32), 1.0);
            let by = if log { math::log(b, sum) } else { b.div(one, sum) };
            let zero = b.size(0);
            elementwise::vector_loop(b, zero, length, lanes, |b, i, lanes| {
                let by = b.spread(by, lanes);
                let v = match log {
                    true => {
                        let v = load(b, x, i, lanes);
                        let top = b.spread(top, lanes);
                        let v = b.sub(v, top);
                        b.sub(v, by)
                    }
                    false => {
                        let v = load(b, y, i, lanes);
                        b.mul(v, by)
                    }
                };
                let at = b.element(y, i, Scalar::F32);
                b.store(v, at);
            });
        });
    })
}

/// Elements `i..` of a row: `lanes` of them, or one as a scalar for 0.
fn load(b: &mut Body, p: Val, i: Val, lanes: usize) -> Val {
    let at = b.element(p, i, Scalar::F32);
    b.load(at, if lanes == 0 { scalar(Scalar::F32) } else { vector(lanes, Scalar::F32) })
}

/// What `of` gives for all elements of a row, combined in one order: lane by lane, the lanes pairwise, then those left over.
fn reduce(
    b: &mut Body,
    length: Val,
    lanes: usize,
    start: f64,
    combine: fn(&mut Body, Val, Val) -> Val,
    of: impl Fn(&mut Body, Val, usize) -> Val,
) -> Val {
    let (zero, width) = (b.size(0), b.size(lanes));
    let whole = b.div(length, width);
    let whole = b.mul(whole, width);
    let first = b.splat(vector(lanes, Scalar::F32), start);
    let body = |b: &mut Body, i: Val, acc: &[Val], lanes: usize| {
        let v = of(b, i, lanes);
        vec![combine(b, v, acc[0])]
    };
    let all = b.repeat(zero, whole, lanes, &[first], |b, i, acc| body(b, i, acc, lanes));
    let all = b.fold(all[0], |b, s, t| combine(b, s, t));
    b.repeat(whole, length, 1, &[all], |b, i, acc| body(b, i, acc, 0))[0]
}
