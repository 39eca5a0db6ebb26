//! `pack-operators`: products of integers as operators on codes, QLinearConv, QLinearAdd, MatMulInteger and their like, in the
//! place of QuantizeLinear and DequantizeLinear around float ops. What has no such operator stays as it is.
//!
//! Of ONNX itself: QLinearConv, QLinearMatMul, MatMulInteger and ConvInteger. The others are ONNX Runtime's (com.microsoft).
//! A product whose range is found as the model runs (`insert-fake-quant{dynamic=true}`) becomes MatMulInteger or ConvInteger,
//! Cast and Mul, which the runtime fuses again.

use crate::operators::{COMPUTES, Coded, MOVED, Target, coded, coded_activation, integer, move_codes};
use crate::operators::{operator, target};
use crate::pack_int4::import_domain;
use crate::pack_qdq::{pack_rest, transpose};
use crate::qtensor::{constant, read};
use crate::{Changed, Exactness, OpSet, Pass, PassCx, PassError};
use dialects::ir::{Elem, Module, Op, OpBuilder, OpData, Type, Uses, Value};
use dialects::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The pass; it has no options of its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PackOperators {}

const NAME: &str = "pack-operators";

impl Pass for PackOperators {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "writes products of integers as operators on codes (QLinearConv, MatMulInteger), for runtimes without QDQ"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["quant.dequantize", "onnx.QuantizeLinear", "onnx.DequantizeLinear"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["onnx.QLinearConv", "onnx.QLinearMatMul", "onnx.MatMulInteger", "onnx.ConvInteger"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        if cx.settings.profile == "tensorrt" {
            let why = "TensorRT takes QuantizeLinear and DequantizeLinear; pack with pack-qdq".into();
            return Err(PassError::Profile { pass: NAME, why });
        }
        let packed = pack_rest(m, cx, NAME)?;
        let mut made: BTreeMap<&str, u64> = BTreeMap::new();
        for op in m.regions[m.top].ops.clone() {
            // Each new op changes who reads what.
            let uses = m.uses();
            match operator(m, &uses, op) {
                None => {}
                Some(found) => match rewrite(m, &uses, op, found)? {
                    Ok(name) => *made.entry(name).or_default() += 1,
                    Err(why) => cx.left(m, op, why),
                },
            }
        }
        if made.is_empty() {
            if cx.may_find_nothing() {
                return Ok(if packed > 0 { Changed::Yes } else { Changed::No });
            }
            let why = "no product reads its activation in codes; put those in first, as in \
                       `rtn{bits=8, group=-1, symmetric=true, narrow=true},insert-fake-quant{dynamic=true},pack-operators`";
            return Err(PassError::Nothing { pass: NAME, why: why.into() });
        }
        import_domain(m);
        let made: Vec<String> = made.iter().map(|(name, n)| format!("{n} x {name}")).collect();
        cx.report.note(format!("operators on codes: {}", made.join(", ")));
        Ok(Changed::Yes)
    }
}

/// Puts an operator in the place of a float op, of which [`operator`] found what it can be. Returns its name, or why there
/// is none.
fn rewrite(
    m: &mut Module,
    uses: &Uses,
    op: Op,
    found: Result<&'static str, &'static str>,
) -> Result<Result<&'static str, &'static str>, PassError> {
    let data = m.ops[op].clone();
    let Some(x) = data.operand(0).and_then(|x| coded_activation(m, x)) else {
        return Ok(Err("its activation stays float"));
    };
    if found == Ok(MOVED) {
        move_codes(m, uses, op);
        return Ok(Ok("moved codes"));
    }
    if COMPUTES.iter().any(|(float, _)| *float == data.name.as_str()) {
        return Ok(found
            .map(|name| computed(m, uses, &data, op, name))
            .and_then(|done| done.ok_or("it has no target")));
    }
    let weight = data.operand(1).and_then(|w| coded(m, w));
    let Some(w) = weight else { return Ok(Err("its weight has blocks, for which there is no operator")) };
    let Some(w_zero) = weight_zero(m, &data, w)? else {
        return Ok(Err("the zero points of its weight differ"));
    };
    let constant_range = m.const_of(x.scale).is_some();
    let product = Product { data: &data, op, x, w, w_zero };
    match data.name.as_str() {
        "onnx.Conv" => match (target(m, uses, op).filter(|_| found.is_ok()), constant_range) {
            (Some(to), true) => Ok(Ok(product.convolution(m, to))),
            _ => product.integers(m, "onnx.ConvInteger"),
        },
        "onnx.MatMul" => match (target(m, uses, op), constant_range) {
            (Some(to), true) => Ok(Ok(product.matmul(m, to))),
            (None, true) => Ok(Ok(product.to_float(m))),
            (_, false) => product.integers(m, "onnx.MatMulInteger"),
        },
        // A Gemm of integers ends in floats, unless it is told how to end.
        _ => match found {
            Ok(_) if constant_range => Ok(Ok(product.gemm(m, target(m, uses, op)))),
            Err(why) if constant_range => Ok(Err(why)),
            _ => product.integers(m, "onnx.MatMulInteger"),
        },
    }
}

/// An op on codes of the same values as a sum, a pool or a Concat.
fn computed(m: &mut Module, uses: &Uses, data: &OpData, op: Op, name: &'static str) -> Option<&'static str> {
    let to = target(m, uses, op)?;
    let triple = |v: Value| coded_activation(m, v).map(|c| [Some(c.codes), Some(c.scale), c.zero]);
    let operands: Vec<[Option<Value>; 3]> =
        data.operands.iter().map(|v| v.and_then(triple)).collect::<Option<_>>()?;
    let end = [Some(to.scale), Some(to.zero)];
    let operands: Vec<Option<Value>> = match data.is("onnx.Concat") {
        true => end.into_iter().chain(operands.into_iter().flatten()).collect(),
        false => operands.into_iter().flatten().chain(end).collect(),
    };
    put(m, data, op, to.codes, OpBuilder::new(name, &data.loc).operands(operands).attrs(data.attrs.clone()));
    Some(name)
}

/// Puts `made` in front of `op`, for all that reads `old`.
fn put(m: &mut Module, data: &OpData, op: Op, old: Value, made: OpBuilder) {
    let ty = m.ty(old).clone();
    let made = m.insert_before(op, made.node(data.node.clone()).meta(data.meta.clone()).result(ty));
    let made = m.ops[made].result(0).expect("the op was built with a result");
    m.replace_uses(old, made);
}

/// The zero point of a weight: one for all of it, where that serves; its own where a product takes one for each output.
/// `None` where they differ and the op takes one alone.
fn weight_zero(m: &mut Module, data: &OpData, w: Coded) -> Result<Option<Value>, PassError> {
    let elem = m.ty(w.codes).elem().unwrap_or(Elem::I8);
    let (bytes, given) = match w.zero.and_then(|z| m.const_of(z)) {
        Some(c) => (read(&m.consts[c])?, w.zero),
        None => (vec![0u8].into(), None),
    };
    let same = bytes.windows(2).all(|b| b[0] == b[1]);
    if data.is("onnx.Conv") && !same {
        return Ok(None);
    }
    Ok(Some(match given.filter(|_| !data.is("onnx.Conv")) {
        Some(z) => z,
        None => {
            let name = m.fresh_name(&format!("{}.zero_point", data.loc));
            m.add_const(m.top, name, constant(elem, Vec::new(), bytes[..1].to_vec()))
        }
    }))
}

/// A product of codes with codes.
struct Product<'a> {
    data: &'a OpData,
    op: Op,
    x: Coded,
    w: Coded,
    w_zero: Value,
}

impl Product<'_> {
    /// Codes, scale and zero point of both.
    fn six(&self) -> [Option<Value>; 6] {
        let (x, w) = (self.x, self.w);
        [Some(x.codes), Some(x.scale), x.zero, Some(w.codes), Some(w.scale), Some(self.w_zero)]
    }

    fn result(&self) -> Value {
        self.data.result(0).expect("a product has a result")
    }

    /// The bias in 32-bit integers.
    fn bias(&self, m: &Module) -> Option<Value> {
        self.data.operand(2).and_then(|b| coded(m, b)).map(|b| b.codes)
    }

    fn convolution(&self, m: &mut Module, to: Target) -> &'static str {
        let operands =
            self.six().into_iter().chain([Some(to.scale), Some(to.zero)]).chain(self.bias(m).map(Some));
        let made = OpBuilder::new("onnx.QLinearConv", &self.data.loc).operands(operands.collect::<Vec<_>>());
        put(m, self.data, self.op, to.codes, made.attrs(self.data.attrs.clone()));
        "QLinearConv"
    }

    fn matmul(&self, m: &mut Module, to: Target) -> &'static str {
        let operands = self.six().into_iter().chain([Some(to.scale), Some(to.zero)]);
        let made =
            OpBuilder::new("onnx.QLinearMatMul", &self.data.loc).operands(operands.collect::<Vec<_>>());
        put(m, self.data, self.op, to.codes, made);
        "QLinearMatMul"
    }

    fn to_float(&self, m: &mut Module) -> &'static str {
        let [x, x_scale, x_zero, w, w_scale, w_zero] = self.six();
        let made = OpBuilder::new("com.microsoft.MatMulIntegerToFloat", &self.data.loc)
            .operands([x, w, x_scale, w_scale, x_zero, w_zero]);
        put(m, self.data, self.op, self.result(), made);
        "MatMulIntegerToFloat"
    }

    fn gemm(&self, m: &mut Module, to: Option<Target>) -> &'static str {
        let end = to.into_iter().flat_map(|to| [Some(to.scale), Some(to.zero)]);
        let operands = self.six().into_iter().chain([self.bias(m)]).chain(end);
        let made =
            OpBuilder::new("com.microsoft.QGemm", &self.data.loc).operands(operands.collect::<Vec<_>>());
        let made = made.attr("transB", self.data.attrs.int("transB").unwrap_or(0));
        put(m, self.data, self.op, to.map_or(self.result(), |to| to.codes), made);
        "QGemm"
    }

    /// A product of integers, and what makes floats of its sums: Cast, Mul, and Add of the bias as it was.
    fn integers(
        &self,
        m: &mut Module,
        name: &'static str,
    ) -> Result<Result<&'static str, &'static str>, PassError> {
        let (data, loc) = (self.data, &self.data.loc);
        let one = |name| data.attrs.float(name).unwrap_or(1.0) == 1.0;
        if !(one("alpha") && one("beta")) || data.attrs.int("transA").unwrap_or(0) != 0 {
            return Ok(Err("a Gemm with factors or transA"));
        }
        let ty = m.ty(self.result()).clone();
        let as_elem = |elem| match ty.dims() {
            Some(dims) => Type::tensor(elem, dims.iter().cloned()),
            None => Type::unranked(elem),
        };
        let convolution = data.is("onnx.Conv");
        let codes = match data.attrs.int("transB").unwrap_or(0) {
            0 => self.w.codes,
            _ => transposed(m, self.w.codes)?,
        };
        let scale = match convolution {
            true => per_channel(m, self.w.scale, &ty)?,
            false => self.w.scale,
        };
        let insert = |m: &mut Module, build: OpBuilder| {
            let made = m.insert_before(self.op, build);
            m.ops[made].result(0).expect("the op was built with a result")
        };
        // Without a zero point the weight's is zero; ConvInteger takes one alone.
        let zero = Some(self.w_zero).filter(|&z| !convolution || integer(m, z) != Some(0));
        let sum = OpBuilder::new(name, loc).node(data.node.clone());
        let sum = sum.operands([Some(self.x.codes), Some(codes), self.x.zero, zero]);
        let attrs = if convolution { data.attrs.clone() } else { Default::default() };
        let sum = insert(m, sum.attrs(attrs).result(as_elem(Elem::I32)));
        let cast = OpBuilder::new("onnx.Cast", loc).operands([sum]).attr("to", i64::from(Elem::F32.onnx()));
        let float = insert(m, cast.result(ty.clone()));
        let scale_ty = m.ty(scale).clone();
        let scales = OpBuilder::new("onnx.Mul", loc).operands([self.x.scale, scale]).result(scale_ty);
        let scales = insert(m, scales);
        let product = OpBuilder::new("onnx.Mul", loc).operands([float, scales]).result(ty.clone());
        let mut y = insert(m, product);
        if let Some(b) = data.operand(2) {
            let b = if convolution { broadcast_bias(m, b, &ty)? } else { b };
            y = insert(m, OpBuilder::new("onnx.Add", loc).operands([y, b]).result(ty));
        }
        m.replace_uses(self.result(), y);
        Ok(Ok(name.rsplit('.').next().unwrap_or(name)))
    }
}

/// A constant matrix of codes the other way round.
fn transposed(m: &mut Module, codes: Value) -> Result<Value, PassError> {
    let bug = || PassError::Env("a quantized weight is no matrix of codes".into());
    let c = m.const_of(codes).ok_or_else(bug)?;
    let (elem, dims) = (m.consts[c].elem, m.consts[c].dims.clone());
    let [rows, cols] = dims[..] else { return Err(bug()) };
    let bytes = transpose(&read(&m.consts[c])?, cols as usize, 1);
    let name = m.fresh_name(&format!("{}.transposed", m.value_label(codes)));
    Ok(m.add_const(m.top, name, constant(elem, vec![cols, rows], bytes)))
}

/// Dims that a vector with an entry for each channel of `ty` broadcasts with.
fn channel_dims(count: u64, ty: &Type) -> Vec<u64> {
    let rank = ty.dims().map_or(4, <[_]>::len);
    let mut dims = vec![1; rank];
    dims[1.min(rank - 1)] = count;
    dims
}

/// A constant vector of scales, one for each channel, so that it multiplies `ty`.
fn per_channel(m: &mut Module, scale: Value, ty: &Type) -> Result<Value, PassError> {
    let Some(c) = m.const_of(scale).map(|c| m.consts[c].clone()) else {
        return Err(PassError::Env("the scales of a quantized weight are no constant".into()));
    };
    let dims = channel_dims(c.count(), ty);
    let bytes = read(&c)?;
    let name = m.fresh_name(&m.value_label(scale));
    Ok(m.add_const(m.top, name, constant(c.elem, dims, bytes)))
}

/// The bias of a convolution, in floats, so that it adds to `ty`.
fn broadcast_bias(m: &mut Module, b: Value, ty: &Type) -> Result<Value, PassError> {
    let fail = |e: &dyn std::fmt::Display| PassError::Env(format!("the bias of a convolution: {e}"));
    let values = match (m.const_of(b), coded(m, b)) {
        (Some(c), _) => Tensor::floats(&m.consts[c]).map_err(|e| fail(&e))?,
        (None, Some(coded)) => {
            let get = |v: Value| m.const_of(v).ok_or_else(|| fail(&"is no constant"));
            let codes = Tensor::from_const(&m.consts[get(coded.codes)?]).map_err(|e| fail(&e))?;
            let scales = Tensor::floats(&m.consts[get(coded.scale)?]).map_err(|e| fail(&e))?;
            let codes = codes.to_i64().map_err(|e| fail(&e))?;
            codes.iter().zip(scales).map(|(&c, s)| c as f32 * s).collect()
        }
        _ => return Err(fail(&"is no constant")),
    };
    let dims: Vec<usize> = channel_dims(values.len() as u64, ty).iter().map(|&d| d as usize).collect();
    let float = Tensor::from_f32(Elem::F32, &dims, values).map_err(|e| fail(&e))?;
    let name = m.fresh_name(&m.value_label(b));
    Ok(m.add_const(m.top, name, float.to_const()))
}
