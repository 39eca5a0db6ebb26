//! Q, K, V and their like: for each batch and head a matrix `[positions, size]` of f32, wherever it lies in memory.
//!
//! Kernels find elements by strides among their sizes, so that the same text reads a tensor in place that is a part of
//! another, or another view of it. Only the elements of one row lie side by side.

use super::Args;
use crate::layout::Layout;
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

    /// Of heads in a layout of `[batch, heads, positions, size]`, where elements of a row lie side by side, and how many heads
    /// there are that differ: the others repeat each of them, so many times running. `None` where they lie otherwise.
    fn of(layout: &Layout, size: usize) -> Option<(Access, usize)> {
        let one = |dim: usize| match &layout.dims[dim][..] {
            [] => Some(Size::Known(0)),
            [part] => Some(part.stride.clone()),
            _ => None,
        };
        let (batch, position) = (one(0)?, one(2)?);
        if size > 1 && one(3)? != Size::Known(1) {
            return None;
        }
        let (count, head) = match &layout.dims[1][..] {
            [differ, repeat] if repeat.stride == Size::Known(0) => (&differ.extent, &differ.stride),
            [part] if part.stride == Size::Known(0) => (&Size::Known(1), &part.stride),
            [part] => (&part.extent, &part.stride),
            [] => (&Size::Known(1), &Size::Known(0)),
            _ => return None,
        };
        let count = usize::try_from(count.known()?).ok()?;
        Some((Access { batch, head: head.clone(), position }, count))
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

    /// The layout of `[batch, heads, positions, size]` that `layout` is, which may have the heads side by side.
    pub fn layout(&self, layout: &Layout) -> Option<Layout> {
        match layout.dims.len() {
            4 => Some(layout.clone()),
            _ => {
                let apart = [self.batch.clone(), self.positions.clone(), self.heads.into(), self.size.into()];
                layout.reshaped(&apart)?.transposed(&[0, 2, 1, 3])
            }
        }
    }

    /// The same where they lie as `layout` says, with only those heads that differ.
    pub fn seen(&self, layout: &Layout) -> Option<Heads> {
        let (access, heads) = Access::of(&self.layout(layout)?, self.size)?;
        Some(Heads { heads, access, ..self.clone() })
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
