//! Models that the left side of a rule is in, made up to refute the rule: small shapes that broadcast or not, with dims
//! of one and of zero, numbers and symbols; zeros, both signs, equal, small and large elements, infinities where the
//! rule says that it holds for them.

use super::build::number;
use super::term::{Compare, Condition, Expr, Function, OpTerm, Term, Test, TextRule, Var};
use dialects::ir::{Attr, Attrs, Dim, Elem, Module, OpBuilder, OpName, Type, Value};
use dialects::onnx::attributes;
use dialects::ops::Item;
use dialects::random::Rng;
use dialects::tensor::{Data, Tensor};
use std::collections::HashMap;

/// The versions of ONNX that rules are tried with.
const OPSETS: [i64; 7] = [23, 23, 23, 20, 18, 17, 13];

/// Values have at most this many dims, and this many elements where conditions say how many.
const RANK: usize = 5;
const ELEMENTS: usize = 4096;

/// A model with the left side of a rule in it.
pub struct Instance {
    /// The model; its types are not inferred.
    pub m: Module,
    /// Elements of its inputs.
    pub inputs: Vec<(Value, Item)>,
    /// The left side's value.
    pub root: Value,
    /// The element type of its floats.
    pub elem: Elem,
}

/// What the conditions ask of a variable, as far as it helps to make one up.
#[derive(Clone, Copy, Default)]
struct Wanted {
    constant: bool,
    one_number: bool,
    one_element: bool,
    positive: bool,
}

/// What conditions say a variable is, in terms of variables that come before it.
#[derive(Default)]
struct Said<'r> {
    /// Its dims.
    shape: HashMap<Var, &'r [Expr]>,
    /// Its integers.
    contents: HashMap<Var, &'r [Expr]>,
    /// How many dims it has.
    rank: HashMap<Var, usize>,
}

struct Maker<'r> {
    rule: &'r TextRule,
    rng: &'r mut Rng,
    m: Module,
    opset: i64,
    elem: Elem,
    /// The shape that most values have, or that they broadcast to.
    base: Vec<usize>,
    wanted: Vec<Wanted>,
    said: Said<'r>,
    vars: HashMap<Var, Value>,
    /// The shapes of those variables that are no terms.
    shapes: HashMap<Var, Vec<usize>>,
    attrs: HashMap<Var, Attr>,
    inputs: Vec<(Value, Item)>,
    /// How dims of inputs are declared: as numbers, by a symbol for each size, or not.
    declared: fn(usize) -> Dim,
    /// How elements are drawn.
    draw: Draw,
}

#[derive(Clone, Copy)]
enum Draw {
    Uniform(f64),
    Small,
    Zero,
    Equal,
    Wild,
}

/// Makes up a model; `None` when one of the numbers of the rule is none of the element type that was drawn.
pub fn instance(rule: &TextRule, rng: &mut Rng) -> Option<Instance> {
    use Elem::{F16, F32, F64, I64};
    let elem = *rng.pick(&[F64, F64, F64, F32, F32, F32, F16, I64]);
    let said = said(rule);
    let asked = said.rank.values().max().copied().filter(|&n| n <= RANK && !rng.one_in(4));
    let rank = asked.unwrap_or_else(|| *rng.pick(&[0, 1, 2, 2, 3, 3, 3, 4, 4]));
    let n = 1 + rng.below(4);
    let square = rng.one_in(3);
    let dim = |rng: &mut Rng| if rng.one_in(24) { 0 } else { 1 + rng.below(4) };
    let base = (0..rank).map(|_| if square { n } else { dim(rng) }).collect();
    let draw = match rng.below(8) {
        0..=2 => Draw::Uniform(2.0),
        3 => Draw::Uniform(0.01),
        4 => Draw::Small,
        5 => Draw::Zero,
        6 => Draw::Equal,
        _ if rule.infinities => Draw::Wild,
        _ => Draw::Uniform(50.0),
    };
    let declared = match rng.below(6) {
        0 => |n: usize| Dim::Sym(format!("d{n}").into()),
        1 => |_: usize| Dim::Unknown,
        _ => |n: usize| Dim::from(n),
    };
    let mut m = Module::default();
    let opset = *rng.pick(&OPSETS);
    m.opsets.insert("onnx".into(), opset);
    m.opsets.insert("com.microsoft".into(), 1);
    let mut maker = Maker {
        rule,
        rng,
        m,
        opset,
        elem,
        base,
        wanted: wanted(rule),
        said,
        vars: HashMap::new(),
        shapes: HashMap::new(),
        attrs: HashMap::new(),
        inputs: Vec::new(),
        declared,
        draw,
    };
    let left = &rule.left[maker.rng.below(rule.left.len())];
    let root = maker.op(left)?;
    let Maker { mut m, inputs, .. } = maker;
    let top = m.top;
    m.regions[top].results = vec![root];
    Some(Instance { m, inputs, root, elem })
}

fn wanted(rule: &TextRule) -> Vec<Wanted> {
    let mut out = vec![Wanted::default(); rule.vars.len()];
    for Condition { not, test } in &rule.conditions {
        let mut todo: Vec<(Function, &[Expr])> = Vec::new();
        let mut exprs: Vec<&Expr> = Vec::new();
        match test {
            Test::Holds(f, args) if !not => todo.push((*f, args)),
            Test::Holds(..) => {}
            Test::Compare(a, how, b) => {
                exprs.extend([a, b]);
                if let (Expr::Call(Function::Number, args), Compare::Greater, false) = (a, how, not)
                    && let Some(Expr::Var(v)) = args.first()
                {
                    out[*v].positive = true;
                }
            }
        }
        collect(exprs, &mut todo);
        for (f, args) in todo {
            note(&mut out, f, args);
        }
    }
    // What the right side computes attributes from is a constant too.
    let mut terms = vec![&rule.right];
    while let Some(t) = terms.pop() {
        let mut todo = Vec::new();
        match t {
            Term::Op(op) => {
                terms.extend(&op.operands);
                collect(op.attrs.iter().map(|(_, e)| e).collect(), &mut todo);
            }
            Term::Ints(items) => collect(items.iter().collect(), &mut todo),
            _ => {}
        }
        for (f, args) in todo {
            note(&mut out, f, args);
        }
    }
    out
}

fn said(rule: &TextRule) -> Said<'_> {
    let mut out = Said::default();
    for Condition { not, test } in &rule.conditions {
        let Test::Compare(Expr::Call(f, args), Compare::Equal, is) = test else { continue };
        let (Some(Expr::Var(v)), false) = (args.first(), *not) else { continue };
        match (f, is) {
            (Function::Shape, Expr::List(dims)) => drop(out.shape.insert(*v, dims)),
            (Function::Contents, Expr::List(items)) => drop(out.contents.insert(*v, items)),
            (Function::Rank, Expr::Int(n)) => drop(out.rank.insert(*v, usize::try_from(*n).unwrap_or(0))),
            _ => {}
        }
    }
    out
}

/// The calls in some expressions.
fn collect<'e>(mut exprs: Vec<&'e Expr>, calls: &mut Vec<(Function, &'e [Expr])>) {
    while let Some(e) = exprs.pop() {
        match e {
            Expr::Call(f, args) => {
                calls.push((*f, args));
                exprs.extend(args);
            }
            Expr::Arithmetic(_, a, b) => exprs.extend([&**a, &**b]),
            Expr::List(items) => exprs.extend(items),
            _ => {}
        }
    }
}

fn note(out: &mut [Wanted], f: Function, args: &[Expr]) {
    if let Some(Expr::Var(v)) = args.first() {
        let w = &mut out[*v];
        w.constant |= f.wants_constant();
        w.one_number |= matches!(f, Function::Splat | Function::Number);
        w.one_element |= f == Function::Scalar;
        w.positive |= f == Function::Positive;
    }
}

impl Maker<'_> {
    fn op(&mut self, op: &OpTerm) -> Option<Value> {
        let name = OpName::parse(&op.name)?;
        if attributes::since(&name).is_some_and(|since| since > self.opset) {
            return None;
        }
        let mut operands = Vec::new();
        for (i, t) in op.operands.iter().enumerate() {
            operands.push(self.term(&op.name, i, t)?);
        }
        // An op that commutes is met in both orders.
        if matches!(op.name.as_str(), "onnx.Add" | "onnx.Mul") && self.rng.one_in(3) {
            operands.reverse();
        }
        let mut attrs = Attrs::default();
        for (attr, e) in &op.attrs {
            let kind = attributes::kind(&name, self.opset, attr);
            if kind.is_none() && name.dialect() == "onnx" {
                // This version of the op has no such attribute.
                return None;
            }
            let value = match e {
                Expr::Var(v) => match self.attrs.get(v) {
                    Some(a) => Some(a.clone()),
                    None => {
                        let drawn = self.attribute(attr, kind.unwrap_or("int"));
                        let left_out = attributes::default(&name, self.opset, attr);
                        let drawn = drawn.or_else(|| left_out.clone());
                        self.attrs.insert(*v, drawn.clone()?);
                        drawn
                    }
                },
                e => Some(self.fixed(e, kind)?),
            };
            attrs.set(attr.as_str(), value?);
        }
        let outputs = op.outputs.unwrap_or(op.result + 1);
        let mut build = OpBuilder::named(name, &"left".into()).operands(operands).attrs(attrs);
        for i in 0..outputs {
            build = if i == op.result { build.result(Type::Unknown) } else { build.no_result() };
        }
        let top = self.m.top;
        let made = self.m.push(top, build);
        self.m.ops[made].result(op.result as usize)
    }

    fn fixed(&self, e: &Expr, kind: Option<&str>) -> Option<Attr> {
        Some(match e {
            Expr::Int(n) if kind == Some("float") => Attr::Float(*n as f32),
            Expr::Int(n) => Attr::Int(*n),
            Expr::Float(x) => Attr::Float(*x as f32),
            Expr::Str(s) => match Elem::from_name(s) {
                Some(e) => Attr::Int(e.onnx().into()),
                None => s.as_str().into(),
            },
            Expr::List(items) => {
                let int = |e: &Expr| if let Expr::Int(n) = e { Some(*n) } else { None };
                Attr::Ints(items.iter().map(int).collect::<Option<_>>()?)
            }
            _ => return None,
        })
    }

    /// A value for an attribute; `None` for its default.
    fn attribute(&mut self, name: &str, kind: &str) -> Option<Attr> {
        let rank = self.base.len() as i64;
        let rng = &mut *self.rng;
        Some(match (name, kind) {
            ("perm", _) => {
                let mut perm: Vec<i64> = (0..rank).collect();
                for i in (1..perm.len()).rev() {
                    perm.swap(i, rng.below(i + 1));
                }
                Attr::Ints(perm)
            }
            ("axes", _) => Attr::Ints(self.axes()),
            ("to", _) => {
                let to = *rng.pick(&[Elem::F64, Elem::F32, Elem::F32, Elem::F16, Elem::I64, Elem::Bool]);
                Attr::Int(to.onnx().into())
            }
            ("axis", _) => Attr::Int(rng.below(2 * rank.max(1) as usize) as i64 - rank),
            ("epsilon", _) => Attr::Float(*rng.pick(&[1e-5, 1e-3, 0.5])),
            (_, "int") if rng.one_in(3) => return None,
            (_, "int") => Attr::Int(rng.below(3) as i64),
            (_, "float") => Attr::Float(*rng.pick(&[0.0, 0.5, 1.0, -2.0])),
            (_, "ints") => Attr::Ints((0..rank).map(|_| 1 + rng.below(2) as i64).collect()),
            _ => return None,
        })
    }

    fn axes(&mut self) -> Vec<i64> {
        let rank = self.base.len().max(1);
        let first = match self.rng.below(3) {
            0 => -1,
            1 => rank as i64 - 1,
            _ => self.rng.below(2 * rank) as i64 - rank as i64,
        };
        let mut axes = vec![first];
        if self.rng.one_in(5) {
            axes.push(self.rng.below(rank) as i64);
        }
        axes
    }

    fn term(&mut self, op: &str, i: usize, t: &Term) -> Option<Option<Value>> {
        let top = self.m.top;
        Some(Some(match t {
            Term::Absent => return Some(None),
            Term::Op(op) => self.op(op)?,
            Term::Any(terms) => {
                let t = &terms[self.rng.below(terms.len())];
                return self.term(op, i, t);
            }
            Term::Named(v, t) => match self.vars.get(v) {
                Some(&known) => known,
                None => {
                    let made = self.term(op, i, t)??;
                    self.vars.insert(*v, made);
                    made
                }
            },
            Term::Number(n) => {
                let scalar = number(*n, self.elem)?;
                let shape = vec![1; self.rng.below(3).saturating_sub(1)];
                self.m.add_const(top, "number", scalar.reshape(&shape).ok()?.to_const())
            }
            Term::Ints(items) => {
                let int = |e: &Expr| if let Expr::Int(n) = e { Some(*n) } else { None };
                let items: Vec<i64> = items.iter().map(int).collect::<Option<_>>()?;
                self.m.add_const(top, "ints", Tensor::new(&[items.len()], items).ok()?.to_const())
            }
            Term::Var(v) => match self.vars.get(v) {
                Some(&known) => known,
                None => {
                    let made = self.variable(*v, op, i)?;
                    self.vars.insert(*v, made);
                    made
                }
            },
        }))
    }

    /// A value for a variable that stands as operand `i` of `op`.
    fn variable(&mut self, v: Var, op: &str, i: usize) -> Option<Value> {
        let w = self.wanted[v];
        let special = match self.said.contents.get(&v).filter(|_| !self.rng.one_in(8)) {
            Some(items) => {
                let items = items.iter().map(|e| self.size(e)).collect::<Option<Vec<i64>>>()?;
                Tensor::new(&[items.len()], items).ok()
            }
            None => self.special(v, op, i),
        };
        // What an op reads as a shape or as axes is a constant nearly always.
        let constant = w.constant || if special.is_some() { !self.rng.one_in(8) } else { self.rng.one_in(2) };
        let t = match special {
            Some(t) => t,
            None => {
                let shape = self.shape_of(v);
                self.tensor(&shape, w)?
            }
        };
        self.shapes.insert(v, t.shape().to_vec());
        let (top, name) = (self.m.top, self.rule.vars[v].clone());
        if constant {
            return Some(self.m.add_const(top, name, t.to_const()));
        }
        let dims: Vec<Dim> = t.shape().iter().map(|&n| (self.declared)(n)).collect();
        let value = self.m.add_arg(top, name, Type::tensor(t.elem(), dims));
        self.inputs.push((value, t.into()));
        Some(value)
    }

    /// Operands that are no numbers to compute with: shapes, axes, places, choices.
    fn special(&mut self, v: Var, op: &str, i: usize) -> Option<Tensor> {
        let op = op.strip_prefix("onnx.")?;
        let rank = self.base.len();
        let ints = |v: Vec<i64>| Tensor::new(&[v.len()], v).ok();
        match (op, i) {
            ("Reshape" | "Expand", 1) => {
                let base: Vec<i64> = self.base.iter().map(|&n| n as i64).collect();
                ints(match self.rng.below(5) {
                    0 if op == "Reshape" => vec![-1],
                    1 if op == "Reshape" && rank > 1 => vec![0, -1],
                    2 => [vec![1], base].concat(),
                    3 if rank > 1 => {
                        let merged = base[0] * base[1];
                        [vec![merged], base[2..].to_vec()].concat()
                    }
                    _ => base,
                })
            }
            ("Squeeze" | "Unsqueeze", 1) => {
                let axes = self.axes();
                ints(axes)
            }
            (reduce, 1) if reduce.starts_with("Reduce") => {
                let axes = self.axes();
                ints(axes)
            }
            ("Gather", 1) => ints(vec![0, *self.rng.pick(&[0, 0, 1, -1])]),
            ("Slice", 1) => ints(vec![self.rng.below(2) as i64]),
            ("Slice", 2) => ints(vec![*self.rng.pick(&[i64::MAX, 1, 2, -1])]),
            ("Slice", 3) => ints(vec![self.rng.below(rank.max(1)) as i64]),
            ("Slice", 4) => ints(vec![1]),
            ("Where", 0) | ("And" | "Or" | "Xor" | "Not", _) => {
                let shape = self.shape_of(v);
                let n = shape.iter().product();
                Tensor::new(&shape, Data::Bool((0..n).map(|_| self.rng.one_in(2)).collect())).ok()
            }
            _ => None,
        }
    }

    /// The shape of a variable: mostly what conditions say of it.
    fn shape_of(&mut self, v: Var) -> Vec<usize> {
        let dims = self.said.shape.get(&v).filter(|_| !self.rng.one_in(8));
        if let Some(dims) = dims {
            let known: Vec<Option<i64>> = dims.iter().map(|e| self.size(e)).collect();
            // What nothing is said of is one, or a size of the base.
            let other =
                |rng: &mut Rng| if rng.one_in(2) || self.base.is_empty() { 1 } else { *rng.pick(&self.base) };
            let dim =
                |d: Option<i64>| d.and_then(|d| usize::try_from(d).ok()).unwrap_or_else(|| other(self.rng));
            let shape: Vec<usize> = known.into_iter().map(dim).collect();
            let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            if shape.len() <= RANK && count.is_some_and(|n| n <= ELEMENTS) {
                return shape;
            }
        }
        match self.said.rank.get(&v) {
            Some(&n) if n == self.base.len() && !self.rng.one_in(8) => self.base.clone(),
            _ => self.shape(self.wanted[v]),
        }
    }

    /// A size that is computed from the shapes of variables that were made up already.
    fn size(&self, e: &Expr) -> Option<i64> {
        Some(match e {
            Expr::Int(n) => *n,
            Expr::Arithmetic(sign, a, b) => {
                let (a, b) = (self.size(a)?, self.size(b)?);
                match sign {
                    '+' => a.checked_add(b)?,
                    '-' => a.checked_sub(b)?,
                    '*' => a.checked_mul(b)?,
                    _ => a.checked_div(b)?,
                }
            }
            Expr::Call(f, args) => {
                let Some(Expr::Var(v)) = args.first() else { return None };
                let shape = self.shapes.get(v)?;
                match (f, args.get(1)) {
                    (Function::Rank, _) => shape.len() as i64,
                    (Function::Dim, Some(Expr::Int(i))) => {
                        let i = if *i < 0 { i + shape.len() as i64 } else { *i };
                        *shape.get(usize::try_from(i).ok()?)? as i64
                    }
                    _ => return None,
                }
            }
            _ => return None,
        })
    }

    /// A shape that mostly broadcasts with the base.
    fn shape(&mut self, w: Wanted) -> Vec<usize> {
        let base = self.base.clone();
        let tail = self.rng.below(base.len() + 1);
        if w.one_element || (w.one_number && !self.rng.one_in(4)) {
            return vec![1; tail.min(self.rng.below(3))];
        }
        match self.rng.below(8) {
            0..=2 => base,
            3 => base[tail..].to_vec(),
            // One number for each channel, which is the last dim.
            4 => base.last().map(|&n| vec![n]).unwrap_or_default(),
            5 => base.iter().map(|&n| if self.rng.one_in(2) { 1 } else { n }).collect(),
            6 => [vec![1 + self.rng.below(2)], base].concat(),
            _ if base.len() > 1 => {
                // A matrix the other way round.
                let mut s = base;
                let n = s.len();
                s.swap(n - 1, n - 2);
                s
            }
            _ => Vec::new(),
        }
    }

    fn tensor(&mut self, shape: &[usize], w: Wanted) -> Option<Tensor> {
        let n: usize = shape.iter().product();
        let whole = self.elem == Elem::I64;
        let mut one = || {
            let u = f64::from(self.rng.float());
            let x = match self.draw {
                Draw::Uniform(scale) if w.one_number && scale > 2.0 => u,
                // Products of 16-bit floats must stay finite.
                Draw::Uniform(scale) if self.elem == Elem::F16 => u * scale.min(1.0),
                Draw::Uniform(scale) => u * scale,
                Draw::Small => *self.rng.pick(&[-2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0]),
                Draw::Zero => 0.0,
                Draw::Equal => 0.75,
                Draw::Wild => {
                    *self.rng.pick(&[f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.0, -0.0, 1.5, -3.0])
                }
            };
            let x = if whole { (x * 4.0).trunc() } else { x };
            match w.positive {
                true if whole => x.abs() + 1.0,
                true if x.is_finite() => x.abs() + *self.rng.pick(&[1e-5, 0.01, 1.0]),
                true => 1.0,
                false => x,
            }
        };
        let values: Vec<f64> = if w.one_number { vec![one(); n] } else { (0..n).map(|_| one()).collect() };
        match self.elem {
            Elem::F64 => Tensor::new(shape, values).ok(),
            Elem::I64 => Tensor::new(shape, values.iter().map(|&x| x as i64).collect::<Vec<_>>()).ok(),
            e => Tensor::from_f32(e, shape, values.iter().map(|&x| x as f32).collect()).ok(),
        }
    }
}
