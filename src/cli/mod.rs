//! The command line. `qcc model.onnx --pass ... -o out.onnx` is the default command; the others are subcommands,
//! one file each.

mod bench;
mod build;
mod convert;
mod diff;
mod eval;
mod explain;
mod generate;
mod inspect;
mod list;
mod measuring;
mod mixed;
mod outliers;
mod quantize;
mod rules;
mod run;
mod sensitivity;
mod statistics;
mod sweep;

use crate::Registry;
use crate::error::Error;
use crate::report::{Show, Summary, paint::Painter};
use crate::term::{self, Term};
use clap::{CommandFactory, Parser, Subcommand};
use miette::{GraphicalReportHandler, GraphicalTheme};
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

/// A quantization compiler: ONNX in, a typed graph rewritten by passes, quantized ONNX out.
#[derive(Parser)]
#[command(
    name = "qcc",
    version,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    max_term_width = 110,
    after_help = "Examples:\n  \
        qcc model.onnx --pass awq,pack-int4 -o model.q.onnx\n  \
        qcc model.onnx --pass 'rtn{group=64, skip=[*lm_head*]},pack-int4' -o model.q.onnx\n  \
        qcc model.onnx --preset int4-awq --calib tokens.npy -o model.q.onnx --strict\n  \
        qcc eval model.q.onnx --tokens eval.npy --baseline model.onnx\n  \
        qcc run model.onnx --input x=x.npy -o out.npz\n  \
        qcc generate model.q.onnx --tokenizer tokenizer.json --prompt 'Once upon a time'\n  \
        qcc bench model.q.onnx --against model.onnx --tokens eval.npy\n  \
        qcc diff model.onnx model.q.onnx --input x=x.npy\n  \
        qcc sensitivity model.onnx --calib tokens.npy --pass rtn\n  \
        qcc outliers model.onnx --calib tokens.npy\n  \
        qcc sweep model.onnx --calib tokens.npy --bits 3,4,8 --group 32,128\n  \
        qcc convert model.onnx -o model.qir\n  \
        qcc rules --check my.qrw\n  \
        qcc build model.q.onnx -o model.so\n  \
        qcc explain model.onnx --node '/layer/Add'\n  \
        qcc inspect model.onnx"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    quantize: quantize::Args,
    #[command(flatten)]
    global: Global,
}

/// Flags of every command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "General")]
struct Global {
    /// Threads to compute with [default: one per core]; the result does not depend on it
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Say nothing but errors and what was asked for by name
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Report as JSON on stdout
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// How good a language model is: perplexity, accuracy, and its distance from a baseline
    Eval(eval::Args),
    /// What a model holds, and which of its weights can be quantized
    Inspect(inspect::Args),
    /// Run a model on given inputs
    Run(run::Args),
    /// Text from a causal language model, token by token
    Generate(generate::Args),
    /// How good, how fast and how large a language model is: perplexity, prefill, decoding, memory
    Bench(bench::Args),
    /// Run two models on the same inputs, and find where they part
    Diff(diff::Args),
    /// What each weight costs when it is quantized, and what to do about it
    Sensitivity(sensitivity::Args),
    /// What stands out in weights and activations, and what to do about it
    Outliers(outliers::Args),
    /// Bytes, errors and distance of a model quantized in many ways
    Sweep(sweep::Args),
    /// Write a model in another format, as one file or two, or against a newer operator set
    Convert(convert::Args),
    /// The rules of exact rewrites: list them, or check a file of them
    Rules(rules::Args),
    /// Compile a model to a shared library for this or another processor (needs a build with the feature mlir)
    Build(build::Args),
    /// Which rules led from a node of a model to what computes its values now
    Explain(explain::Args),
}

/// What a command works with.
struct Context {
    registry: Registry,
    term: Term,
    json: bool,
}

/// The whole program: parses the command line, runs it, and renders what goes wrong. Exit status 0 is success,
/// 1 bad input, 2 a wrong command line.
pub fn main(registry: Registry) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no errors, but come this way too.
            let _ = e.print();
            return ExitCode::from(e.exit_code() as u8);
        }
    };
    match run(cli, registry) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", render(&e));
            ExitCode::from(e.exit_code())
        }
    }
}

fn run(cli: Cli, registry: Registry) -> Result<(), Error> {
    term::handle_interrupts();
    if let Some(n) = cli.global.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n.into());
        pool.build_global().map_err(|e| Error::usage(format!("--threads {n}: {e}"), "give fewer threads"))?;
    }
    let cx = Context { registry, term: Term::new(cli.global.quiet), json: cli.global.json };
    match cli.command {
        Some(Command::Eval(args)) => eval::run(&args, &cx),
        Some(Command::Inspect(args)) => inspect::run(&args, &cx),
        Some(Command::Run(args)) => run::run(&args, &cx),
        Some(Command::Generate(args)) => generate::run(&args, &cx),
        Some(Command::Bench(args)) => bench::run(&args, &cx),
        Some(Command::Diff(args)) => diff::run(&args, &cx),
        Some(Command::Sensitivity(args)) => sensitivity::run(&args, &cx),
        Some(Command::Outliers(args)) => outliers::run(&args, &cx),
        Some(Command::Sweep(args)) => sweep::run(&args, &cx),
        Some(Command::Convert(args)) => convert::run(&args, &cx),
        Some(Command::Rules(args)) => rules::run(&args, &cx),
        Some(Command::Build(args)) => build::run(&args, &cx),
        Some(Command::Explain(args)) => explain::run(&args, &cx),
        None if cli.quantize.list_passes => list::run(&cx),
        None => match cli.quantize.completions {
            Some(shell) => {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "qcc", &mut text);
                print(&String::from_utf8_lossy(&text))
            }
            None => quantize::run(&cli.quantize, &cx),
        },
    }
}

/// Writes a result to stdout. A reader that closed the pipe early, as `head` does, is no failure.
fn print(text: &str) -> Result<(), Error> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::Model(format!("cannot write to stdout: {e}")))
        }
        _ => Ok(()),
    }
}

/// Writes a result to stdout as JSON.
fn print_json(found: &impl Serialize) -> Result<(), Error> {
    let json = serde_json::to_string_pretty(found).expect("results are plain data");
    print(&format!("{json}\n"))
}

fn render(e: &Error) -> String {
    let p = painter(true);
    let theme = if p.color { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).without_cause_chain().with_width(p.width.into());
    let mut out = String::new();
    match handler.render_report(&mut out, e) {
        Ok(()) => out.trim_matches('\n').to_string(),
        Err(_) => e.to_string(),
    }
}

/// Columns to write where there is no terminal to ask.
const WIDTH: u16 = 110;

/// How to write to stdout, or to stderr.
fn painter(to_stderr: bool) -> Painter {
    let terminal = if to_stderr { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
    let mut probe = comfy_table::Table::new();
    probe.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    if to_stderr {
        probe.use_stderr();
    }
    let width = probe.width().filter(|_| terminal).unwrap_or(WIDTH).clamp(60, 200);
    Painter { width, color: terminal && std::env::var_os("NO_COLOR").is_none() }
}

/// Prints a report as asked: JSON, text, or nothing.
fn publish(cx: &Context, s: &Summary, show: Show, to_stderr: bool) -> Result<(), Error> {
    if cx.json {
        return print(&format!("{}\n", s.json()));
    }
    if cx.term.quiet() && !show.stats && !show.timing {
        return Ok(());
    }
    let text = s.text(show, &painter(to_stderr));
    if to_stderr {
        cx.term.trace(&text);
        return Ok(());
    }
    print(&text)
}
