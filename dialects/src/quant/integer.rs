//! DynamicQuantizeLinear, MatMulInteger and QLinearMatMul: products of 8-bit integers.
//!
//! Products are computed in double precision, where every sum of 8-bit products is exact.

use crate::ir::{Elem, Type};
use crate::kernels::strided;
use crate::onnx::matmul;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.DynamicQuantizeLinear",
        results: (1, 3),
        infer: infer_dynamic,
        eval: dynamic,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.MatMulInteger",
        operands: (2, 4),
        infer: |cx| infer_product(cx, 0, 1, Some(Elem::I32)),
        eval: matmul_integer,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.QLinearMatMul",
        operands: (8, 8),
        infer: |cx| infer_product(cx, 0, 3, cx.elem(7)),
        eval: qlinear_matmul,
        ..OpDef::NEW
    },
];

fn infer_dynamic(cx: &InferCx) -> Inferred {
    let codes = match cx.dims(0) {
        Some(dims) => Type::tensor(Elem::U8, dims.iter().cloned()),
        None => Type::unranked(Elem::U8),
    };
    Ok(vec![codes.into(), Type::of_shape(Elem::F32, &[]).into(), Type::of_shape(Elem::U8, &[]).into()])
}

/// The range of X, widened to hold zero, over the 256 codes.
fn dynamic(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let x = t.f32s()?;
    let (low, high) = x.iter().fold((0f32, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
    let scale = if high == low { 1.0 } else { (high - low) / 255.0 };
    let zero = (-low / scale).round_ties_even().clamp(0.0, 255.0);
    let codes: Vec<u8> = strided::map(x, |&v| ((v / scale).round_ties_even() + zero).clamp(0.0, 255.0) as u8);
    let codes = Tensor::new(t.shape(), codes)?;
    Ok(vec![codes.into(), Tensor::scalar(scale).into(), Tensor::scalar(zero as u8).into()])
}

fn infer_product(cx: &InferCx, a: usize, b: usize, elem: Option<Elem>) -> Inferred {
    let Some(elem) = elem else { return Ok(Vec::new()) };
    match (cx.dims(a), cx.dims(b)) {
        (Some(a), Some(b)) => Ok(vec![Type::tensor(elem, matmul::matmul_dims(a, b)?).into()]),
        _ => Ok(vec![Type::unranked(elem).into()]),
    }
}

/// Which dim of a matrix a parameter goes along.
#[derive(Clone, Copy)]
enum Along {
    Rows,
    Columns,
}

/// One parameter for each row or column of a product's operand (or, of its result): spread over a tensor of `shape`.
fn spread(p: &[f64], p_shape: &[usize], shape: &[usize], along: Along) -> Result<Vec<f64>, OpError> {
    let (rows, cols) = match *shape {
        [.., m, n] => (m, n),
        [n] => (1, n),
        [] => (1, 1),
    };
    let wrong = || OpError::invalid(format!("quantization parameters of shape {p_shape:?} for {shape:?}"));
    let wanted = match along {
        Along::Rows => rows,
        Along::Columns => cols,
    };
    let matrix = rows * cols;
    let batches = if p.len() == 1 { 1 } else { p.len().checked_div(wanted).unwrap_or(0) };
    let total = strided::count(shape)?;
    if p.len() != 1 && (batches * wanted != p.len() || (batches != 1 && batches * matrix != total)) {
        return Err(wrong());
    }
    let one = |i: usize| {
        let inside = match along {
            Along::Rows => i / cols % rows,
            Along::Columns => i % cols,
        };
        let batch = if batches == 1 { 0 } else { i / matrix };
        p[if p.len() == 1 { 0 } else { batch * wanted + inside }]
    };
    Ok((0..total).map(one).collect())
}

/// Operand `i` minus its zero points, operand `zero` if there is one.
fn centered(cx: &EvalCx, i: usize, zero: usize, along: Along) -> Result<Tensor, OpError> {
    let t = cx.input(i)?;
    let mut x: Vec<f64> = t.to_i64()?.iter().map(|&v| v as f64).collect();
    if let Some(z) = cx.opt(zero)? {
        let values: Vec<f64> = z.to_i64()?.iter().map(|&v| v as f64).collect();
        let zeros = spread(&values, z.shape(), t.shape(), along)?;
        x.iter_mut().zip(zeros).for_each(|(x, z)| *x -= z);
    }
    Ok(Tensor::new(t.shape(), x)?)
}

fn matmul_integer(cx: &EvalCx) -> Evaluated {
    let (a, b) = (centered(cx, 0, 2, Along::Rows)?, centered(cx, 1, 3, Along::Columns)?);
    let (shape, y) = matmul::product_f64(&a, &b)?;
    // Sums beyond 32 bits wrap, as integer accumulators do.
    cx.one(Tensor::new(&shape, y.into_iter().map(|v| v as i64 as i32).collect::<Vec<i32>>())?)
}

/// `round(a b * a_scale * b_scale / y_scale) + y_zero_point`, saturated.
fn qlinear_matmul(cx: &EvalCx) -> Evaluated {
    let (a, b) = (centered(cx, 0, 2, Along::Rows)?, centered(cx, 3, 5, Along::Columns)?);
    let (shape, mut y) = matmul::product_f64(&a, &b)?;
    let mut scale = |i: usize, along, divide: bool| -> Result<(), OpError> {
        let t = cx.input(i)?;
        let values: Vec<f64> = t.to_f32()?.iter().map(|&v| v.into()).collect();
        let factors = spread(&values, t.shape(), &shape, along)?;
        y.iter_mut().zip(factors).for_each(|(y, f)| *y = if divide { *y / f } else { *y * f });
        Ok(())
    };
    scale(1, Along::Rows, false)?;
    scale(4, Along::Columns, false)?;
    scale(6, Along::Rows, true)?;
    let zero = cx.input(7)?;
    let (low, high) = match zero.elem() {
        Elem::I8 => (-128.0, 127.0),
        Elem::U8 => (0.0, 255.0),
        other => return Err(OpError::Unsupported(format!("QLinearMatMul to {other}"))),
    };
    let zeros: Vec<f64> = zero.to_i64()?.iter().map(|&v| v as f64).collect();
    let zeros = spread(&zeros, zero.shape(), &shape, Along::Rows)?;
    let codes = y.iter().zip(zeros).map(|(y, z)| (y.round_ties_even() + z).clamp(low, high));
    cx.one(match zero.elem() {
        Elem::I8 => Tensor::new(&shape, codes.map(|c| c as i8).collect::<Vec<i8>>())?,
        _ => Tensor::new(&shape, codes.map(|c| c as u8).collect::<Vec<u8>>())?,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("integer");
    }
}
