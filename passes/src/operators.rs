//! Operators on codes: what an op between DequantizeLinear and QuantizeLinear is to a runtime that computes with integers.
//!
//! ONNX Runtime reads such a graph, and puts QLinearConv, QLinearAdd and their like in the place of float ops; `pack-operators`
//! writes them itself. Both ask here which ops can become what.

use crate::calibrate::weight;
use dialects::ir::{Elem, Module, Op, OpBuilder, Use, Uses, Value};
use dialects::tensor::Tensor;

/// A tensor that is read through DequantizeLinear: by its codes, one scale and one zero point, or those of its rows.
#[derive(Clone, Copy, Debug)]
pub struct Coded {
    /// The codes.
    pub codes: Value,
    /// The scale.
    pub scale: Value,
    /// The zero point; without one it is zero.
    pub zero: Option<Value>,
}

/// Where a result is quantized.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Scale and zero point.
    pub scale: Value,
    /// The zero point.
    pub zero: Value,
    /// The codes.
    pub codes: Value,
}

/// Ops whose integers are those that they read, moved; the runtime has them for codes.
pub const MOVES: &[&str] = &[
    "onnx.MaxPool",
    "onnx.Reshape",
    "onnx.Flatten",
    "onnx.Transpose",
    "onnx.Squeeze",
    "onnx.Unsqueeze",
    "onnx.Identity",
    "onnx.Slice",
    "onnx.Pad",
    "onnx.DepthToSpace",
];

/// What [`operator`] says of them.
pub const MOVED: &str = "codes";

/// Ops that compute new values from integers, and what they are called on codes.
pub const COMPUTES: &[(&str, &str)] = &[
    ("onnx.Add", "com.microsoft.QLinearAdd"),
    ("onnx.Mul", "com.microsoft.QLinearMul"),
    ("onnx.AveragePool", "com.microsoft.QLinearAveragePool"),
    ("onnx.GlobalAveragePool", "com.microsoft.QLinearGlobalAveragePool"),
    ("onnx.Concat", "com.microsoft.QLinearConcat"),
];

/// The tensor that `v` is dequantized from. Blocks have no operator.
pub fn coded(m: &Module, v: Value) -> Option<Coded> {
    let (op, _) = m.def_op(v)?;
    let data = &m.ops[op];
    let blocks = data.attrs.int("block_size").unwrap_or(0) != 0;
    if !data.is("onnx.DequantizeLinear") || blocks {
        return None;
    }
    Some(Coded { codes: data.operand(0)?, scale: data.operand(1)?, zero: data.operand(2) })
}

/// The same of an activation: 8-bit codes with one scale and one zero point.
pub fn coded_activation(m: &Module, v: Value) -> Option<Coded> {
    let found = coded(m, v)?;
    let one = |v: Value| m.ty(v).as_tensor().and_then(|t| t.known_shape()).is_some_and(|s| s.is_empty());
    let bytes = matches!(m.ty(found.codes).elem(), Some(Elem::I8 | Elem::U8));
    let float = m.ty(found.scale).elem() == Some(Elem::F32);
    (bytes && float && one(found.scale) && found.zero.is_some_and(one)).then_some(found)
}

/// Whether `v` is a weight in codes: one that is packed as DequantizeLinear, or is still to be.
pub fn coded_weight(m: &Module, v: Value) -> bool {
    coded(m, v).is_some_and(|c| m.const_of(c.codes).is_some()) || weight(m, v).is_some()
}

/// Where the only thing that becomes of an op's result is codes; a Relu or Clip in between is left out where those end at
/// the same values.
pub fn target(m: &Module, uses: &Uses, op: Op) -> Option<Target> {
    let only = |v: Value| match uses.of(v) {
        [Use::Operand(op, 0)] => Some(*op),
        _ => None,
    };
    let mut next = only(m.ops[op].result(0)?)?;
    let bounds = bounds(m, next);
    if bounds.is_some() {
        next = only(m.ops[next].result(0)?)?;
    }
    let data = &m.ops[next];
    if !data.is("onnx.QuantizeLinear") {
        return None;
    }
    let (scale, zero, codes) = (data.operand(1)?, data.operand(2)?, data.result(0)?);
    let (low, high) = match m.ty(codes).elem()? {
        Elem::U8 => (0, 255),
        Elem::I8 => (-128, 127),
        _ => return None,
    };
    if let Some((least, most)) = bounds {
        let (scale, zero) = (scalar(m, scale)?, integer(m, zero)?);
        let code = |x: f32| f64::from((x / scale).round_ties_even()) + zero as f64;
        if code(least) > f64::from(low) || code(most) < f64::from(high) {
            return None;
        }
    }
    Some(Target { scale, zero, codes })
}

/// What an activation function clips to, where it does nothing else.
fn bounds(m: &Module, op: Op) -> Option<(f32, f32)> {
    let data = &m.ops[op];
    let end = |i: usize, none: f32| match data.operand(i) {
        Some(v) => scalar(m, v),
        None => Some(none),
    };
    match data.name.as_str() {
        "onnx.Relu" => Some((0.0, f32::INFINITY)),
        "onnx.Clip" => Some((end(1, f32::NEG_INFINITY)?, end(2, f32::INFINITY)?)),
        _ => None,
    }
}

/// The one element of a float constant.
pub fn scalar(m: &Module, v: Value) -> Option<f32> {
    match Tensor::floats(&m.consts[m.const_of(v)?]).ok()?[..] {
        [x] => Some(x),
        _ => None,
    }
}

/// The one element of an integer constant.
pub fn integer(m: &Module, v: Value) -> Option<i64> {
    let t = Tensor::from_const(&m.consts[m.const_of(v)?]).ok()?;
    match t.to_i64().ok()?[..] {
        [x] => Some(x),
        _ => None,
    }
}

/// What the runtime makes of an op that reads an activation in codes, or why it does not; `None` of an op that reads none.
pub fn operator(m: &Module, uses: &Uses, op: Op) -> Option<Result<&'static str, &'static str>> {
    let data = &m.ops[op];
    let held = |i: usize| data.operand(i).is_some_and(|v| coded_activation(m, v).is_some());
    let weight = || data.operand(1).is_some_and(|w| coded_weight(m, w));
    let float = "what it gives stays float";
    Some(match data.name.as_str() {
        "onnx.Conv" if held(0) && weight() => match (target(m, uses, op), bias(m, op)) {
            (None, _) => Err(float),
            (_, false) => Err("its bias is no constant"),
            _ => Ok("onnx.QLinearConv"),
        },
        "onnx.MatMul" if held(0) && weight() => match target(m, uses, op) {
            Some(_) => Ok("onnx.QLinearMatMul"),
            None => Ok("com.microsoft.MatMulIntegerToFloat"),
        },
        "onnx.Gemm" if held(0) && weight() => {
            let one = |name| data.attrs.float(name).unwrap_or(1.0) == 1.0;
            let plain = one("alpha") && one("beta") && data.attrs.int("transA").unwrap_or(0) == 0;
            let clipped = data.result(0).and_then(|y| match uses.of(y) {
                [Use::Operand(next, 0)] => bounds(m, *next),
                _ => None,
            });
            match plain && bias(m, op) {
                true if clipped.is_some() && target(m, uses, op).is_none() => {
                    Err("it is made one op of floats with what clips its result")
                }
                true => Ok("com.microsoft.QGemm"),
                false => Err("a Gemm with factors, transA, or a bias that is no constant"),
            }
        }
        name if MOVES.contains(&name) && held(0) => match moved(m, uses, op) {
            true => Ok(MOVED),
            false => Err("its codes do not mean the same in front of it and behind"),
        },
        name => {
            let (_, on_codes) = COMPUTES.iter().find(|(float, _)| *float == name)?;
            if !(0..data.operands.len()).any(held) {
                return None;
            }
            match ((0..data.operands.len()).all(held), target(m, uses, op)) {
                (false, _) => Err("one of its operands stays float"),
                (_, None) => Err(float),
                _ => Ok(*on_codes),
            }
        }
    })
}

/// Whether there is no bias, or one in integers.
fn bias(m: &Module, op: Op) -> bool {
    m.ops[op].operand(2).is_none_or(|b| coded(m, b).is_some_and(|b| m.ty(b.codes).elem() == Some(Elem::I32)))
}

/// Whether the codes in front of an op that moves values are codes of the same values behind it.
fn moved(m: &Module, uses: &Uses, op: Op) -> bool {
    let data = &m.ops[op];
    let Some(from) = data.operand(0).and_then(|x| coded_activation(m, x)) else { return false };
    let Some(to) = target(m, uses, op) else { return false };
    let same = |a: Value, b: Value| a == b || scalar(m, a).is_some_and(|s| scalar(m, b) == Some(s));
    let zero = |z| z == to.zero || integer(m, z).is_some_and(|z| integer(m, to.zero) == Some(z));
    let zero = from.zero.is_some_and(zero);
    // What a Pad fills with must be a value whose code is known.
    let filled = !data.is("onnx.Pad") || data.operand(2).is_none_or(|v| scalar(m, v) == Some(0.0));
    // A Relu behind it would be left out.
    let direct = data.result(0).is_some_and(|y| match uses.of(y) {
        [Use::Operand(next, 0)] => m.ops[*next].is("onnx.QuantizeLinear"),
        _ => false,
    });
    same(from.scale, to.scale) && zero && filled && direct
}

/// Has an op that moves values ([`MOVED`]) move codes instead, in front of the QuantizeLinear that is dead then.
pub fn move_codes(m: &mut Module, uses: &Uses, op: Op) {
    let found = m.ops[op].operand(0).and_then(|x| coded_activation(m, x)).zip(target(m, uses, op));
    let Some((from, to)) = found else { return };
    let data = m.ops[op].clone();
    let mut operands = data.operands.clone();
    operands[0] = Some(from.codes);
    let fills = data.is("onnx.Pad") && data.attrs.str("mode").unwrap_or("constant") == "constant";
    if fills {
        operands.resize(operands.len().max(3), None);
        operands[2] = from.zero;
    }
    let ty = m.ty(to.codes).clone();
    let moved = OpBuilder::named(data.name.clone(), &data.loc).operands(operands).attrs(data.attrs.clone());
    let moved = m.insert_before(op, moved.node(data.node.clone()).result(ty));
    let moved = m.ops[moved].result(0).expect("the op was built with a result");
    m.replace_uses(to.codes, moved);
}

/// Has every Pad of an island fill codes: the runtime has no form of its own for one between the two ops.
pub fn pads(m: &mut Module) {
    let uses = m.uses();
    for op in m.regions[m.top].ops.clone() {
        if m.ops[op].is("onnx.Pad") && operator(m, &uses, op) == Some(Ok(MOVED)) {
            move_codes(m, &uses, op);
        }
    }
}
