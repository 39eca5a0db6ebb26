//! `fuse`: long forms of ops become the ops that say the same, as far as the model's version of ONNX has them.
//!
//! LayerNormalization, RMSNormalization, Gelu, Softmax, RotaryEmbedding, Attention; the rules are text,
//! `eqsat/rules/fuse.qrw`, but for those about how heads lie (`heads.rs` beside it), on the engine and with the rules of
//! [`canonicalize`](crate::canonicalize). Models for ONNX Runtime get its own ops where ONNX has none yet. An op that is
//! too new for the model is not made: `raise-opset` comes first where one is wanted.

use crate::canonicalize::rewrite;
use crate::eqsat::{CostModel, Rewrite, Rules, Target};
use crate::{Changed, Exactness, Pass, PassCx, PassError};
use dialects::ir::Module;
use serde::{Deserialize, Serialize};

const NAME: &str = "fuse";

/// The domain of the ops that ONNX Runtime has beside the standard.
const MICROSOFT: &str = "com.microsoft";

/// The options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fuse {
    /// What ops cost: `ort-cpu`, as measured in ONNX Runtime, or `bytes`, the memory they move.
    pub target: Target,
}

impl Pass for Fuse {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "replace the long forms of norms, activations, attention and rotary embedding by the ops of the model's opset"
    }

    fn exactness(&self) -> Exactness {
        Exactness::Exact
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn run(&self, m: &mut Module, cx: &mut PassCx) -> Result<Changed, PassError> {
        let rules = Rules::fuse(&cx.settings.profile).with_user(&cx.settings.rules, &cx.settings.profile);
        let changed = rewrite(m, cx, NAME, &Rewrite::new(&rules, CostModel::of_target(self.target)))?;
        if m.live_ops().iter().any(|&op| m.ops[op].name.dialect() == MICROSOFT) {
            m.opsets.entry(MICROSOFT.into()).or_insert(1);
        }
        Ok(changed)
    }
}
