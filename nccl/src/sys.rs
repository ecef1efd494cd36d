//! The C interfaces, as far as they are used: types, constants, and the tables of functions that are filled at run time.
//! Layouts and values are those of `nccl.h` 2.28.9 and `cuda.h` 13.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::Error;

/// `ncclComm_t`.
pub(crate) type Comm = *mut c_void;
/// `cudaStream_t` and `CUstream`: one type under two names.
pub(crate) type Stream = *mut c_void;

/// `ncclSuccess` and `CUDA_SUCCESS`.
pub(crate) const SUCCESS: c_int = 0;
/// `ncclInProgress`: the call goes on in the background.
pub(crate) const IN_PROGRESS: c_int = 7;
/// `ncclSum`.
pub(crate) const SUM: c_int = 0;
/// `CUDA_ERROR_NOT_READY`: the event has not happened yet.
pub(crate) const NOT_READY: c_int = 600;
/// `CU_EVENT_DEFAULT`: an event that keeps its time.
pub(crate) const EVENT_TIMED: c_uint = 0;
/// `CU_DEVICE_ATTRIBUTE_…`.
pub(crate) const MULTIPROCESSORS: c_int = 16;
pub(crate) const CAPABILITY_MAJOR: c_int = 75;
pub(crate) const CAPABILITY_MINOR: c_int = 76;
/// `CU_STREAM_NON_BLOCKING`: a stream that the legacy default stream does not wait for, and the other way round.
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;

/// `NCCL_CONFIG_UNDEF_INT`: leave this setting to NCCL.
const UNDEFINED: c_int = c_int::MIN;

/// `ncclUniqueId`, passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RawId(pub(crate) [u8; 128]);

/// `ncclConfig_t` of 2.28. NCCL copies as much as it knows of a longer or shorter one, by the size and version inside.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

impl Config {
    /// `NCCL_CONFIG_INITIALIZER` with `blocking = 0`.
    pub(crate) fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 22809,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: std::ptr::null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
            channels_per_net_peer: UNDEFINED,
            nvlink_centric_sched: UNDEFINED,
        }
    }
}

/// Declares a table of C functions, filled from a loaded library by name.
macro_rules! table {
    ($(#[$doc:meta])* $table:ident of $library:literal { $($field:ident = $symbol:literal($($arg:ty),*) -> $result:ty;)* }) => {
        $(#[$doc])*
        pub(crate) struct $table {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> $result,)*
        }

        impl $table {
            /// The file name by which the library is asked for.
            pub(crate) const LIBRARY: &'static str = $library;

            /// Looks up every function, so that a library that lacks one is refused at once.
            pub(crate) fn load(library: &libloading::Library) -> Result<Self, Error> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is the one that the library's own header declares for this name, in every version that has it.
                        let symbol = unsafe { library.get($symbol) };
                        *symbol.map_err(|source| Error::Symbol { library: Self::LIBRARY, symbol: $symbol, source })?
                    },)*
                })
            }
        }
    };
}

table! {
    /// The functions of NCCL.
    Nccl of "libnccl.so.2" {
        get_version = "ncclGetVersion"(*mut c_int) -> c_int;
        get_unique_id = "ncclGetUniqueId"(*mut RawId) -> c_int;
        comm_init_rank_config = "ncclCommInitRankConfig"(*mut Comm, c_int, RawId, c_int, *mut Config) -> c_int;
        comm_get_async_error = "ncclCommGetAsyncError"(Comm, *mut c_int) -> c_int;
        comm_abort = "ncclCommAbort"(Comm) -> c_int;
        comm_finalize = "ncclCommFinalize"(Comm) -> c_int;
        comm_destroy = "ncclCommDestroy"(Comm) -> c_int;
        all_reduce = "ncclAllReduce"(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
        broadcast = "ncclBroadcast"(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
        get_error_string = "ncclGetErrorString"(c_int) -> *const c_char;
        get_last_error = "ncclGetLastError"(Comm) -> *const c_char;
    }
}

/// A table for tests, of which an abort alone may be called.
#[cfg(test)]
pub(crate) fn fake(comm_abort: unsafe extern "C" fn(Comm) -> c_int) -> Nccl {
    macro_rules! never {
        ($($ty:ty),* => $result:ty) => {{
            unsafe extern "C" fn never($(_: $ty),*) -> $result {
                unreachable!("a test calls nothing but the abort")
            }
            never
        }};
    }
    Nccl {
        get_version: never!(*mut c_int => c_int),
        get_unique_id: never!(*mut RawId => c_int),
        comm_init_rank_config: never!(*mut Comm, c_int, RawId, c_int, *mut Config => c_int),
        comm_get_async_error: never!(Comm, *mut c_int => c_int),
        comm_abort,
        comm_finalize: never!(Comm => c_int),
        comm_destroy: never!(Comm => c_int),
        all_reduce: never!(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream => c_int),
        broadcast: never!(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream => c_int),
        get_error_string: never!(c_int => *const c_char),
        get_last_error: never!(Comm => *const c_char),
    }
}

table! {
    /// The functions of the CUDA driver.
    Cuda of "libcuda.so.1" {
        init = "cuInit"(c_uint) -> c_int;
        driver_version = "cuDriverGetVersion"(*mut c_int) -> c_int;
        memory = "cuMemGetInfo_v2"(*mut usize, *mut usize) -> c_int;
        device_count = "cuDeviceGetCount"(*mut c_int) -> c_int;
        device_get = "cuDeviceGet"(*mut c_int, c_int) -> c_int;
        device_uuid = "cuDeviceGetUuid_v2"(*mut [u8; 16], c_int) -> c_int;
        device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int) -> c_int;
        device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int) -> c_int;
        primary_retain = "cuDevicePrimaryCtxRetain"(*mut *mut c_void, c_int) -> c_int;
        set_current = "cuCtxSetCurrent"(*mut c_void) -> c_int;
        event_create = "cuEventCreate"(*mut *mut c_void, c_uint) -> c_int;
        event_record = "cuEventRecord"(*mut c_void, Stream) -> c_int;
        event_query = "cuEventQuery"(*mut c_void) -> c_int;
        event_elapsed = "cuEventElapsedTime"(*mut f32, *mut c_void, *mut c_void) -> c_int;
        event_destroy = "cuEventDestroy_v2"(*mut c_void) -> c_int;
        stream_priorities = "cuCtxGetStreamPriorityRange"(*mut c_int, *mut c_int) -> c_int;
        stream_create = "cuStreamCreateWithPriority"(*mut Stream, c_uint, c_int) -> c_int;
        stream_wait = "cuStreamWaitEvent"(Stream, *mut c_void, c_uint) -> c_int;
        stream_destroy = "cuStreamDestroy_v2"(Stream) -> c_int;
        error_string = "cuGetErrorString"(c_int, *mut *const c_char) -> c_int;
    }
}

/// Opens the first of `candidates` that the loader accepts.
pub(crate) fn open(library: &'static str, candidates: &[std::path::PathBuf]) -> Result<libloading::Library, Error> {
    let mut tried = Vec::new();
    for path in candidates {
        // SAFETY: opening runs the library's initialisers. NCCL and the driver are libraries made to be opened this way, and
        // their initialisers ask nothing of the program. What lies under the name is the installer's word, as with any linked library.
        match unsafe { libloading::Library::new(path) } {
            Ok(opened) => return Ok(opened),
            Err(e) => tried.push(reason(&e)),
        }
    }
    Err(Error::Absent { library, tried: tried.join("; ") })
}

/// The loader's own words, which name the path: the error itself only says that the loader failed.
fn reason(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// Copies a C string that the library owns; empty when there is none.
pub(crate) fn text(chars: *const c_char) -> String {
    if chars.is_null() {
        return String::new();
    }
    // SAFETY: not null, and both libraries return strings that end in a zero and live as long as the library, or until this
    // thread's next call into it.
    unsafe { std::ffi::CStr::from_ptr(chars) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn config_has_the_layout_of_nccl_2_28() {
        // As a C compiler lays out ncclConfig_v22800.
        assert_eq!(size_of::<Config>(), 80);
        assert_eq!(offset_of!(Config, magic), 8);
        assert_eq!(offset_of!(Config, version), 12);
        assert_eq!(offset_of!(Config, blocking), 16);
        assert_eq!(offset_of!(Config, net_name), 32);
        assert_eq!(offset_of!(Config, split_share), 40);
        assert_eq!(offset_of!(Config, traffic_class), 44);
        assert_eq!(offset_of!(Config, comm_name), 48);
        assert_eq!(offset_of!(Config, collnet_enable), 56);
        assert_eq!(offset_of!(Config, nvlink_centric_sched), 76);
        let config = Config::non_blocking();
        assert_eq!((config.size, config.magic, config.version, config.blocking), (80, 0xcafe_beef, 22809, 0));
    }

    #[test]
    fn a_library_without_the_functions_is_refused_by_name() {
        let libc = open("libc.so.6", &["libc.so.6".into()]).expect("every Linux has it");
        let refused = Nccl::load(&libc).err().expect("libc is not NCCL").to_string();
        assert!(refused.contains("libnccl.so.2") && refused.contains("ncclGetVersion"), "{refused}");
    }
}
