//! ConvTranspose and Col2Im: columns of windows added up where the windows lie on the image.
//!
//! Source: the ONNX operator specification; with `output_shape` the padding is what is too much, and its odd cell
//! stands before the image unless `auto_pad` is SAME_UPPER.

use super::conv::{groups, kernel_sizes};
use super::util::{self, shape_of};
use super::window::{Sliding, Window};
use crate::ir::{Attrs, Dim};
use crate::kernels::gemm::{self, Mat};
use crate::kernels::real::{Real, with_real};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[
    OpDef {
        name: "onnx.ConvTranspose",
        operands: (2, 3),
        infer,
        eval: |cx| with_real!(cx.input(0)?, T => eval::<T>(cx)),
        ..OpDef::NEW
    },
    OpDef { name: "onnx.Col2Im", operands: (3, 3), infer: infer_col2im, eval: eval_col2im, ..OpDef::NEW },
];

/// Input positions whose columns one task holds at a time.
const TILE: usize = 512;
/// Channels of the result that one task computes.
const CHANNELS: usize = 16;

/// What the attributes of a transposed convolution say.
struct Plan {
    window: Window,
    /// Cells added behind the result.
    extra: Vec<usize>,
    /// Sizes that are asked for.
    wanted: Option<Vec<usize>>,
}

impl Plan {
    fn of(attrs: &Attrs, kernel: &[usize]) -> Result<Plan, OpError> {
        let rank = kernel.len();
        let list = |name: &str| -> Result<Option<Vec<usize>>, OpError> {
            let Some(given) = attrs.ints(name) else { return Ok(None) };
            // Some exporters also give output_shape its batch and channels.
            let given = if name == "output_shape" && given.len() == rank + 2 { &given[2..] } else { given };
            let sizes = shape_of(given)?;
            match sizes.len() == rank && sizes.iter().all(|&n| n < 1 << 31) {
                true => Ok(Some(sizes)),
                false => Err(OpError::invalid(format!("{name} is {given:?} for {rank} spatial dims"))),
            }
        };
        let extra = list("output_padding")?.unwrap_or_else(|| vec![0; rank]);
        Ok(Plan { window: Window::of(attrs, kernel)?, extra, wanted: list("output_shape")? })
    }

    /// Size and begin of the result along dim `i` for `n` cells.
    fn along(&self, i: usize, n: usize) -> Result<(usize, usize), OpError> {
        self.window.transposed(i, n, self.extra[i], self.wanted.as_ref().map(|w| w[i]))
    }

    fn slide(&self, input: &[usize]) -> Result<Sliding, OpError> {
        let along = input.iter().enumerate().map(|(i, &n)| self.along(i, n));
        let (sizes, begin) = along.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        Ok(self.window.over(sizes, begin, input))
    }
}

fn infer(cx: &InferCx) -> Inferred {
    let kernel = kernel_sizes(cx, 1)?;
    let groups = groups(cx.attrs, "group")?;
    let elem = cx.elem(0).or(cx.elem(1));
    let Some(dims) = cx.dims(0) else { return util::one(elem, None) };
    let [batch, channels, spatial @ ..] = dims else {
        return Err(OpError::invalid(format!("X is {}, expected a batch and channels", cx.ty(0))));
    };
    let filters = match cx.dims(1) {
        None => Dim::Unknown,
        Some([own, per_group, kernel @ ..])
            if kernel.len() == spatial.len() && own.unify(channels).is_some() =>
        {
            per_group.mul(&Dim::from(groups))
        }
        Some(_) => return Err(OpError::invalid(format!("X is {} and W is {}", cx.ty(0), cx.ty(1)))),
    };
    let mut out = vec![batch.clone(), filters];
    match kernel {
        None => out.extend(spatial.iter().map(|_| Dim::Unknown)),
        Some(kernel) => {
            let plan = Plan::of(cx.attrs, &kernel)?;
            for (i, d) in spatial.iter().enumerate() {
                out.push(match (d.known().and_then(|n| usize::try_from(n).ok()), &plan.wanted) {
                    (Some(n), _) => Dim::from(plan.along(i, n)?.0),
                    (None, Some(wanted)) => Dim::from(wanted[i]),
                    (None, None) => Dim::Unknown,
                });
            }
        }
    }
    util::one(elem, Some(out))
}

fn eval<T: Real>(cx: &EvalCx) -> Evaluated {
    let (x, w) = (cx.input(0)?, cx.input(1)?);
    let groups = groups(cx.attrs, "group")?;
    let (&[batch, channels, ref input @ ..], &[own, per_group, ref kernel @ ..]) = (x.shape(), w.shape())
    else {
        return Err(OpError::invalid("expected X [N, C, ..] and W [C, M / group, ..]"));
    };
    if own != channels || !channels.is_multiple_of(groups) || kernel.len() != input.len() {
        let message = format!("W is {:?} and X is {:?} with {groups} groups", w.shape(), x.shape());
        return Err(OpError::invalid(message));
    }
    let s = Plan::of(cx.attrs, kernel)?.slide(input)?;
    let filters = strided::count(&[per_group, groups])?;
    let bias = cx.opt(2)?.map(T::values).transpose()?;
    if bias.as_ref().is_some_and(|b| b.len() != filters) {
        return Err(OpError::invalid(format!("the bias does not have {filters} elements")));
    }
    let shape: Vec<usize> = [batch, filters].into_iter().chain(s.input.iter().copied()).collect();
    let mut y = vec![T::zero(); strided::count(&shape)?];
    let (values, weights) = (T::values(x)?, T::values(w)?);
    let (cells, taps, positions, depth) = (s.cells(), s.taps(), s.positions(), channels / groups);
    let one = |n: usize, g: usize, first: usize, y: &mut [T]| {
        let image = Mat::new(&values[(n * groups + g) * depth * positions..], depth, positions);
        let kernels = Mat::new(&weights[g * depth * per_group * taps..], depth, per_group * taps);
        let count = y.len() / cells;
        let kernels = kernels.cols(first * taps, (first + count) * taps).t();
        for from in (0..positions).step_by(TILE) {
            let width = TILE.min(positions - from);
            let mut columns = vec![T::zero(); count * taps * width];
            gemm::tile(kernels, image.cols(from, from + width), &mut columns);
            s.fold(&columns, from, width, y, |y, c| *y += c);
        }
        if let Some(bias) = &bias {
            for (y, &b) in y.chunks_exact_mut(cells).zip(&bias[g * per_group + first..]) {
                y.iter_mut().for_each(|y| *y += b);
            }
        }
    };
    if !y.is_empty() {
        y.par_chunks_mut(per_group * cells).enumerate().for_each(|(i, y)| {
            y.par_chunks_mut(CHANNELS * cells).enumerate().for_each(|(block, y)| {
                one(i / groups, i % groups, block * CHANNELS, y);
            });
        });
    }
    cx.one(T::tensor(x.elem(), &shape, y)?)
}

fn infer_col2im(cx: &InferCx) -> Inferred {
    let (image, block) = (cx.sym(1), cx.ints(2));
    let Some(image) = image else { return util::one(cx.elem(0), None) };
    let (batch, rows) = match cx.dims(0) {
        None => (Dim::Unknown, Dim::Unknown),
        Some([n, rows, _]) => (n.clone(), rows.clone()),
        Some(_) => return Err(OpError::invalid(format!("the columns are {}, expected 3 dims", cx.ty(0)))),
    };
    let taps = block.and_then(|b| b.iter().try_fold(1i64, |n, &k| n.checked_mul(k)));
    let channels = taps.map_or(Dim::Unknown, |t| rows.div(&Dim::Known(t)));
    util::one(cx.elem(0), Some([batch, channels].into_iter().chain(image.iter().cloned()).collect()))
}

fn eval_col2im(cx: &EvalCx) -> Evaluated {
    let t = cx.input(0)?;
    let (image, block) = (shape_of(&cx.input(1)?.to_i64()?)?, shape_of(&cx.input(2)?.to_i64()?)?);
    let &[batch, rows, positions] = t.shape() else {
        return Err(OpError::invalid(format!("the columns have shape {:?}, expected 3 dims", t.shape())));
    };
    let s = Window::of(cx.attrs, &block)?.slide(&image)?;
    let taps = strided::count(&block)?;
    if strided::count(&s.output)? != positions || !rows.is_multiple_of(taps) {
        let message =
            format!("{rows} rows and {positions} columns for blocks of {block:?} in an image of {image:?}");
        return Err(OpError::invalid(message));
    }
    let shape: Vec<usize> = [batch, rows / taps].into_iter().chain(image).collect();
    let count = strided::count(&shape)?;
    fn run<T: Copy + Default + Send + Sync>(
        x: &[T],
        count: usize,
        s: &Sliding,
        add: impl Fn(&mut T, T) + Sync,
    ) -> Vec<T> {
        let mut y = vec![T::default(); count];
        let (columns, cells) = (s.taps() * s.positions(), s.cells());
        if count > 0 && columns > 0 {
            y.par_chunks_mut(cells)
                .zip(x.par_chunks(columns))
                .for_each(|(y, x)| s.fold(x, 0, s.positions(), y, &add));
        }
        y
    }
    if t.elem().is_float() {
        return with_real!(t, T => {
            let y = run(&T::values(t)?, count, &s, |y, c| *y += c);
            cx.one(T::tensor(t.elem(), &shape, y)?)
        });
    }
    let y = run(&t.to_i64()?, count, &s, |y, c| *y = y.wrapping_add(c));
    cx.one(super::cast::convert(&Tensor::new(&shape, y)?, t.elem(), true)?)
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("conv_transpose");
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let t = |shape: &[usize]| Some(Tensor::new(shape, vec![0f32; shape.iter().product()]).unwrap());
        let case = |x: &[usize], w: &[usize], attrs: &[(&str, Attr)]| {
            Case::new("onnx.ConvTranspose", 22, attrs, vec![t(x), t(w)])
        };
        refused(&case(&[1, 4, 5], &[3, 2, 3], &[]), "X is");
        refused(&case(&[1, 4, 5], &[4, 2, 3], &[("pads", vec![4, 4].into())]), "leaves nothing of 7");
        refused(&case(&[1, 4, 5], &[4, 2, 3], &[("output_shape", vec![-1].into())]), "negative size");
        refused(&case(&[1, 4, 5], &[4, 2, 3], &[("output_shape", vec![9, 9].into())]), "for 1 spatial dims");
        refused(
            &case(&[1, 4, 5], &[4, 2, 3], &[("output_padding", vec![1 << 40].into())]),
            "for 1 spatial dims",
        );
        // A result that cannot be allocated.
        let huge = [("output_shape", vec![1 << 30, 1 << 30].into())];
        assert!(case(&[1, 1, 2, 2], &[1, 1, 1, 1], &huge).eval(false).is_err());
        let three = case(&[1, 5, 2], &[5, 1, 1], &[("group", 3.into())]);
        assert!(three.eval(false).is_err());
    }

    #[test]
    fn blocks_that_do_not_tile_the_image_are_refused() {
        let t = Tensor::new(&[1, 4, 5], vec![0f32; 20]).unwrap();
        let sizes = |v: [i64; 2]| Some(Tensor::new(&[2], v.to_vec()).unwrap());
        let case = |image, block| {
            Case::new("onnx.Col2Im", 18, &[], vec![Some(t.clone()), sizes(image), sizes(block)])
        };
        for (image, block) in
            [([3, 3], [2, 2]), ([5, 5], [1, 5]), ([1, 5], [3, 1]), ([-1, 5], [1, 1]), ([1, 5], [0, 1])]
        {
            assert!(case(image, block).eval(false).is_err(), "{image:?} {block:?}");
        }
    }
}
