//! Sizes known at build time up to named dims: of buffers, of loops.

use dialects::ir::{Dim, Type};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, Mul};

/// A number of elements, rows or bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Size {
    /// A number.
    Known(u64),
    /// A named dim of the model.
    Dim(String),
    /// a + b.
    Add(Box<Size>, Box<Size>),
    /// a b.
    Mul(Box<Size>, Box<Size>),
    /// a / b, rounded up.
    DivUp(Box<Size>, u64),
}

impl Size {
    /// The size of a dim; `None` where nothing is known of it.
    pub fn of(dim: &Dim) -> Option<Size> {
        match dim {
            Dim::Known(n) => u64::try_from(*n).ok().map(Size::Known),
            Dim::Sym(name) => Some(Size::Dim(name.to_string())),
            Dim::Unknown => None,
        }
    }

    /// The dims of a tensor; `None` where one is unknown.
    pub fn shape(ty: &Type) -> Option<Vec<Size>> {
        ty.dims()?.iter().map(Size::of).collect()
    }

    /// The product of sizes.
    pub fn product<'a>(sizes: impl IntoIterator<Item = &'a Size>) -> Size {
        sizes.into_iter().fold(Size::Known(1), |a, b| a * b.clone())
    }

    /// Rounded up to parts of `by`.
    pub fn div_up(self, by: u64) -> Size {
        match self {
            Size::Known(n) => Size::Known(n.div_ceil(by)),
            other => Size::DivUp(Box::new(other), by),
        }
    }

    /// The number, if it is one.
    pub fn known(&self) -> Option<u64> {
        match self {
            Size::Known(n) => Some(*n),
            _ => None,
        }
    }

    /// The named dims in it.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Size::Known(_) => Vec::new(),
            Size::Dim(name) => vec![name],
            Size::Add(a, b) | Size::Mul(a, b) => [a.names(), b.names()].concat(),
            Size::DivUp(a, _) => a.names(),
        }
    }

    /// The value where the dims have these; `None` where one has none, or the value is beyond 63 bits.
    pub fn eval(&self, dim: &dyn Fn(&str) -> Option<u64>) -> Option<u64> {
        let value = match self {
            Size::Known(n) => *n,
            Size::Dim(name) => dim(name)?,
            Size::Add(a, b) => a.eval(dim)?.checked_add(b.eval(dim)?)?,
            Size::Mul(a, b) => a.eval(dim)?.checked_mul(b.eval(dim)?)?,
            Size::DivUp(a, by) => a.eval(dim)?.div_ceil(*by),
        };
        (value <= i64::MAX as u64).then_some(value)
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
        match (self, other) {
            (Size::Known(a), Size::Known(b)) => Size::Known(a.saturating_mul(b)),
            (Size::Known(1), s) | (s, Size::Known(1)) => s,
            (Size::Known(0), _) | (_, Size::Known(0)) => Size::Known(0),
            (a, b) => Size::Mul(Box::new(a), Box::new(b)),
        }
    }
}

impl Add for Size {
    type Output = Size;
    fn add(self, other: Size) -> Size {
        match (self, other) {
            (Size::Known(a), Size::Known(b)) => Size::Known(a.saturating_add(b)),
            (Size::Known(0), s) | (s, Size::Known(0)) => s,
            (a, b) => Size::Add(Box::new(a), Box::new(b)),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Known(n) => write!(f, "{n}"),
            Size::Dim(name) => f.write_str(name),
            Size::Add(a, b) => write!(f, "({a} + {b})"),
            Size::Mul(a, b) => write!(f, "{a} * {b}"),
            Size::DivUp(a, by) => write!(f, "ceil({a} / {by})"),
        }
    }
}
