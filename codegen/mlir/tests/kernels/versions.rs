//! Libraries with code for several processors: which version runs, that it gives what it gives alone, and what they share.

use crate::harness::targets;
use crate::models::{Here, model};
use codegen::plan::{ALIGN, Plan, plan};
use codegen::target::Arch;
use codegen::{Feature, Target, artifact};
use dialects::ir::Module;
use dialects::ops::Ops;
use runtime::{Model, ModelError, Tensor};

/// A packed product, whose weights are the same everywhere, and one of floats, whose weights are not.
fn products() -> Module {
    model(
        "module ir_version=10 opsets {com.microsoft=1, onnx=21}
graph @main(%x : tensor<s x 64xf32>) {
  const %codes : tensor<96x2x16xu8> random(1)
  const %scales : tensor<192xf32> random(2)
  const %w : tensor<96x48xf32> random(3)
  %p = com.microsoft.MatMulNBits(%x, %codes, %scales) {K=64, N=96, bits=4, block_size=32, accuracy_level=4}
  %y = onnx.MatMul(%p, %w)
  return %y
}
",
    )
}

fn planned(m: &Module, targets: &[Target]) -> Plan {
    plan(m, &Ops::standard(), targets, &|_| Some(9)).unwrap()
}

/// With its weights inside.
fn loaded(m: &Module, targets: &[Target]) -> Result<Model, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    let built = artifact::build(&planned(m, targets), &Here, dir.path(), None).unwrap();
    assert_eq!(built.code.len(), targets.len());
    Model::load(&built.library)
}

fn own() -> Arch {
    Target::native().arch
}

#[test]
fn the_best_version_that_a_processor_runs_is_taken() {
    let m = products();
    let all = Target::parse_list(Target::names(own())).unwrap();
    let best = targets().into_iter().max_by_key(|t| t.features.len()).unwrap();
    let (several, alone) = (loaded(&m, &all).unwrap(), loaded(&m, std::slice::from_ref(&best)).unwrap());
    assert_eq!(several.version().target, best.name);
    for rows in [0, 1, 9] {
        let x: Vec<f32> = (0..rows * 64).map(|i| (i % 37) as f32 - 18.0).collect();
        let x = [Tensor::f32(&[rows, 64], &x)];
        assert_eq!(several.run(&x).unwrap(), alone.run(&x).unwrap());
    }
}

#[test]
fn versions_share_the_weights_that_they_pack_alike() {
    let names = ["avx512-vnni", "x86-64-v3", "x86-64", "x86-64-v4"];
    let targets = Target::parse_list(names).unwrap();
    let m = products();
    let plan = planned(&m, &targets);
    let order: Vec<&str> = plan.versions.iter().map(|v| v.target.name.as_str()).collect();
    assert_eq!(order, ["x86-64", "x86-64-v3", "x86-64-v4", "avx512-vnni"]);
    let own: Vec<u64> = plan.versions.iter().map(|v| v.weights).collect();
    let panels = 96 * 48 * 4;
    // Panels are as wide as registers; 48 columns are whole panels of 8 and 16, not of 32.
    assert!(own[0] > panels && own[1] == panels && own[2] == panels / 48 * 64 && own[3] == 0, "{own:?}");
    assert_eq!(plan.weights, ALIGN + own.iter().sum::<u64>());
    assert_eq!(plan.arena, plan.versions.iter().map(|v| v.arena).max().unwrap());
    let mut kernels: Vec<&str> = plan.versions.iter().flat_map(|v| &v.kernels).map(|k| &*k.name).collect();
    let count = kernels.len();
    kernels.sort_unstable();
    kernels.dedup();
    assert_eq!(kernels.len(), count, "a name for two kernels");
}

/// What generated code finds out about this processor, feature by feature, against what Rust's library finds.
#[test]
fn features_are_found_by_generated_code() {
    let m = model(
        "module ir_version=10 opsets {onnx=21}
graph @main(%x : tensor<s x f32>) {
  %y = onnx.Abs(%x)
  return %y
}
",
    );
    let plain = Target::parse(if own() == Arch::X86_64 { "x86-64" } else { "aarch64" }).unwrap();
    let names: Vec<&str> = Target::names(own()).collect();
    let all = names.iter().flat_map(|n| Target::parse(n).unwrap().features);
    let all: std::collections::BTreeSet<Feature> = all.collect();
    assert!(all.len() >= 2);
    for feature in all {
        // Only the check counts on it: code for the feature alone is not run.
        let mut with = plain.clone();
        with.name = "with".into();
        with.features = [feature].into();
        let model = loaded(&m, &[plain.clone(), with.clone()]).unwrap();
        let there = Target::native().has(feature);
        assert_eq!(model.version().target == "with", there, "{feature:?}");
        if !there {
            let e = loaded(&m, &[with]).err().unwrap();
            assert!(
                matches!(&e, ModelError::Processor { expected, .. } if *expected == format!("{feature:?}"))
            );
        }
    }
}

#[test]
fn lists_of_targets() {
    let message = |names: &[&str]| Target::parse_list(names.iter().copied()).err().unwrap().to_string();
    assert!(message(&["x86-64", "z80"]).starts_with("unknown CPU \"z80\", expected one of: native, x86-64,"));
    assert_eq!(
        message(&["x86-64-v3", "x86-64-v3"]),
        "x86-64-v3 has the features of x86-64-v3, expected each CPU once"
    );
    let both = message(&["aarch64-i8mm", "x86-64-v3"]);
    assert_eq!(both, "aarch64-i8mm and x86-64-v3 are of different architectures, expected CPUs of one");
}
