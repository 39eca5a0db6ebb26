//! Tests written as text: a module, a pipeline, and what must come out.
//!
//! ```text
//! ; RUN: const-fold
//! ; run: 1e-6
//! module ir_version=10 opsets {onnx=21}
//! graph @main(%x : tensor<4xf32>) {
//!   ..
//! }
//! ;; module ir_version=10 opsets {onnx=21}
//! ;; ..
//! ```
//!
//! A file holds cases, separated by lines that begin with `; ---`. Of every case it is checked that its text reads
//! back as it prints, in both styles. Then lines of these forms say what else:
//!
//! - `; RUN: PIPELINE` runs passes, as `--pass` does; an empty one only infers types. What comes out must be what
//!   the `;;` lines say. With `QCC_BLESS=1` in the environment they are rewritten to say what came out.
//! - `; FUSE: CPU` fuses the module for a processor; the `;;` lines are what comes of it.
//! - `; BUILD: CPU` does so too; the `;;` lines are the fused module, and its kernels as MLIR.
//! - `; run: TOLERANCE` runs the module before and after on seeded noise and compares the outputs: relative, over
//!   each whole output; without a number, to rounding (1e-5).
//! - `; settings: allow-mul accuracy-level=4` sets what the command line's flags of these names set.
//! - `; error: TEXT` at the end of a line: there the parser or the verifier must find an error with this text. On
//!   a line of its own: the pipeline, or the verifier about no op, must. No other error may be found.
//!
//! Calibration data is noise, of 4 samples; open dims are 1 in front and 3 behind.

use crate::calibrate::{self, Calibration};
use crate::check;
use crate::data::lm::inputs_of;
use crate::driver::{self, Options};
use crate::env::DriverEnv;
use crate::eval::distance::Baseline;
use crate::pipeline::Pipeline;
use crate::term::Term;
use crate::{Registry, files};
use codegen::Target;
use codegen::kernels::Kernel;
use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::parse::{Parsed, parse};
use dialects::ir::print::{Style, print};
use dialects::ir::{Module, infer, verify};
use passes::Settings;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// How expected output is printed: without metadata, and with the elements of all that a reader can take in.
pub const STYLE: Style = Style { full: false, max_inline: 64 };

/// The environment variable that accepts what came out as what is expected.
pub const BLESS: &str = "QCC_BLESS";

/// Relative difference that `; run:` allows when it gives no number.
const ROUNDING: f64 = 1e-5;

/// Cases that failed.
#[derive(Debug, Error)]
#[error("{}", failures.join("\n\n"))]
pub struct Failed {
    /// One message each, with file and line.
    pub failures: Vec<String>,
}

/// Checks every `.qir` file of a folder, in the order of their names. Returns how many cases there were; a folder
/// without any is a failure, since it tests nothing.
pub fn run_dir(dir: impl AsRef<Path>, registry: &Registry) -> Result<usize, Failed> {
    let dir = dir.as_ref();
    let fail = |message: String| Failed { failures: vec![message] };
    let entries = std::fs::read_dir(dir).map_err(|e| fail(format!("cannot read {}: {e}", dir.display())))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "qir"));
    paths.sort();
    let bless = std::env::var_os(BLESS).is_some_and(|v| v == "1");
    let mut failures = Vec::new();
    let mut count = 0;
    for path in &paths {
        match run_file(path, registry, bless) {
            Ok(n) => count += n,
            Err(e) => failures.extend(e.failures),
        }
    }
    if count == 0 && failures.is_empty() {
        return Err(fail(format!("{} holds no cases", dir.display())));
    }
    if failures.is_empty() { Ok(count) } else { Err(Failed { failures }) }
}

/// Checks one file; with `bless`, rewrites its expected output. Returns how many cases there were.
pub fn run_file(path: &Path, registry: &Registry, bless: bool) -> Result<usize, Failed> {
    let fail = |message: String| Failed { failures: vec![format!("{}: {message}", path.display())] };
    let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    let (count, blessed) = run_text(&text, registry, bless).map_err(|failures| Failed {
        failures: failures.into_iter().map(|(line, m)| format!("{}:{line}: {m}", path.display())).collect(),
    })?;
    if blessed != text {
        let mut out = files::OutputFile::create(path).map_err(|e| fail(e.to_string()))?;
        out.write_all(blessed.as_bytes()).map_err(|e| fail(e.to_string()))?;
        out.commit().map_err(|e| fail(e.to_string()))?;
    }
    Ok(count)
}

/// Checks the cases of a text. Returns their number and the text, with `bless` as it should be; or the failures,
/// each with the line where its case or its fault stands.
pub fn run_text(
    text: &str,
    registry: &Registry,
    bless: bool,
) -> Result<(usize, String), Vec<(usize, String)>> {
    let mut failures = Vec::new();
    let mut out = String::new();
    let mut count = 0;
    for (line, case) in split(text) {
        let case = Case::new(case, line);
        if case.is_empty() {
            out.push_str(case.text);
            continue;
        }
        count += 1;
        match case.check(registry, bless) {
            Ok(text) => out.push_str(&text),
            Err((line, message)) => {
                out.push_str(case.text);
                failures.push((line, message));
            }
        }
    }
    if failures.is_empty() { Ok((count, out)) } else { Err(failures) }
}

/// A fused module and, if asked for, its kernels.
fn build(mut m: Module, (cpu, kernels): (&str, bool), registry: &Registry) -> Result<String, String> {
    let target = Target::parse(cpu).map_err(|e| e.to_string())?;
    codegen::fuse::infer(&mut m, registry.ops());
    codegen::fuse::fuse(&mut m, &target, &HashSet::new());
    let mut out = print(&m, STYLE);
    if kernels {
        let ops = m.regions[m.top].ops.iter();
        let steps = ops.filter_map(|&op| codegen::lower::lower(&m, op, &target)).flat_map(|l| l.steps);
        let kernels: Vec<Kernel> = steps.map(|s| s.kernel).collect();
        out.push_str(&format!("\n{}", codegen::kernels::module(&kernels)));
    }
    Ok(out)
}

/// The cases of a file, each with the number of its first line. Separators begin the case after them.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut out = vec![];
    let (mut start, mut first, mut at) = (0, 1, 0);
    for (i, line) in text.split_inclusive('\n').enumerate() {
        if line.starts_with("; ---") && at > start {
            out.push((first, &text[start..at]));
            (start, first) = (at, i + 1);
        }
        at += line.len();
    }
    out.push((first, &text[start..]));
    out
}

/// Where something failed, and how.
type Failure = (usize, String);

struct Case<'a> {
    text: &'a str,
    /// The number of the first line.
    first: usize,
    pipeline: Option<&'a str>,
    /// What the module is fused for, and whether its kernels are shown.
    cpu: Option<(&'a str, bool)>,
    tolerance: Option<&'a str>,
    settings: &'a str,
    /// Line, whether something stands before it, and text of each expected error.
    errors: Vec<(usize, bool, &'a str)>,
    expected: Vec<&'a str>,
}

impl<'a> Case<'a> {
    fn new(text: &'a str, first: usize) -> Case<'a> {
        let mut case = Case {
            text,
            first,
            pipeline: None,
            cpu: None,
            tolerance: None,
            settings: "",
            errors: Vec::new(),
            expected: Vec::new(),
        };
        for (i, line) in text.lines().enumerate() {
            if let Some(expected) = line.strip_prefix(";;") {
                case.expected.push(expected.strip_prefix(' ').unwrap_or(expected).trim_end());
            } else if let Some(pipeline) = line.strip_prefix("; RUN:") {
                case.pipeline = Some(pipeline.trim());
            } else if let Some(cpu) = line.strip_prefix("; BUILD:") {
                case.cpu = Some((cpu.trim(), true));
            } else if let Some(cpu) = line.strip_prefix("; FUSE:") {
                case.cpu = Some((cpu.trim(), false));
            } else if let Some(tolerance) = line.strip_prefix("; run:") {
                case.tolerance = Some(tolerance.trim());
            } else if let Some(settings) = line.strip_prefix("; settings:") {
                case.settings = settings.trim();
            } else if let Some((before, error)) = line.split_once("; error:") {
                case.errors.push((first + i, !before.trim().is_empty(), error.trim()));
            }
        }
        case
    }

    /// Whether there is nothing but comments.
    fn is_empty(&self) -> bool {
        self.text.lines().all(|l| l.trim().is_empty() || l.trim_start().starts_with(';'))
    }

    fn line(&self, offset: usize) -> usize {
        self.first + self.text[..offset].matches('\n').count()
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, Failure> {
        Err((self.first, message.into()))
    }

    /// Checks the case. Returns its text, blessed if that was asked for.
    fn check(&self, registry: &Registry, bless: bool) -> Result<String, Failure> {
        let parsed = match parse(self.text) {
            Ok(parsed) => parsed,
            Err(e) => {
                let line = self.line(e.span().start);
                self.match_errors(vec![(line, true, e.to_string())])?;
                return Ok(self.text.to_owned());
            }
        };
        for style in [STYLE, Style::FULL] {
            let once = print(&parsed.module, style);
            match parse(&once) {
                Ok(again) if print(&again.module, style) == once => {}
                Ok(again) => {
                    let diff = diff(&once, &print(&again.module, style));
                    return self.fail(format!("the text does not read back as it prints:\n{diff}"));
                }
                Err(e) => {
                    let line = once[..e.span().start].matches('\n').count() + 1;
                    return self
                        .fail(format!("what is printed cannot be read, in its line {line}: {e}\n{once}"));
                }
            }
        }
        if let Some(cpu) = self.cpu {
            let built = build(parsed.module, cpu, registry).or_else(|message| self.fail(message))?;
            return self.expect(&built, bless);
        }
        let Some(pipeline) = self.pipeline else {
            self.match_errors(self.diagnostics(&parsed, registry))?;
            return Ok(self.text.to_owned());
        };
        if let Some((line, _, message)) = self.diagnostics(&parsed, registry).pop() {
            return Err((line, format!("the module is wrong before any pass: {message}")));
        }
        let mut before = parsed.module;
        infer::infer(&mut before, registry.ops());
        let mut after = before.clone();
        let ran = self.transform(&mut after, pipeline, registry);
        if let Err(message) = ran {
            self.match_errors(vec![(self.first, false, message)])?;
            return Ok(self.text.to_owned());
        }
        self.match_errors(Vec::new())?;
        if let Some(tolerance) = self.tolerance {
            let tolerance = match tolerance {
                "" => ROUNDING,
                t => t.parse().or_else(|_| self.fail(format!("; run: expected a number, found {t:?}")))?,
            };
            self.compare(&before, &after, tolerance, registry)?;
        }
        self.expect(&print(&after, STYLE), bless)
    }

    /// What the verifier finds, each with its line, and whether it is about an op.
    fn diagnostics(&self, parsed: &Parsed, registry: &Registry) -> Vec<(usize, bool, String)> {
        let place = |d: &dialects::ir::Diagnostic| match d.op.and_then(|op| parsed.spans.get(&op)) {
            Some(span) => (self.line(span.start), true, d.to_string()),
            None => (self.first, false, d.to_string()),
        };
        verify::verify(&parsed.module, registry.ops()).iter().map(place).collect()
    }

    /// Every error must be expected where it is found, and every expected one be found.
    fn match_errors(&self, mut found: Vec<(usize, bool, String)>) -> Result<(), Failure> {
        for &(line, inline, text) in &self.errors {
            let hit = |(at, about, message): &(usize, bool, String)| {
                message.contains(text) && if inline { *about && *at == line } else { !about }
            };
            match found.iter().position(hit) {
                Some(i) => drop(found.remove(i)),
                None => {
                    let list: String = found.iter().map(|(at, _, m)| format!("\n  line {at}: {m}")).collect();
                    let list = if list.is_empty() { " nothing".into() } else { list };
                    return Err((line, format!("expected an error with {text:?}, found{list}")));
                }
            }
        }
        match found.into_iter().next() {
            None => Ok(()),
            Some((line, _, message)) => Err((line, message)),
        }
    }

    fn transform(&self, m: &mut Module, pipeline: &str, registry: &Registry) -> Result<(), String> {
        if pipeline.is_empty() {
            return Ok(());
        }
        let pipeline = Pipeline::parse(pipeline, registry, &[], &[]).map_err(|e| match &e.help {
            Some(help) => format!("{} ({help})", e.message),
            None => e.message.clone(),
        })?;
        let calibration = match pipeline.steps.iter().any(|s| s.pass.needs_calibration()) {
            true => Some(noise(m, registry)?),
            false => None,
        };
        let env = DriverEnv {
            calibration,
            baseline: Some(Baseline::new(m.clone(), usize::MAX)),
            ..DriverEnv::without_data(registry.ops(), Term::new(true))
        };
        let options = Options { settings: self.settings()?, ..Options::default() };
        driver::run(m, &pipeline, registry, &env, &options).map(drop).map_err(|e| e.to_string())
    }

    fn settings(&self) -> Result<Settings, String> {
        let mut s = Settings::default();
        for word in self.settings.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let flag = match key {
                "accuracy-level" => {
                    s.accuracy_level = value
                        .parse()
                        .map_err(|_| format!("; settings: {key} wants a number, found {value:?}"))?;
                    continue;
                }
                "profile" => {
                    s.profile = value.to_string();
                    continue;
                }
                "allow-noop" => &mut s.allow_noop,
                "allow-mul" => &mut s.allow_mul,
                "f16-scales" => &mut s.f16_scales,
                "tied-shared" => &mut s.tied_shared,
                "keep-opset" => &mut s.keep_opset,
                _ => return Err(format!("; settings: unknown setting {key:?}")),
            };
            *flag = true;
        }
        Ok(s)
    }

    fn compare(&self, a: &Module, b: &Module, tolerance: f64, registry: &Registry) -> Result<(), Failure> {
        let exec = Interpreter::new(registry.ops().clone());
        let data = noise(a, registry).or_else(|e| self.fail(e))?;
        for batch in data.batches() {
            let batch = batch.or_else(|e| self.fail(e.to_string()))?;
            let run = |m: &Module| {
                let outputs = &m.regions[m.top].results;
                run_once(&exec, m, &inputs_of(m, batch.clone()), outputs)
            };
            let before = run(a).or_else(|e| self.fail(format!("the module cannot be run: {e}")))?;
            let after = run(b).or_else(|e| self.fail(format!("what came out cannot be run: {e}")))?;
            if before.len() != after.len() {
                return self.fail(format!("{} outputs became {}", before.len(), after.len()));
            }
            let (error, output) = check::error(&before, &after);
            if error.is_nan() || error > tolerance {
                let name = a.value_label(a.regions[a.top].results[output]);
                return self.fail(format!(
                    "output {name:?} differs by {error:.2e} (relative), where {tolerance:.0e} is allowed"
                ));
            }
        }
        Ok(())
    }

    /// Compares what came out with the `;;` lines, or writes them.
    fn expect(&self, found: &str, bless: bool) -> Result<String, Failure> {
        let found: Vec<&str> = found.trim_end().lines().map(str::trim_end).collect();
        if found == self.expected {
            return Ok(self.text.to_owned());
        }
        if !bless {
            let what = match self.expected.is_empty() {
                true => "nothing is expected yet; this came out:\n".to_owned() + &found.join("\n"),
                false => {
                    "something else came out:\n".to_owned()
                        + &diff(&(self.expected.join("\n") + "\n"), &(found.join("\n") + "\n"))
                }
            };
            return self.fail(format!("{what}\nto accept it: {}", accept_command()));
        }
        let kept: Vec<&str> = self.text.lines().filter(|l| !l.starts_with(";;")).collect();
        let mut out = kept.join("\n").trim_end().to_owned();
        for line in found {
            out.push_str("\n;;");
            if !line.is_empty() {
                write!(out, " {line}").expect("writing to a string does not fail");
            }
        }
        // What separates the case from the next one stays.
        let gap = self.text.len() - self.text.trim_end().len();
        out.push_str(&self.text[self.text.len() - gap..]);
        Ok(out)
    }
}

fn noise(m: &Module, registry: &Registry) -> Result<Calibration, String> {
    let options = calibrate::Options {
        calib: Some("random".into()),
        calib_samples: Some(4),
        seq_len: Some(3),
        ..calibrate::Options::default()
    };
    Calibration::open(&options, m, registry.ops(), &Term::new(true)).map_err(|e| e.to_string())
}

fn diff(old: &str, new: &str) -> String {
    similar::TextDiff::from_lines(old, new).unified_diff().header("expected", "found").to_string()
}

/// The command that runs the present test binary again and accepts what comes out.
fn accept_command() -> String {
    let exe = std::env::current_exe().ok();
    let name = exe.as_deref().and_then(Path::file_stem).map(|s| s.to_string_lossy().into_owned());
    // Cargo appends a hash to the name of a test.
    let test = name.as_deref().and_then(|n| n.rsplit_once('-')).map_or("NAME", |(name, _)| name);
    match std::env::var("CARGO_PKG_NAME") {
        Ok(package) => format!("{BLESS}=1 cargo test -p {package} --test {test}"),
        Err(_) => format!("{BLESS}=1 cargo test --test {test}"),
    }
}
