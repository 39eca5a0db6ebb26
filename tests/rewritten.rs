//! Snapshots of rewritten graphs of real models, as `--emit qir` prints them.
//!
//! Hashes of weights that went through floating-point sums are left out: they are the same on every machine of one kind,
//! but not on every kind. Round to nearest has no such sums, and its hashes stand.

use std::path::PathBuf;
use std::process::Command;

fn qir(model: &PathBuf, args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_qcc"))
        .arg(model)
        .args(args)
        .args(["--emit", "qir", "--quiet"])
        .output()
        .expect("the binary runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("the text form is UTF-8")
}

/// A file of the models folder; `None`, said aloud, where there is no such folder.
fn model(name: &str) -> Option<PathBuf> {
    match std::env::var_os("QCC_MODELS") {
        Some(dir) => Some(PathBuf::from(dir).join(name)),
        None => {
            eprintln!("skipped: QCC_MODELS is not set");
            None
        }
    }
}

#[test]
fn tinylm_rounded_and_packed() {
    let tinylm = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/models/tinylm.onnx"));
    insta::assert_snapshot!(qir(&tinylm, &["--pass", "rtn,pack-int4"]));
}

#[test]
fn tinylm_with_a_cache() {
    let tinylm = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/models/tinylm.onnx"));
    insta::assert_snapshot!(qir(&tinylm, &["--pass", "canonicalize,fuse,add-kv-cache"]));
}

#[test]
fn stories_scaled_and_packed() {
    let Some(stories) = model("stories260k/dynamo_sdpa_op23.onnx") else { return };
    let calib = stories.with_file_name("calib_ids.npy");
    let calib = calib.to_str().expect("a path that is text");
    let text = qir(&stories, &["--pass", "awq,pack-int4", "--calib", calib, "--calib-samples", "8"]);
    insta::with_settings!({filters => vec![(r"#blake3:[0-9a-f]{64}", "#")]}, {
        insta::assert_snapshot!(text);
    });
}

#[test]
fn sort_gpt_in_standard_onnx() {
    let Some(gpt) = model("nano_sort_gpt/dynamo_sdpa_op18.onnx") else { return };
    insta::assert_snapshot!(qir(&gpt, &["--pass", "rtn,pack-qdq"]));
}
