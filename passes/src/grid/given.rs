//! Codes that were chosen elsewhere, for the whole matrix at once.

use super::rtn::pack;
use super::{At, Block, BlockOut, LANES, Quantizer, Spec, Stats};

/// A quantized matrix `[N, K]`, one code per byte.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Given {
    /// Inputs.
    pub k: usize,
    /// `[N, K]`.
    pub codes: Vec<u8>,
    /// `[N, kb]`.
    pub scales: Vec<f32>,
    /// `[N, kb]`; the middle of a symmetric grid.
    pub zero_points: Vec<u8>,
}

impl Quantizer for Given {
    type Space = Vec<[f32; LANES]>;

    fn space(&self, _: &Spec) -> Vec<[f32; LANES]> {
        Vec::new()
    }

    fn block(
        &self,
        spec: &Spec,
        at: At,
        x: &Block,
        out: &mut BlockOut,
        codes: &mut Vec<[f32; LANES]>,
    ) -> Stats {
        let kb = spec.groups(self.k);
        codes.clear();
        codes.resize(x.len(), [0.0; LANES]);
        out.zero = [spec.middle() as f32; LANES];
        for l in 0..at.lanes {
            let group = (at.n + l) * kb + at.group;
            out.scale[l] = self.scales[group];
            out.zero[l] = f32::from(self.zero_points[group]);
            let from = (at.n + l) * self.k + at.group * spec.group_size;
            for (row, &code) in codes.iter_mut().zip(&self.codes[from..][..x.len()]) {
                row[l] = f32::from(code);
            }
        }
        pack(spec, x, codes, out)
    }
}
