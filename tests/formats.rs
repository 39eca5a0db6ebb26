//! `qcc run`, `qcc diff` and `qcc convert`, from outside, on the small model of `testdata` and on models made here.

#[path = "common/program.rs"]
mod program;

use npyz::npz::NpzArchive;
use program::{Folder, MODEL, ok, qcc};
use std::path::Path;

/// Runs the program, which must fail with bad input or a wrong command line, and gives what it says.
fn refused(args: &[&str]) -> String {
    let ran = qcc(args);
    assert!(
        ran.code == 1 || ran.code == 2,
        "qcc {}: exit {}\n{}{}",
        args.join(" "),
        ran.code,
        ran.stdout,
        ran.stderr
    );
    ran.stderr.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Folder {
    /// A module of text, written to a file.
    fn module(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// A `.npy` file of format version 1.
    fn npy(&self, name: &str, descr: &str, shape: &str, bytes: &[u8]) -> String {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend((header.len() as u16).to_le_bytes());
        file.extend(header.as_bytes());
        file.extend(bytes);
        std::fs::write(self.path(name), file).unwrap();
        self.path(name)
    }
}

/// `y = x + x`, in a type that numpy lacks.
const DOUBLE: &str = "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<2xbf16>) {
  %y = onnx.Add(%x, %x) : tensor<2xbf16>
  return %y
}
";

#[test]
fn a_run_gives_what_another_runtime_reads() {
    let to = Folder::new();
    let out = to.path("out.npz");
    ok(&["run", MODEL, "-o", &out, "-q"]);
    let mut npz = NpzArchive::open(&out).unwrap();
    let logits = npz.by_name("logits").unwrap().expect("the model's output");
    assert_eq!(logits.shape(), [1, 128, 4096]);
    let values = logits.into_vec::<f32>().unwrap();
    let json: serde_json::Value = serde_json::from_str(&ok(&["run", MODEL, "--json"])).unwrap();
    let max: f64 = values.iter().copied().fold(f32::MIN, f32::max).into();
    let said = json["values"][0]["max"].as_f64().unwrap();
    assert!((said - max).abs() < 1e-9, "the same inputs are made again: {said}, {max}");
    assert_eq!(json["values"][0]["name"], "logits");
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() {
    let to = Folder::new();
    let ids = to.npy("ids.npy", "<i8", "(1, 2)", &[0; 16]);
    let wrong = to.npy("wrong.npy", "<f4", "(1, 2)", &[0; 8]);
    let given = |name: &str, file: &str| format!("{name}={file}");
    for (inputs, says) in [
        (vec![given("input_idz", &ids)], "did you mean \"input_ids\"?"),
        (vec![given("input_ids", &ids)], "no value for the input \"attention_mask\""),
        (vec![given("input_ids", &ids), given("input_ids", &ids)], "is given twice"),
        (vec![given("input_ids", &wrong)], "found f32 [1, 2]"),
        (vec![given("input_ids", "ids.txt")], "neither .npy nor .pb"),
        (vec![given("input_ids", "none.npy")], "none.npy"),
    ] {
        let args: Vec<&str> =
            ["run", MODEL].into_iter().chain(inputs.iter().flat_map(|i| ["--input", i])).collect();
        let said = refused(&args);
        assert!(said.contains(says), "{inputs:?}: {said}");
    }
}

#[test]
fn an_output_is_never_what_was_read() {
    let to = Folder::new();
    let model = to.module("double.qir", DOUBLE);
    let x = to.npy("x.npy", "<f4", "(2,)", &[0; 8]);
    let same = to.path("same.npz");
    ok(&["run", &model, "--input", &format!("x={x}"), "-o", &same]);
    let before = std::fs::read(&same).unwrap();
    assert!(refused(&["run", &model, "--input", &same, "-o", &same]).contains("is also an input"));
    assert!(
        refused(&["run", &model, "--input", &format!("x={x}"), "-o", &model]).contains("is also an input")
    );
    assert!(
        refused(&["run", &model, "--input", &format!("x={x}"), "-o", &to.path("y.npy")]).contains(".npz")
    );
    assert_eq!(std::fs::read(&same).unwrap(), before);
    assert!(refused(&["run", &model, "--input", &x]).contains("which input is it?"));
}

#[test]
fn values_of_other_types_are_said_to_be_that() {
    let to = Folder::new();
    let (a, b) = (to.module("a.qir", DOUBLE), to.module("b.qir", &DOUBLE.replace("bf16", "f16")));
    let x = to.npy("x.npy", "<f4", "(2,)", &[0; 8]);
    let other = DOUBLE.replace("onnx.Add(%x, %x) : tensor<2xbf16>", "onnx.Cast(%x) {to=1} : tensor<2xf32>");
    let other = to.module("c.qir", &other);
    let given = format!("x={x}");
    assert!(refused(&["diff", &a, &b, "--input", &given]).contains("has type tensor<2xf16>"));
    let said = ok(&["diff", &a, &other, "--input", &given]);
    assert!(said.contains("bf16 [2] against f32 [2]"), "{said}");
    assert!(refused(&["diff", &a, &a, "--tolerance", "nan"]).contains("at least 0"));
}

#[test]
fn types_that_numpy_lacks_are_widened_and_narrowed_again() {
    let to = Folder::new();
    let model = to.module("double.qir", DOUBLE);
    let bytes: Vec<u8> = [1.5f32, -3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let x = to.npy("x.npy", "<f4", "(2,)", &bytes);
    let out = to.path("out.npz");
    ok(&["run", &model, "--input", &format!("x={x}"), "-o", &out]);
    let mut npz = NpzArchive::open(&out).unwrap();
    assert_eq!(npz.by_name("y").unwrap().unwrap().into_vec::<f32>().unwrap(), [3.0, -6.0]);
}

#[test]
fn a_difference_is_traced_to_its_first_node() {
    let to = Folder::new();
    let q = to.path("q.onnx");
    ok(&[MODEL, "--pass", "rtn{only=[node_linear_3]},pack-int4", "-o", &q, "-q"]);
    let json: serde_json::Value = serde_json::from_str(&ok(&["diff", MODEL, &q, "--json"])).unwrap();
    assert_eq!(json["first"], "linear_3");
    assert!(json["outputs"][0]["relative"].as_f64().unwrap() > 1e-4);
    let same: serde_json::Value = serde_json::from_str(&ok(&["diff", MODEL, MODEL, "--json"])).unwrap();
    assert_eq!((&same["first"], &same["only_in_b"]), (&serde_json::Value::Null, &0.into()));
}

#[test]
fn a_model_goes_through_every_format_unchanged() {
    let to = Folder::new();
    let (qir, back, split, whole) =
        (to.path("m.qir"), to.path("back.onnx"), to.path("split.onnx"), to.path("whole.onnx"));
    for (from, into, flag) in [
        (MODEL, &qir, None),
        (&qir, &back, None),
        (&back, &split, Some("--external-data")),
        (&split, &whole, None),
    ] {
        let args: Vec<&str> = ["convert", from, "-o", into].into_iter().chain(flag).collect();
        ok(&args);
    }
    assert!(Path::new(&to.path("split.onnx.data")).exists());
    let bytes = |path: &str| std::fs::read(path).unwrap();
    assert_eq!(bytes(&back), bytes(&whole));
    // The original's fields stand in another order.
    let original = bytes(&format!("{}/testdata/models/{MODEL}", env!("CARGO_MANIFEST_DIR")));
    assert_eq!(original.len(), bytes(&back).len());
    let json: serde_json::Value = serde_json::from_str(&ok(&["diff", MODEL, &whole, "--json"])).unwrap();
    assert_eq!((&json["only_in_a"], &json["first"]), (&0.into(), &serde_json::Value::Null));
}

#[test]
fn an_opset_is_raised_and_never_lowered() {
    let to = Folder::new();
    let out = to.path("m.onnx");
    ok(&["convert", MODEL, "-o", &out, "--opset", "23"]);
    let json: serde_json::Value = serde_json::from_str(&ok(&["inspect", &out, "--json"])).unwrap();
    assert_eq!(json["opsets"]["onnx"], 23);
    assert!(refused(&["convert", MODEL, "-o", &out, "--opset", "7"]).contains("is not lowered"));
    assert!(refused(&["convert", MODEL, "-o", &to.path("n.onnx"), "--opset", "99"]).contains("99"));
    assert!(!Path::new(&to.path("n.onnx")).exists());
}
