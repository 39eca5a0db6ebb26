//! Codes of 8 bits behind DequantizeLinear, as products of integers read them.

use crate::fuse::reader;
use crate::layout::{Layout, View};
use crate::size::Size;
use dialects::ir::{Elem, Module, Op, Value};
use dialects::tensor::Tensor;

/// Codes: `value = (code - zero) scale`.
#[derive(Clone, Copy)]
pub struct Coded {
    /// The codes.
    pub codes: Value,
    /// Scales.
    pub scale: Value,
    /// Zero points.
    pub zero: Option<Value>,
    /// The op that reads them.
    op: Option<Op>,
}

/// Whether the codes of `v` are signed, if it has codes of 8 bits.
pub fn signed(m: &Module, v: Value) -> Option<bool> {
    match m.ty(v).elem()? {
        Elem::U8 => Some(false),
        Elem::I8 => Some(true),
        _ => None,
    }
}

impl Coded {
    /// Codes, scale and zero point as operands.
    pub fn new(codes: Value, scale: Value, zero: Option<Value>) -> Coded {
        Coded { codes, scale, zero, op: None }
    }

    /// What `v` is read from, by one constant scale and zero point.
    pub fn activation(m: &Module, v: Value) -> Option<Coded> {
        let op = reader(m, v)?;
        let data = &m.ops[op];
        Some(Coded { op: Some(op), ..Coded::new(data.operand(0)?, data.operand(1)?, data.operand(2)) })
    }

    /// The constant that `v` is read from, with scales for all of it or for each index of `axis`.
    pub fn constant(m: &Module, v: Value, axis: usize) -> Option<Coded> {
        let (op, _) = m.def_op(v).filter(|_| m.const_of(v).is_none())?;
        let data = &m.ops[op];
        if !data.name.as_str().ends_with(".DequantizeLinear") || m.ty(v).elem() != Some(Elem::F32) {
            return None;
        }
        let coded = Coded { op: Some(op), ..Coded::new(data.operand(0)?, data.operand(1)?, data.operand(2)) };
        let dims = m.consts[m.const_of(coded.codes)?].shape();
        let given = data.attrs.int("axis").unwrap_or(1);
        let given = if given < 0 { given + dims.len() as i64 } else { given };
        let each = |v: Value| {
            let count = m.const_of(v).map(|c| m.consts[c].count());
            count == Some(1)
                || (given == axis as i64 && count.is_some() && count == dims.get(axis).map(|&d| d as u64))
        };
        let elem = m.ty(coded.codes).elem();
        let fits = matches!(elem, Some(Elem::U8 | Elem::I8 | Elem::I32))
            && m.ty(coded.scale).elem() == Some(Elem::F32)
            && each(coded.scale)
            && coded.zero.is_none_or(|z| each(z) && m.ty(z).elem() == elem)
            && data.attrs.int("block_size").unwrap_or(0) == 0;
        fits.then_some(coded)
    }

    /// The op that reads the codes, as a view of them.
    pub fn view(&self, m: &Module) -> Option<View> {
        let layout = Layout::contiguous(&Size::shape(m.ty(self.codes))?);
        Some(View { root: self.codes, layout, ops: self.op.into_iter().collect() })
    }

    /// Constant codes less their zero points, which are one for all or one for each index of `axis`.
    pub fn numbers(&self, m: &Module, axis: usize) -> Option<Vec<i64>> {
        let list = |v: Value| {
            let t = Tensor::from_const(&m.consts[m.const_of(v)?]).ok()?;
            Some((t.to_i64().ok()?.into_owned(), t.shape().to_vec()))
        };
        let (mut codes, shape) = list(self.codes)?;
        if let Some(zero) = self.zero {
            let (zeros, inner) = (list(zero)?.0, shape.iter().skip(axis + 1).product::<usize>().max(1));
            let count = zeros.len();
            if count == 0 {
                return None;
            }
            codes.iter_mut().enumerate().for_each(|(i, code)| *code -= zeros[i / inner % count]);
        }
        Some(codes)
    }

    /// Constant scales, so many of them.
    pub fn scales(&self, m: &Module, count: usize) -> Option<Vec<f32>> {
        let scales = Tensor::floats(&m.consts[m.const_of(self.scale)?]).ok()?;
        match scales[..] {
            [one] => Some(vec![one; count]),
            _ => Some(scales).filter(|s| s.len() == count),
        }
    }

    /// The floats that constant codes stand for.
    pub fn floats(&self, m: &Module, axis: usize) -> Option<Tensor> {
        let shape = m.consts[m.const_of(self.codes)?].shape().to_vec();
        let scales = Tensor::floats(&m.consts[m.const_of(self.scale)?]).ok()?;
        let inner = shape.iter().skip(axis + 1).product::<usize>().max(1);
        let count = scales.len().max(1);
        let value = |(i, n): (usize, i64)| n as f32 * scales[i / inner % count];
        let values: Vec<f32> = self.numbers(m, axis)?.into_iter().enumerate().map(value).collect();
        Tensor::new(&shape, values).ok()
    }
}
