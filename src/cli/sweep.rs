//! `qcc sweep`: one model quantized in many ways: bytes, error of the weights, divergence and perplexity of each, and
//! which of them no other one beats.

use super::measuring::{self, Measuring};
use super::{Context, painter, print, print_json};
use crate::error::Error;
use crate::pipeline::{Pipeline, literal};
use crate::report::paint::{Table, bytes, nats};
use passes::{Distance, WeightReport, dce};
use serde::Serialize;
use serde_json::{Value as Json, json};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Passes to try, with options; one after the other where a + stands: rtn,awq{grid=10},awq+rtn
    #[arg(long, value_name = "PASSES", default_value = "rtn")]
    method: String,
    /// Bits per code to try
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [2, 3, 4, 8])]
    bits: Vec<u32>,
    /// Weights that share a scale, -1 for a whole row
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [32, 128], allow_negative_numbers = true)]
    group: Vec<i64>,
    /// Zero points in the middle of the codes, or not
    #[arg(long, value_name = "BOOL,BOOL", value_delimiter = ',', default_values_t = [false], action = clap::ArgAction::Append)]
    symmetric: Vec<bool>,
    /// Clipping to try, where a pass has it: true, false, or shares of the range, such as 0.9 [default: its own]
    #[arg(long, value_name = "VALUE,VALUE", value_delimiter = ',')]
    clip: Vec<String>,
    #[command(flatten)]
    measuring: measuring::Setup,
}

/// One way to quantize the model.
#[derive(Debug, Serialize)]
struct Point {
    passes: String,
    /// What is told apart in the table.
    method: String,
    bits: Option<u64>,
    group: Option<i64>,
    symmetric: Option<bool>,
    clip: Option<Json>,
    /// Bytes of all constants in the file, of weights that stay float too.
    bytes: u64,
    /// Bytes of codes, scales and zero points * 8 / quantized weights.
    bits_per_weight: f64,
    /// Root mean square error of the quantized weights.
    rmse: f64,
    distance: Distance,
    /// No other point has less divergence for as few bytes.
    frontier: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Found {
    measured_on: String,
    bytes_float: u64,
    baseline_perplexity: Option<f64>,
    points: Vec<Point>,
    notes: Vec<String>,
    warnings: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let ways = ways(args, cx)?;
    let mut with = Measuring::open(&args.measuring, cx)?;
    let task = cx.term.task("sweeping", ways.len() as u64);
    let mut points = Vec::with_capacity(ways.len());
    for (method, pipeline) in ways {
        points.push(point(&mut with, method, &pipeline)?);
        task.advance(1);
    }
    drop(task);
    points.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.distance.kl.total_cmp(&b.distance.kl)));
    mark(&mut points);
    let found = Found {
        measured_on: with.data(),
        bytes_float: dce::bytes(&with.m),
        baseline_perplexity: points.iter().find_map(|p| p.distance.baseline_perplexity),
        points,
        notes: with.report.notes.clone(),
        warnings: with.report.warnings.clone(),
    };
    if cx.json {
        return print_json(&found);
    }
    print(&text(&found, &with))
}

/// Every method with every value of the options that it has, each pipeline once.
fn ways(args: &Args, cx: &Context) -> Result<Vec<(String, Pipeline)>, Error> {
    let clip = args.clip.iter().map(|v| serde_json::from_str(v).unwrap_or_else(|_| json!(v)));
    let lists: [(&str, Vec<Json>); 4] = [
        ("bits", args.bits.iter().map(|v| json!(v)).collect()),
        ("group", args.group.iter().map(|v| json!(v)).collect()),
        ("symmetric", args.symmetric.iter().map(|v| json!(v)).collect()),
        ("clip", clip.collect()),
    ];
    let mut out: Vec<(String, Pipeline)> = Vec::new();
    let mut unclipped = !args.clip.is_empty();
    for method in methods(&args.method) {
        let pipeline = args.measuring.pipeline(&method.replace('+', ","), cx)?;
        let mut combinations: Vec<Vec<(&str, Json)>> = vec![Vec::new()];
        for (name, values) in
            lists.iter().filter(|(name, v)| !v.is_empty() && pipeline.option(name).is_some())
        {
            unclipped &= *name != "clip";
            combinations = combinations
                .into_iter()
                .flat_map(|c| values.iter().map(move |v| [c.clone(), vec![(*name, v.clone())]].concat()))
                .collect();
        }
        for changes in combinations {
            let changed = Pipeline::parse(&pipeline.changed(&changes), &cx.registry, &[], &[])?;
            if out.iter().all(|(_, p)| p.normalized() != changed.normalized()) {
                out.push((method.clone(), changed));
            }
        }
    }
    match unclipped {
        true => Err(Error::usage(
            "--clip is given, but no method has an option clip",
            "leave it out, or give rtn",
        )),
        false => Ok(out),
    }
}

/// The methods of a list, whose commas inside options do not count.
fn methods(list: &str) -> Vec<String> {
    let (mut out, mut depth) = (vec![String::new()], 0);
    for c in list.chars() {
        depth += i32::from(c == '{' || c == '[') - i32::from(c == '}' || c == ']');
        match c {
            ',' if depth == 0 => out.push(String::new()),
            c => out.last_mut().expect("the first is there from the start").push(c),
        }
    }
    out.iter().map(|m| m.trim().to_string()).collect()
}

fn point(with: &mut Measuring, method: String, pipeline: &Pipeline) -> Result<Point, Error> {
    let (mut v, bytes) = with.variant(pipeline)?;
    let distance = with.distance(v.all())?;
    let sum = |f: fn(&WeightReport) -> f64| v.weights().iter().map(f).sum::<f64>();
    let count = sum(|w| w.n as f64 * w.k as f64);
    let option = |name| pipeline.option(name);
    Ok(Point {
        passes: pipeline.normalized(),
        method,
        bits: option("bits").and_then(Json::as_u64),
        group: option("group").and_then(Json::as_i64),
        symmetric: option("symmetric").and_then(Json::as_bool),
        clip: option("clip").cloned(),
        bytes,
        bits_per_weight: sum(|w| w.bytes_after as f64) * 8.0 / count,
        rmse: (sum(|w| w.frobenius_error.powi(2)) / count).sqrt(),
        distance,
        frontier: false,
    })
}

/// Marks the points, sorted by bytes and then by divergence, that have less divergence than all before them.
fn mark(points: &mut [Point]) {
    let mut least = f64::INFINITY;
    for p in points {
        p.frontier = p.distance.kl < least;
        least = least.min(p.distance.kl);
    }
}

fn text(found: &Found, with: &Measuring) -> String {
    let mut out = String::new();
    let p = painter(false);
    let clipped = found.points.iter().any(|p| p.clip.is_some());
    let last = if found.baseline_perplexity.is_some() { ">perplexity" } else { ">error" };
    let mut header = vec!["method", ">bits", ">group", "symmetric"];
    header.extend(clipped.then_some("clip"));
    header.extend([">bytes", ">bits/weight", ">RMSE", ">KL", last, "best"]);
    let mut t = Table::new(&header);
    for point in &found.points {
        let or_none = |v: Option<String>| v.unwrap_or_else(|| "-".into());
        let mut row = vec![
            point.method.clone(),
            or_none(point.bits.map(|b| b.to_string())),
            or_none(point.group.map(|g| if g == -1 { "row".into() } else { g.to_string() })),
            or_none(point.symmetric.map(|s| if s { "yes" } else { "no" }.into())),
        ];
        row.extend(clipped.then(|| or_none(point.clip.as_ref().map(literal))));
        row.extend([
            bytes(point.bytes),
            format!("{:.3}", point.bits_per_weight),
            format!("{:.2e}", point.rmse),
            nats(point.distance.kl),
            match point.distance.perplexity {
                Some(x) => format!("{x:.4}"),
                None => format!("{:.2e}", point.distance.error.unwrap_or(f64::NAN).sqrt()),
            },
            if point.frontier { "*" } else { "" }.into(),
        ]);
        t.row(row);
    }
    p.table(&mut out, t);
    with.said(&mut out, &p);
    let float = found.baseline_perplexity.map(|x| format!("perplexity {x:.4}, ")).unwrap_or_default();
    p.line(&mut out, &format!("float: {float}{}", bytes(found.bytes_float)));
    p.line(
        &mut out,
        &format!("measured on {}; best: no other has less divergence for as few bytes", found.measured_on),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_inside_options_do_not_part_methods() {
        assert_eq!(methods("rtn"), ["rtn"]);
        assert_eq!(
            methods("rtn, awq{grid=10, only=[a,b]}+rtn ,awq"),
            ["rtn", "awq{grid=10, only=[a,b]}+rtn", "awq"]
        );
    }

    #[test]
    fn the_frontier_is_what_no_other_point_beats() {
        let point = |bytes, kl| Point {
            passes: String::new(),
            method: String::new(),
            bits: None,
            group: None,
            symmetric: None,
            clip: None,
            bytes,
            bits_per_weight: 0.0,
            rmse: 0.0,
            distance: Distance { kl, error: None, perplexity: None, baseline_perplexity: None, positions: 1 },
            frontier: false,
        };
        let mut points =
            [(10, 0.5), (10, 0.6), (20, 0.5), (30, f64::NAN), (40, 0.1)].map(|(b, kl)| point(b, kl));
        mark(&mut points);
        assert_eq!(points.map(|p| p.frontier), [true, false, false, false, true]);
    }
}
