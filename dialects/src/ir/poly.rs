//! Sums of products of named sizes, in one normal form: equal sums are equal values.

use std::collections::BTreeMap;
use std::fmt;

/// A sum of products of atoms with whole factors, such as `past + 2*batch*seq`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Poly<A> {
    /// The factor of each product, none of them 0. A product is sorted; the empty one is the number.
    terms: BTreeMap<Vec<A>, i64>,
}

impl<A: Ord + Clone> Poly<A> {
    /// A number.
    pub fn number(n: i64) -> Poly<A> {
        Poly { terms: [(Vec::new(), n)].into_iter().filter(|t| t.1 != 0).collect() }
    }

    /// An atom.
    pub fn atom(a: A) -> Poly<A> {
        Poly { terms: [(vec![a], 1)].into() }
    }

    /// The number, if it is one.
    pub fn known(&self) -> Option<i64> {
        match self.terms.first_key_value() {
            None => Some(0),
            Some((atoms, &n)) => (atoms.is_empty() && self.terms.len() == 1).then_some(n),
        }
    }

    /// The atom, if it is one.
    pub fn single(&self) -> Option<&A> {
        match (self.terms.first_key_value(), self.terms.len()) {
            (Some((atoms, 1)), 1) if atoms.len() == 1 => atoms.first(),
            _ => None,
        }
    }

    /// Each product with its factor.
    pub fn terms(&self) -> impl Iterator<Item = (&[A], i64)> {
        self.terms.iter().map(|(atoms, &n)| (atoms.as_slice(), n))
    }

    /// Whether it is at least 0 wherever its atoms are.
    pub fn nonnegative(&self) -> bool {
        self.terms.values().all(|&n| n >= 0)
    }

    fn plus(mut self, atoms: &[A], n: i64) -> Option<Poly<A>> {
        let sum = self.terms.get(atoms).copied().unwrap_or(0).checked_add(n)?;
        match sum {
            0 => self.terms.remove(atoms),
            _ => self.terms.insert(atoms.to_vec(), sum),
        };
        Some(self)
    }

    /// a + b; `None` where a factor is beyond 64 bits.
    pub fn add(&self, other: &Poly<A>) -> Option<Poly<A>> {
        other.terms().try_fold(self.clone(), |sum, (atoms, n)| sum.plus(atoms, n))
    }

    /// a - b.
    pub fn sub(&self, other: &Poly<A>) -> Option<Poly<A>> {
        other.terms().try_fold(self.clone(), |sum, (atoms, n)| sum.plus(atoms, n.checked_neg()?))
    }

    /// a b.
    pub fn mul(&self, other: &Poly<A>) -> Option<Poly<A>> {
        let mut out = Poly::number(0);
        for (a, m) in self.terms() {
            for (b, n) in other.terms() {
                let mut atoms = [a, b].concat();
                atoms.sort();
                out = out.plus(&atoms, m.checked_mul(n)?)?;
            }
        }
        Some(out)
    }

    /// a / b, where that is such a sum again: by long division, the largest products first.
    pub fn div(&self, by: &Poly<A>) -> Option<Poly<A>> {
        let (divisor, d) = by.largest()?;
        let (mut rest, mut quotient) = (self.clone(), Poly::number(0));
        while let Some((atoms, n)) = rest.largest() {
            let mut left = atoms.to_vec();
            for a in divisor {
                left.remove(left.iter().position(|l| l == a)?);
            }
            if n.checked_rem(d)? != 0 {
                return None;
            }
            let part = Poly::number(0).plus(&left, n / d)?;
            quotient = quotient.add(&part)?;
            rest = rest.sub(&part.mul(by)?)?;
        }
        Some(quotient)
    }

    /// The largest product, in an order that multiplication keeps: of more atoms, then of smaller ones.
    fn largest(&self) -> Option<(&[A], i64)> {
        self.terms().max_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then_with(|| b.cmp(a)))
    }

    /// The same of other atoms.
    pub fn map<B: Ord + Clone>(&self, atom: impl Fn(&A) -> B) -> Poly<B> {
        let renamed = self.terms.iter().map(|(atoms, &n)| {
            let mut atoms: Vec<B> = atoms.iter().map(&atom).collect();
            atoms.sort();
            (atoms, n)
        });
        // Two atoms may become one.
        renamed.fold(Poly::number(0), |sum, (atoms, n)| sum.clone().plus(&atoms, n).unwrap_or(sum))
    }

    /// Writes it, atoms as `atom` says: `past + 2*batch*seq - 1`.
    pub fn write(
        &self,
        f: &mut fmt::Formatter<'_>,
        atom: impl Fn(&A, &mut fmt::Formatter<'_>) -> fmt::Result,
    ) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("0");
        }
        // The number stands last.
        let (named, number): (Vec<_>, Vec<_>) = self.terms().partition(|(atoms, _)| !atoms.is_empty());
        for (i, (atoms, n)) in named.into_iter().chain(number).enumerate() {
            match (i, n < 0) {
                (0, true) => f.write_str("-")?,
                (0, false) => {}
                (_, true) => f.write_str(" - ")?,
                (_, false) => f.write_str(" + ")?,
            }
            let one = n.unsigned_abs() == 1 && !atoms.is_empty();
            if !one {
                write!(f, "{}", n.unsigned_abs())?;
            }
            for (j, a) in atoms.iter().enumerate() {
                if j > 0 || !one {
                    f.write_str("*")?;
                }
                atom(a, f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type P = Poly<&'static str>;

    fn n(n: i64) -> P {
        Poly::number(n)
    }

    fn a(name: &'static str) -> P {
        Poly::atom(name)
    }

    #[test]
    fn equal_sums_are_equal_however_they_were_made() {
        let (p, s) = (a("past"), a("seq"));
        let total = p.add(&s).unwrap();
        assert_eq!(total, s.add(&p).unwrap());
        assert_eq!(total.sub(&p).unwrap(), s);
        assert_eq!(total.sub(&total).unwrap().known(), Some(0));
        assert_eq!(p.mul(&s).unwrap(), s.mul(&p).unwrap());
        let twice = total.mul(&n(2)).unwrap();
        assert_eq!(twice, total.add(&total).unwrap());
        assert_eq!(total.mul(&n(0)).unwrap(), n(0));
        assert_eq!((n(3).known(), p.known(), total.known()), (Some(3), None, None));
        assert_eq!((p.single(), twice.single(), p.mul(&s).unwrap().single()), (Some(&"past"), None, None));
    }

    #[test]
    fn a_quotient_is_exact_or_none() {
        let (b, s) = (a("b"), a("s"));
        let rows = b.mul(&s).unwrap().mul(&n(6)).unwrap();
        assert_eq!(rows.div(&s), b.mul(&n(6)));
        assert_eq!(rows.div(&n(3)), b.mul(&s).unwrap().mul(&n(2)));
        assert_eq!(rows.div(&n(4)), None);
        assert_eq!(s.div(&b), None);
        let sum = b.add(&s).unwrap();
        assert_eq!(sum.mul(&n(3)).unwrap().div(&sum), Some(n(3)));
        assert_eq!(sum.mul(&b).unwrap().div(&b), Some(sum.clone()));
        let product = sum.mul(&b.sub(&s).unwrap()).unwrap();
        assert_eq!(product.div(&sum), b.sub(&s));
        assert_eq!(product.add(&n(1)).unwrap().div(&sum), None);
        assert_eq!(sum.div(&b), None);
        assert_eq!(sum.div(&n(0)), None);
    }

    #[test]
    fn what_is_beyond_64_bits_is_none() {
        let most = n(i64::MAX);
        assert_eq!(most.add(&n(1)), None);
        assert_eq!(most.mul(&n(2)), None);
        assert_eq!(n(0).sub(&n(i64::MIN)), None);
        assert_eq!(n(i64::MIN).div(&n(-1)), None);
    }
}
