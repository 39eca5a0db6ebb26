//! Attention on one thread: microseconds of a call, and arithmetic in a second, of both products without what is masked.
//!
//! `cargo bench -p qcc-codegen-mlir --features mlir --bench attention`; `benches/attention.py` has the same sizes for ONNX
//! Runtime.
#![allow(unsafe_code)]

use codegen::kernels::attention_tiles::{Form, ROWS, attention};
use codegen::kernels::module;
use codegen::{Request, Target, link};
use runtime::{Call, Kernels, Team};
use std::time::Instant;

/// Query heads, heads of K and V, their size, query positions, keys, and whether the frontier is causal.
const SIZES: [(usize, usize, usize, usize, usize, bool); 8] = [
    (6, 6, 64, 128, 128, false),
    (6, 6, 64, 128, 128, true),
    (6, 6, 64, 512, 512, false),
    (6, 6, 64, 512, 512, true),
    (6, 6, 64, 1, 512, false),
    (32, 4, 64, 128, 128, false),
    (32, 4, 64, 128, 128, true),
    (32, 4, 64, 1, 1024, false),
];

fn main() {
    let target = Target::native();
    println!("{:>32} {:>10} {:>10}", "heads, size, rows, keys", "us", "GFLOP/s");
    for (heads, shared, size, rows, keys, causal) in SIZES {
        let form = Form {
            size,
            value_size: size,
            scale: 1.0 / (size as f32).sqrt(),
            softcap: None,
            causal,
            mask: None,
        };
        let kernel = attention(&target, &form);
        let request =
            Request { mlir: module([&kernel]), target: target.clone(), form: codegen::Form::Object };
        let dir = tempfile::tempdir().expect("a folder for the library");
        let (object, library) = (dir.path().join("k.o"), dir.path().join("k.so"));
        std::fs::write(&object, codegen_mlir::compile(&request).expect("kernels compile")).expect("room");
        link::shared_library(&[object], &library, &target).expect("a linker");
        // SAFETY: made above for this machine.
        let kernels = unsafe { Kernels::open(&library, &[kernel.name]).expect("the library loads") };

        let data = |n: usize| (0..n).map(|i| (i * 7919 % 1000) as f32 * 2e-3 - 1.0).collect::<Vec<f32>>();
        let (mut q, mut y) = (data(rows * heads * size), data(rows * heads * size));
        let (mut k, mut v) = (data(keys * shared * size), data(keys * shared * size));
        let buffers = [&mut q, &mut k, &mut v, &mut y].map(|d| d.as_mut_ptr().cast::<u8>());
        // Heads side by side, or K and V of a cache for one position.
        let side = |heads: usize, n: usize| [n * heads * size, size, heads * size];
        let cache = [keys * shared * size, keys * size, size];
        let kv = if rows == 1 { cache } else { side(shared, keys) };
        let past = if causal { keys - rows } else { 0 };
        let mut dims = vec![shared, rows, heads / shared, keys, past];
        dims.extend([side(heads, rows), kv, kv, side(heads, rows)].concat());
        let dims: Vec<i64> = dims.into_iter().map(|d| d as i64).collect();
        let units = shared * (rows * heads / shared).div_ceil(ROWS);
        let mut best = f64::INFINITY;
        for _ in 0..200 {
            let start = Instant::now();
            // As little work as this stays on the caller's thread.
            let call = Call { kernel: 0, buffers: &buffers, dims: &dims, units, work: 1 };
            // SAFETY: the buffers are as large as the sizes say.
            unsafe { kernels.call(&call, &Team::new()) }
            best = best.min(start.elapsed().as_secs_f64());
        }
        let seen = if causal { (0..rows).map(|r| past + r + 1).sum() } else { rows * keys };
        let what = format!("{heads}/{shared} {size} {rows} {keys}{}", if causal { " causal" } else { "" });
        println!("{what:>32} {:>10.1} {:>10.1}", best * 1e6, (4 * heads * size * seen) as f64 / best / 1e9);
    }
}
