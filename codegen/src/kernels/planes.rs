//! Planes: the channels of an image with their padding, so laid out that what windows at neighbouring positions see lies side
//! by side.
//!
//! **Layout.** `[image][channel][row][phase][column]`, 4 bytes an element. Where windows move by two columns, the even columns
//! are one phase and the odd ones another: lanes, which are neighbouring positions of a row, read neighbouring elements whatever
//! the stride, and no matrix of patches is ever written. Phases that no window sees are left out. An image of floats that needs
//! none of this is read where it is.
//!
//! **Positions.** A vector is positions of one row. The last one of a row overlaps with the one before it, which gives the same
//! sums twice; a row shorter than a vector is written in part.

use super::{Buffer, Kernel, Step, elementwise};
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Cmp, Scalar, Ty, Val, scalar};
use dialects::onnx::Sliding;

/// Cells of a window that are written out one by one; more are a loop.
pub const TAPS: usize = 16;

/// What an element of a plane is.
#[derive(Clone, Copy, PartialEq)]
pub enum Cell {
    /// An f32, and what stands in the padding.
    Float(f64),
    /// A code as an f32, which holds it exactly.
    Code {
        /// Whether codes are signed.
        signed: bool,
        /// What stands in the padding.
        padding: f64,
    },
    /// Codes of two channels less the zero point, as two i16; the padding is 0.
    Pair {
        /// Whether codes are signed.
        signed: bool,
    },
}

impl Cell {
    /// The planes that `channels` become.
    pub fn planes(self, channels: usize) -> usize {
        if matches!(self, Cell::Pair { .. }) { channels.div_ceil(2) } else { channels }
    }

    /// The type of an element.
    pub fn elem(self) -> Scalar {
        if matches!(self, Cell::Pair { .. }) { Scalar::I32 } else { Scalar::F32 }
    }
}

/// Planes of known sizes, and the windows over them.
#[derive(Clone)]
pub struct Planes {
    /// Rows and columns of the image.
    input: [usize; 2],
    /// Rows and columns of positions.
    pub output: [usize; 2],
    kernel: [usize; 2],
    strides: [usize; 2],
    dilations: [usize; 2],
    /// Padding before the image.
    begin: [usize; 2],
    /// What the columns of each phase are, less multiples of the stride.
    phases: Vec<usize>,
    rows: usize,
    /// Columns of a phase.
    columns: usize,
    /// Elements from one row to the next, and from one plane to the next.
    row: usize,
    /// See above.
    pub plane: usize,
    /// Whether the image itself is read.
    pub direct: bool,
    /// Positions in a vector.
    pub lanes: usize,
}

/// Where a vector of positions is.
#[derive(Clone, Copy)]
pub struct Place {
    /// The element of a plane at which the windows begin.
    pub at: Val,
    /// The first of the positions.
    pub n: Val,
}

impl Planes {
    /// The windows `s` over one or two dims, not counting those in which nothing moves. `None` for more.
    pub fn of(s: &Sliding, cell: Cell, target: &Target) -> Option<Planes> {
        let dims = 0..s.input.len();
        let still = |&i: &usize| s.kernel[i] == 1 && s.begin[i] == 0 && s.input[i] == 1 && s.output[i] == 1;
        let cells = |&i: &usize| s.kernel[i] == 1 && s.begin[i] == 0 && s.output[i] == s.input[i];
        let own: Vec<usize> = dims.clone().filter(|i| !still(i)).collect();
        let all: usize = s.input.iter().product();
        let (mut p, ones) = (Vec::new(), dims.clone().all(|i| cells(&i) && s.strides[i] == 1));
        match own[..] {
            // Each cell by itself: they are one row.
            _ if ones => p.push([all, all, 1, 1, 1, 0]),
            _ => {
                p.extend(own.iter().map(|&i| {
                    [s.input[i], s.output[i], s.kernel[i], s.strides[i], s.dilations[i], s.begin[i]]
                }))
            }
        }
        if p.len() == 1 {
            p.insert(0, [1, 1, 1, 1, 1, 0]);
        }
        let [first, last] = p[..] else { return None };
        let pair = |i: usize| [first[i], last[i]];
        let [input, output, kernel] = [0, 1, 2].map(pair);
        let [strides, dilations, begin] = [3, 4, 5].map(pair);
        if output.contains(&0) {
            return None;
        }
        let mut phases: Vec<usize> = Vec::new();
        for k in 0..kernel[1].min(strides[1]) {
            let phase = k * dilations[1] % strides[1];
            if !phases.contains(&phase) {
                phases.push(phase);
            }
        }
        let reach = |i: usize| (kernel[i] - 1) * dilations[i];
        let rows = (output[0] - 1) * strides[0] + reach(0) + 1;
        let columns = output[1] + reach(1) / strides[1];
        let mut lanes = target.lanes();
        while lanes > 4 && lanes > output[1] {
            lanes /= 2;
        }
        let direct = matches!(cell, Cell::Float(_))
            && begin == [0, 0]
            && strides[1] == 1
            && rows <= input[0]
            && columns <= input[1]
            && lanes <= output[1];
        let row = if direct { input[1] } else { phases.len() * columns };
        let plane = row * if direct { input[0] } else { rows };
        let p = Planes {
            input,
            output,
            kernel,
            strides,
            dilations,
            begin,
            phases,
            rows,
            columns,
            row,
            plane,
            direct,
            lanes,
        };
        Some(p)
    }

    /// Bytes of the planes of `images` of so many channels, and what a vector may read beyond them.
    pub fn bytes(&self, images: &Size, planes: usize) -> Size {
        images.clone() * (planes * self.plane * 4).into() + (4 * self.lanes).into()
    }

    /// The element, counted from the window's first one, that each cell of a window is.
    pub fn taps(&self) -> Vec<usize> {
        let tap = |ky: usize, kx: usize| {
            let column = kx * self.dilations[1];
            let phase = self.phases.iter().position(|&p| p == column % self.strides[1]);
            let phase = phase.expect("a phase for each column of a window");
            ky * self.dilations[0] * self.row + phase * self.columns + column / self.strides[1]
        };
        (0..self.kernel[0]).flat_map(|ky| (0..self.kernel[1]).map(move |kx| tap(ky, kx))).collect()
    }

    /// Positions of all windows.
    pub fn positions(&self) -> usize {
        self.output[0] * self.output[1]
    }

    /// Lanes of a vector that are there.
    pub fn there(&self) -> usize {
        self.lanes.min(self.output[1])
    }

    /// Rows of positions for about `positions` of them, and how many times so many there are.
    pub fn blocks(&self, positions: usize) -> (usize, usize) {
        let rows = (positions / self.output[1]).clamp(1, self.output[0]);
        (rows, self.output[0].div_ceil(rows))
    }

    /// Vectors of so many rows of positions.
    pub fn count(&self, rows: usize) -> usize {
        rows * self.output[1].div_ceil(self.lanes)
    }

    /// `body` for the vectors of the rows `from..to` of positions, `wide` of them at a time, then two and one.
    pub fn vectors(&self, b: &mut Body, from: Val, to: Val, wide: usize, body: impl Fn(&mut Body, &[Place])) {
        let count = self.output[1].div_ceil(self.lanes);
        let per_row = b.size(count);
        let (mut from, to) = (b.mul(from, per_row), b.mul(to, per_row));
        let widths: Vec<usize> = [wide, 2, 1].into_iter().filter(|&w| w <= wide).collect();
        for (i, &wide) in widths.iter().enumerate() {
            if widths[..i].contains(&wide) {
                continue;
            }
            let end = b.whole_steps(from, to, wide);
            b.each(from, end, wide, |b, v| {
                let places: Vec<Place> = (0..wide)
                    .map(|j| {
                        let j = b.size(j);
                        let v = b.add(v, j);
                        self.place(b, v, count)
                    })
                    .collect();
                body(b, &places);
            });
            from = end;
        }
    }

    /// Vector `v`, of which there are `count` in a row.
    fn place(&self, b: &mut Body, v: Val, count: usize) -> Place {
        let per_row = b.size(count);
        let (y, x) = (b.div(v, per_row), b.rem(v, per_row));
        let (lanes, last) = (b.size(self.lanes), b.size(self.output[1].saturating_sub(self.lanes)));
        let x = b.mul(x, lanes);
        let x = b.min(x, last);
        let (step, width) = (b.size(self.strides[0] * self.row), b.size(self.output[1]));
        let (line, n) = (b.mul(y, step), b.mul(y, width));
        Place { at: b.add(line, x), n: b.add(n, x) }
    }

    /// The step that lays out images of `channels` each. Buffers: the image, the planes, and the zero point of a pair if it has
    /// one.
    pub fn lay(
        &self,
        target: &Target,
        cell: Cell,
        channels: usize,
        images: &Size,
        buffers: Vec<Buffer>,
    ) -> Step {
        let planes = cell.planes(channels);
        let zero = buffers.len() > 2;
        let kernel = Kernel::new(target, "planes", |b, a| {
            let (x, out) = (a.buffer(b, 0), a.buffer(b, 1));
            let zero = zero.then(|| {
                let p = a.buffer(b, 2);
                cell.code(b, p, scalar(Scalar::I8))
            });
            b.each(a.begin, a.end, 1, |b, unit| {
                let bytes = b.size(self.plane * 4);
                let start = b.mul(unit, bytes);
                let out = b.at(out, start);
                let image = self.input[0] * self.input[1];
                if planes == channels {
                    let size = b.size(image);
                    let first = b.mul(unit, size);
                    return self.write(b, cell, x, &[first], zero, out);
                }
                let (count, whole, size) = (b.size(planes), b.size(channels), b.size(image));
                let (group, pair) = (b.div(unit, count), b.rem(unit, count));
                let (first, twice) = (b.mul(group, whole), b.add(pair, pair));
                let first = b.add(first, twice);
                let first = b.mul(first, size);
                let next = b.add(first, size);
                let both = |b: &mut Body| self.write(b, cell, x, &[first, next], zero, out);
                if channels.is_multiple_of(2) {
                    return both(b);
                }
                let last = b.size(planes - 1);
                let paired = b.cmp(Cmp::Lt, pair, last);
                b.when_else(paired, both, |b| self.write(b, cell, x, &[first], zero, out));
            });
        });
        let work = (self.plane / 4 + 1).into();
        Step { kernel, buffers, dims: Vec::new(), units: images.clone() * planes.into(), work }
    }

    /// One plane, of the channels that begin at these elements of `x`.
    fn write(&self, b: &mut Body, cell: Cell, x: Val, channels: &[Val], zero: Option<Val>, out: Val) {
        let (none, rows) = (b.size(0), b.size(self.rows));
        b.each(none, rows, 1, |b, row| {
            let (before, height, width) =
                (b.size(self.begin[0]), b.size(self.input[0]), b.size(self.input[1]));
            let y = b.sub(row, before);
            let (low, high) = (b.cmp(Cmp::Ge, y, none), b.cmp(Cmp::Lt, y, height));
            let inside = b.and(low, high);
            let bytes = b.size(self.row * 4);
            let start = b.mul(row, bytes);
            let out = b.at(out, start);
            let line = b.mul(y, width);
            let copied = |b: &mut Body| {
                for (i, &phase) in self.phases.iter().enumerate() {
                    let out = b.at_const(out, i * self.columns * 4);
                    let (low, high) = self.within(phase);
                    self.fill(b, cell, out, 0, low);
                    self.fill(b, cell, out, high, self.columns);
                    let lanes = if self.strides[1] == 1 { b.target.lanes() } else { 1 };
                    let (from, to) = (b.size(low), b.size(high));
                    let one = |b: &mut Body, q: Val, lanes: usize| {
                        let stride = b.size(self.strides[1]);
                        let column = b.mul(q, stride);
                        let offset = b.int(Scalar::I64, phase as i64 - self.begin[1] as i64);
                        let column = b.add(column, offset);
                        let at = b.add(line, column);
                        let at: Vec<Val> = channels.iter().map(|&c| b.add(c, at)).collect();
                        let v = cell.load(b, x, &at, zero, lanes);
                        let p = b.element(out, q, Scalar::F32);
                        b.store(v, p);
                    };
                    match lanes {
                        1 => b.each(from, to, 1, |b, q| one(b, q, 0)),
                        _ => elementwise::vector_loop(b, from, to, lanes, one),
                    }
                }
            };
            b.when_else(inside, copied, |b| self.fill(b, cell, out, 0, self.row));
        });
    }

    /// The columns of a phase that lie on the image.
    fn within(&self, phase: usize) -> (usize, usize) {
        let (before, stride) = (self.begin[1], self.strides[1]);
        let low = before.saturating_sub(phase).div_ceil(stride).min(self.columns);
        let high = (before + self.input[1]).saturating_sub(phase).div_ceil(stride).min(self.columns);
        (low, high.max(low))
    }

    /// Padding in the elements `from..to`.
    fn fill(&self, b: &mut Body, cell: Cell, out: Val, from: usize, to: usize) {
        if from >= to {
            return;
        }
        let padding = match cell {
            Cell::Float(v) | Cell::Code { padding: v, .. } => v,
            Cell::Pair { .. } => 0.0,
        };
        let (from, to, lanes) = (b.size(from), b.size(to), b.target.lanes());
        elementwise::vector_loop(b, from, to, lanes, |b, i, lanes| {
            let v = b.splat(Ty { elem: cell.elem(), lanes }, padding);
            let p = b.element(out, i, Scalar::F32);
            b.store(v, p);
        });
    }
}

impl Cell {
    /// A code as an i32.
    fn code(self, b: &mut Body, p: Val, ty: Ty) -> Val {
        let v = b.load(p, ty);
        match self {
            Cell::Code { signed: false, .. } | Cell::Pair { signed: false } => {
                b.widen_unsigned(v, Scalar::I32)
            }
            _ => b.cast(v, Scalar::I32),
        }
    }

    /// Elements of a plane, of the elements `at` of `x`: one channel or two.
    fn load(self, b: &mut Body, x: Val, at: &[Val], zero: Option<Val>, lanes: usize) -> Val {
        if let Cell::Float(_) = self {
            let p = b.element(x, at[0], Scalar::F32);
            return b.load(p, Ty { elem: Scalar::F32, lanes });
        }
        let code = |b: &mut Body, at: Val| {
            let p = b.element(x, at, Scalar::I8);
            let v = self.code(b, p, Ty { elem: Scalar::I8, lanes });
            match zero {
                Some(zero) => {
                    let zero = b.spread(zero, lanes);
                    b.sub(v, zero)
                }
                None => v,
            }
        };
        let first = code(b, at[0]);
        if let Cell::Code { .. } = self {
            return b.cast(first, Scalar::F32);
        }
        let lower = b.splat(first.ty, f64::from(0xffff));
        let first = b.and(first, lower);
        match at.get(1) {
            Some(&at) => {
                let second = code(b, at);
                let second = b.shl(second, 16);
                b.or(first, second)
            }
            None => first,
        }
    }
}
