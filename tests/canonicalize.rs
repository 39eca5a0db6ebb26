//! `canonicalize` on generated models and on the exports of one real one: the same function, the same form, and time
//! that does not grow with the square of the layers.

use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::parse::parse;
use dialects::ir::print::{Style, print};
use dialects::ir::{Elem, Module, infer, verify};
use dialects::ops::{Item, Ops};
use dialects::random::Rng;
use dialects::tensor::Tensor;
use passes::{Report, Settings};
use qcc::driver::{self, Options};
use qcc::env::DriverEnv;
use qcc::pipeline::Pipeline;
use qcc::term::Term;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Runs a pipeline. Gives the counts of its first pass.
fn rewrite(m: &mut Module, pipeline: &str) -> Report {
    let registry = qcc::registry();
    let env = DriverEnv::without_data(registry.ops(), Term::new(true));
    let options = Options { settings: Settings::default(), ..Options::default() };
    let parsed = Pipeline::parse(pipeline, &registry, &[], &[]).unwrap();
    let outcome = driver::run(m, &parsed, &registry, &env, &options).unwrap_or_else(|e| panic!("{e}"));
    let found: Vec<String> = verify::verify(m, registry.ops()).iter().map(ToString::to_string).collect();
    assert!(found.is_empty(), "{found:?}");
    outcome.report
}

fn histogram(m: &Module) -> BTreeMap<String, usize> {
    let mut h = BTreeMap::new();
    for op in m.live_ops() {
        *h.entry(m.ops[op].name.op().to_string()).or_default() += 1;
    }
    h
}

fn run(m: &Module, inputs: &[Tensor]) -> Vec<Tensor> {
    let args: Vec<_> =
        m.regions[m.top].args.iter().copied().zip(inputs.iter().cloned().map(Item::from)).collect();
    let out = run_once(&Interpreter::new(Ops::standard()), m, &args, &m.regions[m.top].results).unwrap();
    out.iter().map(|item| item.tensor().unwrap().clone()).collect()
}

/// A decoder of `n` layers as a legacy exporter writes it: sizes computed again for every Reshape and Expand.
fn layers(n: usize) -> Module {
    let template = include_str!("../testdata/layers.qir.template");
    let (head, rest) = template.split_once("layer\n").unwrap();
    let (layer, tail) = rest.split_once("tail\n").unwrap();
    let mut text = head.strip_prefix("head\n").unwrap().to_string();
    for i in 0..n {
        text += &layer.replace("{i}", &i.to_string()).replace("{j}", &(i + 1).to_string());
    }
    text += &tail.replace("{n}", &n.to_string());
    parse(&text).unwrap_or_else(|e| panic!("{e}")).module
}

#[test]
fn layers_keep_their_function_and_come_out_alike() {
    let ids = Tensor::new(&[2, 5], (0..10i64).map(|i| i * 7 % 32).collect::<Vec<_>>()).unwrap();
    let mut forms = Vec::new();
    // More layers than one window holds.
    for n in [6, 7, 10] {
        let mut m = layers(n);
        infer::infer(&mut m, &Ops::standard());
        let before = run(&m, std::slice::from_ref(&ids));
        rewrite(&mut m, "canonicalize");
        let after = run(&m, std::slice::from_ref(&ids));
        let (a, b) = (before[0].f32s().unwrap(), after[0].f32s().unwrap());
        let most = a.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(most > 0.1 && a.len() == b.len());
        assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-5 * most), "{n} layers");
        forms.push(histogram(&m));
    }
    // Every layer more adds the same ops.
    for (op, &most) in &forms[2] {
        let [six, seven] = [0, 1].map(|i| forms[i].get(op).copied().unwrap_or(0));
        assert_eq!(most - seven, 3 * (seven - six), "{op}: {forms:?}");
    }
    // What computed sizes is gone.
    for op in ["Equal", "ConstantOfShape", "Identity", "Constant", "Reciprocal"] {
        assert_eq!(forms[2].get(op), None, "{op}");
    }
    assert!(forms[2]["Gather"] <= 2 && forms[2]["Shape"] <= 2 && forms[2]["Cast"] <= 1, "{:?}", forms[2]);
}

#[test]
fn ten_thousand_nodes_take_a_few_windows() {
    let mut solved = Vec::new();
    for n in [21, 42, 84] {
        let mut m = layers(n);
        let nodes = m.live_ops().len();
        let start = std::time::Instant::now();
        let report = rewrite(&mut m, "canonicalize");
        eprintln!("{n} layers, {nodes} nodes -> {} in {:?}", m.live_ops().len(), start.elapsed());
        let count = |what: &str| report.counts[&format!("canonicalize.{what}")];
        eprintln!("{} windows, {} solved", count("windows"), count("windows-solved"));
        assert!(count("windows") as usize >= n);
        solved.push(count("windows-solved"));
    }
    assert!(solved[0] <= 8, "{solved:?}");
    assert!(solved.iter().all(|&s| s == solved[0]), "equal layers are solved once: {solved:?}");
}

#[test]
fn it_gives_the_same_bytes_every_time() {
    let text = |m: &Module| print(m, Style { full: true, max_inline: u64::MAX });
    let mut first = layers(3);
    let mut second = layers(3);
    rewrite(&mut first, "canonicalize");
    rewrite(&mut second, "canonicalize");
    assert_eq!(text(&first), text(&second));
    // And a canonical model stays as it is.
    let mut again = first.clone();
    rewrite(&mut again, "canonicalize");
    let body = |t: String| t.split_once('\n').unwrap().1.to_string();
    assert_eq!(body(text(&again)), body(text(&first)));
}

/// A random chain of ops that move elements, some with sizes that the model computes.
struct Chain {
    rng: Rng,
    body: String,
    /// Name and dims, in which `b` and `s` are symbols.
    values: Vec<(String, Vec<Size>)>,
    next: usize,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Size {
    B,
    S,
    N(usize),
}

impl Chain {
    fn below(&mut self, n: usize) -> usize {
        self.rng.below(n)
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("v{}", self.next)
    }

    fn ints(&mut self, v: &[i64]) -> String {
        let name = self.name();
        let list: Vec<String> = v.iter().map(ToString::to_string).collect();
        self.body += &format!("  const %{name} : tensor<{}xi64> [{}]\n", v.len(), list.join(", "));
        name
    }

    /// A vector of sizes, the symbolic ones read off `x` at run time.
    fn sizes(&mut self, sizes: &[Size]) -> String {
        let parts: Vec<String> = sizes
            .iter()
            .map(|s| match s {
                Size::N(n) => self.ints(&[*n as i64]),
                symbol => {
                    let axis = if *symbol == Size::B { 0 } else { 1 };
                    let name = self.name();
                    self.body += &format!("  %{name} = onnx.Shape(%x) {{start={axis}, end={}}}\n", axis + 1);
                    name
                }
            })
            .collect();
        let list: Vec<String> = parts.iter().map(|p| format!("%{p}")).collect();
        let name = self.name();
        self.body += &format!("  %{name} = onnx.Concat({}) {{axis=0}}\n", list.join(", "));
        name
    }

    fn push(&mut self, op: &str, operands: &[&str], attrs: &str, dims: Vec<Size>) {
        let name = self.name();
        let list: Vec<String> = operands.iter().map(|o| format!("%{o}")).collect();
        self.body += &format!("  %{name} = onnx.{op}({}){attrs}\n", list.join(", "));
        self.values.push((name, dims));
    }

    fn step(&mut self) {
        let i = self.below(self.values.len().min(3));
        let (x, dims) = self.values[self.values.len() - 1 - i].clone();
        let rank = dims.len();
        match self.below(9) {
            0 if rank > 0 => {
                let mut perm: Vec<usize> = (0..rank).collect();
                for i in (1..rank).rev() {
                    let j = self.below(i + 1);
                    perm.swap(i, j);
                }
                let to = perm.iter().map(|&p| dims[p]).collect();
                self.push("Transpose", &[&x], &format!(" {{perm={perm:?}}}"), to);
            }
            1 if rank < 6 => {
                let at = self.below(rank + 1);
                let axis = self.ints(&[at as i64]);
                let mut to = dims;
                to.insert(at, Size::N(1));
                self.push("Unsqueeze", &[&x, &axis], "", to);
            }
            2 => {
                let Some(at) = dims.iter().position(|d| *d == Size::N(1)) else { return };
                let axis = self.ints(&[at as i64]);
                let mut to = dims;
                to.remove(at);
                self.push("Squeeze", &[&x, &axis], "", to);
            }
            3 if rank > 1 => {
                // Two known neighbours merge, or a known size splits.
                let at = self.below(rank - 1);
                let (width, sizes) = match (dims[at], dims[at + 1]) {
                    (Size::N(a), Size::N(b)) => (2, vec![Size::N(a * b)]),
                    (Size::N(a), _) if a % 2 == 0 && rank < 6 => (1, vec![Size::N(2), Size::N(a / 2)]),
                    _ => return,
                };
                let mut to = dims;
                to.splice(at..at + width, sizes);
                let sizes = self.sizes(&to);
                self.push("Reshape", &[&x, &sizes], "", to);
            }
            4 => {
                let Some(at) = dims.iter().position(|d| *d == Size::N(1)) else { return };
                let mut to = dims;
                to[at] = [Size::B, Size::S, Size::N(2), Size::N(3)][self.below(4)];
                let sizes = self.sizes(&to);
                self.push("Expand", &[&x, &sizes], "", to);
            }
            5 if rank > 0 => {
                let at = self.below(rank);
                let Size::N(n) = dims[at] else { return };
                let from = self.below(n);
                let starts =
                    self.ints(&[from as i64 - if self.next.is_multiple_of(2) { n as i64 } else { 0 }]);
                let ends = self.ints(&[i64::MAX]);
                let axes = self.ints(&[at as i64 - rank as i64]);
                let mut to = dims;
                to[at] = Size::N(n - from);
                self.push("Slice", &[&x, &starts, &ends, &axes], "", to);
            }
            6 => {
                let same: Vec<String> =
                    self.values.iter().filter(|v| v.1 == dims).map(|v| v.0.clone()).collect();
                let other = same[self.below(same.len())].clone();
                let op = ["Add", "Mul", "Sub"][self.below(3)];
                self.push(op, &[&x, &other], "", dims);
            }
            7 => self.push("Identity", &[&x], "", dims),
            _ => self.push("Neg", &[&x], "", dims),
        }
    }
}

#[test]
fn random_movements_keep_every_bit() {
    let mut shorter = 0;
    for seed in 0..300 {
        let x = ("x".to_string(), vec![Size::B, Size::S, Size::N(4)]);
        let mut c = Chain { rng: Rng(seed * 2 + 1), body: String::new(), values: vec![x], next: 0 };
        for _ in 0..3 + seed % 15 {
            c.step();
        }
        let results: Vec<String> = c.values.iter().rev().take(2).map(|v| format!("%{}", v.0)).collect();
        if results.contains(&"%x".to_string()) {
            continue;
        }
        let text = format!(
            "module ir_version=10 opsets {{onnx=21}}\ngraph @main(%x : tensor<b x s x 4xf32>) {{\n{}  return {}\n}}\n",
            c.body,
            results.join(", ")
        );
        let mut m = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).module;
        let wrong = infer::infer(&mut m, &Ops::standard());
        assert!(wrong.is_empty(), "{wrong:?}\n{text}");
        let before = m.clone();
        rewrite(&mut m, "canonicalize");
        shorter += usize::from(m.live_ops().len() < before.live_ops().len());
        for (b, s) in [(2, 3), (1, 1), (3, 2)] {
            let mut rng = Rng(seed + 1);
            let x = Tensor::from_f32(Elem::F32, &[b, s, 4], rng.floats(b * s * 4)).unwrap();
            let (old, new) = (run(&before, std::slice::from_ref(&x)), run(&m, &[x]));
            let after = print(&m, Style { full: false, max_inline: 64 });
            assert_eq!(old, new, "seed {seed}, b={b}, s={s}\n{text}\n{after}");
        }
    }
    assert!(shorter > 150, "it had little to do: {shorter}");
}

fn models() -> Option<PathBuf> {
    let dir = std::env::var_os("QCC_MODELS").map(PathBuf::from);
    if dir.is_none() {
        eprintln!("skipped: QCC_MODELS is not set");
    }
    dir
}

/// How many ops of each kind are left, one column per export.
#[test]
fn exports_of_one_model_come_close() {
    let Some(dir) = models() else { return };
    let names = ["model", "external/model", "dynamo_eager_op18", "dynamo_sdpa_op18", "dynamo_sdpa_op23"];
    let mut table: BTreeMap<String, [usize; 5]> = BTreeMap::new();
    let mut total = [0; 5];
    for (i, name) in names.iter().enumerate() {
        let path = dir.join("stories260k").join(format!("{name}.onnx"));
        let mut m = qcc::onnx::import::read(&path).unwrap_or_else(|e| panic!("{e}")).module;
        rewrite(&mut m, "canonicalize");
        for (op, n) in histogram(&m) {
            table.entry(op).or_default()[i] = n;
            total[i] += n;
        }
    }
    let line = |what: &str, n: &[usize; 5]| {
        n.iter().fold(format!("{what:<20}"), |line, n| format!("{line}{n:>6}")) + "\n"
    };
    let mut text: String = table.iter().map(|(op, n)| line(op, n)).collect();
    text += &line("all", &total);
    insta::assert_snapshot!(text);
}
