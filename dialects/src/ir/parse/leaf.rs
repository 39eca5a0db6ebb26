//! The parts of the text form without structure: names, strings, numbers, types, metadata.

use super::super::literal::{parse_float, unquote};
use super::super::{Dim, Elem, Meta, OpName, Symbol, TensorType, Type};
use super::ParseError;
use super::grammar::Rule;
use pest::iterators::Pair;
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) type Node<'i> = Pair<'i, Rule>;
pub(super) type Result<T, E = ParseError> = std::result::Result<T, E>;

pub(super) fn span(p: &Node) -> Range<usize> {
    p.as_span().start()..p.as_span().end()
}

pub(super) fn invalid<T>(p: &Node, message: impl Into<String>) -> Result<T> {
    Err(ParseError::Invalid { span: span(p), message: message.into() })
}

/// The first child of a rule that has one.
pub(super) fn inner(p: Node) -> Node {
    p.into_inner().next().expect("the grammar gives the rule a child")
}

pub(super) fn bytes_of(p: &Node) -> Result<Vec<u8>> {
    unquote(p.as_str()).map_err(|at| {
        let at = p.as_span().start() + at;
        ParseError::Invalid { span: at..at + 1, message: "this escape is none that strings have".into() }
    })
}

pub(super) fn string(p: &Node) -> Result<Symbol> {
    match String::from_utf8(bytes_of(p)?) {
        Ok(s) => Ok(s.into()),
        Err(_) => invalid(p, "expected UTF-8 text, found other bytes"),
    }
}

/// The text of `name`: a word or a string.
pub(super) fn name(p: Node) -> Result<Symbol> {
    let p = inner(p);
    match p.as_rule() {
        Rule::string => string(&p),
        _ => Ok(p.as_str().into()),
    }
}

pub(super) fn number<T: std::str::FromStr>(p: &Node, what: &str) -> Result<T> {
    p.as_str().parse().or_else(|_| invalid(p, format!("expected {what}, found `{}`", p.as_str())))
}

pub(super) fn op_name(p: Node) -> Result<OpName> {
    let p = inner(p);
    if p.as_rule() == Rule::op_parts {
        let parts = p.into_inner().map(|s| string(&s)).collect::<Result<Vec<_>>>()?;
        return Ok(OpName::new(&parts[0], &parts[1]));
    }
    match OpName::parse(p.as_str()) {
        Some(name) => Ok(name),
        None => invalid(
            &p,
            format!("expected an op name with its dialect, such as onnx.{0}, found `{0}`", p.as_str()),
        ),
    }
}

pub(super) fn dict(p: Node) -> Result<Meta> {
    let mut meta = Meta::default();
    for field in p.into_inner() {
        let mut parts = field.clone().into_inner();
        let key = name(parts.next().expect("a field has a name"))?;
        let value = string(&parts.next().expect("a field has a value"))?;
        if meta.get(&key).is_some() {
            return invalid(&field, format!("the field {key:?} is given twice"));
        }
        meta.0.push((key, value));
    }
    Ok(meta)
}

pub(super) fn opsets(p: Node) -> Result<BTreeMap<Symbol, i64>> {
    let mut out = BTreeMap::new();
    for opset in p.into_inner() {
        let mut parts = opset.into_inner();
        let dialect = name(parts.next().expect("an opset has a name"))?;
        let version = number(&parts.next().expect("an opset has a version"), "an opset version")?;
        out.insert(dialect, version);
    }
    Ok(out)
}

pub(super) fn elem(p: &Node) -> Result<Elem> {
    Elem::from_name(p.as_str()).map_or_else(
        || {
            let names: Vec<&str> = Elem::all().map(Elem::name).collect();
            invalid(p, format!("expected an element type ({}), found `{}`", names.join(", "), p.as_str()))
        },
        Ok,
    )
}

pub(super) fn ty(p: Node) -> Result<Type> {
    let p = inner(p);
    let rule = p.as_rule();
    let mut parts = p.into_inner();
    let mut next = || parts.next().expect("the grammar gives the type its parts");
    Ok(match rule {
        Rule::sequence => Type::Sequence(Box::new(ty(next())?)),
        Rule::optional => Type::Optional(Box::new(ty(next())?)),
        Rule::map => Type::Map(elem(&next())?, Box::new(ty(next())?)),
        Rule::shaped => {
            let sparse = next().as_rule() == Rule::sparse_kind;
            let dims = next();
            let dims = (dims.as_rule() == Rule::dims).then(|| dims.into_inner().map(dim).collect());
            let t = TensorType { dims: dims.transpose()?, elem: elem(&next())? };
            if sparse { Type::SparseTensor(t) } else { Type::Tensor(t) }
        }
        _ => Type::Unknown,
    })
}

pub(super) fn dim(p: Node) -> Result<Dim> {
    let p = inner(p);
    Ok(match p.as_rule() {
        Rule::size => Dim::Known(number(&p, "a dim of at most 63 bits")?),
        Rule::name => Dim::Sym(name(p)?),
        Rule::sum => sum(p)?,
        _ => Dim::Unknown,
    })
}

fn sum(p: Node) -> Result<Dim> {
    let whole = p.clone();
    let (mut sum, mut minus) = (Dim::Known(0), false);
    for part in p.into_inner() {
        if part.as_rule() == Rule::sign {
            minus = part.as_str() == "-";
            continue;
        }
        let product = part.into_inner().try_fold(Dim::Known(1), |product, factor| {
            let factor = inner(factor);
            Ok(product.mul(&match factor.as_rule() {
                Rule::digits => Dim::Known(number(&factor, "a number of at most 63 bits")?),
                _ => Dim::Sym(name(factor)?),
            }))
        })?;
        sum = if minus { sum.sub(&product) } else { sum.add(&product) };
    }
    match sum {
        Dim::Unknown => invalid(&whole, "expected a sum of few products, of numbers of at most 63 bits"),
        sum => Ok(sum),
    }
}

pub(super) fn is_float(text: &str) -> bool {
    text.contains(['.', 'x', 'n', 'e'])
}

pub(super) fn float(p: &Node) -> Result<f32> {
    parse_float(p.as_str())
        .map_or_else(|| invalid(p, format!("expected a float of 32 bits, found `{}`", p.as_str())), Ok)
}
