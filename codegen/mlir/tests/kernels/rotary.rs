//! Rotary position embedding, against the interpreter.

use crate::gather::refuse;
use crate::models::{check, check_left, model};
use dialects::tensor::Tensor;
use runtime::Fault;

/// `count` numbers as text.
fn numbers(count: usize, of: fn(f32) -> f32) -> String {
    (0..count).map(|i| format!("{:.6}", of(i as f32 * 0.37))).collect::<Vec<_>>().join(", ")
}

#[test]
fn positions_that_are_given() {
    // Heads, their size, pairs that turn.
    for (heads, size, half) in [(3, 10, 5), (1, 64, 32), (2, 20, 8), (4, 80, 20), (2, 2, 1), (1, 48, 9)] {
        for interleaved in [0, 1] {
            let (cos, sin) = (numbers(7 * half, f32::cos), numbers(7 * half, f32::sin));
            let hidden = heads * size;
            // With heads side by side the number of them is needed where not the whole head turns.
            let m = model(&format!(
                "module ir_version=10 opsets {{com.microsoft=1, onnx=23}}
graph @main(%x : tensor<b x s x {hidden} xf32>, %p : tensor<b x s xi64>, %o : tensor<1 xi64>, %h : tensor<b x {heads} x s x {size} xf32>) {{
  const %c : tensor<7x{half} xf32> [{cos}]
  const %s : tensor<7x{half} xf32> [{sin}]
  %u = com.microsoft.RotaryEmbedding(%x, %p, %c, %s) {{num_heads={heads}, interleaved={interleaved}}}
  %v = com.microsoft.RotaryEmbedding(%h, %o, %c, %s) {{interleaved={interleaved}}}
  %w = onnx.RotaryEmbedding(%x, %c, %s, %p) {{num_heads={heads}, interleaved={interleaved}, rotary_embedding_dim={turned}}}
  %z = onnx.RotaryEmbedding(%h, %c, %s, %p) {{interleaved={interleaved}, rotary_embedding_dim={turned}}}
  return %u, %v, %w, %z
}}
",
                turned = 2 * half,
            ));
            check(&m, &[&[("b", 2), ("s", 3)], &[("b", 1), ("s", 1)], &[("b", 2), ("s", 0)]], 4, 1e-6);
        }
    }
}

#[test]
fn heads_as_large_as_the_caches_say_and_caches_of_every_position() {
    let m = model(
        "module ir_version=10 opsets {com.microsoft=1, onnx=23}
graph @main(%x : tensor<b x s x 48 xf32>, %p : tensor<b x s xi64>, %c : tensor<7 x 8 xf32>, %s : tensor<7 x 8 xf32>, %cs : tensor<b x s x 8 xf32>, %ss : tensor<b x s x 8 xf32>) {
  %u = com.microsoft.RotaryEmbedding(%x, %p, %c, %s)
  %v = onnx.RotaryEmbedding(%x, %cs, %ss) {num_heads=3}
  return %u, %v
}
",
    );
    check(&m, &[&[("b", 2), ("s", 5)], &[("b", 0), ("s", 5)]], 2, 1e-6);
}

#[test]
fn positions_beyond_the_caches_are_refused() {
    for (positions, bad) in
        [("b x s x ", vec![0, 7]), ("b x s x ", vec![-1, 0]), ("1x", vec![6]), ("1x", vec![i64::MAX])]
    {
        let m = model(&format!(
            "module ir_version=10 opsets {{com.microsoft=1, onnx=23}}
graph @main(%x : tensor<b x s x 48xf32>, %p : tensor<{positions}i64>, %c : tensor<7x8xf32>) {{
  %y = com.microsoft.RotaryEmbedding(%x, %p, %c, %c)
  return %y
}}
"
        ));
        let shape = if bad.len() == 2 { vec![1, 2] } else { vec![1] };
        let tensors = [
            Tensor::new(&[1, 2, 48], vec![1f32; 96]).unwrap(),
            Tensor::new(&shape, bad).unwrap(),
            Tensor::new(&[7, 8], vec![1f32; 56]).unwrap(),
        ];
        let given = m.regions[m.top].args.iter().copied().zip(tensors).collect();
        refuse(&m, &[given], Fault::Index, 2);
    }
}

#[test]
fn forms_without_a_kernel_are_left_to_the_interpreter() {
    for (op, operands, attributes) in [
        ("com.microsoft.RotaryEmbedding", "%x, %p, %c, %c", "{is_packed_batching=1, num_heads=3}"),
        // Heads that are not as large as the caches are wide; more pairs than a head has.
        ("onnx.RotaryEmbedding", "%x, %c, %c, %p", "{num_heads=1}"),
        ("com.microsoft.RotaryEmbedding", "%x, %p, %c, %c", "{num_heads=6}"),
        // Rows of which nothing is known.
        ("com.microsoft.RotaryEmbedding", "%x, %q, %c, %c", "{num_heads=3}"),
    ] {
        let m = model(&format!(
            "module ir_version=10 opsets {{com.microsoft=1, onnx=23}}
graph @main(%x : tensor<b x s x 48 xf32>, %p : tensor<b x s xi64>, %q : tensor<b x t xi64>, %c : tensor<7 x 8 xf32>) {{
  %y = {op}({operands}) {attributes}
  return %y
}}
"
        ));
        check_left(&m, op);
    }
}
