//! QuantizeLinear and DequantizeLinear, in every opset's form: one scale for all, one per index of an axis, or one
//! per block along an axis. Codes are integers of 2 to 32 bits, or narrow floats.
//!
//! `x = (code - zero_point) * scale`, one rounding; `code = saturate(round_half_even(x / scale) + zero_point)`.

use crate::ir::{Elem, Type};
use crate::kernels::minifloat::Codec;
use crate::kernels::strided;
use crate::onnx::{cast, util};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.DequantizeLinear",
        operands: (2, 3),
        infer: infer_dequantize,
        eval: dequantize,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.QuantizeLinear",
        operands: (2, 3),
        infer: infer_quantize,
        eval: quantize,
        ..OpDef::NEW
    },
    // The same of the other domain, in which there are no blocks.
    OpDef {
        name: "com.microsoft.DequantizeLinear",
        operands: (2, 3),
        infer: infer_dequantize,
        eval: dequantize,
        ..OpDef::NEW
    },
    OpDef {
        name: "com.microsoft.QuantizeLinear",
        operands: (2, 3),
        infer: infer_quantize,
        eval: quantize,
        ..OpDef::NEW
    },
];

fn named_type(code: Option<i64>) -> Option<Elem> {
    code.and_then(|c| i32::try_from(c).ok()).and_then(Elem::from_onnx)
}

fn infer_dequantize(cx: &InferCx) -> Inferred {
    util::one(named_type(cx.attrs.int("output_dtype")).or(cx.elem(1)), cx.dims(0).map(<[_]>::to_vec))
}

fn infer_quantize(cx: &InferCx) -> Inferred {
    let absent = (!cx.has(2)).then_some(Elem::U8);
    let elem = cx.elem(2).or(named_type(cx.attrs.int("output_dtype"))).or(absent);
    match (elem, cx.dims(0)) {
        (None, _) => Ok(Vec::new()),
        (Some(elem), Some(dims)) => Ok(vec![Type::tensor(elem, dims.iter().cloned()).into()]),
        (Some(elem), None) => Ok(vec![Type::unranked(elem).into()]),
    }
}

/// Which scale belongs to which element.
struct Grid {
    /// Elements of the quantized axis, and elements behind each of its indices.
    axis: usize,
    inner: usize,
    /// Indices of the axis that share a scale; 0 when all elements share one.
    block: usize,
    /// Scales along the axis.
    groups: usize,
    /// Whether each of the inner elements has a scale of its own.
    each: bool,
}

impl Grid {
    fn of(cx: &EvalCx, shape: &[usize], scale: &Tensor) -> Result<Grid, OpError> {
        let block = usize::try_from(cx.int_or("block_size", 0)).unwrap_or(0);
        let wrong = || {
            let (found, axis) = (scale.shape(), cx.int_or("axis", 1));
            OpError::invalid(format!(
                "scales of shape {found:?} for {shape:?} along axis {axis}, blocks of {block}"
            ))
        };
        if scale.rank() == 0 || (scale.len() == 1 && block == 0) {
            return Ok(Grid { axis: 1, inner: 1, block: 0, groups: 1, each: false });
        }
        let at = util::axis(cx.int_or("axis", 1), shape.len())?;
        let (axis, inner) = (shape[at], shape[at + 1..].iter().product());
        if block == 0 {
            return match scale.shape() {
                &[n] if n == axis => Ok(Grid { axis, inner, block: 1, groups: axis, each: false }),
                _ => Err(wrong()),
            };
        }
        let mut want = shape.to_vec();
        want[at] = axis.div_ceil(block);
        match scale.shape() == want {
            true => Ok(Grid { axis, inner, block, groups: want[at], each: true }),
            false => Err(wrong()),
        }
    }

    /// Elements of a run whose scale is one, or whose scales are consecutive.
    fn run(&self) -> usize {
        if self.inner > 1 { self.inner } else { self.block }
    }

    /// Calls `f(start, piece, scale, step)` on threads for pieces of `out`: `piece` begins at element `start`, and its
    /// element `i` has scale number `scale + i * step`.
    fn pieces<T: Send>(&self, out: &mut [T], f: impl Fn(usize, &mut [T], usize, usize) + Sync) {
        const TASK: usize = 1 << 14;
        if out.is_empty() {
            return;
        }
        if self.block == 0 {
            out.par_chunks_mut(TASK).enumerate().for_each(|(i, piece)| f(i * TASK, piece, 0, 0));
            return;
        }
        // Rows of one axis, cut into runs, when the axis is the last dim; else lines of inner elements.
        let line = if self.inner > 1 { self.inner } else { self.axis };
        let lines = (TASK / line).max(1);
        out.par_chunks_mut(lines * line).enumerate().for_each(|(task, out)| {
            for (i, out) in out.chunks_mut(line).enumerate() {
                let index = task * lines + i;
                let start = index * line;
                if self.inner > 1 {
                    let (outer, a) = (index / self.axis, index % self.axis);
                    let group = outer * self.groups + a / self.block;
                    match self.each {
                        true => f(start, out, group * self.inner, 1),
                        false => f(start, out, a, 0),
                    }
                } else {
                    for (g, piece) in out.chunks_mut(self.run()).enumerate() {
                        let row = if self.each { index * self.groups } else { 0 };
                        f(start + g * self.run(), piece, row + g, 0);
                    }
                }
            }
        });
    }
}

fn zero_points<'a>(cx: &EvalCx<'a>, scale: &Tensor) -> Result<Option<&'a Tensor>, OpError> {
    match cx.opt(2)? {
        Some(z) if z.len() != scale.len() => {
            let (z, s) = (z.shape(), scale.shape());
            Err(OpError::invalid(format!("zero points of shape {z:?} for scales of shape {s:?}")))
        }
        z => Ok(z),
    }
}

fn dequantize(cx: &EvalCx) -> Evaluated {
    let (x, scale) = (cx.input(0)?, cx.input(1)?);
    let grid = Grid::of(cx, x.shape(), scale)?;
    let zeros = zero_points(cx, scale)?;
    let to = named_type(Some(cx.int_or("output_dtype", 0))).unwrap_or(scale.elem());
    let scale = cast::convert(scale, Elem::F32, true)?;
    let scale = scale.f32s()?;
    let mut y = vec![0f32; x.len()];
    macro_rules! integers {
        ($codes:expr, $variant:path) => {{
            let zeros = match zeros.map(Tensor::data) {
                Some($variant(z)) => z.iter().map(|&z| i64::from(z)).collect(),
                None => vec![0i64; scale.len()],
                Some(_) => return Err(OpError::invalid("the zero points have another type than the codes")),
            };
            grid.pieces(&mut y, |start, y, at, step| {
                let codes = &$codes[start..start + y.len()];
                if step == 0 {
                    let (zero, scale) = (zeros[at], scale[at]);
                    y.iter_mut().zip(codes).for_each(|(y, &c)| *y = (i64::from(c) - zero) as f32 * scale);
                } else {
                    for (i, (y, &c)) in y.iter_mut().zip(codes).enumerate() {
                        *y = (i64::from(c) - zeros[at + i]) as f32 * scale[at + i];
                    }
                }
            });
        }};
    }
    match (x.data(), Codec::of(x.elem())) {
        (Data::U8(codes), Some(codec)) => {
            let values: Vec<f32> = (0..=255).map(|c| codec.decode(c)).collect();
            let zeros = zeros.map(|z| cast::convert(z, Elem::F32, true)).transpose()?;
            let zeros = zeros.as_ref().map(Tensor::f32s).transpose()?;
            grid.pieces(&mut y, |start, y, at, step| {
                for (i, (y, &c)) in y.iter_mut().zip(&codes[start..]).enumerate() {
                    let zero = zeros.map_or(0.0, |z| z[at + i * step]);
                    *y = (values[usize::from(c)] - zero) * scale[at + i * step];
                }
            });
        }
        (Data::U8(codes), None) => integers!(codes, Data::U8),
        (Data::I8(codes), _) => integers!(codes, Data::I8),
        (Data::U16(codes), _) => integers!(codes, Data::U16),
        (Data::I16(codes), _) => integers!(codes, Data::I16),
        (Data::I32(codes), _) => integers!(codes, Data::I32),
        _ => return Err(util::wrong_elem("a quantized type", x)),
    }
    cx.one(Tensor::from_f32(to, x.shape(), y)?)
}

/// The smallest and the largest code of an integer type that quantization gives.
fn code_range(elem: Elem) -> Option<(f32, f32)> {
    let bits = elem.bits() as i32;
    match elem {
        Elem::I16 | Elem::I8 | Elem::I4 | Elem::I2 => {
            let half = 2f32.powi(bits - 1);
            Some((-half, half - 1.0))
        }
        Elem::U16 | Elem::U8 | Elem::U4 | Elem::U2 => Some((0.0, 2f32.powi(bits) - 1.0)),
        _ => None,
    }
}

fn quantize(cx: &EvalCx) -> Evaluated {
    let (x, scale) = (cx.input(0)?, cx.input(1)?);
    let grid = Grid::of(cx, x.shape(), scale)?;
    let zeros = zero_points(cx, scale)?;
    let to = zeros.map(Tensor::elem).or(named_type(Some(cx.int_or("output_dtype", 0)))).unwrap_or(Elem::U8);
    let zeros = zeros.map(|z| cast::convert(z, Elem::F32, true)).transpose()?;
    let zeros = zeros.as_ref().map(Tensor::f32s).transpose()?;
    let (x32, scale) = (cast::convert(x, Elem::F32, true)?, cast::convert(scale, Elem::F32, true)?);
    let (values, scale) = (x32.f32s()?, scale.f32s()?);
    strided::count(x.shape())?;
    let mut y = vec![0f32; x.len()];
    let range = code_range(to);
    grid.pieces(&mut y, |start, y, at, step| {
        for (i, (y, &x)) in y.iter_mut().zip(&values[start..]).enumerate() {
            let p = at + i * step;
            let zero = zeros.map_or(0.0, |z| z[p]);
            *y = match range {
                Some((low, high)) => ((x / scale[p]).round_ties_even() + zero).clamp(low, high),
                None => x / scale[p] + zero,
            };
        }
    });
    let y = Tensor::new(x.shape(), y)?;
    cx.one(cast::convert(&y, to, cx.int_or("saturate", 1) != 0)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("qdq");
    }
}
