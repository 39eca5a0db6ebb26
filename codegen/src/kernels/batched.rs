//! MatMul of two computed operands, batched as `numpy.matmul`: both are read where they stand.
//!
//! Four rows by two vectors of columns are summed at a time, over K in order; then one vector, then single columns.

use super::{Buffer, Kernel, Lowered, Step, elementwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op};

/// Rows that are multiplied at a time.
const TILE: usize = 4;

/// The sizes of a product, and for each dim of the batch which operands step along it.
struct Form {
    batch: Vec<Size>,
    steps: [Vec<bool>; 2],
    m: Size,
    k: Size,
    n: Size,
}

/// f32 matrices of known or named dims; batches that broadcast.
pub fn supports(m: &Module, op: Op) -> bool {
    of(m, op).is_some()
}

fn of(m: &Module, op: Op) -> Option<Form> {
    let data = &m.ops[op];
    let (x, y, out) = (data.operand(0)?, data.operand(1)?, data.result(0)?);
    let shape = |v| Size::shape(m.ty(v)).filter(|s| s.len() > 1 && m.ty(v).elem() == Some(Elem::F32));
    let split = |s: Vec<Size>| {
        let [batch @ .., rows, cols] = &s[..] else { return None };
        Some((batch.to_vec(), rows.clone(), cols.clone()))
    };
    let (left, m, k) = split(shape(x)?)?;
    let (right, depth, n) = split(shape(y)?)?;
    let (batch, ..) = split(shape(out)?)?;
    let steps = [elementwise::steps(&left, &batch)?, elementwise::steps(&right, &batch)?];
    (k == depth).then_some(Form { batch, steps, m, k, n })
}

/// The kernel. Buffers: both operands, the result. Sizes: M, K, N, and the batch. A unit is four rows of one matrix.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let form = of(m, op)?;
    let mut lowered = Lowered::default();
    let mut buffers = Vec::new();
    for i in 0..2 {
        buffers.push(fused.buffer(m.ops[op].operand(i)?, &mut lowered.blobs)?);
    }
    buffers.push(Buffer::Result(0));
    let kernel = Kernel::new(target, "matmul_batched", |b, a| {
        let (x, w, y) = (a.buffer(b, 0), a.buffer(b, 1), a.buffer(b, 2));
        let (rows, depth, cols) = (a.dim(b, 0), a.dim(b, 1), a.dim(b, 2));
        let sizes: Vec<Val> = (0..form.batch.len()).map(|i| a.dim(b, 3 + i)).collect();
        let (tile, more) = (b.size(TILE), b.size(TILE - 1));
        let tiles = b.add(rows, more);
        let tiles = b.div(tiles, tile);
        let (left, right) = (b.mul(rows, depth), b.mul(depth, cols));
        b.each(a.begin, a.end, 1, |b, unit| {
            let (matrix, t) = (b.div(unit, tiles), b.rem(unit, tiles));
            let first = b.mul(t, tile);
            let [own, other] = matrices(b, &form.steps, &sizes, matrix);
            let start = b.mul(own, left);
            let row = b.mul(first, depth);
            let start = b.add(start, row);
            let x = b.element(x, start, Scalar::F32);
            let start = b.mul(other, right);
            let w = b.element(w, start, Scalar::F32);
            let row = b.mul(matrix, rows);
            let row = b.add(row, first);
            let start = b.mul(row, cols);
            let y = b.element(y, start, Scalar::F32);
            let there = b.sub(rows, first);
            let there = b.min(there, tile);
            let whole = b.cmp(crate::text::Cmp::Eq, there, tile);
            let part = Part { x, w, y, depth, cols };
            b.when_else(
                whole,
                |b| part.rows(b, TILE),
                |b| {
                    let zero = b.size(0);
                    b.each(zero, there, 1, |b, row| part.from(b, row).rows(b, 1));
                },
            );
        });
    });
    let lines = Size::product(&form.batch) * form.m.clone().div_up(TILE as u64);
    let work = (form.k.clone() * form.n.clone() * TILE.into()).div_up(16);
    let dims = [vec![form.m, form.k, form.n], form.batch].concat();
    lowered.steps.push(Step { kernel, buffers, dims, units: lines, work });
    Some(lowered)
}

/// Which matrix of each operand belongs to matrix `at` of the result.
fn matrices(b: &mut Body, steps: &[Vec<bool>; 2], sizes: &[Val], at: Val) -> [Val; 2] {
    let mut left = at;
    let index: Vec<Val> = sizes
        .iter()
        .rev()
        .map(|&size| {
            let i = b.rem(left, size);
            left = b.div(left, size);
            i
        })
        .collect();
    steps.each_ref().map(|steps| {
        let (mut at, mut stride) = (b.size(0), b.size(1));
        for ((&i, &size), _) in
            index.iter().zip(sizes.iter().rev()).zip(steps.iter().rev()).filter(|(_, s)| **s)
        {
            let step = b.mul(i, stride);
            at = b.add(at, step);
            stride = b.mul(stride, size);
        }
        at
    })
}

/// Rows of one matrix by another.
struct Part {
    x: Val,
    w: Val,
    y: Val,
    depth: Val,
    cols: Val,
}

impl Part {
    /// From a later row on.
    fn from(&self, b: &mut Body, row: Val) -> Part {
        let (x, y) = (b.mul(row, self.depth), b.mul(row, self.cols));
        let (x, y) = (b.element(self.x, x, Scalar::F32), b.element(self.y, y, Scalar::F32));
        Part { x, y, ..*self }
    }

    /// The product of so many rows.
    fn rows(&self, b: &mut Body, count: usize) {
        let lanes = b.target.lanes();
        let start = |b: &mut Body, base: Val, width: Val| {
            let mut at = vec![base];
            for _ in 1..count {
                let next = b.element(at[at.len() - 1], width, Scalar::F32);
                at.push(next);
            }
            at
        };
        let (x, y) = (start(b, self.x, self.depth), start(b, self.y, self.cols));
        let zero = b.size(0);
        let (pairs, single) =
            (b.whole_steps(zero, self.cols, 2 * lanes), b.whole_steps(zero, self.cols, lanes));
        b.each(zero, pairs, 2 * lanes, |b, n| self.columns(b, &x, &y, n, 2, lanes));
        b.each(pairs, single, lanes, |b, n| self.columns(b, &x, &y, n, 1, lanes));
        b.each(single, self.cols, 1, |b, n| self.columns(b, &x, &y, n, 1, 0));
    }

    /// Columns from `n` on: `parts` vectors of `lanes`, or one column where that is 0.
    fn columns(&self, b: &mut Body, x: &[Val], y: &[Val], n: Val, parts: usize, lanes: usize) {
        let ty = if lanes == 0 { scalar(Scalar::F32) } else { vector(lanes, Scalar::F32) };
        let none = b.splat(ty, 0.0);
        let zero = b.size(0);
        let sums = b.repeat(zero, self.depth, 1, &vec![none; x.len() * parts], |b, k, sums| {
            let line = b.mul(k, self.cols);
            let line = b.add(line, n);
            let w = b.element(self.w, line, Scalar::F32);
            let w: Vec<Val> = (0..parts)
                .map(|p| {
                    let at = b.at_const(w, p * lanes * 4);
                    b.load(at, ty)
                })
                .collect();
            let mut out = Vec::with_capacity(sums.len());
            for (r, &x) in x.iter().enumerate() {
                let at = b.element(x, k, Scalar::F32);
                let one = b.load(at, scalar(Scalar::F32));
                let one = b.spread(one, lanes);
                for (p, &w) in w.iter().enumerate() {
                    out.push(b.fma(one, w, sums[r * parts + p]));
                }
            }
            out
        });
        for (i, sum) in sums.into_iter().enumerate() {
            let at = b.element(y[i / parts], n, Scalar::F32);
            let at = b.at_const(at, i % parts * lanes * 4);
            b.store(sum, at);
        }
    }
}
