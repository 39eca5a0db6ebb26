//! `gptq`: rounding that makes up for its own errors (Frantar et al., "GPTQ", ICLR 2023).
//!
//! The Gram matrix of each linear's activations is gathered over the calibration data, which is not kept. Weights are
//! rounded one input after the other, and those not yet rounded take up the error ([`crate::grid::compensate`]).

use crate::gram::{self, Gram};
use crate::grid::compensate::{self, Method};
use crate::grid::{Cost, Float, Layout, Matrix};
use crate::group::{self, Group, groups, output_error};
use crate::quantize::{GridOptions, Notes, Shared, dequantize, each, quantize_matrix, scale_type};
use crate::{Changed, Exactness, Filter, OpSet, Pass, PassCx, PassError};
use dialects::ir::Module;
use serde::{Deserialize, Serialize};

/// The pass and its options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Gptq {
    /// The grid.
    #[serde(flatten)]
    pub options: GridOptions,
    /// Inputs with large activations are rounded first.
    pub act_order: bool,
    /// Grids are chosen before any rounding. Without it a group's grid is chosen when its turn comes, which needs the
    /// order of the inputs (`act_order=false`): no runtime reads another.
    pub static_groups: bool,
    /// What is added to the diagonal of the Gram matrix, in means of it.
    pub damp: f64,
    /// Inputs that are rounded between two updates of all others; no more than a matter of speed.
    pub block: usize,
    /// Whether each group's range is chosen for the least error that cannot be made up for, or spans its weights.
    pub clip: bool,
    /// Turns of the descent after rounding.
    pub sweeps: u32,
    /// Which weights.
    #[serde(flatten)]
    pub filter: Filter,
}

impl Default for Gptq {
    fn default() -> Gptq {
        Gptq {
            options: GridOptions::default(),
            act_order: true,
            static_groups: true,
            damp: 0.01,
            block: 128,
            clip: true,
            sweeps: 2,
            filter: Filter::default(),
        }
    }
}

const NAME: &str = "gptq";

impl Pass for Gptq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "quantizes weights one input after the other, the rest making up for the error"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Lossy
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["onnx.MatMul", "onnx.Gemm"])
    }

    fn produces(&self) -> OpSet {
        OpSet::from(["quant.dequantize"])
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        self.check()?;
        each(m, cx, NAME, &self.filter, false, |m, cx, weights| self.all(m, cx, weights))
    }
}

impl Gptq {
    fn check(&self) -> Result<(), PassError> {
        self.options.check(NAME)?;
        let fail = |option, why: &str| Err(PassError::Option { pass: NAME, option, why: why.into() });
        if !(self.damp >= 0.0 && self.damp <= 1.0) {
            return fail("damp", &format!("expected 0 to 1, found {}", self.damp));
        }
        if !(1..=4096).contains(&self.block) {
            return fail("block", &format!("expected 1 to 4096, found {}", self.block));
        }
        if self.act_order && !self.static_groups {
            let why = "with act_order=true groups are static: no runtime reads weights whose groups are out of order";
            return fail("static_groups", why);
        }
        Ok(())
    }

    fn all(&self, m: &mut Module, cx: &mut PassCx, weights: Vec<Shared>) -> Result<(), PassError> {
        let groups = groups(m, weights);
        let first = cx.report.weights.len();
        let progress = cx.env.progress(NAME, groups.len() as u64);
        for run in gram::runs(groups, |g| g.k, gram::BUDGET) {
            let wanted: Vec<_> = run.iter().map(|g| (g.x, g.k)).collect();
            let mut grams = gram::collect(m, cx, &wanted, NAME)?;
            for group in run {
                let gram = grams.remove(&group.x).expect("every wanted value was collected");
                self.group(m, cx, &group, gram)?;
                if !progress.advance(1) {
                    return Err(PassError::Env("interrupted".into()));
                }
            }
        }
        group::finish(m, cx, NAME, &self.filter, &self.options, first)
    }

    fn group(&self, m: &mut Module, cx: &mut PassCx, group: &Group, gram: Gram) -> Result<(), PassError> {
        let k = group.k;
        let Some(cost) = Cost::new(gram, self.damp, self.act_order) else {
            return Ok(());
        };
        for shared in &group.weights {
            let w = group::rows(m, NAME, shared)?;
            let elem = m.ty(shared.first().operand).elem().unwrap_or(shared.first().elem);
            let spec = self.options.spec(k, scale_type(elem, cx.settings));
            let method = Method {
                block: self.block,
                static_groups: self.static_groups,
                clip: self.clip,
                sweeps: self.sweeps,
            };
            let given = compensate::quantize(&w.values, &cost, &spec, &method);
            let bytes = bytemuck::cast_slice(&w.values);
            let matrix = Matrix { bytes, float: Float::F32, layout: Layout::Nk, n: w.n, k };
            let notes = Notes { method: NAME.into(), ..Notes::default() };
            let at = cx.report.weights.len();
            let q = quantize_matrix(m, cx, NAME, shared, &matrix, &self.options, &given, notes)?;
            let q = dequantize(&q.0)?;
            let off = |from: usize, out: &mut [f32]| {
                let from = from * k;
                out.iter_mut().enumerate().for_each(|(i, e)| *e = q[from + i] - w.values[from + i]);
            };
            cx.report.weights[at].output_error = output_error(&w, k, &cost.h, off);
        }
        Ok(())
    }
}
