//! Types: element types, symbolic dims, and the tensor, sequence, optional and map types of values.

use super::literal::Name;
use super::poly::Poly;
use std::fmt;
use std::sync::Arc;

/// The element type of a tensor. Sub-byte elements are stored packed, first element in the low bits,
/// flat and row-major without row padding (the layout of ONNX `raw_data`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Elem {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3FN,
    F8E4M3FNUZ,
    F8E5M2,
    F8E5M2FNUZ,
    F8E8M0,
    F6E2M3,
    F6E3M2,
    F4E2M1,
    I64,
    I32,
    I16,
    I8,
    I4,
    I2,
    U64,
    U32,
    U16,
    U8,
    U4,
    U2,
    Bool,
    C64,
    C128,
    String,
}

/// One row per element type: the type, its name in text, its bits, its ONNX `TensorProto.DataType`.
const ELEMS: [(Elem, &str, usize, i32); 28] = [
    (Elem::F32, "f32", 32, 1),
    (Elem::U8, "u8", 8, 2),
    (Elem::I8, "i8", 8, 3),
    (Elem::U16, "u16", 16, 4),
    (Elem::I16, "i16", 16, 5),
    (Elem::I32, "i32", 32, 6),
    (Elem::I64, "i64", 64, 7),
    (Elem::String, "string", 0, 8),
    (Elem::Bool, "bool", 8, 9),
    (Elem::F16, "f16", 16, 10),
    (Elem::F64, "f64", 64, 11),
    (Elem::U32, "u32", 32, 12),
    (Elem::U64, "u64", 64, 13),
    (Elem::C64, "c64", 64, 14),
    (Elem::C128, "c128", 128, 15),
    (Elem::BF16, "bf16", 16, 16),
    (Elem::F8E4M3FN, "f8e4m3fn", 8, 17),
    (Elem::F8E4M3FNUZ, "f8e4m3fnuz", 8, 18),
    (Elem::F8E5M2, "f8e5m2", 8, 19),
    (Elem::F8E5M2FNUZ, "f8e5m2fnuz", 8, 20),
    (Elem::U4, "u4", 4, 21),
    (Elem::I4, "i4", 4, 22),
    (Elem::F4E2M1, "f4e2m1", 4, 23),
    (Elem::F8E8M0, "f8e8m0", 8, 24),
    (Elem::U2, "u2", 2, 25),
    (Elem::I2, "i2", 2, 26),
    (Elem::F6E2M3, "f6e2m3", 8, 27),
    (Elem::F6E3M2, "f6e3m2", 8, 28),
];

impl Elem {
    fn row(self) -> &'static (Elem, &'static str, usize, i32) {
        ELEMS.iter().find(|r| r.0 == self).expect("ELEMS lists every element type")
    }

    /// Every element type.
    pub fn all() -> impl Iterator<Item = Elem> {
        ELEMS.iter().map(|r| r.0)
    }

    /// The name in the text form, such as `f32`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The element type whose text name is `name`.
    pub fn from_name(name: &str) -> Option<Elem> {
        ELEMS.iter().find(|r| r.1 == name).map(|r| r.0)
    }

    /// Bits of storage per element; 0 for strings, whose length varies.
    pub fn bits(self) -> usize {
        self.row().2
    }

    /// The value of ONNX's `TensorProto.DataType`.
    pub fn onnx(self) -> i32 {
        self.row().3
    }

    /// The element type of ONNX's `TensorProto.DataType` value `code`.
    pub fn from_onnx(code: i32) -> Option<Elem> {
        ELEMS.iter().find(|r| r.3 == code).map(|r| r.0)
    }

    /// Bytes that `count` elements take, or `None` when that overflows or the element is a string.
    pub fn byte_len(self, count: u64) -> Option<u64> {
        match self.bits() {
            0 => None,
            bits => count.checked_mul(bits as u64).map(|b| b.div_ceil(8)),
        }
    }

    /// Whether this is a real floating-point type, of any width.
    pub fn is_float(self) -> bool {
        self.row().1.starts_with('f') || self == Elem::BF16
    }

    /// Whether this is a signed or unsigned integer type (not bool).
    pub fn is_int(self) -> bool {
        self.is_signed_int() || self.row().1.starts_with('u')
    }

    /// Whether this is a signed integer type.
    pub fn is_signed_int(self) -> bool {
        self.row().1.starts_with('i')
    }
}

impl fmt::Display for Elem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A dimension, or one element of a small integer value that inference follows (`Shape` -> `Gather` -> `Concat`).
///
/// The arithmetic never refuses: what it cannot express becomes [`Dim::Unknown`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dim {
    /// A number. Negative only in values, never in a shape.
    Known(i64),
    /// A named size, such as `batch`. Two equal names are equal sizes.
    Sym(Arc<str>),
    /// A sum of products of named sizes that is neither a number nor a name, such as `past + seq`.
    Expr(Arc<Poly<Arc<str>>>),
    /// Anything.
    #[default]
    Unknown,
}

impl Dim {
    /// The number, when there is one.
    pub fn known(&self) -> Option<i64> {
        match self {
            Dim::Known(n) => Some(*n),
            _ => None,
        }
    }

    /// Whether both are surely the same size.
    pub fn same(&self, other: &Dim) -> bool {
        *self != Dim::Unknown && self == other
    }

    /// The sum that this is, if anything is known.
    pub fn poly(&self) -> Option<Poly<Arc<str>>> {
        match self {
            Dim::Known(n) => Some(Poly::number(*n)),
            Dim::Sym(name) => Some(Poly::atom(name.clone())),
            Dim::Expr(p) => Some((**p).clone()),
            Dim::Unknown => None,
        }
    }

    /// Whether it is surely not negative.
    pub fn nonnegative(&self) -> bool {
        self.poly().is_some_and(|p| p.nonnegative())
    }

    fn with(&self, other: &Dim, f: fn(&Names, &Names) -> Option<Names>) -> Dim {
        let sum = || f(&self.poly()?, &other.poly()?);
        sum().map_or(Dim::Unknown, Dim::from)
    }

    /// `self + other`.
    pub fn add(&self, other: &Dim) -> Dim {
        self.with(other, Poly::add)
    }

    /// `self - other`.
    pub fn sub(&self, other: &Dim) -> Dim {
        self.with(other, Poly::sub)
    }

    /// `self * other`.
    pub fn mul(&self, other: &Dim) -> Dim {
        match (self, other) {
            (Dim::Known(0), _) | (_, Dim::Known(0)) => Dim::Known(0),
            _ => self.with(other, Poly::mul),
        }
    }

    /// Integer division, truncating as ONNX's `Div` does.
    pub fn div(&self, other: &Dim) -> Dim {
        match (self, other) {
            (Dim::Known(a), Dim::Known(b)) => a.checked_div(*b).map_or(Dim::Unknown, Dim::Known),
            // A symbolic size of zero would make the quotient undefined, and nothing can then depend on it.
            (a, b) => a.with(b, Poly::div),
        }
    }

    /// The size that two broadcast dims give, or `None` when both are known and do not broadcast.
    pub fn broadcast(&self, other: &Dim) -> Option<Dim> {
        match (self, other) {
            (a, b) if a.same(b) => Some(a.clone()),
            (Dim::Known(1), d) | (d, Dim::Known(1)) => Some(d.clone()),
            (Dim::Known(_), Dim::Known(_)) => None,
            // A known size other than one wins over a symbol: the symbol must be it, or one.
            (Dim::Known(n), _) | (_, Dim::Known(n)) => Some(Dim::Known(*n)),
            _ => Some(Dim::Unknown),
        }
    }

    /// What is known of a size described twice, or `None` when the two contradict. A number beats a name, a name a sum.
    pub fn unify(&self, other: &Dim) -> Option<Dim> {
        match (self, other) {
            (Dim::Known(a), Dim::Known(b)) => (a == b).then(|| self.clone()),
            (Dim::Known(_), _) | (Dim::Sym(_), Dim::Sym(_) | Dim::Expr(_)) => Some(self.clone()),
            (Dim::Expr(_), Dim::Expr(_)) | (_, Dim::Unknown) => Some(self.clone()),
            (_, other) => Some(other.clone()),
        }
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Dim {
        i64::try_from(n).map_or(Dim::Unknown, Dim::Known)
    }
}

/// A sum of products of named sizes.
type Names = Poly<Arc<str>>;

/// Sums of more products, and products of more names, are not followed: they only grow.
const MAX_TERMS: usize = 8;
const MAX_FACTORS: usize = 6;

impl From<Names> for Dim {
    fn from(p: Names) -> Dim {
        match (p.known(), p.single()) {
            (Some(n), _) => Dim::Known(n),
            (_, Some(name)) => Dim::Sym(name.clone()),
            _ if p.terms().count() > MAX_TERMS || p.terms().any(|t| t.0.len() > MAX_FACTORS) => Dim::Unknown,
            _ => Dim::Expr(Arc::new(p)),
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(n) => write!(f, "{n}"),
            Dim::Sym(s) => f.write_str(s),
            Dim::Expr(p) => p.write(f, |name, f| f.write_str(name)),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

/// An element type and a shape; `dims` is `None` when even the rank is unknown.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// The element type.
    pub elem: Elem,
    /// The dims, outermost first.
    pub dims: Option<Vec<Dim>>,
}

impl TensorType {
    /// The shape as numbers, when every dim is known.
    pub fn known_shape(&self) -> Option<Vec<usize>> {
        self.dims.as_ref()?.iter().map(|d| d.known().and_then(|n| usize::try_from(n).ok())).collect()
    }
}

/// The type of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub enum Type {
    /// Nothing is known yet.
    #[default]
    Unknown,
    /// A dense tensor.
    Tensor(TensorType),
    /// A sparse tensor; passed through, never computed with.
    SparseTensor(TensorType),
    /// A sequence of values of one type.
    Sequence(Box<Type>),
    /// A value or nothing.
    Optional(Box<Type>),
    /// A map from a key element type; passed through.
    Map(Elem, Box<Type>),
}

impl Type {
    /// A tensor type.
    pub fn tensor(elem: Elem, dims: impl IntoIterator<Item = Dim>) -> Type {
        Type::Tensor(TensorType { elem, dims: Some(dims.into_iter().collect()) })
    }

    /// A tensor type with a known shape.
    pub fn of_shape(elem: Elem, shape: &[usize]) -> Type {
        Type::tensor(elem, shape.iter().map(|&n| Dim::from(n)))
    }

    /// A tensor of unknown rank.
    pub fn unranked(elem: Elem) -> Type {
        Type::Tensor(TensorType { elem, dims: None })
    }

    /// The tensor type, if it is a dense tensor.
    pub fn as_tensor(&self) -> Option<&TensorType> {
        match self {
            Type::Tensor(t) => Some(t),
            _ => None,
        }
    }

    /// The element type, if it is a dense tensor.
    pub fn elem(&self) -> Option<Elem> {
        self.as_tensor().map(|t| t.elem)
    }

    /// The dims, if it is a dense tensor of known rank.
    pub fn dims(&self) -> Option<&[Dim]> {
        self.as_tensor().and_then(|t| t.dims.as_deref())
    }

    /// What is true of a value that is of the one type or the other.
    pub fn join(&self, other: &Type) -> Type {
        let dim = |(p, q): (&Dim, &Dim)| if p.same(q) { p.clone() } else { Dim::Unknown };
        match (self, other) {
            (Type::Tensor(x), Type::Tensor(y)) if x.elem == y.elem => {
                let dims = match (&x.dims, &y.dims) {
                    (Some(p), Some(q)) if p.len() == q.len() => Some(p.iter().zip(q).map(dim).collect()),
                    _ => None,
                };
                Type::Tensor(TensorType { elem: x.elem, dims })
            }
            (Type::Sequence(x), Type::Sequence(y)) => Type::Sequence(Box::new(x.join(y))),
            (Type::Optional(x), Type::Optional(y)) => Type::Optional(Box::new(x.join(y))),
            (a, b) if a == b => a.clone(),
            _ => Type::Unknown,
        }
    }

    /// What is known of a value described twice, or `None` when the two descriptions contradict.
    /// Where both name a dim, `self` wins.
    pub fn unify(&self, other: &Type) -> Option<Type> {
        let tensor = |a: &TensorType, b: &TensorType| {
            let dims = match (&a.dims, &b.dims) {
                (Some(x), Some(y)) if x.len() != y.len() => return None,
                (Some(x), Some(y)) => Some(x.iter().zip(y).map(|(p, q)| p.unify(q)).collect::<Option<_>>()?),
                (x, y) => x.clone().or_else(|| y.clone()),
            };
            (a.elem == b.elem).then_some(TensorType { elem: a.elem, dims })
        };
        Some(match (self, other) {
            (Type::Unknown, t) | (t, Type::Unknown) => t.clone(),
            (Type::Tensor(a), Type::Tensor(b)) => Type::Tensor(tensor(a, b)?),
            (Type::SparseTensor(a), Type::SparseTensor(b)) => Type::SparseTensor(tensor(a, b)?),
            (Type::Sequence(a), Type::Sequence(b)) => Type::Sequence(Box::new(a.unify(b)?)),
            (Type::Optional(a), Type::Optional(b)) => Type::Optional(Box::new(a.unify(b)?)),
            (Type::Map(k, a), Type::Map(l, b)) if k == l => Type::Map(*k, Box::new(a.unify(b)?)),
            _ => return None,
        })
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<")?;
        match &self.dims {
            None => f.write_str("*x")?,
            Some(dims) => {
                for d in dims {
                    match d {
                        // A name that is no plain word is quoted, so that the text parses back.
                        Dim::Sym(s) => write!(f, "{} x ", Name(s))?,
                        Dim::Expr(p) => {
                            f.write_str("(")?;
                            p.write(f, |name, f| write!(f, "{}", Name(name)))?;
                            f.write_str(") x ")?;
                        }
                        d => write!(f, "{d}x")?,
                    }
                }
            }
        }
        write!(f, "{}>", self.elem)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Type::Unknown => f.write_str("?"),
            Type::Tensor(t) => write!(f, "tensor{t}"),
            Type::SparseTensor(t) => write!(f, "sparse{t}"),
            Type::Sequence(t) => write!(f, "sequence<{t}>"),
            Type::Optional(t) => write!(f, "optional<{t}>"),
            Type::Map(k, t) => write!(f, "map<{k}, {t}>"),
        }
    }
}
