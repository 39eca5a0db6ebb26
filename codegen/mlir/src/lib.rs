//! The compiler behind qcc's code generation: MLIR text in, object code out. The only crate that names MLIR and LLVM.
//!
//! An error that LLVM calls fatal ends the process, so this runs in a process of its own: [`worker`] is that process'
//! `main`, started by qcc from its own executable, with one request on standard input and the result on standard
//! output.

#[cfg(feature = "mlir")]
mod llvm;
#[cfg(feature = "mlir")]
mod mlir;

use codegen::{CompileError, Request};
use std::io::{Read, Write};
use std::process::ExitCode;

/// Whether this build has MLIR.
pub const AVAILABLE: bool = cfg!(feature = "mlir");

/// Compiles one request in this process.
#[cfg(feature = "mlir")]
pub fn compile(request: &Request) -> Result<Vec<u8>, CompileError> {
    mlir::compile(request)
}

/// Compiles nothing: the build has no MLIR.
#[cfg(not(feature = "mlir"))]
pub fn compile(_: &Request) -> Result<Vec<u8>, CompileError> {
    Err(CompileError::Missing("this build of qcc has no MLIR: build it with --features mlir".into()))
}

/// Reads a request (JSON) from standard input, and writes the result to standard output or the error to standard error.
pub fn worker() -> ExitCode {
    let run = || -> Result<(), String> {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(|e| e.to_string())?;
        let request: Request = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        let bytes = compile(&request).map_err(|e| e.to_string())?;
        std::io::stdout().write_all(&bytes).map_err(|e| e.to_string())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // The only way to tell the process that waits; it prints the message.
            let _ = std::io::stderr().write_all(message.as_bytes());
            ExitCode::FAILURE
        }
    }
}
