//! `qcc inspect`: opset, inputs, outputs, ops, parameters by type, and which weights can be quantized.

use super::{Context, painter, print, print_json};
use crate::driver;
use crate::error::Error;
use crate::model::{self, Loaded};
use crate::report::paint::{Painter, Table, bytes};
use dialects::ir::{Module, Value};
use passes::linear::{KERNEL_HINT, Weighted, find, size};
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model: .onnx, or .qir with its weights beside it
    #[arg(value_name = "MODEL")]
    model: PathBuf,
}

/// What a model holds.
#[derive(Serialize)]
struct Inspection {
    model: String,
    file_bytes: u64,
    ir_version: i64,
    opsets: BTreeMap<String, i64>,
    producer: String,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// How often each op stands in the model, the commonest first.
    ops: Vec<(String, usize)>,
    /// By element type.
    constants: BTreeMap<String, Constants>,
    weights: Vec<Weight>,
    /// What inference and the verifier find wrong.
    errors: Vec<String>,
    warnings: Vec<String>,
    recipe: Option<String>,
}

#[derive(Serialize)]
struct Port {
    name: String,
    #[serde(rename = "type")]
    ty: String,
}

#[derive(Default, Serialize)]
struct Constants {
    tensors: u64,
    elements: u64,
    bytes: u64,
}

/// A weight at one op that uses it.
#[derive(Serialize)]
struct Weight {
    weight: String,
    shape: Vec<u64>,
    elem: String,
    bytes: u64,
    op: String,
    node: String,
    /// `[K, N]` when it can be quantized.
    k_n: Option<[usize; 2]>,
    /// Why it cannot.
    why_not: Option<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let Loaded { mut module, warnings, files } = model::load(&args.model)?;
    let errors = driver::verify(&mut module, &cx.registry);
    let found = Inspection {
        model: args.model.display().to_string(),
        file_bytes: model::total_size(&files),
        ir_version: module.ir_version,
        opsets: module.opsets.iter().map(|(k, v)| (k.to_string(), *v)).collect(),
        producer: producer(&module),
        inputs: ports(&module, &module.regions[module.top].args),
        outputs: ports(&module, &module.regions[module.top].results),
        ops: histogram(&module),
        constants: constants(&module),
        weights: find(&module).into_iter().filter_map(|w| weight(&module, w)).collect(),
        errors: errors.iter().map(ToString::to_string).collect(),
        warnings,
        recipe: module.meta.get("metadata.qcc.recipe").map(|r| r.to_string()),
    };
    match cx.json {
        true => print_json(&found),
        false => print(&found.text(&painter(false))),
    }
}

fn producer(m: &Module) -> String {
    let get = |k: &str| m.meta.get(k).map(|s| &**s).filter(|s| !s.is_empty());
    [get("producer_name"), get("producer_version")].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// Inputs that are constants too are weights, not inputs.
fn ports(m: &Module, values: &[Value]) -> Vec<Port> {
    let real = values.iter().filter(|&&v| m.const_of(v).is_none());
    real.map(|&v| Port { name: m.value_label(v), ty: m.ty(v).to_string() }).collect()
}

fn histogram(m: &Module) -> Vec<(String, usize)> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for op in m.live_ops() {
        let name = m.ops[op].name.as_str();
        *counts.entry(name.strip_prefix("onnx.").unwrap_or(name).to_string()).or_default() += 1;
    }
    let mut list: Vec<_> = counts.into_iter().collect();
    list.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    list
}

/// Initializers and tensors in attributes, each once.
fn constants(m: &Module) -> BTreeMap<String, Constants> {
    let mut out: BTreeMap<String, Constants> = BTreeMap::new();
    for id in passes::dce::constants(m) {
        let c = &m.consts[id];
        let row = out.entry(c.elem.to_string()).or_default();
        row.tensors += 1;
        row.elements += c.count();
        row.bytes += c.byte_len();
    }
    out
}

fn weight(m: &Module, w: Weighted) -> Option<Weight> {
    let (op, value, k_n, why_not) = match w {
        Weighted::Linear(l) => (l.op, l.weight, Some([l.k, l.n]), None),
        Weighted::Kernel(l) => {
            let op = m.ops[l.op].name.op();
            (l.op, l.weight, None, Some(format!("{op} {KERNEL_HINT}")))
        }
        Weighted::Other { op, weight, why, .. } => (op, weight, None, Some(why)),
        Weighted::Kept { .. } => return None,
    };
    let (shape, bytes) = size(m, value);
    let data = &m.ops[op];
    Some(Weight {
        weight: m.value_label(value),
        shape,
        elem: m.ty(value).elem().map_or("?".into(), |e| e.to_string()),
        bytes,
        op: data.name.to_string(),
        node: data.loc.to_string(),
        k_n,
        why_not,
    })
}

impl Inspection {
    fn text(&self, p: &Painter) -> String {
        let mut out = String::new();
        let opsets: Vec<String> = self.opsets.iter().map(|(d, v)| format!("{d} {v}")).collect();
        p.line(&mut out, &format!("{}: {}", self.model, bytes(self.file_bytes)));
        p.line(&mut out, &format!("IR version {}, opset {}", self.ir_version, opsets.join(", ")));
        if !self.producer.is_empty() {
            p.line(&mut out, &format!("made by {}", self.producer));
        }
        if let Some(recipe) = &self.recipe {
            p.line(&mut out, &format!("quantized with {recipe}"));
        }
        out.push('\n');
        let mut t = Table::new(&["", "name", "type"]);
        for (what, ports) in [("input", &self.inputs), ("output", &self.outputs)] {
            for port in ports {
                t.row([what.to_string(), port.name.clone(), port.ty.clone()]);
            }
        }
        p.table(&mut out, t);
        let mut t = Table::new(&["op", ">count"]);
        for (op, n) in &self.ops {
            t.row([op.clone(), n.to_string()]);
        }
        p.table(&mut out, t);
        let mut t = Table::new(&["constants", ">tensors", ">elements", ">bytes"]);
        for (elem, c) in &self.constants {
            t.row([elem.clone(), c.tensors.to_string(), c.elements.to_string(), bytes(c.bytes)]);
        }
        p.table(&mut out, t);
        self.weights(&mut out, p);
        for e in &self.errors {
            p.line(&mut out, &format!("error: {e}"));
        }
        for w in &self.warnings {
            p.line(&mut out, &format!("warning: {w}"));
        }
        out
    }

    fn weights(&self, out: &mut String, p: &Painter) {
        let shape = |w: &Weight| w.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        let op = |w: &Weight| w.op.strip_prefix("onnx.").unwrap_or(&w.op).to_string();
        let (can, cannot): (Vec<_>, Vec<_>) = self.weights.iter().partition(|w| w.why_not.is_none());
        if !can.is_empty() {
            let mut t = Table::new(&["can be quantized", "op", ">K x N", "type", ">bytes"]);
            for w in &can {
                let [k, n] = w.k_n.unwrap_or_default();
                t.row([w.weight.clone(), op(w), format!("{k} x {n}"), w.elem.clone(), bytes(w.bytes)]);
            }
            p.table(out, t);
        }
        if !cannot.is_empty() {
            let mut t = Table::new(&["cannot", "op", ">shape", ">bytes", "why"]);
            for w in &cannot {
                let why = w.why_not.clone().unwrap_or_default();
                t.row([w.weight.clone(), op(w), shape(w), bytes(w.bytes), why]);
            }
            p.table(out, t);
        }
        let sum = |list: &[&Weight]| {
            let mut seen = HashSet::new();
            list.iter().filter(|w| seen.insert(&w.weight)).map(|w| w.bytes).sum::<u64>()
        };
        let text = match (can.len(), cannot.len()) {
            (0, 0) => "no weight-bearing op".to_string(),
            (a, b) => format!(
                "{a} of {} weight-bearing ops can be quantized ({}); {b} cannot ({})",
                a + b,
                bytes(sum(&can)),
                bytes(sum(&cannot))
            ),
        };
        p.line(out, &text);
    }
}
