//! What a Gemm computes beside its product: `Y = alpha * op(A) * op(B) + beta * C`. Passes that replace the product by
//! a packed one put the rest around it as ops of their own.

use crate::PassError;
use crate::rewrite::{Patch, apply};
use dialects::ir::{Dim, Module, Op, OpBuilder, OpData, Type, Value};
use dialects::tensor::Tensor;

/// A MatMul or Gemm that is being replaced.
pub struct Gemm {
    /// The op as it was.
    pub data: OpData,
    /// The activation, `[.., K]`; transposed where the Gemm says so.
    pub x: Value,
    /// The bias as an operand of the product itself; see [`Gemm::fuse`].
    pub fused: Option<Value>,
    patch: Patch,
    ty: Type,
}

impl Gemm {
    /// Starts to replace `op`, whose weight is its operand 1 and has `n` outputs.
    pub fn new(m: &mut Module, pass: &'static str, op: Op, n: usize) -> Result<Gemm, PassError> {
        let data = m.ops[op].clone();
        let patch = Patch::new(op);
        let bug =
            || PassError::At { pass, what: data.loc.to_string(), why: "a product without operands".into() };
        let y = data.result(0).ok_or_else(bug)?;
        let mut x = data.operand(0).ok_or_else(bug)?;
        if data.attrs.int("transA").unwrap_or(0) != 0 {
            let transposed = match m.ty(x).as_tensor() {
                Some(t) if t.dims.is_some() => {
                    let dims = t.dims.iter().flatten().rev().cloned();
                    Type::tensor(t.elem, dims)
                }
                _ => m.ty(x).clone(),
            };
            let transpose = OpBuilder::new("onnx.Transpose", &data.loc).operands([x]);
            x = patch.op(m, transpose.attr("perm", vec![1, 0]).result(transposed));
        }
        // The type of the product, from the activation where the file knew no better.
        let known = m.ty(y).clone();
        let dims = m.ty(x).dims().map(|d| {
            let mut d = d.to_vec();
            if let Some(last) = d.last_mut() {
                *last = Dim::from(n);
            }
            d
        });
        let found = match (m.ty(x).elem(), dims) {
            (Some(elem), Some(dims)) => Type::tensor(elem, dims),
            (Some(elem), None) => Type::unranked(elem),
            _ => Type::Unknown,
        };
        let ty = known.unify(&found).unwrap_or(known);
        Ok(Gemm { data, x, fused: None, patch, ty })
    }

    fn factor(&self, name: &str) -> f32 {
        self.data.attrs.float(name).unwrap_or(1.0)
    }

    /// Takes a constant bias of one entry per output into the product, where nothing stands between.
    pub fn fuse(&mut self, m: &Module, n: usize) {
        let plain = self.data.is("onnx.Gemm") && self.factor("alpha") == 1.0 && self.factor("beta") == 1.0;
        let bias = self.data.operand(2).filter(|_| plain);
        let elem = m.ty(self.x).elem();
        let fits = |c: &Value| {
            m.const_of(*c).is_some() && elem.is_some_and(|e| m.ty(*c) == &Type::of_shape(e, &[n]))
        };
        self.fused = bias.filter(fits);
    }

    /// Puts `product`, an op without a result yet, and what stands around it in the place of the op.
    pub fn finish(self, m: &mut Module, pass: &'static str, product: OpBuilder) -> Result<(), PassError> {
        let (alpha, beta) = (self.factor("alpha"), self.factor("beta"));
        let Gemm { data, patch, ty, fused, .. } = self;
        let y = data.result(0).expect("it was there when the replacement began");
        let product = product.node(data.node.clone()).meta(data.meta.clone()).result(ty.clone());
        let mut out = patch.op(m, product);
        if data.is("onnx.Gemm") {
            if alpha != 1.0 {
                out = scaled(m, pass, &patch, &data, out, alpha)?;
            }
            if let Some(mut c) = data.operand(2).filter(|_| fused.is_none() && beta != 0.0) {
                if beta != 1.0 {
                    c = scaled(m, pass, &patch, &data, c, beta)?;
                }
                out = patch.op(m, OpBuilder::new("onnx.Add", &data.loc).operands([out, c]).result(ty));
            }
        }
        let name = m.values[y].name.clone();
        apply(m, pass, patch.replace(y, out))?;
        // The value keeps its name, so that a graph before and after can be compared by names.
        if m.values[out].name.is_empty() {
            m.values[y].name = "".into();
            m.values[out].name = name;
        }
        Ok(())
    }
}

fn scaled(
    m: &mut Module,
    pass: &'static str,
    patch: &Patch,
    data: &OpData,
    v: Value,
    by: f32,
) -> Result<Value, PassError> {
    let fail = |why: String| PassError::At { pass, what: data.loc.to_string(), why };
    let ty = m.ty(v).clone();
    let elem = ty.elem().ok_or_else(|| fail("the type of the product is unknown".into()))?;
    let by = Tensor::from_f32(elem, &[], vec![by]).map_err(|e| fail(e.to_string()))?;
    let by = m.add_const(data.region, m.fresh_name(&format!("{}.factor", data.loc)), by.to_const());
    Ok(patch.op(m, OpBuilder::new("onnx.Mul", &data.loc).operands([v, by]).result(ty)))
}
