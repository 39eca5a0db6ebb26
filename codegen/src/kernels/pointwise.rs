//! Elementwise ops on values of any number of lanes.
//!
//! [`emit`] is the one list of what is compiled; whether an op is in it is found by emitting it.

use super::{math, quantize};
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar};
use dialects::ir::{Dim, Elem, Module, Op, OpData, Value};
use dialects::tensor::Tensor;

/// The type of an element in a register. Bools are one bit there and a byte in memory.
pub fn register(elem: Elem) -> Option<Scalar> {
    Some(match elem {
        Elem::F32 => Scalar::F32,
        Elem::I64 => Scalar::I64,
        Elem::I32 => Scalar::I32,
        Elem::Bool => Scalar::I1,
        Elem::U8 => Scalar::U8,
        Elem::I8 => Scalar::I8,
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

/// A constant of one element, which kernels hold in their code.
pub fn number(m: &Module, v: Value) -> Option<f64> {
    let data = &m.consts[m.const_of(v)?];
    if data.count() != 1 {
        return None;
    }
    let t = Tensor::from_const(data).ok()?;
    match t.i64s() {
        Ok(n) => Some(n[0] as f64).filter(|&x| x as i64 == n[0]),
        Err(_) => t.to_f32().ok().map(|x| f64::from(x[0])).or_else(|| {
            let truth = t.bools().ok().map(|b| f64::from(u8::from(b[0])));
            truth.or_else(|| t.to_i64().ok().map(|n| n[0] as f64))
        }),
    }
}

fn is_quantizer(data: &OpData) -> bool {
    data.name.as_str().ends_with(".QuantizeLinear") || data.name.as_str().ends_with(".DequantizeLinear")
}

/// The codes that `op` makes or reads, if it is QuantizeLinear or DequantizeLinear of f32 with one scale and zero point for
/// all. They are elementwise ops then.
pub fn one_scale(m: &Module, op: Op) -> Option<Value> {
    let data = &m.ops[op];
    let (x, scale, y) = (data.operand(0)?, data.operand(1)?, data.result(0)?);
    let reads = data.name.as_str().ends_with(".DequantizeLinear");
    let (codes, real) = if reads { (x, y) } else { (y, x) };
    let rank = m.ty(x).dims()?.len();
    let one =
        |v: Value| m.ty(v).dims().is_some_and(|d| d.len() <= rank && d.iter().all(|d| *d == Dim::Known(1)));
    let int = |name: &str| data.attrs.int(name).unwrap_or(0);
    let elem = m.ty(codes).elem()?;
    let zero = data.operand(2);
    let fits = is_quantizer(data)
        && m.ty(real).elem() == Some(Elem::F32)
        && m.ty(scale).elem() == Some(Elem::F32)
        && one(scale)
        && zero.is_none_or(|z| one(z) && m.ty(z).elem() == Some(elem))
        && (matches!(elem, Elem::U8 | Elem::I8) || (reads && elem == Elem::I32 && zero.is_none()))
        && int("block_size") == 0
        && int("precision") == 0;
    fits.then_some(codes)
}

/// Whether [`emit`] knows `op` of `m`.
pub fn supports(m: &Module, target: &Target, op: Op) -> bool {
    let data = &m.ops[op];
    let [Some(result)] = data.results[..] else { return false };
    let elem = |v| m.ty(v).elem().and_then(register);
    let Some(out) = elem(result) else { return false };
    let inputs: Option<Vec<Scalar>> = data.operands.iter().flatten().map(|&v| elem(v)).collect();
    let Some(inputs) = inputs.filter(|i| !i.is_empty()) else { return false };
    // Before opset 7 an attribute said how dims meet.
    let plain = data.attrs.int("broadcast").is_none() && data.attrs.int("axis").is_none();
    let fits = if is_quantizer(data) { one_scale(m, op).is_some() } else { plain };
    if !fits || (data.operands.len() != inputs.len() && !data.is("onnx.Clip")) {
        return false;
    }
    let numbers: Vec<Option<f64>> = data.operands.iter().flatten().map(|&v| number(m, v)).collect();
    let params: Vec<Ty> = inputs.into_iter().map(scalar).collect();
    let mut known = false;
    Body::function(target, "probe", &params, |b, p| {
        known = emit(b, data, p, &numbers, out).is_some_and(|v| v.ty == scalar(out));
    });
    known
}

/// One op; its result has elements `out`. Of those operands that are constants, `numbers` says which. `None` where it is not
/// known.
pub fn emit(b: &mut Body, op: &OpData, x: &[Val], numbers: &[Option<f64>], out: Scalar) -> Option<Val> {
    let first = *x.first()?;
    let float = first.ty.elem == Scalar::F32;
    let arithmetic = matches!(first.ty.elem, Scalar::F32 | Scalar::I64 | Scalar::I32);
    let bools = first.ty.elem == Scalar::I1;
    let integer = arithmetic && !float;
    let attr = |name: &str, default: f64| op.attrs.float(name).map_or(default, f64::from);
    let cmp = |b: &mut Body, how| (x.len() == 2 && !bools).then(|| b.cmp(how, x[0], x[1]));
    let name = op.name.as_str().strip_prefix("onnx.").unwrap_or(op.name.as_str());
    let zero = x.get(2).copied();
    Some(match (name, x.len()) {
        ("QuantizeLinear" | "com.microsoft.QuantizeLinear", 2 | 3) if float => {
            quantize::quantized(b, first, x[1], zero, out)
        }
        ("DequantizeLinear" | "com.microsoft.DequantizeLinear", 2 | 3) if !float => {
            let code = b.cast(first, Scalar::F32);
            let code = match zero {
                Some(zero) => {
                    let zero = b.cast(zero, Scalar::F32);
                    b.sub(code, zero)
                }
                None => code,
            };
            b.mul(code, x[1])
        }
        ("Identity", 1) => first,
        ("Cast", 1) => return cast(b, first, out),
        ("Add", 2) if arithmetic => b.add(x[0], x[1]),
        ("Sub", 2) if arithmetic => b.sub(x[0], x[1]),
        ("Mul", 2) if arithmetic => b.mul(x[0], x[1]),
        ("Div", 2) if float => b.div(x[0], x[1]),
        ("Div", 2) if integer => return quotient(b, first, numbers[1]?),
        ("Mod", 2) if integer => {
            return remainder(b, first, numbers[1]?, op.attrs.int("fmod").unwrap_or(0) != 0);
        }
        ("Pow", 2) if float => return power(b, first, numbers[1]?),
        ("Clip", _) if arithmetic => clip(b, op, x),
        ("Max", 2) if arithmetic => b.max(x[0], x[1]),
        ("Min", 2) if arithmetic => b.min(x[0], x[1]),
        ("Sum", 2) if float => b.add(x[0], x[1]),
        ("Neg", 1) if float => b.unary("arith.negf", first),
        ("Abs", 1) if float => b.unary("math.absf", first),
        ("Neg", 1) if integer => {
            let zero = b.splat(first.ty, 0.0);
            b.sub(zero, first)
        }
        ("Abs", 1) if integer => {
            let zero = b.splat(first.ty, 0.0);
            let minus = b.sub(zero, first);
            b.max(first, minus)
        }
        ("Sign", 1) if arithmetic => {
            let [zero, one, minus] = [0.0, 1.0, -1.0].map(|n| b.splat(first.ty, n));
            let (above, below) = (b.cmp(Cmp::Gt, first, zero), b.cmp(Cmp::Lt, first, zero));
            let y = b.select(below, minus, first);
            b.select(above, one, y)
        }
        ("Ceil", 1) if float => math::ceil(b, first),
        ("Floor", 1) if float => math::floor(b, first),
        ("Round", 1) if float => math::round(b, first),
        ("IsNaN", 1) if float => b.cmp(Cmp::Ne, first, first),
        ("Log", 1) if float => math::log(b, first),
        ("Sin", 1) if float => math::sin(b, first),
        ("Cos", 1) if float => math::cos(b, first),
        ("Sqrt", 1) if float => b.unary("math.sqrt", first),
        ("Reciprocal", 1) if float => {
            let one = b.splat(first.ty, 1.0);
            b.div(one, first)
        }
        ("Exp", 1) if float => math::exp(b, first),
        ("Tanh", 1) if float => math::tanh(b, first),
        ("Sigmoid", 1) if float => math::sigmoid(b, first),
        ("Erf", 1) if float => math::erf(b, first),
        ("HardSigmoid", 1) if float => {
            let (alpha, beta) = (attr("alpha", f64::from(0.2f32)), attr("beta", 0.5));
            let (alpha, beta) = (b.splat(first.ty, alpha), b.splat(first.ty, beta));
            let y = b.mul(first, alpha);
            let y = b.add(y, beta);
            unit(b, y)
        }
        ("HardSwish", 1) if float => {
            let (six, half) = (b.splat(first.ty, 6.0), b.splat(first.ty, 0.5));
            let y = b.div(first, six);
            let y = b.add(y, half);
            let y = unit(b, y);
            b.mul(first, y)
        }
        ("LeakyRelu", 1) if float => {
            let alpha = b.splat(first.ty, attr("alpha", f64::from(0.01f32)));
            let y = b.mul(alpha, first);
            where_negative(b, first, y)
        }
        ("Elu", 1) if float => {
            let alpha = b.splat(first.ty, attr("alpha", 1.0));
            let y = math::exp_m1(b, first);
            let y = b.mul(alpha, y);
            where_negative(b, first, y)
        }
        ("Softplus", 1) if float => {
            // max(x, 0) + ln (1 + e^-|x|)
            let zero = b.splat(first.ty, 0.0);
            let size = b.unary("math.absf", first);
            let minus = b.unary("arith.negf", size);
            let e = math::exp(b, minus);
            let rest = math::log_1p(b, e);
            let above = b.max(first, zero);
            b.add(above, rest)
        }
        ("Softsign", 1) if float => {
            let one = b.splat(first.ty, 1.0);
            let size = b.unary("math.absf", first);
            let below = b.add(one, size);
            b.div(first, below)
        }
        ("Relu", 1) if integer => {
            let zero = b.splat(first.ty, 0.0);
            b.max(first, zero)
        }
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
        (_, Scalar::I8 | Scalar::U8) => return None,
        (Scalar::I1, Scalar::F32) => {
            let bits = b.widen_unsigned(x, Scalar::I32);
            b.cast(bits, Scalar::F32)
        }
        (Scalar::I1, to) => b.widen_unsigned(x, to),
        (_, Scalar::I1) => {
            let zero = b.splat(x.ty, 0.0);
            b.cmp(Cmp::Ne, x, zero)
        }
        (Scalar::F32, to) => math::to_integer(b, x, to),
        (_, to) => b.cast(x, to),
    })
}

/// x / d towards zero, for a divisor that is not 0. By -1 the lowest number wraps around; the instruction would trap.
fn quotient(b: &mut Body, x: Val, d: f64) -> Option<Val> {
    let (zero, by) = (b.splat(x.ty, 0.0), b.splat(x.ty, d));
    Some(match d {
        0.0 => return None,
        -1.0 => b.sub(zero, x),
        _ => b.div(x, by),
    })
}

/// What is left of x / d, with the sign of x, or else with that of d; for a divisor that is not 0.
fn remainder(b: &mut Body, x: Val, d: f64, sign_of_x: bool) -> Option<Val> {
    let (zero, by) = (b.splat(x.ty, 0.0), b.splat(x.ty, d));
    Some(match d {
        0.0 => return None,
        -1.0 => zero,
        _ if sign_of_x => b.rem(x, by),
        _ => floor_mod(b, x, by),
    })
}

/// The remainder with the sign of the divisor.
fn floor_mod(b: &mut Body, x: Val, d: Val) -> Val {
    let zero = b.splat(x.ty, 0.0);
    let r = b.rem(x, d);
    let some = b.cmp(Cmp::Ne, r, zero);
    let (low, below) = (b.cmp(Cmp::Lt, r, zero), b.cmp(Cmp::Lt, d, zero));
    let differ = b.xor(low, below);
    let differ = b.and(some, differ);
    let up = b.add(r, d);
    b.select(differ, up, r)
}

/// x to a power that takes no logarithm.
fn power(b: &mut Body, x: Val, exponent: f64) -> Option<Val> {
    let one = b.splat(x.ty, 1.0);
    let root = |b: &mut Body| {
        // Of -0 the root is 0, and of -inf infinity: a power, unlike `sqrt`, has no sign of its own.
        let (zero, minus) = (b.splat(x.ty, 0.0), b.splat(x.ty, f64::NEG_INFINITY));
        let infinity = b.splat(x.ty, f64::INFINITY);
        let y = b.unary("math.sqrt", x);
        let y = b.add(y, zero);
        let endless = b.cmp(Cmp::Eq, x, minus);
        b.select(endless, infinity, y)
    };
    Some(match exponent {
        0.5 => root(b),
        -0.5 => {
            let root = root(b);
            b.div(one, root)
        }
        1.0 => x,
        -1.0 => b.div(one, x),
        2.0 => b.mul(x, x),
        3.0 => {
            let square = b.mul(x, x);
            b.mul(square, x)
        }
        _ => return None,
    })
}

/// x within limits, which are operands, or attributes before opset 11; the upper one wins, and NaN stays.
fn clip(b: &mut Body, op: &OpData, x: &[Val]) -> Val {
    let mut limits = x[1..].iter();
    let mut limit = |b: &mut Body, i: usize, name: &str| match op.operand(i) {
        Some(_) => limits.next().copied(),
        None => op.attrs.float(name).map(|l| b.splat(x[0].ty, l.into())),
    };
    let (low, high) = (limit(b, 1, "min"), limit(b, 2, "max"));
    let mut y = x[0];
    if let Some(low) = low {
        let below = b.cmp(Cmp::Lt, y, low);
        y = b.select(below, low, y);
    }
    if let Some(high) = high {
        let above = b.cmp(Cmp::Gt, y, high);
        y = b.select(above, high, y);
    }
    y
}

/// Within 0 and 1; NaN stays.
fn unit(b: &mut Body, x: Val) -> Val {
    let (zero, one) = (b.splat(x.ty, 0.0), b.splat(x.ty, 1.0));
    let below = b.cmp(Cmp::Lt, x, zero);
    let x = b.select(below, zero, x);
    let above = b.cmp(Cmp::Gt, x, one);
    b.select(above, one, x)
}

/// `y` where x is negative, else x.
fn where_negative(b: &mut Body, x: Val, y: Val) -> Val {
    let zero = b.splat(x.ty, 0.0);
    let negative = b.cmp(Cmp::Lt, x, zero);
    b.select(negative, y, x)
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
