//! Where and Clip.

use super::cast::convert;
use super::util::{broadcast, fact, same_type, sym, wrong_elem};
use crate::ir::{Dim, Elem};
use crate::kernels::strided::{broadcast_shape, count, map, map3};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::{Data, Tensor};

fn choose(cx: &EvalCx) -> Evaluated {
    let (c, a, b) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let shape = broadcast_shape(&[c.shape(), a.shape(), b.shape()])?;
    count(&shape)?;
    let test = c.bools()?;
    macro_rules! pick {
        ($($variant:ident)*) => {
            match (a.data(), b.data()) {
                _ if a.elem() != b.elem() => {
                    let (p, q) = (a.elem(), b.elem());
                    return Err(OpError::Invalid(format!("operands of one type expected, found {p} and {q}")));
                }
                $((Data::$variant(x), Data::$variant(y)) => {
                    let operands = ((test, c.shape()), (x.as_slice(), a.shape()), (y.as_slice(), b.shape()));
                    Data::$variant(map3(operands.0, operands.1, operands.2, &shape, |&t, x, y| {
                        if t { x.clone() } else { y.clone() }
                    }))
                })*
                _ => return Err(wrong_elem("a type that can be chosen from", a)),
            }
        };
    }
    let data = pick!(F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 Bool C64 C128 Str);
    super::util::moved(a, &shape, data)
}

fn infer_choose(cx: &InferCx) -> Inferred {
    let elem = cx.elem(1).or(cx.elem(2));
    let mut facts = broadcast(cx, elem, 0..3)?;
    if let (Some(f), Some((c, sc)), Some((a, sa)), Some((b, sb))) =
        (facts.first_mut(), sym(cx, 0), sym(cx, 1), sym(cx, 2))
    {
        let shape = broadcast_shape(&[&sc, &sa, &sb])?;
        if super::util::small_count(&shape).is_some() {
            let s = map3((c, &sc), (a, &sa), (b, &sb), &shape, |c, a, b| match c.known() {
                Some(0) => b.clone(),
                Some(_) => a.clone(),
                None if a.same(b) => a.clone(),
                None => Dim::Unknown,
            });
            *f = fact(elem.expect("a fact has a type"), f.ty.dims().map(<[Dim]>::to_vec), Some(s));
        }
    }
    Ok(facts)
}

/// Limits are attributes before opset 11 and operands since. The upper one wins where they cross; NaN stays NaN.
fn clip(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let limit = |i: usize, name: &str| -> Result<Option<Tensor>, OpError> {
        match (cx.opt(i)?, cx.attrs.float(name)) {
            (Some(l), _) if l.elem() != t.elem() => Err(wrong_elem(t.elem().name(), l)),
            (Some(l), _) if l.len() == 1 => Ok(Some(l.clone())),
            (Some(l), _) => Err(OpError::Invalid(format!("{name} is a tensor of {} elements", l.len()))),
            (None, Some(x)) => {
                Ok(Some(convert(&Tensor::from_f32(Elem::F32, &[], vec![x])?, t.elem(), true)?))
            }
            (None, None) => Ok(None),
        }
    };
    let (low, high) = (limit(1, "min")?, limit(2, "max")?);
    macro_rules! clip {
        ($($variant:ident)*) => {
            match t.data() {
                $(Data::$variant(v) => {
                    let of = |l: &Option<Tensor>| match l.as_ref().map(Tensor::data) {
                        Some(Data::$variant(l)) => Some(l[0]),
                        _ => None,
                    };
                    let (low, high) = (of(&low), of(&high));
                    Data::$variant(map(v, |&x| {
                        let x = low.filter(|&l| x < l).unwrap_or(x);
                        high.filter(|&h| x > h).unwrap_or(x)
                    }))
                })*
                _ => return Err(wrong_elem("a numeric type", t)),
            }
        };
    }
    let data = clip!(F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8);
    cx.one(Tensor::new(t.shape(), data)?)
}

/// Where and Clip.
pub const OPS: &[OpDef] = &[
    OpDef { name: "onnx.Where", operands: (3, 3), infer: infer_choose, eval: choose, ..OpDef::NEW },
    OpDef { name: "onnx.Clip", operands: (1, 3), infer: same_type, eval: clip, ..OpDef::NEW },
];
