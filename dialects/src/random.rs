//! Random modules for property tests, in this crate and in those that build on it. The same seed gives the same
//! module on every machine.

use crate::ir::{
    Attr, Attrs, ConstData, Dim, Elem, Encoding, Function, Meta, Module, Op, OpBuilder, OpName, Region,
    Symbol, TensorType, Type, Value, ValueDef,
};
use crate::tensor::Tensor;
use bytes::Bytes;
use std::sync::Arc;

/// A small seeded generator: splitmix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is positive.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of these.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// Uniform in [-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `n` floats, uniform in [-1, 1).
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Names that a text form may stumble over, and plain ones. Some occur twice in a module.
const NAMES: [&str; 16] = [
    "a",
    "x",
    "0",
    "12",
    "/layer/q.weight",
    "a b",
    "x:",
    "é",
    "q\"uote\\",
    "a~1",
    "return",
    "const",
    "line\nbreak",
    "_",
    "onnx::MatMul_7",
    "; no comment",
];

/// A module of unknown ops that holds whatever an IR can: every kind of attribute and type, odd and repeated names,
/// nested graphs, functions, constants of every element type, uses before definitions. Made for the text form and
/// for readers of untrusted graphs; most of these modules do not verify.
pub fn odd_module(seed: u64) -> Module {
    let mut g = Odd { m: Module::default(), rng: Rng(seed) };
    g.m.ir_version = g.rng.below(20) as i64;
    for _ in 0..g.rng.below(3) {
        let (name, version) = (g.name(), g.rng.bits() as i64);
        g.m.opsets.insert(name, version);
    }
    g.m.meta = g.meta();
    g.region(g.m.top, 0, &mut Vec::new());
    for _ in 0..g.rng.below(3) {
        let body = g.m.add_region(None);
        let defaults = g.attrs(3, None, &mut Vec::new());
        let f = Function {
            name: g.op_name(),
            overload: g.name(),
            attributes: vec![g.name()],
            defaults,
            opsets: [(g.name(), 3)].into(),
            body,
            meta: g.meta(),
        };
        g.m.functions.push(f);
        g.region(body, 1, &mut Vec::new());
    }
    g.m
}

struct Odd {
    m: Module,
    rng: Rng,
}

impl Odd {
    fn name(&mut self) -> Symbol {
        match self.rng.below(3) {
            0 => "".into(),
            1 => format!("n{}", self.rng.below(1000)).into(),
            _ => (*self.rng.pick(&NAMES)).into(),
        }
    }

    fn op_name(&mut self) -> OpName {
        let names = ["onnx.Add", "com.microsoft.MatMulNBits", "return.x", "graph._"];
        match self.rng.below(6) {
            0 => OpName::new("odd domain", "Op"),
            1 => OpName::new("a.b", "C.D"),
            _ => OpName::parse(self.rng.pick::<&str>(&names)).expect("these are op names"),
        }
    }

    fn meta(&mut self) -> Meta {
        let mut meta = Meta::default();
        if self.rng.one_in(3) {
            for _ in 0..self.rng.below(3) {
                let (k, v) = (self.name(), self.name());
                meta.set(k, v);
            }
        }
        meta
    }

    fn elem(&mut self) -> Elem {
        let all: Vec<Elem> = Elem::all().collect();
        *self.rng.pick(&all)
    }

    fn ty(&mut self, depth: usize) -> Type {
        let tensor = TensorType {
            elem: self.elem(),
            dims: (!self.rng.one_in(5)).then(|| (0..self.rng.below(4)).map(|_| self.dim()).collect()),
        };
        match self.rng.below(if depth > 2 { 4 } else { 7 }) {
            0 => Type::Unknown,
            1 | 2 => Type::Tensor(tensor),
            3 => Type::SparseTensor(tensor),
            4 => Type::Sequence(Box::new(self.ty(depth + 1))),
            5 => Type::Optional(Box::new(self.ty(depth + 1))),
            _ => Type::Map(self.elem(), Box::new(self.ty(depth + 1))),
        }
    }

    fn dim(&mut self) -> Dim {
        match self.rng.below(5) {
            0 => Dim::Known(self.rng.below(100) as i64),
            1 => Dim::Unknown,
            2 => {
                let number = Dim::Known(self.rng.below(9) as i64 - 4);
                (0..self.rng.below(4)).fold(number, |sum, _| sum.mul(&self.dim()).sub(&self.dim()))
            }
            3 => Dim::Sym((*self.rng.pick(&["x", "x8", "f32", "batch", "8x", "s0*2", ""])).into()),
            _ => Dim::Sym((*self.rng.pick(&NAMES)).into()),
        }
    }

    fn konst(&mut self) -> ConstData {
        let elem = self.elem();
        // Mostly small; sometimes too large to be shown by elements.
        let limit = if self.rng.one_in(4) { 12 } else { 4 };
        let dims: Vec<u64> = (0..self.rng.below(4)).map(|_| self.rng.below(limit) as u64).collect();
        let count: u64 = dims.iter().product();
        let bytes: Vec<u8> = match elem.byte_len(count) {
            Some(len) => (0..len).map(|_| self.rng.bits() as u8).collect(),
            None => (0..count).flat_map(|_| [1, 0, 0, 0, 0, 0, 0, 0, self.rng.bits() as u8]).collect(),
        };
        let mut c =
            ConstData::new(elem, dims, Arc::new(Bytes::from(bytes))).expect("as many bytes as elements");
        c.meta = self.meta();
        match self.rng.below(6) {
            0 => c.encoding = Encoding::Typed,
            1 => {
                let bytes: Vec<u8> = (0..self.rng.below(40)).map(|_| self.rng.bits() as u8).collect();
                let meta = c.meta;
                c = ConstData::unchecked(elem, c.dims, Arc::new(Bytes::from(bytes)), Encoding::Sparse);
                c.meta = meta;
            }
            _ => {}
        }
        c
    }

    fn float(&mut self) -> f32 {
        match self.rng.below(4) {
            0 => *self.rng.pick(&[0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, 1e-45, 0.1]),
            // Any bits: NaN payloads too.
            _ => f32::from_bits(self.rng.bits() as u32),
        }
    }

    fn attrs(&mut self, depth: usize, op: Option<Op>, scope: &mut Vec<Value>) -> Attrs {
        let mut attrs = Attrs::default();
        for _ in 0..self.rng.below(4) {
            let (name, value) = (self.name(), self.attr(depth, op, scope));
            attrs.set(name, value);
        }
        attrs
    }

    fn attr(&mut self, depth: usize, op: Option<Op>, scope: &mut Vec<Value>) -> Attr {
        let n = self.rng.below(3);
        let kinds = if depth > 2 { 11 } else { 13 };
        match self.rng.below(kinds) {
            0 => Attr::Int(self.rng.bits() as i64),
            1 => Attr::Float(self.float()),
            2 => Attr::Str(self.string()),
            3 => {
                let c = self.konst();
                Attr::Tensor(self.m.consts.push(c))
            }
            4 => Attr::Type(self.ty(0)),
            5 => Attr::Ints((0..n).map(|_| self.rng.bits() as i64).collect()),
            6 => Attr::Floats((0..n).map(|_| self.float()).collect()),
            7 => Attr::Strs((0..n).map(|_| self.string()).collect()),
            8 => {
                let data: Vec<ConstData> = (0..n).map(|_| self.konst()).collect();
                Attr::Tensors(data.into_iter().map(|c| self.m.consts.push(c)).collect())
            }
            9 => Attr::Types((0..n).map(|_| self.ty(0)).collect()),
            10 => Attr::Ref { name: self.name(), kind: self.rng.bits() as i32 },
            11 => Attr::Graph(self.nested(depth, op, scope)),
            _ => Attr::Graphs((0..n).map(|_| self.nested(depth, op, scope)).collect()),
        }
    }

    fn string(&mut self) -> Bytes {
        match self.rng.one_in(3) {
            true => Bytes::from((0..self.rng.below(9)).map(|_| self.rng.bits() as u8).collect::<Vec<_>>()),
            false => Bytes::from_static(self.rng.pick(&NAMES).as_bytes()),
        }
    }

    fn nested(&mut self, depth: usize, op: Option<Op>, scope: &mut Vec<Value>) -> Region {
        let region = self.m.add_region(op);
        self.region(region, depth + 1, scope);
        region
    }

    /// Fills a region. `scope` holds the values around it, and is left as it was.
    fn region(&mut self, region: Region, depth: usize, scope: &mut Vec<Value>) {
        let outer = scope.len();
        self.m.regions[region].name = self.name();
        self.m.regions[region].meta = self.meta();
        for _ in 0..self.rng.below(4) {
            let (name, ty) = (self.name(), self.ty(0));
            let v = self.m.add_arg(region, name, ty);
            self.decorate(v);
            scope.push(v);
        }
        for _ in 0..self.rng.below(4) {
            let (name, data) = (self.name(), self.konst());
            let v = self.m.add_const(region, name, data);
            self.decorate(v);
            if self.rng.one_in(3) {
                self.m.regions[region].args.push(v);
            }
            scope.push(v);
        }
        let mut ops = Vec::new();
        for _ in 0..self.rng.below(5) {
            let mut b = OpBuilder::named(self.op_name(), &self.name()).meta(self.meta());
            if self.rng.one_in(2) {
                b = b.node(self.name());
            }
            for _ in 0..self.rng.below(3) {
                let (name, ty) = (self.name(), self.ty(0));
                b = if self.rng.one_in(4) { b.no_result() } else { b.named_result(name, ty) };
            }
            let op = self.m.push(region, b);
            for v in self.m.ops[op].results.clone().into_iter().flatten() {
                self.decorate(v);
                scope.push(v);
            }
            ops.push(op);
        }
        for op in ops {
            for _ in 0..self.rng.below(4) {
                let v = match self.rng.below(5) {
                    0 => None,
                    _ if scope.is_empty() => None,
                    _ => Some(*self.rng.pick(scope)),
                };
                self.m.ops[op].operands.push(v);
            }
            let attrs = self.attrs(depth, Some(op), scope);
            self.m.ops[op].attrs = attrs;
        }
        for _ in 0..self.rng.below(3) {
            if !scope.is_empty() {
                let v = *self.rng.pick(scope);
                self.m.regions[region].results.push(v);
            }
        }
        scope.truncate(outer);
    }

    fn decorate(&mut self, v: Value) {
        let meta = self.meta();
        let declared = match self.rng.below(3) {
            0 => Some(self.m.ty(v).clone()),
            1 => Some(self.ty(0)),
            _ => None,
        };
        let ty = self.ty(0);
        let konst = matches!(self.m.values[v].def, ValueDef::Const(_));
        let data = &mut self.m.values[v];
        data.meta = meta;
        data.declared = declared;
        if konst && self.rng.one_in(4) {
            data.ty = ty;
        }
    }
}

/// A sound module of common float ops that can be run: matrix products, broadcast scales and shifts, activations,
/// normalization by hand, movement and reduction, with constants among the operands, values that several ops read,
/// and ops that depend on constants alone or that nobody reads. Inputs `x` and `y` are f32 `[2, 3, 8]`; all values
/// stay of moderate size. Made for comparing a module before and after an exact pass.
pub fn float_module(seed: u64) -> Module {
    let mut m = Module { ir_version: 10, ..Module::default() };
    m.opsets.insert("onnx".into(), 21);
    let top = m.top;
    let shape = vec![2usize, 3, 8];
    let mut g = Floats { rng: Rng(seed), pool: Vec::new(), m };
    for name in ["x", "y"] {
        let v = g.m.add_arg(top, name, Type::of_shape(Elem::F32, &shape));
        g.pool.push((v, shape.clone()));
    }
    for _ in 0..6 + g.rng.below(18) {
        g.step();
    }
    // Late values, so that most of the graph is alive.
    let outputs = 1 + g.rng.below(2);
    let last: Vec<(Value, Vec<usize>)> = g.pool.iter().rev().take(outputs).cloned().collect();
    for (i, (v, shape)) in last.into_iter().enumerate() {
        let out = g.push("onnx.Identity", &[v], Attrs::default(), shape);
        g.m.values[out].name = format!("out{i}").into();
        g.m.regions[top].results.push(out);
    }
    g.m
}

struct Floats {
    m: Module,
    rng: Rng,
    pool: Vec<(Value, Vec<usize>)>,
}

impl Floats {
    fn konst(&mut self, shape: &[usize], scale: f32) -> Value {
        let n = shape.iter().product();
        let data: Vec<f32> = self.rng.floats(n).iter().map(|x| x * scale).collect();
        self.konst_of(shape, data)
    }

    fn konst_of(&mut self, shape: &[usize], data: Vec<f32>) -> Value {
        let t = Tensor::new(shape, data).expect("as many elements as the shape has");
        let name = format!("c{}", self.m.values.len());
        self.m.add_const(self.m.top, name, t.to_const())
    }

    fn ints(&mut self, data: Vec<i64>) -> Value {
        let t = Tensor::new(&[data.len()], data).expect("one dim");
        let name = format!("c{}", self.m.values.len());
        self.m.add_const(self.m.top, name, t.to_const())
    }

    /// Adds an op with one result of this shape and puts it into the pool.
    fn push(&mut self, op: &str, operands: &[Value], attrs: Attrs, shape: Vec<usize>) -> Value {
        let name = format!("v{}", self.m.values.len());
        let b = OpBuilder::new(op, &name.as_str().into()).operands(operands.iter().copied()).attrs(attrs);
        let op = self.m.push(self.m.top, b.named_result(name, Type::of_shape(Elem::F32, &shape)));
        let v = self.m.ops[op].result(0).expect("the op has a result");
        self.pool.push((v, shape));
        v
    }

    fn any(&mut self) -> (Value, Vec<usize>) {
        // Mostly recent values: deep graphs rather than wide ones.
        let n = self.pool.len();
        let at = if self.rng.one_in(3) { self.rng.below(n) } else { n - 1 - self.rng.below(n.min(3)) };
        self.pool[at].clone()
    }

    fn step(&mut self) {
        let (v, shape) = self.any();
        let last = shape.last().copied().unwrap_or(1);
        let none = Attrs::default();
        match self.rng.below(13) {
            0 => {
                let op = *self.rng.pick(&["onnx.Neg", "onnx.Relu", "onnx.Sigmoid", "onnx.Tanh", "onnx.Abs"]);
                self.push(op, &[v], none, shape);
            }
            1 | 2 => {
                // A positive vector: scales that may move through what surrounds them.
                let scale: Vec<f32> = self.rng.floats(last).iter().map(|x| 1.0 + 0.5 * x).collect();
                let c = self.konst_of(&[last], scale);
                let op = *self.rng.pick(&["onnx.Mul", "onnx.Div"]);
                self.push(op, &[v, c], none, shape);
            }
            3 => {
                let dims: &[usize] = if self.rng.one_in(2) { &[] } else { &shape };
                let c = self.konst(dims, 1.0);
                let op = *self.rng.pick(&["onnx.Add", "onnx.Sub", "onnx.Mul"]);
                let operands = if self.rng.one_in(2) { [v, c] } else { [c, v] };
                self.push(op, &operands, none, shape);
            }
            4 | 5 => {
                let n = *self.rng.pick(&[4, 8, 6]);
                let w = self.konst(&[last, n], 1.0 / (last as f32).sqrt());
                let mut out = shape;
                *out.last_mut().expect("values have dims") = n;
                self.push("onnx.MatMul", &[v, w], none, out);
            }
            6 => {
                let same: Vec<Value> = self.pool.iter().filter(|p| p.1 == shape).map(|p| p.0).collect();
                let other = *self.rng.pick(&same);
                let op = *self.rng.pick(&["onnx.Add", "onnx.Mul", "onnx.Sub"]);
                // Tanh keeps repeated products of moderate size.
                let r = self.push(op, &[v, other], none.clone(), shape.clone());
                self.push("onnx.Tanh", &[r], none, shape);
            }
            7 => {
                let mut perm: Vec<i64> = (0..shape.len() as i64).collect();
                let (i, j) = (self.rng.below(perm.len()), self.rng.below(perm.len()));
                perm.swap(i, j);
                let out = perm.iter().map(|&p| shape[p as usize]).collect();
                self.push("onnx.Transpose", &[v], [("perm", Attr::Ints(perm))].into_iter().collect(), out);
            }
            8 => {
                let n: usize = shape.iter().product();
                let out = vec![shape[0], n / shape[0] / last, last];
                let target = self.ints(vec![shape[0] as i64, -1, last as i64]);
                self.push("onnx.Reshape", &[v, target], none, out);
            }
            9 => {
                let axes = self.ints(vec![-1]);
                let mut out = shape;
                *out.last_mut().expect("values have dims") = 1;
                let mean = self.push("onnx.ReduceMean", &[v, axes], none, out);
                self.pool.retain(|p| p.0 != mean);
                let shape = self.pool.iter().find(|p| p.0 == v).expect("it is in the pool").1.clone();
                self.push("onnx.Sub", &[v, mean], Attrs::default(), shape);
            }
            10 => self.rms_norm(v, shape, last),
            11 => {
                // Depends on constants alone.
                let (a, b) = (self.konst(&shape, 0.5), self.konst(&[last], 0.5));
                let c = self.push("onnx.Add", &[a, b], none.clone(), shape.clone());
                self.push("onnx.Add", &[c, v], none, shape);
            }
            _ => {
                self.push("onnx.Softmax", &[v], [("axis", Attr::Int(-1))].into_iter().collect(), shape);
            }
        }
    }

    /// x / sqrt(mean(x^2) + eps) * weight, as exporters write it.
    fn rms_norm(&mut self, v: Value, shape: Vec<usize>, last: usize) {
        let none = Attrs::default();
        let mut narrow = shape.clone();
        *narrow.last_mut().expect("values have dims") = 1;
        let (two, eps) = (self.konst_of(&[], vec![2.0]), self.konst_of(&[], vec![1e-5]));
        let axes = self.ints(vec![-1]);
        let pool = self.pool.len();
        let square = self.push("onnx.Pow", &[v, two], none.clone(), shape.clone());
        let mean = self.push("onnx.ReduceMean", &[square, axes], none.clone(), narrow.clone());
        let sum = self.push("onnx.Add", &[mean, eps], none.clone(), narrow.clone());
        let root = self.push("onnx.Sqrt", &[sum], none.clone(), narrow);
        let unit = self.push("onnx.Div", &[v, root], none.clone(), shape.clone());
        self.pool.truncate(pool);
        let weight: Vec<f32> = self.rng.floats(last).iter().map(|x| 1.0 + 0.5 * x).collect();
        let weight = self.konst_of(&[last], weight);
        self.push("onnx.Mul", &[weight, unit], none, shape);
    }
}
