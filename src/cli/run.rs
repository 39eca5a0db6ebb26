//! `qcc run`: a model on given inputs; its outputs as a summary, and as arrays.

use super::{Context, painter, print};
use crate::calibrate::positive;
use crate::compiler::Worker;
use crate::data::{inputs, npz};
use crate::driver;
use crate::error::Error;
use crate::files;
use crate::report::paint::{Table, seconds};
use codegen::Native;
use dialects::exec::{ExecError, Executor, run_once};
use dialects::ir::interp::Interpreter;
use dialects::ir::{Elem, Module, Value};
use dialects::onnx::cast::convert;
use dialects::ops::Item;
use dialects::tensor::{Data, Tensor};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    #[command(flatten)]
    inputs: inputs::Options,
    /// Give this value instead of the model's outputs; any value of the top graph, by name. May be given more than once
    #[arg(long, value_name = "NAME")]
    value: Vec<String>,
    /// Where to write the values, as arrays (.npz); what numpy has no type for is widened
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Run this often, and report the median time of a run
    #[arg(long, value_name = "N", value_parser = positive)]
    repeat: Option<usize>,
    #[command(flatten)]
    with: With,
}

/// What to run with.
#[derive(clap::Args)]
pub(super) struct With {
    /// What computes
    #[arg(long, value_enum, default_value_t)]
    executor: Kind,
    /// Leave out the int8 activations that packed ops of accuracy_level 4 compute with
    #[arg(long)]
    exact: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    /// The interpreter: the reference
    #[default]
    Interp,
    /// Machine code for this processor, and the interpreter where there is none (needs a build with the feature mlir)
    Cpu,
}

impl With {
    /// The executor asked for.
    pub(super) fn executor(&self, cx: &Context) -> Box<dyn Executor> {
        self.executor.executor(self.exact, cx)
    }
}

/// Nanoseconds since the first call.
fn nanoseconds() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

impl Kind {
    /// The executor, without the roundings of packed ops if `exact`.
    pub(super) fn executor(self, exact: bool, cx: &Context) -> Box<dyn Executor> {
        let ops = cx.registry.ops().clone();
        match self {
            Kind::Interp => Box::new(Interpreter::new(ops).exact(exact)),
            Kind::Cpu => {
                let (term, said) = (cx.term, Mutex::new(String::new()));
                let tell = move |what: &dyn std::fmt::Display| {
                    let text = what.to_string();
                    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                    // A command may prepare a model more than once.
                    if !term.quiet() && *said != text {
                        term.trace(&text);
                        *said = text;
                    }
                };
                Box::new(Native::new(ops, Arc::new(Worker)).exact(exact).tells(nanoseconds, tell))
            }
        }
    }
}

/// A tensor that came out.
#[derive(Serialize)]
struct Out {
    name: String,
    elem: String,
    shape: Vec<usize>,
    min: Option<f64>,
    max: Option<f64>,
    mean: Option<f64>,
    /// Elements that are infinite or no number.
    not_finite: usize,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    if let Some(path) = &args.output {
        let from = args.inputs.files().chain([args.model.clone()]).collect::<Vec<_>>();
        files::refuse_overwrite(path, &from)?;
        if path.extension().is_none_or(|e| e != "npz") {
            let message = format!("-o {}: values are written as .npz", path.display());
            return Err(Error::usage(message, "give the output a name that ends in .npz"));
        }
    }
    let m = driver::read(&args.model, &cx.registry, &cx.term)?;
    let wanted = wanted(args, &m)?;
    let given = args.inputs.read(&m, cx.registry.ops(), &cx.term)?;
    if let Some(made) = &given.made {
        cx.term.trace(&format!("inputs: {made}\n"));
    }
    let exec = args.with.executor(cx);
    let failed = |e: &dyn std::fmt::Display| Error::Model(format!("{}: {e}", args.model.display()));
    let items = run_once(&*exec, &m, &given.values, &wanted).map_err(|e| failed(&e))?;
    let median = args.repeat.map(|n| median(&*exec, &m, &given.values, &wanted, n)).transpose();
    let median = median.map_err(|e| failed(&e))?;
    let mut tensors = Vec::new();
    for (&v, item) in wanted.iter().zip(items) {
        flatten(m.values[v].name.to_string(), item, &mut tensors);
    }
    if let Some(path) = &args.output {
        npz::write(path, &tensors)?;
    }
    let outs: Vec<Out> = tensors.iter().map(|(name, t)| out(name, t)).collect();
    if cx.json {
        let json = serde_json::json!({ "values": outs, "seconds": median });
        return print(&format!("{json:#}\n"));
    }
    if cx.term.quiet() {
        return Ok(());
    }
    let mut table = Table::new(&["value", "type", ">min", ">max", ">mean", ">not finite"]);
    for o in &outs {
        let shape: Vec<String> = o.shape.iter().map(ToString::to_string).collect();
        let number = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.6}"));
        table.row([
            o.name.clone(),
            format!("{}[{}]", o.elem, shape.join(", ")),
            number(o.min),
            number(o.max),
            number(o.mean),
            o.not_finite.to_string(),
        ]);
    }
    let mut text = String::new();
    painter(false).table(&mut text, table);
    if let (Some(s), Some(n)) = (median, args.repeat) {
        text.push_str(&format!("{} a run, the median of {n}\n", seconds(s)));
    }
    print(&text)
}

/// The median time of `n` runs, in seconds; what is done once for all runs does not count.
fn median(
    exec: &dyn Executor,
    m: &Module,
    inputs: &[(Value, Item)],
    wanted: &[Value],
    n: usize,
) -> Result<f64, ExecError> {
    let prepared = exec.prepare(m, wanted)?;
    let mut times = Vec::new();
    // Once more: the first run reads constants.
    for _ in 0..=n {
        let started = Instant::now();
        prepared.run(inputs, &mut |_, _| Ok(()))?;
        times.push(started.elapsed().as_secs_f64());
    }
    times[1..].sort_by(f64::total_cmp);
    Ok(times[1 + n / 2])
}

/// The values to compute: those named, or the model's outputs.
fn wanted(args: &Args, m: &Module) -> Result<Vec<Value>, Error> {
    if args.value.is_empty() {
        return Ok(m.regions[m.top].results.clone());
    }
    let find = |name: &String| {
        let found = top_values(m).find(|&v| *m.values[v].name == **name);
        found.ok_or_else(|| Error::Usage {
            message: format!("--value: the top graph has no value {name:?}"),
            help: None,
        })
    };
    args.value.iter().map(find).collect()
}

/// The values of the top graph, in program order.
pub(super) fn top_values(m: &Module) -> impl Iterator<Item = Value> + '_ {
    let top = &m.regions[m.top];
    let computed = top.ops.iter().flat_map(|&op| m.ops[op].results.iter().flatten().copied());
    top.args.iter().copied().chain(computed)
}

/// The tensors in an item: elements of a sequence are numbered, an optional without a value gives none.
fn flatten(name: String, item: Item, out: &mut Vec<(String, Tensor)>) {
    match item {
        Item::Tensor(t) => out.push((name, t)),
        Item::Sequence(items) => {
            items.into_iter().enumerate().for_each(|(i, item)| flatten(format!("{name}.{i}"), item, out));
        }
        Item::Optional(inner) => {
            if let Some(inner) = inner {
                flatten(name, *inner, out);
            }
        }
    }
}

/// The elements as numbers; none for text and complex numbers.
pub(super) fn numbers(t: &Tensor) -> Vec<f64> {
    match convert(t, Elem::F64, false).map(Tensor::into_data) {
        Ok(Data::F64(v)) => v,
        _ => Vec::new(),
    }
}

fn out(name: &str, t: &Tensor) -> Out {
    let v = numbers(t);
    let finite: Vec<f64> = v.iter().copied().filter(|x| x.is_finite()).collect();
    let some = |x: f64| (!finite.is_empty()).then_some(x);
    Out {
        name: name.into(),
        elem: t.elem().to_string(),
        shape: t.shape().to_vec(),
        min: some(finite.iter().copied().fold(f64::INFINITY, f64::min)),
        max: some(finite.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
        mean: some(finite.iter().sum::<f64>() / finite.len() as f64),
        not_finite: v.len() - finite.len(),
    }
}
