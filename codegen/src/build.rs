//! Kernels, compiled and linked: each distinct one once, in as many parts as there are threads.

use crate::kernels::{Kernel, module};
use crate::{CompileError, Compiler, Form, Request, Target, link};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The shared library `out` of `kernels`, whose intermediate files go into `scratch`. The names of what is in it, sorted.
pub fn library(
    kernels: &[&Kernel],
    target: &Target,
    compiler: &dyn Compiler,
    scratch: &Path,
    out: &Path,
) -> Result<Vec<String>, CompileError> {
    let names: BTreeSet<&str> = kernels.iter().map(|k| k.name.as_str()).collect();
    link::shared_library(&objects(kernels, target, compiler, scratch)?, out, target)?;
    Ok(names.into_iter().map(str::to_owned).collect())
}

/// Objects of `kernels` in the folder `scratch`.
pub fn objects(
    kernels: &[&Kernel],
    target: &Target,
    compiler: &dyn Compiler,
    scratch: &Path,
) -> Result<Vec<PathBuf>, CompileError> {
    let distinct: BTreeMap<&str, &Kernel> = kernels.iter().map(|k| (k.name.as_str(), *k)).collect();
    let distinct: Vec<&Kernel> = distinct.into_values().collect();
    let part = distinct.len().div_ceil(rayon::current_num_threads()).max(1);
    distinct
        .par_chunks(part)
        .enumerate()
        .map(|(i, kernels)| {
            let mlir = module(kernels.iter().copied());
            let request = Request { mlir, target: target.clone(), form: Form::Object };
            let path = scratch.join(format!("kernels{i}.o"));
            std::fs::write(&path, compiler.compile(&request)?)
                .map_err(|e| CompileError::Missing(format!("cannot write {}: {e}", path.display())))?;
            Ok(path)
        })
        .collect()
}
