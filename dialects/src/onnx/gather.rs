//! Gather, GatherElements, GatherND and Compress. An index may count from the end.

use super::util::{axis, fact, moved, small_count, sym};
use crate::ir::Dim;
use crate::kernels::strided::{count, strides};
use crate::map_data;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// `index` counted from the front of a dim of `size`.
pub(super) fn place(index: i64, size: usize) -> Result<usize, OpError> {
    let n = size as i64;
    let at = if index < 0 { index + n } else { index };
    if (0..n).contains(&at) {
        return Ok(at as usize);
    }
    Err(OpError::Invalid(format!("the index {index} is out of range for a dim of {size}")))
}

/// Blocks of `x`, seen as `[outer, size, inner]`: for each outer block, the rows `places`.
pub(super) fn rows<T: Clone>(x: &[T], outer: usize, size: usize, inner: usize, places: &[usize]) -> Vec<T> {
    let mut out = Vec::with_capacity(outer * places.len() * inner);
    for block in 0..outer {
        for &p in places {
            let at = (block * size + p) * inner;
            out.extend_from_slice(&x[at..at + inner]);
        }
    }
    out
}

fn eval_gather(cx: &EvalCx) -> Evaluated {
    let (t, indices) = (cx.input(0)?, cx.input(1)?);
    let i = axis(cx.int_or("axis", 0), t.rank())?;
    let size = t.shape()[i];
    let places: Vec<usize> = indices.to_i64()?.iter().map(|&n| place(n, size)).collect::<Result<_, _>>()?;
    let shape = [&t.shape()[..i], indices.shape(), &t.shape()[i + 1..]].concat();
    count(&shape)?;
    let (outer, inner) = (t.shape()[..i].iter().product(), t.shape()[i + 1..].iter().product());
    moved(t, &shape, map_data!(t.data(), v => rows(v, outer, size, inner, &places)))
}

fn infer_gather(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let (Some(d), Some(k)) = (cx.dims(0), cx.dims(1)) else { return Ok(vec![fact(elem, None, None)]) };
    let i = axis(cx.attrs.int("axis").unwrap_or(0), d.len())?;
    let dims = [&d[..i], k, &d[i + 1..]].concat();
    let contents = (|| {
        let ((s, shape), picked) = (sym(cx, 0)?, cx.ints(1)?);
        let places: Vec<usize> = picked.iter().map(|&n| place(n, shape[i]).ok()).collect::<Option<_>>()?;
        let (outer, inner) = (shape[..i].iter().product::<usize>(), shape[i + 1..].iter().product::<usize>());
        small_count(&[outer, places.len(), inner])?;
        Some(rows(s, outer, shape[i], inner, &places))
    })();
    Ok(vec![fact(elem, Some(dims), contents)])
}

/// The shape of the indices says the shape of the result: each element moves along one axis.
fn eval_elements(cx: &EvalCx) -> Evaluated {
    let (t, indices) = (cx.input(0)?, cx.input(1)?);
    let i = axis(cx.int_or("axis", 0), t.rank())?;
    let places = along_axis(t, indices, i)?;
    moved(t, indices.shape(), map_data!(t.data(), v => rows(v, 1, v.len(), 1, &places)))
}

/// For each element of `indices`, where in `t` it points: its own position, with dim `i` replaced by the index.
pub(super) fn along_axis(t: &Tensor, indices: &Tensor, i: usize) -> Result<Vec<usize>, OpError> {
    let (shape, own) = (indices.shape(), strides(t.shape()));
    let fits = shape.len() == t.rank() && (0..shape.len()).all(|d| d == i || shape[d] <= t.shape()[d]);
    if !fits {
        let (a, b) = (shape, t.shape());
        return Err(OpError::Invalid(format!("indices of shape {a:?} do not fit data of shape {b:?}")));
    }
    let mut at = vec![0usize; shape.len()];
    let mut out = Vec::with_capacity(indices.len());
    for &index in indices.to_i64()?.iter() {
        let p = place(index, t.shape()[i])?;
        let of = |d: usize| own[d] as usize * if d == i { p } else { at[d] };
        out.push((0..shape.len()).map(of).sum());
        for d in (0..shape.len()).rev() {
            at[d] += 1;
            if at[d] < shape[d] {
                break;
            }
            at[d] = 0;
        }
    }
    Ok(out)
}

/// Where the index tuples in the last dim of `indices` point in `t`, as block starts, and the size of a block.
/// The first `batch` dims are shared.
pub(super) fn blocks(t: &Tensor, indices: &Tensor, batch: usize) -> Result<(Vec<usize>, usize), OpError> {
    let shape = indices.shape();
    let tuple = *shape.last().ok_or_else(|| OpError::invalid("the indices are a scalar"))?;
    if batch + tuple > t.rank() || batch >= shape.len() || t.shape()[..batch] != shape[..batch] {
        let (a, b) = (shape, t.shape());
        return Err(OpError::Invalid(format!("indices of shape {a:?} do not fit data of shape {b:?}")));
    }
    let block: usize = t.shape()[batch + tuple..].iter().product();
    let own = strides(t.shape());
    let batches: usize = shape[..batch].iter().product();
    let per_batch: usize = shape[batch..shape.len() - 1].iter().product();
    let batch_size: usize = t.shape()[batch..].iter().product();
    let values = indices.to_i64()?;
    let mut out = Vec::with_capacity(batches * per_batch);
    for n in 0..batches * per_batch {
        let mut at = n / per_batch * batch_size;
        for (d, &index) in values[n * tuple..(n + 1) * tuple].iter().enumerate() {
            at += own[batch + d] as usize * place(index, t.shape()[batch + d])?;
        }
        out.push(at);
    }
    Ok((out, block))
}

fn eval_nd(cx: &EvalCx) -> Evaluated {
    let (t, indices) = (cx.input(0)?, cx.input(1)?);
    let batch =
        usize::try_from(cx.int_or("batch_dims", 0)).map_err(|_| OpError::invalid("negative batch_dims"))?;
    let (starts, block) = blocks(t, indices, batch)?;
    let tuple = indices.shape()[indices.rank() - 1];
    let shape = [&indices.shape()[..indices.rank() - 1], &t.shape()[batch + tuple..]].concat();
    count(&shape)?;
    let data =
        map_data!(t.data(), v => starts.iter().flat_map(|&s| v[s..s + block].iter().cloned()).collect());
    moved(t, &shape, data)
}

fn infer_nd(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let batch = cx.attrs.int("batch_dims").unwrap_or(0).max(0) as usize;
    let dims = match (cx.dims(0), cx.dims(1)) {
        (Some(d), Some([lead @ .., Dim::Known(tuple)])) => {
            let rest = d.get(batch + *tuple as usize..);
            let rest =
                rest.ok_or_else(|| OpError::invalid("the index tuples are longer than the data's rank"))?;
            Some([lead, rest].concat())
        }
        _ => None,
    };
    Ok(vec![fact(elem, dims, None)])
}

/// The rows along `axis` (or the elements, without one) where the condition holds; one that is too short does not hold
/// at the end.
fn compress(cx: &EvalCx) -> Evaluated {
    let (t, hold) = (cx.input(0)?, cx.input(1)?.bools()?);
    let (mut shape, i) = match cx.attrs.int("axis") {
        Some(a) => (t.shape().to_vec(), axis(a, t.rank())?),
        None => (vec![t.len()], 0),
    };
    let size = shape[i];
    let places: Vec<usize> = (0..hold.len()).filter(|&p| hold[p]).collect();
    if let Some(&last) = places.last().filter(|&&p| p >= size) {
        let message = format!("the condition holds at {last}, which is out of range for a dim of {size}");
        return Err(OpError::Invalid(message));
    }
    let (outer, inner) = (shape[..i].iter().product(), shape[i + 1..].iter().product());
    shape[i] = places.len();
    moved(t, &shape, map_data!(t.data(), v => rows(v, outer, size, inner, &places)))
}

fn infer_compress(cx: &InferCx) -> Inferred {
    let dims = match (cx.attrs.int("axis"), cx.dims(0)) {
        (None, _) => Some(vec![Dim::Unknown]),
        (Some(a), Some(d)) => {
            let mut dims = d.to_vec();
            dims[axis(a, d.len())?] = Dim::Unknown;
            Some(dims)
        }
        (Some(_), None) => None,
    };
    super::util::one(cx.elem(0), dims)
}

/// Gather and its kin.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.Gather", operands: (2, 2), infer: infer_gather, eval: eval_gather, ..OpDef::NEW },
    OpDef {
        name: "onnx.GatherElements",
        operands: (2, 2),
        infer: |cx| super::util::one(cx.elem(0), cx.dims(1).map(<[Dim]>::to_vec)),
        eval: eval_elements,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Compress", operands: (2, 2), infer: infer_compress, eval: compress, ..OpDef::NEW },
    OpDef { name: "onnx.GatherND", operands: (2, 2), infer: infer_nd, eval: eval_nd, ..OpDef::NEW },
];
