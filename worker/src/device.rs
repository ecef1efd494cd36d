//! Which device this worker computes on, and libtorch's CUDA part, which is loaded at run time if it is there (design.md §4
//! "Devices").

use crate::gpu::{self, Unusable};
use ella_cuda::fused::Fused;
use ella_cuda::stream::{Entered, Priority, Stream};
use ella_proto::config::{Device as Choice, Dtype};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tch::{Cuda, Device, Kind, Tensor};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the device \"cuda\" (workers.device, --device) cannot be used: {0}; or use \"cpu\"")]
pub struct NoDevice(pub Unusable);

/// The device that the config asks for, with the process set up for it. Call it on each thread that computes.
pub fn set_up(choice: Choice, threads: usize) -> Result<Device, NoDevice> {
    set_threads(threads);
    match choice {
        Choice::Cpu => Ok(Device::Cpu),
        Choice::Auto => Ok(cuda().unwrap_or_else(|why| {
            // Nothing is wrong with a machine that has no GPU.
            if why != Unusable::Nothing {
                tracing::warn!("computes on the processor, because {why}");
            }
            Device::Cpu
        })),
        Choice::Cuda => cuda().map_err(NoDevice),
    }
}

/// Sets what libraries read of the environment when they start, unless it is set already.
///
/// - `THP_MEM_ALLOC_ENABLE=1`: libtorch takes its large tensors from large pages where the system gives them. A page costs as much to get and to give
///   back whatever its size: at 66.8 million parameters a step on two cores took half of the time, and so did the end of a killed process, which its
///   peers wait for.
/// - `CUBLAS_WORKSPACE_CONFIG=:4096:8`: see [`crate::precision`].
///
/// # Safety
/// No other thread may run.
pub unsafe fn set_environment() {
    for (name, value) in [("THP_MEM_ALLOC_ENABLE", "1"), crate::precision::WORKSPACE] {
        if std::env::var_os(name).is_none() {
            // SAFETY: the caller's.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// Whether the variables that choose kernels (`ELLA_FUSED`, `ELLA_GRAPHS`) can be understood. A worker that finds only then that one can't be has begun
/// a run already, and takes it along.
///
/// # Errors
/// In words, the variable and what it may say.
pub fn check_environment() -> Result<(), String> {
    Fused::from_env().map_err(|error| error.to_string())?;
    crate::train::graph::check()
}

/// A stream for this thread's own work on a GPU, until what is returned is dropped. The default one will not do: what it has recorded cannot be played
/// again, and it waits for all others.
///
/// # Errors
/// CUDA's own.
pub fn own_stream(device: Device) -> Result<Option<Entered>, ella_cuda::Error> {
    if !device.is_cuda() {
        return Ok(None);
    }
    Ok(Some(Stream::new(device, Priority::Normal)?.enter()?))
}

/// The number of intra-op threads of this thread's operations: part of SAME.
pub fn set_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}

/// "cpu" or "cuda", as workers tell the coordinator.
pub fn kind_name(device: Device) -> &'static str {
    if device.is_cuda() { "cuda" } else { "cpu" }
}

/// The UUID of a CUDA device: two workers on one GPU must not take it for two.
pub fn uuid(device: Device) -> Option<String> {
    let Device::Cuda(ordinal) = device else { return None };
    let device = nccl_rs::cuda::Driver::load().ok()?.device(u32::try_from(ordinal).ok()?).ok()?;
    Some(device.uuid().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What the bits of this worker's sums come of, beside the kind of device (SAME), by name.
pub fn computes(device: Device) -> HashMap<String, String> {
    let version = libtorch_folder().map_or_else(|| "unknown".to_owned(), |folder| libtorch_version(&folder));
    // What can't be understood was told of when the worker began.
    let fused = fused(Fused::from_env().ok().flatten(), device);
    // What cuBLAS promises the same bits for.
    let chip = match architecture(device) {
        Some(((major, minor), multiprocessors)) => {
            ("GPU", format!("compute capability {major}.{minor}, {multiprocessors} multiprocessors"))
        }
        None => ("processor", instructions()),
    };
    [("libtorch", version), ("fused operators", fused), chip].map(|(name, what)| (name.to_owned(), what)).into()
}

/// The fused operators in use: `chosen` by `ELLA_FUSED`, or as usual, which on a GPU depends on the kind of numbers too.
fn fused(chosen: Option<Fused>, device: Device) -> String {
    let usual = if device.is_cuda() { Fused::USUAL } else { Fused::NONE };
    // In the kind that most of them are there in.
    let names = chosen.unwrap_or(usual).on(Kind::BFloat16, device).names();
    match (chosen, names.as_slice()) {
        (_, []) => "none".to_owned(),
        (Some(_), names) => names.join(", "),
        (None, names) => format!("as usual, of {}", names.join(", ")),
    }
}

fn architecture(device: Device) -> Option<((i32, i32), i32)> {
    let Device::Cuda(ordinal) = device else { return None };
    nccl_rs::cuda::Driver::load().ok()?.device(u32::try_from(ordinal).ok()?).ok()?.architecture().ok()
}

/// Which of its kernels libtorch takes on this processor: by the instructions that there are, unless its own variable says so.
fn instructions() -> String {
    if let Ok(told) = std::env::var("ATEN_CPU_CAPABILITY") {
        return told;
    }
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("fma") {
            return "avx512".to_owned();
        }
        if has!("avx2") && has!("fma") {
            return "avx2".to_owned();
        }
    }
    std::env::consts::ARCH.to_owned()
}

/// The version of the libtorch in this folder, as its wheel says; another build of it may not.
pub fn libtorch_version(folder: &Path) -> String {
    let said = std::fs::read_to_string(folder.join("../version.py")).unwrap_or_default();
    let version = said.lines().find_map(|line| line.strip_prefix("__version__ = ")).unwrap_or("unknown");
    version.trim_matches(['\'', '"']).to_owned()
}

/// NCCL, as torch's wheel brings it, or the system's.
///
/// # Errors
/// If neither is there, or what is there is too old.
pub fn nccl() -> Result<nccl_rs::Library, nccl_rs::Error> {
    let beside_libtorch = libtorch_folder().map(|lib| lib.join("../../nvidia/nccl/lib"));
    nccl_rs::Library::load(beside_libtorch.as_slice())
}

/// What is wrong with this version of NCCL for runs whose workers come and go, and what to do; none is the good answer.
pub fn nccl_fault(version: nccl_rs::Version) -> Option<String> {
    let fault = version.known_fault()?;
    Some(format!("NCCL {version} ({fault}): install another, such as the one that torch's wheel brings"))
}

/// The tensor kind of a config's dtype.
pub fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Fp32 => Kind::Float,
        Dtype::Fp16 => Kind::Half,
        Dtype::Bf16 => Kind::BFloat16,
    }
}

/// The memory of a contiguous tensor on the CPU.
pub(crate) fn bytes_of(tensor: &mut Tensor, kind: Kind) -> &mut [u8] {
    let length = tensor.numel() * kind.elt_size_in_bytes();
    if length == 0 {
        // Aligned for every element type, which torch's own pointer to nothing need not be.
        return bytemuck::cast_slice_mut::<u64, u8>(&mut []);
    }
    // SAFETY: the tensor is contiguous and on the CPU (both checked by the callers), so that its elements are `length` bytes from its
    // data pointer on; they were initialised by torch, any bytes are valid for its dtypes here, and the exclusive borrow of the tensor lasts as long as the slice.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), length) }
}

fn cuda() -> Result<Device, Unusable> {
    let folder = libtorch_folder().unwrap_or_default();
    gpu::check(&folder)?;
    load_cuda_library(&folder)?;
    for line in ella_cuda::load(&folder).map_err(|error| Unusable::Own(error.to_string()))? {
        tracing::warn!("{line}");
    }
    // Until a run says otherwise: see `crate::precision`.
    ella_cuda::precision::set_tf32(false).map_err(|error| Unusable::Own(error.to_string()))?;
    if Cuda::is_available() { Ok(Device::Cuda(0)) } else { Err(Unusable::Refused) }
}

/// Loads libtorch_cuda.so from beside libtorch_cpu.so. It registers itself with libtorch and stays loaded.
fn load_cuda_library(folder: &Path) -> Result<(), Unusable> {
    let path = folder.join(gpu::CUDA_PART);
    // SAFETY: the library's initialisers only register operators with the libtorch that this process already runs, of the same
    // wheel; it is never unloaded.
    let library = unsafe { libloading::os::unix::Library::open(Some(&path), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    match library {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(gpu::not_loaded(&path, &std::error::Error::source(&error).unwrap_or(&error).to_string())),
    }
}

/// Where the running libtorch_cpu.so was loaded from.
pub fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.ends_with("/libtorch_cpu.so"))?;
    Some(PathBuf::from(path).parent()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_computes_is_told_by_name() {
        let _ = tch::Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let told = computes(Device::Cpu);
        let mut names: Vec<&str> = told.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["fused operators", "libtorch", "processor"]);
        assert!(told["libtorch"].starts_with(|c: char| c.is_ascii_digit()), "{told:?}");
        assert!(told.values().all(|what| !what.is_empty() && what.len() <= 256), "{told:?}");
        assert_eq!((fused(None, Device::Cpu).as_str(), fused(Some(Fused::NONE), Device::Cpu).as_str()), ("none", "none"));
        assert!(fused(Some(Fused::ALL), Device::Cpu).starts_with("norm, "));
        // In float32 nothing is fused as usual, and everything that is chosen.
        assert_ne!(fused(None, Device::Cuda(0)), fused(Some(Fused::ALL), Device::Cuda(0)));
    }

    #[test]
    fn a_nccl_whose_abort_hangs_is_told_of_with_what_to_do() {
        let version = |minor, patch| nccl_rs::Version { major: 2, minor, patch };
        let told = nccl_fault(version(28, 4)).unwrap();
        assert!(told.starts_with("NCCL 2.28.4 (2.28.3 to 2.28.8: ") && told.contains("install another"), "{told}");
        assert_eq!(nccl_fault(version(28, 9)), None);
    }

    #[test]
    fn without_a_gpu_auto_is_the_processor_and_cuda_says_what_is_missing() {
        let _ = tch::Tensor::zeros([1], (Kind::Float, Device::Cpu));
        assert!(libtorch_folder().unwrap().join("libtorch_cpu.so").exists());
        assert_eq!(set_up(Choice::Cpu, 1).unwrap(), Device::Cpu);
        if std::path::Path::new("/dev/nvidiactl").exists() {
            println!("skipped: this machine has an NVIDIA device");
            return;
        }
        assert_eq!(set_up(Choice::Auto, 1).unwrap(), Device::Cpu);
        assert!(set_up(Choice::Cuda, 1).unwrap_err().to_string().contains("no NVIDIA device"));
        // libtorch's CUDA part is here; what it stands on is not, and the loader's own words name it.
        let found = load_cuda_library(&libtorch_folder().unwrap());
        if let Err(error) = found {
            let text = error.to_string();
            assert!(text.contains("libtorch_cuda.so cannot be loaded (lib") && text.contains("install the wheel nvidia-"), "{text}");
        }
    }
}
