//! Normalization per channel: BatchNormalization with given statistics, InstanceNormalization, GroupNormalization.
//! Computed in single precision. Channels are dim 1.

use super::util;
use crate::kernels::row;
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.BatchNormalization",
        operands: (5, 5),
        results: (1, 5),
        infer: util::same_type,
        eval: batch,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.InstanceNormalization",
        operands: (3, 3),
        infer: util::same_type,
        eval: |cx| grouped(cx, None),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.GroupNormalization",
        operands: (3, 3),
        infer: util::same_type,
        eval: |cx| grouped(cx, cx.attrs.int("num_groups")),
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
fn per_channel(cx: &EvalCx, i: usize, n: usize) -> Result<Vec<f32>, OpError> {
    let t = cx.input(i)?;
    match t.len() == n {
        true => Ok(t.to_f32()?.into_owned()),
        false => Err(OpError::invalid(format!("operand {i} has {} elements, expected {n}", t.len()))),
    }
}

fn batch(cx: &EvalCx) -> Evaluated {
    if cx.int_or("training_mode", 0) != 0 || (cx.opset < 7 && cx.int_or("is_test", 0) == 0) {
        return Err(OpError::Unsupported("BatchNormalization in training mode".into()));
    }
    let x = cx.input(0)?;
    let (count, cells) = channels(x)?;
    let [scale, bias, mean, variance] = [1, 2, 3, 4].map(|i| per_channel(cx, i, count));
    let (scale, bias, mean, variance) = (scale?, bias?, mean?, variance?);
    let epsilon = cx.float_or("epsilon", 1e-5);
    let mut y = x.to_f32()?.into_owned();
    if cells > 0 {
        y.par_chunks_mut(cells).enumerate().for_each(|(i, y)| {
            let c = i % count;
            row::shift_scale(y, mean[c], scale[c] / (variance[c] + epsilon).sqrt());
            row::shift_scale(y, -bias[c], 1.0);
        });
    }
    cx.one(Tensor::from_f32(x.elem(), x.shape(), y)?)
}

/// Each group of channels normalized by its own mean and variance, one group per channel when `groups` is absent.
fn grouped(cx: &EvalCx, groups: Option<i64>) -> Evaluated {
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
    let (scale, bias) = (per_channel(cx, 1, parameters)?, per_channel(cx, 2, parameters)?);
    let epsilon = cx.float_or("epsilon", 1e-5);
    let mut y = x.to_f32()?.into_owned();
    let n = per_group * cells;
    if n > 0 {
        y.par_chunks_mut(n).enumerate().for_each(|(i, y)| {
            let mean = row::sum(y) / n as f32;
            let inverse = 1.0 / (row::sum_of_squares(y, mean) / n as f32 + epsilon).sqrt();
            for (j, y) in y.chunks_exact_mut(cells).enumerate() {
                let group = i % groups;
                let c = if shared { group } else { group * per_group + j };
                row::shift_scale(y, mean, inverse * scale[c]);
                row::shift_scale(y, -bias[c], 1.0);
            }
        });
    }
    cx.one(Tensor::from_f32(x.elem(), x.shape(), y)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("channel_norm");
    }
}
