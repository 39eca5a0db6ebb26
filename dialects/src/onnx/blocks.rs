//! DepthToSpace and SpaceToDepth: blocks of pixels traded for channels.

use super::movement::transpose;
use super::util;
use crate::ir::{Attrs, Dim};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.DepthToSpace", infer: |cx| infer(cx, true), eval: to_space, ..OpDef::NEW },
    OpDef { name: "onnx.SpaceToDepth", infer: |cx| infer(cx, false), eval: to_depth, ..OpDef::NEW },
];

/// The block's side, and whether the channels of a block stand together (`CRD`) rather than those of a pixel (`DCR`).
fn blocks(attrs: &Attrs) -> Result<(usize, bool), OpError> {
    let size = attrs.int("blocksize").unwrap_or(0);
    let side = usize::try_from(size).ok().filter(|&b| b > 0 && b < 1 << 16);
    let side = side.ok_or_else(|| OpError::invalid(format!("blocksize is {size}")))?;
    match attrs.str("mode").unwrap_or("DCR") {
        "DCR" => Ok((side, false)),
        "CRD" => Ok((side, true)),
        other => Err(OpError::invalid(format!("mode is {other:?}, expected DCR or CRD"))),
    }
}

/// `n` divided by `by` without a rest.
fn split(n: usize, by: usize) -> Result<usize, OpError> {
    match n % by {
        0 => Ok(n / by),
        _ => Err(OpError::invalid(format!("{n} is not a multiple of {by}"))),
    }
}

fn infer(cx: &InferCx, to_space: bool) -> Inferred {
    let (side, _) = blocks(cx.attrs)?;
    let Some(dims) = cx.dims(0) else { return util::one(cx.elem(0), None) };
    let [n, c, h, w] = dims else {
        return Err(OpError::invalid(format!("the operand is {}, expected 4 dims", cx.ty(0))));
    };
    let divide = |d: &Dim, by: usize| match d.known().and_then(|n| usize::try_from(n).ok()) {
        Some(n) => split(n, by).map(Dim::from),
        None => Ok(d.div(&Dim::from(by))),
    };
    let (area, along) = (side * side, Dim::from(side));
    util::one(
        cx.elem(0),
        Some(match to_space {
            true => vec![n.clone(), divide(c, area)?, h.mul(&along), w.mul(&along)],
            false => vec![n.clone(), c.mul(&Dim::from(area)), divide(h, side)?, divide(w, side)?],
        }),
    )
}

fn sizes(shape: &[usize]) -> Result<[usize; 4], OpError> {
    crate::kernels::strided::count(shape)?;
    <[usize; 4]>::try_from(shape)
        .map_err(|_| OpError::invalid(format!("the operand has shape {shape:?}, expected 4 dims")))
}

fn to_space(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let ((b, together), [n, c, h, w]) = (blocks(cx.attrs)?, sizes(t.shape())?);
    let depth = split(c, b * b)?;
    let moved = match together {
        true => transpose(&t.reshape(&[n, depth, b, b, h, w])?, &[0, 1, 4, 2, 5, 3])?,
        false => transpose(&t.reshape(&[n, b, b, depth, h, w])?, &[0, 3, 4, 1, 5, 2])?,
    };
    cx.one(moved.reshape(&[n, depth, h * b, w * b])?)
}

fn to_depth(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let ((b, together), [n, c, h, w]) = (blocks(cx.attrs)?, sizes(t.shape())?);
    let (rows, columns) = (split(h, b)?, split(w, b)?);
    let cut = t.reshape(&[n, c, rows, b, columns, b])?;
    let order = if together { [0, 1, 3, 5, 2, 4] } else { [0, 3, 5, 1, 2, 4] };
    cx.one(transpose(&cut, &order)?.reshape(&[n, c * b * b, rows, columns])?)
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn what_cannot_be_cut_into_blocks_is_refused() {
        let case = |op: &str, shape: &[usize], attrs: &[(&str, Attr)]| {
            let t = Tensor::new(shape, vec![0f32; shape.iter().product()]).unwrap();
            Case::new(op, 28, attrs, vec![Some(t)])
        };
        let two = [("blocksize", 2.into())];
        refused(&case("onnx.DepthToSpace", &[1, 6, 2, 2], &two), "6 is not a multiple of 4");
        refused(&case("onnx.SpaceToDepth", &[1, 1, 2, 3], &two), "3 is not a multiple of 2");
        refused(&case("onnx.SpaceToDepth", &[1, 2, 2], &two), "expected 4 dims");
        refused(&case("onnx.SpaceToDepth", &[1, 1, 2, 2], &[]), "blocksize is 0");
        refused(
            &case("onnx.SpaceToDepth", &[1, 1, 2, 2], &[("blocksize", (1 << 40).into())]),
            "blocksize is",
        );
        let mode = [("blocksize", 2.into()), ("mode", "RCD".into())];
        refused(&case("onnx.DepthToSpace", &[1, 4, 2, 2], &mode), "mode is");
    }
}
