//! Normalization per channel: BatchNormalization, InstanceNormalization, GroupNormalization, and
//! LRN. Computed in double precision for f64, else in single. Channels are dim 1.

use super::util;
use crate::ir::Attrs;
use crate::kernels::real::{Real, with_real};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.BatchNormalization",
        operands: (5, 5),
        results: (1, 5),
        infer: infer_batch,
        eval: |cx| with_real!(cx.input(0)?, T => batch::<T>(cx)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.InstanceNormalization",
        operands: (3, 3),
        infer: util::same_type,
        eval: |cx| with_real!(cx.input(0)?, T => grouped::<T>(cx, None)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.GroupNormalization",
        operands: (3, 3),
        infer: util::same_type,
        eval: |cx| with_real!(cx.input(0)?, T => grouped::<T>(cx, cx.attrs.int("num_groups"))),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.LRN",
        infer: util::same_type,
        verify: |cx| region(cx.attrs, cx.dims(0).map(<[_]>::len)).map(|_| ()),
        eval: |cx| with_real!(cx.input(0)?, T => lrn::<T>(cx)),
        ..OpDef::NEW
    },
];

/// Channels, and cells of each.
fn channels(x: &Tensor) -> Result<(usize, usize), OpError> {
    match *x.shape() {
        [_, c, ref spatial @ ..] => Ok((c, spatial.iter().product())),
        // BatchNormalization also takes a batch of single values.
        [_] => Ok((1, 1)),
        [] => Err(OpError::invalid("X is a scalar, expected a batch and channels")),
    }
}

/// Operand `i`, which must have `n` elements.
fn per_channel<T: Real>(cx: &EvalCx, i: usize, n: usize) -> Result<Vec<T>, OpError> {
    let t = cx.input(i)?;
    match t.len() == n {
        true => Ok(T::values(t)?.into_owned()),
        false => Err(OpError::invalid(format!("operand {i} has {} elements, expected {n}", t.len()))),
    }
}

/// The running statistics are results in training only.
fn infer_batch(cx: &InferCx) -> Inferred {
    let training = cx.attrs.int("training_mode").unwrap_or(0) != 0;
    Ok([0, 3, 4][..if training { 3 } else { 1 }].iter().map(|&i| cx.ty(i).clone().into()).collect())
}

/// Mean and variance of each of `count` channels over the whole batch.
fn statistics<T: Real>(x: &[T], count: usize, cells: usize) -> (Vec<T>, Vec<T>) {
    let one = |c: usize| {
        let rows = || x.chunks_exact(cells.max(1)).skip(c).step_by(count);
        let n = T::of((x.len() / count) as f64);
        let mean = rows().map(T::row_sum).sum::<T>() / n;
        (mean, rows().map(|row| T::row_sum_of_squares(row, mean)).sum::<T>() / n)
    };
    (0..count).into_par_iter().map(one).unzip()
}

fn batch<T: Real>(cx: &EvalCx) -> Evaluated {
    let training = cx.int_or("training_mode", 0) != 0;
    if (training && cx.opset < 14) || (cx.opset < 7 && cx.int_or("is_test", 0) == 0) {
        return Err(OpError::Unsupported("BatchNormalization in training mode before opset 14".into()));
    }
    let x = cx.input(0)?;
    let (count, cells) = channels(x)?;
    let [scale, bias, mean, variance] = [1, 2, 3, 4].map(|i| per_channel::<T>(cx, i, count));
    let (scale, bias, mut mean, mut variance) = (scale?, bias?, mean?, variance?);
    let epsilon = T::of(cx.float_or("epsilon", 1e-5).into());
    let mut y = T::values(x)?.into_owned();
    let mut running = Vec::new();
    if training {
        let momentum = T::of(cx.float_or("momentum", 0.9).into());
        let own = statistics(&y, count, cells);
        for (i, given, own) in [(3, &mut mean, own.0), (4, &mut variance, own.1)] {
            let mix = |(&old, &new): (&T, &T)| old * momentum + new * (T::one() - momentum);
            let mixed: Vec<T> = given.iter().zip(&own).map(mix).collect();
            running.push(T::tensor(cx.input(i)?.elem(), &[count], mixed)?.into());
            *given = own;
        }
    }
    if cells > 0 {
        y.par_chunks_mut(cells).enumerate().for_each(|(i, y)| {
            let c = i % count;
            T::row_shift_scale(y, mean[c], scale[c] / (variance[c] + epsilon).sqrt());
            T::row_shift_scale(y, -bias[c], T::one());
        });
    }
    Ok([T::tensor(x.elem(), x.shape(), y)?.into()].into_iter().chain(running).collect())
}

/// Each group of channels normalized by its own mean and variance, one group per channel when `groups` is absent.
fn grouped<T: Real>(cx: &EvalCx, groups: Option<i64>) -> Evaluated {
    let x = cx.input(0)?;
    let (count, cells) = channels(x)?;
    let groups = groups.map_or(count, |g| usize::try_from(g).unwrap_or(0));
    if groups == 0 || !count.is_multiple_of(groups) {
        return Err(OpError::invalid(format!("{count} channels do not make {groups} groups")));
    }
    // Before opset 21, GroupNormalization has one scale and bias per group.
    let per_group = count / groups;
    let shared = cx.input(1)?.len() == groups && cx.opset < 21;
    let parameters = if shared { groups } else { count };
    let (scale, bias) = (per_channel::<T>(cx, 1, parameters)?, per_channel::<T>(cx, 2, parameters)?);
    let epsilon = T::of(cx.float_or("epsilon", 1e-5).into());
    let mut y = T::values(x)?.into_owned();
    let n = per_group * cells;
    if n > 0 {
        y.par_chunks_mut(n).enumerate().for_each(|(i, y)| {
            let mean = T::row_sum(y) / T::of(n as f64);
            let inverse = (T::row_sum_of_squares(y, mean) / T::of(n as f64) + epsilon).sqrt().recip();
            for (j, y) in y.chunks_exact_mut(cells).enumerate() {
                let group = i % groups;
                let c = if shared { group } else { group * per_group + j };
                T::row_shift_scale(y, mean, inverse * scale[c]);
                T::row_shift_scale(y, -bias[c], T::one());
            }
        });
    }
    cx.one(T::tensor(x.elem(), x.shape(), y)?)
}

/// How many channels before and behind each one LRN sums over.
fn region(attrs: &Attrs, rank: Option<usize>) -> Result<(usize, usize), OpError> {
    let size = attrs.int("size").ok_or_else(|| OpError::invalid("the attribute size is missing"))?;
    match usize::try_from(size) {
        Ok(size) if size > 0 && rank.is_none_or(|r| r >= 2) => Ok(((size - 1) / 2, size / 2)),
        Ok(size) if size > 0 => Err(OpError::invalid("expected a batch and channels")),
        _ => Err(OpError::invalid(format!("size is {size}, expected a positive number"))),
    }
}

/// `X / (bias + alpha / size * sum of squares) ^ beta`, the sum over the channels around.
fn lrn<T: Real>(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (before, behind) = region(cx.attrs, Some(x.rank()))?;
    let attr = |name, default| f64::from(cx.float_or(name, default));
    let (beta, bias) = (T::of(attr("beta", 0.75)), T::of(attr("bias", 1.0)));
    let alpha = T::of(attr("alpha", 1e-4) / (before + behind + 1) as f64);
    let (count, cells) = channels(x)?;
    let values = T::values(x)?;
    let mut y = vec![T::zero(); values.len()];
    if !y.is_empty() {
        y.par_chunks_mut(cells).enumerate().for_each(|(i, y)| {
            let (first, c) = (i / count * count, i % count);
            for near in c.saturating_sub(before)..count.min(c.saturating_add(behind).saturating_add(1)) {
                let row = &values[(first + near) * cells..][..cells];
                y.iter_mut().zip(row).for_each(|(sum, &v)| *sum += v * v);
            }
            let row = &values[i * cells..][..cells];
            y.iter_mut().zip(row).for_each(|(y, &v)| *y = v / (bias + alpha * *y).powf(beta));
        });
    }
    cx.one(T::tensor(x.elem(), x.shape(), y)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("channel_norm");
    }
}
