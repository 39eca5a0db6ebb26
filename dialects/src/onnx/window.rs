//! The geometry that convolutions and pools share: a window that slides over the spatial dims.

use crate::ir::{Attrs, Dim};
use crate::ops::OpError;

/// What the attributes say, before the sizes of the input are known.
pub struct Window {
    /// Sizes.
    pub kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    /// Begins, then ends; for the automatic forms all zero.
    pads: Vec<usize>,
    auto: Auto,
    ceil: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Auto {
    /// As the pads say.
    Given,
    /// Output size `ceil(in / stride)`, the odd cell of padding at the end.
    Upper,
    /// The same, with the odd cell at the beginning.
    Lower,
}

/// A window on an input of known sizes. All lists have one element per spatial dim.
pub struct Sliding {
    /// Sizes of the input.
    pub input: Vec<usize>,
    /// Sizes of the output.
    pub output: Vec<usize>,
    /// Sizes of the window.
    pub kernel: Vec<usize>,
    /// Steps from one window to the next.
    pub strides: Vec<usize>,
    /// Steps inside a window.
    pub dilations: Vec<usize>,
    /// Padding before the input.
    pub begin: Vec<usize>,
    /// Padding behind it.
    pub end: Vec<usize>,
}

/// A bound on attributes and sizes that keeps the arithmetic inside 64 bits.
const MAX: usize = 1 << 31;

impl Window {
    /// Reads the attributes of a window of `kernel` sizes.
    pub fn of(attrs: &Attrs, kernel: &[usize]) -> Result<Window, OpError> {
        let rank = kernel.len();
        let list = |name: &str, n: usize, default: usize| -> Result<Vec<usize>, OpError> {
            let Some(given) = attrs.ints(name) else { return Ok(vec![default; n]) };
            let sizes: Vec<usize> =
                given.iter().filter_map(|&v| usize::try_from(v).ok().filter(|&v| v < MAX)).collect();
            match sizes.len() == n && given.len() == n && sizes.iter().all(|&v| v >= default) {
                true => Ok(sizes),
                false => Err(OpError::invalid(format!("{name} is {given:?} for {rank} spatial dims"))),
            }
        };
        let auto = match attrs.str("auto_pad").unwrap_or("NOTSET") {
            "NOTSET" | "VALID" | "" => Auto::Given,
            "SAME_UPPER" => Auto::Upper,
            "SAME_LOWER" => Auto::Lower,
            other => return Err(OpError::invalid(format!("auto_pad is {other:?}"))),
        };
        let given = attrs.str("auto_pad").is_none_or(|a| a == "NOTSET" || a.is_empty());
        if kernel.iter().any(|&k| k == 0 || k >= MAX) {
            return Err(OpError::invalid(format!("the kernel has sizes {kernel:?}")));
        }
        Ok(Window {
            kernel: kernel.to_vec(),
            strides: list("strides", rank, 1)?,
            dilations: list("dilations", rank, 1)?,
            pads: if given { list("pads", 2 * rank, 0)? } else { vec![0; 2 * rank] },
            auto,
            ceil: attrs.int("ceil_mode").unwrap_or(0) != 0,
        })
    }

    /// The window of a pool, whose sizes are the attribute `kernel_shape`.
    pub fn of_pool(attrs: &Attrs) -> Result<Window, OpError> {
        let missing = || OpError::invalid("the attribute kernel_shape is missing or wrong");
        let kernel: Option<Vec<usize>> = attrs
            .ints("kernel_shape")
            .ok_or_else(missing)?
            .iter()
            .map(|&k| usize::try_from(k).ok())
            .collect();
        Window::of(attrs, &kernel.ok_or_else(missing)?)
    }

    fn reach(&self, i: usize) -> usize {
        (self.kernel[i] - 1) * self.dilations[i] + 1
    }

    /// The output's size along spatial dim `i`, for `n` input cells; `None` where the window does not fit.
    fn size(&self, i: usize, n: usize) -> Option<usize> {
        let stride = self.strides[i];
        if self.auto != Auto::Given {
            return Some(n.div_ceil(stride));
        }
        let (begin, end) = (self.pads[i], self.pads[self.kernel.len() + i]);
        let room = (n + begin + end).checked_sub(self.reach(i))?;
        if !self.ceil {
            return Some(room / stride + 1);
        }
        let out = room.div_ceil(stride) + 1;
        // A last window that would begin in the padding behind the input is left out.
        Some(if (out - 1) * stride >= n + begin { out - 1 } else { out })
    }

    /// The output's dims for these spatial dims.
    pub fn dims(&self, input: &[Dim]) -> Result<Vec<Dim>, OpError> {
        if input.len() != self.kernel.len() {
            let (expected, found) = (self.kernel.len(), input.len());
            return Err(OpError::invalid(format!("expected {expected} spatial dims, found {found}")));
        }
        let one = |(i, d): (usize, &Dim)| {
            let known = d.known().and_then(|n| usize::try_from(n).ok());
            match known {
                Some(n) => self.size(i, n).map(Dim::from).ok_or_else(|| self.misfit(i, n)),
                None => {
                    let padding = self.pads[i] + self.pads[self.kernel.len() + i];
                    let same = self.auto != Auto::Given || padding + 1 == self.reach(i);
                    Ok(if same && self.strides[i] == 1 { d.clone() } else { Dim::Unknown })
                }
            }
        };
        input.iter().enumerate().map(one).collect()
    }

    /// What a transposed op with this window makes of `n` cells along dim `i`: the size of its result, and how many
    /// cells are cut off before it. `extra` cells are added behind; a size that is `wanted` decides the padding.
    pub fn transposed(
        &self,
        i: usize,
        n: usize,
        extra: usize,
        wanted: Option<usize>,
    ) -> Result<(usize, usize), OpError> {
        let (begin, end) = (self.pads[i], self.pads[self.kernel.len() + i]);
        let steps = n.saturating_sub(1).checked_mul(self.strides[i]).filter(|_| n < MAX);
        let full =
            steps.and_then(|s| s.checked_add(self.reach(i) + extra)).ok_or_else(|| self.misfit(i, n))?;
        match wanted.or((self.auto != Auto::Given).then_some(n * self.strides[i])) {
            Some(size) => {
                let padding = full.saturating_sub(size);
                Ok((size, if self.auto == Auto::Upper { padding / 2 } else { padding - padding / 2 }))
            }
            None => match full.checked_sub(begin + end) {
                Some(size) if size > 0 => Ok((size, begin)),
                _ => Err(OpError::invalid(format!(
                    "padding of {begin} and {end} cells leaves nothing of {full}"
                ))),
            },
        }
    }

    /// The windows that slide over an image of sizes `input` and begin `begin` cells before it, one for each cell of
    /// `output`.
    pub fn over(&self, input: Vec<usize>, begin: Vec<usize>, output: &[usize]) -> Sliding {
        Sliding {
            end: vec![0; input.len()],
            input,
            output: output.to_vec(),
            kernel: self.kernel.clone(),
            strides: self.strides.clone(),
            dilations: self.dilations.clone(),
            begin,
        }
    }

    fn misfit(&self, i: usize, n: usize) -> OpError {
        OpError::invalid(format!("a window of {} does not fit {n} cells and padding", self.reach(i)))
    }

    /// The window on an input of these spatial sizes.
    pub fn slide(&self, input: &[usize]) -> Result<Sliding, OpError> {
        let dims: Vec<Dim> = input.iter().map(|&n| Dim::from(n)).collect();
        self.dims(&dims)?;
        let rank = input.len();
        let (mut output, mut begin, mut end) = (Vec::new(), Vec::new(), Vec::new());
        for (i, &n) in input.iter().enumerate() {
            let out = self.size(i, n).filter(|_| n < MAX).ok_or_else(|| self.misfit(i, n))?;
            let needed = out.saturating_sub(1) * self.strides[i] + self.reach(i);
            let padding = needed.saturating_sub(n);
            let (b, e) = match self.auto {
                Auto::Given => (self.pads[i], self.pads[rank + i]),
                Auto::Upper => (padding / 2, padding - padding / 2),
                Auto::Lower => (padding - padding / 2, padding / 2),
            };
            output.push(out);
            begin.push(b);
            end.push(e);
        }
        Ok(Sliding {
            input: input.to_vec(),
            output,
            kernel: self.kernel.clone(),
            strides: self.strides.clone(),
            dilations: self.dilations.clone(),
            begin,
            end,
        })
    }
}

impl Sliding {
    /// The input cell along dim `i` that window `out` sees at its own cell `k`; `None` in the padding.
    fn cell(&self, i: usize, out: usize, k: usize) -> Option<usize> {
        let at = out * self.strides[i] + k * self.dilations[i];
        at.checked_sub(self.begin[i]).filter(|&at| at < self.input[i])
    }

    /// The number of cells of a window.
    pub fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// The number of cells of the input.
    pub fn cells(&self) -> usize {
        self.input.iter().product()
    }

    /// The number of windows.
    pub fn positions(&self) -> usize {
        self.output.iter().product()
    }

    /// How many cells of the input each window sees; those of the padding count if `padding` says so, as far as the padded
    /// input goes.
    pub fn counts(&self, padding: bool) -> Vec<usize> {
        let along = |i: usize, out: usize| match padding {
            true => {
                let room =
                    (self.input[i] + self.begin[i] + self.end[i]).saturating_sub(out * self.strides[i]);
                room.div_ceil(self.dilations[i]).min(self.kernel[i])
            }
            false => (0..self.kernel[i]).filter(|&k| self.cell(i, out, k).is_some()).count(),
        };
        let mut out = vec![0; self.input.len()];
        let count = |position| {
            unflatten(position, &self.output, &mut out);
            out.iter().enumerate().map(|(i, &o)| along(i, o)).product()
        };
        (0..self.positions()).map(count).collect()
    }

    /// Calls `f(at, cell)` for each of the windows `from..from + width` whose own cell `tap` lies on the input, in
    /// order: window `from + at` sees the input's `cell` there. All three are flat, row-major indices.
    pub fn seen(&self, tap: usize, from: usize, width: usize, mut f: impl FnMut(usize, usize)) {
        let rank = self.input.len();
        let Some(last) = rank.checked_sub(1) else { return (0..width).for_each(|at| f(at, 0)) };
        let (mut index, mut out) = (vec![0; rank], vec![0; rank]);
        unflatten(tap, &self.kernel, &mut index);
        let (stride, ahead) = (self.strides[last], index[last] * self.dilations[last]);
        // The windows, counted along the last dim, from which on the tap is on the input, and from which on behind it.
        let enters = self.begin[last].saturating_sub(ahead).div_ceil(stride);
        let leaves = (self.begin[last] + self.input[last]).saturating_sub(ahead).div_ceil(stride);
        let mut at = 0;
        while at < width {
            // One run of windows along the last dim: the dims before it are the same for all of them.
            unflatten(from + at, &self.output, &mut out);
            let (first, run) = (out[last], (self.output[last] - out[last]).min(width - at));
            let along = |base: usize, i: usize| Some(base * self.input[i] + self.cell(i, out[i], index[i])?);
            if let Some(line) = (0..last).try_fold(0, along) {
                let line = line * self.input[last];
                for window in enters.max(first)..leaves.min(first + run) {
                    f(at + window - first, line + window * stride + ahead - self.begin[last]);
                }
            }
            at += run;
        }
    }

    /// The cells that the windows `from..from + width` see, as `[channels * taps, width]`; what lies in the padding is
    /// left as it is. `image` is some channels of the input.
    pub fn unfold<T: Copy>(&self, image: &[T], from: usize, width: usize, columns: &mut [T]) {
        let (cells, taps) = (self.cells(), self.taps());
        for (row, columns) in columns.chunks_exact_mut(width).enumerate() {
            let image = &image[row / taps * cells..][..cells];
            self.seen(row % taps, from, width, |at, cell| columns[at] = image[cell]);
        }
    }

    /// The transpose of [`Sliding::unfold`]: each column's cells are added to the image's with `add`.
    pub fn fold<T: Copy>(
        &self,
        columns: &[T],
        from: usize,
        width: usize,
        image: &mut [T],
        add: impl Fn(&mut T, T),
    ) {
        let (cells, taps) = (self.cells(), self.taps());
        for (row, columns) in columns.chunks_exact(width).enumerate() {
            let image = &mut image[row / taps * cells..][..cells];
            self.seen(row % taps, from, width, |at, cell| add(&mut image[cell], columns[at]));
        }
    }
}

/// Splits a flat row-major index over `sizes` into one index per dim.
pub(crate) fn unflatten(mut at: usize, sizes: &[usize], out: &mut [usize]) {
    for (o, &n) in out.iter_mut().zip(sizes).rev() {
        (*o, at) = (at % n, at / n);
    }
}
