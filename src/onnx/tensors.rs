//! Tensors, between `TensorProto` and the IR's constants.
//!
//! `raw_data` and external data stay where they are in the mapped file. The typed fields are decoded to the bytes
//! that `raw_data` would hold and marked, so that they are written as typed fields again.

use super::external::{EXTERNAL, ExternalError, Folder};
use super::proto::{SparseTensorProto, TensorProto};
use super::rest::{self, DOC, REST};
use bytes::Bytes;
use dialects::ir::{ConstData, ConstError, Elem, Encoding, TensorSource};
use prost::Message;
use std::sync::Arc;
use thiserror::Error;

/// The entry that names a tensor which is no value: one in an attribute.
pub const NAME: &str = "name";

/// Why a tensor cannot be read.
#[derive(Debug, Error)]
pub enum TensorError {
    /// Not one of ONNX's element types.
    #[error("expected a known element type, found {0}")]
    Elem(i32),
    /// A negative dim.
    #[error("expected dims of at least 0, found {0:?}")]
    Dims(Vec<i64>),
    /// The shape asks for another length, or for more than can be counted.
    #[error(transparent)]
    Const(#[from] ConstError),
    /// More than one field holds data.
    #[error("expected data in one field, found it in {} and {}", .0[0], .0[1])]
    TwoFields(Vec<&'static str>),
    /// Data in a field that is not the element type's.
    #[error("expected the data of {elem} elements in {expected}, found it in {found}")]
    WrongField {
        /// The element type.
        elem: Elem,
        /// The field it belongs in.
        expected: &'static str,
        /// The field it is in.
        found: &'static str,
    },
    /// Another number of entries in a typed field.
    #[error("expected {expected} entries of {field}, found {found}")]
    Count {
        /// The field.
        field: &'static str,
        /// Entries by shape and element type.
        expected: u64,
        /// Entries there are.
        found: usize,
    },
    /// A number outside the range of its element type.
    #[error("{field} holds {value}, which is no {elem}")]
    Range {
        /// The field.
        field: &'static str,
        /// The number.
        value: i64,
        /// The element type.
        elem: Elem,
    },
    /// External data is wrong.
    #[error(transparent)]
    External(#[from] ExternalError),
    /// Strings cannot be external.
    #[error("a string tensor cannot be external")]
    ExternalStrings,
    /// A sparse tensor lacks a part.
    #[error("a sparse tensor without {0}")]
    Sparse(&'static str),
}

/// Reads a tensor. Its name is left to the caller.
pub fn read(proto: &TensorProto, folder: &mut Folder) -> Result<ConstData, TensorError> {
    let code = proto.data_type.unwrap_or(0);
    let elem = Elem::from_onnx(code).ok_or(TensorError::Elem(code))?;
    let dims: Result<Vec<u64>, _> = proto.dims.iter().map(|&d| u64::try_from(d)).collect();
    let dims = dims.map_err(|_| TensorError::Dims(proto.dims.clone()))?;
    let count = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let count = count.ok_or_else(|| ConstError::Overflow(dims.clone()))?;

    let typed = typed_field(elem);
    let mut filled = filled_fields(proto);
    if proto.raw_data.is_some() {
        filled.push("raw_data");
    }
    let external = proto.data_location == Some(EXTERNAL);
    if external {
        filled.push("external data");
    }
    if filled.len() > 1 {
        return Err(TensorError::TwoFields(filled));
    }
    if let [found] = filled[..]
        && !["raw_data", "external data", typed].contains(&found)
    {
        return Err(TensorError::WrongField { elem, expected: typed, found });
    }

    let (source, encoding): (Arc<dyn TensorSource>, _) = match &proto.raw_data {
        _ if elem == Elem::String && (external || proto.raw_data.is_some()) => {
            return Err(TensorError::ExternalStrings);
        }
        Some(raw) => (Arc::new(raw.clone()), Encoding::Raw),
        None if external => {
            let expected = elem.byte_len(count).ok_or_else(|| ConstError::Overflow(dims.clone()))?;
            (folder.tensor(proto, expected)?, Encoding::Raw)
        }
        None => (Arc::new(typed_bytes(proto, elem, count)?), Encoding::Typed),
    };
    let mut data = ConstData::new(elem, dims, source)?;
    data.encoding = encoding;
    rest::text(&mut data.meta, DOC, &proto.doc_string);
    let kept = TensorProto {
        segment: proto.segment.clone(),
        data_location: proto.data_location.filter(|_| !external),
        external_data: if external { Vec::new() } else { proto.external_data.clone() },
        metadata_props: rest::metadata(&mut data.meta, &proto.metadata_props),
        ..Default::default()
    };
    rest::keep(&mut data.meta, REST, &kept);
    Ok(data)
}

/// The message of a dense tensor, without its data.
pub fn message(data: &ConstData, name: Option<String>) -> Result<TensorProto, String> {
    let mut proto: TensorProto = rest::kept(&data.meta, REST)?;
    proto.name = name;
    proto.data_type = Some(data.elem.onnx());
    proto.dims = data.dims.iter().map(|&d| d as i64).collect();
    proto.doc_string = rest::text_of(&data.meta, DOC);
    proto.metadata_props.extend(rest::metadata_of(&data.meta));
    Ok(proto)
}

/// Reads a sparse tensor: its encoding is its data, and it is passed through. The name is that of its values.
pub fn read_sparse(proto: &SparseTensorProto, folder: &mut Folder) -> Result<ConstData, TensorError> {
    let values = proto.values.as_ref().ok_or(TensorError::Sparse("values"))?;
    let code = values.data_type.unwrap_or(0);
    let elem = Elem::from_onnx(code).ok_or(TensorError::Elem(code))?;
    let dims: Result<Vec<u64>, _> = proto.dims.iter().map(|&d| u64::try_from(d)).collect();
    let dims = dims.map_err(|_| TensorError::Dims(proto.dims.clone()))?;
    if dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).is_none() {
        return Err(ConstError::Overflow(dims).into());
    }
    let mut whole = proto.clone();
    for part in [&mut whole.values, &mut whole.indices].into_iter().flatten() {
        // What is passed through whole has no file beside it.
        let data = read(part, folder)?;
        if part.data_location == Some(EXTERNAL) {
            part.raw_data = Some(data.read()?);
            part.data_location = None;
            part.external_data.clear();
        }
    }
    let bytes = Bytes::from(whole.encode_to_vec());
    Ok(ConstData::unchecked(elem, dims, Arc::new(bytes), Encoding::Sparse))
}

/// The typed field that an element type belongs in.
fn typed_field(elem: Elem) -> &'static str {
    match elem {
        Elem::F32 | Elem::C64 => "float_data",
        Elem::F64 | Elem::C128 => "double_data",
        Elem::I64 => "int64_data",
        Elem::U32 | Elem::U64 => "uint64_data",
        Elem::String => "string_data",
        _ => "int32_data",
    }
}

fn filled_fields(proto: &TensorProto) -> Vec<&'static str> {
    let fields = [
        ("float_data", proto.float_data.is_empty()),
        ("int32_data", proto.int32_data.is_empty()),
        ("string_data", proto.string_data.is_empty()),
        ("int64_data", proto.int64_data.is_empty()),
        ("double_data", proto.double_data.is_empty()),
        ("uint64_data", proto.uint64_data.is_empty()),
    ];
    fields.into_iter().filter(|(_, empty)| !empty).map(|(name, _)| name).collect()
}

/// The bytes that `raw_data` would hold (for strings, those of [`TensorSource`]).
fn typed_bytes(proto: &TensorProto, elem: Elem, count: u64) -> Result<Bytes, TensorError> {
    let field = typed_field(elem);
    // Complex numbers take two entries; sub-byte elements share one by the byte.
    let expected = match elem {
        Elem::C64 | Elem::C128 => count.saturating_mul(2),
        Elem::String => count,
        _ if elem.bits() < 8 => elem.byte_len(count).unwrap_or(u64::MAX),
        _ => count,
    };
    let found = match field {
        "float_data" => proto.float_data.len(),
        "double_data" => proto.double_data.len(),
        "int64_data" => proto.int64_data.len(),
        "uint64_data" => proto.uint64_data.len(),
        "string_data" => proto.string_data.len(),
        _ => proto.int32_data.len(),
    };
    if found as u64 != expected {
        return Err(TensorError::Count { field, expected, found });
    }
    let range = |value: i64| TensorError::Range { field, value, elem };
    let bytes: Vec<u8> = match field {
        "float_data" => proto.float_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        "double_data" => proto.double_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        "int64_data" => proto.int64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        "string_data" => {
            let mut out = Vec::new();
            for s in &proto.string_data {
                out.extend((s.len() as u64).to_le_bytes());
                out.extend_from_slice(s);
            }
            out
        }
        "uint64_data" if elem == Elem::U32 => {
            let mut out = Vec::with_capacity(4 * found);
            for &x in &proto.uint64_data {
                let x32 = u32::try_from(x).map_err(|_| range(i64::try_from(x).unwrap_or(i64::MAX)))?;
                out.extend(x32.to_le_bytes());
            }
            out
        }
        "uint64_data" => proto.uint64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => {
            let width = (elem.bits() / 8).max(1);
            let (low, high) = match elem {
                Elem::I32 => (i32::MIN, i32::MAX),
                Elem::I16 => (i32::from(i16::MIN), i32::from(i16::MAX)),
                Elem::I8 => (i32::from(i8::MIN), i32::from(i8::MAX)),
                Elem::Bool => (0, 1),
                _ => (0, (1 << (8 * width)) - 1),
            };
            let mut out = Vec::with_capacity(width * found);
            for &x in &proto.int32_data {
                if x < low || x > high {
                    return Err(range(i64::from(x)));
                }
                out.extend_from_slice(&x.to_le_bytes()[..width]);
            }
            out
        }
    };
    Ok(bytes.into())
}

/// Fills the typed field of `elem` from the bytes that [`typed_bytes`] gives.
pub fn fill_typed(proto: &mut TensorProto, elem: Elem, bytes: &[u8]) {
    fn each<const N: usize, T>(bytes: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks().0.iter().map(|&chunk| decode(chunk)).collect()
    }
    match typed_field(elem) {
        "float_data" => proto.float_data = each(bytes, f32::from_le_bytes),
        "double_data" => proto.double_data = each(bytes, f64::from_le_bytes),
        "int64_data" => proto.int64_data = each(bytes, i64::from_le_bytes),
        "uint64_data" if elem == Elem::U32 => {
            proto.uint64_data = each(bytes, |b| u64::from(u32::from_le_bytes(b)));
        }
        "uint64_data" => proto.uint64_data = each(bytes, u64::from_le_bytes),
        "string_data" => {
            let mut left = bytes;
            while let Some((len, tail)) = left.split_first_chunk() {
                let (s, tail) = tail.split_at(tail.len().min(u64::from_le_bytes(*len) as usize));
                proto.string_data.push(Bytes::copy_from_slice(s));
                left = tail;
            }
        }
        _ => {
            proto.int32_data = match elem {
                Elem::I32 => each(bytes, i32::from_le_bytes),
                Elem::I16 => each(bytes, |b| i32::from(i16::from_le_bytes(b))),
                Elem::I8 => each(bytes, |[b]: [u8; 1]| i32::from(b as i8)),
                _ if elem.bits() == 16 => each(bytes, |b| i32::from(u16::from_le_bytes(b))),
                _ => each(bytes, |[b]: [u8; 1]| i32::from(b)),
            };
        }
    }
}
