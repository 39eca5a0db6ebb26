//! CausalConvWithState: a convolution of each channel with its own kernel, over this position and those before it,
//! which a state carries from one call to the next.

use super::util;
use crate::ir::Dim;
use crate::kernels::real::{Real, with_real};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[OpDef {
    name: "onnx.CausalConvWithState",
    operands: (2, 4),
    results: (1, 2),
    infer,
    verify: |cx| activated(cx.attrs.str("activation")).map(|_| ()),
    eval: |cx| with_real!(cx.input(0)?, T => eval::<T>(cx)),
}];

/// Whether `y * sigmoid(y)` is applied.
fn activated(name: Option<&str>) -> Result<bool, OpError> {
    match name.unwrap_or("none") {
        "none" => Ok(false),
        "silu" | "swish" => Ok(true),
        other => Err(OpError::invalid(format!("activation is {other:?}, expected none, silu or swish"))),
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let taps = match cx.dims(1) {
        Some([_, _, k]) => k.sub(&Dim::Known(1)),
        Some(_) => return Err(OpError::invalid(format!("the kernels are {}, expected 3 dims", cx.ty(1)))),
        None => Dim::Unknown,
    };
    let Some(dims) = cx.dims(0) else {
        return Ok(vec![util::fact(elem, None, None), util::fact(elem, None, None)]);
    };
    let [batch, channels, _] = dims else {
        return Err(OpError::invalid(format!("the input is {}, expected 3 dims", cx.ty(0))));
    };
    let state = vec![batch.clone(), channels.clone(), taps];
    Ok(vec![util::fact(elem, Some(dims.to_vec()), None), util::fact(elem, Some(state), None)])
}

fn eval<T: Real>(cx: &EvalCx) -> Evaluated {
    let (x, w) = (cx.input(0)?, cx.input(1)?);
    let silu = activated(cx.attrs.str("activation"))?;
    let (&[batch, channels, length], &[filters, 1, taps]) = (x.shape(), w.shape()) else {
        let message = format!("the input has shape {:?} and the kernels {:?}", x.shape(), w.shape());
        return Err(OpError::invalid(message));
    };
    let (bias, past) = (cx.opt(2)?, cx.opt(3)?);
    let carried = [batch, channels, taps.saturating_sub(1)];
    let fits = filters == channels
        && taps > 0
        && bias.is_none_or(|b| b.len() == channels)
        && past.is_none_or(|p| p.shape() == carried);
    if !fits {
        let (x, w, past) = (x.shape(), w.shape(), past.map(Tensor::shape));
        let message = format!("input {x:?}, kernels {w:?} and past state {past:?} do not fit");
        return Err(OpError::invalid(message));
    }
    let (values, kernels) = (T::values(x)?, T::values(w)?);
    let bias = bias.map(T::values).transpose()?;
    let past = past.map(T::values).transpose()?;
    // Each channel: what was carried, or zeros, and then its own elements.
    let whole = |i: usize| -> Vec<T> {
        let before = match &past {
            Some(p) => p[i * (taps - 1)..][..taps - 1].to_vec(),
            None => vec![T::zero(); taps - 1],
        };
        [&before, &values[i * length..][..length]].concat()
    };
    let (mut y, mut state) = (vec![T::zero(); x.len()], vec![T::zero(); batch * channels * (taps - 1)]);
    let rows: Vec<Vec<T>> = (0..batch * channels).into_par_iter().map(whole).collect();
    if length > 0 {
        y.par_chunks_mut(length).zip(&rows).enumerate().for_each(|(i, (y, row))| {
            let c = i % channels;
            for (t, y) in y.iter_mut().enumerate() {
                let kernel = &kernels[c * taps..][..taps];
                let sum: T = row[t..t + taps].iter().zip(kernel).map(|(&v, &k)| v * k).sum();
                *y = sum + bias.as_ref().map_or(T::zero(), |b| b[c]);
            }
        });
    }
    if taps > 1 {
        state.chunks_exact_mut(taps - 1).zip(&rows).for_each(|(s, row)| s.copy_from_slice(&row[length..]));
    }
    if silu {
        // Of the convolution as it would be stored.
        y = T::values(&T::tensor(x.elem(), x.shape(), y)?)?
            .iter()
            .map(|&v| v / (T::one() + (-v).exp()))
            .collect();
    }
    let state = T::tensor(x.elem(), &carried, state)?;
    Ok(vec![T::tensor(x.elem(), x.shape(), y)?.into(), state.into()])
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let t = |shape: &[usize]| Some(Tensor::new(shape, vec![0f32; shape.iter().product()]).unwrap());
        let case = |x: &[usize], w: &[usize], past: Option<&[usize]>, attrs: &[(&str, Attr)]| {
            Case::new("onnx.CausalConvWithState", 27, attrs, vec![t(x), t(w), None, past.and_then(t)])
        };
        assert!(case(&[2, 3, 4], &[3, 1, 2], Some(&[2, 3, 1]), &[]).eval(false).is_ok());
        refused(&case(&[2, 3], &[3, 1, 2], None, &[]), "input");
        refused(&case(&[2, 3, 4], &[3, 2], None, &[]), "kernels");
        refused(&case(&[2, 3, 4], &[3, 1, 2], None, &[("activation", "relu".into())]), "activation is");
        for (w, past) in
            [([4, 1, 2], None), ([3, 2, 2], None), ([3, 1, 0], None), ([3, 1, 2], Some([2, 3, 2]))]
        {
            let past = past.as_ref().map(|p: &[usize; 3]| &p[..]);
            assert!(case(&[2, 3, 4], &w, past, &[]).eval(false).is_err(), "{w:?} {past:?}");
        }
    }
}
