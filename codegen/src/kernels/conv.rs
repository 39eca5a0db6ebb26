//! Convolutions with constant kernels, and the elementwise ops after them on their sums.
//!
//! Lanes are neighbouring positions of an image, as it lies in memory; the weights of a few filters are in a scalar each. What
//! the windows see is read out of [`planes`](super::planes) cell by cell, so a step of the product is one load for a vector of
//! positions and one broadcast for a filter: `[group][4 filters][channel][cell of the window][filter]`, a stream of weights. All
//! channels are added up in registers.
//!
//! Codes of 8 bits are multiplied two channels at a time, as numbers of 16 bits less their zero points, which is exact.
//! ConvInteger gives the sums; QLinearConv makes codes of them as the interpreter and ONNX Runtime do: with one factor in single
//! precision, halves to even. What stands between DequantizeLinear is scaled, and what comes after it is done in floats.

use super::coded::{Coded, signed};
use super::epilogue::{Epilogue, Spot};
use super::planes::{Cell, Place, Planes, TAPS};
use super::{Args, Blob, Buffer, Kernel, Lowered, Step, elementwise, fours, pointwise, quantize};
use crate::fuse::Fused;
use crate::layout::View;
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

/// A convolution: what it reads, and what it makes of sums.
struct Product {
    x: Value,
    conv: Conv,
    images: Size,
    kind: Kind,
}

/// What is multiplied.
enum Kind {
    /// Floats by constant weights, and a constant bias.
    Float { w: Value, bias: Option<Value> },
    /// Codes.
    Codes { x: Coded, w: Coded, outcome: Outcome },
}

/// What is made of sums of integers.
enum Outcome {
    /// Nothing.
    Sum,
    /// `sum * (x_scale * w_scale) + bias`
    Float { bias: Option<Value> },
    /// `round((sum + bias) * (x_scale * w_scale / y_scale)) + y_zero`, saturated.
    Codes { bias: Option<Value>, scale: Value, zero: Value },
}

impl Kind {
    fn cell(&self, m: &Module) -> Option<Cell> {
        match self {
            Kind::Float { .. } => Some(Cell::Float(0.0)),
            Kind::Codes { x, .. } => Some(Cell::Pair { signed: signed(m, x.codes)? }),
        }
    }
}

/// f32 or 8-bit codes with constant kernels, biases and scales, over one or two dims of known size, or of one element each.
pub fn supports(m: &Module, op: Op) -> bool {
    let cell = |p: &Product| p.kind.cell(m);
    of(m, op).is_some_and(|p| {
        cell(&p).is_some_and(|cell| Planes::of(&p.conv.sliding, cell, &Target::native()).is_some())
    })
}

/// Whether `op` is a Conv that multiplies what stands behind DequantizeLinear.
pub fn reads_codes(m: &Module, op: Op) -> bool {
    m.ops[op].is("onnx.Conv")
        && of(m, op).is_some_and(|p| matches!(p.kind, Kind::Codes { .. }))
        && supports(m, op)
}

/// What reads the codes.
pub fn views(m: &Module, op: Op) -> Vec<View> {
    match of(m, op).map(|p| p.kind) {
        Some(Kind::Codes { x, w, .. }) if m.ops[op].is("onnx.Conv") => {
            [x.view(m), w.view(m)].into_iter().flatten().collect()
        }
        _ => Vec::new(),
    }
}

fn of(m: &Module, op: Op) -> Option<Product> {
    let data = &m.ops[op];
    let at = |i: usize| data.operand(i);
    let constant = |v: Value| m.const_of(v).is_some();
    let count = |v: Value| Some(m.consts[m.const_of(v)?].count());
    let one = |v: Value| Size::shape(m.ty(v)).is_some_and(|s| Size::product(&s) == Size::Known(1));
    let (x, w, kind) = match data.name.as_str() {
        "onnx.ConvInteger" => {
            // There are no scales: the operands stand in their places.
            let of = |i: usize| Some(Coded::new(at(i)?, at(i)?, at(i + 2)));
            let (x, w) = (of(0)?, of(1)?);
            (x.codes, w.codes, Kind::Codes { x, w, outcome: Outcome::Sum })
        }
        "onnx.QLinearConv" => {
            let of = |i: usize| Some(Coded::new(at(i)?, at(i + 1)?, at(i + 2)));
            let ((x, w), (scale, zero)) = ((of(0)?, of(3)?), (at(6)?, at(7)?));
            let known = [x.scale, w.scale, scale, zero].into_iter().chain(at(8)).all(constant);
            let fits = known && signed(m, zero).is_some() && count(zero) == Some(1);
            let outcome = Outcome::Codes { bias: at(8), scale, zero };
            (x.codes, w.codes, fits.then_some(Kind::Codes { x, w, outcome })?)
        }
        _ => {
            let (x, w) = (at(0)?, at(1)?);
            match (Coded::activation(m, x), Coded::constant(m, w, 0)) {
                (Some(x), Some(w)) => {
                    (x.codes, w.codes, Kind::Codes { x, w, outcome: Outcome::Float { bias: at(2) } })
                }
                _ => (x, w, Kind::Float { w, bias: at(2) }),
            }
        }
    };
    let shape = |v: Value| -> Option<Vec<usize>> { Some(m.consts[m.const_of(v)?].shape().to_vec()) };
    let (kernels, given) = (shape(w)?, Size::shape(m.ty(x))?);
    let [images, sizes @ ..] = &given[..] else { return None };
    let known = |s: &Size| s.known().and_then(|n| usize::try_from(n).ok());
    let image: Vec<usize> = std::iter::once(Some(1)).chain(sizes.iter().map(known)).collect::<Option<_>>()?;
    let conv = Conv::of(&data.attrs, &image, &kernels).ok()?;
    let elem = |v: Value| m.ty(v).elem();
    let bias = |v: Option<Value>, e: Elem| {
        v.is_none_or(|v| elem(v) == Some(e) && shape(v) == Some(vec![conv.filters]))
    };
    let each = |v: Value| count(v).is_some_and(|n| n == 1 || n == conv.filters as u64);
    let fits = match &kind {
        Kind::Float { bias: b, .. } => {
            elem(x) == Some(Elem::F32) && elem(w) == Some(Elem::F32) && bias(*b, Elem::F32)
        }
        Kind::Codes { x, w, outcome } => {
            let scaled = !matches!(outcome, Outcome::Sum);
            signed(m, x.codes).is_some()
                && signed(m, w.codes).is_some()
                && x.zero.is_none_or(|z| signed(m, z) == signed(m, x.codes) && one(z))
                && w.zero.is_none_or(|z| signed(m, z) == signed(m, w.codes) && each(z))
                && (!scaled || (count(x.scale) == Some(1) && each(w.scale)))
                && match outcome {
                    Outcome::Sum => true,
                    Outcome::Float { bias: b } => bias(*b, Elem::F32),
                    Outcome::Codes { bias: b, scale, .. } => bias(*b, Elem::I32) && count(*scale) == Some(1),
                }
        }
    };
    let fits = fits && Size::shape(m.ty(data.result(0)?)).is_some() && conv.depth > 0 && conv.filters > 0;
    fits.then(|| Product { x, conv, images: images.clone(), kind })
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
        let sums = match cell {
            _ if many => 24,
            Cell::Float(_) => 12,
            // A product of integers needs a register before it is added.
            _ => 8,
        };
        let (rows, blocks) = planes.blocks(POSITIONS);
        Form {
            groups: conv.groups,
            depth: cell.planes(conv.depth),
            taps: planes.taps(),
            filters,
            tile,
            tiles: filters.div_ceil(tile),
            wide: (sums / tile).min(WIDEST).min(planes.count(rows)),
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

    /// Whether the steps of a plane are written out one by one. Those of integers are not: LLVM adds them up in another order, in
    /// which registers do not suffice.
    fn unrolled(&self) -> bool {
        self.taps.len() <= TAPS && self.cell.elem() == Scalar::F32
    }

    /// How many bytes from the first element of a window each step is.
    fn offsets(&self) -> Vec<u64> {
        let plane = |i: usize| self.taps.iter().map(move |t| 4 * (i * self.planes.plane + t) as u64);
        (0..self.depth).flat_map(plane).collect()
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

/// The bytes of 4-byte elements.
fn bytes<T: Copy, const N: usize>(list: &[T], of: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    list.iter().flat_map(|&v| of(v)).collect()
}

/// Constants that a product and what is made of its sums need, each with an element for each filter.
struct Weights {
    packed: Vec<u8>,
    /// What sums start from.
    start: Vec<u8>,
    /// By what sums are multiplied, and what is added to that.
    factors: Option<Vec<f32>>,
    terms: Option<Vec<f32>>,
}

fn weights(m: &Module, form: &Form, conv: &Conv, kind: &Kind) -> Option<Weights> {
    let floats = |v: Value| Tensor::floats(&m.consts[m.const_of(v)?]).ok();
    let taps = form.taps.len();
    let given = |bias: Option<Value>| bias.map_or(Some(None), |b| floats(b).map(Some));
    let (x, w, outcome) = match kind {
        Kind::Float { w, bias } => {
            let w = floats(*w)?;
            let packed = form.pack(|filter, plane, tap, out| {
                out.copy_from_slice(&w[(filter * conv.depth + plane) * taps + tap].to_le_bytes());
            });
            let start = given(*bias)?.unwrap_or(vec![0.0; conv.filters]);
            return Some(Weights {
                packed,
                start: bytes(&start, f32::to_le_bytes),
                factors: None,
                terms: None,
            });
        }
        Kind::Codes { x, w, outcome } => (x, w, outcome),
    };
    let codes = w.numbers(m, 0)?;
    let packed = form.pack(|filter, plane, tap, out| {
        for (i, out) in out.chunks_exact_mut(2).enumerate() {
            let channel = 2 * plane + i;
            let at = (filter * conv.depth + channel) * taps + tap;
            let w = if channel < conv.depth { codes[at] } else { 0 };
            out.copy_from_slice(&(w as i16).to_le_bytes());
        }
    });
    let none = vec![0i32; conv.filters];
    let scales = |y: f32| -> Option<Vec<f32>> {
        let (x, w) = (x.scales(m, 1)?[0], w.scales(m, conv.filters)?);
        Some(w.into_iter().map(|w| x * w / y).collect())
    };
    let (start, factors, terms) = match outcome {
        Outcome::Sum => (none, None, None),
        Outcome::Float { bias } => (none, Some(scales(1.0)?), given(*bias)?),
        Outcome::Codes { bias, scale, .. } => {
            let start = match bias {
                Some(b) => {
                    let codes =
                        Tensor::from_const(&m.consts[m.const_of(*b)?]).ok()?.to_i64().ok()?.into_owned();
                    codes.into_iter().map(|b| b as i32).collect()
                }
                None => none,
            };
            (start, Some(scales(floats(*scale)?[0])?), None)
        }
    };
    Some(Weights { packed, start: bytes(&start, i32::to_le_bytes), factors, terms })
}

/// The kernels: planes are laid out, if the image is not read as it is, and multiplied.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let Product { x, conv, images, kind } = of(m, op)?;
    let cell = kind.cell(m)?;
    let form = Form::new(Planes::of(&conv.sliding, cell, target)?, cell, &conv, target);
    let domain = fused.domain()?;
    let epilogue = Epilogue::along(fused, &domain, (domain.len() - 2, form.planes.positions()), [])?;
    let Weights { packed, start, factors, terms } = weights(m, &form, &conv, &kind)?;
    let mut lowered = Lowered::default();
    let mut given = vec![fused.buffer(x, &mut lowered.blobs)?];
    let mut read = Vec::new();
    for &v in &epilogue.operands {
        read.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    if let Kind::Codes { x: Coded { zero: Some(zero), .. }, .. } = &kind {
        // Less the zero point is what the padding has too: nothing.
        let zero = fused.buffer(*zero, &mut lowered.blobs)?;
        given.push(zero);
    }
    let groups = images * form.groups.into();
    let x = match form.planes.direct {
        true => given.swap_remove(0),
        false => {
            let out = Buffer::Temp(lowered.temps.len());
            lowered.temps.push(form.planes.bytes(&groups, form.depth));
            given.insert(1, out.clone());
            lowered.steps.push(form.planes.lay(target, cell, conv.depth, &groups, given));
            out
        }
    };
    let steps = if form.unrolled() { Vec::new() } else { form.offsets() };
    let steps = bytes(&steps, u64::to_le_bytes);
    let mut buffers = vec![x];
    let own = [Some(packed), Some(start), Some(steps)].into_iter();
    let ends = [&factors, &terms].map(|list| list.as_ref().map(|list| bytes(list, f32::to_le_bytes)));
    for bytes in own.chain(ends).flatten() {
        buffers.push(Buffer::Blob(lowered.blobs.len()));
        lowered.blobs.push(Blob { bytes: bytes.into() });
    }
    let first = buffers.len();
    let results = fused.results().len();
    buffers.extend((0..results).map(Buffer::Result).chain(read));
    let zero = match &kind {
        Kind::Codes { outcome: Outcome::Codes { zero, .. }, .. } => Some(*zero),
        _ => None,
    };
    let ends = zero.map(|zero| Some((fused.register(zero), pointwise::number(m, zero)?)));
    let ends = ends.map_or(Some(None), |e| e.map(Some))?;
    let scaled = |b: &mut Body, a: &Args, channel: Val, sum: Val| -> Val {
        let own = |b: &mut Body, i: usize| {
            let list = a.buffer(b, i);
            let p = b.element(list, channel, Scalar::F32);
            let v = b.load(p, scalar(Scalar::F32));
            b.broadcast(v, sum.ty.lanes)
        };
        if factors.is_none() {
            return sum;
        }
        let (v, factor) = (b.cast(sum, Scalar::F32), own(b, FACTORS));
        let v = b.mul(v, factor);
        match (ends, &terms) {
            (Some((codes, zero)), _) => {
                let zero = b.splat(v.ty.of(codes), zero);
                quantize::rounded(b, v, Some(zero), codes)
            }
            (None, Some(_)) => {
                let term = own(b, FACTORS + 1);
                b.add(v, term)
            }
            (None, None) => v,
        }
    };
    let finish = |b: &mut Body, a: &Args, (spot, channel): (Spot, Val), sum: Val| {
        let lanes = form.planes.lanes;
        epilogue.emit(b, a, first + results, spot, lanes, |b, _| scaled(b, a, channel, sum))
    };
    let kernel = multiply(target, &form, first, results, &finish);
    let units = groups * (form.tiles * form.blocks).into();
    // Some 16 steps take a nanosecond.
    let work = form.tile * form.steps() * form.rows * form.planes.output[1] / 16 + 1;
    lowered.steps.push(Step { kernel, buffers, dims: Vec::new(), units, work: work.into() });
    Some(lowered)
}

/// The buffer of factors; after it that of terms.
const FACTORS: usize = 4;

/// What is made of the sums of a vector of positions of a channel: the lanes of each result.
type Finish<'f> = dyn Fn(&mut Body, &Args, (Spot, Val), Val) -> Vec<Val> + 'f;

/// The product. Buffers: planes, weights, what sums start from, where steps are, factors and terms if there are some, results
/// from `first` on, and what `finish` reads. A unit is some rows of positions of a tile of filters.
fn multiply(target: &Target, form: &Form, first: usize, results: usize, finish: &Finish) -> Kernel {
    let name = if form.cell.elem() == Scalar::F32 { "conv_f32" } else { "conv_int16" };
    Kernel::new(target, name, |b, a| {
        let [x, w, start, steps] = [0, 1, 2, 3].map(|i| a.buffer(b, i));
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
                    let sums = form.sums(b, [x, w, start, steps], filters, places);
                    for (i, sum) in sums.into_iter().enumerate() {
                        let (place, filter) = (places[i % places.len()], b.size(i / places.len()));
                        let (row, channel) = (b.add(row, filter), b.add(own, filter));
                        let spot = Spot { row, n: place.n, there: form.planes.there() };
                        let size = b.size(form.planes.positions());
                        let at = b.mul(row, size);
                        let at = b.add(at, place.n);
                        for (&y, v) in y.iter().zip(finish(b, a, (spot, channel), sum)) {
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
        let [x, w, start, steps] = buffers;
        let ty = vector(self.planes.lanes, self.cell.elem());
        let mut sums = Vec::new();
        for i in 0..filters {
            let p = b.at_const(start, i * 4);
            let start = b.load(p, scalar(ty.elem));
            let start = b.broadcast(start, ty.lanes);
            sums.extend(std::iter::repeat_n(start, places.len()));
        }
        let x: Vec<Val> = places.iter().map(|p| b.element(x, p.at, Scalar::F32)).collect();
        let none = b.size(0);
        if !self.unrolled() {
            let count = b.size(self.steps());
            return b.rolled(none, count, 1, &sums, |b, i, sums| {
                let p = b.element(steps, i, Scalar::I64);
                let step = b.load(p, scalar(Scalar::I64));
                let x: Vec<Val> = x.iter().map(|&x| b.at(x, step)).collect();
                let bytes = b.size(self.tile * 4);
                let at = b.mul(i, bytes);
                let w = b.at(w, at);
                let mut sums = sums.to_vec();
                self.step(b, &x, w, &mut sums);
                sums
            });
        }
        let planes = b.size(self.depth);
        b.repeat(none, planes, 1, &sums, |b, plane, sums| {
            let (step, line) = (b.size(self.planes.plane * 4), b.size(self.taps.len() * self.tile * 4));
            let (image, line) = (b.mul(plane, step), b.mul(plane, line));
            let x: Vec<Val> = x.iter().map(|&x| b.at(x, image)).collect();
            let w = b.at(w, line);
            let mut sums = sums.to_vec();
            for (i, &tap) in self.taps.iter().enumerate() {
                let x: Vec<Val> = x.iter().map(|&x| b.at_const(x, tap * 4)).collect();
                let w = b.at_const(w, i * self.tile * 4);
                self.step(b, &x, w, &mut sums);
            }
            sums
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
                *sum = match ty.elem {
                    Scalar::F32 => b.fma(w, x, *sum),
                    // Pairs of codes.
                    _ => {
                        let x = b.bitcast(x, vector(2 * ty.lanes, Scalar::I16));
                        fours::pairs(b, x, w, *sum)
                    }
                };
            }
        }
    }
}
