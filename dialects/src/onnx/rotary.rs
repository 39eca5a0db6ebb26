//! RotaryEmbedding (opset 23): pairs of elements of each head turned by the angle of their position.

use super::util;
use crate::kernels::rotary::Angles;
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.RotaryEmbedding", operands: (3, 4), infer: util::same_type, eval, ..OpDef::NEW }];

fn eval(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let grid = Grid::of(x, cx.int_or("num_heads", 0))?;
    let Grid { batch, seq, size, .. } = grid;
    let turned = match usize::try_from(cx.int_or("rotary_embedding_dim", 0)) {
        Ok(0) => size,
        Ok(d) if d <= size => d,
        _ => return Err(OpError::invalid("rotary_embedding_dim exceeds the head size")),
    };
    let (cos, sin) = (cx.input(1)?, cx.input(2)?);
    let wrong = |what: &str, t: &Tensor| {
        let found = t.shape();
        OpError::invalid(format!("{what} has shape {found:?}, X has {batch} rows of {seq} heads of {size}"))
    };
    if cos.shape().last() != Some(&(turned / 2)) || turned % 2 != 0 {
        return Err(wrong("the cosine or sine cache", cos));
    }
    let angles = Angles::of(cos, sin, size, cx.int_or("interleaved", 0) != 0)?;
    // For each batch and position: the row of the caches.
    let rows: Vec<usize> = match (cx.opt(3)?, cos.shape()) {
        (Some(p), [_, _]) if p.shape() == [batch, seq] => {
            p.to_i64()?.iter().map(|&p| angles.row(p)).collect::<Result<_, _>>()?
        }
        (Some(p), [_, _]) => return Err(wrong("position_ids", p)),
        // Caches of one row do not stand for all rows: runtimes refuse that, as the specification does.
        (None, &[b, s, _]) if b == batch && s == seq => (0..batch * seq).collect(),
        _ => return Err(wrong("the cosine or sine cache", cos)),
    };
    cx.one(grid.turned(x, &angles, &rows)?)
}

/// Where the heads of X lie: `[batch, heads, seq, size]`, or `[batch, seq, heads * size]`.
pub(crate) struct Grid {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    heads: usize,
    pub(crate) size: usize,
    heads_first: bool,
}

impl Grid {
    /// X's, with `heads` for a tensor of three dims.
    pub(crate) fn of(x: &Tensor, heads: i64) -> Result<Grid, OpError> {
        let count = usize::try_from(heads).unwrap_or(0);
        match *x.shape() {
            [batch, heads, seq, size] => Ok(Grid { batch, seq, heads, size, heads_first: true }),
            [batch, seq, hidden] if count > 0 && hidden % count == 0 => {
                Ok(Grid { batch, seq, heads: count, size: hidden / count, heads_first: false })
            }
            ref other => {
                let message = format!("X has shape {other:?} with num_heads {heads}: not made of heads");
                Err(OpError::invalid(message))
            }
        }
    }

    /// X with every head turned by its row of angles, `rows` being one for each batch and position.
    pub(crate) fn turned(&self, x: &Tensor, angles: &Angles, rows: &[usize]) -> Result<Tensor, OpError> {
        let mut y = x.to_f32()?.into_owned();
        let Grid { seq, heads, size, .. } = *self;
        if size > 0 && heads * seq > 0 {
            y.par_chunks_mut(size * heads * seq).enumerate().for_each(|(b, y)| {
                for (i, head) in y.chunks_exact_mut(size).enumerate() {
                    let position = if self.heads_first { i % seq } else { i / heads };
                    angles.turn(head, rows[b * seq + position]);
                }
            });
        }
        Ok(Tensor::from_f32(x.elem(), x.shape(), y)?)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("rotary");
    }
}
