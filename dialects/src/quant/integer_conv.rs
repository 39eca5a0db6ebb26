//! ConvInteger and QLinearConv: convolutions of 8-bit integers.
//!
//! Sums are computed in double precision, where every sum of 8-bit products is exact, and wrap to 32 bits.

use crate::ir::Elem;
use crate::onnx::conv::{self, Conv};
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.ConvInteger",
        operands: (2, 4),
        infer: |cx| conv::infer(cx, 0, 1, Some(Elem::I32)),
        eval: conv_integer,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.QLinearConv",
        operands: (8, 9),
        infer: |cx| conv::infer(cx, 0, 3, cx.elem(7)),
        eval: qlinear_conv,
        ..OpDef::NEW
    },
];

/// The codes `t` minus the zero points: one, or one for each index of the first dim.
fn centered(t: &Tensor, zero: Option<&Tensor>, what: &str) -> Result<Vec<f64>, OpError> {
    if !matches!(t.elem(), Elem::I8 | Elem::U8) {
        return Err(OpError::invalid(format!("{what} is of {}, expected i8 or u8", t.elem())));
    }
    let mut x: Vec<f64> = t.to_i64()?.iter().map(|&v| v as f64).collect();
    let Some(zero) = zero else { return Ok(x) };
    let zeros = per_filter(&zero.to_i64()?, t.shape().first().copied().unwrap_or(1), what)?;
    if zero.elem() != t.elem() {
        let message = format!("{what} is of {} and its zero point of {}", t.elem(), zero.elem());
        return Err(OpError::invalid(message));
    }
    let each = x.len() / zeros.len().max(1);
    if each > 0 {
        for (x, z) in x.chunks_exact_mut(each).zip(zeros) {
            x.iter_mut().for_each(|x| *x -= z as f64);
        }
    }
    Ok(x)
}

/// One parameter for each of `count` filters, from as many or from one.
fn per_filter<T: Copy>(p: &[T], count: usize, what: &str) -> Result<Vec<T>, OpError> {
    match p {
        [one] => Ok(vec![*one; count]),
        p if p.len() == count => Ok(p.to_vec()),
        p => Err(OpError::invalid(format!("{what} has {} parameters, expected 1 or {count}", p.len()))),
    }
}

/// The parameter of a whole tensor.
fn scalar(cx: &EvalCx, i: usize) -> Result<f32, OpError> {
    match cx.input(i)?.f32s()? {
        [s] => Ok(*s),
        s => Err(OpError::invalid(format!("operand {i} has {} elements, expected one", s.len()))),
    }
}

/// The sums of X and W, and the operation.
fn sums(
    cx: &EvalCx,
    (x, x_zero): (&Tensor, Option<&Tensor>),
    (w, w_zero): (&Tensor, Option<&Tensor>),
    bias: Option<&[f64]>,
) -> Result<(Conv, Vec<i32>), OpError> {
    let conv = Conv::of(cx.attrs, x.shape(), w.shape())?;
    if let Some(z) = x_zero.filter(|z| z.len() != 1) {
        return Err(OpError::invalid(format!("the zero point of X has shape {:?}", z.shape())));
    }
    let y = conv.run(&centered(x, x_zero, "X")?, &centered(w, w_zero, "W")?, bias)?;
    // Sums beyond 32 bits wrap, as integer accumulators do.
    Ok((conv, y.into_iter().map(|v| v as i64 as i32).collect()))
}

fn conv_integer(cx: &EvalCx) -> Evaluated {
    let (conv, y) = sums(cx, (cx.input(0)?, cx.opt(2)?), (cx.input(1)?, cx.opt(3)?), None)?;
    cx.one(Tensor::new(&conv.shape(), y)?)
}

/// `round(sum * x_scale * w_scale / y_scale) + y_zero_point`, saturated, the factor in single precision as runtimes
/// have it.
fn qlinear_conv(cx: &EvalCx) -> Evaluated {
    let bias =
        cx.opt(8)?.map(|b| Ok::<_, OpError>(b.to_i64()?.iter().map(|&v| v as f64).collect::<Vec<_>>()));
    let bias = bias.transpose()?;
    let (x, w) = ((cx.input(0)?, cx.opt(2)?), (cx.input(3)?, cx.opt(5)?));
    let (conv, sums) = sums(cx, x, w, bias.as_deref())?;
    let (x_scale, y_scale) = (scalar(cx, 1)?, scalar(cx, 6)?);
    let scales = per_filter(cx.input(4)?.f32s()?, conv.filters, "w_scale")?;
    let zero = cx.input(7)?;
    let (low, high) = match zero.elem() {
        Elem::I8 => (-128.0, 127.0),
        Elem::U8 => (0.0, 255.0),
        other => return Err(OpError::invalid(format!("QLinearConv to {other}, expected i8 or u8"))),
    };
    let &[z] = &zero.to_i64()?[..] else {
        return Err(OpError::invalid(format!("the zero point of Y has shape {:?}", zero.shape())));
    };
    let positions = conv.sliding.positions().max(1);
    let code = |(i, &sum): (usize, &i32)| {
        let factor = x_scale * scales[i / positions % conv.filters] / y_scale;
        (f64::from((sum as f32 * factor).round_ties_even()) + z as f64).clamp(low, high)
    };
    let codes = sums.iter().enumerate().map(code);
    cx.one(match zero.elem() {
        Elem::I8 => Tensor::new(&conv.shape(), codes.map(|c| c as i8).collect::<Vec<_>>())?,
        _ => Tensor::new(&conv.shape(), codes.map(|c| c as u8).collect::<Vec<_>>())?,
    })
}

#[cfg(test)]
mod tests {
    use crate::ir::Elem;
    use crate::tensor::{Data, Tensor};
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("integer_conv");
    }

    #[test]
    fn a_sum_that_single_precision_cannot_hold_is_exact() {
        // 300 000 products of 255 * 255, less one: 19 507 500 000 - 65 025 + 255 * 254, modulo 2^32.
        let n = 300_000;
        let mut w = vec![255u8; n];
        w[n - 1] = 254;
        let x = Tensor::new(&[1, n, 1], vec![255u8; n]).unwrap();
        let w = Tensor::new(&[1, n, 1], w).unwrap();
        let y = Case::new("onnx.ConvInteger", 10, &[], vec![Some(x), Some(w)]).eval(false).unwrap();
        let want = (255i64 * 255 * (n as i64 - 1) + 255 * 254) as i32;
        assert_eq!(y[0].tensor().unwrap().data(), &Data::I32(vec![want]));
        assert_eq!(y[0].tensor().unwrap().elem(), Elem::I32);
    }

    #[test]
    fn parameters_that_do_not_fit_are_refused() {
        let codes = |shape: &[usize]| Tensor::new(shape, vec![1u8; shape.iter().product()]).unwrap();
        let case = |x_zero: Tensor, w_zero: Tensor| {
            let operands = vec![Some(codes(&[1, 2, 4])), Some(codes(&[3, 2, 2])), Some(x_zero), Some(w_zero)];
            Case::new("onnx.ConvInteger", 10, &[], operands)
        };
        assert!(case(codes(&[]), codes(&[3])).eval(false).is_ok());
        assert!(case(codes(&[2]), codes(&[])).eval(false).is_err());
        assert!(case(codes(&[]), codes(&[2])).eval(false).is_err());
        assert!(case(codes(&[]), Tensor::scalar(1i8)).eval(false).is_err());
        refused(
            &Case::new("onnx.ConvInteger", 10, &[], vec![Some(codes(&[1, 2, 4])), Some(codes(&[3, 3, 2]))]),
            "groups",
        );
    }
}
