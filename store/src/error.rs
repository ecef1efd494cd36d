//! The one error of store calls: variants by what the caller can do.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use crate::limits::Throttled;

/// A boxed cause.
pub(crate) type Source = Box<dyn Error + Send + Sync + 'static>;

/// What was being done to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Reading an object, whole, in part or as a stream.
    Get,
    /// Asking for an object's size.
    Head,
    /// Listing a folder.
    List,
    /// Writing an object, replacing what was there.
    Put,
    /// Writing an object only if it is absent.
    Create,
    /// Writing an object in several parts.
    Upload,
    /// Deleting an object.
    Delete,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "get",
            Self::Head => "head",
            Self::List => "list",
            Self::Put => "put",
            Self::Create => "create",
            Self::Upload => "upload",
            Self::Delete => "delete",
        })
    }
}

/// Why a store call failed. `url` is the folder's URL (never with credentials), `key` is relative to it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("{url}/{key}: not found; check the path, or that what writes it has finished")]
    NotFound {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
    },
    /// The object is there already, and must not be replaced.
    #[error("{url}/{key}: already exists; choose another name, or delete it first")]
    AlreadyExists {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
    },
    /// The store refuses: credentials, file permissions or a read-only file system.
    #[error("{url}/{key}: {operation} refused ({}); check the credentials, the bucket policy or the folder's permissions", chain(source.as_ref()))]
    Permission {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
        /// What was tried.
        operation: Operation,
        /// What the store said.
        source: Source,
    },
    /// The disk or the quota is full.
    #[error("{url}/{key}: no space left for {operation} ({}); free some space or choose another folder", chain(source.as_ref()))]
    NoSpace {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
        /// What was tried.
        operation: Operation,
        /// What the store said.
        source: Source,
    },
    /// No answer in time. The effect may have taken place, or may yet.
    #[error("{url}/{key}: {operation} got no answer within {after:?}; check the network and the store")]
    Timeout {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
        /// What was tried.
        operation: Operation,
        /// How long was waited.
        after: Duration,
    },
    /// The store or the way to it fails for now: connection lost, throttled, server error.
    #[error("{url}/{key}: {operation} failed for now ({}); try again later", chain(source.as_ref()))]
    Unavailable {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
        /// What was tried.
        operation: Operation,
        /// What the store said.
        source: Source,
    },
    /// The object is not what was recorded.
    #[error("{url}/{key}: corrupt (expected {expected}, found {found}); restore it from a copy, or write it anew")]
    Corrupt {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
        /// What was recorded: a digest or a size.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The store, or this build, cannot do it.
    #[error("{url}: {what}")]
    Unsupported {
        /// The folder.
        url: String,
        /// What cannot be done, and what to do instead.
        what: String,
    },
    /// The URL does not name a folder in a store.
    #[error("{url}: {reason}")]
    BadUrl {
        /// The URL, without credentials.
        url: String,
        /// What is wrong with it, and what is right.
        reason: String,
    },
    /// The key cannot name an object.
    #[error("{url}/{key}: not a valid object name ({reason}); use names joined by single slashes")]
    BadKey {
        /// The folder.
        url: String,
        /// The key given.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Anything else; repeating will not help.
    #[error("{url}/{key}: {operation} failed ({})", chain(source.as_ref()))]
    Other {
        /// The folder.
        url: String,
        /// The object in it.
        key: String,
        /// What was tried.
        operation: Operation,
        /// What the store said.
        source: Source,
    },
}

impl StoreError {
    /// Whether the same call may succeed if repeated.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Unavailable { .. })
    }

    /// Whether starting again later would fail in the same way. A full disk may have room by then.
    pub fn is_permanent(&self) -> bool {
        !self.is_retryable() && !matches!(self, Self::NoSpace { .. })
    }

    /// How long the store asks to be left alone (`Retry-After`).
    pub fn retry_after(&self) -> Option<Duration> {
        let Self::Unavailable { source, .. } = self else { return None };
        causes(source.as_ref()).find_map(|cause| Some(cause.downcast_ref::<Throttled>()?.after))
    }

    /// Whether no connection could be made at all: the address may be wrong.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unavailable { source, .. } if refuses_connections(source.as_ref()))
    }

    /// The variant's name, for counters and tests.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not found",
            Self::AlreadyExists { .. } => "already exists",
            Self::Permission { .. } => "permission",
            Self::NoSpace { .. } => "no space",
            Self::Timeout { .. } => "timeout",
            Self::Unavailable { .. } => "unavailable",
            Self::Corrupt { .. } => "corrupt",
            Self::Unsupported { .. } => "unsupported",
            Self::BadUrl { .. } => "bad url",
            Self::BadKey { .. } => "bad key",
            Self::Other { .. } => "other",
        }
    }
}

const NO_BUCKET: &str = "the bucket or container does not exist; create it first, or correct the URL";
/// Where the clouds give credentials to their own machines.
const METADATA_HOSTS: [&str; 3] = ["169.254.169.254", "169.254.170.2", "metadata.google.internal"];

/// Where and what a call was, to make its error from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) url: &'a str,
    pub(crate) key: &'a str,
    pub(crate) operation: Operation,
}

impl Place<'_> {
    /// Sorts a backend's error by what the caller can do about it.
    pub(crate) fn error(&self, error: object_store::Error) -> StoreError {
        use object_store::Error as E;
        let (url, key, operation) = (self.url.to_owned(), self.key.to_owned(), self.operation);
        match error {
            E::NotFound { .. } if matches!(operation, Operation::Get | Operation::Head | Operation::Delete) => {
                StoreError::NotFound { url, key }
            }
            E::NotFound { .. } => StoreError::BadUrl { url, reason: NO_BUCKET.into() },
            E::AlreadyExists { .. } => StoreError::AlreadyExists { url, key },
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => StoreError::Permission { url, key, operation, source: error.into() },
            E::NotImplemented { .. } | E::NotSupported { .. } => {
                StoreError::Unsupported { url, what: format!("the store does not offer {operation} of {key}: {error}; use another store") }
            }
            E::InvalidPath { source } => StoreError::BadKey { url, key, reason: source.to_string() },
            E::UnknownConfigurationKey { .. } => StoreError::BadUrl { url, reason: error.to_string() },
            E::Precondition { .. } | E::NotModified { .. } => self.replaced(),
            other => self.other(other),
        }
    }

    fn other(&self, error: object_store::Error) -> StoreError {
        let (class, text) = (classify(&error), chain(&error));
        if text.contains("URL scheme is not allowed") {
            let reason = "the endpoint is http://, which is not encrypted; if that is meant, set AWS_ALLOW_HTTP=true (AZURE_…, GOOGLE_…)";
            return StoreError::BadUrl { url: self.url.into(), reason: reason.into() };
        }
        // A folder that is not there lists nothing.
        if self.operation == Operation::List && text.contains("404 Not Found") {
            return StoreError::BadUrl { url: self.url.into(), reason: NO_BUCKET.into() };
        }
        if !METADATA_HOSTS.iter().any(|host| text.contains(host)) {
            return self.sort(class, error.into());
        }
        // Without keys in the environment the client asks the machine's own cloud, which few machines have.
        let class = if class == Class::Other { Class::Permission } else { class };
        self.sort(class, format!("no credentials are set, and the machine's cloud gave none: {text}").into())
    }

    /// The object is another than when its reading began.
    pub(crate) fn replaced(&self) -> StoreError {
        self.corrupt("an object that does not change".into(), "one replaced while it was read".into())
    }

    /// The object is not what was recorded.
    pub(crate) fn corrupt(&self, expected: String, found: String) -> StoreError {
        StoreError::Corrupt { url: self.url.into(), key: self.key.into(), expected, found }
    }

    /// The same for a file's error.
    pub(crate) fn io(&self, error: io::Error) -> StoreError {
        self.sort(classify_io(&error), error.into())
    }

    /// No answer within `after`.
    pub(crate) fn timeout(&self, after: Duration) -> StoreError {
        StoreError::Timeout { url: self.url.into(), key: self.key.into(), operation: self.operation, after }
    }

    /// The store fails for now, in our words.
    pub(crate) fn unavailable(&self, why: &str) -> StoreError {
        self.sort(Class::Unavailable, why.to_owned().into())
    }

    fn sort(&self, class: Class, source: Source) -> StoreError {
        let (url, key, operation) = (self.url.to_owned(), self.key.to_owned(), self.operation);
        match class {
            Class::NotFound => StoreError::NotFound { url, key },
            Class::Permission => StoreError::Permission { url, key, operation, source },
            Class::NoSpace => StoreError::NoSpace { url, key, operation, source },
            Class::Unavailable => StoreError::Unavailable { url, key, operation, source },
            Class::Other => StoreError::Other { url, key, operation, source },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    NotFound,
    Permission,
    NoSpace,
    Unavailable,
    Other,
}

/// An error and its causes.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Whether a request is one that the client refuses to send, or that redirects lead nowhere.
#[cfg(feature = "cloud")]
fn is_never_sent(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(|error| error.downcast_ref::<reqwest::Error>().is_some_and(|error| error.is_builder() || error.is_redirect()))
}

#[cfg(feature = "cloud")]
fn refuses_connections(error: &(dyn Error + 'static)) -> bool {
    use object_store::client::{HttpError, HttpErrorKind};
    causes(error).any(|error| error.downcast_ref::<HttpError>().is_some_and(|error| error.kind() == HttpErrorKind::Connect))
}

#[cfg(not(feature = "cloud"))]
fn refuses_connections(_: &(dyn Error + 'static)) -> bool {
    false
}

/// Looks through the causes: a file error, a connection error, or a server's status.
fn classify(error: &(dyn Error + 'static)) -> Class {
    for error in causes(error) {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return classify_io(io);
        }
        #[cfg(feature = "cloud")]
        if error.downcast_ref::<object_store::client::HttpError>().is_some() {
            return if is_never_sent(error) { Class::Other } else { Class::Unavailable };
        }
    }
    classify_text(&chain(error))
}

fn classify_io(error: &io::Error) -> Class {
    use io::ErrorKind as K;
    match error.kind() {
        K::NotFound => Class::NotFound,
        K::PermissionDenied | K::ReadOnlyFilesystem => Class::Permission,
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => Class::NoSpace,
        K::Interrupted | K::TimedOut | K::ResourceBusy | K::StaleNetworkFileHandle | K::WouldBlock => Class::Unavailable,
        K::ConnectionReset | K::ConnectionAborted | K::ConnectionRefused | K::NotConnected | K::BrokenPipe | K::UnexpectedEof => {
            Class::Unavailable
        }
        _ => Class::Other,
    }
}

/// The client library keeps the type that carries the status private, so its text is read; a test against a real exchange pins the wording.
fn classify_text(text: &str) -> Class {
    // A 200 whose body says InternalError or SlowDown; and S3's 400 for a body that came too slowly.
    if text.contains("Server returned error response") || text.contains("<Code>RequestTimeout</Code>") {
        return Class::Unavailable;
    }
    let status = text.split("status code: ").nth(1).and_then(|rest| rest.get(..3)).and_then(|digits| digits.parse::<u16>().ok());
    match status {
        Some(507) => Class::NoSpace,
        Some(408 | 429 | 500..) => Class::Unavailable,
        _ => Class::Other,
    }
}

/// An error with its causes in one line, each said once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    causes(error).map(ToString::to_string).fold(String::new(), |text, more| match text.contains(&more) {
        _ if text.is_empty() => more,
        true => text,
        false => format!("{text}: {more}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(text: &'static str) -> StoreError {
        let place = Place { url: "s3://b/run", key: "k", operation: Operation::Put };
        place.error(object_store::Error::Generic { store: "S3", source: text.into() })
    }

    #[test]
    fn missing_credentials_are_a_refusal_that_says_so() {
        let error =
            sorted("Error performing PUT http://169.254.169.254/latest/api/token - Server returned non-2xx status code: 403: denied");
        assert_eq!(error.kind(), "permission");
        assert!(error.to_string().contains("no credentials are set"), "{error}");
        assert!(sorted("GET http://169.254.169.254/ - Server returned non-2xx status code: 503: ").is_retryable());
    }

    #[test]
    fn a_bucket_that_is_not_there_says_so_whatever_is_asked_of_it() {
        let text = "Error performing GET http://s3/b?list-type=2 - Server returned non-2xx status code: 404 Not Found: <?xml version=";
        let place = Place { url: "s3://b/run", key: "log/", operation: Operation::List };
        let error = place.error(object_store::Error::Generic { store: "S3", source: text.into() });
        assert_eq!((error.kind(), error.is_permanent()), ("bad url", true));
        assert!(error.to_string().contains("does not exist"), "{error}");
    }

    #[test]
    fn file_errors_are_sorted_by_what_can_be_done() {
        use io::ErrorKind as K;
        for (kind, expected) in [
            (K::StorageFull, "no space"),
            (K::QuotaExceeded, "no space"),
            (K::ReadOnlyFilesystem, "permission"),
            (K::PermissionDenied, "permission"),
            (K::NotFound, "not found"),
            (K::StaleNetworkFileHandle, "unavailable"),
            (K::NotADirectory, "other"),
        ] {
            let place = Place { url: "/run", key: "log/0", operation: Operation::Create };
            let error = place.error(object_store::Error::Generic { store: "file", source: io::Error::from(kind).into() });
            assert_eq!(error.kind(), expected, "{error}");
            assert_eq!(error.kind(), place.io(kind.into()).kind());
            assert_eq!(error.is_permanent(), !matches!(expected, "no space" | "unavailable"), "{error}");
            assert!(error.to_string().starts_with("/run/log/0: "), "{error}");
        }
    }
}
