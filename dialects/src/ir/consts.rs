//! Constants: tensors that are read when asked for, and never copied into the graph.

use super::{Elem, Meta, Type};
use bytes::Bytes;
use cranelift_entity::{PrimaryMap, entity_impl};
use std::fmt::Debug;
use std::sync::{Arc, OnceLock};
use thiserror::Error;

/// Names one constant of a module.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConstId(u32);
entity_impl!(ConstId, "const");

/// Why a constant could not be read.
#[derive(Clone, Debug, Error)]
pub enum ConstError {
    /// The bytes are not there: a `.qir` without its weights, or a file that went away.
    #[error("{0}")]
    Unavailable(String),
    /// The bytes are of another length than the type asks for.
    #[error("expected {expected} bytes of data, found {found}")]
    Length {
        /// Bytes by element type and shape.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The bytes are not those that the text or file was written with.
    #[error("expected data with the BLAKE3 hash {expected}, found {found}")]
    Hash {
        /// The hash that was recorded.
        expected: String,
        /// The hash of what is there.
        found: String,
    },
    /// The shape's element count does not fit in 64 bits.
    #[error("the shape {0:?} has more elements than can be counted")]
    Overflow(Vec<u64>),
}

/// Where a constant's bytes come from: little-endian, sub-byte elements packed as [`Elem`] says, strings each
/// as a u64 length and its bytes.
pub trait TensorSource: Send + Sync + Debug {
    /// The length in bytes, known without reading.
    fn byte_len(&self) -> u64;

    /// All bytes. A slice of a memory map is returned without a copy; it may be unaligned.
    fn read(&self) -> Result<Bytes, ConstError>;

    /// The BLAKE3 hash of the bytes, where it is known without reading them.
    fn known_hash(&self) -> Option<[u8; 32]> {
        None
    }

    /// Whether there are bytes to read: not so for the large constants of a `.qir` without its weights.
    fn is_bound(&self) -> bool {
        true
    }
}

impl TensorSource for Bytes {
    fn byte_len(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self) -> Result<Bytes, ConstError> {
        Ok(self.clone())
    }
}

/// How the file that a constant came from held it, so that writing it back gives the same fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// `raw_data`, or external data.
    #[default]
    Raw,
    /// The typed field of its element type, such as `float_data`.
    Typed,
    /// The bytes are an encoded `SparseTensorProto`; passed through. `elem` and `dims` are those of the dense tensor.
    Sparse,
}

/// One constant tensor.
#[derive(Clone, Debug)]
pub struct ConstData {
    /// The element type.
    pub elem: Elem,
    /// The shape, outermost first.
    pub dims: Vec<u64>,
    /// The bytes.
    pub source: Arc<dyn TensorSource>,
    /// How the bytes stand in the file.
    pub encoding: Encoding,
    /// Other fields of the tensor (documentation, metadata, and the name of one held in an attribute).
    pub meta: Meta,
    hash: OnceLock<[u8; 32]>,
}

impl ConstData {
    /// A constant with raw encoding and no metadata. Checks the length against shape and element type.
    pub fn new(elem: Elem, dims: Vec<u64>, source: Arc<dyn TensorSource>) -> Result<ConstData, ConstError> {
        let count = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let count = count.ok_or_else(|| ConstError::Overflow(dims.clone()))?;
        if elem != Elem::String {
            let expected = elem.byte_len(count).ok_or_else(|| ConstError::Overflow(dims.clone()))?;
            let found = source.byte_len();
            if expected != found {
                return Err(ConstError::Length { expected, found });
            }
        }
        Ok(ConstData::unchecked(elem, dims, source, Encoding::Raw))
    }

    /// A constant whose length is not checked: a sparse one, whose bytes are not its elements.
    pub fn unchecked(
        elem: Elem,
        dims: Vec<u64>,
        source: Arc<dyn TensorSource>,
        encoding: Encoding,
    ) -> ConstData {
        ConstData { elem, dims, source, encoding, meta: Meta::default(), hash: OnceLock::new() }
    }

    /// The number of elements.
    pub fn count(&self) -> u64 {
        self.dims.iter().product()
    }

    /// The length in bytes.
    pub fn byte_len(&self) -> u64 {
        self.source.byte_len()
    }

    /// The tensor type.
    pub fn ty(&self) -> Type {
        Type::of_shape(self.elem, &self.shape())
    }

    /// The shape as `usize`.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().map(|&d| d as usize).collect()
    }

    /// All bytes, without a copy where the source is mapped.
    pub fn read(&self) -> Result<Bytes, ConstError> {
        self.source.read()
    }

    /// The BLAKE3 hash of the bytes, computed when first asked for.
    pub fn hash(&self) -> Result<[u8; 32], ConstError> {
        if let Some(h) = self.hash.get() {
            return Ok(*h);
        }
        let hash = match self.source.known_hash() {
            Some(hash) => hash,
            None => *blake3::hash(&self.read()?).as_bytes(),
        };
        Ok(*self.hash.get_or_init(|| hash))
    }
}

/// The constants of a module.
pub type ConstPool = PrimaryMap<ConstId, ConstData>;
