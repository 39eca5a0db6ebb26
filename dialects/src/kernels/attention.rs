//! Attention over heads: `softmax(softcap(Q K^T * scale) + bias) V`, one block of query rows of one head at a time.
//!
//! Computed in single precision. A row that may attend to nothing gives zeros.

use super::gemm::{self, Mat};
use super::{row, strided};
use crate::ir::Elem;
use crate::ops::{Item, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::borrow::Cow;

/// Query rows that one task works on.
const ROWS: usize = 128;

/// Elements that one task moves.
const CHUNK: usize = 1 << 14;

/// Q, K or V: for each batch and head a matrix `[positions, size]`, wherever it lies in `data`.
pub struct Heads<'a> {
    data: Cow<'a, [f32]>,
    start: usize,
    /// Batches.
    pub batch: usize,
    /// Heads of a batch.
    pub heads: usize,
    /// Rows of a head.
    pub positions: usize,
    /// Elements of a row.
    pub size: usize,
    /// From one batch, head and position to the next.
    strides: [usize; 3],
}

impl<'a> Heads<'a> {
    /// Contiguous `[batch, heads, positions, size]`.
    pub fn contiguous(
        data: impl Into<Cow<'a, [f32]>>,
        [batch, heads, positions, size]: [usize; 4],
    ) -> Result<Heads<'a>, OpError> {
        let strides = [heads * positions * size, positions * size, size];
        Heads::strided(data, 0, [batch, heads, positions, size], strides)
    }

    /// Heads that lie side by side in rows of `[batch, positions, width]`, the first at column `from`.
    pub fn side_by_side(
        data: impl Into<Cow<'a, [f32]>>,
        [batch, positions, width]: [usize; 3],
        from: usize,
        [heads, size]: [usize; 2],
    ) -> Result<Heads<'a>, OpError> {
        let strides = [positions * width, size, width];
        Heads::strided(data, from, [batch, heads, positions, size], strides)
    }

    /// Heads of `[batch, heads, positions, size]` from element `start` on, at these strides between batches, heads and
    /// positions.
    pub fn strided(
        data: impl Into<Cow<'a, [f32]>>,
        start: usize,
        [batch, heads, positions, size]: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Heads<'a>, OpError> {
        let data = data.into();
        let dims = [batch, heads, positions];
        let last = dims.iter().zip(strides).try_fold(start + size, |at, (&n, stride)| {
            at.checked_add(n.saturating_sub(1).checked_mul(stride)?)
        });
        if strided::count(&[batch, heads, positions, size])? > 0 && last.is_none_or(|end| end > data.len()) {
            let found = data.len();
            let message =
                format!("{batch} batches of {heads} heads [{positions}, {size}] in {found} elements");
            return Err(OpError::invalid(message));
        }
        Ok(Heads { data, start, batch, heads, positions, size, strides })
    }

    /// `[batch, heads, positions, size]`, or `[batch, positions, hidden]` with the number of heads beside it.
    pub fn of(t: &'a Tensor, heads: Option<i64>) -> Result<Heads<'a>, OpError> {
        let (shape, data) = (t.shape(), t.to_f32()?);
        let count = heads.and_then(|h| usize::try_from(h).ok()).unwrap_or(0);
        match *shape {
            [batch, heads, positions, size] => Heads::contiguous(data, [batch, heads, positions, size]),
            [batch, positions, hidden] if count > 0 && hidden % count == 0 => {
                Heads::side_by_side(data, [batch, positions, hidden], 0, [count, hidden / count])
            }
            _ => {
                let message = format!("a tensor of shape {shape:?} is not made of {count} heads");
                Err(OpError::invalid(message))
            }
        }
    }

    /// `[batch, heads, positions, size]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.positions, self.size]
    }

    fn at(&self, batch: usize, head: usize, position: usize) -> usize {
        let [b, h, p] = self.strides;
        self.start + batch * b + head * h + position * p
    }

    fn matrix(&self, batch: usize, head: usize) -> Mat<'_, f32> {
        let data = self.data.get(self.at(batch, head, 0)..).unwrap_or(&[]);
        Mat::strided(data, self.positions, self.size, self.strides[2], 1)
    }

    /// The first `n` positions.
    pub fn first(&self, n: usize) -> Heads<'_> {
        Heads { data: Cow::Borrowed(&self.data), positions: n.min(self.positions), ..*self }
    }

    /// A copy, contiguous, whose rows `f(batch, head, position, row)` has changed.
    pub fn changed(
        &self,
        f: impl Fn(usize, usize, usize, &mut [f32]) + Sync,
    ) -> Result<Heads<'static>, OpError> {
        let [_, heads, positions, size] = self.shape();
        let mut data = vec![0f32; strided::count(&self.shape())?];
        if !data.is_empty() {
            let rows = CHUNK.div_ceil(size);
            data.par_chunks_mut(rows * size).enumerate().for_each(|(task, data)| {
                for (i, to) in data.chunks_exact_mut(size).enumerate() {
                    let i = task * rows + i;
                    let (b, h, p) = (i / positions / heads, i / positions % heads, i % positions);
                    to.copy_from_slice(&self.data[self.at(b, h, p)..][..size]);
                    f(b, h, p, to);
                }
            });
        }
        Heads::contiguous(data, self.shape())
    }

    /// These positions in a buffer of `length` positions that held `past` before: those of batch `b` from `from[b]` on.
    pub fn in_buffer(
        &self,
        past: Option<&Heads>,
        from: &[usize],
        length: usize,
    ) -> Result<Heads<'static>, OpError> {
        let [batch, heads, positions, size] = self.shape();
        if let Some(p) = past
            && (p.batch, p.heads, p.size) != (batch, heads, size)
        {
            let (p, own) = (p.shape(), self.shape());
            return Err(OpError::invalid(format!("a cache of past keys or values {p:?} before {own:?}")));
        }
        if from.len() != batch || from.iter().any(|f| f.saturating_add(positions) > length) {
            let message = format!("{positions} positions from {from:?} on in a buffer of {length}");
            return Err(OpError::invalid(message));
        }
        let mut data = vec![0f32; strided::count(&[batch, heads, length, size])?];
        if !data.is_empty() {
            data.par_chunks_mut(length * size).enumerate().for_each(|(i, data)| {
                let (b, h) = (i / heads, i % heads);
                let mut copy = |from: &Heads, n: usize, to: usize| {
                    for (p, to) in data[to * size..].chunks_exact_mut(size).take(n).enumerate() {
                        to.copy_from_slice(&from.data[from.at(b, h, p)..][..size]);
                    }
                };
                if let Some(past) = past {
                    copy(past, past.positions.min(length), 0);
                }
                copy(self, positions, from[b]);
            });
        }
        Heads::contiguous(data, [batch, heads, length, size])
    }

    /// These positions behind those of a cache.
    pub fn after(self, past: Option<&Heads>) -> Result<Heads<'a>, OpError> {
        match past {
            None => Ok(self),
            Some(p) => {
                let old = p.positions;
                self.in_buffer(past, &vec![old; self.batch], old.saturating_add(self.positions))
            }
        }
    }

    /// All elements, as `[batch, heads, positions, size]`.
    pub fn values(&self) -> Result<Cow<'_, [f32]>, OpError> {
        let [_, heads, positions, size] = self.shape();
        let count = strided::count(&self.shape())?;
        if self.strides == [heads * positions * size, positions * size, size] {
            return Ok(Cow::Borrowed(&self.data[self.start..][..count]));
        }
        match self.changed(|_, _, _, _| ())?.data {
            Cow::Owned(data) => Ok(Cow::Owned(data)),
            Cow::Borrowed(data) => Ok(Cow::Borrowed(data)),
        }
    }

    /// A tensor `[batch, heads, positions, size]`.
    pub fn tensor(&self, elem: Elem) -> Result<Tensor, OpError> {
        Ok(Tensor::from_f32(elem, &self.shape(), self.values()?.into_owned())?)
    }
}

/// Which scores to give back.
#[derive(Clone, Copy, PartialEq)]
pub enum Keep {
    /// `Q K^T * scale`.
    Products,
    /// After the softcap.
    Capped,
    /// After the bias.
    Biased,
    /// After the softmax.
    Weights,
}

/// Writes what is added to the scores of (batch, head, row), one for each key, and says whether there is anything.
pub type Bias<'a> = dyn Fn(usize, usize, usize, &mut [f32]) -> bool + Sync + 'a;

/// What happens between the two products.
pub struct Attention<'a> {
    /// Factor of the scores.
    pub scale: f32,
    /// Scores `s` become `tanh(s / softcap) * softcap`; 0 leaves them.
    pub softcap: f32,
    /// What is added to the scores.
    pub bias: &'a Bias<'a>,
    /// One more score per head that takes its share of the softmax and adds nothing to the result.
    pub sinks: Option<&'a [f32]>,
    /// Scores that are wanted.
    pub keep: Option<Keep>,
}

impl Attention<'_> {
    /// The result `[batch, heads, rows, size of V]`, and the scores `[batch, heads, rows, keys]` if they are wanted.
    /// With fewer heads of K and V than of Q, each serves as many neighbours of Q.
    pub fn run(&self, q: &Heads, k: &Heads, v: &Heads) -> Result<(Vec<f32>, Vec<f32>), OpError> {
        let fits = (k.batch, v.batch, v.heads, v.positions) == (q.batch, q.batch, k.heads, k.positions);
        if !fits || k.size != q.size || k.heads == 0 || !q.heads.is_multiple_of(k.heads) {
            let shapes = [q.shape(), k.shape(), v.shape()];
            let message = format!("the heads of Q, K and V are {shapes:?}, which do not fit");
            return Err(OpError::invalid(message));
        }
        if self.sinks.is_some_and(|s| s.len() != q.heads) {
            return Err(OpError::invalid(format!("the sinks are not one for each of {} heads", q.heads)));
        }
        let (rows, keys, groups) = (q.positions, k.positions, q.heads / k.heads);
        let kept = if self.keep.is_some() { strided::count(&[q.batch, q.heads, rows, keys])? } else { 0 };
        let mut scores_out = vec![0f32; kept];
        let mut y = vec![0f32; strided::count(&[q.batch, q.heads, rows, v.size])?];
        let blocks = rows.div_ceil(ROWS);
        // One entry per block of query rows of a head: its part of the results.
        let mut tasks: Vec<(usize, &mut [f32], &mut [f32])> = Vec::new();
        let (mut y_rest, mut scores_rest) = (&mut y[..], &mut scores_out[..]);
        for i in 0..q.batch * q.heads * blocks {
            let count = ROWS.min(rows - i % blocks * ROWS);
            let (a, b) = y_rest.split_at_mut(count * v.size);
            let (c, d) = scores_rest.split_at_mut(if self.keep.is_some() { count * keys } else { 0 });
            (y_rest, scores_rest) = (b, d);
            tasks.push((i, a, c));
        }
        tasks.into_par_iter().for_each(|(i, y, kept)| {
            let (head, from) = (i / blocks, i % blocks * ROWS);
            let (batch, head) = (head / q.heads, head % q.heads);
            let count = ROWS.min(rows - from);
            if keys == 0 {
                return;
            }
            let mut scores = vec![0f32; count * keys];
            let key = k.matrix(batch, head / groups);
            gemm::tile(q.matrix(batch, head).rows(from, from + count), key.t(), &mut scores);
            self.weigh(batch, head, from, keys, &mut scores, kept);
            gemm::tile(Mat::new(&scores, count, keys), v.matrix(batch, head / groups), y);
        });
        Ok((y, scores_out))
    }

    /// Turns the products of query rows from `from` on with all keys into weights.
    fn weigh(
        &self,
        batch: usize,
        head: usize,
        from: usize,
        keys: usize,
        scores: &mut [f32],
        kept: &mut [f32],
    ) {
        let keep = |stage: Keep, scores: &[f32], kept: &mut [f32]| {
            if self.keep == Some(stage) {
                kept.copy_from_slice(scores);
            }
        };
        row::shift_scale(scores, 0.0, self.scale);
        keep(Keep::Products, scores, kept);
        if self.softcap > 0.0 {
            scores.iter_mut().for_each(|s| *s = (*s / self.softcap).tanh() * self.softcap);
        }
        keep(Keep::Capped, scores, kept);
        let mut add = vec![0f32; keys];
        for (r, scores) in scores.chunks_exact_mut(keys).enumerate() {
            let biased = (self.bias)(batch, head, from + r, &mut add);
            if biased {
                row::add(scores, &add);
            }
            if self.keep == Some(Keep::Biased) {
                kept[r * keys..][..keys].copy_from_slice(scores);
            }
            match self.sinks {
                _ if biased && row::max(&add) == f32::NEG_INFINITY => scores.fill(0.0),
                Some(sinks) => row::softmax_beside(scores, sinks[head]),
                None => row::softmax(scores),
            }
        }
        keep(Keep::Weights, scores, kept);
    }
}

/// An op's results, as many as are wanted: `y`, the keys, the values, and the scores `[batch, heads, rows, keys]`.
pub fn results(
    outputs: usize,
    y: Tensor,
    [k, v]: [&Heads; 2],
    (scores, shape): (Vec<f32>, [usize; 4]),
) -> Result<Vec<Item>, OpError> {
    let elem = y.elem();
    let mut out = vec![y.into()];
    if outputs > 1 {
        out.extend([k.tensor(elem)?.into(), v.tensor(elem)?.into()]);
    }
    if outputs > 3 && !(scores.is_empty() && shape.iter().all(|&n| n > 0)) {
        out.push(Tensor::from_f32(elem, &shape, scores)?.into());
    }
    Ok(out)
}

/// `[batch, heads, positions, size]` as a tensor `[batch, positions, heads * size]`.
pub fn joined(elem: Elem, y: &[f32], [batch, heads, positions, size]: [usize; 4]) -> Result<Tensor, OpError> {
    let mut out = vec![0f32; y.len()];
    let width = heads * size;
    if !y.is_empty() {
        let rows = CHUNK.div_ceil(width);
        out.par_chunks_mut(rows * width).enumerate().for_each(|(task, out)| {
            for (i, out) in out.chunks_exact_mut(size).enumerate() {
                let (row, head) = (task * rows + i / heads, i % heads);
                let (batch, position) = (row / positions, row % positions);
                out.copy_from_slice(&y[((batch * heads + head) * positions + position) * size..][..size]);
            }
        });
    }
    Ok(Tensor::from_f32(elem, &[batch, positions, width], out)?)
}
