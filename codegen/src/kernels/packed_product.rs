//! The product of prepared rows of X and packed W: see [`packed`](super::packed) for their layouts.

use super::packed::{AHEAD, CHUNK, Form, ROWS, TILE};
use super::{Args, Kernel, elementwise, pointwise};
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Cmp, Intrinsic, Scalar, Ty, Val, scalar, vector};

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
            Dot::Vnni => {
                let (codes, x) = (b.bitcast(codes, bytes), b.bitcast(x, bytes));
                b.intrinsic(Intrinsic::Vpdpbusd, &[acc, codes, x], acc.ty)
            }
            Dot::Sdot => {
                let (codes, x) = (b.bitcast(codes, bytes), b.bitcast(x, bytes));
                b.intrinsic(Intrinsic::Sdot, &[acc, codes, x], acc.ty)
            }
            Dot::Pairs => {
                let x = b.bitcast(x, bytes);
                if form.bits < 8 {
                    let codes = b.bitcast(codes, bytes);
                    let p = b.intrinsic(Intrinsic::Pmaddubsw, &[codes, x], pairs);
                    return b.add(acc, p);
                }
                // |c| <= 128 times sign(c) x, with |x| <= 127: two of them fit 16 bits.
                let flip = b.splat(codes.ty, f64::from(0x8080_8080u32 as i32));
                let signed = b.xor(codes, flip);
                let signed = b.bitcast(signed, bytes);
                let size = b.unary("math.absi", signed);
                let x = b.intrinsic(Intrinsic::Psignb, &[x, signed], bytes);
                let p = b.intrinsic(Intrinsic::Pmaddubsw, &[size, x], pairs);
                let ones = b.splat(pairs, 1.0);
                let p = b.intrinsic(Intrinsic::Pmaddwd, &[p, ones], acc.ty);
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
                let ones = b.splat(acc.ty, 1.0);
                b.intrinsic(Intrinsic::Pmaddwd, &[acc, ones], vector(acc.ty.lanes / 2, Scalar::I32))
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
                    for (p, &codes) in codes.iter().enumerate() {
                        let i = m * parts + p;
                        acc[i] = dot.four(b, form, acc[i], codes, four);
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
                    for (p, &codes) in codes.iter().enumerate() {
                        let i = m * parts + p;
                        chain[i] = b.fma(codes, one, chain[i]);
                    }
                }
            }
        }
        let mut acc = acc.into_iter();
        let first = acc.next().expect("one chain at least");
        acc.fold(first, |a, c| a.into_iter().zip(c).map(|(a, c)| b.add(a, c)).collect())
    }
}
