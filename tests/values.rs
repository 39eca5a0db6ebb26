//! Every value of the models, as the interpreter computes it, against ONNX Runtime; and inference against both.
//!
//! `QCC_MODEL_VALUES` names the file that `scripts/model_values.py` writes; without it the tests are skipped.

mod common;

use bytes::Bytes;
use common::check_facts;
use dialects::exec::run_once;
use dialects::ir::infer::infer;
use dialects::ir::interp::Interpreter;
use dialects::ir::{ConstData, Dim, Elem, Module, Value};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// What ONNX Runtime says of one value.
struct Reference {
    name: String,
    elem: Elem,
    shape: Vec<usize>,
    norm: f64,
    samples: Vec<f64>,
}

/// One run of one model.
struct Run {
    model: String,
    inputs: Vec<(String, Tensor)>,
    values: Vec<Reference>,
}

fn runs() -> Option<Vec<Run>> {
    let Ok(path) = std::env::var("QCC_MODEL_VALUES") else {
        eprintln!("skipped: QCC_MODEL_VALUES names no file");
        return None;
    };
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut runs: Vec<Run> = Vec::new();
    for line in text.lines() {
        let f: Vec<&str> = line.split('\t').collect();
        let elem = || Elem::from_name(f[2]).unwrap();
        let dims =
            || -> Vec<usize> { f[3].split('x').filter(|d| *d != ".").map(|d| d.parse().unwrap()).collect() };
        match f[0] {
            "model" => runs.push(Run { model: f[1].into(), inputs: Vec::new(), values: Vec::new() }),
            "input" => {
                let hex = f[4];
                let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
                let bytes: Bytes = (0..hex.len() / 2).map(byte).collect();
                let dims = dims().into_iter().map(|d| d as u64).collect();
                let t = Tensor::from_const(&ConstData::new(elem(), dims, Arc::new(bytes)).unwrap()).unwrap();
                runs.last_mut().unwrap().inputs.push((f[1].into(), t));
            }
            "value" => runs.last_mut().unwrap().values.push(Reference {
                name: f[1].into(),
                elem: elem(),
                shape: dims(),
                norm: f[4].parse().unwrap(),
                samples: f[5..].iter().map(|s| s.parse().unwrap()).collect(),
            }),
            other => panic!("not understood: {other}"),
        }
    }
    Some(runs)
}

fn load(model: &str) -> Module {
    let root = std::env::var("QCC_MODELS").expect("QCC_MODEL_VALUES needs QCC_MODELS");
    let mut m = qcc::onnx::import::read(&Path::new(&root).join(model)).unwrap().module;
    let found = infer(&mut m, &Ops::standard());
    assert!(found.is_empty(), "{model}: {found:?}");
    m
}

fn by_name(m: &Module) -> HashMap<&str, Value> {
    m.values.iter().map(|(v, data)| (&*data.name, v)).collect()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    match t.to_f32() {
        Ok(v) => v.iter().map(|&x| x.into()).collect(),
        Err(_) => t.to_i64().unwrap().iter().map(|&x| x as f64).collect(),
    }
}

/// Compares one value; `scale` is its root mean square.
fn compare(t: &Tensor, want: &Reference) -> Result<(), String> {
    if (t.elem(), t.shape()) != (want.elem, want.shape.as_slice()) {
        return Err(format!("is {} {:?}, expected {} {:?}", t.elem(), t.shape(), want.elem, want.shape));
    }
    let v = numbers(t);
    let norm = v.iter().filter(|x| x.is_finite()).map(|x| x * x).sum::<f64>().sqrt();
    let scale = want.norm / (v.len().max(1) as f64).sqrt();
    let close = |a: f64, b: f64, scale: f64| {
        a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-6 + 2e-4 * b.abs() + 2e-5 * scale
    };
    if !close(norm, want.norm, want.norm) {
        return Err(format!("has norm {norm}, expected {}", want.norm));
    }
    let n = v.len();
    let mut at: Vec<usize> = (0..8).map(|i| (i * n.saturating_sub(1)) / 7).collect();
    at.dedup();
    for (&i, &w) in at.iter().zip(&want.samples) {
        if !close(v[i], w, scale) {
            return Err(format!("[{i}] = {}, expected {w}", v[i]));
        }
    }
    Ok(())
}

#[test]
fn every_value_agrees_with_onnx_runtime_and_with_inference() {
    let Some(runs) = runs() else { return };
    let exec = Interpreter::new(Ops::standard());
    for run in &runs {
        let m = load(&run.model);
        let names = by_name(&m);
        let inputs: Vec<(Value, Item)> =
            run.inputs.iter().map(|(n, t)| (names[n.as_str()], t.clone().into())).collect();
        let wanted: Vec<Value> = run.values.iter().map(|r| names[r.name.as_str()]).collect();
        let got = run_once(&exec, &m, &inputs, &wanted).unwrap_or_else(|e| panic!("{}: {e}", run.model));
        let mut symbols = HashMap::new();
        let mut failures = Vec::new();
        for ((r, &v), item) in run.values.iter().zip(&wanted).zip(&got) {
            let t = item.tensor().unwrap();
            let result = compare(t, r).and_then(|()| check_facts(&m, v, t, &mut symbols));
            failures.extend(result.err().map(|e| format!("{}: {} {e}", run.model, r.name)));
        }
        assert!(
            failures.is_empty(),
            "{} values:\n{}",
            failures.len(),
            failures[..failures.len().min(8)].join("\n")
        );
        assert!(!run.values.is_empty());
    }
}

#[test]
fn what_does_not_depend_on_the_inputs_is_inferred() {
    let Some(runs) = runs() else { return };
    for pair in runs.windows(2).filter(|p| p[0].model == p[1].model && !p[0].model.contains("silero")) {
        let m = load(&pair[0].model);
        let names = by_name(&m);
        // A model that only runs at one batch size keeps that symbol the same.
        let mut same: Vec<&Dim> = Vec::new();
        for ((name, a), (_, b)) in pair[0].inputs.iter().zip(&pair[1].inputs) {
            let dims = m.values[names[name.as_str()]].ty.dims().unwrap();
            same.extend((0..dims.len()).filter(|&i| a.shape()[i] == b.shape()[i]).map(|i| &dims[i]));
        }
        let mut lost = Vec::new();
        for (a, b) in pair[0].values.iter().zip(&pair[1].values) {
            let ty = &m.values[names[a.name.as_str()]].ty;
            let Some(dims) = ty.dims() else {
                lost.push(format!("{}: {ty}", a.name));
                continue;
            };
            let fixed = (0..dims.len()).filter(|&i| {
                a.shape[i] == b.shape[i] && dims[i].known().is_none() && !same.contains(&&dims[i])
            });
            lost.extend(fixed.map(|i| format!("{}: dim {i} of {ty} is {}", a.name, a.shape[i])));
        }
        assert!(
            lost.is_empty(),
            "{}: {}\n{}",
            pair[0].model,
            lost.len(),
            lost[..lost.len().min(8)].join("\n")
        );
    }
}
