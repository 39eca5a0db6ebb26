//! Gram matrices of activations, `X^T X`, gathered over the calibration data without keeping any of it.
//!
//! All that weight quantization asks of the data is in there: the error of a linear's output is
//! `|X E^T|^2 = tr(E G E^T)` for a weight error `E` of shape `[N, K]`.

use crate::{PassCx, PassError};
use dialects::exec::ExecError;
use dialects::ir::{Module, Value};
use dialects::kernels::gemm::{self, Mat};
use rayon::prelude::*;
use std::collections::HashMap;

/// Bytes of Gram matrices held at once. What does not fit waits for another run over the data.
pub const BUDGET: usize = 1 << 30;

/// Rows of errors that one task multiplies.
const TILE_ROWS: usize = 128;

/// The Gram matrix of one value whose last dim is K.
#[derive(Clone, Debug)]
pub struct Gram {
    /// The last dim of the value.
    pub k: usize,
    /// Rows of data that went in.
    pub rows: u64,
    /// `[K, K]`, symmetric, row-major: sums over the rows, once it is finished.
    pub sums: Vec<f64>,
    /// Rows that are yet to be added: few at a time would cost as much as many.
    pending: Vec<f32>,
}

impl Gram {
    /// An empty one.
    pub fn new(k: usize) -> Gram {
        Gram { k, rows: 0, sums: vec![0.0; k * k], pending: Vec::new() }
    }

    /// Adds rows of data, `[rows, K]` row-major.
    pub fn add(&mut self, x: &[f32]) {
        self.rows += (x.len() / self.k.max(1)) as u64;
        self.pending.extend_from_slice(x);
        if self.pending.len() >= gemm::GRAM_ROWS * self.k {
            self.flush();
        }
    }

    fn flush(&mut self) {
        gemm::gram(&mut self.sums, &self.pending, self.k);
        self.pending.clear();
    }

    /// The matrix of the rows that were added.
    pub fn finish(mut self) -> Gram {
        self.flush();
        self.pending = Vec::new();
        gemm::mirror(&mut self.sums, self.k);
        self
    }

    /// Refuses a matrix of activations, those of `v`, that are NaN or infinite, or whose squares are.
    pub fn check(&self, m: &Module, v: Value, pass: &'static str) -> Result<(), PassError> {
        if self.diagonal().iter().all(|x| x.is_finite()) {
            return Ok(());
        }
        let why = "the activations, or their squares, are NaN or infinite on the calibration data".into();
        Err(PassError::At { pass, what: m.value_label(v), why })
    }

    /// The diagonal: sums of squares, one per channel.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.k).map(|i| self.sums[i * self.k + i]).collect()
    }

    /// The matrix of the same data with every channel divided by its entry of `scale`.
    pub fn divided(&self, scale: &[f32]) -> Gram {
        let mut sums = self.sums.clone();
        sums.par_chunks_mut(self.k.max(1)).enumerate().for_each(|(i, row)| {
            row.iter_mut().zip(scale).for_each(|(x, &s)| *x /= f64::from(scale[i]) * f64::from(s));
        });
        Gram { k: self.k, rows: self.rows, sums, pending: Vec::new() }
    }

    /// The matrix in single precision.
    pub fn to_f32(&self) -> Vec<f32> {
        self.sums.iter().map(|&x| x as f32).collect()
    }
}

/// `tr(E G E^T)` for rows of errors `e`, `[rows, K]`, and a Gram matrix `g`, `[K, K]`, on this thread.
pub fn quadratic(e: &[f32], g: &[f32], k: usize) -> f64 {
    if k == 0 {
        return 0.0;
    }
    let mut eg = vec![0f32; e.len()];
    gemm::tile(Mat::new(e, e.len() / k, k), Mat::new(g, k, k), &mut eg);
    // A row's sum of K products keeps enough digits in single precision; the rows are summed in double.
    let row = |(a, b): (&[f32], &[f32])| f64::from(a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>());
    e.chunks_exact(k).zip(eg.chunks_exact(k)).map(row).sum()
}

/// [`quadratic`] over rows that are made on demand: `fill(first_row, out)` writes rows `first_row..` of `[n, K]`.
/// On threads; the sum is in the order of rows.
pub fn quadratic_of(n: usize, k: usize, g: &[f32], fill: impl Fn(usize, &mut [f32]) + Sync) -> f64 {
    let tile = |i: usize| {
        let from = i * TILE_ROWS;
        let mut e = vec![0f32; (n - from).min(TILE_ROWS) * k];
        fill(from, &mut e);
        quadratic(&e, g, k)
    };
    let parts: Vec<f64> = (0..n.div_ceil(TILE_ROWS)).into_par_iter().map(tile).collect();
    parts.iter().sum()
}

/// Cuts values into runs over the data, so that the matrices of one run stay within `budget` bytes (a matrix that
/// is larger by itself gets a run of its own). Keeps the order.
pub fn runs<T>(items: Vec<T>, k: impl Fn(&T) -> usize, budget: usize) -> Vec<Vec<T>> {
    let mut out: Vec<Vec<T>> = Vec::new();
    let mut used = 0usize;
    for item in items {
        let bytes = k(&item).saturating_mul(k(&item)).saturating_mul(size_of::<f64>());
        match out.last_mut() {
            Some(run) if used.saturating_add(bytes) <= budget => {
                used += bytes;
                run.push(item);
            }
            _ => {
                used = bytes;
                out.push(vec![item]);
            }
        }
    }
    out
}

/// Runs the calibration data once and gathers the Gram matrix of each value, whose last dim is `k`. No row may reach a
/// value, such as what an expert is given that was never chosen. Without values
/// nothing is run.
pub fn collect(
    m: &Module,
    cx: &PassCx,
    values: &[(Value, usize)],
    pass: &'static str,
) -> Result<HashMap<Value, Gram>, PassError> {
    let mut grams: HashMap<Value, Gram> = values.iter().map(|&(v, k)| (v, Gram::new(k))).collect();
    let wanted: Vec<Value> = values.iter().map(|&(v, _)| v).collect();
    if wanted.is_empty() {
        return Ok(grams);
    }
    cx.env.calibrate(m, &wanted, &mut |v, item| {
        let refuse = |why: String| ExecError::Sink(format!("the activation {:?}: {why}", m.value_label(v)));
        let t = item.tensor().map_err(|e| refuse(e.to_string()))?;
        let gram = grams.get_mut(&v).ok_or_else(|| refuse("was not asked for".into()))?;
        if t.shape().last() != Some(&gram.k) {
            return Err(refuse(format!(
                "expected a last dim of {}, found the shape {:?}",
                gram.k,
                t.shape()
            )));
        }
        gram.add(&t.to_f32().map_err(|e| refuse(e.to_string()))?);
        Ok(())
    })?;
    let grams: HashMap<Value, Gram> = grams.into_iter().map(|(v, g)| (v, g.finish())).collect();
    for &v in &wanted {
        grams[&v].check(m, v, pass)?;
    }
    Ok(grams)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// X = [[1, 2], [3, 4], [5, 6]]: X^T X = [[35, 44], [44, 56]], by hand.
    #[test]
    fn gram_by_hand() {
        let mut g = Gram::new(2);
        g.add(&[1.0, 2.0, 3.0, 4.0]);
        g.add(&[5.0, 6.0]);
        let g = g.finish();
        assert_eq!((g.rows, g.sums.as_slice()), (3, &[35.0, 44.0, 44.0, 56.0][..]));
        assert_eq!(g.diagonal(), [35.0, 56.0]);
        assert_eq!(g.divided(&[1.0, 2.0]).sums, [35.0, 22.0, 22.0, 14.0]);
    }

    /// |X E^T|^2 for E = [[1, -1], [0, 2]]: rows of X E^T are (-1, 4), (-1, 8), (-1, 12): 3 + 16 + 64 + 144 = 227.
    #[test]
    fn quadratic_is_the_output_error() {
        let e = [1.0, -1.0, 0.0, 2.0];
        let g = [35.0, 44.0, 44.0, 56.0];
        assert_eq!(quadratic(&e, &g, 2), 227.0);
        assert_eq!(quadratic_of(2, 2, &g, |from, out| out.copy_from_slice(&e[from * 2..])), 227.0);
    }

    #[test]
    fn runs_respect_the_budget() {
        let sizes = runs(vec![4usize, 4, 8, 100, 1], |&k| k, 2 * 16 * 8);
        assert_eq!(sizes, [vec![4, 4], vec![8], vec![100], vec![1]]);
    }
}
