//! Products of codes by pairs and by fours.
//!
//! Pairs are of 16 bits, and always exact. By fours: one instruction adds four products of bytes to a sum of 32 bits, and does not saturate
//! (`vpdpbusd`, `sdot`, `usdot`; `tdpbusd` does that of tiles of 16 rows).
//!
//! X stays as it is, but signed or unsigned as the instruction takes it. W has its zero points taken away, where that leaves
//! bytes. What the zero point of X would have taken from a sum is taken from it at the end: that zero point times the sum of
//! W's column, which is exact modulo 2^32.

use super::Kernel;
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Intrinsic, Scalar, Val, scalar, vector};

/// Fours that a tile is deep.
pub const DEEP: usize = 16;

/// What multiplies four bytes of X by four of W.
fn instruction(target: &Target) -> Option<Intrinsic> {
    match target.arch {
        Arch::X86_64 if target.has(Feature::Avx512Vnni) => Some(Intrinsic::Vpdpbusd),
        Arch::Aarch64 if target.has(Feature::I8mm) => Some(Intrinsic::Usdot),
        Arch::Aarch64 if target.has(Feature::DotProd) => Some(Intrinsic::Sdot),
        _ => None,
    }
}

/// `sum` and the products of four bytes of `w` with four of `x`.
pub fn step(b: &mut Body, w: Val, x: Val, sum: Val) -> Val {
    let which = instruction(b.target).expect("only targets that have one get weights by fours");
    let [w, x] = [w, x].map(|v| b.bitcast(v, vector(4 * sum.ty.lanes, Scalar::I8)));
    b.intrinsic(which, &[sum, x, w], sum.ty)
}

/// `sum` and the products of pairs of 16 bits of `w`, and of `x` as 32 bits, exactly.
pub fn pairs(b: &mut Body, w: Val, x: Val, sum: Val) -> Val {
    let p = match b.target.arch {
        Arch::X86_64 if b.target.has(Feature::Avx512Vnni) && sum.ty.lanes == 16 => {
            let x = b.bitcast(x, w.ty);
            return b.intrinsic(Intrinsic::Vpdpwssd, &[sum, w, x], sum.ty);
        }
        Arch::X86_64 => {
            let x = b.bitcast(x, w.ty);
            b.intrinsic(Intrinsic::Pmaddwd, &[w, x], sum.ty)
        }
        _ => {
            let w = b.bitcast(w, sum.ty);
            let (upper_w, upper_x) = (b.shr_signed(w, 16), b.shr_signed(x, 16));
            let [lower_w, lower_x] = [w, x].map(|v| {
                let v = b.shl(v, 16);
                b.shr_signed(v, 16)
            });
            let (upper, lower) = (b.mul(upper_w, upper_x), b.mul(lower_w, lower_x));
            b.add(upper, lower)
        }
    };
    b.add(sum, p)
}

/// How X is read.
#[derive(Clone, Copy)]
pub struct Fours {
    /// Whether its codes are signed.
    signed: bool,
    /// Whether the instruction takes them otherwise: they are moved by 128.
    moved: bool,
    /// Whether they are multiplied tile by tile, which takes K by 64.
    tiles: bool,
}

impl Fours {
    /// If `target` multiplies by fours, and the numbers `w` are bytes.
    pub fn of(target: &Target, w: &[i64], signed: bool) -> Option<Fours> {
        let which = instruction(target)?;
        let moved = signed != (which == Intrinsic::Sdot);
        w.iter().all(|&w| i8::try_from(w).is_ok()).then_some(Fours {
            signed,
            moved,
            tiles: target.has(Feature::AmxInt8),
        })
    }

    /// Fours of K elements.
    pub fn steps(self, k: usize) -> usize {
        k.div_ceil(if self.tiles { DEEP * 4 } else { 4 }) * if self.tiles { DEEP } else { 1 }
    }

    /// Codes as the instruction takes them, so many that fours are whole. Buffers: X `[M, K]`, result. A unit is a row.
    pub fn rows(self, target: &Target, k: usize) -> Kernel {
        Kernel::new(target, "rows_of_codes", |b, a| {
            let (x, out) = (a.buffer(b, 0), a.buffer(b, 1));
            let lanes = 4 * b.target.lanes();
            b.each(a.begin, a.end, 1, |b, row| {
                let (from, to) = (b.size(k), b.size(4 * self.steps(k)));
                let (from, to) = (b.mul(row, from), b.mul(row, to));
                let (x, out) = (b.at(x, from), b.at(out, to));
                let some = |b: &mut Body, i: Val, there: usize| {
                    let p = b.at(x, i);
                    let v = b.load_some(p, vector(lanes, Scalar::I8), there);
                    let v = match self.moved {
                        true => {
                            let flip = b.splat(v.ty, -128.0);
                            b.xor(v, flip)
                        }
                        false => v,
                    };
                    let p = b.at(out, i);
                    // What is not there meets weights of 0.
                    b.store_some(v, p, there.next_multiple_of(4));
                };
                let whole = k / lanes * lanes;
                let (none, end) = (b.size(0), b.size(whole));
                b.each(none, end, lanes, |b, i| some(b, i, lanes));
                if whole < k {
                    some(b, end, k - whole);
                }
            });
        })
    }

    /// Whether anything is to be taken from sums, of an X with a zero point or without.
    pub fn shifts(self, zero: bool) -> bool {
        zero || self.moved
    }

    /// A vector of sums, of the columns from `n` on, less what X's zero point adds to them: `columns` has the sums of W's
    /// columns as i32, `zero` is where the zero point is.
    pub fn centred(self, b: &mut Body, sum: Val, columns: Val, n: Val, zero: Option<Val>) -> Val {
        let moved = match (self.moved, self.signed) {
            (false, _) => 0,
            (true, true) => 128,
            (true, false) => -128,
        };
        let mut all = b.int(Scalar::I32, moved);
        if let Some(zero) = zero {
            let zero = b.load(zero, scalar(if self.signed { Scalar::I8 } else { Scalar::U8 }));
            let zero = b.cast(zero, Scalar::I32);
            all = b.add(all, zero);
        }
        let all = b.broadcast(all, sum.ty.lanes);
        let at = b.element(columns, n, Scalar::I32);
        let columns = b.load(at, sum.ty);
        let more = b.mul(columns, all);
        b.sub(sum, more)
    }
}
