//! Instructions that LLVM has no op for: what a processor must have for them, and what they do.
//!
//! Source: Intel, "Intrinsics Guide"; Arm, "Architecture Reference Manual for A-profile", C7.

use super::{Body, Cmp, Scalar, Ty, Val, list, scalar, vector};
use crate::target::{Arch, Feature, Target};

/// An instruction on whole registers, by its name in assembly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intrinsic {
    /// u8 by s8, two products to a sum of 16 bits, which saturates.
    Pmaddubsw,
    /// s16 by s16, two products to a sum of 32 bits.
    Pmaddwd,
    /// s8 with the sign of another s8, 0 where that is 0.
    Psignb,
    /// u8 by s8, four products added to a sum of 32 bits.
    Vpdpbusd,
    /// s16 by s16, two products added to a sum of 32 bits.
    Vpdpwssd,
    /// s8 by s8, four products added to a sum of 32 bits.
    Sdot,
    /// u8 by s8, four products added to a sum of 32 bits.
    Usdot,
    /// Two rows of 8 u8 by two rows of 8 s8, each by each, added to sums of 32 bits.
    Usmmla,
}

use Intrinsic::{Pmaddubsw, Pmaddwd, Psignb, Sdot, Usdot, Usmmla, Vpdpbusd, Vpdpwssd};

/// Of each instruction: bytes of its registers, LLVM's name, what it takes.
const FORMS: &[(Intrinsic, usize, &str, Arch, Option<Feature>)] = &[
    (Pmaddubsw, 32, "llvm.x86.avx2.pmadd.ub.sw", Arch::X86_64, Some(Feature::Avx2)),
    (Pmaddubsw, 64, "llvm.x86.avx512.pmaddubs.w.512", Arch::X86_64, Some(Feature::Avx512)),
    (Pmaddwd, 16, "llvm.x86.sse2.pmadd.wd", Arch::X86_64, None),
    (Pmaddwd, 32, "llvm.x86.avx2.pmadd.wd", Arch::X86_64, Some(Feature::Avx2)),
    (Pmaddwd, 64, "llvm.x86.avx512.pmaddw.d.512", Arch::X86_64, Some(Feature::Avx512)),
    (Psignb, 32, "llvm.x86.avx2.psign.b", Arch::X86_64, Some(Feature::Avx2)),
    (Vpdpbusd, 64, "llvm.x86.avx512.vpdpbusd.512", Arch::X86_64, Some(Feature::Avx512Vnni)),
    (Vpdpwssd, 64, "llvm.x86.avx512.vpdpwssd.512", Arch::X86_64, Some(Feature::Avx512Vnni)),
    (Sdot, 16, "llvm.aarch64.neon.sdot.v4i32.v16i8", Arch::Aarch64, Some(Feature::DotProd)),
    (Usdot, 16, "llvm.aarch64.neon.usdot.v4i32.v16i8", Arch::Aarch64, Some(Feature::I8mm)),
    (Usmmla, 16, "llvm.aarch64.neon.usmmla.v4i32.v16i8", Arch::Aarch64, Some(Feature::I8mm)),
];

impl Intrinsic {
    /// What it takes and gives, on registers of so many bytes.
    pub fn types(self, bytes: usize) -> (Vec<Ty>, Ty) {
        let of = |elem: Scalar| vector(bytes / elem.bytes(), elem);
        let (i8, i16, i32) = (of(Scalar::I8), of(Scalar::I16), of(Scalar::I32));
        match self {
            Pmaddubsw => (vec![i8, i8], i16),
            Pmaddwd => (vec![i16, i16], i32),
            Psignb => (vec![i8, i8], i8),
            Vpdpwssd => (vec![i32, i16, i16], i32),
            Vpdpbusd | Sdot | Usdot | Usmmla => (vec![i32, i8, i8], i32),
        }
    }

    /// The name of the function that stands in for it.
    fn stand_in(self, bytes: usize) -> String {
        format!("emulated_{self:?}_{bytes}").to_lowercase()
    }

    /// Its form on registers of so many bytes.
    ///
    /// # Panics
    /// Where `target` has none: LLVM would end the process when it meets the call.
    fn spelling(self, bytes: usize, target: &Target) -> &'static str {
        let form = FORMS.iter().find(|f| (f.0, f.1) == (self, bytes));
        let &(.., name, arch, feature) = form.unwrap_or_else(|| panic!("{self:?} of {bytes} bytes"));
        let there = arch == target.arch && feature.is_none_or(|f| target.has(f));
        assert!(there, "{name} for {target}, which lacks {feature:?}");
        name
    }

    /// What it does, in ops that every processor has.
    fn emulate(self, b: &mut Body, args: &[Val], ty: Ty) -> Val {
        let (words, halves) = (vector(ty.bytes() / 4, Scalar::I32), vector(ty.bytes() / 2, Scalar::I16));
        match (self, args) {
            (Pmaddubsw, &[unsigned, signed]) => {
                let products = [false, true].map(|upper| {
                    let [u, s] = [unsigned, signed].map(|v| b.bitcast(v, halves));
                    let s = if upper { s } else { b.shl(s, 8) };
                    let s = b.shr_signed(s, 8);
                    let low = b.splat(halves, 255.0);
                    let u = if upper { b.shr(u, 8) } else { b.and(u, low) };
                    let [u, s] = [u, s].map(|v| b.cast(v, Scalar::I32));
                    b.mul(u, s)
                });
                let sum = b.add(products[0], products[1]);
                let most = b.splat(sum.ty, 32767.0);
                let least = b.splat(sum.ty, -32768.0);
                let sum = b.min(sum, most);
                let sum = b.max(sum, least);
                b.cast(sum, Scalar::I16)
            }
            (Pmaddwd, &[x, y]) => {
                let products = [16, 0].map(|up| {
                    let [x, y] = [x, y].map(|v| part(b, v, words, up, 16, true));
                    b.mul(x, y)
                });
                b.add(products[0], products[1])
            }
            (Psignb, &[x, sign]) => {
                let zero = b.splat(ty, 0.0);
                let minus = b.sub(zero, x);
                let negative = b.cmp(Cmp::Lt, sign, zero);
                let none = b.cmp(Cmp::Eq, sign, zero);
                let y = b.select(negative, minus, x);
                b.select(none, zero, y)
            }
            (Vpdpbusd | Sdot | Usdot, &[sum, x, y]) => [24, 16, 8, 0].iter().fold(sum, |sum, &up| {
                let x = part(b, x, words, up, 24, self == Sdot);
                let y = part(b, y, words, up, 24, true);
                let p = b.mul(x, y);
                b.add(sum, p)
            }),
            (Vpdpwssd, &[sum, x, y]) => {
                let p = Pmaddwd.emulate(b, &[x, y], ty);
                b.add(sum, p)
            }
            (Usmmla, &[sum, x, y]) => {
                let (x, mut out) = (b.widen_unsigned(x, Scalar::I32), sum);
                let y = b.cast(y, Scalar::I32);
                for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let row = |b: &mut Body, v: Val, i: usize| {
                        b.shuffle(v, v, &(8 * i..8 * i + 8).collect::<Vec<_>>())
                    };
                    let (x, y) = (row(b, x, i), row(b, y, j));
                    let p = b.mul(x, y);
                    let p = b.fold(p, |b, x, y| b.add(x, y));
                    let old = b.extract(sum, 2 * i + j);
                    let new = b.add(old, p);
                    out = b.insert(new, out, 2 * i + j);
                }
                out
            }
            _ => unreachable!("{self:?} of {} operands", args.len()),
        }
    }
}

/// The functions that stand in for instructions in `text` (see [`Target::emulated`]). Apart from the kernels: a kernel has
/// hundreds of such calls.
pub fn stand_ins(text: &str) -> String {
    let mut out = String::new();
    for &(which, bytes, _, arch, _) in FORMS {
        let name = which.stand_in(bytes);
        if !text.contains(&format!("@{name}(")) {
            continue;
        }
        let (takes, gives) = which.types(bytes);
        let target = Target::baseline_of(arch);
        let f = Body::returning(&target, &name, &takes, gives, |b, args| which.emulate(b, args, gives));
        let head = format!(" -> {gives} {{");
        let apart = format!(" -> {gives} attributes {{passthrough = [\"noinline\"]}} {{");
        out.push_str(&f.replacen("llvm.func ", "llvm.func internal ", 1).replacen(&head, &apart, 1));
    }
    out
}

/// The words of `v`, moved up and then down by so many bits.
fn part(b: &mut Body, v: Val, words: Ty, up: usize, down: usize, signed: bool) -> Val {
    let v = b.bitcast(v, words);
    let v = if up == 0 { v } else { b.shl(v, up) };
    if signed { b.shr_signed(v, down) } else { b.shr(v, down) }
}

impl Body<'_> {
    /// One instruction; the registers are as wide as the result.
    pub fn intrinsic(&mut self, which: Intrinsic, args: &[Val], ty: Ty) -> Val {
        let name = which.spelling(ty.bytes(), self.target);
        let own: Vec<Ty> = args.iter().map(|a| a.ty).collect();
        assert_eq!(which.types(ty.bytes()), (own, ty), "operands of {name}");
        let (args, types) = (list(args), list(args.iter().map(|a| a.ty)));
        let call = match self.target.is_emulated() {
            false => format!("llvm.call_intrinsic \"{name}\"({args}) : ({types}) -> {ty}"),
            true => format!("llvm.call @{}({args}) : ({types}) -> {ty}", which.stand_in(ty.bytes())),
        };
        self.op(ty, call)
    }

    /// `v` with another element in one lane.
    pub fn insert(&mut self, one: Val, v: Val, lane: usize) -> Val {
        let one_ty = scalar(v.ty.elem);
        self.op(v.ty, format_args!("vector.insert {one}, {v} [{lane}] : {one_ty} into {}", v.ty))
    }
}
