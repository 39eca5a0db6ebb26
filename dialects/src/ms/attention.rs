//! Attention and QAttention: the projection to Q, K and V in one product, and attention over their heads.
//!
//! The cache holds keys, then values: `[2, batch, heads, past, size]`.

use super::integer::product;
use super::mask::Mask;
use super::part::{Part, add_opt};
use crate::ir::{Dim, Type};
use crate::kernels::attention::{Attention, Heads, joined};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    // input, weight, bias, mask, past, bias of the scores, past length.
    OpDef {
        name: "com.microsoft.Attention",
        operands: (2, 7),
        results: (1, 2),
        infer: |cx| infer(cx, 0, 4),
        eval: eval_float,
        ..OpDef::NEW
    },
    // input, weight, bias, scales of input and weight, mask, zero points of input and weight, past.
    OpDef {
        name: "com.microsoft.QAttention",
        operands: (5, 9),
        results: (1, 2),
        infer: |cx| infer(cx, 3, 8),
        eval: eval_quantized,
        ..OpDef::NEW
    },
];

/// `elem` is an operand of the result's type.
fn infer(cx: &InferCx, elem: usize, past: usize) -> Inferred {
    let Some(elem) = cx.elem(elem) else { return Ok(Vec::new()) };
    let Some([batch, rows, _]) = cx.dims(0) else { return Ok(vec![Type::unranked(elem).into(); 2]) };
    let heads = cx.attrs.int("num_heads").map_or(Dim::Unknown, Dim::Known);
    let third = || match cx.dims(1) {
        Some([_, all]) => all.div(&Dim::Known(3)),
        _ => Dim::Unknown,
    };
    let sizes = cx.attrs.ints("qkv_hidden_sizes");
    let hidden = sizes.and_then(|s| s.get(2)).map_or_else(third, |&n| Dim::Known(n));
    let old = match (cx.has(past), cx.dims(past)) {
        (false, _) => Dim::Known(0),
        (true, Some([_, _, _, old, _])) => old.clone(),
        _ => Dim::Unknown,
    };
    let y = Type::tensor(elem, [batch.clone(), rows.clone(), hidden.clone()]);
    let cache = [Dim::Known(2), batch.clone(), heads.clone(), old.add(rows), hidden.div(&heads)];
    Ok(vec![y.into(), Type::tensor(elem, cache).into()])
}

fn eval_float(cx: &EvalCx) -> Evaluated {
    if cx.int_or("past_present_share_buffer", 0) != 0 {
        return Err(OpError::Unsupported("a cache in a buffer of fixed length".into()));
    }
    let projected = Part::new("MatMul").of(cx, &[cx.input(0)?, cx.input(1)?])?;
    let projected = add_opt(cx, projected, cx.opt(2)?)?;
    attend(cx, &projected, cx.opt(3)?, cx.opt(4)?, cx.opt(5)?)
}

fn eval_quantized(cx: &EvalCx) -> Evaluated {
    let x = (cx.input(0)?, cx.input(3)?, cx.opt(6)?);
    let projected = product(cx, x, (cx.input(1)?, cx.input(4)?, cx.opt(7)?))?;
    let projected = add_opt(cx, projected, cx.opt(2)?)?;
    attend(cx, &projected, cx.opt(5)?, cx.opt(8)?, None)
}

/// Attention over the heads of `[batch, rows, hidden of Q + hidden of K + hidden of V]`.
fn attend<'a>(
    cx: &EvalCx<'a>,
    projected: &Tensor,
    mask: Option<&Tensor>,
    past: Option<&Tensor>,
    bias: Option<&'a Tensor>,
) -> Evaluated {
    if cx.int_or("do_rotary", 0) != 0 {
        return Err(OpError::Unsupported("rotary embedding inside the op (do_rotary)".into()));
    }
    let [batch, rows, width] = *projected.shape() else {
        let found = projected.shape();
        return Err(OpError::invalid(format!(
            "the projected input has shape {found:?}, expected three dims"
        )));
    };
    let heads = usize::try_from(cx.int_or("num_heads", 0)).unwrap_or(0);
    let sizes: Vec<usize> = match cx.attrs.ints("qkv_hidden_sizes") {
        Some(given) => given.iter().filter_map(|&n| usize::try_from(n).ok()).collect(),
        None => vec![width / 3; 3],
    };
    let fits = sizes.len() == 3 && sizes.iter().try_fold(0usize, |n, &s| n.checked_add(s)) == Some(width);
    if heads == 0 || !fits || sizes.iter().any(|s| s % heads != 0) {
        let message = format!("{width} columns are not made of Q, K and V of {sizes:?}, {heads} heads each");
        return Err(OpError::invalid(message));
    }
    let data = projected.to_f32()?;
    let part = |i: usize| {
        let from = sizes[..i].iter().sum();
        Heads::side_by_side(&data[..], [batch, rows, width], from, [heads, sizes[i] / heads])
    };
    let cached = past.map(Tensor::to_f32).transpose()?;
    let cache = |which: usize, size: usize| -> Result<Option<Heads>, OpError> {
        let (Some(t), Some(data)) = (past, &cached) else { return Ok(None) };
        match *t.shape() {
            [2, b, h, old, s] if (b, h, s) == (batch, heads, size) => {
                let half = data.len() / 2;
                Heads::contiguous(&data[which * half..][..half], [b, h, old, s]).map(Some)
            }
            ref other => Err(OpError::invalid(format!(
                "past has shape {other:?}, expected [2, {batch}, {heads}, past, {size}]"
            ))),
        }
    };
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let (k_size, v_size) = (k.size, v.size);
    let old = past.map_or(0, |t| t.shape().get(3).copied().unwrap_or(0));
    let k = k.after(cache(0, k_size)?.as_ref())?;
    let v = v.after(cache(1, v_size)?.as_ref())?;
    let mask = Mask::of(cx, mask, bias, [batch, heads, rows, k.positions], old)?;
    let attention = Attention {
        scale: cx.attrs.float("scale").unwrap_or(1.0 / (q.size as f32).sqrt()),
        softcap: 0.0,
        bias: &|batch, head, row, out: &mut [f32]| mask.row(batch, head, row, out),
        sinks: None,
        keep: None,
    };
    let (y, _) = attention.run(&q, &k, &v)?;
    let elem = projected.elem();
    let y = joined(elem, &y, [batch, heads, rows, v.size])?;
    if cx.outputs < 2 {
        return cx.one(y);
    }
    if k.size != v.size {
        let message = "a cache of keys and values of different sizes".to_string();
        return Err(OpError::Unsupported(message));
    }
    let mut present = k.values()?.into_owned();
    present.extend_from_slice(&v.values()?);
    let present = Tensor::from_f32(elem, &[2, batch, heads, k.positions, k.size], present)?;
    Ok(vec![y.into(), present.into()])
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::Case;

    #[test]
    fn what_does_not_fit_is_refused() {
        let zeros = |shape: &[usize]| Some(Tensor::new(shape, vec![0f32; shape.iter().product()]).unwrap());
        let error = |attrs: &[(&str, Attr)], mask: Option<Tensor>, past: Option<Tensor>| {
            let inputs = vec![zeros(&[2, 3, 4]), zeros(&[4, 24]), None, mask, past];
            let case = Case::new("com.microsoft.Attention", 1, attrs, inputs);
            case.eval(false).map_or_else(|e| e.to_string(), |_| String::new())
        };
        let two: &[(&str, Attr)] = &[("num_heads", 2.into())];
        assert_eq!(error(two, None, None), "");
        assert!(error(&[], None, None).contains("0 heads each"));
        assert!(error(&[("num_heads", 3.into())], None, None).contains("3 heads each"));
        let sizes: Attr = vec![8, 8, 9].into();
        assert!(
            error(&[("num_heads", 2.into()), ("qkv_hidden_sizes", sizes)], None, None).contains("24 columns")
        );
        let mask = Tensor::new(&[2, 4], vec![1i32; 8]).unwrap();
        assert!(error(two, Some(mask), None).contains("a mask of shape [2, 4]"));
        assert!(error(two, None, zeros(&[2, 2, 2, 5, 3])).contains("expected [2, 2, 2, past, 4]"));
        assert!(error(&[("num_heads", 2.into()), ("do_rotary", 1.into())], None, None).contains("do_rotary"));
    }

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_attention");
    }
}
