//! `Y = X W` with a constant W in panels: the product of `dense` and of `integer`.
//!
//! **Layout.** As many columns as two vector registers hold are a panel; four panels are a unit of work, and K is cut into blocks
//! of 256 steps, so that a block of a panel stays in the first cache while rows pass by: `[N / 4 panels][K / 256][panel][k][lane]`,
//! one stream in the order of its use. Columns beyond N are 0. A step is one element of K, or two of 16 bits, which one
//! instruction multiplies and adds up, or four of 8 bits.
//!
//! **Rows.** X has 4 bytes to a step: an f32, two i16, or four codes. Six rows are multiplied at a time, which are brought together before:
//! `[K / 256][M / 6][k][row]`. Rows that are left over are read where they stand, two by two and one by one; one row alone
//! streams W. Sums of up to 96 rows by four panels are kept on the stack between blocks of K.
//!
//! Source of the blocking: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.

use super::epilogue::Spot;
use super::panel_tiles::AMX_ROWS;
use super::{Args, Blob, Buffer, Kernel, Lowered, Step, elementwise, fours, pointwise};
use crate::size::Size;
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Cmp, Scalar, Tiles, Ty, Val, scalar, vector};
use half::{bf16, f16};

/// Vectors that a panel is wide.
pub(super) const WIDE: usize = 2;
/// Panels in a unit.
pub(super) const PANELS: usize = 4;
/// Elements of K in a block.
const DEPTH: usize = 256;
/// Rows that are multiplied at a time: with two vectors of W, twelve sums, which sixteen registers hold.
const TILE: usize = 6;
/// Rows in a unit.
const ROWS: usize = 96;
/// How far ahead of its use W is asked for, in bytes, where it is used once.
const AHEAD: usize = 4096;

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// An f32.
    F32,
    /// An f16.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Two i8.
    Bytes,
    /// Two i16.
    Words,
    /// Four i8: see [`fours`](super::fours).
    Fours,
}

impl Store {
    /// Bytes of a step of one column.
    pub fn bytes(self) -> usize {
        match self {
            Store::F32 | Store::Words | Store::Fours => 4,
            Store::F16 | Store::Bf16 | Store::Bytes => 2,
        }
    }

    /// Whether a step is integers.
    fn integers(self) -> bool {
        matches!(self, Store::Bytes | Store::Words | Store::Fours)
    }

    /// The shortest form that holds every one of these exactly, and that `target` widens.
    pub fn of(w: &[f32], target: &Target) -> Store {
        let half = target.arch == Arch::Aarch64 || target.has(Feature::F16c);
        if w.iter().all(|w| w.to_bits() & 0xffff == 0) {
            Store::Bf16
        } else if half && w.iter().all(|&w| f16::from_f32(w).to_f32() == w) {
            Store::F16
        } else {
            Store::F32
        }
    }

    /// Writes a float.
    pub fn write(self, v: f32, out: &mut [u8]) {
        match self {
            Store::F16 => out.copy_from_slice(&f16::from_f32(v).to_le_bytes()),
            Store::Bf16 => out.copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
            _ => out.copy_from_slice(&v.to_le_bytes()),
        }
    }
}

/// Sizes of a packed W.
#[derive(Clone, Copy)]
pub struct Form {
    /// Columns.
    pub n: usize,
    /// Steps of K.
    pub k: usize,
    /// Lanes of a vector.
    pub lanes: usize,
    /// How weights are stored.
    pub store: Store,
}

impl Form {
    /// Columns of a panel.
    pub(super) fn width(&self) -> usize {
        WIDE * self.lanes
    }

    /// Whether rows are multiplied 16 by 16, by tiles of AMX, where they stand.
    fn amx(&self, target: &Target) -> bool {
        self.store == Store::Fours && target.has(Feature::AmxInt8)
    }

    /// Columns of all panels.
    pub fn columns(&self) -> usize {
        self.panels() * self.width()
    }

    fn panels(&self) -> usize {
        self.n.div_ceil(self.width())
    }

    /// Whole blocks of K.
    fn blocks(&self) -> usize {
        self.k / DEPTH
    }

    /// What is left of K.
    fn rest(&self) -> usize {
        self.k % DEPTH
    }

    /// Bytes of one panel, from first to last k.
    fn panel(&self) -> usize {
        self.k * self.width() * self.store.bytes()
    }

    /// W in the layout of this file: `write(k, n, bytes)` writes step `k` of column `n`.
    pub fn pack(&self, write: impl Fn(usize, usize, &mut [u8])) -> Vec<u8> {
        let mut out = vec![0u8; self.panels() * self.panel()];
        let mut slots = out.chunks_exact_mut(self.store.bytes());
        for first in (0..self.panels()).step_by(PANELS) {
            for block in (0..self.k).step_by(DEPTH) {
                for panel in first..(first + PANELS).min(self.panels()) {
                    for k in block..(block + DEPTH).min(self.k) {
                        for n in panel * self.width()..(panel + 1) * self.width() {
                            let slot = slots.next().expect("a slot for each step of each column");
                            if n < self.n {
                                write(k, n, slot);
                            }
                        }
                    }
                }
            }
        }
        out
    }
}

/// The buffers before the results, in the product.
const BEFORE: usize = 3;

/// What is done with a vector of sums before they are written: the lanes of each result. What it reads are buffers from the
/// given one on.
pub type Finish<'f> = dyn Fn(&mut Body, &Args, usize, Spot, Val) -> Vec<Val> + 'f;

/// Adds the steps of a product of `rows` of `x` by the packed `w`; `read` is what `finish` reads, for so many results.
#[allow(clippy::too_many_arguments)]
pub fn product(
    lowered: &mut Lowered,
    target: &Target,
    form: &Form,
    x: Buffer,
    w: Vec<u8>,
    rows: &Size,
    (results, read): (usize, Vec<Buffer>),
    finish: &Finish,
) {
    let (blob, mut tiles) = (Buffer::Blob(lowered.blobs.len()), x.clone());
    lowered.blobs.push(Blob { bytes: w.into() });
    if !form.amx(target) {
        tiles = Buffer::Temp(lowered.temps.len());
        lowered.temps.push(rows.clone() * (4 * form.k).into());
        lowered.steps.push(Step {
            kernel: tile(target, form),
            buffers: vec![x.clone(), tiles.clone()],
            dims: vec![rows.clone()],
            units: rows.clone().div_up(TILE as u64),
            work: (TILE * form.k).into(),
        });
    }
    let mut buffers = vec![x, tiles, blob];
    buffers.extend((0..results).map(Buffer::Result).chain(read));
    // Some 64 steps take a nanosecond. More than `ROWS` rows are more units, each of which is worth a thread then.
    let work = (rows.clone() * (form.k * PANELS * form.width()).into()).div_up(64);
    let units = Size::from(form.panels().div_ceil(PANELS)) * rows.clone().div_up(ROWS as u64);
    let kernel = multiply(target, form, results, finish);
    lowered.steps.push(Step { kernel, buffers, dims: vec![rows.clone()], units, work });
}

/// Brings rows together. Buffers: X `[M, K]`, tiles. Sizes: M. A unit is six rows; fewer at the end stay where they are.
fn tile(target: &Target, form: &Form) -> Kernel {
    Kernel::new(target, "tile_rows", |b, a| {
        let (x, out, rows) = (a.buffer(b, 0), a.buffer(b, 1), a.dim(b, 0));
        let tiles = b.size(TILE);
        let tiles = b.div(rows, tiles);
        let end = b.min(a.end, tiles);
        b.each(a.begin, end, 1, |b, t| {
            let stride = b.size(TILE * form.k * 4);
            let start = b.mul(t, stride);
            let x = b.at(x, start);
            let block = |b: &mut Body, i: Val, depth: usize| {
                let (zero, to) = (b.size(0), b.size(depth));
                let out = place(b, out, i, tiles, t, depth);
                let from = b.size(DEPTH * 4);
                let from = b.mul(i, from);
                let x = b.at(x, from);
                b.each(zero, to, 1, |b, k| {
                    let x = b.element(x, k, Scalar::F32);
                    let six = b.size(TILE * 4);
                    let at = b.mul(k, six);
                    let out = b.at(out, at);
                    for row in 0..TILE {
                        let from = b.at_const(x, row * form.k * 4);
                        let v = b.load(from, scalar(Scalar::F32));
                        let to = b.at_const(out, row * 4);
                        b.store(v, to);
                    }
                });
            };
            blocks(b, form, block);
        });
    })
}

/// Where tile `t` of block `i` of K begins, which is `depth` deep.
fn place(b: &mut Body, tiles: Val, i: Val, count: Val, t: Val, depth: usize) -> Val {
    let (whole, own) = (b.size(DEPTH * TILE * 4), b.size(depth * TILE * 4));
    let before = b.mul(i, count);
    let before = b.mul(before, whole);
    let at = b.mul(t, own);
    let at = b.add(before, at);
    b.at(tiles, at)
}

/// `body(number of the block, its depth)` for each block of K.
fn blocks(b: &mut Body, form: &Form, body: impl Fn(&mut Body, Val, usize)) {
    let (zero, whole) = (b.size(0), b.size(form.blocks()));
    if form.blocks() > 0 {
        b.each(zero, whole, 1, |b, i| body(b, i, DEPTH));
    }
    if form.rest() > 0 {
        body(b, whole, form.rest());
    }
}

/// The product. Buffers: X, tiles, W, results, and what `finish` reads. Sizes: M. A unit is four panels by up to 96 rows.
fn multiply(target: &Target, form: &Form, results: usize, finish: &Finish) -> Kernel {
    let name = match form.store {
        Store::F32 => "matmul_f32",
        Store::F16 => "matmul_f16",
        Store::Bf16 => "matmul_bf16",
        Store::Bytes | Store::Fours => "matmul_int8",
        Store::Words => "matmul_int16",
    };
    Kernel::new(target, name, |b, a| {
        let (x, tiles, w) = (a.buffer(b, 0), a.buffer(b, 1), a.buffer(b, 2));
        let y: Vec<Val> = (0..results).map(|i| a.buffer(b, BEFORE + i)).collect();
        let rows = a.dim(b, 0);
        let sums = b.room(ROWS * PANELS * form.width() / 2);
        let amx = form.amx(target).then(|| b.tiles(&[(AMX_ROWS, 64); 8]));
        let (most, six) = (b.size(ROWS), b.size(TILE));
        let more = b.size(ROWS - 1);
        let row_blocks = b.add(rows, more);
        let row_blocks = b.div(row_blocks, most);
        let tile_count = if amx.is_some() { b.size(0) } else { b.div(rows, six) };
        let tiled = b.mul(tile_count, six);
        b.each(a.begin, a.end, 1, |b, unit| {
            let (columns, first) = (b.div(unit, row_blocks), b.rem(unit, row_blocks));
            let first = b.mul(first, most);
            let end = b.add(first, most);
            let end = b.min(end, rows);
            let four = b.size(PANELS);
            let panel = b.mul(columns, four);
            let count = b.size(form.panels());
            let count = b.sub(count, panel);
            let count = b.min(count, four);
            let size = b.size(form.panel());
            let start = b.mul(panel, size);
            let w = b.at(w, start);
            let unit = Unit {
                form,
                x,
                tiles,
                tile_count,
                tiled,
                w,
                sums,
                first,
                end,
                panel,
                count,
                amx: amx.as_ref(),
            };
            unit.clear(b);
            blocks(b, form, |b, i, depth| unit.block(b, i, depth));
            unit.finish(b, a, &y, finish);
        });
        amx.inspect(|tiles| tiles.release(b));
    })
}

/// Four panels by up to 96 rows.
pub(super) struct Unit<'f> {
    pub(super) form: &'f Form,
    x: Val,
    tiles: Val,
    /// Tiles there are, and rows in them.
    tile_count: Val,
    tiled: Val,
    /// The first of the panels.
    w: Val,
    /// `[row - first][panel][lane]`
    sums: Val,
    /// Rows.
    first: Val,
    end: Val,
    /// The number of the first panel, and how many there are.
    panel: Val,
    count: Val,
    amx: Option<&'f Tiles>,
}

impl Unit<'_> {
    /// A vector of sums.
    fn part(&self) -> Ty {
        vector(self.form.lanes, if self.form.store.integers() { Scalar::I32 } else { Scalar::F32 })
    }

    /// Where the sums of `row` by panel `p` of the unit are.
    pub(super) fn sums(&self, b: &mut Body, row: Val, p: Val) -> Val {
        let row = b.sub(row, self.first);
        let four = b.size(PANELS);
        let at = b.mul(row, four);
        let at = b.add(at, p);
        let width = b.size(self.form.width() * 4);
        let at = b.mul(at, width);
        b.at(self.sums, at)
    }

    fn clear(&self, b: &mut Body) {
        let none = b.splat(self.part(), 0.0);
        b.each(self.first, self.end, 1, |b, row| {
            let zero = b.size(0);
            let at = self.sums(b, row, zero);
            for i in 0..PANELS * WIDE {
                let at = b.at_const(at, i * self.form.lanes * 4);
                b.store(none, at);
            }
        });
    }

    /// Block `i` of K, `depth` deep.
    fn block(&self, b: &mut Body, i: Val, depth: usize) {
        let form = self.form;
        let deep = b.size(DEPTH * form.width() * form.store.bytes());
        let start = b.mul(i, deep);
        let start = b.mul(start, self.count);
        let w = b.at(self.w, start);
        let offset = b.size(DEPTH * 4);
        let offset = b.mul(i, offset);
        let x = b.at(self.x, offset);
        let zero = b.size(0);
        b.each(zero, self.count, 1, |b, p| {
            let own = b.size(depth * form.width() * form.store.bytes());
            let start = b.mul(p, own);
            let w = b.at(w, start);
            let end = b.min(self.tiled, self.end);
            b.each(self.first, end, TILE, |b, row| {
                let six = b.size(TILE);
                let t = b.div(row, six);
                let x = place(b, self.tiles, i, self.tile_count, t, depth);
                self.rows(b, &Rows::Tile(x), w, row, p, depth);
            });
            // What is in no tile: the last rows of all.
            let mut from = b.max(self.tiled, self.first);
            if let Some(tiles) = self.amx {
                for pairs in [2, 1] {
                    let to = b.whole_steps(from, self.end, pairs * AMX_ROWS);
                    b.each(from, to, pairs * AMX_ROWS, |b, row| {
                        self.squares(b, tiles, pairs, (x, w), row, p, depth)
                    });
                    from = to;
                }
            }
            let two = b.size(2);
            let left = b.sub(self.end, from);
            let pairs = b.div(left, two);
            let pairs = b.mul(pairs, two);
            let middle = b.add(from, pairs);
            let rows = |b: &mut Body, row: Val, count: usize| {
                let stride = b.size(form.k * 4);
                let at = b.mul(row, stride);
                let x = b.at(x, at);
                let rows = (0..count).map(|r| b.at_const(x, r * form.k * 4)).collect();
                self.rows(b, &Rows::Apart(rows), w, row, p, depth);
            };
            b.each(from, middle, 2, |b, row| rows(b, row, 2));
            b.each(middle, self.end, 1, |b, row| rows(b, row, 1));
        });
    }

    /// A block of a panel by some rows, added to their sums.
    fn rows(&self, b: &mut Body, x: &Rows, w: Val, row: Val, p: Val, depth: usize) {
        let (form, count) = (self.form, x.count());
        // A sum waits for the one before it: few rows take turns with several.
        let chains = (4 / count).max(1);
        let turn = 4;
        let zero = b.splat(self.part(), 0.0);
        let at = self.sums(b, row, p);
        let place = |b: &mut Body, r: usize, part: usize| {
            b.at_const(at, (r * PANELS * form.width() + part * form.lanes) * 4)
        };
        let mut start = Vec::new();
        for r in 0..count {
            for part in 0..WIDE {
                let at = place(b, r, part);
                start.push(b.load(at, self.part()));
            }
        }
        start.extend(std::iter::repeat_n(zero, (chains - 1) * count * WIDE));
        let whole = depth / turn * turn;
        let (from, to, end) = (b.size(0), b.size(whole), b.size(depth));
        let step = |b: &mut Body, k: Val, i: usize, sums: &mut [Val]| {
            let bytes = form.width() * form.store.bytes();
            let line = b.size(bytes);
            let offset = b.mul(k, line);
            let w = b.at(w, offset);
            let w = b.at_const(w, i * bytes);
            if matches!(x, Rows::Apart(_)) && (i * bytes) % 64 < bytes {
                b.prefetch(w, AHEAD);
            }
            let w: Vec<Val> = (0..WIDE).map(|part| self.weights(b, w, part)).collect();
            let sums = &mut sums[i % chains * count * WIDE..][..count * WIDE];
            for r in 0..count {
                let one = x.element(b, k, i, r, self.part().elem);
                let one = b.broadcast(one, form.lanes);
                for (part, &w) in w.iter().enumerate() {
                    let sum = &mut sums[r * WIDE + part];
                    *sum = self.step(b, w, one, *sum);
                }
            }
        };
        let sums = b.repeat(from, to, turn, &start, |b, k, sums| {
            let mut sums = sums.to_vec();
            (0..turn).for_each(|i| step(b, k, i, &mut sums));
            sums
        });
        let sums = match whole == depth {
            true => sums,
            false => b.repeat(to, end, 1, &sums, |b, k, sums| {
                let mut sums = sums.to_vec();
                step(b, k, 0, &mut sums);
                sums
            }),
        };
        for r in 0..count {
            for part in 0..WIDE {
                let own = sums.iter().copied().skip(r * WIDE + part).step_by(count * WIDE);
                let own: Vec<Val> = own.collect();
                let sum = own.into_iter().reduce(|s, t| b.add(s, t)).expect("a chain at least");
                let at = place(b, r, part);
                b.store(sum, at);
            }
        }
    }

    /// A vector of weights, as floats or as pairs of 16 bits.
    fn weights(&self, b: &mut Body, w: Val, part: usize) -> Val {
        let (lanes, store) = (self.form.lanes, self.form.store);
        let at = b.at_const(w, part * lanes * store.bytes());
        match store {
            Store::F32 => b.load(at, self.part()),
            Store::F16 => {
                let v = b.load(at, vector(lanes, Scalar::F16));
                b.cast(v, Scalar::F32)
            }
            Store::Bf16 => {
                let v = b.load(at, vector(lanes, Scalar::I16));
                let v = b.widen_unsigned(v, Scalar::I32);
                let v = b.shl(v, 16);
                b.bitcast(v, self.part())
            }
            Store::Bytes => {
                let v = b.load(at, vector(2 * lanes, Scalar::I8));
                b.cast(v, Scalar::I16)
            }
            Store::Words => b.load(at, vector(2 * lanes, Scalar::I16)),
            Store::Fours => b.load(at, vector(4 * lanes, Scalar::I8)),
        }
    }

    /// `sum` and a step of `x`, the same in every lane, by the weights `w`.
    fn step(&self, b: &mut Body, w: Val, x: Val, sum: Val) -> Val {
        match self.form.store {
            Store::Bytes | Store::Words => fours::pairs(b, w, x, sum),
            Store::Fours => fours::step(b, w, x, sum),
            Store::F32 | Store::F16 | Store::Bf16 => b.fma(w, x, sum),
        }
    }

    /// Finishes and writes all sums.
    fn finish(&self, b: &mut Body, a: &Args, y: &[Val], finish: &Finish) {
        let form = self.form;
        let zero = b.size(0);
        b.each(self.first, self.end, 1, |b, row| {
            b.each(zero, self.count, 1, |b, p| {
                let sums = self.sums(b, row, p);
                let panel = b.add(self.panel, p);
                let width = b.size(form.width());
                let first = b.mul(panel, width);
                let write = |b: &mut Body, there: usize| {
                    for part in 0..WIDE {
                        let n = b.size(part * form.lanes);
                        let n = b.add(first, n);
                        let there = there.saturating_sub(part * form.lanes).min(form.lanes);
                        let at = b.at_const(sums, part * form.lanes * 4);
                        let sum = b.load(at, self.part());
                        let size = b.size(form.n);
                        let at = b.mul(row, size);
                        let at = b.add(at, n);
                        let spot = Spot { row, n, there };
                        for (&y, v) in y.iter().zip(finish(b, a, BEFORE + y.len(), spot, sum)) {
                            let y = elementwise::element(b, y, at, v.ty.elem);
                            pointwise::store_some(b, v, y, there);
                        }
                    }
                };
                let tail = form.n % form.width();
                if tail == 0 {
                    return write(b, form.width());
                }
                let last = b.size(form.n - tail);
                let whole = b.cmp(Cmp::Lt, first, last);
                b.when_else(whole, |b| write(b, form.width()), |b| write(b, tail));
            });
        });
    }
}

/// Rows of a block of X.
enum Rows {
    /// Six together.
    Tile(Val),
    /// Each by itself.
    Apart(Vec<Val>),
}

impl Rows {
    fn count(&self) -> usize {
        match self {
            Rows::Tile(_) => TILE,
            Rows::Apart(rows) => rows.len(),
        }
    }

    /// Step `k + i` of row `r`.
    fn element(&self, b: &mut Body, k: Val, i: usize, r: usize, elem: Scalar) -> Val {
        let at = match self {
            Rows::Tile(x) => {
                let six = b.size(TILE * 4);
                let at = b.mul(k, six);
                let at = b.at(*x, at);
                b.at_const(at, (i * TILE + r) * 4)
            }
            Rows::Apart(rows) => {
                let at = b.element(rows[r], k, Scalar::F32);
                b.at_const(at, i * 4)
            }
        };
        b.load(at, scalar(elem))
    }
}
