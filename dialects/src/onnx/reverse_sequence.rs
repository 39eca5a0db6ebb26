//! ReverseSequence: reverses the first elements of each sequence of a batch.

use super::gather::rows;
use super::util::{moved, same_type};
use crate::map_data;
use crate::ops::{EvalCx, Evaluated, OpDef, OpError};

fn eval(cx: &EvalCx) -> Evaluated {
    let (t, lens) = (cx.input(0)?, cx.input(1)?.to_i64()?);
    let &[first, second, ..] = t.shape() else { return Err(OpError::invalid("expected two dims or more")) };
    let time_first = match (cx.int_or("time_axis", 0), cx.int_or("batch_axis", 1)) {
        (0, 1) => true,
        (1, 0) => false,
        (time, batch) => {
            let message =
                format!("time_axis {time} and batch_axis {batch}, expected 0 and 1 in either order");
            return Err(OpError::Invalid(message));
        }
    };
    let (time, batch) = if time_first { (first, second) } else { (second, first) };
    if lens.len() != batch {
        let found = lens.len();
        return Err(OpError::Invalid(format!("expected {batch} lengths of sequences, found {found}")));
    }
    let bad = lens.iter().find(|&&n| usize::try_from(n).map_or(true, |n| n > time));
    if let Some(n) = bad {
        return Err(OpError::Invalid(format!("a length of {n} is out of range for {time} steps")));
    }
    let source = |i: usize| {
        let (step, b) = if time_first { (i / second, i % second) } else { (i % second, i / second) };
        let len = lens[b] as usize;
        let from = if step < len { len - 1 - step } else { step };
        if time_first { from * second + b } else { b * second + from }
    };
    let places: Vec<usize> = (0..first * second).map(source).collect();
    let inner = t.shape()[2..].iter().product();
    moved(t, t.shape(), map_data!(t.data(), v => rows(v, 1, places.len(), inner, &places)))
}

/// The op.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.ReverseSequence", operands: (2, 2), infer: same_type, eval, ..OpDef::NEW }];
