//! One quantized blob for an embedding and the head that shares its weight (`--tied shared`).
//!
//! `com.microsoft.GatherBlockQuantized` reads rows of packed codes `[V, K * bits / 8]`, and MatMulNBits reads the same
//! bytes as `[V, blocks, blob]` through a Reshape that the runtime folds.

use crate::PassError;
use crate::qtensor::constant;
use crate::rewrite::{Patch, apply};
use dialects::ir::{ConstData, Elem, Module, Op, OpBuilder, Type, Use, Value};

/// A packed weight of `[n, k]`, as MatMulNBits reads it.
pub struct Packed<'a> {
    /// The weight's name while it was float.
    pub label: &'a str,
    /// Codes, `[n, k / block, blob]`.
    pub codes: Value,
    /// Scales, `[n, k / block]`, a constant or a Cast of one.
    pub scales: Value,
    /// Zero points, packed per row.
    pub zero_points: Option<Value>,
    /// Outputs, and rows of the embedding.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Bits of a code's container.
    pub bits: u32,
    /// Weights in a block.
    pub block: usize,
}

/// Makes every Gather of rows from the float weight read the packed one, whose readers stand after `at`. Returns how
/// many there were.
pub fn share(m: &mut Module, pass: &'static str, w: &Packed, at: Op) -> Result<u64, PassError> {
    if !w.k.is_multiple_of(w.block) {
        return Ok(0);
    }
    let float = [w.n, w.k].map(|d| d as u64);
    let table = |v: &Value| {
        let named = &*m.values[*v].name == w.label;
        named && m.const_of(*v).is_some_and(|c| m.consts[c].dims == float)
    };
    let Some(table) = m.values.keys().find(table) else { return Ok(0) };
    let gather = |u: &Use| match *u {
        Use::Operand(op, 0) if m.ops[op].is("onnx.Gather") => {
            (m.ops[op].attrs.int("axis").unwrap_or(0) == 0).then_some(op)
        }
        _ => None,
    };
    let gathers: Vec<Op> = m.uses().of(table).iter().filter_map(gather).collect();
    if gathers.is_empty() {
        return Ok(0);
    }
    let rows = rows(m, w, at)?;
    for &op in &gathers {
        let data = m.ops[op].clone();
        let y = data.result(0).expect("a Gather has a result");
        let patch = Patch::new(op);
        let scales = scales(m, &patch, w, op);
        let ids = data.operand(1);
        let packed = OpBuilder::new("com.microsoft.GatherBlockQuantized", &data.loc)
            .node(data.node.clone())
            .operands([Some(rows), ids, Some(scales)])
            .operands(w.zero_points)
            .attr("bits", i64::from(w.bits))
            .attr("block_size", w.block as i64)
            .attr("gather_axis", 0)
            .attr("quantize_axis", 1)
            .meta(data.meta.clone())
            .result(m.ty(y).clone());
        let out = patch.op(m, packed);
        let name = m.values[y].name.clone();
        apply(m, pass, patch.replace(y, out))?;
        if m.values[out].name.is_empty() {
            m.values[y].name = "".into();
            m.values[out].name = name;
        }
    }
    Ok(gathers.len() as u64)
}

/// The codes as rows; MatMulNBits reads them through a Reshape from here on.
fn rows(m: &mut Module, w: &Packed, at: Op) -> Result<Value, PassError> {
    let id = m.const_of(w.codes).expect("packed codes are a constant");
    let (dims, source) = (m.consts[id].dims.clone(), m.consts[id].source.clone());
    let flat = ConstData::new(Elem::U8, vec![dims[0], dims[1] * dims[2]], source);
    let flat = flat.map_err(|e| PassError::Env(e.to_string()))?;
    let (region, loc) = (m.ops[at].region, m.ops[at].loc.clone());
    let rows = m.add_const(region, m.fresh_name(&format!("{}.q{}", w.label, w.bits)), flat);
    let shape: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
    let shape = constant(Elem::I64, vec![3], bytemuck::cast_slice(&shape).to_vec());
    let shape = m.add_const(region, m.fresh_name(&format!("{}.q{}.shape", w.label, w.bits)), shape);
    let ty: Vec<usize> = dims.iter().map(|&d| d as usize).collect();
    let reshape =
        OpBuilder::new("onnx.Reshape", &loc).operands([rows, shape]).result(Type::of_shape(Elem::U8, &ty));
    let reshape = m.insert_before(at, reshape);
    let blocks = m.ops[reshape].result(0).expect("a Reshape has a result");
    m.replace_uses(w.codes, blocks);
    m.regions[region].consts.retain(|&v| v != w.codes);
    Ok(rows)
}

/// The scales, available before `op`: a Cast that stands later is made again.
fn scales(m: &mut Module, patch: &Patch, w: &Packed, op: Op) -> Value {
    let Some((cast, _)) = m.def_op(w.scales) else { return w.scales };
    let data = m.ops[cast].clone();
    let loc = m.ops[op].loc.clone();
    let again = OpBuilder::named(data.name, &loc).operands(data.operands).attrs(data.attrs);
    let ty = m.ty(w.scales).clone();
    patch.op(m, again.result(ty))
}
