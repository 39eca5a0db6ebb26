//! Attention (opset 23 on): `softmax(softcap(Q K^T * scale) + bias) V`, with grouped-query heads, masks, a
//! key/value cache that is concatenated, and sliding windows.
//!
//! Computed in single precision whatever the float type and `softmax_precision`. A row that may attend to nothing
//! gives zeros, as the specification's later errata say.

use super::softmax::task_rows;
use crate::ir::{Dim, Type};
use crate::kernels::gemm::{self, Mat};
use crate::kernels::{row, strided};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::borrow::Cow;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.Attention", operands: (3, 7), results: (1, 4), infer, eval, ..OpDef::NEW }];

/// Query rows that one task works on.
const ROWS: usize = 128;

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let unranked = || vec![Type::unranked(elem).into(); 4];
    let heads = |name: &str| cx.attrs.int(name).map_or(Dim::Unknown, Dim::Known);
    // [batch, heads, positions, size of a head] of Q, K and V.
    let split = |i: usize, count: Dim| -> Option<[Dim; 4]> {
        match cx.dims(i)? {
            [b, h, s, d] => Some([b.clone(), h.clone(), s.clone(), d.clone()]),
            [b, s, hidden] => Some([b.clone(), count.clone(), s.clone(), hidden.div(&count)]),
            _ => None,
        }
    };
    let (Some(q), Some(k), Some(v)) =
        (split(0, heads("q_num_heads")), split(1, heads("kv_num_heads")), split(2, heads("kv_num_heads")))
    else {
        return Ok(unranked());
    };
    let past = match (cx.has(4), cx.dims(4)) {
        (false, _) => Dim::Known(0),
        (true, Some([_, _, s, _])) => s.clone(),
        _ => Dim::Unknown,
    };
    let total = past.add(&k[2]);
    let [batch, q_heads, rows, _] = q;
    let y = match cx.dims(0).map(<[Dim]>::len) {
        Some(3) => Type::tensor(elem, [batch.clone(), rows.clone(), q_heads.mul(&v[3])]),
        _ => Type::tensor(elem, [batch.clone(), q_heads.clone(), rows.clone(), v[3].clone()]),
    };
    let cache = |x: &[Dim; 4]| Type::tensor(elem, [batch.clone(), k[1].clone(), total.clone(), x[3].clone()]);
    let scores = Type::tensor(elem, [batch.clone(), q_heads, rows, total.clone()]);
    Ok(vec![y.into(), cache(&k).into(), cache(&v).into(), scores.into()])
}

/// Q, K or V: `heads` matrices of `[positions, size]` per batch, at these strides.
struct Heads<'a> {
    data: Cow<'a, [f32]>,
    batch: usize,
    heads: usize,
    positions: usize,
    size: usize,
    /// From one head, and from one position, to the next.
    strides: [usize; 2],
}

impl<'a> Heads<'a> {
    fn of(t: &'a Tensor, heads: Option<i64>) -> Result<Heads<'a>, OpError> {
        let (shape, data) = (t.shape(), t.to_f32()?);
        let count = heads.and_then(|h| usize::try_from(h).ok()).unwrap_or(0);
        match *shape {
            [batch, heads, positions, size] => {
                Ok(Heads { data, batch, heads, positions, size, strides: [positions * size, size] })
            }
            [batch, positions, hidden] if count > 0 && hidden % count == 0 => {
                let size = hidden / count;
                Ok(Heads { data, batch, heads: count, positions, size, strides: [size, hidden] })
            }
            _ => {
                let message = format!("a tensor of shape {shape:?} is not made of {count} heads");
                Err(OpError::invalid(message))
            }
        }
    }

    fn matrix(&self, batch: usize, head: usize) -> Mat<'_, f32> {
        let start = batch * self.heads * self.positions * self.size + head * self.strides[0];
        let data = self.data.get(start..).unwrap_or(&[]);
        Mat::strided(data, self.positions, self.size, self.strides[1], 1)
    }

    /// These positions behind those of a cache `[batch, heads, positions, size]`, contiguous.
    fn after(self, past: Option<&'a Tensor>) -> Result<Heads<'a>, OpError> {
        let past = past.map(|t| Heads::of(t, None)).transpose()?;
        let old = past.as_ref().map_or(0, |p| p.positions);
        if let Some(p) = &past
            && (p.batch, p.heads, p.size) != (self.batch, self.heads, self.size)
        {
            return Err(OpError::invalid("the cache of past keys or values has another shape"));
        }
        if past.is_none() && self.strides == [self.positions * self.size, self.size] {
            return Ok(self);
        }
        let (positions, size) = (old + self.positions, self.size);
        let mut data = vec![0f32; strided::count(&[self.batch, self.heads, positions, size])?];
        if size > 0 && positions > 0 {
            for (i, data) in data.chunks_exact_mut(positions * size).enumerate() {
                let (b, h) = (i / self.heads, i % self.heads);
                let (before, rest) = data.split_at_mut(old * size);
                if let Some(p) = &past {
                    before.copy_from_slice(&p.data[i * old * size..][..old * size]);
                }
                let start = b * self.heads * self.positions * size + h * self.strides[0];
                for (j, to) in rest.chunks_exact_mut(size).enumerate() {
                    to.copy_from_slice(&self.data[start + j * self.strides[1]..][..size]);
                }
            }
        }
        let strides = [positions * size, size];
        Ok(Heads { data: Cow::Owned(data), positions, strides, ..self })
    }

    fn tensor(&self, like: &Tensor) -> Result<Tensor, OpError> {
        let shape = [self.batch, self.heads, self.positions, self.size];
        Ok(Tensor::from_f32(like.elem(), &shape, self.data.to_vec())?)
    }
}

/// What is added to the scores: a mask tensor, the causal frontier, a window, and padding.
struct Bias<'a> {
    mask: Option<(Cow<'a, [f32]>, [usize; 4])>,
    /// Whether a mask of one column stands for all keys (opset 23), rather than for the first (24 on).
    spread: bool,
    causal: bool,
    window: [Option<i64>; 2],
    /// Valid keys of each batch, where they are given.
    valid: Option<Vec<i64>>,
    /// Keys before the first query; minus the query rows is added for `valid`.
    past: i64,
    rows: i64,
}

impl<'a> Bias<'a> {
    fn of(cx: &EvalCx<'a>, [batch, heads, rows, keys]: [usize; 4], past: usize) -> Result<Bias<'a>, OpError> {
        let mask = cx.opt(3)?.map(|t| {
            let values: Cow<[f32]> = match t.bools() {
                Ok(b) => b.iter().map(|&b| if b { 0.0 } else { f32::NEG_INFINITY }).collect(),
                Err(_) => t.to_f32()?,
            };
            let mut shape = [1; 4];
            let rank = t.rank().min(4);
            shape[4 - rank..].copy_from_slice(&t.shape()[t.rank() - rank..]);
            let fits = [(shape[0], batch), (shape[1], heads), (shape[2], rows)];
            if t.rank() > 4 || fits.iter().any(|&(d, n)| d != 1 && d != n) || shape[3] > keys.max(1) {
                let message =
                    format!("a mask of shape {:?} for [{batch}, {heads}, {rows}, {keys}]", t.shape());
                return Err(OpError::invalid(message));
            }
            Ok((values, shape))
        });
        let valid = cx.opt(6)?.map(|t| t.to_i64().map(Cow::into_owned)).transpose()?;
        if valid.as_ref().is_some_and(|v| v.len() != batch) {
            return Err(OpError::invalid(format!("nonpad_kv_seqlen does not have {batch} elements")));
        }
        let side = |name: &str| cx.attrs.int(name).filter(|&n| n >= 0);
        Ok(Bias {
            mask: mask.transpose()?,
            spread: cx.opset < 24,
            causal: cx.int_or("is_causal", 0) != 0,
            window: [side("left_window_size"), side("right_window_size")],
            valid,
            past: past as i64,
            rows: rows as i64,
        })
    }

    /// Writes the bias of a row into `out`. Returns whether there is any.
    fn row(&self, batch: usize, head: usize, row: usize, out: &mut [f32]) -> bool {
        let windowed = self.window.iter().any(Option::is_some);
        if self.mask.is_none() && !self.causal && !windowed && self.valid.is_none() {
            return false;
        }
        out.fill(0.0);
        if let Some((mask, [b, h, r, n])) = &self.mask {
            let pick = |i: usize, size: usize| if size == 1 { 0 } else { i };
            let start = ((pick(batch, *b) * h + pick(head, *h)) * r + pick(row, *r)) * n;
            match mask[start..start + n] {
                [only] if self.spread => out.fill(only),
                ref values => {
                    out[..*n].copy_from_slice(values);
                    out[*n..].fill(f32::NEG_INFINITY);
                }
            }
        }
        let valid = self.valid.as_ref().map(|v| v[batch]);
        let position = row as i64 + valid.map_or(self.past, |v| v - self.rows);
        let [left, right] = self.window;
        // Keys from..to may be attended to.
        let mut to = valid.unwrap_or(i64::MAX);
        if self.causal {
            to = to.min(position + 1);
        }
        to = to.min(right.map_or(i64::MAX, |w| position.saturating_add(w).saturating_add(1)));
        let from = left.map_or(0, |w| position.saturating_sub(w));
        let inside = |i: i64| usize::try_from(i).unwrap_or(0).min(out.len());
        let (from, to) = (inside(from), inside(to));
        out[..from].fill(f32::NEG_INFINITY);
        out[to..].fill(f32::NEG_INFINITY);
        true
    }
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (q_heads, kv_heads) = (cx.attrs.int("q_num_heads"), cx.attrs.int("kv_num_heads"));
    let q = Heads::of(cx.input(0)?, q_heads)?;
    let past = cx.opt(4)?;
    let k = Heads::of(cx.input(1)?, kv_heads)?.after(past)?;
    let v = Heads::of(cx.input(2)?, kv_heads)?.after(cx.opt(5)?)?;
    let fits = (k.batch, v.batch, v.heads, v.positions) == (q.batch, q.batch, k.heads, k.positions);
    if !fits || k.size != q.size || k.heads == 0 || !q.heads.is_multiple_of(k.heads) {
        let shapes: Vec<&[usize]> = (0..3).filter_map(|i| Some(cx.input(i).ok()?.shape())).collect();
        return Err(OpError::invalid(format!("Q, K and V have shapes {shapes:?}, which do not fit")));
    }
    let (rows, keys, groups) = (q.positions, k.positions, q.heads / k.heads);
    let bias = Bias::of(cx, [q.batch, q.heads, rows, keys], past.map_or(0, |p| p.shape()[2]))?;
    let scale = cx.attrs.float("scale").unwrap_or(1.0 / (q.size as f32).sqrt());
    let softcap = cx.float_or("softcap", 0.0);
    let mode = cx.int_or("qk_matmul_output_mode", 0);
    let want_scores = cx.outputs > 3;
    let all_scores = if want_scores { strided::count(&[q.batch, q.heads, rows, keys])? } else { 0 };
    let mut scores_out = vec![0f32; all_scores];
    let mut y = vec![0f32; strided::count(&[q.batch, q.heads, rows, v.size])?];
    let blocks = rows.div_ceil(ROWS);
    // One entry per block of query rows of a head: its part of the results.
    let mut tasks: Vec<(usize, &mut [f32], &mut [f32])> = Vec::new();
    let (mut y_rest, mut scores_rest) = (&mut y[..], &mut scores_out[..]);
    for i in 0..q.batch * q.heads * blocks {
        let count = ROWS.min(rows - i % blocks * ROWS);
        let (a, b) = y_rest.split_at_mut(count * v.size);
        let (c, d) = scores_rest.split_at_mut(if want_scores { count * keys } else { 0 });
        (y_rest, scores_rest) = (b, d);
        tasks.push((i, a, c));
    }
    tasks.into_par_iter().for_each(|(i, y, kept)| {
        let (head, from) = (i / blocks, i % blocks * ROWS);
        let (batch, head) = (head / q.heads, head % q.heads);
        let count = ROWS.min(rows - from);
        let mut scores = vec![0f32; count * keys];
        if keys == 0 {
            return;
        }
        let key = k.matrix(batch, head / groups);
        gemm::tile(q.matrix(batch, head).rows(from, from + count), key.t(), &mut scores);
        row::shift_scale(&mut scores, 0.0, scale);
        if mode == 0 {
            kept.iter_mut().zip(&scores).for_each(|(o, s)| *o = *s);
        }
        if softcap > 0.0 {
            scores.iter_mut().for_each(|s| *s = (*s / softcap).tanh() * softcap);
        }
        if mode == 1 {
            kept.iter_mut().zip(&scores).for_each(|(o, s)| *o = *s);
        }
        let mut add = vec![0f32; keys];
        for (r, scores) in scores.chunks_exact_mut(keys).enumerate() {
            let biased = bias.row(batch, head, from + r, &mut add);
            if biased {
                row::add(scores, &add);
            }
            if mode == 2
                && let Some(kept) = kept.get_mut(r * keys..(r + 1) * keys)
            {
                kept.copy_from_slice(scores);
            }
            if biased && row::max(&add) == f32::NEG_INFINITY {
                scores.fill(0.0);
            } else {
                row::softmax(scores);
            }
        }
        if mode == 3 {
            kept.iter_mut().zip(&scores).for_each(|(o, s)| *o = *s);
        }
        gemm::tile(Mat::new(&scores, count, keys), v.matrix(batch, head / groups), y);
    });
    let x = cx.input(0)?;
    let y = match x.rank() {
        3 => join_heads(&y, [q.batch, q.heads, rows, v.size]),
        _ => y,
    };
    let y_shape = match x.rank() {
        3 => vec![q.batch, rows, q.heads * v.size],
        _ => vec![q.batch, q.heads, rows, v.size],
    };
    let y = Tensor::from_f32(x.elem(), &y_shape, y)?;
    if cx.outputs < 2 {
        return cx.one(y);
    }
    let mut out = vec![y.into(), k.tensor(x)?.into(), v.tensor(x)?.into()];
    if want_scores {
        let shape = [q.batch, q.heads, rows, keys];
        out.push(Tensor::from_f32(x.elem(), &shape, scores_out)?.into());
    }
    Ok(out)
}

/// `[batch, heads, positions, size]` as `[batch, positions, heads * size]`.
fn join_heads(y: &[f32], [_, heads, positions, size]: [usize; 4]) -> Vec<f32> {
    let mut out = vec![0f32; y.len()];
    let width = heads * size;
    if !y.is_empty() {
        let rows = task_rows(width);
        out.par_chunks_mut(rows * width).enumerate().for_each(|(task, out)| {
            for (i, out) in out.chunks_exact_mut(size).enumerate() {
                let (row, head) = (task * rows + i / heads, i % heads);
                let (batch, position) = (row / positions, row % positions);
                out.copy_from_slice(&y[((batch * heads + head) * positions + position) * size..][..size]);
            }
        });
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("attention");
    }
}
