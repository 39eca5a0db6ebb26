//! MaxPool, AveragePool, and the pools over all spatial dims.

use super::window::{Sliding, Window, unflatten};
use crate::ir::{Dim, Elem, Type};
use crate::kernels::{row, strided};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.MaxPool", results: (1, 2), infer, eval: eval_max, ..OpDef::NEW },
    OpDef { name: "onnx.AveragePool", infer, eval: eval_average, ..OpDef::NEW },
    OpDef {
        name: "onnx.GlobalAveragePool",
        infer: infer_global,
        eval: |cx| global(cx, |cells| row::sum(cells) / cells.len() as f32),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.GlobalMaxPool",
        infer: infer_global,
        eval: |cx| global(cx, max_or_nan),
        ..OpDef::NEW
    },
];

fn max_or_nan(cells: &[f32]) -> f32 {
    if cells.iter().any(|v| v.is_nan()) { f32::NAN } else { row::max(cells) }
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
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let kept = |(i, d): (usize, &Dim)| if i < 2 { d.clone() } else { Dim::Known(1) };
    Ok(vec![match cx.dims(0) {
        Some(dims) => Type::tensor(elem, dims.iter().enumerate().map(kept)).into(),
        None => Type::unranked(elem).into(),
    }])
}

fn global(cx: &EvalCx, f: fn(&[f32]) -> f32) -> Evaluated {
    let x = cx.input(0)?;
    let shape: Vec<usize> = x.shape().iter().enumerate().map(|(i, &n)| if i < 2 { n } else { 1 }).collect();
    let cells = x.shape().get(2..).unwrap_or(&[]).iter().product::<usize>();
    if cells == 0 {
        return Err(OpError::invalid(format!("a pool over no cells: X has shape {:?}", x.shape())));
    }
    let y = x.to_f32()?.par_chunks(cells).map(f).collect();
    cx.one(Tensor::from_f32(x.elem(), &shape, y)?)
}

/// The result's shape, and the window.
fn slide(cx: &EvalCx, x: &Tensor) -> Result<(Vec<usize>, Sliding), OpError> {
    let [batch, channels, ref input @ ..] = *x.shape() else {
        return Err(OpError::invalid(format!("X has shape {:?}, expected a batch and channels", x.shape())));
    };
    let sliding = Window::of_pool(cx.attrs)?.slide(input)?;
    let shape: Vec<usize> = [batch, channels].into_iter().chain(sliding.output.iter().copied()).collect();
    strided::count(&shape)?;
    // The table of windows: every cell that any of them sees.
    strided::count(&[sliding.output.iter().product(), strided::count(&sliding.kernel)?])?;
    Ok((shape, sliding))
}

/// For each output position of one channel: the cells of the input (flat) that its window sees.
fn windows(s: &Sliding) -> Vec<Vec<usize>> {
    let rank = s.input.len();
    let (positions, taps) = (s.output.iter().product::<usize>(), s.kernel.iter().product::<usize>());
    let one = |position: usize| {
        let (mut out, mut tap) = (vec![0; rank], vec![0; rank]);
        unflatten(position, &s.output, &mut out);
        let cell = |t: usize| {
            unflatten(t, &s.kernel, &mut tap);
            (0..rank).try_fold(0, |base, i| Some(base * s.input[i] + s.cell(i, out[i], tap[i])?))
        };
        (0..taps).filter_map(cell).collect()
    };
    (0..positions).into_par_iter().map(one).collect()
}

/// The largest element of each window, and where it is in its channel. A NaN wins.
fn maxima<T: Copy + PartialOrd + Send + Sync>(
    x: &[T],
    cells: usize,
    windows: &[Vec<usize>],
    lowest: T,
) -> (Vec<T>, Vec<usize>) {
    let channels = x.len().checked_div(cells).unwrap_or(0);
    let one = |i: usize| {
        let (channel, window) = (i / windows.len(), &windows[i % windows.len()]);
        let x = &x[channel * cells..][..cells];
        let nan = |v: T| v.partial_cmp(&v).is_none();
        let worse = |old: T, new: T| new > old || (nan(new) && !nan(old));
        let start = (window.first().map_or(lowest, |&c| x[c]), window.first().copied().unwrap_or(0));
        window.iter().fold(start, |(top, at), &c| if worse(top, x[c]) { (x[c], c) } else { (top, at) })
    };
    (0..channels * windows.len()).into_par_iter().map(one).unzip()
}

fn eval_max(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (shape, sliding) = slide(cx, x)?;
    let (windows, cells) = (windows(&sliding), sliding.input.iter().product());
    let (y, at) = match x.data() {
        Data::F64(v) => {
            let (y, at) = maxima(v, cells, &windows, f64::NEG_INFINITY);
            (Tensor::new(&shape, y)?, at)
        }
        Data::I8(v) => {
            let (y, at) = maxima(v, cells, &windows, i8::MIN);
            (Tensor::with_elem(x.elem(), &shape, y.into())?, at)
        }
        Data::U8(v) if x.elem().is_int() => {
            let (y, at) = maxima(v, cells, &windows, u8::MIN);
            (Tensor::with_elem(x.elem(), &shape, y.into())?, at)
        }
        _ => {
            let (y, at) = maxima(&x.to_f32()?, cells, &windows, f32::NEG_INFINITY);
            (Tensor::from_f32(x.elem(), &shape, y)?, at)
        }
    };
    if cx.outputs < 2 {
        return cx.one(y);
    }
    // Indices count from the start of X; `storage_order` 1 counts the cells of a channel column-major.
    let rank = sliding.input.len();
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
        (i / windows.len() * cells + cell) as i64
    };
    let at: Vec<i64> = at.into_iter().enumerate().map(|(i, cell)| flat(i, cell)).collect();
    Ok(vec![y.into(), Tensor::new(&shape, at)?.into()])
}

fn eval_average(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (shape, s) = slide(cx, x)?;
    let (windows, cells) = (windows(&s), s.input.iter().product::<usize>());
    let rank = s.input.len();
    // What the sums are divided by: the cells, or with the padding all that the window covers of the padded input.
    let covered = |position: usize| {
        let mut out = vec![0; rank];
        unflatten(position, &s.output, &mut out);
        let along = |i: usize| {
            let end = s.input[i] + s.begin[i] + s.end[i];
            (0..s.kernel[i]).filter(|k| out[i] * s.strides[i] + k * s.dilations[i] < end).count()
        };
        (0..rank).map(along).product::<usize>()
    };
    let padded = cx.int_or("count_include_pad", 0) != 0;
    let counts: Vec<f32> =
        windows.iter().enumerate().map(|(i, w)| (if padded { covered(i) } else { w.len() }) as f32).collect();
    let values = x.to_f32()?;
    let one = |i: usize| {
        let (channel, position) = (i / windows.len(), i % windows.len());
        let x = &values[channel * cells..][..cells];
        windows[position].iter().map(|&c| x[c]).sum::<f32>() / counts[position]
    };
    let y = (0..shape.iter().product()).into_par_iter().map(one).collect();
    cx.one(Tensor::from_f32(x.elem(), &shape, y)?)
}

#[cfg(test)]
mod tests {
    use crate::tensor::Tensor;
    use crate::testing::Case;

    #[test]
    fn a_nan_is_the_maximum() {
        let x = Tensor::new(&[1, 1, 4], vec![1.0, f32::NAN, 3.0, 2.0]).unwrap();
        let case = Case::new("onnx.MaxPool", 21, &[("kernel_shape", vec![2].into())], vec![Some(x)]);
        let y = case.eval(false).unwrap();
        let y = y[0].tensor().unwrap().f32s().unwrap();
        assert!(y[0].is_nan() && y[1].is_nan() && y[2] == 3.0);
    }

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("pool");
    }
}
