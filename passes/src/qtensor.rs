//! The one result of quantizing a weight: codes, scales and zero points of an `[N, K]` matrix, and how it stands
//! in the graph (`quant.dequantize`). Every output form is a view packed from it.

use crate::PassError;
use bytes::Bytes;
use dialects::ir::{Attr, ConstData, Elem, Module, Op, OpBuilder, Type, Value};
use std::sync::Arc;

/// A quantized `[N, K]` matrix: one row per output, groups along K. Layout as `dialects::quant` says.
#[derive(Clone, Debug)]
pub struct QTensor {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Bits per code, 2 to 8.
    pub bits: u32,
    /// Weights along K that share a scale; at least K for a row-wide group.
    pub group_size: usize,
    /// u8 `[N, groups, blob]`.
    pub codes: ConstData,
    /// Float `[N, groups]`.
    pub scales: ConstData,
    /// u8 `[N, groups]`, one per byte; `None` means `2^(bits-1)` everywhere.
    pub zero_points: Option<ConstData>,
}

/// Where a [`QTensor`] stands in a graph.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The `quant.dequantize`.
    pub op: Op,
    /// The shape of the float weight that it stands for.
    pub shape: Vec<usize>,
    /// The dim of it along which K runs.
    pub axis: usize,
    /// The element type of the float weight.
    pub elem: Elem,
    /// The weight's name.
    pub label: String,
}

/// Bits that one code takes in memory: the least of 2, 4 and 8 that holds it.
pub fn container(bits: u32) -> u32 {
    match bits {
        0..=2 => 2,
        3..=4 => 4,
        _ => 8,
    }
}

/// The attribute of `quant.dequantize` that names the weight it was made from.
const LABEL: &str = "weight";

impl QTensor {
    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group_size)
    }

    /// Bytes of codes in a group.
    pub fn blob(&self) -> usize {
        blob(self.group_size, self.bits)
    }

    /// The code that stands for zero where no zero points are given.
    pub fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// The constants' shapes, for `n`, `k`, `bits` and `group_size`: codes, scales (and zero points).
    pub fn shapes(n: usize, k: usize, bits: u32, group_size: usize) -> ([u64; 3], [u64; 2]) {
        let groups = k.div_ceil(group_size);
        ([n as u64, groups as u64, blob(group_size, bits) as u64], [n as u64, groups as u64])
    }

    /// Puts the tensor before `at`, as the float weight of this shape: K runs along its dim `axis`.
    pub fn insert(
        &self,
        m: &mut Module,
        at: Op,
        label: &str,
        shape: &[usize],
        axis: usize,
        elem: Elem,
    ) -> Value {
        let region = m.ops[at].region;
        let loc = m.ops[at].loc.clone();
        let codes = m.add_const(region, m.fresh_name(&format!("{label}.codes")), self.codes.clone());
        let scales = m.add_const(region, m.fresh_name(&format!("{label}.scales")), self.scales.clone());
        let zero_points = self
            .zero_points
            .clone()
            .map(|z| m.add_const(region, m.fresh_name(&format!("{label}.zero_points")), z));
        let op = OpBuilder::new("quant.dequantize", &loc)
            .operands([Some(codes), Some(scales)])
            .operands(zero_points)
            .attr("bits", i64::from(self.bits))
            .attr("group_size", self.group_size as i64)
            .attr("axis", axis as i64)
            .attr("shape", Attr::Ints(shape.iter().map(|&d| d as i64).collect()))
            .attr("to", i64::from(elem.onnx()))
            .attr(LABEL, label)
            .result(Type::of_shape(elem, shape));
        let op = m.insert_before(at, op);
        m.ops[op].result(0).expect("a dequantize has a result")
    }

    /// The quantized tensor that `v` is, when a `quant.dequantize` of constants defines it.
    pub fn of(m: &Module, v: Value) -> Option<(QTensor, Placed)> {
        let (op, 0) = m.def_op(v)? else { return None };
        let data = &m.ops[op];
        if !data.is("quant.dequantize") {
            return None;
        }
        let konst = |i| data.operand(i).and_then(|v| m.const_of(v)).map(|c| m.consts[c].clone());
        let (codes, scales) = (konst(0)?, konst(1)?);
        if data.operand(2).is_some() && konst(2).is_none() {
            return None;
        }
        let shape: Vec<usize> =
            data.attrs.ints("shape")?.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
        let axis = usize::try_from(data.attrs.int("axis")?).ok().filter(|&a| a < shape.len())?;
        let k = shape[axis];
        let q = QTensor {
            n: shape.iter().product::<usize>().checked_div(k)?,
            k,
            bits: u32::try_from(data.attrs.int("bits")?).ok().filter(|b| (2..=8).contains(b))?,
            group_size: usize::try_from(data.attrs.int("group_size")?).ok().filter(|&g| g > 0)?,
            codes,
            scales,
            zero_points: konst(2),
        };
        let (codes, scales) = QTensor::shapes(q.n, q.k, q.bits, q.group_size);
        if q.codes.dims != codes || q.scales.dims != scales || q.codes.elem != Elem::U8 {
            return None;
        }
        let elem = Elem::from_onnx(i32::try_from(data.attrs.int("to")?).ok()?)?;
        let label = data.attrs.str(LABEL).unwrap_or(&data.loc).to_string();
        Some((q, Placed { op, shape, axis, elem, label }))
    }

    /// The block that the runtime's packed forms take for this tensor; a group that none serves is an error.
    pub fn block(&self, pass: &'static str, label: &str) -> Result<usize, PassError> {
        block_size(self.group_size, self.k, container(self.bits)).ok_or_else(|| PassError::At {
            pass,
            what: label.into(),
            why: format!(
                "a group of {} is no multiple of 16, and no block of a packed form",
                self.group_size
            ),
        })
    }

    /// Repeats each group's entry of `size` bytes for every block of the group: `[N, groups]` to `[N, blocks]`. The
    /// bytes themselves where blocks are groups.
    pub fn spread(&self, bytes: Bytes, block: usize, size: usize) -> Result<Bytes, PassError> {
        let (groups, blocks) = (self.groups(), self.k.div_ceil(block));
        if bytes.len() != self.n * groups * size {
            return Err(PassError::Env("a quantized weight has a scale or zero point too few".into()));
        }
        if groups == blocks {
            return Ok(bytes);
        }
        let entry = |i: usize| (i / blocks * groups + i % blocks * block / self.group_size) * size;
        Ok((0..self.n * blocks).flat_map(|i| bytes[entry(i)..][..size].iter().copied()).collect())
    }

    /// Zero points, one per group, given or not.
    pub fn zero_point_bytes(&self) -> Result<Bytes, PassError> {
        match &self.zero_points {
            Some(z) => read(z),
            None => Ok(vec![self.middle(); self.n * self.groups()].into()),
        }
    }
}

/// The bytes of a constant of a quantized tensor.
pub fn read(c: &ConstData) -> Result<Bytes, PassError> {
    c.read().map_err(|e| PassError::Env(format!("a quantized weight cannot be read: {e}")))
}

/// A u8 or float constant made from bytes whose length is known to fit.
pub fn constant(elem: Elem, dims: Vec<u64>, bytes: impl Into<Bytes>) -> ConstData {
    ConstData::new(elem, dims, Arc::new(bytes.into())).expect("the caller fits bytes to shape")
}

fn blob(group_size: usize, bits: u32) -> usize {
    (group_size * container(bits) as usize).div_ceil(8)
}

/// The block of MatMulNBits for groups of `group`: the group itself where it is legal, else the largest legal block
/// that divides it. One scale of a row-wide group serves any block: then the one that takes the fewest bytes.
fn block_size(group: usize, k: usize, bits: u32) -> Option<usize> {
    let legal = [256usize, 128, 64, 32, 16];
    if legal.contains(&group) {
        Some(group)
    } else if group >= k {
        let bytes = |b: &usize| k.div_ceil(*b) * (b * bits as usize / 8 + size_of::<f32>());
        legal.into_iter().min_by_key(bytes)
    } else {
        legal.into_iter().find(|&b| group.is_multiple_of(b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_legal() {
        assert_eq!(block_size(32, 172, 4), Some(32));
        assert_eq!(block_size(256, 172, 4), Some(256));
        assert_eq!(block_size(48, 172, 4), Some(16));
        assert_eq!(block_size(20, 172, 4), None);
        // 172 in 64s: 3 x 36 bytes; in 32s: 6 x 20; in 256: 132; in 128s: 2 x 68.
        assert_eq!(block_size(172, 172, 4), Some(64));
        assert_eq!(block_size(4096, 4096, 4), Some(256));
    }
}
