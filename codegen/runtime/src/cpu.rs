//! Processors: an architecture and the instruction-set features that code may count on.
//!
//! `unsafe` is what one system call takes.
#![allow(unsafe_code)]

use Feature::{AmxInt8, Avx2, Avx512, Avx512Vnni, DotProd, F16c, Fma, I8mm};
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
    /// AMX: products of tiles of bytes.
    AmxInt8,
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
        AmxInt8 => has_tiles(),
        DotProd | I8mm => false,
    };
    (Arch::X86_64, [Avx2, Fma, F16c, Avx512, Avx512Vnni, AmxInt8].into_iter().filter(|&f| has(f)).collect())
}

/// Whether there are tiles of bytes, and the system lets this process use them: it is asked for that.
///
/// Source: Intel, "Software Developer's Manual" volume 2, CPUID; Linux, `Documentation/arch/x86/xstate.rst`.
#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    use std::arch::x86_64::__cpuid_count;
    const BITS: u32 = 1 << 24 | 1 << 25;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(7, 0).edx & BITS != BITS {
        return false;
    }
    let (arch_prctl, request_permission, tile_data) = (158i64, 0x1023i64, 18i64);
    let refused: i64;
    // SAFETY: the call changes nothing but what the system keeps of this process, and fails where it knows no tiles.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") arch_prctl => refused,
            in("rdi") request_permission,
            in("rsi") tile_data,
            out("rcx") _,
            out("r11") _,
        );
    }
    refused == 0
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
