//! How a coordinator is reached: its address, and the token that it may ask for.
//!
//! A token says that a caller knows the coordinator's secret, and no more: it crosses the network in clear text.

use crate::v1::coordinator_client::CoordinatorClient;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// The metadata key that a token is shown under.
const KEY: &str = "authorization";
/// What can't be guessed has at least so many bytes.
const LEAST: usize = 16;
/// More than this no peer takes in one header, and no token needs.
const MOST: usize = 4096;
/// How the wrong token, or none, is put right.
const ADVICE: &str = "give --token-file (or ELLA_TOKEN_FILE) a copy of the coordinator's token file";

/// A secret that a coordinator shares with its workers and clients. It is never shown.
#[derive(Clone)]
pub struct Token {
    /// `Bearer SECRET`, marked as sensitive.
    bearer: MetadataValue<Ascii>,
    /// Of those bytes. Digests are compared, for that takes the same time whatever differs.
    digest: blake3::Hash,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
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

/// Why a caller is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoEntry {
    /// It shows no token.
    #[error("the coordinator asks for a token; {ADVICE}")]
    Missing,
    /// It shows another one.
    #[error("the token is not the coordinator's; {ADVICE}")]
    Wrong,
}

impl Token {
    /// Reads a token from a file. White space around it is no part of it.
    ///
    /// # Errors
    /// If the file can't be read, or what it holds could be guessed or not be sent.
    pub fn load(path: &Path) -> Result<Self, TokenError> {
        let mut text = Vec::new();
        // One byte more than may be there shows that there is too much.
        let read = File::open(path).and_then(|file| file.take(MOST as u64 + 1).read_to_end(&mut text));
        read.map_err(|source| TokenError::Unreadable { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|rule| TokenError::Unfit { path: path.to_owned(), rule })
    }

    /// A token of these bytes, or the rule that they break.
    fn parse(text: &[u8]) -> Result<Self, &'static str> {
        let secret = text.trim_ascii();
        let rules = [
            (!secret.is_empty(), "a token file must not be empty"),
            (text.len() <= MOST, "a token file must not be longer than 4096 bytes"),
            (secret.iter().all(u8::is_ascii_graphic), "a token must be one word of visible ASCII characters"),
            (secret.len() >= LEAST, "a token must have at least 16 bytes"),
        ];
        if let Some((_, rule)) = rules.iter().find(|(holds, _)| !holds) {
            return Err(rule);
        }
        let bytes = [b"Bearer ", secret].concat();
        let Ok(mut bearer) = MetadataValue::try_from(bytes.as_slice()) else { return Err(rules[2].1) };
        bearer.set_sensitive(true);
        Ok(Self { bearer, digest: blake3::hash(&bytes) })
    }

    /// Whether a call with this metadata shows this token.
    ///
    /// # Errors
    /// Why its caller is not let in.
    pub fn check(&self, metadata: &MetadataMap) -> Result<(), NoEntry> {
        let shown = metadata.get(KEY).ok_or(NoEntry::Missing)?;
        if blake3::hash(shown.as_bytes()) == self.digest { Ok(()) } else { Err(NoEntry::Wrong) }
    }
}

/// Where a coordinator is, and the token that is shown to it with every call.
#[derive(Clone, Debug)]
pub struct Access {
    /// Its gRPC address, `http://host:port`.
    pub url: String,
    /// None: it is hoped to ask for none.
    pub token: Option<Token>,
}

/// A client whose every call shows the token, if there is one.
pub type Client = CoordinatorClient<InterceptedService<Channel, Access>>;

impl Access {
    /// A client on a channel to this coordinator.
    pub fn client(&self, channel: Channel) -> Client {
        CoordinatorClient::with_interceptor(channel, self.clone())
    }
}

impl Interceptor for Access {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.token {
            request.metadata_mut().insert(KEY, token.bearer.clone());
        }
        Ok(request)
    }
}

impl From<String> for Access {
    fn from(url: String) -> Self {
        Self { url, token: None }
    }
}

impl From<&String> for Access {
    fn from(url: &String) -> Self {
        url.clone().into()
    }
}

impl From<&str> for Access {
    fn from(url: &str) -> Self {
        url.to_owned().into()
    }
}

impl From<&Self> for Access {
    fn from(access: &Self) -> Self {
        access.clone()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECRET: &str = "correct-horse-battery-staple";

    fn shown(token: Option<Token>) -> MetadataMap {
        let mut access = Access { token, ..Access::from("http://here") };
        access.call(Request::new(())).unwrap().metadata().clone()
    }

    fn token(text: &str) -> Token {
        Token::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn whoever_has_the_same_secret_is_let_in_and_nobody_else() {
        let ours = token(SECRET);
        assert_eq!(ours.check(&shown(Some(token(&format!("  {SECRET}\r\n"))))), Ok(()), "white space around it is no part of it");
        assert_eq!(ours.check(&shown(None)), Err(NoEntry::Missing));
        for other in [&SECRET[1..], &SECRET.to_uppercase(), &format!("{SECRET}s")] {
            assert_eq!(ours.check(&shown(Some(token(other)))), Err(NoEntry::Wrong), "{other}");
        }
        let mut bare = MetadataMap::new();
        bare.insert(KEY, SECRET.parse().unwrap());
        assert_eq!(ours.check(&bare), Err(NoEntry::Wrong));
    }

    #[test]
    fn a_file_that_will_not_do_is_named_with_the_rule_and_without_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let long = "x".repeat(MOST + 1);
        let cases: [(&[u8], &str); 7] = [
            (b"", "must not be empty"),
            (b" \n\t\n", "must not be empty"),
            (b"hunter2hunter22\n", "at least 16 bytes"),
            (b"two words of a secret", "visible ASCII"),
            (b"first-line-of-it\nsecond-line-of-it", "visible ASCII"),
            ("p\u{e4}sswort-p\u{e4}sswort".as_bytes(), "visible ASCII"),
            (long.as_bytes(), "longer than 4096 bytes"),
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
        std::fs::write(&path, format!("{SECRET}\n")).unwrap();
        assert_eq!(Token::load(&path).unwrap().check(&shown(Some(token(SECRET)))), Ok(()));
    }

    #[test]
    fn it_is_not_shown_to_people() {
        let access = Access { token: Some(token(SECRET)), ..Access::from("http://here") };
        let (said, sent) = (format!("{access:?}"), shown(access.token.clone()));
        assert!(said.contains("http://here") && !said.contains(SECRET), "{said}");
        let request = format!("{sent:?}");
        assert!(sent.get(KEY).is_some_and(MetadataValue::is_sensitive) && !request.contains(SECRET), "{request}");
    }
}
