//! Rounding with compensation: the error of every weight is made up for by those that are rounded after it.
//!
//! GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
//! 2023, section 3), in the form that needs no inverse. With the Gram matrix `H` of the inputs and errors `e` of one
//! output's weights, the output's error is `e^T H e`. The inputs are put in the order in which they are *not* rounded
//! (last is first) and `H = L L^T` is factored, so that
//! `e^T H e = sum_s (L[s,s] e_s + sum_{t > s} L[t,s] e_t)^2`: when `s` is rounded, the later terms are known, and its own
//! term is least where `w_s + sum_{t > s} L[t,s] / L[s,s] (w_t - q_t)` is rounded instead of `w_s`. This is what GPTQ's updates with the
//! Cholesky factor of the inverse come to (and Babai's nearest plane: Chen et al., "The Geometry of LLM Quantization", 2025).
//!
//! Afterwards groups of weights take turns: single codes move to where the whole cost is least while all else stands
//! still, and scales are refitted (coordinate descent under all of `H`, as in QuantEase, Behdin et al. 2023). No step
//! raises the cost.
//!
//! A tile of outputs is worked on by one thread; what outputs share is the matrix alone.

use super::clip::{self, Grid, Lanes, Space};
use super::rtn::{code, reciprocal};
use super::{Cost, Given, LANES, Ranges, Spec};
use dialects::kernels::gemm::{self, Mat};
use multiversion::multiversion;
use rayon::prelude::*;

/// Outputs of a tile at most.
const TILE: usize = 128;

/// How to round.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Inputs that are rounded between two updates of all others.
    pub block: usize,
    /// Grids are chosen before any rounding; otherwise when a group's turn comes, for the weights as they are then.
    pub static_groups: bool,
    /// How grids are chosen. (Ranges chosen under the cost of errors, whether all of them or those that nothing makes up for,
    /// gained nothing over ranges chosen for the weights alone: what follows undoes more of their error.)
    pub ranges: Ranges,
    /// Turns of the descent.
    pub sweeps: u32,
}

/// Quantizes the rows `w`, `[N, K]`.
pub fn quantize(w: &[f32], cost: &Cost, spec: &Spec, method: &Method) -> Given {
    let k = cost.k;
    let n = w.len() / k.max(1);
    let kb = spec.groups(k);
    let blocks = blocks(cost, spec);
    let mut out = Given {
        k,
        codes: vec![0; n * k],
        scales: vec![0.0; n * kb],
        zero_points: vec![spec.middle() as u8; n * kb],
    };
    let width = (n / 8).next_multiple_of(LANES).clamp(LANES, TILE);
    let tiles = out.codes.par_chunks_mut(width * k).zip(out.scales.par_chunks_mut(width * kb));
    let tiles = tiles.zip(out.zero_points.par_chunks_mut(width * kb)).zip(w.par_chunks(width * k));
    tiles.for_each(|(((codes, scales), zeros), w)| {
        let mut tile = Tile::new(w, cost, &blocks, spec, method, width);
        tile.round();
        for _ in 0..method.sweeps {
            if !tile.sweep() {
                break;
            }
        }
        tile.write(codes, scales, zeros);
    });
    out
}

/// The block of `H` of each group, damped.
fn blocks(cost: &Cost, spec: &Spec) -> Vec<Vec<f32>> {
    let k = cost.k;
    let block = |g: usize| -> Vec<f32> {
        let range = g * spec.group_size..k.min((g + 1) * spec.group_size);
        let damp = |i: usize, j: usize| if i == j { cost.damp } else { 0.0 };
        let row = |i: usize| range.clone().map(move |j| cost.h[i * k + j] + damp(i, j));
        range.clone().flat_map(row).collect()
    };
    (0..spec.groups(k)).map(block).collect()
}

/// Some outputs, one column each: all buffers are `[.., width]`.
struct Tile<'a> {
    cost: &'a Cost,
    blocks: &'a [Vec<f32>],
    spec: &'a Spec,
    method: &'a Method,
    width: usize,
    outputs: usize,
    /// Weights `[K, width]`.
    w: Vec<f32>,
    /// Codes `[K, width]`.
    codes: Vec<f32>,
    /// `[kb, width]`.
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl<'a> Tile<'a> {
    fn new(
        rows: &[f32],
        cost: &'a Cost,
        blocks: &'a [Vec<f32>],
        spec: &'a Spec,
        method: &'a Method,
        width: usize,
    ) -> Tile<'a> {
        let k = cost.k;
        let outputs = rows.len() / k;
        let mut w = vec![0f32; k * width];
        for (n, row) in rows.chunks_exact(k).enumerate() {
            row.iter().enumerate().for_each(|(i, &x)| w[i * width + n] = x);
        }
        let kb = spec.groups(k);
        let (codes, scales) = (vec![0f32; k * width], vec![0f32; kb * width]);
        let zeros = vec![0f32; kb * width];
        Tile { cost, blocks, spec, method, width, outputs, w, codes, scales, zeros }
    }

    /// The grids of group `g` for these weights, `[group, width]`.
    fn place(&mut self, g: usize, weights: &[f32]) {
        let mut x = vec![[0f32; LANES]; weights.len() / self.width];
        for lane in (0..self.width).step_by(LANES) {
            load(weights, self.width, lane, &mut x);
            let grid = self.method.ranges.grid(self.spec, &x);
            self.scales[g * self.width + lane..][..LANES].copy_from_slice(&grid.scale);
            self.zeros[g * self.width + lane..][..LANES].copy_from_slice(&grid.zero);
        }
    }

    /// GPTQ.
    fn round(&mut self) {
        let (k, width, size) = (self.cost.k, self.width, self.spec.group_size);
        if self.method.static_groups {
            for g in 0..self.spec.groups(k) {
                let rows = g * size..k.min((g + 1) * size);
                let weights = self.w[rows.start * width..rows.end * width].to_vec();
                self.place(g, &weights);
            }
        }
        let block = match self.method.static_groups {
            true => self.method.block,
            // A group lies in one block, so that its weights are up to date when its turn comes.
            false => self.method.block.next_multiple_of(size),
        };
        let l = &self.cost.factor;
        let mut errors = vec![0f32; k * width];
        let mut known = vec![0f32; block.min(k) * width];
        // Blocks start at the inputs that are rounded first: the end of the order.
        for done in (0..k).step_by(block) {
            let (from, to) = (k - k.min(done + block), k - done);
            let known = &mut known[..(to - from) * width];
            let ahead = Mat::new(l, k, k).rows(to, k).cols(from, to).t();
            gemm::tile(ahead, Mat::new(&errors[to * width..], k - to, width), known);
            for s in (from..to).rev() {
                let at = self.cost.order[s] as usize;
                let g = at / size;
                if !self.method.static_groups && at.is_multiple_of(size) {
                    let last = s + 1 - size.min(k - at);
                    let updated: Vec<f32> = (last..=s)
                        .rev()
                        .flat_map(|s| {
                            let at = self.cost.order[s] as usize;
                            let per = 1.0 / l[s * k + s];
                            let (w, known) = (&self.w[at * width..][..width], &known[(s - from) * width..]);
                            w.iter().zip(known).map(move |(w, c)| w + c * per).collect::<Vec<f32>>()
                        })
                        .collect();
                    self.place(g, &updated);
                }
                let (before, own) = known.split_at_mut((s - from) * width);
                round_input(
                    Input {
                        w: &self.w[at * width..][..width],
                        known: &own[..width],
                        per: 1.0 / l[s * k + s],
                        scales: &self.scales[g * width..][..width],
                        zeros: &self.zeros[g * width..][..width],
                        top: self.spec.max_code() as f32,
                    },
                    &mut self.codes[at * width..][..width],
                    &mut errors[s * width..][..width],
                );
                spread(&l[s * k + from..][..s - from], &errors[s * width..][..width], before);
            }
        }
    }

    /// One turn of the descent over all groups; whether anything moved.
    fn sweep(&mut self) -> bool {
        let (k, width, size) = (self.cost.k, self.width, self.spec.group_size);
        let mut errors = vec![0f32; k * width];
        for i in 0..k {
            let g = i / size;
            for t in 0..width {
                let at = i * width + t;
                let grid = g * width + t;
                errors[at] = (self.codes[at] - self.zeros[grid]) * self.scales[grid] - self.w[at];
            }
        }
        // Products with all of `H` are made for several groups at once, and brought up to date between them.
        let wide = self.method.block.next_multiple_of(size).min(k);
        let (mut he, mut part) = (vec![0f32; wide * width], vec![0f32; wide * width]);
        let mut moves = vec![0f32; size.min(k) * width];
        let h = Mat::new(&self.cost.h, k, k);
        let mut moved = false;
        let mut work = Work::default();
        for start in (0..k).step_by(wide) {
            let end = k.min(start + wide);
            let he = &mut he[..(end - start) * width];
            gemm::tile(h.rows(start, end), Mat::new(&errors, k, width), he);
            let own = &errors[start * width..end * width];
            he.iter_mut().zip(own).for_each(|(he, e)| *he += self.cost.damp * e);
            for from in (start..end).step_by(size) {
                let to = end.min(from + size);
                let moves = &mut moves[..(to - from) * width];
                moves.copy_from_slice(&errors[from * width..to * width]);
                let (known, later) = he[(from - start) * width..].split_at_mut((to - from) * width);
                moved |= self.settle(from / size, known, &mut errors[from * width..to * width], &mut work);
                let now = &errors[from * width..to * width];
                moves.iter_mut().zip(now).for_each(|(m, e)| *m = e - *m);
                let part = &mut part[..later.len()];
                gemm::tile(h.rows(to, end).cols(from, to), Mat::new(moves, to - from, width), part);
                later.iter_mut().zip(part).for_each(|(l, p)| *l += *p);
            }
        }
        moved
    }

    /// Moves the codes and the scales of group `g` to where the cost is least, given `he`, `H e` of the group, and brings
    /// its errors up to date. Whether a code moved.
    fn settle(&mut self, g: usize, he: &[f32], errors: &mut [f32], work: &mut Work) -> bool {
        let (k, width, size) = (self.cost.k, self.width, self.spec.group_size);
        let top = self.spec.max_code() as f32;
        let (from, to) = (g * size, k.min((g + 1) * size));
        let Work { space, x, before } = work;
        space.resize(to - from);
        x.resize(to - from, [0f32; LANES]);
        let mut moved = false;
        for lane in (0..width).step_by(LANES) {
            load(&self.w[from * width..to * width], width, lane, x);
            load(&self.codes[from * width..to * width], width, lane, &mut space.codes);
            load(he, width, lane, &mut space.ge);
            let lanes = |v: &[f32]| -> Lanes { std::array::from_fn(|l| v[g * width + lane + l]) };
            let mut grid = Grid { scale: lanes(&self.scales), zero: lanes(&self.zeros) };
            before.clone_from(&space.codes);
            clip::descend(&self.blocks[g], &grid, top, space);
            clip::refit(self.spec, &self.blocks[g], &mut grid, space);
            moved |= *before != space.codes;
            clip::errors(x, &space.codes, &grid, &mut space.error);
            self.scales[g * width + lane..][..LANES].copy_from_slice(&grid.scale);
            store(&space.codes, width, lane, &mut self.codes[from * width..to * width]);
            store(&space.error, width, lane, errors);
        }
        moved
    }

    fn write(&self, codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8]) {
        let (k, kb, width) = (self.cost.k, self.spec.groups(self.cost.k), self.width);
        for n in 0..self.outputs {
            (0..k).for_each(|i| codes[n * k + i] = self.codes[i * width + n] as u8);
            for g in 0..kb {
                scales[n * kb + g] = self.scales[g * width + n];
                zeros[n * kb + g] = self.zeros[g * width + n] as u8;
            }
        }
    }
}

/// Working space for sixteen outputs of a group.
#[derive(Default)]
struct Work {
    space: Space,
    x: Vec<Lanes>,
    before: Vec<Lanes>,
}

/// Sixteen outputs of `[rows, width]`.
fn load(from: &[f32], width: usize, lane: usize, to: &mut [Lanes]) {
    for (to, row) in to.iter_mut().zip(from.chunks_exact(width)) {
        to.copy_from_slice(&row[lane..lane + LANES]);
    }
}

fn store(from: &[Lanes], width: usize, lane: usize, to: &mut [f32]) {
    for (from, row) in from.iter().zip(to.chunks_exact_mut(width)) {
        row[lane..lane + LANES].copy_from_slice(from);
    }
}

/// One input of a tile's outputs, to be rounded.
struct Input<'a> {
    w: &'a [f32],
    /// `sum_{t > s} L[t,s] e_t`.
    known: &'a [f32],
    /// `1 / L[s,s]`.
    per: f32,
    scales: &'a [f32],
    zeros: &'a [f32],
    top: f32,
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn round_input(input: Input, codes: &mut [f32], errors: &mut [f32]) {
    let n = codes.len();
    let (w, known, scales, zeros) = (&input.w[..n], &input.known[..n], &input.scales[..n], &input.zeros[..n]);
    let errors = &mut errors[..n];
    for t in 0..n {
        let c = code(w[t] + known[t] * input.per, reciprocal(scales[t]), zeros[t], input.top);
        codes[t] = c;
        errors[t] = w[t] - (c - zeros[t]) * scales[t];
    }
}

/// Adds what an error contributes to the inputs of its block that are still to be rounded.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn spread(row: &[f32], errors: &[f32], known: &mut [f32]) {
    for (&l, known) in row.iter().zip(known.chunks_exact_mut(errors.len())) {
        for (k, e) in known.iter_mut().zip(errors) {
            *k += l * e;
        }
    }
}

#[cfg(test)]
mod tests;
