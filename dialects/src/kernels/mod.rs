//! The inner loops that ops share. Every kernel gives the same bits for any number of threads: work is cut into
//! tiles of a size that depends on shapes alone, and a float sum is never split over threads.

pub mod attention;
pub mod buffers;
pub mod gemm;
pub mod math;
pub mod minifloat;
pub mod packed;
pub(crate) mod real;
pub mod rotary;
pub mod row;
pub mod strided;
