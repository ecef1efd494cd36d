//! NVIDIA's management library, which comes with the driver: loaded if it is there. What it does not tell is left out.

use libloading::os::unix::Library;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// What is told of a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Told {
    /// Bytes of its memory in use, by all processes.
    pub(super) used: u64,
    pub(super) total: u64,
    /// Of the last moment's time, from 0 to 1, in which anything ran.
    pub(super) busy: Option<f64>,
}

type Device = *mut c_void;

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlUtilization_t`, in percent.
#[repr(C)]
#[derive(Default)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

struct Nvml {
    by_uuid: unsafe extern "C" fn(*const c_char, *mut Device) -> c_int,
    memory: unsafe extern "C" fn(Device, *mut Memory) -> c_int,
    utilization: unsafe extern "C" fn(Device, *mut Utilization) -> c_int,
    /// Never closed: the functions are its.
    _library: Library,
}

static NVML: OnceLock<Option<Nvml>> = OnceLock::new();

/// What is told of the GPU with this UUID, 32 hex digits.
pub(super) fn look(uuid: &str) -> Option<Told> {
    let nvml = NVML.get_or_init(open).as_ref()?;
    let device = names(uuid)?.into_iter().find_map(|name| nvml.device(&name))?;
    let (mut memory, mut utilization) = (Memory::default(), Utilization::default());
    // SAFETY: the handle is the library's own, and the pointer is to a live struct of the layout that it fills.
    let sized = unsafe { (nvml.memory)(device, &raw mut memory) } == 0;
    // SAFETY: as above.
    let timed = unsafe { (nvml.utilization)(device, &raw mut utilization) } == 0;
    let busy = timed.then(|| f64::from(utilization.gpu.min(100)) / 100.0);
    sized.then_some(Told { used: memory.used, total: memory.total, busy })
}

impl Nvml {
    fn device(&self, name: &str) -> Option<Device> {
        let name = CString::new(name).ok()?;
        let mut device: Device = std::ptr::null_mut();
        // SAFETY: the name is a C string, and the pointer is to a live place for a handle, which the call fills if it succeeds.
        (unsafe { (self.by_uuid)(name.as_ptr(), &raw mut device) } == 0).then_some(device)
    }
}

/// A UUID as the library has it: a whole GPU's, or a slice's, for which CUDA tells 16 bytes alike.
fn names(uuid: &str) -> Option<[String; 2]> {
    let part = |range| uuid.get(range);
    let digits = format!("{}-{}-{}-{}-{}", part(0..8)?, part(8..12)?, part(12..16)?, part(16..20)?, part(20..32)?);
    Some(["GPU", "MIG"].map(|kind| format!("{kind}-{digits}")))
}

fn open() -> Option<Nvml> {
    // SAFETY: the driver's library, whose initializers do nothing that threads would mind.
    let library = unsafe { Library::new("libnvidia-ml.so.1") }.ok()?;
    // SAFETY: the signatures are those of nvml.h, unchanged since they were published.
    unsafe {
        let init: unsafe extern "C" fn() -> c_int = *library.get(b"nvmlInit_v2\0").ok()?;
        let by_uuid = *library.get(b"nvmlDeviceGetHandleByUUID\0").ok()?;
        let memory = *library.get(b"nvmlDeviceGetMemoryInfo\0").ok()?;
        let utilization = *library.get(b"nvmlDeviceGetUtilizationRates\0").ok()?;
        (init() == 0).then_some(Nvml { by_uuid, memory, utilization, _library: library })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_written_as_the_library_has_them() {
        let names = names("00112233445566778899aabbccddeeff");
        assert_eq!(names.unwrap(), ["GPU-00112233-4455-6677-8899-aabbccddeeff", "MIG-00112233-4455-6677-8899-aabbccddeeff"]);
        assert_eq!(super::names("0011"), None);
    }

    #[test]
    fn a_gpu_that_is_not_there_tells_nothing() {
        assert_eq!(look("00000000000000000000000000000000"), None);
    }
}
