//! The masks of Attention, QAttention and MultiHeadAttention.
//!
//! A masked key is not left out: `mask_filter_value` is added to its score, so that a row all of whose keys are masked
//! still attends to all of them. What lies behind the causal frontier is left out.

use crate::ops::{EvalCx, OpError};
use crate::tensor::Tensor;
use std::borrow::Cow;

/// What is added to the scores.
pub(super) struct Mask<'a> {
    /// `[batch, rows or 1, keys]`.
    filter: Option<(Vec<f32>, [usize; 3])>,
    /// `[batch or 1, heads or 1, rows or 1, keys]`.
    bias: Option<(Cow<'a, [f32]>, [usize; 4])>,
    /// Keys before the first query of a causal op.
    past: Option<usize>,
}

impl<'a> Mask<'a> {
    /// From a mask of integers (lengths `[batch]`, ends and starts `[2 * batch]`, `[batch, keys]` or
    /// `[batch, rows, keys]` with 0 for a masked key), a bias, and the causal frontier behind `past` keys.
    pub(super) fn of(
        cx: &EvalCx<'a>,
        mask: Option<&Tensor>,
        bias: Option<&'a Tensor>,
        [batch, heads, rows, keys]: [usize; 4],
        past: usize,
    ) -> Result<Mask<'a>, OpError> {
        let value = cx.float_or("mask_filter_value", -10000.0);
        let filter = mask.map(|t| -> Result<(Vec<f32>, [usize; 3]), OpError> {
            let given = t.to_i64()?;
            let inside = |b: usize, key: usize| match given.len() == 2 * batch {
                true => (key as i64) < given[b] && key as i64 >= given[batch + b].min(keys as i64),
                false => (key as i64) < given[b],
            };
            let by_length = || (0..batch * keys).map(|i| inside(i / keys, i % keys)).collect();
            let (kept, shape): (Vec<bool>, _) = match *t.shape() {
                [n] if n == batch || n == 2 * batch => (by_length(), [batch, 1, keys]),
                [b, n] if (b, n) == (batch, keys) => {
                    (given.iter().map(|&m| m > 0).collect(), [batch, 1, keys])
                }
                [b, r, n] if (b, r, n) == (batch, rows, keys) => {
                    (given.iter().map(|&m| m > 0).collect(), [batch, rows, keys])
                }
                ref other => {
                    let message = format!("a mask of shape {other:?} for [{batch}, {heads}, {rows}, {keys}]");
                    return Err(OpError::Unsupported(message));
                }
            };
            Ok((kept.into_iter().map(|kept| if kept { 0.0 } else { value }).collect(), shape))
        });
        Ok(Mask {
            filter: filter.transpose()?,
            bias: bias.map(|t| broadcast_bias(t, [batch, heads, rows, keys])).transpose()?,
            past: (cx.int_or("unidirectional", 0) != 0).then_some(past),
        })
    }

    /// Writes what is added to the scores of a row, and says whether there is anything.
    pub(super) fn row(&self, batch: usize, head: usize, row: usize, out: &mut [f32]) -> bool {
        if self.filter.is_none() && self.bias.is_none() && self.past.is_none() {
            return false;
        }
        out.fill(0.0);
        if let Some((filter, [_, rows, keys])) = &self.filter {
            let row = if *rows == 1 { 0 } else { row };
            out.copy_from_slice(&filter[(batch * rows + row) * keys..][..*keys]);
        }
        if let Some(bias) = &self.bias {
            add_bias(bias, batch, head, row, out);
        }
        if let Some(past) = self.past {
            let frontier = (past + row + 1).min(out.len());
            out[frontier..].fill(f32::NEG_INFINITY);
        }
        true
    }
}

/// A bias `[batch or 1, heads or 1, rows or 1, keys]`, checked.
pub(super) fn broadcast_bias<'a>(
    t: &'a Tensor,
    [batch, heads, rows, keys]: [usize; 4],
) -> Result<(Cow<'a, [f32]>, [usize; 4]), OpError> {
    let wanted = [batch, heads, rows, keys];
    match *t.shape() {
        [b, h, r, n]
            if (b == 1 || b == batch) && (h == 1 || h == heads) && (r == 1 || r == rows) && n == keys =>
        {
            Ok((t.to_f32()?, [b, h, r, n]))
        }
        ref other => {
            Err(OpError::invalid(format!("attention_bias has shape {other:?}, expected {wanted:?}")))
        }
    }
}

/// Adds a row of the bias.
pub(super) fn add_bias(
    (bias, [b, h, r, n]): &(Cow<[f32]>, [usize; 4]),
    batch: usize,
    head: usize,
    row: usize,
    out: &mut [f32],
) {
    let pick = |i: usize, size: usize| if size == 1 { 0 } else { i };
    let start = ((pick(batch, *b) * h + pick(head, *h)) * r + pick(row, *r)) * n;
    out.iter_mut().zip(&bias[start..start + n]).for_each(|(o, b)| *o += b);
}
