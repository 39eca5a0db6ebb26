//! The geometry that convolutions and pools share: a window that slides over the spatial dims.

use crate::ir::{Attrs, Dim};
use crate::ops::OpError;

/// What the attributes say, before the sizes of the input are known.
pub(crate) struct Window {
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
pub(crate) struct Sliding {
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
    pub fn cell(&self, i: usize, out: usize, k: usize) -> Option<usize> {
        let at = out * self.strides[i] + k * self.dilations[i];
        at.checked_sub(self.begin[i]).filter(|&at| at < self.input[i])
    }
}

/// Splits a flat row-major index over `sizes` into one index per dim.
pub(crate) fn unflatten(mut at: usize, sizes: &[usize], out: &mut [usize]) {
    for (o, &n) in out.iter_mut().zip(sizes).rev() {
        (*o, at) = (at % n, at / n);
    }
}
