//! What can be wrong with a model that is read, and what is only worth a warning.

use super::scan::ScanError;
use super::tensors::TensorError;
use crate::files::FileError;
use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

/// A model that cannot be read: the file, the place in it, and what is wrong there.
#[derive(Debug, Error)]
#[error("{}: {}{problem}", file.display(), Prefix(place))]
pub struct ImportError {
    /// The model's file.
    pub file: PathBuf,
    /// The node, tensor or value, such as `node "conv1" (Conv)`; empty when it is about the file.
    pub place: String,
    /// What is wrong.
    #[source]
    pub problem: Box<Problem>,
}

struct Prefix<'a>(&'a str);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "{}: ", self.0) }
    }
}

/// What is wrong.
#[derive(Debug, Error)]
pub enum Problem {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The bytes are no ONNX model.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The bytes are fields of an ONNX model, but not of their types.
    #[error("not an ONNX model: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A tensor is wrong.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A field that must be there is not.
    #[error("expected {0}, found none")]
    Missing(&'static str),
    /// A name that is defined twice.
    #[error("two producers of {value:?}: {first} and {second}")]
    TwoProducers {
        /// The value.
        value: String,
        /// What defines it.
        first: String,
        /// What defines it again.
        second: String,
    },
    /// A name that nothing defines.
    #[error("uses {value:?}, which nothing in the model defines")]
    Undefined {
        /// The value.
        value: String,
    },
    /// A name that is defined later.
    #[error(
        "uses {value:?} before it is defined: expected its producer earlier in the graph, found {producer} later"
    )]
    UsedBeforeDefined {
        /// The value.
        value: String,
        /// What defines it.
        producer: String,
    },
    /// Nodes that wait for each other.
    #[error("the nodes form a cycle: {}", .0.join(" -> "))]
    Cycle(Vec<String>),
    /// The same name for two things in one list.
    #[error("{what} {name:?} occurs twice")]
    Twice {
        /// What it is.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// An attribute says one kind and holds another.
    #[error("attribute {name:?}: expected a value of type {kind}, found {found}")]
    Attribute {
        /// The attribute.
        name: String,
        /// `AttributeProto.type`, by name or number.
        kind: String,
        /// The fields that are set.
        found: String,
    },
    /// More attributes than any op has.
    #[error("expected at most {max} attributes, found {0}", max = super::import::MAX_ATTRIBUTES)]
    Attributes(usize),
    /// Two alternatives of a type at once.
    #[error("the type of {0:?} is two types at once")]
    AmbiguousType(String),
    /// A name that the IR uses for something else.
    #[error("the domain {0:?} is reserved")]
    Domain(String),
    /// One domain at two versions.
    #[error("expected one version of the operators of {domain:?}, found {first} and {second}")]
    Opset {
        /// The domain.
        domain: String,
        /// One version.
        first: i64,
        /// Another.
        second: i64,
    },
}

/// Something odd in a model that can be read.
#[derive(Clone, Debug, PartialEq)]
pub enum Warning {
    /// Fields that this program does not know are not carried over.
    UnknownField {
        /// Such as `graph.node.#31`.
        path: String,
        /// How often it occurs.
        times: usize,
    },
    /// The IR version is newer than any known here.
    NewerIr(i64),
    /// The operators of ONNX are of a newer version than any known here.
    NewerOpset(i64),
    /// No operator versions are given.
    NoOpset,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use super::{MAX_IR, MAX_OPSET};
        match self {
            Warning::UnknownField { path, times } => write!(
                f,
                "the field {path} ({times} times) is unknown: the model is of a newer ONNX, and the field is dropped"
            ),
            Warning::NewerIr(v) => write!(f, "IR version {v} is newer than {MAX_IR}, the newest one known"),
            Warning::NewerOpset(v) => write!(
                f,
                "opset {v} is newer than {MAX_OPSET}, the newest one known: ops are taken to mean what they meant then"
            ),
            Warning::NoOpset => f.write_str("the model imports no operator set; version 1 is assumed"),
        }
    }
}
