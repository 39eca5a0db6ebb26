//! Control flow: If, Loop, Scan. Their bodies are nested regions that see the values around them.

use super::movement::{join, part};
use super::sequence::stack;
use super::util::{axis, fact};
use crate::ir::{Dim, Region, TensorType, Type};
use crate::kernels::strided::count;
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, Item, OpDef, OpError};
use crate::tensor::Tensor;

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
                Fact { ty: a.ty.join(&b.ty), sym, konst: None }
            });
            Ok(either.collect())
        }
    }
}

/// The slices that the iterations of a loop give for one result.
struct Scanned {
    parts: Vec<Tensor>,
    /// Elements in all of them.
    total: usize,
}

impl Scanned {
    fn new() -> Scanned {
        Scanned { parts: Vec::new(), total: 0 }
    }

    fn push(&mut self, item: Item, what: usize) -> Result<(), OpError> {
        let t = item.tensor()?.clone();
        if let Some(first) = self.parts.first()
            && (first.shape(), first.elem()) != (t.shape(), t.elem())
        {
            let (a, b) = (item_type(first), item_type(&t));
            return Err(OpError::Invalid(format!(
                "scan output {what} is {a} first, but {b} in a later iteration"
            )));
        }
        self.total = self.total.saturating_add(t.len());
        // What is stacked at the end must fit into memory all the way there.
        count(&[self.total])?;
        self.parts.push(t);
        Ok(())
    }

    /// The slices along a new dim. Without any, the type of the body's result says of what there are none: a size
    /// that it does not say is 0, as in ONNX Runtime.
    fn stack(self, at: i64, what: usize, ty: Option<&Type>) -> Result<Item, OpError> {
        if !self.parts.is_empty() {
            return Ok(stack(&self.parts.iter().collect::<Vec<_>>(), at)?.into());
        }
        let none = || {
            let what = format!(
                "scan output {what} of a loop that does not run once, whose shape the body does not say"
            );
            OpError::Unsupported(what)
        };
        let (elem, dims) = ty.and_then(|t| Some((t.elem()?, t.dims()?))).ok_or_else(none)?;
        let size = |d: &Dim| d.known().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let mut shape: Vec<usize> = dims.iter().map(size).collect();
        shape.insert(axis(at, shape.len() + 1)?, 0);
        Ok(Tensor::zeros(elem, &shape)?.into())
    }
}

fn item_type(t: &Tensor) -> Type {
    Type::of_shape(t.elem(), t.shape())
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
    let n = carried.len();
    let mut scans: Vec<Scanned> = (n..cx.outputs).map(|_| Scanned::new()).collect();
    let mut i = 0;
    while go && i < limit {
        if i as u64 >= cx.max_iterations {
            return Err(OpError::Invalid(format!("the loop has not ended after {i} iterations")));
        }
        let args = [Tensor::scalar(i).into(), Tensor::scalar(go).into()].into_iter().chain(carried);
        let mut results = (cx.region)(region, args.collect())?.into_iter();
        let wrong = || OpError::invalid("the body gives too few results");
        go = truth(results.next().ok_or_else(wrong)?.tensor()?)?;
        carried = results.by_ref().take(n).collect();
        if carried.len() < n {
            return Err(wrong());
        }
        // A sequence that grows from one iteration to the next must fit into memory as a tensor must.
        for items in carried.iter().filter_map(|c| c.sequence().ok()) {
            let held = items.iter().map(|i| i.tensor().map_or(0, Tensor::len));
            count(&[held.fold(0, usize::saturating_add)])?;
        }
        for (what, s) in scans.iter_mut().enumerate() {
            s.push(results.next().ok_or_else(wrong)?, what)?;
        }
        i += 1;
    }
    let types = (cx.results_of)(region);
    for (what, s) in scans.into_iter().enumerate() {
        carried.push(s.stack(0, what, types.get(1 + n + what))?);
    }
    Ok(carried)
}

/// A type with no more than its element type: what is sure of a value that changes from one iteration to the next.
fn loosened(ty: &Type) -> Type {
    match ty {
        Type::Tensor(t) => Type::unranked(t.elem),
        Type::Sequence(t) => Type::Sequence(Box::new(loosened(t))),
        Type::Optional(t) => Type::Optional(Box::new(loosened(t))),
        _ => Type::Unknown,
    }
}

/// What is true of a carried value after any number of iterations, none included.
fn carried(before: &Type, after: &Type) -> Fact {
    match (before.join(after), before.elem().filter(|e| after.elem() == Some(*e))) {
        (Type::Unknown, Some(elem)) => Type::unranked(elem).into(),
        (ty, _) => ty.into(),
    }
}

fn infer_loop(cx: &InferCx) -> Inferred {
    let operands = 2.min(cx.inputs.len())..cx.inputs.len();
    let n = operands.len();
    let scalar = |elem| fact(elem, Some(Vec::new()), None);
    let mut args = vec![scalar(crate::ir::Elem::I64), scalar(crate::ir::Elem::Bool)];
    args.extend(operands.map(|i| Fact::from(loosened(cx.ty(i)))));
    let results = (cx.region)(body(cx.attrs, "body")?, &args)?;
    let after = results.iter().skip(1).enumerate().map(|(i, r)| match r.ty.as_tensor() {
        _ if i < n => carried(cx.ty(2 + i), &r.ty),
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

/// The value that a Scan reads slice by slice, the dim it goes along, and whether backwards.
type Read = (Tensor, usize, bool);

/// Runs the body of a Scan for `steps` slices.
fn scan(
    cx: &EvalCx,
    mut carried: Vec<Item>,
    read: &[Read],
    steps: usize,
) -> Result<(Vec<Item>, Vec<Scanned>), OpError> {
    let region = body(cx.attrs, "body")?;
    let n = carried.len();
    let mut outs: Vec<Scanned> = (n..cx.outputs).map(|_| Scanned::new()).collect();
    for step in 0..steps {
        let mut args = carried;
        for (t, a, back) in read {
            args.push(slice(t, *a, if *back { steps - 1 - step } else { step })?.into());
        }
        let mut results = (cx.region)(region, args)?.into_iter();
        carried = results.by_ref().take(n).collect();
        for (what, out) in outs.iter_mut().enumerate() {
            let item = results.next().ok_or_else(|| OpError::invalid("the body gives too few results"))?;
            out.push(item, what)?;
        }
        if carried.len() < n {
            return Err(OpError::invalid("the body gives too few results"));
        }
    }
    Ok((carried, outs))
}

/// Scan as of opset 9: states, then values that are read slice by slice.
fn eval_scan(cx: &EvalCx) -> Evaluated {
    if cx.opset < 9 {
        return eval_batch_scan(cx);
    }
    let (states, scanned) = scan_counts(cx.attrs, cx.inputs.len())?;
    let carried: Vec<Item> = (0..states).map(|i| cx.item(i).cloned()).collect::<Result<_, _>>()?;
    let read: Vec<Read> = (0..scanned)
        .map(|i| {
            let t = cx.input(states + i)?;
            let back = per_value(cx.attrs, "scan_input_directions", i) == 1;
            Ok((t.clone(), axis(per_value(cx.attrs, "scan_input_axes", i), t.rank())?, back))
        })
        .collect::<Result<_, OpError>>()?;
    let steps = read.first().map_or(0, |(t, a, _)| t.shape()[*a]);
    if read.iter().any(|(t, a, _)| t.shape()[*a] != steps) {
        return Err(OpError::invalid("scanned values of different lengths"));
    }
    let (mut carried, outs) = scan(cx, carried, &read, steps)?;
    let types = (cx.results_of)(body(cx.attrs, "body")?);
    for (i, mut out) in outs.into_iter().enumerate() {
        if per_value(cx.attrs, "scan_output_directions", i) == 1 {
            out.parts.reverse();
        }
        carried.push(out.stack(per_value(cx.attrs, "scan_output_axes", i), i, types.get(states + i))?);
    }
    Ok(carried)
}

/// Scan of opset 8: every value has a dim for a batch first, and operand 0 may give the length of each sequence of
/// it. Behind a shorter sequence, what is stacked is zero.
fn eval_batch_scan(cx: &EvalCx) -> Evaluated {
    let operands = cx.inputs.len().saturating_sub(1);
    let (states, scanned) = scan_counts(cx.attrs, operands)?;
    let values: Vec<&Tensor> = (1..cx.inputs.len()).map(|i| cx.input(i)).collect::<Result<_, _>>()?;
    let batch = values.first().and_then(|t| t.shape().first()).copied().unwrap_or(0);
    let longest = values.get(states).and_then(|t| t.shape().get(1)).copied().unwrap_or(0);
    let fits = |(i, t): (usize, &&Tensor)| match i < states {
        true => t.shape().first() == Some(&batch),
        false => t.shape().get(..2) == Some(&[batch, longest]),
    };
    if !values.iter().enumerate().all(fits) {
        return Err(OpError::invalid("the batches or lengths of the operands differ"));
    }
    let lengths = cx.opt(0)?.map(Tensor::to_i64).transpose()?;
    let types = (cx.results_of)(body(cx.attrs, "body")?);
    let mut results: Vec<Scanned> = (0..cx.outputs).map(|_| Scanned::new()).collect();
    for b in 0..batch {
        let steps = lengths.as_ref().map_or(Some(longest), |l| usize::try_from(*l.get(b)?).ok());
        let steps = steps.filter(|&n| n <= longest);
        let steps = steps.ok_or_else(|| OpError::invalid("a sequence length is missing or out of range"))?;
        let mut own: Vec<Tensor> = values.iter().map(|t| slice(t, 0, b)).collect::<Result<_, _>>()?;
        let read: Vec<Read> = own
            .drain(states..)
            .enumerate()
            .map(|(i, t)| Ok((part(&t, 0, 0, steps)?, 0, per_value(cx.attrs, "directions", i) == 1)))
            .collect::<Result<_, OpError>>()?;
        debug_assert_eq!(read.len(), scanned);
        let (carried, outs) = scan(cx, own.into_iter().map(Item::from).collect(), &read, steps)?;
        for (i, item) in carried.into_iter().enumerate().take(results.len()) {
            results[i].push(item, i)?;
        }
        for (i, out) in outs.into_iter().enumerate() {
            let found = out.stack(0, i, types.get(states + i))?;
            let found = found.tensor()?;
            let mut padding = found.shape().to_vec();
            padding[0] = longest - steps;
            let padding = Tensor::zeros(found.elem(), &padding)?;
            results[states + i].push(join(&[found, &padding], 0)?.into(), i)?;
        }
    }
    let stacked = results.into_iter().enumerate().map(|(i, r)| r.stack(0, i, None));
    stacked.collect()
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
fn slice(t: &Tensor, a: usize, i: usize) -> Result<Tensor, OpError> {
    let shape = [&t.shape()[..a], &t.shape()[a + 1..]].concat();
    Ok(part(t, a, i, 1)?.reshape(&shape)?)
}

/// The type of one sequence of a batch.
fn without_batch(ty: &Type) -> Type {
    match (ty.elem(), ty.dims()) {
        (Some(elem), Some([_, rest @ ..])) => Type::tensor(elem, rest.to_vec()),
        _ => loosened(ty),
    }
}

fn infer_batch_scan(cx: &InferCx) -> Inferred {
    let (states, scanned) = scan_counts(cx.attrs, cx.inputs.len().saturating_sub(1))?;
    let mut args: Vec<Fact> = (0..states).map(|i| loosened(cx.ty(1 + i)).into()).collect();
    let reads = 1 + states..1 + states + scanned;
    args.extend(reads.clone().map(|i| Fact::from(without_batch(&without_batch(cx.ty(i))))));
    let results = (cx.region)(body(cx.attrs, "body")?, &args)?;
    let lead = |i: usize, n: usize| match cx.dims(i).and_then(|d| d.get(..n)) {
        Some(d) => d.to_vec(),
        None => vec![Dim::Unknown; n],
    };
    let outer = lead(reads.start, 2);
    let out = results.into_iter().enumerate().map(|(i, r)| match (r.ty.elem(), r.ty.dims()) {
        (Some(elem), Some(d)) => {
            fact(elem, Some([&outer[..if i < states { 1 } else { 2 }], d].concat()), None)
        }
        _ => loosened(&r.ty).into(),
    });
    Ok(out.collect())
}

fn infer_scan(cx: &InferCx) -> Inferred {
    if cx.opset < 9 {
        return infer_batch_scan(cx);
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
            _ if i < states => carried(cx.ty(i), &r.ty),
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
        // The lengths that opset 8 has first may be left out.
        operands: (0, usize::MAX),
        results: (1, usize::MAX),
        infer: infer_scan,
        eval: eval_scan,
        ..OpDef::NEW
    },
];
