//! `.qir` files: the IR as text, and its large tensors in a `.safetensors` file beside it.
//!
//! The text names a large tensor by the hash of its bytes; the header of the weights file maps these hashes to its
//! tensors. So a text without its weights still parses, prints and verifies, and a wrong weights file is noticed.

use crate::error::Error;
use crate::files::{self, OutputFile};
use crate::model::Loaded;
use crate::onnx::MAX_OPSET;
use crate::onnx::error::Warning;
use bytes::Bytes;
use dialects::ir::literal::to_hex;
use dialects::ir::print::{Style, print};
use dialects::ir::{ConstData, ConstId, Elem, Encoding, Module, TensorSource, bind, parse};
use safetensors::SafeTensors;
use serde_json::{Map, Value as Json, json};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The prefix of the entries that map hashes to tensors.
const HASH: &str = "blake3:";

/// The header's entry that is no tensor.
const METADATA: &str = "__metadata__";

/// Tensors start at multiples of this many bytes, as the format recommends.
const ALIGN: usize = 8;

/// The module for a reader, without its large tensors.
pub fn text(m: &Module) -> String {
    print(m, Style::COMPACT)
}

/// The weights file of a `.qir`.
pub fn weights_path(path: &Path) -> PathBuf {
    path.with_extension("safetensors")
}

/// Reads a module and binds its weights, if they are there.
pub fn read(path: &Path) -> Result<Loaded, Error> {
    let bad = |why: String| Error::Model(format!("{}: {why}", path.display()));
    let bytes = files::map(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|e| bad(format!("not a text: {e}")))?;
    let mut m = match parse::parse(text) {
        Ok(parsed) => parsed.module,
        Err(problem) => {
            let text = miette::NamedSource::new(path.display().to_string(), text.to_string());
            return Err(Error::Qir { path: path.to_owned(), problem, text: Box::new(text) });
        }
    };
    let weights = weights_path(path);
    let mut loaded = vec![path.to_owned()];
    let mut found = HashMap::new();
    if weights.exists() {
        found = index(&weights)?;
        loaded.push(weights.clone());
    }
    let missing = bind::bind(&mut m, |hash| found.get(&to_hex(hash)).cloned());
    let missing = missing.map_err(|e| Error::Model(format!("{}: {e}", weights.display())))?;
    let mut warnings = Vec::new();
    let opset = m.opset("onnx");
    if opset > MAX_OPSET {
        warnings.push(Warning::NewerOpset(opset).to_string());
    }
    if !missing.is_empty() {
        warnings.push(format!(
            "{}: {} tensors are not in {}; the model can be looked at, but not run or quantized",
            path.display(),
            missing.len(),
            weights.display()
        ));
    }
    Ok(Loaded { module: m, warnings, files: loaded })
}

/// The tensors of a weights file by the hash of their bytes, in hex.
fn index(path: &Path) -> Result<HashMap<String, Arc<dyn TensorSource>>, Error> {
    let bad = |why: String| Error::Model(format!("{}: {why}", path.display()));
    let bytes = files::map(path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let mut out: HashMap<String, Arc<dyn TensorSource>> = HashMap::new();
    for (key, name) in header.metadata().iter().flatten() {
        if let Some(hash) = key.strip_prefix(HASH) {
            let view = tensors.tensor(name).map_err(|e| bad(format!("tensor {name:?}: {e}")))?;
            out.insert(hash.to_string(), Arc::new(bytes.slice_ref(view.data())));
        }
    }
    Ok(out)
}

/// Writes a module to `path`, and its large tensors beside it. Returns the bytes written.
pub fn write(m: &Module, path: &Path, inputs: &[PathBuf]) -> Result<u64, Error> {
    let weights = weights_path(path);
    files::refuse_overwrite(path, inputs)?;
    files::refuse_overwrite(&weights, inputs)?;
    let text = print(m, Style::FULL);
    let stored = stored(m)?;
    let mut bytes = text.len() as u64;
    let mut out = OutputFile::create(path)?;
    out.write_all(text.as_bytes()).map_err(|e| out.error(e))?;
    // The weights first: a text is never in place without them.
    if !stored.is_empty() {
        bytes += write_weights(&stored, &weights)?;
    }
    out.commit()?;
    Ok(bytes)
}

/// Writes text to `path`, whole or not at all.
pub fn write_text(path: &Path, text: &str) -> Result<(), Error> {
    let mut out = OutputFile::create(path)?;
    out.write_all(text.as_bytes()).map_err(|e| out.error(e))?;
    Ok(out.commit()?)
}

/// A tensor for the weights file.
struct Stored<'m> {
    name: String,
    hash: String,
    data: &'m ConstData,
}

/// Every tensor that the text shows by its hash, each content once, in program order.
fn stored(m: &Module) -> Result<Vec<Stored<'_>>, Error> {
    let mut names: HashSet<String> = HashSet::from([METADATA.to_string()]);
    let mut hashes: HashSet<String> = HashSet::new();
    let mut out = Vec::new();
    let mut add = |name: String, id: ConstId| -> Result<(), Error> {
        let data = &m.consts[id];
        if Style::FULL.shows(data) || !data.source.is_bound() {
            return Ok(());
        }
        let hash = data.hash().map_err(|e| Error::Model(format!("tensor {name:?}: {e}")))?;
        let hash = to_hex(&hash);
        if hashes.insert(hash.clone()) {
            let fresh = (0..).map(|i| if i == 0 { name.clone() } else { format!("{name}~{i}") });
            let name = fresh.into_iter().find(|n| !names.contains(n)).expect("numbers do not run out");
            names.insert(name.clone());
            out.push(Stored { name, hash, data });
        }
        Ok(())
    };
    for region in m.live_regions() {
        for &v in &m.regions[region].consts {
            if let Some(id) = m.const_of(v) {
                add(m.value_label(v), id)?;
            }
        }
        for &op in &m.regions[region].ops {
            for id in m.ops[op].attrs.consts() {
                add(m.ops[op].loc.to_string(), id)?;
            }
        }
    }
    for f in &m.functions {
        for id in f.defaults.consts() {
            add(f.name.to_string(), id)?;
        }
    }
    Ok(out)
}

/// The header and the tensors, streamed; nothing is held in memory but what a source itself reads.
fn write_weights(stored: &[Stored], path: &Path) -> Result<u64, Error> {
    let mut header = Map::new();
    let hashes: Map<String, Json> =
        stored.iter().map(|s| (format!("{HASH}{}", s.hash), s.name.as_str().into())).collect();
    header.insert(METADATA.into(), Json::Object(hashes));
    let mut at = 0;
    for s in stored {
        let (dtype, shape) = form(s.data);
        let end = at + s.data.byte_len();
        header.insert(s.name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut text = Json::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(ALIGN) - text.len()));
    let mut out = OutputFile::create(path)?;
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(|e| out.error(e));
    write(&(text.len() as u64).to_le_bytes())?;
    write(text.as_bytes())?;
    for s in stored {
        let bytes: Bytes = s.data.read().map_err(|e| Error::Model(format!("tensor {:?}: {e}", s.name)))?;
        write(&bytes)?;
    }
    out.commit()?;
    Ok(8 + text.len() as u64 + at)
}

/// How the format names a tensor's type. What it has no name for (packed types, strings) is stored as bytes.
fn form(c: &ConstData) -> (&'static str, Vec<u64>) {
    let dtype = match c.elem {
        _ if c.encoding == Encoding::Sparse => None,
        Elem::F64 => Some("F64"),
        Elem::F32 => Some("F32"),
        Elem::F16 => Some("F16"),
        Elem::BF16 => Some("BF16"),
        Elem::I64 => Some("I64"),
        Elem::I32 => Some("I32"),
        Elem::I16 => Some("I16"),
        Elem::I8 => Some("I8"),
        Elem::U64 => Some("U64"),
        Elem::U32 => Some("U32"),
        Elem::U16 => Some("U16"),
        Elem::U8 => Some("U8"),
        Elem::Bool => Some("BOOL"),
        Elem::F8E4M3FN => Some("F8_E4M3"),
        Elem::F8E5M2 => Some("F8_E5M2"),
        _ => None,
    };
    match dtype {
        Some(dtype) => (dtype, c.dims.clone()),
        None => ("U8", vec![c.byte_len()]),
    }
}
