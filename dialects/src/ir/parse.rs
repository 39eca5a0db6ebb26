//! Reads the textual form that [`print`](super::print) writes.
//!
//! Hostile text is refused, never followed: brackets nest at most [`MAX_NESTING`] deep, and what is allocated is
//! proportional to the text. A use may stand before its definition, and a name that nothing defines becomes a
//! value without definition: both are the verifier's to report, with everything else.

mod leaf;
mod tensor;

use super::print::default_loc;
use super::{
    Attr, Attrs, ConstId, Function, Meta, Module, Op, OpBuilder, OpName, Region, Symbol, Type, Value,
    ValueData, ValueDef,
};
use grammar::Rule;
use leaf::{
    Node, Result, bytes_of, dict, float, inner, invalid, is_float, name, number, op_name, opsets, span,
    string, ty,
};
use pest::Parser;
use pest::error::{ErrorVariant, InputLocation};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use thiserror::Error;

#[allow(missing_docs)]
mod grammar {
    #[derive(pest_derive::Parser)]
    #[grammar = "ir/qir.pest"]
    pub struct Grammar;
}

/// How deep brackets may nest.
pub const MAX_NESTING: usize = 100;

/// The most elements that `random(..)` and `splat(..)` make.
pub const MAX_GENERATED: u64 = 1 << 20;

/// Why a text is no module. The span is in bytes.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ParseError {
    /// The text does not follow the grammar.
    #[error("expected {expected}, found {found}")]
    Syntax {
        /// Where.
        span: Range<usize>,
        /// What could stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// Brackets nest too deep.
    #[error("expected brackets at most {MAX_NESTING} deep, found more")]
    Nesting {
        /// The first bracket that is too much.
        span: Range<usize>,
    },
    /// The text follows the grammar but means nothing.
    #[error("{message}")]
    Invalid {
        /// Where.
        span: Range<usize>,
        /// What was expected and what was found.
        message: String,
    },
}

impl ParseError {
    /// Where in the text, in bytes.
    pub fn span(&self) -> Range<usize> {
        match self {
            ParseError::Syntax { span, .. }
            | ParseError::Nesting { span }
            | ParseError::Invalid { span, .. } => span.clone(),
        }
    }
}

/// A module with the places in the text that its ops come from.
#[derive(Clone, Debug)]
pub struct Parsed {
    /// The module.
    pub module: Module,
    /// Where each op stands.
    pub spans: HashMap<Op, Range<usize>>,
}

/// Reads a module. Its large constants have no bytes until [`super::bind::bind`] gives them some.
pub fn parse(text: &str) -> Result<Parsed, ParseError> {
    check_nesting(text)?;
    let mut file = grammar::Grammar::parse(Rule::file, text).map_err(|e| syntax(text, e))?;
    let file = file.next().expect("a parse gives the rule asked for");
    let mut builder = Builder::default();
    for part in file.into_inner() {
        match part.as_rule() {
            Rule::header => builder.header(part)?,
            Rule::graph => builder.graph(part, builder.m.top)?,
            Rule::function => builder.function(part)?,
            _ => {}
        }
    }
    builder.finish()
}

fn check_nesting(text: &str) -> Result<(), ParseError> {
    let mut depth = 0usize;
    let mut chars = text.bytes().enumerate();
    while let Some((i, c)) = chars.next() {
        match c {
            b';' => drop(chars.find(|(_, c)| *c == b'\n')),
            b'"' => {
                while let Some((_, c)) = chars.next() {
                    match c {
                        b'\\' => drop(chars.next()),
                        b'"' => break,
                        _ => {}
                    }
                }
            }
            b'(' | b'{' | b'[' | b'<' => depth += 1,
            b')' | b'}' | b']' | b'>' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(ParseError::Nesting { span: i..i + 1 });
        }
    }
    Ok(())
}

fn syntax(text: &str, e: pest::error::Error<Rule>) -> ParseError {
    let mut at = match e.location {
        InputLocation::Pos(at) | InputLocation::Span((at, _)) => at,
    };
    let mut expected: Vec<String> = match &e.variant {
        ErrorVariant::ParsingError { positives, .. } => {
            positives.iter().filter_map(|r| describe(*r)).map(str::to_owned).collect()
        }
        ErrorVariant::CustomError { message } => vec![message.clone()],
    };
    // By itself pest knows rules only. Asked for details, which is slow, it also knows the punctuation it got to.
    pest::set_error_detail(true);
    let detailed = grammar::Grammar::parse(Rule::file, text).err();
    pest::set_error_detail(false);
    if let Some(attempts) = detailed.and_then(|e| e.parse_attempts()).filter(|a| a.max_position > at) {
        at = attempts.max_position;
        let tokens = attempts.expected_tokens().into_iter().map(|t| t.to_string());
        // Not white space, comments, and classes of characters.
        let shown =
            tokens.filter(|t| !t.trim().is_empty() && t != ";" && t != "BUILTIN_RULE" && !t.contains(".."));
        expected = shown.map(|t| format!("`{t}`")).collect();
    }
    expected.sort_unstable();
    expected.dedup();
    let expected = match expected.split_last() {
        None => "something else".into(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    };
    let rest = &text[at..];
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let len = match rest.chars().next() {
        Some(c) if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
        Some(c) => c.len_utf8(),
        None => 0,
    };
    let found = if rest.is_empty() { "the end of the text".into() } else { format!("`{}`", &rest[..len]) };
    ParseError::Syntax { span: at..at + len, expected, found }
}

/// What an error message calls a rule; `None` for what would only add noise.
fn describe(rule: Rule) -> Option<&'static str> {
    Some(match rule {
        Rule::file | Rule::header => "`module`",
        Rule::graph => "`graph`",
        Rule::function => "`function`",
        Rule::opsets => "`opsets {..}`",
        Rule::value | Rule::arg => "a value (`%name`)",
        Rule::slot | Rule::results => "a value (`%name`) or `_`",
        Rule::kw_const | Rule::constant | Rule::const_arg => "`const`",
        Rule::kw_return | Rule::ret => "`return`",
        Rule::op | Rule::op_name | Rule::op_parts => "an op (`dialect.Op(..)`)",
        Rule::attrs | Rule::dict => "`{`",
        Rule::attr_value => "an attribute value",
        Rule::ty | Rule::shaped | Rule::sequence | Rule::optional | Rule::map | Rule::type_slot => "a type",
        Rule::types => "`: type`",
        Rule::tensor => "a tensor (`tensor<2xf32> [1.0, 2.0]`)",
        Rule::hash | Rule::hex => "`#blake3:..`",
        Rule::elements | Rule::element => "tensor elements",
        Rule::elem => "an element type",
        Rule::dim | Rule::dims | Rule::size => "a dim",
        Rule::name | Rule::word => "a name",
        Rule::string => "a string",
        Rule::number | Rule::index | Rule::decimal => "a number",
        Rule::EOI => "the end of the text",
        Rule::symbol => "`@name`",
        Rule::loc => "`loc(..)`",
        _ => return None,
    })
}

/// A value as the text names it: its name (`None` for a number) and which of the values with it.
type Key<'i> = (Option<Symbol>, &'i str);

fn key(p: Node<'_>) -> Result<Key<'_>> {
    let mut parts = p.into_inner();
    let first = parts.next().expect("a value has a name or a number");
    match first.as_rule() {
        Rule::index => Ok((None, first.as_str())),
        _ => Ok((Some(name(first)?), parts.next().map_or("0", |p| p.as_str()))),
    }
}

/// Where a name stands that is not visible there.
enum Place {
    Operand(Op, usize),
    Result(Region, usize),
    Arg(Region, usize),
}

#[derive(Default)]
struct Builder<'i> {
    m: Module,
    spans: HashMap<Op, Range<usize>>,
    /// Definitions of the present region and those around it, innermost last.
    scopes: Vec<HashMap<Key<'i>, Value>>,
    /// The first definition of each name anywhere.
    all: HashMap<Key<'i>, Value>,
    /// Uses of names that are not visible where they stand.
    pending: Vec<(Place, Key<'i>)>,
}

/// Stands in for a use until every definition is known.
fn pending() -> Value {
    Value::from_u32(u32::MAX - 1)
}

impl<'i> Builder<'i> {
    fn header(&mut self, p: Node<'i>) -> Result<()> {
        for part in p.into_inner() {
            match part.as_rule() {
                Rule::version => self.m.ir_version = number(&inner(part), "an ir_version")?,
                Rule::opsets => self.m.opsets = opsets(part)?,
                _ => self.m.meta = dict(inner(part))?,
            }
        }
        Ok(())
    }

    fn function(&mut self, p: Node<'i>) -> Result<()> {
        let body = self.m.add_region(None);
        let mut f = Function {
            name: OpName::new("", ""),
            overload: "".into(),
            attributes: Vec::new(),
            defaults: Attrs::default(),
            opsets: BTreeMap::new(),
            body,
            meta: Meta::default(),
        };
        for part in p.into_inner() {
            match part.as_rule() {
                Rule::op_name => f.name = op_name(part)?,
                Rule::overload => f.overload = string(&inner(part))?,
                Rule::opsets => f.opsets = opsets(part)?,
                Rule::meta => f.meta = dict(inner(part))?,
                Rule::attributes => {
                    for attribute in part.into_inner() {
                        let mut parts = attribute.into_inner();
                        let name = name(parts.next().expect("an attribute has a name"))?;
                        match parts.next() {
                            None => f.attributes.push(name),
                            Some(value) => f.defaults.set(name, self.attr(value, None)?),
                        }
                    }
                }
                _ => self.graph(part, body)?,
            }
        }
        self.m.functions.push(f);
        Ok(())
    }

    /// Reads a graph into an empty region: definitions first, since a use may stand before its definition.
    fn graph(&mut self, p: Node<'i>, region: Region) -> Result<()> {
        let mut scope = HashMap::new();
        let mut ops = Vec::new();
        let mut const_args = Vec::new();
        let (mut ret, mut notes) = (None, None);
        for part in p.into_inner() {
            match part.as_rule() {
                Rule::symbol => self.m.regions[region].name = name(inner(part))?,
                Rule::arg => {
                    let mut parts = part.into_inner();
                    let first = parts.next().expect("an input has a value");
                    if first.as_rule() == Rule::const_arg {
                        let value = first.into_inner().last().expect("a const input names a value");
                        const_args.push((self.m.regions[region].args.len(), key(value)?));
                        self.m.regions[region].args.push(pending());
                        continue;
                    }
                    let key = key(first)?;
                    let ty = parts.next().map_or(Ok(Type::Unknown), ty)?;
                    let v = self.m.add_arg(region, key.0.clone().unwrap_or_default(), ty);
                    self.enter(&mut scope, key, v);
                }
                Rule::constant => {
                    let mut parts = part.into_inner().skip(1);
                    let key = key(parts.next().expect("a constant has a value"))?;
                    let data = tensor::read(parts.next().expect("a constant has a tensor"))?;
                    let v = self.m.add_const(region, key.0.clone().unwrap_or_default(), data);
                    self.enter(&mut scope, key, v);
                }
                Rule::op => ops.push(self.op(part, region, &mut scope)?),
                Rule::ret => ret = Some(part),
                _ => notes = Some(part),
            }
        }
        self.scopes.push(scope);
        for (i, key) in const_args {
            let v = self.resolve(key, || Place::Arg(region, i));
            self.m.regions[region].args[i] = v;
        }
        for (op, operands, attrs) in ops {
            for (i, slot) in operands.into_iter().enumerate() {
                let slot = inner(slot);
                let v = match slot.as_rule() {
                    Rule::value => Some(self.resolve(key(slot)?, || Place::Operand(op, i))),
                    _ => None,
                };
                self.m.ops[op].operands.push(v);
            }
            if let Some(attrs) = attrs {
                let attrs = self.attrs(attrs, op)?;
                self.m.ops[op].attrs = attrs;
            }
        }
        for p in ret.into_iter().flat_map(|p| p.into_inner().skip(1)) {
            let i = self.m.regions[region].results.len();
            let v = self.resolve(key(p)?, || Place::Result(region, i));
            self.m.regions[region].results.push(v);
        }
        if let Some(notes) = notes {
            self.notes(notes, region)?;
        }
        self.scopes.pop();
        Ok(())
    }

    fn enter(&mut self, scope: &mut HashMap<Key<'i>, Value>, key: Key<'i>, v: Value) {
        // A name defined twice is the verifier's to report; its uses mean the first.
        self.all.entry(key.clone()).or_insert(v);
        scope.entry(key).or_insert(v);
    }

    fn resolve(&mut self, key: Key<'i>, place: impl FnOnce() -> Place) -> Value {
        if let Some(v) = self.scopes.iter().rev().find_map(|s| s.get(&key)) {
            return *v;
        }
        self.pending.push((place(), key));
        pending()
    }

    /// Adds an op with its results; operands and attributes are left for when all definitions are known.
    #[allow(clippy::type_complexity)]
    fn op(
        &mut self,
        p: Node<'i>,
        region: Region,
        scope: &mut HashMap<Key<'i>, Value>,
    ) -> Result<(Op, Vec<Node<'i>>, Option<Node<'i>>)> {
        let whole = span(&p);
        let (mut operands, mut attrs, mut results, mut types) = (Vec::new(), None, Vec::new(), None);
        let (mut full, mut node, mut loc) = (None, Symbol::default(), None);
        for part in p.into_inner() {
            match part.as_rule() {
                Rule::results => {
                    for slot in part.into_inner().map(inner) {
                        let value = slot.as_rule() == Rule::value;
                        results.push(value.then(|| key(slot)).transpose()?);
                    }
                }
                Rule::op_name => full = Some(op_name(part)?),
                Rule::slot => operands.push(part),
                Rule::attrs => attrs = Some(part),
                Rule::types => types = Some(part),
                Rule::symbol => node = name(inner(part))?,
                _ => loc = Some(name(inner(part))?),
            }
        }
        let types = match types {
            None => vec![Type::Unknown; results.len()],
            Some(p) => {
                let list = p.clone().into_inner().map(|slot| {
                    let slot = inner(slot);
                    if slot.as_rule() == Rule::ty { ty(slot) } else { Ok(Type::Unknown) }
                });
                let list = list.collect::<Result<Vec<_>>>()?;
                if list.len() != results.len() {
                    let message = format!("expected {} result types, found {}", results.len(), list.len());
                    return invalid(&p, message);
                }
                list
            }
        };
        let first = results.iter().flatten().next().and_then(|k| k.0.clone()).unwrap_or_default();
        let loc = loc.unwrap_or_else(|| default_loc(&node, &first).into());
        let mut b = OpBuilder::named(full.expect("an op has a name"), &loc).node(node);
        for (result, ty) in results.iter().zip(types) {
            b = match result {
                Some(key) => b.named_result(key.0.clone().unwrap_or_default(), ty),
                None => b.no_result(),
            };
        }
        let op = self.m.push(region, b);
        self.spans.insert(op, whole);
        for (i, key) in results.into_iter().enumerate() {
            if let (Some(key), Some(v)) = (key, self.m.ops[op].results[i]) {
                self.enter(scope, key, v);
            }
        }
        Ok((op, operands, attrs))
    }

    fn attrs(&mut self, p: Node<'i>, op: Op) -> Result<Attrs> {
        let mut attrs = Attrs::default();
        for attr in p.into_inner() {
            let mut parts = attr.clone().into_inner();
            let name = name(parts.next().expect("an attribute has a name"))?;
            let value = self.attr(parts.next().expect("an attribute has a value"), Some(op))?;
            if attrs.get(&name).is_some() {
                return invalid(&attr, format!("the attribute {name:?} is given twice"));
            }
            attrs.set(name, value);
        }
        Ok(attrs)
    }

    fn attr(&mut self, p: Node<'i>, op: Option<Op>) -> Result<Attr> {
        let p = inner(p);
        Ok(match p.as_rule() {
            Rule::number if is_float(p.as_str()) => Attr::Float(float(&p)?),
            Rule::number => Attr::Int(number(&p, "an integer of 64 bits")?),
            Rule::string => Attr::Str(bytes_of(&p)?.into()),
            Rule::type_value => Attr::Type(ty(inner(p))?),
            Rule::tensor => Attr::Tensor(self.const_of(p)?),
            Rule::graph => Attr::Graph(self.nested(p, op)?),
            Rule::reference => {
                let mut parts = p.into_inner();
                let name = name(parts.next().expect("a reference has a name"))?;
                Attr::Ref { name, kind: number(&parts.next().expect("a reference has a kind"), "a kind")? }
            }
            _ => self.list(p, op)?,
        })
    }

    fn const_of(&mut self, p: Node<'i>) -> Result<ConstId> {
        let data = tensor::read(p)?;
        Ok(self.m.consts.push(data))
    }

    fn nested(&mut self, p: Node<'i>, op: Option<Op>) -> Result<Region> {
        let region = self.m.add_region(op);
        self.graph(p, region)?;
        Ok(region)
    }

    /// A list says its kind by its first item, or by name when it is empty; one float makes all numbers floats.
    fn list(&mut self, p: Node<'i>, op: Option<Op>) -> Result<Attr> {
        let mut items: Vec<Node<'i>> = Vec::new();
        let mut kind = None;
        for part in p.clone().into_inner() {
            match part.as_rule() {
                Rule::list_kind => kind = Some(part.as_str()),
                _ => items.push(inner(part)),
            }
        }
        let number = |i: &Node| i.as_rule() == Rule::number;
        let floats = items.iter().any(|i| number(i) && is_float(i.as_str()));
        let found = match items.first().map(|i| i.as_rule()) {
            None => kind.unwrap_or("ints"),
            Some(Rule::number) if floats || kind == Some("floats") => "floats",
            Some(Rule::number) => "ints",
            Some(Rule::string) => "strs",
            Some(Rule::tensor) => "tensors",
            Some(Rule::graph) => "graphs",
            Some(Rule::type_value) => "types",
            Some(_) => return invalid(&p, "expected a list of numbers, strings, tensors, graphs or types"),
        };
        if kind.is_some_and(|k| k != found) {
            return invalid(&p, format!("expected a list of {}, found {found}", kind.unwrap_or_default()));
        }
        let expect = |item: Node<'i>, rule: Rule| match item.as_rule() == rule {
            true => Ok(item),
            false => {
                invalid(&item, format!("expected a list of {found} all through, found `{}`", item.as_str()))
            }
        };
        let items = items.into_iter();
        Ok(match found {
            "ints" => Attr::Ints(
                items
                    .map(|i| self::number(&expect(i, Rule::number)?, "an integer of 64 bits"))
                    .collect::<Result<_>>()?,
            ),
            "floats" => Attr::Floats(items.map(|i| float(&expect(i, Rule::number)?)).collect::<Result<_>>()?),
            "strs" => Attr::Strs(
                items.map(|i| Ok(bytes_of(&expect(i, Rule::string)?)?.into())).collect::<Result<_>>()?,
            ),
            "tensors" => {
                Attr::Tensors(items.map(|i| self.const_of(expect(i, Rule::tensor)?)).collect::<Result<_>>()?)
            }
            "graphs" => {
                Attr::Graphs(items.map(|i| self.nested(expect(i, Rule::graph)?, op)).collect::<Result<_>>()?)
            }
            _ => Attr::Types(items.map(|i| ty(inner(expect(i, Rule::type_value)?))).collect::<Result<_>>()?),
        })
    }

    fn notes(&mut self, p: Node<'i>, region: Region) -> Result<()> {
        for note in p.into_inner() {
            let at = note.clone();
            let rule = note.as_rule();
            let mut parts = note.into_inner();
            let first = parts.next().expect("a note is about something");
            if rule == Rule::graph_note {
                self.m.regions[region].meta = dict(first)?;
                continue;
            }
            if rule == Rule::op_note {
                let op = match first.as_rule() {
                    Rule::value => self.own(first)?.and_then(|v| self.m.def_op(v)).map(|(op, _)| op),
                    _ => self.m.regions[region].ops.get(number::<usize>(&first, "an op's place")?).copied(),
                };
                let Some(op) = op else { return invalid(&at, "expected an op of this graph") };
                self.m.ops[op].meta = dict(parts.next().expect("an op's note has fields"))?;
                continue;
            }
            let Some(v) = self.own(first)? else {
                return invalid(&at, "expected a value that this graph defines");
            };
            for part in parts {
                match part.as_rule() {
                    Rule::note_type => self.m.values[v].ty = ty(inner(part))?,
                    Rule::declared => {
                        let declared = part.into_inner().next().map(ty).transpose()?;
                        let declared = declared.unwrap_or_else(|| self.m.values[v].ty.clone());
                        self.m.values[v].declared = Some(declared);
                    }
                    _ => self.m.values[v].meta = dict(part)?,
                }
            }
        }
        Ok(())
    }

    /// The value that the region being read defines by this name.
    fn own(&self, p: Node<'i>) -> Result<Option<Value>> {
        let key = key(p)?;
        Ok(self.scopes.last().and_then(|s| s.get(&key)).copied())
    }

    fn finish(mut self) -> Result<Parsed> {
        for (place, key) in std::mem::take(&mut self.pending) {
            let m = &mut self.m;
            let v = *self.all.entry(key).or_insert_with_key(|key| {
                m.values.push(ValueData {
                    name: key.0.clone().unwrap_or_default(),
                    ty: Type::Unknown,
                    declared: None,
                    sym: None,
                    def: ValueDef::Erased,
                    meta: Meta::default(),
                })
            });
            match place {
                Place::Operand(op, i) => self.m.ops[op].operands[i] = Some(v),
                Place::Result(region, i) => self.m.regions[region].results[i] = v,
                Place::Arg(region, i) => self.m.regions[region].args[i] = v,
            }
        }
        Ok(Parsed { module: self.m, spans: self.spans })
    }
}
