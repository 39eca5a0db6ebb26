//! The tests in `testdata/*.qir`, and the harness itself: what it must notice, it notices.

use qcc::filetest::{run_dir, run_text};

#[test]
fn verifier() {
    let cases = run_dir("testdata/verify", &qcc::registry()).unwrap_or_else(|e| panic!("{e}"));
    assert!(cases >= 18, "{cases}");
}

#[test]
fn passes() {
    run_dir("testdata/passes", &qcc::registry()).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn kernels() {
    let cases = run_dir("testdata/kernels", &qcc::registry()).unwrap_or_else(|e| panic!("{e}"));
    assert!(cases >= 8, "{cases}");
}

const HEAD: &str = "module ir_version=10 opsets {onnx=21}\n";

fn failure(text: &str) -> (usize, String) {
    let mut failures = run_text(text, &qcc::registry(), false).expect_err("the case is wrong");
    assert_eq!(failures.len(), 1, "{failures:?}");
    failures.remove(0)
}

#[test]
fn the_harness_notices() {
    let graph = "graph @g(%x : tensor<2xf32>) {\n  %y = onnx.Neg(%x)\n  return %y\n}\n";
    // No expected output yet, and another one.
    let (line, message) = failure(&format!("; RUN:\n{HEAD}{graph}"));
    assert!(line == 1 && message.contains("%y = onnx.Neg(%x) : tensor<2xf32>"), "{message}");
    assert!(message.contains("QCC_BLESS=1 cargo test -p qcc --test filetests"), "{message}");
    let (_, message) = failure(&format!("; RUN:\n{HEAD}{graph};; module\n"));
    assert!(message.contains("-module\n") && message.contains("+  return %y\n"), "{message}");
    // An error that is not expected, one that is not found, and one in another line.
    let wrong = graph.replace("(%x)", "(%z)");
    let (line, message) = failure(&format!("{HEAD}{wrong}"));
    assert!(line == 3 && message.contains("nothing defines"), "{message}");
    let (line, message) = failure(&format!("; error: gone\n{HEAD}{graph}"));
    assert!(line == 1 && message.contains("found nothing"), "{message}");
    let (line, _) =
        failure(&format!("{HEAD}{}", wrong.replace("return %y", "return %y ; error: nothing defines")));
    assert_eq!(line, 4);
    // A pass that is not there, and a setting.
    let (_, message) = failure(&format!("; RUN: no-such-pass\n{HEAD}{graph}"));
    assert!(message.contains("no-such-pass"), "{message}");
    let (_, message) = failure(&format!("; RUN: rtn\n; settings: nonsense\n{HEAD}{graph}"));
    assert!(message.contains("nonsense"), "{message}");
}

#[test]
fn blessing_writes_what_came_out_and_keeps_the_rest() {
    let text = format!(
        "; words\n\n; --- one\n; RUN:\n{HEAD}graph @g(%x : tensor<2xf32>) {{\n  %y = onnx.Neg(%x)\n  return %y\n}}\n;; old\n\n; --- two\n{HEAD}graph @g() {{\n  return\n}}\n"
    );
    let (count, blessed) = run_text(&text, &qcc::registry(), true).unwrap();
    assert_eq!(count, 2);
    let expected = format!(
        "}}\n;; {HEAD};;\n;; graph @g(%x : tensor<2xf32>) {{\n;;   %y = onnx.Neg(%x) : tensor<2xf32>\n;;   return %y\n;; }}\n\n; --- two\n"
    );
    assert!(blessed.starts_with("; words\n\n; --- one\n") && blessed.contains(&expected), "{blessed}");
    assert_eq!(run_text(&blessed, &qcc::registry(), false).unwrap(), (2, blessed.clone()));
}
