//! What the IR has no place for: fields that are carried through in a [`Meta`].
//!
//! Documentation and `metadata_props` are plain entries. Any other field is kept as the encoding of a message that
//! holds nothing else, in hexadecimal, under [`REST`]. Writing puts it ahead of the fields that the IR does have:
//! in Protocol Buffers a later scalar replaces an earlier one, and repeated fields append.

use super::proto::StringStringEntryProto;
use bytes::Bytes;
use dialects::ir::Meta;
use prost::Message;
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;

/// The entry that holds fields without a place in the IR.
pub const REST: &str = "rest";

/// The entry that holds a documentation string.
pub const DOC: &str = "doc_string";

/// The prefix of `metadata_props`.
const METADATA: &str = "metadata.";

/// Keeps `message` under `key`, which is not there yet, unless it is empty.
pub fn keep<M: Message + Default + PartialEq>(meta: &mut Meta, key: &str, message: &M) {
    if *message == M::default() {
        return;
    }
    let mut hex = String::new();
    for byte in message.encode_to_vec() {
        // Writing to a string does not fail.
        let _ = write!(hex, "{byte:02x}");
    }
    meta.0.push((key.into(), hex.into()));
}

/// The message kept under `key`, or an empty one.
pub fn kept<M: Message + Default>(meta: &Meta, key: &str) -> Result<M, String> {
    meta.get(key).map_or_else(|| Ok(M::default()), |hex| decode(hex).ok_or_else(|| undecodable(key)))
}

/// The messages kept under `prefix` and a number, by number.
pub fn numbered<M: Message + Default>(meta: &Meta, prefix: &str) -> Result<BTreeMap<usize, M>, String> {
    let number = |key: &str| key.strip_prefix(prefix)?.parse().ok();
    let entries = meta.0.iter().filter_map(|(key, hex)| Some((number(key)?, key, hex)));
    entries.map(|(n, key, hex)| Ok((n, decode(hex).ok_or_else(|| undecodable(key))?))).collect()
}

fn undecodable(key: &str) -> String {
    format!("the entry {key:?} is no encoded message")
}

fn decode<M: Message + Default>(hex: &str) -> Option<M> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = hex.as_bytes().chunks(2).map(byte).collect();
    M::decode(Bytes::from(bytes?)).ok()
}

/// Stores an optional text field, present and empty included.
pub fn text(meta: &mut Meta, key: &str, value: &Option<String>) {
    if let Some(value) = value {
        meta.set(key, value.as_str());
    }
}

/// The optional text field `key`.
pub fn text_of(meta: &Meta, key: &str) -> Option<String> {
    meta.get(key).map(|s| s.to_string())
}

/// Stores `metadata_props`. A list that is no map (a key twice, or none) is returned, to be kept elsewhere.
pub fn metadata(meta: &mut Meta, props: &[StringStringEntryProto]) -> Vec<StringStringEntryProto> {
    let start = meta.0.len();
    let mut seen = HashSet::new();
    for p in props {
        let (Some(key), Some(value)) = (&p.key, &p.value) else {
            meta.0.truncate(start);
            return props.to_vec();
        };
        if !seen.insert(key) {
            meta.0.truncate(start);
            return props.to_vec();
        }
        meta.0.push((format!("{METADATA}{key}").into(), value.as_str().into()));
    }
    Vec::new()
}

/// The `metadata_props` stored in `meta`.
pub fn metadata_of(meta: &Meta) -> Vec<StringStringEntryProto> {
    let entry = |key: &str, value: &str| StringStringEntryProto {
        key: Some(key.to_owned()),
        value: Some(value.to_owned()),
    };
    meta.0.iter().filter_map(|(k, v)| Some(entry(k.strip_prefix(METADATA)?, v))).collect()
}
