//! ScatterElements (and Scatter, its old name), ScatterND and TensorScatter: copies with some elements replaced or
//! combined.
//!
//! Updates are applied in order, so where places repeat the result does not depend on threads.

use super::gather::{along_axis, blocks, place};
use super::util::{axis, moved, same_type, wrong_elem};
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};
use crate::tensor::{Data, Tensor};

/// How an update meets what is there.
#[derive(Clone, Copy)]
enum Reduction {
    None,
    Add,
    Mul,
    Max,
    Min,
}

fn reduction(cx: &EvalCx) -> Result<Reduction, OpError> {
    match cx.attrs.str("reduction").unwrap_or("none") {
        "none" => Ok(Reduction::None),
        "add" => Ok(Reduction::Add),
        "mul" => Ok(Reduction::Mul),
        "max" => Ok(Reduction::Max),
        "min" => Ok(Reduction::Min),
        other => {
            Err(OpError::Invalid(format!("reduction is {other:?}, expected none, add, mul, max or min")))
        }
    }
}

/// Applies updates to a copy: block `i` of them, of `block` elements, at `places[i]`.
fn apply(t: &Tensor, updates: &Tensor, places: &[usize], block: usize, how: Reduction) -> Evaluated {
    if updates.elem() != t.elem() || updates.len() != places.len() * block {
        let (e, n) = (t.elem(), places.len() * block);
        let found = (updates.elem(), updates.len());
        return Err(OpError::Invalid(format!(
            "expected {n} updates of {e}, found {} of {}",
            found.1, found.0
        )));
    }
    fn put<T: Clone>(v: &[T], u: &[T], places: &[usize], block: usize, f: impl Fn(&T, &T) -> T) -> Vec<T> {
        let mut out = v.to_vec();
        for (i, &p) in places.iter().enumerate() {
            for j in 0..block {
                out[p + j] = f(&out[p + j], &u[i * block + j]);
            }
        }
        out
    }
    macro_rules! arms {
        ($($variant:ident: $add:expr, $mul:expr;)*) => {
            match (how, t.data(), updates.data()) {
                $(
                    (Reduction::Add, Data::$variant(v), Data::$variant(u)) => {
                        Data::$variant(put(v, u, places, block, $add))
                    }
                    (Reduction::Mul, Data::$variant(v), Data::$variant(u)) => {
                        Data::$variant(put(v, u, places, block, $mul))
                    }
                    (Reduction::Max, Data::$variant(v), Data::$variant(u)) => {
                        Data::$variant(put(v, u, places, block, |a, b| if b > a { *b } else { *a }))
                    }
                    (Reduction::Min, Data::$variant(v), Data::$variant(u)) => {
                        Data::$variant(put(v, u, places, block, |a, b| if b < a { *b } else { *a }))
                    }
                )*
                _ => return Err(wrong_elem("a numeric type", t)),
            }
        };
    }
    if let Reduction::None = how {
        macro_rules! replace {
            ($($variant:ident)*) => {
                match (t.data(), updates.data()) {
                    $((Data::$variant(v), Data::$variant(u)) => {
                        Data::$variant(put(v, u, places, block, |_, u| u.clone()))
                    })*
                    _ => return Err(wrong_elem(t.elem().name(), updates)),
                }
            };
        }
        return moved(
            t,
            t.shape(),
            replace!(F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 Bool C64 C128 Str),
        );
    }
    let data = arms! {
        F64: |a, b| a + b, |a, b| a * b;
        F32: |a, b| a + b, |a, b| a * b;
        F16: |a, b| a + b, |a, b| a * b;
        BF16: |a, b| a + b, |a, b| a * b;
        I64: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
        I32: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
        I16: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
        I8: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
        U64: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
        U32: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
        U16: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
        U8: |a, b| a.wrapping_add(*b), |a, b| a.wrapping_mul(*b);
    };
    moved(t, t.shape(), data)
}

fn elements(cx: &EvalCx) -> Evaluated {
    let (t, indices, updates) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let places = along_axis(t, indices, axis(cx.int_or("axis", 0), t.rank())?)?;
    apply(t, updates, &places, 1, reduction(cx)?)
}

fn nd(cx: &EvalCx) -> Evaluated {
    let (t, indices, updates) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (places, block) = blocks(t, indices, 0)?;
    apply(t, updates, &places, block, reduction(cx)?)
}

/// Writes rows of a sequence into a cache, at a place of its own for each batch.
fn cache(cx: &EvalCx) -> Evaluated {
    let (t, update) = (cx.input(0)?, cx.input(1)?);
    let i = axis(cx.int_or("axis", -2), t.rank())?;
    if i == 0 {
        return Err(OpError::invalid("the axis is that of the batch"));
    }
    let fits = update.rank() == t.rank()
        && (0..t.rank()).all(|d| match d == i {
            true => update.shape()[d] <= t.shape()[d],
            false => update.shape()[d] == t.shape()[d],
        });
    if !fits {
        let (a, b) = (update.shape(), t.shape());
        return Err(OpError::Invalid(format!(
            "an update of shape {a:?} does not fit a cache of shape {b:?}"
        )));
    }
    let circular = match cx.attrs.str("mode").unwrap_or("linear") {
        "linear" => false,
        "circular" => true,
        other => return Err(OpError::Invalid(format!("mode is {other:?}, expected linear or circular"))),
    };
    let (batch, size, rows) = (t.shape()[0], t.shape()[i], update.shape()[i]);
    let starts = match cx.opt(2)? {
        Some(s) => s.to_i64()?.into_owned(),
        None => vec![0; batch],
    };
    if starts.len() != batch {
        let found = starts.len();
        return Err(OpError::Invalid(format!("expected {batch} write indices, found {found}")));
    }
    let block: usize = t.shape()[i + 1..].iter().product();
    let outer: usize = t.shape()[..i].iter().product();
    let mut places = Vec::with_capacity(outer * rows);
    for o in 0..outer {
        let start = starts[o / (outer / batch)];
        for row in 0..rows {
            let at = start.saturating_add(row as i64);
            let at = if circular { at.rem_euclid(size as i64) } else { at };
            places.push((o * size + place(at, size)?) * block);
        }
    }
    apply(t, update, &places, block, Reduction::None)
}

const fn op(name: &'static str, eval: fn(&EvalCx) -> Evaluated) -> OpDef {
    OpDef { name, operands: (3, 3), infer: same_type, eval, ..OpDef::NEW }
}

/// Scatters.
pub const OPS: &[OpDef] = &[
    op("onnx.Scatter", elements),
    op("onnx.ScatterElements", elements),
    op("onnx.ScatterND", nd),
    OpDef { name: "onnx.TensorScatter", operands: (2, 3), infer: same_type, eval: cache, ..OpDef::NEW },
];
