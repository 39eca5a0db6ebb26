//! `fold-scales`: absorbs products and quotients with constants into the weights, biases and norm gains around them.
//!
//! Each is asked of the e-graph twice: can what is upstream take it, and if not, can the linears that read it? The
//! answer is taken only where it makes the model cheaper. Two kinds stay by default: a scalar factor, which runtimes look
//! for when they fuse activations and attention; and the gain of a norm, which other scales are folded into.

use crate::{Changed, Exactness, Pass, PassCx, PassError, eqsat};
use dialects::ir::{Dim, Module, Op, Value, infer};
use serde::{Deserialize, Serialize};

const NAME: &str = "fold-scales";

/// The options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FoldScales {
    /// Also fold factors of one element.
    pub scalars: bool,
    /// Also fold the gains of norms into the linears that read them.
    pub gains: bool,
}

impl Pass for FoldScales {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "absorb products with constants into the weights and norm gains around them"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        // Contradictions are the verifier's to report.
        infer::infer(m, cx.ops);
        let mut folded = 0;
        // Later products first: one that moves upstream may meet another there and go on with it.
        for op in m.regions[m.top].ops.clone().into_iter().rev() {
            let Some((product, factor)) = product(m, op) else { continue };
            if !self.scalars && m.consts[m.const_of(factor).expect("the factor is a constant")].count() == 1 {
                continue;
            }
            let fail = |m: &Module, why| PassError::At { pass: NAME, what: m.ops[op].loc.to_string(), why };
            let mut outcome = eqsat::fold_window(m, cx.ops, product).map_err(|e| fail(m, e))?;
            if outcome.sites.is_empty() && m.def_op(product).is_some() && (self.gains || !is_gain(m, op)) {
                outcome = eqsat::fold_into_readers(m, cx.ops, product).map_err(|e| fail(m, e))?;
            }
            for limit in outcome.limits {
                cx.report.note(limit);
            }
            folded += u64::from(!outcome.sites.is_empty());
        }
        cx.count("fold-scales.folded", folded);
        Ok(if folded > 0 { Changed::Yes } else { Changed::No })
    }
}

/// The result of a product or quotient with a float constant, and the constant.
fn product(m: &Module, op: Op) -> Option<(Value, Value)> {
    let data = &m.ops[op];
    let (a, b) = (data.operand(0)?, data.operand(1)?);
    let factor = match (data.name.as_str(), m.const_of(a), m.const_of(b)) {
        ("onnx.Mul" | "onnx.Div", None, Some(_)) => b,
        ("onnx.Mul", Some(_), None) => a,
        _ => return None,
    };
    let live = m.regions[data.region].ops.contains(&op);
    (live && m.ty(factor).elem()?.is_float()).then_some((data.result(0)?, factor))
}

/// Whether a product is the last step of a norm written out: what it scales is a product or quotient with one number
/// per row.
fn is_gain(m: &Module, op: Op) -> bool {
    let inner = m.ops[op].operands.iter().flatten().find(|v| m.const_of(**v).is_none());
    let Some((norm, _)) = inner.and_then(|&v| m.def_op(v)) else { return false };
    let data = &m.ops[norm];
    let per_row =
        |v: Value| m.const_of(v).is_none() && m.ty(v).dims().and_then(|d| d.last()) == Some(&Dim::Known(1));
    match data.name.as_str() {
        "onnx.Mul" | "onnx.Div" => data.operands.iter().flatten().any(|&v| per_row(v)),
        // Between the norm and its gain some exporters convert.
        "onnx.Cast" => is_gain(m, norm),
        _ => false,
    }
}
