//! AMX: eight registers that are tiles of 16 rows of 64 bytes at most, and the product of two of them.
//!
//! A kernel says once how large its tiles are ([`Body::tiles`]), and releases them when it is done. The system keeps their
//! contents from one thread to the next only for a process that has asked for it, which `qcc_version` does.
//!
//! Source: Intel, "Software Developer's Manual" volume 1, chapter 18.

use super::{Body, Intrinsic, Scalar, Val, list, scalar, vector};
use crate::target::Feature;

/// Bytes of a row of a tile.
const ROW: usize = 64;
/// Rows of a tile.
const ROWS: usize = 16;

/// The tiles of a kernel.
#[derive(Clone)]
pub struct Tiles {
    /// Rows, and bytes of each, of every tile.
    shapes: Vec<(usize, usize)>,
    /// Memory in place of the registers: see [`Target::emulated`](crate::Target::emulated).
    memory: Option<Val>,
}

impl Body<'_> {
    /// Lays out the tiles: rows, and bytes of each.
    pub fn tiles(&mut self, shapes: &[(usize, usize)]) -> Tiles {
        assert!(self.target.has(Feature::AmxInt8), "tiles for {}", self.target);
        assert!(shapes.len() <= 8 && shapes.iter().all(|&(rows, bytes)| rows <= ROWS && bytes <= ROW));
        let shapes = shapes.to_vec();
        if self.target.is_emulated() {
            let memory = Some(self.room(shapes.len() * ROWS * ROW / 8));
            return Tiles { shapes, memory };
        }
        // The palette; bytes of rows from byte 16 on, two each; rows from byte 48 on.
        let config = self.room(8);
        let mut bytes = [0u8; 64];
        bytes[0] = 1;
        for (i, &(rows, row)) in shapes.iter().enumerate() {
            bytes[16 + 2 * i] = row as u8;
            bytes[48 + i] = rows as u8;
        }
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let word = self.int(Scalar::I64, i64::from_le_bytes(word.try_into().expect("eight bytes")));
            let at = self.at_const(config, 8 * i);
            self.store(word, at);
        }
        self.call_void("llvm.x86.ldtilecfg", &[config]);
        Tiles { shapes, memory: None }
    }

    fn call_void(&mut self, name: &str, args: &[Val]) {
        let types = list(args.iter().map(|a| a.ty));
        self.line(format_args!("llvm.call_intrinsic \"{name}\"({}) : ({types}) -> ()", list(args)));
    }
}

impl Tiles {
    fn number(b: &mut Body, tile: usize) -> Val {
        b.int(Scalar::I8, tile as i64)
    }

    /// Where a tile is, of those in memory.
    fn place(b: &mut Body, memory: Val, tile: usize) -> Val {
        b.at_const(memory, tile * ROWS * ROW)
    }

    /// Moves the rows of a tile, `stride` bytes apart at `ptr`, from or to memory in place of registers.
    fn moved(&self, b: &mut Body, (memory, tile): (Val, usize), ptr: Val, stride: Val, load: bool) {
        let (rows, bytes) = self.shapes[tile];
        let own = Tiles::place(b, memory, tile);
        let (zero, end) = (b.size(0), b.size(rows));
        b.each(zero, end, 1, |b, row| {
            let (other, width) = (b.mul(row, stride), b.size(ROW));
            let here = b.mul(row, width);
            let (other, here) = (b.at(ptr, other), b.at(own, here));
            let (from, to) = if load { (other, here) } else { (here, other) };
            let v = b.load(from, vector(bytes, Scalar::I8));
            b.store(v, to);
        });
    }

    /// All zeros.
    pub fn zero(&self, b: &mut Body, tile: usize) {
        let Some(memory) = self.memory else {
            let tile = Tiles::number(b, tile);
            return b.call_void("llvm.x86.tilezero", &[tile]);
        };
        let at = Tiles::place(b, memory, tile);
        let none = b.splat(vector(ROW / 4, Scalar::I32), 0.0);
        for row in 0..ROWS {
            let at = b.at_const(at, row * ROW);
            b.store(none, at);
        }
    }

    /// Reads rows that are `stride` bytes apart.
    pub fn load(&self, b: &mut Body, tile: usize, ptr: Val, stride: usize) {
        let stride = b.size(stride);
        if let Some(memory) = self.memory {
            return self.moved(b, (memory, tile), ptr, stride, true);
        }
        let tile = Tiles::number(b, tile);
        b.call_void("llvm.x86.tileloadd64", &[tile, ptr, stride]);
    }

    /// Writes rows that are `stride` bytes apart.
    pub fn store(&self, b: &mut Body, tile: usize, ptr: Val, stride: usize) {
        let stride = b.size(stride);
        if let Some(memory) = self.memory {
            return self.moved(b, (memory, tile), ptr, stride, false);
        }
        let tile = Tiles::number(b, tile);
        b.call_void("llvm.x86.tilestored64", &[tile, ptr, stride]);
    }

    /// Adds to the i32 of `sums` the products of rows of `x` with columns of `w`, in which four bytes of a column lie side by
    /// side. One of them is unsigned: `x`, or else `w`.
    pub fn dot(&self, b: &mut Body, (sums, x, w): (usize, usize, usize), unsigned_x: bool) {
        let ((m, n), (x_rows, depth), (w_rows, columns)) =
            (self.shapes[sums], self.shapes[x], self.shapes[w]);
        assert_eq!((x_rows, w_rows, columns), (m, depth / 4, n), "tiles that do not meet");
        let Some(memory) = self.memory else {
            let name = if unsigned_x { "llvm.x86.tdpbusd" } else { "llvm.x86.tdpbsud" };
            let args = [sums, x, w].map(|t| Tiles::number(b, t));
            return b.call_void(name, &args);
        };
        let [sums, x, w] = [sums, x, w].map(|t| Tiles::place(b, memory, t));
        let (words, bytes) = (vector(ROW / 4, Scalar::I32), vector(ROW, Scalar::I8));
        let (zero, rows, deep) = (b.size(0), b.size(m), b.size(depth / 4));
        b.each(zero, rows, 1, |b, row| {
            let width = b.size(ROW);
            let at = b.mul(row, width);
            let (sums, x) = (b.at(sums, at), b.at(x, at));
            b.each(zero, deep, 1, |b, k| {
                let x = b.element(x, k, Scalar::I32);
                let x = b.load(x, scalar(Scalar::I32));
                let x = b.broadcast(x, ROW / 4);
                let x = b.bitcast(x, bytes);
                let at = b.mul(k, width);
                let w = b.at(w, at);
                let w = b.load(w, bytes);
                let sum = b.load(sums, words);
                let (unsigned, signed) = if unsigned_x { (x, w) } else { (w, x) };
                let sum = b.intrinsic(Intrinsic::Vpdpbusd, &[sum, unsigned, signed], words);
                b.store(sum, sums);
            });
        });
    }

    /// Gives the tiles back: what a thread does not use need not be kept.
    pub fn release(&self, b: &mut Body) {
        if self.memory.is_none() {
            b.call_void("llvm.x86.tilerelease", &[]);
        }
    }
}
