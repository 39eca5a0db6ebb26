//! Blocks: 16 outputs by one group, the unit that is loaded, quantized and written. One lane is one output, so
//! that the arithmetic of a group runs down the lanes in order and vectorizes without shuffles.

use super::{GridError, Parts, Quantizer, Spec, Stats};
use dialects::tensor::Tensor;
use half::{bf16, f16};
use multiversion::multiversion;
use std::ops::Range;

/// Outputs of a block.
pub const LANES: usize = 16;

/// Weights of one group (rows, in order along K) of [`LANES`] outputs. Outputs past N are zero.
pub type Block = [[f32; LANES]];

/// How the float matrix lies in memory, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[K, N]`: an ONNX MatMul weight.
    Kn,
    /// `[N, K]`: a Gemm weight with `transB`, an embedding.
    Nk,
}

/// Element types that can be quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Float {
    F32,
    F16,
    BF16,
}

/// A float matrix: little-endian bytes of any alignment, such as a slice of a mapped file.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// The elements.
    pub bytes: &'a [u8],
    /// Their type.
    pub float: Float,
    /// Their order.
    pub layout: Layout,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// Where a block lies.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// The first output.
    pub n: usize,
    /// Outputs that exist, at most [`LANES`].
    pub lanes: usize,
    /// The group along K.
    pub group: usize,
}

/// The result of a block, one lane per output.
#[derive(Debug)]
pub struct BlockOut<'a> {
    /// Scales, as stored.
    pub scale: [f32; LANES],
    /// Zero points: whole numbers.
    pub zero: [f32; LANES],
    /// Codes, low-first in words of 32 bits; zero on entry.
    pub words: &'a mut [[u32; LANES]],
}

impl Matrix<'_> {
    fn width(&self) -> usize {
        match self.float {
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
        }
    }

    pub(super) fn check(&self) -> Result<(), GridError> {
        let expected = self.n.checked_mul(self.k).and_then(|c| c.checked_mul(self.width()));
        if expected != Some(self.bytes.len()) {
            let expected = expected.unwrap_or(usize::MAX);
            return Err(GridError::Length { what: "bytes of the weight", expected, found: self.bytes.len() });
        }
        Ok(())
    }

    /// Element `i` in memory order.
    fn get(&self, i: usize) -> f32 {
        let b = &self.bytes[i * self.width()..];
        match self.float {
            Float::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Float::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
            Float::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        }
    }

    /// The weight of output `n` and input `k`.
    pub fn at(&self, n: usize, k: usize) -> f32 {
        self.get(match self.layout {
            Layout::Kn => k * self.n + n,
            Layout::Nk => n * self.k + k,
        })
    }

    /// The matrix in memory: `[N, K]`, or `[K, N]` without `rows_are_outputs`.
    pub fn tensor(&self, rows_are_outputs: bool) -> Tensor {
        let (rows, columns) = if rows_are_outputs { (self.n, self.k) } else { (self.k, self.n) };
        let as_stored = rows_are_outputs == (self.layout == Layout::Nk);
        let at = |r: usize, c: usize| if as_stored { r * columns + c } else { c * rows + r };
        let values: Vec<f32> =
            (0..rows).flat_map(|r| (0..columns).map(move |c| self.get(at(r, c)))).collect();
        Tensor::new(&[rows, columns], values).expect("a matrix has rows times columns elements")
    }

    /// How many elements are NaN or infinite, and output and input of the one that is first in memory.
    pub(super) fn first_not_finite(&self) -> Option<(u64, usize, usize)> {
        let bad = |&i: &usize| !self.get(i).is_finite();
        let first = (0..self.n * self.k).find(bad)?;
        let count = (first..self.n * self.k).filter(bad).count() as u64;
        let (n, k) = match self.layout {
            Layout::Kn => (first % self.n, first / self.n),
            Layout::Nk => (first / self.k, first % self.k),
        };
        Some((count, n, k))
    }

    /// Loads inputs `rows` of outputs `columns` into `out`: blocks of `rows.len()` rows, one after the other.
    pub(super) fn load(&self, columns: &Range<usize>, rows: &Range<usize>, out: &mut [[f32; LANES]]) {
        match self.layout {
            Layout::Kn => {
                for (i, k) in rows.clone().enumerate() {
                    let at = (k * self.n + columns.start) * self.width();
                    let row = &self.bytes[at..at + columns.len() * self.width()];
                    load_row(row, self.float, i, rows.len(), out);
                }
            }
            Layout::Nk => {
                let mut row = vec![0.0; rows.len() * LANES];
                for (b, block) in
                    out.chunks_exact_mut(rows.len()).take(columns.len().div_ceil(LANES)).enumerate()
                {
                    let first = columns.start + b * LANES;
                    let lanes = LANES.min(columns.end - first);
                    for (l, row) in row.chunks_exact_mut(rows.len()).enumerate().take(lanes) {
                        let at = ((first + l) * self.k + rows.start) * self.width();
                        widen(&self.bytes[at..at + rows.len() * self.width()], self.float, row);
                    }
                    transpose(&row, block);
                }
            }
        }
    }
}

/// `to[k][l] = from[l * rows + k]`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma+f16c"))]
fn transpose(from: &[f32], to: &mut [[f32; LANES]]) {
    let rows = to.len();
    let (whole, rest) = to.as_chunks_mut::<LANES>();
    // A square at a time, so that the rows' cache lines are read once.
    for (c, square) in whole.iter_mut().enumerate() {
        let mut t = [[0.0f32; LANES]; LANES];
        for (l, t) in t.iter_mut().enumerate() {
            t.copy_from_slice(&from[l * rows + c * LANES..][..LANES]);
        }
        for (k, row) in square.iter_mut().enumerate() {
            for (x, t) in row.iter_mut().zip(&t) {
                *x = t[k];
            }
        }
    }
    let start = whole.len() * LANES;
    for (k, x) in rest.iter_mut().enumerate() {
        for (l, x) in x.iter_mut().enumerate() {
            *x = from[l * rows + start + k];
        }
    }
}

/// Widens little-endian f16 or bf16 bytes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma+f16c"))]
fn widen(bytes: &[u8], float: Float, out: &mut [f32]) {
    match float {
        Float::F32 => {
            for (b, x) in bytes.chunks_exact(4).zip(out) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Float::BF16 => {
            for (b, x) in bytes.chunks_exact(2).zip(out) {
                *x = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
            }
        }
        Float::F16 => {
            for (b, x) in bytes.chunks_exact(2).zip(out) {
                *x = widen_f16(u16::from_le_bytes([b[0], b[1]]));
            }
        }
    }
}

/// f16 to f32 without a branch: exponent and fraction are shifted into place and rescaled by `2^112`, which also
/// normalizes subnormals; infinities and NaN overflow and get their exponent put back.
#[inline(always)]
fn widen_f16(h: u16) -> f32 {
    let magnitude = f32::from_bits(((h & 0x7fff) as u32) << 13) * f32::from_bits(0x7780_0000);
    let special = if h & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | ((h & 0x8000) as u32) << 16)
}

/// Puts one row of a `[K, N]` matrix into row `i` of each block of `rows` rows.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma+f16c"))]
fn load_row(row: &[u8], float: Float, i: usize, rows: usize, out: &mut [[f32; LANES]]) {
    let width = if float == Float::F32 { 4 } else { 2 };
    let pieces = row.chunks(LANES * width);
    let blocks = out.chunks_exact_mut(rows);
    match float {
        Float::F32 => {
            for (piece, block) in pieces.zip(blocks) {
                match bytemuck::try_pod_read_unaligned::<[[u8; 4]; LANES]>(piece) {
                    Ok(piece) => block[i] = piece.map(f32::from_le_bytes),
                    Err(_) => {
                        for (x, b) in block[i].iter_mut().zip(piece.chunks_exact(4)) {
                            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                        }
                    }
                }
            }
        }
        Float::F16 => {
            for (piece, block) in pieces.zip(blocks) {
                for (x, b) in block[i].iter_mut().zip(piece.chunks_exact(2)) {
                    *x = widen_f16(u16::from_le_bytes([b[0], b[1]]));
                }
            }
        }
        Float::BF16 => {
            for (piece, block) in pieces.zip(blocks) {
                for (x, b) in block[i].iter_mut().zip(piece.chunks_exact(2)) {
                    *x = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
                }
            }
        }
    }
}

/// What became of a block, summed in double.
fn exact(spec: &Spec, x: &Block, out: &BlockOut) -> Stats {
    let (per_word, mask) = (32 / spec.container(), (1u32 << spec.container()) - 1);
    let mut stats = Stats::default();
    for (k, row) in x.iter().enumerate() {
        let (word, shift) = (k as u32 / per_word, k as u32 % per_word * spec.container());
        for (l, &weight) in row.iter().enumerate() {
            let code = out.words[word as usize][l] >> shift & mask;
            let back = (code as f32 - out.zero[l]) * out.scale[l];
            let weight = f64::from(weight);
            let e = (f64::from(back) - weight).abs();
            stats.add(&Stats { error2: e * e, error1: e, weight2: weight * weight, max_error: e });
        }
    }
    stats
}

/// Quantizes outputs `columns` over all of K into their runs of each part, group by group.
pub(super) fn tile<Q: Quantizer>(
    w: &Matrix,
    spec: &Spec,
    method: &Q,
    columns: Range<usize>,
    parts: Parts,
) -> Stats {
    let Parts { codes, scales, mut zero_points } = parts;
    let (kb, blob) = (spec.groups(w.k), spec.blob());
    let blocks = columns.len().div_ceil(LANES);
    let mut x = vec![[0.0; LANES]; blocks * spec.group_size.min(w.k)];
    let mut words = vec![[0; LANES]; blob.div_ceil(4)];
    let mut space = method.space(spec);
    let mut total = Stats::default();
    for group in 0..kb {
        let rows = group * spec.group_size..w.k.min((group + 1) * spec.group_size);
        let x = &mut x[..blocks * rows.len()];
        w.load(&columns, &rows, x);
        for (b, block) in x.chunks_exact_mut(rows.len()).enumerate() {
            let lanes = LANES.min(columns.len() - b * LANES);
            if lanes < LANES {
                block.iter_mut().for_each(|row| row[lanes..].fill(0.0));
            }
            let at = At { n: columns.start + b * LANES, lanes, group };
            words.fill([0; LANES]);
            let mut out = BlockOut { scale: [0.0; LANES], zero: [0.0; LANES], words: &mut words };
            let mut stats = method.block(spec, at, block, &mut out, &mut space);
            if stats.lost(block.len() * LANES) {
                stats = exact(spec, block, &out);
            }
            total.add(&stats);
            for lane in 0..lanes {
                let index = (b * LANES + lane) * kb + group;
                scales[index] = out.scale[lane];
                if let Some(z) = zero_points.as_deref_mut() {
                    z[index] = out.zero[lane] as u8;
                }
                let blob = &mut codes[index * blob..][..blob];
                let (whole, rest) = blob.as_chunks_mut::<4>();
                for (bytes, word) in whole.iter_mut().zip(&*out.words) {
                    *bytes = word[lane].to_le_bytes();
                }
                if let Some(word) = out.words.get(whole.len()) {
                    rest.copy_from_slice(&word[lane].to_le_bytes()[..rest.len()]);
                }
            }
        }
    }
    total
}
