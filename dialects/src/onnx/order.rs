//! Ops along an axis that are no reductions: CumSum, CumProd, TopK, Trilu, OneHot, NonZero.

use super::gather::place;
use super::util::{axis, fact, moved, one, wrong_elem};
use crate::ir::{Dim, Elem};
use crate::kernels::strided::count;
use crate::map_data;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use std::cmp::Ordering;

/// The sizes before, along and after an axis.
pub(super) fn around(shape: &[usize], i: usize) -> (usize, usize, usize) {
    (shape[..i].iter().product(), shape[i], shape[i + 1..].iter().product())
}

/// Sums, or what else `add` makes from `zero` on, of what comes before each element along the axis, itself included
/// unless `exclusive`.
fn cumulate<T: Copy>(
    x: &[T],
    (outer, n, inner): (usize, usize, usize),
    (exclusive, reverse): (bool, bool),
    zero: T,
    add: impl Fn(T, T) -> T,
) -> Vec<T> {
    let mut out = vec![zero; x.len()];
    for o in 0..outer {
        for i in 0..inner {
            let mut sum = zero;
            for step in 0..n {
                let j = if reverse { n - 1 - step } else { step };
                let at = (o * n + j) * inner + i;
                let next = add(sum, x[at]);
                out[at] = if exclusive { sum } else { next };
                sum = next;
            }
        }
    }
    out
}

fn cumulative(cx: &EvalCx, product: bool) -> Evaluated {
    let (t, along) = (cx.input(0)?, cx.input(1)?.to_i64()?);
    let &[along] = &along[..] else { return Err(OpError::invalid("the axis is not one number")) };
    let dims = around(t.shape(), axis(along, t.rank())?);
    let how = (cx.int_or("exclusive", 0) != 0, cx.int_or("reverse", 0) != 0);
    macro_rules! ints {
        ($v:expr, $t:ty) => {
            match product {
                true => cumulate($v, dims, how, 1, <$t>::wrapping_mul),
                false => cumulate($v, dims, how, 0, <$t>::wrapping_add),
            }
            .into()
        };
    }
    let data: Data = match t.data() {
        Data::F64(v) if product => cumulate(v, dims, how, 1.0, |a, b| a * b).into(),
        Data::F64(v) => cumulate(v, dims, how, 0.0, |a, b| a + b).into(),
        Data::I64(v) => ints!(v, i64),
        Data::I32(v) => ints!(v, i32),
        Data::U64(v) => ints!(v, u64),
        Data::U32(v) => ints!(v, u32),
        _ => {
            let v = t.to_f32()?;
            let values = match product {
                true => cumulate(&v, dims, how, 1.0, |a, b| a * b),
                false => cumulate(&v, dims, how, 0.0, |a, b| a + b),
            };
            return cx.one(Tensor::from_f32(t.elem(), t.shape(), values)?);
        }
    };
    cx.one(Tensor::new(t.shape(), data)?)
}

/// An order of all values: NaN is equal to itself and greater than any number. Sorting needs one.
pub(super) fn total<T: PartialOrd>(a: &T, b: &T) -> Ordering {
    #[allow(clippy::eq_op)]
    let nan = |x: &T| x != x;
    a.partial_cmp(b).unwrap_or_else(|| nan(a).cmp(&nan(b)))
}

/// The places of the `k` first elements of each line, in the order asked for; equal elements in their own order.
fn top_places<T: PartialOrd>(
    x: &[T],
    (outer, n, inner): (usize, usize, usize),
    k: usize,
    largest: bool,
) -> Vec<usize> {
    let mut out = vec![0; outer * k * inner];
    for o in 0..outer {
        for i in 0..inner {
            let value = |j: usize| &x[(o * n + j) * inner + i];
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| {
                let by = total(value(a), value(b));
                if largest { by.reverse() } else { by }
            });
            for (rank, &j) in order[..k].iter().enumerate() {
                out[(o * k + rank) * inner + i] = j;
            }
        }
    }
    out
}

/// Values and their places; `k` is an attribute before opset 10.
fn top_k(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let i = axis(cx.int_or("axis", -1), t.rank())?;
    let k = match cx.attrs.int("k") {
        Some(k) => k,
        None => *cx.input(1)?.to_i64()?.first().ok_or_else(|| OpError::invalid("k is empty"))?,
    };
    let dims @ (outer, n, inner) = around(t.shape(), i);
    let k = usize::try_from(k).ok().filter(|&k| k <= n);
    let k = k.ok_or_else(|| OpError::Invalid(format!("k is out of range for a dim of {n}")))?;
    let largest = cx.int_or("largest", 1) != 0;
    let places = match t.data() {
        Data::F64(v) => top_places(v, dims, k, largest),
        Data::F32(v) => top_places(v, dims, k, largest),
        Data::U64(v) => top_places(v, dims, k, largest),
        Data::F16(v) => top_places(v, dims, k, largest),
        Data::BF16(v) => top_places(v, dims, k, largest),
        _ => top_places(&t.to_i64()?, dims, k, largest),
    };
    let mut shape = t.shape().to_vec();
    shape[i] = k;
    fn pick<T: Clone>(v: &[T], places: &[usize], n: usize, k: usize, inner: usize) -> Vec<T> {
        let at = |(p, &j): (usize, &usize)| v[(p / inner / k * n + j) * inner + p % inner].clone();
        places.iter().enumerate().map(at).collect()
    }
    debug_assert_eq!(places.len(), outer * k * inner);
    let values = moved(t, &shape, map_data!(t.data(), v => pick(v, &places, n, k, inner)))?.remove(0);
    let places: Vec<i64> = places.into_iter().map(|p| p as i64).collect();
    Ok(vec![values, Tensor::new(&shape, places)?.into()])
}

fn infer_top_k(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let dims = cx.dims(0).map(|d| {
        let i = axis(cx.attrs.int("axis").unwrap_or(-1), d.len())?;
        let mut dims = d.to_vec();
        dims[i] = match cx.attrs.int("k") {
            Some(k) => Dim::Known(k),
            None => cx.sym(1).and_then(|s| s.first().cloned()).unwrap_or_default(),
        };
        Ok::<_, OpError>(dims)
    });
    let dims = dims.transpose()?;
    Ok(vec![fact(elem, dims.clone(), None), fact(Elem::I64, dims, None)])
}

/// The upper or lower triangle of the last two dims; the rest becomes zero.
fn trilu(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let &[.., rows, cols] = t.shape() else { return Err(OpError::invalid("expected two dims or more")) };
    let k = cx.opt(1)?.map(Tensor::to_i64).transpose()?.and_then(|v| v.first().copied()).unwrap_or(0);
    let upper = cx.int_or("upper", 1) != 0;
    fn cut<T: Clone + Default>(v: &[T], keep: impl Fn(usize) -> bool) -> Vec<T> {
        v.iter().enumerate().map(|(i, x)| if keep(i) { x.clone() } else { T::default() }).collect()
    }
    let keep = |i: usize| {
        let diagonal = (i % cols) as i64 - (i / cols % rows) as i64;
        if upper { diagonal >= k } else { diagonal <= k }
    };
    moved(t, t.shape(), map_data!(t.data(), v => cut(v, keep)))
}

fn one_hot(cx: &EvalCx) -> Evaluated {
    let (indices, values) = (cx.input(0)?, cx.input(2)?);
    let depth = super::cast::convert(cx.input(1)?, Elem::I64, true)?;
    let depth = match depth.i64s()? {
        &[d] => usize::try_from(d).map_err(|_| OpError::invalid("negative depth"))?,
        _ => return Err(OpError::invalid("the depth is not one number")),
    };
    if values.len() != 2 {
        return Err(OpError::Invalid(format!("expected the values off and on, found {}", values.len())));
    }
    let i = axis(cx.int_or("axis", -1), indices.rank() + 1)?;
    let mut shape = indices.shape().to_vec();
    shape.insert(i, depth);
    let total = count(&shape)?;
    let inner: usize = shape[i + 1..].iter().product();
    let wanted = super::cast::convert(indices, Elem::I64, true)?;
    // An index out of range is on nowhere.
    let hot: Vec<Option<usize>> = wanted.i64s()?.iter().map(|&n| place(n, depth).ok()).collect();
    let on = |at: usize| hot[at / inner / depth * inner + at % inner] == Some(at / inner % depth);
    fn spread<T: Clone>(v: &[T], total: usize, on: impl Fn(usize) -> bool) -> Vec<T> {
        (0..total).map(|at| v[usize::from(on(at))].clone()).collect()
    }
    moved(values, &shape, map_data!(values.data(), v => spread(v, total, on)))
}

fn infer_one_hot(cx: &InferCx) -> Inferred {
    let dims = cx.dims(0).map(|d| {
        let i = axis(cx.attrs.int("axis").unwrap_or(-1), d.len() + 1)?;
        let mut dims = d.to_vec();
        dims.insert(i, cx.sym(1).and_then(|s| s.first().cloned()).unwrap_or_default());
        Ok::<_, OpError>(dims)
    });
    one(cx.elem(2), dims.transpose()?)
}

/// The places of elements that are not zero, `[rank, n]`.
fn non_zero(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let hits: Vec<bool> = match t.data() {
        Data::Str(_) | Data::C64(_) | Data::C128(_) => return Err(wrong_elem("a numeric type", t)),
        _ => super::cast::convert(t, Elem::Bool, true)?.bools()?.to_vec(),
    };
    let places: Vec<usize> = (0..t.len()).filter(|&i| hits[i]).collect();
    let mut out = Vec::with_capacity(t.rank() * places.len());
    for d in 0..t.rank() {
        let (_, n, inner) = around(t.shape(), d);
        out.extend(places.iter().map(|p| (p / inner % n) as i64));
    }
    cx.one(Tensor::new(&[t.rank(), places.len()], out)?)
}

fn infer_non_zero(cx: &InferCx) -> Inferred {
    let rank = cx.dims(0).map_or(Dim::Unknown, |d| Dim::from(d.len()));
    one(Some(Elem::I64), Some(vec![rank, Dim::Unknown]))
}

/// Ops along an axis.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.CumSum",
        operands: (2, 2),
        infer: super::util::same_type,
        eval: |cx| cumulative(cx, false),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.CumProd",
        operands: (2, 2),
        infer: super::util::same_type,
        eval: |cx| cumulative(cx, true),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.TopK",
        operands: (1, 2),
        results: (1, 2),
        infer: infer_top_k,
        eval: top_k,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Trilu", operands: (1, 2), infer: super::util::same_type, eval: trilu, ..OpDef::NEW },
    OpDef { name: "onnx.OneHot", operands: (3, 3), infer: infer_one_hot, eval: one_hot, ..OpDef::NEW },
    OpDef { name: "onnx.NonZero", infer: infer_non_zero, eval: non_zero, ..OpDef::NEW },
];
