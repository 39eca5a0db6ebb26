//! RotaryEmbedding of this domain: positions come before the caches, and one position may stand for a whole row.

use crate::kernels::rotary::Angles;
use crate::onnx::rotary::Grid;
use crate::onnx::util;
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};

/// The ops of this file.
pub const OPS: &[OpDef] = &[OpDef {
    name: "com.microsoft.RotaryEmbedding",
    operands: (4, 4),
    infer: util::same_type,
    eval,
    ..OpDef::NEW
}];

fn eval(cx: &EvalCx) -> Evaluated {
    if cx.int_or("is_packed_batching", 0) != 0 {
        return Err(OpError::Unsupported("rows of several lengths in one (is_packed_batching)".into()));
    }
    let (x, positions, cos, sin) = (cx.input(0)?, cx.input(1)?, cx.input(2)?, cx.input(3)?);
    let half = cos.shape().last().copied().unwrap_or(0);
    // Without a number of heads, the caches say how large one is.
    let heads = match (cx.int_or("num_heads", 0), x.shape()) {
        (0, [_, _, hidden]) => hidden.checked_div(2 * half).unwrap_or(0) as i64,
        (n, _) => n,
    };
    let grid = Grid::of(x, heads)?;
    let angles = Angles::of(cos, sin, grid.size, cx.int_or("interleaved", 0) != 0)?;
    let given = positions.to_i64()?;
    let rows: Vec<usize> = match *positions.shape() {
        [1] => (0..grid.batch * grid.seq)
            .map(|i| angles.row(given[0].saturating_add((i % grid.seq) as i64)))
            .collect::<Result<_, _>>()?,
        [b, s] if (b, s) == (grid.batch, grid.seq) => {
            given.iter().map(|&p| angles.row(p)).collect::<Result<_, _>>()?
        }
        ref other => {
            let (batch, seq) = (grid.batch, grid.seq);
            return Err(OpError::invalid(format!(
                "position_ids has shape {other:?}, expected [1] or [{batch}, {seq}]"
            )));
        }
    };
    cx.one(grid.turned(x, &angles, &rows)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_rotary");
    }
}
