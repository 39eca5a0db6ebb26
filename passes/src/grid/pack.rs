//! Codes in other orders: back to floats, and element by element.

use super::{GridError, LANES, Spec};
use rayon::prelude::*;

/// The code at `i` of a blob of codes of `container` bits, low-first.
#[inline]
pub fn code_at(blob: &[u8], i: usize, container: u32) -> u8 {
    let bit = i * container as usize;
    let mask = ((1u32 << container) - 1) as u8;
    blob[bit / 8] >> (bit % 8) & mask
}

/// `W = (code - zero_point) * scale` of an `[N, K]` matrix, row-major, from parts laid out as [`super::Parts`] says.
///
/// # Errors
/// Parts that do not fit `n`, `k` and the grid.
pub fn dequantize(
    spec: &Spec,
    n: usize,
    k: usize,
    codes: &[u8],
    scales: &[f32],
    zero_points: &[u8],
    out: &mut [f32],
) -> Result<(), GridError> {
    let fits = |what, expected, found| match expected == found {
        true => Ok(()),
        false => Err(GridError::Length { what, expected, found }),
    };
    let lens = spec.lens(n, k).ok_or_else(|| GridError::Spec("the matrix is too large".into()))?;
    fits("bytes of codes", lens.0, codes.len())?;
    fits("scales", lens.1, scales.len())?;
    fits("zero points", lens.1, zero_points.len())?;
    fits("weights", n * k, out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let (kb, blob, container) = (spec.groups(k), spec.blob(), spec.container());
    out.par_chunks_mut(LANES * k).enumerate().for_each(|(i, rows)| {
        for (j, row) in rows.chunks_exact_mut(k).enumerate() {
            let first = (i * LANES + j) * kb;
            for (g, w) in row.chunks_mut(spec.group_size).enumerate() {
                let (scale, zero) = (scales[first + g], f32::from(zero_points[first + g]));
                let blob = &codes[(first + g) * blob..][..blob];
                for (i, w) in w.iter_mut().enumerate() {
                    *w = (f32::from(code_at(blob, i, container)) - zero) * scale;
                }
            }
        }
    });
    Ok(())
}
