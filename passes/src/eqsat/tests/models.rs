//! What the tests of the engine share: small graphs, and questions about them.

use super::*;

/// A module with the graph `(inputs) { body }`, its types inferred.
pub fn module(inputs: &str, body: &str) -> Module {
    let text = format!("module ir_version=10 opsets {{onnx=23}}\ngraph @main({inputs}) {{\n{body}\n}}\n");
    let mut m = parse::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
    let wrong = infer::infer(&mut m, &Ops::standard());
    assert!(wrong.is_empty(), "{wrong:?}");
    m
}

pub fn value(m: &Module, name: &str) -> Value {
    let live = |v: &Value| m.values[*v].def != ValueDef::Erased;
    m.values
        .keys()
        .find(|v| &*m.values[*v].name == name && live(v))
        .unwrap_or_else(|| panic!("no value {name}"))
}

/// The linears that read a value.
pub fn readers(m: &Module, v: Value) -> Vec<Op> {
    linear::linears(m).into_iter().filter(|l| l.x == v).map(|l| l.op).collect()
}

pub fn ask(m: &Module, name: &str) -> Placement {
    let v = value(m, name);
    let ops = readers(m, v);
    assert!(!ops.is_empty(), "no linear reads {name}");
    place(m, &Ops::standard(), v, &ops)
}

/// Numbers between -1 and 1 that look random.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

pub fn run(m: &Module) -> Vec<Vec<f32>> {
    let inputs: Vec<(Value, Item)> = m.regions[m.top]
        .args
        .iter()
        .enumerate()
        .map(|(i, &v)| {
            let t = m.ty(v).as_tensor().unwrap();
            let shape: Vec<usize> =
                t.dims.as_ref().unwrap().iter().map(|d| d.known().map_or(3, |n| n as usize)).collect();
            let data = Data::F32(noise(shape.iter().product(), i as u64 + 1));
            (v, Tensor::new(&shape, data).unwrap().into())
        })
        .collect();
    let exec = Interpreter::new(Ops::standard());
    let items = run_once(&exec as &dyn Executor, m, &inputs, &m.regions[m.top].results).unwrap();
    items.iter().map(|i| i.tensor().unwrap().to_f32().unwrap().into_owned()).collect()
}

pub fn assert_close(a: &[Vec<f32>], b: &[Vec<f32>]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!(a.len(), b.len());
        let most = a.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(most > 0.0 && most.is_finite(), "a test on nothing: {most}");
        for (x, y) in a.iter().zip(b) {
            assert!((x - y).abs() <= 2e-5 * most, "{x} {y}");
        }
    }
}

pub fn histogram(m: &Module) -> BTreeMap<String, usize> {
    let mut h = BTreeMap::new();
    for op in m.live_ops() {
        *h.entry(m.ops[op].name.to_string()).or_default() += 1;
    }
    h
}

/// Scales `name` for its linears as far as the placement's freedom goes, folds, and checks that the function is that
/// of the model with the product in it and that no op was added.
pub fn folds(m: &Module, name: &str) -> Placement {
    let p = ask(m, name);
    assert_eq!(p.why_not, None, "{name}: {p:?}");
    assert_eq!(p.limits, Vec::<String>::new());
    let mut m = m.clone();
    let before = histogram(&m);
    let v = value(&m, name);
    let ops = readers(&m, v);
    let k = m.ty(v).dims().unwrap().last().unwrap().known().unwrap() as usize;
    let numbers: Vec<f32> = noise(k, 99).iter().map(|x| x.abs() + 0.5).collect();
    let scale: Vec<f32> = match &p.freedom {
        None => numbers,
        Some(classes) => classes.iter().map(|&c| numbers[c as usize]).collect(),
    };
    let top = m.top;
    let s = m.add_const(top, "s", Tensor::new(&[k], scale).unwrap().to_const());
    let ty = m.ty(v).clone();
    let mul = m.insert_before(ops[0], OpBuilder::new("onnx.Mul", &"mul".into()).operands([v, s]).result(ty));
    let product = m.ops[mul].result(0).unwrap();
    for &op in &ops {
        for o in m.ops[op].operands.iter_mut().flatten().filter(|o| **o == v) {
            *o = product;
        }
    }
    let want = run(&m);
    let outcome = fold_window(&mut m, &Ops::standard(), product).unwrap();
    assert!(outcome.absorbed, "{outcome:?}");
    assert!(!outcome.sites.is_empty());
    assert_eq!(histogram(&m), before);
    assert_close(&want, &run(&m));
    let wrong = infer::infer(&mut m, &Ops::standard());
    assert!(wrong.is_empty(), "{wrong:?}");
    let order = dialects::ir::graph::topological(&m, m.top).unwrap();
    assert_eq!(order, m.regions[m.top].ops, "definitions come before uses");
    p
}

/// Asks for a placement that must be refused, and gives the reason.
pub fn refused(m: &Module, name: &str) -> String {
    let p = ask(m, name);
    assert!(p.sites.is_empty());
    p.why_not.unwrap_or_else(|| panic!("{name} was absorbed"))
}

pub const RMS: &str = "
  const %two : tensor<f32> splat(2)
  const %eps : tensor<f32> splat(0.00001)
  const %axis : tensor<1xi64> [-1]
  const %one : tensor<f32> splat(1)
  const %g : tensor<8xf32> random(1)
  const %w : tensor<8x4xf32> random(2)
  const %w2 : tensor<8x6xf32> random(3)
  %sq = onnx.Pow(%x, %two)
  %mean = onnx.ReduceMean(%sq, %axis)
  %safe = onnx.Add(%mean, %eps)
  %root = onnx.Sqrt(%safe)";
