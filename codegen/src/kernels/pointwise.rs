//! Elementwise ops on values of any number of lanes.
//!
//! [`emit`] is the one list of what is compiled; whether an op is in it is found by emitting it.

use super::math;
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar};
use dialects::ir::{Elem, Module, Op, OpData};

/// The type of an element in a register. Bools are one bit there and a byte in memory.
pub fn register(elem: Elem) -> Option<Scalar> {
    Some(match elem {
        Elem::F32 => Scalar::F32,
        Elem::I64 => Scalar::I64,
        Elem::I32 => Scalar::I32,
        Elem::Bool => Scalar::I1,
        _ => return None,
    })
}

/// Reads elements into registers.
pub fn load(b: &mut Body, ptr: Val, ty: Ty) -> Val {
    match ty.elem {
        Scalar::I1 => {
            let bytes = b.load(ptr, ty.of(Scalar::I8));
            let zero = b.splat(bytes.ty, 0.0);
            b.cmp(Cmp::Ne, bytes, zero)
        }
        _ => b.load(ptr, ty),
    }
}

/// Reads the first `there` lanes.
pub fn load_some(b: &mut Body, ptr: Val, ty: Ty, there: usize) -> Val {
    match ty.elem {
        Scalar::I1 => {
            let bytes = b.load_some(ptr, ty.of(Scalar::I8), there);
            let zero = b.splat(bytes.ty, 0.0);
            b.cmp(Cmp::Ne, bytes, zero)
        }
        _ => b.load_some(ptr, ty, there),
    }
}

/// Writes elements from registers.
pub fn store(b: &mut Body, v: Val, ptr: Val) {
    let v = in_memory(b, v);
    b.store(v, ptr);
}

/// Writes the first `there` lanes.
pub fn store_some(b: &mut Body, v: Val, ptr: Val, there: usize) {
    let v = in_memory(b, v);
    b.store_some(v, ptr, there);
}

fn in_memory(b: &mut Body, v: Val) -> Val {
    match v.ty.elem {
        Scalar::I1 => b.widen_unsigned(v, Scalar::I8),
        _ => v,
    }
}

/// Whether [`emit`] knows `op` of `m`.
pub fn supports(m: &Module, target: &Target, op: Op) -> bool {
    let data = &m.ops[op];
    let [Some(result)] = data.results[..] else { return false };
    let elem = |v| m.ty(v).elem().and_then(register);
    let Some(out) = elem(result) else { return false };
    let inputs: Option<Vec<Scalar>> = data.operands.iter().flatten().map(|&v| elem(v)).collect();
    let Some(inputs) = inputs.filter(|i| !i.is_empty() && data.operands.len() == i.len()) else {
        return false;
    };
    let params: Vec<Ty> = inputs.into_iter().map(scalar).collect();
    let mut known = false;
    Body::function(target, "probe", &params, |b, p| {
        known = emit(b, data, p, out).is_some_and(|v| v.ty == scalar(out));
    });
    known
}

/// One op; its result has elements `out`. `None` where it is not known.
pub fn emit(b: &mut Body, op: &OpData, x: &[Val], out: Scalar) -> Option<Val> {
    let first = *x.first()?;
    let float = first.ty.elem == Scalar::F32;
    let arithmetic = matches!(first.ty.elem, Scalar::F32 | Scalar::I64 | Scalar::I32);
    let bools = first.ty.elem == Scalar::I1;
    let cmp = |b: &mut Body, how| (x.len() == 2 && !bools).then(|| b.cmp(how, x[0], x[1]));
    let name = op.name.as_str().strip_prefix("onnx.").unwrap_or(op.name.as_str());
    Some(match (name, x.len()) {
        ("Identity", 1) => first,
        ("Cast", 1) => return cast(b, first, out),
        ("Add", 2) if arithmetic => b.add(x[0], x[1]),
        ("Sub", 2) if arithmetic => b.sub(x[0], x[1]),
        ("Mul", 2) if arithmetic => b.mul(x[0], x[1]),
        ("Div", 2) if float => b.div(x[0], x[1]),
        ("Max", 2) if arithmetic => b.max(x[0], x[1]),
        ("Min", 2) if arithmetic => b.min(x[0], x[1]),
        ("Sum", 2) if float => b.add(x[0], x[1]),
        ("Neg", 1) if float => b.unary("arith.negf", first),
        ("Abs", 1) if float => b.unary("math.absf", first),
        ("Sqrt", 1) if float => b.unary("math.sqrt", first),
        ("Reciprocal", 1) if float => {
            let one = b.splat(first.ty, 1.0);
            b.div(one, first)
        }
        ("Exp", 1) if float => math::exp(b, first),
        ("Tanh", 1) if float => math::tanh(b, first),
        ("Sigmoid", 1) if float => math::sigmoid(b, first),
        ("Erf", 1) if float => math::erf(b, first),
        ("Relu", 1) if float => {
            let zero = b.splat(first.ty, 0.0);
            b.max(first, zero)
        }
        ("Swish", 1) if float && op.attrs.float("alpha").unwrap_or(1.0) == 1.0 => {
            let s = math::sigmoid(b, first);
            b.mul(first, s)
        }
        ("com.microsoft.QuickGelu", 1) if float => {
            let alpha = b.splat(first.ty, f64::from(op.attrs.float("alpha").unwrap_or(1.702)));
            let scaled = b.mul(first, alpha);
            let s = math::sigmoid(b, scaled);
            b.mul(first, s)
        }
        ("Gelu", 1) if float => gelu(b, first, op.attrs.str("approximate").unwrap_or("none"))?,
        ("com.microsoft.Gelu", 1) if float => gelu(b, first, "none")?,
        ("com.microsoft.FastGelu", 1) if float => gelu(b, first, "tanh")?,
        ("Where", 3) if bools => b.select(x[0], x[1], x[2]),
        ("Equal", 2) => return cmp(b, Cmp::Eq),
        ("Less", 2) => return cmp(b, Cmp::Lt),
        ("LessOrEqual", 2) => return cmp(b, Cmp::Le),
        ("Greater", 2) => return cmp(b, Cmp::Gt),
        ("GreaterOrEqual", 2) => return cmp(b, Cmp::Ge),
        ("And", 2) if bools => b.and(x[0], x[1]),
        ("Or", 2) if bools => b.or(x[0], x[1]),
        ("Xor", 2) if bools => b.xor(x[0], x[1]),
        ("Not", 1) if bools => {
            let all = b.flag(first.ty, true);
            b.xor(first, all)
        }
        _ => return None,
    })
}

fn cast(b: &mut Body, x: Val, out: Scalar) -> Option<Val> {
    Some(match (x.ty.elem, out) {
        (from, to) if from == to => x,
        (Scalar::I1, Scalar::F32) => {
            let bits = b.widen_unsigned(x, Scalar::I32);
            b.cast(bits, Scalar::F32)
        }
        (Scalar::I1, to) => b.widen_unsigned(x, to),
        (_, Scalar::I1) => {
            let zero = b.splat(x.ty, 0.0);
            b.cmp(Cmp::Ne, x, zero)
        }
        // What a float beyond the integers becomes is the interpreter's affair.
        (Scalar::F32, _) => return None,
        (_, to) => b.cast(x, to),
    })
}

/// x (1 + erf(x / sqrt 2)) / 2, or with tanh.
fn gelu(b: &mut Body, x: Val, how: &str) -> Option<Val> {
    let (half, one) = (b.splat(x.ty, 0.5), b.splat(x.ty, 1.0));
    let inner = match how {
        "none" => {
            let root = b.splat(x.ty, std::f64::consts::FRAC_1_SQRT_2);
            let scaled = b.mul(x, root);
            math::erf(b, scaled)
        }
        "tanh" => {
            let (c, root) = (b.splat(x.ty, 0.044715), b.splat(x.ty, (2.0 / std::f64::consts::PI).sqrt()));
            let square = b.mul(x, x);
            let cubic = b.mul(square, c);
            let sum = b.add(cubic, one);
            let sum = b.mul(sum, x);
            let scaled = b.mul(sum, root);
            math::tanh(b, scaled)
        }
        _ => return None,
    };
    let sum = b.add(inner, one);
    let scaled = b.mul(x, half);
    Some(b.mul(scaled, sum))
}
