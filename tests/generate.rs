//! `qcc generate` and `qcc bench`, from outside, on the small language model of `testdata`.

#[path = "common/program.rs"]
mod program;

use program::{Folder, MODEL, ok, qcc};
use serde_json::Value;

const TOKENIZER: [&str; 2] = ["--tokenizer", "tokenizer.json"];
const PROMPT: [&str; 2] = ["--prompt", "The history of the"];

fn args<'a>(parts: &[&[&'a str]]) -> Vec<&'a str> {
    parts.concat()
}

fn json(more: &[&str]) -> Value {
    serde_json::from_str(&ok(&args(&[&["generate", "--json"], more]))).unwrap()
}

/// Stderr in one line, without what frames it.
fn message(more: &[&str]) -> String {
    let ran = qcc(&args(&[&["generate"], more]));
    assert_ne!(ran.code, 0, "{}", ran.stdout);
    ran.stderr.replace(['│', '×'], " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn greedy_text() {
    let given = args(&[&["generate", MODEL, "--max-new-tokens", "24"], &TOKENIZER, &PROMPT]);
    let text = ok(&given);
    insta::with_settings!({prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_snapshot!("generate", text);
    });
    let found = json(&given[1..]);
    assert_eq!(found["text"].as_str().unwrap(), &text[..text.len() - 1]);
    assert_eq!(found["tokens"].as_array().unwrap().len(), 24);
    assert_eq!((&found["ended"], found["token_seconds"].as_array().unwrap().len()), (&"length".into(), 23));
}

/// The tokens that a model without a cache holds the likeliest, each computed anew from all before.
#[test]
fn greedy_tokens_are_those_of_the_model_without_a_cache() {
    let found = json(&[MODEL, "--ids", "5,99,1234", "--max-new-tokens", "6"]);
    assert_eq!((found["prompt_tokens"].as_u64(), &found["text"]), (Some(3), &Value::Null));
    let mut ids: Vec<i64> = vec![5, 99, 1234];
    let registry = qcc::registry();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models").join(MODEL);
    let m = qcc::driver::read(&path, &registry, &qcc::term::Term::new(true)).unwrap();
    let exec = dialects::ir::interp::Interpreter::new(registry.ops().clone());
    let lm = qcc::data::lm::Lm::of(&m).unwrap();
    for expected in found["tokens"].as_array().unwrap() {
        let inputs = qcc::data::lm::inputs_of(&m, lm.batch_of(&ids, ids.len()));
        let got = dialects::exec::run_once(&exec, &m, &inputs, &[lm.logits.clone().unwrap()]).unwrap();
        let logits = got[0].tensor().unwrap().f32s().unwrap().to_vec();
        let last = &logits[logits.len() - 4096..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        assert_eq!(Some(best as u64), expected.as_u64());
        ids.push(best as i64);
    }
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let drawn = |more: &[&str]| {
        let first: &[&str] = &[MODEL, "--max-new-tokens", "12"];
        json(&args(&[first, &TOKENIZER, &PROMPT, more]))["tokens"].clone()
    };
    let seed = drawn(&["--seed", "3", "--top-k", "40", "--top-p", "0.9"]);
    assert_eq!(seed, drawn(&["--seed", "3", "--top-k", "40", "--top-p", "0.9", "--threads", "1"]));
    assert_ne!(seed, drawn(&["--seed", "4", "--top-k", "40", "--top-p", "0.9"]));
    assert_eq!(drawn(&[]), drawn(&["--temperature", "2", "--top-k", "1"]));
}

#[test]
fn where_text_ends() {
    let given = args(&[&[MODEL, "--max-new-tokens", "24"], &TOKENIZER, &PROMPT]);
    let whole = json(&given);
    let text = whole["text"].as_str().unwrap();
    let word = text.split_whitespace().nth(3).unwrap();
    let stopped = json(&args(&[&given, &["--stop", word]]));
    assert_eq!(stopped["ended"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), text.split(word).next().unwrap());
    // The third token, said to be the end.
    let third = whole["tokens"][2].to_string();
    let ended = json(&args(&[&given, &["--eos", &third]]));
    assert_eq!(ended["ended"], "eos");
    assert!(ended["tokens"].as_array().unwrap().len() <= 2);
}

#[test]
fn a_model_that_has_a_cache_and_quantized_weights() {
    let dir = Folder::new();
    let (cached, quantized) = (dir.path("kv.onnx"), dir.path("q.onnx"));
    ok(&[MODEL, "--pass", "add-kv-cache", "-o", &cached]);
    let tokens = |model: &str| json(&[model, "--ids", "7,8,9", "--max-new-tokens", "5"])["tokens"].clone();
    assert_eq!(tokens(&cached), tokens(MODEL));
    ok(&[&cached, "--pass", "rtn,pack-int4", "-o", &quantized]);
    assert_eq!(tokens(&quantized).as_array().unwrap().len(), 5);
    // Data for a model without a cache is data for one with an empty cache.
    let pipeline = "add-kv-cache,awq{grid=2,clip=false},pack-int4";
    let more = ["--calib", "calib_ids.npy", "--calib-samples", "2", "--check"];
    ok(&args(&[&[MODEL, "--pass", pipeline, "-o", &quantized], &more]));
    assert_eq!(tokens(&quantized).as_array().unwrap().len(), 5);
}

#[test]
fn what_cannot_be_generated() {
    assert!(message(&[MODEL, "--prompt", "x"]).contains("--tokenizer"));
    assert!(message(&args(&[&[MODEL, "--prompt", ""], &TOKENIZER])).contains("no token to go on from"));
    assert!(
        message(&[MODEL, "--ids", "4096"]).contains("token 4096: the model has 4096 rows of its embedding")
    );
    assert!(message(&[MODEL, "--ids", "1", "--temperature=-1"]).contains("--temperature"));
    assert!(message(&[MODEL, "--ids", "1", "--top-p", "0"]).contains("--top-p 0"));
    assert!(message(&[MODEL, "--prompt", "x", "--tokenizer", MODEL]).contains(MODEL));
    let dir = Folder::new();
    let model = |name: &str, text: &str| {
        let path = dir.path(name);
        std::fs::write(&path, format!("module ir_version=10 opsets {{onnx=23}}\n{text}")).unwrap();
        path
    };
    let table = "const %t : tensor<2x2xf32> [1.0, 2.0, 3.0, 4.0]\n  %x = onnx.Gather(%t, %input_ids)\n";
    let attention = "onnx.Attention(%x, %x, %x) {is_causal=1, q_num_heads=1, kv_num_heads=1}\n";
    let ids = "graph @main(%input_ids : tensor<b x s x i64>) {\n  ";
    let other = model("other.qir", &format!("{ids}{table}  %y = {attention}  return %y\n}}\n"));
    assert!(message(&[&other, "--ids", "1"]).contains("no output \"logits\""));
    let ahead = attention.replace("is_causal=1, ", "");
    let encoder = model("encoder.qir", &format!("{ids}{table}  %logits = {ahead}  return %logits\n}}\n"));
    assert!(message(&[&encoder, "--ids", "1"]).contains("sees no later position"));
    let small = model("small.qir", &format!("{ids}{table}  %logits = {attention}  return %logits\n}}\n"));
    let found = message(&args(&[&[&small, "--prompt", "x"], &TOKENIZER]));
    assert!(found.contains("the tokenizer has 4096 tokens, the model 2 rows of its embedding"), "{found}");
    assert_eq!(
        json(&[&small, "--ids", "1,0", "--max-new-tokens", "3"])["tokens"].as_array().unwrap().len(),
        3
    );
}

/// Seven positions: four for the prompt, one for each of three tokens, and the token that the last of these gives.
#[test]
fn a_context_ends() {
    let dir = Folder::new();
    let path = dir.path("table.qir");
    let text = "module ir_version=10 opsets {onnx=23}
graph @main(%input_ids : tensor<b x s x i64>, %position_ids : tensor<b x s x i64>) {
  const %t : tensor<2x2xf32> [1.0, 2.0, 3.0, 4.0]
  const %p : tensor<7x2xf32> [1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 2.0, 2.0, 1.0, 1.0, 3.0, 0.5, 0.5, 2.0]
  %e = onnx.Gather(%t, %input_ids)
  %a = onnx.Gather(%p, %position_ids)
  %x = onnx.Add(%e, %a)
  %logits = onnx.Attention(%x, %x, %x) {is_causal=1, q_num_heads=1, kv_num_heads=1}
  return %logits
}
";
    std::fs::write(&path, text).unwrap();
    let found = json(&[&path, "--ids", "1,0,1,1", "--max-new-tokens", "50"]);
    assert_eq!((found["tokens"].as_array().unwrap().len(), &found["ended"]), (4, &"context".into()));
    let ran = qcc(&["generate", &path, "--ids", "1,0,1,1"]);
    assert!(ran.stderr.contains("ended at the model's context of 7 positions"), "{}", ran.stderr);
    let found = message(&[&path, "--ids", "1,0,1,1,0,0,0,0"]);
    assert!(found.contains("the prompt has 8 tokens, the model a context of 7"), "{found}");
}

#[test]
fn bench() {
    let dir = Folder::new();
    let quantized = dir.path("q.onnx");
    ok(&[MODEL, "--pass", "rtn,pack-int4", "-o", &quantized]);
    let given = ["bench", &quantized, "--against", MODEL, "--tokens", "eval_ids.npy", "--rows", "1"];
    let given = args(&[&given, &["--prefill", "4,8", "--decode", "3"]]);
    let found: Value = serde_json::from_str(&ok(&args(&[&given, &["--json"]]))).unwrap();
    let (own, other) = (&found["models"][0], &found["models"][1]);
    let eval =
        ok(&["eval", &quantized, "--tokens", "eval_ids.npy", "--rows", "1", "--baseline", MODEL, "--json"]);
    let eval: Value = serde_json::from_str(&eval).unwrap();
    assert_eq!(own["scores"], eval);
    assert_eq!(other["scores"]["perplexity"], eval["baseline_perplexity"]);
    assert!(own["weight_bytes"].as_u64() < other["weight_bytes"].as_u64());
    assert!(own["bytes_per_token"].as_u64() < own["weight_bytes"].as_u64());
    assert_eq!(own["prefill"].as_array().unwrap().len(), 2);
    let positive = ["decode_seconds", "tokens_per_second", "share_of_bandwidth"];
    assert!(positive.iter().all(|name| own[name].as_f64().is_some_and(|x| x > 0.0)), "{own}");
    let text = ok(&given);
    for word in ["perplexity", "KL divergence", "prefill of 8", "decode", "share of bandwidth", "GB/s"] {
        assert!(text.contains(word), "{text}");
    }
    let ran = qcc(&["bench", MODEL, "--prefill", "0"]);
    assert!(ran.code == 2 && ran.stderr.contains("--prefill 0"), "{}", ran.stderr);
}
