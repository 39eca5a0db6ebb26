//! A plan as files: a shared library, its weights, a C header.

use crate::driver::{self, ID};
use crate::plan::{self, Plan, Port};
use crate::size::{Atom, Size};
use crate::target::Arch;
use crate::{CompileError, Compiler, Form, Request, Target, build, link};
use dialects::ir::Elem;
use object::write::{Object, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SymbolFlags, SymbolKind, SymbolScope};
use runtime::About;
use std::path::{Path, PathBuf};

/// Bytes in front of the weights, which begin with their hash.
const HEAD: usize = plan::ALIGN as usize;

/// What is written.
pub struct Artifact {
    /// The shared library.
    pub library: PathBuf,
    /// The weights beside it; `None` where they are in the library.
    pub weights: Option<Vec<u8>>,
    /// The C header.
    pub header: String,
    /// The description.
    pub about: About,
    /// Bytes of the objects of each version, in the order of the plan.
    pub code: Vec<u64>,
}

/// Weights in one piece, each blob at its place, behind their hash.
fn weights(plan: &Plan) -> (Vec<u8>, [u8; ID]) {
    let mut bytes = vec![0u8; plan.weights as usize];
    for (at, blob) in &plan.blobs {
        bytes[*at as usize..][..blob.bytes.len()].copy_from_slice(&blob.bytes);
    }
    let id: [u8; ID] = blake3::hash(&bytes[HEAD..]).into();
    bytes[..ID].copy_from_slice(&id);
    (bytes, id)
}

fn elem(elem: Elem) -> runtime::Elem {
    match elem {
        Elem::I64 => runtime::Elem::I64,
        Elem::I32 => runtime::Elem::I32,
        Elem::Bool => runtime::Elem::Bool,
        Elem::U8 => runtime::Elem::U8,
        Elem::I8 => runtime::Elem::I8,
        _ => runtime::Elem::F32,
    }
}

fn port(p: &Port) -> runtime::Port {
    let name = |a: &Atom| match a {
        Atom::Dim(name) => name.clone(),
        _ => unreachable!("the dims of a type are sums of products of names"),
    };
    let dim = |s: &Size| match (s.known(), s.name()) {
        (Some(n), _) => runtime::Dim::Known(n),
        (_, Some(name)) => runtime::Dim::Named(name.to_owned()),
        _ => runtime::Dim::Sum(s.terms().iter().map(|(a, n)| (*n, a.iter().map(name).collect())).collect()),
    };
    runtime::Port { name: p.name.clone(), elem: elem(p.elem), shape: p.shape.iter().map(dim).collect() }
}

/// The description of a plan.
fn about(plan: &Plan, arch: Arch, id: &[u8; ID], weights_file: Option<String>) -> About {
    let version = |v: &plan::Version| runtime::Version {
        target: v.target.name.clone(),
        features: v.target.machine().features.clone(),
    };
    About {
        version: runtime::VERSION,
        arch,
        versions: plan.versions.iter().map(version).collect(),
        dims: plan.dims.clone(),
        inputs: plan.inputs.iter().map(port).collect(),
        outputs: plan.outputs.iter().map(port).collect(),
        arena: plan.arena,
        weights: plan.weights,
        weights_file,
        id: blake3::Hash::from_bytes(*id).to_hex().to_string(),
    }
}

/// Compiles a plan into `scratch`, which holds nothing that must stay; `weights_file` names the file of weights that will
/// lie beside the library, or `None` to put them inside.
pub fn build(
    plan: &Plan,
    compiler: &dyn Compiler,
    scratch: &Path,
    weights_file: Option<String>,
) -> Result<Artifact, CompileError> {
    // What is not a kernel runs on any processor.
    let target = &plan.versions.first().expect("a plan has a version").target.baseline();
    let (bytes, id) = weights(plan);
    let about = about(plan, target.arch, &id, weights_file.clone());
    let text = serde_json::to_string(&about).expect("plain data");
    let failed = |path: &Path, e: std::io::Error| {
        CompileError::Missing(format!("cannot write {}: {e}", path.display()))
    };
    let (mut objects, mut code) = (Vec::new(), Vec::new());
    for version in &plan.versions {
        let folder = scratch.join(version.target.symbol());
        std::fs::create_dir_all(&folder).map_err(|e| failed(&folder, e))?;
        let kernels: Vec<_> = version.kernels.iter().collect();
        let own = build::objects(&kernels, &version.target, compiler, &folder)?;
        let size = |p: &PathBuf| std::fs::metadata(p).map(|m| m.len()).map_err(|e| failed(p, e));
        code.push(own.iter().map(size).sum::<Result<u64, _>>()?);
        objects.extend(own);
    }
    let mlir = driver::module(plan, target, &id, &text);
    let driver = compiler.compile(&Request { mlir, target: target.clone(), form: Form::Object })?;
    let path = scratch.join("driver.o");
    std::fs::write(&path, driver).map_err(|e| failed(&path, e))?;
    objects.push(path);
    if weights_file.is_none() {
        let path = scratch.join("weights.o");
        std::fs::write(&path, data_object(&bytes, target)?).map_err(|e| failed(&path, e))?;
        objects.push(path);
    }
    let library = scratch.join("model.so");
    link::shared_library(&objects, &library, target)?;
    let header = crate::header::header(&about);
    Ok(Artifact { library, weights: weights_file.map(|_| bytes), header, about, code })
}

/// An object that holds `bytes` as the symbol `qcc_weights`.
fn data_object(bytes: &[u8], target: &Target) -> Result<Vec<u8>, CompileError> {
    let arch = match target.arch {
        Arch::X86_64 => Architecture::X86_64,
        Arch::Aarch64 => Architecture::Aarch64,
    };
    let mut object = Object::new(BinaryFormat::Elf, arch, Endianness::Little);
    let section = object.section_id(object::write::StandardSection::ReadOnlyData);
    let symbol = object.add_symbol(Symbol {
        name: b"qcc_weights".to_vec(),
        value: 0,
        size: bytes.len() as u64,
        kind: SymbolKind::Data,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    object.add_symbol_data(symbol, section, bytes, HEAD as u64);
    object
        .write()
        .map_err(|e| CompileError::Refused { stage: "the object of weights".into(), message: e.to_string() })
}
