//! The product of prepared rows of X and packed W: see [`packed`](super::packed) for their layouts.

use super::packed::{AHEAD, CHUNK, Form, ROWS, Rows};
use super::{Args, Kernel, elementwise, pointwise};
use crate::size::Size;
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Cmp, Intrinsic, Scalar, Ty, Val, scalar, vector};

/// What multiplies bytes, four to a lane.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Dot {
    /// AVX-512 VNNI: sums of four in 32 bits.
    Vnni,
    /// `pmaddubsw`: sums of two in 16 bits, which saturate; 4-bit codes do not come near.
    Pairs,
    /// aarch64's sdot, signed by signed: sums of four in 32 bits.
    Sdot,
    /// Unsigned by signed; and `usmmla`, twice as many products, where rows of X come in pairs.
    Usdot,
    /// Byte by byte.
    Plain,
}

impl Dot {
    fn of(target: &Target, form: &Form) -> Dot {
        match target.arch {
            Arch::Aarch64 if target.has(Feature::I8mm) => Dot::Usdot,
            Arch::Aarch64 if target.has(Feature::DotProd) => Dot::Sdot,
            Arch::X86_64 if target.has(Feature::Avx512Vnni) => Dot::Vnni,
            Arch::X86_64 if target.has(Feature::Avx2) && (form.bits < 8 || !target.has(Feature::Avx512)) => {
                Dot::Pairs
            }
            _ => Dot::Plain,
        }
    }

    /// What codes are less than they are written: 8-bit ones are taken signed where the instruction wants it.
    fn offset(self, form: &Form) -> f64 {
        if matches!(self, Dot::Pairs | Dot::Sdot) && form.bits == 8 { 128.0 } else { 0.0 }
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
                let codes = if form.bits == 8 { signed(b, codes) } else { codes };
                let (codes, x) = (b.bitcast(codes, bytes), b.bitcast(x, bytes));
                b.intrinsic(Intrinsic::Sdot, &[acc, codes, x], acc.ty)
            }
            Dot::Usdot => {
                let (codes, x) = (b.bitcast(codes, bytes), b.bitcast(x, bytes));
                b.intrinsic(Intrinsic::Usdot, &[acc, codes, x], acc.ty)
            }
            Dot::Pairs => {
                let x = b.bitcast(x, bytes);
                if form.bits < 8 {
                    let codes = b.bitcast(codes, bytes);
                    let p = b.intrinsic(Intrinsic::Pmaddubsw, &[codes, x], pairs);
                    return b.add(acc, p);
                }
                // |c| <= 128 times sign(c) x, with |x| <= 127: two of them fit 16 bits.
                let signed = signed(b, codes);
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

/// 8-bit codes, each less 128.
fn signed(b: &mut Body, codes: Val) -> Val {
    let flip = b.splat(codes.ty, f64::from(0x8080_8080u32 as i32));
    b.xor(codes, flip)
}

/// Blocks of 16 rows of W in a unit: they meet a row of X while it is in the first cache.
pub(super) const BLOCKS: usize = 4;

/// What is done with a row's 16 sums before they are written: of `(row, first output, how many of the 16 are there, sums in
/// parts)`, the parts of each result.
pub type Finish<'f> = dyn Fn(&mut Body, &Args, Val, Val, usize, Vec<Val>) -> Vec<Vec<Val>> + 'f;

/// The product. Buffers: prepared rows of X, W, results `[M, N]`, and what `finish` reads. Sizes: M. Units: [`units`].
pub fn product(target: &Target, form: &Form, results: usize, finish: &Finish) -> Kernel {
    let [alone, many] = [alone(target, form), together(form)].map(|x| Product::new(target, form, x, finish));
    let family = format!("matmul_{}bit_{}", form.bits, if form.int8 { "int8" } else { "f32" });
    Kernel::new(target, &family, |b, a| {
        let (x, w) = (a.buffer(b, 0), a.buffer(b, 1));
        let y: Vec<Val> = (0..results).map(|i| a.buffer(b, 2 + i)).collect();
        let rows = a.dim(b, 0);
        let block = b.size(form.groups() * form.record());
        let most = b.size(many.most());
        let room = many.tiles().then(|| many.room(b));
        let row_blocks = b.size(many.most() - 1);
        let row_blocks = b.add(rows, row_blocks);
        let row_blocks = b.div(row_blocks, most);
        b.each(a.begin, a.end, 1, |b, unit| {
            let (columns, first) = (b.div(unit, row_blocks), b.rem(unit, row_blocks));
            let first = b.mul(first, most);
            let end = b.add(first, most);
            let rows = (first, b.min(end, rows));
            let four = b.size(BLOCKS);
            let from = b.mul(columns, four);
            let (to, all) = (b.add(from, four), b.size(form.blocks()));
            let to = b.min(to, all);
            let left = match &room {
                Some(room) => many.many(b, a, (x, w, &y), room, (from, to), rows),
                None => first,
            };
            b.each(from, to, 1, |b, nb| {
                let at = b.mul(nb, block);
                let w = b.at(w, at);
                b.each(left, rows.1, 1, |b, m| alone.row(b, a, (x, w, &y), nb, m));
            });
        });
        room.inspect(|room| room.release(b));
    })
}

/// How rows of X are prepared that are multiplied alone.
pub(super) fn alone(target: &Target, form: &Form) -> Rows {
    match Dot::of(target, form) {
        _ if form.int8 => Rows::Codes,
        // 256 times the sum of a digit by codes is to fit 32 bits.
        _ if form.group << form.bits > 1 << 16 => Rows::Floats,
        Dot::Plain => Rows::Floats,
        Dot::Pairs if form.bits == 8 => Rows::Floats,
        _ => Rows::Digits,
    }
}

/// How rows of X are prepared that are multiplied with others: W is decoded once for all.
fn together(form: &Form) -> Rows {
    if form.int8 { Rows::Codes } else { Rows::Floats }
}

/// The product of many rows, for its sizes.
fn sizes<'f>(target: &Target, form: &'f Form) -> Product<'f> {
    Product::new(target, form, together(form), &|_, _, _, _, _, sums| vec![sums])
}

/// Of so many rows those that are multiplied with others.
pub(super) fn tiled(b: &mut Body, form: &Form, rows: Val) -> Val {
    let product = sizes(b.target, form);
    let zero = b.size(0);
    if product.tiles() { b.whole_steps(zero, rows, product.tile) } else { zero }
}

/// The units of a product of so many rows: each is 64 outputs of some rows.
pub fn units(target: &Target, form: &Form, rows: Size) -> Size {
    Size::from(form.blocks().div_ceil(BLOCKS)) * rows.div_up(sizes(target, form).most() as u64)
}

pub(super) struct Product<'f> {
    pub(super) form: &'f Form,
    pub(super) lanes: usize,
    /// Rows that are multiplied at a time where there are many: the registers hold their sums.
    pub(super) tile: usize,
    /// What X is.
    x: Rows,
    /// `None` where X is floats.
    dot: Option<Dot>,
    /// Whether tiles of AMX multiply 16 rows of X by 16 of W.
    pub(super) amx: bool,
    finish: &'f Finish<'f>,
}

/// Where codes are read.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// In their record.
    Packed(Val),
    /// Where they were decoded to: see [`packed_tiles`](super::packed_tiles).
    Decoded(Val),
}

impl Product<'_> {
    fn new<'f>(target: &Target, form: &'f Form, x: Rows, finish: &'f Finish<'f>) -> Product<'f> {
        let lanes = target.lanes().min(ROWS);
        let registers = if target.has(Feature::Avx512) || target.arch == Arch::Aarch64 { 32 } else { 16 };
        // Beside the sums: codes, an element of X, and what the compiler needs.
        let tile = ((registers - 4) / (ROWS / lanes)).min(12);
        let dot = (x != Rows::Floats).then(|| Dot::of(target, form));
        let amx = x == Rows::Codes && target.has(Feature::AmxInt8);
        let tile = match dot {
            _ if amx => ROWS,
            Some(Dot::Usdot) => tile / 2 * 2,
            _ => tile,
        };
        Product { form, lanes, tile, x, dot, amx, finish }
    }

    /// Vectors that 16 rows of W take.
    pub(super) fn parts(&self) -> usize {
        ROWS / self.lanes
    }

    /// Row `m` of X by the block `nb` of W.
    fn row(&self, b: &mut Body, a: &Args, (x, w, y): (Val, Val, &[Val]), nb: Val, m: Val) {
        let form = self.form;
        let stride = b.size(form.x_row());
        let at = b.mul(m, stride);
        let x = b.at(x, at);
        let zero = b.splat(vector(self.lanes, Scalar::F32), 0.0);
        let (from, to) = (b.size(0), b.size(form.groups()));
        let start = vec![zero; self.parts()];
        let sums = b.repeat(from, to, 1, &start, |b, g, sums| self.record(b, x, w, g, sums));
        self.write(b, a, y, nb, m, &sums);
    }

    /// Finishes and writes row `m` of the block `nb` of outputs.
    pub(super) fn write(&self, b: &mut Body, a: &Args, y: &[Val], nb: Val, m: Val, sums: &[Val]) {
        let form = self.form;
        let sixteen = b.size(ROWS);
        let first = b.mul(nb, sixteen);
        let tail = form.n % ROWS;
        if tail == 0 {
            return self.write_some(b, a, y, m, first, sums, ROWS);
        }
        let last = b.size(form.n - tail);
        let whole = b.cmp(Cmp::Lt, first, last);
        b.when_else(
            whole,
            |b| self.write_some(b, a, y, m, first, sums, ROWS),
            |b| self.write_some(b, a, y, m, first, sums, tail),
        );
    }

    /// Finishes and writes row `m`, of which `there` of 16 outputs are there.
    #[allow(clippy::too_many_arguments)]
    fn write_some(&self, b: &mut Body, a: &Args, y: &[Val], m: Val, first: Val, sums: &[Val], there: usize) {
        let n = b.size(self.form.n);
        let at = b.mul(m, n);
        let at = b.add(at, first);
        let results = (self.finish)(b, a, m, first, there, sums.to_vec());
        for (&y, parts) in y.iter().zip(results) {
            for (p, v) in parts.into_iter().enumerate() {
                let part = b.size(p * self.lanes);
                let at = b.add(at, part);
                let y = elementwise::element(b, y, at, v.ty.elem);
                pointwise::store_some(b, v, y, there.saturating_sub(p * self.lanes).min(self.lanes));
            }
        }
    }

    /// One record: a group of 16 rows of W by the same group of a row of X, added to `sums`.
    fn record(&self, b: &mut Body, x: Val, w: Val, g: Val, sums: &[Val]) -> Vec<Val> {
        let form = self.form;
        let record = b.size(form.record());
        let at = b.mul(g, record);
        let w = b.at(w, at);
        for line in 0..form.record().div_ceil(64) {
            b.prefetch(w, AHEAD + 64 * line);
        }
        let dots = self.group(b, &[x], g, Source::Packed(w));
        let (scales, zeros) = (self.scales(b, w), self.zeros(b, w));
        self.scaled(b, x, g, &dots, (&scales, &zeros), sums)
    }

    /// The scales of a record.
    pub(super) fn scales(&self, b: &mut Body, record: Val) -> Vec<Val> {
        let floats = vector(self.lanes, Scalar::F32);
        let elem = if self.form.half_scales { Scalar::F16 } else { Scalar::F32 };
        let load = |p| {
            let at = b.at_const(record, self.form.code_bytes() + p * self.lanes * elem.bytes());
            let s = b.load(at, floats.of(elem));
            b.cast(s, Scalar::F32)
        };
        (0..self.parts()).map(load).collect()
    }

    /// What codes are more than they are written.
    fn offset(&self) -> f64 {
        self.dot.map_or(0.0, |d| d.offset(self.form))
    }

    /// What is added to codes for zero points in the middle.
    pub(super) fn middle(&self, b: &mut Body) -> Vec<Val> {
        let zero = self.offset() - f64::from(1u32 << (self.form.bits - 1));
        vec![b.splat(vector(self.lanes, Scalar::F32), zero); self.parts()]
    }

    /// What is added to codes for the zero points of a record, as floats.
    pub(super) fn zeros(&self, b: &mut Body, record: Val) -> Vec<Val> {
        let (form, floats) = (self.form, vector(self.lanes, Scalar::F32));
        if !form.zeros {
            return self.middle(b);
        }
        let load = |p| {
            let at = b.at_const(record, form.record() - ROWS + p * self.lanes);
            let z = b.load(at, floats.of(Scalar::I8));
            let z = b.widen_unsigned(z, Scalar::I32);
            let z = b.cast(z, Scalar::F32);
            let shift = b.splat(floats, self.offset());
            b.sub(shift, z)
        };
        (0..self.parts()).map(load).collect()
    }

    /// `sums` and the `dots` of group `g` of a row with their scales.
    pub(super) fn scaled(
        &self,
        b: &mut Body,
        row: Val,
        g: Val,
        dots: &[Val],
        (scales, zeros): (&[Val], &[Val]),
        sums: &[Val],
    ) -> Vec<Val> {
        let pairs = b.at_const(row, self.form.x_data());
        let pair = b.element(pairs, g, Scalar::I64);
        let x_scale = b.load(pair, scalar(Scalar::F32));
        let pair = b.at_const(pair, 4);
        let x_sum = b.load(pair, scalar(Scalar::F32));
        let (x_scale, x_sum) = (b.broadcast(x_scale, self.lanes), b.broadcast(x_sum, self.lanes));
        let one = |p| {
            let t = b.fma(zeros[p], x_sum, dots[p]);
            let s = if self.dot.is_some() { b.mul(scales[p], x_scale) } else { scales[p] };
            b.fma(t, s, sums[p])
        };
        (0..self.parts()).map(one).collect()
    }

    /// The sums of codes by activations over group `g` of some rows, as floats.
    pub(super) fn group(&self, b: &mut Body, rows: &[Val], g: Val, source: Source) -> Vec<Val> {
        let form = self.form;
        let first = b.size(form.group);
        let first = b.mul(g, first);
        let x: Vec<Val> = rows.iter().flat_map(|&x| self.x.at(b, form, x, first)).collect();
        let chunk = form.group.min(CHUNK);
        let elem = if self.dot.is_some() { Scalar::I32 } else { Scalar::F32 };
        let zero = b.splat(vector(self.lanes, elem), 0.0);
        let start = vec![zero; x.len() * self.parts()];
        let sums = match form.group / chunk {
            1 => self.chunk(b, &x, source, &start),
            _ => {
                let (from, to) = (b.size(0), b.size(form.group));
                b.repeat(from, to, chunk, &start, |b, k, sums| {
                    let (x, source) = self.later(b, &x, source, k);
                    self.chunk(b, &x, source, sums)
                })
            }
        };
        match self.x {
            Rows::Floats => sums,
            Rows::Codes => sums.into_iter().map(|v| b.cast(v, Scalar::F32)).collect(),
            Rows::Digits => self.digits(b, &sums),
        }
    }

    /// Sums of numbers of three digits, from the sums of each digit.
    fn digits(&self, b: &mut Body, sums: &[Val]) -> Vec<Val> {
        let parts = self.parts();
        let factor = b.splat(vector(self.lanes, Scalar::F32), 65536.0);
        let one = |p: usize| {
            let middle = b.shl(sums[parts + p], 8);
            let lower = b.add(middle, sums[2 * parts + p]);
            let (upper, lower) = (b.cast(sums[p], Scalar::F32), b.cast(lower, Scalar::F32));
            b.fma(upper, factor, lower)
        };
        (0..parts).map(one).collect()
    }

    /// X and codes, `k` elements on.
    pub(super) fn later(&self, b: &mut Body, x: &[Val], source: Source, k: Val) -> (Vec<Val>, Source) {
        let x = x.iter().map(|&x| b.element(x, k, self.x.elem())).collect();
        let mut on = |at: Val, bytes: usize| {
            let bytes = b.size(bytes);
            let offset = b.mul(k, bytes);
            b.at(at, offset)
        };
        let source = match source {
            Source::Packed(w) => Source::Packed(on(w, ROWS * self.form.bits / 8)),
            Source::Decoded(w) => Source::Decoded(on(w, self.decoded())),
        };
        (x, source)
    }

    /// At most 32 elements of K.
    fn chunk(&self, b: &mut Body, x: &[Val], source: Source, sums: &[Val]) -> Vec<Val> {
        match self.dot {
            Some(dot) => self.chunk_bytes(b, dot, x, source, sums),
            None => self.chunk_floats(b, x, source, sums),
        }
    }

    /// `step(x, codes, k, sums)` for each `k` of a chunk, in steps: in a loop where there are many sums to be kept.
    fn steps(
        &self,
        b: &mut Body,
        x: &[Val],
        source: Source,
        size: usize,
        sums: Vec<Val>,
        step: impl Fn(&mut Body, &[Val], Source, usize, &mut [Val]),
    ) -> Vec<Val> {
        let length = self.form.group.min(CHUNK);
        let turn = match source {
            Source::Packed(_) => self.form.per_word(),
            Source::Decoded(_) => size,
        };
        let all = |b: &mut Body, x: &[Val], source, length, mut sums: Vec<Val>| {
            (0..length).step_by(size).for_each(|k| step(b, x, source, k, &mut sums));
            sums
        };
        if x.len() == 1 {
            return all(b, x, source, length, sums);
        }
        let (from, to) = (b.size(0), b.size(length));
        b.rolled(from, to, turn, &sums, |b, k, sums| {
            let (x, source) = self.later(b, x, source, k);
            all(b, &x, source, turn, sums.to_vec())
        })
    }

    /// Bytes that 16 decoded codes take: one each, or a float.
    pub(super) fn decoded(&self) -> usize {
        ROWS * self.x.elem().bytes()
    }

    /// The codes of elements `k` and, as bytes, the three after it, which are in one plane of a word.
    pub(super) fn codes(&self, b: &mut Body, source: Source, k: usize) -> Vec<Val> {
        let ty = vector(self.lanes, if self.dot.is_some() { Scalar::I32 } else { Scalar::F32 });
        let form = self.form;
        let one = |p: usize| match source {
            Source::Decoded(w) => {
                let at = b.at_const(w, k * self.decoded() + p * self.lanes * 4);
                b.load(at, ty)
            }
            Source::Packed(w) => {
                let at = b.at_const(w, (k / form.per_word() * ROWS + p * self.lanes) * 4);
                let word = b.load(at, ty.of(Scalar::I32));
                if self.dot.is_some() { self.bytes(b, word, k) } else { self.float(b, word, k) }
            }
        };
        (0..self.parts()).map(one).collect()
    }

    /// The plane of `k` of a word: four codes.
    fn bytes(&self, b: &mut Body, word: Val, k: usize) -> Val {
        let bits = self.form.bits;
        if bits == 8 {
            return word;
        }
        let byte = i64::from(0x0101_0101i32) * ((1i64 << bits) - 1);
        let mask = b.splat(word.ty, f64::from(byte as u32 as i32));
        let plane = b.shr(word, k % self.form.per_word() / 4 * bits);
        b.and(plane, mask)
    }

    /// The code of `k` where it stands in its word: its element of X was scaled for that.
    fn float(&self, b: &mut Body, word: Val, k: usize) -> Val {
        let (form, place) = (self.form, self.form.place(k));
        let code = match place + form.bits == 32 {
            true => b.shr(word, place),
            false => {
                let bits = ((1i64 << form.bits) - 1) << place;
                let mask = b.splat(word.ty, bits as f64);
                b.and(word, mask)
            }
        };
        b.cast(code, Scalar::F32)
    }

    fn chunk_bytes(&self, b: &mut Body, dot: Dot, x: &[Val], source: Source, sums: &[Val]) -> Vec<Val> {
        let (form, parts, lanes) = (self.form, self.parts(), self.lanes);
        if let (Dot::Usdot, Source::Decoded(_)) = (dot, source) {
            return self.pairs(b, x, source, sums);
        }
        let zero = b.splat(dot.accumulator(form, lanes), 0.0);
        let own = dot.accumulator(form, lanes) != sums[0].ty;
        let acc = if own { vec![zero; sums.len()] } else { sums.to_vec() };
        let acc = self.steps(b, x, source, 4, acc, |b, x, source, k, acc| {
            let codes = self.codes(b, source, k);
            for (m, &x) in x.iter().enumerate() {
                let at = b.at_const(x, k);
                let four = b.load_bytes_as(at, Scalar::I32);
                let four = b.broadcast(four, lanes);
                for (p, &codes) in codes.iter().enumerate() {
                    let i = m * parts + p;
                    acc[i] = dot.four(b, form, acc[i], codes, four);
                }
            }
        });
        if !own {
            return acc;
        }
        let sum = |(acc, &sum): (Val, &Val)| {
            let acc = dot.sums(b, form, acc);
            b.add(acc, sum)
        };
        acc.into_iter().zip(sums).map(sum).collect()
    }

    fn chunk_floats(&self, b: &mut Body, x: &[Val], source: Source, sums: &[Val]) -> Vec<Val> {
        let (parts, lanes) = (self.parts(), self.lanes);
        // A sum waits for the one before it; one row alone takes four of them in turn.
        let chains = if x.len() == 1 { 4 } else { 1 };
        let zero = b.splat(sums[0].ty, 0.0);
        let mut acc = sums.to_vec();
        acc.resize(chains * sums.len(), zero);
        let acc = self.steps(b, x, source, 1, acc, |b, x, source, k, acc| {
            let codes = self.codes(b, source, k);
            let chain = &mut acc[k % chains * sums.len()..][..sums.len()];
            for (m, &x) in x.iter().enumerate() {
                let at = b.at_const(x, k * 4);
                let one = b.load(at, scalar(Scalar::F32));
                let one = b.broadcast(one, lanes);
                for (p, &codes) in codes.iter().enumerate() {
                    let i = m * parts + p;
                    chain[i] = b.fma(codes, one, chain[i]);
                }
            }
        });
        let mut chains = acc.chunks(sums.len()).map(<[Val]>::to_vec);
        let first = chains.next().expect("one chain at least");
        chains.fold(first, |a, c| a.into_iter().zip(c).map(|(a, c)| b.add(a, c)).collect())
    }
}
