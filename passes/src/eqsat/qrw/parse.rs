//! Reads rules (`qrw.pest`). A mistake is reported with the part of the text that it is about.

use super::term::{Compare, Condition, Expr, Function, OpTerm, RuleError, Term, Test, TextRule, Var};
use crate::raise_opset::NEWEST;
use dialects::ir::OpName;
use dialects::ops::Ops;
use grammar::{Grammar, Rule};
use pest::Parser;
use pest::error::{ErrorVariant, InputLocation};
use pest::iterators::Pair;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

// The derive makes a public enum without documentation.
#[allow(missing_docs)]
mod grammar {
    #[derive(pest_derive::Parser)]
    #[grammar = "eqsat/qrw/qrw.pest"]
    pub struct Grammar;
}

/// How deep brackets may nest.
const MAX_NESTING: usize = 100;

/// The words that stand for what the model says: the version of ONNX it is written against.
const OPSET: &str = "opset";

type Result<T> = std::result::Result<T, RuleError>;

/// Reads all rules of a text. Their ops must be among `ops`.
pub fn parse(text: &str, ops: &Ops) -> Result<Vec<TextRule>> {
    nesting(text)?;
    let file = Grammar::parse(Rule::file, text).map_err(|e| syntax(text, &e))?;
    let mut names = HashSet::new();
    let mut rules = Vec::new();
    for pair in file.flat_map(Pair::into_inner).filter(|p| p.as_rule() == Rule::rewrite) {
        let rule = Reader::new(ops).rule(pair)?;
        if !names.insert(rule.name.clone()) {
            let message = format!("two rules have the name {:?}", rule.name);
            return Err(error(rule.span, message, "the second one", None));
        }
        rules.push(rule);
    }
    Ok(rules)
}

fn range(pair: &Pair<Rule>) -> Range<usize> {
    // What follows a rule's last optional part is no part of it.
    let start = pair.as_span().start();
    start..start + pair.as_str().trim_end().len()
}

fn error(span: Range<usize>, message: impl Into<String>, label: &str, help: Option<String>) -> RuleError {
    RuleError { message: message.into(), span, label: label.into(), help }
}

/// Refuses brackets that nest too deep to be followed.
fn nesting(text: &str) -> Result<()> {
    let (mut depth, mut angles) = (0usize, 0usize);
    for (i, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            // A comparison opens nothing, but where it ends is not known here: a new rule starts anew.
            '<' => angles += 1,
            '>' => angles = angles.saturating_sub(1),
            'r' if text[i..].starts_with("rewrite") => angles = 0,
            _ => {}
        }
        if depth.max(angles) > MAX_NESTING {
            let message = format!("expected brackets at most {MAX_NESTING} deep, found more");
            return Err(error(i..i + 1, message, "this one is too deep", None));
        }
    }
    Ok(())
}

fn syntax(text: &str, e: &pest::error::Error<Rule>) -> RuleError {
    let at = match e.location {
        InputLocation::Pos(at) | InputLocation::Span((at, _)) => at,
    };
    let (found, span) = match text[at..].chars().next() {
        Some(c) => (format!("unexpected {c:?}"), at..at + c.len_utf8()),
        // There is nothing to underline at the end; the last character has to do.
        None => {
            let last = text.char_indices().next_back().map_or(0, |(i, _)| i);
            ("the text ends too early".to_string(), last..at)
        }
    };
    let label = match &e.variant {
        ErrorVariant::ParsingError { positives, .. } => {
            let mut names: Vec<&str> = positives.iter().map(|r| describe(*r)).collect();
            names.sort_unstable();
            names.dedup();
            format!("expected {}", names.join(" or "))
        }
        ErrorVariant::CustomError { message } => message.clone(),
    };
    let help =
        r#"a rule is: rewrite "name" (onnx.Mul ?a (onnx.Reciprocal ?b)) => (onnx.Div ?a ?b) if float(?a)"#;
    error(span, format!("the rules cannot be read: {found}"), &label, Some(help.into()))
}

fn describe(rule: Rule) -> &'static str {
    match rule {
        Rule::kw_rewrite | Rule::rewrite => "`rewrite`",
        Rule::string => "a name in quotes",
        Rule::node | Rule::open | Rule::left => "`(`",
        Rule::close => "`)`",
        Rule::op => "an op such as onnx.Mul",
        Rule::arrow => "`=>`",
        Rule::conditions | Rule::kw_if => "`if`",
        Rule::infinities | Rule::kw_with | Rule::kw_infinities => "`with infinities`",
        Rule::term => "a value",
        Rule::variable => "a variable such as ?x",
        Rule::ints | Rule::list => "`[`",
        Rule::any => "alternatives in `<>`",
        Rule::naming | Rule::kw_let => "`let`",
        Rule::attrs => "attributes in `{}`",
        Rule::attr | Rule::name => "a name",
        Rule::result => "a result such as #1",
        Rule::number => "a number",
        Rule::absent => "`_`",
        Rule::compare => "a comparison",
        Rule::comma => "`,`",
        Rule::sum_sign | Rule::product_sign => "an operator",
        Rule::EOI => "the end",
        _ => "an expression",
    }
}

/// The text between quotes.
fn quoted(pair: &Pair<Rule>) -> String {
    pair.as_str().trim_matches('"').to_string()
}

struct Reader<'a> {
    ops: &'a Ops,
    vars: Vec<String>,
    /// Variables that are attributes.
    attrs: HashSet<Var>,
    /// Terms with a name.
    named: HashMap<Var, Term>,
    /// Whether everything that could bind a variable was read.
    right: bool,
    /// In how many alternatives this is: there a variable may be a value in one and an attribute in another.
    any: usize,
}

impl<'a> Reader<'a> {
    fn new(ops: &'a Ops) -> Self {
        let (vars, attrs, named) = (Vec::new(), HashSet::new(), HashMap::new());
        Reader { ops, vars, attrs, named, right: false, any: 0 }
    }

    fn rule(mut self, pair: Pair<Rule>) -> Result<TextRule> {
        let (span, text) = (range(&pair), pair.as_str().trim_end().to_string());
        let (mut name, mut left, mut right) = (String::new(), None, None);
        let (mut conditions, mut profiles, mut infinities) = (Vec::new(), Vec::new(), false);
        for part in pair.into_inner() {
            match part.as_rule() {
                Rule::string => {
                    name = quoted(&part);
                    if name.is_empty() {
                        return Err(error(range(&part), "a rule has no name", "expected a name", None));
                    }
                }
                Rule::naming => {
                    let mut inner = part.into_inner().filter(|p| p.as_rule() != Rule::kw_let);
                    let var = inner.next().expect("a name is a variable");
                    let term = self.term(inner.next().expect("a name has a term"))?;
                    if self.vars.iter().any(|v| *v == var.as_str()[1..]) {
                        let message = format!("{} has a meaning already", var.as_str());
                        return Err(error(range(&var), message, "named again here", None));
                    }
                    let var = self.variable(&var, false)?;
                    self.named.insert(var, term);
                }
                Rule::left => {
                    let at = range(&part);
                    let Some(ops) = tops(self.term(part)?) else {
                        let message = "the left side is an op, or one of several ops";
                        return Err(error(at, message, "not an op", None));
                    };
                    left = Some(ops);
                    self.right = true;
                }
                Rule::term => right = Some(self.term(part)?),
                Rule::conditions => {
                    for c in part.into_inner().filter(|p| p.as_rule() == Rule::condition) {
                        match profile(&c)? {
                            Some(p) => profiles.push(p),
                            None => conditions.push(self.condition(c)?),
                        }
                    }
                }
                Rule::infinities => infinities = true,
                _ => {}
            }
        }
        let left = left.expect("the grammar has a left side");
        let right = right.expect("the grammar has a right side");
        if right == Term::Absent {
            return Err(error(span, "the right side is no value", "expected a value", None));
        }
        if let Term::Op(op) = &right
            && left.contains(op)
        {
            return Err(error(span, "both sides are the same", "this says nothing", None));
        }
        Ok(TextRule { name, text, span, left, right, conditions, infinities, profiles, vars: self.vars })
    }

    fn term(&mut self, pair: Pair<Rule>) -> Result<Term> {
        let inner = pair.into_inner().next().expect("a term is one of its kinds");
        Ok(match inner.as_rule() {
            Rule::node => Term::Op(Box::new(self.node(inner)?)),
            Rule::variable => {
                let var = self.variable(&inner, false)?;
                match self.named.get(&var).filter(|_| !self.right) {
                    Some(term) => Term::Named(var, Box::new(term.clone())),
                    None => Term::Var(var),
                }
            }
            Rule::any if self.right => {
                let message = "the right side is one term, not one of several";
                return Err(error(range(&inner), message, "alternatives", None));
            }
            Rule::any => {
                self.any += 1;
                let terms = inner.into_inner().map(|t| self.term(t)).collect::<Result<_>>()?;
                self.any -= 1;
                Term::Any(terms)
            }
            Rule::number => Term::Number(number(&inner)?),
            Rule::ints => {
                let at = range(&inner);
                let items = inner.into_inner().map(|e| self.expr(e)).collect::<Result<Vec<_>>>()?;
                if !self.right && items.iter().any(|e| !matches!(e, Expr::Int(_))) {
                    let help = "match a variable, and compare its contents: ints(?c) == [0, rank(?x)]";
                    let message = "on the left, a list holds integers only";
                    return Err(error(at, message, "computed here", Some(help.into())));
                }
                Term::Ints(items)
            }
            _ => Term::Absent,
        })
    }

    fn node(&mut self, pair: Pair<Rule>) -> Result<OpTerm> {
        let span = range(&pair);
        let mut op =
            OpTerm { name: String::new(), operands: Vec::new(), attrs: Vec::new(), result: 0, outputs: None };
        for part in pair.into_inner() {
            match part.as_rule() {
                Rule::op => op.name = self.op_name(&part)?,
                Rule::term => op.operands.push(self.term(part)?),
                Rule::attrs => {
                    for attr in part.into_inner() {
                        let at = range(&attr);
                        let mut parts = attr.into_inner();
                        let name = parts.next().expect("an attribute has a name").as_str().to_string();
                        let value = parts.next().expect("an attribute has a value");
                        let value = self.attribute(value)?;
                        if op.attrs.iter().any(|(n, _)| *n == name) {
                            let message = format!("the attribute {name} is given twice");
                            return Err(error(at, message, "given again here", None));
                        }
                        op.attrs.push((name, value));
                    }
                }
                Rule::result => {
                    let at = range(&part);
                    let mut numbers = part.into_inner().map(|p| p.as_str().parse::<u32>());
                    let wrong = |message: &str| error(at.clone(), message, "this result", None);
                    let mut next = || numbers.next().map(|n| n.map_err(|_| wrong("the number is too large")));
                    op.result = next().transpose()?.unwrap_or(0);
                    op.outputs = next().transpose()?;
                    if op.outputs.is_some_and(|n| n <= op.result || n > 64) {
                        return Err(wrong("the op has no such result"));
                    }
                }
                _ => {}
            }
        }
        let name = OpName::parse(&op.name).expect("the grammar asks for a dialect");
        if let Some(def) = self.ops.get(&name)
            && !(def.operands.0..=def.operands.1).contains(&op.operands.len())
        {
            let found = op.operands.len();
            let (least, most) = def.operands;
            let most = if most == usize::MAX { "more".into() } else { most.to_string() };
            let message = format!("{name} has {found} operands, expected {least} to {most}");
            return Err(error(span, message, "this op", None));
        }
        Ok(op)
    }

    fn op_name(&self, pair: &Pair<Rule>) -> Result<String> {
        let name = OpName::parse(pair.as_str()).expect("the grammar asks for a dialect");
        if self.ops.get(&name).is_none() && self.ops.body(&name, NEWEST).is_none() {
            let near = self
                .ops
                .names()
                .into_iter()
                .map(|n| (strsim::damerau_levenshtein(n, pair.as_str()), n))
                .min()
                .filter(|(d, _)| *d <= 4);
            let help = near.map(|(_, n)| format!("did you mean {n}?"));
            let message = format!("unknown op {name}");
            return Err(error(range(pair), message, "no op of this name", help));
        }
        Ok(pair.as_str().to_string())
    }

    fn variable(&mut self, pair: &Pair<Rule>, attr: bool) -> Result<Var> {
        let name = &pair.as_str()[1..];
        let var = match self.vars.iter().position(|v| v == name) {
            Some(var) => var,
            None if self.right => {
                let message = format!("the left side has no ?{name}");
                return Err(error(range(pair), message, "nothing gives it a value", None));
            }
            None => {
                self.vars.push(name.to_string());
                if attr {
                    self.attrs.insert(self.vars.len() - 1);
                }
                self.vars.len() - 1
            }
        };
        if attr != self.attrs.contains(&var) && self.any == 0 {
            let (is, here) = if attr { ("a value", "an attribute") } else { ("an attribute", "a value") };
            let message = format!("?{name} is {is}, and stands for {here} here");
            return Err(error(range(pair), message, "used as another kind of thing", None));
        }
        Ok(var)
    }

    /// An attribute's value: on the left a variable, or something fixed.
    fn attribute(&mut self, pair: Pair<Rule>) -> Result<Expr> {
        let at = range(&pair);
        let bare = |e: &Expr| matches!(e, Expr::Int(_) | Expr::Float(_) | Expr::Str(_));
        let read = pair.as_str().trim();
        if !self.right && read.starts_with('?') && read[1..].chars().all(|c| c.is_alphanumeric() || c == '_')
        {
            let mut inner = pair;
            while inner.as_rule() != Rule::variable {
                inner = inner.into_inner().next().expect("an expression that is a variable holds one");
            }
            return Ok(Expr::Var(self.variable(&inner, true)?));
        }
        let value = self.expr(pair)?;
        let fixed = match &value {
            Expr::List(items) => items.iter().all(bare),
            e => bare(e),
        };
        if !self.right && !fixed {
            let message = "on the left, an attribute is a variable or a fixed value";
            return Err(error(at, message, "computed here", Some("compare it in a condition".into())));
        }
        Ok(value)
    }

    fn condition(&mut self, pair: Pair<Rule>) -> Result<Condition> {
        let at = range(&pair);
        let mut not = false;
        let mut sides = Vec::new();
        let mut compare = None;
        for part in pair.into_inner() {
            match part.as_rule() {
                Rule::not => not = true,
                Rule::compare => {
                    compare = Some(match part.as_str() {
                        "==" => Compare::Equal,
                        "!=" => Compare::NotEqual,
                        "<" => Compare::Less,
                        "<=" => Compare::LessEqual,
                        ">" => Compare::Greater,
                        _ => Compare::GreaterEqual,
                    });
                }
                _ => sides.push(self.expr(part)?),
            }
        }
        let second = sides.pop().expect("a condition has an expression");
        let test = match (sides.pop(), compare, second) {
            (Some(a), Some(compare), b) => Test::Compare(a, compare, b),
            (None, None, Expr::Call(f, args)) if f.is_predicate() => Test::Holds(f, args),
            _ => {
                let help = "a condition is a comparison such as rank(?x) == 3, or one of ".to_string()
                    + &list_functions(true);
                return Err(error(at, "this is no condition", "neither true nor false", Some(help)));
            }
        };
        Ok(Condition { not, test })
    }

    fn expr(&mut self, pair: Pair<Rule>) -> Result<Expr> {
        match pair.as_rule() {
            Rule::expr | Rule::product => {
                let mut inner = pair.into_inner();
                let mut value = self.expr(inner.next().expect("arithmetic has a first operand"))?;
                while let Some(sign) = inner.next() {
                    let sign = sign.as_str().chars().next().expect("a sign is a character");
                    let other = self.expr(inner.next().expect("a sign has an operand behind it"))?;
                    value = Expr::Arithmetic(sign, Box::new(value), Box::new(other));
                }
                Ok(value)
            }
            Rule::atom => self.expr(pair.into_inner().next().expect("an atom is one of its kinds")),
            Rule::number => match pair.as_str().parse::<i64>() {
                Ok(n) => Ok(Expr::Int(n)),
                Err(_) => Ok(Expr::Float(number(&pair)?)),
            },
            Rule::string => Ok(Expr::Str(quoted(&pair))),
            Rule::word => Ok(Expr::Str(pair.as_str().into())),
            Rule::variable => {
                let name = &pair.as_str()[1..];
                match self.vars.iter().position(|v| v == name) {
                    Some(var) => Ok(Expr::Var(var)),
                    None => Ok(Expr::Var(self.variable(&pair, false)?)),
                }
            }
            Rule::list => Ok(Expr::List(pair.into_inner().map(|e| self.expr(e)).collect::<Result<_>>()?)),
            _ => self.call(pair),
        }
    }

    fn call(&mut self, pair: Pair<Rule>) -> Result<Expr> {
        let at = range(&pair);
        let mut inner = pair.into_inner();
        let name = inner.next().expect("a call has a name");
        let Some((arity, f)) = Function::find(name.as_str()) else {
            let message = format!("unknown function {:?}", name.as_str());
            let help = format!("functions: {}; {}", list_functions(false), list_functions(true));
            return Err(error(range(&name), message, "no function of this name", Some(help)));
        };
        let args: Vec<Expr> = inner.map(|e| self.expr(e)).collect::<Result<_>>()?;
        if args.len() != arity {
            let found = args.len();
            let message = format!("{} takes {arity} arguments, found {found}", name.as_str());
            return Err(error(at, message, "this call", None));
        }
        Ok(Expr::Call(f, args))
    }
}

/// The profile that a condition names, if it is `profile(NAME)`.
fn profile(pair: &Pair<Rule>) -> Result<Option<String>> {
    let text = pair.as_str().trim();
    let Some(name) = text.strip_prefix("profile(").and_then(|t| t.strip_suffix(')')) else {
        return Ok(None);
    };
    let name = name.trim().trim_matches('"');
    if name.is_empty() {
        return Err(error(range(pair), "profile() names no profile", "expected a name", None));
    }
    Ok(Some(name.to_string()))
}

/// The ops that a left side may be.
fn tops(t: Term) -> Option<Vec<OpTerm>> {
    match t {
        Term::Op(op) => Some(vec![*op]),
        Term::Any(terms) => {
            let all = terms.into_iter().map(tops).collect::<Option<Vec<_>>>()?;
            Some(all.into_iter().flatten().collect())
        }
        _ => None,
    }
}

fn list_functions(predicates: bool) -> String {
    let names = Function::ALL.iter().filter(|f| f.3.is_predicate() == predicates).map(|f| f.0);
    names.collect::<Vec<_>>().join(", ")
}

fn number(pair: &Pair<Rule>) -> Result<f64> {
    let n = pair.as_str().parse::<f64>().ok().filter(|n| n.is_finite() || pair.as_str() == "-inf");
    n.ok_or_else(|| error(range(pair), "the number is too large", "this number", None))
}

/// Whether a word is the version of ONNX that the model is written against.
pub fn is_opset(word: &str) -> bool {
    word == OPSET
}
