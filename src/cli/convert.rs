//! `qcc convert`: a model in another format, in one file or with its weights beside it, or against a newer operator
//! set. What the model computes stays as it is.

use super::{Context, print};
use crate::driver;
use crate::env::DriverEnv;
use crate::error::Error;
use crate::files;
use crate::model::{self, Format, Loaded, SaveOptions};
use crate::pipeline::Pipeline;
use crate::report::paint::bytes;
use dialects::ir::{Diagnostic, Module};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model: .onnx, or .qir with its weights beside it
    model: PathBuf,
    /// Where to write it
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// What to write [default: by the name of the output]
    #[arg(long, value_enum, value_name = "FORMAT")]
    emit: Option<Format>,
    /// Put weights into a file beside the model (done for models over 1 GiB in any case)
    #[arg(long)]
    external_data: bool,
    /// Raise the model to this operator set of ONNX
    #[arg(long, value_name = "N")]
    opset: Option<i64>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let Loaded { mut module, mut warnings, files: read } = model::load(&args.model)?;
    files::refuse_overwrite(&args.output, &read)?;
    // A broken model may be wanted as text, to look at.
    let mut typed = module.clone();
    let found = driver::verify(&mut typed, &cx.registry);
    warnings.extend(found.iter().map(|d| format!("{} is not valid: {d}", args.model.display())));
    if let Some(n) = args.opset {
        raise(&mut typed, found, n, args, cx)?;
        module = typed;
    }
    let format = args.emit.unwrap_or_else(|| Format::of(&args.output));
    let before = model::total_size(&read);
    let save = SaveOptions { external_data: args.external_data, inputs: read };
    let after = model::save(&module, &args.output, format, save, &cx.term)?;
    for warning in &warnings {
        cx.term.trace(&format!("warning: {warning}\n"));
    }
    if cx.json {
        let json = serde_json::json!({
            "input": args.model.display().to_string(),
            "output": args.output.display().to_string(),
            "input_bytes": before,
            "output_bytes": after,
            "warnings": warnings,
        });
        return print(&format!("{json:#}\n"));
    }
    if cx.term.quiet() {
        return Ok(());
    }
    let (model, output) = (args.model.display(), args.output.display());
    print(&format!("{model} ({}) -> {output} ({})\n", bytes(before), bytes(after)))
}

/// Writes the module, in which `found` is wrong, against operator set `n`; what has no form there is an error that names
/// its node.
fn raise(m: &mut Module, found: Vec<Diagnostic>, n: i64, args: &Args, cx: &Context) -> Result<(), Error> {
    let was = m.opset("onnx");
    if was > n {
        let message = format!("--opset {n}: the model is written against {was}, and is not lowered");
        return Err(Error::Usage { message, help: None });
    }
    if !found.is_empty() {
        return Err(Error::Invalid { path: args.model.clone(), found });
    }
    let pipeline = Pipeline::parse(&format!("raise-opset{{version={n}}}"), &cx.registry, &[], &[])?;
    let env = DriverEnv::without_data(cx.registry.ops(), cx.term);
    driver::run(m, &pipeline, &cx.registry, &env, &driver::Options::default())?;
    Ok(())
}
