//! What the commands share that quantize a model in many ways and measure each: the model, data to measure on, and the
//! way to a quantized variant, its bytes in the file, and its distance from the float model.

use super::Context;
use crate::calibrate::{self, Calibration};
use crate::driver;
use crate::env::DriverEnv;
use crate::error::Error;
use crate::eval::distance::Baseline;
use crate::pipeline::{Pipeline, Step};
use crate::report::paint::Painter;
use dialects::ir::Module;
use passes::sensitivity::Variant;
use passes::{Distance, Env, Exactness, Pass, PassCx, PassError, Report, Settings, dce};
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args)]
pub(super) struct Setup {
    /// The model: .onnx, or .qir with its weights beside it
    model: PathBuf,
    /// Quantize only ops whose node, weight or op type matches (`*` stands for anything)
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    only: Vec<String>,
    /// Leave ops alone whose node, weight or op type matches
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    skip: Vec<String>,
    /// The pass in whose form bytes are counted: pack-int4 or pack-qdq
    #[arg(long, value_name = "PASS", default_value = "pack-int4")]
    packer: String,
    #[command(flatten)]
    calibration: calibrate::Options,
}

impl Setup {
    /// A pipeline of passes that quantize, and nothing else.
    pub fn pipeline(&self, text: &str, cx: &Context) -> Result<Pipeline, Error> {
        let pipeline = Pipeline::parse(text, &cx.registry, &self.only, &self.skip)?;
        let why = |pass: &dyn Pass| match (pass.exactness(), pass.name()) {
            (Exactness::Exact, _) => Some("quantizes nothing: only what rounds weights is measured"),
            (_, "mixed") => Some("chooses for all weights at once: what it chooses from is measured"),
            _ => None,
        };
        match pipeline.steps.iter().find_map(|s| Some((s.pass.name(), why(&*s.pass)?))) {
            None => Ok(pipeline),
            Some((pass, why)) => Err(Error::usage(
                format!("{pass} {why}"),
                "give passes such as rtn or awq{group=64}; --packer says the form",
            )),
        }
    }
}

/// A model to measure variants of.
pub(super) struct Measuring<'a> {
    args: &'a Setup,
    cx: &'a Context,
    pub m: Module,
    env: DriverEnv,
    settings: Settings,
    packer: Arc<Pipeline>,
    /// What the passes said.
    pub report: Report,
}

impl<'a> Measuring<'a> {
    pub fn open(args: &'a Setup, cx: &'a Context) -> Result<Measuring<'a>, Error> {
        let packer = Pipeline::parse(&args.packer, &cx.registry, &[], &[])?;
        if packer.steps.iter().any(|s| s.pass.exactness() == Exactness::Lossy) {
            let help = "give pack-int4 or pack-qdq";
            return Err(Error::usage(format!("--packer {}: it rounds weights", args.packer), help));
        }
        let m = driver::read(&args.model, &cx.registry, &cx.term)?;
        let data = Calibration::open(&args.calibration, &m, cx.registry.ops(), &cx.term);
        let data = data.map_err(|e| Error::Calibration { message: e.message, help: e.help })?;
        let mut report = Report::default();
        data.warnings.iter().for_each(|w| report.warn(w));
        data.notes.iter().for_each(|n| report.note(n));
        let env = DriverEnv {
            calibration: Some(data),
            baseline: Some(Baseline::new(m.clone(), args.calibration.measure_samples)),
            ..DriverEnv::without_data(cx.registry.ops(), cx.term)
        };
        let settings = Settings::default();
        Ok(Measuring { args, cx, m, env, settings, packer: Arc::new(packer), report })
    }

    /// A pipeline made from one that has its patterns already.
    pub fn again(&self, text: &str) -> Result<Pipeline, Error> {
        Ok(Pipeline::parse(text, &self.cx.registry, &[], &[])?)
    }

    /// The model with every weight quantized by the pipeline, each of which can be switched back. Its reports say what
    /// the weights take in the file; the second is what the whole model's constants do.
    pub fn variant(&mut self, pipeline: &Pipeline) -> Result<(Variant, u64), Error> {
        let m = self.m.clone();
        let mut variant = self.within(pipeline, |cx, passes| Variant::of(&m, cx, passes))?;
        let bytes = self.bytes(&mut variant, |_| true)?;
        Ok((variant, bytes))
    }

    /// The bytes of the model's constants as the file holds them, with the weights quantized for which `quantized` holds.
    pub fn bytes(&mut self, v: &mut Variant, quantized: impl Fn(usize) -> bool) -> Result<u64, Error> {
        let packer = self.packer.clone();
        let packed = self.within(&packer, |cx, passes| v.pack(cx, passes, quantized))?;
        Ok(dce::bytes(&packed))
    }

    /// Runs something with the passes of a pipeline.
    fn within<T>(
        &mut self,
        pipeline: &Pipeline,
        run: impl FnOnce(&mut PassCx, &[&dyn Pass]) -> Result<T, PassError>,
    ) -> Result<T, Error> {
        let passes: Vec<&dyn Pass> = pipeline.steps.iter().map(|s| &*s.pass).collect();
        let (ops, env, settings) = (self.cx.registry.ops(), &self.env, &self.settings);
        let ran = run(&mut PassCx { ops, env, settings, report: &mut self.report, rest: &[] }, &passes);
        ran.map_err(|e| {
            let named = |s: &Step| matches!(&e, PassError::Option { pass, .. } if s.pass.name() == *pass);
            let at = pipeline.steps.iter().position(named);
            let blamed = at.and_then(|i| pipeline.blame(i, &e));
            blamed.map_or_else(|| self.failed(&e), Error::Pipeline)
        })
    }

    fn failed(&self, e: &PassError) -> Error {
        Error::Model(format!("{}: {e}", self.args.model.display()))
    }

    /// How far a model is from the float one.
    pub fn distance(&self, m: &Module) -> Result<Distance, Error> {
        self.env.distance(m).map_err(|e| self.failed(&e))
    }

    /// What is measured on: `the first 16 of 128 x 256 tokens from calib.npy`.
    pub fn data(&self) -> String {
        let data = self.env.calibration.as_ref().expect("it was opened with the model");
        let n = self.args.calibration.measure_samples;
        match n < data.samples() {
            true => format!("the first {n} of {}", data.description),
            false => data.description.clone(),
        }
    }

    /// Notes and warnings, for people.
    pub fn said(&self, out: &mut String, p: &Painter) {
        self.report.notes.iter().for_each(|n| p.line(out, &format!("note: {n}")));
        self.report.warnings.iter().for_each(|w| p.warning(out, w));
    }
}
