//! Rows of codes by panels, in tiles of AMX: see [`panel`](super::panel) for the layout. A step of a panel is a row of a tile of
//! W as it stands, and rows of X are rows of a tile.

use super::fours;
use super::panel::{PANELS, Unit, WIDE};
use crate::text::{Body, Tiles, Val};

/// Rows of a tile.
pub(super) const AMX_ROWS: usize = 16;

impl Unit<'_> {
    /// A block of a panel by 16 rows, or twice as many, added to their sums: tiles 0 to 3 are sums, then come those of X and
    /// of W.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn squares(
        &self,
        b: &mut Body,
        tiles: &Tiles,
        count: usize,
        (x, w): (Val, Val),
        row: Val,
        p: Val,
        depth: usize,
    ) {
        let (form, line) = (self.form, self.form.width() * 4);
        let stride = b.size(form.k * 4);
        let at = b.mul(row, stride);
        let x = b.at(x, at);
        let sums = self.sums(b, row, p);
        let cells: Vec<(usize, usize)> =
            (0..count).flat_map(|r| (0..WIDE).map(move |part| (r, part))).collect();
        let place = |b: &mut Body, (r, part): (usize, usize)| {
            b.at_const(sums, r * AMX_ROWS * PANELS * line + part * form.lanes * 4)
        };
        for &cell in &cells {
            let at = place(b, cell);
            tiles.load(b, WIDE * cell.0 + cell.1, at, PANELS * line);
        }
        let (zero, end) = (b.size(0), b.size(depth));
        b.each(zero, end, fours::DEEP, |b, k| {
            let (four, line_size) = (b.size(4), b.size(line));
            let (from, at) = (b.mul(k, four), b.mul(k, line_size));
            let (x, w) = (b.at(x, from), b.at(w, at));
            for r in 0..count {
                let x = b.at_const(x, r * AMX_ROWS * form.k * 4);
                tiles.load(b, 4 + r, x, form.k * 4);
            }
            for part in 0..WIDE {
                let w = b.at_const(w, part * form.lanes * 4);
                tiles.load(b, 6 + part, w, line);
            }
            for &(r, part) in &cells {
                tiles.dot(b, (WIDE * r + part, 4 + r, 6 + part), true);
            }
        });
        for &cell in &cells {
            let at = place(b, cell);
            tiles.store(b, WIDE * cell.0 + cell.1, at, PANELS * line);
        }
    }
}
