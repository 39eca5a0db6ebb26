//! Half-quadratic quantization (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023):
//! the grid of a group is chosen, without data, for the least `sum |w - (q - z) s|^p` with p < 1, which forgives a few
//! large errors for many small ones.
//!
//! The error is split off by an auxiliary variable that a quadratic term of weight `beta` ties to it, and the two are
//! minimized in turns. The auxiliary one has a closed form, the generalized soft threshold; under it the zero point is
//! the mean of `q - (w - shrunk) / s`, with the scale of the whole range. `beta` grows by `KAPPA` a turn.
//!
//! The method's zero point is a real number, and the runtime's a code. So it is rounded, and then the other parameter
//! takes its turns in the same way: the scale, by least squares, from the rounded zero point, from that of round to
//! nearest, and from the clipped grid. A symmetric grid, whose zero point is fixed, has the scale's turns only, with
//! either sign. Of all grids on the way that of least *squared* error stays, which is what the model's output feels: the
//! forgiving norm leads to grids, and does not judge them. So no group loses more than by clipping. Last, grids near that
//! one are tried: the finer a grid is, the more of its gain lies between the steps that clipping tries.
//!
//! Errors are measured in steps of the grid, so that the threshold means the same for weights of any size. p is 3/4
//! rather than the authors' 0.7: its powers are square roots, which every processor rounds alike.

use super::clip::Grid;
use super::rtn::{code, reciprocal};
use super::shrink::{Best, Shrink, least_squares, squares};
use super::{At, Block, BlockOut, LANES, Quantizer, Range, Spec, Stats, encode};
use multiversion::multiversion;

/// Turns of each parameter; weight of the quadratic term at first, and its growth. The authors' values.
const TURNS: usize = 20;
const BETA: f32 = 10.0;
const KAPPA: f32 = 1.01;

/// Scales near the best one, as parts of it, and how often each is refitted.
const NEAR: [f32; 11] = [0.85, 0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05, 1.075, 1.1, 1.15];
const REFITS: usize = 2;

/// Half-quadratic quantization, ending in integer zero points.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hqq;

impl Quantizer for Hqq {
    type Space = ();

    fn space(&self, _: &Spec) {}

    fn block(&self, spec: &Spec, _: At, x: &Block, out: &mut BlockOut, _: &mut ()) -> Stats {
        let grid = Hqq::grid(spec, x);
        (out.scale, out.zero) = (grid.scale, grid.zero);
        encode(spec, x, out)
    }
}

impl Hqq {
    /// The grid of each lane.
    pub(super) fn grid(spec: &Spec, x: &Block) -> Grid {
        let top = spec.max_code() as f32;
        let (scale, zero) = Range::of(x).grid(spec);
        let plain = Grid { scale, zero };
        let clipped = Shrink::grid(spec, x);
        let mut best = Best { cost: squares(x, &clipped, top), grid: clipped };
        let other = match spec.symmetric {
            true if spec.narrow => plain,
            true => Grid { scale: scale.map(|s| -s), zero },
            false => Grid { scale, zero: zero_points(x, &plain, top) },
        };
        for mut grid in [clipped, plain, other] {
            let mut beta = BETA;
            for _ in 0..TURNS {
                grid.refit(spec, &turn(x, &grid, top, beta).scale);
                best.take(&grid, &squares(x, &grid, top));
                beta *= KAPPA;
            }
        }
        let found = best.grid;
        let shifts: &[f32] = if spec.symmetric { &[0.0] } else { &[0.0, -1.0, 1.0] };
        for shift in shifts {
            for near in NEAR {
                let mut grid =
                    Grid { scale: found.scale, zero: found.zero.map(|z| (z + shift).clamp(0.0, top)) };
                grid.refit(spec, &found.scale.map(|s| s * near));
                best.take(&grid, &squares(x, &grid, top));
                for _ in 0..REFITS {
                    grid.refit(spec, &least_squares(x, &grid, top));
                    best.take(&grid, &squares(x, &grid, top));
                }
            }
        }
        best.grid
    }
}

/// The zero points of least cost under the scales of `start`, rounded to codes.
fn zero_points(x: &Block, start: &Grid, top: f32) -> [f32; LANES] {
    let mut grid = *start;
    let mut beta = BETA;
    for _ in 0..TURNS {
        let zero = turn(x, &grid, top, beta).zero;
        for (own, zero) in grid.zero.iter_mut().zip(zero) {
            *own = if zero.is_finite() { zero } else { *own };
        }
        beta *= KAPPA;
    }
    grid.zero.map(|z| z.round().clamp(0.0, top))
}

/// What one turn finds on a grid.
#[derive(Clone, Copy, Default)]
struct Turn {
    /// The scale that is next, with this zero point.
    scale: [f32; LANES],
    /// The zero point that is next, with this scale.
    zero: [f32; LANES],
}

/// Codes to the nearest point; soft threshold of what they miss; scale and zero point of least squares for the rest.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn turn(x: &Block, grid: &Grid, top: f32, beta: f32) -> Turn {
    let r = grid.scale.map(reciprocal);
    let per = 1.0 / beta;
    let mut turn = Turn::default();
    let (mut up, mut down) = ([0.0f32; LANES], [0.0f32; LANES]);
    for row in x {
        for l in 0..LANES {
            let q = code(row[l], r[l], grid.zero[l], top);
            let c = q - grid.zero[l];
            // The error in steps: its size is `root^4`.
            let e = (row[l] - c * grid.scale[l]) * r[l];
            let root = e.abs().sqrt().sqrt();
            // |e| - |e|^(p - 1) / beta; no error at all gives minus infinity.
            let d = e.abs() - per / root;
            let d = if d > 0.0 { d } else { 0.0 };
            let kept = c + (e - if e < 0.0 { -d } else { d });
            up[l] += c * kept;
            down[l] += c * c;
            turn.zero[l] += q - kept;
        }
    }
    let count = x.len() as f32;
    for l in 0..LANES {
        turn.scale[l] = grid.scale[l] * (up[l] / down[l]);
        turn.zero[l] /= count;
    }
    turn
}
