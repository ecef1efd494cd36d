//! One error for all of C++: its text.

use std::ffi::{CStr, c_char, c_int};

/// What libtorch or CUDA said.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub(crate) String);

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self(error.to_string())
    }
}

/// The error of a function that returned `code`, if it failed; `text` gives its words.
pub(crate) fn check(code: c_int, text: unsafe extern "C" fn() -> *const c_char) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(told(text)) }
}

/// The words of what failed last on this thread.
pub(crate) fn told(text: unsafe extern "C" fn() -> *const c_char) -> Error {
    // SAFETY: takes nothing, and returns a C string that lives until this thread's next call.
    let words = unsafe { CStr::from_ptr(text()) };
    Error(words.to_string_lossy().into_owned())
}

/// The loader's own words, which name the path: the error itself only says that the loader failed.
pub(crate) fn reason(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}
