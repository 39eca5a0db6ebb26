//! Attention, against the interpreter.

use crate::models::{Here, check, check_left, check_on, inputs, model};
use codegen::plan::plan;
use codegen::{Form, Native, Request, Target};
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
    &[("b", 1), ("s", 197), ("t", 70)],
    &[("b", 1), ("s", 0), ("t", 3)],
    &[("b", 1), ("s", 3), ("t", 0)],
    &[("b", 0), ("s", 3), ("t", 3)],
];

#[test]
fn heads_side_by_side_of_any_size() {
    for (heads, size, value_size) in [(3, 5, 5), (2, 20, 33), (2, 64, 80)] {
        let (hidden, out) = (heads * size, heads * value_size);
        let m = module(&format!(
            "(%q : tensor<b x s x {hidden} xf32>, %k : tensor<b x t x {hidden} xf32>, %v : tensor<b x t x {out} xf32>, %h : tensor<b x {heads} x t x {size} xf32>, %w : tensor<b x {heads} x t x {value_size} xf32>) {{
  %x = com.microsoft.MultiHeadAttention(%q, %k, %v) {{num_heads={heads}, unidirectional=1}}
  %y = com.microsoft.MultiHeadAttention(%q, %h, %w) {{num_heads={heads}, unidirectional=1}}
  %z = onnx.Attention(%q, %h, %v) {{q_num_heads={heads}, kv_num_heads={heads}, is_causal=1}}
  return %x, %y, %z
}}
"
        ));
        check(&m, SIZES, 3, 1e-5);
    }
    let m = module(&format!(
        "{THREE}) {{
  %x = com.microsoft.MultiHeadAttention(%q, %k, %v) {{num_heads=3, scale=0.3}}
  return %x
}}
"
    ));
    check(&m, SIZES, 1, 1e-5);
}

/// Q, K and V of three heads, and what comes after them.
const THREE: &str =
    "(%q : tensor<b x s x 24 xf32>, %k : tensor<b x t x 24 xf32>, %v : tensor<b x t x 24 xf32>";

#[test]
fn masks_of_every_shape() {
    let (mut args, mut ops, mut results) = (THREE.to_owned(), String::new(), Vec::new());
    let shapes = ["b x 3 x s x t", "1 x 1 x s x t", "b x 1 x 1 x t", "1 x 3 x 1 x t"];
    for (i, shape) in shapes.iter().chain(&["s x t", "3 x 1 x t", "s x 1", "b x 3 x s x 1"]).enumerate() {
        args += &format!(", %m{i} : tensor<{shape} xf32>, %n{i} : tensor<{shape} xbool>");
        if i < shapes.len() {
            let form = "{num_heads=3}";
            ops += &format!("  %x{i} = com.microsoft.MultiHeadAttention(%q, %k, %v, _, _, %m{i}) {form}\n");
            results.push(format!("%x{i}"));
        }
        let form = "q_num_heads=3, kv_num_heads=3";
        ops += &format!("  %y{i} = onnx.Attention(%q, %k, %v, %n{i}) {{{form}}}\n");
        ops += &format!("  %z{i} = onnx.Attention(%q, %k, %v, %m{i}) {{{form}, is_causal=1, softcap=2.5}}\n");
        results.extend([format!("%y{i}"), format!("%z{i}")]);
    }
    let m = module(&format!("{args}) {{\n{ops}  return {}\n}}\n", results.join(", ")));
    check(&m, SIZES, results.len(), 1e-5);
}

#[test]
fn heads_that_share_keys() {
    let (mut args, mut ops, mut results) = (Vec::new(), String::new(), Vec::new());
    for (i, (heads, shared)) in [(8, 2), (6, 1), (4, 4), (9, 3), (16, 1)].into_iter().enumerate() {
        args.push(format!(
            "%q{i} : tensor<b x {heads} x s x 16 xf32>, %k{i} : tensor<b x {shared} x t x 16 xf32>, %v{i} : tensor<b x {shared} x t x 16 xf32>, %m{i} : tensor<b x {heads} x s x t xf32>, %u{i} : tensor<b x s x {} xf32>",
            heads * 16
        ));
        let form = format!("q_num_heads={heads}, kv_num_heads={shared}, is_causal=1");
        ops += &format!("  %x{i} = onnx.Attention(%q{i}, %k{i}, %v{i}, %m{i})\n");
        ops += &format!("  %y{i} = onnx.Attention(%u{i}, %k{i}, %v{i}) {{{form}}}\n");
        results.extend([format!("%x{i}"), format!("%y{i}")]);
    }
    let m = module(&format!("({}) {{\n{ops}  return {}\n}}\n", args.join(", "), results.join(", ")));
    check(&m, SIZES, results.len(), 1e-5);
}

#[test]
fn a_cache_before_the_keys() {
    let (mut args, mut ops, mut results) = (Vec::new(), String::new(), Vec::new());
    for (i, (past, new)) in [(7, 1), (3, 20), (0, 4), (130, 3), (5, 0)].into_iter().enumerate() {
        let part = |name: &str| format!("%{name}{i} : tensor<b x {new} x 40 xf32>");
        let cache = |name: &str| format!("%{name}{i} : tensor<b x 2 x {past} x 20 xf32>");
        args.extend([part("q"), part("k"), part("v"), cache("c"), cache("d")]);
        args.push(format!("%m{i} : tensor<1 x 2 x {new} x {} xf32>", past + new));
        let (qkv, cd) = (format!("%q{i}, %k{i}, %v{i}"), format!("%c{i}, %d{i}"));
        let form = "q_num_heads=2, kv_num_heads=2";
        ops += &format!(
            "  %x{i}, %xk{i}, %xv{i} = com.microsoft.MultiHeadAttention({qkv}, _, _, %m{i}, {cd}) {{num_heads=2}}
  %y{i}, %yk{i}, %yv{i} = onnx.Attention({qkv}, _, {cd}) {{{form}, is_causal=1}}
  %z{i} = onnx.Attention({qkv}, _, {cd}) {{{form}, is_causal=1}}
  %w{i}, %wk{i} = onnx.Attention({qkv}) {{{form}, is_causal=1}}
"
        );
        let each = ["x", "xk", "xv", "y", "yv", "z", "w", "wk"].map(|name| format!("%{name}{i}"));
        results.extend(each);
    }
    let m = module(&format!("({}) {{\n{ops}  return {}\n}}\n", args.join(", "), results.join(", ")));
    check(&m, &[&[("b", 2)], &[("b", 1)]], 20, 1e-5);
}

#[test]
fn masked_rows_infinities_and_nan() {
    let m = module(
        "(%q : tensor<b x s x 24 xf32>, %k : tensor<b x t x 24 xf32>, %v : tensor<b x t x 24 xf32>, %m : tensor<b x 1 x s x t xf32>) {
  %x = com.microsoft.MultiHeadAttention(%q, %k, %v, _, _, %m) {num_heads=3}
  %z = onnx.Attention(%q, %k, %v) {q_num_heads=3, kv_num_heads=3}
  return %x, %z
}
",
    );
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let sizes = [[("b", 2), ("s", 3), ("t", 150)], [("b", 2), ("s", 70), ("t", 140)]];
    let mut all = Vec::new();
    for [_, (_, s), (_, t)] in sizes {
        let mut given = inputs(&m, &[("b", 2), ("s", s), ("t", t)], &mut rng);
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
        all.push(given.clone());
        // Scores that are too large, and not numbers; all -inf without a mask is NaN.
        with(&m, &mut given, "q", |q| {
            q[25] = f32::NAN;
            q[48..56].fill(f32::INFINITY);
        });
        all.push(given);
    }
    check_on(&m, &all, &|_| Some(256), 2, 1e-5);
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
fn every_target_takes_what_is_emitted_for_it() {
    let m = module(
        "(%q : tensor<b x 2 x s x 20 xf32>, %p : tensor<b x s xi64>, %m : tensor<s x s xbool>) {
  const %c : tensor<2 x 3 xf32> [1.0, 0.5, 0.25, 0.75, 0.125, 0.0]
  %r = com.microsoft.RotaryEmbedding(%q, %p, %c, %c) {interleaved=1}
  %y = onnx.Attention(%r, %q, %q, %m)
  %z = onnx.LogSoftmax(%y)
  return %z
}
",
    );
    for name in ["x86-64", "x86-64-v3", "x86-64-v4", "aarch64"] {
        let target = Target::parse(name).unwrap();
        let plan = plan(&m, &Ops::standard(), std::slice::from_ref(&target), &|_| Some(4)).unwrap();
        let mlir = codegen::kernels::module(&plan.versions[0].kernels);
        codegen_mlir::compile(&Request { mlir, target, form: Form::Asm }).unwrap();
    }
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
