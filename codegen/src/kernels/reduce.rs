//! Reductions over dims that lie side by side: sums, means, extremes and norms; pools over all of an image.
//!
//! Rows that are reduced whole are folded in four vectors of lanes at a time; where other dims follow, lanes are columns. Either
//! way the order is fixed, whatever the number of threads.

use super::{Buffer, Kernel, Lowered, Step, elementwise, pointwise, pool};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Ty, Val};
use dialects::ir::{Attr, Module, Op};
use dialects::tensor::Tensor;

/// Vectors that rows are folded in: each step waits for the one before it.
const CHAINS: usize = 4;
/// Columns of a unit, where lanes are columns.
const COLUMNS: usize = 256;

/// What is made of the elements.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sum,
    Mean,
    Max,
    Min,
    SumSquare,
    L1,
    L2,
}

/// `[outer, length, inner]`, of which the middle goes.
struct Form {
    kind: Kind,
    elem: Scalar,
    outer: Size,
    length: Size,
    inner: Size,
}

/// f32; sums and extremes of i64 and i32; constant axes, between which nothing stays. Pools of f32 over all of an image.
pub fn supports(m: &Module, op: Op) -> bool {
    form(m, op).is_some()
}

fn form(m: &Module, op: Op) -> Option<Form> {
    let data = &m.ops[op];
    let kind = match data.name.as_str() {
        "onnx.ReduceSum" => Kind::Sum,
        "onnx.ReduceMean" | "onnx.GlobalAveragePool" => Kind::Mean,
        "onnx.AveragePool" if pool::is_global(m, op) => Kind::Mean,
        "onnx.ReduceMax" | "onnx.GlobalMaxPool" => Kind::Max,
        "onnx.ReduceMin" => Kind::Min,
        "onnx.ReduceSumSquare" => Kind::SumSquare,
        "onnx.ReduceL1" => Kind::L1,
        "onnx.ReduceL2" => Kind::L2,
        _ => return None,
    };
    let x = data.operand(0)?;
    let elem = m.ty(x).elem().and_then(pointwise::register)?;
    let pools = data.name.as_str().ends_with("Pool");
    let plain = matches!(kind, Kind::Sum | Kind::Max | Kind::Min) && !pools;
    let shape = Size::shape(m.ty(x))?;
    let rank = shape.len() as i64;
    let given = match (data.operand(1), data.attrs.get("axes")) {
        // A pool over no cells is an error.
        _ if pools => (2..rank).filter(|&i| shape[i as usize] != Size::Known(0)).collect(),
        (Some(v), _) => Tensor::from_const(&m.consts[m.const_of(v)?]).ok()?.to_i64().ok()?.into_owned(),
        (None, Some(Attr::Ints(axes))) => axes.clone(),
        (None, Some(_)) => return None,
        (None, None) => Vec::new(),
    };
    let all = given.is_empty() && !pools && data.attrs.int("noop_with_empty_axes").unwrap_or(0) == 0;
    let goes = |i: usize| all || given.iter().any(|&a| a == i as i64 || a + rank == i as i64);
    let gone: Vec<usize> = (0..shape.len()).filter(|&i| goes(i)).collect();
    let (&first, &last) = (gone.first()?, gone.last()?);
    let whole = (!pools || gone.len() + 2 == shape.len())
        && (first..=last).all(|i| goes(i) || shape[i] == Size::Known(1));
    let float = elem == Scalar::F32;
    Size::shape(m.ty(data.result(0)?))?;
    ((float || (plain && matches!(elem, Scalar::I32 | Scalar::I64))) && whole).then(|| Form {
        kind,
        elem,
        outer: Size::product(&shape[..first]),
        length: Size::product(&shape[first..=last]),
        inner: Size::product(&shape[last + 1..]),
    })
}

impl Form {
    /// What nothing is reduced to.
    fn start(&self, b: &mut Body, lanes: usize) -> Val {
        let ty = Ty { elem: self.elem, lanes };
        let ends = match self.elem {
            Scalar::I32 => (i32::MIN.into(), i32::MAX.into()),
            _ => (i64::MIN, i64::MAX),
        };
        match self.kind {
            Kind::Max if self.elem == Scalar::F32 => b.splat(ty, f64::NEG_INFINITY),
            Kind::Min if self.elem == Scalar::F32 => b.splat(ty, f64::INFINITY),
            Kind::Max => b.integers(ty, ends.0),
            Kind::Min => b.integers(ty, ends.1),
            _ => b.splat(ty, 0.0),
        }
    }

    /// One more element.
    fn step(&self, b: &mut Body, all: Val, v: Val) -> Val {
        let v = match self.kind {
            Kind::SumSquare | Kind::L2 => b.mul(v, v),
            Kind::L1 => b.unary("math.absf", v),
            _ => v,
        };
        self.join(b, all, v)
    }

    /// Two parts together.
    fn join(&self, b: &mut Body, x: Val, y: Val) -> Val {
        match self.kind {
            Kind::Max => b.max(x, y),
            Kind::Min => b.min(x, y),
            _ => b.add(x, y),
        }
    }

    fn finish(&self, b: &mut Body, all: Val, length: Val) -> Val {
        match self.kind {
            Kind::Mean => {
                let n = b.cast(length, Scalar::F32);
                let n = b.spread(n, all.ty.lanes);
                b.div(all, n)
            }
            Kind::L2 => b.unary("math.sqrt", all),
            _ => all,
        }
    }

    fn load(&self, b: &mut Body, x: Val, at: Val, lanes: usize) -> Val {
        let p = b.element(x, at, self.elem);
        b.load(p, Ty { elem: self.elem, lanes })
    }

    /// Element `from` of `x` and those after it, up to `to`.
    fn row(&self, b: &mut Body, x: Val, from: Val, to: Val) -> Val {
        let lanes = b.target.lanes();
        let start = self.start(b, lanes);
        let turns = b.whole_steps(from, to, CHAINS * lanes);
        let chains = b.repeat(from, turns, CHAINS * lanes, &[start; CHAINS], |b, i, chains| {
            let each = chains.iter().enumerate().map(|(c, &all)| {
                let offset = b.size(c * lanes);
                let at = b.add(i, offset);
                let v = self.load(b, x, at, lanes);
                self.step(b, all, v)
            });
            each.collect()
        });
        let all = chains.into_iter().reduce(|s, t| self.join(b, s, t)).expect("four chains");
        let vectors = b.whole_steps(turns, to, lanes);
        let all = b.repeat(turns, vectors, lanes, &[all], |b, i, all| {
            let v = self.load(b, x, i, lanes);
            vec![self.step(b, all[0], v)]
        });
        let all = b.fold(all[0], |b, s, t| self.join(b, s, t));
        b.repeat(vectors, to, 1, &[all], |b, i, all| {
            let v = self.load(b, x, i, 0);
            vec![self.step(b, all[0], v)]
        })[0]
    }
}

/// The kernel. Buffers: X, the result. Sizes: how many elements become one, and how many dims follow have. A unit is one result,
/// or 256 of a line of them.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let form = form(m, op)?;
    let rows = form.inner == Size::Known(1);
    let mut lowered = Lowered::default();
    let buffers = vec![fused.buffer(m.ops[op].operand(0)?, &mut lowered.blobs)?, Buffer::Result(0)];
    let kernel = Kernel::new(target, "reduce", |b, a| {
        let (x, y) = (a.buffer(b, 0), a.buffer(b, 1));
        let (length, inner) = (a.dim(b, 0), a.dim(b, 1));
        if rows {
            return b.each(a.begin, a.end, 1, |b, unit| {
                let from = b.mul(unit, length);
                let to = b.add(from, length);
                let all = form.row(b, x, from, to);
                let all = form.finish(b, all, length);
                let p = b.element(y, unit, form.elem);
                b.store(all, p);
            });
        }
        let (columns, more) = (b.size(COLUMNS), b.size(COLUMNS - 1));
        let blocks = b.add(inner, more);
        let blocks = b.div(blocks, columns);
        b.each(a.begin, a.end, 1, |b, unit| {
            let (outer, block) = (b.div(unit, blocks), b.rem(unit, blocks));
            let from = b.mul(block, columns);
            let to = b.add(from, columns);
            let to = b.min(to, inner);
            let size = b.mul(length, inner);
            let start = b.mul(outer, size);
            let line = b.mul(outer, inner);
            elementwise::vector_loop(b, from, to, b.target.lanes(), |b, column, lanes| {
                let (zero, none) = (b.size(0), form.start(b, lanes));
                let first = b.add(start, column);
                let all = b.repeat(zero, length, 1, &[none], |b, i, all| {
                    let at = b.mul(i, inner);
                    let at = b.add(first, at);
                    let v = form.load(b, x, at, lanes);
                    vec![form.step(b, all[0], v)]
                });
                let all = form.finish(b, all[0], length);
                let at = b.add(line, column);
                let p = b.element(y, at, form.elem);
                b.store(all, p);
            });
        });
    });
    let units = match rows {
        true => form.outer,
        false => form.outer * form.inner.clone().div_up(COLUMNS as u64),
    };
    let work = if rows { form.length.clone() } else { form.length.clone() * COLUMNS.into() }.div_up(8);
    lowered.steps.push(Step { kernel, buffers, dims: vec![form.length, form.inner], units, work });
    Some(lowered)
}
