//! `com.microsoft.GatherBlockQuantized`: rows of a table of packed codes, as floats. An index out of range gives zeros, as it
//! does in ONNX Runtime.

use super::gather::{index_type, place};
use super::{Buffer, Kernel, Lowered, Step, elementwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Ty, Val, scalar, vector};
use dialects::ir::{Elem, Module, Op};

/// A table of V rows of K codes of `bits`, in blocks that share a scale.
struct Form {
    k: usize,
    block: usize,
    bits: usize,
    zeros: bool,
}

/// A table of two dims, gathered by rows and quantized along them: codes of 2, 4 or 8 bits in bytes, scales of f32.
pub fn supports(m: &Module, op: Op) -> bool {
    form(m, op).is_some()
}

fn form(m: &Module, op: Op) -> Option<Form> {
    let data = &m.ops[op];
    let int = |name: &str, default: i64| data.attrs.int(name).unwrap_or(default);
    let elem = |i: usize| data.operand(i).and_then(|v| m.ty(v).elem());
    let shape = |i: usize| data.operand(i).and_then(|v| Size::shape(m.ty(v)));
    index_type(m, data.operand(1)?)?;
    Size::shape(m.ty(data.operand(1)?))?;
    let [rows, width] = <[Size; 2]>::try_from(shape(0)?).ok()?;
    let bits = usize::try_from(int("bits", 4)).ok().filter(|b| [2, 4, 8].contains(b))?;
    let block = usize::try_from(int("block_size", 128)).ok().filter(|b| *b > 0 && b * bits % 8 == 0)?;
    let k = usize::try_from(width.known()?).ok()?.checked_mul(8 / bits)?;
    let axes = int("gather_axis", 0) == 0 && matches!(int("quantize_axis", 1), 1 | -1);
    let form = Form { k, block, bits, zeros: data.operand(3).is_some() };
    let scales = shape(2)? == [rows.clone(), form.groups().into()];
    let zeros = !form.zeros || (shape(3)? == [rows, form.zero_bytes().into()] && elem(3) == Some(Elem::U8));
    (axes && scales && zeros && elem(0) == Some(Elem::U8) && elem(2) == Some(Elem::F32)).then_some(form)
}

impl Form {
    fn groups(&self) -> usize {
        self.k.div_ceil(self.block)
    }

    fn zero_bytes(&self) -> usize {
        (self.groups() * self.bits).div_ceil(8)
    }
}

/// The kernel. Buffers: codes, indices, scales, result, and the zero points if there are some. Sizes: V. A unit is a row.
pub fn lower(fused: &Fused, target: &Target) -> Option<Lowered> {
    let (m, op) = (fused.module, fused.anchor()?);
    let form = form(m, op)?;
    let of = |i: usize| m.ops[op].operand(i);
    let index = index_type(m, of(1)?)?;
    let mut lowered = Lowered::default();
    let mut buffers = Vec::new();
    for i in 0..3 {
        buffers.push(fused.buffer(of(i)?, &mut lowered.blobs)?);
    }
    buffers.push(Buffer::Result(0));
    if form.zeros {
        buffers.push(fused.buffer(of(3)?, &mut lowered.blobs)?);
    }
    let kernel = Kernel::new(target, "gather_packed", |b, a| {
        let (codes, indices, scales, out) = (a.buffer(b, 0), a.buffer(b, 1), a.buffer(b, 2), a.buffer(b, 3));
        let zeros = form.zeros.then(|| a.buffer(b, 4));
        let rows = a.dim(b, 0);
        b.each(a.begin, a.end, 1, |b, unit| {
            let (at, fine) = place(b, indices, unit, index, rows);
            let row = |b: &mut Body, table: Val, at: Val, bytes: usize| {
                let bytes = b.size(bytes);
                let offset = b.mul(at, bytes);
                b.at(table, offset)
            };
            let y = row(b, out, unit, 4 * form.k);
            let picked = |b: &mut Body| {
                let codes = row(b, codes, at, form.k * form.bits / 8);
                let scales = row(b, scales, at, 4 * form.groups());
                let zeros = zeros.map(|z| row(b, z, at, form.zero_bytes()));
                let (zero, full) = (b.size(0), b.size(form.k / form.block));
                b.each(zero, full, 1, |b, g| form.group(b, codes, scales, zeros, y, g, form.block));
                if form.k % form.block > 0 {
                    form.group(b, codes, scales, zeros, y, full, form.k % form.block);
                }
            };
            b.when_else(fine, picked, |b| {
                let (zero, k) = (b.size(0), b.size(form.k));
                elementwise::vector_loop(b, zero, k, b.target.lanes(), |b, i, lanes| {
                    let none = b.splat(Ty { elem: Scalar::F32, lanes }, 0.0);
                    let at = b.element(y, i, Scalar::F32);
                    b.store(none, at);
                });
            });
        });
    });
    let units = Size::product(&fused.shape(of(1)?)?);
    let (dims, work) = (vec![fused.shape(of(0)?)?[0].clone()], (form.k / 4).into());
    lowered.steps.push(Step { kernel, buffers, dims, units, work });
    Some(lowered)
}

impl Form {
    /// Block `g` of a row, of which `count` codes are there: (code - zero point) * scale.
    #[allow(clippy::too_many_arguments)]
    fn group(&self, b: &mut Body, codes: Val, scales: Val, zeros: Option<Val>, y: Val, g: Val, count: usize) {
        let (bits, per) = (self.bits, 8 / self.bits);
        let at = b.element(scales, g, Scalar::F32);
        let scale = b.load(at, scalar(Scalar::F32));
        let zero = match zeros {
            Some(zeros) => self.zero(b, zeros, g),
            None => b.splat(scalar(Scalar::F32), f64::from(1u32 << (bits - 1))),
        };
        let block = b.size(self.block);
        let first = b.mul(g, block);
        let y = b.element(y, first, Scalar::F32);
        let start = b.size(self.block * bits / 8);
        let start = b.mul(g, start);
        let codes = b.at(codes, start);
        // As many bytes at a time as divide the block.
        let bytes = count * bits / 8;
        let width = (1usize << bytes.trailing_zeros()).min(b.target.lanes());
        let mask = b.splat(vector(width, Scalar::I32), f64::from((1u32 << bits) - 1));
        let (from, to) = (b.size(0), b.size(bytes));
        b.each(from, to, width, |b, i| {
            let at = b.at(codes, i);
            let packed = b.load(at, vector(width, Scalar::I8));
            let packed = b.widen_unsigned(packed, Scalar::I32);
            let plane = |b: &mut Body, p: usize| {
                let v = b.shr(packed, p * bits);
                b.and(v, mask)
            };
            let planes: Vec<Val> = (0..per).map(|p| plane(b, p)).collect();
            let all = interleave(b, &planes);
            let all = b.cast(all, Scalar::F32);
            let (zero, scale) = (b.broadcast(zero, all.ty.lanes), b.broadcast(scale, all.ty.lanes));
            let all = b.sub(all, zero);
            let all = b.mul(all, scale);
            let per = b.size(per);
            let at = b.mul(i, per);
            let at = b.element(y, at, Scalar::F32);
            b.store(all, at);
        });
    }

    /// The zero point of block `g`.
    fn zero(&self, b: &mut Body, zeros: Val, g: Val) -> Val {
        let (bits, per) = (self.bits, 8 / self.bits);
        let by = b.size(per);
        let byte = b.div(g, by);
        let at = b.at(zeros, byte);
        let mut code = b.load(at, scalar(Scalar::I8));
        // Shifted by the place within the byte, one bit of it after the other.
        for level in 0..per.trailing_zeros() as usize {
            let bit = b.splat(scalar(Scalar::I64), (1u32 << level).into());
            let set = b.and(g, bit);
            let set = b.cmp(crate::text::Cmp::Eq, set, bit);
            let moved = b.shr(code, bits << level);
            code = b.select(set, moved, code);
        }
        let code = b.widen_unsigned(code, Scalar::I32);
        let mask = b.int(Scalar::I32, (1i64 << bits) - 1);
        let code = b.and(code, mask);
        b.cast(code, Scalar::F32)
    }
}

/// Lane 0 of each, then lane 1 of each, and so on; of one, two or four.
fn interleave(b: &mut Body, planes: &[Val]) -> Val {
    let pair = |b: &mut Body, x: Val, y: Val| {
        let n = x.ty.lanes;
        let order: Vec<usize> = (0..2 * n).map(|i| i / 2 + i % 2 * n).collect();
        b.shuffle(x, y, &order)
    };
    match *planes {
        [x] => x,
        [x, y] => pair(b, x, y),
        [x, y, z, w] => {
            let (even, odd) = (pair(b, x, z), pair(b, y, w));
            pair(b, even, odd)
        }
        _ => unreachable!("codes of 2, 4 or 8 bits"),
    }
}
