//! `--pass int8-embedding`: every embedding that a Gather reads becomes int8 rows with one scale each.

use dialects::ir::{Elem, Module, Op, OpBuilder, TensorType, Type};
use dialects::tensor::Tensor;
use passes::rewrite::{Patch, each_op};
use passes::{Changed, Exactness, Filter, Pass, PassCx, PassError};

/// The pass; its fields are its options.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Int8Embedding {
    #[serde(flatten)]
    filter: Filter,
}

impl Pass for Int8Embedding {
    fn name(&self) -> &'static str {
        "int8-embedding"
    }

    fn summary(&self) -> &'static str {
        "stores the embeddings that Gather reads as int8 rows with one scale each"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let done = each_op(m, self.name(), |m, op| self.embedding(m, op))?;
        cx.count("embeddings", done);
        Ok(if done > 0 { Changed::Yes } else { Changed::No })
    }
}

impl Int8Embedding {
    fn embedding(&self, m: &mut Module, op: Op) -> Result<Option<Patch>, PassError> {
        let gather = m.ops[op].clone();
        let (Some(table), Some(ids), Some(y)) = (gather.operand(0), gather.operand(1), gather.result(0))
        else {
            return Ok(None);
        };
        let (Some(id), Some(dims)) = (m.const_of(table), m.ty(y).dims().map(<[_]>::to_vec)) else {
            return Ok(None);
        };
        let rows = &m.consts[id];
        let fits = gather.is("onnx.Gather") && rows.elem == Elem::F32 && rows.dims.len() == 2;
        let (label, axis) = (m.value_label(table), gather.attrs.int("axis").unwrap_or(0));
        if !fits || axis != 0 || self.filter.refuses(&[&gather.loc, &label], &gather.name).is_some() {
            return Ok(None);
        }
        let fail = |why: String| PassError::At { pass: self.name(), what: label.clone(), why };
        let rows = Tensor::from_const(rows).map_err(|e| fail(e.to_string()))?;
        let (v, d) = (rows.shape()[0], rows.shape()[1]);
        let values = rows.f32s().map_err(|e| fail(e.to_string()))?;
        let scales: Vec<f32> =
            values.chunks(d.max(1)).map(|r| r.iter().fold(0f32, |a, x| a.max(x.abs())) / 127.0).collect();
        let code =
            |(i, x): (usize, &f32)| if scales[i / d] > 0.0 { (x / scales[i / d]).round() as i8 } else { 0 };
        let codes: Vec<i8> = values.iter().enumerate().map(code).collect();
        let tensor = |t: Result<Tensor, _>| t.expect("one code per element, one scale per row").to_const();
        let (codes, scales) = (tensor(Tensor::new(&[v, d], codes)), tensor(Tensor::new(&[v, 1], scales)));
        let codes = m.add_const(gather.region, m.fresh_name(&format!("{label}.int8")), codes);
        let scales = m.add_const(gather.region, m.fresh_name(&format!("{label}.scale")), scales);

        let ty = |elem, dims: &[_]| Type::Tensor(TensorType { elem, dims: Some(dims.to_vec()) });
        let per_row = [&dims[..dims.len() - 1], &[1usize.into()]].concat();
        let new = |name: &str| OpBuilder::new(name, &gather.loc);
        let p = Patch::new(op);
        let q = p.op(m, new("onnx.Gather").operands([codes, ids]).result(ty(Elem::I8, &dims)));
        let q = p.op(m, new("onnx.Cast").operands([q]).attr("to", 1).result(ty(Elem::F32, &dims)));
        let s = p.op(m, new("onnx.Gather").operands([scales, ids]).result(ty(Elem::F32, &per_row)));
        let x = p.op(m, new("onnx.Mul").operands([q, s]).result(ty(Elem::F32, &dims)));
        Ok(Some(p.replace(y, x)))
    }
}
