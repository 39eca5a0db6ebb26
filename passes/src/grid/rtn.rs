//! Round to nearest: the grid of a group spans its values, as ONNX Runtime's MatMulNBits quantizer places it.
//!
//! Asymmetric: from min to max, zero included; `scale = (max - min) / (2^bits - 1)`, `zero = round(-min / scale)`.
//! Symmetric: `scale = m / -2^(bits-1)` where m is the value of largest magnitude, the negative one of two. Codes are
//! `round(w * (1 / scale) + zero)`, halves away from zero. A group of one repeated value is placed so that the value is exact,
//! which the runtime's quantizer misses by a rounding.

use super::{At, Block, BlockOut, Float, LANES, Quantizer, Spec, Stats};
use multiversion::multiversion;
use rayon::prelude::*;

/// Round to nearest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtn;

/// Least and greatest weight of each lane.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Least.
    pub min: [f32; LANES],
    /// Greatest.
    pub max: [f32; LANES],
}

impl Quantizer for Rtn {
    type Space = ();

    fn space(&self, _: &Spec) {}

    fn block(&self, spec: &Spec, _: At, x: &Block, out: &mut BlockOut, _: &mut ()) -> Stats {
        let range = Range::of(x);
        (out.scale, out.zero) = range.grid(spec);
        encode(spec, x, out)
    }
}

impl Range {
    /// The range of a block's lanes. NaN is passed over.
    pub fn of(x: &Block) -> Range {
        range(x)
    }

    /// Scale and zero point of each lane.
    pub fn grid(&self, spec: &Spec) -> ([f32; LANES], [f32; LANES]) {
        let zero = [spec.middle() as f32; LANES];
        let mut scale = match spec.symmetric {
            true if spec.narrow => narrow(self, zero[0] - 1.0),
            true => symmetric(self, zero[0]),
            false => asymmetric_scale(self, spec.max_code() as f32),
        };
        if spec.scales != Float::F32 {
            scale = scale.map(|s| spec.stored(s));
        }
        match spec.symmetric {
            true => (scale, zero),
            false => (scale, asymmetric_zero(self, &scale, spec.max_code() as f32)),
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn symmetric(range: &Range, middle: f32) -> [f32; LANES] {
    let mut scale = [0.0; LANES];
    for ((scale, &min), &max) in scale.iter_mut().zip(&range.min).zip(&range.max) {
        let m = if max.abs() > min.abs() { max } else { min };
        *scale = m / -middle;
    }
    scale
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn narrow(range: &Range, steps: f32) -> [f32; LANES] {
    let mut scale = [0.0; LANES];
    for ((scale, &min), &max) in scale.iter_mut().zip(&range.min).zip(&range.max) {
        let m = if max.abs() > min.abs() { max.abs() } else { min.abs() };
        *scale = m / steps;
    }
    scale
}

/// The step that spans the range and zero in `steps` steps. A repeated value is one step away from zero.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn asymmetric_scale(range: &Range, steps: f32) -> [f32; LANES] {
    let mut scale = [0.0; LANES];
    for ((scale, &min), &max) in scale.iter_mut().zip(&range.min).zip(&range.max) {
        let low = if min < 0.0 { min } else { 0.0 };
        let high = if max > 0.0 { max } else { 0.0 };
        let span = (high - low) / steps;
        let span = if span == f32::INFINITY { high / steps - low / steps } else { span };
        *scale = if min == max { max.abs() } else { span };
    }
    scale
}

/// The code of zero, on the side of a repeated value that it is.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn asymmetric_zero(range: &Range, scale: &[f32; LANES], steps: f32) -> [f32; LANES] {
    let mut zero = [0.0; LANES];
    let ends = range.min.iter().zip(&range.max);
    for ((zero, &scale), (&min, &max)) in zero.iter_mut().zip(scale).zip(ends) {
        let low = if min < 0.0 { min } else { 0.0 };
        let z = (0.0 - low / scale) + HALF;
        // A scale of zero, or one rounded down to half precision, may take this out of the codes.
        let z = if z > 0.0 { z.floor() } else { 0.0 };
        let z = if z < steps { z } else { steps };
        let z = if scale == 0.0 { 0.0 } else { z };
        let repeated = if min < 0.0 { 1.0 } else { 0.0 };
        *zero = if min == max { repeated } else { z };
    }
    zero
}

/// Multiplies weights into steps; zero where a step is too small to be divided by.
#[inline(always)]
pub(super) fn reciprocal(scale: f32) -> f32 {
    let r = 1.0 / scale;
    if r.is_finite() { r } else { 0.0 }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn range(x: &Block) -> Range {
    let mut min = [f32::INFINITY; LANES];
    let mut max = [f32::NEG_INFINITY; LANES];
    for row in x {
        for l in 0..LANES {
            min[l] = if row[l] < min[l] { row[l] } else { min[l] };
            max[l] = if row[l] > max[l] { row[l] } else { max[l] };
        }
    }
    Range { min, max }
}

/// Adding this puts a small whole number into the low bits of a float.
const WHOLE: f32 = 8_388_608.0;

/// Just under a half: `floor(x + this)` rounds halves up and `0.49999997` down.
const HALF: f32 = 0.499_999_97;

/// The nearest code to `x` on a grid with this zero point and reciprocal of the scale.
#[inline(always)]
pub(super) fn code(x: f32, reciprocal: f32, zero: f32, top: f32) -> f32 {
    let t = x * reciprocal + zero;
    let t = if t > 0.0 { t } else { 0.0 };
    let t = if t < top { t } else { top };
    (t + HALF).floor()
}

/// The nearest codes to a block on the grid in `out`, packed into its words.
pub fn encode(spec: &Spec, x: &Block, out: &mut BlockOut) -> Stats {
    let recip = out.scale.map(reciprocal);
    let top = spec.max_code() as f32;
    codes(x, &out.scale, &out.zero, &recip, top, spec.container(), out.words).total()
}

/// Packs codes, given as whole numbers, on the grid in `out`.
pub(super) fn pack(spec: &Spec, x: &Block, codes: &[[f32; LANES]], out: &mut BlockOut) -> Stats {
    let mut sums = Sums::default();
    let per_word = 32 / spec.container();
    for (k, (row, codes)) in x.iter().zip(codes).enumerate() {
        let (word, shift) = (k as u32 / per_word, k as u32 % per_word * spec.container());
        for l in 0..LANES {
            out.words[word as usize][l] |= (codes[l] as u32) << shift;
            sums.add(l, row[l], (codes[l] - out.zero[l]) * out.scale[l]);
        }
    }
    sums.total()
}

/// Sums of one block, one lane per output.
#[derive(Clone, Copy, Default)]
struct Sums {
    error2: [f32; LANES],
    error1: [f32; LANES],
    weight2: [f32; LANES],
    max_error: [f32; LANES],
}

impl Sums {
    /// A weight and what became of it.
    #[inline(always)]
    fn add(&mut self, l: usize, weight: f32, back: f32) {
        let e = back - weight;
        self.error2[l] += e * e;
        self.error1[l] += e.abs();
        self.weight2[l] += weight * weight;
        self.max_error[l] = if e.abs() > self.max_error[l] { e.abs() } else { self.max_error[l] };
    }

    fn total(&self) -> Stats {
        let mut stats = Stats::default();
        for lane in 0..LANES {
            stats.error2 += f64::from(self.error2[lane]);
            stats.error1 += f64::from(self.error1[lane]);
            stats.weight2 += f64::from(self.weight2[lane]);
            stats.max_error = stats.max_error.max(f64::from(self.max_error[lane]));
        }
        stats
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn codes(
    x: &Block,
    scale: &[f32; LANES],
    zero: &[f32; LANES],
    recip: &[f32; LANES],
    top: f32,
    container: u32,
    words: &mut [[u32; LANES]],
) -> Sums {
    let mut sums = Sums::default();
    let mask = (1u32 << container) - 1;
    for (rows, word) in x.chunks(32 / container as usize).zip(words) {
        let mut packed = [0u32; LANES];
        for (i, row) in rows.iter().enumerate() {
            let shift = i as u32 * container;
            for l in 0..LANES {
                let code = code(row[l], recip[l], zero[l], top);
                packed[l] |= ((code + WHOLE).to_bits() & mask) << shift;
                sums.add(l, row[l], (code - zero[l]) * scale[l]);
            }
        }
        *word = packed;
    }
    sums
}

/// Weights `[n, k]` row-major, rounded to the nearest points of their grids. On threads.
pub fn nearest(mut weights: Vec<f32>, k: usize, spec: &Spec) -> Vec<f32> {
    weights.par_chunks_mut(LANES * k.max(1)).for_each(|rows| fake_quantize(rows, k, spec));
    weights
}

/// Rounds rows of f32 weights, `[rows, k]` row-major, to the nearest points of their grids, in place. On this thread.
pub fn fake_quantize(rows: &mut [f32], k: usize, spec: &Spec) {
    if k == 0 {
        return;
    }
    let top = spec.max_code() as f32;
    let mut x = vec![[0.0; LANES]; spec.group_size.min(k)];
    for rows in rows.chunks_mut(LANES * k) {
        let lanes = rows.len() / k;
        for start in (0..k).step_by(spec.group_size) {
            let end = k.min(start + spec.group_size);
            let x = &mut x[..end - start];
            for l in 0..lanes {
                let row = &rows[l * k..][start..end];
                x.iter_mut().zip(row).for_each(|(x, &w)| x[l] = w);
            }
            let (scale, zero) = Range::of(x).grid(spec);
            round(x, &scale, &zero, top);
            for l in 0..lanes {
                let row = &mut rows[l * k..][start..end];
                row.iter_mut().zip(&*x).for_each(|(w, x)| *w = x[l]);
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn round(x: &mut Block, scale: &[f32; LANES], zero: &[f32; LANES], top: f32) {
    let recip = scale.map(reciprocal);
    for row in x {
        for l in 0..LANES {
            row[l] = (code(row[l], recip[l], zero[l], top) - zero[l]) * scale[l];
        }
    }
}
