//! The graph IR: SSA over tensors, in regions of ordered ops.

pub mod attrs;
pub mod bind;
pub mod calls;
pub mod consts;
pub mod graph;
pub mod infer;
pub mod interp;
pub mod literal;
pub mod module;
pub mod parse;
pub mod poly;
pub mod print;
pub mod types;
pub mod verify;

pub use attrs::{Attr, Attrs};
pub use consts::{ConstData, ConstError, ConstId, ConstPool, Encoding, TensorSource};
pub use infer::Diagnostic;
pub use module::{
    Function, Meta, Module, Op, OpBuilder, OpData, OpName, Region, RegionData, Symbol, Use, Uses, Value,
    ValueData, ValueDef,
};
pub use types::{Dim, Elem, TensorType, Type};
