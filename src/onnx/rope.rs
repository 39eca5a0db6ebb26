//! A streaming protobuf encoder: a message as a rope of small encoded pieces and of large tensors that are read only
//! when they are written.
//!
//! An encoded message is the concatenation of its encoded fields, in any order. So a message that holds tensors is
//! put together from what `prost` encodes of it without them, and from the ropes of the messages inside it, whose
//! lengths are known by summing. No model is ever in memory as a whole.

use bytes::Bytes;
use dialects::ir::{ConstError, TensorSource};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use std::io::{self, Write};
use std::mem;
use std::sync::Arc;
use thiserror::Error;

/// Tensors up to this many bytes are copied into the small pieces.
const INLINE: u64 = 4096;

/// Why a rope could not be written.
#[derive(Debug, Error)]
pub enum RopeError {
    /// The output failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A tensor could not be read.
    #[error(transparent)]
    Tensor(#[from] ConstError),
}

/// An encoded message, or a part of one.
#[derive(Clone, Debug, Default)]
pub struct Rope {
    /// Encoded bytes, each followed by a tensor.
    links: Vec<(Vec<u8>, Arc<dyn TensorSource>)>,
    /// The bytes after the last tensor.
    tail: Vec<u8>,
    len: u64,
}

impl Rope {
    /// The fields of `message`, encoded.
    pub fn of(message: &impl Message) -> Rope {
        let mut rope = Rope::default();
        rope.fields(message);
        rope
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Appends the fields of `message` to this message.
    pub fn fields(&mut self, message: &impl Message) {
        self.append(|tail| message.encode_raw(tail));
    }

    /// Appends the field `tag` that holds the message `inner`.
    pub fn message(&mut self, tag: u32, inner: Rope) {
        self.header(tag, inner.len);
        self.len += inner.len;
        for (bytes, tensor) in inner.links {
            self.tail.extend_from_slice(&bytes);
            self.links.push((mem::take(&mut self.tail), tensor));
        }
        self.tail.extend_from_slice(&inner.tail);
    }

    /// Appends the field `tag` that holds the bytes of `tensor`.
    pub fn tensor(&mut self, tag: u32, tensor: Arc<dyn TensorSource>) -> Result<(), ConstError> {
        let len = tensor.byte_len();
        self.header(tag, len);
        if len <= INLINE {
            let data = checked(&*tensor)?;
            self.append(|tail| tail.extend_from_slice(&data));
        } else {
            self.len += len;
            self.links.push((mem::take(&mut self.tail), tensor));
        }
        Ok(())
    }

    /// Writes everything, reading one tensor at a time; `progress` is told the bytes of each piece written.
    pub fn write(&self, out: &mut impl Write, progress: &mut dyn FnMut(u64)) -> Result<(), RopeError> {
        for (bytes, tensor) in &self.links {
            out.write_all(bytes)?;
            out.write_all(&checked(&**tensor)?)?;
            progress(bytes.len() as u64 + tensor.byte_len());
        }
        out.write_all(&self.tail)?;
        progress(self.tail.len() as u64);
        Ok(())
    }

    fn header(&mut self, tag: u32, len: u64) {
        self.append(|tail| {
            encode_key(tag, WireType::LengthDelimited, tail);
            encode_varint(len, tail);
        });
    }

    fn append(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let before = self.tail.len();
        encode(&mut self.tail);
        self.len += (self.tail.len() - before) as u64;
    }
}

/// Reads a tensor, which must be as long as it said: a wrong length would shift every field behind it.
fn checked(tensor: &dyn TensorSource) -> Result<Bytes, ConstError> {
    let data = tensor.read()?;
    let (expected, found) = (tensor.byte_len(), data.len() as u64);
    if expected != found {
        return Err(ConstError::Length { expected, found });
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::{GraphProto, ModelProto, TensorProto};

    fn written(rope: &Rope) -> Vec<u8> {
        let mut out = Vec::new();
        let mut told = 0;
        rope.write(&mut out, &mut |n| told += n).unwrap();
        assert_eq!((out.len() as u64, told), (rope.len(), rope.len()));
        out
    }

    #[test]
    fn a_rope_decodes_to_the_message() {
        let mut graph = GraphProto { name: Some("g".into()), ..Default::default() };
        let mut rope = Rope::of(&graph);
        for (name, len) in [("small", 5), ("empty", 0), ("large", 100_000), ("larger", 300_001)] {
            let data = Bytes::from((0..len).map(|i| i as u8).collect::<Vec<_>>());
            let mut tensor =
                TensorProto { name: Some(name.into()), dims: vec![len as i64], ..Default::default() };
            let mut inner = Rope::of(&tensor);
            inner.tensor(9, Arc::new(data.clone())).unwrap();
            rope.message(5, inner);
            tensor.raw_data = Some(data);
            graph.initializer.push(tensor);
        }
        let mut model = ModelProto { ir_version: Some(14), ..Default::default() };
        let mut out = Rope::of(&model);
        out.message(7, rope);
        model.graph = Some(graph);
        assert_eq!(ModelProto::decode(&*written(&out)).unwrap(), model);
    }

    #[derive(Debug)]
    struct Liar;
    impl TensorSource for Liar {
        fn byte_len(&self) -> u64 {
            1 << 20
        }
        fn read(&self) -> Result<Bytes, ConstError> {
            Ok(Bytes::from_static(b"short"))
        }
    }

    #[test]
    fn a_tensor_of_another_length_than_it_said_is_an_error() {
        let mut rope = Rope::default();
        rope.tensor(9, Arc::new(Liar)).unwrap();
        let error = rope.write(&mut Vec::new(), &mut |_| {}).unwrap_err();
        assert!(matches!(error, RopeError::Tensor(ConstError::Length { .. })), "{error}");
    }
}
