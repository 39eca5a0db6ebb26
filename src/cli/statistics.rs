//! The flags about statistics of activations: where those of `calibrate` are saved, and where they are taken from.

use crate::error::Error;
use crate::files;
use crate::pipeline::Pipeline;
use crate::qir;
use passes::calibrate::NAME;
use passes::ranges::Statistics;
use std::path::PathBuf;

/// The flags.
#[derive(clap::Args)]
#[command(next_help_heading = "Calibration")]
pub(super) struct StatisticsFlags {
    /// Take the statistics of activations from this file, so that `calibrate` needs no data and runs nothing
    #[arg(long, value_name = "FILE")]
    pub(super) stats_in: Option<PathBuf>,
    /// Save the statistics that `calibrate` gathers (JSON)
    #[arg(long, value_name = "FILE")]
    pub(super) stats_out: Option<PathBuf>,
}

impl StatisticsFlags {
    /// The statistics that are given. Refuses a flag that no pass of the pipeline has to do with.
    pub(super) fn read(&self, pipeline: &Pipeline) -> Result<Option<Statistics>, Error> {
        let flags = [("--stats-in", &self.stats_in), ("--stats-out", &self.stats_out)];
        let given = flags.iter().find(|(_, path)| path.is_some());
        if let (Some((flag, _)), false) = (given, pipeline.steps.iter().any(|s| s.pass.name() == NAME)) {
            let message = format!("{flag} is about {NAME}, which is not in the pipeline");
            return Err(Error::usage(message, "as in --preset static-int8"));
        }
        let Some(path) = &self.stats_in else { return Ok(None) };
        let bytes = files::map(path)?;
        let wrong = |why: String| Error::Data(format!("{} holds no statistics: {why}", path.display()));
        let text = std::str::from_utf8(&bytes).map_err(|e| wrong(e.to_string()))?;
        Statistics::parse(text).map(Some).map_err(wrong)
    }

    /// Saves what was gathered.
    pub(super) fn write(&self, gathered: Option<&Statistics>) -> Result<(), Error> {
        let (Some(path), Some(gathered)) = (&self.stats_out, gathered) else { return Ok(()) };
        qir::write_text(path, &gathered.text().map_err(Error::Data)?)?;
        Ok(())
    }
}
