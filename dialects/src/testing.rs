//! Runs the fixtures of `testdata/*.cases`: single ops whose results an independent implementation computed
//! (`scripts/op_cases` writes them).
//!
//! A file is lines of words. `case NAME OP OPSET OUTPUTS RTOL ATOL` starts a case; `attr NAME KIND VALUE..` with kind
//! `i`, `f`, `s`, `is`, `fs` gives an attribute; `in ELEM DIMS HEX` and `in -` give operands, `out ELEM DIMS HEX`
//! and `out -` (not compared) the results. DIMS is `2x3`, or `.` for a scalar; HEX holds little-endian bytes.

use crate::ir::{Attr, Attrs, ConstData, ConstPool, Dim, Elem, OpName, Type};
use crate::ops::{EvalCx, Fact, InferCx, Item, OpError, Ops};
use crate::tensor::{Data, Tensor};
use bytes::Bytes;
use std::sync::Arc;

/// One single-op case.
pub(crate) struct Case {
    /// What messages call it.
    pub label: String,
    /// The op.
    pub op: OpName,
    /// The opset of the op's dialect.
    pub opset: i64,
    /// The attributes.
    pub attrs: Attrs,
    /// How many results it has.
    pub outputs: usize,
    /// Operands.
    pub inputs: Vec<Option<Item>>,
    /// What the results must be; `None` is not compared.
    expected: Vec<Option<Tensor>>,
    rtol: f64,
    atol: f64,
}

impl Case {
    /// A case without expected results, for tests that check them by hand.
    pub fn new(op: &str, opset: i64, attrs: &[(&str, Attr)], inputs: Vec<Option<Tensor>>) -> Case {
        Case {
            label: op.to_string(),
            op: OpName::parse(op).unwrap(),
            opset,
            attrs: attrs.iter().map(|(n, a)| (*n, a.clone())).collect(),
            outputs: 1,
            inputs: inputs.into_iter().map(|t| t.map(Item::from)).collect(),
            expected: Vec::new(),
            rtol: 0.0,
            atol: 0.0,
        }
    }

    /// Evaluates the op.
    pub fn eval(&self, exact: bool) -> Result<Vec<Item>, OpError> {
        let def = Ops::standard().get(&self.op).unwrap_or_else(|| panic!("no op {}", self.op));
        let region = |_, _| Err(OpError::invalid("no regions here"));
        (def.eval)(&EvalCx {
            name: &self.op,
            attrs: &self.attrs,
            opset: self.opset,
            inputs: &self.inputs,
            outputs: self.outputs,
            consts: &ConstPool::new(),
            exact,
            max_iterations: 1 << 10,
            results_of: &|_| Vec::new(),
            region: &region,
        })
    }

    /// Infers the op from these facts of the operands.
    pub fn infer(&self, facts: &[Option<Fact>]) -> Result<Vec<Fact>, OpError> {
        self.infer_with(facts, &ConstPool::new())
    }

    /// Infers the op when every operand is a constant.
    fn infer_constants(&self) -> Result<Vec<Fact>, OpError> {
        let mut consts = ConstPool::new();
        let mut add = |item: &Item| consts.push(item.tensor().unwrap().to_const());
        let ids: Vec<_> = self.inputs.iter().map(|i| i.as_ref().map(&mut add)).collect();
        let facts: Vec<_> = ids.into_iter().map(|id| id.map(|id| Fact::of_const(id, &consts))).collect();
        self.infer_with(&facts, &consts)
    }

    fn infer_with(&self, facts: &[Option<Fact>], consts: &ConstPool) -> Result<Vec<Fact>, OpError> {
        let def = Ops::standard().get(&self.op).unwrap_or_else(|| panic!("no op {}", self.op));
        let region = |_, _: &[Fact]| Err(OpError::invalid("no regions here"));
        let cx = InferCx {
            name: &self.op,
            attrs: &self.attrs,
            opset: self.opset,
            inputs: facts,
            outputs: self.outputs,
            consts,
            region: &region,
        };
        (def.verify)(&cx)?;
        (def.infer)(&cx)
    }

    /// The facts of the operands: types with `dim` applied, and small contents.
    pub fn facts(&self, ty: impl Fn(usize, &Tensor) -> Type, contents: bool) -> Vec<Option<Fact>> {
        let fact = |(i, item): (usize, &Option<Item>)| {
            let t = item.as_ref()?.tensor().unwrap();
            let few = contents && t.len() <= 64 && t.rank() <= 1 && matches!(t.elem(), Elem::I64 | Elem::I32);
            let sym = few.then(|| t.to_i64().unwrap().iter().map(|&n| Dim::Known(n)).collect());
            Some(Fact { ty: ty(i, t), sym, konst: None })
        };
        self.inputs.iter().enumerate().map(fact).collect()
    }
}

/// Checks every case of `testdata/NAME.cases`: evaluation against the expected results; inference from full, from
/// symbolic, from unranked and from unknown types against the types of the results.
pub(crate) fn check(name: &str) {
    check_file(&format!("{}/testdata/{name}.cases", env!("CARGO_MANIFEST_DIR")));
}

/// Checks that inference from full types and evaluation both refuse `case`, with `message` among their words.
pub(crate) fn refused(case: &Case, message: &str) {
    let full = |_: usize, t: &Tensor| Type::of_shape(t.elem(), t.shape());
    let inferred = case.infer(&case.facts(full, true)).map(|_| ()).map_err(|e| e.to_string());
    let evaluated = case.eval(false).map(|_| ()).map_err(|e| e.to_string());
    for (how, result) in [("inference", inferred), ("evaluation", evaluated)] {
        match result {
            Ok(()) => panic!("{how} of {} accepts what should be refused: {message}", case.label),
            Err(e) => assert!(e.contains(message), "{how} of {}: {e:?} does not say {message:?}", case.label),
        }
    }
}

/// The cases of a file.
pub(crate) fn cases(path: &str) -> Vec<Case> {
    parse(&std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}")))
}

fn check_file(path: &str) {
    let cases = cases(path);
    assert!(!cases.is_empty());
    let failures: Vec<String> = cases.iter().flat_map(|c| check_one(c).err()).collect();
    assert!(failures.is_empty(), "{} of {} failed:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// Ops whose sizes depend on floats, or on more contents than inference follows: they stay unknown.
const BY_VALUE: [&str; 8] =
    ["Range", "OneHot", "NonZero", "Unique", "Compress", "Resize", "Upsample", "NonMaxSuppression"];

fn check_one(case: &Case) -> Result<(), String> {
    let fail = |what: String| format!("{}: {what}", case.label);
    let got = case.eval(false).map_err(|e| fail(e.to_string()))?;
    for (i, want) in case.expected.iter().enumerate() {
        let Some(want) = want else { continue };
        let got = got.get(i).ok_or_else(|| fail(format!("no result {i}")))?.tensor().unwrap();
        if (got.elem(), got.shape()) != (want.elem(), want.shape()) {
            let (ge, gs, we, ws) = (got.elem(), got.shape(), want.elem(), want.shape());
            return Err(fail(format!("result {i} is {ge} {gs:?}, expected {we} {ws:?}")));
        }
        let (g, w) = (numbers(got), numbers(want));
        for (j, (g, w)) in g.iter().zip(&w).enumerate() {
            let close =
                (g - w).abs() <= case.atol + case.rtol * w.abs() || g == w || (g.is_nan() && w.is_nan());
            if !close {
                return Err(fail(format!("result {i}[{j}] = {g}, expected {w}")));
            }
        }
    }
    let symbols = |i: usize, t: &Tensor| {
        let dims = (0..t.rank()).map(|d| Dim::Sym(format!("s{i}_{d}").into()));
        Type::tensor(t.elem(), dims)
    };
    let full = |_: usize, t: &Tensor| Type::of_shape(t.elem(), t.shape());
    let unranked = |_: usize, t: &Tensor| Type::unranked(t.elem());
    let unknown = |_: usize, _: &Tensor| Type::Unknown;
    let views: [(&str, Vec<Option<Fact>>); 5] = [
        ("full", case.facts(full, true)),
        ("full without contents", case.facts(full, false)),
        ("symbolic", case.facts(symbols, false)),
        ("unranked", case.facts(unranked, false)),
        ("unknown", case.facts(unknown, false)),
    ];
    let inferred = views.iter().map(|(view, facts)| (*view, case.infer(facts)));
    for (view, inferred) in inferred.chain([("constant", case.infer_constants())]) {
        let inferred = inferred.map_err(|e| fail(format!("inference from {view} types: {e}")))?;
        for (i, want) in case.expected.iter().enumerate() {
            let Some(want) = want else { continue };
            let ty = inferred.get(i).map_or(Type::Unknown, |f| f.ty.clone());
            let want = Type::of_shape(want.elem(), want.shape());
            let exact = match view {
                "full" => !BY_VALUE.contains(&case.op.op()),
                "constant" => ["Resize", "Upsample"].contains(&case.op.op()),
                _ => false,
            };
            if ty.unify(&want).is_none() || (exact && ty != want) {
                return Err(fail(format!("from {view} types result {i} is inferred {ty}, expected {want}")));
            }
        }
    }
    Ok(())
}

fn numbers(t: &Tensor) -> Vec<f64> {
    match t.data() {
        Data::F64(v) => v.clone(),
        Data::F32(_) | Data::F16(_) | Data::BF16(_) => {
            t.to_f32().unwrap().iter().map(|&x| x.into()).collect()
        }
        Data::U8(v) => v.iter().map(|&x| x.into()).collect(),
        Data::U64(v) => v.iter().map(|&x| x as f64).collect(),
        // Text is compared by the lengths and bytes of its strings.
        Data::Str(v) => {
            v.iter().flat_map(|s| [s.len() as u8].into_iter().chain(s.to_vec())).map(f64::from).collect()
        }
        _ => t.to_i64().unwrap().iter().map(|&x| x as f64).collect(),
    }
}

fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["case", label, op, opset, outputs, rtol, atol] => {
                let mut case = Case::new(op, opset.parse().unwrap(), &[], Vec::new());
                case.label = format!("{label} ({op})");
                case.outputs = outputs.parse().unwrap();
                (case.rtol, case.atol) = (rtol.parse().unwrap(), atol.parse().unwrap());
                cases.push(case);
            }
            ["attr", name, kind, ref values @ ..] => {
                let attr = match kind {
                    "i" => Attr::Int(values[0].parse().unwrap()),
                    "f" => Attr::Float(values[0].parse().unwrap()),
                    "s" => Attr::from(values.join(" ").as_str()),
                    "is" => Attr::Ints(values.iter().map(|v| v.parse().unwrap()).collect()),
                    "fs" => Attr::Floats(values.iter().map(|v| v.parse().unwrap()).collect()),
                    "ss" => Attr::Strs(values.iter().map(|v| Bytes::copy_from_slice(v.as_bytes())).collect()),
                    other => panic!("attribute kind {other}"),
                };
                cases.last_mut().unwrap().attrs.set(name, attr);
            }
            ["in", ref rest @ ..] => {
                cases.last_mut().unwrap().inputs.push(tensor(rest).map(Item::from));
            }
            ["out", ref rest @ ..] => cases.last_mut().unwrap().expected.push(tensor(rest)),
            [""] | ["#", ..] => {}
            _ => panic!("not understood: {line}"),
        }
    }
    cases
}

fn tensor(words: &[&str]) -> Option<Tensor> {
    let &[elem, dims, ref hex @ ..] = words else { return None };
    let dims: Vec<u64> = dims.split('x').filter(|d| *d != ".").map(|d| d.parse().unwrap()).collect();
    let hex = hex.first().copied().unwrap_or("");
    let bytes: Vec<u8> =
        (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
    let c = ConstData::new(Elem::from_name(elem).unwrap(), dims, Arc::new(Bytes::from(bytes))).unwrap();
    Some(Tensor::from_const(&c).unwrap())
}
