//! `qcc bench`: how good a language model is, how fast it reads a prompt and makes tokens, and what it takes.

use super::run::With;
use super::{Context, painter, print, print_json};
use crate::calibrate::positive;
use crate::data::tokens::{self, Rows, Take};
use crate::driver;
use crate::error::Error;
use crate::eval::{Scores, Subject, evaluate};
use crate::generate::{Decoder, cached};
use crate::report::paint::{Table, bytes};
use dialects::exec::Executor;
use dialects::ir::{ConstId, Module, Use};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bytes that the read loops go over at most.
const MOST: u64 = 4 << 30;

/// Bytes that they go over at least: what does not fit into caches.
const LEAST: u64 = 256 << 20;

/// Times that each figure is taken; the best counts, since others use the machine too.
const TIMES: usize = 3;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model; for generation one without a key/value cache gets one, as the pass add-kv-cache adds it
    model: PathBuf,
    /// A model to compare with, such as the one before quantization
    #[arg(long, value_name = "MODEL")]
    against: Option<PathBuf>,
    /// Token ids to predict and to read: a .npy file, integers [rows, tokens]; without it no perplexity is measured
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Only the first N rows of it
    #[arg(long, value_name = "N", value_parser = positive)]
    rows: Option<usize>,
    /// Tokens of the prompts whose reading is timed
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [128])]
    prefill: Vec<usize>,
    /// Tokens whose making is timed, one by one, behind the first of the prompts
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive)]
    decode: usize,
    #[command(flatten)]
    with: With,
}

/// Time to read a prompt.
#[derive(Serialize)]
struct Prefill {
    tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
}

/// Figures of one model.
#[derive(Serialize)]
struct Figures {
    model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    scores: Option<Scores>,
    /// Bytes of all constants.
    weight_bytes: u64,
    /// Bytes of those that every token reads in whole: all but tables that are only looked up.
    bytes_per_token: u64,
    prefill: Vec<Prefill>,
    decode_tokens: usize,
    /// Median over the tokens.
    decode_seconds: f64,
    tokens_per_second: f64,
    /// Bytes per token and second that decoding reads, over what a plain loop reads in this run.
    share_of_bandwidth: f64,
}

/// All figures.
#[derive(Serialize)]
struct Found {
    threads: usize,
    /// Bytes per second that plain loops read, all threads together.
    read_bandwidth: f64,
    models: Vec<Figures>,
    /// The most memory that the process held, in bytes; `None` where the system does not tell.
    peak_memory: Option<u64>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    if args.prefill.contains(&0) {
        return Err(Error::usage("--prefill 0", "give lengths of at least one token"));
    }
    let take = Take { rows: args.rows.unwrap_or(usize::MAX), len: usize::MAX, random: false, seed: 0 };
    let rows = args.tokens.as_deref().map(|path| tokens::read(path, take)).transpose();
    let rows = rows.map_err(|e| Error::Data(e.to_string()))?;
    let mut paths = vec![args.model.as_path()];
    paths.extend(args.against.as_deref());
    let modules = paths.iter().map(|path| driver::read(path, &cx.registry, &cx.term));
    let modules: Vec<Module> = modules.collect::<Result<_, _>>()?;
    let streamed: Vec<(u64, u64)> = modules.iter().map(weights).collect();
    let exec = args.with.executor(cx);
    let mut models = Vec::new();
    for (i, path) in paths.iter().enumerate() {
        let baseline = (i == 0).then(|| Some((modules.get(1)?, *paths.get(1)?))).flatten();
        let scores = match (&rows, &args.tokens) {
            (Some(rows), Some(from)) => Some(scores(&modules[i], path, baseline, rows, from, &*exec, cx)?),
            _ => None,
        };
        let timed = cached(modules[i].clone(), &cx.registry, cx.term)?;
        models.push(time(args, &timed, path, rows.as_ref(), &*exec, scores, streamed[i])?);
    }
    // Only now, since the loops need memory too.
    let peak_memory = peak_memory();
    let read_bandwidth = bandwidth(streamed[0].1);
    for m in &mut models {
        m.share_of_bandwidth = m.bytes_per_token as f64 / m.decode_seconds / read_bandwidth;
    }
    let threads = rayon::current_num_threads();
    let found = Found { threads, read_bandwidth, models, peak_memory };
    if cx.json {
        return print_json(&found);
    }
    print(&text(&found))
}

/// What the model scores, and how far it is from the other one.
fn scores(
    m: &Module,
    path: &Path,
    baseline: Option<(&Module, &Path)>,
    rows: &Rows,
    from: &Path,
    exec: &dyn Executor,
    cx: &Context,
) -> Result<Scores, Error> {
    let failed = |path: &Path, e: &dyn std::fmt::Display| Error::Model(format!("{}: {e}", path.display()));
    let subject = |m, path| {
        let subject = Subject::new(m, exec, rows.len).map_err(|e| failed(path, &e))?;
        rows.check(from, subject.vocab()).map_err(|e| Error::Data(format!("{e} ({})", path.display())))?;
        Ok::<_, Error>(subject)
    };
    let model = subject(m, path)?;
    let other = baseline.map(|(m, path)| subject(m, path)).transpose()?;
    let task = cx.term.task("evaluating", rows.count() as u64);
    evaluate(&model, other.as_ref(), rows, &*task).map_err(|e| failed(path, &e))
}

fn time(
    args: &Args,
    m: &Module,
    path: &Path,
    rows: Option<&Rows>,
    exec: &dyn Executor,
    scores: Option<Scores>,
    (weight_bytes, bytes_per_token): (u64, u64),
) -> Result<Figures, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Model(format!("{}: {e}", path.display()));
    let mut decoder = Decoder::new(m, exec).map_err(|e| failed(&e))?;
    let vocab = decoder.vocab().unwrap_or(1).max(1);
    let prompt = |n: usize| -> Vec<i64> {
        match rows {
            Some(rows) => rows.ids().iter().copied().cycle().take(n).collect(),
            None => (0..n).map(|i| (i * 7 % vocab) as i64).collect(),
        }
    };
    let longest = args.prefill.iter().max().copied().unwrap_or(1).max(args.prefill[0] + args.decode);
    if let Some(bound) = decoder.bound().filter(|&b| b < longest) {
        let message = format!("{longest} positions are asked for, the model has a context of {bound}");
        return Err(Error::usage(failed(&message).to_string(), "give shorter --prefill and --decode"));
    }
    let mut prefill = Vec::new();
    for &tokens in &args.prefill {
        let ids = prompt(tokens);
        let mut seconds = f64::INFINITY;
        for _ in 0..TIMES {
            decoder.restart();
            let started = Instant::now();
            decoder.feed(&ids).map_err(|e| failed(&e))?;
            seconds = seconds.min(started.elapsed().as_secs_f64());
        }
        prefill.push(Prefill { tokens, seconds, tokens_per_second: tokens as f64 / seconds });
    }
    decoder.restart();
    decoder.feed(&prompt(args.prefill[0])).map_err(|e| failed(&e))?;
    let mut times = Vec::with_capacity(args.decode);
    for id in prompt(args.decode) {
        let started = Instant::now();
        decoder.feed(&[id]).map_err(|e| failed(&e))?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let decode_seconds = times[times.len() / 2];
    Ok(Figures {
        model: path.display().to_string(),
        scores,
        weight_bytes,
        bytes_per_token,
        prefill,
        decode_tokens: args.decode,
        decode_seconds,
        tokens_per_second: 1.0 / decode_seconds,
        share_of_bandwidth: 0.0,
    })
}

/// Bytes of all constants, and of those that are not only looked up by rows.
fn weights(m: &Module) -> (u64, u64) {
    let uses = m.uses();
    let mut tables: BTreeSet<ConstId> = BTreeSet::new();
    for &v in &m.regions[m.top].consts {
        let looked_up = |u: &Use| match *u {
            Use::Operand(op, i) => {
                let data = &m.ops[op];
                data.is("onnx.Gather") && i == 0 || data.is("com.microsoft.GatherBlockQuantized") && i != 1
            }
            Use::Result(..) => false,
        };
        if uses.of(v).iter().all(looked_up) {
            tables.extend(m.const_of(v));
        }
    }
    let all = passes::dce::constants(m);
    let sum = |ids: &mut dyn Iterator<Item = &ConstId>| ids.map(|&c| m.consts[c].byte_len()).sum::<u64>();
    (sum(&mut all.iter()), sum(&mut all.iter().filter(|c| !tables.contains(c))))
}

/// Bytes per second that plain loops read: the best of three, over as many bytes as `len`, all threads together.
fn bandwidth(len: u64) -> f64 {
    let words = (len.clamp(LEAST, MOST) / 8) as usize;
    let data: Vec<u64> = (0..words).into_par_iter().map(|i| i as u64).collect();
    let chunk = words.div_ceil(rayon::current_num_threads());
    let read = |_| {
        let started = Instant::now();
        let sum: u64 =
            data.par_chunks(chunk).map(|part| part.iter().fold(0, |a: u64, &x| a.wrapping_add(x))).sum();
        std::hint::black_box(sum);
        (words * 8) as f64 / started.elapsed().as_secs_f64()
    };
    (0..TIMES).map(read).fold(0.0, f64::max)
}

/// The most memory that the process held, in bytes.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn text(found: &Found) -> String {
    let names: Vec<&str> = found.models.iter().map(|m| m.model.as_str()).collect();
    let header: Vec<String> =
        std::iter::once(String::new()).chain(names.iter().map(|n| format!(">{n}"))).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut table = Table::new(&header);
    let mut line = |name: &str, value: &dyn Fn(&Figures) -> String| {
        table.row(std::iter::once(name.to_string()).chain(found.models.iter().map(value)));
    };
    let score = |f: &dyn Fn(&Scores) -> String, m: &Figures| m.scores.as_ref().map_or("-".into(), f);
    if found.models.iter().any(|m| m.scores.is_some()) {
        line("perplexity", &|m| score(&|s| format!("{:.4}", s.perplexity), m));
        line("top-1 accuracy", &|m| score(&|s| format!("{:.4}", s.top1), m));
    }
    if found.models.iter().any(|m| m.scores.as_ref().is_some_and(|s| s.against.is_some())) {
        let against = |s: &Scores| s.against.as_ref().map_or("-".into(), |a| format!("{:.6} nats", a.kl));
        line("KL divergence", &|m| score(&against, m));
    }
    line("weights", &|m| bytes(m.weight_bytes));
    line("read by each token", &|m| bytes(m.bytes_per_token));
    for (i, p) in found.models[0].prefill.iter().enumerate() {
        let name = format!("prefill of {}", p.tokens);
        line(&name, &|m| {
            format!("{:.1} ms, {:.1} tokens/s", m.prefill[i].seconds * 1e3, m.prefill[i].tokens_per_second)
        });
    }
    line("decode", &|m| format!("{:.2} ms, {:.1} tokens/s", m.decode_seconds * 1e3, m.tokens_per_second));
    line("share of bandwidth", &|m| format!("{:.1} %", m.share_of_bandwidth * 100.0));
    let mut out = String::new();
    painter(false).table(&mut out, table);
    let peak = found.peak_memory.map_or(String::new(), |b| format!("; peak memory {}", bytes(b)));
    let bandwidth = found.read_bandwidth / 1e9;
    out.push_str(&format!("{} threads, which read {bandwidth:.1} GB/s{peak}\n", found.threads));
    out
}
