//! `fuse` on decoders that are made up: long forms of norms, activations, rotary embedding and attention as exporters
//! write them, and forms that look alike and compute something else. The interpreter runs each model before and after.

use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::parse::parse;
use dialects::ir::print::{Style, print};
use dialects::ir::{Elem, Module, infer, verify};
use dialects::ops::{Item, Ops};
use dialects::random::Rng;
use dialects::tensor::Tensor;
use passes::Settings;
use qcc::driver::{self, Options};
use qcc::env::DriverEnv;
use qcc::pipeline::Pipeline;
use qcc::term::Term;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The width of a head.
const WIDTH: usize = 4;
/// The width of the residual stream.
const MODEL: usize = 8;

fn rewrite(m: &mut Module, pipeline: &str, profile: &str) {
    let registry = qcc::registry();
    let env = DriverEnv::without_data(registry.ops(), Term::new(true));
    let settings = Settings { profile: profile.into(), ..Settings::default() };
    let options = Options { settings, ..Options::default() };
    let parsed = Pipeline::parse(pipeline, &registry, &[], &[]).unwrap();
    driver::run(m, &parsed, &registry, &env, &options).unwrap_or_else(|e| panic!("{e}"));
    let found: Vec<String> = verify::verify(m, registry.ops()).iter().map(ToString::to_string).collect();
    assert!(found.is_empty(), "{found:?}");
}

fn run(m: &Module, inputs: &[Tensor]) -> Vec<f32> {
    let args: Vec<_> =
        m.regions[m.top].args.iter().copied().zip(inputs.iter().cloned().map(Item::from)).collect();
    let out = run_once(&Interpreter::new(Ops::standard()), m, &args, &m.regions[m.top].results).unwrap();
    out[0].tensor().unwrap().to_f32().unwrap().into_owned()
}

/// A model that is being written.
struct Decoder {
    rng: Rng,
    opset: i64,
    body: String,
    next: usize,
    /// Whether something in it only looks like what an op computes.
    odd: bool,
}

impl Decoder {
    fn one_in(&mut self, n: usize) -> bool {
        self.rng.below(n) == 0
    }

    /// Whether to write the next form wrong.
    fn wrong(&mut self) -> bool {
        let wrong = self.one_in(12);
        self.odd |= wrong;
        wrong
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("%v{}", self.next)
    }

    fn op(&mut self, op: &str, operands: &[&str], attrs: &str) -> String {
        let name = self.name();
        self.body += &format!("  {name} = onnx.{op}({}) {attrs}\n", operands.join(", "));
        name
    }

    fn number(&mut self, x: f32) -> String {
        let name = self.name();
        self.body += &format!("  const {name} : tensor<f32> splat({x:?})\n");
        name
    }

    fn ints(&mut self, v: &[i64]) -> String {
        let name = self.name();
        let list: Vec<String> = v.iter().map(ToString::to_string).collect();
        self.body += &format!("  const {name} : tensor<{}xi64> [{}]\n", v.len(), list.join(", "));
        name
    }

    fn weight(&mut self, dims: &[usize]) -> String {
        let name = self.name();
        let list: Vec<String> = dims.iter().map(ToString::to_string).collect();
        self.body += &format!("  const {name} : tensor<{}xf32> random({})\n", list.join("x"), self.next);
        name
    }

    fn linear(&mut self, x: &str, from: usize, to: usize) -> String {
        let w = self.weight(&[from, to]);
        self.op("MatMul", &[x, &w], "")
    }

    /// Both operand orders.
    fn either(&mut self, op: &str, a: &str, b: &str) -> String {
        if self.one_in(2) { self.op(op, &[a, b], "") } else { self.op(op, &[b, a], "") }
    }

    fn rms_norm(&mut self, x: &str) -> String {
        let two = self.number(2.0);
        let square =
            if self.one_in(2) { self.op("Pow", &[x, &two], "") } else { self.op("Mul", &[x, x], "") };
        let axis = if self.wrong() { 1 } else { -1 };
        let mean = if self.opset < 18 {
            self.op("ReduceMean", &[&square], &format!("{{axes=[{axis}]}}"))
        } else {
            let axes = self.ints(&[axis]);
            self.op("ReduceMean", &[&square, &axes], "")
        };
        let eps = self.number(1e-5);
        let sum = self.either("Add", &mean, &eps);
        let root = self.op("Sqrt", &[&sum], "");
        let normed = if self.one_in(2) {
            self.op("Div", &[x, &root], "")
        } else {
            let r = self.op("Reciprocal", &[&root], "");
            self.either("Mul", x, &r)
        };
        let gain = self.weight(&[MODEL]);
        self.either("Mul", &normed, &gain)
    }

    /// The tables of rotary embedding: `[1, s, WIDTH]`, or with a dim for the heads.
    fn tables(&mut self) -> [String; 2] {
        let size = self.op("Shape", &["%x"], "{start=1, end=2}");
        let size = self.op("Squeeze", &[&size], "");
        let (start, step) = (self.name(), self.name());
        self.body +=
            &format!("  const {start} : tensor<i64> splat(0)\n  const {step} : tensor<i64> splat(1)\n");
        let places = self.op("Range", &[&start, &size, &step], "");
        let axes = self.ints(&[0, 2]);
        let places = self.op("Unsqueeze", &[&places, &axes], "");
        let places = self.op("Cast", &[&places], "{to=1}");
        let freq = self.weight(&[1, 1, WIDTH / 2]);
        let angles = self.op("Mul", &[&places, &freq], "");
        let second = if self.wrong() { self.op("Neg", &[&angles], "") } else { angles.clone() };
        let both = self.op("Concat", &[&angles, &second], "{axis=-1}");
        let heads = self.one_in(2);
        ["Cos", "Sin"].map(|f| {
            let t = self.op(f, &[&both], "");
            let one = self.ints(&[1]);
            if heads { self.op("Unsqueeze", &[&t, &one], "") } else { t }
        })
    }

    fn rotary(&mut self, x: &str, [cos, sin]: &[String; 2]) -> String {
        let n = WIDTH as i64;
        let (end, half) = (if self.one_in(2) { n } else { i64::MAX }, if self.wrong() { 1 } else { n / 2 });
        let [zero, half, end, axis] = [0, half, end, 3].map(|i| self.ints(&[i]));
        let high = self.op("Slice", &[x, &half, &end, &axis], "");
        let low = self.op("Slice", &[x, &zero, &half, &axis], "");
        let turned = self.op("Neg", &[&high], "");
        let other = match self.wrong() {
            true => self.op("Concat", &[&low, &turned], "{axis=-1}"),
            false => self.op("Concat", &[&turned, &low], "{axis=-1}"),
        };
        let (a, b) = (self.either("Mul", x, cos), self.either("Mul", &other, sin));
        self.either("Add", &a, &b)
    }

    /// `[b, s, heads * WIDTH]` as `[b, heads, s, WIDTH]`.
    fn heads(&mut self, x: &str, heads: usize) -> String {
        let to = self.ints(&[0, 0, heads as i64, WIDTH as i64]);
        let x = self.op("Reshape", &[x, &to], "");
        self.op("Transpose", &[&x], "{perm=[0, 2, 1, 3]}")
    }

    fn repeat(&mut self, x: &str, kv: usize, times: usize) -> String {
        if times == 1 {
            return x.to_string();
        }
        let at = if self.wrong() { 1 } else { 2 };
        let axis = self.ints(&[at as i64]);
        let x = self.op("Unsqueeze", &[x, &axis], "");
        let mut sizes = [1; 5];
        sizes[at] = times as i64;
        let sizes = self.ints(&sizes);
        let x = self.op("Expand", &[&x, &sizes], "");
        let to = self.ints(&[0, (kv * times) as i64, -1, WIDTH as i64]);
        self.op("Reshape", &[&x, &to], "")
    }

    /// Which keys a row may attend to: `[b, 1, s, s]`, some rows of it none.
    fn mask(&mut self) -> String {
        let axes = self.ints(&[1, 2]);
        let keys = self.op("Unsqueeze", &["%mask", &axes], "");
        let axes = self.ints(&[1, 3]);
        let rows = self.op("Unsqueeze", &["%mask", &axes], "");
        let rows = self.op("Cast", &[&rows], "{to=9}");
        let keys = self.op("Cast", &[&keys], "{to=9}");
        self.op("And", &[&rows, &keys], "")
    }

    fn attention(&mut self, x: &str) -> String {
        let kv = 1 + self.rng.below(2);
        let times = 1 + self.rng.below(2);
        let n = kv * times;
        let [q, k, v] = [n, kv, kv].map(|n| self.linear(x, MODEL, n * WIDTH));
        let (mut q, mut k, v) = (self.heads(&q, n), self.heads(&k, kv), self.heads(&v, kv));
        if !self.one_in(3) {
            let tables = self.tables();
            (q, k) = (self.rotary(&q, &tables), self.rotary(&k, &tables));
        }
        let (k, v) = (self.repeat(&k, kv, times), self.repeat(&v, kv, times));
        let t = self.op("Transpose", &[&k], "{perm=[0, 1, 3, 2]}");
        let scale = self.number(0.7);
        let product = match self.rng.below(4) {
            0 => {
                let (q, t) = (self.op("Mul", &[&q, &scale], ""), self.op("Mul", &[&t, &scale], ""));
                self.op("MatMul", &[&q, &t], "")
            }
            1 => {
                let q = self.op("Mul", &[&q, &scale], "");
                self.op("MatMul", &[&q, &t], "")
            }
            2 => {
                let s = self.op("MatMul", &[&q, &t], "");
                self.either("Mul", &s, &scale)
            }
            _ => self.op("MatMul", &[&q, &t], ""),
        };
        let mask = self.mask();
        let on = self.number(0.0);
        let hidden = self.one_in(2);
        let off = self.number(if hidden { f32::NEG_INFINITY } else { -3e38 });
        let bias = self.op("Where", &[&mask, &on, &off], "");
        let scores = self.either("Add", &product, &bias);
        let axis = if self.wrong() { 2 } else { -1 };
        let mut p = self.op("Softmax", &[&scores], &format!("{{axis={axis}}}"));
        if hidden {
            let none = self.op("IsNaN", &[&p], "");
            let instead = if self.wrong() { self.number(0.5) } else { self.number(0.0) };
            p = self.op("Where", &[&none, &instead, &p], "");
        }
        let y = self.op("MatMul", &[&p, &v], "");
        let y = self.op("Transpose", &[&y], "{perm=[0, 2, 1, 3]}");
        let to = self.ints(&[0, 0, (n * WIDTH) as i64]);
        let y = self.op("Reshape", &[&y, &to], "");
        self.linear(&y, n * WIDTH, MODEL)
    }

    fn activation(&mut self, x: &str) -> String {
        let (one, half) = (self.number(1.0), self.number(0.5));
        match self.rng.below(3) {
            0 => {
                let from = if self.wrong() { self.op("Neg", &[x], "") } else { x.to_string() };
                let s = self.op("Sigmoid", &[&from], "");
                self.either("Mul", x, &s)
            }
            1 => {
                let root = if self.wrong() { 1.5 } else { std::f32::consts::SQRT_2 };
                let root = self.number(root);
                let e = self.op("Div", &[x, &root], "");
                let e = self.op("Erf", &[&e], "");
                let f = self.either("Add", &e, &one);
                let p = self.either("Mul", x, &f);
                self.either("Mul", &p, &half)
            }
            _ => {
                let (c, r, three) = (self.number(0.044715), self.number(0.797_884_6), self.number(3.0));
                let cube = self.op("Pow", &[x, &three], "");
                let u = self.either("Mul", &cube, &c);
                let u = self.either("Add", x, &u);
                let u = self.either("Mul", &u, &r);
                let t = self.op("Tanh", &[&u], "");
                let f = self.either("Add", &t, &one);
                let p = self.either("Mul", x, &half);
                self.either("Mul", &p, &f)
            }
        }
    }

    fn model(seed: u64) -> (String, bool) {
        let mut d = Decoder { rng: Rng(seed * 2 + 1), opset: 0, body: String::new(), next: 0, odd: false };
        d.opset = [17, 18, 20, 23, 23, 24][d.rng.below(6)];
        let x = d.rms_norm("%x");
        let a = d.attention(&x);
        let x = d.op("Add", &["%x", &a], "");
        let h = d.rms_norm(&x);
        let h = d.linear(&h, MODEL, 6);
        let h = d.activation(&h);
        let h = d.linear(&h, 6, MODEL);
        let z = d.op("Add", &[&x, &h], "");
        let Decoder { opset, body, odd, .. } = d;
        let text = format!(
            "module ir_version=10 opsets {{onnx={opset}}}\ngraph @main(%x : tensor<b x s x {MODEL}xf32>, \
             %mask : tensor<b x s x i64>) {{\n{body}  return {z}\n}}\n"
        );
        (text, odd)
    }
}

#[test]
fn made_up_decoders_keep_their_function() {
    let mut made: BTreeMap<String, usize> = BTreeMap::new();
    for seed in 0..160 {
        let (text, odd) = Decoder::model(seed);
        let mut m = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
        let wrong = infer::infer(&mut m, &Ops::standard());
        assert!(wrong.is_empty(), "seed {seed}: {wrong:?}\n{text}");
        let before = m.clone();
        let pipeline = if seed % 3 == 0 { "fuse" } else { "canonicalize,fuse" };
        let profile = if seed % 4 == 0 { "" } else { "ort-cpu" };
        rewrite(&mut m, pipeline, profile);
        let after = print(&m, Style { full: false, max_inline: 64 });
        for op in m.live_ops().into_iter().filter(|_| !odd) {
            *made.entry(m.ops[op].name.to_string()).or_default() += 1;
        }
        for (b, s) in [(2, 5), (1, 1), (3, 2)] {
            let mut rng = Rng(seed + 1);
            let x = Tensor::from_f32(Elem::F32, &[b, s, MODEL], rng.floats(b * s * MODEL)).unwrap();
            let mask: Vec<i64> = (0..b * s).map(|_| rng.below(3).min(1) as i64).collect();
            let inputs = [x, Tensor::new(&[b, s], mask).unwrap()];
            let (old, new) = (run(&before, &inputs), run(&m, &inputs));
            assert_eq!(old.len(), new.len());
            let most = old.iter().filter(|x| x.is_finite()).fold(1e-3f32, |m, x| m.max(x.abs()));
            let same =
                |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-4 * most;
            let differ = old.iter().zip(&new).position(|p| !same(p));
            assert_eq!(differ, None, "seed {seed}, b={b}, s={s}: {old:?} {new:?}\n{text}\n{after}");
        }
    }
    println!("{made:?}");
    for op in [
        "onnx.Attention",
        "onnx.RotaryEmbedding",
        "onnx.RMSNormalization",
        "onnx.Gelu",
        "com.microsoft.MultiHeadAttention",
        "com.microsoft.RotaryEmbedding",
        "com.microsoft.QuickGelu",
    ] {
        assert!(made.get(op).is_some_and(|&n| n >= 5), "{op} was hardly made: {made:?}");
    }
}

/// The exports of one model, and how many ops of each kind are left of each.
struct Exports {
    /// Name and model.
    models: Vec<(&'static str, Module)>,
}

impl Exports {
    fn read() -> Option<Exports> {
        let Some(dir) = std::env::var_os("QCC_MODELS").map(PathBuf::from) else {
            eprintln!("skipped: QCC_MODELS is not set");
            return None;
        };
        let names = ["model", "external/model", "dynamo_eager_op18", "dynamo_sdpa_op18", "dynamo_sdpa_op23"];
        let read = |name| {
            let path = dir.join("stories260k").join(format!("{name}.onnx"));
            (name, qcc::onnx::import::read(&path).unwrap_or_else(|e| panic!("{e}")).module)
        };
        Some(Exports { models: names.into_iter().map(read).collect() })
    }

    /// Rewrites each, compares what it computes, and counts its ops.
    fn table(mut self, pipeline: &str) -> String {
        let mut table: BTreeMap<String, [usize; 5]> = BTreeMap::new();
        for (i, (name, m)) in self.models.iter_mut().enumerate() {
            infer::infer(m, &Ops::standard());
            let before = m.clone();
            rewrite(m, pipeline, "ort-cpu");
            for op in m.live_ops() {
                table.entry(m.ops[op].name.op().to_string()).or_default()[i] += 1;
                table.entry("~ all".into()).or_default()[i] += 1;
            }
            // A row that may attend to nothing, where the export allows for rows of several lengths.
            for padding in [0, 3] {
                let ids: Vec<i64> = (0..12).map(|i| i * 37 % 500).collect();
                let mask: Vec<i64> = (0..12).map(|i| i64::from(i >= padding)).collect();
                let inputs = [ids, mask].map(|v| Tensor::new(&[1, 12], v).unwrap());
                let (old, new) = (run(&before, &inputs), run(m, &inputs));
                let most = old.iter().fold(0f32, |m, x| m.max(x.abs()));
                assert!(most > 0.1 && old.len() == new.len());
                let off = old.iter().zip(&new).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(off <= 1e-5 * most, "{name} differs by {} of its largest output", off / most);
            }
        }
        let line = |(op, n): (&String, &[usize; 5])| {
            n.iter().fold(format!("{op:<26}"), |line, n| format!("{line}{n:>6}")) + "\n"
        };
        table.iter().map(line).collect()
    }
}

#[test]
fn exports_of_one_model_come_out_alike() {
    if let Some(exports) = Exports::read() {
        insta::assert_snapshot!("exports_fused", exports.table("canonicalize,fuse"));
    }
    if let Some(exports) = Exports::read() {
        let table = exports.table("canonicalize,raise-opset{version=23},fuse");
        insta::assert_snapshot!("exports_raised_and_fused", table);
    }
}
