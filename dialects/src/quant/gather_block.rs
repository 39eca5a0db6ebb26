//! `com.microsoft.GatherBlockQuantized`: Gather from a table that is quantized in blocks along one axis.
//!
//! 4-bit element types hold one code per element; u8 holds codes of 2, 4 or 8 bits packed along the last dim, low-first.
//! Zero points are coded like the data; left out, they are 0 for 4-bit types and the middle code for u8. An index out
//! of range gives zeros.

use crate::ir::{Dim, Elem, Type};
use crate::kernels::packed::code;
use crate::kernels::strided;
use crate::onnx::{cast, util};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "com.microsoft.GatherBlockQuantized", operands: (3, 4), infer, eval, ..OpDef::NEW }];

/// Codes per byte of the data.
fn per_byte(attrs: &crate::ir::Attrs, data: Elem) -> Result<usize, OpError> {
    match (data, attrs.int("bits").unwrap_or(4)) {
        (Elem::U8, bits @ (2 | 4 | 8)) => Ok(8 / bits as usize),
        (Elem::U8, bits) => Err(OpError::Unsupported(format!("codes of {bits} bits, expected 2, 4 or 8"))),
        _ => Ok(1),
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(2) else { return Ok(Vec::new()) };
    let (Some(data), Some(indices), Some(from)) = (cx.dims(0), cx.dims(1), cx.elem(0)) else {
        return Ok(vec![Type::unranked(elem).into()]);
    };
    let per = Dim::Known(per_byte(cx.attrs, from)? as i64);
    let at = util::axis(cx.attrs.int("gather_axis").unwrap_or(0), data.len())?;
    let mut dims = data.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = last.mul(&per);
    }
    dims.splice(at..=at, indices.iter().cloned());
    Ok(vec![Type::tensor(elem, dims).into()])
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (data, indices, scales) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (per, rank) = (per_byte(cx.attrs, data.elem())?, data.rank());
    let gather = util::axis(cx.int_or("gather_axis", 0), rank)?;
    let axis = util::axis(cx.int_or("quantize_axis", 1), rank)?;
    let block = usize::try_from(cx.int_or("block_size", 128)).unwrap_or(0);
    let mut shape = data.shape().to_vec();
    shape[rank - 1] =
        shape[rank - 1].checked_mul(per).ok_or_else(|| OpError::invalid("the data is too large"))?;
    if block == 0 || (per > 1 && (gather == axis || gather == rank - 1)) {
        let message = format!("blocks of {block} along axis {axis}, gathered along axis {gather}");
        return Err(OpError::Unsupported(message));
    }
    let mut grid = shape.clone();
    grid[axis] = shape[axis].div_ceil(block);
    if scales.shape() != grid {
        let found = scales.shape();
        return Err(OpError::invalid(format!("scales of shape {found:?}, expected {grid:?}")));
    }
    // One code per element, as numbers.
    let bits = 8 / per;
    let signed =
        |t: &Tensor| -> Result<Vec<f32>, OpError> { Ok(cast::convert(t, Elem::F32, true)?.f32s()?.to_vec()) };
    let codes = if per == 1 { Some(signed(data)?) } else { None };
    let packed = if per > 1 { data.u8s()? } else { &[] };
    let zeros: Vec<f32> = match cx.opt(3)? {
        None if data.elem() == Elem::U8 => vec![(1u32 << (bits - 1)) as f32; scales.len()],
        None => vec![0.0; scales.len()],
        Some(z) if per == 1 => signed(z)?,
        Some(z) => {
            let (bytes, last) = (z.u8s()?, grid[rank - 1]);
            let row = last.div_ceil(per);
            if last > 0 && bytes.len() != scales.len() / last * row {
                return Err(OpError::invalid(format!("zero points of shape {:?} for {grid:?}", z.shape())));
            }
            (0..scales.len()).map(|i| f32::from(code(&bytes[i / last * row..], bits, i % last))).collect()
        }
    };
    if zeros.len() != scales.len() {
        return Err(OpError::invalid(format!("{} zero points for {} scales", zeros.len(), scales.len())));
    }
    let factors = scales.to_f32()?;
    let (rows, inner) = (shape[gather], shape[gather + 1..].iter().product::<usize>());
    let mut out_shape = shape.clone();
    out_shape.splice(gather..=gather, indices.shape().iter().copied());
    let indices = indices.to_i64()?;
    let behind = shape[axis + 1..].iter().product::<usize>();
    let value = |at: usize| {
        let (outer, q, rest) = (at / (shape[axis] * behind), at / behind % shape[axis], at % behind);
        let group = (outer * grid[axis] + q / block) * behind + rest;
        let c = match &codes {
            Some(codes) => codes[at],
            None => f32::from(code(packed, bits, at)),
        };
        (c - zeros[group]) * factors[group]
    };
    let mut y = vec![0f32; strided::count(&out_shape)?];
    if inner > 0 && !indices.is_empty() {
        y.par_chunks_mut(inner).enumerate().for_each(|(i, y)| {
            let (outer, index) = (i / indices.len(), indices[i % indices.len()]);
            let index = if index < 0 { index + rows as i64 } else { index };
            if let Some(index) = usize::try_from(index).ok().filter(|&i| i < rows) {
                let start = (outer * rows + index) * inner;
                y.iter_mut().enumerate().for_each(|(j, y)| *y = value(start + j));
            }
        });
    }
    cx.one(Tensor::from_f32(scales.elem(), &out_shape, y)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("gather_block");
    }
}
