//! What is recorded of the cases: `cases.tsv`, one line each, and `table.md`, the same by op for a reader.

use super::{OUTCOMES, Outcome};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

/// Ops that qcc leaves out on purpose; a case with one of them does not count.
const EXCLUDED: &[(&str, &[&str])] = &[
    ("training", &["Adagrad", "Adam", "Momentum", "Gradient"]),
    (
        "text",
        &[
            "StringNormalizer",
            "StringConcat",
            "StringSplit",
            "RegexFullMatch",
            "TfIdfVectorizer",
            "LabelEncoder",
        ],
    ),
    ("ai.onnx.ml", &["ArrayFeatureExtractor", "Binarizer", "TreeEnsemble"]),
    ("images", &["ImageDecoder"]),
    (
        "random numbers",
        &[
            "Bernoulli",
            "Multinomial",
            "RandomNormal",
            "RandomNormalLike",
            "RandomUniform",
            "RandomUniformLike",
        ],
    ),
];

/// One case.
pub struct Row {
    /// The op it is about, or the folder it is from.
    pub subject: String,
    /// What it came to.
    pub outcome: Outcome,
    /// Why it did not pass.
    pub reason: String,
    /// Why it does not count.
    pub excluded: Option<&'static str>,
}

/// Why a case of these ops does not count, if it does not.
pub fn excluded(ops: &[String]) -> Option<&'static str> {
    let is = |names: &&[&str]| ops.iter().any(|op| names.contains(&op.as_str()));
    EXCLUDED.iter().find(|(_, names)| is(names)).map(|(why, _)| *why)
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/onnx_conformance")).join(name)
}

/// What each case came to when it was recorded.
pub fn recorded() -> BTreeMap<String, Outcome> {
    let path = file("cases.tsv");
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let lines = text.lines().filter_map(|l| l.split_once('\t'));
    lines
        .map(|(name, rest)| (name.into(), Outcome::from_word(rest.split('\t').next().unwrap_or(rest))))
        .collect()
}

/// Writes both files.
pub fn record(now: &BTreeMap<String, Row>) {
    let mut cases = String::new();
    for (name, row) in now {
        let counts = if row.excluded.is_some() { "\tnot counted" } else { "" };
        let _ = writeln!(cases, "{name}\t{}{counts}", row.outcome.word());
    }
    std::fs::write(file("cases.tsv"), cases).expect("the sources can be written");
    std::fs::write(file("table.md"), table(now)).expect("the sources can be written");
}

fn count<'r>(rows: impl Iterator<Item = &'r Row>) -> BTreeMap<Outcome, usize> {
    let mut n = BTreeMap::new();
    rows.for_each(|r| *n.entry(r.outcome).or_default() += 1);
    n
}

fn cells(n: &BTreeMap<Outcome, usize>) -> String {
    OUTCOMES.iter().map(|(o, _)| format!(" {} |", n.get(o).copied().unwrap_or(0))).collect()
}

/// One line: how many counted cases pass.
pub fn summary(now: &BTreeMap<String, Row>) -> String {
    let n = count(now.values().filter(|r| r.excluded.is_none()));
    let all: usize = n.values().sum();
    let passed = n.get(&Outcome::Passed).copied().unwrap_or(0);
    let rest: Vec<String> = n.iter().skip(1).map(|(o, n)| format!("{n} {}", o.word())).collect();
    let percent = 100.0 * passed as f64 / all.max(1) as f64;
    format!("{passed} of {all} counted cases pass ({percent:.1} %) {}", rest.join(", "))
}

fn table(now: &BTreeMap<String, Row>) -> String {
    let mut out = String::from(
        "# ONNX's own tests\n\n\
         Written by `tests/onnx_conformance` (`QCC_BLESS=1`). Cases by the op they are about, then the folders of whole\n\
         models. Cases of ops that are left out on purpose are listed last, and do not count.\n\n",
    );
    let _ = writeln!(out, "{}.\n", summary(now));
    let mut by_subject: BTreeMap<(bool, &str), Vec<&Row>> = BTreeMap::new();
    for (name, row) in now.iter().filter(|(_, r)| r.excluded.is_none()) {
        by_subject.entry((!name.starts_with("node/"), &row.subject)).or_default().push(row);
    }
    let _ = writeln!(out, "| op | passed | unsupported | wrong | crashed |\n|---|---|---|---|---|");
    for ((_, subject), rows) in &by_subject {
        let _ = writeln!(out, "| {subject} |{}", cells(&count(rows.iter().copied())));
    }
    let _ = writeln!(out, "\n## Cases that do not pass\n");
    for (name, row) in now.iter().filter(|(_, r)| r.excluded.is_none() && r.outcome != Outcome::Passed) {
        let _ = writeln!(out, "- `{name}`: {}: {}", row.outcome.word(), row.reason);
    }
    let _ = writeln!(out, "\n## Left out on purpose\n");
    for (why, ops) in EXCLUDED {
        let n = now.values().filter(|r| r.excluded == Some(*why)).count();
        let _ = writeln!(out, "- {why}, {n} cases: {}", ops.join(", "));
    }
    out
}
