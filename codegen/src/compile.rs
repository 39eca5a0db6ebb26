//! What is asked of the compiler: MLIR text for a target, and the form in which the result is wanted.

use crate::Target;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The form of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// LLVM IR before optimization, as text.
    Llvm,
    /// Assembly, as text.
    Asm,
    /// A relocatable object.
    Object,
}

/// One compilation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// The module, as MLIR text.
    pub mlir: String,
    /// What it is compiled for.
    pub target: Target,
    /// What comes out.
    pub form: Form,
}

/// Why a module was not compiled. The text that is emitted here is always meant to compile: every one of these is a
/// defect of qcc or of its installation.
#[derive(Debug, Error)]
pub enum CompileError {
    /// The build has no compiler, or it could not be started.
    #[error("{0}")]
    Missing(String),
    /// MLIR or LLVM refused the module.
    #[error("{stage}: {message}")]
    Refused {
        /// Where.
        stage: String,
        /// What was said.
        message: String,
    },
    /// The compiler died.
    #[error("the compiler ended with {status}: {message}")]
    Died {
        /// How.
        status: String,
        /// What it said before.
        message: String,
    },
}

/// Turns MLIR text into machine code.
pub trait Compiler: Send + Sync {
    /// The result of one request.
    fn compile(&self, request: &Request) -> Result<Vec<u8>, CompileError>;
}
