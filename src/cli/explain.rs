//! `qcc explain`: the chain of rules that led from a node of the model to what computes its values now.

use super::{Context, print, print_json};
use crate::driver::{self, Options};
use crate::env::DriverEnv;
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::rules;
use passes::eqsat::explain::Chain;
use passes::{Settings, glob};
use std::fmt::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// The node, by its name or that of a result; `*` stands for anything
    #[arg(long, value_name = "NAME")]
    node: String,
    /// Passes in order; those that rewrite by rules are explained
    #[arg(long, short, value_name = "PASSES", default_value = "canonicalize,fuse")]
    pass: String,
    /// More rules, from files
    #[arg(long, value_name = "FILE")]
    rules: Vec<PathBuf>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let pipeline = Pipeline::parse(&args.pass, &cx.registry, &[], &[])?;
    if !pipeline.steps.iter().any(|s| s.pass.rewrites()) {
        return Err(Error::usage("no pass of the pipeline rewrites by rules", "give canonicalize or fuse"));
    }
    let mut m = driver::read(&args.model, &cx.registry, &cx.term)?;
    let known = m.live_ops().into_iter().any(|op| {
        let data = &m.ops[op];
        let results = data.results.iter().flatten().any(|v| glob(&args.node, &m.value_label(*v)));
        results || glob(&args.node, &data.loc)
    });
    if !known {
        let message = format!("{}: no node or value is named {:?}", args.model.display(), args.node);
        return Err(Error::usage(
            message,
            "qcc inspect shows the nodes with weights, qcc MODEL --emit qir all",
        ));
    }
    let settings = Settings {
        explain: true,
        allow_noop: true,
        profile: "ort-cpu".into(),
        rules: rules::load(&args.rules, cx.registry.ops())?,
        ..Settings::default()
    };
    let env = DriverEnv::without_data(cx.registry.ops(), cx.term);
    let options = Options { settings, ..Options::default() };
    let outcome = driver::run(&mut m, &pipeline, &cx.registry, &env, &options)?;
    let wanted = |c: &&Chain| glob(&args.node, &c.node) || glob(&args.node, &c.value);
    let chains: Vec<&Chain> = outcome.report.chains.iter().filter(wanted).collect();
    if cx.json {
        return print_json(&chains);
    }
    if chains.is_empty() {
        return print(&format!("{:?} is computed as it was\n", args.node));
    }
    let mut out = String::new();
    for c in chains {
        write(&mut out, c).expect("writing to a string succeeds");
    }
    print(&out)
}

fn write(out: &mut String, c: &Chain) -> std::fmt::Result {
    writeln!(out, "{}: {:?} at node {:?}", c.pass, c.value, c.node)?;
    writeln!(out, "    {}", c.before)?;
    for link in &c.links {
        writeln!(out, "  = {}    by {}", link.to, link.rule)?;
    }
    match &c.after {
        None => writeln!(out, "  nothing needs it any more"),
        Some(after) if c.links.last().is_none_or(|l| l.to != *after) => writeln!(out, "  = {after}"),
        Some(_) => Ok(()),
    }
}
