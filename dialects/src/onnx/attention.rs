//! Attention (opset 23 on): `softmax(softcap(Q K^T * scale) + bias) V`, with grouped-query heads, masks, a
//! key/value cache that is concatenated, and sliding windows.
//!
//! Computed in single precision whatever the float type and `softmax_precision`. A row that may attend to nothing
//! gives zeros, as the specification's later errata say.

use crate::ir::{Dim, Type};
use crate::kernels::attention::{Attention, Heads, Keep, joined, results};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use std::borrow::Cow;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.Attention", operands: (3, 7), results: (1, 4), infer, eval, ..OpDef::NEW }];

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let unranked = || vec![Type::unranked(elem).into(); 4];
    let heads = |name: &str| cx.attrs.int(name).map_or(Dim::Unknown, Dim::Known);
    // [batch, heads, positions, size of a head] of Q, K and V.
    let split = |i: usize, count: Dim| -> Option<[Dim; 4]> {
        match cx.dims(i)? {
            [b, h, s, d] => Some([b.clone(), h.clone(), s.clone(), d.clone()]),
            [b, s, hidden] => Some([b.clone(), count.clone(), s.clone(), hidden.div(&count)]),
            _ => None,
        }
    };
    let (Some(q), Some(k), Some(v)) =
        (split(0, heads("q_num_heads")), split(1, heads("kv_num_heads")), split(2, heads("kv_num_heads")))
    else {
        return Ok(unranked());
    };
    let past = match (cx.has(4), cx.dims(4)) {
        (false, _) => Dim::Known(0),
        (true, Some([_, _, s, _])) => s.clone(),
        _ => Dim::Unknown,
    };
    let total = past.add(&k[2]);
    let [batch, q_heads, rows, _] = q;
    let y = match cx.dims(0).map(<[Dim]>::len) {
        Some(3) => Type::tensor(elem, [batch.clone(), rows.clone(), q_heads.mul(&v[3])]),
        _ => Type::tensor(elem, [batch.clone(), q_heads.clone(), rows.clone(), v[3].clone()]),
    };
    let cache = |x: &[Dim; 4]| Type::tensor(elem, [batch.clone(), k[1].clone(), total.clone(), x[3].clone()]);
    let scores = Type::tensor(elem, [batch.clone(), q_heads, rows, total.clone()]);
    Ok(vec![y.into(), cache(&k).into(), cache(&v).into(), scores.into()])
}

/// What is added to the scores: a mask tensor, the causal frontier, a window, and padding.
struct Bias<'a> {
    mask: Option<(Cow<'a, [f32]>, [usize; 4])>,
    /// Whether a mask of one column stands for all keys (opset 23), rather than for the first (24 on).
    spread: bool,
    causal: bool,
    window: [Option<i64>; 2],
    /// Valid keys of each batch, where they are given.
    valid: Option<Vec<i64>>,
    /// Keys before the first query; minus the query rows is added for `valid`.
    past: i64,
    rows: i64,
}

impl<'a> Bias<'a> {
    fn of(cx: &EvalCx<'a>, [batch, heads, rows, keys]: [usize; 4], past: usize) -> Result<Bias<'a>, OpError> {
        let mask = cx.opt(3)?.map(|t| {
            let values: Cow<[f32]> = match t.bools() {
                Ok(b) => b.iter().map(|&b| if b { 0.0 } else { f32::NEG_INFINITY }).collect(),
                Err(_) => t.to_f32()?,
            };
            let mut shape = [1; 4];
            let rank = t.rank().min(4);
            shape[4 - rank..].copy_from_slice(&t.shape()[t.rank() - rank..]);
            let fits = [(shape[0], batch), (shape[1], heads), (shape[2], rows)];
            if t.rank() > 4 || fits.iter().any(|&(d, n)| d != 1 && d != n) || shape[3] > keys.max(1) {
                let message =
                    format!("a mask of shape {:?} for [{batch}, {heads}, {rows}, {keys}]", t.shape());
                return Err(OpError::invalid(message));
            }
            Ok((values, shape))
        });
        let valid = cx.opt(6)?.map(|t| t.to_i64().map(Cow::into_owned)).transpose()?;
        if valid.as_ref().is_some_and(|v| v.len() != batch) {
            return Err(OpError::invalid(format!("nonpad_kv_seqlen does not have {batch} elements")));
        }
        let side = |name: &str| cx.attrs.int(name).filter(|&n| n >= 0);
        Ok(Bias {
            mask: mask.transpose()?,
            spread: cx.opset < 24,
            causal: cx.int_or("is_causal", 0) != 0,
            window: [side("left_window_size"), side("right_window_size")],
            valid,
            past: past as i64,
            rows: rows as i64,
        })
    }

    /// Writes the bias of a row into `out`. Returns whether there is any.
    fn row(&self, batch: usize, head: usize, row: usize, out: &mut [f32]) -> bool {
        let windowed = self.window.iter().any(Option::is_some);
        if self.mask.is_none() && !self.causal && !windowed && self.valid.is_none() {
            return false;
        }
        out.fill(0.0);
        if let Some((mask, [b, h, r, n])) = &self.mask {
            let pick = |i: usize, size: usize| if size == 1 { 0 } else { i };
            let start = ((pick(batch, *b) * h + pick(head, *h)) * r + pick(row, *r)) * n;
            match mask[start..start + n] {
                [only] if self.spread => out.fill(only),
                ref values => {
                    out[..*n].copy_from_slice(values);
                    out[*n..].fill(f32::NEG_INFINITY);
                }
            }
        }
        let valid = self.valid.as_ref().map(|v| v[batch]);
        let position = row as i64 + valid.map_or(self.past, |v| v - self.rows);
        let [left, right] = self.window;
        // Keys from..to may be attended to.
        let mut to = valid.unwrap_or(i64::MAX);
        if self.causal {
            to = to.min(position + 1);
        }
        to = to.min(right.map_or(i64::MAX, |w| position.saturating_add(w).saturating_add(1)));
        let from = left.map_or(0, |w| position.saturating_sub(w));
        let inside = |i: i64| usize::try_from(i).unwrap_or(0).min(out.len());
        let (from, to) = (inside(from), inside(to));
        out[..from].fill(f32::NEG_INFINITY);
        out[to..].fill(f32::NEG_INFINITY);
        true
    }
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (q_heads, kv_heads) = (cx.attrs.int("q_num_heads"), cx.attrs.int("kv_num_heads"));
    let cache = |i: usize| cx.opt(i)?.map(|t| Heads::of(t, None)).transpose();
    let (x, past) = (cx.input(0)?, cache(4)?);
    let q = Heads::of(x, q_heads)?;
    let k = Heads::of(cx.input(1)?, kv_heads)?.after(past.as_ref())?;
    let v = Heads::of(cx.input(2)?, kv_heads)?.after(cache(5)?.as_ref())?;
    let [batch, heads, rows, _] = q.shape();
    let bias = Bias::of(cx, [batch, heads, rows, k.positions], past.map_or(0, |p| p.positions))?;
    let mode = match cx.int_or("qk_matmul_output_mode", 0) {
        0 => Keep::Products,
        1 => Keep::Capped,
        2 => Keep::Biased,
        3 => Keep::Weights,
        other => return Err(OpError::invalid(format!("qk_matmul_output_mode is {other}, expected 0 to 3"))),
    };
    let attention = Attention {
        scale: cx.attrs.float("scale").unwrap_or(1.0 / (q.size as f32).sqrt()),
        softcap: cx.float_or("softcap", 0.0),
        bias: &|batch, head, row, out: &mut [f32]| bias.row(batch, head, row, out),
        sinks: None,
        keep: (cx.outputs > 3).then_some(mode),
    };
    let (y, scores) = attention.run(&q, &k, &v)?;
    let shape = [batch, heads, rows, v.size];
    let y = match x.rank() {
        3 => joined(x.elem(), &y, shape)?,
        _ => Tensor::from_f32(x.elem(), &shape, y)?,
    };
    results(cx.outputs, y, [&k, &v], (scores, [batch, heads, rows, k.positions]))
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("attention");
    }
}
