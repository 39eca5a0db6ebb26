use super::super::{Float, nearest};
use super::*;
use crate::gram::Gram;
use proptest::prelude::*;

/// Weights `[n, k]`, and the Gram matrix of `rows` inputs that mix a few independent ones.
struct Case {
    k: usize,
    w: Vec<f32>,
    gram: Gram,
}

impl Case {
    fn new(n: usize, k: usize, rows: usize, seed: u64) -> Case {
        let mut state = seed;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let w = (0..n * k).map(|_| noise()).collect();
        let rank = k / 2 + 1;
        let mix: Vec<f32> = (0..rank * k).map(|_| noise()).collect();
        let mut x = vec![0f32; rows * k];
        for row in x.chunks_exact_mut(k) {
            for mix in mix.chunks_exact(k) {
                let by = noise();
                row.iter_mut().zip(mix).for_each(|(x, m)| *x += by * m);
            }
            row.iter_mut().for_each(|x| *x += 0.3 * noise());
        }
        let mut gram = Gram::new(k);
        gram.add(&x);
        Case { k, w, gram: gram.finish() }
    }

    fn cost(&self, act_order: bool) -> Cost {
        Cost::new(self.gram.clone(), 0.01, act_order).unwrap()
    }

    /// `e^T (H + damp I) e` over all outputs, in double.
    fn error(&self, cost: &Cost, back: &[f32]) -> f64 {
        let k = self.k;
        let rows = self.w.chunks_exact(k).zip(back.chunks_exact(k));
        rows.map(|(w, q)| {
            let e: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(*w) - f64::from(*q)).collect();
            let damp = f64::from(cost.damp);
            (0..k * k)
                .map(|i| {
                    let h = f64::from(cost.h[i]) + if i / k == i % k { damp } else { 0.0 };
                    e[i / k] * h * e[i % k]
                })
                .sum::<f64>()
        })
        .sum()
    }
}

fn spec(bits: u32, group_size: usize, symmetric: bool) -> Spec {
    Spec { bits, group_size, symmetric, narrow: false, scales: Float::F32 }
}

fn method(sweeps: u32) -> Method {
    Method { block: 16, static_groups: true, ranges: Ranges::Span, sweeps }
}

/// What codes stand for.
fn back(given: &Given, spec: &Spec) -> Vec<f32> {
    let (k, kb) = (given.k, spec.groups(given.k));
    (0..given.codes.len())
        .map(|i| {
            let group = i / k * kb + i % k / spec.group_size;
            (f32::from(given.codes[i]) - f32::from(given.zero_points[group])) * given.scales[group]
        })
        .collect()
}

/// The inverse of a symmetric positive matrix, by Gauss and Jordan.
fn inverse(mut a: Vec<f64>, k: usize) -> Vec<f64> {
    let mut b: Vec<f64> = (0..k * k).map(|i| f64::from(u8::from(i / k == i % k))).collect();
    for p in 0..k {
        let d = a[p * k + p];
        for j in 0..k {
            a[p * k + j] /= d;
            b[p * k + j] /= d;
        }
        for i in (0..k).filter(|&i| i != p) {
            let f = a[i * k + p];
            for j in 0..k {
                a[i * k + j] -= f * a[p * k + j];
                b[i * k + j] -= f * b[p * k + j];
            }
        }
    }
    b
}

/// The upper Cholesky factor: `A = U^T U`.
fn upper(a: &[f64], k: usize) -> Vec<f64> {
    let mut u = vec![0f64; k * k];
    for i in 0..k {
        for j in i..k {
            let sum: f64 = (0..i).map(|p| u[p * k + i] * u[p * k + j]).sum();
            let rest = a[i * k + j] - sum;
            u[i * k + j] = if i == j { rest.sqrt() } else { rest / u[i * k + i] };
        }
    }
    u
}

/// The algorithm as the paper has it (Frantar et al. 2023, algorithm 1), in double: the inverse of the Hessian, its upper
/// Cholesky factor, and every error spread over the weights that follow.
fn published(case: &Case, cost: &Cost, spec: &Spec) -> Vec<u8> {
    let k = case.k;
    let order: Vec<usize> = cost.order.iter().rev().map(|&i| i as usize).collect();
    let h =
        |i: usize, j: usize| f64::from(cost.h[i * k + j]) + if i == j { f64::from(cost.damp) } else { 0.0 };
    let permuted = (0..k * k).map(|i| h(order[i / k], order[i % k])).collect();
    let u = upper(&inverse(permuted, k), k);
    let plain = quantize(&case.w, cost, spec, &method(0));
    let kb = spec.groups(k);
    let mut codes = vec![0u8; case.w.len()];
    for (n, row) in case.w.chunks_exact(k).enumerate() {
        let mut w: Vec<f64> = order.iter().map(|&i| f64::from(row[i])).collect();
        for i in 0..k {
            let group = n * kb + order[i] / spec.group_size;
            let (scale, zero) = (f64::from(plain.scales[group]), f64::from(plain.zero_points[group]));
            let code = (w[i] / scale + zero).round().clamp(0.0, f64::from(spec.max_code()));
            codes[n * k + order[i]] = code as u8;
            let error = (w[i] - (code - zero) * scale) / u[i * k + i];
            (i + 1..k).for_each(|j| w[j] -= error * u[i * k + j]);
        }
    }
    codes
}

#[test]
fn agrees_with_the_published_form() {
    for (n, k, group, bits, act_order, symmetric) in [
        (20, 70, 32, 4, true, false),
        (33, 64, 16, 3, false, false),
        (7, 48, 48, 2, true, true),
        (40, 100, 16, 8, true, false),
    ] {
        let case = Case::new(n, k, 300, 7);
        let cost = case.cost(act_order);
        let spec = spec(bits, group, symmetric);
        let got = quantize(&case.w, &cost, &spec, &method(0));
        let want = published(&case, &cost, &spec);
        // A sum on the edge between two codes may fall to either side, and then moves what follows in its row.
        let other = got.codes.iter().zip(&want).filter(|(a, b)| a != b).count();
        assert!(other * 50 <= want.len(), "{other} of {} codes differ: {bits} bits, K = {k}", want.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn compensation_and_descent_lower_the_cost(
        n in 1usize..40, k in 1usize..90, seed: u64, bits in 2u32..=8, group in 16usize..40, symmetric: bool,
        act_order: bool,
    ) {
        let case = Case::new(n, k, 200, seed);
        let cost = case.cost(act_order);
        let spec = spec(bits, group, symmetric);
        let after = |sweeps| case.error(&cost, &back(&quantize(&case.w, &cost, &spec, &method(sweeps)), &spec));
        let (none, one, three) = (after(0), after(1), after(3));
        prop_assert!(one <= none * 1.0001 + 1e-9, "{one} after {none}");
        prop_assert!(three <= one * 1.0001 + 1e-9, "{three} after {one}");
    }
}

#[test]
fn gains_over_rounding_to_nearest() {
    let case = Case::new(64, 128, 1000, 5);
    let cost = case.cost(true);
    let spec = spec(4, 32, false);
    let plain = case.error(&cost, &nearest(case.w.clone(), case.k, &spec));
    let gptq = case.error(&cost, &back(&quantize(&case.w, &cost, &spec, &method(0)), &spec));
    let swept = case.error(&cost, &back(&quantize(&case.w, &cost, &spec, &method(2)), &spec));
    assert!(gptq < 0.5 * plain && swept < 0.95 * gptq, "{plain}, {gptq}, {swept}");
}

/// Three weights of 2 bits: every assignment of codes on the same grid is tried.
#[test]
fn near_the_best_of_all_assignments() {
    let spec = spec(2, 16, false);
    for seed in 0..20 {
        let case = Case::new(1, 3, 50, seed);
        let cost = case.cost(true);
        let given = quantize(&case.w, &cost, &spec, &method(0));
        let (scale, zero) = (given.scales[0], f32::from(given.zero_points[0]));
        let all = (0..64).map(|c| {
            let q: Vec<f32> = (0..3).map(|i| ((c >> (2 * i) & 3) as f32 - zero) * scale).collect();
            case.error(&cost, &q)
        });
        let best = all.fold(f64::INFINITY, f64::min);
        let got = case.error(&cost, &back(&given, &spec));
        let plain = case.error(&cost, &nearest(case.w.clone(), 3, &spec));
        assert!(got >= best - 1e-9 && got <= plain.max(1.5 * best) + 1e-9, "{best} {got} {plain}");
    }
}

#[test]
fn groups_in_turn_are_placed_when_they_are_reached() {
    let case = Case::new(9, 70, 300, 3);
    let cost = case.cost(false);
    let spec = spec(3, 16, false);
    let fixed = quantize(&case.w, &cost, &spec, &method(0));
    let turns = Method { static_groups: false, ..method(0) };
    let moving = quantize(&case.w, &cost, &spec, &turns);
    let kb = spec.groups(case.k);
    // The first group of each row is placed on the weights as they are; the others on what errors made of them.
    for row in 0..9 {
        assert_eq!(moving.scales[row * kb], fixed.scales[row * kb]);
        assert_eq!(moving.codes[row * case.k..][..16], fixed.codes[row * case.k..][..16]);
    }
    assert_ne!(moving.scales, fixed.scales);
    let wide = quantize(&case.w, &cost, &spec, &Method { block: 70, ..turns });
    assert_eq!(moving.scales.len(), wide.scales.len());
}

/// The size of a block is a matter of speed: sums are cut elsewhere, which moves few codes.
#[test]
fn blocks_of_any_size_agree() {
    let case = Case::new(24, 90, 300, 11);
    let cost = case.cost(true);
    let spec = spec(4, 32, false);
    let with = |block| quantize(&case.w, &cost, &spec, &Method { block, ..method(0) });
    let one = with(1);
    for block in [7, 16, 89, 200] {
        let got = with(block);
        let other = got.codes.iter().zip(&one.codes).filter(|(a, b)| a != b).count();
        assert!(other * 50 <= got.codes.len(), "{other} codes differ with blocks of {block}");
    }
}

#[test]
fn threads_change_nothing() {
    let case = Case::new(300, 96, 400, 9);
    let spec = spec(3, 32, false);
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let cost = case.cost(true);
            let pulled = cost.pull().unwrap().add(&case.w, vec![0.5; case.w.len()]);
            quantize(&pulled, &cost, &spec, &method(2))
        })
    };
    let one = with(1);
    assert!(one == with(2) && one == with(7));
}

#[test]
fn what_is_given_is_what_is_packed() {
    let case = Case::new(21, 50, 200, 2);
    let cost = case.cost(true);
    let spec = spec(4, 16, false);
    let given = quantize(&case.w, &cost, &spec, &method(1));
    let bytes = bytemuck::cast_slice(&case.w);
    let w = super::super::Matrix { bytes, float: Float::F32, layout: super::super::Layout::Nk, n: 21, k: 50 };
    let (codes, groups) = spec.lens(21, 50).unwrap();
    let (mut codes, mut scales, mut zeros) = (vec![0; codes], vec![0.0; groups], vec![0; groups]);
    let parts = super::super::Parts { codes: &mut codes, scales: &mut scales, zero_points: Some(&mut zeros) };
    super::super::quantize(&w, &spec, &given, parts).unwrap();
    let mut out = vec![0f32; case.w.len()];
    super::super::pack::dequantize(&spec, 21, 50, &codes, &scales, &zeros, &mut out).unwrap();
    assert_eq!(out, back(&given, &spec));
}
