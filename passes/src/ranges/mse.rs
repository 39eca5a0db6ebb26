//! The range of least squared error: what rounding costs within it, and clipping beyond it.

use super::{Form, Histogram, Range};

/// Ends that are tried at either side, as shares of the whole range.
const STEPS: u32 = 64;

/// The range, within `whole`.
pub fn range(h: &Histogram, whole: Range, form: Form) -> Range {
    let bins: Vec<(f64, f64)> = h.bins().map(|(x, n)| (x, n as f64)).collect();
    // By bin: sums of counts, values and squares of those before it.
    let mut sums = vec![(0.0, 0.0, 0.0)];
    for &(x, n) in &bins {
        let (s0, s1, s2) = sums[sums.len() - 1];
        sums.push((s0 + n, s1 + n * x, s2 + n * x * x));
    }
    let all = sums[bins.len()];
    // Squared distances to `end` of the values between two places.
    let beyond = |from: (f64, f64, f64), to: (f64, f64, f64), end: f64| {
        let (n, x, xx) = (to.0 - from.0, to.1 - from.1, to.2 - from.2);
        (xx - 2.0 * end * x + n * end * end).max(0.0)
    };
    let cost = |r: &Range| -> f64 {
        let (min, max) = (f64::from(r.min), f64::from(r.max));
        let step = (max - min) / f64::from(form.levels - 1);
        let low = sums[bins.partition_point(|b| b.0 < min)];
        let high = sums[bins.partition_point(|b| b.0 <= max)];
        // Rounding is as likely to be off by any part of half a step. Zeros are exact.
        (high.0 - low.0) * step * step / 12.0 + beyond(sums[0], low, min) + beyond(high, all, max)
    };
    let shares = || (1..=STEPS).map(|i| i as f32 / STEPS as f32);
    let lows: Vec<f32> = match form.symmetric || whole.min == 0.0 {
        true => vec![1.0],
        false => shares().collect(),
    };
    let mut best = (cost(&whole), whole);
    for high in shares() {
        for &low in &lows {
            let low = if form.symmetric { high } else { low };
            let r = Range { min: whole.min * low, max: whole.max * high };
            let c = cost(&r);
            if c < best.0 {
                best = (c, r);
            }
        }
    }
    best.1
}
