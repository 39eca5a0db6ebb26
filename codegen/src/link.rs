//! From an object to a shared library, by the system's linker.

use crate::CompileError;
use crate::target::{Arch, Target};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Links `objects` into the shared library `out`. It depends on nothing but what every C program has loaded (`memcpy`,
/// `memset`).
pub fn shared_library(objects: &[PathBuf], out: &Path, target: &Target) -> Result<(), CompileError> {
    let (lld, cross): (&[&str], _) = match target.machine().arch {
        Arch::X86_64 => (&["-m", "elf_x86_64"], "x86_64-linux-gnu-ld"),
        Arch::Aarch64 => (&["-m", "aarch64linux"], "aarch64-linux-gnu-ld"),
    };
    let native = target.missing_here().is_some();
    // The system's own linkers know its own architecture only.
    let linkers: &[(&str, &[&str])] = match native {
        true => &[("cc", &["-nostdlib"]), ("ld", &[]), ("ld.lld-22", lld), ("ld.lld", lld)],
        false => &[("ld.lld-22", lld), ("ld.lld", lld), (cross, &[])],
    };
    for (linker, flags) in linkers {
        let run = Command::new(linker).args(*flags).arg("-shared").arg("-o").arg(out).args(objects).output();
        match run {
            Ok(run) if run.status.success() => return Ok(()),
            Ok(run) => {
                let message = String::from_utf8_lossy(&run.stderr).into_owned();
                return Err(CompileError::Refused { stage: (*linker).into(), message });
            }
            Err(_) => continue,
        }
    }
    let names: Vec<&str> = linkers.iter().map(|l| l.0).collect();
    Err(CompileError::Missing(format!("no linker: none of {} can be started", names.join(", "))))
}
