//! MaxPool, AveragePool and LpPool, the same over all spatial dims, and MaxUnpool.
//!
//! A window is folded cell by cell in row-major order: for each of its cells, over all windows of a channel.

use super::util;
use super::window::{Sliding, Window, unflatten};
use crate::ir::{Attrs, Dim, Elem, Type};
use crate::kernels::real::{Real, with_real};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.MaxPool", results: (1, 2), infer, eval: eval_max, ..OpDef::NEW },
    OpDef {
        name: "onnx.AveragePool",
        infer,
        eval: |cx| with_real!(cx.input(0)?, T => eval_average::<T>(cx)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.LpPool",
        infer,
        verify: |cx| norm(cx.attrs).map(|_| ()),
        eval: |cx| with_real!(cx.input(0)?, T => eval_lp::<T>(cx)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.GlobalAveragePool",
        infer: infer_global,
        eval: |cx| with_real!(cx.input(0)?, T => global::<T>(cx, |x| T::row_sum(x) / T::of(x.len() as f64))),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.GlobalMaxPool",
        infer: infer_global,
        eval: |cx| with_real!(cx.input(0)?, T => global::<T>(cx, max_or_nan)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.GlobalLpPool",
        infer: infer_global,
        verify: |cx| norm(cx.attrs).map(|_| ()),
        eval: |cx| {
            let p = norm(cx.attrs)?;
            with_real!(cx.input(0)?, T => global::<T>(cx, |x| {
                root(x.iter().map(|&v| power(v, T::of(p))).sum::<T>(), T::of(p))
            }))
        },
        ..OpDef::NEW
    },
    OpDef { name: "onnx.MaxUnpool", operands: (2, 3), infer: infer_unpool, eval: eval_unpool, ..OpDef::NEW },
];

fn max_or_nan<T: Real>(cells: &[T]) -> T {
    if cells.iter().any(|v| v.is_nan()) { T::nan() } else { T::row_max(cells) }
}

/// The `p` of an Lp norm, which was a float before opset 2.
fn norm(attrs: &Attrs) -> Result<f64, OpError> {
    let p = attrs.int("p").map(|p| p as f64).or(attrs.float("p").map(f64::from)).unwrap_or(2.0);
    if p > 0.0 { Ok(p) } else { Err(OpError::invalid(format!("p is {p}, expected a positive number"))) }
}

fn power<T: Real>(x: T, p: T) -> T {
    match p {
        p if p == T::one() => x.abs(),
        p if p == T::of(2.0) => x * x,
        p => x.abs().powf(p),
    }
}

fn root<T: Real>(x: T, p: T) -> T {
    match p {
        p if p == T::one() => x,
        p if p == T::of(2.0) => x.sqrt(),
        p => x.powf(p.recip()),
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let window = Window::of_pool(cx.attrs)?;
    let dims = match cx.dims(0) {
        None => None,
        Some([batch, channels, spatial @ ..]) => {
            let out = window.dims(spatial)?;
            Some([batch.clone(), channels.clone()].into_iter().chain(out).collect::<Vec<Dim>>())
        }
        Some(_) => return Err(OpError::invalid(format!("X is {}, expected a batch and channels", cx.ty(0)))),
    };
    let ty = |elem| match &dims {
        Some(dims) => Type::tensor(elem, dims.clone()),
        None => Type::unranked(elem),
    };
    Ok(vec![ty(elem).into(), ty(Elem::I64).into()])
}

fn infer_global(cx: &InferCx) -> Inferred {
    let kept = |(i, d): (usize, &Dim)| if i < 2 { d.clone() } else { Dim::Known(1) };
    util::one(cx.elem(0), cx.dims(0).map(|dims| dims.iter().enumerate().map(kept).collect()))
}

fn global<T: Real>(cx: &EvalCx, f: impl Fn(&[T]) -> T + Sync) -> Evaluated {
    let x = cx.input(0)?;
    let shape: Vec<usize> = x.shape().iter().enumerate().map(|(i, &n)| if i < 2 { n } else { 1 }).collect();
    let cells = x.shape().get(2..).unwrap_or(&[]).iter().product::<usize>();
    if cells == 0 {
        return Err(OpError::invalid(format!("a pool over no cells: X has shape {:?}", x.shape())));
    }
    let y = T::values(x)?.par_chunks(cells).map(&f).collect();
    cx.one(T::tensor(x.elem(), &shape, y)?)
}

/// The result's shape, and the window.
fn slide(cx: &EvalCx, x: &Tensor) -> Result<(Vec<usize>, Sliding), OpError> {
    let [batch, channels, ref input @ ..] = *x.shape() else {
        return Err(OpError::invalid(format!("X has shape {:?}, expected a batch and channels", x.shape())));
    };
    let sliding = Window::of_pool(cx.attrs)?.slide(input)?;
    let shape: Vec<usize> = [batch, channels].into_iter().chain(sliding.output.iter().copied()).collect();
    // What a channel costs: a window may be far larger than the input, when padding is.
    strided::count(&[strided::count(&sliding.output)?, strided::count(&sliding.kernel)?])?;
    strided::count(&shape)?;
    Ok((shape, sliding))
}

/// Each window of `x` folded from `start` with `f(folded, element, cell)`; `cell` counts inside the channel.
fn fold_windows<T: Copy + Sync, U: Clone + Send + Sync>(
    x: &[T],
    s: &Sliding,
    start: U,
    f: impl Fn(&mut U, T, usize) + Sync,
) -> Vec<U> {
    let (cells, positions) = (s.cells(), s.positions());
    let channels = x.len().checked_div(cells).unwrap_or(0);
    let mut y = vec![start; channels * positions];
    if !y.is_empty() {
        y.par_chunks_mut(positions).zip(x.par_chunks(cells)).for_each(|(y, x)| {
            for tap in 0..s.taps() {
                s.seen(tap, 0, positions, |at, cell| f(&mut y[at], x[cell], cell));
            }
        });
    }
    y
}

/// The largest element of each window, a NaN if there is one, and where it is in its channel if `places` are wanted.
fn maxima<T: Copy + PartialOrd + Send + Sync>(
    x: &[T],
    s: &Sliding,
    lowest: T,
    places: bool,
) -> (Vec<T>, Option<Vec<usize>>) {
    let nan = |v: T| v.partial_cmp(&v).is_none();
    let beats = move |new: T, old: T| new > old || (nan(new) && !nan(old));
    if !places {
        return (
            fold_windows(x, s, lowest, |y, v, _| {
                if beats(v, *y) {
                    *y = v
                }
            }),
            None,
        );
    }
    let found = fold_windows(x, s, None, |y: &mut Option<(T, usize)>, v, cell| {
        if y.is_none_or(|(old, _)| beats(v, old)) {
            *y = Some((v, cell));
        }
    });
    let (y, at) = found.into_iter().map(|f| f.unwrap_or((lowest, 0))).unzip();
    (y, Some(at))
}

fn eval_max(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (shape, sliding) = slide(cx, x)?;
    let places = cx.outputs > 1;
    let (y, at) = match x.data() {
        Data::F64(v) => {
            let (y, at) = maxima(v, &sliding, f64::NEG_INFINITY, places);
            (Tensor::new(&shape, y)?, at)
        }
        Data::I8(v) => {
            let (y, at) = maxima(v, &sliding, i8::MIN, places);
            (Tensor::with_elem(x.elem(), &shape, y.into())?, at)
        }
        Data::U8(v) if x.elem().is_int() => {
            let (y, at) = maxima(v, &sliding, u8::MIN, places);
            (Tensor::with_elem(x.elem(), &shape, y.into())?, at)
        }
        _ => {
            let (y, at) = maxima(&x.to_f32()?, &sliding, f32::NEG_INFINITY, places);
            (Tensor::from_f32(x.elem(), &shape, y)?, at)
        }
    };
    let Some(at) = at else { return cx.one(y) };
    // Indices count from the start of X; `storage_order` 1 counts the cells of a channel column-major.
    let (rank, cells, positions) = (sliding.input.len(), sliding.cells(), sliding.positions());
    let mut index = vec![0; rank];
    let column_major = cx.int_or("storage_order", 0) == 1;
    let mut flat = |i: usize, cell: usize| {
        let cell = match column_major {
            false => cell,
            true => {
                unflatten(cell, &sliding.input, &mut index);
                (0..rank).rev().fold(0, |at, d| at * sliding.input[d] + index[d])
            }
        };
        (i / positions * cells + cell) as i64
    };
    let at: Vec<i64> = at.into_iter().enumerate().map(|(i, cell)| flat(i, cell)).collect();
    Ok(vec![y.into(), Tensor::new(&shape, at)?.into()])
}

fn eval_average<T: Real>(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (shape, s) = slide(cx, x)?;
    // What the sums are divided by: the cells, or with the padding all that the window covers of the padded input.
    let counts: Vec<T> =
        s.counts(cx.int_or("count_include_pad", 0) != 0).into_iter().map(|n| T::of(n as f64)).collect();
    let mut y = fold_windows(&T::values(x)?, &s, T::zero(), |y, v, _| *y += v);
    if !counts.is_empty() {
        y.par_chunks_mut(counts.len()).for_each(|y| y.iter_mut().zip(&counts).for_each(|(y, &n)| *y /= n));
    }
    cx.one(T::tensor(x.elem(), &shape, y)?)
}

fn eval_lp<T: Real>(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let p = T::of(norm(cx.attrs)?);
    let (shape, s) = slide(cx, x)?;
    let mut y = fold_windows(&T::values(x)?, &s, T::zero(), |y, v, _| *y += power(v, p));
    y.par_iter_mut().for_each(|y| *y = root(*y, p));
    cx.one(T::tensor(x.elem(), &shape, y)?)
}

/// The shape that indices of MaxUnpool are flat places of: that of the MaxPool's input, as far as it can be told.
fn unpooled(attrs: &Attrs, x: &[usize]) -> Result<Vec<usize>, OpError> {
    let window = Window::of_pool(attrs)?;
    let [batch, channels, spatial @ ..] = x else {
        return Err(OpError::invalid(format!("X has shape {x:?}, expected a batch and channels")));
    };
    if spatial.len() != window.kernel.len() {
        let (expected, found) = (window.kernel.len(), spatial.len());
        return Err(OpError::invalid(format!("expected {expected} spatial dims, found {found}")));
    }
    let size = |(i, &n)| Ok(window.transposed(i, n, 0, None)?.0);
    [Ok(*batch), Ok(*channels)].into_iter().chain(spatial.iter().enumerate().map(size)).collect()
}

fn infer_unpool(cx: &InferCx) -> Inferred {
    let dims = match (cx.has(2), cx.sym(2)) {
        (true, known) => known.map(<[Dim]>::to_vec),
        (false, _) => match (util::known_shape(cx, 0), cx.dims(0)) {
            (Some(shape), _) => Some(unpooled(cx.attrs, &shape)?.into_iter().map(Dim::from).collect()),
            (None, dims) => dims.map(|d| {
                let kept = |(i, d): (usize, &Dim)| if i < 2 { d.clone() } else { Dim::Unknown };
                d.iter().enumerate().map(kept).collect()
            }),
        },
    };
    util::one(cx.elem(0), dims)
}

/// Each element put where its maximum was. With `output_shape` the indices still count in the shape that the
/// attributes imply, which stands at the beginning of the larger result.
fn eval_unpool(cx: &EvalCx) -> Evaluated {
    let (x, at) = (cx.input(0)?, cx.input(1)?);
    if at.shape() != x.shape() {
        let (x, at) = (x.shape(), at.shape());
        return Err(OpError::invalid(format!("indices of shape {at:?} for elements of shape {x:?}")));
    }
    let own = unpooled(cx.attrs, x.shape())?;
    let shape = match cx.opt(2)? {
        Some(t) => util::shape_of(&t.to_i64()?)?,
        None => own.clone(),
    };
    let (own_count, count) = (strided::count(&own)?, strided::count(&shape)?);
    if shape.len() != own.len() {
        return Err(OpError::invalid(format!("output_shape is {shape:?} for {} dims", own.len())));
    }
    let mut index = vec![0; own.len()];
    let mut place = |i: i64| -> Result<usize, OpError> {
        let outside = || OpError::invalid(format!("index {i} is outside of {shape:?}"));
        let at = usize::try_from(i).ok().filter(|&at| at < own_count).ok_or_else(outside)?;
        unflatten(at, &own, &mut index);
        let inside = index.iter().zip(&shape).all(|(i, n)| i < n);
        let flat = index.iter().zip(&shape).fold(0, |at, (i, n)| at * n + i);
        if inside { Ok(flat) } else { Err(outside()) }
    };
    let places: Vec<usize> = at.i64s()?.iter().map(|&i| place(i)).collect::<Result<_, _>>()?;
    fn put<T: Clone + Default>(x: &[T], places: &[usize], count: usize) -> Vec<T> {
        let mut y = vec![T::default(); count];
        places.iter().zip(x).for_each(|(&at, v)| y[at] = v.clone());
        y
    }
    util::moved(x, &shape, crate::map_data!(x.data(), v => put(v, &places, count)))
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn a_nan_is_the_maximum() {
        let x = Tensor::new(&[1, 1, 4], vec![1.0, f32::NAN, 3.0, 2.0]).unwrap();
        let mut case = Case::new("onnx.MaxPool", 21, &[("kernel_shape", vec![2].into())], vec![Some(x)]);
        for outputs in [1, 2] {
            case.outputs = outputs;
            let y = case.eval(false).unwrap();
            let y = y[0].tensor().unwrap().f32s().unwrap();
            assert!(y[0].is_nan() && y[1].is_nan() && y[2] == 3.0);
        }
    }

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("pool");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = |shape: &[usize]| Some(Tensor::new(shape, vec![0f32; shape.iter().product()]).unwrap());
        let lp = |attrs: &[(&str, Attr)]| Case::new("onnx.LpPool", 22, attrs, vec![x(&[1, 1, 4])]);
        refused(&lp(&[]), "kernel_shape is missing");
        refused(&lp(&[("kernel_shape", vec![5].into())]), "does not fit");
        refused(&lp(&[("kernel_shape", vec![2, 2].into())]), "expected 2 spatial dims");
        refused(&lp(&[("kernel_shape", vec![2].into()), ("p", 0.into())]), "p is 0");
        let huge: [(&str, Attr); 2] =
            [("kernel_shape", vec![1 << 30].into()), ("pads", vec![1 << 30, 1 << 30].into())];
        assert!(lp(&huge).eval(false).is_err());
    }

    #[test]
    fn an_index_outside_is_refused() {
        let unpool = |at: [i64; 2], shape: Option<[i64; 3]>| {
            let x = Tensor::new(&[1, 1, 2], vec![1f32, 2.0]).unwrap();
            let at = Tensor::new(&[1, 1, 2], at.to_vec()).unwrap();
            let shape = shape.map(|s| Tensor::new(&[3], s.to_vec()).unwrap());
            let attrs = [("kernel_shape", vec![2].into()), ("strides", vec![2].into())];
            Case::new("onnx.MaxUnpool", 22, &attrs, vec![Some(x), Some(at), shape]).eval(false)
        };
        assert!(unpool([0, 3], None).is_ok());
        for (at, shape) in
            [([0, 4], None), ([-1, 3], None), ([0, 3], Some([1, 1, 3])), ([0, 3], Some([1, 1, -4]))]
        {
            assert!(unpool(at, shape).is_err(), "{at:?} {shape:?}");
        }
        assert!(unpool([0, 3], Some([1, 1 << 40, 1 << 40])).is_err());
    }
}
