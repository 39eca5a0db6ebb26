//! Rotary position embedding: pairs of elements of each head turned by the angle of their position. A unit is one position
//! of one batch, all heads of it.

use super::heads::{Heads, Strides, parts};
use super::{Args, Buffer, Kernel, Lowered, Step, report};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op, Value};
use runtime::Fault;

/// Which row of the caches belongs to a position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rows {
    /// That at its place in `[batch, positions]`.
    InOrder,
    /// That which `[batch, positions]` integers say.
    Each(Scalar),
    /// One integer and the rows after it.
    From(Scalar),
}

/// What the text of the kernel depends on.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// Elements of a head.
    size: usize,
    /// Pairs of it that turn: its first elements, the others stay.
    half: usize,
    /// Whether pairs are neighbours, rather than the elements of two halves.
    interleaved: bool,
    rows: Rows,
}

/// An op, taken apart.
struct Problem {
    form: Form,
    x: Heads,
    /// Cosines and sines, `[rows, half]`.
    caches: [Value; 2],
    /// Rows of the caches.
    count: Size,
    positions: Option<Value>,
}

impl Problem {
    fn of(m: &Module, op: Op) -> Option<Problem> {
        let data = &m.ops[op];
        let microsoft = data.is("com.microsoft.RotaryEmbedding");
        let int = |name: &str| data.attrs.int(name).unwrap_or(0);
        let caches = if microsoft { [2, 3] } else { [1, 2] };
        let caches = [data.operand(caches[0])?, data.operand(caches[1])?];
        let positions = if microsoft { Some(data.operand(1)?) } else { data.operand(3) };
        let shape = Size::shape(m.ty(caches[0]))?;
        let floats = caches.iter().all(|&v| m.ty(v).elem() == Some(Elem::F32));
        if !floats || Size::shape(m.ty(caches[1]))? != shape || int("is_packed_batching") != 0 {
            return None;
        }
        let (width, lead) = shape.split_last()?;
        let half = usize::try_from(width.known()?).ok().filter(|&n| n > 0)?;
        let x = data.operand(0)?;
        let hidden = m.ty(x).dims()?.last()?.known()?;
        let heads = match int("num_heads") {
            0 if microsoft => hidden / (2 * half as i64),
            n => n,
        };
        let x = Heads::of(m, x, Some(heads))?;
        let turned = match int("rotary_embedding_dim") {
            _ if microsoft => 2 * half,
            0 => x.size,
            n => usize::try_from(n).ok()?,
        };
        let integers = |v: Value| match m.ty(v).elem()? {
            Elem::I64 => Some(Scalar::I64),
            Elem::I32 => Some(Scalar::I32),
            _ => None,
        };
        let grid = [x.batch.clone(), x.positions.clone()];
        let rows = match positions {
            None if lead == grid => Rows::InOrder,
            None => return None,
            Some(_) if lead.len() != 1 => return None,
            Some(v) => match Size::shape(m.ty(v))? {
                s if s == grid => Rows::Each(integers(v)?),
                s if microsoft && s == [Size::Known(1)] => Rows::From(integers(v)?),
                _ => return None,
            },
        };
        let interleaved = int("interleaved") != 0;
        let form = Form { size: x.size, half, interleaved, rows };
        (turned == 2 * half && turned <= x.size).then(|| Problem {
            form,
            x,
            caches,
            count: Size::product(lead),
            positions,
        })
    }
}

/// f32, of heads whose size is known.
pub fn supports(m: &Module, op: Op) -> bool {
    Problem::of(m, op).is_some()
}

/// The kernel. Buffers: X, cosines, sines, Y, and positions with the word for faults if there are any. Sizes: positions, heads, rows of the caches,
/// strides of X and of Y.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let Problem { form, x, caches, count, positions } = Problem::of(m, op)?;
    let mut lowered = Lowered::default();
    let mut buffers = vec![fused.buffer(m.ops[op].operand(0)?, &mut lowered.blobs)?];
    for v in caches {
        buffers.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    buffers.push(Buffer::Result(0));
    if let Some(v) = positions {
        buffers.push(fused.buffer(v, &mut lowered.blobs)?);
        buffers.push(Buffer::Fault);
    }
    let mut dims = vec![x.positions.clone(), x.heads.into(), count];
    dims.extend(x.access.dims().into_iter().chain(x.access.dims()));
    let work = (x.heads * x.size / 4 + 1).into();
    let units = x.batch * x.positions;
    lowered.steps.push(Step { kernel: form.kernel(target), buffers, dims, units, work });
    Some(lowered)
}

impl Form {
    fn kernel(&self, target: &Target) -> Kernel {
        let lanes = target.lanes();
        Kernel::new(target, "rotary", |b, a| {
            let (x, y) = (a.buffer(b, 0), a.buffer(b, 3));
            let (positions, heads, count) = (a.dim(b, 0), a.dim(b, 1), a.dim(b, 2));
            let (from, to) = (Strides::of(b, a, 3), Strides::of(b, a, 6));
            let zero = b.size(0);
            b.each(a.begin, a.end, 1, |b, unit| {
                let (batch, position) = (b.div(unit, positions), b.rem(unit, positions));
                let row = self.row(b, a, unit, position);
                let turned = |b: &mut Body| {
                    let half = b.size(self.half);
                    let at = b.mul(row, half);
                    let angles = [1, 2].map(|i| {
                        let cache = a.buffer(b, i);
                        b.element(cache, at, Scalar::F32)
                    });
                    b.each(zero, heads, 1, |b, head| {
                        let x = from.row(b, x, [batch, head, position]);
                        let y = to.row(b, y, [batch, head, position]);
                        self.turn(b, lanes, angles, x, y);
                    });
                };
                if self.rows == Rows::InOrder {
                    return turned(b);
                }
                let (first, last) = (b.cmp(Cmp::Ge, row, zero), b.cmp(Cmp::Lt, row, count));
                let there = b.and(first, last);
                b.when_else(there, turned, |b| {
                    let fault = a.buffer(b, 5);
                    report(b, fault, Fault::Index);
                });
            });
        })
    }

    /// The row of the caches, which may lack it.
    fn row(&self, b: &mut Body, a: &Args, unit: Val, position: Val) -> Val {
        let given = |b: &mut Body, at: Val, elem: Scalar| {
            let p = a.buffer(b, 4);
            let p = b.element(p, at, elem);
            let row = b.load(p, scalar(elem));
            b.cast(row, Scalar::I64)
        };
        match self.rows {
            Rows::InOrder => unit,
            Rows::Each(elem) => given(b, unit, elem),
            Rows::From(elem) => {
                let zero = b.size(0);
                let first = given(b, zero, elem);
                b.add(first, position)
            }
        }
    }

    /// One head from `x` to `y`.
    fn turn(&self, b: &mut Body, lanes: usize, angles: [Val; 2], x: Val, y: Val) {
        let load = |b: &mut Body, p: Val, there: usize| b.load_some(p, vector(lanes, Scalar::F32), there);
        let pairs = |b: &mut Body, i: Val, there: usize| {
            let [c, s] = angles.map(|p| {
                let p = b.element(p, i, Scalar::F32);
                load(b, p, there)
            });
            // Where the first and the second vector lie, and how much of each is there.
            let (stride, there) = match self.interleaved {
                true => (lanes, [(2 * there).min(lanes), (2 * there).saturating_sub(lanes)]),
                false => (self.half, [there; 2]),
            };
            let i = if self.interleaved { b.add(i, i) } else { i };
            let places = |b: &mut Body, p: Val| {
                let first = b.element(p, i, Scalar::F32);
                [first, b.at_const(first, 4 * stride)]
            };
            let from = places(b, x);
            let (u, v) = (load(b, from[0], there[0]), load(b, from[1], there[1]));
            let (p, q) = match self.interleaved {
                true => {
                    let every = |from: usize| (from..2 * lanes).step_by(2).collect::<Vec<_>>();
                    (b.shuffle(u, v, &every(0)), b.shuffle(u, v, &every(1)))
                }
                false => (u, v),
            };
            let difference = {
                let (cp, sq) = (b.mul(c, p), b.mul(s, q));
                b.sub(cp, sq)
            };
            let sum = {
                let (sp, cq) = (b.mul(s, p), b.mul(c, q));
                b.add(sp, cq)
            };
            let (u, v) = match self.interleaved {
                true => {
                    let zip = |from: usize| {
                        (from..from + lanes / 2).flat_map(|i| [i, lanes + i]).collect::<Vec<_>>()
                    };
                    (b.shuffle(difference, sum, &zip(0)), b.shuffle(difference, sum, &zip(lanes / 2)))
                }
                false => (difference, sum),
            };
            let to = places(b, y);
            b.store_some(u, to[0], there[0]);
            b.store_some(v, to[1], there[1]);
        };
        parts(b, 0, self.half, lanes, pairs);
        parts(b, 2 * self.half, self.size, lanes, |b, i, there| {
            let from = b.element(x, i, Scalar::F32);
            let v = load(b, from, there);
            let to = b.element(y, i, Scalar::F32);
            b.store_some(v, to, there);
        });
    }
}
