//! Runs a pipeline: verifies between passes, shows and compares the IR, checks passes against the interpreter,
//! bisects, and leaves a reproducer when a pass fails.

use crate::check::{self, Checked};
use crate::env::DriverEnv;
use crate::error::Error;
use crate::model;
use crate::pipeline::{Pipeline, nearest};
use crate::qir;
use crate::report::paint::count;
use crate::{Registry, term::Term};
use dialects::exec::ExecError;
use dialects::ir::{Diagnostic, Module, infer, verify};
use passes::{Changed, Pass, PassCx, PassError, Report, Settings};
use serde::Serialize;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// After which passes to show something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    /// After every pass.
    All,
    /// After every pass that changed the module.
    Changed,
    /// After the pass of this name.
    Pass(String),
}

impl std::str::FromStr for After {
    type Err = std::convert::Infallible;
    fn from_str(s: &str) -> Result<After, Self::Err> {
        Ok(match s {
            "all" => After::All,
            "changed" => After::Changed,
            name => After::Pass(name.to_string()),
        })
    }
}

/// How to run a pipeline.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Leave out the verifier between passes.
    pub no_verify: bool,
    /// Run the interpreter before and after every pass.
    pub check: bool,
    /// After which passes to print the IR.
    pub print_after: Vec<After>,
    /// Print what every pass changed, as a diff.
    pub print_diff: bool,
    /// Stop after the pass of this name.
    pub stop_after: Option<String>,
    /// Run only so many passes.
    pub bisect_limit: Option<usize>,
    /// Where a failing pass leaves its input and the pipeline.
    pub repro: Option<PathBuf>,
    /// Flags that the reproducer needs beside model and pipeline, as a shell reads them.
    pub repro_flags: String,
    /// Settings for the passes.
    pub settings: Settings,
}

/// What one pass did.
#[derive(Clone, Debug, Serialize)]
pub struct Ran {
    /// The pass with its options.
    pub pass: String,
    /// Wall time.
    pub seconds: f64,
    /// Whether it changed the module.
    pub changed: bool,
    /// What it counted.
    pub counts: BTreeMap<String, u64>,
    /// What `--check` found.
    pub check: Option<Checked>,
}

impl Ran {
    /// The pass's name.
    pub fn name(&self) -> &str {
        self.pass.split('{').next().unwrap_or_default()
    }
}

/// What a pipeline did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What the passes report.
    pub report: Report,
    /// The passes that ran, in order.
    pub passes: Vec<Ran>,
}

/// Runs `pipeline` on `m`. After an error, `m` is not to be used.
pub fn run(
    m: &mut Module,
    pipeline: &Pipeline,
    registry: &Registry,
    env: &DriverEnv,
    options: &Options,
) -> Result<Outcome, Error> {
    check_names(pipeline, options)?;
    let driver = Driver { pipeline, registry, env, options };
    let mut outcome = Outcome::default();
    if let n @ 1.. = passes::linear::kept(m) {
        outcome.report.note(format!("already quantized: {} kept", count(n, "weight")));
    }
    for number in 1..=pipeline.steps.len() {
        let name = pipeline.steps[number - 1].pass.name();
        if let Some(limit) = options.bisect_limit {
            let not = if number > limit { "NOT " } else { "" };
            env.term.trace(&format!("BISECT: {not}running pass ({number}) {name}"));
            if number > limit {
                continue;
            }
        }
        let before = driver.wants_before().then(|| m.clone());
        let ran = driver.step(m, number, before.as_ref(), &mut outcome.report);
        match ran {
            Ok(ran) => outcome.passes.push(ran),
            Err(e) => return Err(driver.leave_repro(e, number, before.as_ref())),
        }
        if options.stop_after.as_deref() == Some(name) {
            break;
        }
    }
    Ok(outcome)
}

/// Reads the model at `path`, types it, and refuses it if it contradicts itself. What is odd about it is said.
pub fn read(path: &Path, registry: &Registry, term: &Term) -> Result<Module, Error> {
    let model::Loaded { module: mut m, warnings, .. } = model::load(path)?;
    for warning in warnings.iter().filter(|_| !term.quiet()) {
        term.trace(&format!("warning: {}: {warning}", path.display()));
    }
    let found = verify(&mut m, registry);
    if found.is_empty() { Ok(m) } else { Err(Error::Invalid { path: path.to_owned(), found }) }
}

/// What to do about an op that cannot be run.
pub const NEEDED: &str =
    "the op is needed to calibrate; passes that need no calibration, such as rtn, leave it unchanged";

/// Types anew, and everything that is wrong with the module.
pub fn verify(m: &mut Module, registry: &Registry) -> Vec<Diagnostic> {
    // What inference contradicts, the verifier finds too.
    infer::infer(m, registry.ops());
    verify::verify(m, registry.ops())
}

/// Refuses names of passes that the pipeline does not have.
fn check_names(pipeline: &Pipeline, options: &Options) -> Result<(), Error> {
    let known: Vec<&str> = pipeline.steps.iter().map(|s| s.pass.name()).collect();
    let printed = options.print_after.iter().filter_map(|a| match a {
        After::Pass(name) => Some(("--print-ir-after", name)),
        _ => None,
    });
    for (flag, name) in printed.chain(options.stop_after.iter().map(|n| ("--stop-after", n))) {
        if !known.contains(&name.as_str()) {
            let near = nearest(name, &known).map(|n| format!("did you mean {n:?}? ")).unwrap_or_default();
            let help = format!("{near}the pipeline has {}", known.join(", "));
            return Err(Error::usage(format!("{flag}: no pass {name:?} in the pipeline"), help));
        }
    }
    Ok(())
}

struct Driver<'a> {
    pipeline: &'a Pipeline,
    registry: &'a Registry,
    env: &'a DriverEnv,
    options: &'a Options,
}

impl Driver<'_> {
    fn wants_before(&self) -> bool {
        self.options.check || self.options.print_diff || self.options.repro.is_some()
    }

    fn step(
        &self,
        m: &mut Module,
        number: usize,
        before: Option<&Module>,
        report: &mut Report,
    ) -> Result<Ran, Error> {
        let step = &self.pipeline.steps[number - 1];
        let counts = report.counts.clone();
        let rest = self.rest(number);
        let started = Instant::now();
        let mut cx = PassCx {
            ops: self.registry.ops(),
            env: self.env,
            settings: &self.options.settings,
            report,
            rest: &rest,
        };
        // A pass that panics has a bug; the user still gets a message and a reproducer, and no half-written file.
        let ran = catch_unwind(AssertUnwindSafe(|| step.pass.run(m, &mut cx)));
        report.merge();
        let changed = match ran {
            Ok(Ok(changed)) => changed == Changed::Yes,
            Ok(Err(e)) => return Err(self.failed(number, e)),
            Err(_) => {
                let message = format!("{} panicked: this is a bug in the pass", step.pass.name());
                return Err(Error::Pass { number, message, help: Some(REPRO_HINT.into()) });
            }
        };
        if changed {
            // What a rewrite leaves without users must not be written: float weights above all.
            let (ops, constants) = passes::dce::sweep(m);
            report.count("dead ops removed", ops);
            report.count("dead constants removed", constants);
        }
        let seconds = started.elapsed().as_secs_f64();
        let found = verify(m, self.registry);
        if !self.options.no_verify && !found.is_empty() {
            return Err(Error::Broken { number, pass: step.pass.name().into(), found });
        }
        self.show(m, number, changed, before);
        let check = match before {
            Some(before) if self.options.check => {
                Some(check::pass(before, m, &*step.pass, self.env).map_err(|message| Error::Check {
                    number,
                    pass: step.pass.name().into(),
                    message,
                })?)
            }
            _ => None,
        };
        let grown = |(k, v): (&String, &u64)| {
            let n = v - counts.get(k).copied().unwrap_or(0);
            (n > 0).then(|| (k.clone(), n))
        };
        let counts = report.counts.iter().filter_map(grown).collect();
        Ok(Ran { pass: step.normalized(), seconds, changed, counts, check })
    }

    /// The passes that run after this one.
    fn rest(&self, number: usize) -> Vec<&dyn Pass> {
        let stop = |name| self.options.stop_after.as_deref() == Some(name);
        let steps = self.pipeline.steps.iter().take(self.options.bisect_limit.unwrap_or(usize::MAX));
        let mut stopped = stop(self.pipeline.steps[number - 1].pass.name());
        let runs = |pass: &&dyn Pass| {
            let runs = !stopped;
            stopped |= stop(pass.name());
            runs
        };
        steps.skip(number).map(|s| &*s.pass).take_while(runs).collect()
    }

    fn show(&self, m: &Module, number: usize, changed: bool, before: Option<&Module>) {
        let name = self.pipeline.steps[number - 1].pass.name();
        let wanted = self.options.print_after.iter().any(|a| match a {
            After::All => true,
            After::Changed => changed,
            After::Pass(p) => p == name,
        });
        let term: &Term = &self.env.term;
        if wanted {
            term.trace(&format!("; IR after pass ({number}) {name}\n{}", qir::text(m)));
        }
        if self.options.print_diff
            && let Some(before) = before
        {
            let (old, new) = (qir::text(before), qir::text(m));
            let diff = similar::TextDiff::from_lines(&old, &new);
            let header = (format!("before ({number}) {name}"), format!("after ({number}) {name}"));
            let diff = diff.unified_diff().header(&header.0, &header.1).to_string();
            match diff.is_empty() {
                true => term.trace(&format!("; pass ({number}) {name} changed nothing")),
                false => term.trace(&diff),
            }
        }
    }

    fn failed(&self, number: usize, e: PassError) -> Error {
        if let Some(e) = self.pipeline.blame(number - 1, &e) {
            return Error::Pipeline(e);
        }
        let help = match &e {
            PassError::Nothing { .. } => Some("--allow-noop lets a pass find nothing to do".to_string()),
            PassError::Exec(ExecError::UnknownOp { .. }) => Some(NEEDED.to_string()),
            _ => None,
        };
        Error::Pass { number, message: e.to_string(), help }
    }

    /// Writes the input of the failing pass and the rest of the pipeline, when that was asked for.
    fn leave_repro(&self, error: Error, number: usize, before: Option<&Module>) -> Error {
        let (Some(dir), Some(before)) = (&self.options.repro, before) else { return error };
        let rest: Vec<String> = self.pipeline.steps[number - 1..].iter().map(|s| s.normalized()).collect();
        let written = std::fs::create_dir_all(dir)
            .map_err(|e| Error::Model(format!("cannot write {}: {e}", dir.display())))
            .and_then(|()| {
                let options = Default::default();
                model::save(before, &dir.join("input.qir"), model::Format::Qir, options, &self.env.term)
            })
            .and_then(|_| qir::write_text(&dir.join("pipeline"), &rest.join(",")));
        let term = &self.env.term;
        let at = dir.display();
        match written {
            Ok(()) => term.trace(
                format!(
                    "reproducer written: qcc {at}/input.qir --pass \"$(cat {at}/pipeline)\" --dry-run {}",
                    self.options.repro_flags
                )
                .trim_end(),
            ),
            Err(e) => term.trace(&format!("no reproducer: {e}")),
        }
        error
    }
}

const REPRO_HINT: &str =
    "--repro DIR leaves the input of the failing pass and the pipeline there, for a report";
