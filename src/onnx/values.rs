//! Values in files of their own: the `.pb` files that ONNX's tests keep inputs and outputs in. A file does not say which
//! message it holds; the type of the value does.

use super::external::Folder;
use super::proto::{OptionalProto, SequenceProto, TensorProto};
use super::tensors::{self, TensorError};
use crate::files::{self, FileError};
use bytes::Bytes;
use dialects::ir::Type;
use dialects::ops::Item;
use dialects::tensor::{self, Tensor};
use prost::Message;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a value cannot be read.
#[derive(Debug, Error)]
pub enum ValueError {
    /// The file cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// It does not hold a value of the type.
    #[error("{}: expected a value of type {ty}: {what}", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// The type asked for.
        ty: Type,
        /// What is wrong.
        what: Box<BadValue>,
    },
}

/// What is wrong with a value.
#[derive(Debug, Error)]
pub enum BadValue {
    /// Not the message that holds such a value.
    #[error(transparent)]
    Decode(#[from] prost::DecodeError),
    /// A tensor in it is wrong.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A tensor in it cannot be held in memory.
    #[error(transparent)]
    Memory(#[from] tensor::TensorError),
    /// A type whose values are not read.
    #[error("values of this type are not read")]
    Type,
}

/// Reads the value of type `ty` in the file at `path`; an unknown type is taken for a tensor.
pub fn read(path: &Path, ty: &Type) -> Result<Item, ValueError> {
    let bytes = files::map(path)?;
    let mut folder = Folder::of_model(path)?;
    let bad = |what| ValueError::Bad { path: path.to_owned(), ty: ty.clone(), what: Box::new(what) };
    decode(bytes, ty, &mut folder).map_err(bad)
}

fn decode(bytes: Bytes, ty: &Type, folder: &mut Folder) -> Result<Item, BadValue> {
    match ty {
        Type::Unknown | Type::Tensor(_) => Ok(tensor(&TensorProto::decode(bytes)?, folder)?.into()),
        Type::Sequence(_) => sequence(&SequenceProto::decode(bytes)?, folder),
        Type::Optional(_) => optional(&OptionalProto::decode(bytes)?, folder),
        Type::SparseTensor(_) | Type::Map(..) => Err(BadValue::Type),
    }
}

fn tensor(proto: &TensorProto, folder: &mut Folder) -> Result<Tensor, BadValue> {
    Ok(Tensor::from_const(&tensors::read(proto, folder)?)?)
}

fn sequence(proto: &SequenceProto, folder: &mut Folder) -> Result<Item, BadValue> {
    let mut items = Vec::new();
    for t in &proto.tensor_values {
        items.push(tensor(t, folder)?.into());
    }
    for s in &proto.sequence_values {
        items.push(sequence(s, folder)?);
    }
    for o in &proto.optional_values {
        items.push(optional(o, folder)?);
    }
    Ok(Item::Sequence(items))
}

fn optional(proto: &OptionalProto, folder: &mut Folder) -> Result<Item, BadValue> {
    let inner = if let Some(t) = &proto.tensor_value {
        Some(tensor(t, folder)?.into())
    } else if let Some(s) = &proto.sequence_value {
        Some(sequence(s, folder)?)
    } else {
        proto.optional_value.as_deref().map(|o| optional(o, folder)).transpose()?
    };
    Ok(Item::Optional(inner.map(Box::new)))
}
