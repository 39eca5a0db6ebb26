//! MaxPool and AveragePool over one or two dims: windows over [`planes`](super::planes), a vector of positions at a time, and
//! the elementwise ops after them.
//!
//! Codes are counted in floats, which hold them exactly. Cells are added up in order, as the interpreter does.

use super::epilogue::{Epilogue, Spot};
use super::planes::{Cell, Planes, TAPS};
use super::{Blob, Buffer, Kernel, Lowered, Step, elementwise, pointwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op, Value};
use dialects::onnx::{Sliding, Window};

/// Vectors of positions at a time.
const WIDE: usize = 4;

/// A pool: what it reads, the windows, and channels of all images.
struct Pool {
    x: Value,
    cell: Cell,
    average: bool,
    sliding: Sliding,
    channels: Size,
}

/// f32, and codes of 8 bits for MaxPool; over one or two dims of known size; without the places of maxima.
pub fn supports(m: &Module, op: Op) -> bool {
    of(m, op).is_some_and(|p| Planes::of(&p.sliding, p.cell, &Target::native()).is_some())
}

/// The windows of a pool over an operand of known spatial sizes.
pub fn windows(m: &Module, op: Op) -> Option<(Vec<Size>, Sliding)> {
    let data = &m.ops[op];
    let shape = Size::shape(m.ty(data.operand(0)?))?;
    let known = |s: &Size| s.known().and_then(|n| usize::try_from(n).ok());
    let spatial: Vec<usize> = shape.get(2..)?.iter().map(known).collect::<Option<_>>()?;
    let sliding = Window::of_pool(&data.attrs).ok()?.slide(&spatial).ok()?;
    Some((shape, sliding))
}

/// Whether one window is the whole image.
pub fn is_global(m: &Module, op: Op) -> bool {
    windows(m, op).is_some_and(|(_, s)| {
        let none = |padding: &[usize]| padding.iter().all(|&p| p == 0);
        s.kernel == s.input && s.positions() == 1 && none(&s.begin) && none(&s.end)
    })
}

fn of(m: &Module, op: Op) -> Option<Pool> {
    let data = &m.ops[op];
    let x = data.operand(0)?;
    let average = data.is("onnx.AveragePool");
    let cell = match m.ty(x).elem()? {
        Elem::F32 if average => Cell::Float(0.0),
        Elem::F32 => Cell::Float(f64::NEG_INFINITY),
        Elem::U8 if !average => Cell::Code { signed: false, padding: 0.0 },
        Elem::I8 if !average => Cell::Code { signed: true, padding: -128.0 },
        _ => return None,
    };
    let (shape, sliding) = windows(m, op)?;
    Size::shape(m.ty(data.result(0)?))?;
    let one = data.results.iter().flatten().count() == 1;
    one.then(|| Pool { x, cell, average, sliding, channels: Size::product(&shape[..2]) })
}

/// The kernels. Buffers of the second: planes, cells of a window, what sums are divided by, results, and what is read with them.
/// A unit is a channel.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let Pool { x, cell, average, sliding, channels } = of(fused.module, fused.anchor()?)?;
    let padding = fused.module.ops[fused.anchor()?].attrs.int("count_include_pad").unwrap_or(0) != 0;
    let planes = Planes::of(&sliding, cell, target)?;
    let (domain, taps) = (fused.domain()?, planes.taps());
    let epilogue = Epilogue::along(fused, &domain, (domain.len() - 2, planes.positions()), [])?;
    let mut lowered = Lowered::default();
    let mut x = fused.buffer(x, &mut lowered.blobs)?;
    let mut read = Vec::new();
    for &v in &epilogue.operands {
        read.push(fused.buffer(v, &mut lowered.blobs)?);
    }
    if !planes.direct {
        lowered.temps.push(planes.bytes(&channels, 1));
        lowered.steps.push(planes.lay(target, cell, 1, &channels, vec![x, Buffer::Temp(0)]));
        x = Buffer::Temp(0);
    }
    let mut buffers = vec![x];
    let mut blob = |bytes: Vec<u8>| {
        lowered.blobs.push(Blob { bytes: bytes.into() });
        Buffer::Blob(lowered.blobs.len() - 1)
    };
    buffers.push(blob(taps.iter().flat_map(|&t| (4 * t as u64).to_le_bytes()).collect()));
    if average {
        buffers.push(blob(sliding.counts(padding).iter().flat_map(|&n| (n as f32).to_le_bytes()).collect()));
    }
    let first = buffers.len();
    let results = fused.results().len();
    buffers.extend((0..results).map(Buffer::Result).chain(read));
    let elem = if matches!(cell, Cell::Code { .. }) { Scalar::I8 } else { Scalar::F32 };
    let ty = vector(planes.lanes, Scalar::F32);
    let wide = WIDE.min(planes.count(planes.output[0]));
    let kernel = Kernel::new(target, "pool", |b, a| {
        let (x, offsets) = (a.buffer(b, 0), a.buffer(b, 1));
        let counts = average.then(|| a.buffer(b, 2));
        let y: Vec<Val> = (0..results).map(|i| a.buffer(b, first + i)).collect();
        b.each(a.begin, a.end, 1, |b, row| {
            let bytes = b.size(planes.plane * 4);
            let start = b.mul(row, bytes);
            let x = b.at(x, start);
            let (none, height) = (b.size(0), b.size(planes.output[0]));
            planes.vectors(b, none, height, wide, |b, places| {
                let x: Vec<Val> = places.iter().map(|p| b.element(x, p.at, Scalar::F32)).collect();
                let join =
                    |b: &mut Body, all: Val, v: Val| if average { b.add(all, v) } else { b.max(all, v) };
                let cell_at = |b: &mut Body, tap: Val, all: &[Val]| -> Vec<Val> {
                    let each = x.iter().zip(all).map(|(&x, &all)| {
                        let p = b.at(x, tap);
                        let v = b.load(p, ty);
                        join(b, all, v)
                    });
                    each.collect()
                };
                let lowest = if average { 0.0 } else { f64::NEG_INFINITY };
                let mut all = vec![b.splat(ty, lowest); places.len()];
                if taps.len() <= TAPS {
                    for &tap in &taps {
                        let tap = b.size(tap * 4);
                        all = cell_at(b, tap, &all);
                    }
                } else {
                    let count = b.size(taps.len());
                    all = b.repeat(none, count, 1, &all, |b, i, all| {
                        let p = b.element(offsets, i, Scalar::I64);
                        let tap = b.load(p, scalar(Scalar::I64));
                        cell_at(b, tap, all)
                    });
                }
                for (v, place) in all.into_iter().zip(places) {
                    let spot = Spot { row, n: place.n, there: planes.there() };
                    let v = match counts {
                        Some(counts) => {
                            let p = b.element(counts, place.n, Scalar::F32);
                            let n = b.load_some(p, ty, spot.there);
                            b.div(v, n)
                        }
                        None if elem == Scalar::I8 => {
                            let code = b.cast(v, Scalar::I32);
                            b.cast(code, Scalar::I8)
                        }
                        None => v,
                    };
                    let size = b.size(planes.positions());
                    let at = b.mul(row, size);
                    let at = b.add(at, place.n);
                    let out = epilogue.emit(b, a, first + results, spot, planes.lanes, |_, _| v);
                    for (&y, v) in y.iter().zip(out) {
                        let y = elementwise::element(b, y, at, v.ty.elem);
                        pointwise::store_some(b, v, y, spot.there);
                    }
                }
            });
        });
    });
    let work = planes.positions() * taps.len() / 8 + 4;
    lowered.steps.push(Step { kernel, buffers, dims: Vec::new(), units: channels, work: work.into() });
    Some(lowered)
}
