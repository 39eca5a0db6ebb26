//! `qcc outliers`: what in a model stands out, and costs 8-bit codes their steps: weights far from the others of their tensor,
//! and channels of activations, with what to do about each.

use super::{Context, painter, print, print_json};
use crate::calibrate::{self, Calibration};
use crate::driver;
use crate::env::DriverEnv;
use crate::error::Error;
use crate::report::paint::{Painter, Table, percent, shorten};
use passes::outliers::{Found, Limits, look};
use passes::{PassCx, Report, Settings};
use serde::Serialize;
use std::path::PathBuf;

/// Names longer than this are cut in the middle.
const NAME_WIDTH: usize = 36;

/// Channels that are named in the table.
const NAMED: usize = 3;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model: .onnx, or .qir with its weights beside it
    model: PathBuf,
    /// A weight is an outlier that is further than so many standard deviations from the mean of its tensor
    #[arg(long, value_name = "K", default_value_t = 6.0, value_parser = positive)]
    sigma: f64,
    /// A channel of activations is one whose largest magnitude is more than so many times that of the median channel
    #[arg(long, value_name = "TIMES", default_value_t = 10.0, value_parser = positive)]
    channel: f64,
    #[command(flatten)]
    calibration: calibrate::Options,
}

fn positive(text: &str) -> Result<f64, String> {
    let found = text.parse::<f64>().ok().filter(|x| *x > 0.0 && x.is_finite());
    found.ok_or_else(|| "expected a positive number".into())
}

/// What `--json` prints.
#[derive(Serialize)]
struct Said<'a> {
    #[serde(flatten)]
    found: &'a Found,
    measured_on: &'a str,
    notes: &'a [String],
    warnings: &'a [String],
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let mut m = driver::read(&args.model, &cx.registry, &cx.term)?;
    let ops = cx.registry.ops();
    let data = Calibration::open(&args.calibration, &m, ops, &cx.term);
    let data = data.map_err(|e| Error::Calibration { message: e.message, help: e.help })?;
    let measured_on = data.description.clone();
    let mut report = Report::default();
    data.warnings.iter().for_each(|w| report.warn(w));
    data.notes.iter().for_each(|n| report.note(n));
    let env = DriverEnv { calibration: Some(data), ..DriverEnv::without_data(ops, cx.term) };
    let settings = Settings::default();
    let limits = Limits { sigma: args.sigma, channel: args.channel };
    let within = PassCx { ops, env: &env, settings: &settings, report: &mut report, rest: &[] };
    let found = look(&mut m, &within, &limits);
    let found = found.map_err(|e| Error::Model(format!("{}: {e}", args.model.display())))?;
    if cx.json {
        let (notes, warnings) = (&report.notes[..], &report.warnings[..]);
        return print_json(&Said { found: &found, measured_on: &measured_on, notes, warnings });
    }
    print(&text(&found, &limits, &report, &measured_on))
}

fn text(found: &Found, limits: &Limits, report: &Report, measured_on: &str) -> String {
    let mut out = String::new();
    let p = painter(false);
    let beyond = format!(">beyond {} sigma", limits.sigma);
    let mut t = Table::new(&["weight", ">K x N", ">max", &beyond, ">range ratio", ">wasted codes"]);
    for w in &found.weights {
        t.row([
            shorten(&w.weight, NAME_WIDTH),
            format!("{} x {}", w.k, w.n),
            format!("{:.3}", w.max),
            w.beyond.to_string(),
            format!("{:.2}", w.range_ratio),
            percent(w.wasted),
        ]);
    }
    p.table(&mut out, t);
    let mut t = Table::new(&["activation", ">channels", ">max", ">mean", ">ratio", "outlier channels"]);
    for a in &found.activations {
        let named = a.outliers.iter().take(NAMED).map(|o| format!("{} ({:.1})", o.channel, o.max));
        let mut named: Vec<String> = named.collect();
        if a.outliers.len() > NAMED {
            named.push(format!("{} more", a.outliers.len() - NAMED));
        }
        t.row([
            shorten(&a.value, NAME_WIDTH),
            a.channels.to_string(),
            format!("{:.2}", a.max),
            format!("{:.3}", a.mean),
            format!("{:.1}", a.ratio),
            named.join(", "),
        ]);
    }
    p.table(&mut out, t);
    alerts(&mut out, &p, found);
    report.notes.iter().for_each(|n| p.line(&mut out, &format!("note: {n}")));
    report.warnings.iter().for_each(|w| p.warning(&mut out, w));
    p.line(&mut out, &format!("measured on {measured_on}"));
    out
}

fn alerts(out: &mut String, p: &Painter, found: &Found) {
    let weights = found.weights.iter().map(|w| (&w.weight, &w.alerts));
    let all = weights.chain(found.activations.iter().map(|a| (&a.value, &a.alerts)));
    let mut any = false;
    for (name, alert) in all.flat_map(|(name, alerts)| alerts.iter().map(move |a| (name, a))) {
        p.warning(out, &format!("{name}: {alert}"));
        any = true;
    }
    if !any {
        p.line(out, "nothing stands out");
    }
}
