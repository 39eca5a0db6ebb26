//! Movement of elements: Transpose, Expand, Slice, Concat, Split, Pad, ConstantOfShape, as copies from one layout to another.
//!
//! One copy is a nest of loops, its sizes and steps given at run time; the text knows only how many loops there are, how
//! wide an element is, and how the innermost loop steps. The outer loops are counted by units of work.

use super::{Blob, Buffer, Kernel, Lowered, Step};
use crate::fuse::Fused;
use crate::layout::{self, Layout, Loop, View};
use crate::memory;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, vector};
use dialects::ir::{Dim, Module, Op, Value};
use dialects::tensor::Tensor;

/// Elements of a whole contiguous copy that a unit takes.
const CHUNK: usize = 4096;

/// Known sizes; for Concat and Split along any axis.
pub fn supports(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let moved = |v: Value| {
        Size::shape(m.ty(v)).is_some() && m.ty(v).elem().is_some_and(|e| memory::size(e).is_some())
    };
    let results = data.results.iter().flatten().all(|&v| moved(v));
    let operand = |i: usize| data.operand(i).is_some_and(moved);
    match data.name.as_str() {
        "onnx.Concat" => results && (0..data.operands.len()).all(operand) && axis(m, op).is_some(),
        "onnx.ConstantOfShape" => results && filling(m, op).is_some(),
        "onnx.Pad" => results && operand(0) && padding(m, op).is_some(),
        "onnx.Split" => {
            results && operand(0) && axis(m, op).is_some() && data.results.iter().all(Option::is_some)
        }
        _ => {
            let from = data.operand(0).filter(|_| operand(0)).and_then(|v| Size::shape(m.ty(v)));
            results && from.is_some_and(|s| layout::applied(m, op, &Layout::contiguous(&s)).is_some())
        }
    }
}

/// The views that operands are read through.
pub fn views(m: &Module, op: Op) -> Vec<View> {
    let data = &m.ops[op];
    let count = match data.name.as_str() {
        "onnx.Concat" => data.operands.len(),
        "onnx.ConstantOfShape" => 0,
        _ => 1,
    };
    (0..count).filter_map(|i| layout::view(m, data.operand(i)?)).collect()
}

/// The axis that values are joined or cut along.
fn axis(m: &Module, op: Op) -> Option<usize> {
    let data = &m.ops[op];
    let rank = m.ty(data.result(0)?).dims()?.len();
    let default = if data.is("onnx.Split") { Some(0) } else { None };
    let axis = data.attrs.int("axis").or(default)?;
    usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok().filter(|&a| a < rank)
}

/// A constant, if it is none that is zero, and how much of it stands before each dim.
type Padding = (Option<Value>, Vec<(usize, Size)>);

/// The constant that Pad puts around its operand, none being zero, and how much of it before each dim.
fn padding(m: &Module, op: Op) -> Option<Padding> {
    let data = &m.ops[op];
    let rank = m.ty(data.operand(0)?).dims()?.len();
    let list = |i: usize| -> Option<Vec<i64>> {
        Some(Tensor::from_const(&m.consts[m.const_of(data.operand(i)?)?]).ok()?.to_i64().ok()?.into_owned())
    };
    let contents = |i: usize| -> Option<Vec<i64>> {
        let sym = data.operand(i).and_then(|v| m.values[v].sym.as_deref());
        list(i).or_else(|| sym?.iter().map(Dim::known).collect())
    };
    // Before opset 11 attributes said it.
    let pads = match data.operand(1) {
        Some(_) => contents(1)?,
        None => data.attrs.ints("pads")?.to_vec(),
    };
    let axes = match data.operand(3) {
        Some(_) => contents(3)?,
        None => (0..rank as i64).collect(),
    };
    let constant = data.attrs.str("mode").is_none_or(|mode| mode == "constant");
    let value = data.operand(2);
    let fits = constant
        && pads.len() == 2 * axes.len()
        && pads.iter().all(|&p| p >= 0)
        && data.attrs.get("value").is_none()
        && value.is_none_or(|v| m.ty(v).elem() == m.ty(data.operand(0).expect("seen above")).elem());
    let begin = axes.iter().zip(&pads).map(|(&axis, &begin)| {
        let axis = usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok();
        Some((axis.filter(|&a| a < rank)?, Size::Known(begin as u64)))
    });
    let begin = begin.collect::<Option<Vec<_>>>().filter(|_| fits)?;
    Some((value, begin))
}

/// The bytes of what ConstantOfShape gives.
fn filling(m: &Module, op: Op) -> Option<Vec<u8>> {
    let data = &m.ops[op];
    match data.attrs.tensor("value") {
        Some(c) => {
            let t = Tensor::from_const(&m.consts[c]).ok()?;
            (t.len() == 1).then(|| memory::bytes(&t).map(<[u8]>::to_vec))?
        }
        None => data.attrs.get("value").is_none().then(|| 0f32.to_le_bytes().to_vec()),
    }
}

/// What is copied.
enum Source {
    /// Elements of a value.
    Value(Value, Layout),
    /// A value of one element.
    Filling(Value),
    /// The bytes of an element.
    Number(Vec<u8>),
}

/// The copies: for each, what is read and how, and the result that is written and how.
fn copies(fused: &Fused) -> Option<Vec<(Source, usize, Layout)>> {
    let (m, op) = (fused.module, fused.anchor()?);
    let data = &m.ops[op];
    let results: Vec<Layout> = data
        .results
        .iter()
        .flatten()
        .map(|&v| Some(Layout::contiguous(&fused.shape(v)?)))
        .collect::<Option<_>>()?;
    match data.name.as_str() {
        "onnx.Concat" => {
            let axis = axis(m, op)?;
            let mut start = Size::Known(0);
            let mut out = Vec::new();
            for &v in data.operands.iter().flatten() {
                let View { root, layout: from, .. } = layout::view(m, v)?;
                let length = from.extent(axis);
                out.push((Source::Value(root, from), 0, part(&results[0], axis, &start, &length)?));
                start = start + length;
            }
            (start == results[0].extent(axis)).then_some(out)
        }
        "onnx.ConstantOfShape" => {
            Some(vec![(Source::Number(filling(m, op)?), 0, results.into_iter().next()?)])
        }
        "onnx.Pad" => {
            let View { root, layout: from, .. } = layout::view(m, data.operand(0)?)?;
            let (value, begin) = padding(m, op)?;
            let width = memory::size(m.ty(root).elem()?)? as usize;
            let around = || value.map_or_else(|| Source::Number(vec![0; width]), Source::Filling);
            let mut inner = results.into_iter().next()?;
            let mut out = Vec::new();
            // Around the dims before, what is left of this one: all of it before and behind the operand.
            for (axis, before) in begin {
                let length = from.extent(axis);
                let end = before.clone() + length.clone();
                let behind = inner.extent(axis).minus(&end)?;
                for (start, length) in [(Size::Known(0), before.clone()), (end, behind)] {
                    if length != Size::Known(0) {
                        out.push((around(), 0, part(&inner, axis, &start, &length)?));
                    }
                }
                inner = part(&inner, axis, &before, &length)?;
            }
            out.push((Source::Value(root, from), 0, inner));
            Some(out)
        }
        "onnx.Split" => {
            let axis = axis(m, op)?;
            let View { root, layout: from, .. } = layout::view(m, data.operand(0)?)?;
            let mut start = Size::Known(0);
            let mut out = Vec::new();
            for (i, to) in results.into_iter().enumerate() {
                let length = to.extent(axis);
                out.push((Source::Value(root, part(&from, axis, &start, &length)?), i, to));
                start = start + length;
            }
            (start == from.extent(axis)).then_some(out)
        }
        _ => {
            let View { root, layout: from, .. } = layout::view(m, data.result(0)?)?;
            Some(vec![(Source::Value(root, from), 0, results.into_iter().next()?)])
        }
    }
}

/// A part of a dim, where a dim of one element is the whole of it.
fn part(of: &Layout, axis: usize, start: &Size, length: &Size) -> Option<Layout> {
    of.sliced(axis, start.clone(), length.clone())
}

/// One kernel for each value that is read or written. Buffers: what is read, what is written.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let mut lowered = Lowered::default();
    // One element again and again.
    let one = |to: &Layout| {
        let shape: Vec<Size> = (0..to.dims.len()).map(|i| to.extent(i)).collect();
        Layout::contiguous(&[]).expanded(&shape)
    };
    for (source, result, to) in copies(fused)? {
        let width = memory::size(fused.module.ty(fused.results()[result]).elem()?)? as usize;
        let (buffer, from) = match source {
            Source::Value(root, from) => (fused.buffer(root, &mut lowered.blobs)?, from),
            Source::Filling(value) => (fused.buffer(value, &mut lowered.blobs)?, one(&to)?),
            Source::Number(bytes) => {
                lowered.blobs.push(Blob { bytes: bytes.into() });
                (Buffer::Blob(lowered.blobs.len() - 1), one(&to)?)
            }
        };
        let step = step(target, width, (buffer, &from), (Buffer::Result(result), &to))?;
        lowered.steps.push(step);
    }
    Some(lowered)
}

/// How the innermost loop steps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inner {
    /// From one element to the next on both sides.
    Run,
    /// One element again and again.
    Repeat,
    /// Anyhow.
    Stride,
}

/// A copy of elements of `width` bytes.
pub fn step(target: &Target, width: usize, from: (Buffer, &Layout), to: (Buffer, &Layout)) -> Option<Step> {
    let mut loops = to.1.loops(from.1)?;
    if loops.is_empty() {
        loops.push(Loop { extent: Size::Known(1), to: Size::Known(1), from: Size::Known(1) });
    }
    let last = loops.last().expect("one at least");
    let inner = match (last.to.known(), last.from.known()) {
        (Some(1), Some(1)) => Inner::Run,
        (Some(1), Some(0)) => Inner::Repeat,
        _ => Inner::Stride,
    };
    let count = loops.len();
    let whole = count == 1 && inner == Inner::Run;
    let elem = match width {
        1 => Scalar::I8,
        2 => Scalar::I16,
        4 => Scalar::I32,
        8 => Scalar::I64,
        _ => return None,
    };
    let mut dims: Vec<Size> = vec![from.1.offset.clone(), to.1.offset.clone()];
    dims.extend(loops.iter().flat_map(|l| [l.extent.clone(), l.to.clone(), l.from.clone()]));
    let kernel = Kernel::new(target, "copy", |b, a| {
        let (source, result) = (a.buffer(b, 0), a.buffer(b, 1));
        let (first, start) = (a.dim(b, 0), a.dim(b, 1));
        let (source, result) = (b.element(source, first, elem), b.element(result, start, elem));
        let sizes: Vec<[Val; 3]> = (0..count).map(|i| [0, 1, 2].map(|j| a.dim(b, 2 + 3 * i + j))).collect();
        let [extent, to_step, from_step] = sizes[count - 1];
        let zero = b.size(0);
        if whole {
            let chunk = b.size(CHUNK);
            let (begin, end) = (b.mul(a.begin, chunk), b.mul(a.end, chunk));
            let end = b.min(end, extent);
            return run(b, elem, source, result, begin, end);
        }
        b.each(a.begin, a.end, 1, |b, unit| {
            let (mut left, mut from, mut to) = (unit, zero, zero);
            for (i, [extent, to_step, from_step]) in sizes[..count - 1].iter().enumerate().rev() {
                let index = if i == 0 { left } else { b.rem(left, *extent) };
                if i > 0 {
                    left = b.div(left, *extent);
                }
                let (f, t) = (b.mul(index, *from_step), b.mul(index, *to_step));
                (from, to) = (b.add(from, f), b.add(to, t));
            }
            let (source, result) = (b.element(source, from, elem), b.element(result, to, elem));
            match inner {
                Inner::Run => run(b, elem, source, result, zero, extent),
                Inner::Repeat => {
                    let v = b.load(source, scalar(elem));
                    let lanes = b.target.lanes() * 4 / width;
                    let wide = b.broadcast(v, lanes);
                    super::elementwise::vector_loop(b, zero, extent, lanes, |b, i, lanes| {
                        let at = b.element(result, i, elem);
                        b.store(if lanes == 0 { v } else { wide }, at);
                    });
                }
                Inner::Stride => b.each(zero, extent, 1, |b, i| {
                    let (f, t) = (b.mul(i, from_step), b.mul(i, to_step));
                    let at = b.element(source, f, elem);
                    let v = b.load(at, scalar(elem));
                    let at = b.element(result, t, elem);
                    b.store(v, at);
                }),
            }
        });
    });
    let outer = Size::product(loops[..count - 1].iter().map(|l| &l.extent));
    let extent = loops[count - 1].extent.clone();
    let (units, work) = match whole {
        true => (extent.div_up(CHUNK as u64), Size::from(CHUNK / 2)),
        // An element that is not read with its neighbours costs about a nanosecond, others half of one, out of the caches.
        false if inner == Inner::Stride => (outer, extent + 4.into()),
        false => (outer, extent.div_up(2) + 4.into()),
    };
    Some(Step { kernel, buffers: vec![from.0, to.0], dims, units, work })
}

/// Elements `from..to` of one buffer into the other.
fn run(b: &mut Body, elem: Scalar, source: Val, result: Val, from: Val, to: Val) {
    let lanes = b.target.lanes() * 4 / elem.bytes();
    super::elementwise::vector_loop(b, from, to, lanes, |b, i, lanes| {
        let ty = if lanes == 0 { scalar(elem) } else { vector(lanes, elem) };
        let at = b.element(source, i, elem);
        let v = b.load(at, ty);
        let at = b.element(result, i, elem);
        b.store(v, at);
    });
}
