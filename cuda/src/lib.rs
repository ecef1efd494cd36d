//! What libtorch's C interface lacks: operators fused for a frozen U-Net, and on a GPU streams, events, graphs and the allocator.
//!
//! Two parts. The operators, libtorch's global choices ([`precision`]) and its profiler ([`profile`]) are linked into every binary. Whatever calls
//! CUDA is a library of its own (`cpp/gpu.cpp`), since it needs libtorch's CUDA part, which may be missing: it is compiled in every build, carried
//! inside the binary, and loaded by [`load`] once libtorch's CUDA part is there. Without it [`stream`], [`graph`] and [`memory`] say so.
//!
//! The kernels (`kernels.h`, `few_keys.h` and `pixels.h` in `cpp`) are one text for two compilers: NVRTC makes GPU code of it at start, and the C++
//! compiler functions for the processor, by which they are tested where there is no GPU, and against which a GPU's are tried when they are loaded.

mod agreement;
mod error;
pub mod fused;
mod gpu;
pub mod graph;
pub mod memory;
mod nvrtc;
mod ops;
pub mod precision;
pub mod profile;
pub mod resize;
pub mod speed;
pub mod stream;

pub use error::Error;
pub use gpu::{is_loaded, load, said};

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;
