//! When two windows are the same to every rule: ops, attributes, small constants by content, large ones by place, and
//! the types of all values. What is found for one can then be replayed on the other.

use super::lang::is_literal;
use super::window::{Scope, Window};
use dialects::ir::{Attr, Attrs, ConstId, Module, Op, Value};
use std::collections::HashMap;
use std::fmt::Write as _;

/// A window's description, and its values and ops in the order in which it names them.
pub struct Signature {
    /// Equal for windows that are the same.
    pub text: String,
    /// Values in the order of their first occurrence.
    pub values: Vec<Value>,
    /// Ops in program order, the context first.
    pub ops: Vec<Op>,
}

impl Signature {
    /// Describes a window.
    pub fn new(m: &Module, scope: &Scope, w: &Window) -> Signature {
        let ops: Vec<Op> = w.context.iter().chain(&w.ops).copied().collect();
        let mut s = Signature { text: format!("{} given\n", w.context.len()), values: Vec::new(), ops };
        let mut numbers: HashMap<Value, usize> = HashMap::new();
        let mut consts: HashMap<ConstId, usize> = HashMap::new();
        for op in s.ops.clone() {
            let data = &m.ops[op];
            let _ = write!(s.text, "{}{}(", data.name, attrs_text(m, &data.attrs));
            for v in &data.operands {
                match v {
                    Some(v) => s.value(m, scope, *v, &mut numbers, &mut consts),
                    None => s.text.push('_'),
                }
                s.text.push(',');
            }
            s.text.push(')');
            for v in &data.results {
                match v {
                    Some(v) => s.value(m, scope, *v, &mut numbers, &mut consts),
                    None => s.text.push('_'),
                }
                s.text.push(',');
            }
            s.text.push('\n');
        }
        for v in &w.roots {
            let _ = write!(s.text, "{:?}{} ", numbers.get(v), scope.is_output(*v));
        }
        s
    }

    fn value(
        &mut self,
        m: &Module,
        scope: &Scope,
        v: Value,
        numbers: &mut HashMap<Value, usize>,
        consts: &mut HashMap<ConstId, usize>,
    ) {
        if let Some(n) = numbers.get(&v) {
            let _ = write!(self.text, "%{n}");
            return;
        }
        numbers.insert(v, self.values.len());
        self.values.push(v);
        let data = &m.values[v];
        match m.const_of(v) {
            Some(c) if is_literal(&m.consts[c]) => self.text.push_str(&const_text(m, c)),
            Some(c) => {
                let next = consts.len();
                let n = *consts.entry(c).or_insert(next);
                let _ = write!(self.text, "const {n} {} {}", data.ty, scope.is_shared(c));
            }
            None => {
                let _ = write!(self.text, "{}", data.ty);
                if let Some(sym) = &data.sym {
                    let _ = write!(self.text, "{sym:?}");
                }
            }
        }
    }
}

/// Attributes as text, tensors by content: equal texts mean equal attributes.
pub fn attrs_text(m: &Module, attrs: &Attrs) -> String {
    let mut sorted: Vec<_> = attrs.iter().collect();
    sorted.sort_by_key(|(name, _)| (*name).clone());
    let mut text = String::from("{");
    for (name, attr) in sorted {
        let _ = match attr {
            Attr::Tensor(c) => write!(text, "{name}={},", const_text(m, *c)),
            other => write!(text, "{name}={other:?},"),
        };
    }
    text.push('}');
    text
}

/// A constant as text: by content when it is a literal, by its number otherwise.
pub fn const_text(m: &Module, c: ConstId) -> String {
    let data = &m.consts[c];
    match data.read().ok().filter(|_| is_literal(data)) {
        Some(bytes) => format!("{} {:?} {bytes:?}", data.elem, data.dims),
        None => format!("{c:?}"),
    }
}
