//! `com.microsoft.MatMulNBits` as a packed product, and the elementwise ops after it on its sums while they are in
//! registers.

use super::packed::{Form, Parts, prepare};
use super::packed_product::product;
use super::{Args, Blob, Buffer, Lowered, Step, elementwise, pointwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, vector};
use dialects::ir::{Module, Op, Value};
use dialects::kernels::packed::code;
use dialects::tensor::Tensor;
use std::collections::HashMap;

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
        dims: Vec::new(),
        units: rows.clone(),
        work: form.k.into(),
    });

    let epilogue = Epilogue::new(fused, &domain, form.n)?;
    let mut buffers = vec![Buffer::Temp(0), Buffer::Blob(0)];
    buffers.extend((0..fused.results().len()).map(Buffer::Result));
    for &v in &epilogue.operands {
        buffers.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    let bias = match m.ops[op].operand(5) {
        Some(v) => {
            buffers.push(fused.buffer(v, &mut lowered.blobs)?);
            true
        }
        None => false,
    };
    let results = fused.results();
    let kernel = product(target, &form, results.len(), &|b, a, row, first, there, sums| {
        let lanes = sums[0].ty.lanes;
        let mut outs = vec![Vec::new(); results.len()];
        for (p, sum) in sums.into_iter().enumerate() {
            let part = b.size(p * lanes);
            let n = b.add(first, part);
            let there = there.saturating_sub(p * lanes).min(lanes);
            let sum = match bias {
                true => {
                    let bias = a.buffer(b, 2 + results.len() + epilogue.operands.len());
                    let at = b.element(bias, n, Scalar::F32);
                    let bias = b.load_some(at, sum.ty, there);
                    b.add(sum, bias)
                }
                false => sum,
            };
            let values = epilogue.emit(b, a, 2 + results.len(), row, n, sum, there);
            outs.iter_mut().zip(results).for_each(|(o, v)| o.push(values[v]));
        }
        outs
    });
    let work = rows.clone() * form.k.into();
    lowered.steps.push(Step { kernel, buffers, dims: vec![rows], units: form.blocks().into(), work });
    Some(lowered)
}

/// The elementwise ops after a product.
pub struct Epilogue<'f, 'm> {
    fused: &'f Fused<'m>,
    /// What they read from memory.
    pub operands: Vec<Value>,
    /// For each operand, whether it steps from row to row, and along the row.
    steps: Vec<(bool, bool)>,
    n: usize,
}

impl<'f, 'm> Epilogue<'f, 'm> {
    /// Of a kernel over `domain`, whose last dim is `n`. `None` for results whose elements the kernel does not write.
    pub fn new(fused: &'f Fused<'m>, domain: &[Size], n: usize) -> Option<Epilogue<'f, 'm>> {
        let operands = fused.operands();
        let steps = operands.iter().map(|&v| {
            let steps = elementwise::steps(&fused.shape(v)?, domain)?;
            let (last, lead) = steps.split_last()?;
            // Dims of one element do not step, and do not count.
            let lead = lead.iter().zip(domain).filter(|(_, d)| **d != Size::Known(1)).any(|(s, _)| *s);
            Some((lead, *last))
        });
        let steps = steps.collect::<Option<_>>()?;
        Some(Epilogue { fused, operands, steps, n })
    }

    /// All values of the body for lanes `n..` of `row`, of which `there` are there; `sum` is what the anchor computed.
    /// Operands are buffers from `first` on.
    #[allow(clippy::too_many_arguments)]
    pub fn emit(
        &self,
        b: &mut Body,
        a: &Args,
        first: usize,
        row: Val,
        n: Val,
        sum: Val,
        there: usize,
    ) -> HashMap<Value, Val> {
        let lanes = sum.ty.lanes;
        let anchor = self.fused.anchor().and_then(|op| self.fused.module.ops[op].result(0));
        let mut values = HashMap::from([(anchor.expect("an epilogue has an anchor"), sum)]);
        for (i, (&v, &(by_row, along))) in self.operands.iter().zip(&self.steps).enumerate() {
            let elem = self.fused.register(v);
            let mut at = if along { n } else { b.size(0) };
            if by_row {
                let stride = b.size(if along { self.n } else { 1 });
                let start = b.mul(row, stride);
                at = b.add(start, at);
            }
            let buffer = a.buffer(b, first + i);
            let p = elementwise::element(b, buffer, at, elem);
            let value = match along {
                true => pointwise::load_some(b, p, vector(lanes, elem), there),
                false => {
                    let one = pointwise::load(b, p, crate::text::scalar(elem));
                    b.broadcast(one, lanes)
                }
            };
            values.insert(v, value);
        }
        elementwise::chain(b, self.fused, &mut values, lanes);
        values
    }
}
