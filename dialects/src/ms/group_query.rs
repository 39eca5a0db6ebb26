//! GroupQueryAttention: causal attention with fewer heads of K and V than of Q, rotary embedding inside, and a key/value
//! cache whose rows each have a length of their own.
//!
//! `seqlens_k[b] + 1` is the length of row `b` with its new positions, `total_sequence_length` the longest. Where the
//! new positions are all there are, the cache counts as empty, whatever its length: a buffer of fixed length is
//! filled from its start. The new positions of row `b` go behind its old ones.

use super::mask::{add_bias, broadcast_bias};
use crate::ir::{Dim, Type};
use crate::kernels::attention::{Attention, Heads, Keep, joined, results};
use crate::kernels::rotary::Angles;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file: query, key, value, past key and value, lengths less one, the longest, cosines, sines,
/// positions, bias of the scores, sinks, scales of a quantized cache, gains of normalized Q and K.
pub const OPS: &[OpDef] = &[OpDef {
    name: "com.microsoft.GroupQueryAttention",
    operands: (7, 16),
    results: (1, 4),
    infer,
    verify,
    eval,
}];

fn counts(attrs: &crate::ir::Attrs) -> Result<[usize; 2], OpError> {
    let one = |name: &str| {
        let n = attrs.int(name).and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        n.ok_or_else(|| OpError::invalid(format!("the attribute {name} is missing or not positive")))
    };
    let [heads, kv_heads] = [one("num_heads")?, one("kv_num_heads")?];
    match heads.is_multiple_of(kv_heads) {
        true => Ok([heads, kv_heads]),
        false => Err(OpError::invalid(format!("{heads} heads of Q for {kv_heads} heads of K and V"))),
    }
}

fn verify(cx: &InferCx) -> Result<(), OpError> {
    counts(cx.attrs).map(|_| ())
}

fn infer(cx: &InferCx) -> Inferred {
    let [heads, kv_heads] = counts(cx.attrs)?;
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let cached = cx.elem(3).unwrap_or(elem);
    let Some([batch, rows, width]) = cx.dims(0) else {
        let [y, cache] = [elem, cached].map(|e| Type::unranked(e).into());
        return Ok(vec![y, cache.clone(), cache]);
    };
    let packed = if cx.has(1) { heads } else { heads + 2 * kv_heads };
    let size = width.div(&Dim::from(packed));
    let total = cx.sym(6).and_then(|s| s.first());
    let old = match (cx.has(3), cx.dims(3)) {
        (false, _) => Some(Dim::Known(0)),
        (true, Some([_, _, old, _])) => Some(old.clone()),
        _ => None,
    };
    // As long as the cache was, or as it must be.
    let length = match (old, total) {
        (Some(Dim::Known(0)), Some(total)) => total.clone(),
        (Some(Dim::Known(old)), Some(Dim::Known(total))) => Dim::Known(old.max(*total)),
        _ => Dim::Unknown,
    };
    let y = Type::tensor(elem, [batch.clone(), rows.clone(), size.mul(&Dim::from(heads))]);
    let cache = Type::tensor(cached, [batch.clone(), Dim::from(kv_heads), length, size.clone()]);
    let scores = [batch.clone(), Dim::from(heads), rows.clone(), total.cloned().unwrap_or(Dim::Unknown)];
    Ok(vec![y.into(), cache.clone().into(), cache.into(), Type::tensor(elem, scores).into()])
}

/// What of the op is not computed here.
fn refuse(cx: &EvalCx) -> Result<(), OpError> {
    let quantized = |name: &str| cx.attrs.str(name).is_some_and(|s| s != "NONE" && !s.is_empty());
    let what = if quantized("k_quant_type") || quantized("v_quant_type") || cx.opt(12)?.is_some() {
        "a quantized cache"
    } else if cx.int_or("sliding_window_cache", 0) != 0 {
        "a cache as long as the window (sliding_window_cache)"
    } else if cx.opt(14)?.is_some() || cx.opt(15)?.is_some() {
        "normalized Q and K (q_norm_weight, k_norm_weight)"
    } else {
        return Ok(());
    };
    Err(OpError::Unsupported(what.into()))
}

/// Q, K and V, each in its own tensor or side by side in one.
fn split<'a>(cx: &EvalCx<'a>, [heads, kv_heads]: [usize; 2]) -> Result<[Heads<'a>; 3], OpError> {
    let x = cx.input(0)?;
    let count = |n: usize| i64::try_from(n).ok();
    if let (Some(k), Some(v)) = (cx.opt(1)?, cx.opt(2)?) {
        let [q, k, v] = [(x, heads), (k, kv_heads), (v, kv_heads)].map(|(t, n)| Heads::of(t, count(n)));
        return Ok([q?, k?, v?]);
    }
    let all = heads + 2 * kv_heads;
    match *x.shape() {
        [batch, rows, width] if width % all == 0 => {
            let (size, data) = (width / all, x.to_f32()?);
            let part = |from: usize, n: usize| {
                Heads::side_by_side(data.clone(), [batch, rows, width], from * size, [n, size])
            };
            Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
        }
        ref other => Err(OpError::invalid(format!("a query of shape {other:?} is not made of {all} heads"))),
    }
}

/// How long each row of the cache is.
struct Lengths {
    /// Old positions of each row.
    old: Vec<usize>,
    /// Old and new ones.
    all: Vec<usize>,
    /// The longest.
    total: usize,
}

impl Lengths {
    fn of(cx: &EvalCx, batch: usize, rows: usize) -> Result<Lengths, OpError> {
        let (lengths, total) = (cx.input(5)?.to_i64()?, cx.input(6)?.to_i64()?);
        let wrong = |what: &str| {
            OpError::invalid(format!(
                "seqlens_k {lengths:?} and total_sequence_length {total:?} for {batch} rows of {rows}: {what}"
            ))
        };
        let [longest] = total[..] else { return Err(wrong("expected one total")) };
        if lengths.len() != batch {
            return Err(wrong("expected one length a row"));
        }
        let longest = usize::try_from(longest).map_err(|_| wrong("a negative total"))?;
        let inside = |&n: &i64| usize::try_from(n.checked_add(1)?).ok().filter(|&n| n <= longest);
        let all: Option<Vec<usize>> = lengths.iter().map(inside).collect();
        let all = all.ok_or_else(|| wrong("a length is beyond the total"))?;
        let old: Option<Vec<usize>> = match longest == rows {
            true => Some(vec![0; batch]),
            false => all.iter().map(|n| n.checked_sub(rows)).collect(),
        };
        let old = old.ok_or_else(|| wrong("there are fewer positions than new ones"))?;
        Ok(Lengths { old, all, total: longest })
    }
}

/// Q and K turned by their positions.
fn rotate<'a>(cx: &EvalCx<'a>, q: Heads<'a>, k: Heads<'a>, l: &Lengths) -> Result<[Heads<'a>; 2], OpError> {
    if cx.int_or("do_rotary", 0) == 0 {
        return Ok([q, k]);
    }
    let [batch, _, rows, size] = q.shape();
    let interleaved = cx.int_or("rotary_interleaved", 0) != 0;
    let angles = Angles::of(cx.input(7)?, cx.input(8)?, size, interleaved)?;
    let first = l.total == rows;
    let given = cx.opt(9)?.map(Tensor::to_i64).transpose()?;
    let position = |i: usize| {
        let (b, row) = (i / rows, (i % rows) as i64);
        match &given {
            // At the start, the first one counts for all.
            Some(p) if first => p.first().map_or(row, |&p| p.saturating_add(row)),
            Some(p) => p.get(i).copied().unwrap_or(-1),
            None => l.old[b] as i64 + row,
        }
    };
    let at: Vec<usize> = (0..batch * rows).map(|i| angles.row(position(i))).collect::<Result<_, _>>()?;
    let turn = |x: &Heads<'a>| x.changed(|b, _, p, head| angles.turn(head, at[b * rows + p]));
    Ok([turn(&q)?, turn(&k)?])
}

fn eval(cx: &EvalCx) -> Evaluated {
    refuse(cx)?;
    let counts = counts(cx.attrs)?;
    let x = cx.input(0)?;
    let [q, k, v] = split(cx, counts)?;
    let [batch, heads, rows, size] = q.shape();
    if (k.batch, k.positions, k.size) != (batch, rows, size) {
        let (q, k) = (q.shape(), k.shape());
        return Err(OpError::invalid(format!("Q has heads {q:?}, and K has {k:?}")));
    }
    let lengths = Lengths::of(cx, batch, rows)?;
    let [q, k] = rotate(cx, q, k, &lengths)?;
    let cache = |i: usize| cx.opt(i)?.map(|t| Heads::of(t, None)).transpose();
    let (past_k, past_v) = (cache(3)?, cache(4)?);
    let length = past_k.as_ref().map_or(0, |p| p.positions).max(lengths.total);
    let k = k.in_buffer(past_k.as_ref(), &lengths.old, length)?;
    let v = v.in_buffer(past_v.as_ref(), &lengths.old, length)?;
    let keys = lengths.total;
    let bias = cx.opt(10)?.map(|t| broadcast_bias(t, [batch, heads, rows, keys])).transpose()?;
    let causal = cx.int_or("causal", 1) != 0;
    let window = usize::try_from(cx.int_or("local_window_size", -1)).ok();
    let row = |b: usize, head: usize, row: usize, out: &mut [f32]| {
        out.fill(0.0);
        if let Some(bias) = &bias {
            add_bias(bias, b, head, row, out);
        }
        let frontier = lengths.old[b] + row + 1;
        let to = if causal { frontier.min(lengths.all[b]) } else { lengths.all[b] }.min(out.len());
        let from = window.map_or(0, |w| frontier.saturating_sub(w)).min(to);
        out[..from].fill(f32::NEG_INFINITY);
        out[to..].fill(f32::NEG_INFINITY);
        true
    };
    let zeros = vec![0f32; heads];
    let sinks = cx.opt(11)?.map(Tensor::to_f32).transpose()?;
    let smooth = (cx.int_or("smooth_softmax", 0) == 1).then_some(&zeros[..]);
    let keep = match cx.int_or("qk_output", 0) {
        0 => None,
        1 => Some(Keep::Biased),
        2 => Some(Keep::Weights),
        other => return Err(OpError::invalid(format!("qk_output is {other}, expected 0, 1 or 2"))),
    };
    let attention = Attention {
        scale: cx.attrs.float("scale").filter(|&s| s != 0.0).unwrap_or(1.0 / (size as f32).sqrt()),
        softcap: cx.float_or("softcap", 0.0),
        bias: &row,
        sinks: sinks.as_deref().or(smooth),
        keep,
    };
    let (y, mut scores) = attention.run(&q, &k.first(keys), &v.first(keys))?;
    // Among the scores that are given back, those left out are zero.
    scores.iter_mut().filter(|s| **s == f32::NEG_INFINITY).for_each(|s| *s = 0.0);
    let y = joined(x.elem(), &y, [batch, heads, rows, v.size])?;
    results(cx.outputs, y, [&k, &v], (scores, [batch, heads, rows, keys]))
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::Case;

    /// Two rows of three positions, with these lengths less one, this total, and a cache of `past` positions.
    fn case(lengths: Vec<i32>, total: i32, past: usize, attrs: &[(&str, Attr)]) -> Case {
        let zeros = |shape: &[usize]| Some(Tensor::new(shape, vec![0f32; shape.iter().product()]).unwrap());
        let (q, k) = (zeros(&[2, 3, 32]), zeros(&[2, 3, 16]));
        let cache = || zeros(&[2, 2, past, 8]);
        let lengths = Tensor::new(&[lengths.len()], lengths).unwrap();
        let inputs = vec![q, k.clone(), k, cache(), cache(), Some(lengths), Some(Tensor::scalar(total))];
        let mut all: Vec<(&str, Attr)> = vec![("num_heads", 4.into()), ("kv_num_heads", 2.into())];
        all.extend_from_slice(attrs);
        Case::new("com.microsoft.GroupQueryAttention", 1, &all, inputs)
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = |c: Case| c.eval(false).unwrap_err().to_string();
        assert!(case(vec![2, 2], 3, 0, &[]).eval(false).is_ok());
        assert!(error(case(vec![2], 3, 0, &[])).contains("one length a row"));
        assert!(error(case(vec![2, 3], 3, 0, &[])).contains("beyond the total"));
        assert!(error(case(vec![2, i32::MAX], 3, 0, &[])).contains("beyond the total"));
        assert!(error(case(vec![2, 2], -1, 0, &[])).contains("negative total"));
        assert!(error(case(vec![5, 1], 6, 3, &[])).contains("fewer positions than new ones"));
        assert!(error(case(vec![2, 2], 3, 0, &[("num_heads", 3.into())])).contains("3 heads of Q"));
        assert!(error(case(vec![2, 2], 3, 0, &[("do_rotary", 1.into())])).contains("operand 7"));
        assert!(
            error(case(vec![2, 2], 3, 0, &[("k_quant_type", "PER_TENSOR".into())])).contains("quantized")
        );
        assert!(error(case(vec![2, 2], 3, 0, &[("qk_output", 7.into())])).contains("qk_output"));
    }

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_group_query");
    }
}
