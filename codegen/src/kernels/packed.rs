//! `Y = X W^T` with W packed in groups of 2-, 4- or 8-bit codes.
//!
//! **Layout.** 16 rows of W lie side by side, one to a lane, so that sums never run across lanes and all of W is one
//! stream. `[N/16][K/group]` records follow each other; a record is
//!
//! ```text
//! codes   [group * bits / 32][16] u32    code of row n, byte j, plane t: k = 32 / bits * d + 4 t + j, bits `bits * t` of the byte
//! scales  [16] f32 or f16 (where all of them are numbers of f16)
//! zeros   [16] u8                        only where W has zero points
//! ```
//!
//! Rows beyond N have scale 0. **Activations** are prepared once per row of X, into `[K/group * group]` elements (padded
//! with 0) followed by `[K/group]` pairs of f32, one of three ways ([`Rows`]). One record gives
//! `scale_w * scale_x * (sum codes x - zero * sum x)`.

use super::{Kernel, packed_product};
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Val, scalar, vector};
use half::f16;

/// Rows of W that lie side by side.
pub const ROWS: usize = 16;
/// Elements of K that one turn of the inner loop takes: sums of 4-bit products of bytes fit 16 bits that long.
pub(super) const CHUNK: usize = 32;
/// How far ahead of its use W is asked for, in bytes.
pub(super) const AHEAD: usize = 4096;

/// What a row of X is prepared to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    /// int8 codes with (scale, sum of the codes), as `accuracy_level` 4 of MatMulNBits rounds them.
    Codes,
    /// f32, scaled by the power of two that undoes the place of their code within its word (so that a code needs no shift),
    /// with (1, sum).
    Floats,
    /// f32 as fixed-point numbers of 24 bits, to half a unit of which they are rounded: no more than 2^-24 of the largest of a
    /// group. Three digits of 8 bits, signed, the upper ones of a group first, `[3][group]`, in the place of four; with
    /// (scale, sum). Products of bytes are exact, and there are several of them in an instruction.
    Digits,
}

/// The largest of a group as a number of three digits. The largest such number, 0x7f7f7f, is 8,355,711: scaling rounds.
const DIGITS: f64 = 8_355_700.0;

impl Rows {
    pub(super) fn elem(self) -> Scalar {
        if self == Rows::Floats { Scalar::F32 } else { Scalar::I8 }
    }

    /// Where a group that begins with element `first` is in a row: at one place, or its digits at three.
    pub(super) fn at(self, b: &mut Body, form: &Form, row: Val, first: Val) -> Vec<Val> {
        let at = b.element(row, first, form.x_elem());
        let places = if self == Rows::Digits { 3 } else { 1 };
        (0..places).map(|i| b.at_const(at, i * form.group)).collect()
    }
}

/// The form of a packed product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    /// Rows of W: outputs.
    pub n: usize,
    /// Columns of W: inputs.
    pub k: usize,
    /// Elements that share a scale, a multiple of 16.
    pub group: usize,
    /// Bits of a code: 2, 4 or 8.
    pub bits: usize,
    /// Whether W has zero points; if not they are in the middle, 2^(bits-1).
    pub zeros: bool,
    /// Whether scales are kept as f16.
    pub half_scales: bool,
    /// Whether activations are rounded to int8, each group of a row by its own scale.
    pub int8: bool,
}

/// The parts of W as MatMulNBits holds them.
pub struct Parts<'a> {
    /// `[N, K/group, group * bits / 8]`, low bits first.
    pub codes: &'a [u8],
    /// `[N, K/group]`.
    pub scales: &'a [f32],
    /// `[N, K/group]`, one to a byte.
    pub zeros: Option<&'a [u8]>,
}

impl Form {
    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group)
    }

    /// Blocks of rows.
    pub fn blocks(&self) -> usize {
        self.n.div_ceil(ROWS)
    }

    /// Elements of K in one u32.
    pub(super) fn per_word(&self) -> usize {
        32 / self.bits
    }

    pub(super) fn code_bytes(&self) -> usize {
        self.group * self.bits / 8 * ROWS
    }

    pub(super) fn record(&self) -> usize {
        let scale = if self.half_scales { 2 } else { 4 };
        self.code_bytes() + ROWS * (scale + usize::from(self.zeros))
    }

    /// Bytes of W.
    pub fn bytes(&self) -> usize {
        self.blocks() * self.groups() * self.record()
    }

    pub(super) fn x_elem(&self) -> Scalar {
        if self.int8 { Scalar::I8 } else { Scalar::F32 }
    }

    pub(super) fn x_data(&self) -> usize {
        self.groups() * self.group * self.x_elem().bytes()
    }

    /// Bytes of one prepared row of X.
    pub fn x_row(&self) -> usize {
        self.x_data() + self.groups() * 8
    }

    /// Where in its u32 the code of element `k` begins.
    pub(super) fn place(&self, k: usize) -> usize {
        let k = k % self.per_word();
        8 * (k % 4) + self.bits * (k / 4)
    }

    /// Whether every scale is a number of f16.
    pub fn scales_are_half(scales: &[f32]) -> bool {
        scales.iter().all(|&s| f16::from_f32(s).to_f32() == s)
    }

    /// W in the layout of this file.
    pub fn pack(&self, parts: &Parts) -> Vec<u8> {
        let mut out = vec![0u8; self.bytes()];
        let (groups, group_bytes) = (self.groups(), self.group * self.bits / 8);
        let mask = ((1u16 << self.bits) - 1) as u8;
        let block = groups * self.record();
        for (i, record) in out.chunks_exact_mut(self.record()).enumerate() {
            let (nb, g) = (i * self.record() / block, i % groups);
            for lane in 0..ROWS.min(self.n - nb * ROWS) {
                let at = (nb * ROWS + lane) * groups + g;
                let codes = &parts.codes[at * group_bytes..][..group_bytes];
                for k in 0..self.group {
                    let code = codes[k * self.bits / 8] >> (k * self.bits % 8) & mask;
                    let place = self.place(k);
                    let word = (k / self.per_word() * ROWS + lane) * 4;
                    record[word + place / 8] |= code << (place % 8);
                }
                let scales = self.code_bytes();
                let zeros = match self.half_scales {
                    true => {
                        let s = f16::from_f32(parts.scales[at]).to_le_bytes();
                        record[scales + 2 * lane..][..2].copy_from_slice(&s);
                        scales + 2 * ROWS
                    }
                    false => {
                        record[scales + 4 * lane..][..4].copy_from_slice(&parts.scales[at].to_le_bytes());
                        scales + 4 * ROWS
                    }
                };
                if let Some(z) = parts.zeros.filter(|_| self.zeros) {
                    record[zeros + lane] = z[at];
                }
            }
        }
        out
    }
}

/// Prepares rows of X. Buffers: X `[M, K]` f32, prepared rows. Sizes: M. A unit is a row.
pub fn prepare(target: &Target, form: &Form) -> Kernel {
    let alone = packed_product::alone(target, form);
    Kernel::new(target, if form.int8 { "quantize_rows" } else { "scale_rows" }, |b, a| {
        let (x, out) = (a.buffer(b, 0), a.buffer(b, 1));
        let (k, stride) = (b.size(form.k), b.size(form.x_row()));
        let rows = a.dim(b, 0);
        let tiled = packed_product::tiled(b, form, rows);
        b.each(a.begin, a.end, 1, |b, m| {
            let at = b.mul(m, k);
            let x = b.element(x, at, Scalar::F32);
            let at = b.mul(m, stride);
            let out = b.at(out, at);
            if alone != Rows::Digits {
                return prepare_row(b, form, alone, x, out);
            }
            let many = b.cmp(Cmp::Lt, m, tiled);
            let row = |rows| move |b: &mut Body| prepare_row(b, form, rows, x, out);
            b.when_else(many, row(Rows::Floats), row(Rows::Digits));
        });
    })
}

fn prepare_row(b: &mut Body, form: &Form, rows: Rows, x: Val, out: Val) {
    let pairs = b.at_const(out, form.x_data());
    let full = form.k / form.group;
    let (zero, full_groups) = (b.size(0), b.size(full));
    let group = |b: &mut Body, g: Val, valid: usize| {
        let size = b.size(form.group);
        let first = b.mul(g, size);
        let x = b.element(x, first, Scalar::F32);
        let lanes = b.target.lanes().min(ROWS);
        let part = |i: usize| {
            let p = b.at_const(x, i * lanes * 4);
            b.load_some(p, vector(lanes, Scalar::F32), valid.saturating_sub(i * lanes).min(lanes))
        };
        let x: Vec<Val> = (0..form.group / lanes).map(part).collect();
        let places = rows.at(b, form, out, first);
        let (scale, sum) = match rows {
            Rows::Codes => codes(b, &x, places[0]),
            Rows::Floats => floats(b, form, &x, places[0]),
            Rows::Digits => digits(b, &x, &places),
        };
        let pair = b.element(pairs, g, Scalar::I64);
        b.store(scale, pair);
        let pair = b.at_const(pair, 4);
        b.store(sum, pair);
    };
    b.each(zero, full_groups, 1, |b, g| group(b, g, form.group));
    if form.groups() > full {
        group(b, full_groups, form.k % form.group);
    }
}

/// The largest size of the numbers of a group.
fn largest(b: &mut Body, x: &[Val]) -> Val {
    let zero = b.splat(x[0].ty, 0.0);
    let top = x.iter().fold(zero, |top, &p| {
        let p = b.unary("math.absf", p);
        b.max_finite(p, top)
    });
    b.fold(top, |b, x, y| b.max_finite(x, y))
}

/// Writes a group as codes; its scale, and the sum of the codes.
fn codes(b: &mut Body, x: &[Val], out: Val) -> (Val, Val) {
    let (ty, one) = (x[0].ty, scalar(Scalar::F32));
    let top = largest(b, x);
    let (limit, none) = (b.splat(one, 127.0), b.splat(one, 0.0));
    let scale = b.div(top, limit);
    let inverse = b.div(limit, top);
    let empty = b.cmp(Cmp::Eq, top, none);
    let inverse = b.select(empty, none, inverse);
    let inverse = b.broadcast(inverse, ty.lanes);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, halves to even.
    let magic = b.splat(ty, 12_582_912.0);
    let mut sum = b.splat(ty.of(Scalar::I32), 0.0);
    for (i, &p) in x.iter().enumerate() {
        let q = b.mul(p, inverse);
        let q = b.add(q, magic);
        let q = b.sub(q, magic);
        let q = b.cast(q, Scalar::I32);
        sum = b.add(sum, q);
        let q = b.cast(q, Scalar::I8);
        let p = b.at_const(out, i * ty.lanes);
        b.store(q, p);
    }
    let sum = b.fold(sum, |b, x, y| b.add(x, y));
    (scale, b.cast(sum, Scalar::F32))
}

/// Writes a group as floats; 1, and their sum.
fn floats(b: &mut Body, form: &Form, x: &[Val], out: Val) -> (Val, Val) {
    let lanes = x[0].ty.lanes;
    let mut sum = b.splat(x[0].ty, 0.0);
    for (i, &p) in x.iter().enumerate() {
        sum = b.add(sum, p);
        let factors: Vec<f64> = (0..lanes).map(|j| f64::from(factor(form, i * lanes + j))).collect();
        let factors = b.floats(&factors);
        let scaled = b.mul(p, factors);
        let p = b.at_const(out, i * lanes * 4);
        b.store(scaled, p);
    }
    let one = b.splat(scalar(Scalar::F32), 1.0);
    (one, b.fold(sum, |b, x, y| b.add(x, y)))
}

/// Writes a group as three digits of each number; their scale, and their sum in its units.
fn digits(b: &mut Body, x: &[Val], places: &[Val]) -> (Val, Val) {
    let (ty, one) = (x[0].ty, scalar(Scalar::F32));
    let top = largest(b, x);
    // The scale of a group of zeros, or of numbers near the smallest, is still a number.
    let (limit, bound) = (b.splat(one, DIGITS), b.splat(one, 126f64.exp2()));
    let inverse = b.div(limit, top);
    let inverse = b.min_finite(inverse, bound);
    let unit = b.splat(one, 1.0);
    let scale = b.div(unit, inverse);
    let inverse = b.broadcast(inverse, ty.lanes);
    let half = b.integers(ty.of(Scalar::I32), 128);
    let zero = b.splat(ty, 0.0);
    let (mut sum, mut wrong) = (zero, zero);
    for (i, &p) in x.iter().enumerate() {
        wrong = b.fma(p, zero, wrong);
        let q = b.mul(p, inverse);
        let q = b.unary("math.roundeven", q);
        sum = b.add(sum, q);
        let mut q = b.cast(q, Scalar::I32);
        // The lower byte, taken as signed, is the digit; what is left is the nearest multiple of 256.
        for (j, &place) in places.iter().rev().enumerate() {
            if j > 0 {
                let up = b.add(q, half);
                q = b.shr_signed(up, 8);
            }
            let digit = b.cast(q, Scalar::I8);
            let at = b.at_const(place, i * ty.lanes);
            b.store(digit, at);
        }
    }
    // A group in which something is no number has no scale.
    let wrong = b.fold(wrong, |b, x, y| b.add(x, y));
    (b.add(scale, wrong), b.fold(sum, |b, x, y| b.add(x, y)))
}

/// What undoes the place of the code of element `k`: a code at the top of its word is shifted down, any other one is
/// read where it stands.
fn factor(form: &Form, k: usize) -> f32 {
    let place = form.place(k);
    if place + form.bits == 32 { 1.0 } else { (-(place as f32)).exp2() }
}
