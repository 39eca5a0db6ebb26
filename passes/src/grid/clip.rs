//! Clipping: the grid of a group is chosen to lose the least of the *output*, and so are its codes.
//!
//! With the Gram matrix `G` of the inputs, an error `e` in the weights of one output costs `e^T G e`. Of `G` only the
//! block of the group's own inputs is used. Per group and output:
//! 1. Grids whose ends are shrunk, each by itself, towards zero; codes to the nearest point; the cheapest stays.
//!    (The search of AWQ, Lin et al. 2023, section 3.2, with both ends free and the block for the diagonal.)
//! 2. In turns: single codes move to where the cost is least while all others stand still (coordinate descent), and
//!    the scale is refitted to the codes by least squares.
//!
//! Every step lowers the cost or is not taken, so the result never costs more than round to nearest does. What
//! underflows or overflows on the way compares as "not lower" and leaves round to nearest.

use super::rtn::{code, pack, reciprocal};
use super::{At, Block, BlockOut, GridError, LANES, Quantizer, Range, Spec, Stats};
use multiversion::multiversion;

/// The ends of a grid are tried at these parts of the group's range.
const SHRINKS: [f32; 13] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4];

/// Those worth a try: the fewer codes there are, the more a narrow grid gains.
pub(super) fn shrinks(bits: u32) -> &'static [f32] {
    match bits {
        0..=2 => &SHRINKS,
        3 => &SHRINKS[..9],
        _ => &SHRINKS[..7],
    }
}

/// Rounds of moving codes and refitting the scale.
const ROUNDS: usize = 3;

/// Sweeps over the codes in each round.
const SWEEPS: usize = 2;

/// What is added to the diagonal, relative to its mean: the calibration data does not know every direction.
const DAMP: f64 = 0.01;

/// Clipping under a Gram matrix.
#[derive(Clone, Debug)]
pub struct Clip {
    group_size: usize,
    /// The diagonal blocks of the Gram matrix, one after the other, each scaled to a mean diagonal of about one.
    blocks: Vec<Vec<f32>>,
    descend: bool,
}

impl Clip {
    /// Under the Gram matrix `gram`, `[K, K]` row-major, for groups of `spec.group_size`.
    ///
    /// # Errors
    /// A matrix that is not `[k, k]`.
    pub fn new(gram: &[f64], k: usize, spec: &Spec) -> Result<Clip, GridError> {
        if k.checked_mul(k) != Some(gram.len()) {
            let expected = k.saturating_mul(k);
            return Err(GridError::Length {
                what: "entries of the Gram matrix",
                expected,
                found: gram.len(),
            });
        }
        let group_size = spec.group_size.max(1);
        let mean = mean(gram, k, 0..k);
        let block = |g: usize| {
            let range = g * group_size..k.min((g + 1) * group_size);
            let own = self::mean(gram, k, range.clone());
            let damp = DAMP * mean;
            let unit = 1.0 / (own + damp);
            let entry = |i: usize, j: usize| {
                let d = if i == j { damp } else { 0.0 };
                ((gram[i * k + j] + d) * unit) as f32
            };
            if !unit.is_finite() || unit == 0.0 {
                // Inputs that are never seen: every weight counts alike.
                let n = range.len();
                return (0..n * n).map(|i| f32::from(u8::from(i % (n + 1) == 0))).collect();
            }
            range.clone().flat_map(|i| range.clone().map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect()
        };
        Ok(Clip { group_size, blocks: (0..spec.groups(k)).map(block).collect(), descend: true })
    }

    /// Only chooses the grid: codes stay the nearest ones, and the scale is what the search found.
    pub fn nearest(self) -> Clip {
        Clip { descend: false, ..self }
    }
}

fn mean(gram: &[f64], k: usize, range: std::ops::Range<usize>) -> f64 {
    let n = range.len().max(1) as f64;
    range.map(|i| gram[i * k + i]).sum::<f64>() / n
}

/// One lane per output.
pub(super) type Lanes = [f32; LANES];

/// Working space of one thread: rows as in a block.
#[derive(Debug, Default)]
pub struct Space {
    pub(super) codes: Vec<Lanes>,
    pub(super) error: Vec<Lanes>,
    /// `G e`.
    pub(super) ge: Vec<Lanes>,
    /// `code - zero`.
    points: Vec<Lanes>,
    /// `G` times those.
    gc: Vec<Lanes>,
}

impl Space {
    pub(super) fn resize(&mut self, rows: usize) {
        for part in [&mut self.codes, &mut self.error, &mut self.ge, &mut self.points, &mut self.gc] {
            part.resize(rows, [0.0; LANES]);
        }
    }
}

/// One grid per lane.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub scale: Lanes,
    pub zero: Lanes,
}

impl Quantizer for Clip {
    type Space = Space;

    fn space(&self, spec: &Spec) -> Space {
        debug_assert_eq!(spec.group_size, self.group_size, "the blocks were cut for another group size");
        Space::default()
    }

    fn block(&self, spec: &Spec, at: At, x: &Block, out: &mut BlockOut, space: &mut Space) -> Stats {
        let gram = &self.blocks[at.group];
        let top = spec.max_code() as f32;
        space.resize(x.len());
        let (mut grid, cost) = search(spec, x, gram, &mut space.error);
        nearest(x, &grid, top, &mut space.codes);
        if self.descend {
            let found = grid;
            errors(x, &space.codes, &grid, &mut space.error);
            multiply(gram, &space.error, &mut space.ge);
            for _ in 0..ROUNDS {
                descend(gram, &grid, top, space);
                refit(spec, gram, &mut grid, space);
            }
            descend(gram, &grid, top, space);
            errors(x, &space.codes, &grid, &mut space.error);
            let last = quadratic(gram, &space.error);
            keep_better(x, &found, &cost, &last, top, &mut grid, &mut space.codes);
        }
        (out.scale, out.zero) = (grid.scale, grid.zero);
        pack(spec, x, &space.codes, out)
    }
}

/// The cheapest of the shrunk grids under nearest codes, and what it costs. Ties go to the wider grid.
fn search(spec: &Spec, x: &Block, gram: &[f32], error: &mut [Lanes]) -> (Grid, Lanes) {
    let range = Range::of(x);
    let top = spec.max_code() as f32;
    let mut best: Option<(Grid, Lanes)> = None;
    let mut consider = |grid: Grid| {
        nearest_errors(x, &grid, top, error);
        let cost = quadratic(gram, error);
        let (found, least) = best.get_or_insert((grid, cost));
        for l in 0..LANES {
            if cost[l] < least[l] {
                (found.scale[l], found.zero[l], least[l]) = (grid.scale[l], grid.zero[l], cost[l]);
            }
        }
    };
    for &high in shrinks(spec.bits) {
        if spec.symmetric {
            // One side has a code more than the other: each may have it.
            let (scale, zero) = shrunk(spec, &range, high, high);
            consider(Grid { scale, zero });
            if !spec.narrow {
                consider(Grid { scale: scale.map(|s| -s), zero });
            }
            continue;
        }
        for &low in shrinks(spec.bits) {
            let (scale, zero) = shrunk(spec, &range, low, high);
            consider(Grid { scale, zero });
        }
    }
    best.expect("there is at least one shrink")
}

/// The grid of a range with its ends shrunk. A lane of one repeated value keeps it, since it is exact.
pub(super) fn shrunk(spec: &Spec, range: &Range, low: f32, high: f32) -> (Lanes, Lanes) {
    let mut r = *range;
    for l in 0..LANES {
        if r.min[l] != r.max[l] {
            r.min[l] *= low;
            r.max[l] *= high;
        }
    }
    r.grid(spec)
}

/// Undoes the descent in lanes where rounding made it cost more than what it started from.
fn keep_better(
    x: &Block,
    found: &Grid,
    before: &Lanes,
    after: &Lanes,
    top: f32,
    grid: &mut Grid,
    codes: &mut [Lanes],
) {
    let worse: [bool; LANES] = std::array::from_fn(|l| after[l] > before[l] || after[l].is_nan());
    if !worse.contains(&true) {
        return;
    }
    for l in (0..LANES).filter(|&l| worse[l]) {
        (grid.scale[l], grid.zero[l]) = (found.scale[l], found.zero[l]);
        let r = reciprocal(found.scale[l]);
        for (x, c) in x.iter().zip(&mut *codes) {
            c[l] = code(x[l], r, found.zero[l], top);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn nearest(x: &Block, grid: &Grid, top: f32, codes: &mut [Lanes]) {
    let r = grid.scale.map(reciprocal);
    for (x, c) in x.iter().zip(codes) {
        for l in 0..LANES {
            c[l] = code(x[l], r[l], grid.zero[l], top);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn nearest_errors(x: &Block, grid: &Grid, top: f32, error: &mut [Lanes]) {
    let r = grid.scale.map(reciprocal);
    for (x, e) in x.iter().zip(error) {
        for l in 0..LANES {
            e[l] = (code(x[l], r[l], grid.zero[l], top) - grid.zero[l]) * grid.scale[l] - x[l];
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn errors(x: &Block, codes: &[Lanes], grid: &Grid, error: &mut [Lanes]) {
    for ((x, c), e) in x.iter().zip(codes).zip(error) {
        for l in 0..LANES {
            e[l] = (c[l] - grid.zero[l]) * grid.scale[l] - x[l];
        }
    }
}

/// Rows of a product that are summed side by side.
const SIDE: usize = 4;

/// `e^T G e` of every lane; `gram` is symmetric, and only its lower half is read.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn quadratic(gram: &[f32], e: &[Lanes]) -> Lanes {
    let g = e.len();
    let mut total = [0.0; LANES];
    for (b, rows) in e.chunks(SIDE).enumerate() {
        let start = b * SIDE;
        let mut sums = [[0.0f32; LANES]; SIDE];
        if rows.len() == SIDE {
            let (r0, r1) = (&gram[start * g..][..start], &gram[(start + 1) * g..][..start]);
            let (r2, r3) = (&gram[(start + 2) * g..][..start], &gram[(start + 3) * g..][..start]);
            let [mut s0, mut s1, mut s2, mut s3] = sums;
            for ((((e, g0), g1), g2), g3) in e.iter().zip(r0).zip(r1).zip(r2).zip(r3) {
                for l in 0..LANES {
                    s0[l] += g0 * e[l];
                    s1[l] += g1 * e[l];
                    s2[l] += g2 * e[l];
                    s3[l] += g3 * e[l];
                }
            }
            sums = [s0, s1, s2, s3];
        } else {
            for (i, s) in sums.iter_mut().enumerate().take(rows.len()) {
                for (j, e) in e[..start].iter().enumerate() {
                    for l in 0..LANES {
                        s[l] += gram[(start + i) * g + j] * e[l];
                    }
                }
            }
        }
        for (i, s) in sums.iter().enumerate().take(rows.len()) {
            let mut own = [0.0f32; LANES];
            for (j, e) in rows.iter().enumerate() {
                let entry = gram[(start + i) * g + start + j];
                for l in 0..LANES {
                    own[l] += entry * e[l];
                }
            }
            for l in 0..LANES {
                total[l] += rows[i][l] * (2.0 * s[l] + own[l]);
            }
        }
    }
    total
}

/// `G x` of every lane.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn multiply(gram: &[f32], x: &[Lanes], out: &mut [Lanes]) {
    out.fill([0.0; LANES]);
    for (column, x) in gram.chunks_exact(x.len()).zip(x) {
        for (g, o) in column.iter().zip(&mut *out) {
            for l in 0..LANES {
                o[l] += g * x[l];
            }
        }
    }
}

/// Moves single codes to where the cost is least, the others standing still, and keeps `ge` up to date.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn descend(gram: &[f32], grid: &Grid, top: f32, space: &mut Space) {
    let steps = grid.scale.map(reciprocal);
    let g = space.codes.len();
    for _ in 0..SWEEPS {
        let mut moved = false;
        for k in 0..g {
            let column = &gram[k * g..][..g];
            let diagonal = column[k];
            let per = reciprocal(diagonal);
            let (codes, ge) = (&mut space.codes[k], &space.ge[k]);
            let mut delta = [0.0f32; LANES];
            let mut any = 0.0f32;
            for l in 0..LANES {
                let to = code(-ge[l] * per, steps[l], codes[l], top);
                let d = (to - codes[l]) * grid.scale[l];
                let gain = d * (2.0 * ge[l] + d * diagonal);
                let d = if gain < 0.0 { d } else { 0.0 };
                codes[l] = if gain < 0.0 { to } else { codes[l] };
                delta[l] = d;
                any += d.abs();
            }
            if any > 0.0 {
                moved = true;
                for (entry, ge) in column.iter().zip(&mut space.ge) {
                    for l in 0..LANES {
                        ge[l] += entry * delta[l];
                    }
                }
            }
        }
        if !moved {
            return;
        }
    }
}

/// Moves the scale to where the cost is least, the codes standing still, and keeps `ge` up to date. What the weights
/// of other groups cost with these is in `ge` too, where the caller put it there.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn refit(spec: &Spec, gram: &[f32], grid: &mut Grid, space: &mut Space) {
    for (c, code) in space.points.iter_mut().zip(&space.codes) {
        for l in 0..LANES {
            c[l] = code[l] - grid.zero[l];
        }
    }
    multiply(gram, &space.points, &mut space.gc);
    // A step `d` of the scale costs `d (2 c^T G e + d c^T G c)`.
    let (mut slope, mut bend) = ([0.0f32; LANES], [0.0f32; LANES]);
    for ((c, ge), gc) in space.points.iter().zip(&space.ge).zip(&space.gc) {
        for l in 0..LANES {
            slope[l] += c[l] * ge[l];
            bend[l] += c[l] * gc[l];
        }
    }
    let mut step = [0.0f32; LANES];
    for l in 0..LANES {
        let scale = spec.stored(grid.scale[l] - slope[l] / bend[l]);
        let d = scale - grid.scale[l];
        if scale.is_finite() && scale != 0.0 && d * (2.0 * slope[l] + d * bend[l]) < 0.0 {
            (grid.scale[l], step[l]) = (scale, d);
        }
    }
    for (ge, gc) in space.ge.iter_mut().zip(&space.gc) {
        for l in 0..LANES {
            ge[l] += step[l] * gc[l];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Float, Layout, Matrix, Parts, Rtn, pack::dequantize, quantize};
    use super::*;
    use proptest::prelude::*;

    struct Case {
        n: usize,
        k: usize,
        w: Vec<f32>,
        /// `[K, K]`, in double.
        gram: Vec<f64>,
    }

    impl Case {
        /// Weights `[n, k]`, and inputs that mix `k / 2 + 1` independent ones, so that they are correlated.
        fn new(n: usize, k: usize, seed: u64) -> Case {
            let mut state = seed;
            let mut noise = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
            };
            let w: Vec<f32> = (0..n * k).map(|_| noise().powi(3) as f32).collect();
            let rank = k / 2 + 1;
            let mix: Vec<f64> = (0..rank * k).map(|_| noise()).collect();
            let entry = |i: usize, j: usize| (0..rank).map(|r| mix[r * k + i] * mix[r * k + j]).sum();
            let gram = (0..k * k).map(|i| entry(i / k, i % k)).collect();
            Case { n, k, w, gram }
        }

        fn run<Q: Quantizer>(&self, spec: &Spec, method: &Q) -> Vec<f32> {
            let bytes: Vec<u8> = self.w.iter().flat_map(|x| x.to_le_bytes()).collect();
            let w = Matrix { bytes: &bytes, float: Float::F32, layout: Layout::Nk, n: self.n, k: self.k };
            let (codes, groups) = spec.lens(self.n, self.k).unwrap();
            let (mut codes, mut scales, mut zeros) = (vec![0; codes], vec![0.0; groups], vec![0; groups]);
            let parts = Parts { codes: &mut codes, scales: &mut scales, zero_points: Some(&mut zeros) };
            let stats = quantize(&w, spec, method, parts).unwrap();
            let mut out = vec![0.0; self.w.len()];
            dequantize(spec, self.n, self.k, &codes, &scales, &zeros, &mut out).unwrap();
            let error2: f64 = self.w.iter().zip(&out).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            assert!((stats.error2 - error2).abs() <= 1e-4 * error2 + 1e-9, "{stats:?} for {error2}");
            out
        }

        /// What the errors of output `n` cost in group `g`, with the diagonal damped as the method does.
        fn cost(&self, spec: &Spec, back: &[f32], n: usize, g: usize) -> f64 {
            let damp = 0.01 * (0..self.k).map(|i| self.gram[i * self.k + i]).sum::<f64>() / self.k as f64;
            let range = g * spec.group_size..self.k.min((g + 1) * spec.group_size);
            let e = |i: usize| f64::from(back[n * self.k + i]) - f64::from(self.w[n * self.k + i]);
            range
                .clone()
                .flat_map(|i| range.clone().map(move |j| (i, j)))
                .map(|(i, j)| e(i) * e(j) * (self.gram[i * self.k + j] + if i == j { damp } else { 0.0 }))
                .sum()
        }
    }

    fn spec(bits: u32, group_size: usize, symmetric: bool) -> Spec {
        Spec { bits, group_size, symmetric, narrow: false, scales: Float::F32 }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn no_group_costs_more_than_rounding(
            n in 1usize..20, k in 1usize..70, seed: u64, bits in 2u32..=8, group in 16usize..40, symmetric: bool,
        ) {
            let case = Case::new(n, k, seed);
            let spec = spec(bits, group, symmetric);
            let plain = case.run(&spec, &Rtn);
            let clip = Clip::new(&case.gram, k, &spec).unwrap();
            let near = case.run(&spec, &clip.clone().nearest());
            let best = case.run(&spec, &clip);
            for n in 0..n {
                for g in 0..spec.groups(k) {
                    let [plain, near, best] = [&plain, &near, &best].map(|b| case.cost(&spec, b, n, g));
                    prop_assert!(near <= plain * 1.0001 + 1e-9, "{near} after {plain}");
                    prop_assert!(best <= near * 1.0001 + 1e-9, "{best} after {near}");
                }
            }
        }
    }

    /// Inputs that move together let errors cancel, which rounding each weight by itself cannot use.
    #[test]
    fn correlated_inputs_gain_much() {
        let case = Case::new(32, 64, 3);
        let spec = spec(4, 32, false);
        let total = |back: &[f32]| -> f64 {
            (0..case.n).flat_map(|n| [case.cost(&spec, back, n, 0), case.cost(&spec, back, n, 1)]).sum()
        };
        let clip = Clip::new(&case.gram, case.k, &spec).unwrap();
        let (plain, near, best) = (
            total(&case.run(&spec, &Rtn)),
            total(&case.run(&spec, &clip.clone().nearest())),
            total(&case.run(&spec, &clip)),
        );
        assert!(near < 0.9 * plain, "{near} after {plain}");
        assert!(best < 0.8 * near, "{best} after {near}");
    }

    #[test]
    fn repeated_values_stay_exact_and_unseen_inputs_are_no_trouble() {
        for symmetric in [false, true] {
            let mut case = Case::new(3, 48, 5);
            case.w[..48].fill(0.1);
            case.w[48..96].fill(-0.3);
            let spec = spec(4, 16, symmetric);
            for gram in [case.gram.clone(), vec![0.0; 48 * 48]] {
                let back = case.run(&spec, &Clip::new(&gram, 48, &spec).unwrap());
                assert_eq!(back[..96], case.w[..96]);
                assert!(back.iter().all(|x| x.is_finite()));
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        let case = Case::new(300, 64, 9);
        let spec = spec(4, 32, false);
        let clip = Clip::new(&case.gram, case.k, &spec).unwrap();
        let with = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        let one = with(1).install(|| case.run(&spec, &clip));
        for threads in [2, 7] {
            assert_eq!(with(threads).install(|| case.run(&spec, &clip)), one);
        }
    }

    #[test]
    fn a_gram_matrix_of_another_size_is_refused() {
        let err = Clip::new(&[1.0; 9], 4, &spec(4, 16, false)).unwrap_err();
        assert_eq!(err, GridError::Length { what: "entries of the Gram matrix", expected: 16, found: 9 });
    }
}
