//! Products by a constant matrix of 8-bit codes, and the elementwise ops after them on their sums: MatMulInteger gives the
//! sums, MatMulIntegerToFloat scales them, and so do MatMul and Gemm of what DequantizeLinear reads; QLinearMatMul makes codes of
//! them, in double precision as the interpreter does.
//!
//! Zero points are taken away first, which leaves numbers of 9 bits: of W when it is packed, of X row by row. Pairs of them are
//! multiplied and added up in 32 bits, which is exact (`pmaddwd`; `pmaddubsw`, twice as wide, saturates). Where a processor
//! multiplies by fours without saturation, and W is bytes, X keeps its zero point: see [`fours`](super::fours).

use super::coded::{Coded, signed};
use super::epilogue::{Epilogue, Spot};
use super::fours::Fours;
use super::panel::{self, Form, Store};
use super::{Args, Blob, Buffer, Kernel, Lowered, Step, elementwise};
use crate::fuse::Fused;
use crate::layout::View;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op, Value};

/// A product of codes: its operands by what they mean, and its sizes.
struct Product {
    x: Coded,
    w: Coded,
    /// Whether W is `[N, K]`.
    transposed: bool,
    n: usize,
    k: usize,
    outcome: Outcome,
}

/// What is made of a sum.
enum Outcome {
    /// Nothing.
    Sum,
    /// `sum * (x_scale * w_scale) + bias`
    Float { scales: [Value; 2], bias: Option<Value> },
    /// `round(sum * x_scale * w_scale / y_scale) + y_zero`, saturated.
    Codes { scales: [Value; 3], zero: Value, signed: bool },
}

impl Outcome {
    /// What is read as operands of elementwise ops are.
    fn operands(&self) -> Vec<Value> {
        match self {
            Outcome::Sum => Vec::new(),
            Outcome::Float { scales, bias } => scales.iter().copied().chain(*bias).collect(),
            Outcome::Codes { scales, .. } => scales.to_vec(),
        }
    }
}

/// Codes of u8 or i8 by a constant matrix of them; one scale and zero point of X and of codes that come out; scales of W for all
/// of it or for each column, and constant zero points likewise.
pub fn supports(m: &Module, op: Op) -> bool {
    of(m, op).is_some()
}

fn of(m: &Module, op: Op) -> Option<Product> {
    let data = &m.ops[op];
    let at = |i: usize| data.operand(i);
    let y = data.result(0)?;
    let (mut transposed, mut plain) = (false, true);
    let (x, w, outcome) = match data.name.as_str() {
        "onnx.MatMulInteger" => {
            // There are no scales: the operands stand in their places.
            let of = |i: usize| Some(Coded::new(at(i)?, at(i)?, at(i + 2)));
            (of(0)?, of(1)?, Outcome::Sum)
        }
        "onnx.QLinearMatMul" => {
            let of = |i: usize| Some(Coded::new(at(i)?, at(i + 1)?, at(i + 2)));
            let (zero, scales) = (at(7)?, [at(1)?, at(4)?, at(6)?]);
            (of(0)?, of(3)?, Outcome::Codes { scales, zero, signed: signed(m, zero)? })
        }
        "com.microsoft.MatMulIntegerToFloat" => {
            let of = |i: usize| Some(Coded::new(at(i)?, at(i + 2)?, at(i + 4)));
            (of(0)?, of(1)?, Outcome::Float { scales: [at(2)?, at(3)?], bias: at(6) })
        }
        name => {
            let one = |name: &str| data.attrs.float(name).unwrap_or(1.0) == 1.0;
            if name == "onnx.Gemm" {
                transposed = data.attrs.int("transB").unwrap_or(0) != 0;
                plain = data.attrs.int("transA").unwrap_or(0) == 0 && one("alpha") && one("beta");
            }
            let (x, w) = factors(m, op)?;
            (x, w, Outcome::Float { scales: [x.scale, w.scale], bias: at(2) })
        }
    };
    let [rows, columns] = m.consts[m.const_of(w.codes)?].shape()[..] else { return None };
    let (k, n) = if transposed { (columns, rows) } else { (rows, columns) };
    let (from, to) = (Size::shape(m.ty(x.codes))?, Size::shape(m.ty(y))?);
    let count = |v: Value| Size::shape(m.ty(v)).map(|s| Size::product(&s));
    let one = |v: Value| count(v) == Some(Size::Known(1));
    let each = |v: Value| m.const_of(v).is_some_and(|c| [1, n as u64].contains(&m.consts[c].count()));
    let float = |v: Value| m.ty(v).elem() == Some(Elem::F32);
    let meets = |v: &Value| Size::shape(m.ty(*v)).is_some_and(|s| elementwise::steps(&s, &to).is_some());
    let ends = match &outcome {
        Outcome::Sum => true,
        Outcome::Float { scales, .. } => one(scales[0]),
        Outcome::Codes { scales, zero, .. } => one(scales[0]) && one(scales[2]) && one(*zero),
    };
    let fits = plain
        && signed(m, x.codes).is_some()
        && signed(m, w.codes).is_some()
        && from.last() == Some(&Size::from(k))
        && to.last() == Some(&Size::from(n))
        && x.zero.is_none_or(|z| signed(m, z) == signed(m, x.codes) && one(z))
        && w.zero.is_none_or(each)
        && ends
        && outcome.operands().iter().all(|v| float(*v) && meets(v));
    fits.then_some(Product { x, w, transposed, n, k, outcome })
}

/// The codes of both factors of a MatMul or Gemm.
fn factors(m: &Module, op: Op) -> Option<(Coded, Coded)> {
    let data = &m.ops[op];
    let (x, w) = (data.operand(0)?, data.operand(1)?);
    let axis = match data.attrs.int("transB").filter(|_| data.is("onnx.Gemm")) {
        None | Some(0) => 1,
        Some(_) => 0,
    };
    Some((Coded::activation(m, x)?, Coded::constant(m, w, axis)?))
}

/// Whether `op` is a MatMul or Gemm that multiplies what stands behind DequantizeLinear.
pub fn reads_codes(m: &Module, op: Op) -> bool {
    matches!(m.ops[op].name.as_str(), "onnx.MatMul" | "onnx.Gemm") && supports(m, op)
}

/// What reads the codes.
pub fn views(m: &Module, op: Op) -> Vec<View> {
    let factors = factors(m, op).filter(|_| reads_codes(m, op));
    factors.into_iter().flat_map(|(x, w)| [x.view(m), w.view(m)]).flatten().collect()
}

/// The kernels: X is centred, its rows brought together, then multiplied.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let Product { x, w, transposed, n, k, outcome } = of(m, op)?;
    let domain = fused.domain()?;
    let rows = Size::product(&domain[..domain.len() - 1]);
    let w = w.numbers(m, usize::from(!transposed))?;
    let signed_x = signed(m, x.codes)?;
    let fours = Fours::of(target, &w, signed_x);
    let store = match fours {
        Some(_) => Store::Fours,
        None if w.iter().all(|&w| i8::try_from(w).is_ok()) => Store::Bytes,
        None => Store::Words,
    };
    let (count, steps) = fours.map_or((2, k.div_ceil(2)), |fours| (4, fours.steps(k)));
    let form = Form { n, k: steps, lanes: target.lanes(), store };
    let at = |k_at: usize, n_at: usize| if transposed { n_at * k + k_at } else { k_at * n + n_at };
    let packed = form.pack(|step, n, out| {
        let size = out.len() / count;
        for (i, out) in out.chunks_exact_mut(size).enumerate() {
            let step = count * step + i;
            let v = if step < k { w[at(step, n)] } else { 0 };
            out.copy_from_slice(&v.to_le_bytes()[..size]);
        }
    });

    let mut lowered = Lowered { temps: vec![rows.clone() * (4 * form.k).into()], ..Lowered::default() };
    let mut buffers = vec![fused.buffer(x.codes, &mut lowered.blobs)?, Buffer::Temp(0)];
    let zero = match x.zero {
        Some(zero) => Some(fused.buffer(zero, &mut lowered.blobs)?),
        None => None,
    };
    let kernel = match fours {
        Some(fours) => fours.rows(target, k),
        None => {
            buffers.extend(zero.clone());
            centre(target, k, signed_x, zero.is_some())
        }
    };
    lowered.steps.push(Step { kernel, buffers, dims: Vec::new(), units: rows.clone(), work: (k / 8).into() });
    let epilogue = Epilogue::new(fused, &domain, n, outcome.operands())?;
    let mut read = Vec::new();
    for &v in &epilogue.operands {
        read.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    let last = read.len();
    if let Outcome::Codes { zero, .. } = outcome {
        read.push(fused.buffer(zero, &mut lowered.blobs)?);
    }
    let shifts = fours.filter(|f| f.shifts(zero.is_some()));
    let columns = read.len();
    if shifts.is_some() {
        let mut sums = vec![0i32; form.columns()];
        for (n, sum) in sums.iter_mut().enumerate().take(n) {
            *sum = (0..k).fold(0, |sum, k| sum.wrapping_add(w[at(k, n)] as i32));
        }
        read.push(Buffer::Blob(lowered.blobs.len()));
        let bytes: Vec<u8> = sums.iter().flat_map(|s| s.to_le_bytes()).collect();
        lowered.blobs.push(Blob { bytes: bytes.into() });
        read.extend(zero.clone());
    }
    let finish = |b: &mut Body, a: &Args, first: usize, spot: Spot, sum: Val| {
        let sum = shifts.map_or(sum, |fours| {
            let zero = zero.as_ref().map(|_| a.buffer(b, first + columns + 1));
            let columns = a.buffer(b, first + columns);
            fours.centred(b, sum, columns, spot.n, zero)
        });
        epilogue.emit(b, a, first, spot, form.lanes, |b, values| match &outcome {
            Outcome::Sum => sum,
            Outcome::Float { scales, bias } => {
                let sum = b.cast(sum, Scalar::F32);
                let scale = b.mul(values[&scales[0]], values[&scales[1]]);
                let y = b.mul(sum, scale);
                bias.map_or(y, |bias| b.add(y, values[&bias]))
            }
            Outcome::Codes { scales, signed, .. } => {
                let zero = a.buffer(b, first + last);
                let zero = b.load(zero, scalar(Scalar::I8));
                in_codes(b, sum, scales.map(|s| values[&s]), zero, *signed)
            }
        })
    };
    let ends = (fused.results().len(), read);
    panel::product(&mut lowered, target, &form, Buffer::Temp(0), packed, &rows, ends, &finish);
    Some(lowered)
}

/// `round(sum * x_scale * w_scale / y_scale) + zero`, saturated, in double precision; NaN is code 0.
fn in_codes(b: &mut Body, sum: Val, [x, w, y]: [Val; 3], zero: Val, signed: bool) -> Val {
    let wide = sum.ty.of(Scalar::F64);
    let sum = b.cast(sum, Scalar::F64);
    let [x, w, y] = [x, w, y].map(|s| b.cast(s, Scalar::F64));
    let v = b.mul(sum, x);
    let v = b.mul(v, w);
    let v = b.div(v, y);
    let none = b.splat(wide, 0.0);
    let number = b.cmp(Cmp::Eq, v, v);
    // Far beyond what is not saturated, and near enough to be rounded by adding 1.5 * 2^52.
    let [most, least] = [1e6, -1e6].map(|l| b.splat(wide, l));
    let near = b.min_finite(v, most);
    let near = b.max_finite(near, least);
    let magic = b.splat(wide, 6_755_399_441_055_744.0);
    let near = b.add(near, magic);
    let near = b.sub(near, magic);
    let zero = match signed {
        true => b.cast(zero, Scalar::I32),
        false => b.widen_unsigned(zero, Scalar::I32),
    };
    let zero = b.cast(zero, Scalar::F64);
    let zero = b.broadcast(zero, wide.lanes);
    let code = b.add(near, zero);
    let (low, high) = if signed { (-128.0, 127.0) } else { (0.0, 255.0) };
    let (low, high) = (b.splat(wide, low), b.splat(wide, high));
    let code = b.min_finite(code, high);
    let code = b.max_finite(code, low);
    let code = b.select(number, code, none);
    let code = b.cast(code, Scalar::I32);
    b.cast(code, if signed { Scalar::I8 } else { Scalar::U8 })
}

/// Codes less their zero point, as i16, in an even number. Buffers: X, result, and the zero point if there is one. A unit is a
/// row.
fn centre(target: &Target, k: usize, signed: bool, zero: bool) -> Kernel {
    Kernel::new(target, "centre_rows", |b, a| {
        let (x, out) = (a.buffer(b, 0), a.buffer(b, 1));
        let lanes = 2 * b.target.lanes();
        let widen = |b: &mut Body, v: Val| match signed {
            true => b.cast(v, Scalar::I16),
            false => b.widen_unsigned(v, Scalar::I16),
        };
        let zero = match zero {
            true => {
                let p = a.buffer(b, 2);
                let zero = b.load(p, scalar(Scalar::I8));
                widen(b, zero)
            }
            false => b.splat(scalar(Scalar::I16), 0.0),
        };
        b.each(a.begin, a.end, 1, |b, row| {
            let (from, to) = (b.size(k), b.size(k.next_multiple_of(2) * 2));
            let (from, to) = (b.mul(row, from), b.mul(row, to));
            let (x, out) = (b.at(x, from), b.at(out, to));
            let some = |b: &mut Body, i: Val, there: usize| {
                let p = b.at(x, i);
                let v = b.load_some(p, vector(lanes, Scalar::I8), there);
                let v = widen(b, v);
                let zero = b.broadcast(zero, lanes);
                let v = b.sub(v, zero);
                // What is not there counts as nothing.
                let v = b.keep(v, there);
                let p = b.element(out, i, Scalar::I16);
                b.store_some(v, p, there.next_multiple_of(2));
            };
            let whole = k / lanes * lanes;
            let (none, end) = (b.size(0), b.size(whole));
            b.each(none, end, lanes, |b, i| some(b, i, lanes));
            if whole < k {
                some(b, end, k - whole);
            }
        });
    })
}
