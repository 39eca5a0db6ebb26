//! Attention: `softmax(softcap(Q K^T scale) + mask) V` over heads, of com.microsoft.MultiHeadAttention and onnx.Attention.
//!
//! Past keys and values are put before the new ones first, where there are any or the whole is a result. The product is in
//! [`attention_tiles`](super::attention_tiles).

use super::attention_tiles::{Form, Mask, ROWS, attention};
use super::heads::{Access, Heads};
use super::{Buffer, Lowered, Step, copy};
use crate::fuse::Fused;
use crate::layout::{self, Layout, View};
use crate::size::Size;
use crate::target::Target;
use dialects::ir::{Elem, Module, Op, Value};

/// Where an op has what.
struct Places {
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

const MULTI_HEAD: Places = Places {
    q_heads: "num_heads",
    kv_heads: "num_heads",
    causal: "unidirectional",
    mask: 5,
    past: [6, 7],
    foreign: &[3, 4, 8, 9],
};

const ATTENTION: Places = Places {
    q_heads: "q_num_heads",
    kv_heads: "kv_num_heads",
    causal: "is_causal",
    mask: 3,
    past: [4, 5],
    foreign: &[6],
};

/// Elements of a head beyond which tiles would take too much of the stack.
const LARGEST: usize = 256;

/// An op, taken apart.
struct Problem {
    form: Form,
    q: Heads,
    k: Heads,
    v: Heads,
    /// What Q, K and V are read from: views of other values where they can be.
    seen: [View; 3],
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
        let places = if microsoft { MULTI_HEAD } else { ATTENTION };
        let attrs = &data.attrs;
        let windowed =
            ["left_window_size", "right_window_size"].iter().any(|n| attrs.int(n).is_some_and(|w| w >= 0));
        let known = |v: Value| Size::shape(m.ty(v)).is_some() && m.ty(v).elem() == Some(Elem::F32);
        if places.foreign.iter().any(|&i| data.operand(i).is_some())
            || windowed
            || data.result(3).is_some()
            || !data.results.iter().flatten().all(|&v| known(v))
        {
            return None;
        }
        let heads = |i: usize, count: &str| Heads::of(m, data.operand(i)?, attrs.int(count));
        let (q, k, v) = (heads(0, places.q_heads)?, heads(1, places.kv_heads)?, heads(2, places.kv_heads)?);
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
        let (past, before) = match places.past.map(|i| data.operand(i)) {
            [None, None] => (None, Size::Known(0)),
            [Some(pk), Some(pv)] => (Some([pk, pv]), Self::before(m, [pk, pv], [&k, &v])?),
            _ => return None,
        };
        let keys = before.clone() + k.positions.clone();
        let grid = [q.batch.clone(), q.heads.into(), q.positions.clone(), keys];
        let (mask, form_mask) = match data.operand(places.mask) {
            None => (None, None),
            Some(v) => {
                let (strides, mask) = Self::mask(m, v, &grid, microsoft)?;
                (Some((v, strides)), Some(mask))
            }
        };
        // What a cache is joined to is copied as it is.
        let alone = past.is_none() && data.results.iter().skip(1).all(Option::is_none);
        let (q, k, v, seen) =
            Self::seen(m, [data.operand(0)?, data.operand(1)?, data.operand(2)?], [q, k, v], alone)?;
        let scale = attrs.float("scale").filter(|&s| !microsoft || s != 0.0);
        let form = Form {
            size: q.size,
            value_size: v.size,
            scale: scale.unwrap_or(1.0 / (q.size as f32).sqrt()),
            softcap: attrs.float("softcap").filter(|&c| !microsoft && c > 0.0),
            causal: attrs.int(places.causal).unwrap_or(0) != 0,
            mask: form_mask,
        };
        let y = if side_by_side { Access::side_by_side } else { Access::heads_first };
        let y = y(&q.heads.into(), &q.positions, v.size);
        Some(Problem { form, q, k, v, seen, past, before, mask, y })
    }

    /// Q, K and V through views, where heads can be read there.
    fn seen(
        m: &Module,
        values: [Value; 3],
        [q, k, v]: [Heads; 3],
        alone: bool,
    ) -> Option<(Heads, Heads, Heads, [View; 3])> {
        let as_is = |v: Value| {
            Some(View { root: v, layout: Layout::contiguous(&Size::shape(m.ty(v))?), ops: Vec::new() })
        };
        let through = |v: Value, heads: &Heads| {
            let view = layout::view(m, v)?;
            // Kernels are given where a buffer begins.
            let start = view.layout.offset == Size::Known(0);
            Some((heads.seen(&view.layout).filter(|_| start)?, view))
        };
        let (q, q_view) = match through(values[0], &q).filter(|(seen, _)| seen.heads == q.heads) {
            Some(seen) => seen,
            None => (q, as_is(values[0])?),
        };
        let both = || Some((through(values[1], &k)?, through(values[2], &v)?));
        let both = both().filter(|((k, _), (v, _))| alone && k.heads == v.heads);
        let ((k, k_view), (v, v_view)) = match both {
            Some(both) => both,
            None => ((k, as_is(values[1])?), (v, as_is(values[2])?)),
        };
        Some((q, k, v, [q_view, k_view, v_view]))
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

/// The views that Q, K and V are read through.
pub fn views(m: &Module, op: Op) -> Vec<View> {
    Problem::of(m, op).map_or(Vec::new(), |p| p.seen.into())
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
    let q = fused.buffer(p.seen[0].root, &mut lowered.blobs)?;
    let mut sources = Vec::new();
    for (i, new) in [&p.k, &p.v].into_iter().enumerate() {
        let own = fused.buffer(p.seen[1 + i].root, &mut lowered.blobs)?;
        let past = match p.past {
            Some(past) => Some(fused.buffer(past[i], &mut lowered.blobs)?),
            None => None,
        };
        sources.push(match (past, result(1 + i)) {
            (None, None) => (own, new.access.clone()),
            (past, whole) => {
                let own = (own, new.layout(&p.seen[1 + i].layout)?);
                joined(&mut lowered, target, new, (past, own, whole), &p.before)?
            }
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
    // Of as many rows as one unit has at most, or fewer: where there are more, all units are worth dividing.
    let work = rows * keys * ((p.form.size + p.form.value_size) / 32 + 1).into();
    lowered.steps.push(Step { kernel: attention(target, &p.form), buffers, dims, units, work });
    Some(lowered)
}

/// The steps that put `own` behind `past`, into `whole` or memory of its own; and where all of it lies then.
fn joined(
    lowered: &mut Lowered,
    target: &Target,
    new: &Heads,
    (past, own, whole): (Option<Buffer>, (Buffer, Layout), Option<Buffer>),
    before: &Size,
) -> Option<(Buffer, Access)> {
    let all = before.clone() + new.positions.clone();
    let access = Access::heads_first(&new.heads.into(), &all, new.size);
    let whole = whole.unwrap_or_else(|| {
        lowered.temps.push(new.batch.clone() * access.batch.clone() * 4.into());
        Buffer::Temp(lowered.temps.len() - 1)
    });
    let shape = |positions: &Size| [new.batch.clone(), new.heads.into(), positions.clone(), new.size.into()];
    let to = Layout::contiguous(&shape(&all));
    if let Some(past) = past {
        let from = Layout::contiguous(&shape(before));
        let to = to.sliced(2, Size::Known(0), before.clone())?;
        lowered.steps.push(copy::step(target, 4, (past, &from), (whole.clone(), &to))?);
    }
    let to = to.sliced(2, before.clone(), new.positions.clone())?;
    lowered.steps.push(copy::step(target, 4, (own.0, &own.1), (whole.clone(), &to))?);
    Some((whole, access))
}
