//! MatMulInteger by a constant matrix of 8-bit codes, and the elementwise ops after it on its sums.
//!
//! Zero points are taken away first, which leaves numbers of 9 bits: of W when it is packed, of X row by row. Pairs of them are
//! multiplied and added up in 32 bits, which is exact (`pmaddwd`; `pmaddubsw`, twice as wide, saturates).

use super::epilogue::{Epilogue, Spot};
use super::panel::{self, Form, Store};
use super::{Args, Buffer, Kernel, Lowered, Step};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op, Value};
use dialects::tensor::Tensor;

/// Codes of u8 or i8 by a constant matrix of them; one zero point of X, constant ones of W for all of it or for each column.
pub fn supports(m: &Module, op: Op) -> bool {
    sizes(m, op).is_some()
}

/// Outputs and inputs.
fn sizes(m: &Module, op: Op) -> Option<(usize, usize)> {
    let data = &m.ops[op];
    let (x, w) = (data.operand(0)?, data.operand(1)?);
    let [k, n] = m.consts[m.const_of(w)?].shape()[..] else { return None };
    let (from, result) = (Size::shape(m.ty(x))?, Size::shape(m.ty(data.result(0)?))?);
    let one = |v: Value| {
        let single = Size::shape(m.ty(v)).is_some_and(|s| Size::product(&s) == Size::Known(1));
        signed(m, v) == signed(m, x) && single
    };
    let each = |v: Value| m.const_of(v).is_some_and(|c| [1, n as u64].contains(&m.consts[c].count()));
    let fits = signed(m, x).is_some()
        && signed(m, w).is_some()
        && from.last() == Some(&Size::from(k))
        && result.last() == Some(&Size::from(n))
        && data.operand(2).is_none_or(one)
        && data.operand(3).is_none_or(each);
    fits.then_some((n, k))
}

/// Whether the codes of `v` are signed, if they are codes.
fn signed(m: &Module, v: Value) -> Option<bool> {
    match m.ty(v).elem()? {
        Elem::U8 => Some(false),
        Elem::I8 => Some(true),
        _ => None,
    }
}

fn codes(m: &Module, v: Value) -> Option<Vec<i64>> {
    Some(Tensor::from_const(&m.consts[m.const_of(v)?]).ok()?.to_i64().ok()?.into_owned())
}

/// The kernels: X is centred, its rows brought together, then multiplied.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let (n, k) = sizes(m, op)?;
    let data = &m.ops[op];
    let domain = fused.domain()?;
    let rows = Size::product(&domain[..domain.len() - 1]);
    let mut w = codes(m, data.operand(1)?)?;
    if let Some(zeros) = data.operand(3) {
        let zeros = codes(m, zeros)?;
        w.iter_mut().enumerate().for_each(|(i, w)| *w -= zeros[i % n % zeros.len()]);
    }
    let store = if w.iter().all(|&w| i8::try_from(w).is_ok()) { Store::Bytes } else { Store::Words };
    let form = Form { n, k: k.div_ceil(2), lanes: target.lanes(), store };
    let packed = form.pack(|step, n, out| {
        let half = out.len() / 2;
        for (i, out) in out.chunks_exact_mut(half).enumerate() {
            let v = w.get((2 * step + i) * form.n + n).copied().unwrap_or(0);
            out.copy_from_slice(&v.to_le_bytes()[..half]);
        }
    });

    let mut lowered = Lowered { temps: vec![rows.clone() * (4 * form.k).into()], ..Lowered::default() };
    let x = data.operand(0)?;
    let mut buffers = vec![fused.buffer(x, &mut lowered.blobs)?, Buffer::Temp(0)];
    if let Some(zero) = data.operand(2) {
        buffers.push(fused.buffer(zero, &mut lowered.blobs)?);
    }
    let kernel = centre(target, k, signed(m, x)?, data.operand(2).is_some());
    lowered.steps.push(Step { kernel, buffers, dims: Vec::new(), units: rows.clone(), work: (k / 8).into() });
    let epilogue = Epilogue::new(fused, &domain, n, None)?;
    let mut read = Vec::new();
    for &v in &epilogue.operands {
        read.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    let finish = |b: &mut Body, a: &Args, first: usize, spot: Spot, sum: Val| {
        epilogue.emit(b, a, first, spot, form.lanes, |_, _| sum)
    };
    let ends = (fused.results().len(), read);
    panel::product(&mut lowered, target, &form, Buffer::Temp(0), packed, &rows, ends, &finish);
    Some(lowered)
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
