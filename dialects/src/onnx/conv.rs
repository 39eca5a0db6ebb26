//! Conv over any number of spatial dims: windows gathered into columns, tile by tile, and multiplied by the kernels.

use super::window::{Sliding, Window, unflatten};
use crate::ir::{Dim, Type};
use crate::kernels::gemm::{self, Mat};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[OpDef { name: "onnx.Conv", operands: (2, 3), infer, eval, ..OpDef::NEW }];

/// Output positions that one task computes.
const TILE: usize = 512;

fn kernel_sizes(cx: &InferCx) -> Option<Vec<usize>> {
    let from_weight = || -> Option<Vec<usize>> {
        let dims = cx.dims(1)?.get(2..)?;
        dims.iter().map(|d| usize::try_from(d.known()?).ok()).collect()
    };
    let given = cx.attrs.ints("kernel_shape").map(|k| k.iter().map(|&k| usize::try_from(k).ok()).collect());
    given.unwrap_or_else(from_weight)
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0).or(cx.elem(1)) else { return Ok(Vec::new()) };
    let Some(dims) = cx.dims(0) else { return Ok(vec![Type::unranked(elem).into()]) };
    let [batch, _, spatial @ ..] = dims else {
        return Err(OpError::invalid(format!("X is {}, expected a batch and channels", cx.ty(0))));
    };
    let filters = cx.dims(1).and_then(|d| d.first()).cloned().unwrap_or(Dim::Unknown);
    let out = match kernel_sizes(cx) {
        Some(kernel) => Window::of(cx.attrs, &kernel)?.dims(spatial)?,
        None => vec![Dim::Unknown; spatial.len()],
    };
    Ok(vec![Type::tensor(elem, [batch.clone(), filters].into_iter().chain(out)).into()])
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (x, w) = (cx.input(0)?, cx.input(1)?);
    let groups = usize::try_from(cx.int_or("group", 1)).unwrap_or(0);
    let (&[batch, channels, ref input @ ..], &[filters, depth, ref kernel @ ..]) = (x.shape(), w.shape())
    else {
        return Err(OpError::invalid("expected X [N, C, ..] and W [M, C / group, ..]"));
    };
    if groups == 0 || depth.checked_mul(groups) != Some(channels) || !filters.is_multiple_of(groups) {
        let message = format!("W is {:?} and X is {:?} with {groups} groups", w.shape(), x.shape());
        return Err(OpError::invalid(message));
    }
    let sliding = Window::of(cx.attrs, kernel)?.slide(input)?;
    let bias = cx.opt(2)?.map(Tensor::to_f32).transpose()?;
    if bias.as_ref().is_some_and(|b| b.len() != filters) {
        return Err(OpError::invalid(format!("the bias does not have {filters} elements")));
    }
    let shape: Vec<usize> = [batch, filters].into_iter().chain(sliding.output.iter().copied()).collect();
    let count = strided::count(&shape)?;
    let (values, weights) = (x.to_f32()?, w.to_f32()?);
    let (cells, taps) = (input.iter().product::<usize>(), kernel.iter().product::<usize>());
    let (positions, per_group) = (sliding.output.iter().product::<usize>(), filters / groups);
    let mut y = vec![0f32; count];
    if count > 0 {
        y.par_chunks_mut(per_group * positions).enumerate().for_each(|(i, y)| {
            let (n, g) = (i / groups, i % groups);
            let image = &values[(n * channels + g * depth) * cells..][..depth * cells];
            let kernels = Mat::new(&weights[g * per_group * depth * taps..], per_group, depth * taps);
            gemm::strips(y, positions, TILE, |from, y| {
                let width = y.cols();
                let mut columns = vec![0f32; depth * taps * width];
                gather(&sliding, image, from, width, &mut columns);
                gemm::tile_into(kernels, Mat::new(&columns, depth * taps, width), y);
                if let Some(bias) = &bias {
                    for (y, b) in y.rows_mut().zip(&bias[g * per_group..]) {
                        y.iter_mut().for_each(|y| *y += b);
                    }
                }
            });
        });
    }
    cx.one(Tensor::from_f32(x.elem(), &shape, y)?)
}

/// The cells that the windows `from..from + width` see, as `[channels * taps, width]`; zero in the padding.
fn gather(s: &Sliding, image: &[f32], from: usize, width: usize, columns: &mut [f32]) {
    let rank = s.input.len();
    let cells: usize = s.input.iter().product();
    let taps: usize = s.kernel.iter().product();
    let (mut tap, mut out) = (vec![0; rank], vec![0; rank]);
    for (row, columns) in columns.chunks_exact_mut(width).enumerate() {
        unflatten(row % taps, &s.kernel, &mut tap);
        let image = &image[row / taps * cells..][..cells];
        // One run of windows along the last dim at a time: the dims before it are the same for all of them.
        let mut at = 0;
        while at < width {
            unflatten(from + at, &s.output, &mut out);
            let Some(last) = rank.checked_sub(1) else {
                columns[at] = image[0];
                break;
            };
            let run = (s.output[last] - out[last]).min(width - at);
            let outer = (0..last).try_fold(0, |base, i| Some(base * s.input[i] + s.cell(i, out[i], tap[i])?));
            if let Some(outer) = outer {
                let line = &image[outer * s.input[last]..][..s.input[last]];
                for (j, c) in columns[at..at + run].iter_mut().enumerate() {
                    if let Some(cell) = s.cell(last, out[last] + j, tap[last]) {
                        *c = line[cell];
                    }
                }
            }
            at += run;
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("conv");
    }
}
