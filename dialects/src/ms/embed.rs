//! EmbedLayerNormalization: the sum of word, position and segment embeddings, normalized.

use super::part::{Part, add, add_opt};
use crate::ir::{Elem, Type};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;

/// The ops of this file.
pub const OPS: &[OpDef] = &[OpDef {
    name: "com.microsoft.EmbedLayerNormalization",
    operands: (7, 9),
    results: (1, 3),
    infer,
    eval,
    ..OpDef::NEW
}];

fn infer(cx: &InferCx) -> Inferred {
    let Some(elem) = cx.elem(2) else { return Ok(Vec::new()) };
    let sum = match (cx.dims(0), cx.dims(2)) {
        (Some(ids), Some([_, hidden])) => Type::tensor(elem, ids.iter().cloned().chain([hidden.clone()])),
        _ => Type::unranked(elem),
    };
    let mask = match cx.dims(0) {
        Some([batch, ..]) => Type::tensor(Elem::I32, [batch.clone()]),
        _ => Type::unranked(Elem::I32),
    };
    Ok(vec![sum.clone().into(), mask.into(), sum.into()])
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (ids, words, positions) = (cx.input(0)?, cx.input(2)?, cx.input(3)?);
    let [batch, seq] = *ids.shape() else {
        return Err(OpError::invalid(format!(
            "input_ids has shape {:?}, expected [batch, seq]",
            ids.shape()
        )));
    };
    let look_up = |table: &Tensor, ids: &Tensor| Part::new("Gather").of(cx, &[table, ids]);
    let position_ids = match cx.opt(8)? {
        Some(given) => given.clone(),
        None => Tensor::new(&[1, seq], (0..seq as i64).collect::<Vec<i64>>())?,
    };
    let segments = match (cx.opt(1)?, cx.opt(4)?) {
        (Some(ids), Some(table)) => Some(look_up(table, ids)?),
        (None, None) => None,
        _ => return Err(OpError::invalid("segment ids and their embedding come together")),
    };
    let sum = add(cx, &look_up(words, ids)?, &look_up(positions, &position_ids)?)?;
    let sum = add_opt(cx, sum, segments.as_ref())?;
    let norm = Part::new("LayerNormalization").with("epsilon", cx.float_or("epsilon", 1e-12));
    let y = norm.of(cx, &[&sum, cx.input(5)?, cx.input(6)?])?;
    // The number of words that the mask leaves.
    let left: Vec<i32> = match cx.opt(7)? {
        Some(mask) if mask.shape() == [batch, seq] => {
            let mask = mask.to_i64()?;
            (0..batch).map(|b| mask[b * seq..][..seq].iter().filter(|&&m| m == 1).count() as i32).collect()
        }
        Some(mask) => {
            let found = mask.shape();
            return Err(OpError::invalid(format!("mask has shape {found:?}, expected [{batch}, {seq}]")));
        }
        None => vec![0; batch],
    };
    Ok(vec![y.into(), Tensor::new(&[batch], left)?.into(), sum.into()])
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("ms_embed");
    }
}
