//! `quant.dequantize`: the values of a quantized weight. The parent module's documentation defines the layout.

use crate::ir::{Attrs, Elem, Type};
use crate::kernels::packed::Packed;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use std::borrow::Cow;

/// The ops of this file.
pub const OPS: &[OpDef] =
    &[OpDef { name: "quant.dequantize", operands: (2, 3), infer, verify, eval, ..OpDef::NEW }];

/// The attributes, read and checked.
struct Form {
    bits: usize,
    group: usize,
    shape: Vec<usize>,
    axis: usize,
    to: Elem,
    n: usize,
    k: usize,
}

impl Form {
    fn of(attrs: &Attrs) -> Result<Form, OpError> {
        let int = |name: &str| {
            let v = attrs.int(name).and_then(|v| usize::try_from(v).ok());
            v.ok_or_else(|| OpError::invalid(format!("the attribute {name} is missing or negative")))
        };
        let (bits, group, axis) = (int("bits")?, int("group_size")?, int("axis")?);
        if !(1..=8).contains(&bits) || group == 0 || group >= 1 << 32 {
            return Err(OpError::invalid(format!("codes of {bits} bits in groups of {group}")));
        }
        let dims = attrs.ints("shape").ok_or_else(|| OpError::invalid("the attribute shape is missing"))?;
        let shape: Option<Vec<usize>> = dims.iter().map(|&d| usize::try_from(d).ok()).collect();
        let wrong =
            || OpError::invalid(format!("the shape {dims:?} with K along dim {axis} is no [N, K] matrix"));
        let shape = shape.ok_or_else(wrong)?;
        let k = *shape.get(axis).ok_or_else(wrong)?;
        let others = || shape.iter().enumerate().filter(|&(i, &d)| i != axis && d != 1).map(|(_, &d)| d);
        if others().count() > 1 {
            return Err(wrong());
        }
        let n = others().next().unwrap_or(1);
        n.checked_mul(k).ok_or_else(wrong)?;
        let to = i32::try_from(int("to")?).ok().and_then(Elem::from_onnx).filter(|e| e.is_float());
        let to = to.ok_or_else(|| OpError::invalid("the attribute to names no float type"))?;
        Ok(Form { bits, group, shape, axis, to, n, k })
    }

    /// Bits that a code takes.
    fn container(&self) -> usize {
        self.bits.next_power_of_two().max(2)
    }

    /// Whether K is the outer of the two dims.
    fn transposed(&self) -> bool {
        self.shape[self.axis + 1..].iter().any(|&d| d != 1)
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let form = Form::of(cx.attrs)?;
    Ok(vec![Type::of_shape(form.to, &form.shape).into()])
}

fn verify(cx: &InferCx) -> Result<(), OpError> {
    let form = Form::of(cx.attrs)?;
    let groups = form.k.div_ceil(form.group);
    let bytes = (form.group * form.container()).div_ceil(8);
    let wants = [
        ("codes", Some(Elem::U8), vec![form.n, groups, bytes]),
        ("scales", None, vec![form.n, groups]),
        ("zero points", Some(Elem::U8), vec![form.n, groups]),
    ];
    for (i, (what, elem, shape)) in wants.into_iter().enumerate() {
        let found = cx.ty(i);
        let want = Type::of_shape(elem.or(found.elem()).unwrap_or(Elem::F32), &shape);
        let float = elem.is_some() || found.elem().is_none_or(Elem::is_float);
        if found.unify(&want).is_none() || !float {
            let message = format!("the {what} are {found}, expected {want}");
            return Err(OpError::invalid(message));
        }
    }
    Ok(())
}

fn eval(cx: &EvalCx) -> Evaluated {
    let form = Form::of(cx.attrs)?;
    let scales: Cow<[f32]> = cx.input(1)?.to_f32()?;
    let zeros = match cx.opt(2)? {
        Some(z) => z.u8s()?.iter().map(|&z| f32::from(z)).collect(),
        None => vec![(1u32 << (form.bits - 1)) as f32; scales.len()],
    };
    let (n, k, group) = (form.n, form.k, form.group);
    let container = form.container();
    let packed = Packed { codes: cx.input(0)?.u8s()?, scales, zeros, n, k, group, container }.checked()?;
    let values = if form.transposed() { packed.dense_transposed() } else { packed.dense() };
    cx.one(Tensor::from_f32(form.to, &form.shape, values)?)
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::Case;

    #[test]
    fn a_form_that_does_not_fit_is_refused() {
        let case = |group: i64, shape: Vec<i64>, axis: i64| {
            let ints = [("bits", 4), ("group_size", group), ("axis", axis), ("to", 1)];
            let mut attrs: Vec<(&str, Attr)> = ints.map(|(n, v)| (n, v.into())).to_vec();
            attrs.push(("shape", shape.into()));
            let codes = Tensor::new(&[2, 1, 2], vec![0x21u8, 0x43, 0x65, 0x87]).unwrap();
            let scales = Tensor::new(&[2, 1], vec![1f32, 0.5]).unwrap();
            Case::new("quant.dequantize", 1, &attrs, vec![Some(codes), Some(scales)])
        };
        let eval = |c: Case| c.eval(false).map(|r| r[0].tensor().unwrap().f32s().unwrap().to_vec());
        // Codes 1 2 3 4 and 5 6 7 8 about the middle, 8.
        assert_eq!(eval(case(4, vec![2, 4], 1)).unwrap(), [-7.0, -6.0, -5.0, -4.0, -1.5, -1.0, -0.5, 0.0]);
        for (group, shape, axis) in [
            (0, vec![2, 4], 1),
            (i64::MAX, vec![2, 4], 1),
            (-1, vec![2, 4], 1),
            (4, vec![2, 8], 1),
            (4, vec![3, 4], 1),
            (4, vec![2, 4], 2),
            (4, vec![2, 2, 4], 2),
            (4, vec![i64::MAX, 4], 1),
        ] {
            assert!(eval(case(group, shape.clone(), axis)).is_err(), "{group} {shape:?} {axis}");
        }
    }

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("dequantize");
    }
}
