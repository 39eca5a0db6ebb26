//! What the ops of this dialect share: axes, broadcasting of symbolic shapes, and building facts.

use crate::ir::{Dim, Elem, Type};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, MAX_SYM, OpError};
use crate::tensor::{Data, Tensor};
use std::borrow::Cow;

/// `axis` counted from the front; a negative one counts from the end.
pub fn axis(axis: i64, rank: usize) -> Result<usize, OpError> {
    let r = rank as i64;
    if axis < -r || axis >= r {
        return Err(OpError::Invalid(format!("axis {axis} is out of range for rank {rank}")));
    }
    Ok((if axis < 0 { axis + r } else { axis }) as usize)
}

/// All of `axes` counted from the front. None may occur twice.
pub fn axes(axes: &[i64], rank: usize) -> Result<Vec<usize>, OpError> {
    let out: Vec<usize> = axes.iter().map(|&a| axis(a, rank)).collect::<Result<_, _>>()?;
    match (1..out.len()).find(|&i| out[..i].contains(&out[i])) {
        Some(i) => Err(OpError::Invalid(format!("axis {} is given twice in {axes:?}", axes[i]))),
        None => Ok(out),
    }
}

/// Dims as text, for messages.
pub fn show(dims: &[Dim]) -> String {
    let names: Vec<String> = dims.iter().map(Dim::to_string).collect();
    format!("[{}]", names.join(", "))
}

/// The dims that shapes broadcast to.
pub fn broadcast_dims(shapes: &[&[Dim]]) -> Result<Vec<Dim>, OpError> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![Dim::Known(1); rank];
    for shape in shapes {
        let lead = rank - shape.len();
        for (o, d) in out[lead..].iter_mut().zip(*shape) {
            *o = o.broadcast(d).ok_or_else(|| {
                let all: Vec<String> = shapes.iter().map(|s| show(s)).collect();
                OpError::Invalid(format!("the shapes {} do not broadcast", all.join(" and ")))
            })?;
        }
    }
    Ok(out)
}

/// One result of this element type and these dims. Nothing is known when the element type is not.
pub fn one(elem: Option<Elem>, dims: Option<Vec<Dim>>) -> Inferred {
    Ok(elem.map(|e| fact(e, dims, None)).into_iter().collect())
}

/// A fact; `sym` is kept only for the types that small contents are followed for.
pub fn fact(elem: Elem, dims: Option<Vec<Dim>>, sym: Option<Vec<Dim>>) -> Fact {
    let ty = match dims {
        Some(dims) => Type::tensor(elem, dims),
        None => Type::unranked(elem),
    };
    let followed = matches!(elem, Elem::I64 | Elem::I32 | Elem::Bool);
    let sym = sym.filter(|s| followed && s.len() as u64 <= MAX_SYM).map(Into::into);
    Fact { ty, sym, konst: None }
}

/// The shape of operand `i` as numbers.
pub fn known_shape(cx: &InferCx, i: usize) -> Option<Vec<usize>> {
    cx.ty(i).as_tensor()?.known_shape()
}

/// The small contents of operand `i` with its shape.
pub fn sym<'a>(cx: &InferCx<'a>, i: usize) -> Option<(&'a [Dim], Vec<usize>)> {
    let (sym, shape) = (cx.sym(i)?, known_shape(cx, i)?);
    (shape.iter().product::<usize>() == sym.len()).then_some((sym, shape))
}

/// The number of elements of a small tensor, or `None` when it is too large to be followed.
pub fn small_count(shape: &[usize]) -> Option<usize> {
    let n = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    (n as u64 <= MAX_SYM).then_some(n)
}

/// The result has the type of the first operand.
pub fn same_type(cx: &InferCx) -> Inferred {
    Ok(vec![cx.ty(0).clone().into()])
}

/// The facts of an elementwise op of broadcast operands `range`, with results of type `elem`.
pub fn broadcast(cx: &InferCx, elem: Option<Elem>, range: std::ops::Range<usize>) -> Inferred {
    let dims: Option<Vec<&[Dim]>> = range.map(|i| cx.dims(i)).collect();
    one(elem, dims.map(|d| broadcast_dims(&d)).transpose()?)
}

/// Small contents of an elementwise op of the operands 0 and 1.
pub fn sym2(cx: &InferCx, f: fn(&Dim, &Dim) -> Dim) -> Option<Vec<Dim>> {
    let ((a, sa), (b, sb)) = (sym(cx, 0)?, sym(cx, 1)?);
    let shape = strided::broadcast_shape(&[&sa, &sb]).ok()?;
    small_count(&shape)?;
    Some(strided::map2((a, &sa), (b, &sb), &shape, f))
}

/// The integers of the attribute `name`, or else of operand `i`: how an op takes its axes before and after the
/// opset that made them an operand. `None` when neither is there.
pub fn ints_or<'a>(cx: &EvalCx<'a>, name: &str, i: usize) -> Result<Option<Cow<'a, [i64]>>, OpError> {
    match cx.attrs.ints(name) {
        Some(v) => Ok(Some(Cow::Borrowed(v))),
        None => Ok(cx.opt(i)?.map(Tensor::to_i64).transpose()?),
    }
}

/// Integers that inference looks for.
pub enum Ints {
    /// The op does not have them.
    Absent,
    /// They are computed at run time.
    Unknown,
    /// These.
    Known(Vec<i64>),
}

/// What [`ints_or`] finds, as far as inference knows.
pub fn infer_ints(cx: &InferCx, name: &str, i: usize) -> Ints {
    match (cx.attrs.ints(name), cx.has(i), cx.ints(i)) {
        (Some(v), ..) => Ints::Known(v.to_vec()),
        (None, false, _) => Ints::Absent,
        (None, true, None) => Ints::Unknown,
        (None, true, Some(v)) => Ints::Known(v),
    }
}

/// A shape of non-negative sizes from integers.
pub fn shape_of(sizes: &[i64]) -> Result<Vec<usize>, OpError> {
    let size = |&n: &i64| usize::try_from(n).map_err(|_| OpError::Invalid(format!("negative size {n}")));
    sizes.iter().map(size).collect()
}

/// A result with the element type of `like`, for ops that only move elements.
pub fn moved(like: &Tensor, shape: &[usize], data: Data) -> Evaluated {
    Ok(vec![Tensor::with_elem(like.elem(), shape, data)?.into()])
}

/// The error for an element type that an op does not work on.
pub fn wrong_elem(expected: &str, found: &Tensor) -> OpError {
    let expected = expected.to_string();
    crate::tensor::TensorError::Elem { expected, found: found.elem() }.into()
}
