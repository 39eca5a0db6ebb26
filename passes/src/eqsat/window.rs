//! Windows: the ops that a question about a value is asked of.
//!
//! A window is the part of the region upstream of a value through which a scale can move, cut where nothing is
//! gained: behind an op that lets no scale through, behind one that takes the scale whole, and before a value that an
//! op outside the window reads too, since that value is needed as it is and a scaled copy would be paid on top.
//! Values that the window does not define are its inputs; what is read of it from outside are its roots.
//!
//! Rules about positions and masks ask how an input of the window was computed. A window of a whole rewrite carries the
//! ops in front of it that tell, its context: it is there to be looked at, and costs nothing.

use super::graph::{Graph, Id};
use super::rules;
use crate::const_fold;
use dialects::ir::{ConstId, Module, Op, OpData, Region, Use, Uses, Value};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, OnceLock};

/// At most this many ops. A window that reaches it is reported.
pub const LARGEST: usize = 200;

/// At most this many ops are in a context, those nearest to the window.
const CONTEXT: usize = 48;

/// A float constant of more elements is a weight: what is computed from it is no position and no mask.
const WEIGHT: u64 = 1024;

/// A region with what windows need to know of it.
pub struct Scope<'a> {
    pub(super) m: &'a Module,
    region: Region,
    uses: Uses,
    place: HashMap<Op, usize>,
    /// Found when first asked for: only rewriting of whole graphs asks.
    shared: OnceLock<Arc<HashSet<ConstId>>>,
    plain: OnceLock<HashSet<Op>>,
}

/// The ops, what is read of them, and where it was cut.
#[derive(Debug, Default)]
pub struct Window {
    /// Ops in program order, those on constants included.
    pub ops: Vec<Op>,
    /// Ops in front of it that tell how its inputs are computed, in program order.
    pub context: Vec<Op>,
    /// Values that are read from outside, the seeds first.
    pub roots: Vec<Value>,
    /// Why it ends where it does.
    pub stops: Vec<String>,
    /// Whether it reached [`LARGEST`].
    pub limited: bool,
}

/// Whether an op reads nothing of its operand but the shape.
fn reads_shape_only(data: &OpData) -> bool {
    data.is("onnx.Shape") || data.is("onnx.Size")
}

impl<'a> Scope<'a> {
    /// The scope of `region`.
    pub fn new(m: &'a Module, region: Region) -> Self {
        let place = m.regions[region].ops.iter().enumerate().map(|(i, &op)| (op, i)).collect();
        Scope { m, region, uses: m.uses(), place, shared: OnceLock::new(), plain: OnceLock::new() }
    }

    /// Where the definition of a value stands: its op's place plus one, zero for what is there from the start.
    pub fn place_of(&self, v: Value) -> usize {
        self.m.def_op(v).and_then(|(op, _)| self.place.get(&op)).map_or(0, |p| p + 1)
    }

    /// The uses of every value.
    pub fn uses(&self) -> &Uses {
        &self.uses
    }

    /// The constants that more than one op reads.
    pub fn shared(&self) -> Arc<HashSet<ConstId>> {
        let find = || {
            let mut readers: HashMap<ConstId, usize> = HashMap::new();
            for v in self.m.live_regions().into_iter().flat_map(|r| &self.m.regions[r].consts) {
                if let Some(c) = self.m.const_of(*v) {
                    *readers.entry(c).or_default() += self.uses.of(*v).len();
                }
            }
            Arc::new(readers.into_iter().filter(|r| r.1 > 1).map(|r| r.0).collect())
        };
        self.shared.get_or_init(find).clone()
    }

    /// Whether more than one op reads a constant.
    pub fn is_shared(&self, c: ConstId) -> bool {
        self.shared().contains(&c)
    }

    /// Whether a value is an output of the graph.
    pub fn is_output(&self, v: Value) -> bool {
        self.uses.of(v).iter().any(|u| matches!(u, Use::Result(..)))
    }

    /// The ops that read a value.
    pub fn readers(&self, v: Value) -> Vec<Op> {
        let op = |u: &Use| match u {
            Use::Operand(op, _) => Some(*op),
            Use::Result(..) => None,
        };
        self.uses.of(v).iter().filter_map(op).collect()
    }

    /// The place of the first op that reads a value and is not among `except`.
    pub fn first_reader(&self, v: Value, except: &HashSet<Op>) -> Option<usize> {
        let readers = self.uses.of(v).iter().filter_map(|u| match u {
            Use::Operand(op, _) if !except.contains(op) => Some(self.enclosing(*op)),
            _ => None,
        });
        readers.flatten().min()
    }

    /// The place of an op of this region, or of the op that holds the nested region it stands in.
    fn enclosing(&self, mut op: Op) -> Option<usize> {
        loop {
            if let Some(&p) = self.place.get(&op) {
                return Some(p);
            }
            op = self.m.regions[self.m.ops[op].region].parent?;
        }
    }

    /// Whether a value is computed from constants alone. Quantized weights do not count: they stay as they are.
    pub(super) fn constant(&self, v: Value, depth: usize) -> bool {
        if self.m.const_of(v).is_some() {
            return true;
        }
        let Some((op, _)) = self.m.def_op(v) else { return false };
        let data = &self.m.ops[op];
        depth > 0
            && data.region == self.region
            && data.name.dialect() == "onnx"
            && !data.name.op().ends_with("QuantizeLinear")
            && !data.name.op().ends_with("DequantizeLinear")
            && data.attrs.regions().next().is_none()
            && data.operands.iter().flatten().next().is_some()
            && data.operands.iter().flatten().all(|&o| self.constant(o, depth - 1))
    }

    /// The window upstream of `seed`, whose users `readers` want it scaled.
    pub fn upstream(&self, seed: Value, readers: &[Op]) -> Window {
        self.grow(&[seed], readers)
    }

    /// The window of `product` and of the ops that read it, in which it may move into their weights, and nowhere else.
    pub fn around(&self, product: Value) -> Window {
        let mul = self.m.def_op(product).map(|(op, _)| op);
        self.finish(Window::default(), &self.readers(product).into_iter().chain(mul).collect())
    }

    /// The window of these ops, which follow each other, and its context.
    pub fn run(&self, ops: &[Op]) -> Window {
        let (roots, context) = (self.roots(&[], ops), self.context(ops));
        Window { ops: ops.to_vec(), context, roots, ..Window::default() }
    }

    /// The ops that the inputs of `ops` are computed by, as far as no weight is behind them: positions, masks, sizes.
    fn context(&self, ops: &[Op]) -> Vec<Op> {
        let m = self.m;
        let plain = self.plain.get_or_init(|| self.without_weights());
        let inside: HashSet<Op> = ops.iter().copied().collect();
        let mut found: BTreeSet<(usize, Op)> = BTreeSet::new();
        let mut todo: VecDeque<Value> =
            ops.iter().flat_map(|&op| m.ops[op].operands.iter().flatten().copied()).collect();
        while let Some(v) = todo.pop_front() {
            let Some((op, _)) = m.def_op(v).filter(|(op, _)| plain.contains(op) && !inside.contains(op))
            else {
                continue;
            };
            if found.len() < CONTEXT && found.insert((self.place_of(v), op)) {
                todo.extend(m.ops[op].operands.iter().flatten());
            }
        }
        found.into_iter().map(|(_, op)| op).collect()
    }

    /// The ops of the region that depend on inputs of the graph and on no weight.
    fn without_weights(&self) -> HashSet<Op> {
        let m = self.m;
        let mut plain: HashSet<Op> = HashSet::new();
        for &op in &m.regions[self.region].ops {
            let data = &m.ops[op];
            let light = |v: &Value| match (m.const_of(*v), m.def_op(*v)) {
                (Some(c), _) => !m.consts[c].elem.is_float() || m.consts[c].count() <= WEIGHT,
                (None, Some((def, _))) => plain.contains(&def),
                (None, None) => true,
            };
            let computed = data.operands.iter().flatten().any(|v| m.const_of(*v).is_none());
            if computed
                && data.attrs.regions().next().is_none()
                && !const_fold::is_random(data)
                && data.operands.iter().flatten().all(light)
            {
                plain.insert(op);
            }
        }
        plain
    }

    /// The window of the ops `readers` and of what computes their constants.
    pub fn of_readers(&self, readers: &[Op]) -> Window {
        self.finish(Window::default(), &readers.iter().copied().collect())
    }

    /// Whether an op stands in this region.
    pub(super) fn here(&self, op: Op) -> bool {
        self.place.contains_key(&op)
    }

    /// The window of the ops `inside`, with what computes their constants; `w` has its seeds as roots.
    pub(super) fn finish(&self, mut w: Window, inside: &BTreeSet<Op>) -> Window {
        let mut ops = inside.iter().filter_map(|op| Some((*self.place.get(op)? + 1, *op))).collect();
        self.close(&mut w, &mut ops);
        w
    }

    /// Grows upstream from `seeds`.
    fn grow(&self, seeds: &[Value], readers: &[Op]) -> Window {
        let m = self.m;
        let mut w = Window::default();
        let mut inside: BTreeMap<usize, Op> = BTreeMap::new();
        let mut shapes: Vec<Op> = Vec::new();
        // Latest definitions first: when a value's turn comes, every op of the window that reads it is there.
        let mut front: BinaryHeap<(usize, Value)> = seeds.iter().map(|&v| (self.place_of(v), v)).collect();
        while let Some((place, v)) = front.pop() {
            let Some((op, _)) = m.def_op(v).filter(|(op, _)| self.place.contains_key(op)) else {
                w.stops.push(format!("{:?} is an input", m.value_label(v)));
                continue;
            };
            if inside.contains_key(&place) {
                continue;
            }
            let seed = seeds.contains(&v);
            let ours = |o: &Op| inside.values().any(|i| i == o) || (seed && readers.contains(o));
            let other = self.uses.of(v).iter().find_map(|u| match u {
                Use::Operand(o, _) if ours(o) || reads_shape_only(&m.ops[*o]) => None,
                Use::Operand(o, _) => {
                    Some(format!("{} {:?} reads it too", m.ops[*o].name.op(), &*m.ops[*o].loc))
                }
                Use::Result(..) => Some("it is an output of the graph".to_string()),
            });
            if let Some(other) = other {
                w.stops.push(format!("{:?} is needed as it is: {other}", m.value_label(v)));
                continue;
            }
            let data = &m.ops[op];
            let name = rules::short(data.name.as_str());
            let mut through = rules::scale_operands(name, data.operands.len());
            if through.is_empty() && !rules::takes_scale(name) {
                w.stops.push(format!("{} {:?} lets no scale through", data.name.op(), &*data.loc));
                continue;
            }
            if inside.len() >= LARGEST {
                w.limited = true;
                continue;
            }
            inside.insert(place, op);
            for u in self.uses.of(v) {
                if let Use::Operand(o, _) = u
                    && reads_shape_only(&m.ops[*o])
                    && m.ops[*o].region == self.region
                {
                    shapes.push(*o);
                }
            }
            if data.is("onnx.MatMul") {
                // A scale per channel goes to the right operand; a constant there takes it.
                through = vec![1];
            }
            for v in through.into_iter().filter_map(|i| data.operand(i)) {
                if !self.constant(v, 8) {
                    front.push((self.place_of(v), v));
                }
            }
        }
        inside.extend(shapes.into_iter().map(|op| (self.place[&op] + 1, op)));
        w.roots = seeds.to_vec();
        self.close(&mut w, &mut inside);
        w
    }

    /// Makes the ops `inside` those of the window, with the ops that compute their operands from constants, and finds
    /// what is read of it.
    fn close(&self, w: &mut Window, inside: &mut BTreeMap<usize, Op>) {
        let m = self.m;
        let mut todo: Vec<Value> =
            inside.values().flat_map(|&o| m.ops[o].operands.iter().flatten().copied()).collect();
        while let Some(v) = todo.pop() {
            if let Some((op, _)) = m.def_op(v)
                && m.const_of(v).is_none()
                && self.constant(v, 8)
                && inside.insert(self.place_of(v), op).is_none()
            {
                todo.extend(m.ops[op].operands.iter().flatten());
            }
        }
        w.ops = std::mem::take(inside).into_values().collect();
        w.roots = self.roots(&w.roots, &w.ops);
    }

    fn roots(&self, seeds: &[Value], ops: &[Op]) -> Vec<Value> {
        let inside: HashSet<Op> = ops.iter().copied().collect();
        let results = ops.iter().flat_map(|&o| self.m.ops[o].results.iter().flatten().copied());
        let read = |v: &Value| {
            self.uses.of(*v).iter().any(|u| !matches!(u, Use::Operand(o, _) if inside.contains(o)))
        };
        let mut roots = seeds.to_vec();
        roots.extend(results.filter(|v| !seeds.contains(v) && read(v)));
        roots
    }
}

impl Window {
    /// Adds the window to an empty graph. Returns the class of each root.
    pub fn build(&self, g: &mut Graph) -> Vec<Id> {
        self.build_on(g, HashMap::new())
    }

    /// Adds the window to a graph, where the values in `classes`, which are its inputs, have these classes.
    pub fn build_on(&self, g: &mut Graph, mut classes: HashMap<Value, Id>) -> Vec<Id> {
        for &op in &self.context {
            g.given(op, &mut classes);
        }
        g.add_ops(&self.ops, &mut classes);
        self.roots.iter().map(|&v| *classes.entry(v).or_insert_with(|| g.leaf(v))).collect()
    }
}
