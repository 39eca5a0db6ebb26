//! How long every axis is, in terms of the batch and of the sequence: found by inferring types at several small
//! sizes, so that no shape arithmetic of the exporter has to be understood.

use super::rules::RANK;
use dialects::ir::{Dim, Module, Type, Value, infer};
use dialects::ops::Ops;
use std::collections::HashMap;

/// Batch and sequence of each probe: distinct primes, so that a product tells its factors.
const PROBES: [(i64, i64); 4] = [(2, 5), (2, 7), (3, 5), (3, 7)];

/// The length of an axis: `fixed`, times the batch, times the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Size {
    /// The constant factor.
    pub fixed: i64,
    /// Whether the batch is a factor.
    pub batch: bool,
    /// Whether the sequence is a factor.
    pub seq: bool,
}

impl Size {
    /// A length that depends on nothing.
    pub fn fixed(n: i64) -> Size {
        Size { fixed: n, batch: false, seq: false }
    }

    fn at(self, (b, s): (i64, i64)) -> i64 {
        self.fixed * if self.batch { b } else { 1 } * if self.seq { s } else { 1 }
    }

    /// What has these lengths in the probes.
    fn of(lengths: [i64; 4]) -> Option<Size> {
        let forms = [(false, false), (true, false), (false, true), (true, true)];
        forms.into_iter().find_map(|(batch, seq)| {
            let unit = Size { fixed: 1, batch, seq };
            let size = Size { fixed: lengths[0] / unit.at(PROBES[0]), ..unit };
            PROBES.iter().zip(lengths).all(|(&p, n)| size.at(p) == n).then_some(size)
        })
    }
}

/// The lengths of the axes of every value of known rank; `None` for one that is no such product.
#[derive(Debug, Default)]
pub struct Sizes(HashMap<Value, Vec<Option<Size>>>);

impl Sizes {
    /// Probes a module whose `inputs` are `[batch, sequence, ...]`.
    pub fn probe(m: &Module, ops: &Ops, inputs: &[Value]) -> Sizes {
        let probes = PROBES.map(|(b, s)| {
            let mut probe = m.clone();
            for &v in inputs {
                let Type::Tensor(t) = &mut probe.values[v].ty else { continue };
                let open = |d: &Dim| d.known().is_none();
                if let Some(dims) = &mut t.dims {
                    for (d, n) in dims.iter_mut().zip([b, s]).filter(|(d, _)| open(d)) {
                        *d = Dim::Known(n);
                    }
                }
            }
            // What the file declares names sizes that are numbers here.
            for op in probe.regions[probe.top].ops.clone() {
                for v in probe.ops[op].results.clone().into_iter().flatten() {
                    probe.values[v].ty = Type::Unknown;
                    probe.values[v].sym = None;
                }
            }
            infer::infer(&mut probe, ops);
            probe
        });
        let sizes = m.values.keys().filter_map(|v| {
            let dims: Vec<&[Dim]> = probes.iter().map(|p| p.ty(v).dims()).collect::<Option<_>>()?;
            let rank = dims[0].len();
            if rank > RANK || dims.iter().any(|d| d.len() != rank) {
                return None;
            }
            let axis = |i: usize| {
                let n = |p: usize| dims[p][i].known();
                Size::of([n(0)?, n(1)?, n(2)?, n(3)?])
            };
            Some((v, (0..rank).map(axis).collect()))
        });
        Sizes(sizes.collect())
    }

    /// The lengths of the axes of `v`, where its rank is known.
    pub fn of(&self, v: Value) -> Option<&[Option<Size>]> {
        self.0.get(&v).map(Vec::as_slice)
    }

    /// The axes of `v` along which the sequence lies.
    pub fn along(&self, v: Value) -> Vec<usize> {
        let sizes = self.of(v).unwrap_or_default();
        (0..sizes.len()).filter(|&i| sizes[i].is_some_and(|s| s.seq)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_told_apart() {
        let at = |f: &dyn Fn(i64, i64) -> i64| Size::of(PROBES.map(|(b, s)| f(b, s)));
        let size = |fixed, batch, seq| Some(Size { fixed, batch, seq });
        assert_eq!(at(&|_, _| 7), size(7, false, false));
        assert_eq!(at(&|b, _| 4 * b), size(4, true, false));
        assert_eq!(at(&|_, s| s), size(1, false, true));
        assert_eq!(at(&|b, s| 6 * b * s), size(6, true, true));
        assert_eq!(at(&|_, s| s + 1), None);
        assert_eq!(at(&|_, s| s * s), None);
        assert_eq!(at(&|_, _| 0), size(0, false, false));
    }
}
