//! The elementwise ops after a product, done on its sums while they are in registers.

use super::{Args, elementwise, pointwise};
use crate::fuse::Fused;
use crate::size::Size;
use crate::text::{Body, Val, scalar, vector};
use dialects::ir::Value;
use std::collections::HashMap;

/// The elementwise ops after a product.
pub struct Epilogue<'f, 'm> {
    fused: &'f Fused<'m>,
    /// What is read from memory: operands of the product itself, and of the ops after it.
    pub operands: Vec<Value>,
    /// For each operand, how it steps from row to row, and whether along the row.
    steps: Vec<(Lead, bool)>,
    n: usize,
}

/// How an operand steps from row to row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Lead {
    /// It stays.
    Stays,
    /// Each row has its own.
    Rows,
    /// Each of so many rows has its own, and then again: a channel.
    Cycle(usize),
}

/// How an operand with these steps meets rows that are all dims but the last `along`; `None` where it does not.
pub fn meets(domain: &[Size], steps: &[bool], along: usize) -> Option<(Lead, bool)> {
    let (lead, tail) = steps.split_at(steps.len().checked_sub(along)?);
    // Dims of one element do not step, and do not count.
    let counted = |from: usize, steps: &[bool]| -> Vec<(usize, bool)> {
        let each = steps.iter().enumerate().map(|(i, &s)| (from + i, s));
        each.filter(|(i, _)| domain[*i] != Size::Known(1)).collect()
    };
    let tail = counted(lead.len(), tail);
    let stepping = tail.iter().any(|t| t.1);
    if stepping && !tail.iter().all(|t| t.1) {
        return None;
    }
    let rows = counted(0, lead);
    let lead = match rows.iter().position(|r| r.1) {
        None => Lead::Stays,
        Some(0) if rows.iter().all(|r| r.1) => Lead::Rows,
        Some(first) if rows[first..].iter().all(|r| r.1) => {
            let sizes = &domain[rows[first].0..lead.len()];
            Lead::Cycle(usize::try_from(Size::product(sizes).known()?).ok()?)
        }
        Some(_) => return None,
    };
    Some((lead, stepping))
}

/// Where sums stand: lanes from output `n` on of `row`, of which `there` are there.
#[derive(Clone, Copy)]
pub struct Spot {
    /// The row.
    pub row: Val,
    /// The first output.
    pub n: Val,
    /// Lanes that are there.
    pub there: usize,
}

impl<'f, 'm> Epilogue<'f, 'm> {
    /// Of a kernel over `domain`, whose last dim is `n`; `own` are operands of the product that meet its results as those of
    /// an elementwise op do. `None` for operands that the kernel cannot read so.
    pub fn new(
        fused: &'f Fused<'m>,
        domain: &[Size],
        n: usize,
        own: impl IntoIterator<Item = Value>,
    ) -> Option<Epilogue<'f, 'm>> {
        Epilogue::along(fused, domain, (1, n), own)
    }

    /// The same, where the last so many dims, which have `n` elements, are a row.
    pub fn along(
        fused: &'f Fused<'m>,
        domain: &[Size],
        (along, n): (usize, usize),
        own: impl IntoIterator<Item = Value>,
    ) -> Option<Epilogue<'f, 'm>> {
        let mut operands: Vec<Value> = own.into_iter().collect();
        operands.extend(fused.operands().into_iter().filter(|v| !operands.contains(v)).collect::<Vec<_>>());
        let steps = operands
            .iter()
            .map(|&v| meets(domain, &elementwise::steps(&fused.shape(v)?, domain)?, along))
            .collect::<Option<_>>()?;
        Some(Epilogue { fused, operands, steps, n })
    }

    /// Every result of the kernel at `spot`. `sum` gives what the product computed, from the operands that are read here: they
    /// are buffers from `first` on.
    pub fn emit(
        &self,
        b: &mut Body,
        a: &Args,
        first: usize,
        spot: Spot,
        lanes: usize,
        sum: impl FnOnce(&mut Body, &HashMap<Value, Val>) -> Val,
    ) -> Vec<Val> {
        let mut values = HashMap::new();
        for (i, (&v, &(lead, along))) in self.operands.iter().zip(&self.steps).enumerate() {
            let elem = self.fused.register(v);
            let mut at = if along { spot.n } else { b.size(0) };
            let row = match lead {
                Lead::Stays => None,
                Lead::Rows => Some(spot.row),
                Lead::Cycle(rows) => {
                    let rows = b.size(rows);
                    Some(b.rem(spot.row, rows))
                }
            };
            if let Some(row) = row {
                let stride = b.size(if along { self.n } else { 1 });
                let start = b.mul(row, stride);
                at = b.add(start, at);
            }
            let buffer = a.buffer(b, first + i);
            let p = elementwise::element(b, buffer, at, elem);
            let value = match along {
                true => pointwise::load_some(b, p, vector(lanes, elem), spot.there),
                false => {
                    let one = pointwise::load(b, p, scalar(elem));
                    b.broadcast(one, lanes)
                }
            };
            values.insert(v, value);
        }
        let anchor = self.fused.anchor().and_then(|op| self.fused.module.ops[op].result(0));
        let sum = sum(b, &values);
        values.insert(anchor.expect("an epilogue has an anchor"), sum);
        elementwise::chain(b, self.fused, &mut values, lanes);
        self.fused.results().iter().map(|v| values[v]).collect()
    }
}
