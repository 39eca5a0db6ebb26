//! `qcc inspect`: opset, inputs, outputs, ops, parameters by type, and which weights can be quantized.

use super::{Context, print};
use crate::error::Error;
use crate::model;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
}

pub(super) fn run(args: &Args, _cx: &Context) -> Result<(), Error> {
    let loaded = model::load(&args.model)?;
    print(&format!("{} ops\n", loaded.module.live_ops().len()))
}
