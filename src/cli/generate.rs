//! `qcc generate`: text from a causal language model, token by token.

use super::run::With;
use super::{Context, print, print_json};
use crate::calibrate::positive;
use crate::data::tokens;
use crate::driver;
use crate::error::Error;
use crate::generate::sample::{Choice, Sampler};
use crate::generate::text::{self, Stops, Text};
use crate::generate::{Decoder, cached};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;
use tokenizers::Tokenizer;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The model; one without a key/value cache gets one, as the pass add-kv-cache adds it
    model: PathBuf,
    /// The tokenizer.json of the model
    #[arg(long, value_name = "FILE", required_unless_present = "ids")]
    tokenizer: Option<PathBuf>,
    /// The text to go on from
    #[arg(long, value_name = "TEXT", required_unless_present = "ids")]
    prompt: Option<String>,
    /// The tokens to go on from, in place of a text
    #[arg(long, value_name = "ID,...", value_delimiter = ',', conflicts_with = "prompt")]
    ids: Option<Vec<u32>>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive)]
    max_new_tokens: usize,
    /// What logits are divided by before a token is drawn; 0 takes the likeliest one [default: 0, and 1 with any of the
    /// three options below]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Draw from the K likeliest tokens
    #[arg(long, value_name = "K", value_parser = positive)]
    top_k: Option<usize>,
    /// Draw from the likeliest tokens that together have probability P
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// What draws follow from: the same seed gives the same tokens [default: 0]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// End before this text. May be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// The token that ends a text [default: the tokenizer's special tokens of such names]
    #[arg(long, value_name = "ID")]
    eos: Option<u32>,
    #[command(flatten)]
    with: With,
}

/// Why no more tokens came.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Ended {
    /// The token that ends a text came.
    Eos,
    /// A stop string came.
    Stop,
    /// As many as were asked for are there.
    Length,
    /// The model has no more positions.
    Context,
}

/// What came out.
#[derive(Serialize)]
struct Generated {
    prompt_tokens: usize,
    tokens: Vec<u32>,
    text: Option<String>,
    ended: Ended,
    prefill_seconds: f64,
    /// Of each token but the first, which the prefill gives.
    token_seconds: Vec<f64>,
}

impl Args {
    fn choice(&self) -> Result<Choice, Error> {
        let drawn = self.top_k.is_some() || self.top_p.is_some() || self.seed.is_some();
        let temperature = self.temperature.unwrap_or(if drawn { 1.0 } else { 0.0 });
        let top_p = self.top_p.unwrap_or(1.0);
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(Error::usage(format!("--temperature {temperature}"), "give 0 or a positive number"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::usage(format!("--top-p {top_p}"), "give a probability over 0, up to 1"));
        }
        Ok(Choice { temperature, top_k: self.top_k.unwrap_or(0), top_p, seed: self.seed.unwrap_or(0) })
    }

    /// The tokenizer, if there is one, and the tokens to go on from.
    fn prompt(&self) -> Result<(Option<Tokenizer>, Vec<u32>), Error> {
        let data = |e: tokens::TokenError| Error::Data(e.to_string());
        let tokenizer = self.tokenizer.as_deref().map(tokens::tokenizer).transpose().map_err(data)?;
        let ids = match (&self.ids, &tokenizer, &self.prompt) {
            (Some(ids), ..) => ids.clone(),
            (None, Some(t), Some(prompt)) => {
                let encoded =
                    t.encode(prompt.as_str(), true).map_err(|e| Error::Data(format!("--prompt: {e}")))?;
                encoded.get_ids().to_vec()
            }
            _ => Vec::new(),
        };
        if ids.is_empty() {
            return Err(Error::usage(
                "there is no token to go on from",
                "give a --prompt of some text, or --ids",
            ));
        }
        Ok((tokenizer, ids))
    }
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<(), Error> {
    let choice = args.choice()?;
    let (tokenizer, prompt) = args.prompt()?;
    let m = cached(driver::read(&args.model, &cx.registry, &cx.term)?, &cx.registry, cx.term)?;
    let exec = args.with.executor(cx);
    let failed = |e: &dyn std::fmt::Display| Error::Model(format!("{}: {e}", args.model.display()));
    let mut decoder = Decoder::new(&m, &*exec).map_err(|e| failed(&e))?;
    let known = tokenizer.as_ref().map(|t| t.get_vocab_size(true));
    let fits = |vocab: usize, what: &str| -> Result<(), Error> {
        let message = match (known, prompt.iter().max()) {
            (Some(n), _) if n > vocab => format!("the tokenizer has {n} tokens, the model {vocab} {what}"),
            (_, Some(&id)) if id as usize >= vocab => format!("token {id}: the model has {vocab} {what}"),
            _ => return Ok(()),
        };
        Err(failed(&message))
    };
    decoder.vocab().map_or(Ok(()), |n| fits(n, "rows of its embedding"))?;
    if let Some(bound) = decoder.bound().filter(|&b| prompt.len() > b) {
        let message = format!("the prompt has {} tokens, the model a context of {bound}", prompt.len());
        return Err(failed(&message));
    }
    let eos = match (args.eos, &tokenizer) {
        (Some(id), _) => vec![id],
        (None, Some(t)) => text::ends(t),
        (None, None) => Vec::new(),
    };

    let mut out =
        Output { cx, text: tokenizer.as_ref().map(|t| Text::after(t, &prompt)), shown: String::new() };
    let (mut sampler, mut stops) = (Sampler::new(choice), Stops::new(&args.stop));
    let (mut tokens, mut token_seconds) = (Vec::new(), Vec::new());
    let started = Instant::now();
    let ids: Vec<i64> = prompt.iter().map(|&id| id.into()).collect();
    let mut logits = decoder.feed(&ids).map_err(|e| failed(&e))?;
    let prefill_seconds = started.elapsed().as_secs_f64();
    fits(logits.len(), "logits")?;
    let ended = loop {
        let open = known.unwrap_or(logits.len()).min(logits.len());
        let next = sampler.next(&logits[..open]).ok_or_else(|| failed(&"no logit is a number"))?;
        let id = u32::try_from(next).map_err(|e| failed(&e))?;
        if eos.contains(&id) {
            break Ended::Eos;
        }
        tokens.push(id);
        if out.token(id, &mut stops)? {
            break Ended::Stop;
        }
        if tokens.len() == args.max_new_tokens {
            break Ended::Length;
        }
        if decoder.bound() == Some(decoder.at()) {
            break Ended::Context;
        }
        let started = Instant::now();
        logits = decoder.feed(&[id.into()]).map_err(|e| failed(&e))?;
        token_seconds.push(started.elapsed().as_secs_f64());
    };
    if ended != Ended::Stop {
        out.rest(&mut stops)?;
    }
    let text = tokenizer.is_some().then(|| std::mem::take(&mut out.shown));
    if cx.json {
        let prompt_tokens = prompt.len();
        return print_json(&Generated { prompt_tokens, tokens, text, ended, prefill_seconds, token_seconds });
    }
    print("\n")?;
    if ended == Ended::Context {
        let bound = decoder.bound().unwrap_or(decoder.at());
        cx.term.trace(&format!("ended at the model's context of {bound} positions"));
    }
    if !cx.term.quiet() {
        let rate = |n: usize, seconds: f64| format!("{n} tokens, {:.1} tokens/s", n as f64 / seconds);
        let decode = match token_seconds.is_empty() {
            true => String::new(),
            false => format!("; decode {}", rate(token_seconds.len(), token_seconds.iter().sum())),
        };
        cx.term.trace(&format!("prefill {}{decode}", rate(prompt.len(), prefill_seconds)));
    }
    Ok(())
}

/// Where text goes as it comes.
struct Output<'a> {
    cx: &'a Context,
    text: Option<Text<'a>>,
    shown: String,
}

impl Output<'_> {
    /// One more token; whether a stop string ended the text.
    fn token(&mut self, id: u32, stops: &mut Stops) -> Result<bool, Error> {
        let decoded =
            |e: tokenizers::Error| Error::Data(format!("the tokenizer cannot decode token {id}: {e}"));
        match &mut self.text {
            None => self.show(&format!("{id} ")).map(|()| false),
            Some(text) => {
                let (shown, stop) = stops.push(&text.push(id).map_err(decoded)?);
                self.show(&shown).map(|()| stop)
            }
        }
    }

    /// What is left when no more tokens come.
    fn rest(&mut self, stops: &mut Stops) -> Result<(), Error> {
        let Some(text) = &mut self.text else { return Ok(()) };
        let rest = text.rest().map_err(|e| Error::Data(format!("the tokenizer cannot decode: {e}")))?;
        let (shown, stop) = stops.push(&rest);
        let held = if stop { String::new() } else { stops.rest() };
        self.show(&(shown + &held))
    }

    fn show(&mut self, text: &str) -> Result<(), Error> {
        self.shown.push_str(text);
        if self.cx.json || text.is_empty() {
            return Ok(());
        }
        print(text)?;
        // What a reader that went away does not get is no failure; `print` has said so of others.
        let _ = std::io::stdout().flush();
        Ok(())
    }
}
