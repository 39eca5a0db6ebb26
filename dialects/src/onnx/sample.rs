//! Ops that read images at real coordinates: GridSample, RoiAlign, MaxRoiPool and DeformConv.
//!
//! A point is a product of taps, dim by dim: places with weights. What lies outside adds nothing.

use super::conv::{self, Conv};
use super::util::{self, wrong_elem};
use crate::ir::{Attrs, Dim, Elem, Type};
use crate::kernels::real::{Real, with_real};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.GridSample",
        operands: (2, 2),
        infer: infer_grid,
        verify: |cx| Sampler::of(cx.attrs).map(|_| ()),
        eval: eval_grid,
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.RoiAlign",
        operands: (3, 3),
        infer: |cx| {
            let sizes = aligned_sizes(cx.attrs)?;
            infer_rois(cx, sizes)
        },
        verify: |cx| aligned_how(cx.attrs, cx.opset).map(|_| ()),
        eval: |cx| with_real!(cx.input(0)?, T => eval_align::<T>(cx)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.MaxRoiPool",
        operands: (2, 2),
        infer: |cx| infer_rois(cx, pooled_sizes(cx.attrs)?),
        eval: |cx| with_real!(cx.input(0)?, T => eval_roi_pool::<T>(cx)),
        ..OpDef::NEW
    },
    OpDef {
        name: "onnx.DeformConv",
        operands: (3, 5),
        infer: |cx| conv::infer(cx, 0, 1, cx.elem(0)),
        eval: |cx| with_real!(cx.input(0)?, T => eval_deform::<T>(cx)),
        ..OpDef::NEW
    },
];

/// The sum over all combinations of one tap per dim: their weights' product times the element of `x` there.
fn read<T: Real>(x: &[T], sizes: &[usize], taps: &[Vec<(usize, T)>]) -> T {
    fn go<T: Real>(x: &[T], sizes: &[usize], taps: &[Vec<(usize, T)>], base: usize) -> T {
        match (taps, sizes) {
            ([first, rest @ ..], [n, sizes @ ..]) => {
                first.iter().map(|&(at, w)| w * go(x, sizes, rest, base * n + at)).sum()
            }
            _ => x[base],
        }
    }
    go(x, sizes, taps, 0)
}

/// The two places around coordinate `x` of `n` places, with their linear weights.
fn linear<T: Real>(x: T, n: usize) -> Vec<(usize, T)> {
    let low = x.floor();
    let weigh = |place: T, w: T| Some((place.to_usize().filter(|&p| p < n)?, w));
    [weigh(low, low + T::one() - x), weigh(low + T::one(), x - low)].into_iter().flatten().collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

#[derive(Clone, Copy, PartialEq)]
enum Padding {
    Zeros,
    Border,
    Reflection,
}

/// What the attributes of GridSample say.
struct Sampler {
    mode: Mode,
    padding: Padding,
    corners: bool,
}

impl Sampler {
    fn of(attrs: &Attrs) -> Result<Sampler, OpError> {
        let mode = match attrs.str("mode").unwrap_or("linear") {
            "nearest" => Mode::Nearest,
            "linear" | "bilinear" => Mode::Linear,
            "cubic" | "bicubic" => Mode::Cubic,
            other => return Err(OpError::invalid(format!("mode is {other:?}"))),
        };
        let padding = match attrs.str("padding_mode").unwrap_or("zeros") {
            "zeros" => Padding::Zeros,
            "border" => Padding::Border,
            "reflection" => Padding::Reflection,
            other => return Err(OpError::invalid(format!("padding_mode is {other:?}"))),
        };
        Ok(Sampler { mode, padding, corners: attrs.int("align_corners").unwrap_or(0) != 0 })
    }

    /// The taps along a dim of `n` places for a grid coordinate, which is -1 at its beginning and 1 at its end.
    fn taps<T: Real>(&self, at: T, n: usize) -> Vec<(usize, T)> {
        let (size, half) = (T::of(n as f64), T::of(0.5));
        let (first, last) = match self.corners {
            true => (T::zero(), size - T::one()),
            false => (-half, size - half),
        };
        let mut x = match self.corners {
            true => (at + T::one()) * half * (size - T::one()),
            false => ((at + T::one()) * size - T::one()) * half,
        };
        if self.mode == Mode::Nearest {
            x = round_ties_even(x);
        }
        if x < first || x > last {
            x = match self.padding {
                Padding::Zeros => x,
                // A curve runs on through the border's copies, as every runtime has it.
                Padding::Border if self.mode == Mode::Cubic => x,
                Padding::Border => x.max(T::zero()).min(size - T::one()),
                Padding::Reflection => reflect(x, first, last),
            };
        }
        let low = x.floor();
        let weights: Vec<(f64, T)> = match self.mode {
            Mode::Nearest => vec![(0.0, T::one())],
            Mode::Linear => vec![(0.0, low + T::one() - x), (1.0, x - low)],
            Mode::Cubic => {
                let away = |p: f64| (low + T::of(p) - x).abs().to_f64().unwrap_or(2.0);
                let weigh = |p: f64| (p, T::of(super::resize::cubic(away(p), -0.75)));
                [-1.0, 0.0, 1.0, 2.0].map(weigh).to_vec()
            }
        };
        let place = |p: T| match self.padding {
            Padding::Zeros => p.to_usize().filter(|&p| p < n),
            Padding::Border => p.max(T::zero()).min(size - T::one()).to_usize(),
            Padding::Reflection if p < first || p > last => {
                reflect(p, first, last).to_usize().map(|p| p.min(n - 1))
            }
            Padding::Reflection => p.to_usize(),
        };
        weights.into_iter().filter_map(|(p, w)| Some((place(low + T::of(p))?, w))).collect()
    }
}

fn round_ties_even<T: Real>(x: T) -> T {
    let round = x.round();
    let tie = (x - x.trunc()).abs() == T::of(0.5);
    if tie && round % T::of(2.0) != T::zero() { round - x.signum() } else { round }
}

/// `x` mirrored at `first` and `last` until it is between them.
fn reflect<T: Real>(x: T, first: T, last: T) -> T {
    let range = last - first;
    // A single place has nothing to mirror.
    if range <= T::zero() || !x.is_finite() {
        return first.max(T::zero());
    }
    let (away, inwards) = if x < first { (first - x, true) } else { (x - last, false) };
    let turns = (away / range).trunc();
    let rest = away - turns * range;
    match (turns % T::of(2.0) == T::zero()) == inwards {
        true => first + rest,
        false => last - rest,
    }
}

fn infer_grid(cx: &InferCx) -> Inferred {
    let elem = cx.elem(0);
    let (Some(x), Some(grid)) = (cx.dims(0), cx.dims(1)) else { return util::one(elem, None) };
    let ([batch, channels, spatial @ ..], [own, places @ .., last]) = (x, grid) else {
        return Err(OpError::invalid(format!("X is {} and the grid is {}", cx.ty(0), cx.ty(1))));
    };
    let fits = spatial.len() == places.len() && last.unify(&Dim::from(spatial.len())).is_some();
    let batch = batch.unify(own).filter(|_| fits);
    let batch =
        batch.ok_or_else(|| OpError::invalid(format!("X is {} and the grid is {}", cx.ty(0), cx.ty(1))))?;
    util::one(elem, Some([batch, channels.clone()].into_iter().chain(places.iter().cloned()).collect()))
}

fn eval_grid(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    match t.elem() {
        e if e.is_float() => with_real!(t, T => cx.one(sample_grid::<T>(cx, t)?)),
        // Integers are interpolated as numbers, and keep their whole part.
        e if e.is_int() || e == Elem::Bool => {
            let numbers = super::cast::convert(t, Elem::F64, true)?;
            cx.one(super::cast::convert(&sample_grid::<f64>(cx, &numbers)?, e, true)?)
        }
        _ => Err(wrong_elem("a numeric type", t)),
    }
}

fn sample_grid<T: Real>(cx: &EvalCx, x: &Tensor) -> Result<Tensor, OpError> {
    let grid = cx.input(1)?;
    let sampler = Sampler::of(cx.attrs)?;
    let wrong = || OpError::invalid(format!("X has shape {:?} and the grid {:?}", x.shape(), grid.shape()));
    let (&[batch, channels, ref spatial @ ..], &[own, ref places @ .., last]) = (x.shape(), grid.shape())
    else {
        return Err(wrong());
    };
    let rank = spatial.len();
    if batch != own || places.len() != rank || last != rank {
        return Err(wrong());
    }
    let shape: Vec<usize> = [batch, channels].into_iter().chain(places.iter().copied()).collect();
    let mut y = vec![T::zero(); strided::count(&shape)?];
    let (values, at) = (T::values(x)?, T::values(grid)?);
    let (cells, points): (usize, usize) = (spatial.iter().product(), places.iter().product());
    if cells == 0 && !y.is_empty() {
        return Err(OpError::invalid(format!("X of shape {:?} has nothing to sample", x.shape())));
    }
    if !y.is_empty() {
        // A task: some points of one image, in all its channels.
        y.par_chunks_mut(channels * points).enumerate().for_each(|(n, y)| {
            let point = |p: usize| -> Vec<T> {
                let at = &at[(n * points + p) * rank..][..rank];
                // A location names the innermost dim first.
                let taps: Vec<_> =
                    spatial.iter().zip(at.iter().rev()).map(|(&n, &at)| sampler.taps(at, n)).collect();
                let channel = |c: usize| read(&values[(n * channels + c) * cells..][..cells], spatial, &taps);
                (0..channels).map(channel).collect()
            };
            let read: Vec<Vec<T>> = (0..points).into_par_iter().map(point).collect();
            for (p, channels) in read.iter().enumerate() {
                channels.iter().enumerate().for_each(|(c, &v)| y[c * points + p] = v);
            }
        });
    }
    Ok(T::tensor(x.elem(), &shape, y)?)
}

fn size(attrs: &Attrs, name: &str) -> Result<usize, OpError> {
    let n = attrs.int(name).unwrap_or(1);
    usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| OpError::invalid(format!("{name} is {n}")))
}

fn aligned_sizes(attrs: &Attrs) -> Result<[usize; 2], OpError> {
    Ok([size(attrs, "output_height")?, size(attrs, "output_width")?])
}

fn pooled_sizes(attrs: &Attrs) -> Result<[usize; 2], OpError> {
    let given = attrs.ints("pooled_shape").ok_or_else(|| OpError::invalid("pooled_shape is missing"))?;
    match util::shape_of(given)?[..] {
        [h, w] if h > 0 && w > 0 => Ok([h, w]),
        _ => Err(OpError::invalid(format!("pooled_shape is {given:?}, expected a height and a width"))),
    }
}

fn infer_rois(cx: &InferCx, sizes: [usize; 2]) -> Inferred {
    let Some(elem) = cx.elem(0) else { return Ok(Vec::new()) };
    for (i, rank) in [(0, 4), (1, 2)] {
        if cx.dims(i).is_some_and(|d| d.len() != rank) {
            return Err(OpError::invalid(format!("operand {i} is {}, expected {rank} dims", cx.ty(i))));
        }
    }
    let dim = |i: usize, d: usize| cx.dims(i).map_or(Dim::Unknown, |dims| dims[d].clone());
    let dims = [dim(1, 0), dim(0, 1), sizes[0].into(), sizes[1].into()];
    Ok(vec![Type::tensor(elem, dims).into()])
}

/// Images and regions of the two region ops, with `columns` numbers per region.
fn regions(cx: &EvalCx, columns: usize) -> Result<([usize; 4], usize), OpError> {
    let (x, rois) = (cx.input(0)?.shape(), cx.input(1)?.shape());
    match (x, rois) {
        (&[n, c, h, w], &[count, width]) if width == columns && (h > 0 && w > 0) => Ok(([n, c, h, w], count)),
        _ => {
            let message =
                format!("X has shape {x:?} and the regions {rois:?}, expected 4 dims and [n, {columns}]");
            Err(OpError::invalid(message))
        }
    }
}

/// Runs `f(region, image, channel, out)` for every region and channel.
fn each_region<T: Real>(
    shape: [usize; 4],
    images: &[usize],
    f: impl Fn(usize, usize, usize, &mut [T]) + Sync,
) -> Result<Vec<T>, OpError> {
    let mut y = vec![T::zero(); strided::count(&shape)?];
    let [_, channels, height, width] = shape;
    if !y.is_empty() {
        y.par_chunks_mut(height * width)
            .enumerate()
            .for_each(|(i, y)| f(i / channels, images[i / channels], i % channels, y));
    }
    Ok(y)
}

/// The image of each region, checked against their number.
fn images(numbers: &[i64], count: usize) -> Result<Vec<usize>, OpError> {
    let inside = |&n: &i64| {
        let n = usize::try_from(n).ok().filter(|&n| n < count);
        n.ok_or_else(|| {
            OpError::invalid(format!("a region lies in another image than the {count} there are"))
        })
    };
    numbers.iter().map(inside).collect()
}

/// Whether regions are shifted by half a pixel, and whether the largest of the samples counts, not the mean.
fn aligned_how(attrs: &Attrs, opset: i64) -> Result<(bool, bool), OpError> {
    let default = if opset < 16 { "output_half_pixel" } else { "half_pixel" };
    let shift = match attrs.str("coordinate_transformation_mode").unwrap_or(default) {
        "half_pixel" => true,
        "output_half_pixel" => false,
        other => return Err(OpError::invalid(format!("coordinate_transformation_mode is {other:?}"))),
    };
    match attrs.str("mode").unwrap_or("avg") {
        "avg" => Ok((shift, false)),
        "max" => Ok((shift, true)),
        other => Err(OpError::invalid(format!("mode is {other:?}, expected avg or max"))),
    }
}

fn eval_align<T: Real>(cx: &EvalCx) -> Evaluated {
    let (x, rois) = (cx.input(0)?, cx.input(1)?);
    let ([batch, channels, height, width], count) = regions(cx, 4)?;
    let (shift, largest) = aligned_how(cx.attrs, cx.opset)?;
    let sizes = aligned_sizes(cx.attrs)?;
    let images = images(&cx.input(2)?.to_i64()?, batch)?;
    if images.len() != count {
        return Err(OpError::invalid(format!("{} batch indices for {count} regions", images.len())));
    }
    let ratio = usize::try_from(cx.int_or("sampling_ratio", 0))
        .map_err(|_| OpError::invalid("sampling_ratio < 0"))?;
    let (scale, half) =
        (T::of(cx.float_or("spatial_scale", 1.0).into()), T::of(if shift { 0.5 } else { 0.0 }));
    let (values, rois) = (T::values(x)?, T::values(rois)?);
    // Begin, size of a bin and samples in it, for rows and for columns.
    let grid = |r: usize| -> Result<[(T, T, usize); 2], OpError> {
        let along = |begin: usize, bins: usize| {
            let at = |i: usize| rois[r * 4 + i] * scale - half;
            let length = at(begin + 2) - at(begin);
            // Regions smaller than a pixel are made one, where nothing is shifted.
            let length = if shift { length } else { length.max(T::one()) };
            let bin = length / T::of(bins as f64);
            let samples = if ratio > 0 { Some(ratio) } else { bin.ceil().max(T::zero()).to_usize() };
            let samples = samples.filter(|_| bin.is_finite());
            let samples =
                samples.ok_or_else(|| OpError::invalid(format!("region {r} has no finite size")))?;
            Ok::<_, OpError>((at(begin), bin, samples))
        };
        let (rows, columns) = (along(1, sizes[0])?, along(0, sizes[1])?);
        strided::count(&[rows.2, columns.2, sizes[0], sizes[1]])?;
        Ok([rows, columns])
    };
    let grids: Vec<_> = (0..count).map(grid).collect::<Result<_, _>>()?;
    // The places along one dim that sample `i` of bin `p` reads. Beyond a pixel outside there is nothing.
    let taps = |(begin, bin, samples): (T, T, usize), p: usize, i: usize, n: usize| -> Vec<(usize, T)> {
        let part = (T::of(i as f64) + T::of(0.5)) * bin / T::of(samples as f64);
        let at = begin + T::of(p as f64) * bin + part;
        if at < -T::one() || at > T::of(n as f64) || at.is_nan() {
            return Vec::new();
        }
        let at = at.max(T::zero()).min(T::of((n - 1) as f64));
        // Always two places, the last one twice at the border: a weight of zero counts where the largest does.
        let low = at.to_usize().unwrap_or(0);
        let part = at - T::of(low as f64);
        vec![(low, T::one() - part), ((low + 1).min(n - 1), part)]
    };
    let y = each_region([count, channels, sizes[0], sizes[1]], &images, |r, image, c, y| {
        let x = &values[(image * channels + c) * height * width..][..height * width];
        let [rows, columns] = grids[r];
        for (at, y) in y.iter_mut().enumerate() {
            let (mut sum, mut top) = (T::zero(), None);
            for i in 0..rows.2 {
                let down = taps(rows, at / sizes[1], i, height);
                for j in 0..columns.2 {
                    let across = taps(columns, at % sizes[1], j, width);
                    let parts = down
                        .iter()
                        .flat_map(|&(p, v)| across.iter().map(move |&(q, w)| x[p * width + q] * (v * w)));
                    if largest {
                        // The largest of the weighted neighbors, as every implementation has it.
                        let best = parts.reduce(T::max).unwrap_or_else(T::zero);
                        top = Some(top.map_or(best, |t: T| t.max(best)));
                    } else {
                        sum += parts.sum();
                    }
                }
            }
            *y = if largest {
                top.unwrap_or_else(T::zero)
            } else {
                sum / T::of((rows.2 * columns.2).max(1) as f64)
            };
        }
    })?;
    cx.one(T::tensor(x.elem(), &[count, channels, sizes[0], sizes[1]], y)?)
}

/// The largest element of each bin of each region, whose borders are rounded to whole pixels; zero for an empty bin.
fn eval_roi_pool<T: Real>(cx: &EvalCx) -> Evaluated {
    let (x, rois) = (cx.input(0)?, cx.input(1)?);
    let ([batch, channels, height, width], count) = regions(cx, 5)?;
    let sizes = pooled_sizes(cx.attrs)?;
    let scale = T::of(cx.float_or("spatial_scale", 1.0).into());
    let (values, rois) = (T::values(x)?, T::values(rois)?);
    let number = |r: usize| rois[r * 5].to_i64().unwrap_or(-1);
    let images = images(&(0..count).map(number).collect::<Vec<_>>(), batch)?;
    // The pixels from..to of bin `p` along one dim of `n`.
    let bin = |r: usize, dim: usize, p: usize, bins: usize, n: usize| {
        let at = |i: usize| (rois[r * 5 + i] * scale).round();
        let (begin, end) = (at(dim), at(dim + 2));
        let length = (end - begin + T::one()).max(T::one()) / T::of(bins as f64);
        let inside = |v: T| (v + begin).max(T::zero()).min(T::of(n as f64)).to_usize().unwrap_or(0);
        inside((T::of(p as f64) * length).floor())..inside((T::of((p + 1) as f64) * length).ceil())
    };
    let y = each_region([count, channels, sizes[0], sizes[1]], &images, |r, image, c, y| {
        let x = &values[(image * channels + c) * height * width..][..height * width];
        for (at, y) in y.iter_mut().enumerate() {
            let rows = bin(r, 2, at / sizes[1], sizes[0], height);
            let columns = bin(r, 1, at % sizes[1], sizes[1], width);
            let cells = rows.flat_map(|i| columns.clone().map(move |j| x[i * width + j]));
            *y = cells.reduce(T::max).unwrap_or_else(T::zero);
        }
    })?;
    cx.one(T::tensor(x.elem(), &[count, channels, sizes[0], sizes[1]], y)?)
}

/// A convolution whose windows read each of their cells where `offset` moves it, times `mask`.
fn eval_deform<T: Real>(cx: &EvalCx) -> Evaluated {
    let (x, w, offset) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let conv = Conv::of(cx.attrs, x.shape(), w.shape())?;
    let (s, channels) = (&conv.sliding, x.shape()[1]);
    let (rank, taps, positions, cells) = (s.input.len(), s.taps(), s.positions(), s.cells());
    let groups = conv::groups(cx.attrs, "offset_group")?;
    if !channels.is_multiple_of(groups) {
        return Err(OpError::invalid(format!("{channels} channels do not make {groups} groups of offsets")));
    }
    let moves = T::values(offset)?;
    let mask = cx.opt(4)?;
    let wanted = |planes: usize| [&[x.shape()[0], groups * planes], &s.output[..]].concat();
    for (t, planes) in [Some((offset, taps * rank)), mask.map(|m| (m, taps))].into_iter().flatten() {
        if t.shape() != wanted(planes) {
            let message = format!("offset or mask has shape {:?}, expected {:?}", t.shape(), wanted(planes));
            return Err(OpError::invalid(message));
        }
    }
    let mask = mask.map(T::values).transpose()?;
    let (values, bias) = (T::values(x)?, cx.opt(3)?.map(T::values).transpose()?);
    let y = conv.multiply(&T::values(w)?, bias.as_deref(), |n, g, from, width, columns| {
        let mut cell = vec![0; rank];
        let mut window = vec![0; rank];
        for (row, columns) in columns.chunks_exact_mut(width).enumerate() {
            let (c, tap) = (g * conv.depth + row / taps, row % taps);
            let image = &values[(n * channels + c) * cells..][..cells];
            // The planes of offsets and mask that this channel's cell `tap` reads.
            let plane = (n * groups + c / (channels / groups)) * taps + tap;
            super::window::unflatten(tap, &s.kernel, &mut cell);
            for (i, y) in columns.iter_mut().enumerate() {
                super::window::unflatten(from + i, &s.output, &mut window);
                let along = |d: usize| {
                    let at = (window[d] * s.strides[d] + cell[d] * s.dilations[d]) as f64 - s.begin[d] as f64;
                    linear(T::of(at) + moves[(plane * rank + d) * positions + from + i], s.input[d])
                };
                let taps: Vec<_> = (0..rank).map(along).collect();
                let weight = mask.as_ref().map_or(T::one(), |m| m[plane * positions + from + i]);
                *y = read(image, &s.input, &taps) * weight;
            }
        }
    })?;
    cx.one(T::tensor(x.elem(), &conv.shape(), y)?)
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("sample");
    }

    fn t(shape: &[usize]) -> Option<Tensor> {
        Some(Tensor::new(shape, vec![0.5f32; shape.iter().product()]).unwrap())
    }

    #[test]
    fn shapes_and_modes_that_do_not_fit_are_refused() {
        let grid = |x: &[usize], g: &[usize], attrs: &[(&str, Attr)]| {
            Case::new("onnx.GridSample", 22, attrs, vec![t(x), t(g)])
        };
        refused(&grid(&[1, 1, 3, 3], &[1, 2, 2, 3], &[]), "the grid");
        refused(&grid(&[1, 1, 3, 3], &[2, 2, 2, 2], &[]), "the grid");
        refused(&grid(&[1, 1, 3, 3], &[1, 2, 2], &[]), "the grid");
        refused(&grid(&[1, 1, 3, 3], &[1, 2, 2, 2], &[("mode", "area".into())]), "mode is \"area\"");
        refused(&grid(&[1, 1, 3, 3], &[1, 2, 2, 2], &[("padding_mode", "wrap".into())]), "padding_mode is");
        let deform = |offset: &[usize], attrs: &[(&str, Attr)]| {
            Case::new("onnx.DeformConv", 22, attrs, vec![t(&[1, 2, 3, 3]), t(&[1, 2, 2, 2]), t(offset)])
        };
        assert!(deform(&[1, 8, 2, 2], &[]).eval(false).is_ok());
        assert!(deform(&[1, 7, 2, 2], &[]).eval(false).is_err());
        assert!(deform(&[1, 8, 2, 3], &[]).eval(false).is_err());
        assert!(deform(&[1, 8, 2, 2], &[("offset_group", 3.into())]).eval(false).is_err());
    }

    #[test]
    fn regions_out_of_range_are_refused() {
        let align = |rois: Vec<f32>, image: i64, attrs: &[(&str, Attr)]| {
            let rois = Tensor::new(&[1, 4], rois).unwrap();
            let image = Tensor::new(&[1], vec![image]).unwrap();
            Case::new("onnx.RoiAlign", 16, attrs, vec![t(&[1, 1, 4, 4]), Some(rois), Some(image)])
        };
        assert!(align(vec![0.0, 0.0, 2.0, 2.0], 0, &[]).eval(false).is_ok());
        assert!(align(vec![0.0, 0.0, 2.0, 2.0], 1, &[]).eval(false).is_err());
        assert!(align(vec![0.0, 0.0, 1e30, 2.0], 0, &[]).eval(false).is_err());
        assert!(align(vec![0.0, 0.0, 1e8, 1e8], 0, &[]).eval(false).is_err());
        assert!(align(vec![0.0, 0.0, f32::NAN, 2.0], 0, &[]).eval(false).is_err());
        refused(&align(vec![0.0; 4], 0, &[("output_height", 0.into())]), "output_height is 0");
        refused(&align(vec![0.0; 4], 0, &[("mode", "sum".into())]), "mode is");
        let pool = |rois: &[usize], attrs: &[(&str, Attr)]| {
            Case::new("onnx.MaxRoiPool", 22, attrs, vec![t(&[1, 1, 4, 4]), t(rois)])
        };
        refused(&pool(&[1, 5], &[]), "pooled_shape is missing");
        assert!(pool(&[1, 4], &[("pooled_shape", vec![2, 2].into())]).eval(false).is_err());
        assert!(pool(&[1, 5], &[("pooled_shape", vec![1 << 31, 1 << 31].into())]).eval(false).is_err());
    }
}
