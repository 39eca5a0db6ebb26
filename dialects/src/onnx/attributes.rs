//! What the specifications say of the attributes of ops: of which kind they are, and which must be given.
//! `scripts/onnx_specs.py` writes the table.

use crate::ir::{Attrs, OpName};
use crate::ops::OpError;
use std::collections::HashMap;
use std::sync::OnceLock;

/// Name, kind, and whether it must be given.
type Attribute = (&'static str, &'static str, bool);

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
                Some((name, kind.trim_end_matches('!'), kind.ends_with('!')))
            };
            table.entry(op).or_default().push((since, words.filter_map(attribute).collect()));
        }
        table.values_mut().for_each(|versions| versions.sort_unstable_by_key(|(since, _)| -since));
        table
    })
}

/// Checks the attributes of the op `name` at `version` of its dialect. What the specification does not name, and ops
/// of other dialects, pass.
pub fn check(name: &OpName, version: i64, attrs: &Attrs) -> Result<(), OpError> {
    if name.dialect() != "onnx" {
        return Ok(());
    }
    let versions = table().get(name.op()).map_or(&[][..], Vec::as_slice);
    let Some((_, attributes)) = versions.iter().find(|(since, _)| *since <= version) else { return Ok(()) };
    for &(attribute, kind, required) in attributes {
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
