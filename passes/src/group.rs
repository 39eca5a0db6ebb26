//! Weights by the value that their linears read: what passes that look at activations work through.

use crate::linear::Form;
use crate::quantize::{Clipping, GridOptions, Notes, Shared, candidates, quantize};
use crate::store::Work;
use crate::{Filter, PassCx, PassError};
use dialects::ir::{Module, Value};
use dialects::tensor::Tensor;
use rayon::prelude::*;

/// Why the activations that a weight multiplies cannot be gathered.
pub fn unwatched(m: &Module, w: &Shared) -> Option<&'static str> {
    if w.uses.iter().any(|l| m.ops[l.op].region != m.top) {
        return Some("activations inside the graphs of If, Loop and Scan are not gathered");
    }
    let columns = w.uses.iter().any(|l| l.form == Form::Columns);
    columns.then_some("the channels of its activation are not the last dim (transA)")
}

/// Whether the activations that a weight multiplies can be gathered, channels last.
pub fn watched(m: &Module, w: &Shared) -> bool {
    w.first().form == Form::Rows && unwatched(m, w).is_none()
}

/// Weights whose linears read one value.
pub struct Group {
    /// The value.
    pub x: Value,
    /// Its last dim.
    pub k: usize,
    /// At least one.
    pub weights: Vec<Shared>,
    /// Some weight is also multiplied with another value, and cannot be scaled for this one.
    pub mixed: bool,
}

/// Groups weights by the value that they multiply, in program order, where it can be watched.
pub fn groups(m: &Module, weights: Vec<Shared>) -> Vec<Group> {
    let mut out: Vec<Group> = Vec::new();
    for w in weights.into_iter().filter(|w| unwatched(m, w).is_none()) {
        let x = w.first().x;
        let mixed = w.uses.iter().any(|l| l.x != x);
        match out.iter_mut().find(|g| g.x == x && g.k == w.first().k) {
            Some(g) => {
                g.mixed |= mixed;
                g.weights.push(w);
            }
            None => out.push(Group { x, k: w.first().k, weights: vec![w], mixed }),
        }
    }
    out
}

/// A float weight, `[N, K]` row-major.
pub struct Rows {
    /// Outputs.
    pub n: usize,
    /// The elements.
    pub values: Vec<f32>,
}

impl Rows {
    /// At most `most` rows of `k` elements, evenly spaced.
    pub fn sample(&self, k: usize, most: usize) -> Rows {
        let n = self.n.min(most);
        let values = (0..n).flat_map(|i| self.values[i * self.n / n * k..][..k].iter().copied()).collect();
        Rows { n, values }
    }
}

/// The weight of a linear, `[N, K]`.
pub fn rows(m: &Module, pass: &'static str, shared: &Shared) -> Result<Rows, PassError> {
    let l = shared.first();
    let fail = |why: String| PassError::At { pass, what: shared.label(m), why };
    let t = Tensor::from_const(&m.consts[l.konst]).map_err(|e| fail(e.to_string()))?;
    let values = t.to_f32().map_err(|e| fail(e.to_string()))?;
    if let Some(i) = values.iter().position(|x| !x.is_finite()) {
        let count = values.iter().filter(|x| !x.is_finite()).count();
        return Err(fail(format!(
            "{count} of {} weights are NaN or infinite, the first at {i}",
            values.len()
        )));
    }
    let values = match l.rows_are_outputs {
        true => values.into_owned(),
        false => {
            let mut out = vec![0f32; l.n * l.k];
            out.par_chunks_mut(l.k).enumerate().for_each(|(n, row)| {
                row.iter_mut().enumerate().for_each(|(k, x)| *x = values[k * l.n + n]);
            });
            out
        }
    };
    Ok(Rows { n: l.n, values })
}

/// Rounds to nearest what no activations were gathered for, and puts the report, from its entry `first` on, into the
/// order of the program.
pub fn finish(
    m: &mut Module,
    cx: &mut PassCx,
    pass: &'static str,
    work: &Work,
    filter: &Filter,
    options: &GridOptions,
    first: usize,
) -> Result<(), PassError> {
    for shared in candidates(m, cx, filter, false) {
        let why = unwatched(m, &shared).unwrap_or("no activations of it were gathered");
        let notes = vec![format!("rounded to nearest: {why}")];
        let notes = Notes { method: "rtn".into(), output_error: None, notes };
        // What clipping would do without data is another thing than what was asked for.
        let options = GridOptions { clip: Clipping::No, ..options.clone() };
        work.once(m, cx, &shared, |m, cx| quantize(m, cx, pass, &shared, &options, notes))?;
    }
    in_program_order(m, cx, first);
    Ok(())
}

/// Puts the report of weights, from its entry `first` on, into the order of the program.
pub fn in_program_order(m: &Module, cx: &mut PassCx, first: usize) {
    let ops = m.live_ops();
    let place = |node: &str| ops.iter().position(|&op| *m.ops[op].loc == *node);
    cx.report.weights[first..].sort_by_cached_key(|w| place(&w.node));
}
