//! Before fusion: ops that are written as others, which have kernels, or join those of others.

use dialects::ir::{Module, Op, OpBuilder, Value, ValueDef};
use dialects::tensor::Tensor;

/// Rewrites the top region of `m`. Values stay what they are, but for rounding.
pub fn simplify(m: &mut Module) {
    for op in m.regions[m.top].ops.clone() {
        if m.ops[op].is("onnx.BatchNormalization") {
            normalization(m, op);
        }
    }
}

/// BatchNormalization with constant statistics as a factor and a term for each channel.
fn normalization(m: &mut Module, op: Op) -> Option<()> {
    let data = m.ops[op].clone();
    let flag = |name: &str| data.attrs.int(name);
    let (x, rank) = (data.operand(0)?, m.ty(data.operand(0)?).dims()?.len());
    let inference = flag("training_mode").unwrap_or(0) == 0
        && data.results.iter().flatten().count() == 1
        && (m.opset("onnx") >= 7 || flag("is_test").unwrap_or(0) != 0)
        && rank >= 2;
    if !inference || flag("spatial") == Some(0) {
        return None;
    }
    let list = |i: usize| Tensor::floats(&m.consts[m.const_of(data.operand(i)?)?]).ok();
    let (scale, bias, mean, variance) = (list(1)?, list(2)?, list(3)?, list(4)?);
    if [&bias, &mean, &variance].iter().any(|v| v.len() != scale.len()) {
        return None;
    }
    let epsilon = f64::from(data.attrs.float("epsilon").unwrap_or(1e-5));
    let factor = |c: usize| f64::from(scale[c]) / (f64::from(variance[c]) + epsilon).sqrt();
    let channels = 0..scale.len();
    let factors: Vec<f32> = channels.clone().map(|c| factor(c) as f32).collect();
    let terms: Vec<f32> =
        channels.map(|c| (f64::from(bias[c]) - f64::from(mean[c]) * factor(c)) as f32).collect();
    let mut shape = vec![1; rank - 1];
    shape[0] = scale.len();
    let number = |m: &mut Module, v: Vec<f32>| {
        let t = Tensor::new(&shape, v).expect("a number for each channel");
        m.add_const(m.top, "", t.to_const())
    };
    let (factors, terms) = (number(m, factors), number(m, terms));
    let ty = m.ty(data.result(0)?).clone();
    let scaled =
        OpBuilder::new("onnx.Mul", &data.loc).node(data.node.clone()).operands([x, factors]).result(ty);
    let scaled = m.insert_before(op, scaled);
    let scaled = m.ops[scaled].result(0)?;
    let sum = OpBuilder::new("onnx.Add", &data.loc).node(data.node.clone()).operands([scaled, terms]);
    replace(m, op, sum);
    Some(())
}

/// Puts an op in the place of another one: its results are those of that one.
fn replace(m: &mut Module, old: Op, new: OpBuilder) {
    let new = m.insert_before(old, new);
    let results: Vec<Option<Value>> = std::mem::take(&mut m.ops[old].results);
    m.erase(old);
    for (i, v) in results.iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?))) {
        m.values[v].def = ValueDef::Result(new, i);
    }
    m.ops[new].results = results;
}
