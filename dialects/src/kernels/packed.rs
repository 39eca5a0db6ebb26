//! Packed integer weights: rows of codes in groups along K, and their values.
//!
//! Row `n` holds `kb = ceil(K / group)` groups, each of `ceil(group * container / 8)` bytes, codes low-first, the last
//! group padded. `W[n, k] = (code - zero_point) * scale`, one rounding to f32.

use crate::ops::OpError;
use multiversion::multiversion;
use rayon::prelude::*;
use std::borrow::Cow;

/// A packed `[N, K]` matrix.
pub struct Packed<'a> {
    /// `[N, kb, ceil(group * container / 8)]`.
    pub codes: &'a [u8],
    /// `[N, kb]`.
    pub scales: Cow<'a, [f32]>,
    /// `[N, kb]`.
    pub zeros: Vec<f32>,
    /// Rows.
    pub n: usize,
    /// Elements of a row.
    pub k: usize,
    /// Elements that share a scale.
    pub group: usize,
    /// Bits that a code takes: 2, 4 or 8.
    pub container: usize,
}

/// The bits of `codes`, low-first, of `bits` each (2, 4 or 8).
pub fn code(bytes: &[u8], bits: usize, i: usize) -> u8 {
    let per = 8 / bits;
    let mask = (0xffu32 >> (8 - bits)) as u8;
    bytes[i / per] >> (i % per * bits) & mask
}

impl Packed<'_> {
    /// Groups per row.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group)
    }

    /// Bytes per group.
    pub fn group_bytes(&self) -> usize {
        (self.group * self.container).div_ceil(8)
    }

    /// Checks that codes, scales and zero points have the lengths that the shape asks for.
    pub fn checked(self) -> Result<Self, OpError> {
        // The bound on the group keeps the arithmetic below inside 64 bits.
        if self.group == 0 || self.group >= 1 << 32 || !matches!(self.container, 2 | 4 | 8) {
            let message = format!("a group of {} codes of {} bits", self.group, self.container);
            return Err(OpError::Unsupported(message));
        }
        let groups = self.n.checked_mul(self.groups());
        let bytes = groups.and_then(|g| g.checked_mul(self.group_bytes()));
        let (n, k) = (self.n, self.k);
        for (what, found, expected) in [
            ("bytes of codes", self.codes.len(), bytes),
            ("scales", self.scales.len(), groups),
            ("zero points", self.zeros.len(), groups),
        ] {
            if Some(found) != expected {
                let group = self.group;
                let expected = expected.map_or("more than can be counted".into(), |e| e.to_string());
                return Err(OpError::invalid(format!(
                    "a packed [{n}, {k}] weight in groups of {group} has {found} {what}, expected {expected}"
                )));
            }
        }
        Ok(self)
    }

    /// Elements `from..from + out.len()` of row `n`.
    pub fn unpack(&self, n: usize, from: usize, out: &mut [f32]) {
        let (groups, bytes) = (self.groups(), self.group_bytes());
        let (mut at, mut out) = (from, out);
        while !out.is_empty() {
            let (g, inside) = (at / self.group, at % self.group);
            let (piece, rest) = out.split_at_mut((self.group - inside).min(out.len()));
            let index = n * groups + g;
            let (codes, scale, zero) =
                (&self.codes[index * bytes..][..bytes], self.scales[index], self.zeros[index]);
            if (inside * self.container).is_multiple_of(8) {
                values(self.container, &codes[inside * self.container / 8..], zero, scale, piece);
            } else {
                for (i, o) in piece.iter_mut().enumerate() {
                    *o = (f32::from(code(codes, self.container, inside + i)) - zero) * scale;
                }
            }
            at += piece.len();
            out = rest;
        }
    }

    /// Row `n`, whose element `i` has the scale and zero point of group `groups[i]`.
    pub fn unpack_by(&self, n: usize, groups: &[usize], out: &mut [f32]) {
        let (row, bytes) = (n * self.groups(), self.group_bytes());
        for (i, (o, &g)) in out.iter_mut().zip(groups).enumerate() {
            let codes = &self.codes[(row + i / self.group) * bytes..][..bytes];
            let code = f32::from(code(codes, self.container, i % self.group));
            *o = (code - self.zeros[row + g]) * self.scales[row + g];
        }
    }

    /// Rows `from..to`, whole, row-major.
    pub fn unpack_rows(&self, from: usize, to: usize, out: &mut [f32]) {
        if self.k > 0 {
            (from..to).zip(out.chunks_exact_mut(self.k)).for_each(|(n, out)| self.unpack(n, 0, out));
        }
    }

    /// The whole matrix as `[N, K]`, on threads.
    pub fn dense(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.n * self.k];
        if self.k > 0 {
            let rows = (1usize << 16).div_ceil(self.k);
            out.par_chunks_mut(rows * self.k).enumerate().for_each(|(i, out)| {
                self.unpack_rows(i * rows, i * rows + out.len() / self.k, out);
            });
        }
        out
    }

    /// The whole matrix as `[K, N]`, on threads.
    pub fn dense_transposed(&self) -> Vec<f32> {
        const SIDE: usize = 64;
        let mut out = vec![0f32; self.n * self.k];
        if self.n > 0 {
            out.par_chunks_mut(SIDE * self.n).enumerate().for_each(|(i, out)| {
                let depth = out.len() / self.n;
                let mut block = vec![0f32; SIDE * depth];
                for n in (0..self.n).step_by(SIDE) {
                    let rows = SIDE.min(self.n - n);
                    for (r, row) in block.chunks_exact_mut(depth).take(rows).enumerate() {
                        self.unpack(n + r, i * SIDE, row);
                    }
                    for (k, out) in out.chunks_exact_mut(self.n).enumerate() {
                        out[n..n + rows].iter_mut().enumerate().for_each(|(r, o)| *o = block[r * depth + k]);
                    }
                }
            });
        }
        out
    }
}

/// The values of `out.len()` codes of one group.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn values(container: usize, codes: &[u8], zero: f32, scale: f32, out: &mut [f32]) {
    let value = |code: u8| (f32::from(code) - zero) * scale;
    match container {
        8 => out.iter_mut().zip(codes).for_each(|(o, &c)| *o = value(c)),
        4 => {
            let (pairs, last) = out.as_chunks_mut::<2>();
            for (o, &c) in pairs.iter_mut().zip(codes) {
                *o = [value(c & 15), value(c >> 4)];
            }
            last.iter_mut().for_each(|o| *o = value(codes[pairs.len()] & 15));
        }
        _ => {
            let (fours, last) = out.as_chunks_mut::<4>();
            for (o, &c) in fours.iter_mut().zip(codes) {
                *o = [value(c & 3), value(c >> 2 & 3), value(c >> 4 & 3), value(c >> 6)];
            }
            for (i, o) in last.iter_mut().enumerate() {
                *o = value(code(codes, 2, fours.len() * 4 + i));
            }
        }
    }
}
