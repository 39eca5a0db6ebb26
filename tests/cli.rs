//! The command line, from outside: the built program is run on the small model of `testdata`.
//!
//! `cargo insta accept`, or `INSTA_UPDATE=always` around the test, takes over a changed text.

#[path = "common/program.rs"]
mod program;

use program::{Folder, MODEL, ok, qcc};
use std::fs;
use std::path::{Path, PathBuf};

impl Folder {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Compares with the stored text; times and paths of temporary folders do not count.
fn snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.add_filter(r"\d+ ms|\d+\.\d\d s\b", "[time]");
    settings.add_filter(r"(/[\w.-]+)+/\.tmp\w+", "[dir]");
    // The list of passes grows.
    settings.add_filter(r"known passes: [\w,\s│-]+\(", "known passes: [passes] (");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn help() {
    snapshot("help", &ok(&["--help"]));
    snapshot("help-inspect", &ok(&["inspect", "--help"]));
}

#[test]
fn inspect() {
    snapshot("inspect", &ok(&["inspect", MODEL]));
    let json: serde_json::Value = serde_json::from_str(&ok(&["inspect", MODEL, "--json"])).unwrap();
    let weights = json["weights"].as_array().unwrap();
    // 4 layers of 7, and the head; the embedding is a Gather.
    let can: Vec<_> = weights.iter().filter(|w| !w["k_n"].is_null()).collect();
    assert_eq!((weights.len(), can.len()), (30, 29));
    assert_eq!(json["opsets"]["onnx"], 18);
    assert_eq!(json["constants"]["f32"]["elements"], 1_311_893);
}

#[test]
fn a_report() {
    let dir = Folder::new();
    let out = dir.path("q.onnx");
    snapshot("report", &ok(&[MODEL, "--pass", "rtn,pack-int4", "-o", &out, "--stats"]));
    assert_eq!(dir.names(), ["q.onnx"]);

    let json = ok(&[MODEL, "--pass", "rtn{bits=8},pack-int4", "-o", &out, "--json", "--skip", "*lm_head*"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["weights"].as_array().unwrap().len(), 28);
    assert_eq!(
        json["recipe"],
        "rtn{bits=8, group=32, symmetric=false, narrow=false, clip=false, hqq=false, skip=[*lm_head*]},pack-int4"
    );
    // The head and the embedding hold the same constant: both match, and both were asked for.
    let float = json["float"].as_array().unwrap();
    assert_eq!(float.len(), 2);
    assert!(float.iter().all(|f| f["asked"] == true && f["weight"] == "m.lm_head.weight"));
    assert_eq!(json["totals"]["output_bytes"], fs::metadata(&out).unwrap().len());
    assert_eq!(json["totals"]["input_bytes"], 5_829_357);
}

#[test]
fn quiet_says_nothing() {
    let dir = Folder::new();
    let ran = qcc(&[MODEL, "--pass", "rtn,pack-int4", "-o", &dir.path("q.onnx"), "--quiet"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "", ""));
}

#[test]
fn wrong_command_lines() {
    let dir = Folder::new();
    let out = dir.path("out.onnx");
    let cases: &[(&str, &[&str])] = &[
        ("no-output", &[MODEL, "--pass", "rtn"]),
        ("unknown-pass", &[MODEL, "--pass", "rtn,pack-in4", "-o", &out]),
        ("unknown-option", &[MODEL, "--pass", "rtn{bit=4},pack-int4", "-o", &out]),
        ("wrong-kind", &[MODEL, "--pass", "rtn{bits=four}", "-o", &out]),
        ("refused-value", &[MODEL, "--pass", "rtn{bits=4, group=7},pack-int4", "-o", &out]),
        ("syntax", &[MODEL, "--pass", "rtn{bits=4", "-o", &out]),
        ("unknown-preset", &[MODEL, "--preset", "int4-atn", "-o", &out]),
        ("stop-after", &[MODEL, "--pass", "rtn", "--stop-after", "rnt", "-o", &out]),
        ("only-without-quantizer", &[MODEL, "--pass", "pack-int4", "--only", "*q*", "-o", &out]),
        ("json-and-ir", &[MODEL, "--emit", "qir", "--json"]),
    ];
    for (name, args) in cases {
        let ran = qcc(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{name}\n{}", ran.stderr);
        snapshot(&format!("wrong-{name}"), &ran.stderr);
    }
    assert_eq!(qcc(&["--no-such-flag"]).code, 2);
    assert_eq!(qcc(&[]).code, 2);
    assert_eq!(dir.names(), [""; 0]);
}

#[test]
fn bad_input() {
    let dir = Folder::new();
    let (out, noise, text) = (dir.path("out.onnx"), dir.path("noise.onnx"), dir.path("bad.qir"));
    fs::write(&noise, [7u8; 100]).unwrap();
    fs::write(
        &text,
        "module ir_version=10 opsets {onnx=18}\n\ngraph @g(%x : tensor<2xf33>) {\n  return %x\n}\n",
    )
    .unwrap();
    let cases: &[(&str, &[&str])] = &[
        ("no-file", &["none.onnx", "-o", &out]),
        ("not-onnx", &[&noise, "-o", &out]),
        ("not-qir", &[&text, "-o", &out]),
        ("nothing-to-pack", &[MODEL, "--pass", "pack-int4", "-o", &out]),
        ("nothing-to-quantize", &[MODEL, "--pass", "rtn", "--only", "nothing", "-o", &out]),
        ("strict", &[MODEL, "--pass", "rtn,pack-int4", "--strict", "-o", &out]),
        ("no-folder", &[MODEL, "-o", "none/out.onnx"]),
    ];
    for (name, args) in cases {
        let ran = qcc(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{name}\n{}", ran.stderr);
        snapshot(&format!("bad-{name}"), &ran.stderr);
    }
    assert_eq!(dir.names(), ["bad.qir", "noise.onnx"]);
}

/// A linear behind an op that nobody knows.
const UNKNOWN_OP: &str = "module ir_version=10 opsets {onnx=21, com.acme=1}
graph @main(%x : tensor<2x16xf32>) {
  const %w : tensor<16x1xf32> [-0.8, -0.7, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
  %h = com.acme.Foo(%x) : tensor<2x16xf32> @\"/layer3/foo\"
  %y = onnx.MatMul(%h, %w) : tensor<2x1xf32>
  return %y
}
";

#[test]
fn an_unknown_op_stops_only_what_must_run_it() {
    let dir = Folder::new();
    let (model, out) = (dir.path("unknown.qir"), dir.path("out.onnx"));
    fs::write(&model, UNKNOWN_OP).unwrap();
    let ran = qcc(&[&model, "--pass", "awq,pack-int4", "--calib", "random", "-o", &out]);
    assert_eq!(ran.code, 1);
    snapshot("bad-unknown-op", &ran.stderr);
    ok(&[&model, "--pass", "rtn{group=16},pack-int4", "-o", &out, "-q"]);
}

#[test]
fn a_failure_leaves_an_existing_output_alone() {
    let dir = Folder::new();
    let out = dir.path("out.onnx");
    fs::write(&out, "before").unwrap();
    assert_eq!(qcc(&[MODEL, "--pass", "rtn,pack-int4", "--strict", "-o", &out]).code, 1);
    assert_eq!(fs::read(&out).unwrap(), b"before");
    // An output that is the input, under whatever name.
    let (copy, link) = (dir.path("copy.onnx"), dir.path("link.onnx"));
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models").join(MODEL), &copy).unwrap();
    fs::hard_link(&copy, &link).unwrap();
    for output in [&copy, &link] {
        let ran = qcc(&[&copy, "--pass", "rtn,pack-int4", "-o", output]);
        assert_eq!(ran.code, 1);
        assert!(ran.stderr.contains("is also an input"), "{}", ran.stderr);
    }
    assert_eq!(fs::metadata(&copy).unwrap().len(), 5_829_357);
    assert_eq!(dir.names(), ["copy.onnx", "link.onnx", "out.onnx"]);
}

#[test]
fn strict_accepts_what_was_asked_for() {
    let dir = Folder::new();
    ok(&[MODEL, "--pass", "rtn,pack-int4", "--strict", "--skip", "Gather", "-o", &dir.path("q.onnx")]);
    assert_eq!(dir.names(), ["q.onnx"]);
}

#[test]
fn a_pass_that_may_do_nothing() {
    let ran = qcc(&[MODEL, "--pass", "pack-int4", "--allow-noop", "--dry-run"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

#[test]
fn output_does_not_depend_on_threads() {
    let dir = Folder::new();
    let run = |threads: &str| {
        let out = dir.path(threads);
        ok(&[MODEL, "--pass", "rtn,pack-int4", "-o", &out, "--emit", "onnx", "--threads", threads]);
        fs::read(out).unwrap()
    };
    let one = run("1");
    assert!(one == run("2") && one == run("7"));
}

#[test]
fn text_is_as_good_an_input() {
    let dir = Folder::new();
    let (qir, direct, through) = (dir.path("m.qir"), dir.path("direct.onnx"), dir.path("through.onnx"));
    ok(&[MODEL, "-o", &qir]);
    assert_eq!(dir.names(), ["m.qir", "m.safetensors"]);
    for (input, output) in [(MODEL, &direct), (qir.as_str(), &through)] {
        ok(&[input, "--pass", "rtn,pack-int4", "-o", output]);
    }
    assert!(fs::read(direct).unwrap() == fs::read(through).unwrap());

    // Without its weights it can be looked at, but not quantized.
    fs::remove_file(dir.path("m.safetensors")).unwrap();
    assert_eq!(ok(&[&qir, "--emit", "qir"]), ok(&[MODEL, "--emit", "qir"]));
    let ran = qcc(&[&qir, "--pass", "rtn,pack-int4", "--dry-run"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("without its weights"), "{}", ran.stderr);
}

#[test]
fn weights_that_are_others_are_noticed() {
    let dir = Folder::new();
    let qir = dir.path("m.qir");
    ok(&[MODEL, "-o", &qir]);
    let weights = dir.path("m.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    // The end of the file is the last weight of the last layer, or the head.
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let ran = qcc(&[&qir, "--pass", "rtn,pack-int4", "--dry-run"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("blake3") || ran.stderr.contains("hash"), "{}", ran.stderr);
}

#[test]
fn looking_into_passes() {
    let run = |flags: &[&str]| {
        let ran = qcc(&[&[MODEL, "--pass", "rtn,pack-int4", "--dry-run"], flags].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran
    };
    let shown = |flags: &[&str]| {
        let text = run(flags).stderr;
        let heads = text.lines().filter(|l| l.starts_with("; IR after")).map(str::to_owned);
        (heads.collect::<Vec<_>>(), text)
    };
    let (heads, text) = shown(&["--print-ir-after", "rtn"]);
    assert_eq!(heads, ["; IR after pass (1) rtn"]);
    assert!(text.contains("quant.dequantize(") && !text.contains("MatMulNBits"));
    let (heads, text) = shown(&["--print-ir-after=all"]);
    assert_eq!(heads, ["; IR after pass (1) rtn", "; IR after pass (2) pack-int4"]);
    assert!(text.contains("MatMulNBits"));
    let (heads, _) = shown(&["--print-ir-after=changed", "--allow-noop", "--stop-after=rtn"]);
    assert_eq!(heads, ["; IR after pass (1) rtn"]);

    let diff = run(&["--print-diff"]).stderr;
    assert!(diff.contains("--- before (1) rtn\n+++ after (1) rtn\n"), "{diff}");
    assert!(diff.lines().any(|l| l.starts_with("-  ") && l.contains("onnx.MatMul(")));
    assert!(diff.lines().any(|l| l.starts_with("+  ") && l.contains("com.microsoft.MatMulNBits(")));

    let bisect = run(&["--bisect-limit=1"]);
    assert_eq!(bisect.stderr, "BISECT: running pass (1) rtn\nBISECT: NOT running pass (2) pack-int4\n");
    assert_eq!(run(&["--bisect-limit=0"]).stderr.matches("NOT running").count(), 2);
}

#[test]
fn a_failing_pass_leaves_a_reproducer() {
    let dir = Folder::new();
    let repro = dir.path("repro");
    let args = [MODEL, "--pass", "rtn,pack-int4,pack-int4", "--dry-run", "--repro", &repro];
    let ran = qcc(&args);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("reproducer written"), "{}", ran.stderr);
    assert_eq!(fs::read_to_string(PathBuf::from(&repro).join("pipeline")).unwrap(), "pack-int4");
    let again = qcc(&[&format!("{repro}/input.qir"), "--pass", "pack-int4", "--dry-run"]);
    assert_eq!(again.code, 1);
    let error = |s: &str| s.split("pack-int4 matched nothing").nth(1).map(str::to_owned);
    assert!(error(&again.stderr).is_some());
    assert_eq!(
        error(&again.stderr),
        error(ran.stderr.split("reproducer").next().unwrap()).or(error(&ran.stderr))
    );
}

#[test]
fn a_reproducer_names_what_the_pipeline_needs() {
    let dir = Folder::new();
    let calib = dir.path("it's data.npy");
    fs::copy("testdata/models/calib_ids.npy", &calib).unwrap();
    let data = ["--calib", &calib, "--calib-samples", "3", "--seed", "7", "--tied", "shared"];
    let args = [MODEL, "--pass", "rtn,pack-int4,pack-int4", "--dry-run", "--repro", &dir.path("repro")];
    let ran = qcc(&[&args[..], &data].concat());
    assert_eq!(ran.code, 1);
    let quoted = calib.replace('\'', "'\\''");
    let wanted = format!("--dry-run --calib '{quoted}' --calib-samples 3 --seed 7 --tied shared\n");
    assert!(ran.stderr.contains(&wanted), "{}", ran.stderr);
}

/// A language model of `vocab` tokens, which gives logits from the token `from` of a row on.
fn small_lm(vocab: usize, from: usize) -> String {
    let numbers = vec!["0.5"; vocab * 2].join(", ");
    format!(
        "module ir_version=10 opsets {{onnx=21}}
graph @main(%input_ids : tensor<b x s x i64>) {{
  const %e : tensor<{vocab}x2xf32> [{numbers}]
  const %h : tensor<2x{vocab}xf32> [{numbers}]
  const %from : tensor<1xi64> [{from}]
  const %to : tensor<1xi64> [1000]
  const %axis : tensor<1xi64> [1]
  %x = onnx.Gather(%e, %input_ids) {{axis=0}} : tensor<b x s x 2xf32>
  %y = onnx.MatMul(%x, %h) : tensor<b x s x {vocab}xf32>
  %logits = onnx.Slice(%y, %from, %to, %axis) : tensor<b x ? x {vocab}xf32>
  return %logits
}}
"
    )
}

#[test]
fn what_is_wrong_with_a_baseline_names_it() {
    let dir = Folder::new();
    let write = |name: &str, text: String| {
        fs::write(dir.path(name), text).unwrap();
        dir.path(name)
    };
    let model = write("model.qir", small_lm(4, 0));
    // Two rows of three tokens, up to 3.
    let header = format!("{:<117}\n", "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3), }");
    let mut npy = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    npy.extend(header.as_bytes());
    npy.extend([0i64, 1, 2, 3, 2, 1].iter().flat_map(|x| x.to_le_bytes()));
    let tokens = dir.path("tokens.npy");
    fs::write(&tokens, npy).unwrap();
    let eval = |baseline: &str| qcc(&["eval", &model, "--tokens", &tokens, "--baseline", baseline]);
    assert_eq!(eval(&model).code, 0, "{}", eval(&model).stderr);
    for (name, vocab, from, what) in [
        ("few_words.qir", 3, 0, "expected token ids from 0 to 2"),
        ("short_rows.qir", 4, 1, "expected logits of shape"),
    ] {
        let ran = eval(&write(name, small_lm(vocab, from)));
        assert_eq!(ran.code, 1);
        // The message is broken into lines.
        let words: Vec<&str> = ran.stderr.split(['\n', ' ', '│', '×']).filter(|w| !w.is_empty()).collect();
        let message = words.join(" ");
        assert!(message.contains(what) && message.contains(name), "{message}");
        assert!(!message.contains("model.qir"), "{message}");
    }
}

#[test]
fn a_newer_operator_set_is_said() {
    let dir = Folder::new();
    let newer = |name: &str| {
        let text = small_lm(4, 0).replace("onnx=21", "onnx=99");
        fs::write(dir.path(name), text).unwrap();
        dir.path(name)
    };
    let (qir, onnx) = (newer("m.qir"), dir.path("m.onnx"));
    let said = |args: &[&str]| {
        let ran = qcc(args);
        assert!(ran.stderr.contains("opset 99 is newer than"), "{args:?}\n{}", ran.stderr);
    };
    said(&["convert", &qir, "-o", &onnx]);
    said(&["run", &onnx, "-o", &dir.path("y.npz")]);
    said(&["run", &qir, "-o", &dir.path("y.npz")]);
    said(&["diff", &qir, &onnx]);
    let report = ok(&[&onnx, "--pass", "dce", "--dry-run"]);
    assert!(report.contains("opset 99 is newer than"), "{report}");
}

#[test]
fn the_model_says_how_it_was_made() {
    let dir = Folder::new();
    let (first, second) = (dir.path("1.qir"), dir.path("2.onnx"));
    ok(&[MODEL, "--pass", "rtn", "-o", &first, "--scale-type", "f16"]);
    ok(&[&first, "--pass", "pack-int4", "-o", &second]);
    let json: serde_json::Value = serde_json::from_str(&ok(&["inspect", &second, "--json"])).unwrap();
    assert_eq!(
        json["recipe"],
        "rtn{bits=4, group=32, symmetric=false, narrow=false, clip=false, hqq=false} --scale-type f16; pack-int4"
    );
    // Without a pass, nothing is said, and nothing changes.
    ok(&[MODEL, "-o", &first]);
    let json: serde_json::Value = serde_json::from_str(&ok(&["inspect", &first, "--json"])).unwrap();
    assert!(json["recipe"].is_null());
}

#[test]
fn a_weight_that_two_passes_round_counts_once() {
    let report = |passes: &str| -> serde_json::Value {
        serde_json::from_str(&ok(&[MODEL, "--pass", passes, "--dry-run", "--json"])).unwrap()
    };
    let (once, twice) = (report("rtn,pack-int4"), report("f16-weights,rtn,pack-int4"));
    let sizes = |r: &serde_json::Value| -> Vec<_> {
        let weights = r["weights"].as_array().unwrap().iter();
        weights.map(|w| (w["node"].clone(), w["bytes_before"].clone(), w["bytes_after"].clone())).collect()
    };
    assert_eq!(sizes(&once), sizes(&twice));
    assert_eq!(twice["weights"][0]["notes"][0], "f16 of val_74");
}

#[test]
fn a_check_tells_wiring_from_rounding_and_leaves_no_trace() {
    let dir = Folder::new();
    let (plain, checked) = (dir.path("plain.onnx"), dir.path("checked.onnx"));
    ok(&[MODEL, "--pass", "rtn,pack-int4", "-o", &plain]);
    let json = ok(&[MODEL, "--pass", "rtn,pack-int4", "-o", &checked, "--check", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let check = |pass: usize, what: &str| json["passes"][pass]["check"][what].as_f64();
    assert!(check(0, "wiring").unwrap() < 1e-5 && check(1, "wiring").unwrap() < 1e-5, "{json}");
    let rounding = check(0, "quantization").unwrap();
    assert!(rounding > 1e-2 && rounding < 0.3, "{rounding}");
    assert_eq!((check(1, "quantization"), check(0, "activations")), (None, None));
    assert!(check(1, "activations").unwrap() > 1e-3);
    assert!(fs::read(plain).unwrap() == fs::read(checked).unwrap());
}

/// Few rows, and the weights of two blocks, so that it takes seconds.
const FEW: [&str; 8] =
    ["--calib", "calib_ids.npy", "--rows", "2", "--seq-len", "32", "--only", "*head*,val_24*,val_77*"];

fn json(args: &[&str]) -> serde_json::Value {
    let args = [args, &FEW, &["--json"]].concat();
    serde_json::from_str(&ok(&args)).unwrap()
}

fn number(v: &serde_json::Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("expected a number, found {v}"))
}

#[test]
fn sensitivity_of_every_weight() {
    let found = json(&["sensitivity", MODEL, "--pass", "rtn{bits=3, group=64}"]);
    let weights = found["weights"].as_array().unwrap();
    assert!(weights.len() > 5);
    let kl = |v: &serde_json::Value| number(&v["kl"]);
    let alone: Vec<f64> = weights.iter().map(|w| kl(&w["alone"])).collect();
    assert!(alone.is_sorted_by(|a, b| a >= b) && alone.iter().all(|&x| x > 0.0), "{alone:?}");
    let all = kl(&found["all"]["distance"]);
    assert!(alone.iter().all(|&x| x < all), "{all} {alone:?}");
    // What matters most alone is also what is missed most.
    assert!(kl(&weights[0]["all_but"]) < all);
    assert_eq!(found["all"]["distance"]["positions"], 2 * 31);
    for w in weights {
        let (k, n) = (number(&w["k"]), number(&w["n"]));
        // 3-bit codes in 4 bits, a scale of 4 bytes and half a byte of a zero point for each 64.
        assert_eq!(
            number(&w["bytes_quantized"]),
            k * n / 2.0 + (k / 64.0) * n * 4.0 + n * (k / 128.0).ceil()
        );
        // The head's float weight stays for the embedding.
        let head = w["weight"] == "m.lm_head.weight";
        let left = if head { 0.0 } else { 4.0 * k * n };
        assert_eq!(number(&w["bytes_saved"]), left - number(&w["bytes_quantized"]), "{w}");
        let forms: Vec<&str> =
            w["forms"].as_array().unwrap().iter().map(|f| f["form"].as_str().unwrap()).collect();
        assert!(forms.contains(&"default") && forms.contains(&"float"), "{forms:?}");
        assert!(w["forms"].as_array().unwrap().contains(&w["recommended"]));
    }
    let recommended = &found["recommended"];
    assert!(
        kl(&recommended["distance"]) <= all
            && number(&recommended["bytes"]) >= number(&found["all"]["bytes"])
    );

    // One weight alone is what the pass makes of it, as `qcc eval` sees it.
    let dir = Folder::new();
    let out = dir.path("q.onnx");
    let first = weights[0]["weight"].as_str().unwrap();
    ok(&[MODEL, "--pass", "rtn{bits=3, group=64},pack-int4", "--only", first, "-o", &out]);
    let rows = dir.path("rows.npy");
    cut_rows(&rows, 2, 32);
    let scores = ok(&["eval", &out, "--tokens", &rows, "--baseline", MODEL, "--exact", "--json"]);
    let scores: serde_json::Value = serde_json::from_str(&scores).unwrap();
    assert!((number(&scores["kl"]) / alone[0] - 1.0).abs() < 1e-3, "{scores} {}", alone[0]);
}

/// The first tokens of the first rows of the calibration data.
fn cut_rows(path: &str, rows: usize, len: usize) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models/calib_ids.npy");
    let bytes = fs::read(from).unwrap();
    let npy = npyz::NpyFile::new(&bytes[..]).unwrap();
    let width = npy.shape()[1] as usize;
    let ids: Vec<i64> = npy.into_vec().unwrap();
    use npyz::WriterBuilder;
    let options = npyz::WriteOptions::new().default_dtype().shape(&[rows as u64, len as u64]);
    let mut w = options.writer(fs::File::create(path).unwrap()).begin_nd().unwrap();
    ids.chunks(width).take(rows).for_each(|row| w.extend(row[..len].iter().copied()).unwrap());
    w.finish().unwrap();
}

#[test]
fn a_sweep() {
    let found = json(&["sweep", MODEL, "--bits", "3,4,8", "--group", "32,-1", "--symmetric", "false,true"]);
    let points = found["points"].as_array().unwrap();
    assert_eq!(points.len(), 12);
    let of = |bits: u64, group: i64, symmetric: bool| {
        let same =
            |p: &&serde_json::Value| p["bits"] == bits && p["group"] == group && p["symmetric"] == symmetric;
        points.iter().find(same).unwrap()
    };
    let (bytes, kl) =
        (|p: &serde_json::Value| number(&p["bytes"]), |p: &serde_json::Value| number(&p["distance"]["kl"]));
    assert!(points.is_sorted_by_key(bytes));
    // 3-bit codes take 4 bits; a row-wide group is written as blocks; fewer bits are worse in every way.
    assert_eq!(bytes(of(3, 32, false)), bytes(of(4, 32, false)));
    assert_eq!(number(&of(4, 32, false)["bits_per_weight"]), 5.125);
    assert_eq!(number(&of(4, 32, true)["bits_per_weight"]), 5.0);
    for measure in [kl, |p: &serde_json::Value| number(&p["rmse"])] {
        for symmetric in [false, true] {
            let of = |bits, group| measure(of(bits, group, symmetric));
            assert!(of(8, 32) < of(4, 32) && of(4, 32) < of(3, 32) && of(4, 32) < of(4, -1));
        }
    }
    let frontier: Vec<&serde_json::Value> = points.iter().filter(|p| p["frontier"] == true).collect();
    assert!(
        frontier.len() > 1 && frontier.windows(2).all(|w| kl(w[0]) > kl(w[1]) && bytes(w[0]) < bytes(w[1]))
    );
    for p in points.iter().filter(|p| p["frontier"] == false) {
        assert!(frontier.iter().any(|f| kl(f) <= kl(p) && bytes(f) <= bytes(p)), "{p}");
    }
}

/// Data of a model that is no language model; figures are not looked at, but the shape of the text is.
#[test]
fn measured_as_text() {
    let text = |args: &[&str]| {
        let text = ok(&[args, &FEW[..6], &["--only", "val_24*"]].concat());
        // Figures may differ in their last digits between processors.
        text.replace(|c: char| c.is_ascii_digit(), "0")
    };
    snapshot("sensitivity", &text(&["sensitivity", MODEL]));
    snapshot(
        "sweep",
        &text(&["sweep", MODEL, "--method", "rtn,awq", "--bits", "4", "--clip", "false,0.9,true"]),
    );
}

/// A channel of an activation that stands out, and an activation of which none does.
const STANDS_OUT: &str = "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<8x4xf32>) {
  const %c : tensor<4xf32> [1, 1, 1000, 1]
  const %w : tensor<4x2xf32> [0.5, 0.25, -0.5, 1, 0.125, -1, 0.75, 0.5]
  const %v : tensor<4x2xf32> [1, 2, 3, 4, 5, 6, 7, 8]
  %a = onnx.Mul(%x, %c) : tensor<8x4xf32>
  %y = onnx.MatMul(%a, %w) : tensor<8x2xf32>
  %z = onnx.MatMul(%a, %v) : tensor<8x2xf32>
  %u = onnx.MatMul(%x, %v) : tensor<8x2xf32>
  return %y, %z, %u
}
";

#[test]
fn what_stands_out() {
    let dir = Folder::new();
    let model = dir.path("outliers.qir");
    fs::write(&model, STANDS_OUT).unwrap();
    let args = ["outliers", &model, "--calib", "random", "--calib-samples", "16"];
    let found: serde_json::Value = serde_json::from_str(&ok(&[&args[..], &["--json"]].concat())).unwrap();
    let activations = found["activations"].as_array().unwrap();
    assert_eq!(activations.len(), 2);
    assert_eq!(
        (&activations[0]["value"], &activations[0]["outliers"][0]["channel"]),
        (&"a".into(), &2.into())
    );
    assert_eq!(activations[1]["outliers"], serde_json::json!([]));
    assert_eq!((number(&found["weights"][1]["max"]), number(&found["weights"][1]["k"])), (8.0, 4.0));
    // Figures may differ in their last digits between processors.
    snapshot("outliers", &ok(&args).replace(|c: char| c.is_ascii_digit(), "0"));
    // With nothing that stands out so far.
    let text = ok(&[&args[..], &["--channel", "1e9"]].concat());
    assert!(text.contains("nothing stands out"), "{text}");
    assert_eq!(qcc(&[&args[..], &["--sigma", "0"]].concat()).code, 2);
}

#[test]
fn what_cannot_be_measured() {
    let dir = Folder::new();
    let (plain, npz) = (dir.path("plain.qir"), dir.path("none.npz"));
    fs::write(&plain, UNKNOWN_OP).unwrap();
    let cases: &[(i32, &str, &[&str])] = &[
        (2, "unknown pass \"rtm\"", &["sensitivity", MODEL, "--pass", "rtm"]),
        (2, "pack-int4 quantizes nothing", &["sensitivity", MODEL, "--pass", "rtn,pack-int4"]),
        (2, "mixed chooses for all weights", &["sensitivity", MODEL, "--pass", "mixed{budget=4bits}"]),
        (2, "it rounds weights", &["sweep", MODEL, "--packer", "rtn"]),
        (
            2,
            "expected a multiple of 16",
            &["sweep", MODEL, "--group", "7", "--rows", "1", "--calib", "calib_ids.npy"],
        ),
        (1, "calibration data is needed", &["sensitivity", &plain]),
        (1, "calibration data is needed", &["outliers", &plain]),
        (1, "cannot read", &["sensitivity", MODEL, "--calib", &npz]),
        (1, "rtn matched nothing", &["sensitivity", MODEL, "--only", "none", "--calib", "calib_ids.npy"]),
    ];
    for (code, message, args) in cases {
        let ran = qcc(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (*code, ""), "{args:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains(message), "{args:?}: expected {message:?}\n{}", ran.stderr);
    }
}

#[test]
fn completions() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(&["--completions", shell]).contains("--list-passes"));
    }
}
