//! RotaryEmbedding (opset 23): pairs of elements of each head turned by the angle of their position.

use super::util;
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.RotaryEmbedding", operands: (3, 4), infer: util::same_type, eval, ..OpDef::NEW }];

fn eval(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let heads_attr = usize::try_from(cx.int_or("num_heads", 0)).unwrap_or(0);
    // Strides between batches, positions and heads, in heads.
    let (batch, seq, heads, size, per_position, per_head) = match *x.shape() {
        [b, h, s, d] => (b, s, h, d, 1, s),
        [b, s, hidden] if heads_attr > 0 && hidden % heads_attr == 0 => {
            (b, s, heads_attr, hidden / heads_attr, heads_attr, 1)
        }
        ref other => {
            let message = format!("X has shape {other:?} with num_heads {heads_attr}: not made of heads");
            return Err(OpError::invalid(message));
        }
    };
    let turned = match usize::try_from(cx.int_or("rotary_embedding_dim", 0)) {
        Ok(0) => size,
        Ok(d) if d <= size => d,
        _ => return Err(OpError::invalid("rotary_embedding_dim exceeds the head size")),
    };
    let half = turned / 2;
    let (cos, sin) = (cx.input(1)?, cx.input(2)?);
    let positions = cx.opt(3)?;
    let wrong = |what: &str, t: &Tensor| {
        let found = t.shape();
        OpError::invalid(format!("{what} has shape {found:?}, X has {batch} rows of {seq} heads of {size}"))
    };
    if cos.shape() != sin.shape() || cos.shape().last() != Some(&half) || turned % 2 != 0 {
        return Err(wrong("the cosine or sine cache", cos));
    }
    // For each batch and position: the row of the caches.
    let rows: Vec<usize> = match (positions, cos.shape()) {
        (Some(p), &[max, _]) => {
            if p.shape() != [batch, seq] {
                return Err(wrong("position_ids", p));
            }
            let inside = |&i: &i64| usize::try_from(i).ok().filter(|&i| i < max);
            let rows: Option<Vec<usize>> = p.to_i64()?.iter().map(inside).collect();
            rows.ok_or_else(|| OpError::invalid(format!("a position is not within the {max} of the caches")))?
        }
        // Caches of one row do not stand for all rows: runtimes refuse that, as the specification does.
        (None, &[b, s, _]) if b == batch && s == seq => (0..batch * seq).collect(),
        _ => return Err(wrong("the cosine or sine cache", cos)),
    };
    let (cos, sin) = (cos.to_f32()?, sin.to_f32()?);
    let interleaved = cx.int_or("interleaved", 0) != 0;
    let mut y = x.to_f32()?.into_owned();
    let turn = |head: &mut [f32], row: usize| {
        let (c, s) = (&cos[row * half..][..half], &sin[row * half..][..half]);
        for (i, (c, s)) in c.iter().zip(s).enumerate() {
            let (p, q) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            (head[p], head[q]) = (c * head[p] - s * head[q], s * head[p] + c * head[q]);
        }
    };
    if size > 0 && heads * seq > 0 {
        y.par_chunks_mut(size * heads * seq).enumerate().for_each(|(b, y)| {
            for (i, head) in y.chunks_exact_mut(size).enumerate() {
                let position = if per_position == 1 { i % per_head } else { i / per_position };
                turn(head, rows[b * seq + position]);
            }
        });
    }
    cx.one(Tensor::from_f32(x.elem(), x.shape(), y)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("rotary");
    }
}
