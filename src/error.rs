//! What a user is told when something fails: one message, with help, and with the text at fault underlined.

use crate::files::FileError;
use crate::pipeline::PipelineError;
use crate::resume::ResumeError;
use dialects::ir::Diagnostic;
use passes::eqsat::qrw::{Refused, RuleError};
use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

/// A failure of the program. [`Error::exit_code`] tells a wrong command line from bad input.
#[derive(Debug, Error)]
pub enum Error {
    /// The command line asks for something that makes no sense.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do about it.
        help: Option<String>,
    },
    /// The pipeline's text is wrong.
    #[error("{0}")]
    Pipeline(PipelineError),
    /// A file cannot be read or written.
    #[error("{0}")]
    File(FileError),
    /// The model cannot be read or written.
    #[error("{0}")]
    Model(String),
    /// The text of a module is wrong.
    #[error("{}: {problem}", path.display())]
    Qir {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: dialects::ir::parse::ParseError,
        /// The text.
        text: Box<miette::NamedSource<String>>,
    },
    /// The text of rewrite rules is wrong.
    #[error("{}: {problem}", path.display())]
    Rules {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: RuleError,
        /// The text.
        text: Box<miette::NamedSource<String>>,
    },
    /// Rewrite rules are refuted, or cannot be checked.
    #[error("{}: {}", path.display(), refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why, rule by rule.
        refused: Vec<Refused>,
    },
    /// A file of tokens is wrong.
    #[error("{0}")]
    Data(String),
    /// The model contradicts itself.
    #[error("{} is not valid: {}", path.display(), Listed(found))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What the verifier found.
        found: Vec<Diagnostic>,
    },
    /// The folder of `--resume` cannot be used.
    #[error("{0}")]
    Resume(ResumeError),
    /// Calibration data is missing or wrong.
    #[error("{message}")]
    Calibration {
        /// What is wrong.
        message: String,
        /// What to give.
        help: Option<String>,
    },
    /// A pass failed.
    #[error("pass ({number}) failed: {message}")]
    Pass {
        /// The pass's place in the pipeline, from 1.
        number: usize,
        /// What it said.
        message: String,
        /// What to do about it.
        help: Option<String>,
    },
    /// A pass left a module that the verifier refuses.
    #[error("pass ({number}) {pass} broke the module; this is a bug in the pass: {}", Listed(found))]
    Broken {
        /// The pass's place in the pipeline, from 1.
        number: usize,
        /// The pass.
        pass: String,
        /// What the verifier found.
        found: Vec<Diagnostic>,
    },
    /// `--check` found that a pass did something else than it says.
    #[error("--check: pass ({number}) {pass}: {message}")]
    Check {
        /// The pass's place in the pipeline, from 1.
        number: usize,
        /// The pass.
        pass: String,
        /// What was expected and what was found.
        message: String,
    },
    /// `--strict`, and weights stay float that nobody asked to keep.
    #[error("--strict: {} float without being asked to:\n{}", stay(left.len()), left.join("\n"))]
    Strict {
        /// One line each.
        left: Vec<String>,
    },
}

fn stay(n: usize) -> String {
    match n {
        1 => "1 weight-bearing op stays".into(),
        n => format!("{n} weight-bearing ops stay"),
    }
}

/// Diagnostics as a list, cut where it gets long.
struct Listed<'a>(&'a [Diagnostic]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        if let [one] = self.0 {
            return one.fmt(f);
        }
        write!(f, "{} errors", self.0.len())?;
        for d in self.0.iter().take(SHOWN) {
            write!(f, "\n  {d}")?;
        }
        match self.0.len().checked_sub(SHOWN) {
            Some(more @ 1..) => write!(f, "\n  and {more} more"),
            _ => Ok(()),
        }
    }
}

impl Error {
    /// A wrong command line.
    pub fn usage(message: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Usage { message: message.into(), help: Some(help.into()) }
    }

    /// 2 for a wrong command line, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage { .. } | Error::Pipeline(_) => 2,
            _ => 1,
        }
    }
}

impl From<PipelineError> for Error {
    fn from(e: PipelineError) -> Error {
        Error::Pipeline(e)
    }
}

impl From<FileError> for Error {
    fn from(e: FileError) -> Error {
        Error::File(e)
    }
}

impl From<ResumeError> for Error {
    fn from(e: ResumeError) -> Error {
        Error::Resume(e)
    }
}

impl miette::Diagnostic for Error {
    fn help(&self) -> Option<Box<dyn fmt::Display + '_>> {
        let text: &str = match self {
            Error::Pipeline(e) => return e.help(),
            Error::Usage { help, .. } | Error::Pass { help, .. } | Error::Calibration { help, .. } => {
                help.as_deref()?
            }
            Error::Broken { .. } | Error::Check { .. } => {
                "--repro DIR leaves the input of the failing pass and the pipeline there, for a report"
            }
            Error::Resume(e) => e.help()?,
            Error::Rules { problem, .. } => problem.help.as_deref()?,
            Error::Refused { .. } => {
                "a rule must hold for every input; add the conditions that it needs after `if`"
            }
            Error::Strict { .. } => "name what may stay float with --skip, by pattern or op type",
            _ => return None,
        };
        Some(Box::new(text))
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        match self {
            Error::Pipeline(e) => e.source_code(),
            Error::Qir { text, .. } | Error::Rules { text, .. } => Some(&**text),
            _ => None,
        }
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = miette::LabeledSpan> + '_>> {
        match self {
            Error::Pipeline(e) => e.labels(),
            Error::Qir { problem, .. } => {
                let label = miette::LabeledSpan::new_with_span(Some("here".into()), problem.span());
                Some(Box::new(std::iter::once(label)))
            }
            Error::Rules { problem, .. } => {
                let label = Some(problem.label.clone());
                let label = miette::LabeledSpan::new_with_span(label, problem.span.clone());
                Some(Box::new(std::iter::once(label)))
            }
            _ => None,
        }
    }
}
