//! Convolutions with constant kernels, and the elementwise ops after them on their sums.
//!
//! Lanes are neighbouring positions of an image, as it lies in memory; the weights of a few filters are in a scalar each. What
//! the windows see is read out of [`planes`](super::planes) cell by cell, so a step of the product is one load for a vector of
//! positions and one broadcast for a filter: `[group][4 filters][channel][cell of the window][filter]`, a stream of weights. All
//! channels are added up in registers.

use super::epilogue::{Epilogue, Spot};
use super::planes::{Cell, Place, Planes};
use super::{Args, Blob, Buffer, Kernel, Lowered, Step, elementwise, pointwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::{Arch, Feature, Target};
use crate::text::{Body, Cmp, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op, Value};
use dialects::onnx::Conv;
use dialects::tensor::Tensor;

/// Filters that are computed together.
const FILTERS: usize = 4;
/// Vectors of positions at most.
const WIDEST: usize = 6;
/// Positions of a unit, or so.
const POSITIONS: usize = 256;
/// Cells of a window that are written out one by one; more are a loop.
const TAPS: usize = 16;

/// A convolution: its operands by what they mean.
struct Product {
    x: Value,
    /// `[filters, depth, ..]`
    w: Value,
    bias: Option<Value>,
    conv: Conv,
    images: Size,
}

/// f32 with constant kernels and biases, over one or two dims of known size, or of one element each.
pub fn supports(m: &Module, op: Op) -> bool {
    of(m, op).is_some_and(|p| Planes::of(&p.conv.sliding, Cell::Float(0.0), &Target::native()).is_some())
}

fn of(m: &Module, op: Op) -> Option<Product> {
    let data = &m.ops[op];
    let (x, w, bias) = (data.operand(0)?, data.operand(1)?, data.operand(2));
    let float = |v: Value| m.ty(v).elem() == Some(Elem::F32);
    let shape = |v: Value| -> Option<Vec<usize>> {
        Some(m.consts[m.const_of(v)?].shape().iter().map(|&n| n as usize).collect())
    };
    let (kernels, given) = (shape(w)?, Size::shape(m.ty(x))?);
    let [images, sizes @ ..] = &given[..] else { return None };
    let known = |s: &Size| s.known().and_then(|n| usize::try_from(n).ok());
    let image: Vec<usize> = std::iter::once(Some(1)).chain(sizes.iter().map(known)).collect::<Option<_>>()?;
    let conv = Conv::of(&data.attrs, &image, &kernels).ok()?;
    let fits = float(x)
        && float(w)
        && Size::shape(m.ty(data.result(0)?)).is_some()
        && conv.depth > 0
        && conv.filters > 0
        && bias.is_none_or(|b| float(b) && shape(b) == Some(vec![conv.filters]));
    fits.then(|| Product { x, w, bias, conv, images: images.clone() })
}

/// Sizes of the product of one image and group.
struct Form {
    planes: Planes,
    cell: Cell,
    groups: usize,
    /// Planes of a group, and the cells that a window sees of each.
    depth: usize,
    taps: Vec<usize>,
    /// Filters of a group, of a tile of them, and tiles.
    filters: usize,
    tile: usize,
    tiles: usize,
    /// Vectors of positions.
    wide: usize,
    /// Rows of positions of a unit, and how many times so many there are.
    rows: usize,
    blocks: usize,
}

impl Form {
    fn new(planes: Planes, cell: Cell, conv: &Conv, target: &Target) -> Form {
        let filters = conv.filters / conv.groups;
        let tile = filters.min(FILTERS);
        // Of the registers a quarter is left for positions, weights and products.
        let many = target.arch == Arch::Aarch64 || target.has(Feature::Avx512);
        let sums = if many { 24 } else { 12 };
        let (rows, blocks) = planes.blocks(POSITIONS);
        Form {
            groups: conv.groups,
            depth: cell.planes(conv.depth),
            taps: planes.taps(),
            filters,
            tile,
            tiles: filters.div_ceil(tile),
            wide: (sums / tile).min(WIDEST),
            rows,
            blocks,
            planes,
            cell,
        }
    }

    /// Steps of the product.
    fn steps(&self) -> usize {
        self.depth * self.taps.len()
    }

    /// The weights in the order of their use: `write(filter, plane, tap, bytes)` writes one, of 4 bytes.
    fn pack(&self, write: impl Fn(usize, usize, usize, &mut [u8])) -> Vec<u8> {
        let mut out = vec![0u8; self.groups * self.tiles * self.steps() * self.tile * 4];
        let mut slots = out.chunks_exact_mut(4);
        for group in 0..self.groups {
            for tile in 0..self.tiles {
                for (plane, tap) in (0..self.depth).flat_map(|p| (0..self.taps.len()).map(move |t| (p, t))) {
                    for i in 0..self.tile {
                        let slot = slots.next().expect("a slot for each weight");
                        let filter = tile * self.tile + i;
                        if filter < self.filters {
                            write(group * self.filters + filter, plane, tap, slot);
                        }
                    }
                }
            }
        }
        out
    }
}

/// The kernels: planes are laid out, if the image is not read as it is, and multiplied.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let Product { x, w, bias, conv, images } = of(m, op)?;
    let cell = Cell::Float(0.0);
    let planes = Planes::of(&conv.sliding, cell, target)?;
    let form = Form::new(planes, cell, &conv, target);
    let domain = fused.domain()?;
    let positions = form.planes.positions();
    let epilogue = Epilogue::along(fused, &domain, (domain.len() - 2, positions), [])?;
    let w = Tensor::from_const(&m.consts[m.const_of(w)?]).ok()?;
    let w = w.f32s().ok()?;
    let packed = form.pack(|filter, plane, tap, out| {
        let at = (filter * form.depth + plane) * form.taps.len() + tap;
        out.copy_from_slice(&w[at].to_le_bytes());
    });
    let start = match bias {
        Some(bias) => Tensor::from_const(&m.consts[m.const_of(bias)?]).ok()?.f32s().ok()?.to_vec(),
        None => vec![0.0; conv.filters],
    };
    let mut lowered = Lowered::default();
    let x = fused.buffer(x, &mut lowered.blobs)?;
    let mut read = Vec::new();
    for &v in &epilogue.operands {
        read.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    let groups = images * form.groups.into();
    let x = match form.planes.direct {
        true => x,
        false => {
            let out = Buffer::Temp(lowered.temps.len());
            lowered.temps.push(form.planes.bytes(&groups, form.depth));
            lowered.steps.push(form.planes.lay(target, cell, conv.depth, &groups, vec![x, out.clone()]));
            out
        }
    };
    let mut buffers = vec![x];
    let mut blob = |bytes: Vec<u8>| {
        lowered.blobs.push(Blob { bytes: bytes.into() });
        Buffer::Blob(lowered.blobs.len() - 1)
    };
    buffers.push(blob(packed));
    buffers.push(blob(start.iter().flat_map(|v| v.to_le_bytes()).collect()));
    // In bytes, as addresses count.
    buffers.push(blob(form.taps.iter().flat_map(|&t| (4 * t as u64).to_le_bytes()).collect()));
    let first = buffers.len();
    let results = fused.results().len();
    buffers.extend((0..results).map(Buffer::Result).chain(read));
    let finish = |b: &mut Body, a: &Args, spot: Spot, sum: Val| {
        epilogue.emit(b, a, first + results, spot, form.planes.lanes, |_, _| sum)
    };
    let kernel = multiply(target, &form, first, results, &finish);
    let units = groups * (form.tiles * form.blocks).into();
    // Some 16 steps take a nanosecond.
    let work = form.tile * form.steps() * form.rows * form.planes.output[1] / 16 + 1;
    lowered.steps.push(Step { kernel, buffers, dims: Vec::new(), units, work: work.into() });
    Some(lowered)
}

/// What is made of the sums of a vector of positions: the lanes of each result.
type Finish<'f> = dyn Fn(&mut Body, &Args, Spot, Val) -> Vec<Val> + 'f;

/// The product. Buffers: planes, weights, what sums start from, cells of a window, results from `first` on, and what `finish`
/// reads. A unit is some rows of positions of a tile of filters.
fn multiply(target: &Target, form: &Form, first: usize, results: usize, finish: &Finish) -> Kernel {
    let name = if form.cell.elem() == Scalar::F32 { "conv_f32" } else { "conv_int16" };
    Kernel::new(target, name, |b, a| {
        let [x, w, start, taps] = [0, 1, 2, 3].map(|i| a.buffer(b, i));
        let y: Vec<Val> = (0..results).map(|i| a.buffer(b, first + i)).collect();
        b.each(a.begin, a.end, 1, |b, unit| {
            let (blocks, tiles) = (b.size(form.blocks), b.size(form.tiles));
            let (block, left) = (b.rem(unit, blocks), b.div(unit, blocks));
            let (tile, image) = (b.rem(left, tiles), b.div(left, tiles));
            let groups = b.size(form.groups);
            let group = b.rem(image, groups);
            let bytes = b.size(form.depth * form.planes.plane * 4);
            let at = b.mul(image, bytes);
            let x = b.at(x, at);
            let own = b.mul(group, tiles);
            let own = b.add(own, tile);
            let bytes = b.size(form.steps() * form.tile * 4);
            let at = b.mul(own, bytes);
            let w = b.at(w, at);
            let (filters, width) = (b.size(form.filters), b.size(form.tile));
            let filter = b.mul(tile, width);
            let [row, own] = [image, group].map(|g| b.mul(g, filters));
            let [row, own] = [row, own].map(|first| b.add(first, filter));
            let start = b.element(start, own, Scalar::F32);
            let (size, height) = (b.size(form.rows), b.size(form.planes.output[0]));
            let from = b.mul(block, size);
            let to = b.add(from, size);
            let to = b.min(to, height);
            let some = |b: &mut Body, filters: usize| {
                form.planes.vectors(b, from, to, form.wide, |b, places| {
                    let sums = form.sums(b, [x, w, start, taps], filters, places);
                    for (i, sum) in sums.into_iter().enumerate() {
                        let (place, filter) = (places[i % places.len()], b.size(i / places.len()));
                        let row = b.add(row, filter);
                        let spot = Spot { row, n: place.n, there: form.planes.there() };
                        let size = b.size(form.planes.positions());
                        let at = b.mul(row, size);
                        let at = b.add(at, place.n);
                        for (&y, v) in y.iter().zip(finish(b, a, spot, sum)) {
                            let y = elementwise::element(b, y, at, v.ty.elem);
                            pointwise::store_some(b, v, y, spot.there);
                        }
                    }
                });
            };
            match form.filters % form.tile {
                0 => some(b, form.tile),
                rest => {
                    let last = b.size(form.tiles - 1);
                    let whole = b.cmp(Cmp::Lt, tile, last);
                    b.when_else(whole, |b| some(b, form.tile), |b| some(b, rest));
                }
            }
        });
    })
}

impl Form {
    /// The sums of some filters for each of these vectors of positions, filter by filter.
    fn sums(&self, b: &mut Body, buffers: [Val; 4], filters: usize, places: &[Place]) -> Vec<Val> {
        let [x, w, start, taps] = buffers;
        let ty = vector(self.planes.lanes, self.cell.elem());
        let mut sums = Vec::new();
        for i in 0..filters {
            let p = b.at_const(start, i * 4);
            let start = b.load(p, scalar(ty.elem));
            let start = b.broadcast(start, ty.lanes);
            sums.extend(std::iter::repeat_n(start, places.len()));
        }
        let x: Vec<Val> = places.iter().map(|p| b.element(x, p.at, Scalar::F32)).collect();
        let (none, planes) = (b.size(0), b.size(self.depth));
        b.repeat(none, planes, 1, &sums, |b, plane, sums| {
            let (step, line) = (b.size(self.planes.plane * 4), b.size(self.taps.len() * self.tile * 4));
            let (image, line) = (b.mul(plane, step), b.mul(plane, line));
            let x: Vec<Val> = x.iter().map(|&x| b.at(x, image)).collect();
            let w = b.at(w, line);
            let mut sums = sums.to_vec();
            if self.taps.len() <= TAPS {
                for (i, &tap) in self.taps.iter().enumerate() {
                    let x: Vec<Val> = x.iter().map(|&x| b.at_const(x, tap * 4)).collect();
                    let w = b.at_const(w, i * self.tile * 4);
                    self.step(b, &x, w, &mut sums);
                }
                return sums;
            }
            let count = b.size(self.taps.len());
            b.repeat(none, count, 1, &sums, |b, i, sums| {
                let p = b.element(taps, i, Scalar::I64);
                let tap = b.load(p, scalar(Scalar::I64));
                let x: Vec<Val> = x.iter().map(|&x| b.at(x, tap)).collect();
                let bytes = b.size(self.tile * 4);
                let at = b.mul(i, bytes);
                let w = b.at(w, at);
                let mut sums = sums.to_vec();
                self.step(b, &x, w, &mut sums);
                sums
            })
        })
    }

    /// One cell of the windows by one weight of each filter.
    fn step(&self, b: &mut Body, x: &[Val], w: Val, sums: &mut [Val]) {
        let ty = vector(self.planes.lanes, self.cell.elem());
        let x: Vec<Val> = x.iter().map(|&x| b.load(x, ty)).collect();
        for (i, sums) in sums.chunks_mut(x.len()).enumerate() {
            let w = b.at_const(w, i * 4);
            let w = b.load(w, scalar(ty.elem));
            let w = b.broadcast(w, ty.lanes);
            for (&x, sum) in x.iter().zip(sums) {
                *sum = b.fma(w, x, *sum);
            }
        }
    }
}
