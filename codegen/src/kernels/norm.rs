//! Normalization of rows: RMS and layer normalization over the last dim, in one pass over a row that stays in cache.
//!
//! Sums are kept in four vectors of lanes and folded in one order, so that a row's result does not depend on its neighbours.

use super::{Buffer, Kernel, Lowered, Step};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op};

/// Vectors that sums are kept in: each addition waits for the one before it.
const CHAINS: usize = 4;

/// f32, over the last dim, whose size is known; one result.
pub fn supports(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let float = data.operands.iter().flatten().all(|&v| m.ty(v).elem() == Some(Elem::F32));
    let Some(dims) = data.operand(0).and_then(|v| m.ty(v).dims()) else { return false };
    let Some(length) = dims.last().and_then(|d| d.known()).filter(|&n| n > 0) else { return false };
    let axis = data.attrs.int("axis").unwrap_or(-1);
    let whole = |i: usize| {
        let ty =
            data.operand(i).map(|v| m.ty(v).dims().map(|d| d.iter().map(|d| d.known()).collect::<Vec<_>>()));
        ty.is_none_or(|d| d == Some(vec![Some(length)]))
    };
    let one = data.results.iter().skip(1).all(Option::is_none);
    float
        && (axis == -1 || axis == dims.len() as i64 - 1)
        && data.operand(1).is_some()
        && whole(1)
        && whole(2)
        && one
}

/// Whether the mean is taken away first.
fn centred(m: &Module, op: Op) -> bool {
    m.ops[op].is("onnx.LayerNormalization")
}

/// The kernel. Buffers: X, scale, Y, and the bias if there is one. A unit is a row.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let data = &m.ops[op];
    let domain = fused.domain()?;
    let length = domain.last()?.known()? as usize;
    let rows = Size::product(&domain[..domain.len() - 1]);
    let epsilon = f64::from(data.attrs.float("epsilon").unwrap_or(1e-5));
    let (centred, biased) = (centred(m, op), data.operand(2).is_some());
    let mut lowered = Lowered::default();
    let mut buffers = vec![fused.buffer(data.operand(0)?, &mut lowered.blobs)?];
    buffers.push(fused.buffer(data.operand(1)?, &mut lowered.blobs)?);
    buffers.push(Buffer::Result(0));
    if biased {
        buffers.push(fused.buffer(data.operand(2)?, &mut lowered.blobs)?);
    }
    let row = Row { length, lanes: target.lanes() };
    let kernel = Kernel::new(target, if centred { "layer_norm" } else { "rms_norm" }, |b, a| {
        let (x, scale, y) = (a.buffer(b, 0), a.buffer(b, 1), a.buffer(b, 2));
        let bias = biased.then(|| a.buffer(b, 3));
        b.each(a.begin, a.end, 1, |b, unit| {
            let size = b.size(length);
            let at = b.mul(unit, size);
            let (x, y) = (b.element(x, at, Scalar::F32), b.element(y, at, Scalar::F32));
            let one = scalar(Scalar::F32);
            let count = b.splat(one, length as f64);
            let mean = match centred {
                true => {
                    let sum = row.sum(b, x, |_, v, _| v);
                    Some(b.div(sum, count))
                }
                false => None,
            };
            let shifted = |b: &mut Body, v: Val| match mean {
                Some(mean) => {
                    let mean = b.spread(mean, v.ty.lanes);
                    b.sub(v, mean)
                }
                None => v,
            };
            let squares = row.sum(b, x, |b, v, there| {
                let v = shifted(b, v);
                let v = b.keep(v, there);
                b.mul(v, v)
            });
            let variance = b.div(squares, count);
            let small = b.splat(one, epsilon);
            let variance = b.add(variance, small);
            let root = b.unary("math.sqrt", variance);
            let unit = b.splat(one, 1.0);
            let factor = b.div(unit, root);
            row.each(b, |b, i, there| {
                let v = row.load(b, x, i, there);
                let v = shifted(b, v);
                let factor = b.spread(factor, v.ty.lanes);
                let v = b.mul(v, factor);
                let s = row.load(b, scale, i, there);
                let mut v = b.mul(v, s);
                if let Some(bias) = bias {
                    let t = row.load(b, bias, i, there);
                    v = b.add(v, t);
                }
                let at = b.element(y, i, Scalar::F32);
                b.store_some(v, at, there);
            });
        });
    });
    let work = (length / 2).into();
    lowered.steps.push(Step { kernel, buffers, dims: Vec::new(), units: rows, work });
    Some(lowered)
}

/// A row of known length.
struct Row {
    length: usize,
    lanes: usize,
}

impl Row {
    fn load(&self, b: &mut Body, p: Val, i: Val, there: usize) -> Val {
        let at = b.element(p, i, Scalar::F32);
        b.load_some(at, vector(self.lanes, Scalar::F32), there)
    }

    /// `body(first element, lanes that are there)` for each vector of the row.
    fn each(&self, b: &mut Body, body: impl Fn(&mut Body, Val, usize)) {
        let whole = self.length / self.lanes * self.lanes;
        let (from, to) = (b.size(0), b.size(whole));
        b.each(from, to, self.lanes, |b, i| body(b, i, self.lanes));
        if whole < self.length {
            body(b, to, self.length - whole);
        }
    }

    /// The sum over the row of what `of` makes of a vector, of which so many lanes are there (the others are 0).
    fn sum(&self, b: &mut Body, x: Val, of: impl Fn(&mut Body, Val, usize) -> Val) -> Val {
        let step = CHAINS * self.lanes;
        let turns = self.length / step * step;
        let zero = b.splat(vector(self.lanes, Scalar::F32), 0.0);
        let (from, to) = (b.size(0), b.size(turns));
        let mut sums = b.repeat(from, to, step, &[zero; CHAINS], |b, i, sums| {
            let each = sums.iter().enumerate().map(|(c, &sum)| {
                let offset = b.size(c * self.lanes);
                let at = b.add(i, offset);
                let v = self.load(b, x, at, self.lanes);
                let v = of(b, v, self.lanes);
                b.add(sum, v)
            });
            each.collect()
        });
        for (c, at) in (turns..self.length).step_by(self.lanes).enumerate() {
            let there = (self.length - at).min(self.lanes);
            let at = b.size(at);
            let v = self.load(b, x, at, there);
            let v = of(b, v, there);
            sums[c] = b.add(sums[c], v);
        }
        let all = sums.into_iter().reduce(|s, t| b.add(s, t)).expect("four sums");
        b.fold(all, |b, s, t| b.add(s, t))
    }
}
