//! Sequences and optionals: building them, taking them apart, and SequenceMap, which runs a graph on each element.
//!
//! A position may count from the end. An element of a sequence is a tensor; inference knows of it what all have in
//! common.

use super::gather::place;
use super::movement::{join, part};
use super::util::{axis, fact};
use crate::ir::{Attr, Dim, Elem, Type};
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, Item, OpDef, OpError};
use crate::tensor::Tensor;

/// The type of the elements of a sequence.
fn held(ty: &Type) -> Type {
    match ty {
        Type::Sequence(t) => (**t).clone(),
        _ => Type::Unknown,
    }
}

fn sequence(of: Type) -> Inferred {
    Ok(vec![Type::Sequence(Box::new(of)).into()])
}

fn one_number(t: &Tensor) -> Result<i64, OpError> {
    match t.to_i64()?[..] {
        [n] => Ok(n),
        ref v => Err(OpError::Invalid(format!("the position has {} elements, expected one", v.len()))),
    }
}

/// Operand `i` as a place among `n`; `None` when it is left out.
fn position(cx: &EvalCx, i: usize, n: usize) -> Result<Option<usize>, OpError> {
    cx.opt(i)?.map(|t| place(one_number(t)?, n)).transpose()
}

fn at(cx: &EvalCx) -> Evaluated {
    let items = cx.item(0)?.sequence()?;
    let i = position(cx, 1, items.len())?.ok_or_else(|| OpError::invalid("the position is missing"))?;
    Ok(vec![items[i].clone()])
}

fn empty_elem(attrs: &crate::ir::Attrs) -> Result<Elem, OpError> {
    let code = attrs.int("dtype").unwrap_or(1);
    let elem = i32::try_from(code).ok().and_then(Elem::from_onnx);
    elem.ok_or_else(|| OpError::Invalid(format!("{code} is no element type")))
}

fn construct(cx: &EvalCx) -> Evaluated {
    let items: Vec<Item> = (0..cx.inputs.len()).map(|i| cx.item(i).cloned()).collect::<Result<_, _>>()?;
    check_elements(&items)?;
    Ok(vec![Item::Sequence(items)])
}

/// All elements of a sequence are of one element type.
fn check_elements(items: &[Item]) -> Result<(), OpError> {
    let elem = |i: &Item| i.tensor().map(Tensor::elem);
    let Some(first) = items.first().map(elem).transpose()? else { return Ok(()) };
    for item in items {
        let found = elem(item)?;
        if found != first {
            return Err(OpError::Invalid(format!("a sequence of {first} cannot hold a tensor of {found}")));
        }
    }
    Ok(())
}

fn infer_construct(cx: &InferCx) -> Inferred {
    let types = (0..cx.inputs.len()).map(|i| cx.ty(i).clone());
    let common = types.reduce(|a, b| match (a.join(&b), a.elem().filter(|e| b.elem() == Some(*e))) {
        (Type::Unknown, Some(elem)) => Type::unranked(elem),
        (ty, _) => ty,
    });
    sequence(common.unwrap_or_default())
}

fn erase(cx: &EvalCx) -> Evaluated {
    let mut items = cx.item(0)?.sequence()?.to_vec();
    let last = items.len().checked_sub(1).ok_or_else(|| OpError::invalid("the sequence is empty"))?;
    items.remove(position(cx, 1, items.len())?.unwrap_or(last));
    Ok(vec![Item::Sequence(items)])
}

fn insert(cx: &EvalCx) -> Evaluated {
    let mut items = cx.item(0)?.sequence()?.to_vec();
    // One place more than there are elements: behind the last.
    let i = match cx.opt(2)?.map(one_number).transpose()? {
        Some(n) if n < 0 => place(n, items.len())?,
        Some(n) => place(n, items.len() + 1)?,
        None => items.len(),
    };
    let item = cx.item(1)?.clone();
    if let Some(first) = items.first() {
        check_elements(&[first.clone(), item.clone()])?;
    }
    items.insert(i, item);
    Ok(vec![Item::Sequence(items)])
}

fn infer_insert(cx: &InferCx) -> Inferred {
    let (held, new) = (held(cx.ty(0)), cx.ty(1));
    // The sequence may be empty, or of any shapes.
    sequence(match (held.elem(), new.elem()) {
        (Some(a), Some(b)) if a != b => {
            return Err(OpError::Invalid(format!("a sequence of {a} cannot hold a tensor of {b}")));
        }
        (Some(e), _) | (None, Some(e)) => Type::unranked(e),
        _ => Type::Unknown,
    })
}

/// The sizes of the parts along a dim of `size`: as given by one number for all (the last may be smaller), by a list,
/// or one each.
fn sizes(size: usize, given: Option<(&[i64], bool)>) -> Result<Vec<usize>, OpError> {
    let positive = |n: &i64| usize::try_from(*n).map_err(|_| OpError::Invalid(format!("a part of size {n}")));
    match given {
        None => Ok(vec![1; size]),
        Some((&[n], true)) => {
            let n = positive(&n)?;
            if n == 0 {
                return Err(OpError::invalid("parts of size 0"));
            }
            Ok((0..size.div_ceil(n)).map(|i| n.min(size - i * n)).collect())
        }
        Some((list, _)) => {
            let parts: Vec<usize> = list.iter().map(positive).collect::<Result<_, _>>()?;
            if parts.iter().try_fold(0usize, |n, &p| n.checked_add(p)) != Some(size) {
                return Err(OpError::Invalid(format!("parts of sizes {parts:?} of a dim of {size}")));
            }
            Ok(parts)
        }
    }
}

fn split(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let i = axis(cx.int_or("axis", 0), t.rank())?;
    let given = cx.opt(1)?.map(|s| Ok::<_, OpError>((s.to_i64()?, s.rank() == 0))).transpose()?;
    let sizes = sizes(t.shape()[i], given.as_ref().map(|(v, scalar)| (&v[..], *scalar)))?;
    // Without sizes, parts of one may lose the dim they are cut along.
    let squeeze = given.is_none() && cx.int_or("keepdims", 1) == 0;
    let mut from = 0;
    let mut items = Vec::with_capacity(sizes.len());
    for n in sizes {
        let piece = part(t, i, from, n)?;
        from += n;
        items.push(Item::Tensor(match squeeze {
            true => piece.reshape(&[&t.shape()[..i], &t.shape()[i + 1..]].concat())?,
            false => piece,
        }));
    }
    Ok(vec![Item::Sequence(items)])
}

fn infer_split(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return sequence(Type::Unknown) };
    let Some(d) = cx.dims(0) else { return sequence(Type::unranked(elem)) };
    let (i, mut dims) = (axis(cx.attrs.int("axis").unwrap_or(0), d.len())?, d.to_vec());
    if cx.has(1) {
        dims[i] = Dim::Unknown;
    } else if cx.attrs.int("keepdims").unwrap_or(1) == 0 {
        dims.remove(i);
    } else {
        dims[i] = Dim::Known(1);
    }
    sequence(Type::tensor(elem, dims))
}

fn concat(cx: &EvalCx) -> Evaluated {
    let items = cx.item(0)?.sequence()?;
    let tensors: Vec<&Tensor> = items.iter().map(Item::tensor).collect::<Result<_, _>>()?;
    let Some(first) = tensors.first() else { return Err(OpError::invalid("the sequence is empty")) };
    let along = cx.attrs.int("axis").ok_or_else(|| OpError::invalid("the attribute axis is missing"))?;
    if cx.int_or("new_axis", 0) != 0 {
        return cx.one(stack(&tensors, along)?);
    }
    cx.one(join(&tensors, axis(along, first.rank())?)?)
}

/// Tensors of one shape, at least one, stacked along a new dim.
pub(super) fn stack(tensors: &[&Tensor], along: i64) -> Result<Tensor, OpError> {
    let rank = tensors.first().map_or(0, |t| t.rank());
    let i = axis(along, rank + 1)?;
    let wide = |t: &&Tensor| {
        let mut shape = t.shape().to_vec();
        shape.insert(i.min(shape.len()), 1);
        t.reshape(&shape)
    };
    let wide: Vec<Tensor> = tensors.iter().map(wide).collect::<Result<_, _>>()?;
    join(&wide.iter().collect::<Vec<_>>(), i)
}

fn infer_concat(cx: &InferCx) -> Inferred {
    let held = held(cx.ty(0));
    let (Some(elem), along) = (held.elem(), cx.attrs.int("axis").unwrap_or(0)) else { return Ok(Vec::new()) };
    let Some(d) = held.dims() else { return Ok(vec![Type::unranked(elem).into()]) };
    let mut dims = d.to_vec();
    if cx.attrs.int("new_axis").unwrap_or(0) != 0 {
        dims.insert(axis(along, d.len() + 1)?, Dim::Unknown);
    } else {
        dims[axis(along, d.len())?] = Dim::Unknown;
    }
    Ok(vec![fact(elem, Some(dims), None)])
}

/// Runs the body on the elements of the first sequence, with those of the others at the same place, and with tensors
/// that stay the same.
fn map(cx: &EvalCx) -> Evaluated {
    let body = cx.attrs.graph("body").ok_or_else(|| OpError::invalid("the graph body is missing"))?;
    let n = cx.item(0)?.sequence()?.len();
    let inputs: Vec<&Item> = (0..cx.inputs.len()).map(|i| cx.item(i)).collect::<Result<_, _>>()?;
    let mut lengths = inputs.iter().filter_map(|i| i.sequence().ok()).map(|items| items.len());
    if let Some(found) = lengths.find(|&found| found != n) {
        return Err(OpError::Invalid(format!("sequences of different lengths, {n} and {found}")));
    }
    let mut out: Vec<Vec<Item>> = vec![Vec::with_capacity(n); cx.outputs];
    for i in 0..n {
        let arg =
            |input: &&Item| input.sequence().map_or_else(|_| (*input).clone(), |items| items[i].clone());
        let results = (cx.region)(body, inputs.iter().map(arg).collect())?;
        if results.len() < out.len() {
            return Err(OpError::invalid("the body gives too few results"));
        }
        out.iter_mut().zip(results).for_each(|(out, item)| out.push(item));
    }
    Ok(out.into_iter().map(Item::Sequence).collect())
}

fn infer_map(cx: &InferCx) -> Inferred {
    let body = cx.attrs.graph("body").ok_or_else(|| OpError::invalid("the graph body is missing"))?;
    let args: Vec<Fact> = (0..cx.inputs.len())
        .map(|i| match cx.ty(i) {
            Type::Sequence(t) => (**t).clone().into(),
            _ => cx.fact(i).cloned().unwrap_or_default(),
        })
        .collect();
    let results = (cx.region)(body, &args)?;
    Ok(results.into_iter().map(|f| Type::Sequence(Box::new(f.ty)).into()).collect())
}

/// Wraps a value, or nothing, whose type is then an attribute.
fn optional(cx: &EvalCx) -> Evaluated {
    let held = cx.inputs.first().cloned().flatten();
    if held.is_none() && !matches!(cx.attrs.get("type"), Some(Attr::Type(_))) {
        return Err(OpError::invalid("neither a value nor the attribute type is given"));
    }
    Ok(vec![Item::Optional(held.map(Box::new))])
}

fn infer_optional(cx: &InferCx) -> Inferred {
    let ty = match (cx.fact(0), cx.attrs.get("type")) {
        (Some(f), _) => f.ty.clone(),
        (None, Some(Attr::Type(t))) => t.clone(),
        _ => Type::Unknown,
    };
    Ok(vec![Type::Optional(Box::new(ty)).into()])
}

/// The value in an optional; since opset 18 a value that is none is taken as one that holds it.
fn get_element(cx: &EvalCx) -> Evaluated {
    match cx.item(0)? {
        Item::Optional(Some(item)) => Ok(vec![(**item).clone()]),
        Item::Optional(None) => Err(OpError::invalid("the optional is empty")),
        item => Ok(vec![item.clone()]),
    }
}

fn has_element(cx: &EvalCx) -> Evaluated {
    let empty = matches!(cx.inputs.first(), None | Some(None) | Some(Some(Item::Optional(None))));
    cx.one(Tensor::scalar(!empty))
}

/// Sequences and optionals.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.SequenceAt",
        operands: (2, 2),
        infer: |cx| Ok(vec![held(cx.ty(0)).into()]),
        eval: at,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.SequenceConstruct",
        operands: (1, usize::MAX),
        infer: infer_construct,
        eval: construct,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.SequenceEmpty",
        operands: (0, 0),
        infer: |cx| sequence(Type::unranked(empty_elem(cx.attrs)?)),
        eval: |cx| empty_elem(cx.attrs).map(|_| vec![Item::Sequence(Vec::new())]),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.SequenceErase",
        operands: (1, 2),
        infer: |cx| Ok(vec![cx.ty(0).clone().into()]),
        eval: erase,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.SequenceInsert", operands: (2, 3), infer: infer_insert, eval: insert, ..OpDef::NEW },
    OpDef {
        name: "onnx.SequenceLength",
        infer: |_| Ok(vec![fact(Elem::I64, Some(Vec::new()), None)]),
        eval: |cx| cx.one(Tensor::scalar(cx.item(0)?.sequence()?.len() as i64)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.SequenceMap",
        operands: (1, usize::MAX),
        results: (1, usize::MAX),
        infer: infer_map,
        eval: map,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.SplitToSequence", operands: (1, 2), infer: infer_split, eval: split, ..OpDef::NEW },
    OpDef { name: "onnx.ConcatFromSequence", infer: infer_concat, eval: concat, ..OpDef::NEW },
    OpDef { name: "onnx.Optional", operands: (0, 1), infer: infer_optional, eval: optional, ..OpDef::NEW },
    OpDef {
        name: "onnx.OptionalGetElement",
        infer: |cx| {
            Ok(vec![match cx.ty(0) {
                Type::Optional(t) => (**t).clone().into(),
                ty => ty.clone().into(),
            }])
        },
        eval: get_element,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.OptionalHasElement",
        operands: (0, 1),
        infer: |_| Ok(vec![fact(Elem::Bool, Some(Vec::new()), None)]),
        eval: has_element,
        ..OpDef::NEW
    },
];
