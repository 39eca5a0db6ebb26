//! Tensors in memory, as the interpreter computes with them: contiguous, row-major, shared until written.

use crate::ir::{ConstData, ConstError, Elem};
use crate::kernels::buffers;
use crate::ops::OpError;
use bytes::Bytes;
use half::{bf16, f16};
use std::borrow::Cow;
use std::sync::Arc;
use thiserror::Error;

/// Elements in memory. Types narrower than a byte, and 8-bit floats, are held one per byte: signed integers
/// widened in `I8`, unsigned integers widened in `U8`, 4-, 6- and 8-bit floats as their codes in `U8`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Data {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    I16(Vec<i16>),
    I8(Vec<i8>),
    U64(Vec<u64>),
    U32(Vec<u32>),
    U16(Vec<u16>),
    U8(Vec<u8>),
    Bool(Vec<bool>),
    /// Real and imaginary part.
    C64(Vec<[f32; 2]>),
    /// Real and imaginary part.
    C128(Vec<[f64; 2]>),
    Str(Vec<Bytes>),
}

/// Runs `$body` with `$v` bound to the vector inside a [`Data`], whatever its element type.
#[macro_export]
macro_rules! each_data {
    ($data:expr, $v:ident => $body:expr) => {
        match $data {
            $crate::tensor::Data::F64($v) => $body,
            $crate::tensor::Data::F32($v) => $body,
            $crate::tensor::Data::F16($v) => $body,
            $crate::tensor::Data::BF16($v) => $body,
            $crate::tensor::Data::I64($v) => $body,
            $crate::tensor::Data::I32($v) => $body,
            $crate::tensor::Data::I16($v) => $body,
            $crate::tensor::Data::I8($v) => $body,
            $crate::tensor::Data::U64($v) => $body,
            $crate::tensor::Data::U32($v) => $body,
            $crate::tensor::Data::U16($v) => $body,
            $crate::tensor::Data::U8($v) => $body,
            $crate::tensor::Data::Bool($v) => $body,
            $crate::tensor::Data::C64($v) => $body,
            $crate::tensor::Data::C128($v) => $body,
            $crate::tensor::Data::Str($v) => $body,
        }
    };
}

/// Like [`each_data`], but each arm wraps what `$body` gives in the variant it came from.
#[macro_export]
macro_rules! map_data {
    ($data:expr, $v:ident => $body:expr) => {
        match $data {
            $crate::tensor::Data::F64($v) => $crate::tensor::Data::F64($body),
            $crate::tensor::Data::F32($v) => $crate::tensor::Data::F32($body),
            $crate::tensor::Data::F16($v) => $crate::tensor::Data::F16($body),
            $crate::tensor::Data::BF16($v) => $crate::tensor::Data::BF16($body),
            $crate::tensor::Data::I64($v) => $crate::tensor::Data::I64($body),
            $crate::tensor::Data::I32($v) => $crate::tensor::Data::I32($body),
            $crate::tensor::Data::I16($v) => $crate::tensor::Data::I16($body),
            $crate::tensor::Data::I8($v) => $crate::tensor::Data::I8($body),
            $crate::tensor::Data::U64($v) => $crate::tensor::Data::U64($body),
            $crate::tensor::Data::U32($v) => $crate::tensor::Data::U32($body),
            $crate::tensor::Data::U16($v) => $crate::tensor::Data::U16($body),
            $crate::tensor::Data::U8($v) => $crate::tensor::Data::U8($body),
            $crate::tensor::Data::Bool($v) => $crate::tensor::Data::Bool($body),
            $crate::tensor::Data::C64($v) => $crate::tensor::Data::C64($body),
            $crate::tensor::Data::C128($v) => $crate::tensor::Data::C128($body),
            $crate::tensor::Data::Str($v) => $crate::tensor::Data::Str($body),
        }
    };
}

impl Data {
    /// The number of elements.
    pub fn len(&self) -> usize {
        each_data!(self, v => v.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type that this storage holds when nothing narrower is said.
    pub fn elem(&self) -> Elem {
        match self {
            Data::F64(_) => Elem::F64,
            Data::F32(_) => Elem::F32,
            Data::F16(_) => Elem::F16,
            Data::BF16(_) => Elem::BF16,
            Data::I64(_) => Elem::I64,
            Data::I32(_) => Elem::I32,
            Data::I16(_) => Elem::I16,
            Data::I8(_) => Elem::I8,
            Data::U64(_) => Elem::U64,
            Data::U32(_) => Elem::U32,
            Data::U16(_) => Elem::U16,
            Data::U8(_) => Elem::U8,
            Data::Bool(_) => Elem::Bool,
            Data::C64(_) => Elem::C64,
            Data::C128(_) => Elem::C128,
            Data::Str(_) => Elem::String,
        }
    }

    /// Storage bytes, strings not counted in depth.
    pub fn byte_len(&self) -> usize {
        each_data!(self, v => std::mem::size_of_val(v.as_slice()))
    }
}

/// Why a tensor is not what an op needs.
#[derive(Clone, Debug, Error)]
pub enum TensorError {
    /// An element type that does not fit.
    #[error("expected a tensor of {expected}, found {found}")]
    Elem {
        /// What was wanted.
        expected: String,
        /// What is there.
        found: Elem,
    },
    /// A shape that does not fit its data.
    #[error("the shape {shape:?} does not hold {count} elements")]
    Shape {
        /// The shape.
        shape: Vec<usize>,
        /// Elements there are.
        count: usize,
    },
    /// A constant that could not be read.
    #[error(transparent)]
    Const(#[from] ConstError),
}

/// A tensor. Cloning shares the data.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    elem: Elem,
    shape: Vec<usize>,
    data: Arc<Data>,
}

macro_rules! from_vec {
    ($($t:ty => $variant:ident),*) => {$(
        impl From<Vec<$t>> for Data {
            fn from(v: Vec<$t>) -> Data { Data::$variant(v) }
        }
    )*};
}
from_vec!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, i16 => I16, i8 => I8,
    u64 => U64, u32 => U32, u16 => U16, u8 => U8, bool => Bool, [f32; 2] => C64, [f64; 2] => C128, Bytes => Str);

impl Tensor {
    /// A tensor of the storage's own element type.
    pub fn new(shape: &[usize], data: impl Into<Data>) -> Result<Tensor, TensorError> {
        let data = data.into();
        Tensor::with_elem(data.elem(), shape, data)
    }

    /// A tensor of element type `elem`, whose storage `data` must be the one [`Data`] says for it.
    pub fn with_elem(elem: Elem, shape: &[usize], data: Data) -> Result<Tensor, TensorError> {
        if count(shape) != Some(data.len()) {
            return Err(TensorError::Shape { shape: shape.to_vec(), count: data.len() });
        }
        if storage(elem) != data.elem() {
            return Err(TensorError::Elem { expected: storage(elem).to_string(), found: data.elem() });
        }
        Ok(Tensor { elem, shape: shape.to_vec(), data: Arc::new(data) })
    }

    /// A scalar.
    pub fn scalar<T>(x: T) -> Tensor
    where
        Vec<T>: Into<Data>,
    {
        Tensor::new(&[], vec![x]).expect("one element fits a scalar")
    }

    /// A float tensor of type `elem` (f64, f32, f16 or bf16) from f32 values, rounded to nearest even.
    pub fn from_f32(elem: Elem, shape: &[usize], values: Vec<f32>) -> Result<Tensor, TensorError> {
        let data = match elem {
            Elem::F32 => Data::F32(values),
            Elem::F64 => Data::F64(values.into_iter().map(f64::from).collect()),
            Elem::F16 => Data::F16(values.into_iter().map(f16::from_f32).collect()),
            Elem::BF16 => Data::BF16(values.into_iter().map(bf16::from_f32).collect()),
            _ => return Err(TensorError::Elem { expected: "f64, f32, f16 or bf16".into(), found: elem }),
        };
        Tensor::new(shape, data)
    }

    /// A tensor of zeros (false, or empty strings).
    pub fn zeros(elem: Elem, shape: &[usize]) -> Result<Tensor, OpError> {
        let count = crate::kernels::strided::count(shape)?;
        let data = match elem {
            Elem::String => Data::Str(vec![Bytes::new(); count]),
            // What a length fits into memory was checked by the count.
            _ => decode(elem, &vec![0; (count * elem.bits()).div_ceil(8)], count),
        };
        Ok(Tensor::with_elem(elem, shape, data)?)
    }

    /// The element type.
    pub fn elem(&self) -> Elem {
        self.elem
    }

    /// The shape, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of dims.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The elements, copied only when they are shared.
    pub fn into_data(self) -> Data {
        Arc::unwrap_or_clone(self.data)
    }

    /// The same elements in another shape of as many elements.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor, TensorError> {
        if count(shape) != Some(self.len()) {
            return Err(TensorError::Shape { shape: shape.to_vec(), count: self.len() });
        }
        Ok(Tensor { elem: self.elem, shape: shape.to_vec(), data: self.data.clone() })
    }

    /// The elements, which must be f32.
    pub fn f32s(&self) -> Result<&[f32], TensorError> {
        match &*self.data {
            Data::F32(v) => Ok(v),
            _ => Err(TensorError::Elem { expected: "f32".into(), found: self.elem }),
        }
    }

    /// The elements as f32: borrowed from f32, widened from f16 and bf16, rounded from f64.
    pub fn to_f32(&self) -> Result<Cow<'_, [f32]>, TensorError> {
        Ok(match &*self.data {
            Data::F32(v) => Cow::Borrowed(v),
            Data::F64(v) => v.iter().map(|&x| x as f32).collect(),
            Data::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(v) => v.iter().map(|x| x.to_f32()).collect(),
            _ => return Err(TensorError::Elem { expected: "a float type".into(), found: self.elem }),
        })
    }

    /// The elements, which must be i64.
    pub fn i64s(&self) -> Result<&[i64], TensorError> {
        match &*self.data {
            Data::I64(v) => Ok(v),
            _ => Err(TensorError::Elem { expected: "i64".into(), found: self.elem }),
        }
    }

    /// The elements as i64: from any integer type or bool.
    pub fn to_i64(&self) -> Result<Cow<'_, [i64]>, TensorError> {
        Ok(match &*self.data {
            Data::I64(v) => Cow::Borrowed(v),
            Data::I32(v) => v.iter().map(|&x| x.into()).collect(),
            Data::I16(v) => v.iter().map(|&x| x.into()).collect(),
            Data::I8(v) => v.iter().map(|&x| x.into()).collect(),
            Data::U32(v) => v.iter().map(|&x| x.into()).collect(),
            Data::U16(v) => v.iter().map(|&x| x.into()).collect(),
            Data::U8(v) if !self.elem.is_float() => v.iter().map(|&x| x.into()).collect(),
            Data::Bool(v) => v.iter().map(|&x| x.into()).collect(),
            _ => return Err(TensorError::Elem { expected: "an integer type".into(), found: self.elem }),
        })
    }

    /// The elements, which must be bool.
    pub fn bools(&self) -> Result<&[bool], TensorError> {
        match &*self.data {
            Data::Bool(v) => Ok(v),
            _ => Err(TensorError::Elem { expected: "bool".into(), found: self.elem }),
        }
    }

    /// The elements, which must be stored as `u8` (u8, u4, u2, and codes of narrow floats).
    pub fn u8s(&self) -> Result<&[u8], TensorError> {
        match &*self.data {
            Data::U8(v) => Ok(v),
            _ => Err(TensorError::Elem { expected: "u8".into(), found: self.elem }),
        }
    }

    /// Reads a constant.
    pub fn from_const(c: &ConstData) -> Result<Tensor, TensorError> {
        if c.encoding == crate::ir::Encoding::Sparse {
            return Err(ConstError::Unavailable("a sparse tensor cannot be computed with".into()).into());
        }
        let data = decode(c.elem, &c.read()?, c.count() as usize);
        Tensor::with_elem(c.elem, &c.shape(), data)
    }

    /// The elements of a float constant as f32.
    pub fn floats(c: &ConstData) -> Result<Vec<f32>, TensorError> {
        Tensor::from_const(c)?.to_f32().map(Cow::into_owned)
    }

    /// Gives the memory back for other tensors, if nobody else reads it.
    pub fn recycle(self) {
        if let Ok(data) = Arc::try_unwrap(self.data) {
            buffers::give(data);
        }
    }

    /// A constant with these elements, packed as [`Elem`] says.
    pub fn to_const(&self) -> ConstData {
        let bytes = Bytes::from(encode(self.elem, &self.data));
        let dims = self.shape.iter().map(|&d| d as u64).collect();
        ConstData::new(self.elem, dims, Arc::new(bytes)).expect("encoding gives the bytes its type asks for")
    }
}

/// The number of elements of `shape`. `None` when a product of some of its sizes overflows, even where another one is
/// zero: ops multiply the sizes around an axis.
fn count(shape: &[usize]) -> Option<usize> {
    let sizes = shape.iter().filter(|&&d| d > 0).try_fold(1usize, |n, &d| n.checked_mul(d))?;
    Some(if shape.contains(&0) { 0 } else { sizes })
}

/// The element type of the storage that holds `elem`.
fn storage(elem: Elem) -> Elem {
    match elem {
        Elem::I4 | Elem::I2 => Elem::I8,
        e if e.bits() > 0 && e.bits() <= 8 && e != Elem::I8 && e != Elem::Bool => Elem::U8,
        e => e,
    }
}

/// Unpacks `count` elements from little-endian bytes of any alignment.
fn decode(elem: Elem, bytes: &[u8], count: usize) -> Data {
    fn le<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
        bytemuck::pod_collect_to_vec(bytes)
    }
    match elem {
        Elem::F64 => Data::F64(le(bytes)),
        Elem::F32 => Data::F32(le(bytes)),
        Elem::F16 => Data::F16(le(bytes)),
        Elem::BF16 => Data::BF16(le(bytes)),
        Elem::I64 => Data::I64(le(bytes)),
        Elem::I32 => Data::I32(le(bytes)),
        Elem::I16 => Data::I16(le(bytes)),
        Elem::I8 => Data::I8(le(bytes)),
        Elem::U64 => Data::U64(le(bytes)),
        Elem::U32 => Data::U32(le(bytes)),
        Elem::U16 => Data::U16(le(bytes)),
        Elem::C64 => Data::C64(le(bytes)),
        Elem::C128 => Data::C128(le(bytes)),
        Elem::Bool => Data::Bool(bytes.iter().map(|&b| b != 0).collect()),
        Elem::String => {
            let mut rest = bytes;
            let mut out = Vec::new();
            while let Some((len, tail)) = rest.split_first_chunk::<8>() {
                let len = (u64::from_le_bytes(*len) as usize).min(tail.len());
                out.push(Bytes::copy_from_slice(&tail[..len]));
                rest = &tail[len..];
            }
            Data::Str(out)
        }
        e if e.bits() < 8 => {
            let (bits, per) = (e.bits(), 8 / e.bits());
            let mask = (1u8 << bits) - 1;
            let code = |i: usize| bytes[i / per] >> (i % per * bits) & mask;
            if e.is_signed_int() {
                let shift = 8 - bits;
                Data::I8((0..count).map(|i| (code(i) << shift) as i8 >> shift).collect())
            } else {
                Data::U8((0..count).map(code).collect())
            }
        }
        _ => Data::U8(bytes.to_vec()),
    }
}

/// The inverse of [`decode`].
fn encode(elem: Elem, data: &Data) -> Vec<u8> {
    if elem.bits() > 0 && elem.bits() < 8 {
        let codes: Vec<u8> = match data {
            Data::I8(v) => v.iter().map(|&x| x as u8).collect(),
            Data::U8(v) => v.clone(),
            _ => Vec::new(),
        };
        let (bits, per) = (elem.bits(), 8 / elem.bits());
        let mask = (1u8 << bits) - 1;
        return codes
            .chunks(per)
            .map(|c| c.iter().enumerate().fold(0, |byte, (i, &x)| byte | (x & mask) << (i * bits)))
            .collect();
    }
    match data {
        Data::F64(v) => bytemuck::cast_slice(v).to_vec(),
        Data::F32(v) => bytemuck::cast_slice(v).to_vec(),
        Data::F16(v) => bytemuck::cast_slice(v).to_vec(),
        Data::BF16(v) => bytemuck::cast_slice(v).to_vec(),
        Data::I64(v) => bytemuck::cast_slice(v).to_vec(),
        Data::I32(v) => bytemuck::cast_slice(v).to_vec(),
        Data::I16(v) => bytemuck::cast_slice(v).to_vec(),
        Data::I8(v) => bytemuck::cast_slice(v).to_vec(),
        Data::U64(v) => bytemuck::cast_slice(v).to_vec(),
        Data::U32(v) => bytemuck::cast_slice(v).to_vec(),
        Data::U16(v) => bytemuck::cast_slice(v).to_vec(),
        Data::U8(v) => v.clone(),
        Data::C64(v) => bytemuck::cast_slice(v).to_vec(),
        Data::C128(v) => bytemuck::cast_slice(v).to_vec(),
        Data::Bool(v) => v.iter().map(|&b| b as u8).collect(),
        Data::Str(v) => v
            .iter()
            .flat_map(|s| (s.len() as u64).to_le_bytes().into_iter().chain(s.iter().copied()))
            .collect(),
    }
}
