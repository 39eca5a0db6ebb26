//! Whether attention looks back only: found by computing its masks, and whether what is cut and offset is what the
//! whole sequence has there: found by computing both.

use super::build::Built;
use super::plan::{Plan, Stuck};
use super::rules::{View, WHOLE};
use super::sizes::Sizes;
use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::{Elem, Module, Op, Value};
use dialects::ops::{Item, Ops};
use dialects::tensor::Tensor;
use std::collections::{HashMap, HashSet};

/// Added to a score, this leaves nothing of the key.
const MASKED: f32 = -1e4;

/// Past and new positions of the runs: the whole, its end behind a past, and a shorter whole.
const RUNS: [(usize, usize); 3] = [(0, 7), (3, 4), (0, 5)];

/// Rows of a run.
const BATCH: usize = 2;

/// What keeps a row of scores from later columns.
enum Mask {
    /// It is added.
    Added(Value),
    /// Where it has this value, the other side is taken.
    Chosen(Value, bool, Value),
}

/// The product of queries and keys whose softmax the op multiplies with values.
pub fn scores(m: &Module, main: &HashSet<Value>, context: Op) -> Result<Op, String> {
    masks(m, main, context).map(|(op, _)| op)
}

/// Walks from the product with the values back to that with the keys: what masks lie between.
fn masks(m: &Module, main: &HashSet<Value>, context: Op) -> Result<(Op, Vec<(Op, Mask)>), String> {
    let mut at = m.ops[context].operand(0).ok_or("an operand is missing")?;
    let (mut soft, mut masks) = (false, Vec::new());
    loop {
        let Some((op, _)) = m.def_op(at) else { return Err("its scores are an input".into()) };
        let data = &m.ops[op];
        let inner: Vec<Value> =
            data.operands.iter().flatten().copied().filter(|v| main.contains(v)).collect();
        let name = data.name.as_str();
        let next = match name {
            "onnx.Softmax" if !soft => {
                soft = true;
                data.operand(0)
            }
            "onnx.MatMul" if soft => return Ok((op, masks)),
            "onnx.Where" => {
                let (cond, yes, no) = (data.operand(0), data.operand(1), data.operand(2));
                let (Some(cond), Some(yes), Some(no)) = (cond, yes, no) else {
                    return Err("a malformed Where".into());
                };
                let kept = if main.contains(&yes) { yes } else { no };
                if soft && !main.contains(&cond) {
                    let filler = if kept == yes { no } else { yes };
                    masks.push((op, Mask::Chosen(cond, kept == no, filler)));
                }
                Some(kept)
            }
            "onnx.Add" if soft => {
                let other = data.operands.iter().flatten().copied().find(|v| !main.contains(v));
                masks.extend(other.map(|v| (op, Mask::Added(v))));
                inner.first().copied().filter(|_| inner.len() == 1)
            }
            "onnx.Cast" | "onnx.Clip" | "onnx.Div" | "onnx.Dropout" | "onnx.Identity" | "onnx.Max"
            | "onnx.Mul" | "onnx.Reshape" | "onnx.Squeeze" | "onnx.Tanh" | "onnx.Unsqueeze" => {
                inner.first().copied().filter(|_| inner.len() == 1)
            }
            _ => None,
        };
        at = next.ok_or_else(|| {
            let loc = &data.loc;
            let what = if soft { "the product of queries and keys" } else { "a softmax" };
            format!("expected {what} behind it, found {name} at node {loc:?}")
        })?;
    }
}

/// The masks of an attention, each with its value and the view of it that is read.
type Masks = Vec<(Value, View, Mask)>;

/// The tensors of one run, by value of the built module.
type Found = HashMap<Value, Tensor>;

/// Computes masks and cut values of the built module, and compares.
pub fn check(
    before: &Module,
    main: &HashSet<Value>,
    sizes: &Sizes,
    plan: &Plan,
    m: &Module,
    built: &Built,
    ops: &Ops,
) -> Result<(), Stuck> {
    let mut wanted: Vec<Value> = Vec::new();
    for &(v, view) in &plan.border {
        wanted.extend(built.values.get(&(v, view)));
    }
    let mut attentions: Vec<(Op, Masks)> = Vec::new();
    for (&op, views) in &plan.ops {
        let data = &before.ops[op];
        let fused = match data.name.as_str() {
            "onnx.Attention" => Some(3),
            "com.microsoft.MultiHeadAttention" => Some(5),
            _ => None,
        };
        if let Some(i) = fused {
            let Some(emit) = views.values().next() else { continue };
            if !emit.masked {
                let mask = data.operand(i).map(|v| (v, emit.operands[i], Mask::Added(v)));
                attentions.push((op, mask.into_iter().collect()));
            }
        } else if plan.contexts.contains(&op) {
            let stuck = |why| Stuck { what: data.loc.to_string(), why };
            let (_, found) = masks(before, main, op).map_err(stuck)?;
            let view = |op: Op, v: Value| {
                let i = before.ops[op].operands.iter().position(|x| *x == Some(v))?;
                plan.ops.get(&op)?.values().next()?.operands.get(i).copied()
            };
            let masks = found.into_iter().filter_map(|(at, mask)| match mask {
                Mask::Added(v) => Some((v, view(at, v)?, mask)),
                Mask::Chosen(v, ..) => Some((v, view(at, v)?, mask)),
            });
            attentions.push((op, masks.collect()));
        }
    }
    attentions.sort_by_key(|(op, _)| *op);
    for (_, masks) in &attentions {
        for (v, view, mask) in masks {
            wanted.extend(built.values.get(&(*v, *view)).or(Some(v)));
            if let Mask::Chosen(_, _, filler) = mask {
                wanted.extend(built.values.get(&(*filler, WHOLE)).or(Some(filler)));
            }
        }
    }
    wanted.sort_unstable();
    wanted.dedup();
    let exec = Interpreter::new(ops.clone()).exact(true);
    let run = |(past, new): (usize, usize)| -> Result<Found, Stuck> {
        let computed: Vec<Value> = wanted.iter().copied().filter(|&v| m.const_of(v).is_none()).collect();
        let failed = |why: String| Stuck { what: "masks and positions".into(), why };
        let inputs = inputs(m, built, past, new).map_err(failed)?;
        let items = run_once(&exec, m, &inputs, &computed).map_err(|e| failed(e.to_string()))?;
        let mut found = Found::new();
        for (&v, item) in computed.iter().zip(items) {
            found.insert(v, item.tensor().map_err(|e| failed(e.to_string()))?.clone());
        }
        for &v in wanted.iter() {
            if let Some(c) = m.const_of(v) {
                let t = Tensor::from_const(&m.consts[c]).map_err(|e| failed(e.to_string()))?;
                found.insert(v, t);
            }
        }
        Ok(found)
    };
    let [whole, end, short] = [run(RUNS[0])?, run(RUNS[1])?, run(RUNS[2])?];
    for &(v, view) in &plan.border {
        let Some(new) = built.values.get(&(v, view)) else { continue };
        let (Some(w), Some(e), Some(s)) = (whole.get(new), end.get(new), short.get(new)) else { continue };
        let along = sizes.along(v);
        let starts = |past: usize| -> Vec<usize> {
            (0..w.rank()).map(|i| if view >> i & 1 == 1 { past } else { 0 }).collect()
        };
        let same = part(w, &starts(RUNS[1].0), e) && part(w, &vec![0; w.rank()], s);
        if !same {
            let what = before.value_label(v);
            let why = match along.is_empty() {
                true => "expected a value that is the same for every length of the sequence, found another",
                false => "expected elements that stay as they are when the sequence grows, found others",
            };
            return Err(Stuck { what, why: why.into() });
        }
    }
    for (op, masks) in &attentions {
        let blocks = |(v, view, mask): &(Value, View, Mask)| {
            let at = |v: &Value, view: View| whole.get(built.values.get(&(*v, view)).unwrap_or(v));
            let Some(t) = at(v, *view) else { return false };
            match mask {
                Mask::Added(_) if t.elem() == Elem::Bool => later(t, &|t, i| t.bools().is_ok_and(|b| !b[i])),
                Mask::Added(_) => later(t, &|t, i| t.to_f32().is_ok_and(|x| x[i] <= MASKED)),
                Mask::Chosen(_, masked, filler) => {
                    let low = at(filler, WHOLE)
                        .and_then(|f| f.to_f32().ok().map(|f| f.iter().all(|&x| x <= MASKED)));
                    low == Some(true) && later(t, &|t, i| t.bools().is_ok_and(|b| b[i] == *masked))
                }
            }
        };
        if !masks.iter().any(blocks) {
            let data = &before.ops[*op];
            let found = if masks.is_empty() { "no mask" } else { "a mask that lets it see later ones" };
            let why = format!(
                "{}: expected attention that sees no later position, found {found}: with a cache the model would \
                 compute something else",
                data.name
            );
            return Err(Stuck { what: data.loc.to_string(), why });
        }
    }
    Ok(())
}

/// Whether `masked` holds of all elements `[.., row, column]` of later columns; there must be some.
fn later(t: &Tensor, masked: &dyn Fn(&Tensor, usize) -> bool) -> bool {
    let [.., rows, columns] = *t.shape() else { return false };
    rows > 1 && rows == columns && (0..t.len()).all(|i| i % columns <= i / columns % rows || masked(t, i))
}

/// Whether `small` is what stands in `large` from `start` on, but for rounding.
fn part(large: &Tensor, start: &[usize], small: &Tensor) -> bool {
    if large.rank() != small.rank() || large.elem() != small.elem() {
        return false;
    }
    let (Ok(a), Ok(b)) = (numbers(large), numbers(small)) else { return false };
    let fits = (0..start.len()).all(|i| start[i] + small.shape()[i] <= large.shape()[i]);
    fits && (0..small.len()).all(|i| {
        let (mut rest, mut at, mut step) = (i, 0, 1);
        for axis in (0..start.len()).rev() {
            at += (rest % small.shape()[axis] + start[axis]) * step;
            rest /= small.shape()[axis];
            step *= large.shape()[axis];
        }
        let (x, y) = (a[at], b[i]);
        x == y || x.is_nan() && y.is_nan() || (x - y).abs() <= 1e-6 * x.abs().max(y.abs())
    })
}

fn numbers(t: &Tensor) -> Result<Vec<f64>, ()> {
    if let Ok(b) = t.bools() {
        return Ok(b.iter().map(|&b| f64::from(u8::from(b))).collect());
    }
    if let Ok(v) = t.to_i64() {
        return Ok(v.iter().map(|&v| v as f64).collect());
    }
    t.to_f32().map(|v| v.iter().map(|&v| f64::from(v)).collect()).map_err(|_| ())
}

/// Inputs of the built module: every position counts, and no token is asked for.
fn inputs(m: &Module, built: &Built, past: usize, new: usize) -> Result<Vec<(Value, Item)>, String> {
    let mut out = Vec::new();
    for &v in &m.regions[m.top].args {
        let (Some(elem), Some(dims)) = (m.ty(v).elem(), m.ty(v).dims()) else { continue };
        let cache = built.past.contains(&v);
        let ones = !cache && !built.rows.contains(&v);
        let known = |i: usize| dims[i].known().and_then(|n| usize::try_from(n).ok());
        let len = |i: usize| match i {
            0 => known(0).unwrap_or(BATCH),
            2 if cache => past,
            1 if ones => past + new,
            1 if !cache => known(1).unwrap_or(new),
            _ => known(i).unwrap_or(1),
        };
        let shape: Vec<usize> = (0..dims.len()).map(len).collect();
        let count = shape.iter().product();
        let t = match elem {
            Elem::I64 => Tensor::new(&shape, vec![i64::from(ones); count]),
            Elem::I32 => Tensor::new(&shape, vec![i32::from(ones); count]),
            Elem::Bool => Tensor::new(&shape, vec![ones; count]),
            _ => Tensor::from_f32(elem, &shape, vec![if ones { 1.0 } else { 0.0 }; count]),
        };
        out.push((v, t.map_err(|e| e.to_string())?.into()));
    }
    Ok(out)
}
