//! Whether this machine's GPU can be used, in words that say what is missing; and what breaks while it is ([`fault`]).

pub mod fault;
pub(crate) mod pieces;

use ella_cuda::fused::Fused;
pub use ella_cuda::said as of_fused;
use ella_cuda::{precision, speed};
use ella_proto::config::Bytes;
use nccl_rs::cuda::Driver;
use std::path::Path;
use tch::{Device, Kind};

/// The file by which the NVIDIA kernel module is told from none at all.
const DEVICE_FILE: &str = "/dev/nvidiactl";

/// libtorch's part for GPUs, beside its others.
pub(crate) const CUDA_PART: &str = "libtorch_cuda.so";

/// Why there is no GPU to compute on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Nothing of NVIDIA's is here: nothing is wrong with the machine.
    #[error("this machine has no NVIDIA device")]
    Nothing,
    /// The kernel module is here, the driver's library is not: a container that was given the device only.
    #[error(
        "the driver's library cannot be loaded ({0}) though {DEVICE_FILE} is here: install the NVIDIA driver; in a container, start it with \
         NVIDIA's runtime (docker run --gpus all)"
    )]
    NoDriver(String),
    /// It is there and does not start.
    #[error("the NVIDIA driver does not start ({said}): {hint}")]
    NotStarted {
        /// In its own words.
        said: String,
        /// What to do.
        hint: &'static str,
    },
    /// The driver cannot run the CUDA that libtorch was built with.
    #[error(
        "the NVIDIA driver is too old: it runs CUDA {}.{}, and libtorch here is built for CUDA {}.{}; install driver {} or newer",
        found.0, found.1, needed.0, needed.1, release(*needed)
    )]
    TooOld {
        /// The newest CUDA that it runs, as (major, minor).
        found: (u32, u32),
        /// What libtorch needs.
        needed: (u32, u32),
    },
    /// A driver without a device.
    #[error("the NVIDIA driver finds no GPU{}: see nvidia-smi -L", visible(.0.as_deref()))]
    NoDevice(
        /// `CUDA_VISIBLE_DEVICES`, if it is set.
        Option<String>,
    ),
    /// A shared library that libtorch needs.
    #[error("{library} cannot be loaded ({said}): {hint}")]
    Library {
        /// That was to be loaded.
        library: String,
        /// The loader's words.
        said: String,
        /// What brings what is missing.
        hint: String,
    },
    /// Our own part beside libtorch's.
    #[error("ella's own CUDA part cannot be loaded: {0}")]
    Own(String),
    /// All of it is there, and libtorch does not take it.
    #[error("libtorch finds no CUDA device that it can use, though the driver finds one: is it libtorch's CPU build?")]
    Refused,
}

/// Which attention a run in bfloat16 with `reduction = "fast"` takes on the GPU that is loaded, a line for each heads' width that ours fits.
///
/// # Errors
/// CUDA's own.
pub fn of_attention() -> Result<Vec<String>, ella_cuda::Error> {
    let (kind, device) = (Kind::BFloat16, Device::Cuda(0));
    precision::set_benchmark(true)?;
    speed::measure(Fused::USUAL.on(kind, device), kind, device)?;
    Ok(speed::measured(kind).iter().map(ToString::to_string).collect())
}

/// The driver's release that first ran a CUDA version.
fn release((major, _): (u32, u32)) -> &'static str {
    match major {
        ..=11 => "450",
        12 => "525",
        13 => "580",
        _ => "of that CUDA version",
    }
}

fn visible(devices: Option<&str>) -> String {
    devices.map(|devices| format!(" (CUDA_VISIBLE_DEVICES is \"{devices}\")")).unwrap_or_default()
}

/// What was seen of the machine.
struct Seen {
    has_file: bool,
    /// The newest CUDA that it runs, and its devices.
    driver: Result<((u32, u32), u32), nccl_rs::Error>,
    /// The CUDA that libtorch was built with.
    built_for: (u32, u32),
    /// `CUDA_VISIBLE_DEVICES`.
    visible: Option<String>,
}

/// Whether the driver has a GPU for the libtorch in this folder, and that has a part for GPUs. No library of libtorch's is loaded for it.
///
/// # Errors
/// What is missing or too old.
pub fn check(libtorch: &Path) -> Result<(), Unusable> {
    let driver = Driver::load().and_then(|driver| Ok((driver.version()?, driver.device_count()?)));
    judge(Seen {
        has_file: Path::new(DEVICE_FILE).exists(),
        driver,
        built_for: built_for(&std::fs::read_to_string(libtorch.join("../version.py")).unwrap_or_default()),
        visible: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
    })?;
    has_cuda(libtorch)
}

/// Whether libtorch in this folder, if it is there, is no CPU build.
fn has_cuda(libtorch: &Path) -> Result<(), Unusable> {
    let part = libtorch.join(CUDA_PART);
    let is_there = part.exists() || !libtorch.join("libtorch_cpu.so").exists();
    if is_there { Ok(()) } else { Err(not_loaded(&part, &format!("{CUDA_PART}: there is no such file"))) }
}

/// A GPU's memory as its driver tells: free bytes, and all; none if it does not tell, or `device` is no GPU.
pub fn memory(device: Device) -> Option<(u64, u64)> {
    ask(device).ok().map(|(free, total)| (free as u64, total as u64))
}

/// Bounds what this process takes of a GPU's memory for tensors, so that several can share it: with no bound, on a processor, nothing is done.
///
/// # Errors
/// libtorch's allocator's own.
pub fn limit(device: Device, most: Option<Bytes>) -> Result<(), ella_cuda::Error> {
    most.filter(|_| device.is_cuda()).map_or(Ok(()), |most| ella_cuda::memory::limit(device, most.0))
}

/// Whether a GPU still answers: one on which a kernel has failed does not, whatever it is asked. Any device but a GPU does.
///
/// # Errors
/// The driver's words.
pub fn answers(device: Device) -> Result<(), nccl_rs::Error> {
    if device.is_cuda() { ask(device).map(drop) } else { Ok(()) }
}

fn ask(device: Device) -> Result<(usize, usize), nccl_rs::Error> {
    let ordinal = if let Device::Cuda(ordinal) = device { u32::try_from(ordinal).unwrap_or(u32::MAX) } else { u32::MAX };
    Driver::load()?.device(ordinal)?.memory()
}

fn judge(Seen { has_file, driver, built_for, visible }: Seen) -> Result<(), Unusable> {
    match driver {
        Err(nccl_rs::Error::Absent { .. }) if !has_file => Err(Unusable::Nothing),
        Err(nccl_rs::Error::Absent { tried, .. }) => Err(Unusable::NoDriver(tried)),
        // CUDA_ERROR_NO_DEVICE: with nothing hidden, a library that was installed on a machine without a GPU.
        Err(nccl_rs::Error::Cuda { code: 100, .. }) if !has_file && visible.is_none() => Err(Unusable::Nothing),
        Err(nccl_rs::Error::Cuda { code: 100, .. }) => Err(Unusable::NoDevice(visible)),
        Err(error) => Err(Unusable::NotStarted { hint: start_hint(&error), said: error.to_string() }),
        // Any driver of a major version runs all its minor ones.
        Ok((found, _)) if found.0 < built_for.0 => Err(Unusable::TooOld { found, needed: (built_for.0, 0) }),
        Ok((_, 0)) => Err(Unusable::NoDevice(visible)),
        Ok(_) => Ok(()),
    }
}

/// By CUresult, as cuda.h explains them.
fn start_hint(error: &nccl_rs::Error) -> &'static str {
    match error {
        nccl_rs::Error::Cuda { code: 802, .. } => "NVSwitch machines need the service nvidia-fabricmanager: start it",
        nccl_rs::Error::Cuda { code: 803 | 804, .. } => {
            "its library and its kernel module are of two versions: restart the machine after an update, or let the container use the host's library"
        }
        nccl_rs::Error::Symbol { .. } => "it is older than any that libtorch here runs on: install a newer one",
        _ => "see nvidia-smi and the kernel's log (dmesg | grep -i nvrm); a restart of the machine may be needed",
    }
}

/// The CUDA version of a wheel's `version.py`; that of the one that ella is made for, where it does not say.
fn built_for(version_py: &str) -> (u32, u32) {
    let said = version_py.lines().find_map(|line| line.strip_prefix("cuda: Optional[str] = "));
    let numbers = said.and_then(|said| said.trim().trim_matches(['\'', '"']).split_once('.'));
    numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?))).unwrap_or((13, 0))
}

/// Why a library of libtorch's was not loaded, from the loader's words, which name the one that is missing: it may be another.
pub fn not_loaded(library: &Path, said: &str) -> Unusable {
    let missing = said.split([':', ' ']).find(|word| word.contains(".so")).unwrap_or_default();
    let missing = missing.rsplit('/').next().unwrap_or_default();
    let hint = match wheel_of(missing) {
        _ if said.contains("undefined symbol") || said.contains("version `") => {
            "it belongs to another version than what is loaded: libtorch and its libraries must be of one wheel's versions".to_owned()
        }
        Some("driver") => "install the NVIDIA driver".to_owned(),
        Some("torch") if library.ends_with(missing) => {
            "libtorch here is the CPU build: install the CUDA build of the same version".to_owned()
        }
        Some(wheel) => format!("install the wheel {wheel} beside torch's (make does so where it finds a GPU)"),
        None => format!("install what brings {missing}"),
    };
    Unusable::Library { library: library.display().to_string(), said: said.to_owned(), hint }
}

/// The wheel that brings a shared library, by the names that torch 2.11 requires.
fn wheel_of(library: &str) -> Option<&'static str> {
    const WHEELS: [(&str, &str); 17] = [
        ("libcuda.so", "driver"),
        ("libcublas", "nvidia-cublas"),
        ("libcudnn", "nvidia-cudnn-cu13"),
        ("libcudart", "nvidia-cuda-runtime"),
        ("libcufft", "nvidia-cufft"),
        ("libcufile", "nvidia-cufile"),
        ("libcupti", "nvidia-cuda-cupti"),
        ("libcurand", "nvidia-curand"),
        ("libcusolver", "nvidia-cusolver"),
        ("libcusparseLt", "nvidia-cusparselt-cu13"),
        ("libcusparse", "nvidia-cusparse"),
        ("libnccl", "nvidia-nccl-cu13"),
        ("libnvJitLink", "nvidia-nvjitlink"),
        ("libnvrtc", "nvidia-cuda-nvrtc"),
        ("libnvshmem", "nvidia-nvshmem-cu13"),
        ("libtorch", "torch"),
        ("libc10", "torch"),
    ];
    WHEELS.iter().find(|(name, _)| library.starts_with(name)).map(|(_, wheel)| *wheel)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(driver: Result<((u32, u32), u32), nccl_rs::Error>) -> Seen {
        Seen { has_file: true, driver, built_for: (13, 0), visible: None }
    }

    fn absent() -> nccl_rs::Error {
        nccl_rs::Error::Absent { library: "libcuda.so.1", tried: "libcuda.so.1: cannot open shared object file".into() }
    }

    fn cuda(code: i32) -> nccl_rs::Error {
        nccl_rs::Error::Cuda { call: "cuInit", code, text: "as the driver says".into() }
    }

    #[test]
    fn what_is_missing_of_a_gpu_is_told_from_what_is_too_old() {
        assert_eq!(judge(seen(Ok(((13, 1), 2)))), Ok(()));
        assert_eq!(judge(Seen { built_for: (13, 2), ..seen(Ok(((13, 0), 1))) }), Ok(()), "a major version runs its minor ones");
        assert_eq!(judge(Seen { has_file: false, ..seen(Err(absent())) }), Err(Unusable::Nothing));
        assert_eq!(judge(Seen { has_file: false, ..seen(Err(cuda(100))) }), Err(Unusable::Nothing));
        // No file, as under Windows, but a GPU all the same.
        assert_eq!(judge(Seen { has_file: false, ..seen(Ok(((13, 0), 1))) }), Ok(()));
        let said = |seen: Seen| judge(seen).unwrap_err().to_string();
        for (seen, words) in [
            (seen(Err(absent())), &["libcuda.so.1: cannot open", "--gpus all"][..]),
            (seen(Ok(((12, 4), 1))), &["runs CUDA 12.4", "built for CUDA 13.0", "driver 580 or newer"]),
            (seen(Ok(((13, 0), 0))), &["finds no GPU: "]),
            (Seen { visible: Some("7".into()), ..seen(Err(cuda(100))) }, &["CUDA_VISIBLE_DEVICES is \"7\""]),
            (seen(Err(cuda(803))), &["cuInit: CUDA driver error 803", "two versions"]),
            (seen(Err(cuda(802))), &["nvidia-fabricmanager"]),
            (seen(Err(cuda(999))), &["nvidia-smi", "nvrm"]),
        ] {
            let text = said(seen);
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    }

    #[test]
    fn the_wheel_says_which_cuda_it_was_built_with() {
        assert_eq!(built_for("debug = False\ncuda: Optional[str] = '12.8'\n"), (12, 8));
        assert_eq!(built_for("cuda: Optional[str] = None\n"), (13, 0));
        let real = crate::device::libtorch_folder().map(|folder| std::fs::read_to_string(folder.join("../version.py")));
        if let Some(Ok(real)) = real {
            assert_eq!(built_for(&real).0, 13);
        }
    }

    #[test]
    fn a_cpu_build_is_told_before_anything_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(has_cuda(folder.path()), Ok(()), "no libtorch is known of");
        std::fs::write(folder.path().join("libtorch_cpu.so"), "").unwrap();
        let text = has_cuda(folder.path()).unwrap_err().to_string();
        assert!(text.contains("libtorch_cuda.so cannot be loaded") && text.contains("libtorch here is the CPU build"), "{text}");
        std::fs::write(folder.path().join("libtorch_cuda.so"), "").unwrap();
        assert_eq!(has_cuda(folder.path()), Ok(()));
    }

    #[test]
    fn a_library_that_is_missing_is_named_with_what_brings_it() {
        let said = |library: &str, said: &str| not_loaded(Path::new(library), said).to_string();
        let missing = "libcudnn.so.9: cannot open shared object file: No such file or directory";
        let text = said("/x/torch/lib/libtorch_cuda.so", missing);
        assert!(text.contains("libtorch_cuda.so cannot be loaded (libcudnn.so.9: ") && text.contains("wheel nvidia-cudnn-cu13"), "{text}");
        let cpu = "/x/torch/lib/libtorch_cuda.so: cannot open shared object file: No such file or directory";
        assert!(said("/x/torch/lib/libtorch_cuda.so", cpu).contains("the CPU build"));
        let mixed = "/x/torch/lib/libtorch_cuda.so: undefined symbol: _ZN3c104cuda";
        assert!(said("/x/torch/lib/libtorch_cuda.so", mixed).contains("one wheel's versions"));
        let other = "libodd.so.3: cannot open shared object file: No such file or directory";
        assert!(said("/x/libtorch_cuda.so", other).contains("install what brings libodd.so.3"));
        assert_eq!(
            (wheel_of("libcusparseLt.so.0"), wheel_of("libcusparse.so.12")),
            (Some("nvidia-cusparselt-cu13"), Some("nvidia-cusparse"))
        );
    }
}
