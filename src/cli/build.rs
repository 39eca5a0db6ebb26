//! `qcc build`: a model as machine code, in a shared library with a C header.

use super::{Context, painter, print};
use crate::compiler::Worker;
use crate::driver;
use crate::error::Error;
use crate::files::OutputFile;
use crate::report::paint::{Table, bytes};
use codegen::plan::{Plan, PlanError, Version, plan};
use codegen::target::TargetError;
use codegen::{CompileError, Compiler, Form, Request, Target, artifact, kernels};
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// What to build for
    #[arg(long, value_enum, default_value_t)]
    target: Kind,
    /// The processor: native, or a level such as x86-64-v3; an unknown one lists them all. Several: code for each, of which
    /// a processor runs what asks for most and is there
    #[arg(long, default_value = "native", value_name = "NAME", value_delimiter = ',')]
    cpu: Vec<String>,
    /// Code for every level of the processor's architecture
    #[arg(long)]
    multiversion: bool,
    /// The shared library to write; the header and the weights go beside it
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Put the weights into the library
    #[arg(long)]
    embed: bool,
    /// Print code instead of writing a library
    #[arg(long, value_enum, value_name = "FORM")]
    emit: Option<Emit>,
    /// The greatest size of a named dim: NAME=N. May be given more than once
    #[arg(long = "max", value_name = "NAME=N", value_parser = bound)]
    max: Vec<(String, u64)>,
    /// The greatest size of named dims that are the first of an input
    #[arg(long, default_value_t = 1, value_name = "N")]
    max_batch: u64,
    /// The greatest size of all other named dims
    #[arg(long, default_value_t = 2048, value_name = "N")]
    max_seq: u64,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Kind {
    /// Machine code for a processor
    #[default]
    Cpu,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Emit {
    /// MLIR, as qcc writes it (needs no LLVM)
    Mlir,
    /// LLVM IR, before it is optimized
    Llvm,
    /// Assembly
    Asm,
}

fn bound(text: &str) -> Result<(String, u64), String> {
    let wrong = || format!("{text:?} is not of the form NAME=N");
    let (name, n) = text.split_once('=').ok_or_else(wrong)?;
    Ok((name.to_owned(), n.parse().map_err(|_| wrong())?))
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let Kind::Cpu = args.target;
    let targets = targets(args).map_err(|e| Error::Usage { message: e.to_string(), help: None })?;
    if args.emit.is_some() && targets.len() > 1 {
        return Err(Error::usage("--emit prints the code of one processor", "give one --cpu"));
    }
    let m = driver::read(&args.model, &cx.registry, &cx.term)?;
    let first: Vec<String> = m.regions[m.top]
        .args
        .iter()
        .filter(|&&v| m.const_of(v).is_none())
        .filter_map(|&v| m.ty(v).dims()?.first().map(ToString::to_string))
        .collect();
    let bound = |name: &str| {
        let given = args.max.iter().find(|(n, _)| n == name).map(|(_, n)| *n);
        Some(given.unwrap_or(if first.iter().any(|f| f == name) { args.max_batch } else { args.max_seq }))
    };
    let plan = plan(&m, cx.registry.ops(), &targets, &bound).map_err(|e| refused(&args.model, e))?;
    if let Some((name, _)) = args.max.iter().find(|(n, _)| !plan.dims.iter().any(|(d, _)| d == n)) {
        let known: Vec<&str> = plan.dims.iter().map(|d| d.0.as_str()).collect();
        let message = format!("the model has no dim {name:?}");
        let help = match known.is_empty() {
            true => "it has no named dims".to_owned(),
            false => format!("its dims are {}", known.join(", ")),
        };
        return Err(Error::Usage { message, help: Some(help) });
    }
    if let Some(emit) = args.emit {
        return print(&emitted(&plan.versions[0], emit)?);
    }
    let Some(out) = &args.output else {
        return Err(Error::usage("no output", "give -o FILE, or --emit to print code"));
    };
    write(args, cx, &plan, out)
}

fn targets(args: &Args) -> Result<Vec<Target>, TargetError> {
    let given = Target::parse_list(args.cpu.iter().map(String::as_str))?;
    match given.first().filter(|_| args.multiversion) {
        Some(target) => Target::parse_list(Target::names(target.arch)),
        None => Ok(given),
    }
}

fn refused(path: &Path, e: PlanError) -> Error {
    Error::Model(format!("{}: {e}", path.display()))
}

fn failed(e: CompileError) -> Error {
    Error::Model(format!("code generation: {e}"))
}

fn emitted(version: &Version, emit: Emit) -> Result<String, Error> {
    let mlir = kernels::module(&version.kernels);
    let form = match emit {
        Emit::Mlir => return Ok(mlir),
        Emit::Llvm => Form::Llvm,
        Emit::Asm => Form::Asm,
    };
    let text = Worker.compile(&Request { mlir, target: version.target.clone(), form }).map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn write(args: &Args, cx: &Context, plan: &Plan, out: &Path) -> Result<(), Error> {
    let name = out.file_name().map(|n| n.to_string_lossy().into_owned());
    let name = name.ok_or_else(|| Error::usage("the output has no file name", "give -o FILE"))?;
    let weights = out.with_extension("weights");
    let weights_name = weights.file_name().map(|n| n.to_string_lossy().into_owned());
    let scratch =
        tempfile::tempdir().map_err(|e| Error::Model(format!("no room for temporary files: {e}")))?;
    let beside = weights_name.filter(|_| !args.embed);
    let task = cx.term.task("compiling", 1);
    let built = artifact::build(plan, &Worker, scratch.path(), beside).map_err(failed)?;
    drop(task);
    let library = std::fs::read(&built.library)
        .map_err(|e| Error::Model(format!("cannot read {}: {e}", built.library.display())))?;
    let header = out.with_extension("h");
    let parts: [(&Path, Option<&[u8]>); 3] = [
        (&weights, built.weights.as_deref()),
        (&header, Some(built.header.as_bytes())),
        (out, Some(&library)),
    ];
    // All are written before the first one takes its name.
    let mut files = Vec::new();
    for (path, bytes) in parts.iter().filter_map(|(p, b)| Some((p, (*b)?))) {
        let mut file = OutputFile::create(path)?;
        file.write_all(bytes).map_err(|e| file.error(e))?;
        files.push(file);
    }
    files.into_iter().try_for_each(OutputFile::commit)?;
    if cx.term.quiet() {
        return Ok(());
    }
    let mut text = String::new();
    match &plan.versions[..] {
        [version] => steps(&mut text, version),
        versions => costs(&mut text, versions, &built.code),
    }
    for (dim, bound) in &plan.dims {
        text.push_str(&format!("{dim} is at most {bound}\n"));
    }
    text.push_str(&format!("weights {}, working memory {}\n", bytes(plan.weights), bytes(plan.arena)));
    let names: Vec<&str> = plan.versions.iter().map(|v| v.target.name.as_str()).collect();
    text.push_str(&format!("{name}: {} for {}\n", bytes(library.len() as u64), names.join(", ")));
    print(&text)
}

/// What the only version does.
fn steps(text: &mut String, version: &Version) {
    let mut kernels: std::collections::BTreeMap<&str, usize> = Default::default();
    for s in &version.steps {
        *kernels.entry(s.kernel.rsplit_once('_').map_or(&*s.kernel, |k| k.0)).or_default() += 1;
    }
    let mut table = Table::new(&["kernel", ">steps"]);
    kernels.iter().for_each(|(k, n)| table.row([(*k).to_owned(), n.to_string()]));
    painter(false).table(text, table);
    text.push_str(&format!("{} steps, {} distinct kernels\n", version.steps.len(), version.kernels.len()));
}

/// What each version costs.
fn costs(text: &mut String, versions: &[Version], code: &[u64]) {
    let mut table = Table::new(&["version", ">steps", ">kernels", ">code", ">weights of its own", ">memory"]);
    for (v, &code) in versions.iter().zip(code) {
        let (steps, kernels) = (v.steps.len().to_string(), v.kernels.len().to_string());
        table.row([v.target.name.clone(), steps, kernels, bytes(code), bytes(v.weights), bytes(v.arena)]);
    }
    painter(false).table(text, table);
}
