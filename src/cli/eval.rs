//! `qcc eval`: perplexity and accuracy of a language model, and its distance from a baseline.

use super::run::With;
use super::{Context, print, print_json};
use crate::calibrate::positive;
use crate::data::tokens::{self, Rows, Take};
use crate::driver;
use crate::error::Error;
use crate::eval::{EvalError, Scores, Subject, evaluate};
use crate::report::paint::nats;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// Token ids to predict: a .npy file, integers [rows, tokens]
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// Only the first N rows
    #[arg(long, value_name = "N", value_parser = positive)]
    rows: Option<usize>,
    /// A model to compare with, such as the one before quantization
    #[arg(long, value_name = "MODEL")]
    baseline: Option<PathBuf>,
    #[command(flatten)]
    with: With,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let read = |path| driver::read(path, &cx.registry, &cx.term);
    let m = read(&args.model)?;
    let baseline = args.baseline.as_deref().map(read).transpose()?;
    let take = Take { rows: args.rows.unwrap_or(usize::MAX), len: usize::MAX, random: false, seed: 0 };
    let rows = tokens::read(&args.tokens, take).map_err(|e| Error::Data(e.to_string()))?;
    let exec = args.with.executor(cx);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |e: EvalError| Error::Model(format!("{}: {e}", path.display()))
    };
    let model = Subject::new(&m, &*exec, rows.len).map_err(failed(&args.model))?;
    let check = |subject: &Subject, path: &Path| {
        let wrong = |e| Error::Data(format!("{e} ({})", path.display()));
        rows.check(&args.tokens, subject.vocab()).map_err(wrong)
    };
    check(&model, &args.model)?;
    let other = match (&baseline, &args.baseline) {
        (Some(b), Some(path)) => {
            let other = Subject::new(b, &*exec, rows.len).map_err(failed(path))?;
            check(&other, path)?;
            Some(other)
        }
        _ => None,
    };
    let task = cx.term.task("evaluating", rows.count() as u64);
    let scores = evaluate(&model, other.as_ref(), &rows, &*task).map_err(|e| match (e, &args.baseline) {
        (EvalError::Baseline(e), Some(path)) => failed(path)(*e),
        (e, _) => failed(&args.model)(e),
    })?;
    drop(task);
    if cx.json {
        return print_json(&scores);
    }
    print(&text(&scores, &rows, &model.notes))
}

fn text(s: &Scores, rows: &Rows, notes: &[String]) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<22}{value}\n"));
    line("tokens", format!("{} rows of {}, {} predicted", s.rows, rows.len, s.positions));
    for note in notes {
        line("", note.clone());
    }
    line("perplexity", format!("{:.4}", s.perplexity));
    line("top-1 accuracy", format!("{:.4}", s.top1));
    if let Some(a) = &s.against {
        line("baseline perplexity", format!("{:.4}", a.baseline_perplexity));
        line("baseline top-1", format!("{:.4}", a.baseline_top1));
        line("KL divergence", format!("{} nats", nats(a.kl)));
        line("top-1 agreement", format!("{:.4}", a.agreement));
    }
    out
}
