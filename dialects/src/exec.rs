//! Executors: run a module and stream chosen values to a sink. The interpreter is the first, and the semantics.

use crate::ir::{Module, OpName, Symbol, Type, Value};
use crate::ops::{Item, OpError};
use thiserror::Error;

/// Why a module cannot be run.
#[derive(Clone, Debug, Error)]
pub enum ExecError {
    /// An op failed.
    #[error("{op} at node {node:?}: {source}")]
    Op {
        /// The op.
        op: OpName,
        /// The source node.
        node: Symbol,
        /// Why.
        source: OpError,
    },
    /// An op that this executor does not know.
    #[error("unsupported op {op} at node {node:?}")]
    UnknownOp {
        /// The op.
        op: OpName,
        /// The source node.
        node: Symbol,
    },
    /// An input of the model that was not given.
    #[error("no value for the input {name:?} of type {ty}")]
    MissingInput {
        /// The input.
        name: Symbol,
        /// Its type.
        ty: Type,
    },
    /// An input of the wrong type.
    #[error("the input {name:?} has type {ty}, but the value given is {found}")]
    WrongInput {
        /// The input.
        name: Symbol,
        /// Its type.
        ty: Type,
        /// What was given.
        found: Type,
    },
    /// A constant that could not be read.
    #[error("the constant {name:?}: {source}")]
    Const {
        /// The constant.
        name: String,
        /// Why.
        source: crate::tensor::TensorError,
    },
    /// The sink refused a value, or asked to stop.
    #[error("{0}")]
    Sink(String),
}

/// Receives each wanted value as soon as it is computed.
pub type Sink<'a> = dyn FnMut(Value, &Item) -> Result<(), ExecError> + 'a;

/// A way to run modules.
pub trait Executor: Send + Sync {
    /// Prepares `m` for runs that compute the values `wanted`, each a value of the top region, and nothing else.
    fn prepare<'m>(&'m self, m: &'m Module, wanted: &[Value]) -> Result<Box<dyn Prepared + 'm>, ExecError> {
        self.prepare_from(m, &[], wanted)
    }

    /// The same, for runs to which the values `given` of the top region are given beside the inputs: what only leads
    /// to those is not computed.
    fn prepare_from<'m>(
        &'m self,
        m: &'m Module,
        given: &[Value],
        wanted: &[Value],
    ) -> Result<Box<dyn Prepared + 'm>, ExecError>;
}

/// A module made ready to run.
pub trait Prepared: Send + Sync {
    /// Runs once. `inputs` gives values to inputs of the top region and to values that were to be given; every one that
    /// the wanted values need must be there. Each wanted value reaches the sink once, in program order.
    fn run(&self, inputs: &[(Value, Item)], sink: &mut Sink) -> Result<(), ExecError>;
}

/// Runs once and returns the wanted values in the order asked for.
pub fn run_once(
    exec: &dyn Executor,
    m: &Module,
    inputs: &[(Value, Item)],
    wanted: &[Value],
) -> Result<Vec<Item>, ExecError> {
    let mut got: Vec<Option<Item>> = vec![None; wanted.len()];
    exec.prepare(m, wanted)?.run(inputs, &mut |v, item| {
        for (slot, _) in got.iter_mut().zip(wanted).filter(|(_, w)| **w == v) {
            *slot = Some(item.clone());
        }
        Ok(())
    })?;
    Ok(got.into_iter().map(|g| g.expect("a prepared run gives every wanted value")).collect())
}
