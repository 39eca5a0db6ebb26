//! Reductions: Reduce*, ArgMax, ArgMin. Axes are an attribute in older opsets and an operand in newer ones.
//!
//! Every result is one sequential (or fixed-lane) fold over its own elements. Half types are reduced in f32.

use super::util::{Ints, axes, axis, fact, infer_ints, ints_or, sym, wrong_elem};
use crate::ir::{Dim, Elem};
use crate::kernels::row;
use crate::kernels::strided::{CHUNK, gather, strides};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use rayon::prelude::*;
use std::borrow::Cow;

/// Which dims go: `None` keeps all, as `noop_with_empty_axes` asks for.
fn reduced(given: Option<&[i64]>, noop: bool, rank: usize) -> Result<Option<Vec<usize>>, OpError> {
    match given {
        Some([]) | None if noop => Ok(None),
        Some([]) | None => Ok(Some((0..rank).collect())),
        Some(v) => axes(v, rank).map(Some),
    }
}

/// The result's shape.
fn kept<T: Clone>(dims: &[T], gone: &[usize], keep: bool, one: T) -> Vec<T> {
    let all = dims.iter().enumerate();
    all.filter_map(|(i, d)| match gone.contains(&i) {
        true => keep.then(|| one.clone()),
        false => Some(d.clone()),
    })
    .collect()
}

/// `x` with the dims `gone` moved to the end: rows that each give one result, and their length.
fn lined_up<'a, T: Clone + Default + Send + Sync + 'static>(
    x: &'a [T],
    shape: &[usize],
    gone: &[usize],
) -> (Cow<'a, [T]>, usize) {
    let order: Vec<usize> = (0..shape.len())
        .filter(|i| !gone.contains(i))
        .chain((0..shape.len()).filter(|i| gone.contains(i)))
        .collect();
    let n = gone.iter().map(|&i| shape[i]).product();
    if order.iter().filter(|&&i| shape[i] != 1).is_sorted() {
        return (x.into(), n);
    }
    let own = strides(shape);
    let to: Vec<usize> = order.iter().map(|&i| shape[i]).collect();
    let steps: Vec<isize> = order.iter().map(|&i| own[i]).collect();
    (gather(x, &to, &steps, 0).into(), n)
}

/// `f` of each of `len` rows of `n` elements.
fn fold_rows<T: Sync, U: Clone + Default + Send>(
    x: &[T],
    n: usize,
    len: usize,
    f: impl Fn(&[T]) -> U + Sync,
) -> Vec<U> {
    let mut out = vec![U::default(); len];
    let per_task = (CHUNK / n.max(1)).max(1);
    out.par_chunks_mut(per_task).enumerate().for_each(|(task, out)| {
        for (i, o) in out.iter_mut().enumerate() {
            let at = (task * per_task + i) * n;
            *o = f(&x[at..at + n]);
        }
    });
    out
}

/// How one kind of reduction folds a row, for single, double and 64-bit integers.
struct Kind {
    single: fn(&[f32]) -> f32,
    double: fn(&[f64]) -> f64,
    int: Option<fn(&[i64]) -> i64>,
    /// Its fold over small contents.
    dim: fn(&Dim, &Dim) -> Dim,
}

fn eval(cx: &EvalCx, kind: Kind) -> Evaluated {
    let t = cx.input(0)?;
    let given = ints_or(cx, "axes", 1)?;
    let noop = cx.int_or("noop_with_empty_axes", 0) != 0;
    // Without axes every element is reduced alone: the fold still applies (a square stays to be taken).
    let gone = reduced(given.as_deref(), noop, t.rank())?.unwrap_or_default();
    let shape = kept(t.shape(), &gone, cx.int_or("keepdims", 1) != 0, 1);
    let len = shape.iter().product();
    let int = |t: &Tensor| -> Result<Vec<i64>, OpError> {
        let f = kind.int.ok_or_else(|| wrong_elem("a float type", t))?;
        let values = t.to_i64()?;
        let (x, n) = lined_up(&values, t.shape(), &gone);
        Ok(fold_rows(&x, n, len, f))
    };
    let nothing = gone.iter().any(|&i| t.shape()[i] == 0);
    // The largest or smallest of nothing is an end of the element type, whichever the fold was done in.
    macro_rules! narrow {
        ($wide:expr, $t:ty) => {{
            let end = |x: i64| match x {
                i64::MIN if nothing => <$t>::MIN,
                i64::MAX if nothing => <$t>::MAX,
                x => x as $t,
            };
            $wide.into_iter().map(end).collect::<Vec<$t>>().into()
        }};
    }
    let data: Data = match t.data() {
        Data::F64(v) => {
            let (x, n) = lined_up(v, t.shape(), &gone);
            fold_rows(&x, n, len, kind.double).into()
        }
        Data::F32(_) | Data::F16(_) | Data::BF16(_) => {
            let v = t.to_f32()?;
            let (x, n) = lined_up(&v, t.shape(), &gone);
            return cx.one(Tensor::from_f32(t.elem(), &shape, fold_rows(&x, n, len, kind.single))?);
        }
        Data::I64(_) => int(t)?.into(),
        Data::I32(_) => narrow!(int(t)?, i32),
        Data::I16(_) => narrow!(int(t)?, i16),
        Data::I8(_) if t.elem() == Elem::I8 => {
            narrow!(int(t)?, i8)
        }
        Data::U32(_) => narrow!(int(t)?, u32),
        Data::U16(_) => narrow!(int(t)?, u16),
        Data::U8(_) if t.elem() == Elem::U8 => {
            narrow!(int(t)?, u8)
        }
        Data::U64(v) => {
            let f = kind.int.ok_or_else(|| wrong_elem("a float type", t))?;
            let v: Option<Vec<i64>> = v.iter().map(|&x| i64::try_from(x).ok()).collect();
            let v = v.ok_or_else(|| OpError::Unsupported("a reduction of u64 beyond 2^63".into()))?;
            let (x, n) = lined_up(&v, t.shape(), &gone);
            narrow!(fold_rows(&x, n, len, f), u64)
        }
        Data::Bool(_) => int(t)?.into_iter().map(|x| x > 0).collect::<Vec<_>>().into(),
        _ => return Err(wrong_elem("a numeric type", t)),
    };
    cx.one(Tensor::new(&shape, data)?)
}

fn infer(cx: &InferCx, kind: Kind) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let Some(d) = cx.dims(0) else { return Ok(vec![fact(elem, None, None)]) };
    let keep = cx.attrs.int("keepdims").unwrap_or(1) != 0;
    let noop = cx.attrs.int("noop_with_empty_axes").unwrap_or(0) != 0;
    let gone = match infer_ints(cx, "axes", 1) {
        Ints::Known(v) => reduced(Some(&v), noop, d.len())?,
        Ints::Absent => reduced(None, noop, d.len())?,
        Ints::Unknown => return Ok(vec![fact(elem, keep.then(|| vec![Dim::Unknown; d.len()]), None)]),
    };
    let Some(gone) = gone else { return Ok(vec![fact(elem, Some(d.to_vec()), None)]) };
    let contents = sym(cx, 0).filter(|(s, _)| gone.len() == d.len() && !s.is_empty());
    let contents = contents.map(|(s, _)| vec![s[1..].iter().fold(s[0].clone(), |a, b| (kind.dim)(&a, b))]);
    Ok(vec![fact(elem, Some(kept(d, &gone, keep, Dim::Known(1))), contents)])
}

fn lost(_: &Dim, _: &Dim) -> Dim {
    Dim::Unknown
}

fn known(f: fn(i64, i64) -> i64) -> impl Fn(&Dim, &Dim) -> Dim {
    move |a, b| match (a, b) {
        (Dim::Known(a), Dim::Known(b)) => Dim::Known(f(*a, *b)),
        _ => Dim::Unknown,
    }
}

fn log_sum_exp<T: Into<f64> + Copy>(x: &[T]) -> f64 {
    let top = x.iter().map(|&v| v.into()).fold(f64::NEG_INFINITY, f64::max);
    // An infinity of either sign is the answer already.
    if top.is_infinite() {
        return top;
    }
    top + x.iter().map(|&v| (v.into() - top).exp()).sum::<f64>().ln()
}

macro_rules! extreme {
    ($x:ident, $start:expr, $cmp:tt) => {
        $x.iter().fold($start, |a, &v| if v $cmp a || v.is_nan() { v } else { a })
    };
}

const SUM: Kind = Kind {
    single: row::sum,
    double: |x| x.iter().sum(),
    int: Some(|x| x.iter().fold(0, |a, &b| a.wrapping_add(b))),
    dim: Dim::add,
};
const MEAN: Kind = Kind {
    single: |x| row::sum(x) / x.len() as f32,
    double: |x| x.iter().sum::<f64>() / x.len() as f64,
    int: Some(|x| x.iter().fold(0, |a: i64, &b| a.wrapping_add(b)).checked_div(x.len() as i64).unwrap_or(0)),
    dim: lost,
};
const PROD: Kind = Kind {
    single: |x| x.iter().product(),
    double: |x| x.iter().product(),
    int: Some(|x| x.iter().fold(1, |a, &b| a.wrapping_mul(b))),
    dim: Dim::mul,
};
const MAX: Kind = Kind {
    single: |x| extreme!(x, f32::NEG_INFINITY, >),
    double: |x| extreme!(x, f64::NEG_INFINITY, >),
    int: Some(|x| x.iter().copied().max().unwrap_or(i64::MIN)),
    dim: |a, b| known(i64::max)(a, b),
};
const MIN: Kind = Kind {
    single: |x| extreme!(x, f32::INFINITY, <),
    double: |x| extreme!(x, f64::INFINITY, <),
    int: Some(|x| x.iter().copied().min().unwrap_or(i64::MAX)),
    dim: |a, b| known(i64::min)(a, b),
};
const L1: Kind = Kind {
    single: |x| x.iter().map(|v| v.abs()).sum(),
    double: |x| x.iter().map(|v| v.abs()).sum(),
    int: Some(|x| x.iter().fold(0, |a, &b| a.wrapping_add(b.wrapping_abs()))),
    dim: lost,
};
const L2: Kind = Kind {
    single: |x| row::sum_of_squares(x, 0.0).sqrt(),
    double: |x| x.iter().map(|v| v * v).sum::<f64>().sqrt(),
    int: Some(|x| x.iter().map(|&v| (v as f64) * (v as f64)).sum::<f64>().sqrt() as i64),
    dim: lost,
};
const SUM_SQUARE: Kind = Kind {
    single: |x| row::sum_of_squares(x, 0.0),
    double: |x| x.iter().map(|v| v * v).sum(),
    int: Some(|x| x.iter().fold(0, |a, &b| a.wrapping_add(b.wrapping_mul(b)))),
    dim: lost,
};
const LOG_SUM: Kind = Kind {
    single: |x| row::sum(x).ln(),
    double: |x| x.iter().sum::<f64>().ln(),
    int: Some(|x| x.iter().map(|&v| v as f64).sum::<f64>().ln() as i64),
    dim: lost,
};
const LOG_SUM_EXP: Kind = Kind {
    single: |x| log_sum_exp(x) as f32,
    double: |x| log_sum_exp(x),
    int: Some(|x| {
        let x: Vec<f64> = x.iter().map(|&v| v as f64).collect();
        log_sum_exp(&x) as i64
    }),
    dim: lost,
};

/// ArgMax and ArgMin: the place of the first (or last) element that `better` never beats.
fn arg(cx: &EvalCx, largest: bool) -> Evaluated {
    let t = cx.input(0)?;
    let i = axis(cx.int_or("axis", 0), t.rank())?;
    let last = cx.int_or("select_last_index", 0) != 0;
    let shape = kept(t.shape(), &[i], cx.int_or("keepdims", 1) != 0, 1);
    let len: usize = shape.iter().product();
    if t.shape()[i] == 0 && len > 0 {
        return Err(OpError::invalid("an empty dim has no largest element"));
    }
    macro_rules! find {
        ($v:expr) => {{
            let v = $v;
            let (x, n) = lined_up(&v[..], t.shape(), &[i]);
            fold_rows(&x, n, len, |row| {
                let mut best = 0;
                for (j, v) in row.iter().enumerate().skip(1) {
                    let better = if largest { *v > row[best] } else { *v < row[best] };
                    if better || (last && *v == row[best]) {
                        best = j;
                    }
                }
                best as i64
            })
        }};
    }
    let out: Vec<i64> = match t.data() {
        Data::F64(v) => find!(v),
        Data::F32(v) => find!(v),
        Data::I64(v) => find!(v),
        Data::U64(v) => find!(v),
        Data::F16(_) | Data::BF16(_) => find!(t.to_f32()?),
        _ => find!(t.to_i64()?),
    };
    cx.one(Tensor::new(&shape, out)?)
}

fn infer_arg(cx: &InferCx) -> Inferred {
    let dims = cx.dims(0).map(|d| {
        let i = axis(cx.attrs.int("axis").unwrap_or(0), d.len())?;
        Ok::<_, OpError>(kept(d, &[i], cx.attrs.int("keepdims").unwrap_or(1) != 0, Dim::Known(1)))
    });
    super::util::one(Some(Elem::I64), dims.transpose()?)
}

macro_rules! reduce {
    ($name:literal, $kind:expr) => {
        OpDef {
            name: $name,
            operands: (1, 2),
            infer: |cx| infer(cx, $kind),
            eval: |cx| eval(cx, $kind),
            ..OpDef::NEW
        }
    };
}

/// Reductions.
pub const OPS: &[OpDef] = &[
    reduce!("onnx.ReduceSum", SUM),
    reduce!("onnx.ReduceMean", MEAN),
    reduce!("onnx.ReduceProd", PROD),
    reduce!("onnx.ReduceMax", MAX),
    reduce!("onnx.ReduceMin", MIN),
    reduce!("onnx.ReduceL1", L1),
    reduce!("onnx.ReduceL2", L2),
    reduce!("onnx.ReduceSumSquare", SUM_SQUARE),
    reduce!("onnx.ReduceLogSum", LOG_SUM),
    reduce!("onnx.ReduceLogSumExp", LOG_SUM_EXP),
    OpDef { name: "onnx.ArgMax", infer: infer_arg, eval: |cx| arg(cx, true), ..OpDef::NEW },
    OpDef { name: "onnx.ArgMin", infer: infer_arg, eval: |cx| arg(cx, false), ..OpDef::NEW },
];

#[cfg(test)]
mod tests {
    use crate::tensor::{Data, Tensor};
    use crate::testing::Case;

    #[test]
    fn the_extremes_of_nothing_are_the_ends_of_the_element_type() {
        let of = |op: &str, data: Data| {
            let x = Tensor::new(&[2, 0], data).unwrap();
            let y = Case::new(op, 18, &[], vec![Some(x), Some(Tensor::new(&[1], vec![1i64]).unwrap())])
                .eval(false);
            y.unwrap()[0].tensor().unwrap().data().clone()
        };
        assert_eq!(of("onnx.ReduceMax", Data::I32(vec![])), Data::I32(vec![i32::MIN; 2]));
        assert_eq!(of("onnx.ReduceMin", Data::I32(vec![])), Data::I32(vec![i32::MAX; 2]));
        assert_eq!(of("onnx.ReduceMax", Data::I8(vec![])), Data::I8(vec![-128; 2]));
        assert_eq!(of("onnx.ReduceMin", Data::I8(vec![])), Data::I8(vec![127; 2]));
        assert_eq!(of("onnx.ReduceMax", Data::U8(vec![])), Data::U8(vec![0; 2]));
        assert_eq!(of("onnx.ReduceMin", Data::U8(vec![])), Data::U8(vec![255; 2]));
        assert_eq!(of("onnx.ReduceMin", Data::U64(vec![])), Data::U64(vec![u64::MAX; 2]));
        assert_eq!(of("onnx.ReduceMax", Data::I64(vec![])), Data::I64(vec![i64::MIN; 2]));
        assert_eq!(of("onnx.ReduceMax", Data::Bool(vec![])), Data::Bool(vec![false; 2]));
        assert_eq!(of("onnx.ReduceProd", Data::I32(vec![])), Data::I32(vec![1; 2]));
    }
}
