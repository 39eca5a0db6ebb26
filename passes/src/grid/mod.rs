//! The numeric core of weight quantization: one float matrix in, codes on a grid out.
//!
//! A weight is seen as `[N, K]`: one row per output, groups of `group_size` along K, `kb = ceil(K / group_size)` groups
//! per row, and `W ~ (code - zero_point) * scale`. All functions work on slices and know nothing of graphs. Invariants:
//! - The matrix is never copied whole: a [`Block`] of 16 outputs by one group is loaded, quantized and written.
//! - Blocks belong to tiles of fixed size; threads share out tiles, and sums are taken over tiles in order. Results
//!   do not depend on the number of threads, nor on the vector instructions of the CPU: only additions,
//!   multiplications, divisions, square roots and comparisons, which round alike everywhere, and no fused multiply-add.
//! - NaN and infinities are found by the pass over the weight that quantizes it.

mod block;
mod clip;
pub mod compensate;
mod cost;
mod given;
mod hqq;
pub mod pack;
mod rtn;
mod shrink;

pub use block::{At, Block, BlockOut, Float, LANES, Layout, Matrix};
pub use clip::Clip;
pub use cost::Cost;
pub use given::Given;
pub use hqq::Hqq;
pub use rtn::{Range, Rtn, encode, fake_quantize, nearest};
pub use shrink::Shrink;

use crate::errors::WeightErrors;
use crate::qtensor::container;
use half::{bf16, f16};
use rayon::prelude::*;
use thiserror::Error;

/// Why a matrix cannot be quantized.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GridError {
    /// A NaN or an infinity.
    #[error("{count} of {total} weights are NaN or infinite, the first at output {n}, input {k}")]
    NotFinite {
        /// How many.
        count: u64,
        /// Of how many.
        total: u64,
        /// Output of the first, in `[N, K]` order.
        n: usize,
        /// Input of the first.
        k: usize,
    },
    /// The weights span so much that what a code stands for is no number of single precision.
    #[error("the weights span nearly all of single precision: their grid would go beyond it")]
    Overflow,
    /// A buffer that does not fit the matrix.
    #[error("{what}: expected {expected}, found {found}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Elements wanted.
        expected: usize,
        /// Elements there are.
        found: usize,
    },
    /// A grid that does not exist.
    #[error("{0}")]
    Spec(String),
}

/// The grid that codes live on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Bits per code, 2 to 8.
    pub bits: u32,
    /// Weights along K that share a scale. A whole row is K itself.
    pub group_size: usize,
    /// Zero point fixed at `2^(bits-1)`.
    pub symmetric: bool,
    /// Of a symmetric grid: without the code that has no opposite, so that scales are positive.
    pub narrow: bool,
    /// The type that scales are rounded to; codes are chosen with the rounded scale.
    pub scales: Float,
}

impl Spec {
    /// Bits that hold one code: the least of 2, 4 and 8 that is enough.
    pub fn container(&self) -> u32 {
        container(self.bits)
    }

    /// The largest code.
    pub fn max_code(&self) -> u32 {
        (1 << self.bits) - 1
    }

    /// The zero point of the symmetric grid.
    pub fn middle(&self) -> u32 {
        1 << (self.bits - 1)
    }

    /// Groups per row.
    pub fn groups(&self, k: usize) -> usize {
        k.div_ceil(self.group_size)
    }

    /// Bytes of the codes of one group.
    pub fn blob(&self) -> usize {
        (self.group_size * self.container() as usize).div_ceil(8)
    }

    /// Lengths of the parts of an `[n, k]` matrix: bytes of codes, and the number of scales (as many zero points).
    /// `None` when they cannot be counted.
    pub fn lens(&self, n: usize, k: usize) -> Option<(usize, usize)> {
        let groups = n.checked_mul(self.groups(k))?;
        Some((groups.checked_mul(self.blob())?, groups))
    }

    fn check(&self) -> Result<(), GridError> {
        if !(2..=8).contains(&self.bits) {
            return Err(GridError::Spec(format!("bits must be 2 to 8, found {}", self.bits)));
        }
        if self.group_size == 0 || self.group_size > usize::MAX / 16 {
            return Err(GridError::Spec(format!("a group of {} weights", self.group_size)));
        }
        Ok(())
    }

    /// The scale as it will be stored.
    fn stored(&self, scale: f32) -> f32 {
        match self.scales {
            Float::F32 => scale,
            Float::F16 => f16::from_f32(scale).clamp(f16::MIN, f16::MAX).to_f32(),
            Float::BF16 => bf16::from_f32(scale).clamp(bf16::MIN, bf16::MAX).to_f32(),
        }
    }
}

/// Where a quantized matrix goes.
#[derive(Debug)]
pub struct Parts<'a> {
    /// `[N, kb, blob]`: codes low-first along K, the last group padded with zeros.
    pub codes: &'a mut [u8],
    /// `[N, kb]`.
    pub scales: &'a mut [f32],
    /// `[N, kb]`, one code per byte; not wanted of a symmetric grid.
    pub zero_points: Option<&'a mut [u8]>,
}

/// What quantization did to a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sum of squared differences between weights and their codes' values.
    pub error2: f64,
    /// Sum of the differences' magnitudes.
    pub error1: f64,
    /// Sum of squared weights.
    pub weight2: f64,
    /// Largest difference.
    pub max_error: f64,
}

impl Stats {
    /// The errors of a matrix of `count` weights.
    pub fn errors(&self, count: usize) -> WeightErrors {
        WeightErrors {
            frobenius: self.error2.sqrt(),
            relative: if self.weight2 > 0.0 { (self.error2 / self.weight2).sqrt() } else { 0.0 },
            max: self.max_error,
            mean: self.error1 / count.max(1) as f64,
        }
    }

    /// Whether sums of `count` weights in single precision overflowed, or lost squares that are too small for it.
    fn lost(&self, count: usize) -> bool {
        let finite = self.error2.is_finite() && self.weight2.is_finite() && self.max_error.is_finite();
        !finite || (self.max_error > 0.0 && self.weight2 < LEAST_SQUARE * count as f64)
    }

    fn add(&mut self, other: &Stats) {
        self.error2 += other.error2;
        self.error1 += other.error1;
        self.weight2 += other.weight2;
        self.max_error = self.max_error.max(other.max_error);
    }
}

/// Mean squares below this have errors whose squares are too small for single precision.
const LEAST_SQUARE: f64 = 1e-28;

/// Chooses scale, zero point and codes of blocks.
pub trait Quantizer: Sync {
    /// Working space of one thread.
    type Space: Send;

    /// Makes working space for groups of `group_size`.
    fn space(&self, spec: &Spec) -> Self::Space;

    /// Quantizes one block: fills `out` and returns what that did. Sums that overflow f32 may come back infinite.
    fn block(&self, spec: &Spec, at: At, x: &Block, out: &mut BlockOut, space: &mut Self::Space) -> Stats;
}

/// How the range of a group is found where there is no data.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Ranges {
    /// It spans the weights: [`Rtn`].
    #[default]
    Span,
    /// It is clipped: [`Shrink`].
    Clip,
    /// This share of what spans the weights.
    Share(f32),
    /// It is refined by half-quadratic splitting: [`Hqq`].
    Hqq,
}

impl Ranges {
    /// What a report calls it.
    pub fn name(self) -> &'static str {
        match self {
            Ranges::Span => "rtn",
            Ranges::Clip | Ranges::Share(_) => "clip",
            Ranges::Hqq => "hqq",
        }
    }

    /// The grid of each lane of a group.
    fn grid(self, spec: &Spec, x: &Block) -> clip::Grid {
        match self {
            Ranges::Span => {
                let (scale, zero) = Range::of(x).grid(spec);
                clip::Grid { scale, zero }
            }
            Ranges::Clip => Shrink::grid(spec, x),
            Ranges::Share(share) => {
                let (scale, zero) = clip::shrunk(spec, &Range::of(x), share, share);
                clip::Grid { scale, zero }
            }
            Ranges::Hqq => Hqq::grid(spec, x),
        }
    }
}

impl Quantizer for Ranges {
    type Space = ();

    fn space(&self, _: &Spec) {}

    fn block(&self, spec: &Spec, at: At, x: &Block, out: &mut BlockOut, space: &mut ()) -> Stats {
        match self {
            Ranges::Span => Rtn.block(spec, at, x, out, space),
            Ranges::Clip => Shrink.block(spec, at, x, out, space),
            Ranges::Hqq => Hqq.block(spec, at, x, out, space),
            Ranges::Share(_) => {
                let grid = self.grid(spec, x);
                (out.scale, out.zero) = (grid.scale, grid.zero);
                encode(spec, x, out)
            }
        }
    }
}

/// Floats that a tile of blocks takes, about: small enough for a core's cache.
const TILE_FLOATS: usize = 1 << 14;

/// Tiles that a matrix of enough outputs is cut into, at least.
const MIN_TILES: usize = 8;

/// Quantizes a matrix into `parts`, in parallel.
///
/// # Errors
/// A NaN or infinity among the weights; buffers of a wrong length; bits other than 2 to 8.
pub fn quantize<Q: Quantizer>(w: &Matrix, spec: &Spec, method: &Q, parts: Parts) -> Result<Stats, GridError> {
    let (code_bytes, groups) = check(w, spec)?;
    let Parts { codes, scales, zero_points } = parts;
    let fits = |what, expected, found| match expected == found {
        true => Ok(()),
        false => Err(GridError::Length { what, expected, found }),
    };
    fits("bytes of codes", code_bytes, codes.len())?;
    fits("scales", groups, scales.len())?;
    if let Some(z) = &zero_points {
        fits("zero points", groups, z.len())?;
    } else if !spec.symmetric {
        return Err(GridError::Spec("an asymmetric grid has zero points".into()));
    }
    if groups == 0 {
        return Ok(Stats::default());
    }

    let (width, kb) = (tile_width(w, spec), spec.groups(w.k));
    let tiles = codes.par_chunks_mut(width * kb * spec.blob()).zip(scales.par_chunks_mut(width * kb));
    let tile = |i: usize, codes: &mut [u8], scales: &mut [f32], zero_points: Option<&mut [u8]>| {
        let columns = i * width..w.n.min((i + 1) * width);
        block::tile(w, spec, method, columns, Parts { codes, scales, zero_points })
    };
    let sums: Vec<Stats> = match zero_points {
        Some(z) => tiles
            .zip(z.par_chunks_mut(width * kb))
            .enumerate()
            .map(|(i, ((c, s), z))| tile(i, c, s, Some(z)))
            .collect(),
        None => tiles.enumerate().map(|(i, (c, s))| tile(i, c, s, None)).collect(),
    };
    total(w, &sums)
}

/// What quantizing a matrix would do to it. Nothing but the sums is kept.
///
/// # Errors
/// As [`quantize`].
pub fn measure<Q: Quantizer>(w: &Matrix, spec: &Spec, method: &Q) -> Result<Stats, GridError> {
    let (_, groups) = check(w, spec)?;
    if groups == 0 {
        return Ok(Stats::default());
    }
    let (width, kb) = (tile_width(w, spec), spec.groups(w.k));
    let tile = |i: usize| {
        let columns = i * width..w.n.min((i + 1) * width);
        let groups = columns.len() * kb;
        let (mut codes, mut scales) = (vec![0; groups * spec.blob()], vec![0.0; groups]);
        let parts = Parts { codes: &mut codes, scales: &mut scales, zero_points: None };
        block::tile(w, spec, method, columns, parts)
    };
    let sums: Vec<Stats> = (0..w.n.div_ceil(width)).into_par_iter().map(tile).collect();
    total(w, &sums)
}

/// Checks matrix and grid, and gives the lengths of the parts.
fn check(w: &Matrix, spec: &Spec) -> Result<(usize, usize), GridError> {
    spec.check()?;
    w.check()?;
    spec.lens(w.n, w.k).ok_or_else(|| GridError::Spec("the matrix is too large".into()))
}

/// Outputs in a tile. A tile is a run of outputs over all of K, so that it owns one run of each part.
/// Wide tiles read memory in longer runs; but there must be tiles enough to share out.
fn tile_width(w: &Matrix, spec: &Spec) -> usize {
    let widest = (w.n / MIN_TILES).next_multiple_of(LANES).clamp(LANES, 32 * LANES);
    (TILE_FLOATS / spec.group_size).next_multiple_of(LANES).clamp(LANES, widest)
}

/// Adds up what happened in tiles, in their order.
fn total(w: &Matrix, sums: &[Stats]) -> Result<Stats, GridError> {
    let mut total = Stats::default();
    sums.iter().for_each(|s| total.add(s));
    if total.weight2.is_finite() && total.error2.is_finite() {
        return Ok(total);
    }
    Err(match w.first_not_finite() {
        Some((count, n, k)) => GridError::NotFinite { count, total: w.n as u64 * w.k as u64, n, k },
        None => GridError::Overflow,
    })
}

#[cfg(test)]
mod tests;
