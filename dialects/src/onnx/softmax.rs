//! Softmax and LogSoftmax. From opset 13 on along one axis; before, over all dims from `axis` on taken as one.
//!
//! Computed in double precision for f64, else in single.

use super::util;
use crate::kernels::real::{Real, with_real};
use crate::ops::{EvalCx, Evaluated, OpDef};
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.Softmax",
        infer: util::same_type,
        eval: |cx| with_real!(cx.input(0)?, T => along_axis(cx, T::row_softmax)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.LogSoftmax",
        infer: util::same_type,
        eval: |cx| with_real!(cx.input(0)?, T => along_axis(cx, T::row_log_softmax)),
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

fn along_axis<T: Real>(cx: &EvalCx, f: fn(&mut [T])) -> Evaluated {
    let x = cx.input(0)?;
    let shape = x.shape();
    let flatten = cx.opset < 13;
    let axis = cx.int_or("axis", if flatten { 1 } else { -1 });
    // A scalar is one row of one element; the old default axis 1 may stand behind the last dim of a vector.
    let axis = match shape.len() {
        0 => 0,
        rank if flatten && axis == rank as i64 => rank,
        rank => util::axis(axis, rank)?,
    };
    let mut data = T::values(x)?.into_owned();
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
