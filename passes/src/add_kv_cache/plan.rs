//! Which views of which values the cached model computes, and how: found from the outputs back to the inputs.
//!
//! A value is *main* when its contents depend on the tokens. Of these only the new positions are computed, but for keys
//! and values, to which the past is joined. All others (positions, masks, tables) are computed as if the sequence were
//! past and new positions together, and where a main op reads them by rows, the rows of the new positions are taken.

use super::rules::{Facts, RESHAPES, View, WHOLE, axis};
use super::sizes::{Size, Sizes};
use dialects::ir::{Module, Op, Value, graph};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// How a view of a value is made.
#[derive(Clone, Debug, PartialEq)]
pub enum Make {
    /// As it was: it does not depend on the length of the sequence.
    Keep,
    /// By its op, at this view.
    Op,
    /// By cutting the whole value.
    Cut,
    /// It holds lengths, of the axes of this value from the first number up to the second.
    Lengths(Value, usize, usize),
    /// By joining the past to the view of the new positions.
    Join(Layout),
}

/// How an op is made at a view.
#[derive(Clone, Debug)]
pub struct Emit {
    /// The views of its operands.
    pub operands: Vec<View>,
    /// For an attention op that takes past keys and values itself: where.
    pub takes: Option<Takes>,
    /// Whether a causal flag is to become a mask.
    pub masked: bool,
}

/// The operands and results by which an attention op takes a past, and the shapes of its keys and values.
#[derive(Clone, Debug)]
pub struct Takes {
    /// Operands of the past key and value.
    pub operands: [usize; 2],
    /// Heads, and elements of one, of keys and of values.
    pub heads: [[i64; 2]; 2],
}

/// Where the parts of keys or values lie: `[batch, heads, positions, size]` but for the order, and axes of one element.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// The axes of one element that are dropped.
    pub ones: Vec<i64>,
    /// The order of the remaining axes that puts them as they are to be.
    pub perm: Vec<i64>,
    /// Whether there is no axis of heads.
    pub single: bool,
    /// Heads.
    pub heads: i64,
    /// Elements of a head.
    pub size: i64,
}

/// One layer's keys and values.
#[derive(Clone, Debug)]
pub enum Layer {
    /// They are joined to the past before these values are read.
    Joined([Value; 2]),
    /// The op takes the past itself.
    Taken(Op),
}

/// What is wrong with a node or value.
pub struct Stuck {
    /// Its name.
    pub what: String,
    /// What was expected and what was found.
    pub why: String,
}

/// The plan.
pub struct Plan {
    /// The views of each value.
    pub values: HashMap<Value, BTreeMap<View, Make>>,
    /// The views of each op.
    pub ops: HashMap<Op, BTreeMap<View, Emit>>,
    /// The layers, in program order.
    pub layers: Vec<Layer>,
    /// Products of attention scores with values: what must be causal.
    pub contexts: Vec<Op>,
    /// Views of values that do not depend on the tokens, but on their number, and which ops read that do.
    pub border: BTreeSet<(Value, View)>,
}

/// Values that depend on the contents of `sources`, and those that depend on the length of the sequence alone.
pub fn dependence(m: &Module, inputs: &[Value], rows: &HashSet<Value>) -> (HashSet<Value>, HashSet<Value>) {
    let (mut main, mut varies) = (rows.clone(), HashSet::new());
    varies.extend(inputs.iter().copied().filter(|v| !rows.contains(v)));
    for &op in &m.regions[m.top].ops {
        let data = &m.ops[op];
        let reads = graph::reads(m, op);
        let sizes_only = data.is("onnx.Shape") || data.is("onnx.Size");
        let set = match () {
            _ if !sizes_only && reads.iter().any(|v| main.contains(v)) => &mut main,
            _ if reads.iter().any(|v| main.contains(v) || varies.contains(v)) => &mut varies,
            _ => continue,
        };
        set.extend(data.results.iter().flatten());
    }
    (main, varies)
}

/// More axes than a tensor has.
const LAST: usize = super::rules::RANK;

/// What the search for a plan works with.
pub struct Planner<'a> {
    facts: Facts<'a>,
    varies: &'a HashSet<Value>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    /// A search over `m`.
    pub fn new(
        m: &'a Module,
        sizes: &'a Sizes,
        main: &'a HashSet<Value>,
        varies: &'a HashSet<Value>,
    ) -> Self {
        let plan = Plan {
            values: HashMap::new(),
            ops: HashMap::new(),
            layers: Vec::new(),
            contexts: Vec::new(),
            border: BTreeSet::new(),
        };
        Planner { facts: Facts { m, sizes, main }, varies, plan }
    }

    /// Finds a plan, or the node at which there is none.
    pub fn run(mut self) -> Result<Plan, Stuck> {
        let m = self.facts.m;
        for &v in &m.regions[m.top].results {
            let along = self.facts.sizes.along(v);
            let ([at], true) = (&along[..], self.facts.main.contains(&v)) else {
                let what = m.value_label(v);
                let why = format!(
                    "expected an output [batch, sequence, ...] computed from tokens, found {}",
                    m.ty(v)
                );
                return Err(Stuck { what, why });
            };
            self.want(v, axis(*at));
        }
        let order = m.regions[m.top].ops.clone();
        for &op in order.iter().rev() {
            self.visit(op).map_err(|why| {
                let data = &m.ops[op];
                Stuck { what: data.loc.to_string(), why: format!("{}: {why}", data.name) }
            })?;
        }
        self.inputs()?;
        self.layers(&order)?;
        self.plan.contexts.reverse();
        Ok(self.plan)
    }

    fn want(&mut self, v: Value, view: View) {
        self.plan.values.entry(v).or_default().entry(view).or_insert(Make::Op);
    }

    fn visit(&mut self, op: Op) -> Result<(), String> {
        let results: Vec<Value> = self.facts.m.ops[op].results.iter().flatten().copied().collect();
        for v in results {
            let mut todo: Vec<View> =
                self.plan.values.get(&v).into_iter().flat_map(|w| w.keys().copied()).collect();
            let mut done = BTreeSet::new();
            while let Some(view) = todo.pop() {
                if !done.insert(view) {
                    continue;
                }
                let make = self.decide(op, v, view)?;
                match &make {
                    Make::Cut => todo.push(WHOLE),
                    Make::Join(_) => todo.push(axis(self.facts.sizes.along(v)[0])),
                    Make::Op => self.emit(op, view)?,
                    Make::Keep | Make::Lengths(..) => {}
                }
                self.plan.values.entry(v).or_default().insert(view, make);
            }
        }
        Ok(())
    }

    /// How a view of a result of `op` is made.
    fn decide(&self, op: Op, v: Value, view: View) -> Result<Make, String> {
        let (m, data) = (self.facts.m, &self.facts.m.ops[op]);
        if self.facts.main.contains(&v) {
            let along = self.facts.sizes.along(v);
            return match along[..] {
                [_] if view == WHOLE => Ok(match self.joint(v) {
                    Some((at, layout)) if at == v => Make::Join(layout),
                    _ => Make::Op,
                }),
                [a] if view == axis(a) => Ok(Make::Op),
                [a, b] if view == axis(a) || view == axis(b) => Ok(Make::Op),
                _ => Err(self.facts.operands(op, view).err().unwrap_or_else(|| {
                    let (n, ty) = (along.len(), m.ty(v));
                    format!(
                        "expected a result with the sequence along one axis, or along two as attention's scores have \
                         it, found {n} of it in {ty}"
                    )
                })),
            };
        }
        if !self.varies.contains(&v) {
            return Ok(Make::Keep);
        }
        if data.is("onnx.Shape") {
            let x = data.operand(0).ok_or("an operand is missing")?;
            if let Some(sizes) = self.facts.sizes.of(x) {
                let rank = sizes.len() as i64;
                let end = |name: &str, default: i64| {
                    let n = data.attrs.int(name).unwrap_or(default);
                    (if n < 0 { n + rank } else { n }).clamp(0, rank) as usize
                };
                let (from, to) = (end("start", 0), end("end", rank));
                if sizes.get(from..to).is_some_and(|s| s.iter().all(Option::is_some)) {
                    return Ok(Make::Lengths(x, from, to));
                }
            }
        }
        if data.operands.iter().flatten().any(|v| self.facts.main.contains(v)) {
            return Err("expected known lengths of all axes".into());
        }
        Ok(match view == WHOLE || self.facts.operands(op, view).is_ok() {
            true => Make::Op,
            false => Make::Cut,
        })
    }

    /// Notes what the op reads at a view.
    fn emit(&mut self, op: Op, view: View) -> Result<(), String> {
        if self.plan.ops.get(&op).is_some_and(|w| w.contains_key(&view)) {
            return Ok(());
        }
        let m = self.facts.m;
        let data = &m.ops[op];
        if data.attrs.regions().next().is_some() {
            return Err("a nested graph that depends on the sequence".into());
        }
        let main = data.results.iter().flatten().any(|v| self.facts.main.contains(v));
        let emit = match data.name.as_str() {
            "onnx.Attention" if main => self.attention(op, view, 3, [4, 5])?,
            "com.microsoft.MultiHeadAttention" if main => self.attention(op, view, 5, [6, 7])?,
            _ => {
                let operands = match main || view != WHOLE {
                    true => self.facts.operands(op, view)?,
                    false => vec![WHOLE; data.operands.len()],
                };
                if main && data.is("onnx.MatMul") {
                    self.context(op, &operands)?;
                }
                Emit { operands, takes: None, masked: false }
            }
        };
        // The shapes of views are made anew.
        let shape = matches!(data.name.as_str(), "onnx.Reshape" | "onnx.Expand") && (main || view != WHOLE);
        let reads = data.operands.iter().zip(&emit.operands).enumerate();
        let reads: Vec<(Value, View)> =
            reads.filter(|(i, _)| !(shape && *i == 1)).filter_map(|(_, (v, &w))| Some(((*v)?, w))).collect();
        for (v, view) in reads {
            if main && self.varies.contains(&v) {
                self.plan.border.insert((v, view));
            }
            self.want(v, view);
        }
        self.plan.ops.entry(op).or_default().insert(view, emit);
        Ok(())
    }

    /// Notes a product that sums over the sequence.
    fn context(&mut self, op: Op, views: &[View]) -> Result<(), String> {
        let operand = |i: usize| self.facts.m.ops[op].operand(i);
        let (Some(a), Some(b)) = (operand(0), operand(1)) else { return Ok(()) };
        let rank = |v: Value| self.facts.sizes.of(v).map_or(0, <[_]>::len);
        let along = |v: Value, i: usize| self.facts.sizes.along(v).contains(&i);
        if rank(a) < 2 || !along(a, rank(a) - 1) {
            return Ok(());
        }
        let both = self.facts.main.contains(&a) && self.facts.main.contains(&b);
        if !both || views[1] != WHOLE || views[0] == WHOLE {
            return Err(
                "it sums over the sequence, and is no product of attention's scores with values".into()
            );
        }
        self.plan.contexts.push(op);
        Ok(())
    }

    /// An op that is attention as a whole: Q, K, V, and a mask at operand `mask`.
    fn attention(&self, op: Op, view: View, mask: usize, past: [usize; 2]) -> Result<Emit, String> {
        let data = &self.facts.m.ops[op];
        let onnx = data.is("onnx.Attention");
        if view == WHOLE {
            return Err("all positions of its result are read".into());
        }
        if data.results.iter().skip(1).any(Option::is_some) {
            return Err("expected one result, found more".into());
        }
        // What else it reads, of which nothing depends on the sequence: the biases of MultiHeadAttention.
        let other = |i: usize| i > 2 && i != mask && (onnx || i != 3);
        if (0..data.operands.len()).any(|i| other(i) && data.operand(i).is_some()) {
            return Err("expected no operands but Q, K, V, a bias and a mask of the scores".into());
        }
        let (Some(q), Some(k), Some(v)) = (data.operand(0), data.operand(1), data.operand(2)) else {
            return Err("expected Q, K and V of their own".into());
        };
        let mut operands = vec![WHOLE; data.operands.len()];
        let heads = |name: &str| data.attrs.int(name).filter(|&n| n > 0);
        let kv_heads = heads(if onnx { "kv_num_heads" } else { "num_heads" });
        let mut shapes = Vec::new();
        let mut fewer = false;
        for (i, x) in [(0, q), (1, k), (2, v)] {
            let sizes = self.facts.sizes.of(x).unwrap_or_default();
            let at = match sizes.len() {
                3 => 1,
                4 if onnx => 2,
                _ => return Err(format!("expected Q, K and V of 3 or 4 dims, found {}", self.facts.m.ty(x))),
            };
            if self.facts.sizes.along(x) != [at] || !self.facts.main.contains(&x) {
                return Err(format!(
                    "expected the sequence along axis {at} of {:?}",
                    self.facts.m.value_label(x)
                ));
            }
            operands[i] = axis(at);
            if i > 0 {
                let fixed = |s: Option<Size>| s.filter(|s| !s.batch && !s.seq).map(|s| s.fixed);
                let last = fixed(sizes[sizes.len() - 1]).ok_or("expected a known size of heads")?;
                let shape = match sizes.len() {
                    3 => kv_heads.map(|h| [h, last / h]),
                    _ => fixed(sizes[1]).map(|h| [h, last]),
                };
                let shape = shape.ok_or("expected a known number of heads")?;
                fewer |= self.joint(x).is_some_and(|(_, l)| l.heads * l.size < shape[0] * shape[1]);
                shapes.push(shape);
            }
        }
        if fewer {
            operands[1] = WHOLE;
            operands[2] = WHOLE;
        }
        if let Some(bias) = data.operand(mask) {
            let rank = self.facts.sizes.of(bias).map(<[_]>::len).ok_or("expected a mask of a known rank")?;
            let along = self.facts.sizes.along(bias);
            if along.iter().any(|&a| a + 2 < rank) {
                return Err("expected a mask with the sequence along its last two axes".into());
            }
            if rank >= 2 && along.contains(&(rank - 2)) {
                operands[mask] = axis(rank - 2);
            }
        }
        let masked = data.attrs.int(if onnx { "is_causal" } else { "unidirectional" }).unwrap_or(0) != 0;
        let takes = (!fewer).then(|| Takes { operands: past, heads: [shapes[0], shapes[1]] });
        Ok(Emit { operands, takes, masked })
    }

    /// Where the past is to be joined to keys or values that become `v`: as far back as nothing but views, repeated
    /// heads and factors lie between, at the value of the fewest elements.
    fn joint(&self, v: Value) -> Option<(Value, Layout)> {
        let mut best: Option<((i64, usize), Value, Layout)> = None;
        let mut at = v;
        loop {
            if let Some(layout) = self.layout(at) {
                // What lies as it is to be comes first, and last what may be heads side by side, taken for one.
                let sorted = layout.perm.windows(2).all(|w| w[0] < w[1]);
                let side_by_side = if layout.single { LAST } else { 0 };
                let moved = usize::from(!sorted) + layout.ones.len() + side_by_side;
                let cost = (layout.heads * layout.size, moved);
                if best.as_ref().is_none_or(|(least, ..)| cost < *least) {
                    best = Some((cost, at, layout));
                }
            }
            let Some((op, _)) = self.facts.m.def_op(at) else { break };
            let data = &self.facts.m.ops[op];
            let name = data.name.as_str();
            let moves = RESHAPES.contains(&name)
                || matches!(name, "onnx.Transpose" | "onnx.Expand" | "onnx.Identity" | "onnx.Cast");
            let scales = matches!(name, "onnx.Mul" | "onnx.Div");
            let next = match data.operands[..] {
                [Some(x), ..] if moves => x,
                [Some(x), Some(y)] if scales && !self.changes(y) => x,
                [Some(x), Some(y)] if scales && !self.changes(x) => y,
                _ => break,
            };
            if !self.facts.main.contains(&next) || self.facts.sizes.along(next).len() != 1 {
                break;
            }
            at = next;
        }
        best.map(|(_, v, layout)| (v, layout))
    }

    fn changes(&self, v: Value) -> bool {
        self.facts.main.contains(&v) || self.varies.contains(&v)
    }

    /// The parts of keys or values, when `v` can be taken apart into them.
    fn layout(&self, v: Value) -> Option<Layout> {
        let sizes: Vec<Size> = self.facts.sizes.of(v)?.iter().copied().collect::<Option<_>>()?;
        let first = sizes.first()?;
        if first.seq || sizes[1..].iter().any(|s| s.batch || (s.seq && s.fixed != 1)) {
            return None;
        }
        if first.batch && first.fixed != 1 {
            return None;
        }
        let mut ones: Vec<usize> = (1..sizes.len()).filter(|&i| sizes[i] == Size::fixed(1)).collect();
        // Without an axis of heads, one of the axes of one element is that of a single head.
        let alone = sizes.len() - ones.len() == 3 && !ones.is_empty();
        let head = alone.then(|| ones.remove(0));
        let rest: Vec<usize> = (0..sizes.len()).filter(|i| !ones.contains(i)).collect();
        let s = rest.iter().position(|&i| sizes[i].seq)?;
        let mut others: Vec<usize> = (1..rest.len()).filter(|&i| i != s).collect();
        others.sort_by_key(|&i| Some(rest[i]) != head);
        let (perm, single, heads, size) = match others[..] {
            [h, d] => (vec![0, h, s, d], false, sizes[rest[h]].fixed, sizes[rest[d]].fixed),
            [d] => (vec![0, s, d], true, 1, sizes[rest[d]].fixed),
            _ => return None,
        };
        let int = |v: Vec<usize>| v.into_iter().map(|i| i as i64).collect();
        Some(Layout { ones: int(ones), perm: int(perm), single, heads, size })
    }

    /// The inputs: tokens are given for the new positions, all others for past and new ones.
    fn inputs(&mut self) -> Result<(), Stuck> {
        let m = self.facts.m;
        for &v in &m.regions[m.top].args {
            let Some(views) = self.plan.values.get_mut(&v) else { continue };
            let main = self.facts.main.contains(&v);
            for (&view, make) in views.iter_mut() {
                *make = match (main, view) {
                    (true, view) if view == axis(1) => Make::Keep,
                    (false, WHOLE) => Make::Keep,
                    (false, _) => Make::Cut,
                    (true, _) => {
                        let why = "its past positions are read, which are not given again";
                        return Err(Stuck { what: m.value_label(v), why: why.into() });
                    }
                };
            }
            if !main {
                views.entry(WHOLE).or_insert(Make::Keep);
            }
        }
        Ok(())
    }

    /// Pairs keys with values.
    fn layers(&mut self, order: &[Op]) -> Result<(), Stuck> {
        let m = self.facts.m;
        let (mut seen, mut used) = (HashSet::new(), HashSet::new());
        for &op in order {
            let data = &m.ops[op];
            let stuck =
                |why: String| Stuck { what: data.loc.to_string(), why: format!("{}: {why}", data.name) };
            let emit = self.plan.ops.get(&op).and_then(|w| w.values().next());
            let pair = match emit {
                Some(Emit { takes: Some(_), .. }) => {
                    self.plan.layers.push(Layer::Taken(op));
                    continue;
                }
                Some(_) if self.plan.contexts.contains(&op) => {
                    let scores = super::causal::scores(m, self.facts.main, op).map_err(stuck)?;
                    [m.ops[scores].operand(1), data.operand(1)]
                }
                Some(_) if data.name.op().ends_with("Attention") => [data.operand(1), data.operand(2)],
                _ => continue,
            };
            let joint = |v: Option<Value>| v.and_then(|v| self.joint(v)).map(|(v, _)| v);
            let [Some(k), Some(v)] = pair.map(joint) else {
                let why =
                    "expected keys and values that can be taken apart into [batch, heads, positions, size]";
                return Err(stuck(why.into()));
            };
            if seen.insert((k, v)) {
                if !used.insert(k) || !used.insert(v) {
                    let why = "expected keys and values of its own, found one of them in two places";
                    return Err(stuck(why.into()));
                }
                self.plan.layers.push(Layer::Joined([k, v]));
            }
        }
        let joined = |make: &BTreeMap<View, Make>| make.values().any(|m| matches!(m, Make::Join(_)));
        match self.plan.values.iter().find(|(v, views)| joined(views) && !used.contains(v)) {
            None => Ok(()),
            Some((&v, _)) => Err(Stuck {
                what: m.value_label(v),
                why: "all positions are read, by no attention that is understood".into(),
            }),
        }
    }
}
