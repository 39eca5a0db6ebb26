//! `int32_t qcc_version(void)`: which of a library's versions this processor runs, found out once, by what the processor
//! says of itself.
//!
//! The versions stand in a row, the one that asks for most last: that one is taken which is last of those that have all
//! they ask for. It depends on nothing (`getauxval` on aarch64, which every C library has), and the code around the
//! versions is for every processor of the architecture.
//!
//! Source: Intel, "Software Developer's Manual" volume 2, CPUID and XGETBV; Linux, `arch/arm64/include/uapi/asm/hwcap.h`.

use crate::plan::Version;
use crate::target::{Arch, Feature};
use crate::text::{Body, Cmp, Scalar, Val, scalar};
use runtime::NO_VERSION;
use std::collections::BTreeMap;

/// What a processor says of itself: words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Word {
    /// CPUID, leaf 1, ECX.
    Leaf1C,
    /// CPUID, leaf 7, EBX.
    Leaf7B,
    /// CPUID, leaf 7, ECX.
    Leaf7C,
    /// CPUID, leaf 7, EDX.
    Leaf7D,
    /// CPUID, leaf 0x80000001, ECX.
    ExtendedC,
    /// The registers that the system keeps when it changes threads.
    Xcr0,
    /// `AT_HWCAP`.
    Hwcap,
    /// `AT_HWCAP2`.
    Hwcap2,
}

use Word::{ExtendedC, Hwcap, Hwcap2, Leaf1C, Leaf7B, Leaf7C, Leaf7D, Xcr0};

/// The bits that say that there is a feature, all of what LLVM takes it to mean.
fn needs(feature: Feature) -> &'static [(Word, &'static [u32])] {
    match feature {
        // SSE4.2, MOVBE, POPCNT, the system's consent, AVX; BMI1, AVX2, BMI2; LZCNT; registers of 256 bits.
        Feature::Avx2 => {
            &[(Leaf1C, &[20, 22, 23, 27, 28]), (Leaf7B, &[3, 5, 8]), (ExtendedC, &[5]), (Xcr0, &[1, 2])]
        }
        Feature::Fma => &[(Leaf1C, &[12])],
        Feature::F16c => &[(Leaf1C, &[29])],
        // F, DQ, CD, BW, VL; masks, and registers of 512 bits, 32 of them.
        Feature::Avx512 => &[(Leaf7B, &[16, 17, 28, 30, 31]), (Xcr0, &[1, 2, 5, 6, 7])],
        Feature::Avx512Vnni => &[(Leaf7C, &[11])],
        // Tiles, and products of bytes; the registers of tiles.
        Feature::AmxInt8 => &[(Leaf7D, &[24, 25]), (Xcr0, &[17, 18])],
        Feature::DotProd => &[(Hwcap, &[20])],
        Feature::I8mm => &[(Hwcap2, &[13])],
    }
}

/// All that the code of a version needs.
fn needed(version: &Version) -> BTreeMap<Word, u32> {
    let mut all = BTreeMap::new();
    for &(word, places) in version.target.machine().features.iter().flat_map(|&f| needs(f)) {
        *all.entry(word).or_default() |= places.iter().fold(0, |bits, place| bits | 1 << place);
    }
    all
}

/// The function.
pub(super) fn function(versions: &[Version]) -> String {
    let target = versions.first().expect("a plan has a version").target.machine().baseline();
    let mut out = String::from(
        "llvm.mlir.global internal @qcc_known(-1 : i32) {addr_space = 0 : i32, alignment = 4 : i64} : i32\n",
    );
    if target.arch == Arch::Aarch64 {
        out.push_str("llvm.func @getauxval(i64) -> i64\n");
    }
    out.push_str(&Body::returning(&target, "qcc_version", &[], scalar(Scalar::I32), |b, _| {
        let at = b.op(scalar(Scalar::Ptr), "llvm.mlir.addressof @qcc_known : !llvm.ptr");
        let (slot, xcr0) = (b.room(1), b.room(1));
        let (none, unknown) = (b.int(Scalar::I32, 0), b.int(Scalar::I32, -1));
        b.store(none, xcr0);
        let known = b.load_shared(at, Scalar::I32);
        let first = b.cmp(Cmp::Eq, known, unknown);
        b.when(first, |b| {
            let nothing = b.int(Scalar::I32, NO_VERSION.into());
            b.store(nothing, slot);
            let words = match target.arch {
                Arch::X86_64 => x86(b, xcr0),
                Arch::Aarch64 => aarch64(b),
            };
            for (i, version) in versions.iter().enumerate() {
                let mut fits = b.flag(scalar(Scalar::I1), true);
                for (word, bits) in needed(version) {
                    let bits = b.int(Scalar::I32, (bits as i32).into());
                    let there = b.and(words[&word], bits);
                    let there = b.cmp(Cmp::Eq, there, bits);
                    fits = b.and(fits, there);
                }
                b.when(fits, |b| {
                    let i = b.int(Scalar::I32, i as i64);
                    if !version.target.machine().has(Feature::AmxInt8) {
                        return b.store(i, slot);
                    }
                    let allowed = tiles_allowed(b);
                    b.when(allowed, |b| b.store(i, slot));
                });
            }
            let found = b.load(slot, scalar(Scalar::I32));
            b.store_shared(found, at);
        });
        b.load_shared(at, Scalar::I32)
    }));
    out
}

const CLOBBERED: &str = "~{dirflag},~{fpsr},~{flags}";

/// EAX, EBX, ECX and EDX of a leaf. The compiler may want EBX for itself.
fn cpuid(b: &mut Body, leaf: u32) -> [Val; 4] {
    let (eax, ecx) = (b.int(Scalar::I32, (leaf as i32).into()), b.int(Scalar::I32, 0));
    b.line(format_args!(
        "%leaf_{leaf:x} = llvm.inline_asm has_side_effects asm_dialect = att \"movq %rbx, %rsi\\0Acpuid\\0Axchgq %rbx, %rsi\", \
         \"={{ax}},={{si}},={{cx}},={{dx}},{{ax}},{{cx}},{CLOBBERED}\" {eax}, {ecx} : (i32, i32) -> !llvm.struct<(i32, i32, i32, i32)>"
    ));
    [0, 1, 2, 3].map(|i| {
        let from = "!llvm.struct<(i32, i32, i32, i32)>";
        b.op(scalar(Scalar::I32), format_args!("llvm.extractvalue %leaf_{leaf:x}[{i}] : {from}"))
    })
}

fn x86(b: &mut Body, xcr0: Val) -> BTreeMap<Word, Val> {
    let zero = b.int(Scalar::I32, 0);
    // A leaf beyond the last one gives what another leaf says.
    let most = |b: &mut Body, base: u32, wanted: u32| {
        let [most, ..] = cpuid(b, base);
        let wanted = b.int(Scalar::I32, (wanted as i32).into());
        b.cmp(Cmp::Ge, most, wanted)
    };
    let seven = most(b, 0, 7);
    let extended = most(b, 0x8000_0000, 0x8000_0001);
    let [_, _, leaf1, _] = cpuid(b, 1);
    let [_, leaf7b, leaf7c, leaf7d] = cpuid(b, 7);
    let [_, _, extended_c, _] = cpuid(b, 0x8000_0001);
    let kept = b.int(Scalar::I32, 1 << 27);
    let asked = b.and(leaf1, kept);
    let asked = b.cmp(Cmp::Ne, asked, zero);
    b.when(asked, |b| {
        // XGETBV, which an assembler for every processor need not know.
        b.line(format_args!(
            "%xcr0 = llvm.inline_asm has_side_effects asm_dialect = att \".byte 0x0f, 0x01, 0xd0\", \
             \"={{ax}},={{dx}},{{cx}},{CLOBBERED}\" {zero} : (i32) -> !llvm.struct<(i32, i32)>"
        ));
        let low = b.op(scalar(Scalar::I32), "llvm.extractvalue %xcr0[0] : !llvm.struct<(i32, i32)>");
        b.store(low, xcr0);
    });
    let mut words = BTreeMap::from([(Leaf1C, leaf1)]);
    for (word, there, v) in [
        (Leaf7B, seven, leaf7b),
        (Leaf7C, seven, leaf7c),
        (Leaf7D, seven, leaf7d),
        (ExtendedC, extended, extended_c),
    ] {
        words.insert(word, b.select(there, v, zero));
    }
    words.insert(Xcr0, b.load(xcr0, scalar(Scalar::I32)));
    words
}

/// Whether the system lets this process use tiles: it is asked for that (`arch_prctl(ARCH_REQ_XCOMP_PERM, 18)`).
fn tiles_allowed(b: &mut Body) -> Val {
    let [call, request, tiles] = [158, 0x1023, 18].map(|n| b.int(Scalar::I64, n));
    let refused = b.op(
        scalar(Scalar::I64),
        format_args!(
            "llvm.inline_asm has_side_effects asm_dialect = att \"syscall\", \
             \"={{ax}},{{ax}},{{di}},{{si}},~{{rcx}},~{{r11}},~{{memory}},{CLOBBERED}\" {call}, {request}, {tiles} : (i64, i64, i64) -> i64"
        ),
    );
    let zero = b.size(0);
    b.cmp(Cmp::Eq, refused, zero)
}

fn aarch64(b: &mut Body) -> BTreeMap<Word, Val> {
    let words = [(Hwcap, 16), (Hwcap2, 26)].map(|(word, number)| {
        let number = b.int(Scalar::I64, number);
        let v = b.op(scalar(Scalar::I64), format_args!("llvm.call @getauxval({number}) : (i64) -> i64"));
        (word, b.cast(v, Scalar::I32))
    });
    BTreeMap::from(words)
}
