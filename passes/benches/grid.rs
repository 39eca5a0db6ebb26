//! Speed of the quantizer's core beside plain reads and copies of the same bytes, in one run:
//! `cargo bench -p qcc-passes --bench grid -- [MiB]`.

use passes::grid::{Float, Layout, Matrix, Parts, Ranges, Spec, quantize};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

const K: usize = 4096;
const N: usize = 4096;

/// Best of five, in seconds.
fn best(mut f: impl FnMut()) -> f64 {
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| time(&mut f)).fold(f64::INFINITY, f64::min)
}

fn main() {
    let mib = std::env::args().filter_map(|a| a.parse::<usize>().ok()).next().unwrap_or(256);
    let bytes = mib << 20;
    let gb = bytes as f64 / 1e9;
    let threads = rayon::current_num_threads();
    println!("{mib} MiB of fp32 in matrices of [{K}, {N}], {threads} threads");

    let mut state = 1u64;
    let mut noise = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.1
    };
    // One byte off, as a slice of a mapped file is.
    let mut data = vec![0u8; bytes + 1];
    for b in data[1..].chunks_exact_mut(4) {
        b.copy_from_slice(&noise().to_le_bytes());
    }
    let data = &data[1..];

    let mut copy = vec![0u8; bytes];
    let t = best(|| {
        copy.par_chunks_mut(1 << 20).zip(data.par_chunks(1 << 20)).for_each(|(c, d)| c.copy_from_slice(d));
    });
    println!("{:24} {:7.2} GB/s", "copy", gb / t);
    drop(copy);
    let t = best(|| {
        let sum = |c: &[u8]| {
            c.chunks_exact(8)
                .fold(0u64, |s, b| s.wrapping_add(u64::from_le_bytes(b.try_into().expect("8 bytes"))))
        };
        black_box(data.par_chunks(1 << 20).map(sum).reduce(|| 0, u64::wrapping_add));
    });
    println!("{:24} {:7.2} GB/s", "read", gb / t);

    for (ranges, bits, group_size, symmetric, layout) in [
        (Ranges::Span, 4, 32, false, Layout::Kn),
        (Ranges::Span, 4, 32, true, Layout::Kn),
        (Ranges::Span, 4, 128, false, Layout::Kn),
        (Ranges::Span, 4, K, false, Layout::Kn),
        (Ranges::Span, 2, 64, false, Layout::Kn),
        (Ranges::Span, 8, 32, false, Layout::Kn),
        (Ranges::Span, 4, 32, false, Layout::Nk),
        (Ranges::Span, 4, 128, false, Layout::Nk),
        (Ranges::Clip, 4, 32, false, Layout::Kn),
        (Ranges::Clip, 2, 32, false, Layout::Kn),
        (Ranges::Hqq, 4, 32, false, Layout::Kn),
    ] {
        let spec = Spec { bits, group_size, symmetric, narrow: false, scales: Float::F32 };
        let (codes, groups) = spec.lens(N, K).expect("it fits");
        let count = bytes / (K * N * 4);
        let mut out: Vec<_> =
            (0..count).map(|_| (vec![0u8; codes], vec![0f32; groups], vec![0u8; groups])).collect();
        let t = best(|| {
            for (weight, (codes, scales, zeros)) in data.chunks_exact(K * N * 4).zip(&mut out) {
                let w = Matrix { bytes: weight, float: Float::F32, layout, n: N, k: K };
                let parts = Parts { codes, scales, zero_points: Some(zeros) };
                black_box(quantize(&w, &spec, &ranges, parts).expect("finite weights"));
            }
        });
        let kind = if symmetric { "symmetric" } else { "asymmetric" };
        println!("{} {bits}-bit g{group_size} {kind} {layout:?}: {:7.2} GB/s", ranges.name(), gb / t);
    }
}
