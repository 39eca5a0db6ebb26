//! `pack-int4`: quantized weights become `com.microsoft.MatMulNBits`, the form that ONNX Runtime multiplies without
//! unpacking. Codes of 2, 4 and 8 bits are packed as such, others in the next container. What it cannot multiply, such
//! as the kernels of a Conv, becomes DequantizeLinear (see [`crate::pack_qdq`]).
//!
//! Never written: `g_idx` (wrong results with u8 zero points), float zero points (about 100x slower), blocks that
//! are no power of two from 16 to 256 (refused by the CPU kernels).

use crate::gemm::Gemm;
use crate::linear::root;
use crate::qtensor::{Placed, QTensor, constant, container, read};
use crate::{Changed, Exactness, OpSet, Pass, PassCx, PassError, pack_qdq, tied};
use dialects::ir::{ConstData, Elem, Module, Op, OpBuilder, Region, Type, Use, Value};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The pass; it has no options of its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PackInt4 {}

const NAME: &str = "pack-int4";

/// The domain of packed ops.
const DOMAIN: &str = "com.microsoft";

/// The counter of embeddings that share a head's blob.
const SHARED: &str = "shared embeddings";

impl Pass for PackInt4 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "packs quantized weights into com.microsoft.MatMulNBits (2, 4 and 8 bits)"
    }

    // The weights are what they were; activations are rounded only where the profile asks the runtime to.
    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["com.microsoft.MatMulNBits"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        if cx.settings.profile == "tensorrt" {
            let why = "TensorRT has no MatMulNBits; pack with pack-qdq".into();
            return Err(PassError::Profile { pass: NAME, why });
        }
        let mut found = 0u64;
        let mut packed = 0u64;
        for op in m.live_ops() {
            let Some((q, placed)) = m.ops[op].result(0).and_then(|v| QTensor::of(m, v)) else { continue };
            found += 1;
            packed += pack(m, cx, &q, &placed)?;
        }
        // What `mixed` chose may all be float.
        if found == 0 && !cx.settings.allow_noop && cx.report.mix.is_none() {
            let why = "no quantized weights are there to pack; quantize first, as in `rtn,pack-int4`".into();
            return Err(PassError::Nothing { pass: NAME, why });
        }
        if cx.settings.tied_shared && !cx.report.counts.contains_key(SHARED) {
            cx.report.warn("--tied shared: no packed weight is also an embedding, so nothing is shared");
        }
        import_domain(m);
        packed += pack_qdq::pack_rest(m, cx, NAME)?;
        cx.count("packed ops", packed);
        Ok(if packed > 0 { Changed::Yes } else { Changed::No })
    }
}

/// Imports the domain of packed ops into the graphs that have some: the model's, and those of functions.
pub fn import_domain(m: &mut Module) {
    let packed = m.live_ops().into_iter().filter(|&op| m.ops[op].name.dialect() == DOMAIN);
    let roots: HashSet<Region> = packed.map(|op| root(m, m.ops[op].region)).collect();
    if !roots.is_empty() {
        m.opsets.entry(DOMAIN.into()).or_insert(1);
    }
    for f in m.functions.iter_mut().filter(|f| roots.contains(&f.body)) {
        f.opsets.entry(DOMAIN.into()).or_insert(1);
    }
}

/// Packs every use of one quantized weight. Returns how many.
fn pack(m: &mut Module, cx: &mut PassCx, q: &QTensor, placed: &Placed) -> Result<u64, PassError> {
    let weight = m.ops[placed.op].result(0).expect("a dequantize has a result");
    let users: Vec<Use> = m.uses().of(weight).to_vec();
    let mut operands = None;
    let mut packed = 0;
    for user in users {
        let (op, refused) = match user {
            Use::Operand(op, i) => (op, refuse(m, op, i, placed)),
            Use::Result(..) => (placed.op, true),
        };
        if refused {
            continue;
        }
        let operands = match &operands {
            Some(operands) => operands,
            None => operands.insert(Operands::new(m, cx, q, placed)?),
        };
        replace(m, op, operands)?;
        packed += 1;
    }
    if let (Some(w), true) = (&operands, cx.settings.tied_shared) {
        let shared = tied::share(m, NAME, &w.packed(&placed.label), placed.op)?;
        if shared > 0 {
            cx.count(SHARED, shared);
        }
        let entry = cx.report.weights.iter_mut().find(|r| r.weight == placed.label);
        if let (Some(entry), true) = (entry, shared > 0) {
            entry.notes.push("also serves the embedding".into());
        }
    }
    if m.uses().of(weight).is_empty() {
        m.erase(placed.op);
    }
    if let (Some(operands), true) = (operands, packed > 0) {
        for w in cx.report.weights.iter_mut().filter(|w| w.weight == placed.label) {
            w.bytes_after = operands.bytes;
        }
    }
    Ok(packed)
}

/// Whether the use of a weight as operand `i` of `op` has no packed form.
fn refuse(m: &Module, op: Op, i: usize, placed: &Placed) -> bool {
    let data = &m.ops[op];
    let trans_b = data.attrs.int("transB").unwrap_or(0) != 0;
    let k_axis = match data.name.as_str() {
        "onnx.MatMul" => placed.shape.len().checked_sub(2),
        "onnx.Gemm" => Some(usize::from(trans_b)),
        _ => None,
    };
    let float = matches!(placed.elem, Elem::F32 | Elem::F16 | Elem::BF16);
    let x = data.operand(0).and_then(|v| m.ty(v).elem());
    // Where the activation's type is unknown it is the weight's: the op takes no two types.
    i != 1 || k_axis != Some(placed.axis) || !float || x.is_some_and(|x| x != placed.elem)
}

/// What every packed op of one weight shares.
struct Operands {
    b: Value,
    scales: Value,
    zero_points: Option<Value>,
    n: usize,
    k: usize,
    bits: u32,
    block: usize,
    /// `accuracy_level` of the ops.
    level: i64,
    /// Bytes of codes, scales and zero points.
    bytes: u64,
}

impl Operands {
    fn new(m: &mut Module, cx: &mut PassCx, q: &QTensor, placed: &Placed) -> Result<Operands, PassError> {
        let bits = container(q.bits);
        let block = q.block(NAME, &placed.label)?;
        let blocks = q.k.div_ceil(block);
        let b = blocked_codes(q, block)?;
        let per_block = |c: &ConstData| q.spread(read(c)?, block, c.elem.bits() / 8);
        let dims = vec![q.n as u64, blocks as u64];
        let mut scales = constant(q.scales.elem, dims.clone(), per_block(&q.scales)?);
        // Without zero points the kernel takes the middle of the container, which is the middle of the codes only
        // where they fill it.
        let needed = q.zero_points.is_some() || bits != q.bits;
        let zero_points = needed.then(|| q.spread(q.zero_point_bytes()?, block, 1)).transpose()?;
        let zero_points = zero_points.map(|z| {
            let row = (blocks * bits as usize).div_ceil(8);
            constant(Elem::U8, vec![q.n as u64, row as u64], pack_rows(&z, blocks, bits))
        });
        let region = m.ops[placed.op].region;
        let half = cx.settings.f16_scales && placed.elem == Elem::F32;
        let level = level(cx, placed.elem, half);
        warn_of_runtime(cx, bits, placed.elem, level);
        if half {
            scales = to_f16(&scales, &placed.label)?;
        }
        let bytes = [Some(&b), Some(&scales), zero_points.as_ref()]
            .into_iter()
            .flatten()
            .map(ConstData::byte_len)
            .sum();
        let name = |m: &Module, part: &str| m.fresh_name(&format!("{}.q{}.{part}", placed.label, q.bits));
        let b = m.add_const(region, name(m, "codes"), b);
        let scales = m.add_const(region, name(m, "scales"), scales);
        let zero_points = zero_points.map(|z| m.add_const(region, name(m, "zero_points"), z));
        let scales = match half {
            false => scales,
            true => {
                let ty = Type::of_shape(Elem::F32, &[q.n, blocks]);
                let loc = m.ops[placed.op].loc.clone();
                let to = i64::from(Elem::F32.onnx());
                let cast = OpBuilder::new("onnx.Cast", &loc).operands([scales]).attr("to", to).result(ty);
                let cast = m.insert_before(placed.op, cast);
                m.ops[cast].result(0).expect("a Cast has a result")
            }
        };
        Ok(Operands { b, scales, zero_points, n: q.n, k: q.k, bits, block, level, bytes })
    }
}

impl Operands {
    fn packed<'a>(&self, label: &'a str) -> tied::Packed<'a> {
        tied::Packed {
            label,
            codes: self.b,
            scales: self.scales,
            zero_points: self.zero_points,
            n: self.n,
            k: self.k,
            bits: self.bits,
            block: self.block,
        }
    }
}

/// Replaces one MatMul or Gemm.
fn replace(m: &mut Module, op: Op, w: &Operands) -> Result<(), PassError> {
    let mut gemm = Gemm::new(m, NAME, op, w.n)?;
    gemm.fuse(m, w.n);
    let packed = OpBuilder::new("com.microsoft.MatMulNBits", &gemm.data.loc)
        .operands([gemm.x, w.b, w.scales])
        .operands(match (w.zero_points, gemm.fused) {
            (None, None) => vec![],
            (z, None) => vec![z],
            (z, c) => vec![z, None, c],
        })
        .attr("K", w.k as i64)
        .attr("N", w.n as i64)
        .attr("bits", i64::from(w.bits))
        .attr("block_size", w.block as i64)
        .attr("accuracy_level", w.level);
    gemm.finish(m, NAME, packed)
}

/// Codes in blocks of `block` along K: `[N, blocks, block * bits / 8]`. The bytes themselves where they fit already.
fn blocked_codes(q: &QTensor, block: usize) -> Result<ConstData, PassError> {
    let bits = container(q.bits) as usize;
    let blocks = q.k.div_ceil(block);
    let (row, blob) = (q.groups() * q.blob(), block * bits / 8);
    let dims = vec![q.n as u64, blocks as u64, blob as u64];
    if row == blocks * blob {
        let c = ConstData::new(Elem::U8, dims, q.codes.source.clone());
        return c.map_err(|e| PassError::Env(e.to_string()));
    }
    // A group is a whole number of blocks, or the row: either way the codes run on without gaps, and only the
    // padding at the end of a row differs.
    let codes = read(&q.codes)?;
    let used = (q.k * bits).div_ceil(8);
    let mut out = vec![0u8; q.n * blocks * blob];
    for (to, from) in out.chunks_exact_mut(blocks * blob).zip(codes.chunks_exact(row)) {
        to[..used].copy_from_slice(&from[..used]);
    }
    Ok(constant(Elem::U8, dims, out))
}

/// Packs codes of one byte each, `per_row` to a row, low-first; every row starts a byte.
fn pack_rows(codes: &[u8], per_row: usize, bits: u32) -> Vec<u8> {
    if bits == 8 {
        return codes.to_vec();
    }
    let per_byte = (8 / bits) as usize;
    let row = per_row.div_ceil(per_byte);
    let mut out = vec![0u8; codes.len() / per_row.max(1) * row];
    out.par_chunks_mut(row.max(1)).zip(codes.par_chunks(per_row.max(1))).for_each(|(out, codes)| {
        for (byte, codes) in out.iter_mut().zip(codes.chunks(per_byte)) {
            *byte = codes.iter().rev().fold(0, |b, &x| b << bits | x);
        }
    });
    out
}

fn to_f16(scales: &ConstData, label: &str) -> Result<ConstData, PassError> {
    let bytes = read(scales)?;
    let values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    let halves: Vec<half::f16> = values.iter().map(|&x| half::f16::from_f32(x)).collect();
    if halves.iter().zip(&values).any(|(h, &x)| h.is_infinite() || (x != 0.0 && h.to_f32() == 0.0)) {
        let why = "a scale does not fit f16; write scales as f32".into();
        return Err(PassError::At { pass: NAME, what: label.into(), why });
    }
    Ok(constant(Elem::F16, scales.dims.clone(), bytemuck::cast_slice(&halves).to_vec()))
}

/// The `accuracy_level` for activations of type `elem`: int8 activations want scales that are f32 constants. With others
/// ONNX Runtime 1.31 takes the codes for ones packed with their scales, which they are not, and multiplies by rubbish
/// (found by running f16 models and scales behind a Cast at each of its levels of optimization).
fn level(cx: &mut PassCx, elem: Elem, cast: bool) -> i64 {
    let asked = cx.settings.accuracy_level;
    if asked != 4 || elem == Elem::F32 && !cast {
        return asked;
    }
    cx.report.note(
        "int8 activations (accuracy_level 4) need scales of f32: ONNX Runtime computes nonsense with others; the packed \
         ops compute with float activations (accuracy_level 0)",
    );
    0
}

fn warn_of_runtime(cx: &mut PassCx, bits: u32, elem: Elem, level: i64) {
    if bits == 2 && level != 4 {
        cx.report.warn(
            "2-bit MatMulNBits with float activations runs about 150x slower in ONNX Runtime than with int8 \
             activations; `--profile ort-cpu` asks for those",
        );
    }
    pack_qdq::warn_of_bf16(cx, elem);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_points_start_a_byte_in_every_row() {
        assert_eq!(pack_rows(&[1, 2, 3, 4, 5, 6], 3, 4), [0x21, 0x03, 0x54, 0x06]);
        assert_eq!(pack_rows(&[1, 2, 3, 1, 2], 5, 2), [0b01_11_10_01, 0b10]);
        assert_eq!(pack_rows(&[200, 7], 1, 8), [200, 7]);
    }

    /// A row-wide group of K = 20 in 4 bits: 10 bytes a row become two blocks of 8 bytes, the scale twice.
    #[test]
    fn a_row_wide_group_is_spread_over_blocks() {
        let codes: Vec<u8> = (0..20).collect();
        let q = QTensor {
            n: 2,
            k: 20,
            bits: 4,
            group_size: 20,
            codes: constant(Elem::U8, vec![2, 1, 10], codes),
            scales: constant(Elem::U8, vec![2, 1], vec![7, 9]),
            zero_points: None,
        };
        let b = read(&blocked_codes(&q, 16).unwrap()).unwrap();
        assert_eq!(&b[..16], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&b[16..26], &(10..20).collect::<Vec<u8>>()[..]);
        assert_eq!(q.spread(vec![7, 9].into(), 16, 1).unwrap()[..], [7, 7, 9, 9]);
    }
}
