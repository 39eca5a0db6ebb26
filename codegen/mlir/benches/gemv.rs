//! Packed matrix-vector products out of memory and out of cache, against plain reads of the same bytes in the same run.
//! With several rows of X, multiply-adds a second count.
//!
//! `cargo bench -p qcc-codegen-mlir --features mlir --bench gemv [-- MiB [threads [rows]]]`
#![allow(unsafe_code)]

use codegen::kernels::packed::{Form, prepare};
use codegen::kernels::packed_product::{product, units};
use codegen::kernels::{Kernel, module};
use codegen::{Request, Target, link};
use multiversion::multiversion;
use rayon::prelude::*;
use runtime::{Call, Kernels, Team};
use std::hint::black_box;
use std::time::Instant;

const SIZE: usize = 4096;

/// The best of some turns, in seconds.
fn best(turns: usize, mut f: impl FnMut()) -> f64 {
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..turns).map(|_| time(&mut f)).fold(f64::INFINITY, f64::min)
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn sum(words: &[u64]) -> u64 {
    let mut acc = [0u64; 32];
    for chunk in words.chunks_exact(32) {
        acc.iter_mut().zip(chunk).for_each(|(a, w)| *a = a.wrapping_add(*w));
    }
    acc.iter().fold(0, |a, w| a.wrapping_add(*w))
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn bits(words: &[u64]) -> u64 {
    let mut acc = [0u64; 16];
    for chunk in words.chunks_exact(16) {
        acc.iter_mut().zip(chunk).for_each(|(a, w)| *a |= *w);
    }
    acc.iter().fold(0, |a, w| a | *w)
}

/// Four places at once.
fn streams(words: &[u64]) -> u64 {
    let quarter = words.len() / 4;
    let (a, rest) = words.split_at(quarter);
    let (b, rest) = rest.split_at(quarter);
    let (c, d) = rest.split_at(quarter);
    let step = 512;
    let at = |s: &[u64], i: usize| sum(&s[i..(i + step).min(s.len())]);
    (0..quarter).step_by(step).map(|i| at(a, i) ^ at(b, i) ^ at(c, i) ^ at(d, i)).fold(0, |a, b| a ^ b)
}

/// Bytes in a second of the best plain loop.
fn read(words: &[u64], threads: usize, turns: usize) -> f64 {
    let part = words.len().div_ceil(threads);
    let loops: [fn(&[u64]) -> u64; 3] = [sum, bits, streams];
    let times = loops.iter().map(|f| {
        best(turns, || {
            black_box(words.par_chunks(part).map(f).reduce(|| 0, |a, b| a ^ b));
        })
    });
    words.len() as f64 * 8.0 / times.fold(f64::INFINITY, f64::min)
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let mib = args.first().copied().unwrap_or(1536);
    let all = args.get(1).map_or(vec![1, 2], |&t| vec![t]);
    let target = Target::native();
    let rows = args.get(2).copied().unwrap_or(1);
    let columns = ["threads", "read GB/s", "kernel GB/s", "share", "GMAC/s"];
    println!("{:20} {}", "kernel", columns.map(|c| format!("{c:>12}")).concat());
    for int8 in [true, false] {
        for (what, mib, zeros) in
            [("DRAM", mib, false), ("DRAM, zero points", mib, true), ("cache", 8, false)]
        {
            let form = Form { n: SIZE, k: SIZE, group: 32, bits: 4, zeros, half_scales: true, int8 };
            for &threads in &all {
                measure(&target, &form, what, mib << 20, threads, rows);
            }
        }
    }
}

fn measure(target: &Target, form: &Form, what: &str, bytes: usize, threads: usize, rows: usize) {
    let kernels: [Kernel; 2] =
        [prepare(target, form), product(target, form, 1, &|_, _, _, _, _, out| vec![out])];
    let request = Request { mlir: module(&kernels), target: target.clone(), form: codegen::Form::Object };
    let dir = tempfile::tempdir().expect("a folder for the library");
    let (object, library) = (dir.path().join("k.o"), dir.path().join("k.so"));
    std::fs::write(&object, codegen_mlir::compile(&request).expect("kernels compile")).expect("room");
    link::shared_library(&[object], &library, target).expect("a linker");
    let names: Vec<String> = kernels.iter().map(|k| k.name.clone()).collect();
    // SAFETY: made above for this machine.
    let kernels = unsafe { Kernels::open(&library, &names).expect("the library loads") };

    let count = units(target, form, rows.into()).eval(&|_| None).expect("a number of rows");
    let matrices = (bytes / form.bytes()).max(1);
    let mut words = vec![0x3c3c_1357_2468_3c3cu64; matrices * form.bytes() / 8];
    let mut x = vec![0.5f32; rows * form.k];
    let mut prepared = vec![0u8; rows * form.x_row()];
    let mut y = vec![0f32; rows * form.n];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let turns = if matrices == 1 { 200usize.div_ceil(rows) + 4 } else { 5 };
    let (plain, time) = pool.install(|| {
        let plain = read(&words, threads, turns);
        let w: *mut u8 = words.as_mut_ptr().cast();
        let team = Team::new();
        let time = best(turns, || {
            for i in 0..matrices {
                let call = |kernel, buffers: &[*mut u8], dims: &[i64], units| {
                    // SAFETY: the buffers are sized by the form.
                    unsafe { kernels.call(&Call { kernel, buffers, dims, units, work: 4096 }, &team) }
                };
                let p = prepared.as_mut_ptr();
                call(0, &[x.as_mut_ptr().cast(), p], &[rows as i64], rows);
                let buffers = [p, w.wrapping_add(i * form.bytes()), y.as_mut_ptr().cast()];
                call(1, &buffers, &[rows as i64], count as usize);
            }
        });
        (plain, time)
    });
    let name = format!("{} {what}", if form.int8 { "int8" } else { "f32" });
    let speed = (words.len() * 8) as f64 / time;
    let multiplied = (matrices * rows * form.k * form.n) as f64 / time;
    let numbers = [plain / 1e9, speed / 1e9, 100.0 * speed / plain, multiplied / 1e9];
    let numbers = numbers.map(|n| format!("{n:>12.2}")).concat();
    println!("{name:20} {threads:>12}{numbers}");
}
