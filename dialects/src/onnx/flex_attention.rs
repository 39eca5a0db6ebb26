//! FlexAttention (of ONNX's preview domain): attention whose scores and probabilities pass through graphs that the op
//! holds. Q is `[batch, heads, rows, size]`; K and V are `[batch, key heads, keys, size]`.
//!
//! Products and softmax are computed in double precision; scores and probabilities take the type that
//! `softmax_precision` says where the graphs see them.

use super::cast::convert;
use super::util::fact;
use crate::ir::{Elem, Region, Type};
use crate::kernels::gemm::{self, Mat};
use crate::kernels::strided::count;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use rayon::prelude::*;

/// The element type of scores and probabilities.
fn precision(attrs: &crate::ir::Attrs, elem: Elem) -> Result<Elem, OpError> {
    match attrs.int("softmax_precision") {
        Some(code) => {
            let elem = i32::try_from(code).ok().and_then(Elem::from_onnx);
            let float = elem.filter(|e| matches!(e, Elem::F32 | Elem::F64 | Elem::F16 | Elem::BF16));
            float.ok_or_else(|| {
                OpError::Invalid(format!("softmax_precision is {code}, expected a float type"))
            })
        }
        None if elem == Elem::F64 => Ok(Elem::F64),
        None => Ok(Elem::F32),
    }
}

fn doubles(t: &Tensor) -> Result<Vec<f64>, OpError> {
    match convert(t, Elem::F64, true)?.into_data() {
        Data::F64(v) => Ok(v),
        _ => Err(super::util::wrong_elem("a numeric type", t)),
    }
}

/// `values` of `shape` as the graph `name` changes them, if there is one.
fn modified(
    cx: &EvalCx,
    name: &str,
    elem: Elem,
    shape: &[usize],
    values: Vec<f64>,
) -> Result<Vec<f64>, OpError> {
    let t = convert(&Tensor::new(shape, values)?, elem, true)?;
    let Some(graph) = cx.attrs.graph(name) else { return doubles(&t) };
    let results = (cx.region)(graph, vec![t.into()])?;
    let [result] = &results[..] else {
        return Err(OpError::Invalid(format!(
            "the graph {name} gives {} results, expected one",
            results.len()
        )));
    };
    let t = result.tensor()?;
    if t.shape() != shape || t.elem() != elem {
        let (e, s) = (t.elem(), t.shape());
        return Err(OpError::Invalid(format!("the graph {name} gives {e} {s:?}, expected {elem} {shape:?}")));
    }
    doubles(t)
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (q, k, v) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (&[batch, heads, rows, size], &[kb, k_heads, keys, ks], &[vb, v_heads, v_keys, v_size]) =
        (q.shape(), k.shape(), v.shape())
    else {
        return Err(OpError::invalid("expected Q, K and V of four dims"));
    };
    let fits = [kb, vb] == [batch; 2] && (v_heads, v_keys, ks) == (k_heads, keys, size);
    if !fits || k_heads == 0 || !heads.is_multiple_of(k_heads) {
        let shapes = (q.shape(), k.shape(), v.shape());
        return Err(OpError::Invalid(format!("Q, K and V have shapes {shapes:?}, which do not fit")));
    }
    let elem = precision(cx.attrs, q.elem())?;
    let scale = cx.attrs.float("scale").map_or(1.0 / (size as f64).sqrt(), f64::from);
    let shape = [batch, heads, rows, keys];
    let mut scores = vec![0f64; count(&shape)?];
    let mut y = vec![0f64; count(&[batch, heads, rows, v_size])?];
    let (qs, ks, vs) = (doubles(q)?, doubles(k)?, doubles(v)?);
    // The keys, or values, of size `n` that head `i` of all batches reads.
    let shared = |i: usize, n: usize| (i / heads * k_heads + i % heads / (heads / k_heads)) * keys * n;
    if rows * keys > 0 {
        scores.par_chunks_mut(rows * keys).enumerate().for_each(|(i, out)| {
            let key = Mat::new(&ks[shared(i, size)..], keys, size);
            gemm::tile(Mat::new(&qs[i * rows * size..], rows, size), key.t(), out);
            out.iter_mut().for_each(|s| *s *= scale);
        });
        let mut scores = modified(cx, "score_mod", elem, &shape, scores)?;
        scores.par_chunks_mut(keys).for_each(|row| {
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|s| *s = (*s - most).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|s| *s /= sum);
        });
        let probs = modified(cx, "prob_mod", elem, &shape, scores)?;
        if v_size > 0 {
            y.par_chunks_mut(rows * v_size).enumerate().for_each(|(i, out)| {
                let value = Mat::new(&vs[shared(i, v_size)..], keys, v_size);
                gemm::tile(Mat::new(&probs[i * rows * keys..], rows, keys), value, out);
            });
        }
    }
    cx.one(convert(&Tensor::new(&[batch, heads, rows, v_size], y)?, q.elem(), true)?)
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let inner = precision(cx.attrs, elem)?;
    let (mut y, mut scores) = (None, Type::unranked(inner));
    if let (Some([b, h, l, _]), Some([_, _, s, _])) = (cx.dims(0), cx.dims(1)) {
        scores = Type::tensor(inner, [b, h, l, s].map(Clone::clone));
        y = match cx.dims(2) {
            Some([.., size]) => Some([b, h, l, size].map(Clone::clone).to_vec()),
            _ => None,
        };
    }
    let graphs: Vec<Region> = ["score_mod", "prob_mod"].iter().filter_map(|n| cx.attrs.graph(n)).collect();
    for graph in graphs {
        (cx.region)(graph, &[scores.clone().into()])?;
    }
    Ok(vec![fact(elem, y, None)])
}

/// The op.
pub const OPS: &[OpDef] =
    &[OpDef { name: "ai.onnx.preview.FlexAttention", operands: (3, 3), infer, eval, ..OpDef::NEW }];
