//! `pack-qdq`: quantized weights in standard ONNX, as blocked DequantizeLinear (opset 21) feeding a MatMul.
//!
//! ONNX Runtime fuses the pair into its packed kernel only for a weight of shape `[K, N]` with blocks along axis 0,
//! read by one MatMul. So that is the form written for every linear: a Gemm becomes MatMul and Add, a weight that
//! several ops read gets a DequantizeLinear for each.

use crate::qtensor::{Placed, QTensor, constant, container, read};
use crate::rewrite::{Patch, apply};
use crate::{Changed, Exactness, OpSet, Pass, PassCx, PassError};
use dialects::ir::{ConstData, Elem, Module, Op, OpBuilder, Type, Use, Value};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// The pass; it has no options of its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PackQdq {}

const NAME: &str = "pack-qdq";

impl Pass for PackQdq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "packs quantized weights into blocked DequantizeLinear (opset 21), standard ONNX"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["onnx.DequantizeLinear"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let found: Vec<(QTensor, Placed)> = m
            .live_ops()
            .into_iter()
            .filter_map(|op| m.ops[op].result(0).and_then(|v| QTensor::of(m, v)))
            .collect();
        if found.is_empty() {
            if cx.settings.allow_noop {
                return Ok(Changed::No);
            }
            let why = "no quantized weights are there to pack; quantize first, as in `rtn,pack-qdq`".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        // 2-bit elements came with opset 25, 4-bit ones and blocks with 21.
        let needed = if found.iter().any(|(q, _)| container(q.bits) == 2) { 25 } else { 21 };
        crate::raise_opset::raise(m, cx, needed, NAME)?;
        let mut packed = 0;
        for (q, placed) in &found {
            packed += pack(m, cx, q, placed)?;
        }
        cx.count("packed ops", packed);
        Ok(Changed::Yes)
    }
}

/// Codes, scales and zero points of one weight, `[K, N]` with blocks along axis 0.
struct Columns {
    operands: [Value; 3],
    block: usize,
    bytes: u64,
}

/// Packs every use of one quantized weight. Returns how many.
fn pack(m: &mut Module, cx: &mut PassCx, q: &QTensor, placed: &Placed) -> Result<u64, PassError> {
    let weight = m.ops[placed.op].result(0).expect("a dequantize has a result");
    let columns = Columns::new(m, q, placed)?;
    let users: Vec<Use> = m.uses().of(weight).to_vec();
    for (i, user) in users.iter().enumerate() {
        match *user {
            Use::Operand(op, 1) if fuses(m, op, placed) => linear(m, op, q, placed, &columns)?,
            _ => {
                if let Use::Operand(op, _) = *user {
                    let why = "the weight is written as DequantizeLinear, which the runtime does not fuse into this op";
                    cx.left(m, op, why);
                }
                plain(m, *user, q, placed, &columns);
            }
        }
        if i == 1 {
            cx.report.note(format!(
                "{:?} is read by several ops: each has its own DequantizeLinear",
                placed.label
            ));
        }
    }
    m.erase(placed.op);
    for w in cx.report.weights.iter_mut().filter(|w| w.weight == placed.label) {
        w.bytes_after = columns.bytes;
    }
    Ok(users.len() as u64)
}

/// Whether `op`, which reads the weight as its right operand, is a plain product along the groups.
fn fuses(m: &Module, op: Op, placed: &Placed) -> bool {
    let data = &m.ops[op];
    let trans_b = usize::from(data.attrs.int("transB").unwrap_or(0) != 0);
    match data.name.as_str() {
        "onnx.MatMul" => placed.axis + 2 == placed.shape.len(),
        "onnx.Gemm" => placed.axis == trans_b && data.attrs.int("transA").unwrap_or(0) == 0,
        _ => false,
    }
}

impl Columns {
    fn new(m: &mut Module, q: &QTensor, placed: &Placed) -> Result<Columns, PassError> {
        let bits = container(q.bits);
        let elem = match bits {
            2 => Elem::U2,
            4 => Elem::U4,
            _ => Elem::U8,
        };
        let block = q.block(NAME, &placed.label)?;
        let blocks = q.k.div_ceil(block);
        let size = q.scales.elem.bits() / 8;
        let scales = transpose(&q.spread(read(&q.scales)?, block, size)?, blocks, size);
        let zero_points = transpose(&q.spread(q.zero_point_bytes()?, block, 1)?, blocks, 1);
        let per_block = vec![blocks as u64, q.n as u64];
        let consts = [
            constant(elem, vec![q.k as u64, q.n as u64], codes(q, bits)?),
            constant(q.scales.elem, per_block.clone(), scales),
            constant(elem, per_block, flat(&zero_points, bits)),
        ];
        let bytes = consts.iter().map(ConstData::byte_len).sum();
        let region = m.ops[placed.op].region;
        let names = ["codes", "scales", "zero_points"];
        let mut operands = consts.into_iter().zip(names).map(|(c, part)| {
            let name = m.fresh_name(&format!("{}.q{}.{part}", placed.label, q.bits));
            m.add_const(region, name, c)
        });
        let operands = [(); 3].map(|()| operands.next().expect("three constants were made"));
        Ok(Columns { operands, block, bytes })
    }

    /// A DequantizeLinear of the weight as `[K, N]`.
    fn op(&self, loc: &dialects::ir::Symbol, q: &QTensor, elem: Elem) -> OpBuilder {
        OpBuilder::new("onnx.DequantizeLinear", loc)
            .operands(self.operands)
            .attr("axis", 0)
            .attr("block_size", self.block as i64)
            .result(Type::of_shape(elem, &[q.k, q.n]))
    }
}

/// Rewrites one MatMul or Gemm.
fn linear(m: &mut Module, op: Op, q: &QTensor, placed: &Placed, w: &Columns) -> Result<(), PassError> {
    let data = m.ops[op].clone();
    let patch = Patch::new(op);
    let weight = patch.op(m, w.op(&data.loc, q, placed.elem));
    if data.is("onnx.MatMul") {
        m.ops[op].operands[1] = Some(weight);
        return Ok(());
    }
    let y = data.result(0).expect("a Gemm has a result");
    let (name, ty) = (m.values[y].name.clone(), m.ty(y).clone());
    let x = data.operand(0);
    let product = OpBuilder::new("onnx.MatMul", &data.loc).node(data.node.clone());
    let mut out = patch.op(m, product.operands([x, Some(weight)]).meta(data.meta.clone()).result(ty.clone()));
    if let Some(c) = data.operand(2) {
        out = patch.op(m, OpBuilder::new("onnx.Add", &data.loc).operands([out, c]).result(ty));
    }
    apply(m, NAME, patch.replace(y, out))?;
    if m.values[out].name.is_empty() {
        m.values[y].name = "".into();
        m.values[out].name = name;
    }
    Ok(())
}

/// Gives a use that is no product the weight in its own shape: DequantizeLinear, Transpose and Reshape as needed.
fn plain(m: &mut Module, user: Use, q: &QTensor, placed: &Placed, w: &Columns) {
    let loc = m.ops[placed.op].loc.clone();
    let insert = |m: &mut Module, b| {
        let op = m.insert_before(placed.op, b);
        m.ops[op].result(0).expect("the op was built with a result")
    };
    let mut v = insert(m, w.op(&loc, q, placed.elem));
    let rows = placed.shape[..placed.axis].iter().product::<usize>() == q.n && q.n > 1;
    let flat = if rows { [q.n, q.k] } else { [q.k, q.n] };
    if rows {
        let b = OpBuilder::new("onnx.Transpose", &loc).operands([v]).attr("perm", vec![1, 0]);
        v = insert(m, b.result(Type::of_shape(placed.elem, &flat)));
    }
    if placed.shape != flat {
        let dims: Vec<i64> = placed.shape.iter().map(|&d| d as i64).collect();
        let shape = constant(Elem::I64, vec![dims.len() as u64], bytemuck::cast_slice(&dims).to_vec());
        let shape =
            m.add_const(m.ops[placed.op].region, m.fresh_name(&format!("{}.shape", placed.label)), shape);
        let b = OpBuilder::new("onnx.Reshape", &loc).operands([v, shape]);
        v = insert(m, b.result(Type::of_shape(placed.elem, &placed.shape)));
    }
    match user {
        Use::Operand(op, i) => m.ops[op].operands[i] = Some(v),
        Use::Result(region, i) => m.regions[region].results[i] = v,
    }
}

/// Codes as ONNX stores them: `[K, N]` row-major, packed flat without padding.
fn codes(q: &QTensor, bits: u32) -> Result<Vec<u8>, PassError> {
    /// Rows of K that one task unpacks.
    const TILE: usize = 64;
    let bytes = read(&q.codes)?;
    let (n, k, bits_, per_byte) = (q.n, q.k, bits as usize, (8 / bits) as usize);
    let (blob, row) = (q.blob(), q.groups() * q.blob());
    let mask = ((1u16 << bits) - 1) as u8;
    let mut out = vec![0u8; n * k];
    out.par_chunks_mut(TILE * n).enumerate().for_each(|(t, out)| {
        for (col, codes) in bytes.chunks_exact(row).enumerate() {
            for (r, out) in out.chunks_exact_mut(n).enumerate() {
                let (group, i) = ((t * TILE + r) / q.group_size, (t * TILE + r) % q.group_size);
                out[col] = codes[group * blob + i / per_byte] >> (i % per_byte * bits_) & mask;
            }
        }
    });
    Ok(flat(&out, bits))
}

/// Packs codes of one byte each, low-first, without padding between rows.
fn flat(codes: &[u8], bits: u32) -> Vec<u8> {
    match bits {
        8 => codes.to_vec(),
        _ => {
            let byte = |c: &[u8]| c.iter().rev().fold(0u8, |b, &x| b << bits | x);
            codes.par_chunks((8 / bits) as usize).map(byte).collect()
        }
    }
}

/// `[N, cols]` entries of `size` bytes to `[cols, N]`.
fn transpose(bytes: &[u8], cols: usize, size: usize) -> Vec<u8> {
    let rows = bytes.len() / (cols * size).max(1);
    let entries = (0..cols).flat_map(|c| (0..rows).map(move |r| (r * cols + c) * size));
    entries.flat_map(|i| bytes[i..i + size].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of K = 3 in groups of 2, 4 bits, last group padded: [1 2 | 3 _], [4 5 | 6 _].
    #[test]
    fn codes_run_flat_along_n() {
        let q = QTensor {
            n: 2,
            k: 3,
            bits: 4,
            group_size: 2,
            codes: constant(Elem::U8, vec![2, 2, 1], vec![0x21, 0xf3, 0x54, 0xf6]),
            scales: constant(Elem::U8, vec![2, 2], vec![0; 4]),
            zero_points: None,
        };
        // [K, N] is [1 4][2 5][3 6].
        assert_eq!(codes(&q, 4).unwrap(), [0x41, 0x52, 0x63]);
    }

    #[test]
    fn odd_rows_share_bytes() {
        assert_eq!(flat(&[1, 2, 3, 4, 5], 4), [0x21, 0x43, 0x05]);
        assert_eq!(transpose(&[1, 2, 3, 4, 5, 6], 3, 1), [1, 4, 2, 5, 3, 6]);
        assert_eq!(transpose(&[1, 2, 3, 4, 5, 6, 7, 8], 2, 2), [1, 2, 5, 6, 3, 4, 7, 8]);
    }
}
