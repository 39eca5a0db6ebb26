//! Which token comes next.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// What logits are divided by; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// What the choices follow from.
    pub seed: u64,
}

/// Chooses tokens. The same seed and logits give the same tokens.
#[derive(Debug)]
pub struct Sampler {
    choice: Choice,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at its first token.
    pub fn new(choice: Choice) -> Sampler {
        Sampler { choice, rng: ChaCha8Rng::seed_from_u64(choice.seed) }
    }

    /// The next token, by the logits of all; `None` where none of them is a number. Of equal ones the first is the
    /// likelier.
    pub fn next(&mut self, logits: &[f32]) -> Option<usize> {
        let finite = logits.iter().enumerate().filter(|(_, x)| !x.is_nan() && **x > f32::NEG_INFINITY);
        let mut order: Vec<(usize, f32)> = finite.map(|(i, &x)| (i, x)).collect();
        let likelier = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let Choice { temperature, top_k, top_p, .. } = self.choice;
        if temperature <= 0.0 {
            return order.into_iter().min_by(likelier).map(|(i, _)| i);
        }
        order.sort_unstable_by(likelier);
        if top_k > 0 {
            order.truncate(top_k);
        }
        let most = f64::from(order.first()?.1);
        let mut weights: Vec<f64> =
            order.iter().map(|&(_, x)| ((f64::from(x) - most) / temperature).exp()).collect();
        let all: f64 = weights.iter().sum();
        let mut sum = 0.0;
        let kept = weights.iter().position(|w| {
            sum += w / all;
            sum >= top_p
        });
        weights.truncate(kept.map_or(weights.len(), |i| i + 1));
        let total: f64 = weights.iter().sum();
        let mut left = self.rng.random::<f64>() * total;
        let drawn = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        Some(order[drawn.unwrap_or(weights.len() - 1)].0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Choice = Choice { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 7 };

    fn counts(choice: Choice, logits: &[f32]) -> Vec<usize> {
        let mut sampler = Sampler::new(choice);
        let mut counts = vec![0; logits.len()];
        (0..20_000).for_each(|_| counts[sampler.next(logits).unwrap()] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        let mut greedy = Sampler::new(Choice { temperature: 0.0, ..ALL });
        assert_eq!(greedy.next(&[1.0, 3.0, f32::NAN, 3.0]), Some(1));
        assert_eq!(greedy.next(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(greedy.next(&[]), None);
    }

    /// Probabilities 1/8, 5/8, 2/8: in 20,000 draws one is off by more than 400 once in a million.
    #[test]
    fn tokens_come_as_often_as_they_should() {
        let logits = [1f32.ln(), 5f32.ln(), 2f32.ln()];
        let near = |found: &[usize], shares: [f64; 3]| {
            let off = |(&n, p): (&usize, f64)| (n as f64 - 20_000.0 * p).abs();
            assert!(found.iter().zip(shares).all(|x| off(x) < 400.0), "{found:?}");
        };
        near(&counts(ALL, &logits), [0.125, 0.625, 0.25]);
        near(&counts(Choice { top_k: 2, ..ALL }, &logits), [0.0, 5.0 / 7.0, 2.0 / 7.0]);
        near(&counts(Choice { top_p: 0.7, ..ALL }, &logits), [0.0, 5.0 / 7.0, 2.0 / 7.0]);
        near(&counts(Choice { top_p: 0.6, ..ALL }, &logits), [0.0, 1.0, 0.0]);
        // At half the temperature probabilities are squared.
        near(&counts(Choice { temperature: 0.5, ..ALL }, &logits), [1.0 / 30.0, 25.0 / 30.0, 4.0 / 30.0]);
        assert_eq!(counts(ALL, &logits), counts(ALL, &logits));
        assert_ne!(counts(ALL, &logits), counts(Choice { seed: 8, ..ALL }, &logits));
    }
}
