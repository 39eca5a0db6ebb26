//! External data: tensors in files of their own.
//!
//! Reading checks, before anything is mapped, that a location stays inside the model's folder (links included), that
//! the file is there and that the slice lies within it; the file is mapped when a tensor is first read. Writing lays
//! tensors out in one sidecar file, aligned so that a runtime can map them.

use super::proto::{StringStringEntryProto, TensorProto};
use crate::files::{self, FileError};
use bytes::Bytes;
use dialects::ir::{ConstError, TensorSource};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, OnceLock};
use thiserror::Error;

/// Why external data cannot be used.
#[derive(Debug, Error)]
pub enum ExternalError {
    /// There is no `location`.
    #[error("external data without a location")]
    NoLocation,
    /// A number that is none.
    #[error("external data {key} {found:?} is not a number of bytes")]
    Number {
        /// `offset` or `length`.
        key: &'static str,
        /// The text.
        found: String,
    },
    /// An absolute path.
    #[error("external data at {0:?}: expected a path relative to the model, found an absolute one")]
    Absolute(String),
    /// A path with `..`, or a link that leads out.
    #[error("external data at {0:?} lies outside the model's folder")]
    Outside(String),
    /// The model was not read from a folder.
    #[error("external data at {0:?}, but the model has no folder")]
    NoFolder(String),
    /// The file cannot be found or looked at.
    #[error("external data at {location:?} cannot be read: {source}")]
    Missing {
        /// The location.
        location: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The location is a directory or a device.
    #[error("external data at {0:?} is not a regular file")]
    NotAFile(String),
    /// The slice goes beyond the end of the file.
    #[error(
        "external data at {location:?}: expected {length} bytes at offset {offset}, found {size} in the file"
    )]
    TooShort {
        /// The location.
        location: String,
        /// The slice's start.
        offset: u64,
        /// The slice's length.
        length: u64,
        /// The file's length.
        size: u64,
    },
}

/// `TensorProto.DataLocation.EXTERNAL`.
pub const EXTERNAL: i32 = 1;

/// The folder of a model, and the data files found in it so far.
#[derive(Debug, Default)]
pub struct Folder {
    root: Option<(PathBuf, PathBuf)>,
    files: HashMap<String, Arc<DataFile>>,
}

/// A data file, mapped when first read.
#[derive(Debug)]
struct DataFile {
    path: PathBuf,
    size: u64,
    map: OnceLock<Bytes>,
}

impl Folder {
    /// The folder that holds the model at `model`.
    pub fn of_model(model: &Path) -> Result<Folder, FileError> {
        let folder = match model.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let real = fs::canonicalize(folder);
        let real = real.map_err(|source| FileError::Io { doing: "read", path: folder.to_owned(), source })?;
        Ok(Folder { root: Some((folder.to_owned(), real)), files: HashMap::new() })
    }

    /// The data files that tensors were found in, in order.
    pub fn paths(&self) -> Vec<PathBuf> {
        let mut paths: Vec<_> = self.files.values().map(|f| f.path.clone()).collect();
        paths.sort();
        paths
    }

    /// The bytes of an external tensor that should have `expected` of them.
    pub fn tensor(
        &mut self,
        proto: &TensorProto,
        expected: u64,
    ) -> Result<Arc<dyn TensorSource>, ExternalError> {
        let entry = |key: &str| {
            let found = proto.external_data.iter().rev().find(|e| e.key.as_deref() == Some(key));
            found.and_then(|e| e.value.as_deref())
        };
        let number = |key: &'static str| {
            let parse = |s: &str| {
                s.trim().parse::<u64>().map_err(|_| ExternalError::Number { key, found: s.to_owned() })
            };
            entry(key).map(parse).transpose()
        };
        let location = entry("location").ok_or(ExternalError::NoLocation)?;
        let offset = number("offset")?.unwrap_or(0);
        let length = number("length")?.unwrap_or(expected);
        let file = self.file(location)?;
        let inside = offset.checked_add(length).is_some_and(|end| end <= file.size);
        if !inside {
            let location = location.to_owned();
            return Err(ExternalError::TooShort { location, offset, length, size: file.size });
        }
        Ok(Arc::new(Slice { file, offset, length }))
    }

    fn file(&mut self, location: &str) -> Result<Arc<DataFile>, ExternalError> {
        if let Some(file) = self.files.get(location) {
            return Ok(file.clone());
        }
        let path = Path::new(location);
        if path.is_absolute() || path.has_root() {
            return Err(ExternalError::Absolute(location.to_owned()));
        }
        if path.components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
            return Err(ExternalError::Outside(location.to_owned()));
        }
        let Some((folder, root)) = &self.root else {
            return Err(ExternalError::NoFolder(location.to_owned()));
        };
        let missing = |source| ExternalError::Missing { location: location.to_owned(), source };
        let real = fs::canonicalize(folder.join(path)).map_err(missing)?;
        if !real.starts_with(root) {
            return Err(ExternalError::Outside(location.to_owned()));
        }
        let meta = fs::metadata(&real).map_err(missing)?;
        if !meta.is_file() {
            return Err(ExternalError::NotAFile(location.to_owned()));
        }
        let file = Arc::new(DataFile { path: real, size: meta.len(), map: OnceLock::new() });
        self.files.insert(location.to_owned(), file.clone());
        Ok(file)
    }
}

impl DataFile {
    fn bytes(&self) -> Result<Bytes, FileError> {
        if let Some(bytes) = self.map.get() {
            return Ok(bytes.clone());
        }
        let bytes = files::map(&self.path)?;
        Ok(self.map.get_or_init(|| bytes).clone())
    }
}

/// A part of a data file.
#[derive(Debug)]
struct Slice {
    file: Arc<DataFile>,
    offset: u64,
    length: u64,
}

impl TensorSource for Slice {
    fn byte_len(&self) -> u64 {
        self.length
    }

    fn read(&self) -> Result<Bytes, ConstError> {
        let bytes = self.file.bytes().map_err(|e| ConstError::Unavailable(e.to_string()))?;
        let (start, end) = (self.offset as usize, (self.offset + self.length) as usize);
        // The file may have shrunk since it was looked at.
        if end > bytes.len() {
            let found = (bytes.len() as u64).saturating_sub(self.offset);
            return Err(ConstError::Length { expected: self.length, found });
        }
        Ok(bytes.slice(start..end))
    }
}

/// Tensors of fewer bytes stay in the model, where shape inference wants to see them.
pub const SIDECAR_MIN: u64 = 4096;

/// The sidecar file of a model that is being written: which tensors go where.
#[derive(Debug)]
pub struct Sidecar {
    /// Its name, as the model refers to it.
    pub name: String,
    /// Offsets and tensors, in the order of the file.
    pub tensors: Vec<(u64, Arc<dyn TensorSource>)>,
    /// The length so far.
    pub len: u64,
}

impl Sidecar {
    /// An empty sidecar called `name`.
    pub fn new(name: String) -> Sidecar {
        Sidecar { name, tensors: Vec::new(), len: 0 }
    }

    /// Gives a tensor its place and makes `proto` refer to it. The place is a multiple of 4 KiB, or of 64 KiB for a
    /// tensor as large (Windows maps at those).
    pub fn refer(&mut self, proto: &mut TensorProto, tensor: Arc<dyn TensorSource>) {
        let len = tensor.byte_len();
        let align = if len >= 1 << 16 { 1 << 16 } else { 1 << 12 };
        let offset = self.len.next_multiple_of(align);
        self.len = offset + len;
        self.tensors.push((offset, tensor));
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.to_owned()),
            value: Some(value),
        };
        proto.data_location = Some(EXTERNAL);
        proto.external_data = vec![
            entry("location", self.name.clone()),
            entry("offset", offset.to_string()),
            entry("length", len.to_string()),
        ];
    }
}
