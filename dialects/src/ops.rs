//! What an op is: a name, type inference, a verifier and a reference evaluation; and the table of all ops.

use crate::ir::{Attrs, ConstId, ConstPool, Dim, Elem, Function, OpName, Region, Type};
use crate::onnx::functions;
use crate::tensor::{Tensor, TensorError};
use std::collections::HashMap;
use std::sync::Arc;
use thiserror::Error;

/// Why an op cannot be inferred, verified or evaluated. Whoever called adds the op's name and source node.
#[derive(Clone, Debug, Error)]
pub enum OpError {
    /// The op breaks its own specification: says what was expected and what was found.
    #[error("{0}")]
    Invalid(String),
    /// The op is legal, but qcc does not do this form of it.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// An operand is not what the op needs.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl OpError {
    /// [`OpError::Invalid`] from anything printable.
    pub fn invalid(message: impl Into<String>) -> OpError {
        OpError::Invalid(message.into())
    }
}

/// What inference knows of a value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    /// The type.
    pub ty: Type,
    /// Small integer contents, row-major, in symbols where they are not numbers. A bool is 0 or 1. A symbol is
    /// a size, so it is never negative.
    pub sym: Option<Arc<[Dim]>>,
    /// The constant that the value is.
    pub konst: Option<ConstId>,
}

impl From<Type> for Fact {
    fn from(ty: Type) -> Fact {
        Fact { ty, ..Fact::default() }
    }
}

/// At most this many elements of an integer value are followed by inference.
pub const MAX_SYM: u64 = 64;

impl Fact {
    /// What is known of a constant: its type, and its contents when they are few integers.
    pub fn of_const(id: ConstId, consts: &ConstPool) -> Fact {
        let c = &consts[id];
        let followed = matches!(c.elem, Elem::I64 | Elem::I32 | Elem::Bool);
        let few =
            followed && c.dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).is_some_and(|n| n <= MAX_SYM);
        let sym = few.then(|| Tensor::from_const(c).ok()).flatten();
        let sym = sym.and_then(|t| Some(t.to_i64().ok()?.iter().map(|&n| Dim::Known(n)).collect()));
        Fact { ty: c.ty(), sym, konst: Some(id) }
    }
}

/// What inference gives: one fact per result, in order. Fewer than the op has results leaves the rest unknown.
pub type Inferred = Result<Vec<Fact>, OpError>;

/// What an op's inference and verifier see.
pub struct InferCx<'a> {
    /// The op's name.
    pub name: &'a OpName,
    /// Its attributes.
    pub attrs: &'a Attrs,
    /// The opset version of its dialect.
    pub opset: i64,
    /// Facts of the operands; `None` is one left out.
    pub inputs: &'a [Option<Fact>],
    /// How many results the op has (results that nobody wants included).
    pub outputs: usize,
    /// The module's constants.
    pub consts: &'a ConstPool,
    /// Infers a nested region from facts of its inputs, and gives facts of its results.
    pub region: &'a dyn Fn(Region, &[Fact]) -> Inferred,
}

impl<'a> InferCx<'a> {
    /// What is known of operand `i`; `None` when it is left out.
    pub fn fact(&self, i: usize) -> Option<&'a Fact> {
        self.inputs.get(i).and_then(Option::as_ref)
    }

    /// Whether operand `i` is given.
    pub fn has(&self, i: usize) -> bool {
        self.fact(i).is_some()
    }

    /// The type of operand `i`; unknown when it is left out.
    pub fn ty(&self, i: usize) -> &'a Type {
        self.fact(i).map_or(&Type::Unknown, |f| &f.ty)
    }

    /// The element type of operand `i`, if it is known.
    pub fn elem(&self, i: usize) -> Option<Elem> {
        self.ty(i).elem()
    }

    /// The dims of operand `i`, if its rank is known.
    pub fn dims(&self, i: usize) -> Option<&'a [Dim]> {
        self.ty(i).dims()
    }

    /// The small integer contents of operand `i`, if they are known.
    pub fn sym(&self, i: usize) -> Option<&'a [Dim]> {
        self.fact(i)?.sym.as_deref()
    }

    /// The contents of operand `i` as numbers, if all are known.
    pub fn ints(&self, i: usize) -> Option<Vec<i64>> {
        self.sym(i)?.iter().map(Dim::known).collect()
    }
}

/// A value at run time.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A tensor.
    Tensor(Tensor),
    /// A sequence.
    Sequence(Vec<Item>),
    /// An optional that holds something or nothing.
    Optional(Option<Box<Item>>),
}

impl From<Tensor> for Item {
    fn from(t: Tensor) -> Item {
        Item::Tensor(t)
    }
}

impl Item {
    /// The type, as far as the value tells: an empty sequence does not say of what.
    pub fn ty(&self) -> Type {
        match self {
            Item::Tensor(t) => Type::of_shape(t.elem(), t.shape()),
            Item::Sequence(items) => {
                let types = items.iter().map(Item::ty).reduce(|a, b| a.join(&b));
                Type::Sequence(Box::new(types.unwrap_or_default()))
            }
            Item::Optional(held) => {
                Type::Optional(Box::new(held.as_ref().map(|i| i.ty()).unwrap_or_default()))
            }
        }
    }

    /// The elements of the sequence, if it is one.
    pub fn sequence(&self) -> Result<&[Item], OpError> {
        match self {
            Item::Sequence(items) => Ok(items),
            Item::Tensor(_) => Err(OpError::invalid("expected a sequence, found a tensor")),
            Item::Optional(_) => Err(OpError::invalid("expected a sequence, found an optional")),
        }
    }

    /// The tensor, if it is one.
    pub fn tensor(&self) -> Result<&Tensor, OpError> {
        match self {
            Item::Tensor(t) => Ok(t),
            Item::Sequence(_) => Err(OpError::invalid("expected a tensor, found a sequence")),
            Item::Optional(_) => Err(OpError::invalid("expected a tensor, found an optional")),
        }
    }
}

/// What evaluation gives: at least as many items as the op has wanted results.
pub type Evaluated = Result<Vec<Item>, OpError>;

/// What an op's evaluation sees.
pub struct EvalCx<'a> {
    /// The op's name.
    pub name: &'a OpName,
    /// Its attributes.
    pub attrs: &'a Attrs,
    /// The opset version of its dialect.
    pub opset: i64,
    /// Operands; `None` is one left out.
    pub inputs: &'a [Option<Item>],
    /// How many results the op has.
    pub outputs: usize,
    /// The module's constants, for attributes that are tensors.
    pub consts: &'a ConstPool,
    /// The most iterations that a Loop makes.
    pub max_iterations: u64,
    /// Whether ops compute over the reals what they say, leaving out the roundings that a runtime may add (the
    /// int8 activations of `accuracy_level` 4).
    pub exact: bool,
    /// What is known of the types of a nested region's results.
    pub results_of: &'a dyn Fn(Region) -> Vec<Type>,
    /// Runs a nested region on these inputs; values of the regions around it are visible to it.
    pub region: &'a dyn Fn(Region, Vec<Item>) -> Evaluated,
}

impl<'a> EvalCx<'a> {
    /// Operand `i`, which must be given.
    pub fn item(&self, i: usize) -> Result<&'a Item, OpError> {
        let item = self.inputs.get(i).and_then(Option::as_ref);
        item.ok_or_else(|| OpError::invalid(format!("operand {i} is missing")))
    }

    /// Operand `i`, which must be a tensor.
    pub fn input(&self, i: usize) -> Result<&'a Tensor, OpError> {
        self.item(i)?.tensor()
    }

    /// Operand `i` as a tensor, or `None` when it is left out.
    pub fn opt(&self, i: usize) -> Result<Option<&'a Tensor>, OpError> {
        self.inputs.get(i).and_then(Option::as_ref).map(Item::tensor).transpose()
    }

    /// The integer attribute `name`, or `default` when it is left out.
    pub fn int_or(&self, name: &str, default: i64) -> i64 {
        self.attrs.int(name).unwrap_or(default)
    }

    /// The float attribute `name`, or `default` when it is left out.
    pub fn float_or(&self, name: &str, default: f32) -> f32 {
        self.attrs.float(name).unwrap_or(default)
    }

    /// One result.
    pub fn one(&self, t: Tensor) -> Evaluated {
        Ok(vec![t.into()])
    }
}

/// One op. `OpDef { name: "onnx.Sqrt", eval: .., ..OpDef::NEW }` is how a file of ops defines it.
pub struct OpDef {
    /// The whole name, such as `onnx.MatMul`.
    pub name: &'static str,
    /// The fewest and most operands (`usize::MAX` for no limit). Trailing operands that are left out do not count.
    pub operands: (usize, usize),
    /// The fewest and most results.
    pub results: (usize, usize),
    /// Type, shape and small-value inference. Must not refuse what it merely cannot express.
    pub infer: fn(&InferCx) -> Inferred,
    /// Checks attributes and operand types beyond what inference checks.
    pub verify: fn(&InferCx) -> Result<(), OpError>,
    /// The reference evaluation.
    pub eval: fn(&EvalCx) -> Evaluated,
}

impl OpDef {
    /// An op that infers nothing and cannot be evaluated, to be filled in.
    pub const NEW: OpDef = OpDef {
        name: "",
        operands: (1, 1),
        results: (1, 1),
        infer: |_| Ok(Vec::new()),
        verify: |_| Ok(()),
        eval: |cx| Err(OpError::Unsupported(format!("{} has no evaluation", cx.name))),
    };
}

/// Every op of this crate.
pub(crate) fn all() -> impl Iterator<Item = &'static OpDef> {
    let families =
        [crate::onnx::FAMILIES, crate::ms::FAMILIES, crate::quant::FAMILIES, crate::kernel::FAMILIES];
    families.into_iter().flatten().copied().flatten()
}

/// The table of known ops. An op that is not in it passes through untouched.
#[derive(Clone, Default)]
pub struct Ops {
    table: HashMap<&'static str, &'static OpDef>,
    /// Whether an op of ONNX that is not in the table has the body that its specification gives.
    bodies: bool,
}

impl Ops {
    /// Every op of this crate.
    pub fn standard() -> Ops {
        Ops { table: all().map(|def| (def.name, def)).collect(), bodies: true }
    }

    /// Adds ops; a name that is there already is replaced.
    pub fn add(&mut self, family: &'static [OpDef]) {
        self.table.extend(family.iter().map(|def| (def.name, def)));
    }

    /// The op `name`, such as `onnx.MatMul`.
    pub fn get(&self, name: &OpName) -> Option<&'static OpDef> {
        self.table.get(name.as_str()).copied()
    }

    /// The body that the specification gives the op `name` at `version` of its dialect.
    pub fn body(&self, name: &OpName, version: i64) -> Option<&'static Function> {
        self.bodies.then(|| functions::body(name, version)).flatten()
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.table.keys().copied().collect();
        names.sort_unstable();
        names
    }
}
