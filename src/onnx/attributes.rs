//! Attributes, between `AttributeProto` and the IR's. Nested graphs are left to the importer and the exporter.

use super::error::Problem;
use super::external::Folder;
use super::proto::{AttributeProto, TensorProto};
use super::rest;
use super::tensors::{self, NAME};
use super::types::{ambiguous, proto_of, type_of};
use dialects::ir::{Attr, ConstData, Encoding, Meta, Module};

/// The kinds of `AttributeProto.AttributeType`.
pub mod kind {
    #![allow(missing_docs)]
    pub const FLOAT: i32 = 1;
    pub const INT: i32 = 2;
    pub const STRING: i32 = 3;
    pub const TENSOR: i32 = 4;
    pub const GRAPH: i32 = 5;
    pub const FLOATS: i32 = 6;
    pub const INTS: i32 = 7;
    pub const STRINGS: i32 = 8;
    pub const TENSORS: i32 = 9;
    pub const GRAPHS: i32 = 10;
    pub const SPARSE_TENSOR: i32 = 11;
    pub const SPARSE_TENSORS: i32 = 12;
    pub const TYPE_PROTO: i32 = 13;
    pub const TYPE_PROTOS: i32 = 14;
}

const NAMES: [&str; 15] = [
    "UNDEFINED",
    "FLOAT",
    "INT",
    "STRING",
    "TENSOR",
    "GRAPH",
    "FLOATS",
    "INTS",
    "STRINGS",
    "TENSORS",
    "GRAPHS",
    "SPARSE_TENSOR",
    "SPARSE_TENSORS",
    "TYPE_PROTO",
    "TYPE_PROTOS",
];

/// The entry of an op that keeps what the IR has no place for in its attribute `name`.
pub fn rest_key(name: &str) -> String {
    format!("attribute.{name}")
}

/// The fields of an attribute that hold a value, by the kind that each belongs to.
fn filled(a: &AttributeProto) -> Vec<i32> {
    let fields = [
        (kind::FLOAT, a.f.is_some()),
        (kind::INT, a.i.is_some()),
        (kind::STRING, a.s.is_some()),
        (kind::TENSOR, a.t.is_some()),
        (kind::GRAPH, a.g.is_some()),
        (kind::FLOATS, !a.floats.is_empty()),
        (kind::INTS, !a.ints.is_empty()),
        (kind::STRINGS, !a.strings.is_empty()),
        (kind::TENSORS, !a.tensors.is_empty()),
        (kind::GRAPHS, !a.graphs.is_empty()),
        (kind::SPARSE_TENSOR, a.sparse_tensor.is_some()),
        (kind::SPARSE_TENSORS, !a.sparse_tensors.is_empty()),
        (kind::TYPE_PROTO, a.tp.is_some()),
        (kind::TYPE_PROTOS, !a.type_protos.is_empty()),
    ];
    fields.into_iter().filter(|(_, set)| *set).map(|(k, _)| k).collect()
}

/// The kind of an attribute, checked against the field that is set. Models of 2017 leave the kind out: then it is
/// the field's.
pub fn kind_of(a: &AttributeProto) -> Result<i32, Problem> {
    let filled = filled(a);
    let kind = a.kind.unwrap_or(0);
    // Only lists may be empty, and a scalar left out is its default.
    let good = match filled[..] {
        [] => kind != 0 || a.ref_attr_name.is_some(),
        [one] => kind == 0 || kind == one,
        _ => false,
    };
    if !good || !(0..NAMES.len() as i32).contains(&kind) {
        let name = |k: &i32| NAMES.get(*k as usize).map_or_else(|| k.to_string(), |n| (*n).to_owned());
        let found: Vec<String> = filled.iter().map(name).collect();
        return Err(Problem::Attribute {
            name: a.name.clone().unwrap_or_default(),
            kind: name(&kind),
            found: if found.is_empty() { "none".to_owned() } else { found.join(" and ") },
        });
    }
    Ok(if kind == 0 { filled.first().copied().unwrap_or(0) } else { kind })
}

/// Reads an attribute that holds no graph; `None` for one that does.
pub fn read(a: &AttributeProto, m: &mut Module, folder: &mut Folder) -> Result<Option<Attr>, Problem> {
    let what = kind_of(a)?;
    if let Some(name) = a.ref_attr_name.as_ref().filter(|n| !n.is_empty()) {
        return Ok(Some(Attr::Ref { name: name.as_str().into(), kind: what }));
    }
    let missing = || Problem::Attribute {
        name: a.name.clone().unwrap_or_default(),
        kind: NAMES[what as usize].to_owned(),
        found: "none".to_owned(),
    };
    for ty in a.tp.as_deref().into_iter().chain(&a.type_protos) {
        if ambiguous(ty) {
            return Err(Problem::AmbiguousType(a.name.clone().unwrap_or_default()));
        }
    }
    Ok(Some(match what {
        kind::FLOAT => Attr::Float(a.f.unwrap_or_default()),
        kind::INT => Attr::Int(a.i.unwrap_or_default()),
        kind::STRING => Attr::Str(a.s.clone().unwrap_or_default()),
        kind::TENSOR => {
            let data = tensor(a.t.as_deref().ok_or_else(missing)?, folder)?;
            Attr::Tensor(m.consts.push(data))
        }
        kind::FLOATS => Attr::Floats(a.floats.clone()),
        kind::INTS => Attr::Ints(a.ints.clone()),
        kind::STRINGS => Attr::Strs(a.strings.clone()),
        kind::TENSORS => {
            let data: Result<Vec<ConstData>, Problem> = a.tensors.iter().map(|t| tensor(t, folder)).collect();
            Attr::Tensors(data?.into_iter().map(|d| m.consts.push(d)).collect())
        }
        kind::SPARSE_TENSOR => {
            let sparse = a.sparse_tensor.as_deref().ok_or_else(missing)?;
            Attr::Tensor(m.consts.push(tensors::read_sparse(sparse, folder)?))
        }
        kind::SPARSE_TENSORS => {
            let mut ids = Vec::new();
            for t in &a.sparse_tensors {
                ids.push(m.consts.push(tensors::read_sparse(t, folder)?));
            }
            Attr::Tensors(ids)
        }
        kind::TYPE_PROTO => Attr::Type(type_of(a.tp.as_deref().ok_or_else(missing)?)),
        kind::TYPE_PROTOS => Attr::Types(a.type_protos.iter().map(type_of).collect()),
        kind::GRAPH if a.g.is_none() => return Err(missing()),
        _ => return Ok(None),
    }))
}

fn tensor(proto: &TensorProto, folder: &mut Folder) -> Result<ConstData, Problem> {
    let mut data = tensors::read(proto, folder)?;
    rest::text(&mut data.meta, NAME, &proto.name);
    Ok(data)
}

/// Keeps, in the metadata of its op, what the IR's attribute has no place for.
pub fn keep_rest(a: &AttributeProto, meta: &mut Meta) {
    let exact = |ty: &super::proto::TypeProto| proto_of(&type_of(ty)).as_ref() == Some(ty);
    let rest = AttributeProto {
        // An empty list of tensors does not say of which sort they are.
        kind: a.kind.filter(|k| *k == kind::SPARSE_TENSORS && a.sparse_tensors.is_empty()),
        doc_string: a.doc_string.clone(),
        tp: a.tp.clone().filter(|t| !exact(t)),
        type_protos: if a.type_protos.iter().all(exact) { Vec::new() } else { a.type_protos.clone() },
        ..Default::default()
    };
    rest::keep(meta, &rest_key(a.name.as_deref().unwrap_or_default()), &rest);
}

/// The message of an attribute without the tensors and graphs in it; `rest` is what was kept of it.
pub fn message(m: &Module, name: &str, attr: &Attr, rest: AttributeProto) -> AttributeProto {
    let sparse = |id| m.consts[id].encoding == Encoding::Sparse;
    let mut a =
        AttributeProto { name: Some(name.to_owned()), doc_string: rest.doc_string, ..Default::default() };
    let what = match attr {
        Attr::Int(i) => {
            a.i = Some(*i);
            kind::INT
        }
        Attr::Float(f) => {
            a.f = Some(*f);
            kind::FLOAT
        }
        Attr::Str(s) => {
            a.s = Some(s.clone());
            kind::STRING
        }
        Attr::Ints(v) => {
            a.ints = v.clone();
            kind::INTS
        }
        Attr::Floats(v) => {
            a.floats = v.clone();
            kind::FLOATS
        }
        Attr::Strs(v) => {
            a.strings = v.clone();
            kind::STRINGS
        }
        Attr::Type(t) => {
            let kept = rest.tp.filter(|p| type_of(p) == *t);
            a.tp = Some(kept.unwrap_or_else(|| Box::new(proto_of(t).unwrap_or_default())));
            kind::TYPE_PROTO
        }
        Attr::Types(ts) => {
            let same = rest.type_protos.iter().map(type_of).eq(ts.iter().cloned());
            let made = || ts.iter().map(|t| proto_of(t).unwrap_or_default()).collect();
            a.type_protos = if same { rest.type_protos } else { made() };
            kind::TYPE_PROTOS
        }
        Attr::Tensor(id) if sparse(*id) => kind::SPARSE_TENSOR,
        Attr::Tensor(_) => kind::TENSOR,
        Attr::Tensors(ids) if ids.first().is_some_and(|id| sparse(*id)) => kind::SPARSE_TENSORS,
        Attr::Tensors(ids) if ids.is_empty() => rest.kind.unwrap_or(kind::TENSORS),
        Attr::Tensors(_) => kind::TENSORS,
        Attr::Graph(_) => kind::GRAPH,
        Attr::Graphs(_) => kind::GRAPHS,
        Attr::Ref { name, kind } => {
            a.ref_attr_name = Some(name.to_string());
            *kind
        }
    };
    a.kind = Some(what);
    a
}
