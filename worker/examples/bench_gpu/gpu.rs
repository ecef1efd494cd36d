//! What only a GPU, or only libtorch's CUDA part, can tell.

use serde_json::{Value, json};
use tch::Device;

/// From here on [`memory`] tells of the most that was taken.
pub(crate) fn reset_peak(device: Device) {
    if device.is_cuda() {
        // Without the counters there is nothing to reset, and `memory` says so.
        drop(ella_cuda::memory::reset_peak(device));
    }
}

/// The most memory that was taken since: of the device by tensors and by libtorch's allocator, or of the processor by this process.
pub(crate) fn memory(device: Device) -> Value {
    if !device.is_cuda() {
        return json!({ "peak_resident_bytes": resident() });
    }
    match ella_cuda::memory::counters(device) {
        Ok(found) => json!({ "peak_allocated_bytes": found.peak_allocated, "peak_reserved_bytes": found.peak_reserved }),
        Err(error) => json!({ "skipped": error.to_string() }),
    }
}

fn resident() -> u64 {
    // SAFETY: the structure is plain numbers, and the call only fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    usage.ru_maxrss.unsigned_abs() * 1024
}
