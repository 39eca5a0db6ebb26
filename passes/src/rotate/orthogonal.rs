//! Orthogonal matrices: Hadamard ones with random signs, and random ones.

use dialects::random::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How a rotation is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A Hadamard matrix whose rows have random signs, divided by its norm: every channel goes into every other with the
    /// same weight.
    #[default]
    Hadamard,
    /// A random orthogonal matrix.
    Random,
}

/// An orthogonal matrix `[n, n]`, row-major. The same seed gives the same bits on every machine and for any number of
/// threads.
///
/// Hadamard matrices are Sylvester's (1867) of order 2^k times Paley's (1933) of order q + 1 or 2 (q + 1) for a prime q;
/// where `n` has no such form, the second factor is a random orthogonal matrix of the odd part of `n`.
pub fn orthogonal(kind: Kind, n: usize, seed: u64) -> Vec<f64> {
    let mut rng = Rng(seed ^ (n as u64).rotate_left(32));
    if kind == Kind::Random {
        return random(n, &mut rng);
    }
    let odd = n >> n.trailing_zeros();
    let orders = (0..=n.trailing_zeros()).map(|k| odd << k);
    let paley = orders.filter(|&b| b > 1).find_map(|b| Some((b, paley(b)?)));
    let (b, core) = match (odd, paley) {
        (1, _) => (1, vec![1.0]),
        (_, Some((b, core))) => {
            let norm = (b as f64).sqrt();
            (b, core.into_iter().map(|x| x / norm).collect())
        }
        (odd, None) => (odd, random(odd, &mut rng)),
    };
    let norm = ((n / b) as f64).sqrt();
    let signs: Vec<f64> = (0..n).map(|_| if rng.one_in(2) { 1.0 } else { -1.0 }).collect();
    let entry = |i: usize, j: usize| {
        let sylvester = if ((i / b) & (j / b)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        signs[i] * sylvester * core[i % b * b + j % b] / norm
    };
    (0..n * n).map(|at| entry(at / n, at % n)).collect()
}

/// A random orthogonal matrix, uniform among them: the Q of a QR decomposition of a normal one, as a product of
/// reflections (Stewart, "The efficient generation of random orthogonal matrices", SIAM J. Numer. Anal. 1980).
fn random(n: usize, rng: &mut Rng) -> Vec<f64> {
    let mut q = vec![0f64; n * n];
    for i in 0..n {
        q[i * n + i] = if rng.one_in(2) { 1.0 } else { -1.0 };
    }
    for size in 2..=n {
        let mut v: Vec<f64> = (0..size).map(|_| normal(rng)).collect();
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v[0] += norm.copysign(v[0]);
        let square = v.iter().map(|x| x * x).sum::<f64>();
        if square == 0.0 {
            continue;
        }
        q.par_chunks_mut(n).for_each(|row| {
            let row = &mut row[n - size..];
            let dot: f64 = row.iter().zip(&v).map(|(x, v)| x * v).sum();
            row.iter_mut().zip(&v).for_each(|(x, v)| *x -= 2.0 * dot / square * v);
        });
    }
    q
}

/// A standard normal number (Box and Muller 1958).
fn normal(rng: &mut Rng) -> f64 {
    let mut uniform = || ((rng.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
}

/// The Hadamard matrix of order `b` by Paley's first or second construction; `None` where neither is of this order.
fn paley(b: usize) -> Option<Vec<f64>> {
    if !b.is_multiple_of(4) {
        return None;
    }
    let prime = |q: usize| q > 2 && (2..).take_while(|d| d * d <= q).all(|d| !q.is_multiple_of(d));
    // With 3 modulo 4 the matrix below is skew, with 1 symmetric.
    let border = |q: usize| {
        let mut square = vec![false; q];
        (1..q).for_each(|x| square[x * x % q] = true);
        let n = q + 1;
        let entry = move |i: usize, j: usize| match (i, j) {
            _ if i == j => 0.0,
            (0, _) => 1.0,
            (_, 0) => {
                if q % 4 == 3 {
                    -1.0
                } else {
                    1.0
                }
            }
            _ => {
                if square[(q + i - j) % q] {
                    1.0
                } else {
                    -1.0
                }
            }
        };
        (0..n * n).map(|at| entry(at / n, at % n)).collect::<Vec<f64>>()
    };
    let (first, second) = (b - 1, b / 2 - 1);
    if first % 4 == 3 && prime(first) {
        let mut h = border(first);
        (0..b).for_each(|i| h[i * b + i] += 1.0);
        return Some(h);
    }
    if second % 4 == 1 && prime(second) {
        let (s, n) = (border(second), second + 1);
        let entry = |i: usize, j: usize| {
            let (a, c) = (i % 2, j % 2);
            let (sum, own) = (if a + c == 2 { -1.0 } else { 1.0 }, if a + c == 0 { 1.0 } else { -1.0 });
            s[i / 2 * n + j / 2] * sum + if i / 2 == j / 2 { own } else { 0.0 }
        };
        return Some((0..b * b).map(|at| entry(at / b, at % b)).collect());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inverse_is_the_transpose() {
        for kind in [Kind::Hadamard, Kind::Random] {
            for n in [1, 2, 3, 4, 12, 20, 24, 28, 36, 43, 64, 172, 384] {
                let q = orthogonal(kind, n, 7);
                for i in 0..n {
                    for j in 0..n {
                        let dot: f64 = (0..n).map(|k| q[i * n + k] * q[j * n + k]).sum();
                        let want = if i == j { 1.0 } else { 0.0 };
                        assert!((dot - want).abs() < 1e-12, "{kind:?} {n}: {i} {j} {dot}");
                    }
                }
            }
        }
    }

    #[test]
    fn hadamard_spreads_evenly() {
        for n in [2, 8, 12, 28, 64, 384, 768] {
            let even = 1.0 / (n as f64).sqrt();
            let q = orthogonal(Kind::Hadamard, n, 0);
            assert!(q.iter().all(|x| (x.abs() - even).abs() < 1e-12), "{n}");
        }
    }

    #[test]
    fn seeds_differ_and_repeat() {
        for kind in [Kind::Hadamard, Kind::Random] {
            assert_eq!(orthogonal(kind, 48, 1), orthogonal(kind, 48, 1));
            assert_ne!(orthogonal(kind, 48, 1), orthogonal(kind, 48, 2));
        }
    }
}
