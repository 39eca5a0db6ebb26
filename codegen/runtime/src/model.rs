//! A whole compiled model: its library, its weights, its working memory.
//!
//! The library is trusted as any program is; what is checked is that it and its weights are whole, belong together, and are
//! for this processor. `unsafe` is what calling it takes: every size that it relies on is checked here or by itself.
#![allow(unsafe_code)]

use crate::about::{About, Dim, Elem, Port, VERSION, Version};
use crate::cpu;
use crate::fault::Fault;
use crate::kernels::Shared;
use crate::parallel::Team;
use crate::tensor::Tensor;
use libloading::Library;
use memmap2::Mmap;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use thiserror::Error;

/// Why a model cannot be loaded or run.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The system refused the library, or it is none of qcc's.
    #[error("{}: {source}", path.display())]
    Library {
        /// The library.
        path: PathBuf,
        /// Why.
        source: libloading::Error,
    },
    /// The library's description cannot be read.
    #[error("{}: the description of the model: {why}", path.display())]
    About {
        /// The library.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The library is for another processor.
    #[error("{}: built for {expected}, which this processor lacks", path.display())]
    Processor {
        /// The library.
        path: PathBuf,
        /// What it needs.
        expected: String,
    },
    /// The file of weights cannot be read, or is that of another build.
    #[error("{}: {why}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// An input that does not fit.
    #[error("the input {name:?} is {found}, expected {expected}")]
    Input {
        /// The input.
        name: String,
        /// What was expected.
        expected: String,
        /// What was given.
        found: String,
    },
    /// Another number of inputs.
    #[error("{found} inputs were given, expected {expected}")]
    Count {
        /// How many there are.
        expected: usize,
        /// How many were given.
        found: usize,
    },
    /// A dim beyond what the model was built for.
    #[error("the dim {dim:?} is {found}, but the model was built for at most {bound}")]
    Bound {
        /// The dim.
        dim: String,
        /// What was given.
        found: u64,
        /// The bound.
        bound: u64,
    },
    /// An output that has no size for these inputs.
    #[error("the output {name:?} has no size for inputs of these sizes")]
    Output {
        /// The output.
        name: String,
    },
    /// An input holds what the model cannot use; the outputs are worthless.
    #[error("the inputs: {0}")]
    Fault(Fault),
    /// The library refused its arguments: it is not what its description says.
    #[error("the library returned {0}")]
    Refused(i32),
}

type Kernel = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64);
type Parallel = unsafe extern "C" fn(*mut c_void, Kernel, *const *mut u8, *const i64, i64, i64);
type Run = unsafe extern "C" fn(
    *const i64,
    *const *const u8,
    *const *mut u8,
    *mut u8,
    *const u8,
    Parallel,
    *mut c_void,
) -> i32;

type Choose = unsafe extern "C" fn() -> i32;

enum Weights {
    Mapped(Mmap),
    /// In the library.
    Own(*const u8),
}
// SAFETY: read only.
unsafe impl Send for Weights {}
// SAFETY: read only.
unsafe impl Sync for Weights {}

/// A loaded model.
pub struct Model {
    about: About,
    chosen: usize,
    run: Run,
    weights: Weights,
    /// Words, so that it is aligned.
    arena: Mutex<Vec<u128>>,
    _library: Library,
}

fn about(library: &Library, path: &Path) -> Result<About, ModelError> {
    let failed = |source| ModelError::Library { path: path.to_owned(), source };
    // SAFETY: the symbol is a NUL-terminated string in the library.
    let text = unsafe {
        let symbol = library.get::<*const c_char>(b"qcc_model").map_err(failed)?;
        CStr::from_ptr(symbol.try_as_raw_ptr().expect("a symbol has an address").cast())
    };
    let wrong = |why: String| ModelError::About { path: path.to_owned(), why };
    let about: About = serde_json::from_slice(text.to_bytes()).map_err(|e| wrong(e.to_string()))?;
    match about.version == VERSION {
        true => Ok(about),
        false => Err(wrong(format!("version {}, expected {VERSION}", about.version))),
    }
}

impl Model {
    /// Loads the library `path` and the weights beside it.
    pub fn load(path: impl AsRef<Path>) -> Result<Model, ModelError> {
        let path = path.as_ref();
        let failed = |source| ModelError::Library { path: path.to_owned(), source };
        // A name without a folder would be searched for elsewhere.
        let full =
            if path.parent() == Some(Path::new("")) { Path::new(".").join(path) } else { path.to_owned() };
        // SAFETY: a library of qcc runs nothing when it is loaded.
        let library = unsafe { Library::new(&full) }.map_err(failed)?;
        let about = about(&library, path)?;
        let refused = |expected: String| ModelError::Processor { path: path.to_owned(), expected };
        let mut missing = Vec::new();
        for v in &about.versions {
            let lacks = cpu::missing(about.arch, &v.features);
            missing.push(lacks.ok_or_else(|| refused(format!("{:?}", about.arch)))?);
        }
        if missing.iter().all(|m| !m.is_empty()) {
            let list = |m: &Vec<_>| m.iter().map(|f| format!("{f:?}")).collect::<Vec<_>>().join(", ");
            return Err(refused(missing.iter().map(list).collect::<Vec<_>>().join(", or ")));
        }
        // SAFETY: the interface of this version.
        let chosen = unsafe { library.get::<Choose>(b"qcc_version").map_err(failed)?() };
        let chosen = usize::try_from(chosen).ok().filter(|&i| i < about.versions.len());
        let chosen = chosen.ok_or_else(|| refused("what the system does not allow".to_owned()))?;
        // SAFETY: the interface of this version.
        let run = unsafe { *library.get::<Run>(b"qcc_run").map_err(failed)? };
        let weights = match &about.weights_file {
            // SAFETY: the symbol is the first byte of the weights, whose length is the description's.
            None => unsafe {
                let symbol = library.get::<*const u8>(b"qcc_weights").map_err(failed)?;
                Weights::Own(symbol.try_as_raw_ptr().expect("a symbol has an address").cast())
            },
            Some(name) => map(&full.with_file_name(name), &about)?,
        };
        let arena = vec![0u128; (about.arena as usize).div_ceil(16) + 4];
        Ok(Model { about, chosen, run, weights, arena: Mutex::new(arena), _library: library })
    }

    /// What the model is.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The version of the code that runs here.
    pub fn version(&self) -> &Version {
        &self.about.versions[self.chosen]
    }

    /// Runs once. Inputs in the order of [`About::inputs`]; outputs likewise.
    pub fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError> {
        let sizes = self.sizes(inputs)?;
        let mut outputs: Vec<Tensor> = Vec::new();
        for p in &self.about.outputs {
            let size = |d: &Dim| d.eval(|name| sizes.get(name).copied());
            let none = || ModelError::Output { name: p.name.clone() };
            let shape: Vec<usize> = p.shape.iter().map(size).collect::<Option<_>>().ok_or_else(none)?;
            let bytes = shape.iter().try_fold(p.elem.bytes(), |a, &n| a.checked_mul(n)).ok_or_else(none)?;
            outputs.push(Tensor { elem: p.elem, shape, bytes: vec![0; bytes] });
        }
        let dims: Vec<i64> = self.about.dims.iter().map(|(n, _)| sizes[n.as_str()] as i64).collect();
        let from: Vec<*const u8> = inputs.iter().map(|t| t.bytes.as_ptr()).collect();
        let to: Vec<*mut u8> = outputs.iter_mut().map(|t| t.bytes.as_mut_ptr()).collect();
        let weights = match &self.weights {
            Weights::Mapped(map) => map.as_ptr(),
            Weights::Own(at) => *at,
        };
        let mut arena = self.arena.lock().expect("a run does not panic");
        let arena: *mut u8 = arena.as_mut_ptr().cast();
        let arena = arena.wrapping_add(arena.align_offset(64));
        let team = Team::new();
        // SAFETY: buffers have the sizes that the description gives for dims within their bounds, which are checked
        // above, the arena is this run's alone, and `parallel` is given the team that it expects.
        let code = unsafe {
            (self.run)(
                dims.as_ptr(),
                from.as_ptr(),
                to.as_ptr(),
                arena,
                weights,
                parallel,
                std::ptr::from_ref(&team).cast_mut().cast(),
            )
        };
        match Fault::of((-1i32).saturating_sub(code)) {
            _ if code == 0 => Ok(outputs),
            Some(fault) => Err(ModelError::Fault(fault)),
            None => Err(ModelError::Refused(code)),
        }
    }

    /// The named dims, as the inputs have them.
    fn sizes(&self, inputs: &[Tensor]) -> Result<HashMap<&str, u64>, ModelError> {
        if inputs.len() != self.about.inputs.len() {
            return Err(ModelError::Count { expected: self.about.inputs.len(), found: inputs.len() });
        }
        let mut sizes: HashMap<&str, u64> = HashMap::new();
        for (p, t) in self.about.inputs.iter().zip(inputs) {
            let fits = p.elem == t.elem
                && p.shape.len() == t.shape.len()
                && p.shape.iter().zip(&t.shape).all(|(d, &n)| match d {
                    Dim::Known(k) => *k == n as u64,
                    Dim::Named(name) => *sizes.entry(name).or_insert(n as u64) == n as u64,
                    // Looked at when all names are known.
                    Dim::Sum(_) => true,
                });
            let bytes = t.shape.iter().try_fold(t.elem.bytes(), |a, &n| a.checked_mul(n));
            if !fits || bytes != Some(t.bytes.len()) {
                return Err(wrong_input(p, t));
            }
        }
        for (p, t) in self.about.inputs.iter().zip(inputs) {
            let holds = |(d, &n): (&Dim, &usize)| d.eval(|name| sizes.get(name).copied()) == Some(n);
            if !p.shape.iter().zip(&t.shape).all(holds) {
                return Err(wrong_input(p, t));
            }
        }
        for (name, bound) in &self.about.dims {
            let found = sizes.get(name.as_str()).copied().unwrap_or(0);
            if found > *bound {
                return Err(ModelError::Bound { dim: name.clone(), found, bound: *bound });
            }
            sizes.entry(name).or_insert(0);
        }
        Ok(sizes)
    }
}

fn wrong_input(p: &Port, t: &Tensor) -> ModelError {
    let text = |elem: Elem, dims: Vec<String>| format!("{elem:?}[{}]", dims.join(", ")).to_lowercase();
    let bytes = format!(" in {} bytes", t.bytes.len());
    ModelError::Input {
        name: p.name.clone(),
        expected: text(p.elem, p.shape.iter().map(Dim::to_string).collect()),
        found: text(t.elem, t.shape.iter().map(usize::to_string).collect()) + &bytes,
    }
}

fn map(path: &Path, about: &About) -> Result<Weights, ModelError> {
    let wrong = |why: String| ModelError::Weights { path: path.to_owned(), why };
    let file = std::fs::File::open(path).map_err(|e| wrong(e.to_string()))?;
    // SAFETY: as with every map, nobody may write to the file while it is in use.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| wrong(e.to_string()))?;
    if map.len() as u64 != about.weights || map.len() < 64 {
        return Err(wrong(format!("{} bytes, expected {}", map.len(), about.weights)));
    }
    let found = blake3::Hasher::new().update_rayon(&map[64..]).finalize();
    let written = blake3::Hash::from_bytes(map[..32].try_into().expect("32 bytes"));
    if found.to_hex().as_str() != about.id || written != found {
        return Err(wrong(format!(
            "these weights have hash {found}, the library was built with {}",
            about.id
        )));
    }
    Ok(Weights::Mapped(map))
}

/// Divides the units of a kernel among the threads of the [`Team`] `context`.
unsafe extern "C" fn parallel(
    context: *mut c_void,
    kernel: Kernel,
    buffers: *const *mut u8,
    dims: *const i64,
    units: i64,
    work: i64,
) {
    let shared = Shared((buffers, dims));
    // SAFETY: what `Model::run` passes.
    let team = unsafe { &*context.cast::<Team>() };
    team.divide(units.max(0) as usize, work.max(1) as u64, |from, to| {
        let (buffers, dims) = shared.get();
        // SAFETY: the library's own arguments, passed through.
        unsafe { kernel(buffers, dims, from as i64, to as i64) }
    });
}
