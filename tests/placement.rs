//! Scale placement on real models: every export of one model must give the same answer, and folding a scale within
//! the freedom it was given must keep the model's outputs.

use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::{Module, Op, OpBuilder, Value, infer};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use passes::eqsat::{self, Placement};
use passes::linear;
use std::path::PathBuf;

fn models() -> Option<PathBuf> {
    let dir = std::env::var_os("QCC_MODELS").map(PathBuf::from);
    if dir.is_none() {
        eprintln!("skipped: QCC_MODELS is not set");
    }
    dir
}

fn load(path: &std::path::Path) -> Module {
    let imported = qcc::onnx::import::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut m = imported.module;
    infer::infer(&mut m, &Ops::standard());
    m
}

/// The linears of a model by the value they read, in program order.
fn groups(m: &Module) -> Vec<(Value, Vec<Op>)> {
    let mut out: Vec<(Value, Vec<Op>)> = Vec::new();
    for l in linear::linears(m) {
        match out.iter_mut().find(|(v, _)| *v == l.x) {
            Some((_, ops)) => ops.push(l.op),
            None => out.push((l.x, vec![l.op])),
        }
    }
    out
}

fn placements(m: &Module) -> Vec<(Value, Vec<Op>, Placement)> {
    let ops = Ops::standard();
    groups(m)
        .into_iter()
        .map(|(v, readers)| {
            let p = eqsat::place(m, &ops, v, &readers);
            (v, readers, p)
        })
        .collect()
}

const STORIES: [&str; 5] = [
    "stories260k/model.onnx",
    "stories260k/external/model.onnx",
    "stories260k/dynamo_sdpa_op18.onnx",
    "stories260k/dynamo_eager_op18.onnx",
    "stories260k/dynamo_sdpa_op23.onnx",
];

#[test]
fn every_export_of_one_model_gives_the_same_places() {
    let Some(dir) = models() else { return };
    // Query heads 2i and 2i + 1 share a key-value head of width 8.
    let tied: Vec<u32> = (0..64).map(|c| c / 16 * 8 + c % 8).collect();
    for name in STORIES {
        let m = load(&dir.join(name));
        let start = std::time::Instant::now();
        let found = placements(&m);
        eprintln!("{name}: {} groups in {:?}", found.len(), start.elapsed());
        for (v, readers, p) in &found {
            let nodes: Vec<String> = readers.iter().map(|&o| m.ops[o].loc.to_string()).collect();
            eprintln!(
                "  {} -> {nodes:?}: {:?} {} {:?} {:?}",
                m.value_label(*v),
                p.sites,
                match &p.freedom {
                    None => "free".to_string(),
                    Some(c) => format!("{} classes", c.iter().max().unwrap() + 1),
                },
                p.why_not,
                p.limits
            );
        }
        assert_eq!(found.len(), 21, "{name}");
        for (i, (_, readers, p)) in found.iter().enumerate() {
            assert_eq!(p.why_not, None, "{name} group {i}");
            assert_eq!(p.limits, Vec::<String>::new(), "{name} group {i}");
            assert_eq!(p.sites.len(), 1, "{name} group {i}: {:?}", p.sites);
            let (count, freedom) = match i {
                20 => (1, None),
                _ => [(3, None), (1, Some(tied.clone())), (2, None), (1, None)][i % 4].clone(),
            };
            assert_eq!(readers.len(), count, "{name} group {i}");
            assert_eq!(p.freedom, freedom, "{name} group {i}");
        }
    }
}

/// Numbers from 0.5 to 1.5 that look random.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 24) as f32 + 0.5
    };
    (0..n).map(|_| next()).collect()
}

fn logits(m: &Module, rows: usize, seq: usize) -> Vec<f32> {
    let inputs: Vec<(Value, Item)> = m.regions[m.top]
        .args
        .iter()
        .filter(|v| m.const_of(**v).is_none())
        .map(|&v| {
            let ids = if m.values[v].name.contains("mask") {
                vec![1; rows * seq]
            } else {
                (0..(rows * seq) as i64).map(|i| i * 7 % 3).collect()
            };
            (v, Tensor::new(&[rows, seq], ids).unwrap().into())
        })
        .collect();
    let exec = Interpreter::new(Ops::standard());
    let items = run_once(&exec, m, &inputs, &m.regions[m.top].results).unwrap();
    items[0].tensor().unwrap().to_f32().unwrap().into_owned()
}

/// Multiplies the input of every group that has a place by random numbers, divides its weights' view of it by the same,
/// and folds. The outputs must stay.
#[test]
fn folding_keeps_the_outputs() {
    let Some(dir) = models() else { return };
    let ops = Ops::standard();
    for name in STORIES.iter().chain(&[
        "nano_sort_gpt/legacy_sdpa_op17.onnx",
        "nano_sort_gpt/dynamo_sdpa_op18.onnx",
        "tinylm/model.onnx",
    ]) {
        let mut m = load(&dir.join(name));
        let before = logits(&m, 1, 9);
        let count = m.live_ops().len();
        let (mut folded, mut left) = (0, 0);
        for (seed, (v, readers)) in groups(&m).into_iter().enumerate().collect::<Vec<_>>().into_iter().rev() {
            let p = eqsat::place(&m, &ops, v, &readers);
            if p.why_not.is_some() {
                left += 1;
                eprintln!("{name}: {} stays: {:?}", m.value_label(v), p.why_not);
                continue;
            }
            let k = m.ty(v).dims().unwrap().last().unwrap().known().unwrap() as usize;
            let free = numbers(k, seed as u64 + 1);
            let s: Vec<f32> = match &p.freedom {
                None => free,
                Some(c) => c.iter().map(|&c| free[c as usize]).collect(),
            };
            // The readers take the inverse: x * s * (1 / s).
            let inverse: Vec<f32> = s.iter().map(|x| 1.0 / x).collect();
            let top = m.top;
            let s = m.add_const(top, "", Tensor::new(&[k], s).unwrap().to_const());
            let inverse = m.add_const(top, "", Tensor::new(&[k], inverse).unwrap().to_const());
            let ty = m.ty(v).clone();
            let mul = |x, s| OpBuilder::new("onnx.Mul", &"mul".into()).operands([x, s]).result(ty.clone());
            // Folding may have moved the readers.
            let order = &m.regions[top].ops;
            let place = |op: &Op| order.iter().position(|o| o == op);
            let reader = *readers.iter().min_by_key(|op| place(op)).unwrap();
            let first = m.insert_before(reader, mul(v, s));
            let product = m.ops[first].result(0).unwrap();
            // An opaque op between keeps the second product from undoing the first.
            let max = OpBuilder::new("onnx.Max", &"max".into()).operands([product]).result(ty.clone());
            let max = m.insert_after(first, max);
            let shown = m.ops[max].result(0).unwrap();
            let second = m.insert_after(max, mul(shown, inverse));
            let back = m.ops[second].result(0).unwrap();
            for &op in &readers {
                for o in m.ops[op].operands.iter_mut().flatten().filter(|o| **o == v) {
                    *o = back;
                }
            }
            let outcome = eqsat::fold_window(&mut m, &ops, product).unwrap();
            assert!(outcome.absorbed, "{name}: {outcome:?}");
            let order = dialects::ir::graph::topological(&m, m.top).unwrap();
            assert_eq!(order, m.regions[m.top].ops, "definitions come before uses");
            for op in m.live_ops() {
                let dead = |v: &&Value| m.values[**v].def == dialects::ir::ValueDef::Erased;
                let dead = m.ops[op].operands.iter().flatten().find(dead);
                assert_eq!(dead, None, "{} {:?} reads what was erased", m.ops[op].name, m.ops[op].loc);
            }
            folded += 1;
        }
        eprintln!("{name}: {folded} folded, {left} left");
        assert!(folded > 0);
        assert!(m.live_ops().len() <= count + 2 * folded, "a product was left");
        let after = logits(&m, 1, 9);
        let most = before.iter().fold(0f32, |a, x| a.max(x.abs()));
        let wrong = before.iter().zip(&after).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
        eprintln!("{name}: outputs differ by {wrong} of {most}");
        assert!(wrong <= 2e-5 * most, "{name}: {wrong} of {most}");
    }
}
