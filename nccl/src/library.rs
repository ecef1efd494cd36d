//! NCCL as a loaded library: finding it, its version, and identifiers of communicators.

use std::ffi::c_int;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::Error;
use crate::sys::{self, Comm, Nccl, RawId};

/// A loaded NCCL. Cheap to clone; never unloaded, since NCCL leaves threads behind that run its code.
#[derive(Clone)]
pub struct Library(Arc<Nccl>);

impl Library {
    /// Loads `libnccl.so.2` from the first of the folders `search` that has it (a torch wheel brings `nvidia/nccl/lib`), else
    /// from where the system's loader looks.
    ///
    /// # Errors
    /// [`Error::Absent`] with every path tried; [`Error::Symbol`] when what was found is too old.
    pub fn load(search: &[PathBuf]) -> Result<Self, Error> {
        let mut candidates: Vec<PathBuf> = search.iter().map(|folder| folder.join(Nccl::LIBRARY)).collect();
        candidates.extend([PathBuf::from(Nccl::LIBRARY), PathBuf::from("libnccl.so")]);
        let opened = std::mem::ManuallyDrop::new(sys::open(Nccl::LIBRARY, &candidates)?);
        Ok(Self(Arc::new(Nccl::load(&opened)?)))
    }

    /// The version of the library that was loaded.
    ///
    /// # Errors
    /// [`Error::Nccl`].
    pub fn version(&self) -> Result<Version, Error> {
        let mut code: c_int = 0;
        // SAFETY: the pointer is to a live integer, which the call fills.
        let result = unsafe { (self.0.get_version)(&raw mut code) };
        self.check("ncclGetVersion", result, std::ptr::null_mut())?;
        Ok(Version::from_code(code))
    }

    /// Makes an identifier for a new communicator. One rank makes it, and all ranks initialise with it; that rank must live until they have.
    ///
    /// # Errors
    /// [`Error::Nccl`], for instance where no network interface can be used.
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut id = RawId([0; 128]);
        // SAFETY: the pointer is to 128 live bytes, which the call fills.
        let result = unsafe { (self.0.get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", result, std::ptr::null_mut())?;
        Ok(UniqueId(id.0))
    }

    #[cfg(test)]
    pub(crate) fn of(table: Nccl) -> Self {
        Self(Arc::new(table))
    }

    pub(crate) fn table(&self) -> &Nccl {
        &self.0
    }

    /// Turns a result code into an error with NCCL's own text. "In progress" is not an error: what was begun is polled.
    /// `comm` is null or a communicator that is alive.
    pub(crate) fn check(&self, call: &'static str, code: c_int, comm: Comm) -> Result<(), Error> {
        if code == sys::SUCCESS || code == sys::IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both take any value of the caller's contract and return a string of the library's, or null.
        let (text, detail) = unsafe { ((self.0.get_error_string)(code), (self.0.get_last_error)(comm)) };
        Err(Error::Nccl { call, code, text: sys::text(text), detail: sys::text(detail) })
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Library").field(&Nccl::LIBRARY).finish()
    }
}

/// The 128 bytes by which the ranks of one communicator find each other. Whoever has them can join: treat them as a secret of the run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; 128]);

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}

/// A version of NCCL; they compare as one expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2, for years now.
    pub major: u32,
    /// 28 in 2.28.9.
    pub minor: u32,
    /// 9 in 2.28.9.
    pub patch: u32,
}

impl Version {
    /// `NCCL_VERSION` of `nccl.h`, read backwards: the scheme changed after 2.8.
    fn from_code(code: c_int) -> Self {
        let code = u32::try_from(code).unwrap_or(0);
        let unit = if code < 10_000 { 1_000 } else { 10_000 };
        Self { major: code / unit, minor: code % unit / 100, patch: code % 100 }
    }

    /// What is known to be wrong with this version for a run whose members come and go; none is the good answer.
    pub fn known_fault(self) -> Option<&'static str> {
        let at = |minor, patch| Self { major: 2, minor, patch };
        if self < at(18, 0) {
            Some("older than 2.18: lacks parts of non-blocking communicators")
        } else if self < at(26, 2) {
            Some("older than 2.26.2: an abort can hang for good")
        } else if (at(28, 3)..=at(28, 8)).contains(&self) {
            Some("2.28.3 to 2.28.8: an abort can hang for good")
        } else {
            None
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_library_is_named_with_every_path_tried() {
        let folder = PathBuf::from("/no/such/folder");
        match Library::load(std::slice::from_ref(&folder)) {
            Err(Error::Absent { library, tried }) => {
                assert_eq!(library, "libnccl.so.2");
                assert!(tried.contains("/no/such/folder/libnccl.so.2"), "{tried}");
            }
            // A machine with NCCL installed finds it after all, which is what the search is for.
            Ok(library) => assert!(library.version().is_ok()),
            Err(other) => panic!("expected Absent, found {other}"),
        }
    }

    #[test]
    fn version_codes_are_read_in_both_schemes() {
        assert_eq!(Version::from_code(22809).to_string(), "2.28.9");
        assert_eq!(Version::from_code(21805).to_string(), "2.18.5");
        assert_eq!(Version::from_code(2708).to_string(), "2.7.8");
        assert_eq!(Version::from_code(-1).to_string(), "0.0.0");
    }

    #[test]
    fn versions_whose_abort_hangs_are_known() {
        let fault = |code| Version::from_code(code).known_fault();
        assert!(fault(2708).is_some() && fault(22501).is_some());
        assert!(fault(22803).is_some() && fault(22808).is_some());
        assert!(fault(22602).is_none() && fault(22802).is_none() && fault(22809).is_none());
    }
}
