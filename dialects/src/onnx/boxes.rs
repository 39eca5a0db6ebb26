//! NonMaxSuppression: of boxes that overlap, the one with the best score.

use super::util;
use crate::ir::{Dim, Elem, Type};
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "onnx.NonMaxSuppression", operands: (2, 5), infer, eval, ..OpDef::NEW }];

fn infer(cx: &InferCx) -> Inferred {
    for i in [0, 1] {
        if cx.dims(i).is_some_and(|d| d.len() != 3) {
            return Err(OpError::invalid(format!("operand {i} is {}, expected 3 dims", cx.ty(i))));
        }
    }
    Ok(vec![Type::tensor(Elem::I64, [Dim::Unknown, Dim::Known(3)]).into()])
}

/// A box by its sides.
struct Sides {
    low: [f32; 2],
    high: [f32; 2],
}

impl Sides {
    /// From two opposite corners, or from a center and sizes.
    fn of(b: &[f32], centered: bool) -> Sides {
        let side = |d: usize| match centered {
            true => (b[d] - b[d + 2] / 2.0, b[d] + b[d + 2] / 2.0),
            false => (b[d].min(b[d + 2]), b[d].max(b[d + 2])),
        };
        let (a, b) = (side(0), side(1));
        Sides { low: [a.0, b.0], high: [a.1, b.1] }
    }

    fn area(&self) -> f32 {
        (self.high[0] - self.low[0]) * (self.high[1] - self.low[1])
    }

    /// Whether the part that both share is more than `limit` of what they cover.
    fn overlaps(&self, other: &Sides, limit: f32) -> bool {
        let along = |d: usize| self.high[d].min(other.high[d]) - self.low[d].max(other.low[d]);
        let (height, width) = (along(0), along(1));
        let (shared, areas) = (height * width, [self.area(), other.area()]);
        if height <= 0.0 || width <= 0.0 || shared <= 0.0 || areas.iter().any(|a| *a <= 0.0) {
            return false;
        }
        let covered = areas[0] + areas[1] - shared;
        covered > 0.0 && shared / covered > limit
    }
}

/// The operand `i`, if it is given: one number.
fn number<T: Copy>(values: Option<&[T]>, name: &str) -> Result<Option<T>, OpError> {
    match values {
        None | Some([]) => Ok(None),
        Some([x]) => Ok(Some(*x)),
        Some(v) => Err(OpError::invalid(format!("{name} is {} numbers, expected one", v.len()))),
    }
}

fn eval(cx: &EvalCx) -> Evaluated {
    let (boxes, scores) = (cx.input(0)?, cx.input(1)?);
    let (&[batch, count, 4], &[own, classes, scored]) = (boxes.shape(), scores.shape()) else {
        let message = format!("boxes of shape {:?} with scores {:?}", boxes.shape(), scores.shape());
        return Err(OpError::invalid(message));
    };
    if own != batch || scored != count {
        let message = format!("boxes of shape {:?} with scores {:?}", boxes.shape(), scores.shape());
        return Err(OpError::invalid(message));
    }
    let most = cx.opt(2)?.map(Tensor::to_i64).transpose()?;
    let most = number(most.as_deref(), "max_output_boxes_per_class")?.unwrap_or(0);
    let most = usize::try_from(most.max(0)).unwrap_or(usize::MAX);
    let limit = number(cx.opt(3)?.map(Tensor::f32s).transpose()?, "iou_threshold")?.unwrap_or(0.0);
    let lowest = number(cx.opt(4)?.map(Tensor::f32s).transpose()?, "score_threshold")?;
    if !(0.0..=1.0).contains(&limit) {
        return Err(OpError::invalid(format!("iou_threshold is {limit}, expected 0 to 1")));
    }
    let centered = cx.int_or("center_point_box", 0) != 0;
    let (boxes, scores) = (boxes.f32s()?, scores.f32s()?);
    // What is kept of one class of one image, best first, equal scores in their own order.
    let class = |i: usize| -> Vec<i64> {
        let scores = &scores[i * count..][..count];
        let sides = |b: usize| Sides::of(&boxes[(i / classes * count + b) * 4..][..4], centered);
        let mut order: Vec<usize> = (0..count).filter(|&b| lowest.is_none_or(|l| scores[b] > l)).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let mut kept: Vec<(usize, Sides)> = Vec::new();
        for b in order {
            if kept.len() >= most {
                break;
            }
            let own = sides(b);
            if !kept.iter().any(|(_, k)| k.overlaps(&own, limit)) {
                kept.push((b, own));
            }
        }
        let place = |b: usize| [(i / classes) as i64, (i % classes) as i64, b as i64];
        kept.iter().flat_map(|(b, _)| place(*b)).collect()
    };
    let kept: Vec<Vec<i64>> = (0..batch * classes).into_par_iter().map(class).collect();
    let kept = kept.concat();
    cx.one(Tensor::new(&util::shape_of(&[(kept.len() / 3) as i64, 3])?, kept)?)
}

#[cfg(test)]
mod tests {
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("boxes");
    }

    #[test]
    fn boxes_without_scores_are_refused() {
        let t = |shape: &[usize]| Some(Tensor::new(shape, vec![0.5f32; shape.iter().product()]).unwrap());
        let case = |boxes: &[usize], scores: &[usize], limit: f32| {
            Case::new(
                "onnx.NonMaxSuppression",
                11,
                &[],
                vec![t(boxes), t(scores), None, Some(Tensor::scalar(limit))],
            )
        };
        refused(&case(&[2, 4], &[1, 1, 2], 0.5), "");
        for (boxes, scores) in [([1, 2, 5], [1, 1, 2]), ([1, 2, 4], [1, 1, 3]), ([1, 2, 4], [2, 1, 2])] {
            assert!(case(&boxes, &scores, 0.5).eval(false).is_err(), "{boxes:?} {scores:?}");
        }
        assert!(case(&[1, 2, 4], &[1, 1, 2], 1.5).eval(false).is_err());
    }
}
