//! Fusion: which ops one kernel does together.
//!
//! Ops are visited in program order. An elementwise op joins the kernel of one of its operands if both have the same shape,
//! that kernel can take it, and no path leads out of that kernel and back in through another operand. What is fused
//! becomes one `kernel.fused`, whose body holds the ops as they were; so what the interpreter makes of a fused module is what
//! it makes of the module.
//!
//! A DequantizeLinear joins nothing: everything that reads what it gives has a copy of it, and reads the codes. So between the
//! kernels of a model of QDQ islands there are codes, and sums, activations and residual connections are done in registers.

use crate::kernels::{Blob, Buffer, elementwise, pointwise};
use crate::lower::{self, Anchor};
use crate::simplify;
use crate::size::Size;
use crate::target::Target;
use crate::text::Scalar;
use dialects::ir::{
    Attr, Dim, Elem, Module, Op, OpBuilder, Region, TensorType, Type, Use, Value, ValueDef, graph, infer,
};
use dialects::kernel::FUSED;
use dialects::ops::Ops;
use dialects::tensor::Tensor;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Ops whose kernels see to it that results are as long as they are said to be.
const CHECKED: &[&str] = &["onnx.Range"];

/// Infers the types of `m`. What the file declares of values on the way is left out, since kernels rely on sizes; but where
/// nothing else is known and a kernel checks it. Where a value is declared to be as long as an input, and found to be as long
/// as a sum of other dims (a cache that grows to `total = past + new`), so is the input: that is checked when inputs come.
pub fn infer(m: &mut Module, ops: &Ops) {
    let results = m.regions[m.top].ops.iter().flat_map(|&op| m.ops[op].results.iter().flatten().copied());
    let results: Vec<Value> = results.filter(|&v| m.const_of(v).is_none()).collect();
    let declared: Vec<(Value, Type)> =
        results.into_iter().map(|v| (v, std::mem::take(&mut m.values[v].ty))).collect();
    infer::infer(m, ops);
    if substitute(m, &declared) {
        declared.iter().for_each(|(v, _)| m.values[*v].ty = Type::Unknown);
        infer::infer(m, ops);
    }
    let checked = |v: Value| m.def_op(v).is_some_and(|(op, _)| CHECKED.contains(&m.ops[op].name.as_str()));
    let open = |v: Value, ty: &Type| Size::shape(m.ty(v)).is_none() && Size::shape(ty).is_some();
    let taken: Vec<_> = declared.into_iter().filter(|(v, ty)| checked(*v) && open(*v, ty)).collect();
    if !taken.is_empty() {
        taken.into_iter().for_each(|(v, ty)| m.values[v].ty = ty);
        infer::infer(m, ops);
    }
}

/// Gives inputs the sums of dims that values of the same named length were found to have.
fn substitute(m: &mut Module, declared: &[(Value, Type)]) -> bool {
    let mut sums: HashMap<Dim, Option<Dim>> = HashMap::new();
    for (v, ty) in declared {
        let (Some(said), Some(found)) = (ty.dims(), m.ty(*v).dims()) else { continue };
        let pairs = said.iter().zip(found);
        for (name, sum) in pairs.filter(|pair| matches!(pair, (Dim::Sym(_), Dim::Expr(_)))) {
            // What is said to be two things is neither.
            let known = sums.entry(name.clone()).or_insert_with(|| Some(sum.clone()));
            *known = known.take().filter(|k| k == sum);
        }
    }
    let sum_of = |d: &Dim| {
        let sum = sums.get(d)?.clone()?;
        let named = |name: &str| sums.contains_key(&Dim::Sym(name.into()));
        let free = Size::of(&sum)?.names().into_iter().all(|name| !named(name));
        free.then_some(sum)
    };
    let args = m.regions[m.top].args.iter().copied().filter(|&v| m.const_of(v).is_none());
    let mut changed = false;
    for v in args.collect::<Vec<_>>() {
        let Type::Tensor(TensorType { elem, dims: Some(dims) }) = m.ty(v) else { continue };
        let ty = Type::tensor(*elem, dims.iter().map(|d| sum_of(d).unwrap_or_else(|| d.clone())));
        changed |= ty != *m.ty(v);
        m.values[v].ty = ty;
    }
    changed
}

/// Sets of groups, by number.
#[derive(Clone, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn has(&self, i: usize) -> bool {
        self.0.get(i / 64).is_some_and(|w| w >> (i % 64) & 1 == 1)
    }

    fn set(&mut self, i: usize) {
        if self.0.len() <= i / 64 {
            self.0.resize(i / 64 + 1, 0);
        }
        self.0[i / 64] |= 1 << (i % 64);
    }

    fn join(&mut self, other: &Bits) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }
}

/// Ops that become one kernel, or one op that does not.
struct Group {
    ops: Vec<Op>,
    /// Those of them that read codes and are there as copies.
    copied: HashSet<Op>,
    /// Views that it sees its operands through, in order. They stay for others too.
    views: Vec<Op>,
    /// The shape of its loop; `None` for a group that nothing may join.
    domain: Option<Vec<Size>>,
    /// What the kernel is made around, if not elementwise ops alone.
    anchor: Option<Anchor>,
    /// Whether it becomes a kernel.
    fused: bool,
    /// The groups that it needs, and those that they need.
    needs: Bits,
}

/// Fuses the top region of `m` for `target`. Values in `keep` stay values of the top region.
pub fn fuse(m: &mut Module, target: &Target, keep: &HashSet<Value>) {
    simplify::simplify(m, keep);
    let mut groups: Vec<Group> = Vec::new();
    let mut of: HashMap<Value, usize> = HashMap::new();
    for op in m.regions[m.top].ops.clone() {
        if m.is_const(op) {
            continue;
        }
        let reads: Vec<Value> = graph::reads(m, op);
        let group = |v: &Value| of.get(v).copied();
        let mut needed: BTreeSet<usize> = reads.iter().filter_map(group).collect();
        // With copies of what reads codes, it needs the codes.
        let readers: Vec<Op> = reads.iter().filter_map(|&v| reader(m, v)).collect();
        let codes = |v: Value| reader(m, v).and_then(|op| m.ops[op].operand(0)).unwrap_or(v);
        let inner: BTreeSet<usize> = reads.iter().filter_map(|&v| group(&codes(v))).collect();
        let at = match join(m, target, op, &groups, &inner) {
            Some(at) => {
                needed = inner;
                at
            }
            None => {
                groups.push(start(m, target, op));
                groups.len() - 1
            }
        };
        let g = &mut groups[at];
        let elementwise = g.anchor.is_none() || !g.ops.is_empty();
        for read in readers.into_iter().filter(|_| g.domain.is_some() && elementwise) {
            if g.copied.insert(read) {
                g.ops.push(read);
            }
        }
        let mut needs = std::mem::take(&mut groups[at].needs);
        for &n in needed.iter().filter(|&&n| n != at) {
            needs.set(n);
            needs.join(&groups[n].needs);
        }
        for g in groups.iter_mut().filter(|g| g.needs.has(at)) {
            g.needs.join(&needs);
        }
        groups[at].needs = needs;
        groups[at].ops.push(op);
        m.ops[op].results.iter().flatten().for_each(|&v| {
            of.insert(v, at);
        });
    }
    rewrite(m, groups, keep);
}

/// The op that gives `v`, if it is one that reads codes by one constant scale.
pub fn reader(m: &Module, v: Value) -> Option<Op> {
    let (op, _) = m.def_op(v).filter(|_| m.const_of(v).is_none())?;
    let data = &m.ops[op];
    let parameters = data.operands.iter().skip(1).flatten().all(|&p| m.const_of(p).is_some());
    let codes = pointwise::one_scale(m, op).filter(|&codes| parameters && data.operand(0) == Some(codes))?;
    matches!(m.ty(codes).elem(), Some(Elem::U8 | Elem::I8)).then_some(op)
}

fn start(m: &Module, target: &Target, op: Op) -> Group {
    let reads_codes = m.ops[op].result(0).is_some_and(|v| reader(m, v) == Some(op));
    let domain = m.ops[op].result(0).and_then(|v| Size::shape(m.ty(v)));
    let anchor = lower::anchor(m, op).filter(|_| domain.is_some());
    let simple = anchor.is_none() && domain.is_some() && fits(m, target, op, domain.as_deref(), None);
    let fused = simple || anchor.is_some();
    let domain = domain.filter(|_| fused && !reads_codes);
    let views = anchor.map_or(Vec::new(), |a| views(m, op, &a));
    let copied = HashSet::new();
    Group { ops: Vec::new(), copied, views, domain, anchor, fused, needs: Bits::default() }
}

/// The views that an anchor sees its operands through.
fn views(m: &Module, op: Op, anchor: &Anchor) -> Vec<Op> {
    let ops: HashSet<Op> = anchor.views(m, op).into_iter().flat_map(|view| view.ops).collect();
    m.regions[m.top].ops.iter().copied().filter(|op| ops.contains(op)).collect()
}

/// Whether `op` is an elementwise op over `domain` that a kernel around `anchor` can take.
fn fits(m: &Module, target: &Target, op: Op, domain: Option<&[Size]>, anchor: Option<Anchor>) -> bool {
    let Some(domain) = domain else { return false };
    let whole = |v: Value| Size::shape(m.ty(v)).is_some_and(|s| s == domain);
    let meets = |v: Value| {
        let shape = Size::shape(m.ty(v));
        let steps = shape.and_then(|s| elementwise::steps(&s, domain));
        steps.is_some_and(|s| anchor.is_none_or(|a| a.takes(domain, &s)))
    };
    pointwise::supports(m, target, op)
        && m.ops[op].results.iter().flatten().all(|&v| whole(v))
        && m.ops[op].operands.iter().flatten().all(|&v| meets(v))
}

/// The group of an operand that `op` joins.
fn join(m: &Module, target: &Target, op: Op, groups: &[Group], needed: &BTreeSet<usize>) -> Option<usize> {
    let reads_codes = m.ops[op].result(0).is_some_and(|v| reader(m, v) == Some(op));
    if reads_codes || lower::anchor(m, op).is_some() {
        return None;
    }
    needed.iter().rev().copied().find(|&at| {
        let g = &groups[at];
        let back = needed.iter().any(|&n| n != at && groups[n].needs.has(at));
        g.fused && !back && fits(m, target, op, g.domain.as_deref(), g.anchor)
    })
}

/// Puts the groups in order and makes kernels of those that are to be.
fn rewrite(m: &mut Module, groups: Vec<Group>, keep: &HashSet<Value>) {
    let top = m.top;
    let mut order: Vec<usize> = (0..groups.len()).collect();
    // A group comes after all it needs: it needs more than each of them does.
    let count = |g: &Group| g.needs.0.iter().map(|w| w.count_ones()).sum::<u32>();
    order.sort_by_key(|&i| (count(&groups[i]), i));
    let constants: Vec<Op> = m.regions[top].ops.iter().copied().filter(|&op| m.is_const(op)).collect();
    let uses = m.uses();
    let mut outside: HashSet<Value> = keep.clone();
    outside.extend(m.regions[top].results.iter().copied());
    let own = |(i, g): (usize, &Group)| {
        g.ops.iter().filter(|op| !g.copied.contains(*op)).map(move |&op| (op, i)).collect::<Vec<_>>()
    };
    let group_of: HashMap<Op, usize> = groups.iter().enumerate().flat_map(own).collect();
    let mut copies: HashMap<Op, Vec<usize>> = HashMap::new();
    for (i, g) in groups.iter().enumerate() {
        let seen = g.views.iter().filter(|op| m.ops[**op].result(0).is_some_and(|v| reader(m, v).is_some()));
        g.copied.iter().chain(seen).for_each(|&op| copies.entry(op).or_default().push(i));
    }
    // Where each op computes: what reads codes does so where its copies are, and by itself where something else reads it.
    let homes = |op: Op| -> Vec<usize> {
        let Some(copies) = copies.get(&op) else { return group_of.get(&op).copied().into_iter().collect() };
        let copied = |u: &Use| matches!(u, Use::Operand(op, _) if group_of.get(op).is_some_and(|g| copies.contains(g)));
        let gives = m.ops[op].result(0).expect("it was found by its result");
        let needed = outside.contains(&gives) || !uses.of(gives).iter().all(copied);
        copies.iter().copied().chain(group_of.get(&op).copied().filter(|_| needed)).collect()
    };
    let mut leaving = Vec::new();
    for v in m.values.keys() {
        let Some((def, _)) = m.def_op(v) else { continue };
        let Some(own) = group_of.get(&def) else { continue };
        let leaves = |u: &Use| match u {
            Use::Operand(op, _) => {
                let homes = homes(*op);
                homes.is_empty() || homes.iter().any(|h| h != own)
            }
            _ => true,
        };
        if uses.of(v).iter().any(leaves) {
            leaving.push(v);
        }
    }
    outside.extend(leaving);
    m.regions[top].ops = constants;
    for i in order {
        let g = &groups[i];
        match g.fused {
            true => outline(m, g, &outside),
            false => m.regions[top].ops.extend(&g.ops),
        }
    }
    drop_dead(m, keep);
}

/// Drops ops of the top region that nothing needs any more: views that all their readers see through.
fn drop_dead(m: &mut Module, keep: &HashSet<Value>) {
    let top = m.top;
    let mut needed: HashSet<Value> = m.regions[top].results.iter().chain(keep).copied().collect();
    let mut ops = std::mem::take(&mut m.regions[top].ops);
    ops.reverse();
    ops.retain(|&op| {
        let results = &m.ops[op].results;
        let live = results.iter().flatten().any(|v| needed.contains(v) || m.const_of(*v).is_some());
        if live {
            needed.extend(graph::reads(m, op));
        }
        live
    });
    ops.reverse();
    m.regions[top].ops = ops;
}

/// Moves the ops of a group, behind copies of its views, into the body of a `kernel.fused` at the end of the top region.
fn outline(m: &mut Module, group: &Group, outside: &HashSet<Value>) {
    let top = m.top;
    let body = m.add_region(None);
    let ops: Vec<Op> = group.views.iter().chain(&group.ops).copied().collect();
    let inside: HashSet<Value> =
        ops.iter().flat_map(|&op| m.ops[op].results.iter().flatten().copied()).collect();
    let mut operands: Vec<Value> = Vec::new();
    for &op in &ops {
        for v in graph::reads(m, op) {
            if !inside.contains(&v) && m.const_of(v).is_none() && !operands.contains(&v) {
                operands.push(v);
            }
        }
    }
    let mut map: HashMap<Value, Value> = HashMap::new();
    for &v in &operands {
        let ty = m.ty(v).clone();
        let arg = m.add_arg(body, "", ty);
        m.values[arg].sym = m.values[v].sym.clone();
        map.insert(v, arg);
    }
    let mut results = Vec::new();
    for &op in &ops {
        let data = m.ops[op].clone();
        let operands = data.operands.iter().map(|v| v.map(|v| map.get(&v).copied().unwrap_or(v)));
        let mut b =
            OpBuilder::named(data.name, &data.loc).node(data.node).attrs(data.attrs).operands(operands);
        for r in &data.results {
            b = match r {
                Some(v) => b.result(m.ty(*v).clone()),
                None => b.no_result(),
            };
        }
        let copy = m.push(body, b);
        for (old, new) in data.results.iter().zip(m.ops[copy].results.clone()) {
            if let (Some(old), Some(new)) = (old, new) {
                map.insert(*old, new);
                m.values[new].sym = m.values[*old].sym.clone();
                if group.ops.contains(&op) && !group.copied.contains(&op) && outside.contains(old) {
                    results.push((*old, new));
                }
            }
        }
    }
    m.regions[body].results = results.iter().map(|r| r.1).collect();
    let first =
        group.ops.iter().find(|op| !group.copied.contains(*op)).expect("a group has an op of its own");
    let loc = m.ops[*first].loc.clone();
    let mut fused = OpBuilder::new(FUSED, &loc).operands(operands).attr("body", Attr::Graph(body));
    if group.anchor.is_some() {
        fused = fused.attr(ANCHOR, Attr::Int(group.views.len() as i64));
    }
    let fused = m.push(top, fused);
    m.regions[body].parent = Some(fused);
    for (i, (v, _)) in results.iter().enumerate() {
        m.values[*v].def = ValueDef::Result(fused, i);
    }
    m.ops[fused].results = results.iter().map(|r| Some(r.0)).collect();
}

/// The ops that `op` stands for, by name and source node: those in its body if it is a `kernel.fused`, else itself.
pub fn members(m: &Module, op: Op) -> impl Iterator<Item = (String, String)> + '_ {
    let body = m.ops[op].attrs.graph("body").filter(|_| m.ops[op].is(FUSED));
    let ops = body.map_or(vec![op], |b| m.regions[b].ops.clone());
    ops.into_iter().map(|op| (m.ops[op].name.to_string(), m.ops[op].loc.to_string()))
}

/// The attribute that says which op of the body the kernel is made around. Before it stand views, behind it elementwise ops.
const ANCHOR: &str = "anchor";

/// A `kernel.fused`, as those see it who lower it.
pub struct Fused<'m> {
    /// The module.
    pub module: &'m Module,
    /// The op.
    pub op: Op,
    body: Region,
    pointwise: Vec<Op>,
    anchor: Option<Op>,
}

impl<'m> Fused<'m> {
    /// The op `op` of `module`, if it is one.
    pub fn of(module: &'m Module, op: Op) -> Option<Fused<'m>> {
        let data = &module.ops[op];
        let body = data.is(FUSED).then(|| data.attrs.graph("body"))??;
        let ops = &module.regions[body].ops;
        let at = data.attrs.int(ANCHOR).and_then(|i| usize::try_from(i).ok());
        let anchor = at.and_then(|i| ops.get(i).copied());
        let pointwise = ops.iter().copied().skip(at.map_or(0, |i| i + 1)).collect();
        Some(Fused { module, op, body, pointwise, anchor })
    }

    /// The source node that the kernel is named after: that of the anchor, or of the first op.
    pub fn node(&self) -> String {
        self.module.ops[self.anchor.unwrap_or(self.op)].loc.to_string()
    }

    /// The op that the kernel is made around.
    pub fn anchor(&self) -> Option<Op> {
        self.anchor
    }

    /// The elementwise ops, in order.
    pub fn pointwise(&self) -> &[Op] {
        &self.pointwise
    }

    /// What comes out, as values of the body.
    pub fn results(&self) -> &'m [Value] {
        &self.module.regions[self.body].results
    }

    /// The shape of the loop.
    pub fn domain(&self) -> Option<Vec<Size>> {
        let anchor = self.anchor.and_then(|op| self.module.ops[op].result(0));
        self.shape(anchor.or(self.results().first().copied())?)
    }

    /// The shape of a value.
    pub fn shape(&self, v: Value) -> Option<Vec<Size>> {
        Size::shape(self.module.ty(v))
    }

    /// The type of a value's elements in a register.
    pub fn register(&self, v: Value) -> Scalar {
        let elem = self.module.ty(v).elem().expect("a tensor");
        pointwise::register(elem).expect("checked when it was fused")
    }

    /// A constant of one element, which kernels hold in their code.
    pub fn number(&self, v: Value) -> Option<f64> {
        pointwise::number(self.module, v)
    }

    /// What the elementwise ops read from memory: the inputs of the body, and constants of more than one element.
    pub fn operands(&self) -> Vec<Value> {
        let made: HashSet<Value> = self.module.regions[self.body]
            .ops
            .iter()
            .flat_map(|&op| self.module.ops[op].results.iter().flatten().copied())
            .collect();
        let mut out = Vec::new();
        for &op in &self.pointwise {
            for &v in self.module.ops[op].operands.iter().flatten() {
                if !made.contains(&v) && self.number(v).is_none() && !out.contains(&v) {
                    out.push(v);
                }
            }
        }
        out
    }

    /// The buffer of a value that is read from memory: an operand, or a constant, which becomes a blob.
    pub fn buffer(&self, v: Value, blobs: &mut Vec<Blob>) -> Option<Buffer> {
        if let Some(i) = self.module.regions[self.body].args.iter().position(|&a| a == v) {
            return Some(Buffer::Operand(i));
        }
        let data = &self.module.consts[self.module.const_of(v)?];
        let t = Tensor::from_const(data).ok()?;
        blobs.push(Blob { bytes: crate::memory::bytes(&t)?.to_vec().into() });
        Some(Buffer::Blob(blobs.len() - 1))
    }
}
