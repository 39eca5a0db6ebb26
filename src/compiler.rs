//! The compiler, in a process of its own: an error that LLVM calls fatal ends that process, and not this one.

use codegen::{CompileError, Compiler, Request};
use std::env;
use std::ffi::OsStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The argument that makes the program a compiler and nothing else: `main` looks for it before anything is parsed.
pub const WORKER: &str = "__compile";

/// The environment variable that names the program to start, where it is not this one.
const PROGRAM: &str = "QCC_COMPILER";

/// Starts a process for each request.
pub struct Worker;

fn program() -> Result<PathBuf, CompileError> {
    let own =
        || env::current_exe().map_err(|e| CompileError::Missing(format!("cannot find the compiler: {e}")));
    env::var_os(PROGRAM).map_or_else(own, |path| Ok(path.into()))
}

impl Compiler for Worker {
    fn compile(&self, request: &Request) -> Result<Vec<u8>, CompileError> {
        let path = program()?;
        let missing = |e: &dyn std::fmt::Display| {
            CompileError::Missing(format!("cannot start the compiler {}: {e}", path.display()))
        };
        let child = Command::new(&path)
            .arg(OsStr::new(WORKER))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = child.map_err(|e| missing(&e))?;
        let request = serde_json::to_vec(request).expect("a request is plain data");
        let mut stdin = child.stdin.take().expect("asked for above");
        // One that dies before it has read all says why below.
        let _ = stdin.write_all(&request);
        drop(stdin);
        let done = child.wait_with_output().map_err(|e| missing(&e))?;
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        match done.status.code() {
            Some(0) => Ok(done.stdout),
            Some(1) if !said.is_empty() => Err(CompileError::Missing(said)),
            _ => Err(CompileError::Died { status: done.status.to_string(), message: said }),
        }
    }
}
