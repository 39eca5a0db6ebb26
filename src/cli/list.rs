//! `--list-passes`: name, summary, options with their defaults; and the presets.

use super::{Context, print, print_json};
use crate::error::Error;
use crate::pipeline::{PRESETS, defaults};
use passes::Exactness;
use serde_json::{Map, Value as Json, json};
use std::fmt::Write;

pub(super) fn run(cx: &Context) -> Result<(), Error> {
    let mut out = String::new();
    let mut list = Vec::new();
    for def in cx.registry.passes() {
        let options = match (def.defaults)() {
            Json::Object(map) => map,
            _ => Map::new(),
        };
        let pass = (def.make)(Json::Object(options.clone()))
            .map_err(|e| Error::Model(format!("{}: {e}", def.name)))?;
        let kind = match pass.exactness() {
            Exactness::Exact => "exact",
            Exactness::Lossy => "lossy",
        };
        let data = if pass.needs_calibration() { ", needs calibration data" } else { "" };
        write!(out, "{} ({kind}{data})\n    {}\n", def.name, pass.summary())
            .expect("writing to a string succeeds");
        if !options.is_empty() {
            writeln!(out, "    options: {}", defaults(&options)).expect("writing to a string succeeds");
        }
        list.push(json!({
            "name": def.name,
            "summary": pass.summary(),
            "exactness": kind,
            "needs_calibration": pass.needs_calibration(),
            "options": options,
        }));
    }
    if cx.json {
        let presets: Map<String, Json> = PRESETS.iter().map(|p| (p.0.to_string(), p.1.into())).collect();
        let all = json!({ "passes": list, "presets": presets });
        return print_json(&all);
    }
    out.push_str("\nPresets:\n");
    for (name, text, what) in PRESETS {
        writeln!(out, "  {name:<14} {text:<22} {what}").expect("writing to a string succeeds");
    }
    print(&out)
}
