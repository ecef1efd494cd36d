//! The library with the GPU's part: its table of functions, and how it comes into the process.

use std::ffi::{c_char, c_int, c_void};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::os::unix::Library;
use rustix::fs::{MemfdFlags, memfd_create};
use tch::Device;
use torch_sys::C_tensor;

use crate::fused::Fused;
use crate::{Error, Result, agreement, error, nvrtc, ops};

/// The library itself; empty if it was built without CUDA's headers.
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libella_gpu.so"));

/// `EllaGpu` of `cpp/gpu.h`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) error: unsafe extern "C" fn() -> *const c_char,
    capability: unsafe extern "C" fn(c_int, *mut c_int, *mut c_int) -> c_int,
    set_kernels: unsafe extern "C" fn(c_int, *const c_void) -> c_int,
    launch: unsafe extern "C" fn(*const c_char, c_int, c_int, c_int, c_int, c_int, *mut *mut c_void) -> c_int,
    pub(crate) stream_new: unsafe extern "C" fn(c_int, c_int, *mut i64) -> c_int,
    pub(crate) stream_current: unsafe extern "C" fn(c_int, *mut i64) -> c_int,
    pub(crate) stream_enter: unsafe extern "C" fn(c_int, i64) -> c_int,
    pub(crate) stream_raw: unsafe extern "C" fn(c_int, i64, *mut *mut c_void) -> c_int,
    pub(crate) stream_synchronize: unsafe extern "C" fn(c_int, i64) -> c_int,
    pub(crate) stream_keep: unsafe extern "C" fn(c_int, i64, *const C_tensor) -> c_int,
    pub(crate) event_record: unsafe extern "C" fn(c_int, i64, *mut *mut c_void) -> c_int,
    pub(crate) event_wait: unsafe extern "C" fn(c_int, i64, *mut c_void) -> c_int,
    pub(crate) event_done: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int,
    pub(crate) event_synchronize: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub(crate) event_free: unsafe extern "C" fn(c_int, *mut c_void) -> c_int,
    pub(crate) graph_begin: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> c_int,
    pub(crate) graph_end: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub(crate) graph_replay: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub(crate) graph_free: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub(crate) memory: unsafe extern "C" fn(c_int, *mut i64) -> c_int,
    pub(crate) memory_reset_peak: unsafe extern "C" fn(c_int) -> c_int,
    pub(crate) memory_empty_cache: unsafe extern "C" fn() -> c_int,
    pub(crate) memory_limit: unsafe extern "C" fn(c_int, i64) -> c_int,
}

/// The GPU that a worker computes on: of those that its process may see, the first.
const FIRST: c_int = 0;

static TABLE: OnceLock<&'static Table> = OnceLock::new();
/// The first GPU's compute capability, as (9, 0).
static CAPABILITY: OnceLock<(c_int, c_int)> = OnceLock::new();
/// Fused operators that give something else on it than on the processor.
static WRONG: OnceLock<(Fused, Vec<String>)> = OnceLock::new();

/// Loads the GPU's part, once, compiles the kernels for the first GPU and tries those that are to be used: some seconds. `libtorch` is the folder of the
/// libtorch that runs, and its CUDA part must be loaded already, with its symbols for all. Nothing may have asked libtorch for a GPU before that, as
/// seeding does: it asks for its CUDA part once, and takes it for absent from then on.
///
/// A fused operator that gives something else than the processor's is off from then on. What is to be said of that, and of operators that could not be tried,
/// comes back, from the call that loads it.
///
/// # Errors
/// This program was built without GPU support; the loader's words; the kernels' compiler is missing or refuses; `ELLA_FUSED` names something else; a kernel
/// breaks the GPU.
pub fn load(libtorch: &Path) -> Result<&'static [String]> {
    static ONE: Mutex<()> = Mutex::new(());
    // Nobody finds it loaded before it has been tried.
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if is_loaded() {
        return Ok(&[]);
    }
    // All that may be taken later, whatever wins by time.
    let used = Fused { timed: false, ..Fused::from_env()?.unwrap_or(Fused::USUAL) };
    let table = open()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are to live integers, which the call fills.
    error::check(unsafe { (table.capability)(FIRST, &raw mut major, &raw mut minor) }, table.error)?;
    let image = nvrtc::compile(&nvrtc::folders(libtorch), (major, minor))?;
    // SAFETY: the image is machine code for this GPU, which the call copies.
    error::check(unsafe { (table.set_kernels)(FIRST, image.as_ptr().cast()) }, table.error)?;
    // SAFETY: the table lives as long as the process: its library is never unloaded.
    unsafe { ops::ella_use_gpu(table) };
    CAPABILITY.get_or_init(|| (major, minor));
    let wrong = agreement::wrong(used, Device::Cuda(FIRST as usize))?;
    // What that took on the default stream is nobody's.
    // SAFETY: takes nothing.
    error::check(unsafe { (table.memory_empty_cache)() }, table.error)?;
    WRONG.get_or_init(|| wrong);
    TABLE.get_or_init(|| table);
    Ok(said())
}

/// Whether the GPU's part is loaded.
pub fn is_loaded() -> bool {
    TABLE.get().is_some()
}

/// The first GPU's compute capability, as (9, 0), once the GPU's part is loaded.
pub(crate) fn capability() -> Option<(c_int, c_int)> {
    CAPABILITY.get().copied()
}

/// The fused operators that were found wrong on the first GPU, once they have been tried.
pub(crate) fn wrong() -> Option<Fused> {
    WRONG.get().map(|(wrong, _)| *wrong)
}

/// What is to be said of the fused operators on the first GPU: a line about each that was found wrong and is off, or could not be tried.
pub fn said() -> &'static [String] {
    WRONG.get().map_or(&[], |(_, lines)| lines)
}

/// The table, or an error that says that it is not there.
pub(crate) fn table() -> Result<&'static Table> {
    TABLE.get().copied().ok_or_else(|| Error("there is no GPU here, or libtorch's CUDA part is not loaded".into()))
}

/// A GPU's number, as CUDA has it.
pub(crate) fn ordinal(device: Device) -> Result<c_int> {
    match device {
        Device::Cuda(ordinal) => c_int::try_from(ordinal).map_err(|_| Error(format!("there is no GPU {ordinal}"))),
        other => Err(Error(format!("{other:?} is no GPU"))),
    }
}

/// Calls one function of the table.
pub(crate) fn call(work: impl FnOnce(&Table) -> c_int) -> Result<()> {
    let table = table()?;
    error::check(work(table), table.error)
}

/// Opens the carried library from memory: no file is written, so that a read-only container will do.
fn open() -> Result<&'static Table> {
    if LIBRARY.is_empty() {
        return Err(Error("this program was built without GPU support: there were no CUDA headers beside its libtorch".into()));
    }
    let failed = |what: &str, error: &dyn std::error::Error| Error(format!("{what}: {}", error::reason(error)));
    let memory = memfd_create("libella_gpu.so", MemfdFlags::CLOEXEC).map_err(|e| failed("memory for the GPU's part", &e))?;
    let mut file = std::fs::File::from(memory);
    file.write_all(LIBRARY).map_err(|e| failed("memory for the GPU's part", &e))?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: the library is of this build; its initialisers ask nothing of the program.
    let library = unsafe { Library::open(Some(&path), libc::RTLD_NOW | libc::RTLD_LOCAL) }.map_err(|e| failed("the GPU's part", &e))?;
    // SAFETY: the type is that of `ella_gpu` in cpp/gpu.cpp, and the table that of cpp/gpu.h, both of this build.
    let table = unsafe {
        let get = library.get::<unsafe extern "C" fn() -> *const Table>(b"ella_gpu").map_err(|e| failed("the GPU's part", &e))?;
        get().as_ref()
    };
    // Never unloaded: the table stays.
    std::mem::forget(library);
    table.ok_or_else(|| Error("the GPU's part has no functions".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shim is compiled in every build: it must be there, and offer its table.
    #[test]
    fn the_gpus_part_is_carried() {
        assert!(LIBRARY.starts_with(b"\x7fELF"), "built without CUDA's headers");
        assert!(LIBRARY.windows(9).any(|window| window == b"ella_gpu\0"));
    }

    #[test]
    fn without_libtorchs_cuda_part_it_says_what_is_missing() {
        if Path::new("/dev/nvidiactl").exists() {
            println!("skipped: this machine has an NVIDIA device");
            return;
        }
        let error = load(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(error.contains("the GPU's part: "), "{error}");
        assert!(!is_loaded() && table().is_err());
    }
}
