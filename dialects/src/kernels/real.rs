//! The two types that float ops compute in: f64 for tensors of f64, f32 for every other float type.
//!
//! An op is written once, over [`Real`]. Rows of f32 go through the kernels of [`row`]; rows of f64 are rare, and
//! are folded plainly, in order.

use super::gemm::Scalar;
use super::row;
use crate::ir::Elem;
use crate::tensor::{Data, Tensor, TensorError};
use half::{bf16, f16};
use num_traits::{Float, NumAssign};
use std::borrow::Cow;

/// f32 or f64.
pub trait Real: Scalar + Float + NumAssign + std::iter::Sum + std::fmt::Debug {
    /// The nearest number of this type.
    fn of(x: f64) -> Self;

    /// The elements of a float tensor as this type.
    fn values(t: &Tensor) -> Result<Cow<'_, [Self]>, TensorError>;

    /// A float tensor of type `elem`, each element rounded once.
    fn tensor(elem: Elem, shape: &[usize], values: Vec<Self>) -> Result<Tensor, TensorError>;

    /// The sum.
    fn row_sum(x: &[Self]) -> Self {
        x.iter().copied().sum()
    }

    /// The sum of `(x - center)^2`.
    fn row_sum_of_squares(x: &[Self], center: Self) -> Self {
        x.iter().map(|&v| (v - center) * (v - center)).sum()
    }

    /// The largest element, negative infinity for none. A NaN is passed over.
    fn row_max(x: &[Self]) -> Self {
        x.iter().fold(Self::neg_infinity(), |a, &v| if v > a { v } else { a })
    }

    /// Replaces each element `x` by `(x - shift) * scale`.
    fn row_shift_scale(x: &mut [Self], shift: Self, scale: Self) {
        x.iter_mut().for_each(|v| *v = (*v - shift) * scale);
    }

    /// Replaces each element `x` by `(x - shift) * factor * scale`, with one scale per element.
    fn row_normalize(x: &mut [Self], shift: Self, factor: Self, scale: &[Self]) {
        x.iter_mut().zip(scale).for_each(|(v, &s)| *v = (*v - shift) * factor * s);
    }

    /// Adds `y` element by element.
    fn row_add(x: &mut [Self], y: &[Self]) {
        x.iter_mut().zip(y).for_each(|(v, &w)| *v += w);
    }

    /// The softmax of a row, in place.
    fn row_softmax(x: &mut [Self]) {
        let top = Self::row_max(x);
        x.iter_mut().for_each(|v| *v = (*v - top).exp());
        let total = Self::row_sum(x);
        x.iter_mut().for_each(|v| *v /= total);
    }

    /// The logarithm of the softmax of a row, in place.
    fn row_log_softmax(x: &mut [Self]) {
        let top = Self::row_max(x);
        let log = x.iter().map(|&v| (v - top).exp()).sum::<Self>().ln();
        x.iter_mut().for_each(|v| *v = *v - top - log);
    }
}

impl Real for f32 {
    fn of(x: f64) -> f32 {
        x as f32
    }

    fn values(t: &Tensor) -> Result<Cow<'_, [f32]>, TensorError> {
        t.to_f32()
    }

    fn tensor(elem: Elem, shape: &[usize], values: Vec<f32>) -> Result<Tensor, TensorError> {
        Tensor::from_f32(elem, shape, values)
    }

    fn row_sum(x: &[f32]) -> f32 {
        row::sum(x)
    }

    fn row_sum_of_squares(x: &[f32], center: f32) -> f32 {
        row::sum_of_squares(x, center)
    }

    fn row_max(x: &[f32]) -> f32 {
        row::max(x)
    }

    fn row_shift_scale(x: &mut [f32], shift: f32, scale: f32) {
        row::shift_scale(x, shift, scale);
    }

    fn row_normalize(x: &mut [f32], shift: f32, factor: f32, scale: &[f32]) {
        row::normalize(x, shift, factor, scale);
    }

    fn row_add(x: &mut [f32], y: &[f32]) {
        row::add(x, y);
    }

    fn row_softmax(x: &mut [f32]) {
        row::softmax(x);
    }

    fn row_log_softmax(x: &mut [f32]) {
        row::log_softmax(x);
    }
}

impl Real for f64 {
    fn of(x: f64) -> f64 {
        x
    }

    fn values(t: &Tensor) -> Result<Cow<'_, [f64]>, TensorError> {
        Ok(match t.data() {
            Data::F64(v) => Cow::Borrowed(v),
            _ => t.to_f32()?.iter().map(|&x| x.into()).collect(),
        })
    }

    fn tensor(elem: Elem, shape: &[usize], values: Vec<f64>) -> Result<Tensor, TensorError> {
        let data = match elem {
            Elem::F64 => Data::F64(values),
            Elem::F32 => Data::F32(values.into_iter().map(|x| x as f32).collect()),
            Elem::F16 => Data::F16(values.into_iter().map(f16::from_f64).collect()),
            Elem::BF16 => Data::BF16(values.into_iter().map(bf16::from_f64).collect()),
            _ => return Err(TensorError::Elem { expected: "f64, f32, f16 or bf16".into(), found: elem }),
        };
        Tensor::new(shape, data)
    }
}

/// Runs `$body` with `$t` the type that floats like those of the tensor `$x` are computed in.
macro_rules! with_real {
    ($x:expr, $t:ident => $body:expr) => {
        if $x.elem() == $crate::ir::Elem::F64 {
            type $t = f64;
            $body
        } else {
            type $t = f32;
            $body
        }
    };
}
pub(crate) use with_real;
