//! Models on disk: which reader or writer a path gets.

use crate::error::Error;
use crate::onnx::error::Problem;
use crate::term::Term;
use crate::{onnx, qir};
use dialects::ir::Module;
use std::path::{Path, PathBuf};

/// A file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// An ONNX model.
    Onnx,
    /// The IR as text, with its weights in a .safetensors file beside it.
    Qir,
}

impl Format {
    /// The format of a path: `.qir` is text, everything else ONNX.
    pub fn of(path: &Path) -> Format {
        match path.extension() {
            Some(e) if e == "qir" => Format::Qir,
            _ => Format::Onnx,
        }
    }
}

/// A model that was read.
pub struct Loaded {
    /// The model.
    pub module: Module,
    /// What is odd about it.
    pub warnings: Vec<String>,
    /// The files it was read from and still refers to.
    pub files: Vec<PathBuf>,
}

/// How to write a model.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Weights go to a file beside the model, whatever their size.
    pub external_data: bool,
    /// Files that must not be overwritten: those that the model was read from.
    pub inputs: Vec<PathBuf>,
}

/// Reads the model at `path`.
pub fn load(path: &Path) -> Result<Loaded, Error> {
    match Format::of(path) {
        Format::Onnx => {
            let read = onnx::import::read(path).map_err(|e| match &*e.problem {
                // It names the file itself.
                Problem::File(file) => Error::Model(file.to_string()),
                _ => Error::Model(e.to_string()),
            })?;
            let warnings = read.warnings.iter().map(ToString::to_string).collect();
            Ok(Loaded { module: read.module, warnings, files: read.files })
        }
        Format::Qir => qir::read(path),
    }
}

/// Writes `m` to `path`. Returns the bytes written, all files together.
pub fn save(
    m: &Module,
    path: &Path,
    format: Format,
    options: SaveOptions,
    term: &Term,
) -> Result<u64, Error> {
    match format {
        Format::Onnx => {
            let SaveOptions { external_data, inputs } = options;
            let options = onnx::export::Options { external_data, inputs };
            let mut bar = None;
            let mut before = 0;
            let mut progress = |done: u64, total: u64| {
                let bar = bar.get_or_insert_with(|| term.task("writing", total >> 20));
                bar.advance((done >> 20) - before);
                before = done >> 20;
            };
            let written = onnx::export::write(m, path, &options, &mut progress);
            let written = written.map_err(|e| Error::Model(e.to_string()))?;
            Ok(written.0.iter().map(|(_, bytes)| bytes).sum())
        }
        Format::Qir => qir::write(m, path, &options.inputs),
    }
}

/// Bytes of all these files.
pub fn total_size(files: &[PathBuf]) -> u64 {
    files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum()
}
