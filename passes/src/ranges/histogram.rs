//! Histograms whose range doubles: bounded memory, and the same counts in whatever parts the values come.

use multiversion::multiversion;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Bins on either side of zero.
pub const HALF: usize = 2048;

/// The smallest power of two that bins reach to.
const LEAST: i32 = -100;

/// Values that one task counts.
const CHUNK: usize = 1 << 16;

/// Values whose bins are found at once.
const BLOCK: usize = 256;

/// Values that are looked at side by side.
const LANES: usize = 16;

/// How much of a new batch goes into the moving averages.
const MOMENTUM: f64 = 0.01;

/// Counts of a tensor's values. Bins are of equal width and reach to a power of two at either side, so that widening them
/// merges pairs, exactly.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Bins reach from `-2^exponent` to `2^exponent`.
    exponent: i32,
    /// From the least to the greatest; empty while all values are zero.
    #[serde(with = "filled")]
    counts: Vec<u64>,
    /// Values that are zero; these are in no bin.
    zeros: u64,
    /// Values that are NaN or infinite; these are counted nowhere else.
    not_finite: u64,
    /// Batches, the least and the greatest of their values, and the moving averages of both.
    ends: Option<Ends>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Ends {
    min: f32,
    max: f32,
    moving: (f64, f64),
}

/// What a first look at values finds.
#[derive(Clone, Copy)]
struct Look {
    min: f32,
    max: f32,
    zeros: u64,
    not_finite: u64,
}

impl Look {
    const NOTHING: Look = Look { min: f32::INFINITY, max: f32::NEG_INFINITY, zeros: 0, not_finite: 0 };

    fn of(x: &[f32]) -> Look {
        look(x)
    }

    fn and(self, other: Look) -> Look {
        Look {
            min: self.min.min(other.min),
            max: self.max.max(other.max),
            zeros: self.zeros + other.zeros,
            not_finite: self.not_finite + other.not_finite,
        }
    }
}

/// Each lane looks for itself, so that the compiler can put them side by side.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn look(x: &[f32]) -> Look {
    let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    // Fewer than 2^32 in a lane: one task's values.
    let (mut zeros, mut not_finite) = ([0u32; LANES], [0u32; LANES]);
    let mut one = |l: usize, x: f32| {
        let finite = x.abs() < f32::INFINITY;
        zeros[l] += u32::from(x == 0.0);
        not_finite[l] += u32::from(!finite);
        min[l] = if finite && x < min[l] { x } else { min[l] };
        max[l] = if finite && x > max[l] { x } else { max[l] };
    };
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        (0..LANES).for_each(|l| one(l, x[l]));
    }
    rest.iter().enumerate().for_each(|(l, &x)| one(l, x));
    let lane = |l: usize| Look {
        min: min[l],
        max: max[l],
        zeros: zeros[l].into(),
        not_finite: not_finite[l].into(),
    };
    (0..LANES).map(lane).fold(Look::NOTHING, Look::and)
}

/// The bin of each value, among `2 * HALF`, whose width is `1 / per_width`; what is zero or not finite has one of its own
/// behind them.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn bins(x: &[f32], per_width: f32, out: &mut [u32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        // Rounded down; `floor` is a call where the processor is not known to have it.
        let place = x * per_width;
        let whole = place as i32;
        let bin = whole - i32::from(place < whole as f32) + HALF as i32;
        let bin = bin.clamp(0, 2 * HALF as i32 - 1) as u32;
        *out = if x == 0.0 || x.abs() >= f32::INFINITY || x.is_nan() { 2 * HALF as u32 } else { bin };
    }
}

/// Counts as they are saved: the bins that hold something, each with its place.
mod filled {
    use super::HALF;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(counts: &[u64], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(counts.iter().enumerate().filter(|(_, n)| **n > 0))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u64>, D::Error> {
        let bins = Vec::<(usize, u64)>::deserialize(d)?;
        let mut counts = vec![0; if bins.is_empty() { 0 } else { 2 * HALF }];
        for (i, n) in bins {
            let wrong = || D::Error::custom(format!("a bin at {i}, where there are {}", 2 * HALF));
            *counts.get_mut(i).ok_or_else(wrong)? = n;
        }
        Ok(counts)
    }
}

impl Histogram {
    /// Why this is no histogram of any values, where it was read from a file that says so.
    pub fn check(&self) -> Result<(), String> {
        let count = self.counts.iter().try_fold(self.zeros, |n, &c| n.checked_add(c));
        let count = count.ok_or("more values than can be counted")?;
        let Some(e) = self.ends else {
            return if count == 0 { Ok(()) } else { Err(format!("{count} values without a range")) };
        };
        let ends = [f64::from(e.min), f64::from(e.max), e.moving.0, e.moving.1];
        if ends.iter().any(|x| !x.is_finite()) || e.min > e.max || e.moving.0 > e.moving.1 {
            return Err(format!("expected a finite range, found {} to {}", e.min, e.max));
        }
        if count == 0 || !(LEAST..=128).contains(&self.exponent) && !self.counts.is_empty() {
            return Err(format!("{count} values in bins up to 2^{}", self.exponent));
        }
        Ok(())
    }

    /// Counts the values of one batch.
    pub fn add(&mut self, x: &[f32]) {
        let look = x.par_chunks(CHUNK).map(Look::of).reduce(|| Look::NOTHING, Look::and);
        self.zeros += look.zeros;
        self.not_finite += look.not_finite;
        if look.min > look.max {
            return;
        }
        let now = (f64::from(look.min), f64::from(look.max));
        self.ends = Some(match self.ends {
            None => Ends { min: look.min, max: look.max, moving: now },
            Some(e) => {
                let blend = |old: f64, new: f64| old + MOMENTUM * (new - old);
                let moving = (blend(e.moving.0, now.0), blend(e.moving.1, now.1));
                Ends { min: e.min.min(look.min), max: e.max.max(look.max), moving }
            }
        });
        let most = look.max.max(-look.min);
        if most > 0.0 {
            self.reach(exponent(most));
            self.count(x);
        }
    }

    /// Widens the bins to `2^exponent`.
    fn reach(&mut self, exponent: i32) {
        if self.counts.is_empty() {
            self.counts = vec![0; 2 * HALF];
            self.exponent = exponent;
        }
        while self.exponent < exponent {
            let old = std::mem::replace(&mut self.counts, vec![0; 2 * HALF]);
            let merged = old.chunks_exact(2).map(|pair| pair[0] + pair[1]);
            self.counts[HALF / 2..].iter_mut().zip(merged).for_each(|(new, sum)| *new = sum);
            self.exponent += 1;
        }
    }

    fn count(&mut self, x: &[f32]) {
        // A power of two: the product is exact.
        let per_width = HALF as f32 * 2f32.powi(-self.exponent);
        let parts: Vec<Vec<u32>> = x
            .par_chunks(CHUNK)
            .map(|x| {
                // Zeros and what is not finite go to a bin of their own, which is not looked at.
                // Two tables in turn: neighbours often share a bin, and a count must be written before it is read again.
                let mut counts = [vec![0u32; 2 * HALF + 1], vec![0u32; 2 * HALF + 1]];
                let mut places = [0u32; BLOCK];
                for x in x.chunks(BLOCK) {
                    bins(x, per_width, &mut places);
                    let (pairs, rest) = places[..x.len()].as_chunks::<2>();
                    for &[a, b] in pairs {
                        counts[0][a as usize] += 1;
                        counts[1][b as usize] += 1;
                    }
                    rest.iter().for_each(|&a| counts[0][a as usize] += 1);
                }
                let [mut counts, other] = counts;
                counts.iter_mut().zip(other).for_each(|(n, m)| *n += m);
                counts
            })
            .collect();
        for part in parts {
            self.counts.iter_mut().zip(part).for_each(|(sum, n)| *sum += u64::from(n));
        }
    }

    /// The least value; `None` before there is one.
    pub fn min(&self) -> Option<f32> {
        self.ends.map(|e| e.min)
    }

    /// The greatest value.
    pub fn max(&self) -> Option<f32> {
        self.ends.map(|e| e.max)
    }

    /// Moving averages of the batches' least and greatest values.
    pub fn moving(&self) -> Option<(f32, f32)> {
        self.ends.map(|e| (e.moving.0 as f32, e.moving.1 as f32))
    }

    /// Values that are NaN or infinite.
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// Values that are zero.
    pub fn zeros(&self) -> u64 {
        self.zeros
    }

    /// All values that were counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.zeros
    }

    /// The width of a bin.
    pub fn width(&self) -> f64 {
        2f64.powi(self.exponent) / HALF as f64
    }

    /// Bins that hold something: the middle of each and its count, in ascending order. Zeros are not among them.
    pub fn bins(&self) -> impl Iterator<Item = (f64, u64)> {
        let width = self.width();
        let middle = move |i: usize| (i as f64 - HALF as f64 + 0.5) * width;
        self.counts.iter().enumerate().filter(|(_, n)| **n > 0).map(move |(i, &n)| (middle(i), n))
    }

    /// The value below which a share of the values lies, as if each bin's were spread evenly.
    pub fn quantile(&self, share: f64) -> f32 {
        let (Some(min), Some(max)) = (self.min(), self.max()) else { return 0.0 };
        let wanted = share.clamp(0.0, 1.0) * self.total() as f64;
        let width = self.width();
        let mut below = 0.0;
        for (i, &n) in self.counts.iter().enumerate() {
            if i == HALF {
                below += self.zeros as f64;
                if below >= wanted {
                    return 0f32.clamp(min, max);
                }
            }
            let n = n as f64;
            if n > 0.0 && below + n >= wanted {
                let part = (wanted - below) / n;
                return (((i as f64 - HALF as f64 + part) * width) as f32).clamp(min, max);
            }
            below += n;
        }
        max
    }

    /// The histogram of the values' magnitudes.
    pub fn magnitudes(&self) -> Histogram {
        let mut out = self.clone();
        let Some(ends) = self.ends else { return out };
        if !self.counts.is_empty() {
            for i in 0..HALF {
                out.counts[HALF + i] += std::mem::take(&mut out.counts[HALF - 1 - i]);
            }
        }
        let most = ends.max.max(-ends.min);
        out.ends = Some(Ends { min: ends.min.max(-ends.max).max(0.0), max: most, ..ends });
        out
    }

    /// Counts of the bins above zero, up to the last that holds something.
    pub fn above(&self) -> &[u64] {
        let above = self.counts.get(HALF..).unwrap_or_default();
        &above[..above.iter().rposition(|&n| n > 0).map_or(0, |last| last + 1)]
    }
}

/// The least `e` from [`LEAST`] on with `x <= 2^e`, for positive `x`.
fn exponent(x: f32) -> i32 {
    let bits = x.to_bits();
    let whole = (bits >> 23) as i32 - 127;
    let up = i32::from(bits & 0x7F_FFFF != 0);
    (whole + up).max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exponents() {
        for (x, e) in [(1.0, 0), (1.5, 1), (2.0, 1), (0.25, -2), (0.26, -1), (3e38, 128), (1e-42, LEAST)] {
            assert_eq!(exponent(x), e, "{x}");
        }
    }

    #[test]
    fn what_is_not_finite_is_only_counted() {
        let mut h = Histogram::default();
        assert_eq!(h.min(), None);
        h.add(&[f32::NAN, f32::INFINITY]);
        assert_eq!((h.min(), h.not_finite(), h.total()), (None, 2, 0));
        h.add(&[0.0, -0.0, f32::NEG_INFINITY]);
        assert_eq!((h.min(), h.max(), h.zeros(), h.not_finite()), (Some(0.0), Some(0.0), 2, 3));
        assert_eq!((h.bins().count(), h.quantile(0.7)), (0, 0.0));
        h.add(&[-3.0, 1e-30]);
        assert_eq!((h.min(), h.total()), (Some(-3.0), 4));
    }

    proptest! {
        /// In one batch or in many, in any order: the same counts.
        #[test]
        fn parts_and_order_change_nothing(
            x in prop::collection::vec(prop_oneof![-1e3f32..1e3, -1e-3f32..1e-3, Just(0.0)], 1..200),
            cut in 0usize..200,
        ) {
            let mut whole = Histogram::default();
            whole.add(&x);
            let mut parts = Histogram::default();
            let (a, b) = x.split_at(cut.min(x.len()));
            parts.add(b);
            parts.add(a);
            prop_assert_eq!(&whole.counts, &parts.counts);
            prop_assert_eq!((whole.exponent, whole.zeros, whole.min(), whole.max()),
                (parts.exponent, parts.zeros, parts.min(), parts.max()));
            prop_assert_eq!(whole.total(), x.len() as u64);
            // Every value lies in the bin that counts it.
            let mut sorted = x.clone();
            sorted.sort_by(f32::total_cmp);
            for share in [0.0, 0.1, 0.5, 0.9, 1.0] {
                let rank = ((share * x.len() as f64).ceil() as usize).clamp(1, x.len());
                let exact = f64::from(sorted[rank - 1]);
                let found = f64::from(whole.quantile(share));
                prop_assert!((found - exact).abs() <= whole.width() * 1.001, "{share}: {found} for {exact}");
            }
            let m = whole.magnitudes();
            let mut sizes = Histogram::default();
            sizes.add(&x.iter().map(|x| x.abs()).collect::<Vec<_>>());
            // On the edge of a bin, a value and its negative fall to different sides.
            let total: u64 = m.above().iter().sum();
            prop_assert_eq!(total, sizes.above().iter().sum::<u64>());
            prop_assert_eq!(m.max(), sizes.max());
        }
    }
}
