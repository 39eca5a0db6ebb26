//! The textual form of a module.
//!
//! ```text
//! module ir_version=10 opsets {onnx=21}
//!
//! graph @main(%x : tensor<batch x 4xf32>) {
//!   const %scale : tensor<4xf32> [1.0, 0.5, 2.0, 1.0]
//!   const %w : tensor<4x512xf32> #blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85
//!   %0 = onnx.Mul(%x, %scale) : tensor<batch x 4xf32>
//!   %y = onnx.MatMul(%0, %w) : tensor<batch x 512xf32>
//!   return %y
//! }
//! ```
//!
//! Invariant: printing what [`parse`](super::parse::parse) reads from a print gives the same text, for every
//! module whose links are whole and whose brackets nest at most [`super::parse::MAX_NESTING`] deep.
//!
//! - A value is `%name`, quoted where it is no plain word. One without a name is `%0`, `%1`, .. in order of
//!   definition. A name that is visible twice is told apart as `%name`, `%name~1`, ..
//! - `_` is an operand left out or a result that nobody wants. A missing type is unknown.
//! - Constants that are inputs too stand among the inputs as `const %name`.
//! - Small tensors show their elements, flat and row-major; others their hash, and [`super::bind`] finds the bytes.
//! - `loc(name)` is the source node where the first result's name does not tell it.
//!
//! [`Style::FULL`] adds what a reader rarely wants and an exporter needs: node names (`@name`), how tensors were
//! encoded, and at the end of each graph `notes` with declared types and metadata. Exporting what it parses to
//! gives the same file. [`Style::COMPACT`] leaves that out.

use super::literal::{Name, Quoted, elements, float, to_hex};
use super::{
    Attr, Attrs, ConstData, ConstId, Encoding, Function, Meta, Module, Op, Region, Symbol, Type, Value,
    ValueDef,
};
use std::collections::HashMap;
use std::fmt::{self, Write};

/// What a print shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Whether node names, encodings, declared types and metadata are shown.
    pub full: bool,
    /// The most elements of a tensor that are shown instead of its hash.
    pub max_inline: u64,
}

impl Style {
    /// What a reader wants to see.
    pub const COMPACT: Style = Style { full: false, max_inline: 16 };
    /// Everything.
    pub const FULL: Style = Style { full: true, max_inline: 64 };
}

/// The most bytes that a tensor shown by its elements has: strings may be few and long.
const MAX_INLINE_BYTES: u64 = 4096;

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print(self, Style::COMPACT))
    }
}

/// The text of a module. A large tensor that cannot be read shows `#?` in place of its hash.
pub fn print(m: &Module, style: Style) -> String {
    let mut p = Printer { m, style, names: names(m), out: String::new(), indent: 0 };
    p.module().expect("writing to a string does not fail");
    p.out
}

/// Values as their text names them.
pub fn names(m: &Module) -> HashMap<Value, String> {
    let mut namer =
        Namer { m, names: HashMap::new(), visible: HashMap::new(), highest: HashMap::new(), next: 0 };
    for root in std::iter::once(m.top).chain(m.functions.iter().map(|f| f.body)) {
        namer.define(root);
    }
    // What is used but defined nowhere comes last, so that no definition takes its name.
    for region in m.live_regions() {
        let data = &m.regions[region];
        let operands = data.ops.iter().flat_map(|&op| m.ops[op].operands.iter().copied().flatten());
        for v in data.args.iter().copied().chain(operands).chain(data.results.iter().copied()) {
            namer.undefined(v);
        }
    }
    namer.names
}

struct Namer<'m> {
    m: &'m Module,
    names: HashMap<Value, String>,
    /// How many values of a name the present region and those around it define.
    visible: HashMap<Symbol, u32>,
    /// The most that was ever visible.
    highest: HashMap<Symbol, u32>,
    next: u32,
}

impl Namer<'_> {
    fn define(&mut self, region: Region) {
        let data = &self.m.regions[region];
        let mut own: Vec<Value> = Vec::new();
        own.extend(data.args.iter().filter(|&&v| self.m.values[v].def == ValueDef::Arg(region)));
        own.extend(data.consts.iter().filter(|&&v| matches!(self.m.values[v].def, ValueDef::Const(_))));
        own.extend(data.ops.iter().flat_map(|&op| self.m.ops[op].results.iter().copied().flatten()));
        let mut entered: Vec<&Symbol> = Vec::new();
        for v in own {
            if self.names.contains_key(&v) {
                continue;
            }
            let name = &self.m.values[v].name;
            let text = match name.is_empty() {
                true => self.number(),
                false => {
                    let n = self.visible.entry(name.clone()).or_default();
                    *n += 1;
                    entered.push(name);
                    let highest = self.highest.entry(name.clone()).or_default();
                    *highest = (*highest).max(*n);
                    label(name, *n - 1)
                }
            };
            self.names.insert(v, text);
        }
        for &op in &data.ops {
            for nested in self.m.ops[op].attrs.regions() {
                self.define(nested);
            }
        }
        for name in entered {
            *self.visible.get_mut(name).expect("the name was entered") -= 1;
        }
    }

    fn undefined(&mut self, v: Value) {
        if self.names.contains_key(&v) {
            return;
        }
        let name = self.m.values.get(v).map_or_else(|| "".into(), |d| d.name.clone());
        let text = match name.is_empty() {
            true => self.number(),
            false => {
                let n = self.highest.entry(name.clone()).or_default();
                *n += 1;
                label(&name, *n - 1)
            }
        };
        self.names.insert(v, text);
    }

    fn number(&mut self) -> String {
        self.next += 1;
        format!("%{}", self.next - 1)
    }
}

fn label(name: &str, instance: u32) -> String {
    match instance {
        0 => format!("%{}", Name(name)),
        n => format!("%{}~{n}", Name(name)),
    }
}

struct Printer<'m> {
    m: &'m Module,
    style: Style,
    names: HashMap<Value, String>,
    out: String,
    indent: usize,
}

impl Printer<'_> {
    fn module(&mut self) -> fmt::Result {
        let m = self.m;
        write!(self.out, "module ir_version={} opsets ", m.ir_version)?;
        self.opsets(m.opsets.iter())?;
        self.meta(&m.meta)?;
        self.out.write_str("\n\n")?;
        self.graph(m.top)?;
        self.out.write_char('\n')?;
        for function in &m.functions {
            self.out.write_char('\n')?;
            self.function(function)?;
            self.out.write_char('\n')?;
        }
        Ok(())
    }

    fn function(&mut self, f: &Function) -> fmt::Result {
        write!(self.out, "function {} ", f.name.text())?;
        if !f.overload.is_empty() {
            write!(self.out, "overload {} ", Quoted(f.overload.as_bytes()))?;
        }
        self.out.write_str("opsets ")?;
        self.opsets(f.opsets.iter())?;
        if !f.attributes.is_empty() || !f.defaults.is_empty() {
            self.out.write_str(" attributes {")?;
            self.list(f.attributes.iter(), |p, name| write!(p.out, "{}", Name(name)))?;
            if !f.attributes.is_empty() && !f.defaults.is_empty() {
                self.out.write_str(", ")?;
            }
            self.attr_list(&f.defaults)?;
            self.out.write_char('}')?;
        }
        self.meta(&f.meta)?;
        self.out.write_str(" = ")?;
        self.graph(f.body)
    }

    fn opsets<'a>(&mut self, opsets: impl Iterator<Item = (&'a Symbol, &'a i64)>) -> fmt::Result {
        self.out.write_char('{')?;
        self.list(opsets, |p, (name, version)| write!(p.out, "{}={version}", Name(name)))?;
        self.out.write_char('}')
    }

    fn meta(&mut self, meta: &Meta) -> fmt::Result {
        if self.style.full && !meta.is_empty() {
            self.out.write_str(" meta ")?;
            self.dict(meta)?;
        }
        Ok(())
    }

    fn dict(&mut self, meta: &Meta) -> fmt::Result {
        self.out.write_char('{')?;
        self.list(meta.0.iter(), |p, (k, v)| write!(p.out, "{}={}", Name(k), Quoted(v.as_bytes())))?;
        self.out.write_char('}')
    }

    fn list<T>(
        &mut self,
        items: impl Iterator<Item = T>,
        mut item: impl FnMut(&mut Self, T) -> fmt::Result,
    ) -> fmt::Result {
        for (i, x) in items.enumerate() {
            if i > 0 {
                self.out.write_str(", ")?;
            }
            item(self, x)?;
        }
        Ok(())
    }

    fn line(&mut self) -> fmt::Result {
        write!(self.out, "\n{:1$}", "", self.indent * 2)
    }

    fn value(&mut self, v: Value) -> fmt::Result {
        self.out.write_str(&self.names[&v])
    }

    fn graph(&mut self, region: Region) -> fmt::Result {
        let m = self.m;
        let data = &m.regions[region];
        self.out.write_str("graph")?;
        if !data.name.is_empty() {
            write!(self.out, " @{}", Name(&data.name))?;
        }
        self.out.write_char('(')?;
        self.args(region)?;
        self.out.write_str(") {")?;
        self.indent += 1;
        for &v in &data.consts {
            if let ValueDef::Const(c) = m.values[v].def {
                self.line()?;
                self.out.write_str("const ")?;
                self.value(v)?;
                self.out.write_str(" : ")?;
                self.tensor(c)?;
            }
        }
        for &op in &data.ops {
            self.line()?;
            self.op(op)?;
        }
        self.line()?;
        self.out.write_str("return")?;
        for (i, &v) in data.results.iter().enumerate() {
            self.out.write_str(if i == 0 { " " } else { ", " })?;
            self.value(v)?;
        }
        if self.style.full {
            self.notes(region)?;
        }
        self.indent -= 1;
        self.line()?;
        self.out.write_char('}')
    }

    /// Inputs on one line while it is short, else one a line.
    fn args(&mut self, region: Region) -> fmt::Result {
        let args = &self.m.regions[region].args;
        let start = self.out.len();
        self.list(args.iter(), |p, &v| p.arg(region, v))?;
        if self.out.len() - start <= 90 || args.len() < 2 {
            return Ok(());
        }
        self.out.truncate(start);
        self.indent += 2;
        for (i, &v) in args.iter().enumerate() {
            if i > 0 {
                self.out.write_char(',')?;
            }
            self.line()?;
            self.arg(region, v)?;
        }
        self.indent -= 2;
        Ok(())
    }

    fn arg(&mut self, region: Region, v: Value) -> fmt::Result {
        let m = self.m;
        if m.values[v].def != ValueDef::Arg(region) {
            self.out.write_str("const ")?;
            return self.value(v);
        }
        self.value(v)?;
        match m.ty(v) {
            Type::Unknown => Ok(()),
            ty => write!(self.out, " : {ty}"),
        }
    }

    fn op(&mut self, op: Op) -> fmt::Result {
        let m = self.m;
        let data = &m.ops[op];
        let slot = |p: &mut Self, v: &Option<Value>| match v {
            Some(v) => p.value(*v),
            None => p.out.write_char('_'),
        };
        if !data.results.is_empty() {
            self.list(data.results.iter(), slot)?;
            self.out.write_str(" = ")?;
        }
        write!(self.out, "{}(", data.name.text())?;
        self.list(data.operands.iter(), slot)?;
        self.out.write_char(')')?;
        if !data.attrs.is_empty() {
            self.out.write_str(" {")?;
            self.attr_list(&data.attrs)?;
            self.out.write_char('}')?;
        }
        if data.results.iter().flatten().any(|&v| *m.ty(v) != Type::Unknown) {
            self.out.write_str(" : ")?;
            self.list(data.results.iter(), |p, v| match v {
                Some(v) => write!(p.out, "{}", m.ty(*v)),
                None => p.out.write_char('_'),
            })?;
        }
        let first = data.results.iter().flatten().next().map_or("", |&v| &*m.values[v].name);
        let untold = if self.style.full {
            if !data.node.is_empty() {
                write!(self.out, " @{}", Name(&data.node))?;
            }
            &*data.loc != default_loc(&data.node, first)
        } else {
            // Without the node's name, the first result's says where the op comes from.
            let told = data.loc == data.node && !data.node.is_empty() && !first.is_empty();
            &*data.loc != first && !told
        };
        match untold {
            true => write!(self.out, " loc({})", Name(&data.loc)),
            false => Ok(()),
        }
    }

    fn attr_list(&mut self, attrs: &Attrs) -> fmt::Result {
        self.list(attrs.iter(), |p, (name, value)| {
            write!(p.out, "{}=", Name(name))?;
            p.attr(value)
        })
    }

    fn attr(&mut self, attr: &Attr) -> fmt::Result {
        match attr {
            Attr::Int(i) => write!(self.out, "{i}"),
            Attr::Float(x) => self.out.write_str(&float(*x)),
            Attr::Str(s) => write!(self.out, "{}", Quoted(s)),
            Attr::Tensor(c) => self.tensor(*c),
            Attr::Graph(r) => self.graph(*r),
            Attr::Type(t) => write!(self.out, "!{t}"),
            Attr::Ref { name, kind } => write!(self.out, "ref({}, {kind})", Name(name)),
            Attr::Ints(v) => self.attrs_of("ints", v, |p, i| write!(p.out, "{i}")),
            Attr::Floats(v) => self.attrs_of("floats", v, |p, x| p.out.write_str(&float(*x))),
            Attr::Strs(v) => self.attrs_of("strs", v, |p, s| write!(p.out, "{}", Quoted(s))),
            Attr::Tensors(v) => self.attrs_of("tensors", v, |p, c| p.tensor(*c)),
            Attr::Graphs(v) => self.attrs_of("graphs", v, |p, r| p.graph(*r)),
            Attr::Types(v) => self.attrs_of("types", v, |p, t| write!(p.out, "!{t}")),
        }
    }

    /// A list. Its items show their kind, and an empty one names it.
    fn attrs_of<T>(
        &mut self,
        kind: &str,
        items: &[T],
        item: impl FnMut(&mut Self, &T) -> fmt::Result,
    ) -> fmt::Result {
        if items.is_empty() {
            return write!(self.out, "{kind}[]");
        }
        self.out.write_char('[')?;
        self.list(items.iter(), item)?;
        self.out.write_char(']')
    }

    fn tensor(&mut self, id: ConstId) -> fmt::Result {
        let c = &self.m.consts[id];
        self.out.write_str("tensor<")?;
        c.dims.iter().try_for_each(|d| write!(self.out, "{d}x"))?;
        write!(self.out, "{}> ", c.elem)?;
        match c.encoding {
            Encoding::Sparse => self.out.write_str("sparse ")?,
            Encoding::Typed if self.style.full => self.out.write_str("typed ")?,
            _ => {}
        }
        if self.style.full && !c.meta.is_empty() {
            self.dict(&c.meta)?;
            self.out.write_char(' ')?;
        }
        let data = data(c, self.style);
        self.out.write_str(&data)
    }

    fn notes(&mut self, region: Region) -> fmt::Result {
        let m = self.m;
        let data = &m.regions[region];
        let start = self.out.len();
        self.line()?;
        self.out.write_str("notes {")?;
        self.indent += 1;
        let empty = self.out.len();
        if !data.meta.is_empty() {
            self.line()?;
            self.out.write_str("graph ")?;
            self.dict(&data.meta)?;
        }
        for (i, &op) in data.ops.iter().enumerate() {
            let op = &m.ops[op];
            if op.meta.is_empty() {
                continue;
            }
            self.line()?;
            self.out.write_str("op ")?;
            match op.results.iter().flatten().next() {
                Some(&v) => self.value(v)?,
                None => write!(self.out, "{i}")?,
            }
            self.out.write_char(' ')?;
            self.dict(&op.meta)?;
        }
        let args = data.args.iter().filter(|&&v| m.values[v].def == ValueDef::Arg(region));
        let results = data.ops.iter().flat_map(|&op| m.ops[op].results.iter().flatten());
        let consts = data.consts.iter().filter(|&&v| matches!(m.values[v].def, ValueDef::Const(_)));
        for &v in args.chain(consts).chain(results) {
            self.value_note(v)?;
        }
        self.indent -= 1;
        if self.out.len() == empty {
            self.out.truncate(start);
            return Ok(());
        }
        self.line()?;
        self.out.write_char('}')
    }

    fn value_note(&mut self, v: Value) -> fmt::Result {
        let data = &self.m.values[v];
        let own_type = match data.def {
            ValueDef::Const(c) => data.ty != self.m.consts[c].ty(),
            ValueDef::Erased => return Ok(()),
            _ => false,
        };
        if data.declared.is_none() && data.meta.is_empty() && !own_type {
            return Ok(());
        }
        self.line()?;
        self.value(v)?;
        if own_type {
            write!(self.out, " type {}", data.ty)?;
        }
        match &data.declared {
            Some(ty) if *ty == data.ty => self.out.write_str(" declared")?,
            Some(ty) => write!(self.out, " declared {ty}")?,
            None => {}
        }
        if !data.meta.is_empty() {
            self.out.write_char(' ')?;
            self.dict(&data.meta)?;
        }
        Ok(())
    }
}

/// The location that an op has when its text gives none.
pub(super) fn default_loc<'a>(node: &'a str, first_result: &'a str) -> &'a str {
    if node.is_empty() { first_result } else { node }
}

impl Style {
    /// Whether a tensor is shown by its elements rather than by its hash, if it can be read.
    pub fn shows(self, c: &ConstData) -> bool {
        let count = c.dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        c.byte_len() <= MAX_INLINE_BYTES && count.is_some_and(|n| n <= self.max_inline)
    }
}

/// What stands behind a tensor's type: its elements, its bytes, or its hash.
fn data(c: &ConstData, style: Style) -> String {
    if style.shows(c)
        && let Ok(bytes) = c.read()
    {
        let count = c.count();
        let shown = (c.encoding != Encoding::Sparse).then(|| elements(c.elem, count, &bytes)).flatten();
        return match shown.as_deref() {
            Some([one]) if c.dims.is_empty() => one.clone(),
            Some(all) => format!("[{}]", all.join(", ")),
            None => format!("bytes \"{}\"", to_hex(&bytes)),
        };
    }
    match c.hash() {
        Ok(hash) => format!("#blake3:{}", to_hex(&hash)),
        Err(_) => "#?".into(),
    }
}
