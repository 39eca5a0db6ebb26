//! Softmax, LogSoftmax and Hardmax. From opset 13 on along one axis; before, over all dims from `axis` on taken as one.
//!
//! Computed in double precision for f64, else in single.

use super::util;
use crate::ir::Elem;
use crate::kernels::real::{Real, with_real};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use half::f16;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.Softmax",
        infer,
        eval: |cx| match cx.input(0)?.elem() {
            Elem::F16 => along_axis(cx, softmax_of_halves),
            _ => with_real!(cx.input(0)?, T => along_axis(cx, T::row_softmax)),
        },
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.LogSoftmax",
        infer,
        eval: |cx| with_real!(cx.input(0)?, T => along_axis(cx, T::row_log_softmax)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.Hardmax",
        infer,
        eval: |cx| with_real!(cx.input(0)?, T => along_axis(cx, hardmax::<T>)),
        ..OpDef::NEW
    },
];

/// How many rows of `n` elements one task works on.
pub(crate) fn task_rows(n: usize) -> usize {
    (1usize << 14).div_ceil(n.max(1))
}

/// Runs `f` on every row of `n` elements, on threads.
fn each_row<T: Send>(data: &mut [T], n: usize, f: impl Fn(&mut [T]) + Sync) {
    if n > 0 {
        data.par_chunks_mut(task_rows(n) * n).for_each(|task| task.chunks_exact_mut(n).for_each(&f));
    }
}

/// The softmax of a row of f16, in place: the specification's body of the op, each of whose steps gives f16.
fn softmax_of_halves(row: &mut [f32]) {
    let half = |x: f32| f16::from_f32(x).to_f32();
    let top = f32::row_max(row);
    row.iter_mut().for_each(|x| *x = half(half(*x - top).exp()));
    let total = half(f32::row_sum(row));
    row.iter_mut().for_each(|x| *x /= total);
}

/// One at the first of the greatest elements, zero elsewhere.
fn hardmax<T: Real>(row: &mut [T]) {
    let best = (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    row.iter_mut().enumerate().for_each(|(i, x)| *x = if i == best { T::one() } else { T::zero() });
}

/// The axis for this rank, 0 for a scalar; the old default axis 1 may stand behind the last dim of a vector.
fn place(axis: Option<i64>, flatten: bool, rank: usize) -> Result<usize, OpError> {
    let axis = axis.unwrap_or(if flatten { 1 } else { -1 });
    match rank {
        0 => Ok(0),
        _ if flatten && axis == rank as i64 => Ok(rank),
        _ => util::axis(axis, rank),
    }
}

fn infer(cx: &InferCx) -> Inferred {
    if let Some(d) = cx.dims(0) {
        place(cx.attrs.int("axis"), cx.opset < 13, d.len())?;
    }
    util::same_type(cx)
}

fn along_axis<T: Real>(cx: &EvalCx, f: fn(&mut [T])) -> Evaluated {
    let x = cx.input(0)?;
    let shape = x.shape();
    let flatten = cx.opset < 13;
    let axis = place(cx.attrs.int("axis"), flatten, shape.len())?;
    let values = T::values(x)?;
    let mut data = strided::build(values.len(), |start, out| {
        out.copy_from_slice(&values[start..start + out.len()]);
    });
    let (n, inner): (usize, usize) = match flatten || shape.is_empty() {
        true => (shape[axis..].iter().product(), 1),
        false => (shape[axis], shape[axis + 1..].iter().product()),
    };
    if inner == 1 {
        each_row(&mut data, n, f);
    } else if !data.is_empty() {
        data.par_chunks_mut(n * inner).for_each(|block| {
            let mut line = vec![T::zero(); n];
            for i in 0..inner {
                (0..n).for_each(|j| line[j] = block[j * inner + i]);
                f(&mut line);
                (0..n).for_each(|j| block[j * inner + i] = line[j]);
            }
        });
    }
    cx.one(T::tensor(x.elem(), shape, data)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("softmax");
    }
}
