//! The built program, run from outside on the small models of `testdata`.

use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// The language model that comes with the project.
pub const MODEL: &str = "tinylm.onnx";

/// What a run gave.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the program in the folder of the test models.
pub fn qcc(args: &[&str]) -> Ran {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models");
    let out = Command::new(env!("CARGO_BIN_EXE_qcc")).args(args).current_dir(models).output().unwrap();
    Ran {
        code: out.status.code().unwrap(),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// Runs the program, which must succeed, and gives its stdout.
pub fn ok(args: &[&str]) -> String {
    let ran = qcc(args);
    assert_eq!(ran.code, 0, "qcc {}\n{}", args.join(" "), ran.stderr);
    ran.stdout
}

/// A folder for outputs, and a path in it.
pub struct Folder(pub TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_string()
    }
}
