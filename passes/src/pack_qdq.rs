//! `pack-qdq`: quantized weights in standard ONNX, as blocked DequantizeLinear (opset 21) feeding a MatMul.
//!
//! ONNX Runtime fuses the pair into its packed kernel only for a weight of shape `[K, N]` with blocks along axis 0,
//! read by one MatMul. So that is the form written for every linear: a Gemm becomes MatMul and Add, a weight that
//! several ops read gets a DequantizeLinear for each. Kernels of Conv and gates of LSTM have one scale for each row.

use crate::gemm::Gemm;
use crate::operators::pads;
use crate::qtensor::{Placed, QTensor, constant, container, read};
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
        if cx.settings.profile != "tensorrt" {
            pads(m);
        }
        let packed = pack_rest(m, cx, NAME)?;
        if packed == 0 {
            // What `mixed` chose may all be float.
            if cx.may_find_nothing() || cx.report.mix.is_some() {
                return Ok(Changed::No);
            }
            let why = "no quantized weights are there to pack; quantize first, as in `rtn,pack-qdq`".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        cx.count("packed ops", packed);
        Ok(Changed::Yes)
    }
}

/// Packs every quantized weight that is there, for `pass`. Returns how many uses they have.
pub fn pack_rest(m: &mut Module, cx: &mut PassCx, pass: &'static str) -> Result<u64, PassError> {
    let found: Vec<(QTensor, Placed)> = m
        .live_ops()
        .into_iter()
        .filter_map(|op| m.ops[op].result(0).and_then(|v| QTensor::of(m, v)))
        .collect();
    let needed = found.iter().map(|(q, placed)| match () {
        // 2-bit elements came with opset 25, 4-bit ones and blocks with 21, scales in half precision with 19.
        () if container(q.bits) == 2 => 25,
        () if !in_rows(m, q, placed) && !by_output(m, q, placed) => 21,
        () if q.scales.elem != Elem::F32 => 19,
        () => 13,
    });
    if let Some(needed) = needed.max() {
        crate::raise_opset::raise(m, cx, needed, pass)?;
    }
    let mut packed = 0;
    for (q, placed) in &found {
        warn_of_bf16(cx, placed.elem);
        packed += match in_rows(m, q, placed) {
            true => rows(m, cx, q, placed)?,
            false => pack(m, cx, q, placed)?,
        };
    }
    Ok(packed)
}

/// Says that the runtime has no kernels for weights of this type on the CPU, where that is so.
pub fn warn_of_bf16(cx: &mut PassCx, elem: Elem) {
    if elem == Elem::BF16 {
        cx.report.warn(
            "ONNX Runtime has no bf16 kernels for the CPU, for packed weights as little as for MatMul and Add: like \
             the float model, the output runs on its other providers",
        );
    }
}

/// Whether a weight is written with one scale for each row: one of whole bytes and row-wide groups that no product
/// reads. The runtime takes kernels so, and dequantizes them far faster than blocks.
fn in_rows(m: &Module, q: &QTensor, placed: &Placed) -> bool {
    let weight = m.ops[placed.op].result(0).expect("a dequantize has a result");
    // A Gemm of integers takes rows too.
    let integers = |u: &Use, op: Op| m.ops[op].is("onnx.Gemm") && multiplies_codes(m, *u);
    let product = |u: &Use| matches!(u, Use::Operand(op, 1) if fuses(m, *op, placed) && !integers(u, *op));
    let whole = q.group_size == q.k && container(q.bits) == 8;
    // In a square weight the shape does not tell which axis is which.
    whole && placed.shape == [q.n, q.k] && placed.axis == 1 && !m.uses().of(weight).iter().any(product)
}

/// Writes a weight with one scale for each row, in the shape that its readers reshape it to where that keeps its rows.
fn rows(m: &mut Module, cx: &mut PassCx, q: &QTensor, placed: &Placed) -> Result<u64, PassError> {
    let weight = m.ops[placed.op].result(0).expect("a dequantize has a result");
    let users: Vec<Use> = m.uses().of(weight).to_vec();
    // All readers share one Reshape, which goes where the constant can have its shape.
    let reshape = match users[..] {
        [Use::Operand(op, 0)] if m.ops[op].is("onnx.Reshape") => m.ops[op].result(0),
        _ => None,
    };
    let shape = reshape.and_then(|v| m.ty(v).as_tensor()?.known_shape());
    let (to, shape, axis) = match (reshape, shape) {
        (Some(v), Some(s)) if s.first() == Some(&q.n) => (v, s, 0),
        (Some(v), Some(s)) if s.first() == Some(&1) && s.get(1) == Some(&q.n) => (v, s, 1),
        _ => (weight, placed.shape.clone(), 0),
    };
    let dims: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
    let parts = |source: &ConstData, dims| {
        ConstData::new(source.elem, dims, source.source.clone()).map_err(|e| PassError::Env(e.to_string()))
    };
    let per_row = vec![q.n as u64];
    let (codes, zero_points) = match &q.zero_points {
        Some(z) => (parts(&q.codes, dims)?, Some(parts(z, per_row.clone())?)),
        // Codes about their middle are signed integers, which need no zero point.
        None => {
            let signed: Vec<u8> = read(&q.codes)?.iter().map(|&c| c.wrapping_sub(q.middle())).collect();
            // The runtime's Gemm of integers is fused only where zero points are given.
            let gemm = users.iter().any(|u| matches!(u, Use::Operand(op, _) if m.ops[*op].is("onnx.Gemm")));
            let zeros = gemm.then(|| constant(Elem::I8, per_row.clone(), vec![0; q.n]));
            (constant(Elem::I8, dims, signed), zeros)
        }
    };
    let consts = [Some(codes), Some(parts(&q.scales, per_row)?), zero_points];
    let bytes = consts.iter().flatten().map(ConstData::byte_len).sum();
    let operands = add_parts(m, q, placed, consts);
    let loc = m.ops[placed.op].loc.clone();
    let op = OpBuilder::new("onnx.DequantizeLinear", &loc).operands(operands).attr("axis", axis);
    let op = m.insert_before(placed.op, op.result(Type::of_shape(placed.elem, &shape)));
    let new = m.ops[op].result(0).expect("the op was built with a result");
    m.replace_uses(to, new);
    if to != weight {
        m.erase(m.def_op(to).expect("it is the result of a Reshape").0);
    }
    m.erase(placed.op);
    for w in cx.report.weights.iter_mut().filter(|w| w.weight == placed.label) {
        w.bytes_after = bytes;
    }
    cx.report.note(
        "weights that are no operand of a product are written as DequantizeLinear, which ONNX Runtime runs before \
         every use; with the session option session.disable_quant_qdq=1 it does so once, when it loads the model",
    );
    Ok(users.len() as u64)
}

/// Whether a weight is written as `[K, N]` with one scale for each output: one of whole bytes that is multiplied with
/// activations in 8 bits only. The runtime multiplies integers then.
fn by_output(m: &Module, q: &QTensor, placed: &Placed) -> bool {
    let weight = m.ops[placed.op].result(0).expect("a dequantize has a result");
    let integers = |u: &Use| match u {
        Use::Operand(op, 1) => fuses(m, *op, placed) && multiplies_codes(m, *u),
        _ => false,
    };
    q.group_size >= q.k && container(q.bits) == 8 && m.uses().of(weight).iter().all(integers)
}

/// Adds codes, scales and zero points of a weight to its graph.
fn add_parts(m: &mut Module, q: &QTensor, placed: &Placed, parts: [Option<ConstData>; 3]) -> Vec<Value> {
    let region = m.ops[placed.op].region;
    let named = parts.into_iter().zip(["codes", "scales", "zero_points"]);
    let add = |(part, name): (Option<ConstData>, &str)| {
        let name = m.fresh_name(&format!("{}.q{}.{name}", placed.label, q.bits));
        part.map(|part| m.add_const(region, name, part))
    };
    named.filter_map(add).collect()
}

/// Codes, scales and zero points of one weight, `[K, N]` with blocks along axis 0; `[1, K, N]` when guarded.
struct Columns {
    operands: Vec<Value>,
    /// Inputs of a block; `None` where every output has one scale.
    block: Option<usize>,
    bytes: u64,
    /// Whether a Squeeze keeps the runtime from fusing the weight with an activation that is dequantized too: of blocks
    /// of 8-bit codes it makes an integer product that then fails.
    guarded: bool,
}

/// Packs every use of one quantized weight. Returns how many.
fn pack(m: &mut Module, cx: &mut PassCx, q: &QTensor, placed: &Placed) -> Result<u64, PassError> {
    let weight = m.ops[placed.op].result(0).expect("a dequantize has a result");
    let users: Vec<Use> = m.uses().of(weight).to_vec();
    let columns = match by_output(m, q, placed) {
        true => Columns::by_output(m, q, placed)?,
        false => {
            let guarded = container(q.bits) == 8 && users.iter().any(|u| multiplies_codes(m, *u));
            Columns::new(m, q, placed, guarded)?
        }
    };
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

/// Whether a use is a product with an activation that comes from codes.
fn multiplies_codes(m: &Module, user: Use) -> bool {
    let Use::Operand(op, 1) = user else { return false };
    let x = m.ops[op].operand(0).and_then(|x| m.def_op(x));
    x.is_some_and(|(x, _)| m.ops[x].is("onnx.DequantizeLinear"))
}

/// Whether `op`, which reads the weight as its right operand, is a plain product along the groups.
fn fuses(m: &Module, op: Op, placed: &Placed) -> bool {
    let data = &m.ops[op];
    let trans_b = usize::from(data.attrs.int("transB").unwrap_or(0) != 0);
    match data.name.as_str() {
        "onnx.MatMul" => placed.axis + 2 == placed.shape.len(),
        "onnx.Gemm" => placed.axis == trans_b,
        _ => false,
    }
}

impl Columns {
    fn new(m: &mut Module, q: &QTensor, placed: &Placed, guarded: bool) -> Result<Columns, PassError> {
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
        let dims = |rows: usize| [1, rows as u64, q.n as u64][usize::from(!guarded)..].to_vec();
        let per_block = dims(blocks);
        let consts = [
            constant(elem, dims(q.k), codes(q, bits)?),
            constant(q.scales.elem, per_block.clone(), scales),
            constant(elem, per_block, flat(&zero_points, bits)),
        ];
        let bytes = consts.iter().map(ConstData::byte_len).sum();
        let operands = add_parts(m, q, placed, consts.map(Some));
        Ok(Columns { operands, block: Some(block), bytes, guarded })
    }

    /// With one scale for each output. Codes about their middle are signed integers, whose zero points are zero.
    fn by_output(m: &mut Module, q: &QTensor, placed: &Placed) -> Result<Columns, PassError> {
        let (shift, elem) = match &q.zero_points {
            Some(_) => (0, Elem::U8),
            None => (q.middle(), Elem::I8),
        };
        let codes: Vec<u8> = codes(q, 8)?.into_iter().map(|c| c.wrapping_sub(shift)).collect();
        let outputs = vec![q.n as u64];
        let zero_points = q.zero_points.as_ref().map(read).transpose()?;
        let zero_points = zero_points.map_or_else(|| vec![0; q.n], |z| z.to_vec());
        let consts = [
            Some(constant(elem, vec![q.k as u64, q.n as u64], codes)),
            Some(constant(q.scales.elem, outputs.clone(), read(&q.scales)?.to_vec())),
            Some(constant(elem, outputs, zero_points)),
        ];
        let bytes = consts.iter().flatten().map(ConstData::byte_len).sum();
        let operands = add_parts(m, q, placed, consts);
        Ok(Columns { operands, block: None, bytes, guarded: false })
    }

    /// Puts the weight as `[K, N]` before `at`.
    fn insert(&self, m: &mut Module, at: Op, q: &QTensor, elem: Elem) -> Value {
        let loc = m.ops[at].loc.clone();
        let dims = [1, q.k, q.n];
        let dequantize = OpBuilder::new("onnx.DequantizeLinear", &loc).operands(self.operands.clone());
        let dequantize = match self.block {
            Some(block) => dequantize.attr("axis", i64::from(self.guarded)).attr("block_size", block as i64),
            None => dequantize.attr("axis", 1),
        };
        let dequantize = dequantize.result(Type::of_shape(elem, &dims[usize::from(!self.guarded)..]));
        let mut op = m.insert_before(at, dequantize);
        if self.guarded {
            let axes = constant(Elem::I64, vec![1], 0i64.to_le_bytes().to_vec());
            let axes = m.add_const(m.ops[at].region, m.fresh_name("axes"), axes);
            let squeeze = OpBuilder::new("onnx.Squeeze", &loc).operands([m.ops[op].result(0), Some(axes)]);
            op = m.insert_before(at, squeeze.result(Type::of_shape(elem, &[q.k, q.n])));
        }
        m.ops[op].result(0).expect("the op was built with a result")
    }
}

/// Rewrites one MatMul or Gemm.
fn linear(m: &mut Module, op: Op, q: &QTensor, placed: &Placed, w: &Columns) -> Result<(), PassError> {
    let weight = w.insert(m, op, q, placed.elem);
    // A Gemm of integers stays one: the runtime has a kernel for it, with the bias.
    if m.ops[op].is("onnx.MatMul") || w.block.is_none() {
        m.ops[op].operands[1] = Some(weight);
        if m.ops[op].attrs.int("transB").is_some() {
            m.ops[op].attrs.set("transB", 0.into());
        }
        return Ok(());
    }
    let gemm = Gemm::new(m, NAME, op, q.n)?;
    let product = OpBuilder::new("onnx.MatMul", &gemm.data.loc).operands([gemm.x, weight]);
    gemm.finish(m, NAME, product)
}

/// Gives a use that is no product the weight in its own shape: DequantizeLinear, Transpose and Reshape as needed.
fn plain(m: &mut Module, user: Use, q: &QTensor, placed: &Placed, w: &Columns) {
    let loc = m.ops[placed.op].loc.clone();
    let insert = |m: &mut Module, b| {
        let op = m.insert_before(placed.op, b);
        m.ops[op].result(0).expect("the op was built with a result")
    };
    let mut v = w.insert(m, placed.op, q, placed.elem);
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
pub fn transpose(bytes: &[u8], cols: usize, size: usize) -> Vec<u8> {
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
