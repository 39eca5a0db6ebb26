//! Kernels of a shared library, called with tables of pointers and sizes.
//!
//! The one place that runs generated code, hence `unsafe`: a kernel trusts its tables. Whoever makes a [`Call`] sizes its
//! buffers by the same expressions that the code was generated from.
#![allow(unsafe_code)]

use libloading::Library;
use rayon::prelude::*;
use std::ffi::OsStr;
use thiserror::Error;

/// Why a library could not be loaded.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The system refused it.
    #[error("{0}")]
    Load(#[from] libloading::Error),
}

type Function = unsafe extern "C" fn(bufs: *const *mut u8, dims: *const i64, begin: i64, end: i64);

/// A loaded library.
pub struct Kernels {
    // Functions are only used while the library is loaded.
    functions: Vec<Function>,
    _library: Library,
}

/// One kernel's arguments.
pub struct Call<'a> {
    /// Which kernel, by its place in the list that [`Kernels::open`] was given.
    pub kernel: usize,
    /// Its buffers.
    pub buffers: &'a [*mut u8],
    /// Its sizes.
    pub dims: &'a [i64],
    /// Units of work.
    pub units: usize,
    /// Units that a thread takes at least: fewer are not worth waking one.
    pub grain: usize,
}

/// Pointers that threads share: each unit writes what is its own.
struct Shared<'a>(&'a [*mut u8]);
// SAFETY: kernels write disjoint parts of their outputs for disjoint ranges of units, and only read the rest.
unsafe impl Sync for Shared<'_> {}

impl Kernels {
    /// Loads `path` and finds the kernels `names`.
    ///
    /// # Safety
    /// The library must be one that was generated for this machine, with these kernels.
    pub unsafe fn open(path: impl AsRef<OsStr>, names: &[String]) -> Result<Kernels, KernelError> {
        // SAFETY: promised by the caller; the functions live as long as the library beside them.
        unsafe {
            let library = Library::new(path.as_ref())?;
            let find = |name: &String| library.get::<Function>(name.as_bytes()).map(|f| *f);
            let functions = names.iter().map(find).collect::<Result<_, _>>()?;
            Ok(Kernels { functions, _library: library })
        }
    }

    /// Runs all units.
    ///
    /// # Safety
    /// Buffers and sizes must be those that the kernel was generated for, and no other thread may use what it writes.
    pub unsafe fn call(&self, call: &Call) {
        let f = self.functions[call.kernel];
        let &Call { buffers, dims, units, .. } = call;
        let shared = Shared(buffers);
        let run = |from: usize, to: usize| {
            let shared = &shared;
            // SAFETY: promised by the caller.
            unsafe { f(shared.0.as_ptr(), dims.as_ptr(), from as i64, to as i64) }
        };
        let threads = rayon::current_num_threads();
        let parts = (units / call.grain.max(1)).clamp(1, 4 * threads);
        match threads == 1 || parts == 1 {
            true => run(0, units),
            false => {
                let at = |i: usize| i * units / parts;
                (0..parts).into_par_iter().with_max_len(1).for_each(|i| run(at(i), at(i + 1)));
            }
        }
    }
}
