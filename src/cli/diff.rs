//! `qcc diff`: two models on the same inputs, value by value: where they part, and how the error goes on from there.
//!
//! Values are the same when they have the same name. They are compared in the order in which the first model computes
//! them. Memory is bounded: when the values do not fit the budget together, both models run once more for the rest.

use super::run::{With, numbers, top_values};
use super::{Context, painter, print, print_json};
use crate::check;
use crate::data::inputs;
use crate::driver;
use crate::error::Error;
use crate::report::paint::{Table, count};
use dialects::exec::{ExecError, Executor};
use dialects::ir::{Module, Value};
use dialects::ops::Item;
use dialects::tensor::Tensor;
use serde::Serialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Bytes of values of the first model that are kept for the second.
const BUDGET: usize = 1 << 30;

/// Values shown after the first one that differs.
const SHOWN: usize = 20;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model to compare with
    a: PathBuf,
    /// The model that is compared
    b: PathBuf,
    #[command(flatten)]
    inputs: inputs::Options,
    /// A value differs when its relative error (Frobenius) is larger
    #[arg(long, value_name = "X", default_value_t = 1e-4, value_parser = tolerance)]
    tolerance: f64,
    /// Show every value
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    with: With,
}

fn tolerance(s: &str) -> Result<f64, String> {
    s.parse().ok().filter(|&x: &f64| x >= 0.0).ok_or_else(|| "expected a number of at least 0".to_string())
}

/// How one value differs.
#[derive(Clone, Debug, Serialize)]
struct Difference {
    value: String,
    node: String,
    op: String,
    /// Frobenius norm of the difference over that of the value.
    relative: f64,
    /// The largest difference of two elements.
    max_abs: f64,
    /// Why the two cannot be compared.
    why: Option<String>,
}

/// What was found.
#[derive(Serialize)]
struct Found {
    compared: usize,
    /// Values of the first model that the second does not have.
    only_in_a: usize,
    /// Values of the second model that the first does not have.
    only_in_b: usize,
    /// The first value whose error is above the tolerance.
    first: Option<String>,
    values: Vec<Difference>,
    outputs: Vec<Difference>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let read = |path| driver::read(path, &cx.registry, &cx.term);
    let (a, b) = (read(&args.a)?, read(&args.b)?);
    let given = args.inputs.read(&a, cx.registry.ops(), &cx.term)?;
    if let Some(made) = &given.made {
        cx.term.trace(&format!("inputs: {made}\n"));
    }
    let given_b = same_inputs(&a, &given.values, &b, args)?;
    let exec = args.with.executor(cx);
    let pairs = pairs(&a, &b);
    let values = compare(&*exec, (&a, &given.values, &args.a), (&b, &given_b, &args.b), &pairs)?;
    let first = values.iter().position(|d| d.relative > args.tolerance);
    let outputs = a.regions[a.top].results.iter().map(|&v| &*a.values[v].name);
    let found = Found {
        compared: values.len(),
        only_in_a: computed(&a) - values.len(),
        only_in_b: computed(&b) - values.len(),
        first: first.map(|i| values[i].value.clone()),
        outputs: outputs.filter_map(|name| values.iter().find(|d| d.value == name).cloned()).collect(),
        values,
    };
    if cx.json {
        return print_json(&found);
    }
    print(&text(&found, first, args))
}

/// The values that a model computes in its top graph.
fn computed(m: &Module) -> usize {
    top_values(m).filter(|&v| m.def_op(v).is_some() && m.const_of(v).is_none()).count()
}

/// Values of the same name that both models compute, in the order of the first.
fn pairs(a: &Module, b: &Module) -> Vec<(Value, Value)> {
    let own = |m: &Module| {
        let own = |&v: &Value| m.def_op(v).is_some() && m.const_of(v).is_none();
        top_values(m).filter(own).collect::<Vec<_>>()
    };
    let in_b: HashMap<String, Value> = own(b)
        .into_iter()
        .map(|v| (b.values[v].name.to_string(), v))
        .filter(|(n, _)| !n.is_empty())
        .collect();
    own(a).into_iter().filter_map(|v| Some((v, *in_b.get(&*a.values[v].name)?))).collect()
}

/// The inputs of the first model as those of the second, by name.
fn same_inputs(
    a: &Module,
    given: &[(Value, Item)],
    b: &Module,
    args: &Args,
) -> Result<Vec<(Value, Item)>, Error> {
    let inputs = &b.regions[b.top].args;
    let same = |(v, item): &(Value, Item)| {
        let name = &a.values[*v].name;
        match inputs.iter().find(|&&w| b.values[w].name == *name) {
            Some(&w) => Ok((w, item.clone())),
            None => Err(Error::Model(format!(
                "{} has no input {name:?}, as {} has",
                args.b.display(),
                args.a.display()
            ))),
        }
    };
    given.iter().map(same).collect()
}

/// A model, its inputs, and its file.
type Subject<'m> = (&'m Module, &'m [(Value, Item)], &'m Path);

fn compare(
    exec: &dyn Executor,
    (a, inputs_a, path_a): Subject,
    (b, inputs_b, path_b): Subject,
    pairs: &[(Value, Value)],
) -> Result<Vec<Difference>, Error> {
    let run = |m: &Module, path: &Path, inputs, wanted: &[Value], sink: &mut dialects::exec::Sink| {
        let ran = exec.prepare(m, wanted).and_then(|p| p.run(inputs, sink));
        ran.map_err(|e: ExecError| Error::Model(format!("{}: {e}", path.display())))
    };
    let mut found: HashMap<Value, Difference> = HashMap::new();
    let mut left = pairs.to_vec();
    while !left.is_empty() {
        let wanted: Vec<Value> = left.iter().map(|p| p.0).collect();
        let (mut kept, mut bytes): (HashMap<Value, Item>, usize) = Default::default();
        run(a, path_a, inputs_a, &wanted, &mut |v, item| {
            let size = item.tensor().map_or(0, |t| t.data().byte_len());
            if kept.is_empty() || bytes + size <= BUDGET {
                bytes += size;
                kept.insert(v, item.clone());
            }
            Ok(())
        })?;
        let (now, later): (Vec<_>, Vec<_>) = left.into_iter().partition(|p| kept.contains_key(&p.0));
        let of: HashMap<Value, Value> = now.iter().map(|&(x, y)| (y, x)).collect();
        let wanted: Vec<Value> = now.iter().map(|p| p.1).collect();
        run(b, path_b, inputs_b, &wanted, &mut |w, item| {
            let v = of[&w];
            found.insert(v, difference(a, v, &kept[&v], item));
            Ok(())
        })?;
        left = later;
    }
    Ok(pairs.iter().map(|(v, _)| found.remove(v).expect("every wanted value reaches the sink")).collect())
}

fn difference(m: &Module, v: Value, x: &Item, y: &Item) -> Difference {
    let op = m.def_op(v).map(|(op, _)| &m.ops[op]);
    let mut d = Difference {
        value: m.values[v].name.to_string(),
        node: op.map_or_else(String::new, |op| op.loc.to_string()),
        op: op.map_or_else(String::new, |op| op.name.to_string()),
        relative: f64::INFINITY,
        max_abs: f64::INFINITY,
        why: None,
    };
    match (x, y) {
        (Item::Tensor(x), Item::Tensor(y)) if (x.elem(), x.shape()) == (y.elem(), y.shape()) => {
            (d.relative, d.max_abs) = errors(x, y);
        }
        (Item::Tensor(x), Item::Tensor(y)) => {
            let of = |t: &Tensor| format!("{} {:?}", t.elem(), t.shape());
            d.why = Some(format!("{} against {}", of(x), of(y)));
        }
        (x, y) if x == y => (d.relative, d.max_abs) = (0.0, 0.0),
        _ => d.why = Some("no tensors, and not the same".into()),
    }
    d
}

/// The relative error (Frobenius) and the largest difference. The same infinity, or no number, on both sides is no
/// difference; on one side only, it is an infinite one.
fn errors(x: &Tensor, y: &Tensor) -> (f64, f64) {
    if x == y {
        return (0.0, 0.0);
    }
    let (x, y) = (numbers(x), numbers(y));
    if x.len() != y.len() || x.is_empty() {
        return (f64::INFINITY, f64::INFINITY);
    }
    let pairs = || x.iter().copied().zip(y.iter().copied());
    let infinite = |e: f64| if e.is_nan() { f64::INFINITY } else { e };
    let relative = infinite(check::relative(pairs()));
    let gap =
        |(x, y): (f64, f64)| if x == y || x.is_nan() && y.is_nan() { 0.0 } else { infinite((x - y).abs()) };
    let most = pairs().map(gap).fold(0.0, f64::max);
    (relative, most)
}

fn text(found: &Found, first: Option<usize>, args: &Args) -> String {
    let mut out = String::new();
    let p = painter(false);
    let (a, b) = (args.a.display(), args.b.display());
    p.line(
        &mut out,
        &format!(
            "{} of the same name compared; {} only in {a}, {} only in {b}",
            count(found.compared, "value"),
            found.only_in_a,
            found.only_in_b
        ),
    );
    match first.map(|i| &found.values[i]) {
        None => p.line(&mut out, &format!("no value differs by more than {:.0e}", args.tolerance)),
        Some(d) => p.line(
            &mut out,
            &format!(
                "the first value that differs by more than {:.0e}: {:?}, of {} at node {:?}",
                args.tolerance, d.value, d.op, d.node
            ),
        ),
    }
    out.push('\n');
    let mut table = Table::new(&["value", "op", ">relative", ">max abs", "node"]);
    let row = |d: &Difference| {
        let number = |x: f64| if d.why.is_some() { "-".into() } else { format!("{x:.2e}") };
        let node = d.why.as_ref().map_or(d.node.clone(), |why| format!("{}: {why}", d.node));
        [d.value.clone(), d.op.clone(), number(d.relative), number(d.max_abs), node]
    };
    // From the last value that is the same on to where the error has gone, and the outputs.
    let from = if args.all { 0 } else { first.map_or(found.values.len(), |i| i.saturating_sub(1)) };
    let to = if args.all { found.values.len() } else { found.values.len().min(from + SHOWN) };
    found.values[from..to].iter().for_each(|d| table.row(row(d)));
    p.table(&mut out, table);
    let mut outputs = Table::new(&["output", "op", ">relative", ">max abs", "node"]);
    found.outputs.iter().for_each(|d| outputs.row(row(d)));
    p.table(&mut out, outputs);
    out
}
