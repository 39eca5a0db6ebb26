//! Pad, in all its modes, cropping included, and CenterCropPad.
//!
//! Each dim has a map from places of the result to places of the operand, or to the constant.

use super::util::{Ints, axes, fact, infer_ints, ints_or, moved, shape_of};
use crate::ir::{Attrs, Dim, Elem};
use crate::kernels::strided::{count, strides};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};

/// Where each place of the result along one dim of `size` comes from; `None` is the constant.
fn sources(size: usize, before: i64, len: usize, mode: &str) -> Result<Vec<Option<usize>>, OpError> {
    let n = size as i64;
    let at = |i: usize| i as i64 - before;
    let inside = |j: i64| (0..n).contains(&j).then_some(j as usize);
    let all = 0..len;
    match mode {
        "constant" => Ok(all.map(|i| inside(at(i))).collect()),
        _ if n == 0 && len > 0 => Err(OpError::Invalid(format!("an empty dim cannot be padded by {mode}"))),
        "edge" => Ok(all.map(|i| Some(at(i).clamp(0, n - 1) as usize)).collect()),
        "wrap" => Ok(all.map(|i| Some(at(i).rem_euclid(n) as usize)).collect()),
        "reflect" => {
            // A mirror at either end, without repeating the border, has this period.
            let period = (2 * n - 2).max(1);
            let fold = |j: i64| if j < n { j } else { period - j };
            Ok(all.map(|i| Some(fold(at(i).rem_euclid(period)) as usize)).collect())
        }
        other => {
            Err(OpError::Invalid(format!("mode is {other:?}, expected constant, edge, reflect or wrap")))
        }
    }
}

/// The elements of `x` that `maps` name, dim by dim.
fn padded<T: Clone>(x: &[T], shape: &[usize], maps: &[Vec<Option<usize>>], value: T) -> Vec<T> {
    let Some((last, outer)) = maps.split_last() else { return x.to_vec() };
    let own = strides(shape);
    let mut out = Vec::with_capacity(maps.iter().map(Vec::len).product());
    let mut at = vec![0usize; outer.len()];
    for _ in 0..outer.iter().map(Vec::len).product::<usize>() {
        let place = |d: usize| outer[d][at[d]].map(|p| p * own[d] as usize);
        match (0..outer.len()).map(place).try_fold(0, |n, p| Some(n + p?)) {
            Some(row) => {
                out.extend(last.iter().map(|p| p.map_or_else(|| value.clone(), |p| x[row + p].clone())))
            }
            None => out.resize(out.len() + last.len(), value.clone()),
        }
        for d in (0..outer.len()).rev() {
            at[d] += 1;
            if at[d] < outer[d].len() {
                break;
            }
            at[d] = 0;
        }
    }
    out
}

/// The tensor whose element at each place is the element of `t` that `maps` name, dim by dim; `value`, or zero, where
/// one of them names none. `value` has one element of the type of `t`.
pub(crate) fn placed(t: &Tensor, maps: &[Vec<Option<usize>>], value: Option<&Tensor>) -> Evaluated {
    let shape: Vec<usize> = maps.iter().map(Vec::len).collect();
    count(&shape)?;
    macro_rules! pad {
        ($($variant:ident)*) => {
            match t.data() {
                $(Data::$variant(v) => {
                    let value = match value.map(Tensor::data) {
                        Some(Data::$variant(c)) => c[0].clone(),
                        _ => Default::default(),
                    };
                    Data::$variant(padded(v, t.shape(), maps, value))
                })*
            }
        };
    }
    moved(t, &shape, pad!(F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 Bool C64 C128 Str))
}

/// The amounts are an attribute before opset 11; the dims they are for can be chosen from opset 18 on.
fn eval(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let old = if cx.attrs.ints("paddings").is_some() { "paddings" } else { "pads" };
    let pads = ints_or(cx, old, 1)?.ok_or_else(|| OpError::invalid("pads are missing"))?;
    let along = match cx.opt(3)? {
        Some(v) => axes(&v.to_i64()?, t.rank())?,
        None => (0..t.rank()).collect(),
    };
    if pads.len() != 2 * along.len() {
        return Err(OpError::Invalid(format!("{} pads for {} dims", pads.len(), along.len())));
    }
    let mode = cx.attrs.str("mode").unwrap_or("constant");
    let mut shape = t.shape().to_vec();
    let mut before = vec![0i64; t.rank()];
    for (j, &i) in along.iter().enumerate() {
        let (b, e) = (pads[j], pads[along.len() + j]);
        before[i] = b;
        let size = (shape[i] as i64).checked_add(b).and_then(|n| n.checked_add(e));
        let size = size.and_then(|n| usize::try_from(n).ok());
        shape[i] =
            size.ok_or_else(|| OpError::Invalid(format!("pads {b} and {e} of a dim of {}", shape[i])))?;
    }
    count(&shape)?;
    let maps: Vec<_> =
        (0..t.rank()).map(|i| sources(t.shape()[i], before[i], shape[i], mode)).collect::<Result<_, _>>()?;
    let value = match (cx.opt(2)?, cx.attrs.float("value")) {
        (Some(v), _) if v.len() == 1 && v.elem() == t.elem() => Some(v.clone()),
        (Some(v), _) => {
            return Err(OpError::Invalid(format!("the constant is {} elements of {}", v.len(), v.elem())));
        }
        (None, Some(x)) => {
            Some(super::cast::convert(&Tensor::from_f32(Elem::F32, &[], vec![x])?, t.elem(), true)?)
        }
        (None, None) => None,
    };
    placed(t, &maps, value.as_ref())
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let Some(d) = cx.dims(0) else { return Ok(vec![fact(elem, None, None)]) };
    let pads = match cx.attrs.ints("pads").or(cx.attrs.ints("paddings")) {
        Some(v) => Some(v.iter().map(|&n| Dim::Known(n)).collect()),
        None => cx.sym(1).map(<[Dim]>::to_vec),
    };
    let along = match infer_ints(cx, "", 3) {
        Ints::Absent => Some((0..d.len()).collect()),
        Ints::Known(v) => Some(axes(&v, d.len())?),
        Ints::Unknown => None,
    };
    let mut dims = d.to_vec();
    match (pads, along) {
        (Some(pads), Some(along)) if pads.len() == 2 * along.len() => {
            for (j, &i) in along.iter().enumerate() {
                dims[i] = dims[i].add(&pads[j].add(&pads[along.len() + j]));
            }
        }
        (Some(pads), Some(along)) => {
            return Err(OpError::Invalid(format!("{} pads for {} dims", pads.len(), along.len())));
        }
        (_, Some(along)) => along.iter().for_each(|&i| dims[i] = Dim::Unknown),
        (_, None) => dims.fill(Dim::Unknown),
    }
    Ok(vec![fact(elem, Some(dims), None)])
}

/// Which dims CenterCropPad resizes.
fn centered(attrs: &Attrs, rank: usize, given: usize) -> Result<Vec<usize>, OpError> {
    let along = match attrs.ints("axes") {
        Some(v) => axes(v, rank)?,
        None => (0..rank).collect(),
    };
    match along.len() == given {
        true => Ok(along),
        false => Err(OpError::Invalid(format!("{given} sizes for {} dims", along.len()))),
    }
}

/// The middle of the operand, or the operand in the middle of zeros. An odd cell is cut off or added behind.
fn eval_center(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let sizes = shape_of(&cx.input(1)?.to_i64()?)?;
    let mut shape = t.shape().to_vec();
    centered(cx.attrs, t.rank(), sizes.len())?.iter().zip(sizes).for_each(|(&i, n)| shape[i] = n);
    count(&shape)?;
    let before =
        |own: usize, n: usize| if n < own { -(((own - n) / 2) as i64) } else { ((n - own) / 2) as i64 };
    let maps = t.shape().iter().zip(&shape).map(|(&own, &n)| sources(own, before(own, n), n, "constant"));
    placed(t, &maps.collect::<Result<Vec<_>, _>>()?, None)
}

fn infer_center(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let Some(d) = cx.dims(0) else { return Ok(vec![fact(elem, None, None)]) };
    let mut dims = d.to_vec();
    match cx.sym(1) {
        Some(sizes) => {
            let along = centered(cx.attrs, d.len(), sizes.len())?;
            along.iter().zip(sizes).for_each(|(&i, n)| dims[i] = n.clone());
        }
        None => match cx.attrs.ints("axes") {
            Some(v) => axes(v, d.len())?.iter().for_each(|&i| dims[i] = Dim::Unknown),
            None => dims.fill(Dim::Unknown),
        },
    }
    Ok(vec![fact(elem, Some(dims), None)])
}

/// Pad and CenterCropPad.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.Pad", operands: (1, 4), infer, eval, ..OpDef::NEW },
    OpDef {
        name: "onnx.CenterCropPad",
        operands: (2, 2),
        infer: infer_center,
        eval: eval_center,
        ..OpDef::NEW
    },
];
