//! Single kernels of a shared library, called with tables of pointers and sizes.
//!
//! Generated code is run here, hence `unsafe`: a kernel trusts its tables. Whoever makes a [`Call`] sizes its buffers by the
//! same expressions that the code was generated from.
#![allow(unsafe_code)]

use crate::parallel::Team;
use libloading::Library;
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
    functions: Vec<Function>,
    // The functions live as long as it.
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
    /// What a unit takes, in nanoseconds or so.
    pub work: u64,
}

/// Pointers that threads share.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub T);
// SAFETY: kernels write disjoint parts of their outputs for disjoint ranges of units, and only read the rest.
unsafe impl<T> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    /// The pointers. (A closure that names the field would capture them alone.)
    pub(crate) fn get(&self) -> T {
        self.0
    }
}

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

    /// Runs all units, on the threads of `team`.
    ///
    /// # Safety
    /// Buffers and sizes must be those that the kernel was generated for, and no other thread may use what it writes.
    pub unsafe fn call(&self, call: &Call, team: &Team) {
        let f = self.functions[call.kernel];
        let shared = Shared((call.buffers.as_ptr(), call.dims.as_ptr()));
        team.divide(call.units, call.work, |from, to| {
            let (buffers, dims) = shared.get();
            // SAFETY: promised by the caller.
            unsafe { f(buffers, dims, from as i64, to as i64) }
        });
    }
}
