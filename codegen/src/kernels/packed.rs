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
//! with 0) followed by `[K/group]` pairs of f32: int8 codes with (scale, sum of the codes), as `accuracy_level` 4 of
//! MatMulNBits rounds them; or f32, scaled by the power of two that undoes the place of their code within its word (so
//! that a code needs no shift), with (1, sum). One record gives `scale_w * scale_x * (sum codes x - zero * sum x)`.

use super::{Args, Kernel, elementwise, pointwise};
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar, vector};
use half::f16;

/// Rows of W that lie side by side.
pub const ROWS: usize = 16;
/// Elements of K that one turn of the inner loop takes: sums of 4-bit products of bytes fit 16 bits that long.
const CHUNK: usize = 32;
/// How far ahead of its use W is asked for, in bytes.
const AHEAD: usize = 4096;
/// Rows of X that are multiplied at a time.
const TILE: usize = 4;

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
    fn per_word(&self) -> usize {
        32 / self.bits
    }

    fn code_bytes(&self) -> usize {
        self.group * self.bits / 8 * ROWS
    }

    fn record(&self) -> usize {
        let scale = if self.half_scales { 2 } else { 4 };
        self.code_bytes() + ROWS * (scale + usize::from(self.zeros))
    }

    /// Bytes of W.
    pub fn bytes(&self) -> usize {
        self.blocks() * self.groups() * self.record()
    }

    fn x_elem(&self) -> Scalar {
        if self.int8 { Scalar::I8 } else { Scalar::F32 }
    }

    fn x_data(&self) -> usize {
        self.groups() * self.group * self.x_elem().bytes()
    }

    /// Bytes of one prepared row of X.
    pub fn x_row(&self) -> usize {
        self.x_data() + self.groups() * 8
    }

    /// Where in its u32 the code of element `k` begins.
    fn place(&self, k: usize) -> usize {
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

/// Prepares rows of X. Buffers: X `[M, K]` f32, prepared rows. A unit is a row.
pub fn prepare(target: &Target, form: &Form) -> Kernel {
    let lanes = target.lanes().min(ROWS);
    Kernel::new(target, if form.int8 { "quantize_rows" } else { "scale_rows" }, |b, a| {
        let (x, out) = (a.buffer(b, 0), a.buffer(b, 1));
        let (k, stride) = (b.size(form.k), b.size(form.x_row()));
        b.each(a.begin, a.end, 1, |b, m| {
            let at = b.mul(m, k);
            let x = b.element(x, at, Scalar::F32);
            let at = b.mul(m, stride);
            let out = b.at(out, at);
            let pairs = b.at_const(out, form.x_data());
            let full = form.k / form.group;
            let (zero, full_groups) = (b.size(0), b.size(full));
            b.each(zero, full_groups, 1, |b, g| {
                prepare_group(b, form, lanes, x, out, pairs, g, form.group);
            });
            if form.groups() > full {
                prepare_group(b, form, lanes, x, out, pairs, full_groups, form.k % form.group);
            }
        });
    })
}

/// One group of a row, of which `valid` elements are there.
#[allow(clippy::too_many_arguments)]
fn prepare_group(
    b: &mut Body,
    form: &Form,
    lanes: usize,
    x: Val,
    out: Val,
    pairs: Val,
    g: Val,
    valid: usize,
) {
    let ty = vector(lanes, Scalar::F32);
    let group = b.size(form.group);
    let first = b.mul(g, group);
    let x = b.element(x, first, Scalar::F32);
    let out = b.element(out, first, form.x_elem());
    let parts: Vec<Val> = (0..form.group / lanes)
        .map(|i| {
            let p = b.at_const(x, i * lanes * 4);
            b.load_some(p, ty, valid.saturating_sub(i * lanes).min(lanes))
        })
        .collect();
    let (scale, sum) = match form.int8 {
        true => {
            let zero = b.splat(ty, 0.0);
            let top = parts.iter().fold(zero, |top, &p| {
                let p = b.unary("math.absf", p);
                b.max_finite(p, top)
            });
            let top = b.fold(top, |b, x, y| b.max_finite(x, y));
            let limit = b.splat(scalar(Scalar::F32), 127.0);
            let none = b.splat(scalar(Scalar::F32), 0.0);
            let scale = b.div(top, limit);
            let inverse = b.div(limit, top);
            let empty = b.cmp(Cmp::Eq, top, none);
            let inverse = b.select(empty, none, inverse);
            let inverse = b.broadcast(inverse, lanes);
            // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, halves to even.
            let magic = b.splat(ty, 12_582_912.0);
            let mut sum = b.splat(ty.of(Scalar::I32), 0.0);
            for (i, &p) in parts.iter().enumerate() {
                let q = b.mul(p, inverse);
                let q = b.add(q, magic);
                let q = b.sub(q, magic);
                let q = b.cast(q, Scalar::I32);
                sum = b.add(sum, q);
                let q = b.cast(q, Scalar::I8);
                let p = b.at_const(out, i * lanes);
                b.store(q, p);
            }
            let sum = b.fold(sum, |b, x, y| b.add(x, y));
            (scale, b.cast(sum, Scalar::F32))
        }
        false => {
            let zero = b.splat(ty, 0.0);
            let mut sum = zero;
            for (i, &p) in parts.iter().enumerate() {
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
    };
    let pair = b.element(pairs, g, Scalar::I64);
    b.store(scale, pair);
    let pair = b.at_const(pair, 4);
    b.store(sum, pair);
}

/// What undoes the place of the code of element `k`: a code at the top of its word is shifted down, any other one is
/// read where it stands.
fn factor(form: &Form, k: usize) -> f32 {
    let place = form.place(k);
    if place + form.bits == 32 { 1.0 } else { (-(place as f32)).exp2() }
}

/// What multiplies bytes, four to a lane.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dot {
    /// AVX-512 VNNI: sums of four in 32 bits.
    Vnni,
    /// `pmaddubsw`: sums of two in 16 bits, which saturate; 4-bit codes do not come near.
    Pairs,
    /// aarch64's sdot.
    Sdot,
    /// Byte by byte.
    Plain,
}

impl Dot {
    fn of(target: &Target, form: &Form) -> Dot {
        match target.arch {
            // Signed by signed: 8-bit codes do not fit.
            Arch::Aarch64 if target.has(Feature::DotProd) && form.bits < 8 => Dot::Sdot,
            Arch::X86_64 if target.has(Feature::Avx512Vnni) => Dot::Vnni,
            Arch::X86_64 if target.has(Feature::Avx2) && (form.bits < 8 || !target.has(Feature::Avx512)) => {
                Dot::Pairs
            }
            _ => Dot::Plain,
        }
    }

    /// What codes are less than they are written: 8-bit ones are taken signed where the instruction wants it.
    fn offset(self, form: &Form) -> f64 {
        if self == Dot::Pairs && form.bits == 8 { 128.0 } else { 0.0 }
    }

    fn accumulator(self, form: &Form, lanes: usize) -> Ty {
        match self {
            Dot::Pairs if form.bits < 8 => vector(2 * lanes, Scalar::I16),
            _ => vector(lanes, Scalar::I32),
        }
    }

    /// `acc` and the products of four unsigned codes with four signed bytes in each lane.
    fn four(self, b: &mut Body, form: &Form, acc: Val, codes: Val, x: Val) -> Val {
        let lanes = codes.ty.lanes;
        let (bytes, pairs) = (vector(4 * lanes, Scalar::I8), vector(2 * lanes, Scalar::I16));
        match self {
            Dot::Vnni => b.intrinsic("llvm.x86.avx512.vpdpbusd.512", &[acc, codes, x], acc.ty),
            Dot::Sdot => {
                let (codes, x) = (b.bitcast(codes, bytes), b.bitcast(x, bytes));
                b.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", &[acc, codes, x], acc.ty)
            }
            Dot::Pairs => {
                let (madd, wide) = match lanes {
                    16 => ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
                    _ => ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
                };
                let x = b.bitcast(x, bytes);
                if form.bits < 8 {
                    let codes = b.bitcast(codes, bytes);
                    let p = b.intrinsic(madd, &[codes, x], pairs);
                    return b.add(acc, p);
                }
                // |c| <= 128 times sign(c) x, with |x| <= 127: two of them fit 16 bits.
                let flip = b.splat(codes.ty, f64::from(0x8080_8080u32 as i32));
                let signed = b.xor(codes, flip);
                let signed = b.bitcast(signed, bytes);
                let size = b.unary("math.absi", signed);
                let x = b.intrinsic("llvm.x86.avx2.psign.b", &[x, signed], bytes);
                let p = b.intrinsic(madd, &[size, x], pairs);
                let ones = b.splat(pairs, 1.0);
                let p = b.intrinsic(wide, &[p, ones], acc.ty);
                b.add(acc, p)
            }
            Dot::Plain => (0..4).fold(acc, |acc, j| {
                let low = b.splat(codes.ty, 255.0);
                let c = b.shr(codes, 8 * j);
                let c = b.and(c, low);
                let x = b.shl(x, 24 - 8 * j);
                let x = b.shr_signed(x, 24);
                let p = b.mul(c, x);
                b.add(acc, p)
            }),
        }
    }

    /// The accumulator as one sum to a lane.
    fn sums(self, b: &mut Body, form: &Form, acc: Val) -> Val {
        match self {
            Dot::Pairs if form.bits < 8 => {
                let wide = match acc.ty.lanes {
                    32 => "llvm.x86.avx512.pmaddw.d.512",
                    _ => "llvm.x86.avx2.pmadd.wd",
                };
                let ones = b.splat(acc.ty, 1.0);
                b.intrinsic(wide, &[acc, ones], vector(acc.ty.lanes / 2, Scalar::I32))
            }
            _ => acc,
        }
    }
}

/// What is done with a row's 16 sums before they are written: of `(row, first output, how many of the 16 are there, sums in
/// parts)`, the parts of each result.
pub type Finish<'f> = dyn Fn(&mut Body, &Args, Val, Val, usize, Vec<Val>) -> Vec<Vec<Val>> + 'f;

/// The product. Buffers: prepared rows of X, W, results `[M, N]`, and what `finish` reads. Sizes: M. A unit is 16 outputs of
/// all rows.
pub fn product(target: &Target, form: &Form, results: usize, finish: &Finish) -> Kernel {
    let kernel = Product {
        form,
        lanes: target.lanes().min(ROWS),
        dot: form.int8.then(|| Dot::of(target, form)),
        finish,
    };
    let family = format!("matmul_{}bit_{}", form.bits, if form.int8 { "int8" } else { "f32" });
    Kernel::new(target, &family, |b, a| {
        let (x, w) = (a.buffer(b, 0), a.buffer(b, 1));
        let y: Vec<Val> = (0..results).map(|i| a.buffer(b, 2 + i)).collect();
        let rows = a.dim(b, 0);
        let block = b.size(form.groups() * form.record());
        b.each(a.begin, a.end, 1, |b, nb| {
            let at = b.mul(nb, block);
            let w = b.at(w, at);
            let (zero, tile) = (b.size(0), b.size(TILE));
            let tiles = b.div(rows, tile);
            let tiled = b.mul(tiles, tile);
            b.each(zero, tiled, TILE, |b, m| kernel.rows(b, a, (x, w, &y), nb, m, TILE));
            b.each(tiled, rows, 1, |b, m| kernel.rows(b, a, (x, w, &y), nb, m, 1));
        });
    })
}

struct Product<'f> {
    form: &'f Form,
    lanes: usize,
    /// `None` for f32 activations.
    dot: Option<Dot>,
    finish: &'f Finish<'f>,
}

impl Product<'_> {
    /// Vectors that 16 rows of W take.
    fn parts(&self) -> usize {
        ROWS / self.lanes
    }

    /// `tile` rows of X from `m` on by the block `nb` of W.
    fn rows(&self, b: &mut Body, a: &Args, (x, w, y): (Val, Val, &[Val]), nb: Val, m: Val, tile: usize) {
        let form = self.form;
        let stride = b.size(form.x_row());
        let at = b.mul(m, stride);
        let x = b.at(x, at);
        let xs: Vec<Val> = (0..tile).map(|i| b.at_const(x, i * form.x_row())).collect();
        let zero = b.splat(vector(self.lanes, Scalar::F32), 0.0);
        let (from, to) = (b.size(0), b.size(form.groups()));
        let start = vec![zero; tile * self.parts()];
        let sums = b.repeat(from, to, 1, &start, |b, g, sums| self.record(b, &xs, w, g, sums));
        let sixteen = b.size(ROWS);
        let first = b.mul(nb, sixteen);
        let tail = form.n % ROWS;
        if tail == 0 {
            return self.write(b, a, y, m, first, &sums, ROWS);
        }
        let last = b.size(form.n - tail);
        let whole = b.cmp(Cmp::Lt, first, last);
        b.when(whole, |b| self.write(b, a, y, m, first, &sums, ROWS));
        let partial = b.cmp(Cmp::Ge, first, last);
        b.when(partial, |b| self.write(b, a, y, m, first, &sums, tail));
    }

    /// Finishes and writes rows from `m` on, of which `there` of 16 outputs are there.
    #[allow(clippy::too_many_arguments)]
    fn write(&self, b: &mut Body, a: &Args, y: &[Val], m: Val, first: Val, sums: &[Val], there: usize) {
        let n = b.size(self.form.n);
        for (i, sums) in sums.chunks(self.parts()).enumerate() {
            let row = b.size(i);
            let row = b.add(m, row);
            let at = b.mul(row, n);
            let at = b.add(at, first);
            let results = (self.finish)(b, a, row, first, there, sums.to_vec());
            for (&y, parts) in y.iter().zip(results) {
                for (p, v) in parts.into_iter().enumerate() {
                    let part = b.size(p * self.lanes);
                    let at = b.add(at, part);
                    let y = elementwise::element(b, y, at, v.ty.elem);
                    pointwise::store_some(b, v, y, there.saturating_sub(p * self.lanes).min(self.lanes));
                }
            }
        }
    }

    /// One record: a group of 16 rows of W by the same group of each row of X, added to `sums`.
    fn record(&self, b: &mut Body, xs: &[Val], w: Val, g: Val, sums: &[Val]) -> Vec<Val> {
        let (form, parts, lanes) = (self.form, self.parts(), self.lanes);
        let record = b.size(form.record());
        let at = b.mul(g, record);
        let w = b.at(w, at);
        for line in 0..form.record().div_ceil(64) {
            b.prefetch(w, AHEAD + 64 * line);
        }
        let floats = vector(lanes, Scalar::F32);
        let group = b.size(form.group);
        let first = b.mul(g, group);
        let x: Vec<Val> = xs.iter().map(|&x| b.element(x, first, form.x_elem())).collect();
        let dots = self.group(b, &x, w);

        let mut scales = b.at_const(w, form.code_bytes());
        let half = form.half_scales;
        let elem = if half { Scalar::F16 } else { Scalar::F32 };
        let scale: Vec<Val> = (0..parts)
            .map(|p| {
                let at = b.at_const(scales, p * lanes * elem.bytes());
                let s = b.load(at, floats.of(elem));
                b.cast(s, Scalar::F32)
            })
            .collect();
        scales = b.at_const(scales, ROWS * elem.bytes());
        let offset = self.dot.map_or(0.0, |d| d.offset(form));
        let zeros: Vec<Val> = (0..parts)
            .map(|p| match form.zeros {
                true => {
                    let at = b.at_const(scales, p * lanes);
                    let z = b.load(at, floats.of(Scalar::I8));
                    let z = b.widen_unsigned(z, Scalar::I32);
                    let z = b.cast(z, Scalar::F32);
                    let shift = b.splat(floats, offset);
                    b.sub(shift, z)
                }
                false => b.splat(floats, offset - f64::from(1u32 << (form.bits - 1))),
            })
            .collect();
        let mut out = Vec::with_capacity(sums.len());
        for (m, &row) in xs.iter().enumerate() {
            let pairs = b.at_const(row, form.x_data());
            let pair = b.element(pairs, g, Scalar::I64);
            let x_scale = b.load(pair, scalar(Scalar::F32));
            let pair = b.at_const(pair, 4);
            let x_sum = b.load(pair, scalar(Scalar::F32));
            let (x_scale, x_sum) = (b.broadcast(x_scale, lanes), b.broadcast(x_sum, lanes));
            for p in 0..parts {
                let i = m * parts + p;
                let t = b.fma(zeros[p], x_sum, dots[i]);
                let s = if self.dot.is_some() { b.mul(scale[p], x_scale) } else { scale[p] };
                out.push(b.fma(t, s, sums[i]));
            }
        }
        out
    }

    /// The sums of codes by activations over one group, as floats.
    fn group(&self, b: &mut Body, x: &[Val], w: Val) -> Vec<Val> {
        let form = self.form;
        let chunk = form.group.min(CHUNK);
        let chunks = form.group / chunk;
        let sums = x.len() * self.parts();
        let ty = match self.dot {
            Some(_) => vector(self.lanes, Scalar::I32),
            None => vector(self.lanes, Scalar::F32),
        };
        let zero = b.splat(ty, 0.0);
        let start = vec![zero; sums];
        let out = match chunks {
            1 => self.chunk(b, x, w, &start),
            _ => {
                let (from, to) = (b.size(0), b.size(chunks));
                b.repeat(from, to, 1, &start, |b, c, sums| {
                    let (w_step, x_step) = (form.code_bytes() / chunks, chunk);
                    let (w_step, x_step) = (b.size(w_step), b.size(x_step));
                    let at = b.mul(c, w_step);
                    let w = b.at(w, at);
                    let at = b.mul(c, x_step);
                    let x: Vec<Val> = x.iter().map(|&x| b.element(x, at, form.x_elem())).collect();
                    self.chunk(b, &x, w, sums)
                })
            }
        };
        out.into_iter().map(|v| b.cast(v, Scalar::F32)).collect()
    }

    /// At most 32 elements of K.
    fn chunk(&self, b: &mut Body, x: &[Val], w: Val, sums: &[Val]) -> Vec<Val> {
        match self.dot {
            Some(dot) => self.chunk_int8(b, dot, x, w, sums),
            None => self.chunk_f32(b, x, w, sums),
        }
    }

    fn words(&self, b: &mut Body, w: Val, word: usize) -> Vec<Val> {
        (0..self.parts())
            .map(|p| {
                let at = b.at_const(w, (word * ROWS + p * self.lanes) * 4);
                b.load(at, vector(self.lanes, Scalar::I32))
            })
            .collect()
    }

    fn chunk_int8(&self, b: &mut Body, dot: Dot, x: &[Val], w: Val, sums: &[Val]) -> Vec<Val> {
        let (form, parts, lanes) = (self.form, self.parts(), self.lanes);
        let zero = b.splat(dot.accumulator(form, lanes), 0.0);
        let own = dot.accumulator(form, lanes) != sums[0].ty;
        let mut acc = if own { vec![zero; sums.len()] } else { sums.to_vec() };
        let byte = i64::from(0x0101_0101i32) * ((1i64 << form.bits) - 1);
        let mask = b.splat(vector(lanes, Scalar::I32), f64::from(byte as u32 as i32));
        for word in 0..form.group.min(CHUNK) / form.per_word() {
            let codes = self.words(b, w, word);
            for plane in 0..8 / form.bits {
                let codes: Vec<Val> = codes
                    .iter()
                    .map(|&c| match form.bits {
                        8 => c,
                        _ => {
                            let c = b.shr(c, plane * form.bits);
                            b.and(c, mask)
                        }
                    })
                    .collect();
                for (m, &x) in x.iter().enumerate() {
                    let at = b.at_const(x, word * form.per_word() + 4 * plane);
                    let four = b.load_bytes_as(at, Scalar::I32);
                    let four = b.broadcast(four, lanes);
                    for p in 0..parts {
                        let i = m * parts + p;
                        acc[i] = dot.four(b, form, acc[i], codes[p], four);
                    }
                }
            }
        }
        match own {
            false => acc,
            true => acc
                .into_iter()
                .zip(sums)
                .map(|(a, &s)| {
                    let a = dot.sums(b, form, a);
                    b.add(a, s)
                })
                .collect(),
        }
    }

    fn chunk_f32(&self, b: &mut Body, x: &[Val], w: Val, sums: &[Val]) -> Vec<Val> {
        let (form, parts, lanes) = (self.form, self.parts(), self.lanes);
        let words = vector(lanes, Scalar::I32);
        // A sum waits for the one before it; one row alone takes four of them in turn.
        let chains = if x.len() == 1 { 4 } else { 1 };
        let zero = b.splat(sums[0].ty, 0.0);
        let mut acc: Vec<Vec<Val>> =
            (0..chains).map(|c| if c == 0 { sums.to_vec() } else { vec![zero; sums.len()] }).collect();
        for word in 0..form.group.min(CHUNK) / form.per_word() {
            let codes = self.words(b, w, word);
            for k in 0..form.per_word() {
                let place = form.place(k);
                let codes: Vec<Val> = codes
                    .iter()
                    .map(|&c| {
                        let c = match place + form.bits == 32 {
                            true => b.shr(c, place),
                            false => {
                                let bits = ((1i64 << form.bits) - 1) << place;
                                let mask = b.splat(words, bits as f64);
                                b.and(c, mask)
                            }
                        };
                        b.cast(c, Scalar::F32)
                    })
                    .collect();
                let chain = &mut acc[k % chains];
                for (m, &x) in x.iter().enumerate() {
                    let at = b.at_const(x, (word * form.per_word() + k) * 4);
                    let one = b.load(at, scalar(Scalar::F32));
                    let one = b.broadcast(one, lanes);
                    for p in 0..parts {
                        let i = m * parts + p;
                        chain[i] = b.fma(codes[p], one, chain[i]);
                    }
                }
            }
        }
        let mut acc = acc.into_iter();
        let first = acc.next().expect("one chain at least");
        acc.fold(first, |a, c| a.into_iter().zip(c).map(|(a, c)| b.add(a, c)).collect())
    }
}
