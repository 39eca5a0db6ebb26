//! `com.microsoft.MatMulNBits`: `Y = A * W^T + bias` with W packed, as ONNX Runtime's CPU kernels compute it.
//!
//! With `accuracy_level` 4 those kernels round each block of a row of A to int8 (scale = absmax / 127, to nearest
//! even), multiply integers exactly, and scale the sums: up to float rounding that is the product of the rounded A
//! with the dequantized W. They do so for u8 or absent zero points, and for 2 bits only at block sizes 32 to 128;
//! all other forms compute in single precision. Measured with ONNX Runtime 1.31.

use crate::ir::{Attrs, Dim, Type};
use crate::kernels::gemm::{self, Mat};
use crate::kernels::packed::{Packed, code};
use crate::kernels::{row, strided};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::borrow::Cow;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "com.microsoft.MatMulNBits", operands: (3, 6), infer, verify, eval, ..OpDef::NEW }];

/// Rows of W that a task dequantizes at a time, whatever K.
const TILE: usize = 128;

struct Form {
    n: usize,
    k: usize,
    group: usize,
    bits: usize,
}

impl Form {
    fn of(attrs: &Attrs) -> Result<Form, OpError> {
        let int = |name: &str| {
            let v = attrs.int(name).and_then(|v| usize::try_from(v).ok());
            v.ok_or_else(|| OpError::invalid(format!("the attribute {name} is missing or negative")))
        };
        let bits = if attrs.get("bits").is_some() { int("bits")? } else { 4 };
        if !matches!(bits, 2 | 4 | 8) {
            return Err(OpError::Unsupported(format!("codes of {bits} bits, expected 2, 4 or 8")));
        }
        let form = Form { n: int("N")?, k: int("K")?, group: int("block_size")?, bits };
        match form.n == 0 || form.k == 0 || form.group == 0 {
            true => Err(OpError::invalid("N, K and block_size must be positive")),
            false => Ok(form),
        }
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let form = Form::of(cx.attrs)?;
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let Some(dims) = cx.dims(0) else { return Ok(vec![Type::unranked(elem).into()]) };
    let wrong = || OpError::invalid(format!("A is {}, expected its last dim to be {}", cx.ty(0), form.k));
    let (last, lead) = dims.split_last().ok_or_else(wrong)?;
    last.unify(&Dim::from(form.k)).ok_or_else(wrong)?;
    Ok(vec![Type::tensor(elem, lead.iter().cloned().chain([Dim::from(form.n)])).into()])
}

/// What the runtime's kernels take: blocks of a power of two from 16 on, and parts that fit them.
fn verify(cx: &InferCx) -> Result<(), OpError> {
    let form = Form::of(cx.attrs)?;
    if form.group < 16 || !form.group.is_power_of_two() {
        let message = format!("block_size is {}, expected a power of two from 16 on", form.group);
        return Err(OpError::invalid(message));
    }
    let level = cx.attrs.int("accuracy_level").unwrap_or(0);
    if !(0..=4).contains(&level) {
        return Err(OpError::invalid(format!("accuracy_level is {level}, expected 0 to 4")));
    }
    let groups = form.k.div_ceil(form.group);
    let too_large = || OpError::invalid("its parts are too large to be counted");
    let scales = form.n.checked_mul(groups).ok_or_else(too_large)?;
    let codes = scales.checked_mul(form.group * form.bits / 8).ok_or_else(too_large)?;
    for (i, what, want) in [(1, "bytes of codes", codes), (2, "scales", scales)] {
        let found = cx.ty(i).as_tensor().and_then(|t| t.known_shape());
        let found = found.and_then(|shape| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)));
        if let Some(found) = found.filter(|&n| n != want) {
            return Err(OpError::invalid(format!("there are {found} {what}, expected {want}")));
        }
    }
    Ok(())
}

fn eval(cx: &EvalCx) -> Evaluated {
    let form = Form::of(cx.attrs)?;
    let Form { n, k, group, bits } = form;
    let a = cx.input(0)?;
    if a.shape().last() != Some(&k) {
        return Err(OpError::invalid(format!(
            "A has shape {:?}, expected its last dim to be {k}",
            a.shape()
        )));
    }
    let scales = cx.input(2)?.to_f32()?;
    let zero_points = cx.opt(3)?;
    let float_zeros = zero_points.is_some_and(|z| z.elem().is_float());
    let zeros = match zero_points {
        None => vec![(1u32 << (bits - 1)) as f32; scales.len()],
        Some(z) if float_zeros => z.to_f32()?.into_owned(),
        Some(z) => zero_codes(z.u8s()?, n, k.div_ceil(group.max(1)), bits)?,
    };
    let codes = cx.input(1)?.u8s()?;
    let w = Packed { codes, scales, zeros, n, k, group, container: bits }.checked()?;
    let order = cx.opt(4)?.map(|g| group_order(&g.to_i64()?, &w)).transpose()?;
    let bias = cx.opt(5)?.map(Tensor::to_f32).transpose()?;
    if bias.as_ref().is_some_and(|b| b.len() != n) {
        return Err(OpError::invalid(format!("the bias does not have {n} elements")));
    }
    let mut x = a.to_f32()?;
    let int8 =
        cx.int_or("accuracy_level", 0) == 4 && !float_zeros && (bits != 2 || (32..=128).contains(&group));
    if int8 && !cx.exact {
        x = Cow::Owned(round_to_int8(&x, k, group));
    }
    let shape: Vec<usize> = a.shape()[..a.rank() - 1].iter().copied().chain([n]).collect();
    let m: usize = shape[..shape.len() - 1].iter().product();
    let mut y = vec![0f32; strided::count(&[m, n])?];
    let x = Mat::new(&x, m, k);
    gemm::strips(&mut y, n, TILE, |from, y| {
        let rows = y.cols();
        let mut tile = vec![0f32; rows * k];
        match &order {
            None => w.unpack_rows(from, from + rows, &mut tile),
            Some(groups) => {
                (from..).zip(tile.chunks_exact_mut(k)).for_each(|(n, row)| w.unpack_by(n, groups, row))
            }
        }
        gemm::tile_into(x, Mat::new(&tile, rows, k).t(), y);
        if let Some(bias) = &bias {
            y.rows_mut().for_each(|y| row::add(y, &bias[from..from + rows]));
        }
    });
    cx.one(Tensor::from_f32(a.elem(), &shape, y)?)
}

/// The group of each element along K, where they do not lie in order (`g_idx`).
fn group_order(given: &[i64], w: &Packed) -> Result<Vec<usize>, OpError> {
    let groups = w.groups();
    let inside = |&g: &i64| usize::try_from(g).ok().filter(|&g| g < groups);
    let order: Option<Vec<usize>> = given.iter().take(w.k).map(inside).collect();
    order.filter(|o| o.len() == w.k).ok_or_else(|| {
        let (k, found) = (w.k, given.len());
        OpError::invalid(format!("g_idx has {found} elements, expected {k} groups below {groups}"))
    })
}

/// Zero points of `[N, kb]` from codes packed row by row, each row padded to whole bytes.
fn zero_codes(bytes: &[u8], n: usize, groups: usize, bits: usize) -> Result<Vec<f32>, OpError> {
    let row = (groups * bits).div_ceil(8);
    if row.checked_mul(n) != Some(bytes.len()) {
        let message = format!("there are {} bytes of zero points, expected {n} rows of {row}", bytes.len());
        return Err(OpError::invalid(message));
    }
    let one = |i: usize| f32::from(code(&bytes[i / groups * row..], bits, i % groups));
    Ok((0..n * groups).map(one).collect())
}

/// Rows of `k` elements, rounded in blocks of `group` to int8 and back.
fn round_to_int8(x: &[f32], k: usize, group: usize) -> Vec<f32> {
    let mut x = x.to_vec();
    if k > 0 {
        x.par_chunks_mut((1usize << 14).div_ceil(k) * k).for_each(|rows| {
            for row in rows.chunks_exact_mut(k) {
                row.chunks_mut(group).for_each(row::round_to_int8);
            }
        });
    }
    x
}

#[cfg(test)]
mod tests {
    use crate::tensor::Tensor;
    use crate::testing::Case;

    #[test]
    fn exact_evaluation_leaves_the_activations_alone() {
        let run = |level: i64, exact| {
            let ints = [("K", 16), ("N", 1), ("bits", 4), ("block_size", 16), ("accuracy_level", level)];
            let a: Vec<f32> = (0..16).map(|i| 1.0 + i as f32 * 0.013).collect();
            let inputs = vec![
                Some(Tensor::new(&[1, 16], a).unwrap()),
                Some(Tensor::new(&[1, 1, 8], vec![0x9fu8; 8]).unwrap()),
                Some(Tensor::new(&[1], vec![1f32]).unwrap()),
            ];
            let case = Case::new("com.microsoft.MatMulNBits", 1, &ints.map(|(n, v)| (n, v.into())), inputs);
            case.eval(exact).unwrap()[0].tensor().unwrap().f32s().unwrap()[0]
        };
        // Even elements are multiplied by 7, odd ones by 1: 7 * (8 + 0.013 * 56) + (8 + 0.013 * 64).
        assert!((run(0, false) - 69.928).abs() < 1e-4);
        assert_eq!(run(4, true), run(0, false));
        assert_ne!(run(4, false), run(0, false));
    }

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("matmul_nbits");
    }
}
