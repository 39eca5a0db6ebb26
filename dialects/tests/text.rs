//! The text form: print -> parse -> print is the identity, and nothing is lost on the way.

use dialects::ir::print::{Style, names, print};
use dialects::ir::{Attr, Attrs, ConstError, ConstId, Module, Region, Type, Value, ValueDef};
use dialects::ir::{bind, parse};
use dialects::random::{Rng, odd_module};
use std::sync::Arc;

const ALL: Style = Style { full: true, max_inline: u64::MAX };

fn reparse(text: &str) -> Module {
    parse::parse(text).unwrap_or_else(|e| panic!("{e} at {:?} in\n{text}", &text[e.span()])).module
}

/// Compares what two modules hold, value by value in program order, without printing them.
struct Same<'a> {
    a: &'a Module,
    b: &'a Module,
    values: Vec<(Value, Value)>,
}

impl Same<'_> {
    fn check(a: &Module, b: &Module) {
        assert_eq!((a.ir_version, &a.opsets, &a.meta), (b.ir_version, &b.opsets, &b.meta));
        let mut same = Same { a, b, values: Vec::new() };
        same.region(a.top, b.top);
        assert_eq!(a.functions.len(), b.functions.len());
        for (f, g) in a.functions.iter().zip(&b.functions) {
            assert_eq!((&f.name, &f.overload, &f.attributes), (&g.name, &g.overload, &g.attributes));
            assert_eq!((&f.opsets, &f.meta), (&g.opsets, &g.meta));
            same.attrs(&f.defaults, &g.defaults);
            same.region(f.body, g.body);
        }
        // Operands must be the same values: each value of one module always meets the same one of the other.
        let mut pairs = same.values;
        pairs.sort();
        pairs.dedup();
        assert!(pairs.windows(2).all(|w| w[0].0 != w[1].0), "one value became two");
        pairs.sort_by_key(|p| p.1);
        assert!(pairs.windows(2).all(|w| w[0].1 != w[1].1), "two values became one");
    }

    fn value(&mut self, v: Value, w: Value) {
        self.values.push((v, w));
        let (a, b) = (&self.a.values[v], &self.b.values[w]);
        assert_eq!((&a.name, &a.ty, &a.declared, &a.meta), (&b.name, &b.ty, &b.declared, &b.meta));
        match (a.def, b.def) {
            (ValueDef::Const(c), ValueDef::Const(d)) => self.tensor(c, d),
            (ValueDef::Result(_, i), ValueDef::Result(_, j)) => assert_eq!(i, j),
            (ValueDef::Arg(_), ValueDef::Arg(_)) => {}
            (x, y) => panic!("{x:?} became {y:?}"),
        }
    }

    fn slots(&mut self, a: &[Option<Value>], b: &[Option<Value>]) {
        assert_eq!(a.len(), b.len());
        for (v, w) in a.iter().zip(b) {
            assert_eq!(v.is_some(), w.is_some());
            if let (Some(v), Some(w)) = (v, w) {
                self.value(*v, *w);
            }
        }
    }

    fn values(&mut self, a: &[Value], b: &[Value]) {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).for_each(|(v, w)| self.value(*v, *w));
    }

    fn tensor(&mut self, c: ConstId, d: ConstId) {
        let (c, d) = (&self.a.consts[c], &self.b.consts[d]);
        assert_eq!((c.elem, &c.dims, c.encoding, &c.meta), (d.elem, &d.dims, d.encoding, &d.meta));
        assert_eq!(c.hash().unwrap(), d.hash().unwrap());
        if d.source.is_bound() {
            assert_eq!(c.read().unwrap(), d.read().unwrap());
        }
    }

    fn attrs(&mut self, a: &Attrs, b: &Attrs) {
        assert_eq!(a.iter().count(), b.iter().count());
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for ((n, x), (o, y)) in a.iter().zip(b.iter()) {
            assert_eq!(n, o);
            match (x, y) {
                (Attr::Float(x), Attr::Float(y)) => assert_eq!(x.to_bits(), y.to_bits()),
                (Attr::Floats(x), Attr::Floats(y)) => assert_eq!(bits(x), bits(y)),
                (Attr::Tensor(x), Attr::Tensor(y)) => self.tensor(*x, *y),
                (Attr::Tensors(x), Attr::Tensors(y)) => {
                    assert_eq!(x.len(), y.len());
                    x.iter().zip(y).for_each(|(x, y)| self.tensor(*x, *y));
                }
                (Attr::Graph(x), Attr::Graph(y)) => self.region(*x, *y),
                (Attr::Graphs(x), Attr::Graphs(y)) => {
                    assert_eq!(x.len(), y.len());
                    x.iter().zip(y).for_each(|(x, y)| self.region(*x, *y));
                }
                (x, y) => assert_eq!(x, y),
            }
        }
    }

    fn region(&mut self, r: Region, s: Region) {
        let (a, b) = (&self.a.regions[r], &self.b.regions[s]);
        assert_eq!((&a.name, &a.meta, a.parent.is_some()), (&b.name, &b.meta, b.parent.is_some()));
        self.values(&a.args, &b.args);
        self.values(&a.consts, &b.consts);
        assert_eq!(a.ops.len(), b.ops.len());
        for (&o, &p) in a.ops.iter().zip(&b.ops) {
            let (x, y) = (&self.a.ops[o], &self.b.ops[p]);
            assert_eq!((&x.name, &x.node, &x.loc, &x.meta), (&y.name, &y.node, &y.loc, &y.meta));
            self.slots(&x.operands, &y.operands);
            self.slots(&x.results, &y.results);
            self.attrs(&x.attrs, &y.attrs);
            assert_eq!(y.region, s);
        }
        self.values(&a.results, &b.results);
    }
}

#[test]
fn random_modules_read_back() {
    for seed in 0..600 {
        let m = odd_module(seed);
        for style in [Style::COMPACT, Style::FULL, ALL] {
            let text = print(&m, style);
            let back = reparse(&text);
            assert_eq!(print(&back, style), text, "seed {seed}");
            if style.full {
                Same::check(&m, &back);
            }
        }
    }
}

#[test]
fn mutated_text_never_panics() {
    let mut rng = Rng(7);
    let texts: Vec<String> = (0..40).map(|seed| print(&odd_module(seed), ALL)).collect();
    let bits =
        ["%", "~", "{", "}", "\"", "\\", "<", "x", "0x", "-", "_", ":", "graph", "@", "99999999999999999999"];
    let mut accepted = 0;
    for _ in 0..6000 {
        let mut text = rng.pick(&texts).clone().into_bytes();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(text.len());
            match rng.below(4) {
                0 => text[at] = rng.bits() as u8,
                1 => drop(text.drain(at..(at + 1 + rng.below(20)).min(text.len()))),
                2 => drop(text.splice(at..at, rng.pick(&bits).bytes())),
                _ => {
                    let from = rng.below(text.len());
                    let piece: Vec<u8> = text[from..(from + 30).min(text.len())].to_vec();
                    drop(text.splice(at..at, piece));
                }
            }
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        match parse::parse(&text) {
            Err(e) => assert!(text.get(e.span()).is_some() && !e.to_string().is_empty(), "{e:?}"),
            Ok(parsed) => {
                accepted += 1;
                let once = print(&parsed.module, ALL);
                assert_eq!(print(&reparse(&once), ALL), once);
            }
        }
    }
    assert!(accepted > 120, "only {accepted} mutations parse: the test has lost its point");
}

#[test]
fn a_readable_module() {
    let text = "\
module ir_version=10 opsets {onnx=21}

graph @main(%x : tensor<batch x 4xf32>, %ids : tensor<?x(2*batch*\"s 1\" - past + 1) x i64>, const %w) {
  const %w : tensor<4xf32> [1.0, 0.5, -2.0, 1e-6]
  const %eps : tensor<f32> 1e-5
  const %big : tensor<64x64xf16> #blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262
  %0 = onnx.Mul(%x, %w) : tensor<batch x 4xf32>
  %a, _, %\"12\" = onnx.Foo(%0, _, %eps) {axis=-1, mode=\"linear\", scales=[1.0, nan]} : tensor<*xf32>, _, ? loc(/l/foo)
  %y = onnx.If(%c) {else_branch=graph() {
    return %a
  }, then_branch=graph @then() {
    %1 = onnx.Neg(%a)
    return %1
  }} : tensor<batch x \"s 1\" x 8xf32>
  return %y
}
";
    let m = reparse(text);
    assert_eq!(print(&m, Style::COMPACT), text);
    assert_eq!(m.to_string(), text);
    let region = &m.regions[m.top];
    assert_eq!(region.args[2], region.consts[0]);
    assert_eq!(&*m.ops[region.ops[1]].loc, "/l/foo");
    assert_eq!(&*m.ops[region.ops[2]].loc, "y");
    // `%c` is defined nowhere: that is kept for the verifier.
    let c = m.ops[region.ops[2]].operands[0].unwrap();
    assert_eq!(m.values[c].def, ValueDef::Erased);
}

#[test]
fn same_names_are_told_apart() {
    let text = "\
module ir_version=10 opsets {}

graph(%a : tensor<f32>) {
  %a~1 = onnx.Neg(%a)
  %b = onnx.If(%a~1) {then_branch=graph() {
    %a~2 = onnx.Neg(%a~1)
    return %a~2
  }}
  %a~2 = onnx.Neg(%a)
  return %gone
}
";
    // The nested value is visible together with all three of the outer graph.
    let want = text
        .replace("    %a~2 = onnx.Neg(%a~1)\n    return %a~2", "    %a~3 = onnx.Neg(%a~1)\n    return %a~3");
    let m = reparse(text);
    assert_eq!(print(&m, Style::COMPACT), want);
    assert_eq!(names(&m).values().filter(|n| n.starts_with("%a")).count(), 4);
    assert!(m.values.values().filter(|v| &*v.name == "a").count() == 4);
}

fn error(text: &str) -> (String, String) {
    let whole = format!("module opsets {{}} graph(%x) {{ {text} return %x }}");
    let e = parse::parse(&whole).expect_err("the text is wrong");
    (whole[e.span()].to_string(), e.to_string())
}

#[test]
fn errors_point_and_explain() {
    let cases = [
        ("%y = onnx.Add(%x, ) ", ")", "expected a value (`%name`) or `_`, found `)`"),
        ("%y = onnx.Add(%x : ", ":", "found `:`"),
        ("%y = Add(%x) ", "Add", "expected an op name with its dialect, such as onnx.Add, found `Add`"),
        ("%y = onnx.Add(%x) : tensor<2xf31> ", "f31", "expected an element type (f32, u8,"),
        ("%y = onnx.Add(%x) : ?, ? ", ": ?, ?", "expected 1 result types, found 2"),
        ("%y = onnx.A(%x) {a=1, a=2} ", "a=2", "the attribute \"a\" is given twice"),
        ("%y = onnx.A(%x) {a=[1, \"b\"]} ", "\"b\"", "expected a list of ints all through"),
        ("%y = onnx.A(%x) {a=99999999999999999999} ", "99999999999999999999", "an integer of 64 bits"),
        ("%y = onnx.A(%x) {a=\"\\q\"} ", "\\", "escape"),
        ("const %c : tensor<2xf32> [1.0] ", "[1.0]", "expected 2 elements, found 1"),
        ("const %c : tensor<2xi4> [7, 8] ", "8", "expected a number of type i4, found `8`"),
        (
            "const %c : tensor<2xf32> bytes \"00\" ",
            "tensor<2xf32> bytes \"00\"",
            "expected 8 bytes of data, found 1",
        ),
        ("const %c : tensor<99999999x99999999x99999999xf32> #? ", "", "more elements than can be counted"),
        ("const %c : tensor<2xf32> #blake3:00 ", "00", "expected 64 hexadecimal digits, found 2"),
        ("const %c : tensor<9999999xf32> splat(1.0) ", "", "generated elements, found more"),
        ("const %c : tensor<?xf32> #? ", "?", "expected a size, found `?`"),
        (
            "%y = onnx.A(%x) : tensor<(a*b*c*d*e*f*g) x f32> ",
            "(a*b*c*d*e*f*g)",
            "expected a sum of few products",
        ),
        (
            "%y = onnx.A(%x) : tensor<(9223372036854775807*a + a) x f32> ",
            "",
            "expected a sum of few products",
        ),
    ];
    for (text, at, message) in cases {
        let (found_at, found) = error(text);
        assert!(found.contains(message), "{text}: {found}");
        assert!(at.is_empty() || found_at == at, "{text}: points at {found_at:?}");
    }
    let end = parse::parse("module opsets {} graph() {").unwrap_err();
    assert!(end.to_string().ends_with("found the end of the text"), "{end}");
}

#[test]
fn hostile_text_is_refused() {
    let types = format!("module opsets {{}} graph(%x : {}) {{}}", "sequence<".repeat(100_000));
    assert!(matches!(parse::parse(&types), Err(parse::ParseError::Nesting { .. })));
    let open = "module opsets {} graph() { onnx.If() {a=".to_string();
    let graphs = format!("{open}{}", "graph() { onnx.If() {a=".repeat(100_000));
    assert!(matches!(parse::parse(&graphs), Err(parse::ParseError::Nesting { .. })));
    // As deep as is allowed, on a thread with a small stack, and wrong at the very end.
    let deep = (parse::MAX_NESTING - 4) / 2;
    let text = format!(
        "module opsets {{}} graph() {{ {} onnx.X() {} return }}",
        "onnx.If() {a=graph() {".repeat(deep),
        "return }}".repeat(deep)
    );
    let wrong = text.replace("onnx.X()", "onnx.X(");
    let run = move || {
        let m = parse::parse(&text).unwrap().module;
        assert!(parse::parse(&wrong).is_err());
        assert_eq!(m.live_regions().len(), deep + 1);
        reparse(&print(&m, Style::FULL));
    };
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn weights_bind_by_hash() {
    let data = bytes::Bytes::from(vec![7u8; 256]);
    let hash = *blake3::hash(&data).as_bytes();
    let hex = blake3::hash(&data).to_hex();
    let text = format!(
        "module ir_version=10 opsets {{}}\n\ngraph() {{\n  const %w : tensor<64xf32> #blake3:{hex}\n  return\n}}\n"
    );
    let mut m = reparse(&text);
    let c = ConstId::from_u32(0);
    assert!(matches!(m.consts[c].read(), Err(ConstError::Unavailable(_))));
    assert_eq!(print(&m, Style::COMPACT), text);
    assert_eq!(bind::bind(&mut m, |_| None).unwrap(), [c]);
    // Other bytes of the right length are noticed when they are read.
    let mut wrong = m.clone();
    assert!(
        bind::bind(&mut wrong, |_| Some(Arc::new(bytes::Bytes::from(vec![8u8; 256])))).unwrap().is_empty()
    );
    assert!(matches!(wrong.consts[c].read(), Err(ConstError::Hash { .. })));
    let short = bind::bind(&mut m.clone(), |_| Some(Arc::new(bytes::Bytes::from(vec![8u8; 255]))));
    assert!(matches!(short, Err(ConstError::Length { expected: 256, found: 255 })));
    let found = bind::bind(&mut m, |h| (*h == hash).then(|| Arc::new(data.clone()) as _)).unwrap();
    assert!(found.is_empty());
    assert_eq!(m.consts[c].read().unwrap(), data);
    assert_eq!(print(&m, Style::COMPACT), text);
}

#[test]
fn generated_elements() {
    let m = reparse(
        "module opsets {} graph() {
           const %a : tensor<3xf32> splat(2.5)
           const %b : tensor<1000xf32> random(1)
           const %c : tensor<1000xi4> random(1)
           return
         }",
    );
    let read = |i| m.consts[ConstId::from_u32(i)].read().unwrap();
    assert_eq!(*read(0), *bytemuck::cast_slice::<f32, u8>(&[2.5; 3]));
    let floats: Vec<f32> = bytemuck::pod_collect_to_vec(&read(1));
    assert!(floats.iter().all(|x| (-1.0..1.0).contains(x)));
    let mean = floats.iter().sum::<f32>() / 1000.0;
    assert!(mean.abs() < 0.1, "{mean}");
    // All 16 codes occur.
    let mut seen = [false; 16];
    read(2).iter().for_each(|b| (seen[(b & 15) as usize], seen[(b >> 4) as usize]) = (true, true));
    assert_eq!(seen, [true; 16]);
    assert_eq!(*m.ty(m.regions[m.top].consts[0]), Type::of_shape(dialects::ir::Elem::F32, &[3]));
}
