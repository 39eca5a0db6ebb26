//! Processors: an architecture and the instruction-set features that code may count on.

use Feature::{Avx2, Avx512, Avx512Vnni, DotProd, F16c, Fma, I8mm};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// An instruction-set feature that some kernel asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Feature {
    /// 256-bit vectors of floats and integers; and BMI, LZCNT and MOVBE, which came with them.
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

/// A CPU architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

/// The features of `features` that this machine lacks; `None` for another architecture.
pub fn missing(arch: Arch, features: &BTreeSet<Feature>) -> Option<Vec<Feature>> {
    let (own, here) = native();
    (own == arch).then(|| features.difference(&here).copied().collect())
}

/// This machine's architecture and features, as its processor describes itself.
#[cfg(target_arch = "x86_64")]
pub fn native() -> (Arch, BTreeSet<Feature>) {
    let has = |feature| match feature {
        Avx2 => {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("movbe")
        }
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

/// This machine's architecture and features, as its processor describes itself.
#[cfg(target_arch = "aarch64")]
pub fn native() -> (Arch, BTreeSet<Feature>) {
    let has = |feature| match feature {
        DotProd => std::arch::is_aarch64_feature_detected!("dotprod"),
        I8mm => std::arch::is_aarch64_feature_detected!("i8mm"),
        _ => false,
    };
    (Arch::Aarch64, [DotProd, I8mm].into_iter().filter(|&f| has(f)).collect())
}
