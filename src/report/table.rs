//! The report as text.

use super::paint::{Painter, Table, bytes, count, percent, seconds, shorten};
use super::{Float, Show, Summary};
use passes::WeightReport;

/// Names longer than this are cut in the middle.
const NAME_WIDTH: usize = 44;

/// The same, in a table that has to say why.
const SHORT_NAME_WIDTH: usize = 32;

/// The same, in a table of many columns.
const LEAST_NAME_WIDTH: usize = 22;

pub(super) fn render(s: &Summary, show: Show, p: &Painter) -> String {
    let mut out = String::new();
    match show.layers {
        true => layers(&mut out, p, s),
        false => weights(&mut out, p, s),
    }
    notes(&mut out, p, s);
    float(&mut out, p, &s.float);
    checks(&mut out, p, s);
    if show.timing {
        timing(&mut out, p, s);
    }
    if show.stats {
        stats(&mut out, p, s);
    }
    for note in &s.notes {
        p.line(&mut out, &format!("note: {note}"));
    }
    for warning in &s.warnings {
        p.warning(&mut out, warning);
    }
    totals(&mut out, p, s);
    out
}

fn weights(out: &mut String, p: &Painter, s: &Summary) {
    let measured = s.weights.iter().any(|w| w.output_error.is_some());
    let error = if measured { ">output error" } else { ">weight error" };
    let mut t = Table::new(&["weight", ">K x N", "method", ">before", ">after", error]);
    for w in &s.weights {
        t.row([
            shorten(&w.weight, NAME_WIDTH),
            format!("{} x {}", w.k, w.n),
            method(w),
            bytes(w.bytes_before),
            bytes(w.bytes_after),
            match (w.output_error, measured) {
                (Some(e), _) => percent(e),
                (None, true) => format!("{} (weight)", percent(w.weight_error)),
                (None, false) => percent(w.weight_error),
            },
        ]);
    }
    p.table(out, t);
}

/// A row for each step of each weight; what only the last of them has is said of the weight as it is in the end.
fn layers(out: &mut String, p: &Painter, s: &Summary) {
    let header = ["weight", "method", "step", ">weight error", ">output error", ">|W - Q|", ">max", ">mean"];
    let mut t = Table::new(&header);
    for w in &s.weights {
        let last = w.steps.len().saturating_sub(1);
        for (i, step) in w.steps.iter().enumerate() {
            let [name, method] = match i {
                0 => [shorten(&w.weight, LEAST_NAME_WIDTH), method(w)],
                _ => Default::default(),
            };
            let end = |e: f64| if i == last { format!("{e:.2e}") } else { String::new() };
            t.row([
                name,
                method,
                step.step.clone(),
                percent(step.weight_error),
                step.output_error.map_or("-".into(), percent),
                end(w.frobenius_error),
                end(w.max_error),
                end(w.mean_error),
            ]);
        }
    }
    p.table(out, t);
}

/// What else is to be known of weights.
fn notes(out: &mut String, p: &Painter, s: &Summary) {
    let mut said: Vec<&str> = Vec::new();
    for w in &s.weights {
        for note in &w.notes {
            // A note that many weights share is said once.
            if !said.contains(&note.as_str()) {
                said.push(note);
                let n = s.weights.iter().filter(|o| o.notes.contains(note)).count();
                let who = if n == 1 { w.weight.clone() } else { count(n, "weight") };
                p.line(out, &format!("{who}: {note}"));
            }
        }
    }
    if !said.is_empty() {
        out.push('\n');
    }
}

/// `awq int4 g32`; a group of a whole row has no number, and neither has a weight that is still float.
fn method(w: &WeightReport) -> String {
    match w.group_size {
        _ if w.bits >= 16 => w.method.clone(),
        g if g >= w.k => format!("{} int{} row", w.method, w.bits),
        g => format!("{} int{} g{g}", w.method, w.bits),
    }
}

fn float(out: &mut String, p: &Painter, float: &[Float]) {
    let mut t = Table::new(&["stays float", "op", ">shape", ">bytes", "why"]);
    for f in float {
        let shape: Vec<String> = f.shape.iter().map(u64::to_string).collect();
        let op = f.op.strip_prefix("onnx.").unwrap_or(&f.op);
        let name = shorten(&f.weight, SHORT_NAME_WIDTH);
        t.row([name, op.to_string(), shape.join(" x "), bytes(f.bytes), f.why.clone()]);
    }
    p.table(out, t);
}

fn checks(out: &mut String, p: &Painter, s: &Summary) {
    let mut t = Table::new(&["check", ">wiring", ">quantized weights", ">int8 activations"]);
    let show = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.1e}"));
    for r in &s.passes {
        if let Some(c) = &r.check {
            t.row([r.name().to_string(), show(c.wiring), show(c.quantization), show(c.activations)]);
        }
    }
    p.table(out, t);
}

fn timing(out: &mut String, p: &Painter, s: &Summary) {
    let mut t = Table::new(&["pass", "changed", ">time"]);
    for r in &s.passes {
        t.row([r.name(), if r.changed { "yes" } else { "no" }, &seconds(r.seconds)]);
    }
    let rest = s.totals.seconds - s.passes.iter().map(|r| r.seconds).sum::<f64>();
    t.row(["reading, checking, writing", "", &seconds(rest.max(0.0))]);
    p.table(out, t);
}

fn stats(out: &mut String, p: &Painter, s: &Summary) {
    let mut t = Table::new(&["pass", ">count", "what"]);
    for r in &s.passes {
        for (what, n) in &r.counts {
            t.row([r.name(), &n.to_string(), what]);
        }
    }
    p.table(out, t);
}

fn totals(out: &mut String, p: &Painter, s: &Summary) {
    let t = &s.totals;
    if !s.weights.is_empty() {
        let bits = t.bits_per_weight.map(|b| format!(" at {b:.3} bits per weight")).unwrap_or_default();
        let float = match s.float.len() {
            0 => "no weight-bearing op stays float".to_string(),
            n => {
                let verb = if n == 1 { "stays" } else { "stay" };
                let size = bytes(float_bytes(&s.float));
                format!("{} {verb} float ({size})", count(n, "weight-bearing op"))
            }
        };
        p.line(out, &format!("{} quantized{bits}; {float}", count(s.weights.len(), "weight")));
    }
    if let Some(c) = &s.calibration {
        p.line(out, &format!("calibration: {c}"));
    }
    let (input, time) = (bytes(t.input_bytes), seconds(t.seconds));
    match (&s.output, t.output_bytes) {
        (Some(path), Some(n)) => {
            let ratio = n as f64 / t.input_bytes.max(1) as f64;
            p.line(out, &format!("{path}: {input} -> {} ({}), {time}", bytes(n), percent(ratio)));
        }
        _ => p.line(out, &format!("{}: {input}, nothing written, {time}", s.input)),
    }
}

/// A weight that several ops use counts once.
fn float_bytes(float: &[Float]) -> u64 {
    let first = |i: usize| !float[..i].iter().any(|f| f.weight == float[i].weight);
    (0..float.len()).filter(|&i| first(i)).map(|i| float[i].bytes).sum()
}
