use super::*;
use crate::awq::Awq;
use crate::rtn::Rtn;
use crate::testing::NoData;
use crate::{CalibSink, Env, Pass, Progress, Report, Scratch, Settings};
use bytes::Bytes;
use dialects::exec::Executor;
use dialects::ir::interp::Interpreter;
use dialects::ir::parse::parse;
use dialects::ir::{Value, infer};
use dialects::ops::{Item, Ops};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Everything in memory.
#[derive(Default)]
struct World {
    ops: Ops,
    kept: Mutex<BTreeMap<Key, Vec<u8>>>,
    /// How many values each run over the data was asked for.
    asked: Mutex<Vec<usize>>,
}

impl Store for World {
    fn get(&self, key: &Key) -> Option<Vec<u8>> {
        self.kept.lock().unwrap().get(key).cloned()
    }

    fn put(&self, key: &Key, value: &[u8]) -> Result<(), PassError> {
        self.kept.lock().unwrap().insert(*key, value.to_vec());
        Ok(())
    }
}

impl Env for World {
    fn calibrate(&self, m: &Module, wanted: &[Value], sink: &mut CalibSink) -> Result<(), PassError> {
        self.asked.lock().unwrap().push(wanted.len());
        let exec = Interpreter::new(self.ops.clone());
        let prepared = exec.prepare(m, wanted)?;
        let x = Tensor::new(&[64, 16], noise(64 * 16, 1)).unwrap();
        Ok(prepared.run(&[(m.regions[m.top].args[0], Item::from(x))], sink)?)
    }

    fn scratch(&self, len: usize) -> Result<Box<dyn Scratch>, PassError> {
        NoData.scratch(len)
    }

    fn progress(&self, task: &str, total: u64) -> Box<dyn Progress> {
        NoData.progress(task, total)
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }
}

/// Numbers between -1 and 1, the same for a seed.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Two products of one normalized value, whose gain is uneven, and a product behind each: three groups for awq.
fn model() -> Module {
    let list = |n, seed| {
        let numbers: Vec<String> = noise(n, seed).iter().map(|x| format!("{x:?}")).collect();
        numbers.join(", ")
    };
    let text = format!(
        "module ir_version=10 opsets {{onnx=23}}
graph @main(%x : tensor<64x16xf32>) {{
  const %g : tensor<16xf32> [1, 1, 1, 1, 9, 1, 1, 1, 1, 0.1, 1, 1, 30, 1, 1, 1]
  const %a : tensor<16x16xf32> [{}]
  const %b : tensor<16x16xf32> [{}]
  const %c : tensor<16x8xf32> [{}]
  const %d : tensor<16x8xf32> [{}]
  %n = onnx.RMSNormalization(%x, %g) {{axis=-1}} : tensor<64x16xf32>
  %p = onnx.MatMul(%n, %a) : tensor<64x16xf32>
  %q = onnx.MatMul(%n, %b) : tensor<64x16xf32>
  %y = onnx.MatMul(%p, %c) : tensor<64x8xf32>
  %z = onnx.MatMul(%q, %d) : tensor<64x8xf32>
  return %y, %z
}}
",
        list(256, 2),
        list(256, 3),
        list(128, 4),
        list(128, 5)
    );
    let mut m = parse(&text).unwrap().module;
    infer::infer(&mut m, &Ops::standard());
    m
}

struct Ran {
    content: Key,
    report: String,
    warnings: Vec<String>,
    /// Values that each run over the data was asked for.
    asked: Vec<usize>,
}

fn run(pass: &dyn Pass, mut m: Module, world: &World, settings: &Settings) -> Result<Ran, PassError> {
    world.asked.lock().unwrap().clear();
    let mut report = Report::default();
    pass.run(&mut m, &mut PassCx { ops: &world.ops, env: world, settings, rest: &[], report: &mut report })?;
    let warnings = std::mem::take(&mut report.warnings);
    let report = serde_json::to_string(&(report.weights, report.notes)).unwrap();
    Ok(Ran { content: content(&m), report, warnings, asked: world.asked.lock().unwrap().clone() })
}

fn world() -> World {
    World { ops: Ops::standard(), ..World::default() }
}

fn awq() -> Awq {
    Awq { options: crate::quantize::GridOptions { group: 16, ..Default::default() }, ..Awq::default() }
}

fn rtn() -> Rtn {
    Rtn { grid: crate::quantize::GridOptions { group: 16, ..Default::default() }, ..Rtn::default() }
}

/// Whatever was finished before: the same model and report, and only what is missing is gathered.
#[test]
fn what_is_finished_is_not_done_again() {
    let settings = Settings::default();
    let fresh = run(&awq(), model(), &world(), &settings).unwrap();
    assert!(fresh.report.contains("scale in") && fresh.asked == [3], "{} {:?}", fresh.report, fresh.asked);
    let all = world();
    run(&awq(), model(), &all, &settings).unwrap();
    let entries: Vec<(Key, Vec<u8>)> = all.kept.lock().unwrap().clone().into_iter().collect();
    assert_eq!(entries.len(), 3);
    for subset in 0..8usize {
        let some = world();
        let taken = entries.iter().enumerate().filter(|(i, _)| subset >> i & 1 == 1);
        some.kept.lock().unwrap().extend(taken.map(|(_, e)| e.clone()));
        let again = run(&awq(), model(), &some, &settings).unwrap();
        assert_eq!((again.content, &again.report), (fresh.content, &fresh.report), "subset {subset}");
        let missing = 3 - subset.count_ones() as usize;
        assert_eq!(again.asked, if missing == 0 { vec![] } else { vec![missing] });
        assert!(again.warnings.is_empty());
        assert_eq!(some.kept.lock().unwrap().len(), 3);
    }
}

/// A result is found for what it was made of, and nothing else.
#[test]
fn keys_are_of_content() {
    let settings = Settings::default();
    let world = world();
    let keys = |pass: &dyn Pass, m: Module, settings: &Settings| -> Vec<Key> {
        world.kept.lock().unwrap().clear();
        run(pass, m, &world, settings).unwrap();
        world.kept.lock().unwrap().keys().copied().collect()
    };
    let mut seen = keys(&rtn(), model(), &settings);
    assert_eq!(seen.len(), 4);
    assert_eq!(keys(&rtn(), model(), &settings), seen);
    let mut new = |keys: Vec<Key>| {
        assert!(keys.len() >= 3 && keys.iter().all(|k| !seen.contains(k)));
        seen.extend(keys);
    };
    new(keys(&awq(), model(), &settings));
    new(keys(&Awq { grid: 19, ..awq() }, model(), &settings));
    new(keys(&rtn(), model(), &Settings { f16_scales: true, ..Settings::default() }));
    let mut other = rtn();
    other.grid.symmetric = true;
    new(keys(&other, model(), &settings));
    // One bit of the gain, which is no weight, but which the activations depend on.
    let mut m = model();
    let g = m.consts.keys().find(|&c| m.consts[c].count() == 16).unwrap();
    let mut bytes = m.consts[g].read().unwrap().to_vec();
    bytes[0] ^= 1;
    m.consts[g] = ConstData::new(Elem::F32, vec![16], Arc::new(Bytes::from(bytes))).unwrap();
    new(keys(&awq(), m, &settings));
}

/// Bytes that are not what was kept: never a panic, and what does not fit is made anew.
#[test]
fn damaged_content_is_harmless() {
    let settings = Settings::default();
    let world = world();
    let fresh = run(&rtn(), model(), &world, &settings).unwrap();
    let (key, whole) = world.kept.lock().unwrap().first_key_value().map(|(k, v)| (*k, v.clone())).unwrap();
    let with = |bytes: Vec<u8>| {
        world.kept.lock().unwrap().insert(key, bytes);
        run(&rtn(), model(), &world, &settings).unwrap()
    };
    assert!(with(whole.clone()).warnings.is_empty());
    for at in 0..whole.len() {
        let cut = with(whole[..at].to_vec());
        assert_eq!((cut.content, cut.warnings.len()), (fresh.content, 1), "cut after {at} bytes");
        let mut bytes = whole.clone();
        bytes[at] = !bytes[at];
        with(bytes);
    }
    // The result of another weight, whole as it is.
    let other = world.kept.lock().unwrap().values().find(|v| v.len() != whole.len()).cloned().unwrap();
    let ran = with(other);
    assert_eq!(ran.content, fresh.content);
    assert!(ran.warnings[0].contains("does not fit"), "{:?}", ran.warnings);
}

#[test]
fn sizes_are_checked_before_anything_is_made() {
    let part = |bits, group_size, n, k| Part {
        n,
        k,
        bits,
        group_size,
        codes: ByteBuf::new(),
        scale_type: "f32".into(),
        scales: ByteBuf::new(),
        zero_points: None,
    };
    assert_eq!(part(4, 32, 3, 40).lens(), Ok((3 * 2 * 16, 6)));
    assert_eq!(part(3, 16, 1, 16).lens(), Ok((8, 1)));
    for (bits, group, n, k) in [
        (1, 32, 1, 1),
        (9, 32, 1, 1),
        (4, 0, 1, 1),
        (4, usize::MAX, 1, 1),
        (4, 16, usize::MAX, usize::MAX),
        (8, usize::MAX / 16, 17, 1),
    ] {
        assert!(part(bits, group, n, k).lens().is_err(), "{bits} {group} {n} {k}");
    }
    assert_eq!(part(4, 16, 1, 1).scale_type(), Ok(Elem::F32));
    assert!(Part { scale_type: "i64".into(), ..part(4, 16, 1, 1) }.scale_type().is_err());
}
