//! ONNX Runtime's operators on codes, as the float ops that they stand for between DequantizeLinear and QuantizeLinear: what
//! these become is described in [`simplify`](crate::simplify).

use dialects::ir::{Attrs, Elem, Module, Op, OpBuilder, OpData, Type, Value};
use dialects::tensor::Tensor;

/// How the operands of an operator stand.
enum Form {
    /// Triples of codes, scale and zero point, of so many operands; then scale and zero point of the result.
    Triples(usize),
    /// Scale and zero point of the result; then triples.
    Result,
    /// A, B, C and the result of a Gemm.
    Gemm,
}

/// The float op of each operator.
const OPERATORS: &[(&str, &str, Form)] = &[
    ("com.microsoft.QGemm", "onnx.Gemm", Form::Gemm),
    ("com.microsoft.QLinearAdd", "onnx.Add", Form::Triples(2)),
    ("com.microsoft.QLinearAveragePool", "onnx.AveragePool", Form::Triples(1)),
    ("com.microsoft.QLinearConcat", "onnx.Concat", Form::Result),
    ("com.microsoft.QLinearGlobalAveragePool", "onnx.GlobalAveragePool", Form::Triples(1)),
    ("com.microsoft.QLinearLeakyRelu", "onnx.LeakyRelu", Form::Triples(1)),
    ("com.microsoft.QLinearMul", "onnx.Mul", Form::Triples(2)),
    ("com.microsoft.QLinearSigmoid", "onnx.Sigmoid", Form::Triples(1)),
];

/// Rewrites `op`, if it is such an operator on tensors with one scale and zero point each.
pub fn spell_out(m: &mut Module, op: Op) -> Option<()> {
    let data = m.ops[op].clone();
    let (_, name, form) = OPERATORS.iter().find(|o| data.is(o.0))?;
    if data.attrs.int("channels_last").unwrap_or(0) != 0 {
        return None;
    }
    let result = data.result(0)?;
    let float = |m: &Module, v: Value| Some(Type::tensor(Elem::F32, m.ty(v).dims()?.to_vec()));
    let ty = float(m, result)?;
    let (triples, end) = match form {
        Form::Triples(n) => ((0..*n).map(|i| 3 * i).collect(), Some(3 * n)),
        Form::Result => ((2..data.operands.len()).step_by(3).collect::<Vec<_>>(), Some(0)),
        Form::Gemm => (vec![0, 3], data.operand(7).map(|_| 7)),
    };
    let mut read = Vec::new();
    // The scales of a Gemm's B may be one for each column.
    let axis = i64::from(data.attrs.int("transB").unwrap_or(0) == 0);
    for &i in &triples {
        let (codes, scale) = (data.operand(i)?, data.operand(i + 1)?);
        read.push((float(m, codes)?, [Some(codes), Some(scale), data.operand(i + 2)]));
    }
    let mut attrs: Attrs = data.attrs.clone();
    attrs.remove("channels_last");
    let mut extra = Vec::new();
    if let Form::Gemm = form {
        if attrs.float("alpha").unwrap_or(1.0) != 1.0 {
            return None;
        }
        extra.extend(bias(m, &data)?);
    }
    let mut operands = Vec::new();
    for (ty, triple) in read {
        let b = OpBuilder::new("onnx.DequantizeLinear", &data.loc).operands(triple);
        operands.push(give(m, op, b.attr("axis", axis).result(ty))?);
    }
    operands.extend(extra);
    let b = OpBuilder::new(name, &data.loc).node(data.node.clone()).attrs(attrs).operands(operands);
    match end {
        None => super::replace(m, op, b),
        Some(at) => {
            let y = give(m, op, b.result(ty))?;
            let codes = m.ty(result).elem()?;
            let b = OpBuilder::new("onnx.QuantizeLinear", &data.loc);
            let b = b.operands([Some(y), data.operand(at), data.operand(at + 1)]);
            super::replace(m, op, b.attr("output_dtype", i64::from(codes.onnx())));
        }
    }
    Some(())
}

/// The result of an op in front of another one.
fn give(m: &mut Module, before: Op, b: OpBuilder) -> Option<Value> {
    let op = m.insert_before(before, b);
    m.ops[op].result(0)
}

/// The bias of a QGemm in floats: integers with the scale of its sums. `Some(None)` where there is none.
fn bias(m: &mut Module, data: &OpData) -> Option<Option<Value>> {
    let Some(c) = data.operand(6) else { return Some(None) };
    let list = |m: &Module, v: Value| Tensor::floats(&m.consts[m.const_of(v)?]).ok();
    let codes = Tensor::from_const(&m.consts[m.const_of(c)?]).ok()?;
    let (a, b) = (list(m, data.operand(1)?)?, list(m, data.operand(4)?)?);
    let n = codes.shape().last().copied().unwrap_or(1);
    let (&[a], true) = (&a[..], b.len() == 1 || b.len() == n) else { return None };
    let codes_of = codes.to_i64().ok()?;
    let scaled = codes_of.iter().enumerate().map(|(i, &c)| c as f32 * (a * b[i % b.len()]));
    let float = Tensor::new(codes.shape(), scaled.collect::<Vec<f32>>()).ok()?;
    Some(Some(m.add_const(m.top, "", float.to_const())))
}
