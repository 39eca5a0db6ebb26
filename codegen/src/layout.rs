//! Layouts: where the elements of a value lie in memory, when it is only another look at a value that was computed.
//!
//! A dim is a list of parts, each so many steps of so many elements, outermost first: heads that are repeated for grouped
//! queries are `(2 of 64), (3 of 0)`. Reshape splits and joins parts, Transpose orders dims, Expand gives a dim no step,
//! Slice moves the start; so a chain of these needs no copy before an op that reads by layout.

use crate::size::Size;
use dialects::ir::{Dim, Module, Op, Value};
use dialects::onnx::cut;

/// So many steps of so many elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// How many.
    pub extent: Size,
    /// Elements from one to the next.
    pub stride: Size,
}

/// Where elements lie, counted from the start of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The parts of each dim. A dim of one element has none.
    pub dims: Vec<Vec<Part>>,
    /// The first element.
    pub offset: Size,
}

/// A loop over two layouts at a time: how often, and the steps in the one and the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loop {
    /// How often.
    pub extent: Size,
    /// Elements from one to the next where it is written.
    pub to: Size,
    /// Elements from one to the next where it is read.
    pub from: Size,
}

const ONE: Size = Size::Known(1);

impl Layout {
    /// One element behind the other, the last dim first.
    pub fn contiguous(shape: &[Size]) -> Layout {
        let mut stride = ONE;
        let mut dims: Vec<Vec<Part>> = Vec::new();
        for extent in shape.iter().rev() {
            let part = Part { extent: extent.clone(), stride: stride.clone() };
            dims.push(if *extent == ONE { Vec::new() } else { vec![part] });
            stride = stride * extent.clone();
        }
        dims.reverse();
        Layout { dims, offset: Size::Known(0) }
    }

    /// The size of a dim.
    pub fn extent(&self, dim: usize) -> Size {
        Size::product(self.dims[dim].iter().map(|p| &p.extent))
    }

    /// Dims in another order.
    pub fn transposed(&self, perm: &[usize]) -> Option<Layout> {
        let dims: Option<Vec<_>> = perm.iter().map(|&i| self.dims.get(i).cloned()).collect();
        Some(Layout { dims: dims?, offset: self.offset.clone() })
    }

    /// The same elements in another shape, where each dim of it takes whole parts, or parts that it divides.
    pub fn reshaped(&self, shape: &[Size]) -> Option<Layout> {
        let none = Size::Known(0);
        if self.dims.iter().flatten().any(|p| p.extent == none) {
            return shape.contains(&none).then(|| Layout::contiguous(shape));
        }
        let mut left: Vec<Part> = Vec::new();
        for p in self.dims.iter().flatten() {
            match left.last_mut() {
                Some(l) if l.stride == p.extent.clone() * p.stride.clone() => {
                    *l = Part { extent: l.extent.clone() * p.extent.clone(), stride: p.stride.clone() };
                }
                _ => left.push(p.clone()),
            }
        }
        let mut dims = Vec::new();
        for size in shape.iter().rev() {
            let (mut parts, mut need) = (Vec::new(), size.clone());
            while need != ONE {
                let p = left.pop()?;
                if let Some(rest) = need.div(&p.extent) {
                    need = rest;
                    parts.push(p);
                } else {
                    let rest = p.extent.div(&need)?;
                    left.push(Part { extent: rest, stride: p.stride.clone() * need.clone() });
                    parts.push(Part { extent: need, stride: p.stride });
                    need = ONE;
                }
            }
            parts.reverse();
            dims.push(parts);
        }
        dims.reverse();
        left.is_empty().then(|| Layout { dims, offset: self.offset.clone() })
    }

    /// Broadcast to a shape.
    pub fn expanded(&self, shape: &[Size]) -> Option<Layout> {
        let lead = shape.len().checked_sub(self.dims.len())?;
        let still = |size: &Size| match *size == ONE {
            true => Vec::new(),
            false => vec![Part { extent: size.clone(), stride: Size::Known(0) }],
        };
        let mut dims: Vec<Vec<Part>> = shape[..lead].iter().map(still).collect();
        for (i, size) in shape[lead..].iter().enumerate() {
            dims.push(match self.extent(i) {
                own if own == *size => self.dims[i].clone(),
                own if own == ONE => still(size),
                _ => return None,
            });
        }
        Some(Layout { dims, offset: self.offset.clone() })
    }

    /// `length` elements of a dim from `start` on.
    pub fn sliced(&self, dim: usize, start: Size, length: Size) -> Option<Layout> {
        let mut out = self.clone();
        if self.extent(dim) == length {
            return Some(out);
        }
        let [part] = &self.dims[dim][..] else { return None };
        out.offset = self.offset.clone() + start * part.stride.clone();
        out.dims[dim] = match length == ONE {
            true => Vec::new(),
            false => vec![Part { extent: length, stride: part.stride.clone() }],
        };
        Some(out)
    }

    /// Each `step`-th element of a dim, whose size is known.
    pub fn stepped(&self, dim: usize, step: u64) -> Option<Layout> {
        let mut out = self.clone();
        if step == 1 || self.extent(dim) == ONE {
            return Some(out);
        }
        let [part] = &self.dims[dim][..] else { return None };
        let extent = Size::Known(part.extent.known()?).div_up(step);
        let stride = part.stride.clone() * Size::Known(step);
        out.dims[dim] = if extent == ONE { Vec::new() } else { vec![Part { extent, stride }] };
        Some(out)
    }

    /// The loops that write what is laid out as `from` to where this says, outermost first; `None` where the dims of this
    /// are in parts.
    pub fn loops(&self, from: &Layout) -> Option<Vec<Loop>> {
        let mut loops: Vec<Loop> = Vec::new();
        for (to, from) in self.dims.iter().zip(&from.dims) {
            let mut step = match &to[..] {
                [] if from.is_empty() => continue,
                [one] => one.stride.clone(),
                _ => return None,
            };
            let mut inner = Vec::new();
            for p in from.iter().rev() {
                inner.push(Loop { extent: p.extent.clone(), to: step.clone(), from: p.stride.clone() });
                step = step * p.extent.clone();
            }
            loops.extend(inner.into_iter().rev());
        }
        let mut merged: Vec<Loop> = Vec::new();
        for l in loops {
            let goes_on = |m: &Loop| {
                m.to == l.extent.clone() * l.to.clone() && m.from == l.extent.clone() * l.from.clone()
            };
            match merged.last_mut() {
                Some(m) if goes_on(m) => {
                    *m = Loop { extent: m.extent.clone() * l.extent.clone(), to: l.to, from: l.from };
                }
                _ => merged.push(l),
            }
        }
        Some(merged)
    }
}

/// The ops that only look at their first operand in another way.
const VIEWS: &[&str] = &[
    "onnx.Identity",
    "onnx.Reshape",
    "onnx.Squeeze",
    "onnx.Unsqueeze",
    "onnx.Flatten",
    "onnx.Transpose",
    "onnx.Expand",
    "onnx.Slice",
];

/// Whether `op` is one of these.
pub fn is_view(m: &Module, op: Op) -> bool {
    VIEWS.contains(&m.ops[op].name.as_str())
}

/// Whether the result of `op` is its first operand's elements, all of them and in order.
pub fn is_same(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let shape = |v: Option<Value>| v.and_then(|v| Size::shape(m.ty(v)));
    let (Some(from), Some(to)) = (shape(data.operand(0)), shape(data.result(0))) else { return false };
    is_view(m, op) && applied(m, op, &Layout::contiguous(&from)) == Some(Layout::contiguous(&to))
}

/// The layout of the result of `op`, one of the views, where its operand lies as `layout` says.
pub fn applied(m: &Module, op: Op, layout: &Layout) -> Option<Layout> {
    let data = &m.ops[op];
    let shape = Size::shape(m.ty(data.result(0)?))?;
    match data.name.as_str() {
        "onnx.Transpose" => {
            let rank = layout.dims.len();
            let perm = match data.attrs.ints("perm") {
                Some(perm) => perm.iter().map(|&i| usize::try_from(i).ok()).collect::<Option<Vec<_>>>()?,
                None => (0..rank).rev().collect(),
            };
            layout.transposed(&perm)
        }
        "onnx.Expand" => layout.expanded(&shape),
        "onnx.Slice" => sliced(m, op, layout),
        name if VIEWS.contains(&name) => layout.reshaped(&shape),
        _ => None,
    }
}

fn sliced(m: &Module, op: Op, layout: &Layout) -> Option<Layout> {
    let data = &m.ops[op];
    let dims = m.ty(data.operand(0)?).dims()?;
    let contents =
        |i: usize| -> Option<Vec<Dim>> { Some(m.values[data.operand(i)?].sym.as_deref()?.to_vec()) };
    let (starts, ends) = (contents(1)?, contents(2)?);
    let axes = match data.operand(3) {
        Some(_) => contents(3)?.iter().map(Dim::known).collect::<Option<Vec<_>>>()?,
        None => (0..starts.len() as i64).collect(),
    };
    let steps = match data.operand(4) {
        Some(_) => contents(4)?.iter().map(|s| u64::try_from(s.known()?).ok()).collect::<Option<_>>()?,
        None => vec![1; starts.len()],
    };
    if steps.contains(&0) || [starts.len(), ends.len(), steps.len()].iter().any(|&n| n != axes.len()) {
        return None;
    }
    let mut out = layout.clone();
    for (((&axis, start), end), &step) in axes.iter().zip(&starts).zip(&ends).zip(&steps) {
        let axis = if axis < 0 { axis + dims.len() as i64 } else { axis };
        let axis = usize::try_from(axis).ok().filter(|&a| a < dims.len())?;
        let (start, length) = cut(&dims[axis], start, end)?;
        out = out.sliced(axis, Size::of(&start)?, Size::of(&length)?)?.stepped(axis, step)?;
    }
    Some(out)
}

/// A value seen through views.
#[derive(Clone, Debug)]
pub struct View {
    /// The value whose buffer the elements are in.
    pub root: Value,
    /// Where.
    pub layout: Layout,
    /// The views between, the last one first.
    pub ops: Vec<Op>,
}

/// Where the elements of `v` lie, through as many views as have a layout; `None` where its sizes are not known.
pub fn view(m: &Module, v: Value) -> Option<View> {
    let mut chain = Vec::new();
    let mut root = v;
    while let Some((op, 0)) = m.def_op(root).filter(|&(op, _)| m.const_of(root).is_none() && is_view(m, op)) {
        chain.push(op);
        root = m.ops[op].operand(0)?;
    }
    // From the furthest root on, the first one from which every view has a layout.
    (0..=chain.len()).rev().find_map(|i| {
        let root = if i == 0 { v } else { m.ops[chain[i - 1]].operand(0)? };
        let start = Layout::contiguous(&Size::shape(m.ty(root))?);
        let layout = chain[..i].iter().rev().try_fold(start, |l, &op| applied(m, op, &l))?;
        Some(View { root, layout, ops: chain[..i].to_vec() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(shape: &[u64]) -> Vec<Size> {
        shape.iter().map(|&n| Size::Known(n)).collect()
    }

    fn part(extent: u64, stride: u64) -> Part {
        Part { extent: Size::Known(extent), stride: Size::Known(stride) }
    }

    /// The elements in order, by counting through all parts.
    fn places(l: &Layout) -> Vec<u64> {
        let mut out = vec![l.offset.known().unwrap()];
        for p in l.dims.iter().flatten() {
            let (n, s) = (p.extent.known().unwrap(), p.stride.known().unwrap());
            out = out.iter().flat_map(|&at| (0..n).map(move |i| at + i * s)).collect();
        }
        out
    }

    #[test]
    fn heads_repeated_for_grouped_queries_keep_no_step() {
        // A cache [1, 2, 5, 4] as [1, 5, 2 x 3 x 4].
        let cache = Layout::contiguous(&known(&[1, 2, 5, 4]));
        let l = cache.transposed(&[0, 2, 1, 3]).unwrap();
        let l = l.reshaped(&known(&[1, 5, 2, 1, 4])).unwrap().expanded(&known(&[1, 5, 2, 3, 4])).unwrap();
        let l = l.reshaped(&known(&[1, 5, 24])).unwrap();
        assert_eq!(l.dims[2], [part(2, 20), part(3, 0), part(4, 1)]);
        let heads = l.reshaped(&known(&[1, 5, 6, 4])).unwrap();
        assert_eq!(heads.dims[2], [part(2, 20), part(3, 0)]);
        let expected: Vec<u64> = (0..5)
            .flat_map(|t| (0..6).flat_map(move |h| (0..4).map(move |d| h / 3 * 20 + t * 4 + d)))
            .collect();
        assert_eq!(places(&heads), expected);
    }

    #[test]
    fn what_a_reshape_would_tear_is_refused() {
        let l = Layout::contiguous(&known(&[4, 6])).transposed(&[1, 0]).unwrap();
        assert!(l.reshaped(&known(&[24])).is_some(), "parts stand for a dim");
        assert!(l.reshaped(&known(&[8, 3])).is_none());
        assert!(l.reshaped(&known(&[23])).is_none());
        assert!(Layout::contiguous(&known(&[4, 6])).reshaped(&known(&[2, 6])).is_none(), "elements are left");
        let nothing = Layout::contiguous(&known(&[4, 0, 6]));
        assert!(nothing.reshaped(&known(&[0, 2])).is_some() && nothing.reshaped(&known(&[24])).is_none());
    }

    #[test]
    fn named_dims_split_and_join() {
        let (b, s) = (Size::of(&Dim::Sym("b".into())).unwrap(), Size::of(&Dim::Sym("s".into())).unwrap());
        let l = Layout::contiguous(&[b.clone() * s.clone(), 6.into()]);
        let split = l.reshaped(&[b.clone(), s.clone(), 2.into(), 3.into()]).unwrap();
        assert_eq!(split, Layout::contiguous(&[b.clone(), s.clone(), 2.into(), 3.into()]));
        assert!(l.reshaped(&[b.clone(), 6.into()]).is_none());
        // Past and new positions are one dim.
        let shape = [b.clone(), b.clone() + s.clone(), 2.into(), 3.into()];
        let all = Layout::contiguous(&shape).reshaped(&[b.clone(), b.clone() + s.clone(), 6.into()]).unwrap();
        assert_eq!(all, Layout::contiguous(&[b.clone(), b + s, 6.into()]));
    }

    #[test]
    fn loops_are_as_few_as_can_be() {
        let to = Layout::contiguous(&known(&[2, 5, 3, 4]));
        let from = Layout::contiguous(&known(&[2, 3, 5, 4])).transposed(&[0, 2, 1, 3]).unwrap();
        let size = |l: &Loop| [&l.extent, &l.to, &l.from].map(|s| s.known().unwrap());
        let loops: Vec<_> = to.loops(&from).unwrap().iter().map(size).collect();
        assert_eq!(loops, [[2, 60, 60], [5, 12, 4], [3, 4, 20], [4, 1, 1]]);
        let loops: Vec<_> = to.loops(&to).unwrap().iter().map(size).collect();
        assert_eq!(loops, [[120, 1, 1]]);
        let part = to.sliced(2, 1.into(), 2.into()).unwrap();
        let loops: Vec<_> = part.loops(&part).unwrap().iter().map(size).collect();
        assert_eq!(loops, [[10, 12, 12], [8, 1, 1]]);
        assert_eq!(part.offset, Size::Known(4));
    }
}
