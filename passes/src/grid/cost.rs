//! What errors of weights cost in the output: `e^T H e`, factored once for all outputs.

use crate::gram::Gram;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::reborrow::ReborrowMut;
use faer::traits::ComplexField;
use faer::{MatMut, MatRef, Par};
use rayon::prelude::*;

/// The most that is added to the diagonal, in means of it; a matrix of activations is factored long before.
const MOST_DAMP: f64 = 100.0;

/// What is added to the diagonal, in means of it, where weights make up for differences of outputs: more than for
/// rounding, since a direction of which the data says little would move them far.
const RIDGE: f64 = 0.1;

/// Outputs that one task solves for.
const SOLVE_ROWS: usize = 64;

/// A pivot is at least what was added to the diagonal. Where rounding took it below this part of it, the precision was
/// not enough.
const LEAST_PIVOT: f32 = 0.5;

/// The cost of errors of one output: `e^T (H + damp I) e` with `H = G / mean(diag G)` for the Gram matrix `G` of the
/// inputs.
#[derive(Debug)]
pub struct Cost {
    /// Inputs.
    pub k: usize,
    /// `H`, `[K, K]`.
    pub h: Vec<f32>,
    /// The inputs in the order in which they are *not* rounded: the last is the first.
    pub order: Vec<u32>,
    /// `L` with `H + damp I = L L^T` in that order, `[K, K]`, lower; what is above the diagonal has no meaning.
    pub factor: Vec<f32>,
    /// What was added to the diagonal, in means of it.
    pub damp: f32,
    /// `1 / mean(diag G)`.
    unit: f32,
}

impl Cost {
    /// Of a Gram matrix of finite numbers. With `act_order` the inputs with the largest activations are rounded first,
    /// otherwise they are rounded as they stand. `damp` is what to add to the diagonal, in means of it; it is raised
    /// tenfold until the matrix can be factored. `None` where all inputs are zero.
    pub fn new(gram: Gram, damp: f64, act_order: bool) -> Option<Cost> {
        let k = gram.k;
        let diagonal = gram.diagonal();
        let unit = k as f64 / diagonal.iter().sum::<f64>();
        if !(unit.is_finite() && unit > 0.0) {
            return None;
        }
        let mut order: Vec<u32> = (0..k as u32).rev().collect();
        if act_order {
            order.sort_by(|&a, &b| diagonal[a as usize].total_cmp(&diagonal[b as usize]));
        }
        let mut h: Vec<f32> = Vec::new();
        gram.sums.par_iter().map(|x| (x * unit) as f32).collect_into_vec(&mut h);
        drop(gram);
        let mut added = damp;
        while added <= MOST_DAMP {
            if let Some(factor) = factor(&h, &order, added) {
                return Some(Cost { k, h, order, factor, damp: added as f32, unit: unit as f32 });
            }
            added = (added * 10.0).max(1e-4);
        }
        None
    }
}

/// What weights make up for.
pub struct Pull<'a> {
    cost: &'a Cost,
    /// As [`Cost::factor`], with the diagonal raised by [`RIDGE`].
    factor: Vec<f32>,
}

impl Cost {
    /// Prepares for [`Pull::add`].
    pub fn pull(&self) -> Option<Pull<'_>> {
        let ridge = RIDGE.max(self.damp.into());
        factor(&self.h, &self.order, ridge).map(|factor| Pull { cost: self, factor })
    }
}

impl Pull<'_> {
    /// `W + P (H + ridge I)^-1` for weights `W` and `P = D^T X` with the same rows of data, both `[N, K]`: the weights that
    /// make up for differences `D` between the outputs that are wanted and those that `W` gives.
    pub fn add(&self, w: &[f32], mut pull: Vec<f32>) -> Vec<f32> {
        let Cost { k, ref order, unit, .. } = *self.cost;
        let factor = MatRef::from_row_major_slice(&self.factor, k, k);
        pull.par_chunks_mut(SOLVE_ROWS * k).zip(w.par_chunks(SOLVE_ROWS * k)).for_each(|(pull, w)| {
            let mut sides: Vec<f32> = Vec::with_capacity(pull.len());
            for row in pull.chunks_exact(k) {
                sides.extend(order.iter().map(|&i| row[i as usize] * unit));
            }
            let mut view = MatMut::from_column_major_slice_mut(&mut sides, k, pull.len() / k);
            solve_lower_triangular_in_place(factor, view.rb_mut(), Par::Seq);
            solve_upper_triangular_in_place(factor.transpose(), view, Par::Seq);
            let rows = pull.chunks_exact_mut(k).zip(w.chunks_exact(k)).zip(sides.chunks_exact(k));
            for ((out, w), side) in rows {
                order.iter().zip(side).for_each(|(&i, d)| out[i as usize] = w[i as usize] + d);
            }
        });
        pull
    }
}

/// The factor of `h` with `damp` on its diagonal, in double precision where single is not enough.
fn factor(h: &[f32], order: &[u32], damp: f64) -> Option<Vec<f32>> {
    single(h, order, damp).or_else(|| double(h, order, damp))
}

/// The factor in single precision, unless that is not enough.
fn single(h: &[f32], order: &[u32], damp: f64) -> Option<Vec<f32>> {
    let factor = cholesky(permuted(h, order, damp as f32, |x| x), order.len())?;
    determined(&factor, order.len(), damp).then_some(factor)
}

/// The factor in double precision.
fn double(h: &[f32], order: &[u32], damp: f64) -> Option<Vec<f32>> {
    let factor = cholesky(permuted(h, order, damp, f64::from), order.len())?;
    let factor: Vec<f32> = factor.into_iter().map(|x| x as f32).collect();
    determined(&factor, order.len(), damp).then_some(factor)
}

/// Whether no pivot is below what it must be.
fn determined(factor: &[f32], k: usize, damp: f64) -> bool {
    (0..k).all(|i| factor[i * k + i].powi(2) >= LEAST_PIVOT * damp as f32)
}

fn permuted<T: Copy + Default + Send + Sync + std::ops::AddAssign>(
    h: &[f32],
    order: &[u32],
    damp: T,
    widen: fn(f32) -> T,
) -> Vec<T> {
    let k = order.len();
    let mut out = vec![T::default(); k * k];
    out.par_chunks_mut(k.max(1)).zip(order).enumerate().for_each(|(i, (row, &from))| {
        let from = &h[from as usize * k..][..k];
        row[..=i].iter_mut().zip(order).for_each(|(x, &at)| *x = widen(from[at as usize]));
        row[i] += damp;
    });
    out
}

/// `L` in the place of the lower half of a row-major matrix; `None` where that has no positive pivots. On one thread,
/// whose result is the same for any number of them.
fn cholesky<T: ComplexField + Copy>(mut a: Vec<T>, k: usize) -> Option<Vec<T>> {
    let scratch = cholesky_in_place_scratch::<T>(k, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let view = MatMut::from_row_major_slice_mut(&mut a, k, k);
    let none = LltRegularization::default();
    let found = cholesky_in_place(view, none, Par::Seq, MemStack::new(&mut memory), Default::default());
    found.is_ok().then_some(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gram(k: usize, sums: Vec<f64>) -> Gram {
        let mut g = Gram::new(k);
        g.sums = sums;
        g
    }

    /// `L L^T`, at `[i, j]` of the inputs.
    fn product(c: &Cost, i: usize, j: usize) -> f32 {
        let at = |i: usize| c.order.iter().position(|&o| o as usize == i).unwrap();
        let (a, b) = (at(i), at(j));
        (0..=a.min(b)).map(|p| c.factor[a * c.k + p] * c.factor[b * c.k + p]).sum()
    }

    #[test]
    fn the_factor_is_that_of_the_damped_matrix() {
        // The mean of the diagonal is 2.
        let c = Cost::new(gram(3, vec![1.0, 0.5, 0.0, 0.5, 3.0, 1.0, 0.0, 1.0, 2.0]), 0.01, true).unwrap();
        assert_eq!((c.order.as_slice(), c.damp), (&[0, 2, 1][..], 0.01));
        let want = [0.51, 0.25, 0.0, 0.25, 1.51, 0.5, 0.0, 0.5, 1.01];
        for (i, want) in want.iter().enumerate() {
            assert!((product(&c, i / 3, i % 3) - want).abs() < 1e-6, "entry {i}");
        }
        assert_eq!(Cost::new(gram(2, vec![1.0, 0.0, 0.0, 1.0]), 0.0, false).unwrap().order, [1, 0]);
    }

    #[test]
    fn damp_is_raised_as_far_as_it_takes() {
        // Not of any data: its eigenvalues are 3 and -1, which takes more than 1 on the diagonal.
        let c = Cost::new(gram(2, vec![1.0, 2.0, 2.0, 1.0]), 0.01, true).unwrap();
        assert_eq!(c.damp, 10.0);
        // Of rank one, without damp.
        let c = Cost::new(gram(2, vec![1.0, 1.0, 1.0, 1.0]), 0.0, true).unwrap();
        assert!(c.damp > 0.0 && c.damp <= 0.001, "{}", c.damp);
        assert!(Cost::new(gram(2, vec![0.0; 4]), 0.01, true).is_none());
    }

    /// One input: `W + P / (H + ridge)` by hand, with H = 1 and P = 3 of a Gram matrix of 4.
    #[test]
    fn pull_by_hand() {
        let c = Cost::new(gram(1, vec![4.0]), 0.01, true).unwrap();
        let got = c.pull().unwrap().add(&[5.0], vec![3.0]);
        assert!((got[0] - (5.0 + 0.75 / 1.1)).abs() < 1e-6, "{got:?}");
    }

    /// With enough data the weights come out that make the outputs what they should be.
    #[test]
    fn pull_solves_for_the_outputs() {
        let (rows, k) = (400, 5);
        let number = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 300.0;
        let x: Vec<f32> = (0..rows * k).map(number).collect();
        let mut g = Gram::new(k);
        g.add(&x);
        let g = g.finish();
        let (w, wanted) = ([0.1f32, -0.4, 0.8, 0.3, 0.0], [0.2f32, -0.4, 0.7, 0.5, -0.1]);
        let mut pull = vec![0f32; k];
        for x in x.chunks_exact(k) {
            let d: f32 = x.iter().zip(&wanted).zip(&w).map(|((x, a), b)| x * (a - b)).sum();
            pull.iter_mut().zip(x).for_each(|(p, x)| *p += d * x);
        }
        let got = Cost::new(g, 0.01, true).unwrap().pull().unwrap().add(&w, pull);
        for ((got, wanted), w) in got.iter().zip(&wanted).zip(&w) {
            // The ridge holds back about a tenth of the way.
            assert!((got - wanted).abs() <= 0.2 * (wanted - w).abs() + 0.01, "{got} for {wanted}, from {w}");
        }
    }
}
