//! An op of the default domain that an op of this dialect is made of.

use crate::ir::{Attr, Attrs, OpName};
use crate::ops::{self, EvalCx, Evaluated, Fact, InferCx, Inferred, Item, OpDef, OpError};
use crate::tensor::Tensor;

/// The opset whose meaning the parts have.
const OPSET: i64 = 23;

/// An op with its attributes.
pub(super) struct Part {
    name: OpName,
    def: &'static OpDef,
    attrs: Attrs,
    opset: i64,
}

impl Part {
    /// The op `op` of the default domain.
    pub(super) fn new(op: &str) -> Part {
        let name = OpName::new("onnx", op);
        let def = ops::all().find(|def| def.name == name.as_str()).expect("parts are known ops");
        Part { name, def, attrs: Attrs::default(), opset: OPSET }
    }

    /// With an attribute.
    pub(super) fn with(mut self, name: &str, value: impl Into<Attr>) -> Part {
        self.attrs.set(name, value.into());
        self
    }

    /// With the attributes of the whole that have these names.
    pub(super) fn taking(mut self, from: &Attrs, names: &[&str]) -> Part {
        for name in names {
            if let Some(value) = from.get(name) {
                self.attrs.set(*name, value.clone());
            }
        }
        self
    }

    /// With another opset's meaning.
    pub(super) fn opset(self, opset: i64) -> Part {
        Part { opset, ..self }
    }

    /// The first result.
    pub(super) fn eval(&self, cx: &EvalCx, inputs: &[Option<&Tensor>]) -> Result<Tensor, OpError> {
        let first = self.eval_all(cx, inputs, 1)?.into_iter().next();
        Ok(first.ok_or_else(|| OpError::invalid(format!("{} gave nothing", self.name)))?.tensor()?.clone())
    }

    /// The first result of an op all of whose operands are given.
    pub(super) fn of(&self, cx: &EvalCx, inputs: &[&Tensor]) -> Result<Tensor, OpError> {
        let inputs: Vec<Option<&Tensor>> = inputs.iter().copied().map(Some).collect();
        self.eval(cx, &inputs)
    }

    /// All of so many results.
    pub(super) fn eval_all(&self, cx: &EvalCx, inputs: &[Option<&Tensor>], outputs: usize) -> Evaluated {
        let inputs: Vec<Option<Item>> = inputs.iter().map(|t| t.map(|t| t.clone().into())).collect();
        (self.def.eval)(&EvalCx {
            name: &self.name,
            attrs: &self.attrs,
            opset: self.opset,
            inputs: &inputs,
            outputs,
            ..*cx
        })
    }

    /// The facts of the results, from facts of the operands.
    pub(super) fn infer(&self, cx: &InferCx, inputs: &[Option<Fact>], outputs: usize) -> Inferred {
        (self.def.infer)(&InferCx {
            name: &self.name,
            attrs: &self.attrs,
            opset: self.opset,
            inputs,
            outputs,
            ..*cx
        })
    }
}

/// `x + y` of tensors that broadcast.
pub(super) fn add(cx: &EvalCx, x: &Tensor, y: &Tensor) -> Result<Tensor, OpError> {
    Part::new("Add").of(cx, &[x, y])
}

/// `x`, or `x + y` where there is a `y`.
pub(super) fn add_opt(cx: &EvalCx, x: Tensor, y: Option<&Tensor>) -> Result<Tensor, OpError> {
    y.map_or(Ok(x.clone()), |y| add(cx, &x, y))
}
