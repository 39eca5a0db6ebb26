//! Resize and Upsample: every dim resampled on its own, one after the other, by weights over the operand's places.
//!
//! Coordinates are computed in single precision as ONNX Runtime does it, since rounding decides which place is nearest.
//! A result whose size follows from scales is taken for `input * scale` long, fraction and all, where the corners are
//! aligned, as ONNX's reference does it.

use super::pad::placed;
use super::util::{self, axes, shape_of};
use crate::ir::{Attrs, Dim, Elem};
use crate::kernels::real::{Real, with_real};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use std::borrow::Cow;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.Resize",
        operands: (1, 4),
        infer: |cx| infer(cx, if cx.opset < 11 { 1 } else { 2 }),
        verify: |cx| Method::of(cx.attrs, cx.opset, false).map(|_| ()),
        eval: |cx| eval(cx, false),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.Upsample",
        operands: (1, 2),
        infer: |cx| infer(cx, 1),
        verify: |cx| Method::of(cx.attrs, cx.opset, true).map(|_| ()),
        eval: |cx| eval(cx, true),
        ..OpDef::NEW
    },
];

/// Longer results are refused: single precision does not tell their places apart.
const MAX_SIZE: usize = 1 << 24;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

/// Which place is the nearest to a coordinate.
#[derive(Clone, Copy)]
enum Nearest {
    PreferFloor,
    PreferCeil,
    Floor,
    Ceil,
    /// As before opset 11: the one before when the result is larger, the one behind when it is smaller.
    Old,
}

/// Where a place of the result lies on the operand.
#[derive(Clone, Copy, PartialEq)]
enum Transform {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    Crop,
}

/// What the attributes say of the resampling.
struct Method {
    mode: Mode,
    nearest: Nearest,
    transform: Transform,
    antialias: bool,
    exclude_outside: bool,
    cubic: f64,
}

impl Method {
    fn of(attrs: &Attrs, opset: i64, upsample: bool) -> Result<Method, OpError> {
        let old = upsample || opset < 11;
        let wrong = |name: &str, found: &str| OpError::invalid(format!("{name} is {found:?}"));
        let mode = match attrs.str("mode").unwrap_or("nearest") {
            "nearest" => Mode::Nearest,
            "linear" | "bilinear" => Mode::Linear,
            "cubic" if !old => Mode::Cubic,
            other => return Err(wrong("mode", other)),
        };
        let nearest = match attrs.str("nearest_mode").unwrap_or("round_prefer_floor") {
            _ if old => Nearest::Old,
            "round_prefer_floor" => Nearest::PreferFloor,
            "round_prefer_ceil" => Nearest::PreferCeil,
            "floor" => Nearest::Floor,
            "ceil" => Nearest::Ceil,
            other => return Err(wrong("nearest_mode", other)),
        };
        let transform = match attrs.str("coordinate_transformation_mode").unwrap_or("half_pixel") {
            _ if old => Transform::Asymmetric,
            "half_pixel" => Transform::HalfPixel,
            "half_pixel_symmetric" => Transform::HalfPixelSymmetric,
            "pytorch_half_pixel" => Transform::PytorchHalfPixel,
            "align_corners" => Transform::AlignCorners,
            "asymmetric" => Transform::Asymmetric,
            "tf_crop_and_resize" => Transform::Crop,
            // A mode of opset 11 only: half pixels for nearest.
            "tf_half_pixel_for_nn" => Transform::HalfPixel,
            other => return Err(wrong("coordinate_transformation_mode", other)),
        };
        let flag = |name| attrs.int(name).unwrap_or(0) != 0;
        if flag("antialias") && mode == Mode::Nearest {
            return Err(OpError::invalid("antialias has no meaning for the mode nearest"));
        }
        Ok(Method {
            mode,
            nearest,
            transform,
            antialias: flag("antialias"),
            exclude_outside: flag("exclude_outside"),
            cubic: attrs.float("cubic_coeff_a").unwrap_or(-0.75).into(),
        })
    }

    /// The coordinate on the operand of place `i` of the result.
    fn coordinate(&self, a: &Axis, i: usize) -> f32 {
        let (i, last) = (i as f32, a.input as f32 - 1.0);
        match self.transform {
            Transform::HalfPixel => (i + 0.5) / a.scale - 0.5,
            Transform::HalfPixelSymmetric => {
                let shift = a.input as f32 / 2.0 * (1.0 - a.size as f32 / a.length);
                shift + (i + 0.5) / a.scale - 0.5
            }
            Transform::PytorchHalfPixel if a.size > 1 => (i + 0.5) / a.scale - 0.5,
            Transform::PytorchHalfPixel => 0.0,
            Transform::AlignCorners if a.length == 1.0 => 0.0,
            Transform::AlignCorners => i * last / (a.length - 1.0),
            Transform::Asymmetric => i / a.scale,
            Transform::Crop if a.length == 1.0 => 0.5 * (a.roi.0 + a.roi.1) * last,
            Transform::Crop => a.roi.0 * last + i * (a.roi.1 - a.roi.0) * last / (a.length - 1.0),
        }
    }

    /// The places of the operand that place `i` of the result is made of, with their weights. `None` lies outside of
    /// what is cropped.
    fn weights(&self, a: &Axis, i: usize) -> Option<Vec<(usize, f64)>> {
        let x = self.coordinate(a, i);
        let last = a.input - 1;
        if self.transform == Transform::Crop && (x < 0.0 || x > last as f32) {
            return None;
        }
        let inside = |p: f32| p.clamp(0.0, last as f32) as usize;
        let (reach, kernel): (f64, &dyn Fn(f64) -> f64) = match self.mode {
            Mode::Nearest => {
                let place = match self.nearest {
                    Nearest::PreferFloor => (x - 0.5).ceil(),
                    Nearest::PreferCeil => (x + 0.5).floor(),
                    Nearest::Ceil => x.ceil(),
                    Nearest::Old if a.scale < 1.0 => x.ceil(),
                    Nearest::Floor | Nearest::Old => x.floor(),
                };
                return Some(vec![(inside(place), 1.0)]);
            }
            Mode::Linear => (1.0, &|d| (1.0 - d).max(0.0)),
            Mode::Cubic => (2.0, &|d| cubic(d, self.cubic)),
        };
        // Smoothing stretches the kernel over all places that fall together.
        let squeeze = if self.antialias { f64::from(a.scale).min(1.0) } else { 1.0 };
        let x = f64::from(x);
        let (from, to) = ((x - reach / squeeze).floor() as i64 + 1, (x + reach / squeeze).ceil() as i64);
        let mut weights: Vec<(i64, f64)> =
            (from..to).map(|p| (p, kernel((p as f64 - x).abs() * squeeze))).collect();
        if self.exclude_outside {
            weights.retain(|(p, _)| (0..=last as i64).contains(p));
        }
        let total: f64 = weights.iter().map(|(_, w)| w).sum();
        let total = if total == 0.0 { 1.0 } else { total };
        Some(weights.into_iter().map(|(p, w)| (p.clamp(0, last as i64) as usize, w / total)).collect())
    }
}

/// Keys' cubic convolution kernel at distance `d`, with coefficient `a`.
pub(crate) fn cubic(d: f64, a: f64) -> f64 {
    match d {
        d if d <= 1.0 => ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0,
        d if d < 2.0 => ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a,
        _ => 0.0,
    }
}

/// One dim that is resampled.
#[derive(Clone, Copy)]
struct Axis {
    dim: usize,
    /// Places of the operand and of the result.
    input: usize,
    size: usize,
    scale: f32,
    /// The result's length, which scales may make a fraction.
    length: f32,
    /// The part of the operand that is read, in parts of its length.
    roi: (f32, f32),
}

/// What says how large the result is.
enum Target<'a> {
    Scales(Cow<'a, [f32]>),
    Sizes(Vec<usize>),
}

/// The dims that are resampled, of an operand of this shape.
fn plan(attrs: &Attrs, shape: &[usize], target: &Target, roi: Option<&[f32]>) -> Result<Vec<Axis>, OpError> {
    let along = match attrs.ints("axes") {
        Some(v) => axes(v, shape.len())?,
        None => (0..shape.len()).collect(),
    };
    let wrong = |what: &str, n: usize| OpError::invalid(format!("{n} {what} for {} dims", along.len()));
    if let Some(roi) = roi.filter(|r| r.len() != 2 * along.len()) {
        return Err(wrong("numbers in roi", roi.len()));
    }
    let ratio = |size: usize, input: usize| size as f32 / input as f32;
    let (scales, sizes): (Vec<f32>, Option<Vec<usize>>) = match target {
        Target::Scales(s) if s.len() != along.len() => return Err(wrong("scales", s.len())),
        Target::Sizes(s) if s.len() != along.len() => return Err(wrong("sizes", s.len())),
        Target::Scales(s) => (s.to_vec(), None),
        Target::Sizes(s) => {
            let own: Vec<f32> = s.iter().zip(&along).map(|(&n, &d)| ratio(n, shape[d])).collect();
            let shared = match attrs.str("keep_aspect_ratio_policy").unwrap_or("stretch") {
                "stretch" => None,
                "not_larger" => Some(own.iter().copied().fold(f32::INFINITY, f32::min)),
                "not_smaller" => Some(own.iter().copied().fold(0.0, f32::max)),
                other => return Err(OpError::invalid(format!("keep_aspect_ratio_policy is {other:?}"))),
            };
            match shared {
                None => (own, Some(s.clone())),
                Some(scale) => {
                    let round = |&d: &usize| (shape[d] as f32 * scale + 0.5).floor() as usize;
                    (vec![scale; along.len()], Some(along.iter().map(round).collect()))
                }
            }
        }
    };
    let mut out = Vec::new();
    for (j, &dim) in along.iter().enumerate() {
        let (input, scale) = (shape[dim], scales[j]);
        if !(scale > 0.0 && scale.is_finite()) && input > 0 {
            return Err(OpError::invalid(format!("dim {dim} of {input} is scaled by {scale}")));
        }
        let length = sizes.as_ref().map_or(input as f32 * scale, |s| s[j] as f32);
        let size = length.floor() as usize;
        let roi = roi.map_or((0.0, 1.0), |r| (r[j], r[along.len() + j]));
        if size == input && (scale - 1.0).abs() < 1e-6 && roi == (0.0, 1.0) {
            continue;
        }
        if size > MAX_SIZE {
            return Err(OpError::Unsupported(format!("dim {dim} of {input} resized to {size}")));
        }
        if input == 0 && size > 0 {
            return Err(OpError::invalid(format!("dim {dim} is empty and is to become {size} long")));
        }
        out.push(Axis { dim, input, size, scale, length, roi });
    }
    Ok(out)
}

fn infer(cx: &InferCx, scales_at: usize) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    let Some(dims) = cx.dims(0) else { return util::one(Some(elem), None) };
    let along = match cx.attrs.ints("axes") {
        Some(v) => axes(v, dims.len())?,
        None => (0..dims.len()).collect(),
    };
    let mut out = dims.to_vec();
    let stretch = cx.attrs.str("keep_aspect_ratio_policy").is_none_or(|p| p == "stretch");
    let scales = cx.attrs.floats("scales").map(Cow::Borrowed).or(constant(cx, scales_at).map(Cow::Owned));
    let target = match (cx.sym(3), scales) {
        (Some(s), _) if !s.is_empty() && stretch && s.len() == along.len() => {
            along.iter().zip(s).for_each(|(&d, s)| out[d] = s.clone());
            if let (Some(sizes), Some(shape)) = (cx.ints(3), util::known_shape(cx, 0)) {
                plan(cx.attrs, &shape, &Target::Sizes(shape_of(&sizes)?), None)?;
            }
            return util::one(Some(elem), Some(out));
        }
        (Some(s), _) if !s.is_empty() => cx.ints(3).map(|s| shape_of(&s).map(Target::Sizes)).transpose()?,
        (_, Some(s)) if !s.is_empty() => Some(Target::Scales(s)),
        _ => None,
    };
    along.iter().for_each(|&d| out[d] = Dim::Unknown);
    match (target, util::known_shape(cx, 0)) {
        (Some(target), Some(shape)) => {
            along.iter().for_each(|&d| out[d] = dims[d].clone());
            plan(cx.attrs, &shape, &target, None)?.iter().for_each(|a| out[a.dim] = Dim::from(a.size));
        }
        // A dim that is not scaled stays what it is, known or not.
        (Some(Target::Scales(s)), None) if s.len() == along.len() => {
            along
                .iter()
                .zip(s.iter())
                .filter(|(_, s)| **s == 1.0)
                .for_each(|(&d, _)| out[d] = dims[d].clone());
        }
        _ => {}
    }
    util::one(Some(elem), Some(out))
}

/// The floats of operand `i`, if it is a constant.
fn constant(cx: &InferCx, i: usize) -> Option<Vec<f32>> {
    let data = &cx.consts[cx.fact(i)?.konst?];
    // Scales are one per dim: anything longer is wrong, and not read.
    let t = (data.count() <= 64).then(|| Tensor::from_const(data).ok()).flatten()?;
    Some(t.to_f32().ok()?.into_owned())
}

fn eval(cx: &EvalCx, upsample: bool) -> Evaluated {
    let t = cx.input(0)?;
    let method = Method::of(cx.attrs, cx.opset, upsample)?;
    let old = upsample || cx.opset < 11;
    // Operands before and after the region were given as empty tensors until they could be left out.
    let given = |i: usize| Ok::<_, OpError>(cx.opt(i)?.filter(|t| !t.is_empty()));
    let scales = match (cx.attrs.floats("scales"), given(if old { 1 } else { 2 })?) {
        (Some(v), _) => Some(Cow::Borrowed(v)),
        (None, t) => t.map(Tensor::to_f32).transpose()?,
    };
    let sizes = if old { None } else { given(3)? };
    let target = match (scales, sizes) {
        (Some(s), None) => Target::Scales(s),
        (None, Some(s)) => Target::Sizes(shape_of(&s.to_i64()?)?),
        (None, None) => return Err(OpError::invalid("neither scales nor sizes are given")),
        (Some(_), Some(_)) => return Err(OpError::invalid("both scales and sizes are given")),
    };
    let roi = match method.transform {
        Transform::Crop => {
            let roi = given(1)?.ok_or_else(|| OpError::invalid("tf_crop_and_resize needs roi"))?;
            Some(roi.to_f32()?)
        }
        _ => None,
    };
    let plan = plan(cx.attrs, t.shape(), &target, roi.as_deref())?;
    let mut shape = t.shape().to_vec();
    strided::count(&shape)?;
    for a in &plan {
        shape[a.dim] = a.size;
        // Every step on the way, not only the result, must be small enough.
        strided::count(&shape)?;
    }
    if shape.contains(&0) {
        return util::moved(t, &shape, crate::map_data!(t.data(), _v => Vec::new()));
    }
    let outside = cx.float_or("extrapolation_value", 0.0);
    if method.mode == Mode::Nearest {
        let mut maps: Vec<Vec<Option<usize>>> =
            t.shape().iter().map(|&n| (0..n).map(Some).collect()).collect();
        for a in &plan {
            maps[a.dim] = (0..a.size).map(|i| method.weights(a, i).map(|w| w[0].0)).collect();
        }
        let value = match method.transform {
            Transform::Crop => Some(super::cast::convert(&Tensor::scalar(outside), t.elem(), true)?),
            _ => None,
        };
        return placed(t, &maps, value.as_ref());
    }
    if t.elem().is_float() {
        return cx.one(with_real!(t, T => resample::<T>(t, &method, &plan, outside.into())?));
    }
    // Integers are resampled as numbers and rounded.
    let numbers = super::cast::convert(t, Elem::F64, true)?;
    let y = resample::<f64>(&numbers, &method, &plan, outside.into())?;
    let rounded = strided::map(&f64::values(&y)?, |v| v.round_ties_even());
    cx.one(super::cast::convert(&Tensor::new(y.shape(), rounded)?, t.elem(), true)?)
}

fn resample<T: Real>(t: &Tensor, method: &Method, plan: &[Axis], outside: f64) -> Result<Tensor, OpError> {
    let mut shape = t.shape().to_vec();
    let mut x = T::values(t)?;
    for a in plan {
        let weights: Vec<Option<Vec<(usize, T)>>> = (0..a.size)
            .map(|i| Some(method.weights(a, i)?.into_iter().map(|(p, w)| (p, T::of(w))).collect()))
            .collect();
        let inner: usize = shape[a.dim + 1..].iter().product();
        shape[a.dim] = a.size;
        let read = |at: usize| {
            let (outer, i, rest) = (at / inner / a.size, at / inner % a.size, at % inner);
            match &weights[i] {
                Some(w) => w.iter().map(|&(p, w)| x[(outer * a.input + p) * inner + rest] * w).sum(),
                None => T::of(outside),
            }
        };
        let y = strided::build(strided::count(&shape)?, |start, out| {
            out.iter_mut().enumerate().for_each(|(i, y)| *y = read(start + i));
        });
        x = Cow::Owned(y);
    }
    Ok(T::tensor(t.elem(), &shape, x.into_owned())?)
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("resize");
    }

    fn resize(attrs: &[(&str, Attr)], scales: &[f32], sizes: &[i64]) -> Case {
        let x = Tensor::new(&[1, 1, 4, 4], vec![0f32; 16]).unwrap();
        let scales = (!scales.is_empty()).then(|| Tensor::new(&[scales.len()], scales.to_vec()).unwrap());
        let sizes = (!sizes.is_empty()).then(|| Tensor::new(&[sizes.len()], sizes.to_vec()).unwrap());
        Case::new("onnx.Resize", 19, attrs, vec![Some(x), None, scales, sizes])
    }

    #[test]
    fn absurd_sizes_are_refused_before_anything_is_allocated() {
        for scales in [[1.0, 1.0, 1e9, 1.0], [1.0, 1.0, 1e9, 1e9], [1.0, 1e9, 1e9, 1e9], [1.0, 1.0, 1e6, 1e6]]
        {
            assert!(resize(&[], &scales, &[]).eval(false).is_err(), "{scales:?}");
            assert!(resize(&[("mode", "linear".into())], &scales, &[]).eval(false).is_err(), "{scales:?}");
        }
        refused(&resize(&[], &[], &[1, 1, 4, i64::MAX]), "resized to");
        refused(&resize(&[], &[], &[1, 1, 4, -1]), "negative size");
    }

    #[test]
    fn wrong_attributes_and_operands_are_refused() {
        refused(&resize(&[("mode", "quintic".into())], &[1.0; 4], &[]), "mode is \"quintic\"");
        refused(&resize(&[("nearest_mode", "any".into())], &[1.0; 4], &[]), "nearest_mode is");
        refused(&resize(&[("coordinate_transformation_mode", "x".into())], &[1.0; 4], &[]), "coordinate_");
        refused(&resize(&[("antialias", 1.into())], &[1.0; 4], &[]), "antialias");
        refused(&resize(&[], &[], &[1, 2]), "2 sizes for 4 dims");
        refused(&resize(&[("axes", vec![2, 2].into())], &[], &[5, 5]), "given twice");
        refused(&resize(&[("axes", vec![4].into())], &[], &[5]), "out of range");
        let bad: [(&[f32], &[i64]); 5] = [
            (&[], &[]),
            (&[1.0; 4], &[1; 4]),
            (&[1.0, 1.0, 0.0, 1.0], &[]),
            (&[1.0, 1.0, f32::NAN, 1.0], &[]),
            (&[2.0], &[]),
        ];
        for (scales, sizes) in bad {
            assert!(resize(&[], scales, sizes).eval(false).is_err(), "{scales:?} {sizes:?}");
        }
        let crop = [("coordinate_transformation_mode", "tf_crop_and_resize".into())];
        assert!(resize(&crop, &[1.0; 4], &[]).eval(false).is_err());
    }
}
