//! What goes in and comes out: an element type, a shape, bytes.

use crate::about::Elem;

/// A contiguous, row-major tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The element type.
    pub elem: Elem,
    /// The shape.
    pub shape: Vec<usize>,
    /// The elements, in the machine's byte order.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// A tensor of f32.
    pub fn f32(shape: &[usize], values: &[f32]) -> Tensor {
        let bytes = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        Tensor { elem: Elem::F32, shape: shape.to_vec(), bytes }
    }

    /// A tensor of i64.
    pub fn i64(shape: &[usize], values: &[i64]) -> Tensor {
        let bytes = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        Tensor { elem: Elem::I64, shape: shape.to_vec(), bytes }
    }

    /// The elements, if they are f32.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let four = |b: &[u8]| f32::from_ne_bytes(b.try_into().expect("chunks of four"));
        (self.elem == Elem::F32).then(|| self.bytes.chunks_exact(4).map(four).collect())
    }

    /// The elements, if they are i64.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        let eight = |b: &[u8]| i64::from_ne_bytes(b.try_into().expect("chunks of eight"));
        (self.elem == Elem::I64).then(|| self.bytes.chunks_exact(8).map(eight).collect())
    }
}
