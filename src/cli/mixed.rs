//! The flags about `mixed`: a recipe to replay, and what its search found.

use crate::Registry;
use crate::error::Error;
use crate::files::{self, FileError};
use crate::pipeline::Pipeline;
use crate::qir;
use crate::report::frontier;
use passes::mixed::{Mix, NAME, Recipe};
use std::path::{Path, PathBuf};

/// The flags.
#[derive(clap::Args)]
#[command(next_help_heading = "Mixed precision")]
pub(super) struct Flags {
    /// Give each layer what this file says, instead of a search by `mixed`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["write_recipe", "frontier"])]
    pub(super) recipe: Option<PathBuf>,
    /// Write what `mixed` gives each layer, to be edited and given to --recipe
    #[arg(long, value_name = "FILE")]
    write_recipe: Option<PathBuf>,
    /// Write what `mixed` found: all costs and every best recipe as .json, a chart as .svg. May be given more than once
    #[arg(long, value_name = "FILE")]
    frontier: Vec<PathBuf>,
}

/// A form of the frontier's file.
#[derive(Clone, Copy)]
enum Form {
    Json,
    Svg,
}

fn form(path: &Path) -> Option<Form> {
    match path.extension()?.to_str()? {
        "json" => Some(Form::Json),
        "svg" => Some(Form::Svg),
        _ => None,
    }
}

impl Flags {
    /// Refuses what makes no sense, and hands the recipe to the pass that replays it.
    pub(super) fn prepare(&self, pipeline: &mut Pipeline, registry: &Registry) -> Result<(), Error> {
        let flags = [
            (self.recipe.is_some(), "--recipe"),
            (self.write_recipe.is_some(), "--write-recipe"),
            (!self.frontier.is_empty(), "--frontier"),
        ];
        let given = flags.iter().find(|(given, _)| *given);
        if let (Some((_, flag)), false) = (given, pipeline.steps.iter().any(|s| s.pass.name() == NAME)) {
            let help = "as in --pass mixed{budget=5bits},pack-int4, or --pass mixed,pack-int4 with --recipe";
            return Err(Error::usage(format!("{flag} is about mixed, which is not in the pipeline"), help));
        }
        if let Some(path) = self.frontier.iter().find(|p| form(p).is_none()) {
            let message = format!("--frontier {}: its form cannot be told from the name", path.display());
            return Err(Error::usage(message, "name it .json or .svg"));
        }
        // What cannot be written is said before anything is measured.
        for path in self.outputs() {
            let folder = path.parent().filter(|f| !f.as_os_str().is_empty() && !f.is_dir());
            if let Some(folder) = folder.map(Path::to_owned) {
                return Err(FileError::NoFolder { path: path.clone(), folder }.into());
            }
        }
        let Some(path) = &self.recipe else { return Ok(()) };
        let bytes = files::map(path)?;
        let wrong = |why: String| Error::Data(format!("{} is no recipe: {why}", path.display()));
        let text = std::str::from_utf8(&bytes).map_err(|e| wrong(e.to_string()))?;
        let recipe = Recipe::parse(text).map_err(wrong)?;
        let recipe = serde_json::to_value(recipe).map_err(|e| Error::Data(e.to_string()))?;
        pipeline.give(registry, NAME, "recipe", &recipe)?;
        Ok(())
    }

    /// Files that are written beside the model.
    pub(super) fn outputs(&self) -> impl Iterator<Item = &PathBuf> {
        self.write_recipe.iter().chain(&self.frontier)
    }

    /// Writes what was found.
    pub(super) fn write(&self, mix: &Mix) -> Result<(), Error> {
        if let Some(path) = &self.write_recipe {
            qir::write_text(path, &mix.recipe().text())?;
        }
        for path in &self.frontier {
            let text = match form(path) {
                Some(Form::Svg) => frontier::svg(mix)
                    .map_err(|why| Error::Data(format!("{} cannot be drawn: {why}", path.display())))?,
                _ => frontier::json(mix),
            };
            qir::write_text(path, &text)?;
        }
        Ok(())
    }
}
