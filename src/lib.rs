//! The driver of qcc: the only place that touches files, terminals, clocks and users.
//!
//! A custom build is five lines: a pass of your own joins the registry and the whole command line comes with it.
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     qcc::cli::main(qcc::registry())
//! }
//! ```
//!
//! with `qcc::registry().with::<MyPass>()` for a pass `MyPass`.

pub mod calibrate;
pub mod check;
pub mod cli;
pub mod compiler;
pub mod data;
pub mod driver;
pub mod env;
pub mod error;
pub mod eval;
pub mod files;
pub mod filetest;
pub mod generate;
pub mod model;
pub mod onnx;
pub mod pipeline;
pub mod qir;
pub mod report;
pub mod resume;
pub mod rules;
pub mod stream;
pub mod term;

pub use error::Error;

use dialects::ops::{OpDef, Ops};
use passes::{PASSES, Pass, PassDef};
use serde::{Serialize, de::DeserializeOwned};

/// What a build of qcc knows: its passes and its ops.
#[derive(Clone)]
pub struct Registry {
    passes: Vec<PassDef>,
    ops: Ops,
}

/// Every pass and op of the project.
pub fn registry() -> Registry {
    Registry { passes: PASSES.iter().map(|def| def()).collect(), ops: Ops::standard() }
}

impl Registry {
    /// Adds a pass; one of the same name is replaced.
    pub fn with<P: Pass + Default + Serialize + DeserializeOwned + 'static>(mut self) -> Registry {
        let def = PassDef::of::<P>(P::default().name());
        self.passes.retain(|d| d.name != def.name);
        self.passes.push(def);
        self
    }

    /// Adds ops; those of the same names are replaced.
    pub fn with_op(mut self, family: &'static [OpDef]) -> Registry {
        self.ops.add(family);
        self
    }

    /// The passes, in the order in which they were added.
    pub fn passes(&self) -> &[PassDef] {
        &self.passes
    }

    /// The pass `name`.
    pub fn pass(&self, name: &str) -> Option<&PassDef> {
        self.passes.iter().find(|d| d.name == name)
    }

    /// The ops.
    pub fn ops(&self) -> &Ops {
        &self.ops
    }
}
