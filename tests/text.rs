//! The text form on real models: print -> parse -> print is the identity, the full style exports to the same file
//! once its weights are bound, and the verifier finds nothing wrong.

use dialects::ir::print::{Style, print};
use dialects::ir::verify::verify;
use dialects::ir::{Module, bind, parse};
use dialects::ops::Ops;
use dialects::random::odd_module;
use qcc::onnx::{export, import};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The models in `QCC_MODELS`, or none, said.
fn models() -> Vec<PathBuf> {
    let Ok(root) = std::env::var("QCC_MODELS") else {
        eprintln!("QCC_MODELS is not set: skipped");
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(&root)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => folders.push(path),
                Some(e) if e == "onnx" => found.push(path),
                _ => {}
            }
        }
    }
    assert!(found.len() >= 11, "{root} holds only {} models", found.len());
    found.sort();
    found
}

fn read(path: &Path) -> Module {
    import::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).module
}

fn reparse(text: &str, path: &Path) -> Module {
    match parse::parse(text) {
        Ok(parsed) => parsed.module,
        Err(e) => panic!("{}: {e} at {:?}", path.display(), &text[e.span()]),
    }
}

#[test]
fn real_models_read_back() {
    for path in models() {
        let m = read(&path);
        for style in [Style::COMPACT, Style::FULL] {
            let text = print(&m, style);
            assert_eq!(print(&reparse(&text, &path), style), text, "{}", path.display());
            let metadata = text.contains("pkg.torch");
            assert!(style.full || !metadata, "{}: the compact style shows metadata", path.display());
        }
    }
}

#[test]
fn real_models_export_from_text_as_they_were() {
    for path in models() {
        let m = read(&path);
        let mut back = reparse(&print(&m, Style::FULL), &path);
        let sources: HashMap<_, _> =
            m.consts.values().map(|c| (c.hash().unwrap(), c.source.clone())).collect();
        let missing = bind::bind(&mut back, |h| sources.get(h).cloned()).unwrap();
        assert!(missing.is_empty(), "{}", path.display());
        let (a, b) = (export::to_bytes(&m).unwrap(), export::to_bytes(&back).unwrap());
        assert!(a == b, "{}: the text loses something that the file has", path.display());
    }
}

#[test]
fn real_models_verify() {
    let ops = Ops::standard();
    for path in models() {
        let m = read(&path);
        let found: Vec<String> = verify(&m, &ops).iter().map(ToString::to_string).collect();
        assert_eq!(found, [""; 0], "{}", path.display());
    }
}

#[test]
fn weights_stand_beside_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.qir");
    let mut beside = 0;
    for seed in 0..200 {
        let m = odd_module(seed);
        qcc::qir::write(&m, &path, &[]).unwrap();
        let read = qcc::qir::read(&path).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(read.warnings.is_empty(), "seed {seed}: {:?}", read.warnings);
        assert_eq!(print(&read.module, Style::FULL), print(&m, Style::FULL), "seed {seed}");
        for c in read.module.consts.values() {
            // Reading checks the hash.
            c.read().unwrap();
        }
        let weights = qcc::qir::weights_path(&path);
        if weights.exists() {
            beside += 1;
            std::fs::remove_file(weights).unwrap();
        }
    }
    assert!(beside > 30, "only {beside} modules have large tensors: the test has lost its point");
}
