//! Q, K, V and their like: for each batch and head a matrix `[positions, size]` of f32, wherever it lies in memory.
//!
//! Kernels find elements by strides among their sizes, so that the same text reads a tensor in place that is a part of
//! another, or another view of it. Only the elements of one row lie side by side.

use super::Args;
use crate::size::Size;
use crate::text::{Body, Scalar, Val};
use dialects::ir::{Elem, Module, Value};

/// Elements from one batch, head and position to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Between batches.
    pub batch: Size,
    /// Between heads.
    pub head: Size,
    /// Between positions.
    pub position: Size,
}

impl Access {
    /// Of a contiguous `[batch, heads, positions, size]`.
    pub fn heads_first(heads: &Size, positions: &Size, size: usize) -> Access {
        let head = positions.clone() * size.into();
        Access { batch: heads.clone() * head.clone(), head, position: size.into() }
    }

    /// Of heads that lie side by side in rows of `[batch, positions, heads * size]`.
    pub fn side_by_side(heads: &Size, positions: &Size, size: usize) -> Access {
        let position = heads.clone() * size.into();
        Access { batch: positions.clone() * position.clone(), head: size.into(), position }
    }

    /// As sizes of a kernel, which [`Strides::of`] reads.
    pub fn dims(&self) -> [Size; 3] {
        [self.batch.clone(), self.head.clone(), self.position.clone()]
    }
}

/// A tensor of heads.
#[derive(Clone, Debug)]
pub struct Heads {
    /// Batches.
    pub batch: Size,
    /// Heads of a batch.
    pub heads: usize,
    /// Rows of a head.
    pub positions: Size,
    /// Elements of a row.
    pub size: usize,
    /// Where they lie.
    pub access: Access,
}

impl Heads {
    /// The tensor `[batch, heads, positions, size]`, or `[batch, positions, heads * size]` with the number of heads beside
    /// it. `None` for others, and where the number of heads or their size is not known.
    pub fn of(m: &Module, v: Value, heads: Option<i64>) -> Option<Heads> {
        let ty = m.ty(v);
        let shape = Size::shape(ty).filter(|_| ty.elem() == Some(Elem::F32))?;
        let known = |s: &Size| s.known().and_then(|n| usize::try_from(n).ok());
        match &shape[..] {
            [batch, count, positions, size] => {
                let (heads, size) = (known(count)?, known(size)?);
                let access = Access::heads_first(count, positions, size);
                Some(Heads { batch: batch.clone(), heads, positions: positions.clone(), size, access })
            }
            [batch, positions, hidden] => {
                let hidden = known(hidden)?;
                let heads = heads.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)?;
                let size = hidden.is_multiple_of(heads).then_some(hidden / heads)?;
                let access = Access::side_by_side(&heads.into(), positions, size);
                Some(Heads { batch: batch.clone(), heads, positions: positions.clone(), size, access })
            }
            _ => None,
        }
    }
}

/// An [`Access`] in the text of a kernel.
#[derive(Clone, Copy)]
pub struct Strides {
    batch: Val,
    head: Val,
    /// Elements from one position to the next.
    pub position: Val,
}

impl Strides {
    /// That of the sizes from `first` on.
    pub fn of(b: &mut Body, a: &Args, first: usize) -> Strides {
        Strides { batch: a.dim(b, first), head: a.dim(b, first + 1), position: a.dim(b, first + 2) }
    }

    /// Elements before the row of a batch, head and position.
    pub fn offset(&self, b: &mut Body, [batch, head, position]: [Val; 3]) -> Val {
        let batch = b.mul(batch, self.batch);
        let head = b.mul(head, self.head);
        let position = b.mul(position, self.position);
        let at = b.add(batch, head);
        b.add(at, position)
    }

    /// The row of a batch, head and position of the tensor at `base`.
    pub fn row(&self, b: &mut Body, base: Val, at: [Val; 3]) -> Val {
        let at = self.offset(b, at);
        b.element(base, at, Scalar::F32)
    }
}

/// `body(first element, lanes that are there)` for each vector of the elements `from..to` of a row.
pub fn parts(b: &mut Body, from: usize, to: usize, lanes: usize, body: impl Fn(&mut Body, Val, usize)) {
    let middle = from + (to - from) / lanes * lanes;
    let (first, last) = (b.size(from), b.size(middle));
    b.each(first, last, lanes, |b, i| body(b, i, lanes));
    if middle < to {
        body(b, last, to - middle);
    }
}
