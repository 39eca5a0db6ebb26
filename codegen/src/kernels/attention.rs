//! Attention: `softmax(softcap(Q K^T scale) + mask) V` over heads, of com.microsoft.MultiHeadAttention and onnx.Attention.
//!
//! Past keys and values are put before the new ones first, where there are any or the whole is a result. The product is in
//! [`attention_tiles`](super::attention_tiles).

use super::attention_tiles::{Form, Mask, ROWS, attention};
use super::heads::{Access, Heads, Strides, parts};
use super::{Buffer, Kernel, Lowered, Step, elementwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Scalar, Ty, vector};
use dialects::ir::{Elem, Module, Op, Value};

/// Where an op has what.
struct Layout {
    /// Attributes: numbers of heads of Q, and of K and V; whether a query sees no key behind its own position.
    q_heads: &'static str,
    kv_heads: &'static str,
    causal: &'static str,
    /// Operands: the mask, past keys and values.
    mask: usize,
    past: [usize; 2],
    /// Operands that no kernel knows: biases of Q, K and V, padding, caches in buffers of fixed length.
    foreign: &'static [usize],
}

const MULTI_HEAD: Layout = Layout {
    q_heads: "num_heads",
    kv_heads: "num_heads",
    causal: "unidirectional",
    mask: 5,
    past: [6, 7],
    foreign: &[3, 4, 8, 9],
};

const ATTENTION: Layout = Layout {
    q_heads: "q_num_heads",
    kv_heads: "kv_num_heads",
    causal: "is_causal",
    mask: 3,
    past: [4, 5],
    foreign: &[6],
};

/// Elements of a head beyond which tiles would take too much of the stack.
const LARGEST: usize = 512;

/// An op, taken apart.
struct Problem {
    form: Form,
    q: Heads,
    k: Heads,
    v: Heads,
    /// Keys and values before the new ones, and how many.
    past: Option<[Value; 2]>,
    before: Size,
    /// The mask and its strides between batches, heads and rows.
    mask: Option<(Value, [Size; 3])>,
    /// Where the result lies.
    y: Access,
}

impl Problem {
    fn of(m: &Module, op: Op) -> Option<Problem> {
        let data = &m.ops[op];
        let microsoft = data.is("com.microsoft.MultiHeadAttention");
        let layout = if microsoft { MULTI_HEAD } else { ATTENTION };
        let attrs = &data.attrs;
        let windowed =
            ["left_window_size", "right_window_size"].iter().any(|n| attrs.int(n).is_some_and(|w| w >= 0));
        let known = |v: Value| Size::shape(m.ty(v)).is_some() && m.ty(v).elem() == Some(Elem::F32);
        if layout.foreign.iter().any(|&i| data.operand(i).is_some())
            || windowed
            || data.result(3).is_some()
            || !data.results.iter().flatten().all(|&v| known(v))
        {
            return None;
        }
        let heads = |i: usize, count: &str| Heads::of(m, data.operand(i)?, attrs.int(count));
        let (q, k, v) = (heads(0, layout.q_heads)?, heads(1, layout.kv_heads)?, heads(2, layout.kv_heads)?);
        let side_by_side = m.ty(data.operand(0)?).dims()?.len() == 3;
        let fits = k.batch == q.batch
            && (&v.batch, v.heads, &v.positions) == (&k.batch, k.heads, &k.positions)
            && k.size == q.size
            && k.heads > 0
            && q.heads.is_multiple_of(k.heads)
            && (1..=LARGEST).contains(&q.size)
            && (1..=LARGEST).contains(&v.size)
            && (side_by_side || !microsoft);
        if !fits {
            return None;
        }
        let (past, before) = match layout.past.map(|i| data.operand(i)) {
            [None, None] => (None, Size::Known(0)),
            [Some(pk), Some(pv)] => (Some([pk, pv]), Self::before(m, [pk, pv], [&k, &v])?),
            _ => return None,
        };
        let keys = before.clone() + k.positions.clone();
        let grid = [q.batch.clone(), q.heads.into(), q.positions.clone(), keys];
        let (mask, form_mask) = match data.operand(layout.mask) {
            None => (None, None),
            Some(v) => {
                let (strides, mask) = Self::mask(m, v, &grid, microsoft)?;
                (Some((v, strides)), Some(mask))
            }
        };
        let scale = attrs.float("scale").filter(|&s| !microsoft || s != 0.0);
        let form = Form {
            size: q.size,
            value_size: v.size,
            scale: scale.unwrap_or(1.0 / (q.size as f32).sqrt()),
            softcap: attrs.float("softcap").filter(|&c| !microsoft && c > 0.0),
            causal: attrs.int(layout.causal).unwrap_or(0) != 0,
            mask: form_mask,
        };
        let y = if side_by_side { Access::side_by_side } else { Access::heads_first };
        let y = y(&q.heads.into(), &q.positions, v.size);
        Some(Problem { form, q, k, v, past, before, mask, y })
    }

    /// The number of past positions.
    fn before(m: &Module, past: [Value; 2], new: [&Heads; 2]) -> Option<Size> {
        let [k, v] = past.map(|v| Heads::of(m, v, None));
        let (k, v) = (k?, v?);
        let fits = [&k, &v]
            .into_iter()
            .zip(new)
            .all(|(old, new)| (&old.batch, old.heads, old.size) == (&new.batch, new.heads, new.size));
        (fits && k.positions == v.positions).then_some(k.positions)
    }

    /// Strides of a mask over batches, heads, rows and keys, 0 along dims of one element.
    fn mask(m: &Module, v: Value, grid: &[Size; 4], microsoft: bool) -> Option<([Size; 3], Mask)> {
        let ty = m.ty(v);
        let bools = match ty.elem()? {
            Elem::F32 => false,
            Elem::Bool if !microsoft => true,
            _ => return None,
        };
        let shape = Size::shape(ty)?;
        let lead = 4usize.checked_sub(shape.len())?;
        if lead > 0 && (microsoft || shape.is_empty()) {
            return None;
        }
        let mut whole = vec![Size::Known(1); lead];
        whole.extend(shape);
        let one = Size::Known(1);
        let meets = whole.iter().zip(grid).take(3).all(|(found, size)| *found == one || found == size);
        // One column for all keys. From opset 24 on, and in the other dialect, it would be one for the first.
        let spread = whole[3] == one && !microsoft && m.opset("onnx") < 24;
        if !meets || !(whole[3] == grid[3] || spread) {
            return None;
        }
        let stride = |i: usize| match whole[i] == one {
            true => Size::Known(0),
            false => Size::product(&whole[i + 1..]),
        };
        Some(([stride(0), stride(1), stride(2)], Mask { bools, along: whole[3] != one }))
    }
}

/// f32, of a known number of heads of known size, with a mask of f32 or bools; no biases of Q, K and V, no padding masks, no
/// windows, and no scores as a result.
pub fn supports(m: &Module, op: Op) -> bool {
    Problem::of(m, op).is_some()
}

/// The kernels. Keys and values are joined where that is asked for; then rows of Q meet them.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let data = &m.ops[op];
    let p = Problem::of(m, op)?;
    let mut lowered = Lowered::default();
    let result = |i: usize| {
        let at = fused.results().iter().position(|&v| Some(v) == data.result(i));
        at.map(Buffer::Result)
    };
    let q = fused.buffer(data.operand(0)?, &mut lowered.blobs)?;
    let mut sources = Vec::new();
    for (i, new) in [&p.k, &p.v].into_iter().enumerate() {
        let own = fused.buffer(data.operand(1 + i)?, &mut lowered.blobs)?;
        let past = match p.past {
            Some(past) => Some(fused.buffer(past[i], &mut lowered.blobs)?),
            None => None,
        };
        sources.push(match (past, result(1 + i)) {
            (None, None) => (own, new.access.clone()),
            (past, whole) => joined(&mut lowered, target, new, (past, own, whole), &p.before),
        });
    }
    let keys = p.before.clone() + p.k.positions.clone();
    let mut dims: Vec<Size> = vec![p.k.heads.into(), p.q.positions.clone(), (p.q.heads / p.k.heads).into()];
    dims.extend([keys.clone(), p.before.clone()]);
    let accesses = [&p.q.access, &sources[0].1, &sources[1].1, &p.y];
    dims.extend(accesses.into_iter().flat_map(Access::dims));
    let mut buffers = vec![q, sources[0].0.clone(), sources[1].0.clone(), result(0)?];
    if let Some((v, strides)) = p.mask {
        buffers.push(fused.buffer(v, &mut lowered.blobs)?);
        dims.extend(strides);
    }
    let rows = p.q.positions.clone() * (p.q.heads / p.k.heads).into();
    let units = p.q.batch.clone() * p.k.heads.into() * rows.clone().div_up(ROWS as u64);
    let work = rows * keys * ((p.form.size + p.form.value_size) / 32 + 1).into();
    lowered.steps.push(Step { kernel: attention(target, &p.form), buffers, dims, units, work });
    Some(lowered)
}

/// The step that puts `own` behind `past`, into `whole` or memory of its own; and where all of it lies then.
fn joined(
    lowered: &mut Lowered,
    target: &Target,
    new: &Heads,
    (past, own, whole): (Option<Buffer>, Buffer, Option<Buffer>),
    before: &Size,
) -> (Buffer, Access) {
    let all = before.clone() + new.positions.clone();
    let access = Access::heads_first(&new.heads.into(), &all, new.size);
    let whole = whole.unwrap_or_else(|| {
        lowered.temps.push(new.batch.clone() * access.batch.clone() * 4.into());
        Buffer::Temp(lowered.temps.len() - 1)
    });
    let mut dims = vec![new.heads.into(), before.clone(), new.positions.clone()];
    dims.extend(new.access.dims());
    let kernel = join(target, new.size, past.is_some());
    let buffers = [Some(own), Some(whole.clone()), past].into_iter().flatten().collect();
    let units = new.batch.clone() * new.heads.into();
    let work = (all * new.size.into()).div_up(8);
    lowered.steps.push(Step { kernel, buffers, dims, units, work });
    (whole, access)
}

/// Copies heads behind those of a cache. Buffers: the new ones, the whole, the cache if there is one. Sizes: heads, positions
/// of the cache, new ones, their strides. A unit is a head of a batch.
fn join(target: &Target, size: usize, cached: bool) -> Kernel {
    let lanes = target.lanes();
    Kernel::new(target, "join_heads", |b, a| {
        let (new, whole) = (a.buffer(b, 0), a.buffer(b, 1));
        let (heads, before, positions) = (a.dim(b, 0), a.dim(b, 1), a.dim(b, 2));
        let strides = Strides::of(b, a, 3);
        let (zero, width) = (b.size(0), b.size(size));
        let old = b.mul(before, width);
        let all = b.add(before, positions);
        let all = b.mul(all, width);
        b.each(a.begin, a.end, 1, |b, unit| {
            let (batch, head) = (b.div(unit, heads), b.rem(unit, heads));
            let at = b.mul(unit, all);
            let to = b.element(whole, at, Scalar::F32);
            if cached {
                let past = a.buffer(b, 2);
                let at = b.mul(unit, old);
                let from = b.element(past, at, Scalar::F32);
                elementwise::vector_loop(b, zero, old, lanes, |b, i, lanes| {
                    let (from, to) = (b.element(from, i, Scalar::F32), b.element(to, i, Scalar::F32));
                    let v = b.load(from, Ty { elem: Scalar::F32, lanes });
                    b.store(v, to);
                });
            }
            let to = b.element(to, old, Scalar::F32);
            b.each(zero, positions, 1, |b, position| {
                let from = strides.row(b, new, [batch, head, position]);
                let at = b.mul(position, width);
                let to = b.element(to, at, Scalar::F32);
                parts(b, 0, size, lanes, |b, i, there| {
                    let (from, to) = (b.element(from, i, Scalar::F32), b.element(to, i, Scalar::F32));
                    let v = b.load_some(from, vector(lanes, Scalar::F32), there);
                    b.store_some(v, to, there);
                });
            });
        });
    })
}
