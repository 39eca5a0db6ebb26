//! Squares of lanes: as many vectors as each has lanes, turned or summed.

use crate::text::{Body, Val};

/// The lanes of `x` and then `y` in groups of `unit`, those with an even number or those with an odd one.
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
pub fn each_summed(b: &mut Body, mut vectors: Vec<Val>) -> Val {
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
pub fn transposed(b: &mut Body, mut rows: Vec<Val>) -> Vec<Val> {
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
