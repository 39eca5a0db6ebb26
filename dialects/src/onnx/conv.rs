//! Conv over any number of spatial dims: windows gathered into columns, tile by tile, and multiplied by the kernels.
//! What is here serves the other convolutions too: those of integers, and the deformable one.

use super::window::{Sliding, Window};
use crate::ir::{Attrs, Dim, Elem, Type};
use crate::kernels::gemm::{self, Mat};
use crate::kernels::real::{Real, with_real};
use crate::kernels::strided;
use crate::ops::{EvalCx, Evaluated, InferCx, Inferred, OpDef, OpError};
use rayon::prelude::*;

/// The ops of this file.
pub const OPS: &[OpDef] = &[OpDef {
    name: "onnx.Conv",
    operands: (2, 3),
    infer: |cx| infer(cx, 0, 1, cx.elem(0).or(cx.elem(1))),
    eval: |cx| with_real!(cx.input(0)?, T => eval::<T>(cx)),
    ..OpDef::NEW
}];

/// Output positions that one task computes.
const TILE: usize = 512;

/// The sizes of the kernels, which are operand `w`; an attribute that says otherwise is wrong.
pub(crate) fn kernel_sizes(cx: &InferCx, w: usize) -> Result<Option<Vec<usize>>, OpError> {
    let sizes = |d: &Dim| usize::try_from(d.known()?).ok();
    let own = cx.dims(w).and_then(|d| d.get(2..)?.iter().map(sizes).collect::<Option<Vec<usize>>>());
    check_kernel(cx.attrs, own.as_deref())?;
    let given = |k: &[i64]| k.iter().map(|&k| usize::try_from(k).ok()).collect();
    Ok(own.or(cx.attrs.ints("kernel_shape").and_then(given)))
}

fn check_kernel(attrs: &Attrs, kernel: Option<&[usize]>) -> Result<(), OpError> {
    match (attrs.ints("kernel_shape"), kernel) {
        (Some(given), Some(own))
            if !given.iter().map(|&k| usize::try_from(k).ok()).eq(own.iter().map(|&k| Some(k))) =>
        {
            Err(OpError::invalid(format!("kernel_shape is {given:?}, but the kernels in W are {own:?}")))
        }
        _ => Ok(()),
    }
}

/// The attribute `name`, a number of groups.
pub(crate) fn groups(attrs: &Attrs, name: &str) -> Result<usize, OpError> {
    let n = attrs.int(name).unwrap_or(1);
    usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| OpError::invalid(format!("{name} is {n}")))
}

/// The result of a convolution of operand `x` with the kernels `w`.
pub(crate) fn infer(cx: &InferCx, x: usize, w: usize, elem: Option<Elem>) -> Inferred {
    let kernel = kernel_sizes(cx, w)?;
    let groups = groups(cx.attrs, "group")?;
    let Some(elem) = elem else { return Ok(Vec::new()) };
    let Some(dims) = cx.dims(x) else { return Ok(vec![Type::unranked(elem).into()]) };
    let [batch, channels, spatial @ ..] = dims else {
        return Err(OpError::invalid(format!("X is {}, expected a batch and channels", cx.ty(x))));
    };
    let (filters, depth) = match cx.dims(w) {
        None => (&Dim::Unknown, &Dim::Unknown),
        Some([filters, depth, own @ ..]) if own.len() == spatial.len() => (filters, depth),
        Some(_) => {
            return Err(OpError::invalid(format!(
                "X is {} and W is {}: the ranks differ",
                cx.ty(x),
                cx.ty(w)
            )));
        }
    };
    if depth.mul(&Dim::from(groups)).unify(channels).is_none() {
        let message = format!("W is {} and X is {} with {groups} groups", cx.ty(w), cx.ty(x));
        return Err(OpError::invalid(message));
    }
    let out = match kernel {
        Some(kernel) => Window::of(cx.attrs, &kernel)?.dims(spatial)?,
        None => vec![Dim::Unknown; spatial.len()],
    };
    Ok(vec![Type::tensor(elem, [batch.clone(), filters.clone()].into_iter().chain(out)).into()])
}

/// A convolution whose sizes fit.
pub struct Conv {
    batch: usize,
    /// Groups of channels, each with its own filters.
    pub groups: usize,
    /// Channels of one group.
    pub depth: usize,
    /// Filters of all groups.
    pub filters: usize,
    /// How the kernels go over the spatial dims.
    pub sliding: Sliding,
}

impl Conv {
    /// The convolution of X and W of these shapes.
    pub fn of(attrs: &Attrs, x: &[usize], w: &[usize]) -> Result<Conv, OpError> {
        let groups = groups(attrs, "group")?;
        let (&[batch, channels, ref input @ ..], &[filters, depth, ref kernel @ ..]) = (x, w) else {
            return Err(OpError::invalid("expected X [N, C, ..] and W [M, C / group, ..]"));
        };
        if depth.checked_mul(groups) != Some(channels) || !filters.is_multiple_of(groups) {
            return Err(OpError::invalid(format!("W is {w:?} and X is {x:?} with {groups} groups")));
        }
        check_kernel(attrs, Some(kernel))?;
        Ok(Conv { batch, groups, depth, filters, sliding: Window::of(attrs, kernel)?.slide(input)? })
    }

    /// The result's shape.
    pub fn shape(&self) -> Vec<usize> {
        [self.batch, self.filters].into_iter().chain(self.sliding.output.iter().copied()).collect()
    }

    /// The kernels `w` times columns of X, plus one `bias` per filter. `columns(n, g, from, width, out)` writes what the
    /// windows `from..from + width` see of image `n` and group `g`, as `[depth * taps, width]`; `out` comes zeroed.
    pub(crate) fn multiply<T: Real>(
        &self,
        w: &[T],
        bias: Option<&[T]>,
        columns: impl Fn(usize, usize, usize, usize, &mut [T]) + Sync,
    ) -> Result<Vec<T>, OpError> {
        if bias.is_some_and(|b| b.len() != self.filters) {
            return Err(OpError::invalid(format!("the bias does not have {} elements", self.filters)));
        }
        let rows = self.depth * self.sliding.taps();
        let (positions, per_group) = (self.sliding.positions(), self.filters / self.groups);
        let mut y = vec![T::zero(); strided::count(&self.shape())?];
        if y.is_empty() {
            return Ok(y);
        }
        y.par_chunks_mut(per_group * positions).enumerate().for_each(|(i, y)| {
            let (n, g) = (i / self.groups, i % self.groups);
            let kernels = Mat::new(&w[g * per_group * rows..], per_group, rows);
            gemm::strips(y, positions, TILE, |from, y| {
                let width = y.cols();
                let mut tile = vec![T::zero(); rows * width];
                columns(n, g, from, width, &mut tile);
                gemm::tile_into(kernels, Mat::new(&tile, rows, width), y);
                if let Some(bias) = bias {
                    for (y, &b) in y.rows_mut().zip(&bias[g * per_group..]) {
                        y.iter_mut().for_each(|y| *y += b);
                    }
                }
            });
        });
        Ok(y)
    }

    /// The convolution of the elements `x` with the kernels `w`.
    pub(crate) fn run<T: Real>(&self, x: &[T], w: &[T], bias: Option<&[T]>) -> Result<Vec<T>, OpError> {
        let image = self.depth * self.sliding.cells();
        self.multiply(w, bias, |n, g, from, width, out| {
            self.sliding.unfold(&x[(n * self.groups + g) * image..][..image], from, width, out);
        })
    }
}

fn eval<T: Real>(cx: &EvalCx) -> Evaluated {
    let (x, w) = (cx.input(0)?, cx.input(1)?);
    let conv = Conv::of(cx.attrs, x.shape(), w.shape())?;
    let bias = cx.opt(2)?.map(T::values).transpose()?;
    let y = conv.run(&T::values(x)?, &T::values(w)?, bias.as_deref())?;
    cx.one(T::tensor(x.elem(), &conv.shape(), y)?)
}

#[cfg(test)]
mod tests {
    use crate::ir::Attr;
    use crate::tensor::Tensor;
    use crate::testing::{Case, refused};

    #[test]
    fn agrees_with_the_references() {
        crate::testing::check("conv");
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let t = |shape: &[usize]| Some(Tensor::new(shape, vec![0f32; shape.iter().product()]).unwrap());
        let case = |x: &[usize], w: &[usize], attrs: &[(&str, Attr)]| {
            Case::new("onnx.Conv", 22, attrs, vec![t(x), t(w)])
        };
        refused(&case(&[1, 4, 5], &[2, 3, 3], &[]), "with 1 groups");
        refused(&case(&[1, 4, 5], &[3, 2, 3], &[("group", 0.into())]), "group is 0");
        refused(&case(&[1, 4, 5, 5], &[2, 4, 3], &[]), "");
        refused(&case(&[1, 4, 5], &[2, 4, 3], &[("kernel_shape", vec![2].into())]), "kernel_shape is [2]");
        refused(&case(&[1, 4, 5], &[2, 4, 7], &[]), "does not fit");
        refused(&case(&[4], &[2, 4, 7], &[]), "expected");
    }
}
