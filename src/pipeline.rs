//! Pipelines: the text given to `--pass`, parsed, checked against the registry, and made into passes.
//!
//! The grammar is in `pipeline.pest`. A mistake is reported with the part of the text that it is about; an unknown
//! name comes with the nearest known one. The normalized text writes every option out, so that it says what was
//! run even when a default changes later.

use crate::Registry;
use passes::{Filter, Pass, PassDef, PassError};
use pest::Parser;
use pest::error::InputLocation;
use pest::iterators::Pair;
use serde_json::{Map, Value as Json};
use std::fmt::Write;
use std::ops::Range;
use thiserror::Error;

// The derive makes a public enum without documentation.
#[allow(missing_docs)]
mod grammar {
    #[derive(pest_derive::Parser)]
    #[grammar = "pipeline.pest"]
    pub struct Grammar;
}
use grammar::{Grammar, Rule};

/// Pipelines with a name: name, text, what it is for.
pub const PRESETS: &[(&str, &str, &str)] = &[
    (
        "int4-awq",
        "awq,pack-int4",
        "4-bit weights, activation-aware scales and clipping; needs calibration data",
    ),
    (
        "int4-gptq",
        "gptq,pack-int4",
        "4-bit weights, rounded so that they make up for each other's errors; needs calibration data",
    ),
    ("int4-rtn", "rtn,pack-int4", "4-bit weights, rounded to nearest; needs no data"),
    ("int8-rtn", "rtn{bits=8},pack-int4", "8-bit weights, rounded to nearest; needs no data"),
    (
        "static-int8",
        "rtn{bits=8, group=-1, symmetric=true, narrow=true},reduce-range,calibrate{method=mse},insert-fake-quant,pack-qdq",
        "8-bit weights and activations, as ONNX Runtime and TensorRT fuse them; needs calibration data",
    ),
    (
        "dynamic-int8",
        "rtn{bits=8, group=-1, symmetric=true, narrow=true, skip=[Conv, ConvTranspose, DeformConv, LSTM, GRU, RNN]},reduce-range,\
         insert-fake-quant{dynamic=true},pack-operators",
        "8-bit weights, and activations in 8 bits whose range is found as the model runs; needs no data",
    ),
    ("int4-awq-qdq", "awq,pack-qdq", "like int4-awq, in standard ONNX ops (DequantizeLinear, opset 21)"),
];

/// A pipeline's text is wrong.
#[derive(Clone, Debug, Error, miette::Diagnostic)]
#[error("{message}")]
pub struct PipelineError {
    /// What is wrong.
    pub message: String,
    /// The text.
    #[source_code]
    pub text: String,
    /// The part of the text that is wrong.
    #[label("{label}")]
    pub span: miette::SourceSpan,
    /// What stands there.
    pub label: String,
    /// What to do about it.
    #[help]
    pub help: Option<String>,
}

/// One pass of a pipeline with its options.
pub struct Step {
    /// The pass.
    pub pass: Box<dyn Pass>,
    /// Every option with its value, those left out with their defaults.
    pub options: Map<String, Json>,
    /// Where it stands in the text.
    span: Range<usize>,
    /// Where the options that were given stand.
    option_spans: Vec<(String, Range<usize>)>,
}

/// Passes in the order in which they run.
pub struct Pipeline {
    /// The text as it was given.
    pub text: String,
    /// The passes.
    pub steps: Vec<Step>,
}

impl Step {
    /// Which ops the pass may touch, when it has such options.
    pub fn filter(&self) -> Option<Filter> {
        let list = |key: &str| -> Option<Vec<String>> {
            let items = self.options.get(key)?.as_array()?;
            Some(items.iter().filter_map(|s| s.as_str().map(str::to_owned)).collect())
        };
        Some(Filter { only: list("only")?, skip: list("skip")? })
    }

    /// The step with every option that has a value: `rtn{bits=4, group=32, symmetric=false}`.
    pub fn normalized(&self) -> String {
        self.changed(&[])
    }

    /// The same with other values for those of `changes` that the pass has as options.
    fn changed(&self, changes: &[(&str, Json)]) -> String {
        let mut out = self.pass.name().to_string();
        let change = |key: &str| changes.iter().find(|(k, _)| *k == key).map(|(_, v)| v);
        let empty = |v: &Json| v.is_null() || v.as_array().is_some_and(Vec::is_empty);
        let shown: Vec<String> = self
            .options
            .iter()
            .map(|(k, v)| (k, change(k).unwrap_or(v)))
            .filter(|(_, v)| !empty(v))
            .map(|(k, v)| format!("{k}={}", literal(v)))
            .collect();
        if !shown.is_empty() {
            write!(out, "{{{}}}", shown.join(", ")).expect("writing to a string succeeds");
        }
        out
    }
}

impl Pipeline {
    /// Parses `text`, resolves every pass and option in `registry`, and adds the patterns `only` and `skip` to
    /// every pass that has these options.
    pub fn parse(
        text: &str,
        registry: &Registry,
        only: &[String],
        skip: &[String],
    ) -> Result<Pipeline, PipelineError> {
        let build = Builder { text, registry };
        let root = Grammar::parse(Rule::pipeline, text).map_err(|e| build.syntax(&e))?;
        let passes = root.flat_map(Pair::into_inner).filter(|p| p.as_rule() == Rule::pass);
        let mut steps = passes.map(|p| build.step(p, only, skip)).collect::<Result<Vec<_>, _>>()?;
        for (flag, given) in [("only", only), ("skip", skip)] {
            if !given.is_empty() && !steps.iter().any(|s| s.options.contains_key(flag)) {
                let message = format!("--{flag} is given, but no pass of the pipeline takes it");
                return Err(build.error(0..text.len(), message, "no quantizing pass here", None));
            }
        }
        for i in 0..steps.len() {
            if steps[i + 1..].iter().any(|s| s.pass.compensates()) {
                build.leave_rounding(&mut steps[i])?;
            }
        }
        steps.shrink_to_fit();
        Ok(Pipeline { text: text.to_string(), steps })
    }

    /// Gives an option that the command line cannot write to every pass named `pass`. It is no part of the normalized
    /// text.
    pub fn give(
        &mut self,
        registry: &Registry,
        pass: &str,
        option: &str,
        value: &Json,
    ) -> Result<(), PipelineError> {
        let Some(def) = registry.pass(pass) else { return Ok(()) };
        for step in self.steps.iter_mut().filter(|s| s.pass.name() == pass) {
            let mut options = step.options.clone();
            options.insert(option.to_string(), value.clone());
            step.pass = (def.make)(Json::Object(options)).map_err(|why| PipelineError {
                message: format!("{pass}: the option {option} does not fit: {why}"),
                text: self.text.clone(),
                span: step.span.clone().into(),
                label: "of this pass".into(),
                help: None,
            })?;
        }
        Ok(())
    }

    /// The whole pipeline with every option written out.
    pub fn normalized(&self) -> String {
        self.steps.iter().map(Step::normalized).collect::<Vec<_>>().join(",")
    }

    /// The text of the same pipeline with other values for options, in every pass that has them.
    pub fn changed(&self, changes: &[(&str, Json)]) -> String {
        self.steps.iter().map(|s| s.changed(changes)).collect::<Vec<_>>().join(",")
    }

    /// The value of an option in the first pass that has it.
    pub fn option(&self, name: &str) -> Option<&Json> {
        self.steps.iter().find_map(|s| s.options.get(name))
    }

    /// An error of a running pass as an error about the option it names, with the span of that option.
    pub fn blame(&self, step: usize, error: &PassError) -> Option<PipelineError> {
        let PassError::Option { pass, option, why } = error else { return None };
        let step = &self.steps[step];
        let given = step.option_spans.iter().find(|(k, _)| k == option);
        let value = step.options.get(*option).map(literal).unwrap_or_default();
        let (span, label) = match given {
            Some((_, span)) => (span.clone(), "given here".to_string()),
            None => (step.span.clone(), format!("{option}={value} by default")),
        };
        let text = self.text.clone();
        let message = format!("{pass}: option {option}: {why}");
        Some(PipelineError { message, text, span: span.into(), label, help: None })
    }
}

struct Builder<'a> {
    text: &'a str,
    registry: &'a Registry,
}

impl Builder<'_> {
    fn error(
        &self,
        span: Range<usize>,
        message: impl Into<String>,
        label: impl Into<String>,
        help: Option<String>,
    ) -> PipelineError {
        let text = self.text.to_string();
        PipelineError { message: message.into(), text, span: span.into(), label: label.into(), help }
    }

    fn syntax(&self, e: &pest::error::Error<Rule>) -> PipelineError {
        let at = match e.location {
            InputLocation::Pos(at) | InputLocation::Span((at, _)) => at,
        };
        let (message, span) = match self.text[at..].chars().next() {
            Some(c) => (format!("unexpected {c:?}"), at..at + c.len_utf8()),
            // There is nothing to underline at the end; the last character has to do.
            None => ("it ends too early".to_string(), at - usize::from(at > 0)..at),
        };
        let help = "a pipeline is passes with options, such as awq{group=64, clip=false},pack-int4";
        let expected = match &e.variant {
            pest::error::ErrorVariant::ParsingError { positives, .. } => expected(positives),
            pest::error::ErrorVariant::CustomError { message } => message.clone(),
        };
        self.error(span, format!("the pipeline cannot be read: {message}"), expected, Some(help.into()))
    }

    fn step(&self, pair: Pair<Rule>, only: &[String], skip: &[String]) -> Result<Step, PipelineError> {
        let span = range(&pair);
        let mut inner = pair.into_inner();
        let name = inner.next().expect("a pass has a name");
        let def = self.registry.pass(name.as_str()).ok_or_else(|| self.unknown_pass(&name))?;
        let known = match (def.defaults)() {
            Json::Object(map) => map,
            _ => Map::new(),
        };
        let mut options = known.clone();
        let mut option_spans: Vec<(String, Range<usize>)> = Vec::new();
        for option in inner.filter(|p| p.as_rule() == Rule::option) {
            let whole = range(&option);
            let mut parts = option.into_inner();
            let key = parts.next().expect("an option has a key");
            let value = parts.nth(1).expect("an option has a value after its sign");
            let name = key.as_str().replace('-', "_");
            if !known.contains_key(&name) {
                return Err(self.unknown_option(def, &key, &known));
            }
            if option_spans.iter().any(|(k, _)| *k == name) {
                let message = format!("{}: option {name} is given twice", def.name);
                return Err(self.error(range(&key), message, "given again here", None));
            }
            let value = self.value(def, &name, &known, value)?;
            options.insert(name.clone(), value);
            option_spans.push((name, whole));
        }
        for (key, given) in [("only", only), ("skip", skip)] {
            if let Some(Json::Array(list)) = options.get_mut(key) {
                list.extend(given.iter().map(|p| Json::from(p.as_str())));
            }
        }
        let pass = self.make(def, &options, &span)?;
        Ok(Step { pass, options, span, option_spans })
    }

    fn make(
        &self,
        def: &PassDef,
        options: &Map<String, Json>,
        span: &Range<usize>,
    ) -> Result<Box<dyn Pass>, PipelineError> {
        (def.make)(Json::Object(options.clone())).map_err(|why| {
            let message = format!("{}: the options do not fit: {why}", def.name);
            self.error(span.clone(), message, "in the options of this pass", None)
        })
    }

    /// Has a pass scale weights only, when it can and nothing else was asked of it.
    fn leave_rounding(&self, step: &mut Step) -> Result<(), PipelineError> {
        let asked = step.option_spans.iter().any(|(name, _)| name == "round");
        let (false, Some(round), Some(def)) =
            (asked, step.options.get_mut("round"), self.registry.pass(step.pass.name()))
        else {
            return Ok(());
        };
        *round = Json::Bool(false);
        step.pass = self.make(def, &step.options, &step.span)?;
        Ok(())
    }

    fn unknown_pass(&self, name: &Pair<Rule>) -> PipelineError {
        let known: Vec<&str> = self.registry.passes().iter().map(|d| d.name).collect();
        let message = format!("unknown pass {:?}", name.as_str());
        let list = format!("known passes: {} (--list-passes describes them)", known.join(", "));
        let preset = PRESETS.iter().find(|p| p.0 == name.as_str());
        let help = match (preset, nearest(name.as_str(), &known)) {
            (Some(p), _) => format!("{} is a preset: --preset {}", p.0, p.0),
            (None, Some(near)) => format!("did you mean {near:?}? {list}"),
            (None, None) => list,
        };
        self.error(range(name), message, "no pass of this name", Some(help))
    }

    fn unknown_option(&self, def: &PassDef, key: &Pair<Rule>, options: &Map<String, Json>) -> PipelineError {
        let known: Vec<&str> = options.keys().map(String::as_str).collect();
        let message = format!("{}: unknown option {:?}", def.name, key.as_str());
        let list = match options.is_empty() {
            true => format!("{} has no options", def.name),
            false => format!("options of {}: {}", def.name, defaults(options)),
        };
        let help = match nearest(&key.as_str().replace('-', "_"), &known) {
            Some(near) => format!("did you mean {near:?}? {list}"),
            None => list,
        };
        self.error(range(key), message, "no option of this name", Some(help))
    }

    /// The value of an option that the pass takes among its defaults. What is no list where a list is expected is one of
    /// one element.
    fn value(
        &self,
        def: &PassDef,
        name: &str,
        known: &Map<String, Json>,
        pair: Pair<Rule>,
    ) -> Result<Json, PipelineError> {
        let (span, text) = (range(&pair), pair.as_str().to_string());
        let value = match (&known[name], self.json(pair)?) {
            (Json::Array(_), value @ Json::Array(_)) => value,
            (Json::Array(_), value) => Json::Array(vec![value]),
            (_, value) => value,
        };
        let mut options = known.clone();
        options.insert(name.to_string(), value.clone());
        let Err(why) = (def.make)(Json::Object(options)) else { return Ok(value) };
        let expected = kind(&why);
        let message = format!("{}: option {name}: expected {expected}, found {text}", def.name);
        let help = format!("the default is {name}={}", literal(&known[name]));
        Err(self.error(span, message, format!("expected {expected}"), Some(help)))
    }

    fn json(&self, pair: Pair<Rule>) -> Result<Json, PipelineError> {
        let span = range(&pair);
        let pair = pair.into_inner().next().expect("a value is of some kind");
        let text = pair.as_str();
        let number = || serde_json::from_str(text).map_err(|_| ());
        let parsed = match pair.as_rule() {
            Rule::list => {
                return Ok(Json::Array(
                    pair.into_inner()
                        .filter(|v| v.as_rule() == Rule::value)
                        .map(|v| self.json(v))
                        .collect::<Result<_, _>>()?,
                ));
            }
            Rule::int | Rule::float => number(),
            Rule::string => serde_json::from_str::<String>(text).map(Json::from).map_err(|_| ()),
            Rule::boolean => Ok(Json::Bool(text == "true")),
            _ => Ok(Json::from(text)),
        };
        parsed.map_err(|()| self.error(span, format!("the value {text} cannot be read"), "here", None))
    }
}

fn range(pair: &Pair<Rule>) -> Range<usize> {
    let span = pair.as_span();
    // A rule that ends in optional parts may take the blanks after it along.
    span.start()..span.start() + span.as_str().trim_end().len()
}

fn expected(rules: &[Rule]) -> String {
    let name = |r: &Rule| match r {
        Rule::pass | Rule::name => "a pass",
        Rule::option | Rule::key => "an option",
        Rule::EOI => "the end",
        Rule::comma => "a comma",
        Rule::open => "{",
        Rule::close => "}",
        Rule::equals => "=",
        Rule::end => "]",
        _ => "a value",
    };
    let mut names: Vec<&str> = rules.iter().map(name).collect();
    names.sort();
    names.dedup();
    format!("expected {}", names.join(" or "))
}

/// A value as the grammar writes it.
pub fn literal(v: &Json) -> String {
    match v {
        Json::Array(items) => format!("[{}]", items.iter().map(literal).collect::<Vec<_>>().join(", ")),
        Json::String(s) if is_plain(s) => s.clone(),
        v => v.to_string(),
    }
}

fn is_plain(s: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || "_-./:*+%".contains(c);
    !s.is_empty() && s.chars().all(word) && s.parse::<f64>().is_err() && s != "true" && s != "false"
}

/// What was expected, in a user's words, where deserializing a value failed with `why`.
fn kind(why: &str) -> String {
    let expected = why.split_once("expected ").map_or(why, |(_, expected)| expected);
    let expected = expected.split_once(", found ").map_or(expected, |(expected, _)| expected);
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" if why.contains("`-") => "a whole number from 0".into(),
        "u8" | "u16" | "u32" | "u64" | "usize" | "i32" | "i64" => "a whole number".into(),
        "f32" | "f64" => "a number".into(),
        "a boolean" => "true or false".into(),
        "a string" | "string or map" => "a word".into(),
        other => other.replace('`', ""),
    }
}

/// Options with their values: `bits=4, group=32`.
pub fn defaults(options: &Map<String, Json>) -> String {
    options.iter().map(|(k, v)| format!("{k}={}", literal(v))).collect::<Vec<_>>().join(", ")
}

/// The known name that is closest to `name`, when one is close.
pub fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let scored = known.iter().map(|k| (strsim::damerau_levenshtein(&name.to_lowercase(), k), *k));
    let (distance, best) = scored.min_by_key(|(d, _)| *d)?;
    let close = distance <= 1 + name.len() / 3;
    let prefix = |k: &&&str| name.len() >= 2 && k.starts_with(name);
    if close { Some(best) } else { known.iter().find(prefix).copied() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dialects::ir::Module;
    use passes::{Changed, Exactness, PassCx};
    use serde::{Deserialize, Serialize};

    #[derive(Debug, Serialize, Deserialize)]
    #[serde(default)]
    struct Round {
        bits: u32,
        group: i64,
        scale: f64,
        clip: bool,
        any: Json,
        #[serde(flatten)]
        filter: Filter,
    }

    impl Default for Round {
        fn default() -> Round {
            Round { bits: 4, group: 32, scale: 1.0, clip: true, any: Json::Null, filter: Filter::default() }
        }
    }

    #[derive(Debug, Default, Serialize, Deserialize)]
    struct Tidy {}

    macro_rules! pass {
        ($t:ty, $name:literal) => {
            impl Pass for $t {
                fn name(&self) -> &'static str {
                    $name
                }
                fn summary(&self) -> &'static str {
                    ""
                }
                fn exactness(&self) -> Exactness {
                    Exactness::Exact
                }
                fn run(&self, _: &mut Module, _: &mut PassCx) -> Result<Changed, PassError> {
                    Ok(Changed::No)
                }
            }
        };
    }
    pass!(Round, "round");
    pass!(Tidy, "tidy-up");

    fn parse(text: &str) -> Result<Pipeline, PipelineError> {
        let registry = Registry { passes: Vec::new(), ops: Default::default() };
        Pipeline::parse(text, &registry.with::<Round>().with::<Tidy>(), &[], &[])
    }

    /// The message, and the part of the text that it is about.
    fn refused(text: &str) -> (String, String, Option<String>) {
        let e = parse(text).map(|p| p.normalized()).unwrap_err();
        let at = e.span.offset()..e.span.offset() + e.span.len();
        (e.message, text[at].to_string(), e.help)
    }

    #[test]
    fn options_reach_the_pass() {
        let p =
            parse(" tidy-up , round{ group=-1, scale = 2, clip=false, skip=[*head*, \"a b\"], only=x/y.z }")
                .unwrap();
        let want =
            "tidy-up,round{bits=4, group=-1, scale=2, clip=false, only=[x/y.z], skip=[*head*, \"a b\"]}";
        assert_eq!(p.normalized(), want);
        assert_eq!(parse(want).unwrap().normalized(), want);
        let f = p.steps[1].filter().unwrap();
        assert_eq!(
            (f.only, f.skip),
            (vec!["x/y.z".to_string()], vec!["*head*".to_string(), "a b".to_string()])
        );
        assert!(p.steps[0].filter().is_none());
    }

    #[test]
    fn floats_and_words() {
        let of = |v: &str| parse(&format!("round{{any=[{v}]}}")).unwrap().steps[0].options["any"].clone();
        assert_eq!(
            of("1, -2.5, 1e3, 1x, true, truely, 4bit-g32"),
            serde_json::json!([1, -2.5, 1e3, "1x", true, "truely", "4bit-g32"])
        );
    }

    #[test]
    fn mistakes_are_underlined() {
        let (message, at, help) = refused("tidy-up,runod{bits=3}");
        assert_eq!((message.as_str(), at.as_str()), ("unknown pass \"runod\"", "runod"));
        assert!(help.unwrap().contains("did you mean \"round\"?"));
        let (message, at, help) = refused("round{bits=3, gruop=64}");
        assert_eq!((message.as_str(), at.as_str()), ("round: unknown option \"gruop\"", "gruop"));
        let help = help.unwrap();
        assert!(help.contains("did you mean \"group\"?") && help.contains("bits=4, group=32"), "{help}");
        let (message, at, _) = refused("round{bits=many}");
        assert_eq!(
            (message.as_str(), at.as_str()),
            ("round: option bits: expected a whole number, found many", "many")
        );
        assert_eq!(refused("round{clip=1}").1, "1");
        assert_eq!(refused("round{bits=2.5}").1, "2.5");
        assert_eq!(refused("round{bits=1, bits=2}").0, "round: option bits is given twice");
        let (message, at, _) = refused("tidy-up, round{bits=-4} ,tidy-up");
        assert_eq!(message, "round: option bits: expected a whole number from 0, found -4");
        assert_eq!(at, "-4");
        assert!(refused("zzzzzzzz").2.unwrap().starts_with("known passes"));
    }

    #[test]
    fn text_that_is_no_pipeline() {
        for (text, at) in
            [("round{bits=4", "4"), ("round,,round", ","), ("round{bits}", "}"), ("round}", "}"), ("", "")]
        {
            let (message, found, _) = refused(text);
            assert!(message.starts_with("the pipeline cannot be read"), "{message}");
            assert_eq!(found, at, "{text}");
        }
    }

    #[test]
    fn patterns_reach_every_pass_that_takes_them() {
        let registry =
            Registry { passes: Vec::new(), ops: Default::default() }.with::<Round>().with::<Tidy>();
        let skip = ["*head*".to_string()];
        let p = Pipeline::parse("tidy-up,round{skip=a},round", &registry, &[], &skip).unwrap();
        assert_eq!(p.steps[1].filter().unwrap().skip, ["a", "*head*"]);
        assert_eq!(p.steps[2].filter().unwrap().skip, ["*head*"]);
        let e = Pipeline::parse("tidy-up", &registry, &[], &skip).map(|_| ()).unwrap_err();
        assert!(e.message.contains("no pass of the pipeline takes it"));
    }

    #[test]
    fn an_option_that_a_pass_refuses_is_underlined() {
        let text = "tidy-up,round{bits=3, group=7}";
        let p = parse(text).unwrap();
        let e = PassError::Option { pass: "round", option: "group", why: "expected 16..256, found 7".into() };
        let e = p.blame(1, &e).unwrap();
        assert_eq!(&text[e.span.offset()..e.span.offset() + e.span.len()], "group=7");
        let e = PassError::Option { pass: "round", option: "clip", why: "x".into() };
        assert_eq!(p.blame(1, &e).unwrap().label, "clip=true by default");
    }
}
