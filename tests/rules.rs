//! Rules as text, from outside: `qcc rules`, `--rules` and `qcc explain`.

#[path = "common/program.rs"]
mod program;

use program::{Folder, MODEL, ok, qcc};
use std::fs;

const GOOD: &str = r#"; a quotient written as a product
rewrite "divide" (onnx.Mul ?a (onnx.Reciprocal ?b)) => (onnx.Div ?a ?b) if float(?a)
rewrite "neg-neg" (onnx.Neg (onnx.Neg ?x)) => ?x with infinities
"#;

#[test]
fn rules_of_the_project_are_listed() {
    let text = ok(&["rules", "--list"]);
    for name in ["canonicalize", "scales", "fuse", "layer-norm", "scale-columns"] {
        assert!(text.contains(name), "{name}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&ok(&["rules", "--list", "--json"])).unwrap();
    let fuse: Vec<_> = json.as_array().unwrap().iter().filter(|r| r["set"] == "fuse").collect();
    assert!(fuse.len() >= 9 && fuse.iter().all(|r| r["text"].as_str().unwrap().starts_with("rewrite")));
}

#[test]
fn a_file_is_checked() {
    let dir = Folder::new();
    let path = dir.path("my.qrw");
    fs::write(&path, GOOD).unwrap();
    let text = ok(&["rules", "--check", &path]);
    assert!(text.contains("divide") && text.contains("holds on"), "{text}");

    fs::write(&path, r#"rewrite "wrong" (onnx.Sub ?a ?b) => (onnx.Sub ?b ?a)"#).unwrap();
    for args in [
        vec!["rules", "--check", &path],
        vec![MODEL, "--pass", "canonicalize", "--rules", &path, "--dry-run"],
    ] {
        let ran = qcc(&args);
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        assert!(ran.stderr.contains("is no equality") && ran.stderr.contains("left side"), "{}", ran.stderr);
    }

    fs::write(&path, r#"rewrite "a" (onnx.Mull ?a ?b) => ?a"#).unwrap();
    let ran = qcc(&["rules", "--check", &path]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("unknown op onnx.Mull") && ran.stderr.contains("did you mean onnx.Mul?"),
        "{}",
        ran.stderr
    );
}

#[test]
fn rules_of_a_user_are_applied_and_explained() {
    let dir = Folder::new();
    let (model, rules, out) = (dir.path("m.qir"), dir.path("my.qrw"), dir.path("out.qir"));
    fs::write(
        &model,
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<4xf32>) {
  %e = onnx.Neg(%x) loc(\"neg\")
  %z = onnx.Abs(%e) loc(\"abs\")
  return %z
}
",
    )
    .unwrap();
    fs::write(&rules, "rewrite \"abs-of-neg\" (onnx.Abs (onnx.Neg ?x)) => (onnx.Abs ?x) if float(?x)")
        .unwrap();
    ok(&[&model, "--pass", "canonicalize", "-o", &out]);
    assert!(fs::read_to_string(&out).unwrap().contains("onnx.Neg"));
    let dir2 = Folder::new();
    let out = dir2.path("out.qir");
    ok(&[&model, "--pass", "canonicalize", "--rules", &rules, "-o", &out]);
    let text = fs::read_to_string(&out).unwrap();
    assert!(!text.contains("onnx.Neg"), "{text}");

    let args = ["explain", &model, "--node", "abs", "--pass", "canonicalize", "--rules", &rules];
    let text = ok(&args);
    assert!(text.contains("by abs-of-neg") && text.contains("onnx.Abs"), "{text}");
    let ran = qcc(&["explain", &model, "--node", "nothing"]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);

    // A pipeline that uses no rules is asked for one that does.
    let ran = qcc(&[&model, "--pass", "dce", "--rules", &rules, "--dry-run"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("--rules is given"), "{}", ran.stderr);
}
