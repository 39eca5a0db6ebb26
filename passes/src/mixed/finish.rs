//! What becomes of a module in the rest of the pipeline: the passes after this one, tried on a copy, and the file that
//! would be written. Sizes are taken from there, so that they are those of the output whatever packs it.

use crate::pack_int4::PackInt4;
use crate::pack_qdq::PackQdq;
use crate::trial::Trial;
use crate::{Pass, PassCx, PassError, Report, Settings, WeightReport, dce};
use dialects::ir::Module;

/// A module after the rest of the pipeline.
pub(super) struct Finished {
    m: Module,
    /// What the passes reported.
    pub report: Report,
}

/// Runs the rest of the pipeline on a copy of `m`, of which `weights` are quantized. Where no pass packs them it is done
/// as `pack-int4` does, or `pack-qdq` for TensorRT.
pub(super) fn finished(m: &Module, cx: &PassCx, weights: Vec<WeightReport>) -> Result<Finished, PassError> {
    let pack: &dyn Pass = match cx.settings.profile == "tensorrt" {
        true => &PackQdq {},
        false => &PackInt4 {},
    };
    let packed = cx.rest.iter().any(|p| p.consumes().contains("quant.dequantize"));
    let rest = cx.rest.iter().copied().chain((!packed).then_some(pack));
    let settings = Settings { allow_noop: true, ..cx.settings.clone() };
    let mut out = Finished { m: m.clone(), report: Report { weights, ..Report::default() } };
    let env = Trial::new(cx.env).silent();
    dce::sweep(&mut out.m);
    for pass in rest {
        let mut cx =
            PassCx { ops: cx.ops, env: &env, settings: &settings, report: &mut out.report, rest: &[] };
        pass.run(&mut out.m, &mut cx)?;
        dce::sweep(&mut out.m);
    }
    Ok(out)
}

impl Finished {
    /// Bytes of the output file.
    pub(super) fn bytes(&self, cx: &PassCx) -> Result<u64, PassError> {
        cx.env.file_bytes(&self.m)
    }
}
