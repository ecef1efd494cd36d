//! The devices that tests run on.

// Every test program uses a part of this; and the lint's exception for tests does not reach helpers.
#![allow(dead_code, clippy::unwrap_used)]

mod emulator;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::os::unix::Library;
use tch::{Cuda, Device};

/// The first GPU with everything loaded that it takes, if this machine has one.
pub(crate) fn gpu() -> Option<Device> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    static FAILED: OnceLock<String> = OnceLock::new();
    if let Some(why) = FAILED.get() {
        panic!("{why}");
    }
    *GPU.get_or_init(|| {
        if !std::path::Path::new("/dev/nvidiactl").exists() {
            println!("skipped on a GPU: this machine has no NVIDIA device");
            return None;
        }
        let folder = libtorch();
        // SAFETY: of the same wheel as the libtorch that runs; never unloaded.
        let library = unsafe { Library::open(Some(folder.join("libtorch_cuda.so")), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        std::mem::forget(library.unwrap());
        // What took half a minute to fail once is not tried again by every test.
        let lines = ella_cuda::load(&folder).unwrap_or_else(|error| panic!("{}", FAILED.get_or_init(|| error.to_string())));
        assert_eq!(lines, [""; 0]);
        assert!(Cuda::is_available());
        ella_cuda::precision::set_tf32(false).unwrap();
        Some(Device::Cuda(0))
    })
}

/// One test at a time: what is measured, limited, recorded and seeded is the whole process's.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seeds libtorch, whose numbers are this test's as long as it holds what this returns. Not before the GPU's libraries are loaded: libtorch asks for them
/// once, and takes them for absent from then on.
pub(crate) fn seed(number: i64) -> MutexGuard<'static, ()> {
    let alone = alone();
    let _ = gpu();
    tch::manual_seed(number);
    alone
}

/// Whether this is the test program that tries the GPU's half of the kernels without a GPU.
pub(crate) fn is_emulated() -> bool {
    env!("CARGO_CRATE_NAME") == "emulated"
}

/// Where operators are tried: on the processor, and on a GPU where there is one.
pub(crate) fn devices() -> Vec<Device> {
    if is_emulated() {
        emulator::install();
        return vec![Device::Cpu];
    }
    std::iter::once(Device::Cpu).chain(gpu()).collect()
}

/// The folder of the libtorch that runs.
fn libtorch() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.ends_with("/libtorch_cpu.so")).unwrap();
    PathBuf::from(path).parent().unwrap().to_owned()
}
