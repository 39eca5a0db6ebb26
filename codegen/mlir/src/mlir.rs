//! MLIR text, parsed, verified and lowered to the LLVM dialect.

use crate::llvm;
use codegen::{CompileError, Request};
use melior::Context;
use melior::diagnostic::Diagnostic;
use melior::dialect::DialectRegistry;
use melior::ir::Module;
use melior::ir::operation::OperationLike;
use melior::pass::PassManager;
use melior::utility;
use std::sync::{Arc, Mutex};

/// From the dialects that kernels are emitted in to the LLVM dialect. Kernels address memory by pointers, so there is no
/// lowering of memrefs in it.
const PIPELINE: &str = "builtin.module(canonicalize,cse,convert-scf-to-cf,\
    convert-vector-to-llvm{reassociate-fp-reductions=0},convert-arith-to-llvm,convert-math-to-llvm,\
    convert-cf-to-llvm,reconcile-unrealized-casts,canonicalize,cse)";

/// The result of one request.
pub fn compile(request: &Request) -> Result<Vec<u8>, CompileError> {
    let registry = DialectRegistry::new();
    utility::register_all_dialects(&registry);
    utility::register_all_passes();
    let context = Context::new_with_registry(&registry, false);
    context.load_all_available_dialects();
    utility::register_all_llvm_translations(&context);

    let said = Arc::new(Mutex::new(Vec::new()));
    let listener = said.clone();
    context.attach_diagnostic_handler(move |d: Diagnostic| {
        listener.lock().expect("no other thread").push(format!("{}: {d}", d.location()));
        true
    });
    let refused = |stage: &str| CompileError::Refused {
        stage: stage.to_owned(),
        message: said.lock().expect("no other thread").join("\n"),
    };

    let mut module = Module::parse(&context, &request.mlir).ok_or_else(|| refused("MLIR's parser"))?;
    if !module.as_operation().verify() {
        return Err(refused("MLIR's verifier"));
    }
    let manager = PassManager::new(&context);
    utility::parse_pass_pipeline(manager.as_operation_pass_manager(), PIPELINE)
        .map_err(|e| CompileError::Refused { stage: "MLIR's pipeline".into(), message: e.to_string() })?;
    manager.run(&mut module).map_err(|_| refused("lowering to LLVM"))?;
    llvm::emit(&module, &request.target, request.form)
}
