//! Attention of a block of query rows, tile of keys after tile: scores of a tile, their exponentials beside the largest score
//! so far, and the sums of V that these weigh, which are scaled down when a larger score comes (online softmax: Milakov and
//! Gimelshein, "Online normalizer calculation for softmax", 2018; in tiles: Dao et al., "FlashAttention", 2022, algorithm 1).
//!
//! Rows are the positions of all query heads that share a head of K and V, so that both are read once for all of them. A
//! unit is a block of [`ROWS`] rows of one such head. Its tiles lie on the stack: memory does not grow with the number of
//! keys. Two ways to the same sums:
//!
//! - Many rows: keys of a tile are turned so that a vector holds one element of many keys, and values copied beside each
//!   other; then blocks of rows by vectors of columns stay in registers, as in any matrix product.
//! - Few rows (decoding): each key and value is needed about once, so both are read where they are: a vector holds elements of
//!   one key, and products are summed across lanes for as many keys at a time as there are lanes.
//!
//! A key that is masked, by -inf or behind the causal frontier, counts for nothing, whatever its score. A row that may attend
//! to nothing gives zeros.

use super::heads::{Strides, parts};
use super::lanes::{each_summed, transposed};
use super::{Args, Kernel};
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar, vector};

/// Query rows of a unit: K and V are copied once for all of them.
pub const ROWS: usize = 2 * PART;

/// Rows whose scores with a tile of keys are kept at a time, in the first level of the cache beside the keys. A multiple of all
/// blocks of rows but the last.
const PART: usize = 66;

/// At most so many rows read K and V where they are.
const FEW: usize = 8;

/// Positions among the sizes that the kernel expects: heads of K and V, query positions, query heads to each of them, keys, keys
/// before the first query; then strides (see [`Strides`]) of Q, K, V and the result, and of the mask between batches, heads and
/// rows.
pub(super) const STRIDES: usize = 5;

/// A mask that is added to the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Bools, true for what may be attended to, rather than f32.
    pub bools: bool,
    /// Whether it steps from key to key.
    pub along: bool,
}

/// What the text of the kernel depends on.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Elements of a row of Q and of K.
    pub size: usize,
    /// Elements of a row of V.
    pub value_size: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Scores `s` become `tanh(s / softcap) softcap`.
    pub softcap: Option<f32>,
    /// Whether no key behind a query's position, counted from the keys before the first query on, is attended to.
    pub causal: bool,
    /// The mask.
    pub mask: Option<Mask>,
}

/// The kernel. Buffers: Q, K, V, the result, and the mask if there is one. Sizes: see [`STRIDES`]. A unit is a block of rows
/// of a head of K and V.
pub fn attention(target: &Target, form: &Form) -> Kernel {
    Kernel::new(target, "attention", |b, a| {
        let t = Tiles::new(b, *form);
        let sizes: Vec<Val> = (0..STRIDES).map(|i| a.dim(b, i)).collect();
        let (kv_heads, positions, group) = (sizes[0], sizes[1], sizes[2]);
        let rows = b.mul(positions, group);
        let (zero, one, most) = (b.size(0), b.size(1), b.size(ROWS));
        let last = b.sub(rows, one);
        let blocks = b.div(last, most);
        let blocks = b.add(blocks, one);
        b.each(a.begin, a.end, 1, |b, unit| {
            let (head, block) = (b.div(unit, blocks), b.rem(unit, blocks));
            let (batch, head) = (b.div(head, kv_heads), b.rem(head, kv_heads));
            let first = b.mul(block, most);
            let left = b.sub(rows, first);
            let count = b.min(left, most);
            let u = Unit { batch, head, first, count, group, keys: sizes[3], past: sizes[4] };
            let start = [1, 2].map(|i| {
                let base = a.buffer(b, i);
                let strides = Strides::of(b, a, STRIDES + 3 * i);
                (strides.row(b, base, [batch, head, zero]), strides.position)
            });
            let few = b.size(FEW);
            let few = b.cmp(Cmp::Le, count, few);
            b.when_else(
                few,
                |b| t.tiles(b, a, &u, start, Way::InPlace),
                |b| t.tiles(b, a, &u, start, Way::Copied),
            );
            t.finish(b, a, &u);
        });
    })
}

/// A block of rows of a head of K and V.
pub(super) struct Unit {
    pub(super) batch: Val,
    pub(super) head: Val,
    pub(super) first: Val,
    pub(super) count: Val,
    pub(super) group: Val,
    pub(super) keys: Val,
    pub(super) past: Val,
}

impl Unit {
    /// The batch, head and position of row `r` of the block, or of the last one: heads that share keys are neighbours.
    pub(super) fn place(&self, b: &mut Body, r: Val) -> [Val; 3] {
        let one = b.size(1);
        let last = b.sub(self.count, one);
        let r = b.min(r, last);
        let row = b.add(self.first, r);
        let (position, member) = (b.div(row, self.group), b.rem(row, self.group));
        let head = b.mul(self.head, self.group);
        let head = b.add(head, member);
        [self.batch, head, position]
    }
}

/// How K and V are read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    InPlace,
    Copied,
}

impl Way {
    /// Keys of a tile.
    pub(super) const fn keys(self) -> usize {
        match self {
            Way::InPlace => 128,
            Way::Copied => 64,
        }
    }

    /// Rows that are multiplied at a time.
    const fn blocks(self) -> [usize; 2] {
        match self {
            Way::InPlace => [4, 1],
            Way::Copied => [6, 4],
        }
    }

    /// So many rows, rounded up to whole blocks: the last row stands for those that are not there.
    fn rows(self, b: &mut Body, count: Val) -> Val {
        let [large, small] = self.blocks().map(|n| b.size(n));
        let whole = b.div(count, large);
        let whole = b.mul(whole, large);
        let rest = b.sub(count, whole);
        let one = b.size(1);
        let more = b.sub(small, one);
        let rest = b.add(rest, more);
        let rest = b.div(rest, small);
        let rest = b.mul(rest, small);
        let rest = b.min(rest, large);
        b.add(whole, rest)
    }
}

/// Rows `from..to` of a unit, of those from `base` on whose scores are kept together.
pub(super) struct Part {
    pub(super) base: Val,
    pub(super) from: Val,
    pub(super) to: Val,
}

/// Where as many keys lie as there are lanes, from one on.
type Keys<'k> = dyn Fn(&mut Body, Val) -> Vec<Val> + 'k;

/// Where on the stack what lies, and how large it is.
pub(super) struct Tiles {
    pub(super) form: Form,
    pub(super) lanes: usize,
    /// Vectors of sums that registers hold beside what is multiplied.
    pub(super) sums: usize,
    /// Rows of Q, scaled, with zeros up to whole vectors.
    pub(super) q: Val,
    /// Sums of V, a row to a row, with as many columns as whole vectors have.
    pub(super) y: Val,
    /// Scores, then weights.
    pub(super) scores: Val,
    /// The keys of a tile, turned: blocks of some keys of `[size, keys of a block]`.
    pub(super) k: Val,
    /// The values of a tile.
    pub(super) v: Val,
    /// The largest score of each row in this tile, and in all; what weights are the exponentials beside; the factor by which
    /// sums shrink in this tile; the sum of weights in lanes.
    pub(super) now: Val,
    pub(super) top: Val,
    pub(super) beside: Val,
    pub(super) shrink: Val,
    pub(super) total: Val,
    /// How many keys each row sees, and where its mask starts.
    pub(super) sees: Val,
    pub(super) mask: Val,
}

impl Tiles {
    fn new(b: &mut Body, form: Form) -> Tiles {
        let lanes = b.target.lanes();
        let many = b.target.has(Feature::Avx512) || b.target.arch == Arch::Aarch64;
        let up = |n: usize| n.next_multiple_of(lanes);
        let mut floats = |n: usize| b.room(n.div_ceil(2));
        let keys = Way::Copied.keys();
        let numbers = Self::numbers(lanes);
        Tiles {
            lanes,
            sums: if many { 24 } else { 12 },
            q: floats(ROWS * up(form.size)),
            y: floats(ROWS * up(form.value_size)),
            scores: floats((keys * PART).max(Way::InPlace.keys() * FEW)),
            k: floats(keys * form.size),
            v: floats(keys * up(form.value_size)),
            top: floats(numbers),
            now: floats(numbers),
            beside: floats(numbers),
            shrink: floats(numbers),
            total: floats(ROWS * lanes),
            sees: floats(2 * ROWS),
            mask: floats(2 * ROWS),
            form,
        }
    }

    /// Room for a number to each row, with a vector behind the last.
    fn numbers(lanes: usize) -> usize {
        (ROWS + lanes).next_multiple_of(lanes)
    }

    pub(super) fn floats(&self) -> Ty {
        vector(self.lanes, Scalar::F32)
    }

    /// Elements from one row of Q to the next, and of the sums of V.
    pub(super) fn widths(&self) -> [usize; 2] {
        [self.form.size, self.form.value_size].map(|n| n.next_multiple_of(self.lanes))
    }

    /// Vectors of columns that blocks of so many rows take.
    fn columns(&self, rows: usize) -> usize {
        let n = (self.sums / rows).min(8);
        1 << n.ilog2()
    }

    /// Row `r` of a tile on the stack whose rows have `width` elements.
    pub(super) fn row(&self, b: &mut Body, tile: Val, r: Val, width: usize) -> Val {
        let width = b.size(width);
        let at = b.mul(r, width);
        b.element(tile, at, Scalar::F32)
    }

    /// The scores of row `r`.
    pub(super) fn scores(&self, b: &mut Body, part: &Part, r: Val, way: Way) -> Val {
        let r = b.sub(r, part.base);
        self.row(b, self.scores, r, way.keys())
    }

    /// `body(first row, rows)` for blocks of rows, which are whole.
    fn blocks(&self, b: &mut Body, part: &Part, way: Way, body: impl Fn(&mut Body, Val, usize)) {
        let mut from = part.from;
        for rows in way.blocks() {
            let to = b.whole_steps(from, part.to, rows);
            b.each(from, to, rows, |b, r| body(b, r, rows));
            from = to;
        }
    }

    /// Reads `rows` rows of Q and sets sums to nothing. Returns how many keys the last one sees: no other sees more.
    fn start(&self, b: &mut Body, a: &Args, u: &Unit, rows: Val) -> Val {
        let base = a.buffer(b, 0);
        let strides = Strides::of(b, a, STRIDES);
        let masks = self.form.mask.map(|_| Strides::of(b, a, STRIDES + 12));
        let (zero, one) = (b.size(0), b.size(1));
        let nothing = b.splat(self.floats(), 0.0);
        let least = b.splat(self.floats(), f64::NEG_INFINITY);
        for tops in [self.top, self.now] {
            parts(b, 0, Self::numbers(self.lanes), self.lanes, |b, i, _| {
                let at = b.element(tops, i, Scalar::F32);
                b.store(least, at);
            });
        }
        let scale = b.splat(self.floats(), f64::from(self.form.scale));
        let [width, value_width] = self.widths();
        b.each(zero, rows, 1, |b, r| {
            let place = u.place(b, r);
            let from = strides.row(b, base, place);
            let to = self.row(b, self.q, r, width);
            parts(b, 0, self.form.size, self.lanes, |b, i, there| {
                let (from, to) = (b.element(from, i, Scalar::F32), b.element(to, i, Scalar::F32));
                let v = b.load_some(from, self.floats(), there);
                let v = b.mul(v, scale);
                b.store(v, to);
            });
            let to = self.row(b, self.y, r, value_width);
            parts(b, 0, value_width, self.lanes, |b, i, _| {
                let to = b.element(to, i, Scalar::F32);
                b.store(nothing, to);
            });
            let at = self.row(b, self.total, r, self.lanes);
            b.store(nothing, at);
            let sees = match self.form.causal {
                true => {
                    let before = b.add(u.past, place[2]);
                    let sees = b.add(before, one);
                    b.min(sees, u.keys)
                }
                false => u.keys,
            };
            let at = b.element(self.sees, r, Scalar::I64);
            b.store(sees, at);
            if let Some(masks) = masks {
                let offset = masks.offset(b, place);
                let at = b.element(self.mask, r, Scalar::I64);
                b.store(offset, at);
            }
        });
        let last = b.sub(rows, one);
        let at = b.element(self.sees, last, Scalar::I64);
        b.load(at, scalar(Scalar::I64))
    }

    /// All tiles of keys that a row sees, of K and V from these places on with these elements between positions.
    fn tiles(&self, b: &mut Body, a: &Args, u: &Unit, start: [(Val, Val); 2], way: Way) {
        let count = way.rows(b, u.count);
        let end = self.start(b, a, u, count);
        let [(k, k_step), (v, v_step)] = start;
        let (zero, one, most) = (b.size(0), b.size(1), b.size(way.keys()));
        b.each(zero, end, way.keys(), |b, from| {
            let left = b.sub(end, from);
            let there = b.min(left, most);
            let tile = |b: &mut Body, base: Val, step: Val| {
                let at = b.mul(from, step);
                b.element(base, at, Scalar::F32)
            };
            let (k, v) = (tile(b, k, k_step), tile(b, v, v_step));
            let last = b.sub(there, one);
            // Keys in whole vectors: the last one stands for those that are not there.
            let keys = |b: &mut Body, first: Val| -> Vec<Val> {
                let row = |i: usize| {
                    let i = b.size(i);
                    let i = b.add(first, i);
                    let i = b.min(i, last);
                    let at = b.mul(i, k_step);
                    b.element(k, at, Scalar::F32)
                };
                (0..self.lanes).map(row).collect()
            };
            let (v, v_step) = match way {
                Way::InPlace => (v, v_step),
                Way::Copied => {
                    self.turn_keys(b, there, &keys);
                    (self.copy_values(b, v, v_step, there), b.size(self.widths()[1]))
                }
            };
            let first = self.first_that_sees(b, u, from, way);
            let part = b.size(PART);
            let start = b.div(first, part);
            let start = b.mul(start, part);
            b.each(start, count, PART, |b, base| {
                let next = b.add(base, part);
                let part = Part { base, from: b.max(base, first), to: b.min(next, count) };
                match way {
                    Way::InPlace => self.scores_in_place(b, &part, there, &keys),
                    Way::Copied => self.scores_of_copies(b, &part, there),
                }
                self.weigh(b, a, &part, from, there, way);
                self.blocks(b, &part, way, |b, r, rows| {
                    self.values(b, &part, (r, rows), (v, v_step), there, way);
                });
            });
        });
    }

    /// The first row of a block that sees a key from `from` on, where rows are multiplied in whole blocks.
    fn first_that_sees(&self, b: &mut Body, u: &Unit, from: Val, way: Way) -> Val {
        let zero = b.size(0);
        if !self.form.causal {
            return zero;
        }
        let large = b.size(way.blocks()[0]);
        let whole = b.div(u.count, large);
        let whole = b.mul(whole, large);
        let position = b.sub(from, u.past);
        let row = b.mul(position, u.group);
        let row = b.sub(row, u.first);
        let row = b.max(row, zero);
        let row = b.div(row, large);
        let row = b.mul(row, large);
        b.min(row, whole)
    }

    /// Scores of rows with the keys of a tile that are there, as many keys at a time as there are lanes.
    fn scores_in_place(&self, b: &mut Body, part: &Part, there: Val, keys: &Keys) {
        let zero = b.size(0);
        b.each(zero, there, self.lanes, |b, first| {
            let keys = keys(b, first);
            b.each(part.from, part.to, 1, |b, r| {
                let q = self.row(b, self.q, r, self.widths()[0]);
                let step = |b: &mut Body, i: Val, there: usize, sums: &[Val]| -> Vec<Val> {
                    let at = b.element(q, i, Scalar::F32);
                    let q = b.load(at, self.floats());
                    let product = |(&key, &sum): (&Val, &Val)| {
                        let at = b.element(key, i, Scalar::F32);
                        let k = b.load_some(at, self.floats(), there);
                        b.fma(k, q, sum)
                    };
                    keys.iter().zip(sums).map(product).collect()
                };
                let whole = self.form.size / self.lanes * self.lanes;
                let (to, nothing) = (b.size(whole), b.splat(self.floats(), 0.0));
                let start = vec![nothing; self.lanes];
                let mut sums =
                    b.repeat(zero, to, self.lanes, &start, |b, i, sums| step(b, i, self.lanes, sums));
                if whole < self.form.size {
                    sums = step(b, to, self.form.size - whole, &sums);
                }
                let sums = each_summed(b, sums);
                let at = self.scores(b, part, r, Way::InPlace);
                let at = b.element(at, first, Scalar::F32);
                b.store(sums, at);
            });
        });
    }

    /// Keys that are multiplied at a time where they are turned.
    fn panel(&self) -> usize {
        self.columns(Way::Copied.blocks()[0]) * self.lanes
    }

    /// Turns the keys of a tile.
    fn turn_keys(&self, b: &mut Body, there: Val, keys: &Keys) {
        let (size, panel) = (self.form.size, self.panel());
        let (zero, width, whole) = (b.size(0), b.size(panel), b.size(size));
        b.each(zero, there, panel, |b, block| {
            let at = b.mul(block, whole);
            let turned = b.element(self.k, at, Scalar::F32);
            for column in (0..panel).step_by(self.lanes) {
                let first = b.size(column);
                let first = b.add(block, first);
                let keys = keys(b, first);
                let to = b.at_const(turned, 4 * column);
                parts(b, 0, size, self.lanes, |b, i, there| {
                    let elements = keys.iter().map(|&key| {
                        let at = b.element(key, i, Scalar::F32);
                        b.load_some(at, self.floats(), there)
                    });
                    let elements = elements.collect();
                    let at = b.mul(i, width);
                    let to = b.element(to, at, Scalar::F32);
                    for (i, v) in transposed(b, elements).into_iter().take(there).enumerate() {
                        let to = b.at_const(to, 4 * i * panel);
                        b.store(v, to);
                    }
                });
            }
        });
    }

    /// Scores of rows with the keys of a tile that are there, which are turned.
    fn scores_of_copies(&self, b: &mut Body, part: &Part, there: Val) {
        let (size, panel) = (self.form.size, self.panel());
        let (zero, width, whole) = (b.size(0), b.size(panel), b.size(size));
        let columns = vec![self.lanes; panel / self.lanes];
        b.each(zero, there, panel, |b, block| {
            let at = b.mul(block, whole);
            let turned = b.element(self.k, at, Scalar::F32);
            self.blocks(b, part, Way::Copied, |b, r, rows| {
                let q = self.row(b, self.q, r, self.widths()[0]);
                let nothing = b.splat(self.floats(), 0.0);
                let start = vec![nothing; rows * columns.len()];
                let sums = self.product(b, (q, self.widths()[0]), (turned, width), whole, &columns, &start);
                let to = self.scores(b, part, r, Way::Copied);
                let to = b.element(to, block, Scalar::F32);
                for (i, v) in sums.into_iter().enumerate() {
                    let (row, column) = (i / columns.len(), i % columns.len());
                    let to = b.at_const(to, 4 * (row * Way::Copied.keys() + column * self.lanes));
                    b.store(v, to);
                }
            });
        });
    }

    /// Rows of `x`, which lie `x.1` elements apart, by `steps` rows of vectors from `y` on, `y.1` elements apart, of which so many
    /// lanes are there; added to `start`.
    fn product(
        &self,
        b: &mut Body,
        x: (Val, usize),
        y: (Val, Val),
        steps: Val,
        there: &[usize],
        start: &[Val],
    ) -> Vec<Val> {
        let zero = b.size(0);
        b.repeat(zero, steps, 1, start, |b, i, sums| {
            let at = b.mul(i, y.1);
            let row = b.element(y.0, at, Scalar::F32);
            let vectors = there.iter().enumerate().map(|(c, &there)| {
                let at = b.at_const(row, 4 * c * self.lanes);
                b.load_some(at, self.floats(), there)
            });
            let vectors: Vec<Val> = vectors.collect();
            let x_at = b.element(x.0, i, Scalar::F32);
            let mut out = Vec::with_capacity(sums.len());
            for (r, sums) in sums.chunks(there.len()).enumerate() {
                let at = b.at_const(x_at, 4 * r * x.1);
                let one = b.load(at, scalar(Scalar::F32));
                let one = b.broadcast(one, self.lanes);
                out.extend(sums.iter().zip(&vectors).map(|(&sum, &v)| b.fma(one, v, sum)));
            }
            out
        })
    }

    /// Copies the values of a tile; returns where they are.
    fn copy_values(&self, b: &mut Body, v: Val, step: Val, count: Val) -> Val {
        let zero = b.size(0);
        b.each(zero, count, 1, |b, i| {
            let at = b.mul(i, step);
            let from = b.element(v, at, Scalar::F32);
            let to = self.row(b, self.v, i, self.widths()[1]);
            parts(b, 0, self.form.value_size, self.lanes, |b, i, there| {
                let (from, to) = (b.element(from, i, Scalar::F32), b.element(to, i, Scalar::F32));
                let v = b.load_some(from, self.floats(), there);
                b.store(v, to);
            });
        });
        self.v
    }

    /// Adds the values of a tile, weighed, to the sums of `rows` rows from `r` on.
    #[allow(clippy::too_many_arguments)]
    fn values(
        &self,
        b: &mut Body,
        part: &Part,
        (r, rows): (Val, usize),
        (v, step): (Val, Val),
        count: Val,
        way: Way,
    ) {
        let columns = self.columns(rows);
        let width = self.widths()[1];
        // Vectors that are whole: those on the stack all are.
        let whole = if way == Way::Copied { width } else { self.form.value_size } / self.lanes;
        let weights = self.scores(b, part, r, way);
        let shrink = b.element(self.shrink, r, Scalar::F32);
        let panel = |b: &mut Body, first: Val, there: &[usize]| {
            let at = self.row(b, self.y, r, width);
            let at = b.element(at, first, Scalar::F32);
            let mut places = Vec::new();
            let mut start = Vec::new();
            for i in 0..rows {
                let shrink = b.at_const(shrink, 4 * i);
                let shrink = b.load(shrink, scalar(Scalar::F32));
                let shrink = b.broadcast(shrink, self.lanes);
                for c in 0..there.len() {
                    let at = b.at_const(at, 4 * (i * width + c * self.lanes));
                    let sum = b.load(at, self.floats());
                    start.push(b.mul(sum, shrink));
                    places.push(at);
                }
            }
            let v = b.element(v, first, Scalar::F32);
            let sums = self.product(b, (weights, way.keys()), (v, step), count, there, &start);
            sums.into_iter().zip(places).for_each(|(sum, at)| b.store(sum, at));
        };
        let panels = whole / columns;
        let (from, to) = (b.size(0), b.size(panels * columns * self.lanes));
        b.each(from, to, columns * self.lanes, |b, first| panel(b, first, &vec![self.lanes; columns]));
        let rest: Vec<usize> = (panels * columns * self.lanes..width)
            .step_by(self.lanes)
            .map(|i| if way == Way::Copied { self.lanes } else { (self.form.value_size - i).min(self.lanes) })
            .collect();
        if !rest.is_empty() {
            panel(b, to, &rest);
        }
    }
}
