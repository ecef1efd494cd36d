//! A secret in a file, which is read again as it changes: a projected service account's token is replaced every hour or so.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tonic::metadata::{Ascii, MetadataValue};

/// What can't be guessed has at least so many bytes.
const LEAST: usize = 16;
/// More than this no peer takes in one header, and no token needs.
const MOST: usize = 4096;
/// A few tokens of that length.
const LONGEST_FILE: usize = 4 * MOST;
/// How old what was read may be.
const FRESH: Duration = Duration::from_secs(1);

/// The secrets of one file, one a line. Who shows it shows the first; who asks for it takes any, so that a secret can be replaced while
/// both sides run. None is ever shown to people.
#[derive(Clone)]
pub struct Token {
    path: PathBuf,
    kept: Arc<Mutex<Kept>>,
}

struct Kept {
    secrets: Vec<Secret>,
    /// Of the file, when it was last read.
    file: blake3::Hash,
    read: Instant,
    /// How often the file had become one that will not do.
    failed: u64,
}

struct Secret {
    /// `Bearer SECRET`, marked as sensitive.
    bearer: MetadataValue<Ascii>,
    /// Of the secret. Digests are compared, for that takes the same time whatever differs.
    digest: blake3::Hash,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({})", self.path.display())
    }
}

/// Why a file holds no token. What it holds is not told.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It can't be read.
    #[error("{}: the token file cannot be read ({source}); check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What it holds will not do.
    #[error("{}: {rule}; make one with: head -c 24 /dev/urandom | base64 > FILE", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        rule: &'static str,
    },
}

impl Token {
    /// Reads the tokens of a file. White space around them is no part of them. Later on the file is read again when it has changed; one that
    /// will not do then is told of in the log, and what was read before stays.
    ///
    /// # Errors
    /// If the file can't be read, or what it holds could be guessed or not be sent.
    pub fn load(path: &Path) -> Result<Self, TokenError> {
        let text = read(path)?;
        let secrets = parse(&text).map_err(|rule| TokenError::Unfit { path: path.to_owned(), rule })?;
        let kept = Kept { secrets, file: blake3::hash(&text), read: Instant::now(), failed: 0 };
        Ok(Self { path: path.to_owned(), kept: Arc::new(Mutex::new(kept)) })
    }

    /// Whether this is one of the file's secrets.
    pub fn accepts(&self, secret: &[u8]) -> bool {
        let digest = blake3::hash(secret);
        self.with_newest(|kept| kept.secrets.iter().any(|secret| secret.digest == digest))
    }

    /// The file's first secret, as a call shows it.
    pub fn bearer(&self) -> Option<MetadataValue<Ascii>> {
        self.with_newest(|kept| kept.secrets.first().map(|secret| secret.bearer.clone()))
    }

    /// How often the file had become one that will not do (KNOWN).
    pub fn failed_reloads(&self) -> u64 {
        self.with_newest(|kept| kept.failed)
    }

    fn with_newest<T>(&self, get: impl FnOnce(&Kept) -> T) -> T {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.read.elapsed() >= FRESH {
            kept.read = Instant::now();
            self.refresh(&mut kept);
        }
        get(&kept)
    }

    fn refresh(&self, kept: &mut Kept) {
        let text = read(&self.path);
        // A file that can't be read differs from any that can.
        let file = text.as_ref().map_or_else(|_| blake3::hash(&[0; MOST]), |text| blake3::hash(text));
        if file == kept.file {
            return;
        }
        kept.file = file;
        let secrets = text.and_then(|text| parse(&text).map_err(|rule| TokenError::Unfit { path: self.path.clone(), rule }));
        match secrets {
            Ok(secrets) => {
                kept.secrets = secrets;
                tracing::info!("{}: the token was replaced", self.path.display());
            }
            Err(error) => {
                kept.failed += 1;
                tracing::warn!("{error}; the token from before stays in use");
            }
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TokenError> {
    let mut text = Vec::new();
    // One byte more than may be there shows that there is too much.
    let read = File::open(path).and_then(|file| file.take(LONGEST_FILE as u64 + 1).read_to_end(&mut text));
    read.map_err(|source| TokenError::Unreadable { path: path.to_owned(), source })?;
    Ok(text)
}

/// The secrets in these bytes, or the rule that they break.
fn parse(text: &[u8]) -> Result<Vec<Secret>, &'static str> {
    if text.len() > LONGEST_FILE {
        return Err("a token file must not be longer than 16384 bytes");
    }
    let secrets: Vec<Secret> =
        text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()).map(secret).collect::<Result<_, _>>()?;
    if secrets.is_empty() { Err("a token file must not be empty") } else { Ok(secrets) }
}

fn secret(secret: &[u8]) -> Result<Secret, &'static str> {
    const VISIBLE: &str = "a token must be one word of visible ASCII characters on a line of its own";
    let rules = [
        (secret.len() <= MOST, "a token must not be longer than 4096 bytes"),
        (secret.iter().all(u8::is_ascii_graphic), VISIBLE),
        (secret.len() >= LEAST, "a token must have at least 16 bytes"),
    ];
    if let Some((_, rule)) = rules.iter().find(|(holds, _)| !holds) {
        return Err(rule);
    }
    let Ok(mut bearer) = MetadataValue::try_from([b"Bearer ", secret].concat().as_slice()) else { return Err(VISIBLE) };
    bearer.set_sensitive(true);
    Ok(Secret { bearer, digest: blake3::hash(secret) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECRET: &str = "correct-horse-battery-staple";

    /// As if enough time had passed since the file was read.
    fn later(token: &Token) {
        let mut kept = token.kept.lock().unwrap();
        kept.read = kept.read.checked_sub(FRESH).unwrap();
    }

    #[test]
    fn whoever_has_the_same_secret_is_known_and_nobody_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("  {SECRET}\r\n\nanother-secret-of-it\n")).unwrap();
        let token = Token::load(file.path()).unwrap();
        assert!(token.accepts(SECRET.as_bytes()) && token.accepts(b"another-secret-of-it"), "white space around it is no part of it");
        assert_eq!(token.bearer().unwrap().as_bytes(), format!("Bearer {SECRET}").as_bytes());
        for other in [&SECRET[1..], &SECRET.to_uppercase(), &format!("{SECRET}s"), ""] {
            assert!(!token.accepts(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_file_that_will_not_do_is_named_with_the_rule_and_without_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let (long, longer) = ("x".repeat(MOST + 1), "x".repeat(LONGEST_FILE + 1));
        let cases: [(&[u8], &str); 7] = [
            (b"", "must not be empty"),
            (b" \n\t\n", "must not be empty"),
            (b"hunter2hunter22\n", "at least 16 bytes"),
            (b"two words of a secret", "visible ASCII"),
            ("p\u{e4}sswort-p\u{e4}sswort".as_bytes(), "visible ASCII"),
            (long.as_bytes(), "longer than 4096 bytes"),
            (longer.as_bytes(), "longer than 16384 bytes"),
        ];
        for (text, rule) in cases {
            std::fs::write(&path, text).unwrap();
            let error = Token::load(&path).unwrap_err();
            let said = format!("{error} {error:?}");
            assert!(matches!(error, TokenError::Unfit { .. }), "{said}");
            assert!(said.contains(rule) && said.contains(path.to_str().unwrap()), "{said}");
            let held = String::from_utf8_lossy(text);
            assert!(held.split_whitespace().all(|word| !said.contains(word) || word.len() < 4), "{said}");
        }
        for path in [folder.path(), &folder.path().join("none")] {
            let error = Token::load(path).unwrap_err();
            assert!(matches!(error, TokenError::Unreadable { .. }) && error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn the_newest_secret_counts_and_a_broken_file_changes_nothing_but_the_count() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), SECRET).unwrap();
        let token = Token::load(file.path()).unwrap();
        std::fs::write(file.path(), "the-next-secret-of-it").unwrap();
        later(&token);
        assert!(token.accepts(b"the-next-secret-of-it") && !token.accepts(SECRET.as_bytes()));
        for _ in 0..3 {
            std::fs::write(file.path(), "short").unwrap();
            later(&token);
            assert!(token.accepts(b"the-next-secret-of-it") && !token.accepts(b"short"));
        }
        assert_eq!(token.failed_reloads(), 1, "one broken file is told of once");
        std::fs::remove_file(file.path()).unwrap();
        later(&token);
        assert!(token.accepts(b"the-next-secret-of-it"));
        assert_eq!(token.failed_reloads(), 2);
    }

    #[test]
    fn it_is_not_shown_to_people() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), SECRET).unwrap();
        let token = Token::load(file.path()).unwrap();
        let bearer = token.bearer().unwrap();
        let said = format!("{token:?} {bearer:?}");
        assert!(bearer.is_sensitive() && !said.contains(SECRET), "{said}");
    }
}
