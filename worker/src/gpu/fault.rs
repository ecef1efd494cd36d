//! What went wrong on a GPU, told from the words of libtorch, cuBLAS, cuDNN, NCCL and the driver: an error of tch's carries no code.
//!
//! Two things must be told from all else. A GPU whose memory is full is as well as ever, and less work at once may fit. A GPU on which a
//! kernel has failed is of no more use to this process: CUDA answers every later call with the same error (a "sticky" one), whatever it is
//! asked. Such a process must end: it could neither train nor take part in a collective, and others would wait for it.

use std::fmt;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its memory is full.
    OutOfMemory,
    /// A kernel read, wrote or jumped where it must not, or found its input wrong.
    Program,
    /// Something between a program and hardware: the driver says no more.
    Launch,
    /// The device: its memory, its links, its bus.
    Hardware,
    /// The device is older, or newer, than what libtorch was built for.
    Generation,
}

/// Texts of the CUDA runtime (`cudaGetErrorString`), of libtorch's allocator, and of the kernel's log; the first that is found counts.
const TEXTS: [(&str, Fault); 35] = [
    ("CUDA out of memory", Fault::OutOfMemory),
    ("would exceed allowed memory", Fault::OutOfMemory),
    ("CUDA error: out of memory", Fault::OutOfMemory),
    ("CUDA driver error: out of memory", Fault::OutOfMemory),
    ("Cuda failure 2 'out of memory'", Fault::OutOfMemory),
    ("CUBLAS_STATUS_ALLOC_FAILED", Fault::OutOfMemory),
    ("CUDNN_STATUS_ALLOC_FAILED", Fault::OutOfMemory),
    ("DEVICE_ALLOCATION_FAILED", Fault::OutOfMemory),
    ("DefaultCPUAllocator: can't allocate memory", Fault::OutOfMemory),
    ("uncorrectable ECC error", Fault::Hardware),
    ("uncorrectable NVLink error", Fault::Hardware),
    ("fallen off the bus", Fault::Hardware),
    ("GPU is lost", Fault::Hardware),
    ("device is no longer available", Fault::Hardware),
    ("is/are busy or unavailable", Fault::Hardware),
    ("hardware stack error", Fault::Hardware),
    ("NVRM: Xid", Fault::Hardware),
    ("device-side assert", Fault::Program),
    ("illegal memory access", Fault::Program),
    ("illegal instruction was encountered", Fault::Program),
    ("misaligned address", Fault::Program),
    ("invalid program counter", Fault::Program),
    ("operation not supported on global/shared address space", Fault::Program),
    ("no kernel image is available", Fault::Generation),
    ("unspecified launch failure", Fault::Launch),
    ("launch timed out and was terminated", Fault::Launch),
    ("context is destroyed", Fault::Launch),
    ("CUDA error: unknown error", Fault::Launch),
    ("CUBLAS_STATUS_EXECUTION_FAILED", Fault::Launch),
    ("CUDNN_STATUS_EXECUTION_FAILED", Fault::Launch),
    ("CUDA driver error: unknown error", Fault::Launch),
    // NCCL's own, which may stand beside one of the above.
    ("Cuda failure 'out of memory'", Fault::OutOfMemory),
    ("Failed to CUDA calloc", Fault::OutOfMemory),
    ("Failed to CUDA malloc", Fault::OutOfMemory),
    // What libtorch says where no workspace of cuDNN's fits; of a shape that cuDNN does not take, it says the same.
    ("unable to find an engine to execute this computation", Fault::OutOfMemory),
];

impl Fault {
    /// What an error's text tells of, if it is one of these.
    pub fn of(error: &impl fmt::Display) -> Option<Self> {
        let text = error.to_string();
        TEXTS.iter().find(|(words, _)| text.contains(words)).map(|(_, fault)| *fault)
    }

    /// Whether this process can do nothing more on the device.
    pub fn ends_the_process(self) -> bool {
        self != Self::OutOfMemory
    }

    /// What to do.
    pub fn hint(self) -> &'static str {
        match self {
            Self::OutOfMemory => "use a smaller train.micro_batch, or train.gradient_checkpointing = true",
            Self::Program => {
                "a kernel was given what it cannot take: start again; if it comes again, start with CUDA_LAUNCH_BLOCKING=1, which names the kernel, \
                 and report it"
            }
            Self::Launch => "start again; if it comes again, look at the kernel's log (dmesg | grep Xid) and at nvidia-smi -q",
            Self::Hardware => "look at the kernel's log (dmesg | grep Xid) and at nvidia-smi -q; the GPU must be reset, or replaced",
            Self::Generation => "this libtorch has no kernels for this GPU: use another GPU, or a libtorch built for it",
        }
    }
}

/// The first line of an error of libtorch's: what follows is its own stack, of no use to anybody here.
pub fn first_line(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    let end = text.find("\nException raised from").or_else(|| text.find('\n')).unwrap_or(text.len());
    text[..end].trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    /// As torch 2.11 (`CUDACachingAllocator.cpp`, `CUDAException.cpp`), the CUDA 13 runtime and NCCL 2.28 say it.
    #[test]
    fn each_fault_is_known_by_its_words() {
        let wrapped = |text: &str| {
            format!("libtorch: Internal torch error: {text}\nException raised from malloc at x.cpp:1 (most recent call first):\n")
        };
        for (text, fault) in [
            (
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.06 GiB is free. Including \
                 non-PyTorch memory, this process has 78.12 GiB memory in use.",
                Fault::OutOfMemory,
            ),
            ("Allocation on device 0 would exceed allowed memory. (out of memory)", Fault::OutOfMemory),
            ("CUDA error: out of memory", Fault::OutOfMemory),
            ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Fault::OutOfMemory),
            ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", Fault::OutOfMemory),
            ("NCCL error 1: unhandled cuda error; Cuda failure 2 'out of memory'", Fault::OutOfMemory),
            ("CUDA error: device-side assert triggered", Fault::Program),
            ("CUDA error: an illegal memory access was encountered", Fault::Program),
            ("CUDA error: misaligned address", Fault::Program),
            ("CUDA error: unspecified launch failure", Fault::Launch),
            ("NCCL error 1: unhandled cuda error; Cuda failure 719 'unspecified launch failure'", Fault::Launch),
            ("CUDA error: the launch timed out and was terminated", Fault::Launch),
            ("CUDA error: unknown error", Fault::Launch),
            ("cuMemGetInfo: CUDA driver error 214: uncorrectable ECC error encountered", Fault::Hardware),
            ("CUDA error: uncorrectable NVLink error detected during the execution", Fault::Hardware),
            ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", Fault::Hardware),
            ("NVRM: Xid (PCI:0000:65:00): 79, GPU has fallen off the bus.", Fault::Hardware),
            ("the device is no longer available", Fault::Hardware),
            ("CUDA error: no kernel image is available for execution on the device", Fault::Generation),
        ] {
            assert_eq!(Fault::of(&wrapped(text)), Some(fault), "{text}");
            assert_eq!(fault.ends_the_process(), fault != Fault::OutOfMemory);
            assert!(!fault.hint().is_empty());
            assert_eq!(first_line(&wrapped(text)), format!("libtorch: Internal torch error: {text}"));
        }
        for other in ["shape '[3]' is invalid for input of size 4", "connection reset by peer", "out of memory bounds of a segment"] {
            assert_eq!(Fault::of(&other), None, "{other}");
        }
    }

    /// libtorch's real words, where they can be had without a GPU.
    #[test]
    fn memory_that_the_processor_has_not_is_known_from_libtorchs_own_error() {
        let error = Tensor::f_empty([1 << 50], (Kind::Float, Device::Cpu)).unwrap_err();
        assert_eq!(Fault::of(&error), Some(Fault::OutOfMemory), "{error}");
        let line = first_line(&error);
        assert!(line.contains("can't allocate memory") && !line.contains('\n'), "{line}");
    }

    #[test]
    fn a_full_gpu_is_known_from_libtorchs_own_error() {
        let device = match crate::device::set_up(ella_proto::config::Device::Cuda, 1) {
            Ok(device) => device,
            Err(error) => return println!("skipped: {error}"),
        };
        let error = Tensor::f_empty([1 << 45], (Kind::Float, device)).unwrap_err();
        assert_eq!(Fault::of(&error), Some(Fault::OutOfMemory), "{error}");
        assert!(crate::gpu::answers(device).is_ok() && crate::gpu::memory(device).is_some_and(|(free, total)| free <= total && free > 0));
    }
}
