//! Sizes known at build time up to named dims: of buffers, of loops, of steps in memory.

use dialects::ir::poly::Poly;
use dialects::ir::{Dim, Type};
use std::fmt;
use std::ops::{Add, Mul};

/// A number of elements, rows or bytes. Equal sizes are equal values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Size {
    /// A number.
    Known(u64),
    /// A sum of products that is no number.
    Sum(Poly<Atom>),
}

/// What sizes are made of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Atom {
    /// A named dim of the model.
    Dim(String),
    /// A size in parts of so many, rounded up.
    DivUp(Box<Size>, u64),
    /// A size beyond what can be counted, or below zero.
    Lost,
}

impl Size {
    /// The size of a dim; `None` where nothing is known of it.
    pub fn of(dim: &Dim) -> Option<Size> {
        Some(dim.poly()?.map(|name| Atom::Dim(name.to_string())).into())
    }

    /// The dims of a tensor; `None` where one is unknown.
    pub fn shape(ty: &Type) -> Option<Vec<Size>> {
        ty.dims()?.iter().map(Size::of).collect()
    }

    /// The product of sizes.
    pub fn product<'a>(sizes: impl IntoIterator<Item = &'a Size>) -> Size {
        sizes.into_iter().fold(Size::Known(1), |a, b| a * b.clone())
    }

    fn poly(&self) -> Poly<Atom> {
        match self {
            Size::Known(n) => i64::try_from(*n).map_or(Poly::atom(Atom::Lost), Poly::number),
            Size::Sum(p) => p.clone(),
        }
    }

    fn with(&self, other: &Size, f: fn(&Poly<Atom>, &Poly<Atom>) -> Option<Poly<Atom>>) -> Size {
        f(&self.poly(), &other.poly()).unwrap_or(Poly::atom(Atom::Lost)).into()
    }

    /// Rounded up to parts of `by`.
    pub fn div_up(self, by: u64) -> Size {
        match self {
            Size::Known(n) => Size::Known(n.div_ceil(by)),
            other => Size::Sum(Poly::atom(Atom::DivUp(Box::new(other), by))),
        }
    }

    /// The difference of two sizes; `None` where it is known to be below zero.
    pub fn minus(&self, by: &Size) -> Option<Size> {
        let left = self.poly().sub(&by.poly())?;
        match left.known() {
            Some(n) => u64::try_from(n).ok().map(Size::Known),
            None => Some(Size::Sum(left)),
        }
    }

    /// The quotient, where the sizes themselves show that it is a whole one.
    pub fn div(&self, by: &Size) -> Option<Size> {
        self.poly().div(&by.poly()).map(Size::from)
    }

    /// The number, if it is one.
    pub fn known(&self) -> Option<u64> {
        match self {
            Size::Known(n) => Some(*n),
            Size::Sum(_) => None,
        }
    }

    /// The named dim, if it is one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Size::Sum(p) => match p.single() {
                Some(Atom::Dim(name)) => Some(name),
                _ => None,
            },
            Size::Known(_) => None,
        }
    }

    /// The products that it is the sum of, each with its factor.
    pub fn terms(&self) -> Vec<(Vec<Atom>, i64)> {
        self.poly().terms().map(|(atoms, n)| (atoms.to_vec(), n)).collect()
    }

    /// The named dims in it.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Size::Known(_) => Vec::new(),
            Size::Sum(p) => p.terms().flat_map(|(atoms, _)| atoms).flat_map(Atom::names).collect(),
        }
    }

    /// The value where the dims have these; `None` where one has none, or the value is beyond 63 bits or below zero.
    pub fn eval(&self, dim: &dyn Fn(&str) -> Option<u64>) -> Option<u64> {
        self.sum(dim, false)
    }

    /// The greatest value that it can have where the dims have at most these.
    pub fn most(&self, dim: &dyn Fn(&str) -> Option<u64>) -> Option<u64> {
        self.sum(dim, true)
    }

    fn sum(&self, dim: &dyn Fn(&str) -> Option<u64>, most: bool) -> Option<u64> {
        let p = match self {
            Size::Known(n) => return Some(*n),
            Size::Sum(p) => p,
        };
        let mut sum = 0i128;
        for (atoms, factor) in p.terms().filter(|t| !most || t.1 > 0) {
            let mut product = i128::from(factor);
            for a in atoms {
                let value = match a {
                    Atom::Dim(name) => dim(name)?,
                    Atom::DivUp(size, by) => size.sum(dim, most)?.div_ceil(*by),
                    Atom::Lost => return None,
                };
                product = product.checked_mul(value.into())?;
            }
            sum = sum.checked_add(product)?;
        }
        i64::try_from(sum).ok().and_then(|n| u64::try_from(n).ok())
    }
}

impl Atom {
    fn names(&self) -> Vec<&str> {
        match self {
            Atom::Dim(name) => vec![name],
            Atom::DivUp(size, _) => size.names(),
            Atom::Lost => Vec::new(),
        }
    }
}

impl From<Poly<Atom>> for Size {
    fn from(p: Poly<Atom>) -> Size {
        match p.known().map(u64::try_from) {
            Some(Ok(n)) => Size::Known(n),
            Some(Err(_)) => Size::Sum(Poly::atom(Atom::Lost)),
            None => Size::Sum(p),
        }
    }
}

impl From<usize> for Size {
    fn from(n: usize) -> Size {
        Size::Known(n as u64)
    }
}

impl Mul for Size {
    type Output = Size;
    fn mul(self, other: Size) -> Size {
        self.with(&other, Poly::mul)
    }
}

impl Add for Size {
    type Output = Size;
    fn add(self, other: Size) -> Size {
        self.with(&other, Poly::add)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Known(n) => write!(f, "{n}"),
            Size::Sum(p) => p.write(f, |a, f| a.fmt(f)),
        }
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Atom::Dim(name) => f.write_str(name),
            Atom::DivUp(size, by) => write!(f, "ceil(({size}) / {by})"),
            Atom::Lost => f.write_str("(a size that cannot be counted)"),
        }
    }
}
