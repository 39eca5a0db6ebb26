//! How far a quantized weight is from the float one, and its outputs on calibration data, after each step of a method:
//! the figures that reports have. All sums are in double precision and in the order of rows.

use crate::WeightReport;
use crate::gram::quadratic_of;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Multiplications that measuring the errors of outputs may take. Of a weight for which this is too little, as many
/// outputs are measured as it is enough for, evenly spaced, but [`OUTPUTS`] at least.
const WORK: usize = 1 << 33;

/// Outputs whose errors are measured at least, where there are as many.
pub const OUTPUTS: usize = 512;

/// Errors after one step of a method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepErrors {
    /// The step: `rtn`, `scale`, `clip`, `hqq`, and so on.
    pub step: String,
    /// |W - Q| / |W|, Frobenius, if the method ended here.
    pub weight_error: f64,
    /// |XW - XQ| / |XW| on the calibration data; `None` without. Of a weight of thousands of inputs and outputs, of some
    /// outputs, evenly spaced, but [`OUTPUTS`] at least.
    pub output_error: Option<f64>,
}

/// Errors of one weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WeightErrors {
    /// |W - Q|, Frobenius.
    pub frobenius: f64,
    /// |W - Q| / |W|; zero of a weight that is zero.
    pub relative: f64,
    /// The largest |w - q|.
    pub max: f64,
    /// The mean of |w - q|.
    pub mean: f64,
}

impl WeightErrors {
    /// Of `w` and what stands for it, `q`; both `[N, K]` row-major.
    pub fn of(w: &[f32], q: &[f32], k: usize) -> WeightErrors {
        // Squares, magnitudes, the largest of these, and squares of the weight itself.
        type Sums = (f64, f64, f64, f64);
        let row = |(w, q): (&[f32], &[f32])| -> Sums {
            w.iter().zip(q).fold((0.0, 0.0, 0.0, 0.0), |(e2, e1, max, w2), (&w, &q)| {
                let (w, q) = (f64::from(w), f64::from(q));
                let e = (w - q).abs();
                (e2 + e * e, e1 + e, f64::max(max, e), w2 + w * w)
            })
        };
        let k = k.max(1);
        let rows: Vec<Sums> = w.par_chunks(k).zip(q.par_chunks(k)).map(row).collect();
        let add = |a: Sums, b: &Sums| (a.0 + b.0, a.1 + b.1, f64::max(a.2, b.2), a.3 + b.3);
        let (e2, e1, max, w2) = rows.iter().fold((0.0, 0.0, 0.0, 0.0), add);
        WeightErrors {
            frobenius: e2.sqrt(),
            relative: if w2 > 0.0 { (e2 / w2).sqrt() } else { 0.0 },
            max,
            mean: e1 / w.len().max(1) as f64,
        }
    }
}

/// [`quadratic_of`] of `n` rows, or of as many as [`WORK`] allows; `fill` writes one.
fn cost(n: usize, k: usize, gram: &[f32], fill: impl Fn(usize, &mut [f32]) + Sync) -> f64 {
    let taken = n.min((WORK / (k * k).max(1)).max(OUTPUTS));
    quadratic_of(taken, k, gram, |from, out| {
        for (i, row) in out.chunks_exact_mut(k.max(1)).enumerate() {
            fill((from + i) * n / taken, row);
        }
    })
}

/// Judges what stands for a weight after each step of a method.
pub struct Judge<'a> {
    w: &'a [f32],
    n: usize,
    k: usize,
    /// The Gram matrix of the inputs, and the weight's own outputs under it.
    gram: Option<(&'a [f32], f64)>,
    last: WeightErrors,
    steps: Vec<StepErrors>,
}

impl<'a> Judge<'a> {
    /// Of the weight `w`, `[N, K]` row-major. `gram` is the Gram matrix `[K, K]` of its inputs, where there is one.
    pub fn new(w: &'a [f32], n: usize, k: usize, gram: Option<&'a [f32]>) -> Judge<'a> {
        let own = |g: &'a [f32]| (g, cost(n, k, g, |at, out| out.copy_from_slice(&w[at * k..][..k])));
        Judge { w, n, k, gram: gram.map(own), last: WeightErrors::default(), steps: Vec::new() }
    }

    /// Notes what it costs when `q`, `[N, K]`, stands for the weight after this step.
    pub fn step(&mut self, step: &str, q: &[f32]) {
        let k = self.k;
        let off = |at: usize, out: &mut [f32]| {
            let rows = q[at * k..][..k].iter().zip(&self.w[at * k..]);
            out.iter_mut().zip(rows).for_each(|(e, (q, w))| *e = q - w);
        };
        let output_error = self.gram.and_then(|(gram, own)| {
            let ratio = cost(self.n, k, gram, off).max(0.0) / own;
            (own > 0.0 && ratio.is_finite()).then(|| ratio.sqrt())
        });
        self.last = WeightErrors::of(self.w, q, k);
        let weight_error = self.last.relative;
        self.steps.push(StepErrors { step: step.to_string(), weight_error, output_error });
    }

    /// The error of the output after the last step.
    pub fn output_error(&self) -> Option<f64> {
        self.steps.last()?.output_error
    }

    /// Puts the steps into the weight's report, and what the last of them cost as its errors.
    pub fn finish(self, report: &mut WeightReport) {
        if let Some(last) = self.steps.last() {
            report.set_errors(&self.last);
            report.output_error = last.output_error;
        }
        report.steps = self.steps;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// W = [[3, 0], [0, 4]], Q = [[3, 1], [-2, 4]]: errors 1 and 2.
    #[test]
    fn errors_by_hand() {
        let e = WeightErrors::of(&[3.0, 0.0, 0.0, 4.0], &[3.0, 1.0, -2.0, 4.0], 2);
        assert_eq!((e.frobenius, e.max, e.mean), (5f64.sqrt(), 2.0, 0.75));
        assert!((e.relative - 5f64.sqrt() / 5.0).abs() < 1e-15, "{e:?}");
    }

    #[test]
    fn squares_beyond_single_precision_are_no_trouble() {
        for scale in [1e30f32, 1e-30] {
            let w = [3.0 * scale, 4.0 * scale];
            let e = WeightErrors::of(&w, &[3.0 * scale, 0.0], 2);
            assert!((e.relative - 0.8).abs() < 1e-7, "{e:?}");
        }
        assert_eq!(WeightErrors::of(&[0.0; 4], &[0.0; 4], 2).relative, 0.0);
    }

    /// Under G = [[2, 1], [1, 2]]: W = (1, 1) has outputs of 6; an error of (1, -1) costs 2, one of (1, 0) costs 2.
    #[test]
    fn steps_end_in_the_report() {
        let gram = [2.0, 1.0, 1.0, 2.0];
        let mut judge = Judge::new(&[1.0, 1.0], 1, 2, Some(&gram[..]));
        judge.step("rtn", &[2.0, 0.0]);
        judge.step("clip", &[1.0, 2.0]);
        let mut report = WeightReport::default();
        judge.finish(&mut report);
        let third = (1f64 / 3.0).sqrt();
        assert_eq!(report.steps.iter().map(|s| s.step.as_str()).collect::<Vec<_>>(), ["rtn", "clip"]);
        assert_eq!(report.steps[0].weight_error, 1.0);
        assert!((report.steps[0].output_error.unwrap() - third).abs() < 1e-12);
        assert_eq!((report.weight_error, report.max_error), (0.5f64.sqrt(), 1.0));
        assert_eq!(report.output_error, report.steps[1].output_error);

        // No inputs ever seen: nothing is said of the output.
        let mut judge = Judge::new(&[1.0, 1.0], 1, 2, Some(&[0.0; 4][..]));
        judge.step("rtn", &[2.0, 0.0]);
        assert_eq!(judge.steps[0].output_error, None);
    }
}
