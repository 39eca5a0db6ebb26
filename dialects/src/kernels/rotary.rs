//! Rotary position embedding: pairs of elements of a head turned by the angle of their position.

use crate::ops::OpError;
use crate::tensor::Tensor;
use std::borrow::Cow;

/// Cosines and sines of angles, one row of `half` for each position.
pub struct Angles<'a> {
    cos: Cow<'a, [f32]>,
    sin: Cow<'a, [f32]>,
    half: usize,
    /// Whether pairs are neighbours, rather than the elements of two halves.
    interleaved: bool,
}

impl<'a> Angles<'a> {
    /// From two tensors `[.., half]` of one shape, for heads of `size` elements of which the first `2 * half` turn.
    pub fn of(
        cos: &'a Tensor,
        sin: &'a Tensor,
        size: usize,
        interleaved: bool,
    ) -> Result<Angles<'a>, OpError> {
        let half = cos.shape().last().copied().unwrap_or(0);
        if cos.shape() != sin.shape() || half > size / 2 {
            let (c, s) = (cos.shape(), sin.shape());
            let message = format!("cosines of shape {c:?} and sines of shape {s:?} for heads of {size}");
            return Err(OpError::invalid(message));
        }
        Ok(Angles { cos: cos.to_f32()?, sin: sin.to_f32()?, half, interleaved })
    }

    /// Positions that there are angles for.
    pub fn rows(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }

    /// The row of a position; an error where there is none.
    pub fn row(&self, position: i64) -> Result<usize, OpError> {
        let row = usize::try_from(position).ok().filter(|&row| row < self.rows());
        row.ok_or_else(|| OpError::invalid(format!("position {position} is not within the {}", self.rows())))
    }

    /// Turns one head by the angles of a row.
    pub fn turn(&self, head: &mut [f32], row: usize) {
        let half = self.half;
        let (c, s) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
        for (i, (c, s)) in c.iter().zip(s).enumerate() {
            let (p, q) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            (head[p], head[q]) = (c * head[p] - s * head[q], s * head[p] + c * head[q]);
        }
    }
}
