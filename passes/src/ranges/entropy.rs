//! The range of least divergence (Migacz, "8-bit Inference with TensorRT", GTC 2017, "Entropy calibration").

use super::Histogram;

/// What empty bins are taken to hold, so that logarithms are finite.
const EMPTY: f64 = 1e-4;

/// The share of the values that may be clipped. Where many values have one magnitude, such as a picture's background,
/// the divergence is as small right behind it: what is clipped looks like more of the same.
const CLIPPED: f64 = 0.01;

/// The magnitude to clip at: of all numbers of bins from `levels` on, the one at which the distribution of the clipped
/// values and that of the same values on `levels` codes have the least Kullback-Leibler divergence. Zeros have a code of
/// their own whatever the range, and are left out.
pub fn threshold(magnitudes: &Histogram, levels: usize) -> f32 {
    let bins = magnitudes.above();
    let most = magnitudes.max().unwrap_or(0.0);
    if bins.len() <= levels || levels == 0 {
        return most;
    }
    let counts: Vec<f64> = bins.iter().map(|&n| n as f64).collect();
    let mut sums = vec![0.0];
    counts.iter().for_each(|n| sums.push(sums[sums.len() - 1] + n));
    let total = sums[counts.len()];
    let least = sums.partition_point(|&below| below < total * (1.0 - CLIPPED)).max(levels);
    let best = (least..=counts.len())
        .map(|end| (divergence(&counts[..end], total - sums[end], levels), end))
        .min_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    let end = best.map_or(counts.len(), |(_, end)| end);
    ((end as f64 * magnitudes.width()) as f32).min(most)
}

/// KL(P || Q): P are the counts with `clipped` more in the last bin, Q the counts on codes, each code's shared out evenly
/// over its bins that are not empty.
fn divergence(counts: &[f64], clipped: f64, levels: usize) -> f64 {
    let last = counts.len() - 1;
    let p = |i: usize| counts[i] + if i == last { clipped } else { 0.0 };
    let mut q = vec![0.0; counts.len()];
    for level in 0..levels {
        let part = level * counts.len() / levels..(level + 1) * counts.len() / levels;
        let filled = part.clone().filter(|&i| p(i) > 0.0).count();
        if filled > 0 {
            let share = counts[part.clone()].iter().sum::<f64>() / filled as f64;
            part.filter(|&i| p(i) > 0.0).for_each(|i| q[i] = share);
        }
    }
    // What empty bins get is taken from the others, so that the sums stay.
    let smooth = |empty: usize| EMPTY * empty as f64 / (counts.len() - empty).max(1) as f64;
    let less = (
        smooth((0..counts.len()).filter(|&i| p(i) == 0.0).count()),
        smooth(q.iter().filter(|&&q| q == 0.0).count()),
    );
    let filled = |x: f64, less: f64| if x == 0.0 { EMPTY } else { x - less };
    let (p_sum, q_sum) = ((0..counts.len()).map(p).sum::<f64>(), q.iter().sum::<f64>());
    let term = |i: usize| {
        let (p, q) = (filled(p(i), less.0) / p_sum, filled(q[i], less.1) / q_sum);
        p * (p / q).ln()
    };
    (0..counts.len()).map(term).sum()
}
