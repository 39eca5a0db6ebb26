//! LayerNormalization and RMSNormalization: over all dims from `axis` on. Computed in double
//! precision for f64, else in single.
//!
//! `Y = (X - mean) / sqrt(variance + epsilon) * scale + bias`; RMSNormalization has no mean and no bias.

use super::softmax::task_rows;
use super::util;
use crate::ir::{Dim, Elem, Type};
use crate::kernels::real::{Real, with_real};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.LayerNormalization",
        operands: (2, 3),
        results: (1, 3),
        infer,
        eval: |cx| with_real!(cx.input(0)?, T => eval::<T>(cx, true)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.RMSNormalization",
        operands: (2, 2),
        infer,
        eval: |cx| with_real!(cx.input(0)?, T => eval::<T>(cx, false)),
        ..OpDef::NEW
    },
    // RMSNormalization as exporters wrote it before it was standard: it also gives the inverse deviation.
    OpDef {
        name: "onnx.SimplifiedLayerNormalization",
        operands: (2, 2),
        results: (1, 2),
        infer: |cx| infer(cx).map(without_mean),
        eval: |cx| with_real!(cx.input(0)?, T => eval::<T>(cx, false)).map(without_mean),
        ..OpDef::NEW
    },
];

fn without_mean<T>(mut results: Vec<T>) -> Vec<T> {
    if results.len() > 1 {
        results.remove(1);
    }
    results
}

fn infer(cx: &InferCx) -> Inferred {
    let mut facts = vec![cx.ty(0).clone().into()];
    let Some(dims) = cx.dims(0) else { return Ok(facts) };
    let axis = util::axis(cx.attrs.int("axis").unwrap_or(-1), dims.len())?;
    let kept = |(i, d): (usize, &Dim)| if i < axis { d.clone() } else { Dim::Known(1) };
    // Mean and inverse deviation are in the type the sums were stashed in.
    let stash = cx.attrs.int("stash_type").unwrap_or(1);
    if let Some(elem) = i32::try_from(stash).ok().and_then(Elem::from_onnx) {
        let ty = Type::tensor(elem, dims.iter().enumerate().map(kept));
        facts.resize(3, ty.into());
    }
    Ok(facts)
}

/// `t` as one number per element of `dims`, to which it must broadcast.
fn spread<T: Real>(t: &Tensor, dims: &[usize]) -> Result<Vec<T>, OpError> {
    let values = T::values(t)?;
    // Leading ones do not count; what is left must be at most the dims' rank.
    let ones = t.shape().iter().take_while(|&&n| n == 1).count();
    let own = &t.shape()[ones.min(t.rank().saturating_sub(dims.len()))..];
    if own == dims {
        return Ok(values.into_owned());
    }
    if strided::broadcast_shape(&[own, dims])? != dims {
        let message = format!("a tensor of shape {:?} does not broadcast to {dims:?}", t.shape());
        return Err(OpError::invalid(message));
    }
    strided::count(dims)?;
    Ok(strided::gather(&values, dims, &strided::broadcast_strides(own, dims), 0))
}

fn eval<T: Real>(cx: &EvalCx, centered: bool) -> Evaluated {
    let x = cx.input(0)?;
    let axis = util::axis(cx.int_or("axis", -1), x.rank())?;
    let (outer, dims) = x.shape().split_at(axis);
    let epsilon = T::of(cx.float_or("epsilon", 1e-5).into());
    let scale = spread::<T>(cx.input(1)?, dims)?;
    let bias = cx.opt(2)?.map(|b| spread(b, dims)).transpose()?;
    let n = scale.len();
    let length = T::of(n as f64);
    let mut y = T::values(x)?.into_owned();
    let rows = strided::count(outer)?;
    let (mut means, mut inverses) = (vec![T::zero(); rows], vec![T::zero(); rows]);
    if n > 0 {
        let per_task = task_rows(n);
        let statistics = means.par_chunks_mut(per_task).zip(inverses.par_chunks_mut(per_task));
        y.par_chunks_mut(per_task * n).zip(statistics).for_each(|(y, (means, inverses))| {
            let statistics = means.iter_mut().zip(inverses);
            for (y, (mean, inverse)) in y.chunks_exact_mut(n).zip(statistics) {
                *mean = if centered { T::row_sum(y) / length } else { T::zero() };
                *inverse = (T::row_sum_of_squares(y, *mean) / length + epsilon).sqrt().recip();
                T::row_normalize(y, *mean, *inverse, &scale);
                if let Some(bias) = &bias {
                    T::row_add(y, bias);
                }
            }
        });
    }
    let y = T::tensor(x.elem(), x.shape(), y)?;
    if cx.outputs < 2 {
        return cx.one(y);
    }
    let kept: Vec<usize> = outer.iter().copied().chain(dims.iter().map(|_| 1)).collect();
    let stash = i32::try_from(cx.int_or("stash_type", 1)).ok().and_then(Elem::from_onnx).unwrap_or(Elem::F32);
    let mean = T::tensor(stash, &kept, means)?;
    let inverse = T::tensor(stash, &kept, inverses)?;
    Ok(vec![y.into(), mean.into(), inverse.into()])
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("normalization");
    }
}
