//! A walk over the bytes of a file with the tables of [`super::proto`], before anything is decoded.
//!
//! It finds what decoding would hide or could not bound: fields of a newer ONNX than ours (which `prost` drops without
//! a word), nesting deeper than a decoder's stack should follow, and a structure whose decoded form would be out of
//! proportion to the file. Tensor bytes are skipped by their length and never touched. The wire format is that of
//! Protocol Buffers ("Encoding", the reference of the format).

use super::proto::{ModelProto, Table};
use thiserror::Error;

/// Messages nested deeper than this are refused: the limit that Protocol Buffers readers share.
const MAX_DEPTH: usize = 100;

/// A decoded structure may always take this many bytes, and more only in proportion to the file.
const STRUCTURE_ALLOWANCE: u64 = 1 << 30;

/// Decoded bytes allowed for each byte of the file, beyond [`STRUCTURE_ALLOWANCE`].
const STRUCTURE_FACTOR: u64 = 16;

/// Why bytes are not an ONNX model.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ScanError {
    /// The bytes break off inside a field.
    #[error("truncated: {path} at byte {offset} wants {wanted} bytes, and {left} are left")]
    Truncated {
        /// The field.
        path: String,
        /// Where its content starts.
        offset: usize,
        /// Bytes it wants.
        wanted: u64,
        /// Bytes there are.
        left: usize,
    },
    /// The bytes are no sequence of fields.
    #[error("not an ONNX model: byte {offset}, in {path}, starts no protobuf field")]
    Malformed {
        /// The message being read.
        path: String,
        /// Where.
        offset: usize,
    },
    /// Too deep.
    #[error("{path} nests deeper than {MAX_DEPTH} messages")]
    Depth {
        /// The message, shortened.
        path: String,
    },
    /// The decoded form would take too much memory.
    #[error("a file of {len} bytes whose structure would take over {limit} bytes in memory is refused")]
    Size {
        /// The length of the file.
        len: usize,
        /// The limit it is over.
        limit: u64,
    },
}

/// What a walk found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scan {
    /// Each kind of unknown field once: a path such as `graph.node.#31`, and how often it occurs.
    pub unknown: Vec<(String, usize)>,
}

/// Walks an encoded [`ModelProto`].
pub fn scan(bytes: &[u8]) -> Result<Scan, ScanError> {
    let limit = STRUCTURE_ALLOWANCE + STRUCTURE_FACTOR * bytes.len() as u64;
    let mut walk = Walk { bytes, at: 0, path: Vec::new(), decoded: 0, limit, found: Scan::default() };
    walk.message(ModelProto::table(), bytes.len(), 0)?;
    Ok(walk.found)
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    path: Vec<&'static str>,
    decoded: u64,
    limit: u64,
    found: Scan,
}

impl Walk<'_> {
    /// Walks the fields of one message, up to `end`.
    fn message(&mut self, table: Table, end: usize, depth: usize) -> Result<(), ScanError> {
        if depth > MAX_DEPTH {
            return Err(ScanError::Depth { path: self.path() });
        }
        self.count(table.size as u64)?;
        while self.at < end {
            let start = self.at;
            let key = self.varint(end)?;
            let (number, wire) = (key >> 3, key & 7);
            if number == 0 || number > (1 << 29) - 1 {
                return Err(ScanError::Malformed { path: self.path(), offset: start });
            }
            let known = table.fields.iter().find(|f| u64::from(f.tag) == number);
            let Some(field) = known else {
                self.unknown(number);
                self.skip(number, wire, start, end, depth)?;
                continue;
            };
            self.path.push(field.name);
            match (wire, field.inner) {
                (2, inner) => {
                    let len = self.length(end)?;
                    match inner {
                        Some(inner) => self.message(inner(), self.at + len, depth + 1)?,
                        None => {
                            // A packed varint of one byte decodes to eight; text and bytes add a header.
                            self.count(if field.numbers { 8 * len as u64 } else { 32 })?;
                            self.at += len;
                        }
                    }
                }
                _ => {
                    self.count(8)?;
                    self.skip(number, wire, start, end, depth)?;
                }
            }
            self.path.pop();
        }
        Ok(())
    }

    /// Skips the content of a field whose key was read.
    fn skip(
        &mut self,
        number: u64,
        wire: u64,
        start: usize,
        end: usize,
        depth: usize,
    ) -> Result<(), ScanError> {
        match wire {
            0 => self.varint(end).map(drop),
            1 => self.advance(8, end),
            2 => self.length(end).map(|len| self.at += len),
            5 => self.advance(4, end),
            // A group, which no ONNX version uses: its fields up to the matching end.
            3 if depth < MAX_DEPTH => loop {
                let start = self.at;
                let key = self.varint(end)?;
                if key == number << 3 | 4 {
                    return Ok(());
                }
                self.skip(key >> 3, key & 7, start, end, depth + 1)?;
            },
            3 => Err(ScanError::Depth { path: self.path() }),
            _ => Err(ScanError::Malformed { path: self.path(), offset: start }),
        }
    }

    /// Reads a length and checks that as many bytes are there.
    fn length(&mut self, end: usize) -> Result<usize, ScanError> {
        let wanted = self.varint(end)?;
        let left = end - self.at;
        match usize::try_from(wanted) {
            Ok(len) if len <= left => Ok(len),
            _ => Err(ScanError::Truncated { path: self.path(), offset: self.at, wanted, left }),
        }
    }

    fn advance(&mut self, len: usize, end: usize) -> Result<(), ScanError> {
        let left = end - self.at;
        if len > left {
            return Err(ScanError::Truncated {
                path: self.path(),
                offset: self.at,
                wanted: len as u64,
                left,
            });
        }
        self.at += len;
        Ok(())
    }

    fn varint(&mut self, end: usize) -> Result<u64, ScanError> {
        let start = self.at;
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            if self.at == end {
                return Err(ScanError::Truncated { path: self.path(), offset: start, wanted: 1, left: 0 });
            }
            let byte = self.bytes[self.at];
            self.at += 1;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(ScanError::Malformed { path: self.path(), offset: start })
    }

    /// Counts bytes of the decoded form against the limit.
    fn count(&mut self, bytes: u64) -> Result<(), ScanError> {
        self.decoded = self.decoded.saturating_add(bytes);
        if self.decoded > self.limit {
            return Err(ScanError::Size { len: self.bytes.len(), limit: self.limit });
        }
        Ok(())
    }

    fn unknown(&mut self, number: u64) {
        let mut path = self.path.join(".");
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(&format!("#{number}"));
        let found = &mut self.found.unknown;
        match found.iter().position(|(p, _)| *p == path) {
            Some(i) => found[i].1 += 1,
            // Garbage may look like many different fields: the first ones tell enough.
            None if found.len() < 64 => found.push((path, 1)),
            None => {}
        }
    }

    /// The path of the field being read; of a deep one, its two ends.
    fn path(&self) -> String {
        match self.path.as_slice() {
            [] => "the model".to_owned(),
            p if p.len() > 16 => format!("{}...{}", p[..8].join("."), p[p.len() - 4..].join(".")),
            p => p.join("."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::{GraphProto, NodeProto};
    use prost::Message;

    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2];
        prost::encoding::encode_varint(content.len() as u64, &mut bytes);
        bytes.extend_from_slice(content);
        bytes
    }

    #[test]
    fn unknown_fields_are_found_where_they_stand() {
        let node = NodeProto { op_type: Some("Relu".into()), ..Default::default() };
        let mut node = node.encode_to_vec();
        node.extend([15 << 3, 7]); // field 15, a varint
        let graph = [field(1, &node), field(1, &node)].concat();
        let mut model = [vec![8, 14], field(7, &graph)].concat();
        model.extend([0x85, 0x02, 1, 2, 3, 4]); // field 32, four bytes
        let found = scan(&model).unwrap();
        assert_eq!(found.unknown, [("graph.node.#15".to_owned(), 2), ("#32".to_owned(), 1)]);
    }

    #[test]
    fn a_known_file_has_none() {
        let graph = GraphProto { name: Some("g".into()), ..Default::default() };
        let model = ModelProto { ir_version: Some(14), graph: Some(graph), ..Default::default() };
        assert_eq!(scan(&model.encode_to_vec()).unwrap(), Scan::default());
    }

    #[test]
    fn a_cut_file_is_truncated_where_it_was_cut() {
        let model = field(7, &field(2, b"the name of a graph"));
        match scan(&model[..10]).unwrap_err() {
            ScanError::Truncated { path, wanted, left, .. } => {
                assert_eq!((path.as_str(), wanted, left), ("graph", 21, 8));
            }
            e => panic!("{e}"),
        }
    }

    #[test]
    fn depth_is_bounded() {
        // graph.node.attribute.g, over and over.
        let mut inner = Vec::new();
        for _ in 0..40 {
            inner = field(1, &field(5, &field(6, &inner)));
        }
        let error = scan(&field(7, &inner)).unwrap_err();
        assert!(matches!(error, ScanError::Depth { .. }), "{error}");
        // Nested groups are as deep.
        let groups = vec![31 << 3 | 3; 100_000];
        assert!(scan(&groups).is_err());
    }

    #[test]
    fn a_structure_out_of_proportion_is_refused() {
        // 40 million empty nodes in 80 MB would decode to over 8 GB.
        let graph = [1 << 3 | 2, 0].repeat(40_000_000);
        let error = scan(&field(7, &graph)).unwrap_err();
        assert!(matches!(error, ScanError::Size { .. }), "{error}");
    }

    #[test]
    fn wire_noise_is_refused() {
        assert!(matches!(scan(&[0x00, 1]), Err(ScanError::Malformed { .. })));
        assert!(matches!(scan(&[0x0f]), Err(ScanError::Malformed { .. })));
        assert!(matches!(scan(&[0xff; 11]), Err(ScanError::Malformed { .. })));
    }
}
