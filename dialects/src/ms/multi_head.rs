//! MultiHeadAttention: Q, K and V in their own tensors, or packed, with biases, masks and a key/value cache.

use super::mask::Mask;
use crate::ir::{Dim, Type};
use crate::kernels::attention::{Attention, Heads, Keep, joined, results};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file: query, key, value, bias, key padding mask, bias of the scores, past key and value, past length,
/// cache indirection.
pub const OPS: &[OpDef] = &[OpDef {
    name: "com.microsoft.MultiHeadAttention",
    operands: (1, 10),
    results: (1, 4),
    infer,
    eval,
    ..OpDef::NEW
}];

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let unranked = || Ok(vec![Type::unranked(elem).into(); 4]);
    let heads = cx.attrs.int("num_heads").map_or(Dim::Unknown, Dim::Known);
    let (Some(q), key, value) = (cx.dims(0), cx.dims(1), cx.dims(2)) else { return unranked() };
    // Rows, and [keys, size] of K and of V.
    let (batch, rows, k, v) = match (q, key, value) {
        ([b, s, _, _, d], ..) => (b, s, [s.clone(), d.clone()], d.clone()),
        ([b, s, _], Some([_, n, _, _, d]), _) => (b, s, [n.clone(), d.clone()], d.clone()),
        ([b, s, _], Some([_, n, h]), Some([_, _, hv])) => (b, s, [n.clone(), h.div(&heads)], hv.div(&heads)),
        ([b, s, _], Some([_, _, n, d]), Some([_, _, _, dv])) => (b, s, [n.clone(), d.clone()], dv.clone()),
        _ => return unranked(),
    };
    let old = match (cx.has(6), cx.dims(6)) {
        (false, _) => Dim::Known(0),
        (true, Some([_, _, old, _])) => old.clone(),
        _ => Dim::Unknown,
    };
    let total = old.add(&k[0]);
    let cache = |size: &Dim| [batch.clone(), heads.clone(), total.clone(), size.clone()];
    let scores = [batch.clone(), heads.clone(), rows.clone(), total.clone()];
    let types = [
        Type::tensor(elem, [batch.clone(), rows.clone(), heads.mul(&v)]),
        Type::tensor(elem, cache(&k[1])),
        Type::tensor(elem, cache(&v)),
        Type::tensor(elem, scores),
    ];
    Ok(types.into_iter().map(Into::into).collect())
}

/// Part `which` of heads packed as `[batch, positions, heads, parts, size]`.
fn packed(t: &Tensor, which: usize) -> Result<Heads<'_>, OpError> {
    let [b, s, n, parts, d] = *t.shape() else {
        return Err(OpError::invalid(format!("packed heads have shape {:?}, expected five dims", t.shape())));
    };
    if which >= parts {
        return Err(OpError::invalid(format!("the packed heads {:?} have no part {which}", t.shape())));
    }
    Heads::strided(t.to_f32()?, which * d, [b, n, s, d], [s * n * parts * d, parts * d, n * parts * d])
}

fn eval(cx: &EvalCx) -> Evaluated {
    if cx.opt(8)?.is_some() || cx.opt(9)?.is_some() {
        return Err(OpError::Unsupported("a cache in a buffer of fixed length".into()));
    }
    let x = cx.input(0)?;
    let count = cx.attrs.int("num_heads");
    let (q, k, v) = match (x.rank(), cx.opt(1)?, cx.opt(2)?) {
        (5, None, None) => (packed(x, 0)?, packed(x, 1)?, packed(x, 2)?),
        (3, Some(kv), None) if kv.rank() == 5 => (Heads::of(x, count)?, packed(kv, 0)?, packed(kv, 1)?),
        (3, Some(k), Some(v)) => (Heads::of(x, count)?, Heads::of(k, count)?, Heads::of(v, count)?),
        (rank, k, v) => {
            let given = [Some(x), k, v].map(|t| t.map(|t| t.shape().to_vec()));
            let message = format!("query, key and value of shapes {given:?} (a query of {rank} dims)");
            return Err(OpError::Unsupported(message));
        }
    };
    // Keys and values of four dims come from elsewhere, projected and biased.
    let projected = cx.opt(1)?.is_some_and(|k| k.rank() == 4);
    let (q, k, v) = match cx.opt(3)? {
        None => (q, k, v),
        Some(bias) => {
            let bias = bias.to_f32()?;
            let sizes = [&q, &k, &v].map(|h| h.heads * h.size);
            if bias.len() != sizes.iter().sum::<usize>() {
                let found = bias.len();
                return Err(OpError::invalid(format!(
                    "a bias of {found} elements for Q, K and V of {sizes:?}"
                )));
            }
            let plus = |x: &Heads, from: usize| {
                let size = x.size;
                x.changed(|_, head, _, row| {
                    let bias = &bias[from + head * size..][..size];
                    row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                })
            };
            let q = plus(&q, 0)?;
            match projected {
                true => (q, k, v),
                false => (q, plus(&k, sizes[0])?, plus(&v, sizes[0] + sizes[1])?),
            }
        }
    };
    let cache = |i: usize| cx.opt(i)?.map(|t| Heads::of(t, None)).transpose();
    let past = cache(6)?;
    let old = past.as_ref().map_or(0, |p| p.positions);
    let (k, v) = (k.after(past.as_ref())?, v.after(cache(7)?.as_ref())?);
    let [batch, heads, rows, _] = q.shape();
    let mask = Mask::of(cx, cx.opt(4)?, cx.opt(5)?, [batch, heads, rows, k.positions], old)?;
    let attention = Attention {
        scale: cx.attrs.float("scale").filter(|&s| s != 0.0).unwrap_or(1.0 / (q.size as f32).sqrt()),
        softcap: 0.0,
        bias: &|batch, head, row, out: &mut [f32]| mask.row(batch, head, row, out),
        sinks: None,
        keep: (cx.outputs > 3).then_some(Keep::Products),
    };
    let (y, scores) = attention.run(&q, &k, &v)?;
    let y = joined(x.elem(), &y, [batch, heads, rows, v.size])?;
    results(cx.outputs, y, [&k, &v], (scores, [batch, heads, rows, k.positions]))
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_multi_head");
    }
}
