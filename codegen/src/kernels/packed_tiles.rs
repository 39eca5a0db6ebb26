//! Many rows of X by packed W: see [`packed`](super::packed) for the layouts.
//!
//! Codes of some groups of four blocks of 16 rows of W are decoded once, to bytes or floats, four columns of K or one after
//! another, and are then multiplied by tile after tile of rows of X. So the inner loop has loads, products and sums only, and
//! its sums of one group are in registers; those of all groups are on the stack. Sums of int8 codes are
//! made as they are for one row alone, to the bit.

use super::Args;
use super::packed::{CHUNK, ROWS};
use super::packed_product::{BLOCKS, Product, Source};
use crate::text::{Body, Cmp, Intrinsic, Scalar, Tiles, Val, vector};

/// Bytes of codes that are decoded at a time, if a group has no more: half of a first cache.
const DECODED: usize = 1 << 14;
/// Longer groups would take too much of the stack.
const MOST: usize = 1 << 17;
/// Tiles of a unit.
const TILES: usize = 8;

/// Room of a unit on the stack.
pub(super) struct Room {
    /// `[block][k][16]`, or `[block][k / 4][16][4]` bytes.
    codes: Val,
    /// `[block][group][16]` f32.
    scales: Val,
    /// `[block][group][16]` f32; only where W has zero points.
    zeros: Val,
    /// `[row - first][block][16]` f32.
    sums: Val,
    /// Of AMX: sums, X, W; and `[16][16]` i32 behind the first.
    amx: Option<(Tiles, Val)>,
}

impl Room {
    pub(super) fn release(&self, b: &mut Body) {
        self.amx.iter().for_each(|(tiles, _)| tiles.release(b));
    }
}

/// A unit: whole tiles of rows, and blocks, each from the first to behind the last.
struct Unit<'r> {
    room: &'r Room,
    rows: (Val, Val),
    blocks: (Val, Val),
}

impl Product<'_> {
    /// Whether many rows are multiplied in tiles.
    pub(super) fn tiles(&self) -> bool {
        self.group_bytes() * BLOCKS <= MOST
    }

    /// Bytes of a decoded group of a block.
    fn group_bytes(&self) -> usize {
        self.form.group * self.decoded()
    }

    /// Rows of a unit.
    pub(super) fn most(&self) -> usize {
        TILES * self.tile
    }

    /// Groups that are decoded at a time.
    fn run(&self) -> usize {
        (DECODED / BLOCKS / self.group_bytes()).clamp(1, self.form.groups())
    }

    pub(super) fn room(&self, b: &mut Body) -> Room {
        let groups = BLOCKS * self.run();
        let words = groups * ROWS / 2;
        Room {
            codes: b.room(groups * self.group_bytes() / 8),
            scales: b.room(words),
            zeros: b.room(if self.form.zeros { words } else { 0 }),
            sums: b.room(self.most() * BLOCKS * ROWS / 2),
            amx: self.amx.then(|| {
                let shapes = [(ROWS, 64), (ROWS, self.depth()), (self.depth() / 4, 64)];
                (b.tiles(&shapes), b.room(ROWS * ROWS / 2))
            }),
        }
    }

    /// Whole tiles of the rows `first..end` of X by some blocks of W: the first row that is left.
    pub(super) fn many(
        &self,
        b: &mut Body,
        a: &Args,
        (x, w, y): (Val, Val, &[Val]),
        room: &Room,
        blocks: (Val, Val),
        (first, end): (Val, Val),
    ) -> Val {
        let tiled = b.whole_steps(first, end, self.tile);
        let unit = Unit { room, rows: (first, tiled), blocks };
        let some = b.cmp(Cmp::Lt, first, tiled);
        b.when(some, |b| {
            let none = vec![b.splat(vector(self.lanes, Scalar::F32), 0.0); self.parts()];
            self.all(b, &unit, |b, _, sums, _| self.store(b, sums, &none));
            let (zero, groups) = (b.size(0), b.size(self.form.groups()));
            b.each(zero, groups, self.run(), |b, from| {
                let next = b.size(self.run());
                let next = b.add(from, next);
                let run = (from, b.min(next, groups));
                b.each(blocks.0, blocks.1, 1, |b, nb| self.decode(b, w, &unit, nb, run));
                b.each(first, tiled, self.tile, |b, m| {
                    b.each(blocks.0, blocks.1, 1, |b, nb| self.multiply(b, x, &unit, nb, m, run));
                });
            });
            self.all(b, &unit, |b, m, sums, nb| {
                let sums = self.load(b, sums);
                self.write(b, a, y, nb, m, &sums);
            });
        });
        tiled
    }

    /// `body(row, its sums, block)` for all of a unit.
    fn all(&self, b: &mut Body, unit: &Unit, body: impl Fn(&mut Body, Val, Val, Val)) {
        b.each(unit.rows.0, unit.rows.1, 1, |b, m| {
            b.each(unit.blocks.0, unit.blocks.1, 1, |b, nb| {
                let sums = self.sums(b, unit, m, nb);
                body(b, m, sums, nb);
            });
        });
    }

    /// Where the sums of row `m` by the block `nb` are.
    fn sums(&self, b: &mut Body, unit: &Unit, m: Val, nb: Val) -> Val {
        let (row, block) = (b.sub(m, unit.rows.0), b.sub(nb, unit.blocks.0));
        let blocks = b.size(BLOCKS);
        let at = b.mul(row, blocks);
        let at = b.add(at, block);
        let bytes = b.size(ROWS * 4);
        let at = b.mul(at, bytes);
        b.at(unit.room.sums, at)
    }

    /// Where the group `g` of a run that begins at `from` is in `at`, in which a group of a block takes so many bytes.
    fn place(&self, b: &mut Body, unit: &Unit, at: Val, (nb, g, from): (Val, Val, Val), bytes: usize) -> Val {
        let (block, run, g) = (b.sub(nb, unit.blocks.0), b.size(self.run()), b.sub(g, from));
        let i = b.mul(block, run);
        let i = b.add(i, g);
        let bytes = b.size(bytes);
        let offset = b.mul(i, bytes);
        b.at(at, offset)
    }

    /// 16 floats.
    fn load(&self, b: &mut Body, at: Val) -> Vec<Val> {
        let load = |p| {
            let at = b.at_const(at, p * self.lanes * 4);
            b.load(at, vector(self.lanes, Scalar::F32))
        };
        (0..self.parts()).map(load).collect()
    }

    fn store(&self, b: &mut Body, at: Val, values: &[Val]) {
        for (p, &v) in values.iter().enumerate() {
            let at = b.at_const(at, p * self.lanes * 4);
            b.store(v, at);
        }
    }

    /// Decodes a run of groups of the block `nb`.
    fn decode(&self, b: &mut Body, w: Val, unit: &Unit, nb: Val, (from, to): (Val, Val)) {
        let (form, room) = (self.form, unit.room);
        let step = if form.int8 { 4 } else { 1 };
        let block = b.size(form.groups() * form.record());
        let at = b.mul(nb, block);
        let w = b.at(w, at);
        b.each(from, to, 1, |b, g| {
            let record = b.size(form.record());
            let at = b.mul(g, record);
            let w = b.at(w, at);
            let codes = self.place(b, unit, room.codes, (nb, g, from), self.group_bytes());
            let (zero, words) = (b.size(0), b.size(form.group / form.per_word()));
            b.each(zero, words, 1, |b, word| {
                let (stride, bytes) = (b.size(ROWS * 4), b.size(form.per_word() * self.decoded()));
                let (from, to) = (b.mul(word, stride), b.mul(word, bytes));
                let (w, codes) = (b.at(w, from), b.at(codes, to));
                for k in (0..form.per_word()).step_by(step) {
                    let at = b.at_const(codes, k * self.decoded());
                    let values = self.codes(b, Source::Packed(w), k);
                    self.store(b, at, &values);
                }
            });
            let scales = self.scales(b, w);
            let at = self.place(b, unit, room.scales, (nb, g, from), ROWS * 4);
            self.store(b, at, &scales);
            if form.zeros {
                let zeros = self.zeros(b, w);
                let at = self.place(b, unit, room.zeros, (nb, g, from), ROWS * 4);
                self.store(b, at, &zeros);
            }
        });
    }

    /// Decoded codes of at most 32 elements of K by pairs of rows of X, added to their sums: 2 by 8 codes meet 2 by 8 bytes,
    /// and a vector has the sums of two rows of W by two of X.
    pub(super) fn pairs(&self, b: &mut Body, x: &[Val], codes: Source, sums: &[Val]) -> Vec<Val> {
        let (parts, bytes) = (self.parts(), vector(16, Scalar::I8));
        let zero = b.splat(vector(4, Scalar::I32), 0.0);
        let (from, to) = (b.size(0), b.size(self.form.group.min(CHUNK)));
        let start = vec![zero; x.len() / 2 * 2 * parts];
        let acc = b.rolled(from, to, 8, &start, |b, k, acc| {
            let (x, codes) = self.later(b, x, codes, k);
            let [first, second] = [0, 4].map(|k| self.codes(b, codes, k));
            let pairs: Vec<Val> = first
                .iter()
                .zip(&second)
                .flat_map(|(&f, &s)| [(f, s, 0), (f, s, 2)])
                .map(|(f, s, i)| {
                    let two = b.shuffle(f, s, &[i, 4 + i, 1 + i, 5 + i]);
                    b.bitcast(two, bytes)
                })
                .collect();
            let rows: Vec<Val> = x
                .chunks(2)
                .map(|two| {
                    let [upper, lower] = [two[0], two[1]].map(|x| b.load_bytes_as(x, Scalar::I64));
                    let both = b.broadcast(upper, 2);
                    let both = b.insert(lower, both, 1);
                    b.bitcast(both, bytes)
                })
                .collect();
            let each = rows.iter().flat_map(|&x| pairs.iter().map(move |&w| (x, w)));
            each.zip(acc).map(|((x, w), &acc)| b.intrinsic(Intrinsic::Usmmla, &[acc, w, x], acc.ty)).collect()
        });
        let mut out = Vec::with_capacity(sums.len());
        for (i, rows) in acc.chunks(2 * parts).enumerate() {
            for row in 0..2 {
                for (p, four) in rows.chunks(2).enumerate() {
                    let own = b.shuffle(four[0], four[1], &[row, 2 + row, 4 + row, 6 + row]);
                    out.push(b.add(own, sums[(2 * i + row) * parts + p]));
                }
            }
        }
        out
    }

    /// Elements of K in a tile of AMX.
    fn depth(&self) -> usize {
        [64, 32].into_iter().find(|&d| self.form.group.is_multiple_of(d)).unwrap_or(16)
    }

    /// The sums of group `g` of 16 rows of X by decoded codes, by tiles of AMX.
    fn squares(&self, b: &mut Body, (tiles, sums): &(Tiles, Val), x: Val, g: Val, codes: Val) -> Vec<Val> {
        let form = self.form;
        tiles.zero(b, 0);
        let group = b.size(form.group);
        let first = b.mul(g, group);
        let x = b.at(x, first);
        let zero = b.size(0);
        b.each(zero, group, self.depth(), |b, k| {
            let line = b.size(ROWS);
            let offset = b.mul(k, line);
            let (x, codes) = (b.at(x, k), b.at(codes, offset));
            tiles.load(b, 1, x, form.x_row());
            tiles.load(b, 2, codes, ROWS * 4);
            tiles.dot(b, (0, 1, 2), false);
        });
        tiles.store(b, 0, *sums, ROWS * 4);
        let row = |i: usize| {
            let at = b.at_const(*sums, i * ROWS * 4);
            let v = b.load(at, vector(ROWS, Scalar::I32));
            b.cast(v, Scalar::F32)
        };
        (0..ROWS).map(row).collect()
    }

    /// A tile of rows from `m` on by a run of groups of the block `nb`, added to their sums.
    fn multiply(&self, b: &mut Body, x: Val, unit: &Unit, nb: Val, m: Val, (from, to): (Val, Val)) {
        let (form, room) = (self.form, unit.room);
        let stride = b.size(form.x_row());
        let at = b.mul(m, stride);
        let x = b.at(x, at);
        let rows: Vec<Val> = (0..self.tile).map(|i| b.at_const(x, i * form.x_row())).collect();
        let first = self.sums(b, unit, m, nb);
        b.each(from, to, 1, |b, g| {
            let codes = self.place(b, unit, room.codes, (nb, g, from), self.group_bytes());
            let dots = match &room.amx {
                Some(amx) => self.squares(b, amx, x, g, codes),
                None => self.group(b, &rows, g, Source::Decoded(codes)),
            };
            let scales = self.place(b, unit, room.scales, (nb, g, from), ROWS * 4);
            let scales = self.load(b, scales);
            let zeros = match form.zeros {
                true => {
                    let zeros = self.place(b, unit, room.zeros, (nb, g, from), ROWS * 4);
                    self.load(b, zeros)
                }
                false => self.middle(b),
            };
            for (i, (&row, dots)) in rows.iter().zip(dots.chunks(self.parts())).enumerate() {
                let at = b.at_const(first, i * BLOCKS * ROWS * 4);
                let sums = self.load(b, at);
                let sums = self.scaled(b, row, g, dots, (&scales, &zeros), &sums);
                self.store(b, at, &sums);
            }
        });
    }
}
