//! MatMul and Gemm, in single precision for f32, f16 and bf16, in double for f64, and wrapping for integers.
//!
//! Source: the ONNX operator specification; MatMul follows `numpy.matmul`.

use super::util;
use crate::ir::{Attrs, Dim, Elem, Type};
use crate::kernels::buffers;
use crate::kernels::gemm::{self, Mat, Scalar};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, Fact, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor, TensorError};
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.MatMul", operands: (2, 2), infer: infer_matmul, eval: eval_matmul, ..OpDef::NEW },
    OpDef { name: "onnx.Gemm", operands: (2, 3), infer: infer_gemm, eval: eval_gemm, ..OpDef::NEW },
];

/// The dims of `numpy.matmul` on these dims.
pub(crate) fn matmul_dims(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, OpError> {
    let (Some((a_last, a_lead)), Some(_)) = (a.split_last(), b.first()) else {
        return Err(OpError::invalid("a scalar cannot be multiplied as a matrix"));
    };
    let (b_batch, b_rows, b_cols) = match b {
        [k] => (&[][..], k, None),
        [batch @ .., k, n] => (batch, k, Some(n)),
        [] => (&[][..], a_last, None),
    };
    if a_last.unify(b_rows).is_none() {
        return Err(OpError::invalid(format!("the inner dims of a product differ: {a_last} and {b_rows}")));
    }
    let (a_rows, a_batch) = a_lead.split_last().map_or((None, a_lead), |(m, batch)| (Some(m), batch));
    let mut dims = util::broadcast_dims(&[a_batch, b_batch])?;
    dims.extend(a_rows.cloned());
    dims.extend(b_cols.cloned());
    Ok(dims)
}

/// The element type that both factors have.
fn one_elem(cx: &InferCx) -> Result<Option<Elem>, OpError> {
    match (cx.elem(0), cx.elem(1)) {
        (Some(a), Some(b)) if a != b => {
            Err(OpError::invalid(format!("the factors have different types, {a} and {b}")))
        }
        (a, b) => Ok(a.or(b)),
    }
}

fn infer_matmul(cx: &InferCx) -> Inferred {
    let Some(elem) = one_elem(cx)? else { return Ok(Vec::new()) };
    let dims = cx.dims(0).zip(cx.dims(1)).map(|(a, b)| matmul_dims(a, b));
    util::one(Some(elem), dims.transpose()?)
}

/// A product's operand: matrices `[rows, cols]`, one per element of `batch`.
struct Stack {
    batch: Vec<usize>,
    rows: usize,
    cols: usize,
}

impl Stack {
    /// `shape` as matrices. A vector is one row, or one column where `column` says so.
    fn of(shape: &[usize], column: bool) -> Result<Stack, OpError> {
        match shape {
            [] => Err(OpError::invalid("a scalar cannot be multiplied as a matrix")),
            &[k] if column => Ok(Stack { batch: Vec::new(), rows: k, cols: 1 }),
            &[k] => Ok(Stack { batch: Vec::new(), rows: 1, cols: k }),
            [batch @ .., m, k] => Ok(Stack { batch: batch.to_vec(), rows: *m, cols: *k }),
        }
    }

    /// For each matrix of the batch `out` that this one is broadcast to: which of its own matrices it is.
    fn indices(&self, out: &[usize]) -> Vec<usize> {
        let mut index = vec![0];
        let lead = out.len() - self.batch.len();
        for (i, &n) in out.iter().enumerate() {
            let own = if i < lead { 1 } else { self.batch[i - lead] };
            let next = |&base: &usize| (0..n).map(move |j| base * own + if own == 1 { 0 } else { j });
            index = index.iter().flat_map(next).collect();
        }
        index
    }
}

/// `numpy.matmul` of operands whose matrices `product` multiplies: `(a, b, c)` with `c` to be filled.
fn batched<T: Default + Clone + Send + Sync + 'static>(
    (a, a_shape): (&[T], &[usize]),
    (b, b_shape): (&[T], &[usize]),
    product: impl Fn(Mat<T>, Mat<T>, &mut [T]) + Sync,
) -> Result<(Vec<usize>, Vec<T>), OpError> {
    let dims = |s: &[usize]| s.iter().map(|&n| Dim::from(n)).collect::<Vec<_>>();
    let shape = matmul_dims(&dims(a_shape), &dims(b_shape))?;
    let shape: Vec<usize> = shape.iter().filter_map(|d| usize::try_from(d.known()?).ok()).collect();
    let (mut left, right) = (Stack::of(a_shape, false)?, Stack::of(b_shape, true)?);
    // One matrix on the right: the left batch is just more rows.
    if right.batch.iter().all(|&n| n == 1) {
        left.rows *= left.batch.iter().product::<usize>();
        left.batch.clear();
    }
    let (m, k, n) = (left.rows, left.cols, right.cols);
    let count = strided::count(&shape)?;
    // A product writes every element, if only the sum of nothing.
    let mut c = buffers::take(count);
    if count > 0 && left.batch.is_empty() && right.batch.iter().all(|&n| n == 1) {
        product(Mat::new(a, m, k), Mat::new(b, k, n), &mut c);
    } else if count > 0 {
        let batch = &shape[..left.batch.len().max(right.batch.len())];
        let (ai, bi) = (left.indices(batch), right.indices(batch));
        c.par_chunks_mut(m * n).zip(ai).zip(bi).for_each(|((c, i), j)| {
            product(Mat::new(&a[i * m * k..], m, k), Mat::new(&b[j * k * n..], k, n), c);
        });
    }
    Ok((shape, c))
}

/// The product of two stacks of matrices in `T`, as `numpy.matmul`.
fn floats<T: Scalar>(a: (&[T], &[usize]), b: (&[T], &[usize])) -> Result<(Vec<usize>, Vec<T>), OpError> {
    batched(a, b, |a, b, c| gemm::matmul(a, b, c))
}

/// `numpy.matmul` of f64 tensors.
pub(crate) fn product_f64(a: &Tensor, b: &Tensor) -> Result<(Vec<usize>, Vec<f64>), OpError> {
    match (a.data(), b.data()) {
        (Data::F64(x), Data::F64(y)) => floats((x, a.shape()), (y, b.shape())),
        _ => Err(OpError::invalid("a product of other types than f64")),
    }
}

fn eval_matmul(cx: &EvalCx) -> Evaluated {
    cx.one(product(cx.input(0)?, cx.input(1)?)?)
}

/// `numpy.matmul` of tensors of one type.
pub(crate) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    let (x, y) = (a.shape(), b.shape());
    macro_rules! wrapping {
        ($a:expr, $b:expr, $t:ty) => {{
            let product = |a: Mat<$t>, b: Mat<$t>, c: &mut [$t]| {
                a.multiply_into(b, c, |sum: $t, p, q| sum.wrapping_add(p.wrapping_mul(q)));
            };
            let (shape, c) = batched(($a, x), ($b, y), product)?;
            Tensor::new(&shape, c)?
        }};
    }
    Ok(match (a.data(), b.data()) {
        (Data::F64(a), Data::F64(b)) => {
            let (shape, c) = floats((a, x), (b, y))?;
            Tensor::new(&shape, c)?
        }
        (Data::I64(a), Data::I64(b)) => wrapping!(a, b, i64),
        (Data::I32(a), Data::I32(b)) => wrapping!(a, b, i32),
        (Data::U64(a), Data::U64(b)) => wrapping!(a, b, u64),
        (Data::U32(a), Data::U32(b)) => wrapping!(a, b, u32),
        _ if a.elem() != b.elem() => {
            return Err(TensorError::Elem { expected: a.elem().to_string(), found: b.elem() }.into());
        }
        _ => {
            let (shape, c) = floats((&a.to_f32()?, x), (&b.to_f32()?, y))?;
            Tensor::from_f32(a.elem(), &shape, c)?
        }
    })
}

fn transposed(attrs: &Attrs) -> (bool, bool) {
    let flag = |name| attrs.int(name).unwrap_or(0) != 0;
    (flag("transA"), flag("transB"))
}

fn infer_gemm(cx: &InferCx) -> Inferred {
    let Some(elem) = one_elem(cx)? else { return Ok(Vec::new()) };
    let (ta, tb) = transposed(cx.attrs);
    // Before opset 7 the operands are matrices too; anything else is wrong.
    let pick = |i: usize, swap: bool| -> Result<[Dim; 2], OpError> {
        match cx.dims(i) {
            Some([r, c]) if swap => Ok([c.clone(), r.clone()]),
            Some([r, c]) => Ok([r.clone(), c.clone()]),
            Some(d) => Err(OpError::invalid(format!("operand {i} of Gemm has {} dims, expected 2", d.len()))),
            None => Ok([Dim::Unknown, Dim::Unknown]),
        }
    };
    let ([m, ka], [kb, n]) = (pick(0, ta)?, pick(1, tb)?);
    if ka.unify(&kb).is_none() {
        return Err(OpError::invalid(format!("the inner dims of a product differ: {ka} and {kb}")));
    }
    Ok(vec![Fact::from(Type::tensor(elem, [m, n]))])
}

fn eval_gemm(cx: &EvalCx) -> Evaluated {
    let (a, b, c) = (cx.input(0)?, cx.input(1)?, cx.opt(2)?);
    let (alpha, beta) = (cx.float_or("alpha", 1.0), cx.float_or("beta", 1.0));
    let shapes = (a.shape(), b.shape(), c.map_or(&[][..], Tensor::shape));
    let scaled = (alpha, beta);
    let out = match (a.data(), b.data(), c.map(Tensor::data)) {
        (Data::F64(a), Data::F64(b), None) => {
            let (shape, y) = gemm(cx, (a, b, None), shapes, (f64::from(alpha), f64::from(beta)))?;
            Tensor::new(&shape, y)?
        }
        (Data::F64(a), Data::F64(b), Some(Data::F64(c))) => {
            let (shape, y) = gemm(cx, (a, b, Some(c)), shapes, (f64::from(alpha), f64::from(beta)))?;
            Tensor::new(&shape, y)?
        }
        _ => {
            let bias = c.map(Tensor::to_f32).transpose()?;
            let (shape, y) = gemm(cx, (&a.to_f32()?, &b.to_f32()?, bias.as_deref()), shapes, scaled)?;
            Tensor::from_f32(a.elem(), &shape, y)?
        }
    };
    cx.one(out)
}

type Bias<'a, T> = Option<&'a [T]>;

/// `alpha * a * b + beta * c`, with `c` broadcast to the product.
fn gemm<T>(
    cx: &EvalCx,
    (a, b, c): (&[T], &[T], Bias<T>),
    (a_shape, b_shape, c_shape): (&[usize], &[usize], &[usize]),
    (alpha, beta): (T, T),
) -> Result<(Vec<usize>, Vec<T>), OpError>
where
    T: Scalar + PartialEq + std::ops::Add<Output = T> + std::ops::Mul<Output = T>,
{
    let (&[ar, ac], &[br, bc]) = (a_shape, b_shape) else {
        return Err(OpError::invalid(format!("expected matrices, found shapes {a_shape:?} and {b_shape:?}")));
    };
    let (ta, tb) = transposed(cx.attrs);
    let (a, b) = (Mat::new(a, ar, ac), Mat::new(b, br, bc));
    let (a, b) = (if ta { a.t() } else { a }, if tb { b.t() } else { b });
    let (m, k) = if ta { (ac, ar) } else { (ar, ac) };
    let (kb, n) = if tb { (bc, br) } else { (br, bc) };
    if k != kb {
        return Err(OpError::invalid(format!("the inner dims of a product differ: {k} and {kb}")));
    }
    let mut y = vec![T::default(); strided::count(&[m, n])?];
    gemm::matmul(a, b, &mut y);
    if alpha != T::ONE {
        y.iter_mut().for_each(|y| *y = *y * alpha);
    }
    let Some(c) = c else { return Ok((vec![m, n], y)) };
    let (rows, cols) = match *c_shape {
        [] => (1, 1),
        [n] => (1, n),
        [m, n] => (m, n),
        _ => (0, 0),
    };
    if (rows != 1 && rows != m) || (cols != 1 && cols != n) || c.len() != rows * cols {
        let message = format!("a bias of shape {c_shape:?} does not broadcast to [{m}, {n}]");
        return Err(OpError::invalid(message));
    }
    if n > 0 {
        y.par_chunks_mut(n).enumerate().for_each(|(i, y)| {
            let c = &c[if rows == 1 { 0 } else { i * cols }..][..cols];
            if cols == 1 {
                y.iter_mut().for_each(|y| *y = *y + beta * c[0]);
            } else {
                y.iter_mut().zip(c).for_each(|(y, &c)| *y = *y + beta * c);
            }
        });
    }
    Ok((vec![m, n], y))
}

#[cfg(test)]
mod tests {
    use crate::ir::Type;
    use crate::tensor::Tensor;
    use crate::testing::{Case, check};

    #[test]
    fn agrees_with_the_references() {
        check("matmul");
    }

    #[test]
    fn factors_of_different_types_are_refused() {
        let a = Tensor::new(&[1, 1], vec![1i64]).unwrap();
        let b = Tensor::new(&[1, 1], vec![1f32]).unwrap();
        for op in ["onnx.MatMul", "onnx.Gemm"] {
            let case = Case::new(op, 21, &[], vec![Some(a.clone()), Some(b.clone())]);
            let e = case.infer(&case.facts(|_, t| Type::of_shape(t.elem(), t.shape()), true)).unwrap_err();
            assert!(e.to_string().contains("different types, i64 and f32"), "{e}");
            assert!(case.eval(false).is_err());
        }
    }
}
