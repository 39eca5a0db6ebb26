//! `rotate` on real models: the outputs stay, and no product with a rotation is left.

use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::{Module, Value, infer};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use passes::Settings;
use qcc::driver::{self, Options};
use qcc::env::DriverEnv;
use qcc::pipeline::Pipeline;
use qcc::term::Term;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn models() -> Option<PathBuf> {
    let dir = std::env::var_os("QCC_MODELS").map(PathBuf::from);
    if dir.is_none() {
        eprintln!("skipped: QCC_MODELS is not set");
    }
    dir
}

fn load(path: &Path) -> Module {
    let imported = qcc::onnx::import::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut m = imported.module;
    infer::infer(&mut m, &Ops::standard());
    m
}

fn rotate(m: &mut Module, pipeline: &str) -> Vec<String> {
    let registry = qcc::registry();
    let env = DriverEnv::without_data(registry.ops(), Term::new(true));
    let pipeline = Pipeline::parse(pipeline, &registry, &[], &[]).unwrap();
    let options = Options { settings: Settings::default(), ..Options::default() };
    let outcome = driver::run(m, &pipeline, &registry, &env, &options).unwrap_or_else(|e| panic!("{e}"));
    outcome.report.notes
}

fn outputs(m: &Module, shape: [usize; 2]) -> Vec<f32> {
    let count = shape[0] * shape[1];
    let ids = |v: &Value| match m.values[*v].name.contains("mask") {
        true => vec![1; count],
        false => (0..count as i64).map(|i| i * 7 % 3).collect(),
    };
    let args = m.regions[m.top].args.iter().filter(|v| m.const_of(**v).is_none());
    let inputs: Vec<(Value, Item)> =
        args.map(|v| (*v, Tensor::new(&shape, ids(v)).unwrap().into())).collect();
    let items = run_once(&Interpreter::new(Ops::standard()), m, &inputs, &m.regions[m.top].results).unwrap();
    items[0].tensor().unwrap().to_f32().unwrap().into_owned()
}

fn histogram(m: &Module) -> BTreeMap<String, usize> {
    let mut h = BTreeMap::new();
    m.live_ops().into_iter().for_each(|op| *h.entry(m.ops[op].name.to_string()).or_default() += 1);
    h
}

/// Rotates a model and checks that its outputs stay. Returns the histograms before and after, and the notes.
fn keeps(path: &Path, pipeline: &str) -> [BTreeMap<String, usize>; 2] {
    let mut m = load(path);
    let name = path.display();
    let (before, ops) = (outputs(&m, [1, 9]), histogram(&m));
    let notes = rotate(&mut m, pipeline);
    eprintln!("{name}: {notes:?}");
    assert!(notes.iter().any(|n| n.contains("; 0 products with a rotation stay")), "{name}: {notes:?}");
    let after = outputs(&m, [1, 9]);
    let most = before.iter().fold(0f32, |a, x| a.max(x.abs()));
    let wrong = before.iter().zip(&after).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
    eprintln!("{name}: outputs differ by {wrong} of {most}");
    assert!(wrong <= 1e-4 * most, "{name}: {wrong} of {most}");
    [ops, histogram(&m)]
}

#[test]
fn every_export_of_one_model_is_rotated() {
    let Some(dir) = models() else { return };
    for name in [
        "stories260k/model.onnx",
        "stories260k/external/model.onnx",
        "stories260k/dynamo_sdpa_op18.onnx",
        "stories260k/dynamo_eager_op18.onnx",
        "stories260k/dynamo_sdpa_op23.onnx",
    ] {
        for pipeline in ["rotate", "rotate{kind=random, seed=5}"] {
            let [before, after] = keeps(&dir.join(name), pipeline);
            // The products are those that were there; long norms lose their gains.
            assert_eq!(before["onnx.MatMul"], after["onnx.MatMul"], "{name}");
            assert!(after["onnx.Mul"] <= before["onnx.Mul"], "{name}");
        }
    }
}

#[test]
fn the_model_of_the_tests_is_rotated() {
    let [before, after] = keeps(Path::new("testdata/models/tinylm.onnx"), "rotate");
    assert_eq!(before["onnx.MatMul"], after["onnx.MatMul"]);
    // The gain of each norm is gone.
    assert!(after["onnx.Mul"] < before["onnx.Mul"]);
}

#[test]
fn layer_norms_lose_their_mean() {
    let Some(dir) = models() else { return };
    for name in ["nano_sort_gpt/legacy_sdpa_op17.onnx", "nano_sort_gpt/dynamo_sdpa_op18.onnx"] {
        let [before, after] = keeps(&dir.join(name), "rotate");
        assert!(!after.contains_key("onnx.LayerNormalization"), "{name}: {after:?}");
        // Means are in the weights: as many reductions are left as there were norms, those of the squares.
        let count = |h: &BTreeMap<String, usize>, op: &str| h.get(op).copied().unwrap_or(0);
        let norms = count(&before, "onnx.LayerNormalization");
        assert!(norms > 0, "{name}");
        assert_eq!(count(&after, "onnx.ReduceMean"), count(&before, "onnx.ReduceMean") + norms, "{name}");
        assert_eq!(count(&after, "onnx.Sub"), count(&before, "onnx.Sub"), "{name}");
    }
}
