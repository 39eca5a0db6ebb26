//! What becomes of a module in the rest of the pipeline: the passes after this one, tried on a copy, and the file that
//! would be written. Sizes are taken from there, so that they are those of the output whatever packs it.

use crate::pack_int4::PackInt4;
use crate::{
    CalibSink, Distance, Env, Pass, PassCx, PassError, Progress, Report, Scratch, Settings, Stream,
    WeightReport, dce,
};
use dialects::ir::{Module, Value};

/// A module after the rest of the pipeline.
pub(super) struct Finished {
    m: Module,
    /// What the passes reported.
    pub report: Report,
}

/// Runs the rest of the pipeline on a copy of `m`, of which `weights` are quantized. Where no pass packs them it is done
/// as `pack-int4` does.
pub(super) fn finished(m: &Module, cx: &PassCx, weights: Vec<WeightReport>) -> Result<Finished, PassError> {
    let pack = PackInt4::default();
    let packed = cx.rest.iter().any(|p| p.consumes().contains("quant.dequantize"));
    let rest = cx.rest.iter().copied().chain((!packed).then_some(&pack as &dyn Pass));
    let settings = Settings { allow_noop: true, ..cx.settings.clone() };
    let mut out = Finished { m: m.clone(), report: Report { weights, ..Report::default() } };
    let env = Trial(cx.env);
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

/// The outside world for what is only tried: it shows nothing, and what is quantized is no part of the result.
pub(super) struct Trial<'a>(pub &'a dyn Env);

impl Env for Trial<'_> {
    fn calibrate(&self, m: &Module, wanted: &[Value], sink: &mut CalibSink) -> Result<(), PassError> {
        self.0.calibrate(m, wanted, sink)
    }

    fn stream(&self) -> Result<Box<dyn Stream + '_>, PassError> {
        self.0.stream()
    }

    fn distance(&self, m: &Module) -> Result<Distance, PassError> {
        self.0.distance(m)
    }

    fn file_bytes(&self, m: &Module) -> Result<u64, PassError> {
        self.0.file_bytes(m)
    }

    fn scratch(&self, len: usize) -> Result<Box<dyn Scratch>, PassError> {
        self.0.scratch(len)
    }

    fn progress(&self, _: &str, _: u64) -> Box<dyn Progress> {
        Box::new(Silent)
    }
}

struct Silent;

impl Progress for Silent {
    fn advance(&self, _: u64) -> bool {
        true
    }
}
