//! Cast and CastLike between all element types.
//!
//! Floats round to nearest even, once. A float that an integer type cannot hold is undefined in ONNX: here it
//! saturates, and NaN becomes 0. Integers keep their low bits. Bool is whether a number is not zero.

use super::util::{fact, wrong_elem};
use crate::ir::{Attrs, Dim, Elem};
use crate::kernels::minifloat::{Codec, Round};
use crate::kernels::strided::map;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};
use bytes::Bytes;
use half::{bf16, f16};

/// Maps every number of a tensor, whatever its type: half and narrow floats appear as f32, bool as u8.
macro_rules! numbers {
    ($t:expr, $x:ident => $e:expr) => {{
        let t: &Tensor = $t;
        match t.data() {
            Data::F64(v) => map(v, |&$x| $e),
            Data::F32(v) => map(v, |&$x| $e),
            Data::F16(v) => map(v, |h| {
                let $x = h.to_f32();
                $e
            }),
            Data::BF16(v) => map(v, |h| {
                let $x = h.to_f32();
                $e
            }),
            Data::I64(v) => map(v, |&$x| $e),
            Data::I32(v) => map(v, |&$x| $e),
            Data::I16(v) => map(v, |&$x| $e),
            Data::I8(v) => map(v, |&$x| $e),
            Data::U64(v) => map(v, |&$x| $e),
            Data::U32(v) => map(v, |&$x| $e),
            Data::U16(v) => map(v, |&$x| $e),
            Data::U8(v) => match Codec::of(t.elem()) {
                Some(codec) => map(v, |&c| {
                    let $x = codec.decode(c);
                    $e
                }),
                None => map(v, |&$x| $e),
            },
            Data::Bool(v) => map(v, |&b| {
                let $x = u8::from(b);
                $e
            }),
            _ => return Err(wrong_elem("a numeric type", t)),
        }
    }};
}

/// `t` with the element type `to`. `saturate` is for narrow floats: whether what is out of their range becomes
/// their largest number, rather than infinity or NaN.
pub fn convert(t: &Tensor, to: Elem, saturate: bool) -> Result<Tensor, OpError> {
    cast(t, to, saturate, Round::Up)
}

fn cast(t: &Tensor, to: Elem, saturate: bool, round: Round) -> Result<Tensor, OpError> {
    if t.elem() == to {
        return Ok(t.clone());
    }
    if let Data::Str(v) = t.data() {
        return cast(&Tensor::new(t.shape(), parse(v)?)?, to, saturate, round);
    }
    let data: Data = match to {
        Elem::F64 => numbers!(t, x => x as f64).into(),
        Elem::F32 => numbers!(t, x => x as f32).into(),
        Elem::F16 => numbers!(t, x => f16::from_f64(x as f64)).into(),
        Elem::BF16 => numbers!(t, x => bf16::from_f64(x as f64)).into(),
        Elem::I64 => numbers!(t, x => x as i64).into(),
        Elem::I32 => numbers!(t, x => x as i32).into(),
        Elem::I16 => numbers!(t, x => x as i16).into(),
        Elem::I8 => numbers!(t, x => x as i8).into(),
        Elem::U64 => numbers!(t, x => x as u64).into(),
        Elem::U32 => numbers!(t, x => x as u32).into(),
        Elem::U16 => numbers!(t, x => x as u16).into(),
        Elem::U8 => numbers!(t, x => x as u8).into(),
        Elem::Bool => numbers!(t, x => x as f64 != 0.0).into(),
        Elem::I4 => numbers!(t, x => (x as i64 as i8) << 4 >> 4).into(),
        Elem::I2 => numbers!(t, x => (x as i64 as i8) << 6 >> 6).into(),
        Elem::U4 => numbers!(t, x => x as i64 as u8 & 0x0f).into(),
        Elem::U2 => numbers!(t, x => x as i64 as u8 & 0x03).into(),
        Elem::String => Data::Str(text(t)?),
        _ => {
            let codec = Codec::of(to).ok_or_else(|| OpError::Unsupported(format!("a cast to {to}")))?;
            match to {
                Elem::F8E8M0 => numbers!(t, x => codec.encode_exponent(x as f64, round, saturate)).into(),
                _ => numbers!(t, x => codec.encode(x as f64, saturate)).into(),
            }
        }
    };
    Ok(Tensor::with_elem(to, t.shape(), data)?)
}

/// Numbers from text, in decimal or scientific notation, `INF` and `NaN` in any case.
fn parse(v: &[Bytes]) -> Result<Vec<f64>, OpError> {
    let number = |s: &Bytes| std::str::from_utf8(s).ok().and_then(|s| s.trim().parse().ok());
    let fail = |s: &Bytes| OpError::Invalid(format!("{:?} is not a number", String::from_utf8_lossy(s)));
    v.iter().map(|s| number(s).ok_or_else(|| fail(s))).collect()
}

/// Numbers as text, the shortest that reads back to the same number.
fn text(t: &Tensor) -> Result<Vec<Bytes>, OpError> {
    fn float(x: impl std::fmt::Display + Into<f64> + Copy) -> String {
        match x.into() {
            f if f.is_nan() => "NaN".into(),
            f if f.is_infinite() => if f > 0.0 { "INF" } else { "-INF" }.into(),
            _ => x.to_string(),
        }
    }
    let strings: Vec<String> = match t.data() {
        Data::F64(v) => v.iter().map(|&x| float(x)).collect(),
        Data::I64(v) => v.iter().map(i64::to_string).collect(),
        Data::U64(v) => v.iter().map(u64::to_string).collect(),
        Data::Bool(v) => v.iter().map(|&b| u8::from(b).to_string()).collect(),
        _ if t.elem().is_float() => {
            let values: Vec<f32> = numbers!(t, x => x as f32);
            values.into_iter().map(float).collect()
        }
        _ => t.to_i64()?.iter().map(i64::to_string).collect(),
    };
    Ok(strings.into_iter().map(Bytes::from).collect())
}

/// The element type that the attribute `to` means: by number, or before opset 6 by name.
pub(super) fn target(attrs: &Attrs) -> Result<Elem, OpError> {
    if let Some(name) = attrs.str("to") {
        // The names are those of the enum whose numbers came later.
        const NAMES: [(&str, Elem); 14] = [
            ("FLOAT", Elem::F32),
            ("UINT8", Elem::U8),
            ("INT8", Elem::I8),
            ("UINT16", Elem::U16),
            ("INT16", Elem::I16),
            ("INT32", Elem::I32),
            ("INT64", Elem::I64),
            ("STRING", Elem::String),
            ("BOOL", Elem::Bool),
            ("FLOAT16", Elem::F16),
            ("DOUBLE", Elem::F64),
            ("UINT32", Elem::U32),
            ("UINT64", Elem::U64),
            ("BFLOAT16", Elem::BF16),
        ];
        let found = NAMES.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        return found
            .map(|(_, e)| *e)
            .ok_or_else(|| OpError::Invalid(format!("{name:?} is no element type")));
    }
    let code = attrs.int("to").ok_or_else(|| OpError::invalid("the attribute to is missing"))?;
    let elem = i32::try_from(code).ok().and_then(Elem::from_onnx);
    elem.ok_or_else(|| OpError::Invalid(format!("{code} is no element type")))
}

fn options(cx: &EvalCx) -> Result<(bool, Round), OpError> {
    let round = match cx.attrs.str("round_mode").unwrap_or("up") {
        "up" => Round::Up,
        "down" => Round::Down,
        "nearest" => Round::Nearest,
        other => {
            return Err(OpError::Invalid(format!("round_mode is {other:?}, expected up, down or nearest")));
        }
    };
    Ok((cx.int_or("saturate", 1) != 0, round))
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (saturate, round) = options(cx)?;
    cx.one(cast(cx.input(0)?, target(cx.attrs)?, saturate, round)?)
}

fn eval_like(cx: &EvalCx) -> Evaluated {
    let (saturate, round) = options(cx)?;
    cx.one(cast(cx.input(0)?, cx.input(1)?.elem(), saturate, round)?)
}

fn result(cx: &InferCx, to: Elem) -> Inferred {
    let as_bool = |d: &Dim| match d {
        Dim::Known(n) => Dim::Known((*n != 0).into()),
        _ => Dim::Unknown,
    };
    // A 32-bit element that is known fits, or wraps as the op does.
    let as_i32 = |d: &Dim| d.known().map_or(d.clone(), |n| Dim::Known((n as i32).into()));
    let sym = cx.sym(0).map(|s| match to {
        Elem::Bool => s.iter().map(as_bool).collect(),
        Elem::I32 => s.iter().map(as_i32).collect(),
        _ => s.to_vec(),
    });
    Ok(vec![fact(to, cx.dims(0).map(<[Dim]>::to_vec), sym)])
}

/// Cast and CastLike.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.Cast", infer: |cx| result(cx, target(cx.attrs)?), eval, ..OpDef::NEW },
    OpDef {
        name: "onnx.CastLike",
        operands: (2, 2),
        infer: |cx| cx.elem(1).map_or(Ok(Vec::new()), |to| result(cx, to)),
        eval: eval_like,
        ..OpDef::NEW
    },
];
