//! Writes the graph that a plan describes: in program order, each op once for each view of its results.

use super::plan::{Emit, Layer, Layout, Make, Plan};
use super::rules::{View, WHOLE, axis};
use super::sizes::{Size, Sizes};
use dialects::ir::{Attr, Dim, Elem, Module, Op, OpBuilder, Symbol, Type, Value, ValueDef};
use dialects::tensor::Tensor;
use std::collections::{HashMap, HashSet};

/// The dim of the past.
const PAST: &str = "past_sequence_length";
/// The dim of past and new positions together.
const TOTAL: &str = "total_sequence_length";

/// What was built.
pub struct Built {
    /// What stands for each view of each value of the module before.
    pub values: HashMap<(Value, View), Value>,
    /// The inputs that take the past.
    pub past: HashSet<Value>,
    /// The inputs that take new positions only.
    pub rows: HashSet<Value>,
}

/// What the module before was found to be.
pub struct Found<'a> {
    /// The lengths of its axes.
    pub sizes: &'a Sizes,
    /// Values whose contents depend on the tokens.
    pub main: &'a HashSet<Value>,
    /// Values that depend on the length of the sequence alone.
    pub varies: &'a HashSet<Value>,
    /// The inputs that take new positions only, in order.
    pub rows: &'a [Value],
    /// What is to be computed.
    pub plan: &'a Plan,
}

/// Rebuilds `m` by the plan.
pub fn build(m: &mut Module, found: &Found) -> Built {
    let order = std::mem::take(&mut m.regions[m.top].ops);
    let built =
        Built { values: HashMap::new(), past: HashSet::new(), rows: found.rows.iter().copied().collect() };
    let loc = m.values[found.rows[0]].name.clone();
    let mut b =
        Builder { m, found, built, caches: HashMap::new(), presents: Vec::new(), made: HashMap::new(), loc };
    b.caches();
    b.inputs();
    for op in order {
        b.op(op);
    }
    b.finish()
}

/// A length that is only known when the model runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Run {
    Batch,
    Past,
    New,
    Total,
}

/// What is made once.
#[derive(PartialEq, Eq, Hash)]
enum Shared {
    Length(Run),
    Ints(Vec<i64>, bool),
    Shape(Vec<(Size, bool)>),
    Causal,
}

struct Builder<'a> {
    m: &'a mut Module,
    found: &'a Found<'a>,
    built: Built,
    /// The past of keys or values that are joined, and the name of what they are with it; by their value, or their op
    /// and which of the two.
    caches: HashMap<(Cached, usize), (Value, Symbol)>,
    presents: Vec<(Symbol, Option<Value>, Type)>,
    made: HashMap<Shared, Value>,
    loc: Symbol,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Cached {
    Value(Value),
    Op(Op),
}

impl Builder<'_> {
    /// Adds the inputs for past keys and values.
    fn caches(&mut self) {
        let batch = self.m.ty(self.found.rows[0]).dims().map_or(Dim::Unknown, |d| d[0].clone());
        for (n, layer) in self.found.plan.layers.iter().enumerate() {
            for (which, part) in ["key", "value"].into_iter().enumerate() {
                let (cached, elem, [heads, size]) = match layer {
                    Layer::Joined(pair) => {
                        let v = pair[which];
                        let layout = self.found.plan.values[&v].values().find_map(|make| match make {
                            Make::Join(l) => Some([l.heads, l.size]),
                            _ => None,
                        });
                        let Some(shape) = layout else { continue };
                        (Cached::Value(v), self.m.ty(v).elem(), shape)
                    }
                    Layer::Taken(op) => {
                        let takes = self.found.plan.ops[op].values().find_map(|e| e.takes.as_ref());
                        let Some(takes) = takes else { continue };
                        let elem = self.m.ops[*op].operand(1 + which).and_then(|v| self.m.ty(v).elem());
                        (Cached::Op(*op), elem, takes.heads[which])
                    }
                };
                let elem = elem.unwrap_or(Elem::F32);
                let ty = |len: &str| {
                    let dims = [batch.clone(), Dim::Known(heads), Dim::Sym(len.into()), Dim::Known(size)];
                    Type::tensor(elem, dims)
                };
                let name = self.m.fresh_name(&format!("past_key_values.{n}.{part}"));
                let past = self.m.add_arg(self.m.top, name, ty(PAST));
                self.m.values[past].declared = Some(ty(PAST));
                let present = self.m.fresh_name(&format!("present.{n}.{part}"));
                self.built.past.insert(past);
                // One value may serve as several layers' keys: the first one's input is used.
                self.caches.entry((cached, which)).or_insert((past, present.clone()));
                self.presents.push((present, None, ty(TOTAL)));
            }
        }
    }

    /// Gives inputs that are read in their whole length that length.
    fn inputs(&mut self) {
        for v in self.m.regions[self.m.top].args.clone() {
            let Some(views) = self.found.plan.values.get(&v) else { continue };
            let whole = !self.found.main.contains(&v);
            let data = &mut self.m.values[v];
            for ty in [Some(&mut data.ty), data.declared.as_mut()].into_iter().flatten().filter(|_| whole) {
                if let Type::Tensor(t) = ty
                    && let Some(d) = t.dims.as_mut().and_then(|d| d.get_mut(1))
                {
                    *d = Dim::Sym(TOTAL.into());
                }
            }
            for (&view, make) in views {
                if *make == Make::Keep {
                    self.built.values.insert((v, view), v);
                }
            }
            let loc = self.m.values[v].name.clone();
            self.cuts(v, &loc);
        }
    }

    fn push(&mut self, op: OpBuilder) -> Value {
        let op = self.m.push(self.m.top, op.result(Type::Unknown));
        self.m.ops[op].result(0).expect("it was given a result")
    }

    fn at(&self, name: &str) -> OpBuilder {
        OpBuilder::new(name, &self.loc)
    }

    /// Integers as a constant: a vector, or a scalar.
    fn ints(&mut self, ints: &[i64], scalar: bool) -> Value {
        let key = Shared::Ints(ints.to_vec(), scalar);
        if let Some(&v) = self.made.get(&key) {
            return v;
        }
        let shape: &[usize] = if scalar { &[] } else { &[ints.len()] };
        let t = Tensor::new(shape, ints.to_vec()).expect("the shape is that of the elements");
        let v = self.m.add_const(self.m.top, "", t.to_const());
        self.made.insert(key, v);
        v
    }

    /// A length, as a vector of one element.
    fn length(&mut self, which: Run) -> Value {
        if let Some(&v) = self.made.get(&Shared::Length(which)) {
            return v;
        }
        let shape = |b: &Self, of: Value, i: i64| {
            b.at("onnx.Shape").operands([of]).attr("start", i).attr("end", i + 1)
        };
        let op = match which {
            Run::Batch => shape(self, self.found.rows[0], 0),
            Run::New => shape(self, self.found.rows[0], 1),
            Run::Past => {
                let args = &self.m.regions[self.m.top].args;
                let past = args.iter().copied().find(|v| self.built.past.contains(v));
                shape(self, past.expect("a model with attention has a cache"), 2)
            }
            Run::Total => {
                let (past, new) = (self.length(Run::Past), self.length(Run::New));
                self.at("onnx.Add").operands([past, new])
            }
        };
        let v = self.push(op);
        self.made.insert(Shared::Length(which), v);
        v
    }

    /// Lengths of axes, each with whether only the new positions lie along it, as a vector.
    fn shape(&mut self, sizes: Vec<(Size, bool)>) -> Value {
        if let Some(&v) = self.made.get(&Shared::Shape(sizes.clone())) {
            return v;
        }
        let mut parts = Vec::new();
        let mut fixed = Vec::new();
        for &(size, new) in &sizes {
            let seq = if new { Run::New } else { Run::Total };
            let factors = [size.batch.then_some(Run::Batch), size.seq.then_some(seq)];
            let mut product = None;
            for which in factors.into_iter().flatten() {
                let v = self.length(which);
                product = Some(match product {
                    None => v,
                    Some(p) => self.push(self.at("onnx.Mul").operands([p, v])),
                });
            }
            let Some(mut v) = product else {
                fixed.push(size.fixed);
                continue;
            };
            if size.fixed != 1 {
                let n = self.ints(&[size.fixed], false);
                v = self.push(self.at("onnx.Mul").operands([v, n]));
            }
            if !fixed.is_empty() {
                parts.push(self.ints(&std::mem::take(&mut fixed), false));
            }
            parts.push(v);
        }
        if !fixed.is_empty() || parts.is_empty() {
            parts.push(self.ints(&fixed, false));
        }
        let v = match parts[..] {
            [one] => one,
            _ => self.push(self.at("onnx.Concat").operands(parts).attr("axis", 0)),
        };
        self.made.insert(Shared::Shape(sizes), v);
        v
    }

    /// The shape of a view of `v`.
    fn shape_of(&mut self, v: Value, view: View, axes: std::ops::Range<usize>) -> Option<Value> {
        let sizes = self.found.sizes.of(v)?;
        let sizes =
            axes.map(|i| Some((sizes.get(i).copied()??, view & axis(i) != 0))).collect::<Option<_>>()?;
        Some(self.shape(sizes))
    }

    /// What a view of a value is now.
    fn get(&self, v: Value, view: View) -> Value {
        self.built.values.get(&(v, view)).copied().unwrap_or(v)
    }

    fn op(&mut self, op: Op) {
        let data = self.m.ops[op].clone();
        let results: Vec<Value> = data.results.iter().flatten().copied().collect();
        let planned = self.found.plan.ops.get(&op).into_iter().flatten();
        let mut first = true;
        for (&view, emit) in planned {
            self.emit(op, &data, view, emit, std::mem::take(&mut first));
        }
        for &v in &results {
            let views = self.found.plan.values.get(&v).into_iter().flatten();
            for (&view, make) in views {
                if let &Make::Lengths(x, from, to) = make
                    && let Some(shape) = self.shape_of(x, WHOLE, from..to)
                {
                    self.built.values.insert((v, view), shape);
                }
            }
            self.join(v, &data.loc);
            self.cuts(v, &data.loc);
        }
        let depends = |v: &Value| self.found.main.contains(v) || self.found.varies.contains(v);
        match first {
            true if !results.iter().any(depends) => self.m.regions[self.m.top].ops.push(op),
            true => results.iter().for_each(|&v| self.m.values[v].def = ValueDef::Erased),
            false => {}
        }
    }

    /// The op at one view: itself the first time, then copies.
    fn emit(&mut self, op: Op, data: &dialects::ir::OpData, view: View, emit: &Emit, first: bool) {
        let mut operands: Vec<Option<Value>> =
            data.operands.iter().zip(&emit.operands).map(|(v, &w)| v.map(|v| self.get(v, w))).collect();
        let y = data.results.iter().flatten().copied().next().expect("a planned op has a result");
        let shaped = data.is("onnx.Reshape") || data.is("onnx.Expand");
        if shaped && (self.found.main.contains(&y) || view != WHOLE) {
            let target = data.operand(1).filter(|&t| self.m.const_of(t).is_none());
            let rank = self.found.sizes.of(y).map_or(0, <[_]>::len);
            if target.is_some()
                && let Some(shape) = self.shape_of(y, view, 0..rank)
            {
                operands[1] = Some(shape);
            }
        }
        let mut attrs = data.attrs.clone();
        if emit.masked && data.is("onnx.Attention") {
            attrs.set("is_causal", Attr::Int(0));
            operands.resize(operands.len().max(4), None);
            operands[3] = Some(self.causal(operands[3]));
        }
        if let Some(takes) = &emit.takes {
            let mut builder = OpBuilder::named(data.name.clone(), &data.loc).node(data.node.clone());
            let mut named = vec![std::mem::replace(&mut self.m.values[y].name, "".into())];
            operands.resize(operands.len().max(takes.operands[1] + 1), None);
            for (which, &i) in takes.operands.iter().enumerate() {
                let (past, present) = self.caches[&(Cached::Op(op), which)].clone();
                operands[i] = Some(past);
                named.push(present);
            }
            builder = builder.operands(operands).attrs(attrs).meta(data.meta.clone());
            for name in &named {
                builder = builder.named_result(name.clone(), Type::Unknown);
            }
            let new = self.m.push(self.m.top, builder);
            let results: Vec<Value> = self.m.ops[new].results.iter().flatten().copied().collect();
            self.m.values[y].def = ValueDef::Erased;
            self.built.values.insert((y, view), results[0]);
            for (name, v) in named[1..].iter().zip(&results[1..]) {
                self.present(name, *v);
            }
        } else if first {
            let target = &mut self.m.ops[op];
            (target.operands, target.attrs) = (operands, attrs);
            self.m.regions[self.m.top].ops.push(op);
            for &v in data.results.iter().flatten() {
                self.built.values.insert((v, view), v);
            }
        } else {
            let mut builder = OpBuilder::named(data.name.clone(), &data.loc).operands(operands).attrs(attrs);
            for v in &data.results {
                builder = if v.is_some() { builder.result(Type::Unknown) } else { builder.no_result() };
            }
            let new = self.m.push(self.m.top, builder.meta(data.meta.clone()));
            for (old, new) in data.results.iter().zip(self.m.ops[new].results.clone()) {
                if let (Some(old), Some(new)) = (old, new) {
                    self.built.values.insert((*old, view), new);
                }
            }
        }
    }

    fn present(&mut self, name: &Symbol, v: Value) {
        if let Some(slot) = self.presents.iter_mut().find(|(n, ..)| n == name) {
            slot.1 = Some(v);
        }
    }

    /// Where a position may look: at itself and what lies before it, `[new, total]`; and at what `mask` allows.
    fn causal(&mut self, mask: Option<Value>) -> Value {
        let causal = match self.made.get(&Shared::Causal) {
            Some(&v) => v,
            None => {
                let (past, total) = (self.length(Run::Past), self.length(Run::Total));
                let scalar = |b: &mut Self, v| {
                    let axes = b.ints(&[0], false);
                    b.push(b.at("onnx.Squeeze").operands([v, axes]))
                };
                let (past, total) = (scalar(self, past), scalar(self, total));
                let (zero, one, last) =
                    (self.ints(&[0], true), self.ints(&[1], true), self.ints(&[1], false));
                let columns = self.push(self.at("onnx.Range").operands([zero, total, one]));
                let rows = self.push(self.at("onnx.Range").operands([past, total, one]));
                let rows = self.push(self.at("onnx.Unsqueeze").operands([rows, last]));
                let v = self.push(self.at("onnx.LessOrEqual").operands([columns, rows]));
                self.made.insert(Shared::Causal, v);
                v
            }
        };
        let Some(mask) = mask else { return causal };
        match self.m.ty(mask).elem() {
            Some(Elem::Bool) => self.push(self.at("onnx.And").operands([mask, causal])),
            elem => {
                let never = Tensor::from_f32(elem.unwrap_or(Elem::F32), &[], vec![f32::NEG_INFINITY]);
                let never = never.unwrap_or_else(|_| Tensor::scalar(f32::NEG_INFINITY)).to_const();
                let never = self.m.add_const(self.m.top, "", never);
                self.push(self.at("onnx.Where").operands([causal, mask, never]))
            }
        }
    }

    /// The rows of the new positions of a value, along the axes of each view that is to be cut.
    fn cuts(&mut self, v: Value, loc: &Symbol) {
        let views = self.found.plan.values.get(&v).into_iter().flatten();
        let cut: Vec<View> = views.filter(|(_, make)| **make == Make::Cut).map(|(&view, _)| view).collect();
        for view in cut {
            let mut x = self.get(v, WHOLE);
            for i in (0..64).filter(|&i| view & axis(i) != 0) {
                let (from, to) = (self.length(Run::Past), self.length(Run::Total));
                let at = self.ints(&[i as i64], false);
                x = self.push(OpBuilder::new("onnx.Slice", loc).operands([x, from, to, at]));
            }
            self.built.values.insert((v, view), x);
        }
    }

    /// Keys or values behind their past.
    fn join(&mut self, v: Value, loc: &Symbol) {
        let views = self.found.plan.values.get(&v);
        let Some(Make::Join(layout)) = views.and_then(|w| w.get(&WHOLE)) else { return };
        let Layout { ones, perm, single, .. } = layout;
        let along = self.found.sizes.along(v);
        let mut x = self.get(v, axis(along[0]));
        let at = |name: &str| OpBuilder::new(name, loc);
        let moved = perm.windows(2).any(|w| w[0] > w[1]);
        let (ones_at, head) = (self.ints(ones, false), self.ints(&[1], false));
        if !ones.is_empty() {
            x = self.push(at("onnx.Squeeze").operands([x, ones_at]));
        }
        if moved {
            x = self.push(at("onnx.Transpose").operands([x]).attr("perm", perm.clone()));
        }
        if *single {
            x = self.push(at("onnx.Unsqueeze").operands([x, head]));
        }
        for which in [0, 1] {
            let Some((past, present)) = self.caches.get(&(Cached::Value(v), which)).cloned() else {
                continue;
            };
            x = self.push(at("onnx.Concat").operands([past, x]).attr("axis", 2));
            self.m.values[x].name = present.clone();
            self.present(&present, x);
        }
        if *single {
            x = self.push(at("onnx.Squeeze").operands([x, head]));
        }
        if moved {
            let inverse: Vec<i64> = (0..perm.len())
                .map(|i| perm.iter().position(|&p| p == i as i64).expect("an order of all axes") as i64)
                .collect();
            x = self.push(at("onnx.Transpose").operands([x]).attr("perm", inverse));
        }
        if !ones.is_empty() {
            x = self.push(at("onnx.Unsqueeze").operands([x, ones_at]));
        }
        self.built.values.insert((v, WHOLE), x);
    }

    /// What is known of the type of a view of a value.
    fn ty(&self, v: Value, view: View) -> Type {
        let Some(elem) = self.m.ty(v).elem() else { return Type::Unknown };
        let Some(sizes) = self.found.sizes.of(v) else { return Type::unranked(elem) };
        let given = |i: usize| self.m.ty(self.found.rows[0]).dims().map_or(Dim::Unknown, |d| d[i].clone());
        let dim = |(i, size): (usize, &Option<Size>)| match size {
            Some(Size { fixed, batch: false, seq: false }) => Dim::Known(*fixed),
            Some(Size { fixed: 1, batch: true, seq: false }) => given(0),
            Some(Size { fixed: 1, batch: false, seq: true }) if view & axis(i) != 0 => given(1),
            Some(Size { fixed: 1, batch: false, seq: true }) => Dim::Sym(TOTAL.into()),
            _ => Dim::Unknown,
        };
        Type::tensor(elem, sizes.iter().enumerate().map(dim))
    }

    /// Sets the outputs, and what is known of types.
    fn finish(mut self) -> Built {
        let results = self.m.regions[self.m.top].results.clone();
        for (i, v) in results.into_iter().enumerate() {
            let view = self.found.sizes.along(v).first().map_or(WHOLE, |&a| axis(a));
            let new = self.get(v, view);
            if new != v {
                let old = self.m.values[v].clone();
                let data = &mut self.m.values[new];
                // An attention op made anew has the name already.
                if !old.name.is_empty() {
                    data.name = old.name;
                }
                (data.ty, data.declared, data.meta) = (old.ty, old.declared, old.meta);
                self.m.values[v].name = "".into();
            }
            self.m.regions[self.m.top].results[i] = new;
        }
        // Only lengths are known anew; what was declared spoke of others.
        let outputs: HashSet<Value> = self.m.regions[self.m.top].results.iter().copied().collect();
        let mut types: HashMap<Value, Type> = HashMap::new();
        for (&(old, view), &new) in &self.built.values {
            types.insert(new, self.ty(old, view));
        }
        for op in self.m.regions[self.m.top].ops.clone() {
            for v in self.m.ops[op].results.clone().into_iter().flatten().filter(|v| !outputs.contains(v)) {
                let data = &mut self.m.values[v];
                (data.ty, data.declared, data.sym) = (types.remove(&v).unwrap_or_default(), None, None);
            }
        }
        for (_, v, ty) in std::mem::take(&mut self.presents) {
            if let Some(v) = v {
                self.m.regions[self.m.top].results.push(v);
                self.m.values[v].ty = ty.clone();
                self.m.values[v].declared = Some(ty);
            }
        }
        self.built
    }
}
