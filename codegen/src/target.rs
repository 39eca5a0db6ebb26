//! The machine that code is made for: an architecture and the instruction-set features that may be used.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use thiserror::Error;

/// An instruction-set feature that some kernel asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Feature {
    /// 256-bit vectors of floats and integers.
    Avx2,
    /// Fused multiply-add.
    Fma,
    /// Conversion between f16 and f32.
    F16c,
    /// 512-bit vectors, with byte and word operations and 256-bit forms.
    Avx512,
    /// Integer dot products of bytes into 512-bit vectors.
    Avx512Vnni,
    /// aarch64: integer dot products of bytes.
    DotProd,
    /// aarch64: integer matrix products of bytes.
    I8mm,
}

impl Feature {
    /// The names that LLVM knows the feature by.
    fn llvm(self) -> &'static str {
        match self {
            Feature::Avx2 => "+avx2",
            Feature::Fma => "+fma",
            Feature::F16c => "+f16c",
            Feature::Avx512 => "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd",
            Feature::Avx512Vnni => "+avx512vnni",
            Feature::DotProd => "+dotprod",
            Feature::I8mm => "+i8mm",
        }
    }
}

/// A CPU architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
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
        let (arch, features) = native();
        Target { name: "native".to_owned(), arch, features }
    }

    /// Whether code may use `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.contains(&feature)
    }

    /// The features that this machine lacks to run code for the target; `None` for another architecture.
    pub fn missing_here(&self) -> Option<Vec<Feature>> {
        let (arch, here) = native();
        (arch == self.arch).then(|| self.features.difference(&here).copied().collect())
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
        let features = self.features.iter().map(|f| f.llvm());
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

#[cfg(target_arch = "x86_64")]
fn native() -> (Arch, BTreeSet<Feature>) {
    let has = |feature| match feature {
        Avx2 => is_x86_feature_detected!("avx2"),
        Fma => is_x86_feature_detected!("fma"),
        F16c => is_x86_feature_detected!("f16c"),
        Avx512 => {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512cd")
        }
        Avx512Vnni => is_x86_feature_detected!("avx512vnni"),
        DotProd | I8mm => false,
    };
    (Arch::X86_64, [Avx2, Fma, F16c, Avx512, Avx512Vnni].into_iter().filter(|&f| has(f)).collect())
}

#[cfg(target_arch = "aarch64")]
fn native() -> (Arch, BTreeSet<Feature>) {
    let has = |feature| match feature {
        DotProd => std::arch::is_aarch64_feature_detected!("dotprod"),
        I8mm => std::arch::is_aarch64_feature_detected!("i8mm"),
        _ => false,
    };
    (Arch::Aarch64, [DotProd, I8mm].into_iter().filter(|&f| has(f)).collect())
}
