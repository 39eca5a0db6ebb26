//! The machine that code is made for: an architecture and the instruction-set features that may be used.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use thiserror::Error;

pub use runtime::cpu::{Arch, Feature};

/// The names that LLVM knows a feature by.
fn llvm(feature: Feature) -> &'static str {
    match feature {
        Feature::Avx2 => "+avx2",
        Feature::Fma => "+fma",
        Feature::F16c => "+f16c",
        Feature::Avx512 => "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd",
        Feature::Avx512Vnni => "+avx512vnni",
        Feature::DotProd => "+dotprod",
        Feature::I8mm => "+i8mm",
    }
}

/// What code is made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The name by which it was asked for.
    pub name: String,
    /// The architecture.
    pub arch: Arch,
    /// The features that may be used.
    pub features: BTreeSet<Feature>,
}

/// A target that there is none of.
#[derive(Clone, Debug, Error)]
#[error("unknown CPU {found:?}, expected one of: {}", known.join(", "))]
pub struct UnknownTarget {
    /// What was asked for.
    pub found: String,
    /// What there is.
    pub known: Vec<&'static str>,
}

use Feature::{Avx2, Avx512, Avx512Vnni, DotProd, F16c, Fma, I8mm};

/// The targets that have a name, each with its features.
const NAMED: &[(&str, Arch, &[Feature])] = &[
    ("x86-64", Arch::X86_64, &[]),
    ("x86-64-v3", Arch::X86_64, &[Avx2, Fma, F16c]),
    ("x86-64-v4", Arch::X86_64, &[Avx2, Fma, F16c, Avx512]),
    ("avx512-vnni", Arch::X86_64, &[Avx2, Fma, F16c, Avx512, Avx512Vnni]),
    ("aarch64", Arch::Aarch64, &[]),
    ("aarch64-dotprod", Arch::Aarch64, &[DotProd]),
    ("aarch64-i8mm", Arch::Aarch64, &[DotProd, I8mm]),
];

impl Target {
    /// The target `name`: one of a list, or `native`, this machine.
    pub fn parse(name: &str) -> Result<Target, UnknownTarget> {
        if name == "native" {
            return Ok(Target::native());
        }
        let known = || std::iter::once("native").chain(NAMED.iter().map(|t| t.0)).collect();
        let &(_, arch, features) = NAMED
            .iter()
            .find(|t| t.0 == name)
            .ok_or_else(|| UnknownTarget { found: name.to_owned(), known: known() })?;
        Ok(Target { name: name.to_owned(), arch, features: features.iter().copied().collect() })
    }

    /// This machine, as its processor describes itself.
    pub fn native() -> Target {
        let (arch, features) = runtime::cpu::native();
        Target { name: "native".to_owned(), arch, features }
    }

    /// Whether code may use `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.contains(&feature)
    }

    /// The features that this machine lacks to run code for the target; `None` for another architecture.
    pub fn missing_here(&self) -> Option<Vec<Feature>> {
        runtime::cpu::missing(self.arch, &self.features)
    }

    /// LLVM's triple.
    pub fn triple(&self) -> &'static str {
        match self.arch {
            Arch::X86_64 => "x86_64-unknown-linux-gnu",
            Arch::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// LLVM's name of the baseline CPU.
    pub fn llvm_cpu(&self) -> &'static str {
        match self.arch {
            Arch::X86_64 if self.has(Avx512) => "x86-64-v4",
            Arch::X86_64 if self.has(Avx2) => "x86-64-v3",
            Arch::X86_64 => "x86-64",
            Arch::Aarch64 => "generic",
        }
    }

    /// LLVM's list of features. Vectors are as wide as the registers, which LLVM avoids by itself with 512 bits.
    pub fn llvm_features(&self) -> String {
        let features = self.features.iter().map(|&f| llvm(f));
        let wide = self.has(Avx512).then_some("-prefer-256-bit");
        features.chain(wide).collect::<Vec<_>>().join(",")
    }

    /// Floats in a vector register.
    pub fn lanes(&self) -> usize {
        match self.arch {
            Arch::X86_64 if self.has(Avx512) => 16,
            Arch::X86_64 if self.has(Avx2) => 8,
            _ => 4,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
