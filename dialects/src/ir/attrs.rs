//! Attributes of ops: the value kinds of ONNX's `AttributeProto`, with typed access.

use super::{ConstId, Region, Symbol, Type};
use bytes::Bytes;

/// One attribute value.
#[derive(Clone, Debug, PartialEq)]
pub enum Attr {
    /// A 64-bit integer.
    Int(i64),
    /// A 32-bit float.
    Float(f32),
    /// Bytes, usually UTF-8 text.
    Str(Bytes),
    /// A tensor in the module's constant pool (a sparse one is a constant with `Encoding::Sparse`).
    Tensor(ConstId),
    /// A nested graph.
    Graph(Region),
    /// A type.
    Type(Type),
    /// Integers.
    Ints(Vec<i64>),
    /// Floats.
    Floats(Vec<f32>),
    /// Byte strings.
    Strs(Vec<Bytes>),
    /// Tensors.
    Tensors(Vec<ConstId>),
    /// Nested graphs.
    Graphs(Vec<Region>),
    /// Types.
    Types(Vec<Type>),
    /// Inside a function body: the attribute of the call with this name. `kind` is ONNX's `AttributeType`.
    Ref {
        /// The attribute of the enclosing function that is meant.
        name: Symbol,
        /// ONNX's `AttributeProto.AttributeType`.
        kind: i32,
    },
}

/// The names of ONNX's `AttributeProto.AttributeType`, by number.
const KINDS: [&str; 15] = [
    "undefined",
    "float",
    "int",
    "string",
    "tensor",
    "graph",
    "floats",
    "ints",
    "strings",
    "tensors",
    "graphs",
    "sparse_tensor",
    "sparse_tensors",
    "type_proto",
    "type_protos",
];

/// The name of the attribute kind that ONNX numbers `kind`.
pub fn kind_name(kind: i32) -> &'static str {
    usize::try_from(kind).ok().and_then(|k| KINDS.get(k)).unwrap_or(&KINDS[0])
}

impl Attr {
    /// The name of its kind; a sparse tensor is a tensor here.
    pub fn kind(&self) -> &'static str {
        kind_name(match self {
            Attr::Float(_) => 1,
            Attr::Int(_) => 2,
            Attr::Str(_) => 3,
            Attr::Tensor(_) => 4,
            Attr::Graph(_) => 5,
            Attr::Floats(_) => 6,
            Attr::Ints(_) => 7,
            Attr::Strs(_) => 8,
            Attr::Tensors(_) => 9,
            Attr::Graphs(_) => 10,
            Attr::Type(_) => 13,
            Attr::Types(_) => 14,
            Attr::Ref { kind, .. } => *kind,
        })
    }

    /// Whether it is of the kind with this name.
    pub fn is_kind(&self, name: &str) -> bool {
        self.kind() == name.strip_prefix("sparse_").unwrap_or(name)
    }
}

/// Named attributes in their original order. A name occurs once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attrs(Vec<(Symbol, Attr)>);

impl Attrs {
    /// The attribute `name`.
    pub fn get(&self, name: &str) -> Option<&Attr> {
        self.0.iter().find(|(n, _)| &**n == name).map(|(_, a)| a)
    }

    /// Sets `name`, keeping its place when it is there already.
    pub fn set(&mut self, name: impl Into<Symbol>, value: Attr) {
        let name = name.into();
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some(slot) => slot.1 = value,
            None => self.0.push((name, value)),
        }
    }

    /// Removes `name` and returns what it was.
    pub fn remove(&mut self, name: &str) -> Option<Attr> {
        let i = self.0.iter().position(|(n, _)| &**n == name)?;
        Some(self.0.remove(i).1)
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Symbol, &Attr)> {
        self.0.iter().map(|(n, a)| (n, a))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The integer `name`.
    pub fn int(&self, name: &str) -> Option<i64> {
        match self.get(name)? {
            Attr::Int(i) => Some(*i),
            _ => None,
        }
    }

    /// The float `name`.
    pub fn float(&self, name: &str) -> Option<f32> {
        match self.get(name)? {
            Attr::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// The text `name`, when it is UTF-8.
    pub fn str(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Attr::Str(s) => std::str::from_utf8(s).ok(),
            _ => None,
        }
    }

    /// The integers `name`.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        match self.get(name)? {
            Attr::Ints(v) => Some(v),
            _ => None,
        }
    }

    /// The floats `name`.
    pub fn floats(&self, name: &str) -> Option<&[f32]> {
        match self.get(name)? {
            Attr::Floats(v) => Some(v),
            _ => None,
        }
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<ConstId> {
        match self.get(name)? {
            Attr::Tensor(c) => Some(*c),
            _ => None,
        }
    }

    /// The nested graph `name`.
    pub fn graph(&self, name: &str) -> Option<Region> {
        match self.get(name)? {
            Attr::Graph(r) => Some(*r),
            _ => None,
        }
    }

    /// Every nested graph, in order.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        self.0.iter().flat_map(|(_, a)| match a {
            Attr::Graph(r) => vec![*r],
            Attr::Graphs(rs) => rs.clone(),
            _ => Vec::new(),
        })
    }

    /// Every constant, in order.
    pub fn consts(&self) -> impl Iterator<Item = ConstId> {
        self.0.iter().flat_map(|(_, a)| match a {
            Attr::Tensor(c) => vec![*c],
            Attr::Tensors(cs) => cs.clone(),
            _ => Vec::new(),
        })
    }
}

impl<N: Into<Symbol>> FromIterator<(N, Attr)> for Attrs {
    fn from_iter<I: IntoIterator<Item = (N, Attr)>>(iter: I) -> Attrs {
        let mut attrs = Attrs::default();
        for (name, value) in iter {
            attrs.set(name, value);
        }
        attrs
    }
}

impl From<i64> for Attr {
    fn from(v: i64) -> Attr {
        Attr::Int(v)
    }
}

impl From<f32> for Attr {
    fn from(v: f32) -> Attr {
        Attr::Float(v)
    }
}

impl From<&str> for Attr {
    fn from(v: &str) -> Attr {
        Attr::Str(Bytes::copy_from_slice(v.as_bytes()))
    }
}

impl From<Vec<i64>> for Attr {
    fn from(v: Vec<i64>) -> Attr {
        Attr::Ints(v)
    }
}
