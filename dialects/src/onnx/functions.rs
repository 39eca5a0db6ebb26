//! The bodies that the specifications of ops give, as one module of functions: an op without an entry in the table
//! is evaluated and inferred through its body. `scripts/onnx_specs.py` writes them.

use crate::ir::{Function, Module, OpName, parse};
use crate::ops::Ops;
use std::collections::HashMap;
use std::sync::OnceLock;

struct Library {
    module: Module,
    /// For each op, since which version each function is its body, newest first.
    bodies: HashMap<String, Vec<(i64, usize)>>,
    ops: Ops,
}

fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let module =
            parse::parse(include_str!("functions.qir")).expect("the bodies parse: a test reads them").module;
        let mut bodies: HashMap<String, Vec<(i64, usize)>> = HashMap::new();
        for (i, f) in module.functions.iter().enumerate() {
            let since = f.overload.parse().expect("an overload in this module is a version");
            bodies.entry(f.name.to_string()).or_default().push((since, i));
        }
        bodies.values_mut().for_each(|b| b.sort_unstable_by(|a, b| b.cmp(a)));
        Library { module, bodies, ops: Ops::standard() }
    })
}

/// The module whose functions the bodies are.
pub fn module() -> &'static Module {
    &library().module
}

/// The ops that the bodies are made of.
pub fn ops() -> &'static Ops {
    &library().ops
}

/// The body of the op `name` at `version` of its dialect.
pub fn body(name: &OpName, version: i64) -> Option<&'static Function> {
    let library = library();
    let bodies = library.bodies.get(name.as_str())?;
    let (_, i) = bodies.iter().find(|(since, _)| *since <= version)?;
    Some(&library.module.functions[*i])
}
