//! `qcc sensitivity`: how much each weight costs when it alone is quantized, what it would save to leave it out, and
//! what to do about it.
//!
//! The recommendation weighs measured divergence against bytes in the file. The price of divergence is what a byte buys
//! on the average where every weight gets the finest form that codes have, 8 bits as a rule. A weight gets a better form, be it a smaller group, 8 bits or float, while each
//! further byte for it saves at least [`WORTH`] times as much. Its forms are measured for it alone, and only where
//! its whole divergence would be worth the bytes of the cheapest one.

use super::measuring::{self, Measuring};
use super::{Context, painter, print, print_json};
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::report::paint::{Table, bytes, nats, percent, shorten};
use dialects::ir::Module;
use passes::sensitivity::Variant;
use passes::{Distance, Progress, dce};
use serde::Serialize;
use serde_json::{Value as Json, json};

/// How many times more than the average a byte must save to be worth it.
const WORTH: f64 = 2.0;

/// Groups to try where a smaller one is wanted, the largest that is smaller first.
const GROUPS: [i64; 4] = [128, 64, 32, 16];

/// Names longer than this are cut in the middle.
const NAME_WIDTH: usize = 32;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The quantizing passes with their options, such as awq{group=64}
    #[arg(long, short, value_name = "PASSES", default_value = "rtn")]
    pass: String,
    #[command(flatten)]
    measuring: measuring::Setup,
}

/// A form that a weight may have in the file.
#[derive(Clone, Debug, Serialize)]
struct Form {
    /// `default`, `group 16`, `int8`, `float`.
    form: String,
    /// Bytes of its parts.
    bytes: u64,
    /// The divergence with this weight alone in this form.
    kl: f64,
}

/// What was measured of one weight.
#[derive(Debug, Serialize)]
struct Measured {
    weight: String,
    node: String,
    k: usize,
    n: usize,
    bytes_float: u64,
    bytes_quantized: u64,
    /// What the file loses when this weight alone is quantized; below zero where its float form must stay for another use.
    bytes_saved: i64,
    weight_error: f64,
    output_error: Option<f64>,
    /// With this weight alone quantized.
    alone: Distance,
    /// With all others quantized.
    all_but: Distance,
    /// The forms that were measured, by their bytes.
    forms: Vec<Form>,
    recommended: Form,
}

/// The model in one form.
#[derive(Debug, Serialize)]
struct Whole {
    passes: String,
    /// Bytes of all constants in the file.
    bytes: u64,
    distance: Distance,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Found {
    measured_on: String,
    bytes_float: u64,
    all: Whole,
    /// Nats that a byte saves on the average, where all weights get 8 bits.
    price: f64,
    /// Sorted: the most sensitive first.
    weights: Vec<Measured>,
    recommended: Whole,
    notes: Vec<String>,
    warnings: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let pipeline = args.measuring.pipeline(&args.pass, cx)?;
    let mut with = Measuring::open(&args.measuring, cx)?;
    let (mut v, all_bytes) = with.variant(&pipeline)?;
    let count = v.weights().len();
    let task = cx.term.task("measuring", 2 * count as u64);
    let all = with.distance(v.all())?;
    let bytes_float = dce::bytes(&with.m);
    let mut weights = (0..count)
        .map(|i| measure(&mut with, &mut v, i, bytes_float, &*task))
        .collect::<Result<Vec<_>, Error>>()?;
    drop(task);
    let price = forms(&mut with, &pipeline, &mut weights, all.kl, cx)?;
    for w in &mut weights {
        w.recommended = recommend(&w.forms, WORTH * price).clone();
    }
    let recommended = recommended(&mut with, &pipeline, &weights)?;
    weights.sort_by(|a, b| b.alone.kl.total_cmp(&a.alone.kl));
    let found = Found {
        measured_on: with.data(),
        bytes_float,
        all: Whole { passes: pipeline.normalized(), bytes: all_bytes, distance: all },
        price,
        weights,
        recommended,
        notes: with.report.notes.clone(),
        warnings: with.report.warnings.clone(),
    };
    if cx.json {
        return print_json(&found);
    }
    print(&text(&found, &with))
}

/// Measures weight `i` alone, and all the others.
fn measure(
    with: &mut Measuring,
    v: &mut Variant,
    i: usize,
    bytes_float: u64,
    task: &dyn Progress,
) -> Result<Measured, Error> {
    let alone = with.distance(v.only(i))?;
    task.advance(1);
    let all_but = with.distance(v.all_but(i))?;
    task.advance(1);
    let bytes = with.bytes(v, |w| w == i)?;
    let w = v.weights()[i].clone();
    let default = Form { form: "default".into(), bytes: w.bytes_after, kl: alone.kl };
    Ok(Measured {
        weight: w.weight,
        node: w.node,
        k: w.k,
        n: w.n,
        bytes_float: w.bytes_before,
        bytes_quantized: w.bytes_after,
        bytes_saved: bytes_float as i64 - bytes as i64,
        weight_error: w.weight_error,
        output_error: w.output_error,
        alone,
        all_but,
        recommended: default.clone(),
        forms: vec![default],
    })
}

/// Better forms by the options that make them.
fn better(pipeline: &Pipeline) -> Vec<(String, Vec<(&'static str, Json)>)> {
    let mut out = Vec::new();
    let group = pipeline.option("group").and_then(Json::as_i64);
    let smaller = group.and_then(|g| GROUPS.into_iter().find(|&s| g == -1 || s < g));
    out.extend(smaller.map(|g| (format!("group {g}"), vec![("group", json!(g))])));
    if pipeline.option("bits").and_then(Json::as_u64).is_some_and(|bits| bits < 8) {
        out.push(("int8".into(), vec![("bits", json!(8))]));
    }
    out
}

/// Measures the better forms of the weights where they may be worth their bytes, and returns the price of divergence.
fn forms(
    with: &mut Measuring,
    pipeline: &Pipeline,
    weights: &mut [Measured],
    all: f64,
    cx: &Context,
) -> Result<f64, Error> {
    let better = better(pipeline);
    let mut variants = Vec::new();
    for (form, changes) in &better {
        let changed = with.again(&pipeline.changed(changes))?;
        variants.push((form.clone(), with.variant(&changed)?.0));
    }
    let of =
        |v: &Variant, w: &Measured| v.weights().iter().position(|o| o.weight == w.weight && o.node == w.node);
    let (mut spent, mut saved) = (0, all);
    for w in weights.iter() {
        let wide = variants.last().and_then(|(_, v)| Some(v.weights()[of(v, w)?].bytes_after));
        spent += wide.unwrap_or(w.bytes_float).saturating_sub(w.bytes_quantized);
    }
    if let Some((_, v)) = variants.last_mut() {
        saved -= with.distance(v.all())?.kl;
    }
    let price = if spent > 0 { saved.max(0.0) / spent as f64 } else { 0.0 };
    let task = cx.term.task("measuring better forms", (weights.len() * variants.len()) as u64);
    for w in weights.iter_mut() {
        for (form, v) in &mut variants {
            task.advance(1);
            let Some(i) = of(v, w) else { continue };
            let bytes = v.weights()[i].bytes_after;
            let extra = bytes.saturating_sub(w.bytes_quantized).max(1);
            if w.alone.kl >= WORTH * price * extra as f64 && bytes < w.bytes_float {
                let kl = with.distance(v.only(i))?.kl;
                w.forms.push(Form { form: form.clone(), bytes, kl });
            }
        }
        w.forms.push(Form { form: "float".into(), bytes: w.bytes_float, kl: 0.0 });
        w.forms.sort_by_key(|f| f.bytes);
    }
    Ok(price)
}

/// The best of these forms, by their bytes, each of whose further bytes saves at least `price` nats.
fn recommend(forms: &[Form], price: f64) -> &Form {
    let mut best = forms.iter().find(|f| f.form == "default").expect("the default form was measured");
    loop {
        let gain = |f: &Form| match f.bytes.checked_sub(best.bytes) {
            None | Some(0) => f64::INFINITY,
            Some(extra) => (best.kl - f.kl) / extra as f64,
        };
        let further = forms.iter().filter(|f| f.kl < best.kl && gain(f) >= price);
        // The steepest step; of equal ones the smaller.
        let Some(next) = further.reduce(|a, b| if gain(b) > gain(a) { b } else { a }) else { return best };
        best = next;
    }
}

/// The model with every weight in the form recommended for it.
fn recommended(with: &mut Measuring, pipeline: &Pipeline, weights: &[Measured]) -> Result<Whole, Error> {
    let named = |form: &str| -> Vec<String> {
        weights.iter().filter(|w| w.recommended.form == form).map(|w| w.weight.clone()).collect()
    };
    let mut parts = Vec::new();
    for (form, mut changes) in better(pipeline) {
        let names = named(&form);
        if !names.is_empty() {
            changes.push(("only", json!(names)));
            parts.push(pipeline.changed(&changes));
        }
    }
    if !named("default").is_empty() {
        let mut skip = pipeline.steps.first().and_then(|s| s.filter()).map(|f| f.skip).unwrap_or_default();
        skip.extend(named("float"));
        parts.push(pipeline.changed(&[("skip", json!(skip))]));
    }
    let passes = parts.join(",");
    if parts.is_empty() {
        let m: Module = with.m.clone();
        return Ok(Whole { passes, bytes: dce::bytes(&m), distance: with.distance(&m)? });
    }
    let (mut v, bytes) = with.variant(&with.again(&passes)?)?;
    Ok(Whole { passes, bytes, distance: with.distance(v.all())? })
}

fn text(found: &Found, with: &Measuring) -> String {
    let mut out = String::new();
    let p = painter(false);
    let tokens = found.all.distance.perplexity.is_some();
    let second = if tokens { ">perplexity" } else { ">error" };
    let mut t =
        Table::new(&["weight", ">K x N", ">KL alone", second, ">KL all but", ">saved", "recommended"]);
    for w in &found.weights {
        let saved = match u64::try_from(w.bytes_saved) {
            Ok(n) => bytes(n),
            Err(_) => format!("-{}", bytes(w.bytes_saved.unsigned_abs())),
        };
        t.row([
            shorten(&w.weight, NAME_WIDTH),
            format!("{} x {}", w.k, w.n),
            nats(w.alone.kl),
            change(&w.alone),
            nats(w.all_but.kl),
            saved,
            recommendation(w),
        ]);
    }
    p.table(&mut out, t);
    with.said(&mut out, &p);
    let whole = |w: &Whole| {
        format!("KL {}, {} {}, {}", nats(w.distance.kl), &second[1..], change(&w.distance), bytes(w.bytes))
    };
    p.line(&mut out, &format!("all quantized:    {}", whole(&found.all)));
    p.line(&mut out, &format!("as recommended:   {}", whole(&found.recommended)));
    if found.recommended.passes != found.all.passes {
        p.line(&mut out, &format!("recommended:      {}", found.recommended.passes));
    }
    let float =
        found.all.distance.baseline_perplexity.map(|x| format!("perplexity {x:.4}, ")).unwrap_or_default();
    p.line(&mut out, &format!("float:            {float}{}", bytes(found.bytes_float)));
    p.line(&mut out, &format!("measured on:      {}", found.measured_on));
    out
}

/// The change of the perplexity, or the relative error of outputs that have none.
fn change(d: &Distance) -> String {
    match (d.perplexity, d.baseline_perplexity) {
        (Some(x), Some(float)) => format!("{:+.3} %", (x / float - 1.0) * 100.0),
        _ => percent(d.error.unwrap_or(f64::NAN).sqrt()),
    }
}

fn recommendation(w: &Measured) -> String {
    let more = || bytes(w.recommended.bytes.saturating_sub(w.bytes_quantized));
    match w.recommended.form.as_str() {
        "default" => "default".into(),
        "float" => format!("keep float, {} more", more()),
        form => format!("{form}, {} more", more()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(form: &str, bytes: u64, kl: f64) -> Form {
        Form { form: form.into(), bytes, kl }
    }

    #[test]
    fn bytes_are_spent_where_they_save_enough() {
        let forms = [
            form("default", 100, 0.9),
            form("group 16", 110, 0.8),
            form("int8", 200, 0.1),
            form("float", 800, 0.0),
        ];
        let of = |price: f64| recommend(&forms, price).form.clone();
        // The smaller group saves 0.01 a byte; from there int8 saves 0.0078 for each of 90, float 0.00017 for each of 600.
        assert_eq!(of(0.02), "default");
        assert_eq!(of(0.009), "group 16");
        assert_eq!(of(0.005), "int8");
        assert_eq!(of(0.0001), "float");
        // No form that is worse is taken for its price, nor one that cannot be measured.
        let worse = [form("default", 100, 0.5), form("group 16", 110, 0.6), form("int8", 200, f64::NAN)];
        assert_eq!(recommend(&worse, 0.0).form, "default");
        // A float weight that takes no more than its codes is always better.
        let tiny = [form("default", 100, 0.5), form("float", 90, 0.0)];
        assert_eq!(recommend(&tiny, 1e9).form, "float");
    }
}
