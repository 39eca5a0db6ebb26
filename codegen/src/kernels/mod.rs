//! The kernels: one file per family, each a pure function from shapes and a target to MLIR text.
//!
//! Every kernel is a function `(bufs: ptr, dims: ptr, begin: i64, end: i64)`: a table of pointers, a table of sizes, and
//! the units of work it is to do. Units are independent of each other and each is computed in one order, so results do not
//! depend on how they are divided among threads.

pub mod attention;
pub mod attention_tiles;
mod attention_weights;
pub mod batched;
pub mod coded;
pub mod conv;
pub mod copy;
pub mod dense;
pub mod elementwise;
pub mod epilogue;
mod fours;
pub mod gather;
pub mod gather_packed;
pub mod heads;
pub mod integer;
mod lanes;
pub mod math;
pub mod matmul_nbits;
pub mod norm;
pub mod packed;
pub mod packed_product;
mod packed_tiles;
pub mod panel;
mod panel_tiles;
pub mod planes;
pub mod pointwise;
pub mod pool;
pub mod quantize;
pub mod range;
pub mod reduce;
pub mod rotary;
pub mod sizes;
pub mod softmax;

use crate::size::Size;
use crate::target::Target;
use crate::text::{Body, Scalar, Val, scalar, stand_ins};
use runtime::Fault;
use std::collections::BTreeSet;

/// The text of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The function's name: the family and a hash of the text, so that equal kernels are one.
    pub name: String,
    /// The function.
    pub text: String,
}

/// A buffer that a kernel reads or writes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Buffer {
    /// An operand of the op that is lowered.
    Operand(usize),
    /// A result of it.
    Result(usize),
    /// Bytes prepared at build time (see [`Lowered::blobs`]).
    Blob(usize),
    /// Memory between the steps of one op (see [`Lowered::temps`]).
    Temp(usize),
    /// One i32, 0 before the run, to which kernels write what is wrong with the data (see [`report`]).
    Fault,
}

/// One kernel, called on all its units.
#[derive(Clone, Debug)]
pub struct Step {
    /// The kernel.
    pub kernel: Kernel,
    /// What it reads and writes, in the order it expects.
    pub buffers: Vec<Buffer>,
    /// The sizes it expects.
    pub dims: Vec<Size>,
    /// How many units there are.
    pub units: Size,
    /// What a unit takes, in nanoseconds or so: little work is not worth another thread.
    pub work: Size,
}

/// An op as kernels.
#[derive(Clone, Debug, Default)]
pub struct Lowered {
    /// Kernels in order.
    pub steps: Vec<Step>,
    /// Bytes of each temporary buffer.
    pub temps: Vec<Size>,
    /// Constant bytes: repacked weights.
    pub blobs: Vec<Blob>,
}

impl Lowered {
    /// Every named dim that the kernels' sizes depend on.
    pub fn names(&self) -> BTreeSet<&str> {
        let steps = self.steps.iter().flat_map(|s| s.dims.iter().chain([&s.units, &s.work]));
        steps.chain(&self.temps).flat_map(Size::names).collect()
    }
}

/// Constant bytes, made when they are asked for.
#[derive(Clone, Debug)]
pub struct Blob {
    /// The bytes.
    pub bytes: std::sync::Arc<[u8]>,
}

/// What the text of a kernel sees of its arguments.
pub struct Args {
    bufs: Val,
    dims: Val,
    /// The first unit.
    pub begin: Val,
    /// The end of the units.
    pub end: Val,
}

impl Args {
    /// Buffer `i`.
    pub fn buffer(&self, b: &mut Body, i: usize) -> Val {
        let slot = b.at_const(self.bufs, 8 * i);
        b.load(slot, scalar(Scalar::Ptr))
    }

    /// Size `i`.
    pub fn dim(&self, b: &mut Body, i: usize) -> Val {
        let slot = b.at_const(self.dims, 8 * i);
        b.load(slot, scalar(Scalar::I64))
    }
}

/// Writes `fault` to the buffer [`Buffer::Fault`]. The kernel goes on, without reading what it must not; the run fails
/// when it is over.
pub fn report(b: &mut Body, word: Val, fault: Fault) {
    let number = b.int(Scalar::I32, fault as i64);
    b.store_shared(number, word);
}

impl Kernel {
    /// The kernel of this family that `write` writes.
    pub fn new(target: &Target, family: &str, write: impl FnOnce(&mut Body, &Args)) -> Kernel {
        let params = [Scalar::Ptr, Scalar::Ptr, Scalar::I64, Scalar::I64].map(scalar);
        let text = Body::function(target, "NAME", &params, |b, p| {
            write(b, &Args { bufs: p[0], dims: p[1], begin: p[2], end: p[3] })
        });
        let hash = blake3::hash(text.as_bytes()).to_hex();
        let name = format!("{family}_{}", &hash[..12]);
        let text = text.replacen("@NAME(", &format!("@{name}("), 1);
        Kernel { name, text }
    }
}

impl Kernel {
    /// Adds to the name.
    pub fn rename(&mut self, suffix: &str) {
        let name = format!("{}_{suffix}", self.name);
        self.text = self.text.replacen(&format!("@{}(", self.name), &format!("@{name}("), 1);
        self.name = name;
    }
}

/// One MLIR module of these kernels; of equal ones the first.
pub fn module<'a>(kernels: impl IntoIterator<Item = &'a Kernel>) -> String {
    let mut seen = std::collections::BTreeMap::new();
    for k in kernels {
        seen.entry(&k.name).or_insert(&k.text);
    }
    let text: String = seen.into_values().map(String::as_str).collect();
    format!("module {{\n{}{text}}}\n", stand_ins(&text))
}
