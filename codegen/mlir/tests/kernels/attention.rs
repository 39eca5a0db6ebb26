//! Attention, against the interpreter.

use crate::models::{Here, check, check_left, check_on, inputs, model};
use codegen::Native;
use dialects::exec::run_once;
use dialects::ir::{Module, Value};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A model of the text `graph`.
fn module(graph: &str) -> Module {
    model(&format!("module ir_version=10 opsets {{com.microsoft=1, onnx=23}}\ngraph @main{graph}"))
}

/// The argument `name`.
fn arg(m: &Module, name: &str) -> Value {
    let named = |&&v: &&Value| &*m.values[v].name == name;
    *m.regions[m.top].args.iter().find(named).unwrap()
}

/// `given` with f32 argument `name` changed.
fn with(m: &Module, given: &mut [(Value, Item)], name: &str, change: impl FnOnce(&mut [f32])) {
    let v = arg(m, name);
    let (_, item) = given.iter_mut().find(|g| g.0 == v).unwrap();
    let t = item.tensor().unwrap();
    let mut data = t.f32s().unwrap().to_vec();
    change(&mut data);
    *item = Tensor::new(t.shape(), data).unwrap().into();
}

/// Rows and keys: one of each, fewer and more than a tile and a block, none.
const SIZES: &[&[(&str, usize)]] = &[
    &[("b", 2), ("s", 1), ("t", 1)],
    &[("b", 1), ("s", 1), ("t", 300)],
    &[("b", 2), ("s", 5), ("t", 19)],
    &[("b", 1), ("s", 71), ("t", 130)],
    &[("b", 2), ("s", 12), ("t", 64)],
    &[("b", 1), ("s", 0), ("t", 3)],
    &[("b", 1), ("s", 3), ("t", 0)],
    &[("b", 0), ("s", 3), ("t", 3)],
];

#[test]
fn heads_side_by_side_of_any_size() {
    for (heads, size, value_size) in [(3, 5, 5), (2, 20, 20), (6, 64, 64), (2, 80, 33), (1, 130, 7)] {
        let (hidden, out) = (heads * size, heads * value_size);
        let m = module(&format!(
            "(%q : tensor<b x s x {hidden} xf32>, %k : tensor<b x t x {hidden} xf32>, %v : tensor<b x t x {out} xf32>, %h : tensor<b x {heads} x t x {size} xf32>, %w : tensor<b x {heads} x t x {value_size} xf32>) {{
  %x = com.microsoft.MultiHeadAttention(%q, %k, %v) {{num_heads={heads}}}
  %y = com.microsoft.MultiHeadAttention(%q, %h, %w) {{num_heads={heads}, unidirectional=1, scale=0.3}}
  %z = onnx.Attention(%q, %k, %v) {{q_num_heads={heads}, kv_num_heads={heads}, softcap=2.5}}
  return %x, %y, %z
}}
"
        ));
        check(&m, SIZES, 3, 1e-5);
    }
}

#[test]
fn masks_of_every_shape() {
    for shape in ["b x 3 x s x t", "1 x 1 x s x t", "b x 1 x 1 x t", "1 x 3 x 1 x t"] {
        let m = module(&format!(
            "(%q : tensor<b x s x 24 xf32>, %k : tensor<b x t x 24 xf32>, %v : tensor<b x t x 24 xf32>, %m : tensor<{shape} xf32>, %n : tensor<{shape} xbool>) {{
  %x = com.microsoft.MultiHeadAttention(%q, %k, %v, _, _, %m) {{num_heads=3}}
  %y = onnx.Attention(%q, %k, %v, %n) {{q_num_heads=3, kv_num_heads=3}}
  %z = onnx.Attention(%q, %k, %v, %m) {{q_num_heads=3, kv_num_heads=3, is_causal=1}}
  return %x, %y, %z
}}
"
        ));
        check(&m, SIZES, 3, 1e-5);
    }
    for shape in ["s x t", "3 x 1 x t", "s x 1", "b x 3 x s x 1"] {
        let m = module(&format!(
            "(%q : tensor<b x s x 24 xf32>, %k : tensor<b x t x 24 xf32>, %v : tensor<b x t x 24 xf32>, %m : tensor<{shape} xf32>, %n : tensor<{shape} xbool>) {{
  %y = onnx.Attention(%q, %k, %v, %n) {{q_num_heads=3, kv_num_heads=3}}
  %z = onnx.Attention(%q, %k, %v, %m) {{q_num_heads=3, kv_num_heads=3}}
  return %y, %z
}}
"
        ));
        check(&m, SIZES, 2, 1e-5);
    }
}

#[test]
fn heads_that_share_keys() {
    for (heads, shared, size) in [(8, 2, 16), (6, 1, 20), (4, 4, 8), (9, 3, 64)] {
        let m = module(&format!(
            "(%q : tensor<b x {heads} x s x {size} xf32>, %k : tensor<b x {shared} x t x {size} xf32>, %v : tensor<b x {shared} x t x {size} xf32>, %m : tensor<b x {heads} x s x t xf32>, %u : tensor<b x s x {wide} xf32>) {{
  %x = onnx.Attention(%q, %k, %v, %m) {{scale=0.2}}
  %y = onnx.Attention(%q, %k, %v) {{is_causal=1}}
  %z = onnx.Attention(%u, %k, %v) {{q_num_heads={heads}, kv_num_heads={shared}}}
  return %x, %y, %z
}}
",
            wide = heads * size,
        ));
        check(&m, SIZES, 3, 1e-5);
    }
}

#[test]
fn a_cache_before_the_keys() {
    for (past, new) in [(7, 1), (3, 20), (0, 4), (130, 3), (5, 0)] {
        let total = past + new;
        let m = module(&format!(
            "(%q : tensor<b x {new} x 40 xf32>, %k : tensor<b x {new} x 40 xf32>, %v : tensor<b x {new} x 40 xf32>, %pk : tensor<b x 2 x {past} x 20 xf32>, %pv : tensor<b x 2 x {past} x 20 xf32>, %m : tensor<1 x 2 x {new} x {total} xf32>) {{
  %x, %xk, %xv = com.microsoft.MultiHeadAttention(%q, %k, %v, _, _, %m, %pk, %pv) {{num_heads=2, unidirectional=1}}
  %y, %yk, %yv = onnx.Attention(%q, %k, %v, _, %pk, %pv) {{q_num_heads=2, kv_num_heads=2, is_causal=1}}
  %z = onnx.Attention(%q, %k, %v, _, %pk, %pv) {{q_num_heads=2, kv_num_heads=2}}
  %w, %wk = onnx.Attention(%q, %k, %v) {{q_num_heads=2, kv_num_heads=2}}
  return %x, %xk, %xv, %y, %yv, %z, %w, %wk
}}
"
        ));
        check(&m, &[&[("b", 2)], &[("b", 1)]], 4, 1e-5);
    }
}

#[test]
fn masked_rows_infinities_and_nan() {
    let m = module(
        "(%q : tensor<b x s x 24 xf32>, %k : tensor<b x t x 24 xf32>, %v : tensor<b x t x 24 xf32>, %m : tensor<b x 1 x s x t xf32>) {
  %x = com.microsoft.MultiHeadAttention(%q, %k, %v, _, _, %m) {num_heads=3}
  %y = onnx.Attention(%q, %k, %v, %m) {q_num_heads=3, kv_num_heads=3}
  %z = onnx.Attention(%q, %k, %v) {q_num_heads=3, kv_num_heads=3}
  return %x, %y, %z
}
",
    );
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for (s, t) in [(3, 150), (70, 140)] {
        let sizes = [("b", 2), ("s", s), ("t", t)];
        let mut given = inputs(&m, &sizes, &mut rng);
        with(&m, &mut given, "m", |mask| {
            mask.iter_mut().for_each(|v| {
                if rng.random_bool(0.3) {
                    *v = f32::NEG_INFINITY
                }
            });
            // Nothing; nothing in the first tiles; nothing but the last key; a NaN; an infinity.
            mask[..t].fill(f32::NEG_INFINITY);
            mask[t..2 * t - 10].fill(f32::NEG_INFINITY);
            mask[2 * t..3 * t - 1].fill(f32::NEG_INFINITY);
            mask[3 * t - 1] = 0.5;
            mask[s * t + 3] = f32::NAN;
            mask[(s + 1) * t + t - 1] = f32::INFINITY;
        });
        check_on(&m, &[given.clone()], &|_| Some(256), 3, 1e-5);
        // Scores that are too large, and not numbers; all -inf without a mask is NaN.
        with(&m, &mut given, "q", |q| {
            q[1] = f32::NAN;
            q[24..32].fill(f32::INFINITY);
        });
        check_on(&m, &[given], &|_| Some(256), 3, 1e-5);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let m = module(
        "(%q : tensor<b x s x 60 xf32>, %k : tensor<b x t x 60 xf32>, %v : tensor<b x t x 60 xf32>) {
  %x = com.microsoft.MultiHeadAttention(%q, %k, %v) {num_heads=3, unidirectional=1}
  return %x
}
",
    );
    let native = Native::new(Ops::standard(), Arc::new(Here));
    let given = inputs(&m, &[("b", 2), ("s", 301), ("t", 301)], &mut ChaCha8Rng::seed_from_u64(2));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run_once(&native, &m, &given, &m.regions[m.top].results).unwrap())
    };
    let bits = |items: Vec<Item>| -> Vec<u32> {
        items[0].tensor().unwrap().f32s().unwrap().iter().map(|v| v.to_bits()).collect()
    };
    assert_eq!(bits(run(1)), bits(run(3)));
}

#[test]
fn forms_without_a_kernel_are_left_to_the_interpreter() {
    for (op, operands, attributes) in [
        // Biases of Q, K and V; a padding mask; another mask than [b, h, s, t]; packed heads.
        ("com.microsoft.MultiHeadAttention", "%q, %k, %v, %c", "{num_heads=2}"),
        ("com.microsoft.MultiHeadAttention", "%q, %k, %v, _, %n", "{num_heads=2}"),
        ("com.microsoft.MultiHeadAttention", "%q, %k, %v, _, _, %u", "{num_heads=2}"),
        ("com.microsoft.MultiHeadAttention", "%p", "{num_heads=2}"),
        // Windows, padding, heads of unknown size, masks of bools of fewer keys.
        ("onnx.Attention", "%q, %k, %v", "{q_num_heads=2, kv_num_heads=2, left_window_size=4}"),
        ("onnx.Attention", "%q, %k, %v, _, _, _, %n", "{q_num_heads=2, kv_num_heads=2}"),
        ("onnx.Attention", "%d, %d, %d", ""),
        ("onnx.Attention", "%q, %k, %v, %f", "{q_num_heads=2, kv_num_heads=2}"),
    ] {
        let m = module(&format!(
            "(%q : tensor<b x s x 8 xf32>, %k : tensor<b x t x 8 xf32>, %v : tensor<b x t x 8 xf32>, %c : tensor<24 xf32>, %n : tensor<b xi64>, %u : tensor<b x 2 x s x u xf32>, %p : tensor<b x s x 2 x 3 x 4 xf32>, %d : tensor<b x 2 x s x d xf32>, %f : tensor<s x 3 xbool>) {{
  %y = {op}({operands}) {attributes}
  return %y
}}
"
        ));
        check_left(&m, op);
    }
    let m = module(
        "(%q : tensor<b x 2 x s x 4 xf32>) {
  %y, %k, %v, %s = onnx.Attention(%q, %q, %q)
  return %y, %s
}
",
    );
    check_left(&m, "onnx.Attention");
}
