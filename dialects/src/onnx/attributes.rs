//! What the specifications say of the attributes of ops: of which kind they are, which must be given, and defaults.
//! `scripts/onnx_specs.py` writes the table.

use crate::ir::{Attr, Attrs, OpName};
use crate::ops::OpError;
use std::collections::HashMap;
use std::sync::OnceLock;

struct Attribute {
    name: &'static str,
    kind: &'static str,
    required: bool,
    /// The default, as text.
    default: Option<&'static str>,
}

/// For each op, since which version its attributes are these, newest first.
type Table = HashMap<&'static str, Vec<(i64, Vec<Attribute>)>>;

fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table: HashMap<_, Vec<_>> = HashMap::new();
        for line in include_str!("attributes.txt").lines().filter(|l| !l.starts_with('#')) {
            let mut words = line.split(' ');
            let (Some(op), Some(Ok(since))) = (words.next(), words.next().map(str::parse::<i64>)) else {
                continue;
            };
            let attribute = |word: &'static str| {
                let (name, kind) = word.split_once(':')?;
                let (kind, default) = kind.split_once('=').map_or((kind, None), |(k, d)| (k, Some(d)));
                let (kind, required) = (kind.trim_end_matches('!'), kind.ends_with('!'));
                Some(Attribute { name, kind, required, default })
            };
            table.entry(op).or_default().push((since, words.filter_map(attribute).collect()));
        }
        table.values_mut().for_each(|versions| versions.sort_unstable_by_key(|(since, _)| -since));
        table
    })
}

/// The attributes of the op `name` at `version` of its dialect. `None` for an op that the table does not hold.
fn attributes(name: &OpName, version: i64) -> Option<&'static [Attribute]> {
    let versions = table().get(name.op()).filter(|_| name.dialect() == "onnx")?;
    versions.iter().find(|(since, _)| *since <= version).map(|(_, a)| a.as_slice())
}

/// The kind of an attribute of the op `name`, such as `ints`; `None` when the specification has no such attribute.
pub fn kind(name: &OpName, version: i64, attribute: &str) -> Option<&'static str> {
    attributes(name, version)?.iter().find(|a| a.name == attribute).map(|a| a.kind)
}

/// The value that an attribute of the op `name` has when it is left out, if the specification gives one.
pub fn default(name: &OpName, version: i64, attribute: &str) -> Option<Attr> {
    let a = attributes(name, version)?.iter().find(|a| a.name == attribute)?;
    let text = a.default?;
    let list = || text.split(',');
    Some(match a.kind {
        "int" => Attr::Int(text.parse().ok()?),
        "float" => Attr::Float(text.parse().ok()?),
        "string" => text.into(),
        "ints" => Attr::Ints(list().map(str::parse).collect::<Result<_, _>>().ok()?),
        "floats" => Attr::Floats(list().map(str::parse).collect::<Result<_, _>>().ok()?),
        _ => return None,
    })
}

/// The version of ONNX that brought the op `name`, of those that the table holds.
pub fn since(name: &OpName) -> Option<i64> {
    table().get(name.op()).filter(|_| name.dialect() == "onnx")?.last().map(|(since, _)| *since)
}

/// Checks the attributes of the op `name` at `version` of its dialect. What the specification does not name, and ops
/// of other dialects, pass.
pub fn check(name: &OpName, version: i64, attrs: &Attrs) -> Result<(), OpError> {
    for &Attribute { name: attribute, kind, required, .. } in attributes(name, version).into_iter().flatten()
    {
        match attrs.get(attribute) {
            None if required => {
                return Err(OpError::invalid(format!(
                    "the attribute {attribute} is missing, expected {kind}"
                )));
            }
            Some(a) if !a.is_kind(kind) => {
                let found = a.kind();
                return Err(OpError::invalid(format!(
                    "the attribute {attribute} is of kind {found}, expected {kind}"
                )));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_specification() {
        let of = |op: &str, version, attribute| default(&OpName::new("onnx", op), version, attribute);
        assert_eq!(of("LayerNormalization", 17, "epsilon"), Some(Attr::Float(1e-5)));
        assert_eq!(of("Softmax", 11, "axis"), Some(Attr::Int(1)));
        assert_eq!(of("Softmax", 13, "axis"), Some(Attr::Int(-1)));
        assert_eq!(of("Gelu", 20, "approximate"), Some("none".into()));
        assert_eq!(of("Gelu", 19, "approximate"), None);
        assert_eq!(of("Transpose", 13, "perm"), None);
        assert_eq!(kind(&OpName::new("onnx", "ReduceMean"), 13, "axes"), Some("ints"));
        assert_eq!(kind(&OpName::new("onnx", "ReduceMean"), 18, "axes"), None);
        assert_eq!(since(&OpName::new("onnx", "Gelu")), Some(20));
    }
}
