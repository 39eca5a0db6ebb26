//! QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear of 8-bit codes: one scale for all, or one per index of an axis.
//!
//! `code = saturate(round(x / scale) + zero)`, halves to even; NaN is code 0, as the interpreter has it. `x = (code - zero) scale`.

use super::{Args, Buffer, Kernel, Lowered, Step, elementwise, math, pointwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar};
use dialects::ir::{Elem, Module, Op, Value};

/// Elements whose range a unit of DynamicQuantizeLinear finds, and that one writes.
const CHUNK: usize = 4096;

/// The type of codes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Codes {
    U8,
    I8,
    /// Only to be read, and without a zero point.
    I32,
}

impl Codes {
    fn of(m: &Module, v: Value) -> Option<Codes> {
        Some(match m.ty(v).elem()? {
            Elem::U8 => Codes::U8,
            Elem::I8 => Codes::I8,
            Elem::I32 => Codes::I32,
            _ => return None,
        })
    }

    fn elem(self) -> Scalar {
        match self {
            Codes::U8 => Scalar::U8,
            Codes::I8 => Scalar::I8,
            Codes::I32 => Scalar::I32,
        }
    }

    /// Codes as integers of 32 bits, `lanes` of them or one.
    fn load(self, b: &mut Body, p: Val, lanes: usize) -> Val {
        let v = b.load(p, Ty { elem: self.elem(), lanes });
        b.cast(v, Scalar::I32)
    }
}

/// How lines of elements find their scales.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scales {
    /// One for all.
    One,
    /// One for each line, counted along an axis.
    Line,
    /// One for each element of a line.
    Each,
}

/// A line of elements, and the lines there are.
struct Form {
    codes: Codes,
    scales: Scales,
    line: Size,
    lines: Size,
    axis: Size,
    zero: bool,
}

/// f32 and 8-bit codes (32-bit ones without a zero point are read), without blocks. With one scale they are elementwise ops.
pub fn supports(m: &Module, op: Op) -> bool {
    pointwise::one_scale(m, op).is_none() && form(m, op).is_some()
}

fn quantizes(m: &Module, op: Op) -> bool {
    m.ops[op].name.as_str().ends_with(".QuantizeLinear")
}

fn form(m: &Module, op: Op) -> Option<Form> {
    let data = &m.ops[op];
    let (x, scale, y) = (data.operand(0)?, data.operand(1)?, data.result(0)?);
    let float = |v: Value| m.ty(v).elem() == Some(Elem::F32);
    let zero = data.operand(2);
    let (codes, real) = if quantizes(m, op) { (y, x) } else { (x, y) };
    let codes = Codes::of(m, codes)?;
    let shape = Size::shape(m.ty(x))?;
    let params = Size::shape(m.ty(scale))?;
    let same = |z: Value| Size::shape(m.ty(z)).as_ref() == Some(&params) && Codes::of(m, z) == Some(codes);
    let wide = codes == Codes::I32 && (zero.is_some() || quantizes(m, op));
    let blocks = data.attrs.int("block_size").unwrap_or(0) != 0;
    if !float(real) || !float(scale) || wide || blocks || !zero.is_none_or(same) {
        return None;
    }
    let one = params.is_empty() || params == [Size::Known(1)];
    let axis = data.attrs.int("axis").unwrap_or(1);
    let axis = usize::try_from(if axis < 0 { axis + shape.len() as i64 } else { axis }).ok();
    let zero = zero.is_some();
    let form = |scales, at: usize, axis| {
        let (line, lines) = (Size::product(&shape[at..]), Size::product(&shape[..at]));
        Some(Form { codes, scales, line, lines, axis, zero })
    };
    let last = shape.len().saturating_sub(1);
    match axis {
        _ if one => form(Scales::One, last, 1.into()),
        Some(a) if a < shape.len() && params == shape[a..=a] => {
            let scales = if a == last { Scales::Each } else { Scales::Line };
            form(scales, if a == last { a } else { a + 1 }, shape[a].clone())
        }
        _ => None,
    }
}

/// The kernel. Buffers: what is read, scales, result, and the zero points if there are some. Sizes: a line, the axis. A unit is
/// a line.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let form = form(m, op)?;
    let quantizes = quantizes(m, op);
    let mut lowered = Lowered::default();
    let mut buffers = Vec::new();
    for i in 0..2 {
        buffers.push(fused.buffer(m.ops[op].operand(i)?, &mut lowered.blobs)?);
    }
    buffers.push(Buffer::Result(0));
    if form.zero {
        buffers.push(fused.buffer(m.ops[op].operand(2)?, &mut lowered.blobs)?);
    }
    let kernel = Kernel::new(target, if quantizes { "quantize" } else { "dequantize" }, |b, a| {
        let (x, scales, y) = (a.buffer(b, 0), a.buffer(b, 1), a.buffer(b, 2));
        let zeros = form.zero.then(|| a.buffer(b, 3));
        let (line, axis, none) = (a.dim(b, 0), a.dim(b, 1), b.size(0));
        b.each(a.begin, a.end, 1, |b, unit| {
            let start = b.mul(unit, line);
            let own = if form.scales == Scales::Line { b.rem(unit, axis) } else { none };
            elementwise::vector_loop(b, none, line, b.target.lanes(), |b, i, lanes| {
                let (scale, zero) = form.parameters(b, scales, zeros, own, i, lanes);
                let at = b.add(start, i);
                if quantizes {
                    let p = b.element(x, at, Scalar::F32);
                    let v = b.load(p, Ty { elem: Scalar::F32, lanes });
                    let code = quantized(b, v, scale, Some(zero), form.codes.elem());
                    let p = b.element(y, at, Scalar::I8);
                    b.store(code, p);
                } else {
                    let p = b.element(x, at, form.codes.elem());
                    let code = form.codes.load(b, p, lanes);
                    let code = b.cast(code, Scalar::F32);
                    let v = b.sub(code, zero);
                    let v = b.mul(v, scale);
                    let p = b.element(y, at, Scalar::F32);
                    b.store(v, p);
                }
            });
        });
    });
    let work = form.line.clone().div_up(2);
    let dims = vec![form.line, form.axis];
    lowered.steps.push(Step { kernel, buffers, dims, units: form.lines, work });
    Some(lowered)
}

impl Form {
    /// Scale and zero point, as floats, of elements `i..` of a line whose own are number `own`.
    fn parameters(&self, b: &mut Body, s: Val, z: Option<Val>, own: Val, i: Val, lanes: usize) -> (Val, Val) {
        let (at, width) = if self.scales == Scales::Each { (i, lanes) } else { (own, 0) };
        let p = b.element(s, at, Scalar::F32);
        let scale = b.load(p, Ty { elem: Scalar::F32, lanes: width });
        let zero = match z {
            Some(z) => {
                let p = b.element(z, at, Scalar::I8);
                let zero = self.codes.load(b, p, width);
                b.cast(zero, Scalar::F32)
            }
            None => b.splat(scale.ty, 0.0),
        };
        match self.scales {
            Scales::Each => (scale, zero),
            _ => (b.spread(scale, lanes), b.spread(zero, lanes)),
        }
    }
}

/// `round(x / scale) + zero`, saturated, as codes of the type `codes`.
pub fn quantized(b: &mut Body, x: Val, scale: Val, zero: Option<Val>, codes: Scalar) -> Val {
    let v = b.div(x, scale);
    rounded(b, v, zero, codes)
}

/// `round(v) + zero`, saturated, as codes of the type `codes`; NaN is code 0.
pub fn rounded(b: &mut Body, v: Val, zero: Option<Val>, codes: Scalar) -> Val {
    let (low, high) = if codes == Scalar::U8 { (0.0, 255.0) } else { (-128.0, 127.0) };
    let (low, high, none) = (b.splat(v.ty, low), b.splat(v.ty, high), b.splat(v.ty, 0.0));
    let mut v = math::round(b, v);
    if let Some(zero) = zero {
        let zero = b.cast(zero, Scalar::F32);
        v = b.add(v, zero);
    }
    let number = b.cmp(Cmp::Eq, v, v);
    let v = b.select(number, v, none);
    let v = b.min_finite(v, high);
    let v = b.max_finite(v, low);
    b.cast(v, codes)
}

/// f32 of known or named dims.
pub fn supports_dynamic(m: &Module, op: Op) -> bool {
    let x = m.ops[op].operand(0);
    x.is_some_and(|v| m.ty(v).elem() == Some(Elem::F32) && Size::shape(m.ty(v)).is_some())
}

/// Two kernels: the range of each chunk, and the codes by the range of all of them. Buffers: X, ranges, and the results that
/// are asked for. Sizes: the elements.
pub fn lower_dynamic(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let x = m.ops[op].operand(0)?;
    let count = Size::product(&fused.shape(x)?);
    let chunks = count.clone().div_up(CHUNK as u64);
    let mut lowered = Lowered { temps: vec![chunks.clone() * 8.into()], ..Lowered::default() };
    let x = fused.buffer(x, &mut lowered.blobs)?;
    let place = |i: usize| {
        let v = m.ops[op].result(i)?;
        fused.results().iter().position(|&r| r == v)
    };
    let results: Vec<(usize, usize)> = (0..3).filter_map(|i| Some((i, place(i)?))).collect();
    lowered.steps.push(Step {
        kernel: ranges(target),
        buffers: vec![x.clone(), Buffer::Temp(0)],
        dims: vec![count.clone()],
        units: chunks.clone(),
        work: (CHUNK / 4).into(),
    });
    let mut buffers = vec![x, Buffer::Temp(0)];
    buffers.extend(results.iter().map(|r| Buffer::Result(r.1)));
    let kernel = Kernel::new(target, "quantize_dynamic", |b, a| {
        let count = a.dim(b, 0);
        let (scale, zero) = range_of_all(b, a, count);
        let none = b.size(0);
        let first = b.cmp(Cmp::Eq, a.begin, none);
        for (i, &(which, _)) in results.iter().enumerate() {
            let out = a.buffer(b, 2 + i);
            match which {
                0 => codes_of(b, a, count, out, scale, zero),
                1 => b.when(first, |b| b.store(scale, out)),
                _ => b.when(first, |b| {
                    let code = b.cast(zero, Scalar::I32);
                    let code = b.cast(code, Scalar::I8);
                    b.store(code, out);
                }),
            }
        }
    });
    // A unit at least: of nothing there are a scale and a zero point too.
    let units = (count.clone() + 1.into()).div_up(CHUNK as u64);
    let work = (CHUNK / 2).into();
    lowered.steps.push(Step { kernel, buffers, dims: vec![count], units, work });
    Some(lowered)
}

/// The least and the greatest of zero and each chunk.
fn ranges(target: &Target) -> Kernel {
    Kernel::new(target, "ranges", |b, a| {
        let (x, out, count) = (a.buffer(b, 0), a.buffer(b, 1), a.dim(b, 0));
        let lanes = b.target.lanes();
        b.each(a.begin, a.end, 1, |b, unit| {
            let chunk = b.size(CHUNK);
            let from = b.mul(unit, chunk);
            let to = b.add(from, chunk);
            let to = b.min(to, count);
            let middle = b.whole_steps(from, to, lanes);
            let at = |b: &mut Body, i: Val, lanes: usize| {
                let p = b.element(x, i, Scalar::F32);
                b.load(p, Ty { elem: Scalar::F32, lanes })
            };
            // A NaN is on neither side of anything, and is passed over.
            let widen = |b: &mut Body, v: Val, range: &[Val]| {
                vec![b.min_finite(v, range[0]), b.max_finite(v, range[1])]
            };
            let zero = b.splat(Ty { elem: Scalar::F32, lanes }, 0.0);
            let range = b.repeat(from, middle, lanes, &[zero, zero], |b, i, range| {
                let v = at(b, i, lanes);
                widen(b, v, range)
            });
            let range = [
                b.fold(range[0], |b, s, t| b.min_finite(s, t)),
                b.fold(range[1], |b, s, t| b.max_finite(s, t)),
            ];
            let range = b.repeat(middle, to, 1, &range, |b, i, range| {
                let v = at(b, i, 0);
                widen(b, v, range)
            });
            let out = b.element(out, unit, Scalar::I64);
            b.store(range[0], out);
            let out = b.at_const(out, 4);
            b.store(range[1], out);
        });
    })
}

/// Scale and zero point of the range of all chunks; both as floats.
fn range_of_all(b: &mut Body, a: &Args, count: Val) -> (Val, Val) {
    let ranges = a.buffer(b, 1);
    let float = scalar(Scalar::F32);
    let [none, codes, one] = [0.0, 255.0, 1.0].map(|v| b.splat(float, v));
    let (zero, chunk, more) = (b.size(0), b.size(CHUNK), b.size(CHUNK - 1));
    let chunks = b.add(count, more);
    let chunks = b.div(chunks, chunk);
    let range = b.repeat(zero, chunks, 1, &[none, none], |b, i, range| {
        let p = b.element(ranges, i, Scalar::I64);
        let low = b.load(p, float);
        let p = b.at_const(p, 4);
        let high = b.load(p, float);
        vec![b.min_finite(low, range[0]), b.max_finite(high, range[1])]
    });
    let span = b.sub(range[1], range[0]);
    let scale = b.div(span, codes);
    let empty = b.cmp(Cmp::Eq, range[0], range[1]);
    let scale = b.select(empty, one, scale);
    let minus = b.unary("arith.negf", range[0]);
    let zero = b.div(minus, scale);
    let zero = math::round(b, zero);
    let zero = b.min_finite(zero, codes);
    (scale, b.max_finite(zero, none))
}

fn codes_of(b: &mut Body, a: &Args, count: Val, out: Val, scale: Val, zero: Val) {
    let x = a.buffer(b, 0);
    let chunk = b.size(CHUNK);
    let (from, to) = (b.mul(a.begin, chunk), b.mul(a.end, chunk));
    let to = b.min(to, count);
    elementwise::vector_loop(b, from, to, b.target.lanes(), |b, i, lanes| {
        let p = b.element(x, i, Scalar::F32);
        let v = pointwise::load(b, p, Ty { elem: Scalar::F32, lanes });
        let (scale, zero) = (b.spread(scale, lanes), b.spread(zero, lanes));
        let code = quantized(b, v, scale, Some(zero), Scalar::U8);
        let p = b.element(out, i, Scalar::I8);
        b.store(code, p);
    });
}
