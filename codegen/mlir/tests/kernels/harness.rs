//! Compiles kernels in this process, and calls them.

use codegen::kernels::{Kernel, module};
use codegen::target::Arch;
use codegen::{Feature, Form, Request, Target, link};
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
    let known = [Arch::X86_64, Arch::Aarch64].into_iter().flat_map(Target::names);
    let all = known.map(|n| Target::parse(n).unwrap());
    all.filter(|t| t.missing_here().is_some_and(|m| m.is_empty())).collect()
}

/// Targets that this machine stands in for: those of `chosen`, or all if `QCC_EVERY_TARGET` is set. None where it lacks
/// what every one of them counts on.
pub fn emulated(chosen: &[&str]) -> Vec<Target> {
    let native = Target::native();
    let able = native.arch == Arch::Aarch64 || [Feature::Fma, Feature::F16c].iter().all(|&f| native.has(f));
    if !able {
        println!("skipped: {chosen:?}, for which this machine does not stand in");
        return Vec::new();
    }
    let every = std::env::var_os("QCC_EVERY_TARGET").is_some();
    let known = [Arch::X86_64, Arch::Aarch64].into_iter().flat_map(Target::names);
    let names = known.filter(|n| every || chosen.contains(n));
    names.map(|n| Target::parse(n).unwrap().emulated()).collect()
}

/// What a processor must have for an instruction that kernels ask for by name.
fn needed(instruction: &str) -> (Arch, Option<Feature>) {
    match instruction.trim_start_matches("llvm.") {
        "x86.sse2.pmadd.wd" => (Arch::X86_64, None),
        "x86.avx2.pmadd.wd" | "x86.avx2.pmadd.ub.sw" | "x86.avx2.psign.b" => {
            (Arch::X86_64, Some(Feature::Avx2))
        }
        "x86.avx512.pmaddw.d.512" | "x86.avx512.pmaddubs.w.512" => (Arch::X86_64, Some(Feature::Avx512)),
        "x86.avx512.vpdpbusd.512" | "x86.avx512.vpdpwssd.512" => (Arch::X86_64, Some(Feature::Avx512Vnni)),
        "x86.ldtilecfg" | "x86.tilerelease" | "x86.tilezero" | "x86.tileloadd64" | "x86.tilestored64"
        | "x86.tdpbusd" | "x86.tdpbsud" => (Arch::X86_64, Some(Feature::AmxInt8)),
        "aarch64.neon.sdot.v4i32.v16i8" => (Arch::Aarch64, Some(Feature::DotProd)),
        "aarch64.neon.usdot.v4i32.v16i8" | "aarch64.neon.usmmla.v4i32.v16i8" => {
            (Arch::Aarch64, Some(Feature::I8mm))
        }
        other => panic!("{other}: a new instruction, which this list must name"),
    }
}

/// Checks that `mlir` asks for no instruction that `target` lacks.
pub fn check_instructions(mlir: &str, target: &Target) {
    for call in mlir.split("llvm.call_intrinsic \"").skip(1) {
        let name = call.split('"').next().unwrap();
        let (arch, feature) = needed(name);
        assert!(arch == target.arch && feature.is_none_or(|f| target.has(f)), "{name} for {target}");
    }
    let count = |text: &str| mlir.matches(text).count();
    let named = count("llvm.x86.") + count("llvm.aarch64.");
    assert_eq!(named, count("llvm.call_intrinsic"), "instructions are asked for in one way");
}
