//! Memory planned ahead: where every value of a compiled model lies, for the largest sizes that it is built for.
//!
//! All intermediate values and temporaries share one arena. A value's place is free again after the last step that reads
//! it; a new one takes the lowest place where it fits (first fit, in the order of the steps).

use crate::fuse::{self, Fused};
use crate::kernels::{Blob, Buffer, Kernel, Lowered};
use crate::{Size, Target, layout, lower, memory};
use dialects::ir::{Elem, Module, Op, Value};
use dialects::ops::Ops;
use std::collections::{BTreeMap, HashMap, HashSet};
use thiserror::Error;

/// Buffers begin at multiples of a cache line; the weights' first one holds their hash.
pub const ALIGN: u64 = 64;

/// Why a model cannot be compiled as a whole.
#[derive(Clone, Debug, Error)]
pub enum PlanError {
    /// Ops that no kernel does.
    #[error("no kernel for {}", list(ops))]
    NoKernel {
        /// The ops, with their source nodes.
        ops: Vec<(String, String)>,
    },
    /// A dim of an input without a bound.
    #[error("the dim {dim:?} has no bound, expected the greatest size to build for")]
    Unbounded {
        /// The dim.
        dim: String,
    },
    /// A value whose type is not known well enough, or not one that kernels know.
    #[error("{value:?} has type {ty}, expected a tensor of f32, i64, i32 or bool with known or named dims")]
    Type {
        /// The value.
        value: String,
        /// Its type.
        ty: String,
    },
    /// A size that no input has.
    #[error("the dim {dim:?} at node {node:?} is no dim of an input")]
    Unknown {
        /// The dim.
        dim: String,
        /// The source node.
        node: String,
    },
    /// An output that no kernel would write.
    #[error("the output {output:?} is an input, a constant, or another output")]
    Output {
        /// The output.
        output: String,
    },
    /// Sizes beyond what can be counted.
    #[error("the model is too large at these bounds")]
    TooLarge,
}

fn list(ops: &[(String, String)]) -> String {
    let shown: Vec<String> = ops.iter().take(8).map(|(op, node)| format!("{op} at node {node:?}")).collect();
    let more = ops.len().saturating_sub(8);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    shown.join(", ") + &tail
}

/// Where a buffer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The input of this number.
    Input(usize),
    /// The output of this number.
    Output(usize),
    /// So far into the arena.
    Arena(u64),
    /// So far into the weights.
    Weights(u64),
    /// The word for faults.
    Fault,
}

/// A kernel called on all its units.
#[derive(Clone, Debug)]
pub struct PlannedStep {
    /// The kernel's name.
    pub kernel: String,
    /// The source node of the first op that it does.
    pub node: String,
    /// Its buffers.
    pub buffers: Vec<Place>,
    /// Its sizes.
    pub dims: Vec<Size>,
    /// Its units.
    pub units: Size,
    /// What a unit takes.
    pub work: Size,
}

/// An input or output.
#[derive(Clone, Debug)]
pub struct Port {
    /// The name.
    pub name: String,
    /// The element type.
    pub elem: Elem,
    /// The dims.
    pub shape: Vec<Size>,
}

/// A whole model, ready to be emitted.
pub struct Plan {
    /// Inputs in order.
    pub inputs: Vec<Port>,
    /// Outputs in order.
    pub outputs: Vec<Port>,
    /// Named dims, each with its bound, sorted by name.
    pub dims: Vec<(String, u64)>,
    /// The code for each target, the one that asks for most last.
    pub versions: Vec<Version>,
    /// Bytes of the arena that every version can do with.
    pub arena: u64,
    /// Constant bytes, each with its place; versions that read the same bytes share them.
    pub blobs: Vec<(u64, Blob)>,
    /// Bytes of all of them.
    pub weights: u64,
}

/// A model's code for one target.
pub struct Version {
    /// The target.
    pub target: Target,
    /// Kernels, each once.
    pub kernels: Vec<Kernel>,
    /// Steps in order.
    pub steps: Vec<PlannedStep>,
    /// Bytes of the arena.
    pub arena: u64,
    /// Bytes of constants that no version before this one reads.
    pub weights: u64,
}

fn align(n: u64) -> Option<u64> {
    n.checked_next_multiple_of(ALIGN)
}

/// Places in the arena that are taken.
#[derive(Default)]
struct Arena {
    /// Start and end, sorted.
    taken: Vec<(u64, u64)>,
    top: u64,
}

impl Arena {
    fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = align(bytes.max(1))?;
        let mut at = 0;
        let mut slot = self.taken.len();
        for (i, &(from, to)) in self.taken.iter().enumerate() {
            if from - at >= bytes {
                slot = i;
                break;
            }
            at = to;
        }
        let end = at.checked_add(bytes)?;
        self.taken.insert(slot, (at, end));
        self.top = self.top.max(end);
        Some(at)
    }

    fn free(&mut self, at: u64) {
        self.taken.retain(|t| t.0 != at);
    }
}

/// Plans `m` for each of `targets`, of one architecture, of which the first is the one that asks for least. `bound` gives
/// the greatest size of a named dim.
pub fn plan(
    m: &Module,
    ops: &Ops,
    targets: &[Target],
    bound: &dyn Fn(&str) -> Option<u64>,
) -> Result<Plan, PlanError> {
    let mut m = m.clone();
    fuse::infer(&mut m, ops);
    let mut out = interface(&m, bound)?;
    let mut places = HashMap::new();
    for target in targets {
        let mut m = m.clone();
        fuse::fuse(&mut m, target, &HashSet::new());
        let mut version = self::version(&m, target, &mut out, &mut places)?;
        if targets.len() > 1 {
            version.rename();
        }
        out.arena = out.arena.max(version.arena);
        out.versions.push(version);
    }
    Ok(out)
}

/// What a run is given.
fn args(m: &Module) -> impl Iterator<Item = Value> {
    m.regions[m.top].args.iter().copied().filter(|&v| m.const_of(v).is_none())
}

fn port(m: &Module, v: Value) -> Result<Port, PlanError> {
    let data = &m.values[v];
    let wrong = || PlanError::Type { value: data.name.to_string(), ty: data.ty.to_string() };
    let elem = data.ty.elem().filter(|&e| memory::size(e).is_some()).ok_or_else(wrong)?;
    let shape = Size::shape(&data.ty).ok_or_else(wrong)?;
    Ok(Port { name: data.name.to_string(), elem, shape })
}

/// A plan without code: what goes in and comes out of a module whose types are inferred.
fn interface(m: &Module, bound: &dyn Fn(&str) -> Option<u64>) -> Result<Plan, PlanError> {
    let mut dims: BTreeMap<String, u64> = BTreeMap::new();
    let inputs: Vec<Port> = args(m).map(|v| port(m, v)).collect::<Result<_, _>>()?;
    let results = m.regions[m.top].results.iter();
    let outputs: Vec<Port> = results.map(|&v| port(m, v)).collect::<Result<_, _>>()?;
    for size in inputs.iter().flat_map(|p| &p.shape) {
        if let Some(name) = size.name() {
            let bound = bound(name).ok_or_else(|| PlanError::Unbounded { dim: name.to_owned() })?;
            dims.insert(name.to_owned(), bound);
        }
    }
    let dims = dims.into_iter().collect();
    let (versions, blobs) = (Vec::new(), Vec::new());
    Ok(Plan { inputs, outputs, dims, versions, arena: ALIGN, blobs, weights: ALIGN })
}

impl Version {
    /// Names that no other version has: the same text becomes other code there.
    fn rename(&mut self) {
        let suffix = self.target.symbol();
        self.kernels.iter_mut().for_each(|k| k.rename(&suffix));
        self.steps.iter_mut().for_each(|s| s.kernel = format!("{}_{suffix}", s.kernel));
    }
}

/// The code of a fused module for `target`; its constants go to those of `out`, which `places` finds.
fn version(
    m: &Module,
    target: &Target,
    out: &mut Plan,
    places: &mut HashMap<blake3::Hash, u64>,
) -> Result<Version, PlanError> {
    let dims: BTreeMap<String, u64> = out.dims.iter().cloned().collect();
    let lowered = lower_all(m, target)?;
    for (op, l) in &lowered {
        let made = m.ops[*op].results.iter().flatten().filter_map(|&v| Size::shape(m.ty(v))).flatten();
        let made: Vec<Size> = made.collect();
        let names = made.iter().flat_map(Size::names).chain(l.iter().flat_map(Lowered::names));
        if let Some(dim) = names.into_iter().find(|n| !dims.contains_key(*n)) {
            let node = m.ops[*op].loc.to_string();
            return Err(PlanError::Unknown { dim: dim.to_owned(), node });
        }
    }
    let bytes = |v: Value| -> Result<u64, PlanError> {
        let p = port(m, v)?;
        let unit = memory::size(p.elem).ok_or(PlanError::TooLarge)?;
        let count = Size::product(&p.shape).most(&|d| dims.get(d).copied()).ok_or(PlanError::TooLarge)?;
        count.checked_mul(unit).ok_or(PlanError::TooLarge)
    };
    let (kernels, steps, before) = (Vec::new(), Vec::new(), out.weights);
    let mut version = Version { target: target.clone(), kernels, steps, arena: 0, weights: 0 };
    version.arena = place(m, lowered, &bytes, &dims, (out, &mut version, places))?;
    version.weights = out.weights - before;
    Ok(version)
}

/// The kernels of every op that computes anything.
fn lower_all(m: &Module, target: &Target) -> Result<Vec<(Op, Option<Lowered>)>, PlanError> {
    let mut left = Vec::new();
    let mut out = Vec::new();
    let mut needed: HashSet<Value> = m.regions[m.top].results.iter().copied().collect();
    for &op in m.regions[m.top].ops.iter().rev() {
        let data = &m.ops[op];
        if !data.results.iter().flatten().any(|v| needed.contains(v)) {
            continue;
        }
        if m.is_const(op) {
            continue;
        }
        if layout::is_same(m, op) {
            needed.extend(data.operand(0));
            out.push((op, None));
            continue;
        }
        match lower::lower(m, op, target) {
            Some(l) => {
                // What only says how large a result is was read at build time.
                let read = l.steps.iter().flat_map(|s| &s.buffers).filter_map(|b| match b {
                    Buffer::Operand(i) => data.operands[*i],
                    _ => None,
                });
                needed.extend(read);
                out.push((op, Some(l)));
            }
            None => {
                needed.extend(data.operands.iter().flatten());
                left.extend(fuse::members(m, op));
            }
        }
    }
    left.reverse();
    out.reverse();
    if left.is_empty() { Ok(out) } else { Err(PlanError::NoKernel { ops: left }) }
}

/// Gives every value its place, and makes the steps. The bytes of the arena.
fn place(
    m: &Module,
    lowered: Vec<(Op, Option<Lowered>)>,
    bytes: &dyn Fn(Value) -> Result<u64, PlanError>,
    dims: &BTreeMap<String, u64>,
    (out, version, blobs): (&mut Plan, &mut Version, &mut HashMap<blake3::Hash, u64>),
) -> Result<u64, PlanError> {
    // A view is the value it looks at.
    let mut root: HashMap<Value, Value> = HashMap::new();
    for (op, l) in &lowered {
        if let (None, Some(from), Some(to)) = (l, m.ops[*op].operand(0), m.ops[*op].result(0)) {
            root.insert(to, *root.get(&from).unwrap_or(&from));
        }
    }
    let of = |v: Value| *root.get(&v).unwrap_or(&v);
    let mut last: HashMap<Value, usize> = HashMap::new();
    for (i, (op, _)) in lowered.iter().enumerate() {
        for &v in m.ops[*op].operands.iter().flatten() {
            last.insert(of(v), i);
        }
    }
    let mut places: HashMap<Value, Place> = args(m).enumerate().map(|(i, v)| (v, Place::Input(i))).collect();
    let results = &m.regions[m.top].results;
    let mut emitted: HashSet<String> = HashSet::new();
    let mut arena = Arena::default();
    for (i, (op, l)) in lowered.into_iter().enumerate() {
        let data = &m.ops[op];
        let Some(l) = l else { continue };
        for &v in data.results.iter().flatten() {
            let output = results.iter().position(|&r| of(r) == v);
            let at = match output {
                Some(o) => Place::Output(o),
                None => Place::Arena(arena.take(bytes(v)?).ok_or(PlanError::TooLarge)?),
            };
            places.insert(v, at);
        }
        let temps = l.temps.iter().map(|t| {
            let size = t.most(&|d| dims.get(d).copied()).ok_or(PlanError::TooLarge)?;
            arena.take(size).ok_or(PlanError::TooLarge)
        });
        let temps: Vec<u64> = temps.collect::<Result<_, _>>()?;
        let mut own = Vec::new();
        for blob in l.blobs {
            let hash = blake3::hash(&blob.bytes);
            let at = match blobs.get(&hash) {
                Some(&at) => at,
                None => {
                    let at = out.weights;
                    let size = align(blob.bytes.len() as u64).ok_or(PlanError::TooLarge)?;
                    out.weights = at.checked_add(size).ok_or(PlanError::TooLarge)?;
                    blobs.insert(hash, at);
                    out.blobs.push((at, blob));
                    at
                }
            };
            own.push(at);
        }
        let fused = Fused::of(m, op);
        for s in l.steps {
            let buffers = s.buffers.iter().map(|b| match b {
                Buffer::Operand(i) => {
                    places[&of(data.operands[*i].expect("a kernel's operands are all there"))]
                }
                Buffer::Result(i) => places[&data.results[*i].expect("a kernel's results are all there")],
                Buffer::Blob(i) => Place::Weights(own[*i]),
                Buffer::Temp(i) => Place::Arena(temps[*i]),
                Buffer::Fault => Place::Fault,
            });
            version.steps.push(PlannedStep {
                kernel: s.kernel.name.clone(),
                node: fused.as_ref().map_or_else(|| data.loc.to_string(), |f| f.node()),
                buffers: buffers.collect(),
                dims: s.dims,
                units: s.units,
                work: s.work,
            });
            if emitted.insert(s.kernel.name.clone()) {
                version.kernels.push(s.kernel);
            }
        }
        temps.into_iter().for_each(|at| arena.free(at));
        for (&v, _) in last.iter().filter(|(_, l)| **l == i) {
            if let Some(Place::Arena(at)) = places.get(&v) {
                arena.free(*at);
            }
        }
    }
    // What comes out without being computed has no kernel that would write it.
    let computed = |v: &Value| matches!(places.get(&of(*v)), Some(Place::Output(_)));
    let mut seen = HashSet::new();
    if let Some(&v) = results.iter().find(|v| !computed(v) || !seen.insert(of(**v))) {
        return Err(PlanError::Output { output: m.value_label(v) });
    }
    Ok(arena.top)
}
