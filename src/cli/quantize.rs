//! The default command: read a model, run a pipeline, write the result, report.

use super::run::Kind;
use super::{Context, mixed, print, publish, statistics};
use crate::calibrate::{self, Calibration};
use crate::driver::{self, After, Options};
use crate::env::{DriverEnv, Output};
use crate::error::Error;
use crate::eval::distance::Baseline;
use crate::files;
use crate::model::{self, Format, SaveOptions};
use crate::pipeline::{PRESETS, Pipeline, Step, nearest};
use crate::qir;
use crate::report::{self, Float, Show, Summary, Totals};
use crate::resume::{Folder, Identity};
use crate::rules;
use clap::ValueEnum;
use dialects::ir::Module;
use passes::eqsat::qrw::UserRules;
use passes::{Exactness, Settings};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What runs on packed weights, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Profile {
    /// ONNX Runtime on a CPU, fastest: int8 activations in packed ops (accuracy_level 4)
    #[default]
    OrtCpu,
    /// ONNX Runtime on a CPU, exact activations (accuracy_level 0)
    OrtCpuExact,
    /// TensorRT: symmetric 8-bit activations in explicit QDQ, whose zero points are zero, and float biases
    Tensorrt,
}

/// The element type of scales in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum ScaleType {
    /// 16-bit, behind a Cast that the runtime folds
    F16,
    /// That of the activations
    #[default]
    F32,
}

/// What becomes of a weight that is both embedding and head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Tied {
    /// One quantized blob for both
    Shared,
    /// The head is quantized, the embedding stays float
    #[default]
    Separate,
}

/// The flags of the default command.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The model: .onnx, or .qir with its weights beside it
    #[arg(value_name = "MODEL", required_unless_present_any = ["list_passes", "completions"])]
    model: Option<PathBuf>,
    /// Passes in order, with options: awq{group=64, clip=false},pack-int4. May be given more than once
    #[arg(long, short, value_name = "PASSES")]
    pass: Vec<String>,
    /// A pipeline by name, such as int4-awq (--list-passes shows them)
    #[arg(long, value_name = "NAME", conflicts_with = "pass")]
    preset: Option<String>,
    /// Where to write the result
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// What to write [default: by the name of the output]; qir without an output prints it
    #[arg(long, value_enum, value_name = "FORMAT")]
    emit: Option<Format>,
    /// Run and report, but write nothing
    #[arg(long, conflicts_with = "output")]
    dry_run: bool,
    /// Keep finished weights in this folder; after an interruption the same command goes on where it stopped
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Show passes and presets, and leave
    #[arg(long)]
    pub(super) list_passes: bool,
    /// Print a completion script for this shell, and leave
    #[arg(long, value_name = "SHELL")]
    pub(super) completions: Option<clap_complete::Shell>,

    /// Quantize only ops whose node, weight or op type matches (`*` stands for anything); for every pass
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', help_heading = "Quantization")]
    only: Vec<String>,
    /// Leave ops alone whose node, weight or op type matches; for every pass
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', help_heading = "Quantization")]
    skip: Vec<String>,
    /// Fail when a weight-bearing op stays float that --skip does not name
    #[arg(long, help_heading = "Quantization")]
    strict: bool,
    /// Go on when a quantizing pass finds nothing to work on
    #[arg(long, help_heading = "Quantization")]
    allow_noop: bool,
    /// Keep a scale that has no place in the graph as a Mul
    #[arg(long, help_heading = "Quantization")]
    allow_mul: bool,
    /// Rewrite rules of your own (.qrw), for canonicalize and fuse; each is checked first. May be given more than once
    #[arg(long, value_name = "FILE", help_heading = "Quantization")]
    rules: Vec<PathBuf>,
    /// What the model is to run on
    #[arg(long, value_enum, default_value_t, help_heading = "Quantization")]
    profile: Profile,
    /// The type of scales
    #[arg(long, value_enum, value_name = "TYPE", default_value_t, help_heading = "Quantization")]
    scale_type: ScaleType,
    /// A weight that is both embedding and head
    #[arg(long, value_enum, value_name = "HOW", default_value_t, help_heading = "Quantization")]
    tied: Tied,
    /// Raise no opset; a form that needs a newer one is an error
    #[arg(long, help_heading = "Quantization")]
    keep_opset: bool,
    /// Put weights into a file beside the model (done for models over 1 GiB in any case)
    #[arg(long, help_heading = "Quantization")]
    external_data: bool,

    #[command(flatten)]
    mixed: mixed::Flags,
    #[command(flatten)]
    calibration: calibrate::Options,
    /// What computes where a pass gathers activations from runs of the whole model
    #[arg(long, value_enum, default_value_t, help_heading = "Calibration")]
    executor: Kind,
    #[command(flatten)]
    statistics: statistics::StatisticsFlags,
    #[command(flatten)]
    debug: Debug,
}

/// The flags that look into a pipeline.
#[derive(clap::Args)]
#[command(next_help_heading = "Looking into passes")]
struct Debug {
    /// Print the IR to stderr after a pass, after `all`, or after those that `changed` it
    #[arg(long, value_name = "PASS")]
    print_ir_after: Vec<After>,
    /// Print what every pass changed, as a diff
    #[arg(long)]
    print_diff: bool,
    /// Leave out the verifier between passes
    #[arg(long)]
    no_verify: bool,
    /// Run the model before and after every pass and compare
    #[arg(long)]
    check: bool,
    /// Report the time of every pass
    #[arg(long)]
    timing: bool,
    /// Report what every pass counted
    #[arg(long)]
    stats: bool,
    /// Report the errors of every weight after each step of its method
    #[arg(long)]
    layers: bool,
    /// Stop after this pass
    #[arg(long, value_name = "PASS")]
    stop_after: Option<String>,
    /// Run only the first N passes, and say which
    #[arg(long, value_name = "N")]
    bisect_limit: Option<usize>,
    /// A failing pass leaves its input and the pipeline in this folder
    #[arg(long, value_name = "DIR")]
    repro: Option<PathBuf>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let started = Instant::now();
    let input = args.model.as_deref().expect("clap asks for a model");
    let format = args.emit.unwrap_or_else(|| args.output.as_deref().map_or(Format::Onnx, Format::of));
    let to_stdout = args.output.is_none() && args.emit == Some(Format::Qir) && !args.dry_run;
    if args.output.is_none() && !to_stdout && !args.dry_run {
        return Err(Error::usage("no output", "give -o FILE, or --dry-run to write nothing"));
    }
    if to_stdout && cx.json {
        return Err(Error::usage(
            "both the IR and the report would go to stdout",
            "give -o FILE to one of them",
        ));
    }
    let mut pipeline = pipeline(args, cx)?;
    args.mixed.prepare(&mut pipeline, &cx.registry)?;
    if !args.rules.is_empty() && !pipeline.steps.iter().any(|s| s.pass.rewrites()) {
        return Err(Error::usage(
            "--rules is given, but no pass of the pipeline takes it",
            "add canonicalize",
        ));
    }
    let given = args.statistics.read(&pipeline)?;
    let rules = rules::load(&args.rules, cx.registry.ops())?;
    let loaded = model::load(input)?;
    for output in args.output.iter().chain(args.mixed.outputs()).chain(&args.statistics.stats_out) {
        files::refuse_overwrite(output, &loaded.files)?;
    }
    let mut m = loaded.module;
    let found = driver::verify(&mut m, &cx.registry);
    if !found.is_empty() && !args.debug.no_verify {
        return Err(Error::Invalid { path: input.to_owned(), found });
    }
    let mut env = DriverEnv { given_statistics: given, ..env(args, cx, &pipeline, &m, &rules)? };
    let options = options(args, rules);
    // Samples for `--check` alone leave no trace in the output.
    let fed = env.calibration.as_ref().filter(|_| needs_data(args, &pipeline));
    let recipe = std::iter::once(pipeline.normalized()).chain(flags(args)).chain(rule_flags(args));
    let recipe = recipe.collect::<Vec<_>>().join(" ");
    let provenance = match pipeline.steps.is_empty() {
        true => Vec::new(),
        false => provenance(&m, &recipe, fed),
    };
    if format == Format::Onnx {
        let path = args.output.clone().unwrap_or_else(|| input.to_owned());
        env.output = Some(Output { path, external_data: args.external_data, meta: provenance.clone() });
    }
    let mut outcome = driver::run(&mut m, &pipeline, &cx.registry, &env, &options)?;
    let calibration =
        env.calibration.as_ref().filter(|_| needs_data(args, &pipeline) || measures(args, &pipeline));
    for w in loaded.warnings.iter().chain(calibration.iter().flat_map(|c| &c.warnings)) {
        outcome.report.warn(w.clone());
    }
    for n in calibration.iter().flat_map(|c| &c.notes) {
        outcome.report.note(n.clone());
    }
    if let Some(folder) = &env.store {
        outcome.report.note(folder.summary());
    }
    let float = if quantizes(&pipeline) { report::float(&m, &pipeline, &outcome.report) } else { Vec::new() };
    if args.strict {
        strict(&float)?;
    }
    provenance.into_iter().for_each(|(key, value)| m.meta.set(key, value));
    let mut totals = Totals { input_bytes: model::total_size(&loaded.files), ..Totals::default() };
    totals.weights(&outcome.report);
    if to_stdout {
        print(&qir::text(&m))?;
    } else if let Some(output) = &args.output {
        let save = SaveOptions { external_data: args.external_data, inputs: loaded.files.clone() };
        totals.output_bytes = Some(model::save(&m, output, format, save, &cx.term)?);
    }
    if let Some(mix) = &outcome.report.mix {
        args.mixed.write(mix)?;
    }
    args.statistics.write(env.statistics.lock().unwrap_or_else(|e| e.into_inner()).as_ref())?;
    totals.seconds = started.elapsed().as_secs_f64();
    let summary = Summary {
        input: input.display().to_string(),
        output: args.output.as_ref().map(|p| p.display().to_string()),
        recipe: pipeline.normalized(),
        calibration: calibration.map(|c| c.description.clone()),
        weights: outcome.report.weights,
        float,
        totals,
        passes: outcome.passes,
        warnings: outcome.report.warnings,
        notes: outcome.report.notes,
    };
    let Debug { timing, stats, layers, .. } = args.debug;
    publish(cx, &summary, Show { timing, stats, layers }, to_stdout)
}

fn pipeline(args: &Args, cx: &Context) -> Result<Pipeline, Error> {
    let text = match &args.preset {
        Some(name) => preset(name)?.to_string(),
        None => args.pass.join(","),
    };
    if text.trim().is_empty() {
        return Ok(Pipeline { text, steps: Vec::new() });
    }
    Ok(Pipeline::parse(&text, &cx.registry, &args.only, &args.skip)?)
}

fn preset(name: &str) -> Result<&'static str, Error> {
    if let Some(p) = PRESETS.iter().find(|p| p.0 == name) {
        return Ok(p.1);
    }
    let known: Vec<&str> = PRESETS.iter().map(|p| p.0).collect();
    let near = nearest(name, &known).map(|n| format!("did you mean {n:?}? ")).unwrap_or_default();
    Err(Error::usage(
        format!("unknown preset {name:?}"),
        format!("{near}known presets: {}", known.join(", ")),
    ))
}

/// Whether a pass needs calibration data. With statistics that were saved `calibrate` does not.
fn needs_data(args: &Args, pipeline: &Pipeline) -> bool {
    let given = args.statistics.stats_in.is_some();
    let needs = |s: &Step| s.pass.needs_calibration() && !(given && s.pass.name() == passes::calibrate::NAME);
    pipeline.steps.iter().any(needs)
}

fn quantizes(pipeline: &Pipeline) -> bool {
    pipeline.steps.iter().any(|s| s.pass.exactness() == Exactness::Lossy)
}

/// Whether passes say with calibration data what they did, whether they need it or not.
fn measures(args: &Args, pipeline: &Pipeline) -> bool {
    args.calibration.calib.is_some() && quantizes(pipeline)
}

fn env(
    args: &Args,
    cx: &Context,
    pipeline: &Pipeline,
    m: &Module,
    rules: &UserRules,
) -> Result<DriverEnv, Error> {
    let needed = needs_data(args, pipeline);
    let mut data = args.calibration.clone();
    if !needed && data.calib.is_none() {
        // A check alone does well with noise.
        data.calib = Some("random".into());
        data.calib_samples = Some(1);
    }
    // A file that no pass asks for is a mistake all the same when it is not there.
    if let Some(path) = data.calib.as_ref().filter(|p| p.as_os_str() != "random") {
        files::map(path)?;
    }
    let open = || Calibration::open(&data, m, cx.registry.ops(), &cx.term);
    let calibration = (needed || measures(args, pipeline) || args.debug.check).then(open).transpose();
    let calibration = calibration.map_err(|e| Error::Calibration { message: e.message, help: e.help })?;
    let store = args.resume.as_deref().map(|dir| {
        let data = calibration.as_ref().filter(|_| needed);
        let run = Identity {
            model: passes::store::content(m),
            calibration: data.map(|c| c.hash),
            pipeline: pipeline.normalized(),
            flags: flags(args).join(" "),
            rules: rules.content(),
        };
        Folder::open(dir, &run)
    });
    let beside = args.output.as_deref().and_then(Path::parent).filter(|p| !p.as_os_str().is_empty());
    Ok(DriverEnv {
        ops: cx.registry.ops().clone(),
        term: cx.term,
        scratch: beside.map_or_else(std::env::temp_dir, Path::to_owned),
        store: store.transpose()?,
        executor: args.executor.executor(false, cx),
        calibration,
        output: None,
        baseline: needed.then(|| Baseline::new(m.clone(), data.measure_samples)),
        statistics: Default::default(),
        given_statistics: None,
        saves_statistics: args.statistics.stats_out.is_some(),
        originals: args.debug.check.then(Default::default),
    })
}

fn options(args: &Args, rules: UserRules) -> Options {
    let debug = &args.debug;
    Options {
        no_verify: debug.no_verify,
        check: debug.check,
        print_after: debug.print_ir_after.clone(),
        print_diff: debug.print_diff,
        stop_after: debug.stop_after.clone(),
        bisect_limit: debug.bisect_limit,
        repro: debug.repro.clone(),
        repro_flags: repro_flags(args),
        settings: Settings {
            allow_noop: args.allow_noop,
            allow_mul: args.allow_mul,
            accuracy_level: match args.profile {
                Profile::OrtCpu => 4,
                Profile::OrtCpuExact | Profile::Tensorrt => 0,
            },
            f16_scales: args.scale_type == ScaleType::F16,
            tied_shared: args.tied == Tied::Shared,
            keep_opset: args.keep_opset,
            measure: args.calibration.calib.is_some(),
            profile: args.profile.to_possible_value().map(|p| p.get_name().to_string()).unwrap_or_default(),
            rules,
            explain: false,
        },
    }
}

/// What a reproducer needs beside its model and pipeline: the data, and the flags that change what passes do.
fn repro_flags(args: &Args) -> String {
    let data = &args.calibration;
    let quoted = |path: &PathBuf| shell_word(&path.display().to_string());
    let given = [
        ("--calib", data.calib.as_ref().map(quoted)),
        ("--tokenizer", data.tokenizer.as_ref().map(quoted)),
        ("--calib-samples", data.calib_samples.map(|n| n.to_string())),
        ("--seq-len", data.seq_len.map(|n| n.to_string())),
        ("--calib-order", (data.calib_order == calibrate::Order::Random).then(|| "random".into())),
        ("--seed", (data.seed != 0).then(|| data.seed.to_string())),
    ];
    let given = given.into_iter().filter_map(|(flag, value)| Some(format!("{flag} {}", value?)));
    given.chain(flags(args)).chain(rule_flags(args)).collect::<Vec<_>>().join(" ")
}

/// Text as one word of a shell.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:=@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_string();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn strict(float: &[Float]) -> Result<(), Error> {
    let unasked = float.iter().filter(|f| !f.asked);
    let left: Vec<String> = unasked.map(|f| format!("  {} at node {:?}: {}", f.op, f.node, f.why)).collect();
    if left.is_empty() { Ok(()) } else { Err(Error::Strict { left }) }
}

/// The flags that change what passes do.
fn flags(args: &Args) -> Vec<String> {
    let flags = [
        (args.profile == Profile::OrtCpuExact, "--profile ort-cpu-exact"),
        (args.profile == Profile::Tensorrt, "--profile tensorrt"),
        (args.scale_type == ScaleType::F16, "--scale-type f16"),
        (args.tied == Tied::Shared, "--tied shared"),
        (args.allow_mul, "--allow-mul"),
        (args.keep_opset, "--keep-opset"),
        (args.executor == Kind::Cpu, "--executor cpu"),
    ];
    let named = [("--recipe", &args.mixed.recipe), ("--stats-in", &args.statistics.stats_in)];
    let named = named
        .into_iter()
        .filter_map(|(flag, path)| Some(format!("{flag} {}", path.as_ref()?.file_name()?.to_string_lossy())));
    let flags = flags.into_iter().filter(|(given, _)| *given).map(|(_, flag)| flag.to_string());
    flags.chain(named).collect()
}

/// The files of rules, by name.
fn rule_flags(args: &Args) -> impl Iterator<Item = String> {
    let names = args.rules.iter().filter_map(|path| path.file_name());
    names.map(|name| format!("--rules {}", shell_word(&name.to_string_lossy())))
}

/// What the model says of how it was made, as metadata. A model that was made by qcc before keeps its earlier recipe in
/// front.
fn provenance(m: &Module, recipe: &str, calibration: Option<&Calibration>) -> Vec<(String, String)> {
    let key = |k: &str| format!("metadata.qcc.{k}");
    let recipe = match m.meta.get(&key("recipe")) {
        Some(earlier) => format!("{earlier}; {recipe}"),
        None => recipe.to_string(),
    };
    let hex = |c: &Calibration| c.hash.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let calibration = calibration.map(|c| (key("calibration"), format!("blake3:{}", hex(c))));
    let version = (key("version"), env!("CARGO_PKG_VERSION").to_string());
    [(key("recipe"), recipe)].into_iter().chain(calibration).chain([version]).collect()
}
