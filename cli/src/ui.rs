//! What people and scripts see: results, progress, errors, exit codes (design.md §6).

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use ella_coordinator::client::ClientError;
use ella_coordinator::credentials::CredentialError;
use ella_dataset::DataError;
use ella_dataset::scenes::ScenesError;
use ella_model::ModelError;
use ella_model::error::is_lasting;
use ella_proto::config::ConfigError;
use ella_proto::exit::Exit;
use ella_store::{LogError, StoreError};
use ella_worker::device::NoDevice;
use ella_worker::draw::NoiseError;
use ella_worker::feed::FeedError;
use ella_worker::grids::DrawError;
use ella_worker::job::JobError;
pub(crate) use ella_worker::meter::{Meter, note, plain};
use ella_worker::prepare::PrepareError;
use serde::Serialize;

/// Done.
pub(crate) const DONE: u8 = Exit::Done.code();
/// Failed; trying again may help.
pub(crate) const FAILED: u8 = Exit::Failed.code();
/// Bad usage or config.
pub(crate) const USAGE: u8 = Exit::Usage.code();
/// Preempted and resumable.
pub(crate) const PREEMPTED: u8 = Exit::Preempted.code();
/// Starting again would fail in the same way.
pub(crate) const NO_RETRY: u8 = Exit::NoRetry.code();

/// Why a command ends without its result, in one line, and the exit code that says so to scripts.
#[derive(Debug)]
pub(crate) struct Fail {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Fail {
    pub(crate) fn failed(message: impl Display) -> Self {
        Self { code: FAILED, message: message.to_string() }
    }

    pub(crate) fn usage(message: impl Display) -> Self {
        Self { code: USAGE, message: message.to_string() }
    }

    /// What is named is not there, or cannot be used: the same would fail again.
    pub(crate) fn lasting(message: impl Display) -> Self {
        Self { code: NO_RETRY, message: message.to_string() }
    }

    /// A file of this machine that could not be read or written.
    pub(crate) fn io(path: impl AsRef<std::path::Path>, action: &str, error: &std::io::Error) -> Self {
        let hint = "check the path, its permissions and free space";
        let message = format!("{}: cannot be {action} ({error}); {hint}", path.as_ref().display());
        // A file that is there where a folder is to be made stays there.
        Self { code: Exit::of(false, is_lasting(error) || error.kind() == ErrorKind::AlreadyExists).code(), message }
    }
}

/// Errors that tell by their type whose fault they are ([`Exit::of`]): of what was typed, or of what is there.
macro_rules! fail_from {
    ($($error:ty),+) => { $(impl From<$error> for Fail {
        fn from(error: $error) -> Self {
            Self { code: Exit::of(error.is_usage(), error.is_permanent()).code(), message: error.to_string() }
        }
    })+ };
}

fail_from!(ModelError, DataError, FeedError, PrepareError, DrawError);

/// Errors that may pass: libtorch's own.
macro_rules! failed_from {
    ($($error:ty),+) => { $(impl From<$error> for Fail {
        fn from(error: $error) -> Self {
            Self::failed(error)
        }
    })+ };
}

failed_from!(tch::TchError);

/// Errors of what was typed alone.
macro_rules! usage_from {
    ($($error:ty),+) => { $(impl From<$error> for Fail {
        fn from(error: $error) -> Self {
            Self::usage(error)
        }
    })+ };
}

usage_from!(CredentialError, ConfigError);

impl From<NoDevice> for Fail {
    fn from(error: NoDevice) -> Self {
        Self::lasting(error)
    }
}

impl From<StoreError> for Fail {
    fn from(error: StoreError) -> Self {
        DataError::from(error).into()
    }
}

impl From<JobError> for Fail {
    fn from(error: JobError) -> Self {
        Self { code: error.alone.code(), message: error.message }
    }
}

impl From<ClientError> for Fail {
    fn from(error: ClientError) -> Self {
        let usage = matches!(error, ClientError::BadUrl { .. });
        let permanent = matches!(error, ClientError::NoEntry { .. } | ClientError::Untrusted { .. });
        Self { code: Exit::of(usage, permanent).code(), message: error.to_string() }
    }
}

impl From<LogError> for Fail {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Store(error) => error.into(),
            LogError::Gap { .. } | LogError::Bad { .. } | LogError::Gone { .. } => Self::lasting(error),
            LogError::Superseded { .. } | LogError::Contended { .. } => Self::failed(error),
        }
    }
}

impl From<ScenesError> for Fail {
    fn from(error: ScenesError) -> Self {
        let (usage, permanent) = match &error {
            ScenesError::Setting { .. } => (true, true),
            ScenesError::Io { source, .. } => (false, is_lasting(source)),
            _ => (false, true),
        };
        Self { code: Exit::of(usage, permanent).code(), message: error.to_string() }
    }
}

impl From<NoiseError> for Fail {
    fn from(error: NoiseError) -> Self {
        match error {
            NoiseError::Size { .. } => Self::usage(format_args!("--size: {error}")),
            NoiseError::Shape { .. } => Self::lasting(error),
            NoiseError::Model(error) => error.into(),
        }
    }
}

/// How a command's result is given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    /// One JSON object on stdout, and nothing else there.
    pub(crate) json: bool,
}

impl Out {
    /// Gives the result: the object, or the text made for people.
    pub(crate) fn result(self, value: &impl Serialize, text: impl FnOnce() -> String) {
        let text = if self.json { serde_json::to_string(value).unwrap_or_default() } else { plain(&text()).into_owned() };
        if let Err(fail) = print(&text) {
            // Nothing is left to do but to give the result.
            ella_worker::leave(Self { json: false }.fail(&fail));
        }
    }

    /// Tells why there is no result, and gives the exit code.
    pub(crate) fn fail(self, fail: &Fail) -> u8 {
        let message = plain(&one_line(&fail.message)).into_owned();
        note(format_args!("ella: {message}"));
        if self.json {
            // It was said on stderr, and the code says more than that stdout took nothing.
            let _ = print(&serde_json::json!({ "error": message }).to_string());
        }
        fail.code
    }
}

/// Writes to stdout, to the end: what is in its buffer at the end of the process nobody would hear of.
pub(crate) fn print(text: &str) -> Result<(), Fail> {
    let mut stdout = std::io::stdout();
    match writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush()) {
        // Whoever closed stdout does not want to read it.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Fail::failed(format_args!("stdout: cannot be written ({error})"))),
        _ => Ok(()),
    }
}

/// A message without the pictures that parsers draw of their input, in one line.
pub(crate) fn one_line(text: &str) -> String {
    let drawn = |line: &str| line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start().starts_with('|');
    let lines: Vec<&str> = text.lines().filter(|line| !drawn(line.trim())).map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut message = String::new();
    for line in lines {
        if !message.is_empty() {
            message.push_str(if message.ends_with([':', ';', ',', '.']) { " " } else { ": " });
        }
        message.push_str(line);
    }
    message
}

/// A word as a shell takes it.
pub(crate) fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// A number of things for people: `1 term`, `2 terms`.
pub(crate) fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// A size for people.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let at = (n.max(1).ilog2() / 10).min(4) as usize;
    if at == 0 { format!("{n} bytes") } else { format!("{:.1} {}", n as f64 / 1024f64.powi(at as i32), units[at]) }
}

/// A time span for people.
pub(crate) fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parsers_drawing_is_left_out_of_the_line() {
        let text = "run.toml: TOML parse error at line 3, column 9\n  |\n3 | steps = \"many\"\n  |         ^^^^^^\ninvalid type: string, expected u64\n";
        assert_eq!(one_line(text), "run.toml: TOML parse error at line 3, column 9: invalid type: string, expected u64");
        assert_eq!(one_line("plain"), "plain");
    }

    #[test]
    fn what_would_fail_again_has_the_code_that_workers_have_for_it() {
        let (url, key, file) = (|| "file:///r".to_owned(), || "k".to_owned(), || "a.arrow".to_owned());
        let corrupt = || StoreError::Corrupt { url: url(), key: key(), expected: "1 byte".to_owned(), found: "2 bytes".to_owned() };
        let bad_url = || StoreError::BadUrl { url: url(), reason: "it is none".to_owned() };
        let cases: [(Fail, u8); 16] = [
            (corrupt().into(), NO_RETRY),
            (bad_url().into(), USAGE),
            (DataError::Store(corrupt()).into(), NO_RETRY),
            (DataError::SourceMissing { source_name: file() }.into(), NO_RETRY),
            (DataError::Crowded { file: file(), bytes: 2, limit: 1 }.into(), FAILED),
            (DataError::Setting { field: "resolution", rule: "a multiple of 8", found: "63".to_owned() }.into(), USAGE),
            (PrepareError::Data(DataError::SourceMissing { source_name: file() }).into(), NO_RETRY),
            (LogError::Gap { url: url(), file: key(), last: 3 }.into(), NO_RETRY),
            (LogError::Contended { url: url(), tries: 9 }.into(), FAILED),
            (ModelError::argument("steps", "1 to 1000", 1001).into(), USAGE),
            (ModelError::MissingFile { file: "nowhere".into(), expected: "a model".to_owned() }.into(), NO_RETRY),
            (Fail::io("nowhere", "read", &std::io::ErrorKind::NotFound.into()), NO_RETRY),
            (Fail::io("file", "made", &std::io::ErrorKind::AlreadyExists.into()), NO_RETRY),
            (Fail::io("full", "written", &std::io::ErrorKind::StorageFull.into()), FAILED),
            (Fail::io("locked", "written", &std::io::ErrorKind::PermissionDenied.into()), NO_RETRY),
            (Fail::io("locked", "written", &std::io::ErrorKind::ReadOnlyFilesystem.into()), NO_RETRY),
        ];
        for (fail, code) in cases {
            assert_eq!(fail.code, code, "{}", fail.message);
        }
    }

    #[test]
    fn a_command_that_is_shown_can_be_typed() {
        assert_eq!(["a/b-1.toml", "job \u{e9}.toml", "it's", ""].map(shell), ["a/b-1.toml", "'job \u{e9}.toml'", "'it'\\''s'", "''"]);
    }

    #[test]
    fn sizes_and_spans_read_well() {
        assert_eq!((bytes(0), bytes(1023), bytes(1536)), ("0 bytes".into(), "1023 bytes".into(), "1.5 KiB".into()));
        assert_eq!((span(0.25), span(61.2), span(7260.0)), ("0.2 s".into(), "1 min 01 s".into(), "2 h 01 min".into()));
    }
}
