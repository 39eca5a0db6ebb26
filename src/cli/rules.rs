//! `qcc rules`: lists the rules of the exact rewrites, or checks a file of them.

use super::{Context, print, print_json};
use crate::error::Error;
use crate::rules;
use passes::eqsat;
use passes::eqsat::qrw::check;
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Args {
    /// Show every rule of the project, and which ops it is about
    #[arg(long)]
    list: bool,
    /// Try to refute the rules of this file
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    match &args.check {
        Some(path) => check(path, cx),
        None => list(cx),
    }
}

fn list(cx: &Context) -> Result<(), Error> {
    let rules = eqsat::rules();
    if cx.json {
        return print_json(&rules);
    }
    let mut out = String::new();
    let mut set = "";
    for rule in &rules {
        if rule.set != set {
            set = rule.set;
            let gap = if out.is_empty() { "" } else { "\n" };
            writeln!(out, "{gap}{set}").expect("writing to a string succeeds");
        }
        writeln!(out, "  {:<28} {}", rule.name, rule.ops.join(", ")).expect("writing to a string succeeds");
    }
    print(&out)
}

fn check(path: &Path, cx: &Context) -> Result<(), Error> {
    let ops = cx.registry.ops();
    let mut refused = Vec::new();
    let mut held = Vec::new();
    for rule in rules::read(path, ops)? {
        match check::check(&rule, ops) {
            Ok(models) => held.push((rule.name, models)),
            Err(e) => refused.push(e),
        }
    }
    if cx.json {
        let held: Vec<_> = held.iter().map(|(name, n)| json!({ "rule": name, "models": n })).collect();
        let why: Vec<String> = refused.iter().map(ToString::to_string).collect();
        print_json(&json!({ "held": held, "refused": why }))?;
    } else if !cx.term.quiet() {
        let lines = held.iter().map(|(name, n)| format!("{name:<28} holds on {n} models\n"));
        print(&lines.collect::<String>())?;
    }
    match refused.is_empty() {
        true => Ok(()),
        false => Err(Error::Refused { path: path.to_path_buf(), refused }),
    }
}
