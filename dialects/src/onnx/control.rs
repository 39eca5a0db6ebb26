//! Control flow: If, Loop, Scan. Their bodies are nested regions that see the values around them.

use super::gather::place;
use super::util::{axis, fact};
use crate::ir::{Dim, Region, TensorType, Type};
use crate::map_data;
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, Item, OpDef, OpError};
use crate::tensor::{Data, Tensor};

fn body(attrs: &crate::ir::Attrs, name: &str) -> Result<Region, OpError> {
    attrs.graph(name).ok_or_else(|| OpError::Invalid(format!("the graph {name} is missing")))
}

fn truth(t: &Tensor) -> Result<bool, OpError> {
    match t.bools()? {
        &[b] => Ok(b),
        v => Err(OpError::Invalid(format!("the condition has {} elements, expected one", v.len()))),
    }
}

fn eval_if(cx: &EvalCx) -> Evaluated {
    let branch = if truth(cx.input(0)?)? { "then_branch" } else { "else_branch" };
    (cx.region)(body(cx.attrs, branch)?, Vec::new())
}

/// What is true of a value that is one of two.
fn join(a: &Type, b: &Type) -> Type {
    let dim = |(p, q): (&Dim, &Dim)| if p.same(q) { p.clone() } else { Dim::Unknown };
    match (a, b) {
        (Type::Tensor(x), Type::Tensor(y)) if x.elem == y.elem => {
            let dims = match (&x.dims, &y.dims) {
                (Some(p), Some(q)) if p.len() == q.len() => Some(p.iter().zip(q).map(dim).collect()),
                _ => None,
            };
            Type::Tensor(TensorType { elem: x.elem, dims })
        }
        (Type::Sequence(x), Type::Sequence(y)) => Type::Sequence(Box::new(join(x, y))),
        (Type::Optional(x), Type::Optional(y)) => Type::Optional(Box::new(join(x, y))),
        (a, b) if a == b => a.clone(),
        _ => Type::Unknown,
    }
}

/// A branch that is known not to be taken is not looked at: it may contradict what is known here.
fn infer_if(cx: &InferCx) -> Inferred {
    let branch = |name: &str| (cx.region)(body(cx.attrs, name)?, &[]);
    match cx.ints(0).as_deref() {
        Some([0]) => branch("else_branch"),
        Some([_]) => branch("then_branch"),
        _ => {
            let (a, b) = (branch("then_branch")?, branch("else_branch")?);
            let either = a.into_iter().zip(b).map(|(a, b)| {
                let sym = a.sym.zip(b.sym).filter(|(a, b)| a == b).map(|(a, _)| a);
                Fact { ty: join(&a.ty, &b.ty), sym, konst: None }
            });
            Ok(either.collect())
        }
    }
}

/// Slices of one shape, stacked along a new dim `at`.
fn stack(parts: Vec<Item>, at: i64, what: usize) -> Result<Item, OpError> {
    let none = || OpError::Unsupported(format!("scan output {what} of a loop that does not run once"));
    let first = parts.first().ok_or_else(none)?.tensor()?.clone();
    let at = axis(at, first.rank() + 1)?;
    let outer: usize = first.shape()[..at].iter().product();
    let inner: usize = first.shape()[at..].iter().product();
    let tensors: Vec<&Tensor> = parts.iter().map(Item::tensor).collect::<Result<_, _>>()?;
    if tensors.iter().any(|t| (t.shape(), t.elem()) != (first.shape(), first.elem())) {
        return Err(OpError::Invalid(format!(
            "scan output {what} changes its shape or type between iterations"
        )));
    }
    macro_rules! stack {
        ($($variant:ident)*) => {
            match first.data() {
                $(Data::$variant(_) => {
                    let mut out = Vec::with_capacity(first.len() * tensors.len());
                    for o in 0..outer {
                        for t in &tensors {
                            if let Data::$variant(v) = t.data() {
                                out.extend_from_slice(&v[o * inner..(o + 1) * inner]);
                            }
                        }
                    }
                    Data::$variant(out)
                })*
            }
        };
    }
    let data = stack!(F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 Bool C64 C128 Str);
    let mut shape = first.shape().to_vec();
    shape.insert(at, tensors.len());
    Ok(Tensor::with_elem(first.elem(), &shape, data)?.into())
}

/// Operands: the greatest number of iterations, a condition, the carried values. The body takes the iteration, the
/// condition and the carried values; it gives a condition, the carried values, and slices to be stacked.
fn eval_loop(cx: &EvalCx) -> Evaluated {
    let region = body(cx.attrs, "body")?;
    let limit = match cx.opt(0)? {
        Some(t) => t.to_i64()?.first().copied().ok_or_else(|| OpError::invalid("the trip count is empty"))?,
        None => i64::MAX,
    };
    let mut go = cx.opt(1)?.map(truth).transpose()?.unwrap_or(true);
    let mut carried: Vec<Item> =
        (2..cx.inputs.len()).map(|i| cx.item(i).cloned()).collect::<Result<_, _>>()?;
    let mut scans: Vec<Vec<Item>> = vec![Vec::new(); cx.outputs.saturating_sub(carried.len())];
    let mut i = 0;
    while go && i < limit {
        let args = [Tensor::scalar(i).into(), Tensor::scalar(go).into()].into_iter().chain(carried.clone());
        let mut results = (cx.region)(region, args.collect())?.into_iter();
        let wrong = || OpError::invalid("the body gives too few results");
        go = truth(results.next().ok_or_else(wrong)?.tensor()?)?;
        for c in &mut carried {
            *c = results.next().ok_or_else(wrong)?;
        }
        for s in &mut scans {
            s.push(results.next().ok_or_else(wrong)?);
        }
        i += 1;
    }
    for (n, s) in scans.into_iter().enumerate() {
        carried.push(stack(s, 0, n)?);
    }
    Ok(carried)
}

/// A type with no more than its element type: what is sure of a value that changes from one iteration to the next.
fn loosened(ty: &Type) -> Type {
    match ty {
        Type::Tensor(t) => Type::unranked(t.elem),
        _ => Type::Unknown,
    }
}

fn infer_loop(cx: &InferCx) -> Inferred {
    let carried = 2.min(cx.inputs.len())..cx.inputs.len();
    let n = carried.len();
    let scalar = |elem| fact(elem, Some(Vec::new()), None);
    let mut args = vec![scalar(crate::ir::Elem::I64), scalar(crate::ir::Elem::Bool)];
    args.extend(carried.clone().map(|i| Fact::from(loosened(cx.ty(i)))));
    let results = (cx.region)(body(cx.attrs, "body")?, &args)?;
    // A loop may run no iteration at all: what is carried is then what came in.
    let after = results.iter().skip(1).enumerate().map(|(i, r)| match r.ty.as_tensor() {
        _ if i < n => Fact::from(join(cx.ty(2 + i), &r.ty)),
        Some(t) => {
            let stacked = |d: &Vec<Dim>| std::iter::once(Dim::Unknown).chain(d.iter().cloned()).collect();
            fact(t.elem, t.dims.as_ref().map(stacked), None)
        }
        None => Fact::default(),
    });
    Ok(after.collect())
}

/// Integers of a Scan, one per scanned value: axes or directions, 0 when they are left out.
fn per_value(attrs: &crate::ir::Attrs, name: &str, i: usize) -> i64 {
    attrs.ints(name).and_then(|v| v.get(i)).copied().unwrap_or(0)
}

/// Scan as of opset 9: states, then values that are read slice by slice.
fn eval_scan(cx: &EvalCx) -> Evaluated {
    if cx.opset < 9 {
        return Err(OpError::Unsupported("Scan before opset 9".into()));
    }
    let region = body(cx.attrs, "body")?;
    let (states, scanned) = scan_counts(cx.attrs, cx.inputs.len())?;
    let mut carried: Vec<Item> = (0..states).map(|i| cx.item(i).cloned()).collect::<Result<_, _>>()?;
    let inputs: Vec<(&Tensor, usize)> = (0..scanned)
        .map(|i| {
            let t = cx.input(states + i)?;
            Ok((t, axis(per_value(cx.attrs, "scan_input_axes", i), t.rank())?))
        })
        .collect::<Result<_, OpError>>()?;
    let steps = inputs.first().map_or(0, |(t, a)| t.shape()[*a]);
    if inputs.iter().any(|(t, a)| t.shape()[*a] != steps) {
        return Err(OpError::invalid("scanned values of different lengths"));
    }
    let mut outs: Vec<Vec<Item>> = vec![Vec::new(); cx.outputs.saturating_sub(states)];
    for step in 0..steps {
        let mut args = carried.clone();
        for (i, (t, a)) in inputs.iter().enumerate() {
            let back = per_value(cx.attrs, "scan_input_directions", i) == 1;
            args.push(slice(t, *a, if back { steps - 1 - step } else { step })?);
        }
        let mut results = (cx.region)(region, args)?.into_iter();
        for slot in &mut carried {
            *slot = results.next().ok_or_else(|| OpError::invalid("the body gives too few results"))?;
        }
        for out in &mut outs {
            out.push(results.next().ok_or_else(|| OpError::invalid("the body gives too few results"))?);
        }
    }
    for (i, mut out) in outs.into_iter().enumerate() {
        if per_value(cx.attrs, "scan_output_directions", i) == 1 {
            out.reverse();
        }
        carried.push(stack(out, per_value(cx.attrs, "scan_output_axes", i), i)?);
    }
    Ok(carried)
}

/// How many operands are states, and how many are scanned.
fn scan_counts(attrs: &crate::ir::Attrs, operands: usize) -> Result<(usize, usize), OpError> {
    let n = attrs.int("num_scan_inputs").ok_or_else(|| OpError::invalid("num_scan_inputs is missing"))?;
    let scanned = usize::try_from(n).ok().filter(|&n| n <= operands);
    let scanned =
        scanned.ok_or_else(|| OpError::Invalid(format!("{n} scan inputs of {operands} operands")))?;
    Ok((operands - scanned, scanned))
}

/// Element `i` along dim `a`, which goes.
fn slice(t: &Tensor, a: usize, i: usize) -> Result<Item, OpError> {
    let i = place(i as i64, t.shape()[a])?;
    let (outer, n): (usize, usize) = (t.shape()[..a].iter().product(), t.shape()[a]);
    let inner: usize = t.shape()[a + 1..].iter().product();
    fn pick<T: Clone>(v: &[T], outer: usize, n: usize, inner: usize, i: usize) -> Vec<T> {
        (0..outer).flat_map(|o| v[(o * n + i) * inner..][..inner].iter().cloned()).collect()
    }
    let data = map_data!(t.data(), v => pick(v, outer, n, inner, i));
    let mut shape = t.shape().to_vec();
    shape.remove(a);
    Ok(Tensor::with_elem(t.elem(), &shape, data)?.into())
}

fn infer_scan(cx: &InferCx) -> Inferred {
    if cx.opset < 9 {
        return Ok(Vec::new());
    }
    let (states, scanned) = scan_counts(cx.attrs, cx.inputs.len())?;
    let mut args: Vec<Fact> = (0..states).map(|i| Fact::from(loosened(cx.ty(i)))).collect();
    let mut length = Dim::Unknown;
    for i in 0..scanned {
        let arg = match (cx.elem(states + i), cx.dims(states + i)) {
            (Some(elem), Some(d)) => {
                let a = axis(per_value(cx.attrs, "scan_input_axes", i), d.len())?;
                let mut dims = d.to_vec();
                let n = dims.remove(a);
                length = length.unify(&n).unwrap_or_default();
                fact(elem, Some(dims), None)
            }
            _ => Fact::from(loosened(cx.ty(states + i))),
        };
        args.push(arg);
    }
    let results = (cx.region)(body(cx.attrs, "body")?, &args)?;
    let mut out = Vec::new();
    for (i, r) in results.into_iter().enumerate() {
        out.push(match r.ty.as_tensor() {
            _ if i < states => Fact::from(join(cx.ty(i), &r.ty)),
            Some(TensorType { elem, dims: Some(d) }) => {
                let a = axis(per_value(cx.attrs, "scan_output_axes", i - states), d.len() + 1)?;
                let mut dims = d.clone();
                dims.insert(a, length.clone());
                fact(*elem, Some(dims), None)
            }
            _ => Fact::from(loosened(&r.ty)),
        });
    }
    Ok(out)
}

/// Control flow.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.If", results: (1, usize::MAX), infer: infer_if, eval: eval_if, ..OpDef::NEW },
    OpDef {
        name: "onnx.Loop",
        // The trip count and the condition may both be left out.
        operands: (0, usize::MAX),
        results: (1, usize::MAX),
        infer: infer_loop,
        eval: eval_loop,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.Scan",
        operands: (1, usize::MAX),
        results: (1, usize::MAX),
        infer: infer_scan,
        eval: eval_scan,
        ..OpDef::NEW
    },
];
