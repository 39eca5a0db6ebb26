//! `fold-scales`: multiplications by constants that constants before them can take are gone: a weight's columns and
//! its bias, a norm's gain, through reshapes, transposes, elementwise products and attention.
//!
//! Whether and where is found by the e-graph (see [`crate::eqsat`]), one window for each multiplication; what it finds is
//! taken only when the window gets cheaper.

use crate::{Changed, Exactness, OpSet, Pass, PassCx, PassError, eqsat};
use dialects::ir::{Module, Op};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The pass; it has no options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FoldScales {}

const NAME: &str = "fold-scales";

impl Pass for FoldScales {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "folds multiplications by constants into the weights, biases and norm gains before them"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn consumes(&self) -> OpSet {
        OpSet::from(["onnx.Mul", "onnx.Div"])
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let mut seen = BTreeSet::new();
        let mut folded = 0;
        // What a fold writes is new, and may be folded further; what was looked at is not looked at again.
        while let Some(op) = m.live_ops().into_iter().find(|&op| scales(m, op) && seen.insert(op)) {
            let product = m.ops[op].result(0).expect("a scale has a result");
            let outcome = eqsat::fold_window(m, cx.ops, product).map_err(|why| PassError::At {
                pass: NAME,
                what: m.ops[op].loc.to_string(),
                why,
            })?;
            outcome.limits.iter().for_each(|limit| cx.report.note(limit.clone()));
            folded += u64::from(!outcome.sites.is_empty());
        }
        cx.count("folded scales", folded);
        Ok(if folded > 0 { Changed::Yes } else { Changed::No })
    }
}

/// Whether `op` multiplies a float value by a constant, or divides it by one.
fn scales(m: &Module, op: Op) -> bool {
    let data = &m.ops[op];
    let konst = |i| data.operand(i).is_some_and(|v| m.const_of(v).is_some());
    let float = data.result(0).and_then(|v| m.ty(v).elem()).is_some_and(|e| e.is_float());
    float
        && match data.name.as_str() {
            "onnx.Mul" => konst(0) != konst(1),
            "onnx.Div" => !konst(0) && konst(1),
            _ => false,
        }
}
