//! Types and value declarations, between ONNX's messages and the IR's.
//!
//! A declaration that the IR's type says less than (denotations, opaque types, element types of a newer ONNX, negative
//! dims) is kept whole beside the value, and written back as long as the value's type is still what it says.

use super::proto::{
    Dimension, ElementTypeProto, MapTypeProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};
use super::rest::{self, DOC, REST};
use dialects::ir::{Dim, Elem, Meta, TensorType, Type, ValueData};

/// The entry of a value whose declared type says more than [`Type`] can.
const TYPE: &str = "type_proto";

/// The IR's type for a declared one.
pub fn type_of(proto: &TypeProto) -> Type {
    let inner = |e: &ElementTypeProto| Box::new(e.elem_type.as_ref().map_or(Type::Unknown, type_of));
    match proto {
        TypeProto { tensor_type: Some(t), .. } => tensor(t).map_or(Type::Unknown, Type::Tensor),
        TypeProto { sparse_tensor_type: Some(t), .. } => tensor(t).map_or(Type::Unknown, Type::SparseTensor),
        TypeProto { sequence_type: Some(e), .. } => Type::Sequence(inner(e)),
        TypeProto { optional_type: Some(e), .. } => Type::Optional(inner(e)),
        TypeProto { map_type: Some(t), .. } => match t.key_type.and_then(Elem::from_onnx) {
            Some(key) => Type::Map(key, Box::new(t.value_type.as_ref().map_or(Type::Unknown, type_of))),
            None => Type::Unknown,
        },
        _ => Type::Unknown,
    }
}

fn tensor(proto: &TensorTypeProto) -> Option<TensorType> {
    let dim = |d: &Dimension| match d {
        Dimension { dim_value: Some(n), .. } if *n >= 0 => Dim::Known(*n),
        Dimension { dim_value: None, dim_param: Some(name), .. } if !name.is_empty() => {
            Dim::Sym(name.as_str().into())
        }
        _ => Dim::Unknown,
    };
    let elem = Elem::from_onnx(proto.elem_type?)?;
    Some(TensorType { elem, dims: proto.shape.as_ref().map(|s| s.dim.iter().map(dim).collect()) })
}

/// The message for a type; `None` for an unknown one.
pub fn proto_of(ty: &Type) -> Option<TypeProto> {
    let tensor = |t: &TensorType| TensorTypeProto {
        elem_type: Some(t.elem.onnx()),
        shape: t.dims.as_ref().map(|dims| TensorShapeProto { dim: dims.iter().map(dimension).collect() }),
    };
    let element = |t: &Type| Some(Box::new(ElementTypeProto { elem_type: proto_of(t) }));
    let empty = TypeProto::default();
    Some(match ty {
        Type::Unknown => return None,
        Type::Tensor(t) => TypeProto { tensor_type: Some(tensor(t)), ..empty },
        Type::SparseTensor(t) => TypeProto { sparse_tensor_type: Some(tensor(t)), ..empty },
        Type::Sequence(t) => TypeProto { sequence_type: element(t), ..empty },
        Type::Optional(t) => TypeProto { optional_type: element(t), ..empty },
        Type::Map(key, value) => {
            let map = MapTypeProto { key_type: Some(key.onnx()), value_type: proto_of(value) };
            TypeProto { map_type: Some(Box::new(map)), ..empty }
        }
    })
}

fn dimension(dim: &Dim) -> Dimension {
    match dim {
        Dim::Known(n) => Dimension { dim_value: Some(*n), ..Dimension::default() },
        Dim::Sym(name) => Dimension { dim_param: Some(name.to_string()), ..Dimension::default() },
        // A name would be one more size to whoever reads it.
        Dim::Expr(_) | Dim::Unknown => Dimension::default(),
    }
}

/// Whether a message sets two members of a `oneof`, which no reader would agree on.
pub fn ambiguous(proto: &TypeProto) -> bool {
    let shape = |t: &Option<TensorTypeProto>| {
        let dims = t.as_ref().and_then(|t| t.shape.as_ref()).map_or(&[][..], |s| &s.dim);
        dims.iter().any(|d| d.dim_value.is_some() && d.dim_param.is_some())
    };
    let inner = |e: &Option<Box<ElementTypeProto>>| {
        e.as_ref().and_then(|e| e.elem_type.as_ref()).is_some_and(ambiguous)
    };
    let set = [
        proto.tensor_type.is_some(),
        proto.sparse_tensor_type.is_some(),
        proto.sequence_type.is_some(),
        proto.optional_type.is_some(),
        proto.map_type.is_some(),
        proto.opaque_type.is_some(),
    ];
    set.iter().filter(|s| **s).count() > 1
        || shape(&proto.tensor_type)
        || shape(&proto.sparse_tensor_type)
        || inner(&proto.sequence_type)
        || inner(&proto.optional_type)
        || proto.map_type.as_ref().and_then(|m| m.value_type.as_ref()).is_some_and(ambiguous)
}

/// Stores a declaration in a value. Its type, where the value has one already, is only what was declared.
pub fn declare(value: &mut ValueData, info: &ValueInfoProto) {
    let ty = info.kind.as_ref().map_or(Type::Unknown, type_of);
    if info.kind != proto_of(&ty) {
        keep_type(&mut value.meta, TYPE, info.kind.clone());
    }
    if value.ty == Type::Unknown {
        value.ty = ty.clone();
    }
    value.declared = Some(ty);
    rest::text(&mut value.meta, DOC, &info.doc_string);
    let odd = rest::metadata(&mut value.meta, &info.metadata_props);
    rest::keep(&mut value.meta, REST, &ValueInfoProto { metadata_props: odd, ..Default::default() });
}

/// Keeps a type, inside the message that may hold one.
pub fn keep_type(meta: &mut Meta, key: &str, kind: Option<TypeProto>) {
    rest::keep(meta, key, &ValueInfoProto { kind, ..Default::default() });
}

/// The declaration of a value under `name`.
pub fn declaration(value: &ValueData, name: &str) -> Result<ValueInfoProto, String> {
    let ty = value.declared.as_ref().unwrap_or(&value.ty);
    let mut info: ValueInfoProto = rest::kept(&value.meta, REST)?;
    let kept: ValueInfoProto = rest::kept(&value.meta, TYPE)?;
    info.name = Some(name.to_owned());
    info.kind = match kept.kind {
        Some(kind) if type_of(&kind) == *ty => Some(kind),
        _ => proto_of(ty),
    };
    info.doc_string = rest::text_of(&value.meta, DOC);
    info.metadata_props.extend(rest::metadata_of(&value.meta));
    Ok(info)
}
