//! Whole blocks of architectures, built here: where a scale goes in them, and where it must not.

use super::*;

/// As in GPT-J: attention and MLP read one LayerNorm and are added to the residual together; biases in the MLP alone.
fn parallel_block() -> Module {
    module(
        "%x : tensor<2x3x8xf32>, %mask : tensor<3x3xf32>",
        "const %g : tensor<8xf32> random(1)
  const %b : tensor<8xf32> random(2)
  const %wq : tensor<8x8xf32> random(3)
  const %wk : tensor<8x8xf32> random(4)
  const %wv : tensor<8x8xf32> random(5)
  const %wo : tensor<8x8xf32> random(6)
  const %wi : tensor<8x12xf32> random(7)
  const %bi : tensor<12xf32> random(8)
  const %wf : tensor<12x8xf32> random(9)
  const %bf : tensor<8xf32> random(10)
  const %heads : tensor<4xi64> [0, 0, 2, 4]
  const %merged : tensor<3xi64> [0, 0, 8]
  const %root : tensor<f32> splat(2)
  %h = onnx.LayerNormalization(%x, %g, %b)
  %q0 = onnx.MatMul(%h, %wq)
  %k0 = onnx.MatMul(%h, %wk)
  %v0 = onnx.MatMul(%h, %wv)
  %q1 = onnx.Reshape(%q0, %heads)
  %k1 = onnx.Reshape(%k0, %heads)
  %v1 = onnx.Reshape(%v0, %heads)
  %q = onnx.Transpose(%q1) {perm = [0, 2, 1, 3]}
  %k = onnx.Transpose(%k1) {perm = [0, 2, 3, 1]}
  %v = onnx.Transpose(%v1) {perm = [0, 2, 1, 3]}
  %s = onnx.MatMul(%q, %k)
  %d = onnx.Div(%s, %root)
  %m = onnx.Add(%d, %mask)
  %p = onnx.Softmax(%m)
  %a = onnx.MatMul(%p, %v)
  %t = onnx.Transpose(%a) {perm = [0, 2, 1, 3]}
  %c = onnx.Reshape(%t, %merged)
  %attn = onnx.MatMul(%c, %wo)
  %i0 = onnx.MatMul(%h, %wi)
  %i = onnx.Add(%i0, %bi)
  %act = onnx.Gelu(%i) {approximate = \"tanh\"}
  %f0 = onnx.MatMul(%act, %wf)
  %f = onnx.Add(%f0, %bf)
  %both = onnx.Add(%attn, %f)
  %y = onnx.Add(%both, %x)
  return %y",
    )
}

#[test]
fn a_parallel_attention_block() {
    let m = parallel_block();
    let norm = folds(&m, "h");
    assert_eq!((norm.freedom, norm.sites), (None, vec!["g".to_string(), "b".to_string()]));
    let attention = folds(&m, "c");
    assert_eq!((attention.freedom, attention.sites), (None, vec!["wv".to_string()]));
    let why = refused(&m, "act");
    assert!(why.contains("Gelu") && why.contains("no scale through"), "{why}");
}

#[test]
fn a_pre_norm_block_with_a_gated_residual() {
    // What is added to the residual is multiplied by a gate that the same norm feeds.
    let m = module(
        "%x : tensor<2x3x8xf32>, %p : tensor<2x3x3xf32>",
        "const %g : tensor<8xf32> random(1)
  const %wv : tensor<8x6xf32> random(2)
  const %bv : tensor<6xf32> random(3)
  const %wo : tensor<6x8xf32> random(4)
  const %wg : tensor<8x8xf32> random(5)
  const %bg : tensor<8xf32> random(6)
  const %w2 : tensor<8x4xf32> random(7)
  %h = onnx.RMSNormalization(%x, %g)
  %v0 = onnx.MatMul(%h, %wv)
  %v = onnx.Add(%v0, %bv)
  %a = onnx.MatMul(%p, %v)
  %o = onnx.MatMul(%a, %wo)
  %g0 = onnx.MatMul(%h, %wg)
  %g1 = onnx.Add(%g0, %bg)
  %gate = onnx.Sigmoid(%g1)
  %gated = onnx.Mul(%gate, %o)
  %y = onnx.Add(%x, %gated)
  %z = onnx.MatMul(%gated, %w2)
  return %y, %z",
    );
    assert_eq!(folds(&m, "h").sites, ["g"]);
    assert_eq!(folds(&m, "a").sites, ["wv", "bv"]);
    // The residual needs the gated value as it is.
    let why = refused(&m, "gated");
    assert!(why.contains("Add"), "{why}");
    // Where only a linear reads it, the scale goes past the gate, which lets none through, into the other factor.
    let m = module(
        "%x : tensor<2x3x8xf32>",
        "const %wo : tensor<8x8xf32> random(4)
  const %wg : tensor<8x8xf32> random(5)
  const %w2 : tensor<8x4xf32> random(7)
  %o = onnx.MatMul(%x, %wo)
  %g0 = onnx.MatMul(%x, %wg)
  %gate = onnx.Sigmoid(%g0)
  %gated = onnx.Mul(%gate, %o)
  %z = onnx.MatMul(%gated, %w2)
  return %z",
    );
    assert_eq!(folds(&m, "gated").sites, ["wo"]);
}

/// The placement of a scale per channel on what a Conv reads, folded and compared.
fn folds_channels(m: &Module, name: &str) -> Vec<String> {
    let v = value(m, name);
    let scope = Scope::new(m, m.top);
    let readers = scope.readers(v);
    let p = place_along(m, &Ops::standard(), v, Channels::Second, &readers);
    assert_eq!((&p.why_not, &p.freedom), (&None, &None), "{p:?}");
    let mut m = m.clone();
    let channels = m.ty(v).dims().unwrap()[1].known().unwrap() as usize;
    let s: Vec<f32> = noise(channels, 5).iter().map(|x| x.abs() + 0.5).collect();
    let top = m.top;
    let s = m.add_const(top, "s", Tensor::new(&[channels, 1, 1], s).unwrap().to_const());
    let ty = m.ty(v).clone();
    let mul =
        m.insert_before(readers[0], OpBuilder::new("onnx.Mul", &"mul".into()).operands([v, s]).result(ty));
    let product = m.ops[mul].result(0).unwrap();
    for op in readers {
        m.ops[op].operands[0] = Some(product);
    }
    let want = run(&m);
    let before = histogram(&m);
    let outcome = fold_window(&mut m, &Ops::standard(), product).unwrap();
    assert!(outcome.absorbed, "{outcome:?}");
    let mut without = before.clone();
    without.remove("onnx.Mul");
    assert_eq!(histogram(&m), without);
    assert_close(&want, &run(&m));
    p.sites
}

#[test]
fn a_conv_batch_norm_relu_chain() {
    let m = module(
        "%x : tensor<1x2x6x6xf32>",
        "const %w1 : tensor<4x2x3x3xf32> random(1)
  const %g1 : tensor<4xf32> random(2)
  const %b1 : tensor<4xf32> random(3)
  const %m1 : tensor<4xf32> random(4)
  const %v1 : tensor<4xf32> [0.5, 1, 1.5, 2]
  const %w2 : tensor<4x1x3x3xf32> random(5)
  const %c2 : tensor<4xf32> random(6)
  const %w3 : tensor<3x4x1x1xf32> random(7)
  %a = onnx.Conv(%x, %w1) {pads = [1, 1, 1, 1]}
  %n = onnx.BatchNormalization(%a, %g1, %b1, %m1, %v1)
  %r = onnx.Relu(%n)
  %pool = onnx.MaxPool(%r) {kernel_shape = [2, 2], strides = [2, 2]}
  %d = onnx.Conv(%pool, %w2, %c2) {group = 4, pads = [1, 1, 1, 1]}
  %s = onnx.Relu(%d)
  %mean = onnx.GlobalAveragePool(%s)
  %y = onnx.Conv(%mean, %w3)
  return %y",
    );
    assert_eq!(folds_channels(&m, "pool"), ["g1", "b1"]);
    assert_eq!(folds_channels(&m, "mean"), ["w2", "c2"]);
}

#[test]
fn a_post_norm_block_shares_its_norm_and_its_gelu_takes_nothing() {
    // As in BERT: the LayerNorm's output is what the next layer reads and what it is added to.
    let m = module(
        "%x : tensor<2x3x8xf32>, %p : tensor<2x3x3xf32>",
        "const %g : tensor<8xf32> random(1)
  const %b : tensor<8xf32> random(2)
  const %wv : tensor<8x8xf32> random(3)
  const %wo : tensor<8x8xf32> random(4)
  const %wi : tensor<8x12xf32> random(5)
  const %bi : tensor<12xf32> random(6)
  const %wf : tensor<12x8xf32> random(7)
  %v = onnx.MatMul(%x, %wv)
  %a = onnx.MatMul(%p, %v)
  %o = onnx.MatMul(%a, %wo)
  %r = onnx.Add(%x, %o)
  %h = onnx.LayerNormalization(%r, %g, %b)
  %i0 = onnx.MatMul(%h, %wi)
  %i = onnx.Add(%i0, %bi)
  %act = onnx.Gelu(%i)
  %f = onnx.MatMul(%act, %wf)
  %s = onnx.Add(%h, %f)
  %y = onnx.LayerNormalization(%s, %g, %b)
  return %y",
    );
    let why = refused(&m, "h");
    assert!(why.contains("\"h\" is needed as it is") && why.contains("Add"), "{why}");
    let why = refused(&m, "act");
    assert!(why.contains("Gelu \"act\" lets no scale through"), "{why}");
    // V to output stays free.
    assert_eq!(folds(&m, "a").sites, ["wv"]);
}
