//! LinearAttention (opset 27): attention by a state that every position updates, `S = decay S + k (x) v`, read as
//! `scale * q^T S`; with the delta rule `v` is first corrected by what the state already gives for `k`.
//!
//! Queries are `[batch, positions, heads * size]`, as keys and values are; the state is `[batch, heads, key size, value
//! size]`. Computed in single precision, one task for each head of a batch.

use super::util::fact;
use crate::ir::{Dim, Elem};
use crate::kernels::strided::count;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::borrow::Cow;

fn heads(attrs: &crate::ir::Attrs, name: &str) -> Result<usize, OpError> {
    let n = attrs.int(name).and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
    n.ok_or_else(|| OpError::Invalid(format!("the attribute {name} is not a positive number")))
}

/// `[batch, positions, width]` of an operand.
fn packed(t: &Tensor, what: &str) -> Result<[usize; 3], OpError> {
    let shape = t.shape().try_into();
    shape.map_err(|_| OpError::Invalid(format!("{what} has shape {:?}, expected three dims", t.shape())))
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (q_heads, kv_heads) = (heads(cx.attrs, "q_num_heads")?, heads(cx.attrs, "kv_num_heads")?);
    let (gated, delta) = match cx.attrs.str("update_rule").unwrap_or("gated_delta") {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => return Err(OpError::Invalid(format!("update_rule is {other:?}"))),
    };
    let (q, k, v) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let [batch, steps, q_width] = packed(q, "query")?;
    let (k_shape, v_shape) = (packed(k, "key")?, packed(v, "value")?);
    let (size, v_size) = (q_width / q_heads, v_shape[2] / kv_heads);
    let fits = q_heads.is_multiple_of(kv_heads)
        && q_width == q_heads * size
        && k_shape == [batch, steps, kv_heads * size]
        && v_shape == [batch, steps, kv_heads * v_size];
    if !fits {
        let shapes = (q.shape(), k.shape(), v.shape());
        return Err(OpError::Invalid(format!(
            "query, key and value of shapes {shapes:?} do not fit {q_heads} and {kv_heads} heads"
        )));
    }
    // A gate is one number for each key head and position, or more; `widths` are those it may have.
    let gate = |i: usize, what: &str, wanted: bool, widths: [usize; 2]| match (cx.opt(i)?, wanted) {
        (None, false) => Ok(None),
        (Some(t), true) => {
            let [b, s, width] = packed(t, what)?;
            if [b, s] != [batch, steps] || !widths.contains(&width) {
                return Err(OpError::Invalid(format!("{what} has shape {:?}", t.shape())));
            }
            Ok(Some((t.to_f32()?, width)))
        }
        (None, true) => Err(OpError::Invalid(format!("{what} is missing"))),
        (Some(_), false) => Err(OpError::Invalid(format!("{what} is given, but update_rule takes none"))),
    };
    let decay = gate(4, "decay", gated, [kv_heads, kv_heads * size])?;
    let beta = gate(5, "beta", delta, [kv_heads, 1])?;
    let scale = match cx.float_or("scale", 0.0) {
        0.0 => 1.0 / (size as f32).sqrt(),
        given => given,
    };
    let state_shape = [batch, kv_heads, size, v_size];
    let past = cx.opt(3)?;
    let mut states = match past {
        Some(t) if t.shape() == state_shape => t.to_f32()?.into_owned(),
        Some(t) => {
            let found = t.shape();
            return Err(OpError::Invalid(format!("the state has shape {found:?}, expected {state_shape:?}")));
        }
        None => vec![0f32; count(&state_shape)?],
    };
    let (qs, ks, vs): (Cow<[f32]>, _, _) = (q.to_f32()?, k.to_f32()?, v.to_f32()?);
    let group = q_heads / kv_heads;
    // For each key head of a batch: `[steps, group, v_size]`.
    let per_head = steps * group * v_size;
    let mut parts = vec![0f32; count(&[batch, kv_heads, per_head])?];
    if size * v_size > 0 && per_head > 0 {
        let tasks = states.par_chunks_mut(size * v_size).zip(parts.par_chunks_mut(per_head));
        tasks.enumerate().for_each(|(task, (state, out))| {
            let (b, h) = (task / kv_heads, task % kv_heads);
            let mut written = vec![0f32; v_size];
            for step in 0..steps {
                let at = b * steps + step;
                let key = &ks[(at * kv_heads + h) * size..][..size];
                let value = &vs[(at * kv_heads + h) * v_size..][..v_size];
                if let Some((decay, width)) = &decay {
                    for (i, row) in state.chunks_exact_mut(v_size).enumerate() {
                        let i = if *width == kv_heads { h } else { h * size + i };
                        let factor = decay[at * width + i].exp();
                        row.iter_mut().for_each(|s| *s *= factor);
                    }
                }
                written.copy_from_slice(value);
                if let Some((beta, width)) = &beta {
                    let mut known = vec![0f32; v_size];
                    for (row, k) in state.chunks_exact(v_size).zip(key) {
                        known.iter_mut().zip(row).for_each(|(r, s)| *r += s * k);
                    }
                    let rate = beta[at * width + if *width == 1 { 0 } else { h }];
                    written.iter_mut().zip(&known).for_each(|(w, r)| *w = rate * (*w - r));
                }
                for (row, k) in state.chunks_exact_mut(v_size).zip(key) {
                    row.iter_mut().zip(&written).for_each(|(s, w)| *s += k * w);
                }
                for g in 0..group {
                    let query = &qs[(at * q_heads + h * group + g) * size..][..size];
                    let out = &mut out[(step * group + g) * v_size..][..v_size];
                    for (row, q) in state.chunks_exact(v_size).zip(query) {
                        out.iter_mut().zip(row).for_each(|(o, s)| *o += q * s);
                    }
                    out.iter_mut().for_each(|o| *o *= scale);
                }
            }
        });
    }
    let mut y = Vec::with_capacity(parts.len());
    for b in 0..batch {
        for step in 0..steps {
            for h in 0..kv_heads {
                let start = (b * kv_heads + h) * per_head + step * group * v_size;
                y.extend_from_slice(&parts[start..start + group * v_size]);
            }
        }
    }
    let y = Tensor::from_f32(q.elem(), &[batch, steps, q_heads * v_size], y)?;
    let state_elem: Elem = past.map_or(q.elem(), Tensor::elem);
    Ok(vec![y.into(), Tensor::from_f32(state_elem, &state_shape, states)?.into()])
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let (q_heads, kv_heads) = (heads(cx.attrs, "q_num_heads")?, heads(cx.attrs, "kv_num_heads")?);
    let state = if cx.has(3) { cx.elem(3).unwrap_or(elem) } else { elem };
    let (q_heads, kv_heads) = (Dim::from(q_heads), Dim::from(kv_heads));
    let (y, s) = match (cx.dims(0), cx.dims(2)) {
        (Some([b, t, width]), Some([_, _, v_width])) => {
            let v_size = v_width.div(&kv_heads);
            let y = vec![b.clone(), t.clone(), q_heads.mul(&v_size)];
            (Some(y), Some(vec![b.clone(), kv_heads, width.div(&q_heads), v_size]))
        }
        _ => (None, None),
    };
    Ok(vec![fact(elem, y, None), fact(state, s, None)])
}

/// The op.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.LinearAttention", operands: (3, 6), results: (1, 2), infer, eval, ..OpDef::NEW }];
