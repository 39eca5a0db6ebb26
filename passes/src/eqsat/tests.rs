//! Tests of the engine on small graphs: where a scale is absorbed, where it must not be, and that folding keeps the
//! function, checked by the interpreter on random inputs.

use super::*;
use crate::linear;
use dialects::exec::{Executor, run_once};
use dialects::ir::interp::Interpreter;
use dialects::ir::{OpBuilder, ValueDef, infer, parse};
use dialects::ops::Item;
use dialects::tensor::{Data, Tensor};
use models::*;

#[test]
fn rms_norm_with_reciprocal() {
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        &format!(
            "{RMS}
  %r = onnx.Reciprocal(%root)
  %n = onnx.Mul(%x, %r)
  %h = onnx.Mul(%g, %n)
  %y = onnx.MatMul(%h, %w)
  %z = onnx.MatMul(%h, %w2)
  return %y, %z"
        ),
    );
    let p = folds(&m, "h");
    assert_eq!((p.freedom, p.sites), (None, vec!["g".to_string()]));
}

#[test]
fn rms_norm_with_division_and_casts() {
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        &format!(
            "{RMS}
  %r = onnx.Div(%one, %root)
  %n = onnx.Mul(%x, %r)
  %c = onnx.Cast(%n) {{to = 1}}
  %h = onnx.Mul(%g, %c)
  %y = onnx.MatMul(%h, %w)
  return %y"
        ),
    );
    let v = value(&m, "h");
    let p = place(&m, &Ops::standard(), v, &readers(&m, v));
    assert_eq!((p.why_not, p.freedom, p.sites), (None, None, vec!["g".to_string()]));
}

#[test]
fn rms_norm_without_gain_has_no_place() {
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        &format!("{RMS}\n  %h = onnx.Div(%x, %root)\n  %y = onnx.MatMul(%h, %w)\n  return %y"),
    );
    assert!(refused(&m, "h").contains("is an input"));
}

#[test]
fn fused_norms() {
    for (norm, sites) in [
        ("onnx.RMSNormalization(%x, %g)", vec!["g"]),
        ("onnx.SimplifiedLayerNormalization(%x, %g)", vec!["g"]),
        ("com.microsoft.SkipSimplifiedLayerNormalization(%x, %x, %g, %b)", vec!["g"]),
        ("com.microsoft.SkipLayerNormalization(%x, %x, %g)", vec!["g"]),
        ("com.microsoft.SkipLayerNormalization(%x, %x, %g, %b, %b)", vec!["g", "b"]),
        ("onnx.LayerNormalization(%x, %g)", vec!["g"]),
        ("onnx.LayerNormalization(%x, %g, %b)", vec!["g", "b"]),
    ] {
        let m = module(
            "%x : tensor<b x t x 8xf32>",
            &format!(
                "const %g : tensor<8xf32> random(1)
  const %b : tensor<8xf32> random(2)
  const %w : tensor<8x4xf32> random(3)
  %h = {norm}
  %y = onnx.MatMul(%h, %w)
  return %y"
            ),
        );
        assert_eq!(folds(&m, "h").sites, sites);
    }
}

#[test]
fn a_skip_norm_whose_sum_is_read_stays_one_op() {
    let m = module(
        "%x : tensor<b x t x 8xf32>, %r : tensor<b x t x 8xf32>",
        "const %g : tensor<8xf32> random(1)
  const %w : tensor<8x8xf32> random(3)
  %h, _, _, %sum = com.microsoft.SkipSimplifiedLayerNormalization(%x, %r, %g)
  %y = onnx.MatMul(%h, %w)
  %z = onnx.Add(%sum, %y)
  return %z, %sum",
    );
    assert_eq!(folds(&m, "h").sites, ["g"]);
    // The sum itself takes no scale: nothing in the op could undo it.
    let m = module(
        "%x : tensor<b x t x 8xf32>, %r : tensor<b x t x 8xf32>",
        "const %g : tensor<8xf32> random(1)
  const %w : tensor<8x8xf32> random(3)
  %h, _, _, %sum = com.microsoft.SkipSimplifiedLayerNormalization(%x, %r, %g)
  %y = onnx.MatMul(%sum, %w)
  return %y",
    );
    refused(&m, "sum");
}

#[test]
fn long_layer_norm() {
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        &format!(
            "{RMS}
  const %beta : tensor<8xf32> random(7)
  %mu = onnx.ReduceMean(%x, %axis)
  %d = onnx.Sub(%x, %mu)
  %n = onnx.Div(%d, %root)
  %ng = onnx.Mul(%n, %g)
  %h = onnx.Add(%ng, %beta)
  %y = onnx.MatMul(%h, %w)
  return %y"
        ),
    );
    assert_eq!(folds(&m, "h").sites, ["g", "beta"]);
}

#[test]
fn a_shared_norm_is_left_alone() {
    // As in a post-norm model: the norm's output is the residual too.
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        "const %g : tensor<8xf32> random(1)
  const %w : tensor<8x8xf32> random(3)
  %h = onnx.RMSNormalization(%x, %g)
  %y = onnx.MatMul(%h, %w)
  %z = onnx.Add(%h, %y)
  return %z",
    );
    let why = refused(&m, "h");
    assert!(why.contains("Add") && why.contains("\"h\""), "{why}");
    // And an output of the model stays what it is.
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        "const %g : tensor<8xf32> random(1)
  const %w : tensor<8x8xf32> random(3)
  %h = onnx.RMSNormalization(%x, %g)
  %y = onnx.MatMul(%h, %w)
  return %y, %h",
    );
    assert!(refused(&m, "h").contains("output"));
}

#[test]
fn gelu_lets_no_scale_through() {
    let head = "const %w : tensor<8x6xf32> random(1)
  const %b : tensor<6xf32> random(2)
  const %v : tensor<6x8xf32> random(3)
  const %half : tensor<f32> splat(0.5)
  const %one : tensor<f32> splat(1)
  const %c : tensor<f32> splat(0.7978846)
  const %root : tensor<f32> splat(1.4142135)
  const %three : tensor<f32> splat(3)
  const %k : tensor<f32> splat(0.044715)
  %l = onnx.MatMul(%x, %w)
  %u = onnx.Add(%l, %b)";
    let forms = [
        "%h = onnx.Gelu(%u)",
        "%half_u = onnx.Mul(%u, %half)
  %p = onnx.Pow(%u, %three)
  %q = onnx.Mul(%p, %k)
  %r = onnx.Add(%u, %q)
  %s = onnx.Mul(%r, %c)
  %t = onnx.Tanh(%s)
  %v1 = onnx.Add(%t, %one)
  %h = onnx.Mul(%half_u, %v1)",
        "%d = onnx.Div(%u, %root)
  %e = onnx.Erf(%d)
  %f = onnx.Add(%e, %one)
  %i = onnx.Mul(%u, %f)
  %h = onnx.Mul(%i, %half)",
        "%sig = onnx.Sigmoid(%u)\n  %h = onnx.Mul(%u, %sig)",
    ];
    for form in forms {
        let m = module(
            "%x : tensor<n x 8xf32>",
            &format!("{head}\n  {form}\n  %y = onnx.MatMul(%h, %v)\n  return %y"),
        );
        refused(&m, "h");
    }
}

#[test]
fn relu_passes_a_positive_scale() {
    let m = module(
        "%x : tensor<n x 8xf32>",
        "const %w : tensor<8x6xf32> random(1)
  const %b : tensor<6xf32> random(2)
  const %v : tensor<6x8xf32> random(3)
  %l = onnx.MatMul(%x, %w)
  %u = onnx.Add(%l, %b)
  %h = onnx.Relu(%u)
  %y = onnx.MatMul(%h, %v)
  return %y",
    );
    assert_eq!(folds(&m, "h").sites, ["w", "b"]);
}

#[test]
fn gemm_columns_and_bias() {
    for (w, attrs) in [("6x8", "{transB = 1}"), ("8x6", "{transB = 0, alpha = 0.5f, beta = 2.0f}")] {
        let attrs = attrs.replace("0.5f", "0.5").replace("2.0f", "2.0");
        let m = module(
            "%x : tensor<n x 8xf32>",
            &format!(
                "const %w : tensor<{w}xf32> random(1)
  const %b : tensor<6xf32> random(2)
  const %v : tensor<6x8xf32> random(3)
  %h = onnx.Gemm(%x, %w, %b) {attrs}
  %y = onnx.Gemm(%h, %v)
  return %y"
            ),
        );
        assert_eq!(folds(&m, "h").sites, ["w", "b"]);
    }
}

#[test]
fn gated_mlp_folds_into_up() {
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        "const %wg : tensor<8x6xf32> random(1)
  const %wu : tensor<8x6xf32> random(2)
  const %wd : tensor<6x8xf32> random(3)
  %g = onnx.MatMul(%x, %wg)
  %s = onnx.Sigmoid(%g)
  %a = onnx.Mul(%g, %s)
  %u = onnx.MatMul(%x, %wu)
  %h = onnx.Mul(%a, %u)
  %y = onnx.MatMul(%h, %wd)
  return %y",
    );
    let p = folds(&m, "h");
    assert_eq!((p.freedom, p.sites), (None, vec!["wu".to_string()]));
}

/// Attention written out, `heads` query heads on `kv` key-value heads of width 2.
fn attention(heads: usize, kv: usize, tail: &str) -> Module {
    let (q, k) = (heads * 2, kv * 2);
    let r = heads / kv;
    let repeat = if r == 1 {
        "%vr = onnx.Reshape(%vt, %same)".to_string()
    } else {
        format!(
            "const %ax2 : tensor<1xi64> [2]
  const %to5 : tensor<5xi64> [1, 1, {r}, 1, 1]
  const %back : tensor<4xi64> [0, {heads}, -1, 2]
  %v5 = onnx.Unsqueeze(%vt, %ax2)
  %ve = onnx.Expand(%v5, %to5)
  %vr = onnx.Reshape(%ve, %back)"
        )
    };
    module(
        &format!("%x : tensor<2x3x8xf32>, %p : tensor<2x{heads}x3x3xf32>"),
        &format!(
            "const %wv : tensor<8x{k}xf32> random(1)
  const %wo : tensor<{q}x8xf32> random(2)
  const %shape : tensor<4xi64> [0, 0, {kv}, 2]
  const %merge : tensor<3xi64> [0, 0, {q}]
  const %same : tensor<4xi64> [0, 0, 0, 0]
  const %zero : tensor<f32> splat(0)
  %v = onnx.MatMul(%x, %wv)
  %vs = onnx.Reshape(%v, %shape)
  %vt = onnx.Transpose(%vs) {{perm = [0, 2, 1, 3]}}
  {repeat}
  %soft = onnx.Softmax(%p)
  %nan = onnx.IsNaN(%soft)
  %probs = onnx.Where(%nan, %zero, %soft)
  %a = onnx.MatMul(%probs, %vr)
  %at = onnx.Transpose(%a) {{perm = [0, 2, 1, 3]}}
  %h = onnx.Reshape(%at, %merge)
  {tail}
  %y = onnx.MatMul(%h, %wo)
  return %y"
        ),
    )
}

#[test]
fn attention_output_folds_into_v() {
    let p = folds(&attention(4, 4, ""), "h");
    assert_eq!((p.freedom, p.sites), (None, vec!["wv".to_string()]));
}

#[test]
fn repeated_heads_are_tied() {
    let p = folds(&attention(4, 2, ""), "h");
    assert_eq!(p.sites, ["wv"]);
    assert_eq!(p.freedom, Some(vec![0, 1, 0, 1, 2, 3, 2, 3]));
}

#[test]
fn attention_that_is_read_twice_is_left_alone() {
    let m = attention(4, 2, "%other = onnx.Relu(%h)");
    let why = refused(&m, "h");
    assert!(why.contains("Relu"), "{why}");
}

#[test]
fn fused_attention() {
    // [batch, heads, positions, width] and [batch, positions, heads * width], with and without repeated heads.
    for (kv, freedom) in [(4, None), (2, Some(vec![0, 1, 0, 1, 2, 3, 2, 3]))] {
        let k = kv * 2;
        let four = format!(
            "const %wv : tensor<8x{k}xf32> random(1)
  const %wo : tensor<8x8xf32> random(2)
  const %shape : tensor<4xi64> [0, 0, {kv}, 2]
  const %merge : tensor<3xi64> [0, 0, 8]
  %v = onnx.MatMul(%x, %wv)
  %vs = onnx.Reshape(%v, %shape)
  %vt = onnx.Transpose(%vs) {{perm = [0, 2, 1, 3]}}
  %a = onnx.Attention(%q, %k, %vt) {{scale = 0.5}}
  %at = onnx.Transpose(%a) {{perm = [0, 2, 1, 3]}}
  %h = onnx.Reshape(%at, %merge)
  %y = onnx.MatMul(%h, %wo)
  return %y"
        );
        let m = module(
            &format!("%x : tensor<2x3x8xf32>, %q : tensor<2x4x3x2xf32>, %k : tensor<2x{kv}x3x2xf32>"),
            &four,
        );
        let p = folds(&m, "h");
        assert_eq!((&p.freedom, p.sites), (&freedom, vec!["wv".to_string()]));
        let three = format!(
            "const %wv : tensor<8x{k}xf32> random(1)
  const %wo : tensor<8x8xf32> random(2)
  %v = onnx.MatMul(%x, %wv)
  %h = onnx.Attention(%q, %k, %v) {{q_num_heads = 4, kv_num_heads = {kv}}}
  %y = onnx.MatMul(%h, %wo)
  return %y"
        );
        let m = module(
            &format!("%x : tensor<2x3x8xf32>, %q : tensor<2x3x8xf32>, %k : tensor<2x3x{k}xf32>"),
            &three,
        );
        let p = folds(&m, "h");
        assert_eq!((p.freedom, p.sites), (freedom, vec!["wv".to_string()]));
    }
}

#[test]
fn attention_whose_values_are_an_output_is_left_alone() {
    let m = module(
        "%x : tensor<2x3x8xf32>, %q : tensor<2x3x8xf32>, %k : tensor<2x3x8xf32>",
        "const %wv : tensor<8x8xf32> random(1)
  const %wo : tensor<8x8xf32> random(2)
  %v = onnx.MatMul(%x, %wv)
  %h, _, %present = onnx.Attention(%q, %k, %v) {q_num_heads = 4, kv_num_heads = 4}
  %y = onnx.MatMul(%h, %wo)
  return %y, %present",
    );
    refused(&m, "h");
}

#[test]
fn a_fused_projection_takes_the_scale_in_one_part() {
    let m = module(
        "%x : tensor<2x3x8xf32>",
        "const %w : tensor<8x12xf32> random(1)
  const %b : tensor<12xf32> random(2)
  const %wo : tensor<4x8xf32> random(3)
  %l = onnx.MatMul(%x, %w)
  %qkv = onnx.Add(%l, %b)
  %q, %k, %v = onnx.Split(%qkv) {axis = 2, num_outputs = 3}
  %kt = onnx.Transpose(%k) {perm = [0, 2, 1]}
  %scores = onnx.MatMul(%q, %kt)
  %p = onnx.Softmax(%scores)
  %h = onnx.MatMul(%p, %v)
  %y = onnx.MatMul(%h, %wo)
  return %y",
    );
    let p = folds(&m, "h");
    assert_eq!((p.freedom, p.sites), (None, vec!["w".to_string(), "b".to_string()]));
}

#[test]
fn reshaped_norms_and_their_shapes() {
    // What reads only the shape of a value does not mind a scale on it.
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        "const %g : tensor<8xf32> random(1)
  const %b : tensor<8xf32> random(2)
  const %w : tensor<8x6xf32> random(3)
  const %bias : tensor<6xf32> random(4)
  const %flat : tensor<2xi64> [-1, 8]
  const %from : tensor<1xi64> [0]
  const %to : tensor<1xi64> [2]
  const %six : tensor<1xi64> [6]
  %n = onnx.LayerNormalization(%x, %g, %b)
  %shape = onnx.Shape(%n)
  %lead = onnx.Slice(%shape, %from, %to)
  %full = onnx.Concat(%lead, %six) {axis = 0}
  %h = onnx.Reshape(%n, %flat)
  %l = onnx.Gemm(%h, %w, %bias)
  %y = onnx.Reshape(%l, %full)
  return %y",
    );
    assert_eq!(folds(&m, "h").sites, ["g", "b"]);
}

#[test]
fn quantized_weights_are_opaque() {
    let m = module(
        "%x : tensor<n x 8xf32>",
        "const %codes : tensor<8x4xu8> random(1)
  const %scale : tensor<f32> splat(0.1)
  const %v : tensor<4x8xf32> random(3)
  %w = onnx.DequantizeLinear(%codes, %scale)
  %h = onnx.MatMul(%x, %w)
  %y = onnx.MatMul(%h, %v)
  return %y",
    );
    refused(&m, "h");
}

#[test]
fn a_scalar_place_is_not_worth_a_vector() {
    // A product with a scalar would become one with a vector: more to read, and no longer what fusions look for.
    let m = module(
        "%x : tensor<n x 8xf32>",
        "const %c : tensor<f32> splat(0.5)
  const %v : tensor<8x8xf32> random(3)
  %t = onnx.Tanh(%x)
  %h = onnx.Mul(%t, %c)
  %y = onnx.MatMul(%h, %v)
  return %y",
    );
    refused(&m, "h");
}

#[test]
fn two_runs_agree() {
    let m = attention(4, 2, "");
    assert_eq!(ask(&m, "h"), ask(&m, "h"));
}

#[test]
fn a_parallel_block_scales_both_branches() {
    // As in GPT-J: attention and MLP read the same norm.
    let m = module(
        "%x : tensor<b x t x 8xf32>",
        "const %g : tensor<8xf32> random(1)
  const %b : tensor<8xf32> random(2)
  const %wq : tensor<8x8xf32> random(3)
  const %wf : tensor<8x6xf32> random(4)
  const %wo : tensor<6x8xf32> random(5)
  %h = onnx.LayerNormalization(%x, %g, %b)
  %q = onnx.MatMul(%h, %wq)
  %f = onnx.MatMul(%h, %wf)
  %a = onnx.Gelu(%f)
  %o = onnx.MatMul(%a, %wo)
  %s = onnx.Add(%q, %o)
  %y = onnx.Add(%x, %s)
  return %y",
    );
    assert_eq!(folds(&m, "h").sites, ["g", "b"]);
}

#[test]
fn ties_join_classes_in_order() {
    assert_eq!(tie(&[0, 1, 2, 3], &Wish(vec![vec![1, 3]])), [0, 1, 2, 1]);
    assert_eq!(tie(&[0, 0, 1, 2], &Wish(vec![vec![2, 1], vec![1, 0]])), [0, 0, 0, 0]);
}

mod architectures;
mod models;
mod rotations;
