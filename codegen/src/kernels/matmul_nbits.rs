//! `com.microsoft.MatMulNBits` as a packed product, and the elementwise ops after it on its sums while they are in
//! registers.

use super::epilogue::{Epilogue, Spot};
use super::packed::{Form, Parts, prepare};
use super::packed_product::{product, units};
use super::{Blob, Buffer, Lowered, Step};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use dialects::ir::{Module, Op, Value};
use dialects::kernels::packed::code;
use dialects::tensor::Tensor;

/// f32 activations, constant weights, integer zero points, groups in order.
pub fn supports(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let float = |v: Option<Value>| v.is_some_and(|v| m.ty(v).elem() == Some(dialects::ir::Elem::F32));
    let constant = |i: usize| data.operand(i).is_none_or(|v| m.const_of(v).is_some());
    let zeros = data.operand(3).is_none_or(|v| m.ty(v).elem() == Some(dialects::ir::Elem::U8));
    let group = data.attrs.int("block_size").unwrap_or(0);
    float(data.operand(0))
        && float(data.operand(2))
        && (1..6).all(constant)
        && zeros
        && data.operand(4).is_none()
        && group >= 16
        && group % 16 == 0
        && (group < 32 || group % 32 == 0)
}

fn form(m: &Module, op: Op) -> Option<Form> {
    let attrs = &m.ops[op].attrs;
    let int = |name| attrs.int(name).and_then(|v| usize::try_from(v).ok());
    let (bits, group) = (int("bits").unwrap_or(4), int("block_size")?);
    // ONNX Runtime's kernels round activations for these forms only; so does the interpreter.
    let int8 = attrs.int("accuracy_level") == Some(4) && (bits != 2 || (32..=128).contains(&group));
    let zeros = m.ops[op].operand(3).is_some();
    Some(Form { n: int("N")?, k: int("K")?, group, bits, zeros, half_scales: false, int8 })
}

fn constant(m: &Module, op: Op, i: usize) -> Option<Tensor> {
    Tensor::from_const(&m.consts[m.const_of(m.ops[op].operand(i)?)?]).ok()
}

/// Zero points one to a byte, from rows padded to whole bytes.
fn zero_codes(packed: &[u8], form: &Form) -> Vec<u8> {
    let (groups, bits) = (form.groups(), form.bits);
    let row = (groups * bits).div_ceil(8);
    (0..form.n * groups).map(|i| code(&packed[i / groups * row..], bits, i % groups)).collect()
}

/// The kernels: activations are prepared, then multiplied.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let mut form = form(m, op)?;
    let domain = fused.domain()?;
    let rows = Size::product(&domain[..domain.len() - 1]);

    let (codes, scales) = (constant(m, op, 1)?, constant(m, op, 2)?);
    let zeros = match m.ops[op].operand(3) {
        Some(_) => Some(zero_codes(constant(m, op, 3)?.u8s().ok()?, &form)),
        None => None,
    };
    let (codes, scales) = (codes.u8s().ok()?, scales.f32s().ok()?);
    let cells = form.n * form.groups();
    if scales.len() != cells || codes.len() != cells * form.group * form.bits / 8 {
        return None;
    }
    form.half_scales = Form::scales_are_half(scales);
    let w = form.pack(&Parts { codes, scales, zeros: zeros.as_deref() });

    let mut lowered = Lowered { temps: vec![rows.clone() * form.x_row().into()], ..Lowered::default() };
    lowered.blobs.push(Blob { bytes: w.into() });
    let x = fused.buffer(m.ops[op].operand(0)?, &mut lowered.blobs)?;
    lowered.steps.push(Step {
        kernel: prepare(target, &form),
        buffers: vec![x, Buffer::Temp(0)],
        dims: vec![rows.clone()],
        units: rows.clone(),
        work: form.k.into(),
    });

    let bias = m.ops[op].operand(5);
    let epilogue = Epilogue::new(fused, &domain, form.n, bias)?;
    let results = fused.results().len();
    let mut buffers = vec![Buffer::Temp(0), Buffer::Blob(0)];
    buffers.extend((0..results).map(Buffer::Result));
    for &v in &epilogue.operands {
        buffers.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    let kernel = product(target, &form, results, &|b, a, row, first, there, sums| {
        let lanes = sums[0].ty.lanes;
        let mut outs = vec![Vec::new(); results];
        for (p, sum) in sums.into_iter().enumerate() {
            let part = b.size(p * lanes);
            let n = b.add(first, part);
            let spot = Spot { row, n, there: there.saturating_sub(p * lanes).min(lanes) };
            let values = epilogue.emit(b, a, 2 + results, spot, lanes, |b, values| match bias {
                Some(bias) => b.add(sum, values[&bias]),
                None => sum,
            });
            outs.iter_mut().zip(values).for_each(|(o, v)| o.push(v));
        }
        outs
    });
    // 64 outputs, at what memory gives: half of what the cache does.
    let work = rows.clone() * (2 * form.k).into();
    let units = units(target, &form, rows.clone());
    lowered.steps.push(Step { kernel, buffers, dims: vec![rows], units, work });
    Some(lowered)
}
