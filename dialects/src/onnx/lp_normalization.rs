//! LpNormalization: lines along an axis over their 1- or 2-norm; a line of zeros stays zero. Summed in double precision.

use super::cast::convert;
use super::order::around;
use super::util::{axis, same_type, wrong_elem};
use crate::ir::Elem;
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};
use crate::tensor::{Data, Tensor};

fn eval(cx: &EvalCx) -> Evaluated {
    let x = cx.input(0)?;
    let (outer, n, inner) = around(x.shape(), axis(cx.int_or("axis", -1), x.rank())?);
    let p = match cx.int_or("p", 2) {
        p @ (1 | 2) => p,
        other => return Err(OpError::Invalid(format!("p is {other}, expected 1 or 2"))),
    };
    if !x.elem().is_float() {
        return Err(wrong_elem("a float type", x));
    }
    let Data::F64(mut v) = convert(x, Elem::F64, true)?.into_data() else {
        return Err(wrong_elem("a float type", x));
    };
    for o in 0..outer {
        for i in 0..inner {
            let at = |j: usize| (o * n + j) * inner + i;
            let norm = match p {
                1 => (0..n).map(|j| v[at(j)].abs()).sum(),
                _ => (0..n).map(|j| v[at(j)] * v[at(j)]).sum::<f64>().sqrt(),
            };
            if norm != 0.0 {
                (0..n).for_each(|j| v[at(j)] /= norm);
            }
        }
    }
    cx.one(convert(&Tensor::new(x.shape(), v)?, x.elem(), true)?)
}

/// The op.
pub const OPS: &[OpDef] = &[OpDef { name: "onnx.LpNormalization", infer: same_type, eval, ..OpDef::NEW }];
