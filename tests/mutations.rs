//! Broken models: ONNX's own tests with attributes, operands, versions, inputs and bytes of the file changed at random.
//! What comes out does not matter, but nothing may panic, in import, inference, verification or evaluation.
//!
//! The cases are those of `tests/onnx_conformance`: `QCC_ONNX_TESTS` names their folder; without it the test is skipped.
//! `QCC_MUTATIONS` says how many times each is changed.

use dialects::exec::run_once;
use dialects::ir::infer::infer;
use dialects::ir::interp::Interpreter;
use dialects::ir::verify::verify;
use dialects::ir::{Attr, Elem, Module, Op, Type, Value};
use dialects::onnx::cast::convert;
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use qcc::onnx::{import, values};
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A xorshift generator.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n.max(1)
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    /// A number that breaks things, but makes no tensor that is large and legal.
    fn int(&mut self) -> i64 {
        self.pick(&[0, 1, -1, 2, 3, -3, 5, -9, 17, 1 << 40, -(1 << 40), i64::MAX, i64::MIN])
    }

    fn float(&mut self) -> f32 {
        self.pick(&[0.0, -1.0, 1.5, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, 1e-40])
    }

    fn elem(&mut self) -> Elem {
        let all: Vec<Elem> = Elem::all().collect();
        self.pick(&all)
    }
}

fn attribute(rng: &mut Rng, old: &Attr) -> Attr {
    match (rng.below(4), old) {
        (0, _) => match rng.below(5) {
            0 => Attr::Int(rng.int()),
            1 => Attr::Float(rng.float()),
            2 => Attr::from("nothing"),
            3 => Attr::Ints(vec![rng.int(), rng.int()]),
            _ => Attr::Floats(Vec::new()),
        },
        (_, Attr::Int(_)) => Attr::Int(rng.int()),
        (_, Attr::Float(_)) => Attr::Float(rng.float()),
        (_, Attr::Str(_)) => Attr::from("nothing"),
        (_, Attr::Ints(v)) => {
            let mut v = v.clone();
            match rng.below(3) {
                0 => v.push(rng.int()),
                1 => drop(v.pop()),
                _ => {
                    let i = rng.below(v.len());
                    v.get_mut(i).map(|slot| *slot = rng.int()).unwrap_or_default();
                }
            }
            Attr::Ints(v)
        }
        (_, Attr::Floats(v)) => Attr::Floats(v.iter().map(|_| rng.float()).collect()),
        (_, other) => other.clone(),
    }
}

fn tensor(rng: &mut Rng, t: &Tensor) -> Tensor {
    let changed = match rng.below(6) {
        0 => convert(t, rng.elem(), true).ok(),
        1 => {
            let mut shape = t.shape().to_vec();
            let i = rng.below(shape.len());
            shape.get_mut(i).map(|d| *d = 0).unwrap_or_default();
            Tensor::zeros(t.elem(), &shape).ok()
        }
        2 => Tensor::zeros(t.elem(), &[]).ok(),
        3 => t.reshape(&[&[1][..], t.shape()].concat()).ok(),
        4 => t.reshape(&[t.len()]).ok(),
        _ => {
            let v: Vec<i64> = (0..t.len()).map(|_| rng.int()).collect();
            let ints = Tensor::new(t.shape(), v).expect("as many as there were");
            convert(&ints, t.elem(), true).ok()
        }
    };
    changed.unwrap_or_else(|| t.clone())
}

fn mutate(rng: &mut Rng, m: &mut Module, inputs: &mut [(Value, Item)]) {
    let ops: Vec<Op> = m.live_ops();
    if ops.is_empty() {
        return;
    }
    let op = rng.pick(&ops);
    match rng.below(8) {
        0 | 1 => {
            let names: Vec<_> = m.ops[op].attrs.iter().map(|(n, a)| (n.clone(), a.clone())).collect();
            if !names.is_empty() {
                let (name, old) = rng.pick(&names);
                match rng.below(3) {
                    0 => drop(m.ops[op].attrs.remove(&name)),
                    _ => m.ops[op].attrs.set(name, attribute(rng, &old)),
                }
            }
        }
        2 => {
            let operands = &mut m.ops[op].operands;
            let (i, j) = (rng.below(operands.len()), rng.below(operands.len()));
            match rng.below(4) {
                _ if operands.is_empty() => {}
                0 => operands[i] = None,
                1 => operands.truncate(i),
                2 => operands.swap(i, j),
                _ => operands.push(operands[i]),
            }
        }
        3 => {
            let version = 1 + rng.below(28) as i64;
            m.opsets.insert("onnx".into(), version);
        }
        _ if inputs.is_empty() => {}
        _ => {
            let i = rng.below(inputs.len());
            let (v, item) = &mut inputs[i];
            if let Item::Tensor(t) = item {
                *item = tensor(rng, t).into();
            } else if rng.below(2) == 0 {
                *item = Item::Sequence(Vec::new());
            }
            let ty = item.ty();
            m.values[*v].ty = if rng.below(2) == 0 { Type::Unknown } else { ty };
            // What inference and the file said of other values no longer holds.
            for (_, value) in m.values.iter_mut() {
                if matches!(value.def, dialects::ir::ValueDef::Result(..)) {
                    value.ty = Type::Unknown;
                }
            }
        }
    }
}

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A file with a few bytes changed, or cut short, as far as it imports.
fn damaged(rng: &mut Rng, file: &[u8]) -> Option<Module> {
    let mut bytes = file.to_vec();
    for _ in 0..=rng.below(3) {
        let i = rng.below(bytes.len());
        match rng.below(4) {
            0 => bytes.truncate(i),
            1 => drop(bytes.drain(i..(i + 1 + rng.below(8)).min(file.len()).min(bytes.len()))),
            _ => bytes.get_mut(i).map(|b| *b = rng.next() as u8).unwrap_or_default(),
        }
        if bytes.is_empty() {
            break;
        }
    }
    Some(import::from_bytes(bytes.into()).ok()?.module)
}

fn load(folder: &Path) -> Option<(Module, Vec<(Value, Item)>)> {
    let m = import::read(&folder.join("model.onnx")).ok()?.module;
    let args = m.regions[m.top].args.iter().copied().filter(|&v| m.const_of(v).is_none());
    let mut inputs = Vec::new();
    for (i, v) in args.enumerate() {
        let path = folder.join(format!("test_data_set_0/input_{i}.pb"));
        inputs.push((v, values::read(&path, m.ty(v)).ok()?));
    }
    Some((m, inputs))
}

#[test]
fn nothing_panics_on_a_broken_model() {
    let Ok(root) = std::env::var("QCC_ONNX_TESTS") else {
        eprintln!("skipped: QCC_ONNX_TESTS names no folder");
        return;
    };
    let times: u64 = std::env::var("QCC_MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    let listed = std::fs::read_dir(Path::new(&root).join("node")).expect("generate.py wrote the cases");
    let mut folders: Vec<PathBuf> = listed.map(|e| e.expect("an entry of a folder").path()).collect();
    folders.sort();
    let (ops, before) = (Ops::standard(), std::panic::take_hook());
    std::panic::set_hook(Box::new(|info| PANIC.with_borrow_mut(|p| *p = info.to_string())));
    let (ran, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let try_one = |(i, folder): (usize, &PathBuf)| -> Vec<(String, String)> {
        let Some((m, inputs)) = load(folder) else { return Vec::new() };
        let file = std::fs::read(folder.join("model.onnx")).expect("the model was read before");
        let exec = Interpreter::new(ops.clone()).max_iterations(50);
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let mut panics = Vec::new();
        for n in 0..times {
            let (mut m, mut inputs) = (m.clone(), inputs.clone());
            let mut rng = Rng(0x9e37_79b9_7f4a_7c15 ^ (i as u64) << 20 ^ n << 8 ^ 1);
            for _ in 0..8 {
                rng.next();
            }
            for _ in 0..=rng.below(2) {
                mutate(&mut rng, &mut m, &mut inputs);
            }
            let result = catch_unwind(AssertUnwindSafe(|| {
                if let Some(mut m) = damaged(&mut rng, &file) {
                    infer(&mut m, &ops);
                    verify(&m, &ops);
                }
                infer(&mut m, &ops);
                verify(&m, &ops);
                let wanted = m.regions[m.top].results.clone();
                run_once(&exec, &m, &inputs, &wanted).is_ok()
            }));
            match result {
                Ok(true) => ran.fetch_add(1, Ordering::Relaxed),
                _ => refused.fetch_add(1, Ordering::Relaxed),
            };
            if result.is_err() {
                panics.push((PANIC.with_borrow(String::clone), format!("{name}, change {n}")));
            }
        }
        panics
    };
    let all: Vec<(String, String)> = folders.par_iter().enumerate().flat_map_iter(try_one).collect();
    std::panic::set_hook(before);
    let (ran, refused) = (ran.into_inner(), refused.into_inner());
    eprintln!("{ran} broken models ran, {refused} were refused");
    assert!(ran > 0 && refused > 0, "the changes break nothing, or everything");
    let mut by_place: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (what, case) in all {
        by_place.entry(what).or_default().push(case);
    }
    let listed: Vec<String> = by_place
        .iter()
        .map(|(what, cases)| format!("{} times: {what} ({})", cases.len(), cases[0]))
        .collect();
    assert!(listed.is_empty(), "{} panics:\n{}", listed.len(), listed.join("\n"));
}
