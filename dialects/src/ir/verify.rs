//! The verifier. It collects everything that is wrong with a module and names op and source node.
//!
//! What holds in a module that verifies:
//!
//! 1. A value has one definition, and the definition and the value agree on each other.
//! 2. An op stands in one region, a region hangs on one op (or is the model's graph, or a function's body), and
//!    both know where they are.
//! 3. A value is used only where it is visible: after its definition, in its own region and the ones nested in ops
//!    that stand after it. So no op waits for itself.
//! 4. A name belongs to one of the values that are visible together. Functions have names of their own.
//! 5. Inputs and outputs of the model's graph have names.
//! 6. The operands and results of a known op are as many as it takes, and its own verifier finds nothing.
//! 7. Inference contradicts no type that is written down.
//! 8. Every dialect of the model is imported with a version, but qcc's own (`quant`, `kernel`); a function imports
//!    for itself.
//! 9. A constant has as many bytes as its type asks for. References to attributes stand in functions only.
//!
//! Function bodies are generic: 6 and 7 look at their ops' arity alone. Unknown ops pass.

use super::calls::{Callee, Callees};
use super::{
    Attr, ConstId, Diagnostic, Elem, Encoding, Function, Module, Op, OpData, Region, Symbol, Value, ValueDef,
    graph, infer,
};
use crate::onnx::functions;
use crate::ops::Ops;
use petgraph::algo::kosaraju_scc;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Dialects that no model imports.
pub const OWN_DIALECTS: [&str; 2] = ["quant", "kernel"];

/// Everything that is wrong with `m`; empty when it is sound.
pub fn verify(m: &Module, ops: &Ops) -> Vec<Diagnostic> {
    let dangling = dangling(m);
    if !dangling.is_empty() {
        return dangling;
    }
    let mut v = Verifier {
        m,
        callees: Callees::new(m, ops),
        opsets: &m.opsets,
        function: false,
        chain: Vec::new(),
        visible: HashSet::new(),
        names: HashMap::new(),
        defined: HashSet::new(),
        placed: HashSet::new(),
        cycles: HashMap::new(),
        found: Vec::new(),
    };
    v.top();
    for f in &m.functions {
        (v.opsets, v.function) = (&f.opsets, true);
        v.region(f.body, None);
    }
    let mut found = v.found;
    found.extend(infer::check(m, ops));
    let mut seen = HashSet::new();
    found.retain(|d| seen.insert((d.op, d.message.clone())));
    found
}

/// Live entities that name others which the module does not have. Nothing else can be asked of such a module.
fn dangling(m: &Module) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    let mut report = |op: Option<Op>, message: String| match op {
        Some(op) => found.push(Diagnostic::at(m, op, message)),
        None => found.push(Diagnostic { op: None, name: None, loc: "".into(), message }),
    };
    let mut stack: Vec<(Option<Op>, Region)> = vec![(None, m.top)];
    stack.extend(m.functions.iter().map(|f| (None, f.body)));
    let mut held = HashSet::new();
    while let Some((holder, region)) = stack.pop() {
        if !m.regions.is_valid(region) || !held.insert(region) {
            report(holder, format!("{region} is not there, or hangs on another op too"));
            continue;
        }
        let data = &m.regions[region];
        for v in data.args.iter().chain(&data.consts).chain(&data.results).filter(|v| !m.values.is_valid(**v))
        {
            report(holder, format!("{v} in {region} is no value of the module"));
        }
        for &op in &data.ops {
            if !m.ops.is_valid(op) {
                report(holder, format!("{op} in {region} is no op of the module"));
                continue;
            }
            let data = &m.ops[op];
            let values = data.operands.iter().chain(&data.results).flatten();
            for v in values.filter(|v| !m.values.is_valid(**v)) {
                report(Some(op), format!("{v} is no value of the module"));
            }
            for c in data.attrs.consts().filter(|c| !m.consts.is_valid(*c)) {
                report(Some(op), format!("{c} is no tensor of the module"));
            }
            stack.extend(data.attrs.regions().map(|r| (Some(op), r)));
        }
    }
    for (v, data) in m.values.iter() {
        let whole = match data.def {
            ValueDef::Result(op, _) => m.ops.is_valid(op),
            ValueDef::Arg(region) => m.regions.is_valid(region),
            ValueDef::Const(c) => m.consts.is_valid(c),
            ValueDef::Erased => true,
        };
        if !whole {
            report(None, format!("{v} is defined by {:?}, which is not there", data.def));
        }
    }
    found
}

/// What is wrong with the number of operands or results of a known op.
pub fn arity(m: &Module, callee: Callee, op: &OpData) -> Option<String> {
    let body = |m: &Module, f: &Function| {
        let body = &m.regions[f.body];
        ((0, body.args.len()), (0, body.results.len()))
    };
    let (operands, results) = match callee {
        Callee::Native(def) => (def.operands, def.results),
        Callee::Function(f) => body(m, f),
        Callee::Spec(f) => body(functions::module(), f),
    };
    let count = |slots: &[Option<Value>]| slots.iter().rposition(Option::is_some).map_or(0, |i| i + 1);
    let range = |(least, most): (usize, usize)| match most {
        usize::MAX => format!("at least {least}"),
        _ if least == most => least.to_string(),
        _ => format!("{least} to {most}"),
    };
    let (least, most) = operands;
    let found = count(&op.operands);
    if found < least || found > most {
        return Some(format!("expected {} operands, found {found}", range(operands)));
    }
    if let Some(i) = op.operands[..least].iter().position(Option::is_none) {
        return Some(format!("operand {i} is left out, but it is required"));
    }
    // Fewer results than the least are no harm: nobody wants them.
    let found = count(&op.results);
    (found > results.1).then(|| format!("expected {} results, found {found}", range(results)))
}

struct Verifier<'m> {
    m: &'m Module,
    callees: Callees<'m>,
    /// Imports of the model or function being looked at.
    opsets: &'m BTreeMap<Symbol, i64>,
    function: bool,
    /// The regions being looked at, outermost first, each with the op in it that holds the next one.
    chain: Vec<(Region, Option<Op>)>,
    visible: HashSet<Value>,
    names: HashMap<&'m Symbol, Value>,
    /// Every value that had its definition.
    defined: HashSet<Value>,
    /// Every op that had its place.
    placed: HashSet<Op>,
    /// Ops by strongly connected component, for regions in which something is used too early.
    cycles: HashMap<Region, HashMap<Op, usize>>,
    found: Vec<Diagnostic>,
}

impl<'m> Verifier<'m> {
    /// Reports something wrong at `op`, or at nothing in particular.
    fn report(&mut self, op: Option<Op>, message: String) {
        self.found.push(match op {
            Some(op) => Diagnostic::at(self.m, op, message),
            None => Diagnostic { op: None, name: None, loc: "".into(), message },
        });
    }

    fn label(&self, v: Value) -> String {
        format!("{:?}", self.m.value_label(v))
    }

    fn top(&mut self) {
        let data = &self.m.regions[self.m.top];
        let nameless = |v: &Value| self.m.values[*v].name.is_empty();
        let count = |values: &[Value]| values.iter().filter(|v| nameless(v)).count();
        for (what, n) in [("inputs", count(&data.args)), ("outputs", count(&data.results))] {
            if n > 0 {
                self.report(
                    None,
                    format!("the {what} of the model's graph must have names, but {n} have none"),
                );
            }
        }
        self.region(self.m.top, None);
    }

    fn region(&mut self, region: Region, holder: Option<Op>) {
        let m = self.m;
        let data = &m.regions[region];
        if data.parent != holder {
            self.report(holder, format!("{region} says that it belongs to {:?}", data.parent));
        }
        self.chain.push((region, None));
        let mut own = Vec::new();
        for &v in &data.args {
            match m.values[v].def {
                ValueDef::Arg(r) if r == region => own.push((v, None)),
                ValueDef::Const(_) if data.consts.contains(&v) => {}
                _ => {
                    let label = self.label(v);
                    self.report(holder, format!("the graph's input {label} is no input or constant of it"));
                }
            }
        }
        for &v in &data.consts {
            match m.values[v].def {
                ValueDef::Const(c) => {
                    own.push((v, None));
                    let label = self.label(v);
                    self.constant(holder, &format!("the constant {label}"), c);
                }
                _ => {
                    let label = self.label(v);
                    self.report(holder, format!("{label} stands among the constants, but is none"));
                }
            }
        }
        let given = own.len();
        for &op in &data.ops {
            own.extend(m.ops[op].results.iter().flatten().map(|&v| (v, Some(op))));
        }
        let shadowed = self.enter_names(&own);
        for &(v, at) in &own[..given] {
            self.define(v, at.or(holder));
        }
        for &op in &data.ops {
            self.op(op, region);
        }
        for &v in &data.results {
            if !self.visible.contains(&v) {
                let why = self.invisible(v);
                self.report(holder, format!("the graph's output {} {why}", self.label(v)));
            }
        }
        self.chain.pop();
        for (v, _) in own {
            self.visible.remove(&v);
        }
        for (name, before) in shadowed {
            match before {
                Some(v) => self.names.insert(name, v),
                None => self.names.remove(name),
            };
        }
    }

    /// Enters the names that a region defines and reports those that are taken. Returns what they meant before.
    fn enter_names(&mut self, own: &[(Value, Option<Op>)]) -> Vec<(&'m Symbol, Option<Value>)> {
        let mut before = Vec::new();
        for &(v, op) in own {
            let name = &self.m.values[v].name;
            if name.is_empty() {
                continue;
            }
            let old = self.names.insert(name, v);
            before.push((name, old));
            if old.is_some_and(|old| old != v) {
                self.report(op, format!("the name {name:?} is taken by another value"));
            }
        }
        // Undone in reverse, so that a name entered twice ends up meaning what it did.
        before.reverse();
        before
    }

    fn define(&mut self, v: Value, at: Option<Op>) {
        if !self.defined.insert(v) {
            let label = self.label(v);
            self.report(at, format!("{label} is defined twice"));
        }
        self.visible.insert(v);
    }

    fn op(&mut self, op: Op, region: Region) {
        let m = self.m;
        if !self.placed.insert(op) {
            return self.report(Some(op), "it stands in two places".into());
        }
        let data = &m.ops[op];
        if data.region != region {
            self.report(Some(op), format!("it stands in {region}, but says {}", data.region));
        }
        let dialect = data.name.dialect();
        if !self.opsets.contains_key(dialect) && !OWN_DIALECTS.contains(&dialect) {
            self.report(Some(op), format!("the dialect {dialect:?} is not imported with an opset version"));
        }
        if let Some(message) = self.callees.of(data, self.opsets).and_then(|callee| arity(m, callee, data)) {
            self.report(Some(op), message);
        }
        let holder = self.chain.last_mut().expect("the op's region is being looked at");
        holder.1 = Some(op);
        for v in data.operands.iter().flatten() {
            if !self.visible.contains(v) {
                let why = self.invisible(*v);
                self.report(Some(op), format!("reads {}, which {why}", self.label(*v)));
            }
        }
        for (name, attr) in data.attrs.iter() {
            if !self.function && matches!(attr, Attr::Ref { .. }) {
                self.report(
                    Some(op),
                    format!("the attribute {name:?} refers to a function's, but is in none"),
                );
            }
        }
        for c in data.attrs.consts() {
            self.constant(Some(op), "a tensor attribute", c);
        }
        for nested in data.attrs.regions() {
            self.region(nested, Some(op));
        }
        for (i, v) in data.results.iter().enumerate() {
            let Some(v) = *v else { continue };
            if m.values[v].def != ValueDef::Result(op, i) {
                let label = self.label(v);
                self.report(Some(op), format!("its result {i}, {label}, says that it comes from elsewhere"));
            }
            self.define(v, Some(op));
        }
    }

    /// Why a value is not visible where the chain ends.
    fn invisible(&mut self, v: Value) -> String {
        let m = self.m;
        let at = match m.values[v].def {
            ValueDef::Erased => return "nothing defines".into(),
            ValueDef::Result(op, _) => op,
            _ => return "is defined in a graph that is not visible here".into(),
        };
        let Some(&(region, holder)) = self.chain.iter().find(|(r, _)| *r == m.ops[at].region) else {
            return "is defined in a graph that is not visible here".into();
        };
        if !m.regions[region].ops.contains(&at) {
            return "nothing defines".into();
        }
        let components = self.cycles.entry(region).or_insert_with(|| {
            let components = kosaraju_scc(&graph::view(m, region));
            components
                .into_iter()
                .enumerate()
                .flat_map(|(i, ops)| ops.into_iter().map(move |o| (o, i)))
                .collect()
        });
        let cycle =
            holder.is_some_and(|h| components.get(&h).is_some_and(|c| components.get(&at) == Some(c)));
        let by = &m.ops[at];
        match cycle {
            true => format!("depends on it: a cycle through {} at node {:?}", by.name, &*by.loc),
            false => format!("is defined only later, by {} at node {:?}", by.name, &*by.loc),
        }
    }

    fn constant(&mut self, op: Option<Op>, what: &str, id: ConstId) {
        let c = &self.m.consts[id];
        if c.encoding == Encoding::Sparse || c.elem == Elem::String {
            return;
        }
        let count = c.dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let expected = count.and_then(|n| c.elem.byte_len(n));
        if expected != Some(c.byte_len()) {
            let expected =
                expected.map_or_else(|| "a number of bytes that can be counted".into(), |n| n.to_string());
            self.report(
                op,
                format!("{what}: expected {expected} bytes for {}, found {}", c.elem, c.byte_len()),
            );
        }
    }
}
