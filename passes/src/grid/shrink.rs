//! Clipping without data: the grid of a group is chosen to lose the least of the weights themselves.
//!
//! Grids whose ends are shrunk, each by itself, towards zero; codes to the nearest point; the one of least squared error
//! stays. (The search of [`super::Clip`] with every input alike and independent, so that sums of squares take the place
//! of quadratic forms.) Then the scale is refitted to the codes by least squares, in turns with the codes. A step that
//! does not lower the error is not taken, so that no group loses more than by rounding to nearest on its whole range;
//! what overflows on the way compares as "not lower".

use super::clip::{Grid, shrinks, shrunk};
use super::rtn::{code, reciprocal};
use super::{At, Block, BlockOut, LANES, Quantizer, Range, Spec, Stats, encode};
use multiversion::multiversion;

/// Rounds of refitting the scale.
const REFITS: usize = 2;

/// Clipping to the least squared error of the weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shrink;

impl Quantizer for Shrink {
    type Space = ();

    fn space(&self, _: &Spec) {}

    fn block(&self, spec: &Spec, _: At, x: &Block, out: &mut BlockOut, _: &mut ()) -> Stats {
        let grid = Shrink::grid(spec, x);
        (out.scale, out.zero) = (grid.scale, grid.zero);
        encode(spec, x, out)
    }
}

impl Shrink {
    /// The grid of each lane.
    pub(super) fn grid(spec: &Spec, x: &Block) -> Grid {
        let top = spec.max_code() as f32;
        let mut best = search(spec, x, top);
        for _ in 0..REFITS {
            let mut grid = best.grid;
            grid.refit(spec, &least_squares(x, &grid, top));
            best.take(&grid, &squares(x, &grid, top));
        }
        best.grid
    }
}

/// The best grid so far of each lane, and what it costs.
pub(super) struct Best {
    pub grid: Grid,
    pub cost: [f32; LANES],
}

impl Best {
    /// Takes `grid` in the lanes where it costs less. Ties go to what came first.
    pub fn take(&mut self, grid: &Grid, cost: &[f32; LANES]) {
        for (l, &cost) in cost.iter().enumerate() {
            if cost < self.cost[l] {
                (self.grid.scale[l], self.grid.zero[l], self.cost[l]) = (grid.scale[l], grid.zero[l], cost);
            }
        }
    }
}

impl Grid {
    /// Takes other scales, as they will be stored, in the lanes where they are any.
    pub(super) fn refit(&mut self, spec: &Spec, scale: &[f32; LANES]) {
        for (own, &scale) in self.scale.iter_mut().zip(scale) {
            let stored = spec.stored(scale);
            if stored.is_finite() && stored != 0.0 {
                *own = stored;
            }
        }
    }
}

/// The shrunk grid of least squared error.
fn search(spec: &Spec, x: &Block, top: f32) -> Best {
    let range = Range::of(x);
    let (scale, zero) = range.grid(spec);
    let grid = Grid { scale, zero };
    let mut best = Best { cost: squares(x, &grid, top), grid };
    let mut consider = |grid: &Grid| best.take(grid, &squares(x, grid, top));
    for &high in shrinks(spec.bits) {
        if spec.symmetric {
            // One side has a code more than the other: each may have it.
            let (scale, zero) = shrunk(spec, &range, high, high);
            consider(&Grid { scale, zero });
            if !spec.narrow {
                consider(&Grid { scale: scale.map(|s| -s), zero });
            }
            continue;
        }
        for &low in shrinks(spec.bits) {
            let (scale, zero) = shrunk(spec, &range, low, high);
            consider(&Grid { scale, zero });
        }
    }
    best
}

/// The squared error of the nearest codes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn squares(x: &Block, grid: &Grid, top: f32) -> [f32; LANES] {
    let r = grid.scale.map(reciprocal);
    let mut sum = [0.0; LANES];
    for row in x {
        for l in 0..LANES {
            let e = (code(row[l], r[l], grid.zero[l], top) - grid.zero[l]) * grid.scale[l] - row[l];
            sum[l] += e * e;
        }
    }
    sum
}

/// The scale of least squared error under the nearest codes: `c x / c c` with `c = code - zero`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn least_squares(x: &Block, grid: &Grid, top: f32) -> [f32; LANES] {
    let r = grid.scale.map(reciprocal);
    let (mut up, mut down) = ([0.0f32; LANES], [0.0f32; LANES]);
    for row in x {
        for l in 0..LANES {
            let c = code(row[l], r[l], grid.zero[l], top) - grid.zero[l];
            up[l] += c * row[l];
            down[l] += c * c;
        }
    }
    std::array::from_fn(|l| up[l] / down[l])
}
