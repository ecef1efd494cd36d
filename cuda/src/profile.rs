//! What libtorch's profiler saw: operators on the processor, kernels on a GPU.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::{Result, gpu, ops};

/// One operator or kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name; a kernel's with its C++ template arguments.
    pub name: String,
    /// Whether it ran on a GPU.
    pub on_device: bool,
    /// When it began, in microseconds of a clock that all of them share.
    pub start_us: f64,
    /// How long it took, in microseconds.
    pub duration_us: f64,
}

/// Runs `work` and tells what ran meanwhile. Operators hold the time of those that they call. Wait for the device inside `work`, or its last kernels are
/// missing.
///
/// # Errors
/// What `work` returns; the profiler's own.
pub fn profile<T, E: From<crate::Error>>(work: impl FnOnce() -> std::result::Result<T, E>) -> std::result::Result<(T, Vec<Event>), E> {
    // SAFETY: takes a number.
    ops::check(unsafe { ops::ella_profile_begin(gpu::is_loaded().into()) })?;
    let result = work();
    let events = end();
    Ok((result?, events?))
}

fn end() -> Result<Vec<Event>> {
    let mut events = Vec::new();
    // SAFETY: `each` is called during this call only, with this vector, which nobody else has meanwhile.
    ops::check(unsafe { ops::ella_profile_end((&raw mut events).cast(), each) })?;
    Ok(events)
}

extern "C" fn each(user: *mut c_void, name: *const c_char, on_device: c_int, start_ns: u64, duration_ns: u64) {
    // SAFETY: `user` is the vector that `end` gave, and `name` a C string that lives through the call.
    let (events, name) = unsafe { (&mut *user.cast::<Vec<Event>>(), CStr::from_ptr(name)) };
    let micros = |ns: u64| ns as f64 / 1000.0;
    let name = name.to_string_lossy().into_owned();
    events.push(Event { name, on_device: on_device != 0, start_us: micros(start_ns), duration_us: micros(duration_ns) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn operators_are_seen_by_name() {
        let a = Tensor::ones([64, 64], (Kind::Float, Device::Cpu));
        let (product, events) = profile(|| Ok::<_, crate::Error>(a.matmul(&a))).unwrap();
        assert_eq!(product.double_value(&[0, 0]), 64.0);
        let seen = events.iter().find(|event| event.name == "aten::mm").expect("a product of matrices");
        assert!(!seen.on_device && seen.duration_us > 0.0);
        let failed = profile(|| Err::<(), _>(crate::Error("no".into()))).unwrap_err();
        assert_eq!(failed.to_string(), "no");
    }
}
