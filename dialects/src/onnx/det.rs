//! Det: determinants by elimination with partial pivoting, in double precision.

use super::util;
use crate::kernels::real::Real;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[OpDef { name: "onnx.Det", infer, eval, ..OpDef::NEW }];

fn infer(cx: &InferCx) -> Inferred {
    let dims = cx.dims(0).map(|d| match d {
        [batch @ .., m, n] if m.unify(n).is_some() => Ok(batch.to_vec()),
        _ => Err(OpError::invalid(format!("X is {}, expected square matrices", cx.ty(0)))),
    });
    util::one(cx.elem(0), dims.transpose()?)
}

fn determinant(a: &mut [f64], n: usize) -> f64 {
    let mut product = 1.0;
    for k in 0..n {
        let size = |i: usize| a[i * n + k].abs();
        let pivot = (k + 1..n).fold(k, |best, i| if size(i) > size(best) { i } else { best });
        if pivot != k {
            (k..n).for_each(|j| a.swap(k * n + j, pivot * n + j));
            product = -product;
        }
        let head = a[k * n + k];
        product *= head;
        if head == 0.0 {
            return product;
        }
        for i in k + 1..n {
            let factor = a[i * n + k] / head;
            (k..n).for_each(|j| a[i * n + j] -= factor * a[k * n + j]);
        }
    }
    product
}

fn eval(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let (batch, n) = match *t.shape() {
        [ref batch @ .., m, n] if m == n => (batch, n),
        ref other => {
            return Err(OpError::invalid(format!("X has shape {other:?}, expected square matrices")));
        }
    };
    let mut x = f64::values(t)?.into_owned();
    let count = crate::kernels::strided::count(batch)?;
    // An empty matrix has the determinant of a product of nothing.
    let y =
        if n == 0 { vec![1.0; count] } else { x.par_chunks_mut(n * n).map(|a| determinant(a, n)).collect() };
    cx.one(f64::tensor(t.elem(), batch, y)?)
}

#[cfg(test)]
mod tests {
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    fn case(shape: &[usize], x: Vec<f64>) -> Case {
        Case::new("onnx.Det", 22, &[], vec![Some(Tensor::new(shape, x).unwrap())])
    }

    #[test]
    fn determinants_worked_out_by_hand() {
        let x =
            vec![0.0, 2.0, 3.0, 1.0, 1.0, 1.0, 4.0, 0.0, 5.0, 1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 1.0, 0.0, 0.0];
        let y = case(&[2, 3, 3], x).eval(false).unwrap();
        // 0 (5 - 0) - 2 (5 - 4) + 3 (0 - 4) = -14; the second has a row twice another.
        assert_eq!(y[0].tensor().unwrap(), &Tensor::new(&[2], vec![-14.0, 0.0]).unwrap());
        let y = case(&[2, 0, 0], Vec::new()).eval(false).unwrap();
        assert_eq!(y[0].tensor().unwrap(), &Tensor::new(&[2], vec![1.0, 1.0]).unwrap());
    }

    #[test]
    fn other_than_square_matrices_are_refused() {
        refused(&case(&[2, 3], vec![0.0; 6]), "expected square matrices");
        refused(&case(&[3], vec![0.0; 3]), "expected square matrices");
    }
}
