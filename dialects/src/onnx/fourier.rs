//! DFT, STFT and MelWeightMatrix. Transforms are computed in double precision, whatever the float type.
//!
//! A tensor's last dim holds the real and the imaginary part, or the real part alone.

use super::util;
use crate::ir::{Attrs, Dim, Elem, Type};
use crate::kernels::real::Real;
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;
use rustfft::num_complex::Complex;
use rustfft::{Fft, FftPlanner};
use std::sync::Arc;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.DFT",
        operands: (1, 3),
        infer: infer_dft,
        verify: |cx| flags(cx.attrs, "onesided", 0).and(flags(cx.attrs, "inverse", 0)).map(|_| ()),
        eval: eval_dft,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.STFT",
        operands: (2, 4),
        infer: infer_stft,
        verify: |cx| flags(cx.attrs, "onesided", 1).map(|_| ()),
        eval: eval_stft,
        ..OpDef::NEW
    },
    OpDef { name: "onnx.MelWeightMatrix", operands: (5, 5), infer: infer_mel, eval: eval_mel, ..OpDef::NEW },
];

/// The attribute `name`, which is 0 or 1.
fn flags(attrs: &Attrs, name: &str, default: i64) -> Result<bool, OpError> {
    match attrs.int(name).unwrap_or(default) {
        0 => Ok(false),
        1 => Ok(true),
        n => Err(OpError::invalid(format!("{name} is {n}, expected 0 or 1"))),
    }
}

/// The number that operand `i` is.
fn number(t: &Tensor, name: &str) -> Result<i64, OpError> {
    match t.to_i64()?[..] {
        [n] => Ok(n),
        _ => Err(OpError::invalid(format!("{name} is {} numbers, expected one", t.len()))),
    }
}

/// The positive number that a tensor is.
fn length(t: &Tensor, name: &str) -> Result<usize, OpError> {
    let n = number(t, name)?;
    usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| OpError::invalid(format!("{name} is {n}")))
}

/// One transform along rows.
struct Transform {
    fft: Arc<dyn Fft<f64>>,
    inverse: bool,
    /// Whether a half of the spectrum stands for all of it.
    onesided: bool,
}

impl Transform {
    fn of(n: usize, inverse: bool, onesided: bool) -> Transform {
        let mut planner = FftPlanner::new();
        let fft = if inverse { planner.plan_fft_inverse(n) } else { planner.plan_fft_forward(n) };
        Transform { fft, inverse, onesided }
    }

    /// Transforms `row`, whose elements behind `given` are not set yet.
    fn run(&self, row: &mut [Complex<f64>], given: usize) {
        let n = row.len();
        let given = given.min(n);
        row[given..].fill(Complex::default());
        if self.inverse && self.onesided {
            // A real signal's spectrum: the half that is not given mirrors the one that is.
            row[n / 2 + 1..].fill(Complex::default());
            row[0].im = 0.0;
            (1..n.div_ceil(2)).for_each(|k| row[n - k] = row[k].conj());
            if n.is_multiple_of(2) {
                row[n / 2].im = 0.0;
            }
        }
        self.fft.process(row);
        if self.inverse {
            row.iter_mut().for_each(|v| *v /= n as f64);
        }
    }
}

/// A tensor's elements as complex numbers; the last dim is 1 or 2 long.
fn complex(t: &Tensor) -> Result<(Vec<usize>, Vec<Complex<f64>>), OpError> {
    let values = f64::values(t)?;
    match t.shape() {
        [dims @ .., 1] => Ok((dims.to_vec(), values.iter().map(|&re| Complex::new(re, 0.0)).collect())),
        [dims @ .., 2] => {
            Ok((dims.to_vec(), values.chunks_exact(2).map(|c| Complex::new(c[0], c[1])).collect()))
        }
        shape => Err(OpError::invalid(format!("the shape is {shape:?}, expected a last dim of 1 or 2"))),
    }
}

/// Which dim of `rank` is transformed: an attribute before opset 20, an operand since.
fn dft_axis(attrs: &Attrs, opset: i64, operand: Option<i64>, rank: usize) -> Result<usize, OpError> {
    let given = if opset < 20 { attrs.int("axis").unwrap_or(1) } else { operand.unwrap_or(-2) };
    match util::axis(given, rank)? {
        axis if axis + 1 < rank => Ok(axis),
        _ => Err(OpError::invalid(format!("axis {given} is the one of real and imaginary parts"))),
    }
}

fn infer_dft(cx: &InferCx) -> Inferred {
    let elem = cx.elem(0);
    let Some(dims) = cx.dims(0) else { return util::one(elem, None) };
    let (inverse, onesided) = (flags(cx.attrs, "inverse", 0)?, flags(cx.attrs, "onesided", 0)?);
    let mut out = dims.to_vec();
    if let Some(last) = out.last_mut() {
        *last = Dim::Known(if inverse && onesided { 1 } else { 2 });
    }
    let operand = cx.ints(2).and_then(|v| v.first().copied());
    if cx.opset >= 20 && cx.has(2) && operand.is_none() {
        let rank = dims.len();
        out.iter_mut().take(rank.saturating_sub(1)).for_each(|d| *d = Dim::Unknown);
        return util::one(elem, Some(out));
    }
    let axis = dft_axis(cx.attrs, cx.opset, operand, dims.len())?;
    let n = match (cx.has(1), cx.sym(1)) {
        (true, Some([n])) => n.clone(),
        (true, _) => Dim::Unknown,
        (false, _) if inverse && onesided => dims[axis].sub(&Dim::Known(1)).mul(&Dim::Known(2)),
        (false, _) => dims[axis].clone(),
    };
    out[axis] = if onesided && !inverse { n.div(&Dim::Known(2)).add(&Dim::Known(1)) } else { n };
    util::one(elem, Some(out))
}

fn eval_dft(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let (inverse, onesided) = (flags(cx.attrs, "inverse", 0)?, flags(cx.attrs, "onesided", 0)?);
    let operand = cx.opt(2)?.map(|a| number(a, "the axis")).transpose()?;
    let axis = dft_axis(cx.attrs, cx.opset, operand, t.rank())?;
    let (shape, x) = complex(t)?;
    if onesided && !inverse && t.shape().last() == Some(&2) {
        return Err(OpError::invalid("onesided needs a real signal, found a complex one"));
    }
    let own = shape[axis];
    let n = match cx.opt(1)? {
        Some(n) => length(n, "dft_length")?,
        None if inverse && onesided => 2 * own.saturating_sub(1),
        None => own,
    };
    let kept = if onesided && !inverse { n / 2 + 1 } else { n };
    let parts = if inverse && onesided { 1 } else { 2 };
    let mut to = shape.clone();
    to[axis] = kept;
    to.push(parts);
    let count = strided::count(&to)?;
    let (outer, inner): (usize, usize) = (shape[..axis].iter().product(), shape[axis + 1..].iter().product());
    if n == 0 && count + t.len() > 0 {
        return Err(OpError::invalid("a transform of no elements"));
    }
    let mut y = vec![0f64; count];
    if count > 0 {
        strided::count(&[rayon::current_num_threads(), n])?;
        let transform = Transform::of(n, inverse, onesided);
        let row = |o: usize, i: usize| {
            let mut row = vec![Complex::default(); n];
            (0..own.min(n)).for_each(|k| row[k] = x[(o * own + k) * inner + i]);
            transform.run(&mut row, own);
            row
        };
        y.par_chunks_mut(kept * inner * parts).enumerate().take(outer).for_each(|(o, y)| {
            for i in 0..inner {
                for (k, v) in row(o, i).into_iter().take(kept).enumerate() {
                    let at = (k * inner + i) * parts;
                    y[at] = v.re;
                    if parts == 2 {
                        y[at + 1] = v.im;
                    }
                }
            }
        });
    }
    cx.one(f64::tensor(t.elem(), &to, y)?)
}

/// Batch, signal length and parts of a signal's dims; the parts may be left out.
fn signal<D: Clone>(dims: &[D], one: D) -> Option<(D, D, D)> {
    match dims {
        [b, n, parts] => Some((b.clone(), n.clone(), parts.clone())),
        [b, n] => Some((b.clone(), n.clone(), one)),
        _ => None,
    }
}

fn infer_stft(cx: &InferCx) -> Inferred {
    let elem = cx.elem(0);
    let wrong =
        || OpError::invalid(format!("the signal is {}, expected a batch, a length and parts", cx.ty(0)));
    let (batch, n, _) = match cx.dims(0) {
        Some(dims) => signal(dims, Dim::Known(1)).ok_or_else(wrong)?,
        None => Default::default(),
    };
    let scalar = |i: usize| cx.sym(i).and_then(|s| s.first().cloned()).unwrap_or_default();
    let frame = match (cx.has(3), cx.has(2)) {
        (true, _) => scalar(3),
        (false, true) => cx.dims(2).and_then(|d| d.first().cloned()).unwrap_or_default(),
        (false, false) => n.clone(),
    };
    let frames = n.sub(&frame).div(&scalar(1)).add(&Dim::Known(1));
    // Sizes that do not fit are found when the signal is there.
    let frames = if frames.known().is_some_and(|f| f < 0) { Dim::Unknown } else { frames };
    let bins = match flags(cx.attrs, "onesided", 1)? {
        true => frame.div(&Dim::Known(2)).add(&Dim::Known(1)),
        false => frame,
    };
    util::one(elem, Some(vec![batch, frames, bins, Dim::Known(2)]))
}

fn eval_stft(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let wrong = || OpError::invalid(format!("the signal has shape {:?}", t.shape()));
    let (batch, n, parts) = signal(t.shape(), 1).ok_or_else(wrong)?;
    let step = length(cx.input(1)?, "frame_step")?;
    let window = cx.opt(2)?;
    let frame = match (cx.opt(3)?, window) {
        (Some(l), _) => length(l, "frame_length")?,
        (None, Some(w)) => w.len(),
        (None, None) => n,
    };
    if window.is_some_and(|w| w.shape() != [frame]) {
        let found = window.map(Tensor::shape).unwrap_or_default();
        return Err(OpError::invalid(format!("a window of shape {found:?} for frames of {frame}")));
    }
    let room = n.checked_sub(frame).filter(|_| frame > 0);
    let room = room.ok_or_else(|| OpError::invalid(format!("frames of {frame} in a signal of {n}")))?;
    let onesided = flags(cx.attrs, "onesided", 1)?;
    if onesided && parts == 2 && cx.attrs.int("onesided").is_some() {
        return Err(OpError::invalid("onesided needs a real signal, found a complex one"));
    }
    let (frames, bins) = (room / step + 1, if onesided { frame / 2 + 1 } else { frame });
    let shape = [batch, frames, bins, 2];
    let mut y = vec![0f64; strided::count(&shape)?];
    let (_, x) = complex(&t.reshape(&[batch, n, parts])?)?;
    let weights = window.map(f64::values).transpose()?;
    let transform = Transform::of(frame, false, onesided);
    if !y.is_empty() {
        y.par_chunks_mut(bins * 2).enumerate().for_each(|(i, y)| {
            let from = i / frames * n + i % frames * step;
            let mut row = x[from..from + frame].to_vec();
            if let Some(w) = &weights {
                row.iter_mut().zip(w.iter()).for_each(|(v, w)| *v *= w);
            }
            transform.run(&mut row, frame);
            for (y, v) in y.chunks_exact_mut(2).zip(row) {
                y.copy_from_slice(&[v.re, v.im]);
            }
        });
    }
    cx.one(f64::tensor(t.elem(), &shape, y)?)
}

fn mel_type(attrs: &Attrs) -> Result<Elem, OpError> {
    let code = attrs.int("output_datatype").unwrap_or(1);
    let elem = i32::try_from(code).ok().and_then(Elem::from_onnx).filter(|e| e.is_float() || e.is_int());
    elem.ok_or_else(|| OpError::invalid(format!("output_datatype {code} is no numeric type")))
}

fn infer_mel(cx: &InferCx) -> Inferred {
    let scalar = |i: usize| cx.sym(i).and_then(|s| s.first().cloned()).unwrap_or_default();
    let bins = scalar(1).div(&Dim::Known(2)).add(&Dim::Known(1));
    Ok(vec![Type::tensor(mel_type(cx.attrs)?, [bins, scalar(0)]).into()])
}

/// Triangles over the bins of a spectrum, evenly spaced on the mel scale, `mel(f) = 2595 log10(1 + f / 700)`. A
/// triangle's corners are rounded down to whole bins.
fn eval_mel(cx: &EvalCx) -> Evaluated {
    let elem = mel_type(cx.attrs)?;
    let (bands, n) = (length(cx.input(0)?, "num_mel_bins")?, length(cx.input(1)?, "dft_length")?);
    let rate = length(cx.input(2)?, "sample_rate")?;
    let edge = |i: usize| -> Result<f64, OpError> {
        match f64::values(cx.input(i)?)?[..] {
            [f] if f >= 0.0 && f.is_finite() => Ok(f),
            _ => Err(OpError::invalid(format!("operand {i} is no frequency"))),
        }
    };
    let bins = n / 2 + 1;
    let mut y = vec![0f64; strided::count(&[bins, bands])?];
    let mel = |f: f64| 2595.0 * (f / 700.0).ln_1p() / std::f64::consts::LN_10;
    let hertz = |m: f64| 700.0 * (m / 2595.0 * std::f64::consts::LN_10).exp_m1();
    let (low, high) = (mel(edge(3)?), mel(edge(4)?));
    let step = (high - low) / (bands + 2) as f64;
    let corner = |i: usize| -> Result<usize, OpError> {
        let f = hertz(low + i as f64 * step);
        let at = ((n + 1) as f64 * f / rate as f64).floor();
        let at = if at >= 0.0 && at < bins as f64 { Some(at as usize) } else { None };
        at.ok_or_else(|| {
            OpError::invalid(format!("{f} Hz lies outside of {bins} bins at {rate} samples a second"))
        })
    };
    for band in 0..bands {
        let [left, center, right] = [corner(band)?, corner(band + 1)?, corner(band + 2)?];
        let mut set = |bin: usize, v: f64| y[bin * bands + band] = v;
        if left == center {
            set(center, 1.0);
        }
        for bin in left..=center {
            if left < center {
                set(bin, (bin - left) as f64 / (center - left) as f64);
            }
        }
        for bin in center..right {
            set(bin, (right - bin) as f64 / (right - center) as f64);
        }
    }
    cx.one(super::cast::convert(&Tensor::new(&[bins, bands], y)?, elem, true)?)
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("fourier");
    }

    fn t(shape: &[usize]) -> Option<Tensor> {
        Some(Tensor::new(shape, vec![0.5f32; shape.iter().product()]).unwrap())
    }

    #[test]
    fn transforms_that_make_no_sense_are_refused() {
        let dft = |x: &[usize], n: Option<i64>, axis: Option<i64>, attrs: &[(&str, Attr)]| {
            Case::new("onnx.DFT", 20, attrs, vec![t(x), n.map(Tensor::scalar), axis.map(Tensor::scalar)])
        };
        refused(&dft(&[2, 4, 2], None, Some(2), &[]), "real and imaginary parts");
        refused(&dft(&[2, 4, 2], None, Some(-4), &[]), "out of range");
        refused(&dft(&[2, 4, 2], None, None, &[("inverse", 2.into())]), "inverse is 2");
        assert!(dft(&[2, 4, 3], None, None, &[]).eval(false).is_err());
        assert!(dft(&[2, 4, 2], None, None, &[("onesided", 1.into())]).eval(false).is_err());
        for n in [0, -3, 1 << 40, i64::MAX] {
            assert!(dft(&[2, 4, 1], Some(n), None, &[]).eval(false).is_err(), "{n}");
        }
        let stft = |x: &[usize], step: i64, frame: i64| {
            let operands = vec![t(x), Some(Tensor::scalar(step)), None, Some(Tensor::scalar(frame))];
            Case::new("onnx.STFT", 17, &[], operands).eval(false)
        };
        assert!(stft(&[1, 8, 1], 2, 4).is_ok());
        for (step, frame) in [(0, 4), (2, 9), (2, 0), (-1, 4)] {
            assert!(stft(&[1, 8, 1], step, frame).is_err(), "{step} {frame}");
        }
        let mel = |bands: i64, n: i64, low: f32, high: f32| {
            let sizes = [bands, n, 8000].map(|n| Some(Tensor::scalar(n)));
            let edges = [low, high].map(|f| Some(Tensor::scalar(f)));
            Case::new("onnx.MelWeightMatrix", 17, &[], sizes.into_iter().chain(edges).collect()).eval(false)
        };
        assert!(mel(8, 16, 0.0, 4000.0).is_ok());
        for (bands, n, low, high) in
            [(8, 16, 0.0, 40000.0), (0, 16, 0.0, 1.0), (1 << 40, 16, 0.0, 1.0), (8, 16, -1e9, 1.0)]
        {
            assert!(mel(bands, n, low, high).is_err(), "{bands} {n} {low} {high}");
        }
    }
}
