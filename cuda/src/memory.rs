//! libtorch's allocator of GPU memory.

use tch::Device;

use crate::{Result, gpu};

/// Bytes of a device that this process has by libtorch's allocator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// In tensors.
    pub allocated: u64,
    /// Taken from the device: those in tensors, and those kept for later ones.
    pub reserved: u64,
    /// The most in tensors since [`reset_peak`].
    pub peak_allocated: u64,
    /// The most taken from the device since then.
    pub peak_reserved: u64,
}

/// The device's counters.
///
/// # Errors
/// `device` is no GPU, or the GPU's part is not loaded; the same for every function here.
pub fn counters(device: Device) -> Result<Counters> {
    let mut bytes = [0_i64; 4];
    let device = gpu::ordinal(device)?;
    // SAFETY: the pointer is to four live integers, which the call fills.
    gpu::call(|gpu| unsafe { (gpu.memory)(device, bytes.as_mut_ptr()) })?;
    let [allocated, reserved, peak_allocated, peak_reserved] = bytes.map(i64::unsigned_abs);
    Ok(Counters { allocated, reserved, peak_allocated, peak_reserved })
}

/// Has the peaks begin anew.
///
/// # Errors
/// See [`counters`].
pub fn reset_peak(device: Device) -> Result<()> {
    let device = gpu::ordinal(device)?;
    // SAFETY: takes a number.
    gpu::call(|gpu| unsafe { (gpu.memory_reset_peak)(device) })
}

/// Gives what no tensor uses back to the device.
///
/// # Errors
/// See [`counters`].
pub fn empty_cache() -> Result<()> {
    // SAFETY: takes nothing.
    gpu::call(|gpu| unsafe { (gpu.memory_empty_cache)() })
}

/// Has the allocator refuse what goes beyond `bytes` in all. What libraries take for themselves (CUDA's context, about half a GB, and NCCL's buffers) is
/// not counted.
///
/// # Errors
/// See [`counters`].
pub fn limit(device: Device, bytes: u64) -> Result<()> {
    let device = gpu::ordinal(device)?;
    // SAFETY: takes numbers.
    gpu::call(|gpu| unsafe { (gpu.memory_limit)(device, i64::try_from(bytes).unwrap_or(i64::MAX)) })
}
