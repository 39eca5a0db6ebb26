//! Compiles kernels in this process, and calls them.

use codegen::kernels::{Kernel, module};
use codegen::{Form, Request, Target, link};
use runtime::{Call, Kernels, Team};
use tempfile::TempDir;

/// Kernels that are loaded.
pub struct Loaded {
    kernels: Kernels,
    _dir: TempDir,
}

/// Compiles for `target`, which this machine must be.
pub fn load(target: &Target, kernels: &[&Kernel]) -> Loaded {
    let request =
        Request { mlir: module(kernels.iter().copied()), target: target.clone(), form: Form::Object };
    let object = codegen_mlir::compile(&request).unwrap_or_else(|e| panic!("{e}\n{}", request.mlir));
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("k.o"), dir.path().join("k.so"));
    std::fs::write(&from, object).unwrap();
    link::shared_library(&[from], &to, target).unwrap();
    let names: Vec<String> = kernels.iter().map(|k| k.name.clone()).collect();
    // SAFETY: the library was made a line above, for this machine.
    let kernels = unsafe { Kernels::open(&to, &names).unwrap() };
    Loaded { kernels, _dir: dir }
}

impl Loaded {
    /// Calls kernel number `kernel` on all its units.
    pub fn call(&self, kernel: usize, buffers: &[*mut u8], dims: &[i64], units: usize) {
        let call = Call { kernel, buffers, dims, units, work: 1 << 20 };
        // SAFETY: tests size the buffers as the forms of the kernels say.
        unsafe { self.kernels.call(&call, &Team::new()) };
    }
}

/// The targets that this machine runs.
pub fn targets() -> Vec<Target> {
    let names =
        ["x86-64", "x86-64-v3", "x86-64-v4", "avx512-vnni", "aarch64", "aarch64-dotprod", "aarch64-i8mm"];
    let all = names.iter().map(|n| Target::parse(n).unwrap());
    all.filter(|t| t.missing_here().is_some_and(|m| m.is_empty())).collect()
}
