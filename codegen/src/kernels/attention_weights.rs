//! The part of [`attention_tiles`](super::attention_tiles) between the two products: scores become weights, and sums are divided
//! by the sum of weights.

use super::attention_tiles::{Mask, Part, STRIDES, Tiles, Unit, Way};
use super::heads::{Strides, parts};
use super::{Args, elementwise, math, pointwise};
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar};

impl Tiles {
    /// Turns the scores of rows with `count` keys from `from` on into weights. What is one number to a row is done for as many
    /// rows at a time as there are lanes: row by row it would be a chain of waiting.
    pub(super) fn weigh(&self, b: &mut Body, a: &Args, part: &Part, from: Val, count: Val, way: Way) {
        let (zero, floats) = (b.size(0), self.floats());
        let least = b.splat(floats, f64::NEG_INFINITY);
        b.each(part.from, part.to, 1, |b, r| {
            let row = self.scores(b, part, r, way);
            if let Some(cap) = self.form.softcap {
                self.cap(b, row, count, cap);
            }
            if let Some(mask) = self.form.mask {
                self.add_mask(b, a, mask, row, r, from, count);
            }
            self.hide(b, row, r, from, count);
            let top = b.repeat(zero, count, self.lanes, &[least], |b, i, top| {
                let at = b.element(row, i, Scalar::F32);
                let s = b.load(at, floats);
                // A NaN is passed over, and makes the sum NaN.
                vec![b.max_finite(s, top[0])]
            });
            let top = b.fold(top[0], Body::max_finite);
            let at = b.element(self.now, r, Scalar::F32);
            b.store(top, at);
        });
        // Lanes behind the last row belong to rows of the next part, which have no scores yet: nothing becomes of them.
        b.each(part.from, part.to, self.lanes, |b, r| {
            let [now, top, beside, shrink] =
                [self.now, self.top, self.beside, self.shrink].map(|p| b.element(p, r, Scalar::F32));
            let (new, old) = (b.load(now, floats), b.load(top, floats));
            b.store(least, now);
            let new = b.max_finite(new, old);
            b.store(new, top);
            // Where all is masked so far there is nothing to compare with: weights are 0 beside any number.
            let nothing = b.cmp(Cmp::Eq, new, least);
            let none = b.splat(floats, 0.0);
            let new = b.select(nothing, none, new);
            b.store(new, beside);
            let less = b.sub(old, new);
            let less = math::exp_below(b, less);
            b.store(less, shrink);
        });
        b.each(part.from, part.to, 1, |b, r| {
            let row = self.scores(b, part, r, way);
            let [beside, shrink] = [self.beside, self.shrink].map(|p| {
                let at = b.element(p, r, Scalar::F32);
                let one = b.load(at, scalar(Scalar::F32));
                b.broadcast(one, self.lanes)
            });
            let total_at = self.row(b, self.total, r, self.lanes);
            let total = b.load(total_at, floats);
            let total = b.mul(total, shrink);
            let total = b.repeat(zero, count, self.lanes, &[total], |b, i, total| {
                let at = b.element(row, i, Scalar::F32);
                let s = b.load(at, floats);
                let s = b.sub(s, beside);
                let w = math::exp_below(b, s);
                b.store(w, at);
                vec![b.add(total[0], w)]
            });
            b.store(total[0], total_at);
        });
    }

    /// Bounds the scores of a row.
    fn cap(&self, b: &mut Body, row: Val, count: Val, cap: f32) {
        let zero = b.size(0);
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

    /// Writes the rows: sums by the sum of weights.
    pub(super) fn finish(&self, b: &mut Body, a: &Args, u: &Unit) {
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
