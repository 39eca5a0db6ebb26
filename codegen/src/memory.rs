//! Tensors as the bytes that kernels read and write.

use dialects::ir::Elem;
use dialects::kernels::buffers;
use dialects::tensor::{Data, Tensor};

/// The bytes of a tensor whose elements kernels know.
pub fn bytes(t: &Tensor) -> Option<&[u8]> {
    Some(match t.data() {
        Data::F32(v) => bytemuck::cast_slice(v),
        Data::I64(v) => bytemuck::cast_slice(v),
        Data::I32(v) => bytemuck::cast_slice(v),
        Data::U8(v) => v,
        Data::I8(v) => bytemuck::cast_slice(v),
        // A bool is a byte, 0 or 1.
        Data::Bool(v) => bytemuck::cast_slice(v),
        _ => return None,
    })
}

/// Bytes of an element.
pub fn size(elem: Elem) -> Option<u64> {
    Some(match elem {
        Elem::I64 => 8,
        Elem::F32 | Elem::I32 => 4,
        Elem::U8 | Elem::I8 | Elem::Bool => 1,
        _ => return None,
    })
}

/// Room for `count` elements, every one of which is to be written.
pub fn room(elem: Elem, count: usize) -> Option<Data> {
    Some(match elem {
        Elem::F32 => Data::F32(buffers::take(count)),
        Elem::I64 => Data::I64(vec![0; count]),
        Elem::I32 => Data::I32(vec![0; count]),
        Elem::U8 => Data::U8(vec![0; count]),
        Elem::I8 => Data::I8(vec![0; count]),
        Elem::Bool => Data::Bool(buffers::take(count)),
        _ => return None,
    })
}

/// Where the elements stand.
pub fn start(data: &mut Data) -> *mut u8 {
    match data {
        Data::F32(v) => v.as_mut_ptr().cast(),
        Data::I64(v) => v.as_mut_ptr().cast(),
        Data::I32(v) => v.as_mut_ptr().cast(),
        Data::U8(v) => v.as_mut_ptr(),
        Data::I8(v) => v.as_mut_ptr().cast(),
        Data::Bool(v) => v.as_mut_ptr().cast(),
        _ => std::ptr::null_mut(),
    }
}
