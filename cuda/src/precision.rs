//! libtorch's global choices of how to compute. They hold for the whole process, and are made before anything is computed.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Result, ops};

static SEARCHES: AtomicBool = AtomicBool::new(false);

/// Whether products and convolutions of float32 numbers may be computed on a GPU in TF32: with 10 bits of fraction for 23. libtorch's own choice is yes for
/// convolutions and no for products.
///
/// # Errors
/// libtorch's own; the same for every function here.
pub fn set_tf32(on: bool) -> Result<()> {
    // SAFETY: takes a number.
    ops::check(unsafe { ops::ella_set_tf32(on.into()) })
}

/// Whether every operation gives the same bits each time. One that cannot is an error then. cuBLAS needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the
/// environment besides, from before its first use.
///
/// # Errors
/// See [`set_tf32`].
pub fn set_deterministic(on: bool) -> Result<()> {
    // SAFETY: takes a number.
    ops::check(unsafe { ops::ella_set_deterministic(on.into()) })
}

/// Whether cuDNN tries several algorithms for a new shape and keeps the fastest, and [`speed`](crate::speed) does so too: which one that is may differ from
/// one process to another. Not unless it is asked for.
///
/// # Errors
/// See [`set_tf32`].
pub fn set_benchmark(on: bool) -> Result<()> {
    SEARCHES.store(on, Ordering::Relaxed);
    // SAFETY: takes a number.
    ops::check(unsafe { ops::ella_set_benchmark(on.into()) })
}

/// What [`set_benchmark`] was told last.
#[must_use]
pub fn searches() -> bool {
    SEARCHES.load(Ordering::Relaxed)
}
