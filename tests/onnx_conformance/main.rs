//! ONNX's own tests as the judge: every case that the pinned `onnx` package ships is imported, inferred, printed and
//! parsed back, evaluated, and compared with the outputs it comes with, in its own tolerance.
//!
//! `generate.py` writes the cases to the folder that `QCC_ONNX_TESTS` names; without it the test is skipped, and says so.
//! `cases.tsv` holds what each case came to when it was last recorded, and `table.md` the same by op. The test fails when
//! a case comes to something worse; `QCC_BLESS=1` records what there is now.

#[path = "../common/mod.rs"]
mod common;
mod table;

use common::check_facts;
use dialects::exec::{ExecError, run_once};
use dialects::ir::infer::infer;
use dialects::ir::interp::Interpreter;
use dialects::ir::print::{Style, print};
use dialects::ir::verify::verify;
use dialects::ir::{Dim, Elem, Module, Type, Value, bind, parse};
use dialects::onnx::cast::convert;
use dialects::ops::{Item, OpError, Ops};
use dialects::tensor::{Data, Tensor};
use qcc::onnx::{import, values};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use table::Row;

/// What a case comes to, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Passed,
    Unsupported,
    Wrong,
    Crashed,
}

const OUTCOMES: [(Outcome, &str); 4] = [
    (Outcome::Passed, "passed"),
    (Outcome::Unsupported, "unsupported"),
    (Outcome::Wrong, "wrong"),
    (Outcome::Crashed, "crashed"),
];

impl Outcome {
    fn word(self) -> &'static str {
        OUTCOMES.iter().find(|o| o.0 == self).expect("all are listed").1
    }

    fn from_word(word: &str) -> Outcome {
        OUTCOMES.iter().find(|o| o.1 == word).unwrap_or_else(|| panic!("no outcome is called {word}")).0
    }
}

/// One case of the folder.
struct Case {
    kind: String,
    name: String,
    /// The op it is about.
    subject: String,
    /// Every op in it.
    ops: Vec<String>,
    rtol: f64,
    atol: f64,
    folder: PathBuf,
}

/// Why a case does not pass.
struct Failure(Outcome, String);

fn wrong(what: impl ToString) -> Failure {
    Failure(Outcome::Wrong, what.to_string())
}

impl From<ExecError> for Failure {
    fn from(e: ExecError) -> Failure {
        match e {
            ExecError::UnknownOp { .. } | ExecError::Op { source: OpError::Unsupported(_), .. } => {
                Failure(Outcome::Unsupported, e.to_string())
            }
            _ => wrong(e),
        }
    }
}

fn cases(root: &Path) -> Vec<Case> {
    let path = root.join("cases.tsv");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let case = |line: &str| {
        let f: Vec<&str> = line.split('\t').collect();
        Case {
            kind: f[0].into(),
            name: f[1].into(),
            subject: f[2].into(),
            ops: f[5].split(',').map(str::to_owned).collect(),
            rtol: f[3].parse().unwrap(),
            atol: f[4].parse().unwrap(),
            folder: root.join(f[0]).join(f[1]),
        }
    };
    text.lines().map(case).collect()
}

/// The printed module, parsed back, with the tensors that the text only names.
fn through_text(m: &Module) -> Result<Module, Failure> {
    let text = print(m, Style::FULL);
    let mut parsed =
        parse::parse(&text).map_err(|e| wrong(format!("the printed text does not parse: {e}")))?.module;
    if print(&parsed, Style::FULL) != text {
        return Err(wrong("the printed text changes when it is parsed and printed again"));
    }
    let sources: HashMap<_, _> = m.consts.iter().filter_map(|(_, c)| Some((c.hash().ok()?, c))).collect();
    let missing = bind::bind(&mut parsed, |hash| sources.get(hash).map(|c| c.source.clone()));
    match missing.map_err(wrong)?.len() {
        0 => Ok(parsed),
        n => Err(wrong(format!("{n} tensors of the text are not found again"))),
    }
}

/// Reads `WORD_0.pb`, `WORD_1.pb`, ... as values of these types.
fn data(set: &Path, word: &str, m: &Module, of: &[Value]) -> Result<Vec<Item>, Failure> {
    let path = |i| set.join(format!("{word}_{i}.pb"));
    let there = of.iter().enumerate().take_while(|(i, _)| path(*i).exists());
    there.map(|(i, &v)| values::read(&path(i), m.ty(v)).map_err(wrong)).collect()
}

fn run(case: &Case) -> Result<(), Failure> {
    let ops = Ops::standard();
    let imported = import::read(&case.folder.join("model.onnx")).map_err(wrong)?;
    let mut m = through_text(&imported.module)?;
    let declared = m.clone();
    let complaints = [infer(&mut m, &ops), verify(&m, &ops)].concat();
    if let Some(first) = complaints.first() {
        return Err(wrong(format!("{first:?}")));
    }
    let top = &m.regions[m.top];
    let inputs: Vec<Value> = top.args.iter().copied().filter(|&v| m.const_of(v).is_none()).collect();
    // Every value whose type can be compared; the outputs last, in order.
    let mut wanted: Vec<Value> =
        m.regions[m.top].ops.iter().flat_map(|&op| m.ops[op].results.clone()).flatten().collect();
    let outputs = wanted.len()..wanted.len() + top.results.len();
    wanted.extend(&top.results);
    let exec = Interpreter::new(ops.clone());
    let mut sets = 0;
    for set in (0..).map(|n| case.folder.join(format!("test_data_set_{n}"))).take_while(|p| p.exists()) {
        sets += 1;
        let given = data(&set, "input", &declared, &inputs)?;
        let expected = data(&set, "output", &declared, &top.results)?;
        if expected.is_empty() {
            return Err(wrong("the case comes without outputs"));
        }
        let fed: Vec<(Value, Item)> = inputs.iter().copied().zip(given).collect();
        let got = run_once(&exec, &m, &fed, &wanted)?;
        for (i, (want, got)) in expected.iter().zip(&got[outputs.clone()]).enumerate() {
            compare(want, got, case).map_err(|e| wrong(format!("output {i}{e}")))?;
        }
        for loosen in LOOSENED {
            let mut loose = declared.clone();
            for &v in &inputs {
                loose.values[v].ty = loosen.1(v, &loose.values[v].ty);
                loose.values[v].declared = None;
            }
            for &v in &top.results {
                loose.values[v].ty = Type::Unknown;
                loose.values[v].declared = None;
            }
            let facts = check_inference(&mut loose, &ops, &wanted, &got);
            facts.map_err(|e| wrong(format!("inference from {} types: {e}", loosen.0)))?;
        }
    }
    if sets == 0 { Err(wrong("the case comes without data")) } else { Ok(()) }
}

/// How types of inputs are forgotten before inference is asked: it must stay true, and must not refuse.
type Loosen = fn(Value, &Type) -> Type;
const LOOSENED: [(&str, Loosen); 4] = [
    ("declared", |_, ty| ty.clone()),
    ("symbolic", |v, ty| match ty {
        Type::Tensor(t) => {
            let sizes = 0..t.dims.as_ref().map_or(0, Vec::len);
            Type::tensor(t.elem, sizes.map(|i| Dim::Sym(format!("{v}_{i}").into())))
        }
        other => other.clone(),
    }),
    ("unranked", |_, ty| ty.elem().map_or(ty.clone(), Type::unranked)),
    ("unknown", |_, _| Type::Unknown),
];

fn check_inference(m: &mut Module, ops: &Ops, values: &[Value], found: &[Item]) -> Result<(), String> {
    if let Some(first) = infer(m, ops).first() {
        return Err(format!("{first:?}"));
    }
    let mut symbols = HashMap::new();
    for (&v, item) in values.iter().zip(found) {
        let said = |e: String| format!("{:?} {e}", m.values[v].name);
        match item {
            Item::Tensor(t) => check_facts(m, v, t, &mut symbols).map_err(said)?,
            other => match (m.ty(v), other) {
                (Type::Unknown, _) | (Type::Sequence(_), Item::Sequence(_)) => {}
                (Type::Optional(_), Item::Optional(_)) => {}
                (ty, _) => return Err(said(format!("is inferred {ty}, but is {other:?}"))),
            },
        }
    }
    Ok(())
}

fn compare(want: &Item, got: &Item, case: &Case) -> Result<(), String> {
    match (want, got) {
        (Item::Tensor(want), Item::Tensor(got)) => compare_tensors(want, got, case),
        (Item::Sequence(want), Item::Sequence(got)) if want.len() == got.len() => {
            let mut pairs = want.iter().zip(got).enumerate();
            pairs.try_for_each(|(i, (w, g))| compare(w, g, case).map_err(|e| format!("[{i}]{e}")))
        }
        (Item::Optional(None), Item::Optional(None)) => Ok(()),
        (Item::Optional(Some(want)), Item::Optional(Some(got))) => compare(want, got, case),
        _ => Err(format!(" is {got:?}, expected {want:?}")),
    }
}

fn compare_tensors(want: &Tensor, got: &Tensor, case: &Case) -> Result<(), String> {
    if (got.elem(), got.shape()) != (want.elem(), want.shape()) {
        let (ge, gs, we, ws) = (got.elem(), got.shape(), want.elem(), want.shape());
        return Err(format!(" is {ge} {gs:?}, expected {we} {ws:?}"));
    }
    if let (Data::Str(w), Data::Str(g)) = (want.data(), got.data()) {
        return if w == g { Ok(()) } else { Err(format!(" is {g:?}, expected {w:?}")) };
    }
    // ONNX's own runner allows two units in the last place of a bfloat16.
    let rtol = if want.elem() == Elem::BF16 { case.rtol.max(2f64.powi(-6)) } else { case.rtol };
    let numbers = |t: &Tensor| -> Result<Vec<f64>, String> {
        let wide = convert(t, Elem::F64, false).map_err(|e| e.to_string())?;
        match wide.into_data() {
            Data::F64(v) => Ok(v),
            _ => Err(" does not widen to f64".to_string()),
        }
    };
    for (i, (g, w)) in numbers(got)?.into_iter().zip(numbers(want)?).enumerate() {
        let close = (g - w).abs() <= case.atol + rtol * w.abs() || g == w || (g.is_nan() && w.is_nan());
        if !close {
            return Err(format!(", element {i}: {g}, expected {w}"));
        }
    }
    Ok(())
}

#[test]
fn no_case_is_worse_than_recorded() {
    let Ok(root) = std::env::var("QCC_ONNX_TESTS") else {
        eprintln!("skipped: QCC_ONNX_TESTS names no folder");
        return;
    };
    let all = cases(Path::new(&root));
    let only = std::env::var("QCC_ONNX_CASES").unwrap_or_default();
    let chosen: Vec<&Case> = all.iter().filter(|c| c.name.contains(&only)).collect();
    assert!(!chosen.is_empty(), "no case is called like {only:?}");
    let judge = |case: &&Case| {
        let result = catch_unwind(AssertUnwindSafe(|| run(case)));
        let crash = || Failure(Outcome::Crashed, "panicked".into());
        let (outcome, reason) = match result.unwrap_or_else(|_| Err(crash())) {
            Ok(()) => (Outcome::Passed, String::new()),
            Err(Failure(outcome, reason)) => (outcome, reason),
        };
        let key = format!("{}/{}", case.kind, case.name);
        (key, Row { subject: case.subject.clone(), outcome, reason, excluded: table::excluded(&case.ops) })
    };
    let now: BTreeMap<String, Row> = chosen.par_iter().map(judge).collect();
    if only.is_empty() && std::env::var_os("QCC_BLESS").is_some_and(|v| v == "1") {
        table::record(&now);
    }
    let before = table::recorded();
    let mut worse = Vec::new();
    let mut better = 0;
    for (name, row) in &now {
        // A case that nobody recorded must pass.
        let was = before.get(name).copied().unwrap_or(Outcome::Passed);
        if row.outcome > was {
            worse.push(format!("{name}: {}, was {}: {}", row.outcome.word(), was.word(), row.reason));
        }
        better += usize::from(row.outcome < was);
        if !only.is_empty() {
            eprintln!("{name}: {} {}", row.outcome.word(), row.reason);
        }
    }
    if only.is_empty() {
        worse.extend(before.keys().filter(|n| !now.contains_key(*n)).map(|n| format!("{n}: gone")));
        eprintln!("{}", table::summary(&now));
    }
    if better > 0 {
        eprintln!("{better} cases are better than recorded: record them with QCC_BLESS=1");
    }
    assert!(worse.is_empty(), "{} cases are worse than recorded:\n{}", worse.len(), worse.join("\n"));
}
