//! Rewrites that go wrong: after an exact pass, one thing that it made is changed as a mistake in a rule or a packer
//! would have it (a scale dropped, an axis off by one, operands swapped, a sign, groups moved by one). `--check` or the
//! verifier must notice, and name the pass and a node.
//!
//! The subjects are the cases of `testdata/passes/*.qir`, so that a new rule with a case of its own is covered.
//! `QCC_SURVIVORS=1` prints what was not noticed.

use dialects::ir::{Attr, ConstData, Dim, Module, Op, Value, infer, parse};
use dialects::tensor::{Data, Tensor};
use passes::{Changed, Exactness, Pass, PassCx, PassError, Settings, dce};
use qcc::calibrate::{Calibration, Options as Sampling};
use qcc::driver::{self, Options};
use qcc::env::DriverEnv;
use qcc::pipeline::Pipeline;
use qcc::term::Term;
use qcc::{Error, Registry};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Changes of one case that are tried at most, spread over all that there are.
const PER_CASE: usize = 60;

/// A pass that runs another one, and spoils what it made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Wrong {
    /// The other pass, with its options.
    pass: String,
    /// Which of all mistakes.
    mistake: usize,
}

/// What was done in the last run, and how many mistakes there are to choose from.
static DONE: Mutex<(String, usize)> = Mutex::new((String::new(), 0));

impl Pass for Wrong {
    fn name(&self) -> &'static str {
        "wrong"
    }

    fn summary(&self) -> &'static str {
        "does another pass's work, with a mistake"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn needs_calibration(&self) -> bool {
        Pipeline::parse(&self.pass, &qcc::registry(), &[], &[])
            .is_ok_and(|p| p.steps[0].pass.needs_calibration())
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let before = m.clone();
        let inner = Pipeline::parse(&self.pass, &qcc::registry(), &[], &[]).expect("it ran before");
        let changed = inner.steps[0].pass.run(m, cx)?;
        dce::sweep(m);
        infer::infer(m, cx.ops);
        let mistakes = mistakes(&before, m);
        let mut done = DONE.lock().unwrap();
        *done = (String::new(), mistakes.len());
        if let Some(mistake) = mistakes.get(self.mistake) {
            done.0 = mistake.make(m);
        }
        Ok(changed)
    }
}

/// A mistake, and where.
#[derive(Clone, Debug)]
enum Mistake {
    Swap(Op),
    Attr(Op, String, Attr),
    /// The op is left out.
    Skip(Op),
    /// A constant operand of an op has other elements.
    Const(Op, usize, &'static str, Tensor),
}

impl Mistake {
    /// Makes it, and says what it is.
    fn make(&self, m: &mut Module) -> String {
        let name = |m: &Module, op: Op| format!("{} {:?}", m.ops[op].name, &*m.ops[op].loc);
        match self {
            Mistake::Swap(op) => {
                m.ops[*op].operands.swap(0, 1);
                format!("operands of {} swapped", name(m, *op))
            }
            Mistake::Attr(op, key, value) => {
                m.ops[*op].attrs.set(key.as_str(), value.clone());
                format!("{key}={value:?} of {}", name(m, *op))
            }
            Mistake::Skip(op) => {
                let (x, y) = (m.ops[*op].operand(0).unwrap(), m.ops[*op].result(0).unwrap());
                let text = format!("{} left out", name(m, *op));
                m.replace_uses(y, x);
                text
            }
            Mistake::Const(op, index, what, tensor) => {
                let old = m.ops[*op].operand(*index).unwrap();
                let label = m.value_label(old);
                let konst = m.add_const(m.ops[*op].region, "", tensor.to_const());
                m.replace_uses(old, konst);
                format!("{what} of the constant {label:?} that {} reads", name(m, *op))
            }
        }
    }
}

/// Every mistake that can be made with what a pass made or changed.
fn mistakes(before: &Module, after: &Module) -> Vec<Mistake> {
    let old: std::collections::HashSet<Op> = before.live_ops().into_iter().collect();
    let mut out = Vec::new();
    for op in after.live_ops() {
        let data = &after.ops[op];
        let new = !old.contains(&op);
        let changed = |i: usize| {
            let now = data.operand(i);
            let fresh = |v: Value| match (before.values.is_valid(v), after.const_of(v)) {
                (true, Some(c)) => before.const_of(v) != Some(c),
                _ => true,
            };
            new && now.is_some_and(fresh)
                || !new
                    && (before.ops[op].operand(i) != now
                        || now.is_some_and(|v| after.const_of(v).is_some() && fresh(v)))
        };
        let any = new || (0..data.operands.len()).any(changed) || before.ops[op].attrs != data.attrs;
        if !any {
            continue;
        }
        let commutes = ["Add", "Mul", "And", "Or", "Max", "Min", "Equal"].contains(&data.name.op());
        if let (Some(a), Some(b)) = (data.operand(0), data.operand(1))
            && a != b
            && !commutes
        {
            out.push(Mistake::Swap(op));
        }
        for (key, value) in data.attrs.iter() {
            let other = match value {
                Attr::Int(i) => vec![Attr::Int(i + 1), Attr::Int(i - 1)],
                Attr::Float(x) => vec![Attr::Float(-x), Attr::Float(x * 2.0)],
                Attr::Ints(v) if v.len() > 1 => {
                    let mut v = v.clone();
                    v.rotate_left(1);
                    vec![Attr::Ints(v)]
                }
                _ => Vec::new(),
            };
            // A hint to runtimes changes no function, nor does the size of a block that holds all inputs anyway.
            let one_block =
                || after.ty(data.operand(1).unwrap()).dims().is_some_and(|d| d.contains(&Dim::Known(1)));
            if &**key == "accuracy_level"
                || &**key == "block_size" && data.is("onnx.DequantizeLinear") && one_block()
            {
                continue;
            }
            let other = other.into_iter().filter(|o| o != value);
            out.extend(other.map(|o| Mistake::Attr(op, key.to_string(), o)));
        }
        if let (Some(x), Some(y)) = (data.operand(0), data.result(0))
            && new
            && after.ty(x) == after.ty(y)
            && !data.is("onnx.Identity")
            && data.results.iter().flatten().count() == 1
        {
            out.push(Mistake::Skip(op));
        }
        for i in (0..data.operands.len()).filter(|&i| changed(i)) {
            let Some(konst) = data.operand(i).and_then(|v| after.const_of(v)) else { continue };
            out.extend(
                spoiled(&after.consts[konst]).into_iter().map(|(what, t)| Mistake::Const(op, i, what, t)),
            );
        }
    }
    out
}

/// Wrong forms of a constant.
fn spoiled(konst: &ConstData) -> Vec<(&'static str, Tensor)> {
    let Ok(t) = Tensor::from_const(konst) else { return Vec::new() };
    let shape = t.shape().to_vec();
    let mut out: Vec<(&'static str, Tensor)> = Vec::new();
    let moved = |axis: usize| -> Vec<usize> {
        let inner: usize = shape[axis + 1..].iter().product();
        let n = shape[axis];
        (0..shape.iter().product())
            .map(|i| {
                let at = i / inner % n;
                i - at * inner + (at + 1) % n * inner
            })
            .collect()
    };
    let mut orders: Vec<(&'static str, Vec<usize>)> =
        (0..shape.len()).filter(|&a| shape[a] > 1).map(|a| ("places moved by one", moved(a))).collect();
    if let [.., a, b] = shape[..]
        && a == b
        && a > 1
    {
        let order = (0..t.len()).map(|i| i / (a * b) * (a * b) + i % b * a + i / b % a).collect();
        orders.push(("transposed form", order));
    }
    if let Ok(x) = t.to_f32().map(|x| x.into_owned())
        && t.elem().is_float()
    {
        let mut make = |what, values: Vec<f32>| {
            out.extend(Tensor::from_f32(t.elem(), &shape, values).map(|t| (what, t)))
        };
        make("a dropped scale", vec![1.0; x.len()]);
        make("the sign", x.iter().map(|x| -x).collect());
        make("twice", x.iter().map(|x| x * 2.0).collect());
        orders.iter().for_each(|(what, order)| make(what, order.iter().map(|&i| x[i]).collect()));
    } else if let Data::U8(x) = t.data() {
        let mut make = |what, values: Vec<u8>| out.extend(Tensor::new(&shape, values).map(|t| (what, t)));
        make("nibbles swapped", x.iter().map(|x| x.rotate_left(4)).collect());
        make("one more", x.iter().map(|x| x.wrapping_add(1)).collect());
        orders.iter().for_each(|(what, order)| make(what, order.iter().map(|&i| x[i]).collect()));
    } else if let Data::I64(x) = t.data() {
        let mut make = |what, values: Vec<i64>| out.extend(Tensor::new(&shape, values).map(|t| (what, t)));
        make("one more", x.iter().map(|x| x + 1).collect());
        orders.iter().for_each(|(what, order)| make(what, order.iter().map(|&i| x[i]).collect()));
    }
    // What is the same as before is no mistake.
    let bytes = konst.read().ok();
    out.retain(|(_, t)| t.to_const().read().ok() != bytes);
    out
}

/// The cases of a file of tests whose last pass is exact: module and pipeline.
fn cases(text: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for case in text.split("\n; ---") {
        let run = case.lines().find_map(|l| l.strip_prefix("; RUN:"));
        let odd = case.contains("; error:") || case.contains("; settings:");
        let module: Vec<&str> = case.lines().skip_while(|l| !l.starts_with("module ")).collect();
        let module: Vec<&str> = module.into_iter().filter(|l| !l.starts_with(';')).collect();
        if let Some(run) = run.filter(|_| !odd && !module.is_empty()) {
            out.push((run.trim().to_string(), module.join("\n")));
        }
    }
    out
}

fn env(m: &Module, registry: &Registry) -> DriverEnv {
    let options = Sampling {
        calib: Some("random".into()),
        calib_samples: Some(4),
        seq_len: Some(3),
        ..Sampling::default()
    };
    let term = Term::new(true);
    let calibration = Calibration::open(&options, m, registry.ops(), &term).ok();
    DriverEnv { calibration, ..DriverEnv::without_data(registry.ops(), term) }
}

/// What came of one mistake.
enum Fate {
    /// Nothing to do in this case.
    Nothing,
    /// It was noticed; whether a node was named.
    Noticed(bool),
    Survived,
}

fn fate(m: &Module, pipeline: &Pipeline, registry: &Registry) -> Fate {
    let mut after = m.clone();
    let settings = Settings { allow_noop: true, ..Settings::default() };
    let options = Options { check: true, settings, ..Options::default() };
    let ran = driver::run(&mut after, pipeline, registry, &env(m, registry), &options);
    let made = !DONE.lock().unwrap().0.is_empty();
    match ran {
        _ if !made => Fate::Nothing,
        Ok(_) => Fate::Survived,
        Err(Error::Check { pass, message, .. }) => Fate::Noticed(pass == "wrong" && message.contains(" at ")),
        Err(Error::Broken { pass, found, .. }) => Fate::Noticed(pass == "wrong" && !found.is_empty()),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn wrong_rewrites_are_noticed() {
    let registry = qcc::registry().with::<Wrong>();
    let mut counts: BTreeMap<String, (usize, usize, usize)> = BTreeMap::new();
    let mut survivors = Vec::new();
    let mut files: Vec<_> =
        std::fs::read_dir("testdata/passes").unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for (run, module) in cases(&text) {
            let Ok(parsed) = Pipeline::parse(&run, &registry, &[], &[]) else { continue };
            let Some((last, first)) = parsed.steps.split_last() else { continue };
            if last.pass.exactness() != Exactness::Exact {
                continue;
            }
            let mut m = parse::parse(&module).unwrap().module;
            infer::infer(&mut m, registry.ops());
            let first: Vec<String> = first.iter().map(|s| s.normalized()).collect();
            let try_out = |mistake: usize| {
                let wrong = format!("wrong{{pass={:?}, mistake={mistake}}}", last.normalized());
                let pipeline = [first.clone(), vec![wrong]].concat().join(",");
                fate(&m, &Pipeline::parse(&pipeline, &registry, &[], &[]).unwrap(), &registry)
            };
            try_out(0);
            let all = DONE.lock().unwrap().1;
            let (noticed, named, made) = counts.entry(last.pass.name().to_string()).or_default();
            for i in (0..all).step_by(all.div_ceil(PER_CASE).max(1)) {
                match try_out(i) {
                    Fate::Nothing => continue,
                    Fate::Noticed(place) => {
                        *noticed += 1;
                        *named += usize::from(place);
                    }
                    Fate::Survived => {
                        let what = DONE.lock().unwrap().0.clone();
                        survivors.push(format!("{}: {run}: {what}", file.display()));
                    }
                }
                *made += 1;
            }
        }
    }
    let sum = |f: fn(&(usize, usize, usize)) -> usize| counts.values().map(f).sum::<usize>();
    let (noticed, named, made) = (sum(|c| c.0), sum(|c| c.1), sum(|c| c.2));
    println!("{noticed} of {made} mistakes noticed, {named} with a node: {counts:?}");
    if std::env::var_os("QCC_SURVIVORS").is_some() {
        survivors.iter().for_each(|s| println!("survived: {s}"));
    }
    assert!(made > 200, "only {made} mistakes: the test has lost its point");
    assert!(noticed * 100 >= made * 98, "{noticed} of {made} noticed; survivors:\n{}", survivors.join("\n"));
    assert!(named * 100 >= noticed * 98, "{named} of {noticed} with a node");
}
