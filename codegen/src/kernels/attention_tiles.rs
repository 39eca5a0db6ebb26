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
use super::{Args, Kernel, elementwise, math, pointwise};
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar, vector};

/// Query rows of a unit.
pub const ROWS: usize = 64;

/// At most so many rows read K and V where they are.
const FEW: usize = 8;

/// Positions among the sizes that the kernel expects: heads of K and V, query positions, query heads to each of them, keys, keys
/// before the first query; then strides (see [`Strides`]) of Q, K, V and the result, and of the mask between batches, heads and
/// rows.
const STRIDES: usize = 5;

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
struct Unit {
    batch: Val,
    head: Val,
    first: Val,
    count: Val,
    group: Val,
    keys: Val,
    past: Val,
}

impl Unit {
    /// The batch, head and position of row `r` of the block, or of the last one: heads that share keys are neighbours.
    fn place(&self, b: &mut Body, r: Val) -> [Val; 3] {
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
enum Way {
    InPlace,
    Copied,
}

impl Way {
    /// Keys of a tile.
    const fn keys(self) -> usize {
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
        b.add(whole, rest)
    }
}

/// Where as many keys lie as there are lanes, from one on.
type Keys<'k> = dyn Fn(&mut Body, Val) -> Vec<Val> + 'k;

/// Where on the stack what lies, and how large it is.
struct Tiles {
    form: Form,
    lanes: usize,
    /// Vectors of sums that registers hold beside what is multiplied.
    sums: usize,
    /// Rows of Q, scaled, with zeros up to whole vectors.
    q: Val,
    /// Sums of V, a row to a row, with as many columns as whole vectors have.
    y: Val,
    /// Scores, then weights.
    scores: Val,
    /// The keys of a tile, turned: blocks of some keys of `[size, keys of a block]`.
    k: Val,
    /// The values of a tile.
    v: Val,
    /// The largest score of each row, the factor by which the sums of a row shrink in this tile, and the sum of its weights in
    /// lanes.
    top: Val,
    shrink: Val,
    total: Val,
    /// How many keys each row sees, and where its mask starts.
    sees: Val,
    mask: Val,
}

impl Tiles {
    fn new(b: &mut Body, form: Form) -> Tiles {
        let lanes = b.target.lanes();
        let many = b.target.has(Feature::Avx512) || b.target.arch == Arch::Aarch64;
        let up = |n: usize| n.next_multiple_of(lanes);
        let mut floats = |n: usize| b.room(n.div_ceil(2));
        let keys = Way::Copied.keys();
        Tiles {
            lanes,
            sums: if many { 24 } else { 12 },
            q: floats(ROWS * up(form.size)),
            y: floats(ROWS * up(form.value_size)),
            scores: floats((keys * ROWS).max(Way::InPlace.keys() * FEW)),
            k: floats(keys * form.size),
            v: floats(keys * up(form.value_size)),
            top: floats(ROWS),
            shrink: floats(ROWS),
            total: floats(ROWS * lanes),
            sees: floats(2 * ROWS),
            mask: floats(2 * ROWS),
            form,
        }
    }

    fn floats(&self) -> Ty {
        vector(self.lanes, Scalar::F32)
    }

    /// Elements from one row of Q to the next, and of the sums of V.
    fn widths(&self) -> [usize; 2] {
        [self.form.size, self.form.value_size].map(|n| n.next_multiple_of(self.lanes))
    }

    /// Vectors of columns that blocks of so many rows take.
    fn columns(&self, rows: usize) -> usize {
        let n = (self.sums / rows).min(8);
        1 << n.ilog2()
    }

    /// Row `r` of a tile on the stack whose rows have `width` elements.
    fn row(&self, b: &mut Body, tile: Val, r: Val, width: usize) -> Val {
        let width = b.size(width);
        let at = b.mul(r, width);
        b.element(tile, at, Scalar::F32)
    }

    /// `body(first row, rows)` for blocks of rows up to `count`, which are whole blocks.
    fn blocks(&self, b: &mut Body, count: Val, way: Way, body: impl Fn(&mut Body, Val, usize)) {
        let mut from = b.size(0);
        for rows in way.blocks() {
            let size = b.size(rows);
            let left = b.sub(count, from);
            let whole = b.div(left, size);
            let whole = b.mul(whole, size);
            let to = b.add(from, whole);
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
        let least = b.splat(scalar(Scalar::F32), f64::NEG_INFINITY);
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
            let at = b.element(self.top, r, Scalar::F32);
            b.store(least, at);
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
        let keys = way.keys();
        let count = way.rows(b, u.count);
        let end = self.start(b, a, u, count);
        let [(k, k_step), (v, v_step)] = start;
        let (zero, one, most) = (b.size(0), b.size(1), b.size(keys));
        b.each(zero, end, keys, |b, from| {
            let left = b.sub(end, from);
            let there = b.min(left, most);
            let tile = |b: &mut Body, base: Val, step: Val| {
                let at = b.mul(from, step);
                b.element(base, at, Scalar::F32)
            };
            let (k, v) = (tile(b, k, k_step), tile(b, v, v_step));
            let last = b.sub(there, one);
            // Keys in whole vectors: the last one stands for those that are not there.
            let rows = |b: &mut Body, first: Val| -> Vec<Val> {
                let row = |i: usize| {
                    let i = b.size(i);
                    let i = b.add(first, i);
                    let i = b.min(i, last);
                    let at = b.mul(i, k_step);
                    b.element(k, at, Scalar::F32)
                };
                (0..self.lanes).map(row).collect()
            };
            match way {
                Way::InPlace => self.scores_in_place(b, count, there, &rows),
                Way::Copied => self.scores_of_copies(b, count, there, &rows),
            }
            b.each(zero, count, 1, |b, r| self.weigh(b, a, r, from, there, keys));
            let (v, v_step) = match way {
                Way::InPlace => (v, v_step),
                Way::Copied => (self.copy_values(b, v, v_step, there), b.size(self.widths()[1])),
            };
            self.blocks(b, count, way, |b, r, rows| self.values(b, (r, rows), (v, v_step), there, way));
        });
    }

    /// Scores of `count` rows with the keys of a tile that are there, as many keys at a time as there are lanes.
    fn scores_in_place(&self, b: &mut Body, count: Val, there: Val, rows: &Keys) {
        let zero = b.size(0);
        b.each(zero, there, self.lanes, |b, first| {
            let keys = rows(b, first);
            b.each(zero, count, 1, |b, r| {
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
                let at = self.row(b, self.scores, r, Way::InPlace.keys());
                let at = b.element(at, first, Scalar::F32);
                b.store(sums, at);
            });
        });
    }

    /// The same from keys that are turned first.
    fn scores_of_copies(&self, b: &mut Body, count: Val, there: Val, rows: &Keys) {
        let size = self.form.size;
        let columns = self.columns(Way::Copied.blocks()[0]);
        let width = columns * self.lanes;
        let (zero, wide) = (b.size(0), b.size(width));
        b.each(zero, there, width, |b, block| {
            let whole = b.size(size);
            let at = b.mul(block, whole);
            let turned = b.element(self.k, at, Scalar::F32);
            for column in 0..columns {
                let first = b.size(column * self.lanes);
                let first = b.add(block, first);
                let keys = rows(b, first);
                let to = b.at_const(turned, 4 * column * self.lanes);
                parts(b, 0, size, self.lanes, |b, i, there| {
                    let elements = keys.iter().map(|&key| {
                        let at = b.element(key, i, Scalar::F32);
                        b.load_some(at, self.floats(), there)
                    });
                    let elements = elements.collect();
                    let at = b.mul(i, wide);
                    let to = b.element(to, at, Scalar::F32);
                    for (i, v) in transposed(b, elements).into_iter().take(there).enumerate() {
                        let to = b.at_const(to, 4 * i * width);
                        b.store(v, to);
                    }
                });
            }
            self.blocks(b, count, Way::Copied, |b, r, rows| {
                let q = self.row(b, self.q, r, self.widths()[0]);
                let steps = b.size(size);
                let nothing = b.splat(self.floats(), 0.0);
                let start = vec![nothing; rows * columns];
                let there = vec![self.lanes; columns];
                let sums = self.product(b, (q, self.widths()[0]), (turned, wide), steps, &there, &start);
                for (i, sums) in sums.chunks(columns).enumerate() {
                    let row = b.size(i);
                    let row = b.add(r, row);
                    let to = self.row(b, self.scores, row, Way::Copied.keys());
                    let to = b.element(to, block, Scalar::F32);
                    for (c, &v) in sums.iter().enumerate() {
                        let to = b.at_const(to, 4 * c * self.lanes);
                        b.store(v, to);
                    }
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

    /// Turns the scores of row `r` with `count` keys from `from` on into weights.
    fn weigh(&self, b: &mut Body, a: &Args, r: Val, from: Val, count: Val, keys: usize) {
        let zero = b.size(0);
        let row = self.row(b, self.scores, r, keys);
        let number = scalar(Scalar::F32);
        if let Some(cap) = self.form.softcap {
            b.each(zero, count, self.lanes, |b, i| {
                let at = b.element(row, i, Scalar::F32);
                let s = b.load(at, self.floats());
                let cap = b.splat(s.ty, f64::from(cap));
                let s = b.div(s, cap);
                let s = math::tanh(b, s);
                let s = b.mul(s, cap);
                b.store(s, at);
            });
        }
        if let Some(mask) = self.form.mask {
            self.add_mask(b, a, mask, row, r, from, count);
        }
        self.hide(b, row, r, from, count);

        let least = b.splat(self.floats(), f64::NEG_INFINITY);
        let top = b.repeat(zero, count, self.lanes, &[least], |b, i, top| {
            let at = b.element(row, i, Scalar::F32);
            let s = b.load(at, self.floats());
            // A NaN is passed over, and makes the sum NaN.
            vec![b.max_finite(s, top[0])]
        });
        let top = b.fold(top[0], Body::max_finite);
        let top_at = b.element(self.top, r, Scalar::F32);
        let old = b.load(top_at, number);
        let top = b.max_finite(top, old);
        b.store(top, top_at);
        // Where all is masked so far there is nothing to compare with: weights are 0 beside any number.
        let least = b.splat(number, f64::NEG_INFINITY);
        let nothing = b.cmp(Cmp::Eq, top, least);
        let none = b.splat(number, 0.0);
        let top = b.select(nothing, none, top);
        let shrink = b.sub(old, top);
        let shrink = math::exp_below(b, shrink);
        let at = b.element(self.shrink, r, Scalar::F32);
        b.store(shrink, at);

        let total_at = self.row(b, self.total, r, self.lanes);
        let total = b.load(total_at, self.floats());
        let (shrink, top) = (b.broadcast(shrink, self.lanes), b.broadcast(top, self.lanes));
        let total = b.mul(total, shrink);
        let total = b.repeat(zero, count, self.lanes, &[total], |b, i, total| {
            let at = b.element(row, i, Scalar::F32);
            let s = b.load(at, self.floats());
            let s = b.sub(s, top);
            let w = math::exp_below(b, s);
            b.store(w, at);
            vec![b.add(total[0], w)]
        });
        b.store(total[0], total_at);
    }

    /// Adds row `r` of the mask to its scores.
    #[allow(clippy::too_many_arguments)]
    fn add_mask(&self, b: &mut Body, a: &Args, mask: Mask, row: Val, r: Val, from: Val, count: Val) {
        let zero = b.size(0);
        let elem = if mask.bools { Scalar::I1 } else { Scalar::F32 };
        let base = a.buffer(b, 4);
        let at = b.element(self.mask, r, Scalar::I64);
        let offset = b.load(at, scalar(Scalar::I64));
        let offset = if mask.along { b.add(offset, from) } else { offset };
        let base = elementwise::element(b, base, offset, elem);
        elementwise::vector_loop(b, zero, count, self.lanes, |b, i, lanes| {
            let score_at = b.element(row, i, Scalar::F32);
            let s = b.load(score_at, Ty { elem: Scalar::F32, lanes });
            let m = match mask.along {
                true => {
                    let at = elementwise::element(b, base, i, elem);
                    pointwise::load(b, at, Ty { elem, lanes })
                }
                false => {
                    let one = pointwise::load(b, base, scalar(elem));
                    b.spread(one, lanes)
                }
            };
            let least = b.splat(s.ty, f64::NEG_INFINITY);
            let s = match mask.bools {
                true => b.select(m, s, least),
                false => {
                    let masked = b.cmp(Cmp::Eq, m, least);
                    let sum = b.add(s, m);
                    b.select(masked, least, sum)
                }
            };
            b.store(s, score_at);
        });
    }

    /// Takes away the scores of keys that row `r` does not see, up to the end of the last vector.
    fn hide(&self, b: &mut Body, row: Val, r: Val, from: Val, count: Val) {
        let (zero, width) = (b.size(0), b.size(self.lanes));
        let at = b.element(self.sees, r, Scalar::I64);
        let sees = b.load(at, scalar(Scalar::I64));
        let sees = b.sub(sees, from);
        let sees = b.max(sees, zero);
        let sees = b.min(sees, count);
        let whole = b.div(sees, width);
        let whole = b.mul(whole, width);
        b.each(whole, count, self.lanes, |b, i| {
            let at = b.element(row, i, Scalar::F32);
            let s = b.load(at, self.floats());
            let left = b.sub(sees, i);
            let left = b.cast(left, Scalar::I32);
            let left = b.broadcast(left, self.lanes);
            let lane = b.lanes_of(Scalar::I32, &(0..self.lanes as i64).collect::<Vec<_>>());
            let seen = b.cmp(Cmp::Lt, lane, left);
            let least = b.splat(s.ty, f64::NEG_INFINITY);
            let s = b.select(seen, s, least);
            b.store(s, at);
        });
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
    fn values(&self, b: &mut Body, (r, rows): (Val, usize), (v, step): (Val, Val), count: Val, way: Way) {
        let (columns, keys) = (self.columns(rows), way.keys());
        let width = self.widths()[1];
        // Vectors that are whole: those on the stack all are.
        let whole = if way == Way::Copied { width } else { self.form.value_size } / self.lanes;
        let weights = self.row(b, self.scores, r, keys);
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
            let sums = self.product(b, (weights, keys), (v, step), count, there, &start);
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

    /// Writes the rows: sums by the sum of weights.
    fn finish(&self, b: &mut Body, a: &Args, u: &Unit) {
        let base = a.buffer(b, 3);
        let strides = Strides::of(b, a, STRIDES + 9);
        let (zero, number) = (b.size(0), scalar(Scalar::F32));
        let none = b.splat(number, 0.0);
        b.each(zero, u.count, 1, |b, r| {
            let total = self.row(b, self.total, r, self.lanes);
            let total = b.load(total, self.floats());
            let total = b.fold(total, Body::add);
            let one = b.splat(number, 1.0);
            let share = b.div(one, total);
            // Zeros where there is nothing to attend to: all of a mask is -inf, or there are no keys. Scores that are all -inf by
            // themselves give NaN.
            let nothing = match self.form.mask {
                Some(_) => b.cmp(Cmp::Eq, total, none),
                None => b.cmp(Cmp::Eq, u.keys, zero),
            };
            let share = b.select(nothing, none, share);
            let share = b.broadcast(share, self.lanes);
            let from = self.row(b, self.y, r, self.widths()[1]);
            let place = u.place(b, r);
            let to = strides.row(b, base, place);
            parts(b, 0, self.form.value_size, self.lanes, |b, i, there| {
                let (from, to) = (b.element(from, i, Scalar::F32), b.element(to, i, Scalar::F32));
                let v = b.load(from, self.floats());
                let v = b.mul(v, share);
                b.store_some(v, to, there);
            });
        });
    }
}

/// The lanes of `a` and `b` in groups of `unit`, those with an even number or those with an odd one.
fn halves(b: &mut Body, x: Val, y: Val, unit: usize, odd: bool) -> Val {
    let lanes = x.ty.lanes;
    // Within four lanes nothing has to cross the halves of a register.
    let block = if unit < 4 { 4 } else { lanes };
    let pick = |from: usize| {
        let groups = (0..block / unit).filter(move |g| g % 2 == usize::from(odd));
        groups.flat_map(move |g| (0..unit).map(move |i| from + g * unit + i))
    };
    let order: Vec<usize> =
        (0..lanes).step_by(block).flat_map(|at| pick(at).chain(pick(lanes + at))).collect();
    b.shuffle(x, y, &order)
}

/// The sums over the lanes of as many vectors as there are lanes, each in a lane.
fn each_summed(b: &mut Body, mut vectors: Vec<Val>) -> Val {
    let lanes = vectors.len();
    let mut unit = 1;
    while unit < lanes {
        // Four lanes hold sums of four vectors after the units 1 and 2: then groups of four are summed.
        let pairs = vectors.chunks(2).map(|pair| {
            let even = halves(b, pair[0], pair[1], if unit < 4 { 1 } else { 4 }, false);
            let odd = halves(b, pair[0], pair[1], if unit < 4 { 1 } else { 4 }, true);
            b.add(even, odd)
        });
        vectors = pairs.collect();
        unit *= 2;
    }
    vectors[0]
}

/// Element i of vector j as element j of vector i: blocks of two change places, then of four, and so on.
fn transposed(b: &mut Body, mut rows: Vec<Val>) -> Vec<Val> {
    let lanes = rows.len();
    let mut unit = 1;
    while unit < lanes {
        for i in (0..lanes).filter(|i| i & unit == 0) {
            let (x, y) = (rows[i], rows[i + unit]);
            let pick = |high: usize| -> Vec<usize> {
                let of = |j: usize| if j & unit == 0 { j + high } else { lanes + j - unit + high };
                (0..lanes).map(of).collect()
            };
            rows[i] = b.shuffle(x, y, &pick(0));
            rows[i + unit] = b.shuffle(x, y, &pick(unit));
        }
        unit *= 2;
    }
    rows
}
