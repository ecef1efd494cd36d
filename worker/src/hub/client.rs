//! The hub's HTTP interface: a revision's list of files, a file's identity, and its contents.
//!
//! Written over the HTTP client that object stores use already: hf-hub 1.0 brings another TLS provider (which needs cmake) and a client
//! for Xet, and earlier ones have no deadlines, no offline mode and no `HF_TOKEN`.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::cache::{disk, length};
use super::{HubError, HubId, Settings};
use crate::http::{chain, client};

/// How long an answer, or its next part, may take.
const READ: Duration = Duration::from_secs(60);
/// How often something is tried that comes no further.
const ATTEMPTS: u32 = 4;
/// The first pause between two attempts; each is twice the one before.
const PAUSE: Duration = Duration::from_millis(250);
/// Redirects within the hub, such as those of models that were renamed.
const HOPS: usize = 5;

/// A hub.
#[derive(Debug)]
pub(super) struct Hub<'a> {
    id: &'a HubId,
    endpoint: &'a str,
    http: Client,
    /// Stops at redirects, whose headers tell what a file is.
    still: Client,
}

/// A revision, and the files that it holds.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// What the hub says of a file.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    pub(super) name: String,
    /// The name of its contents: SHA-256 of large files, git's of others.
    pub(super) etag: String,
    pub(super) size: u64,
}

/// Why an attempt failed.
enum Trouble {
    /// Another may succeed.
    Passing(String),
    Final(HubError),
}

impl From<reqwest::Error> for Trouble {
    fn from(error: reqwest::Error) -> Self {
        Trouble::Passing(chain(error))
    }
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl fmt::Display for Hub<'_> {
    /// Which model from where.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {}", self.id, self.endpoint)
    }
}

impl<'a> Hub<'a> {
    pub(super) fn new(id: &'a HubId, settings: &'a Settings) -> Result<Self, HubError> {
        let client = |policy: Policy| {
            let builder = client(settings.token.as_deref());
            let builder = builder.ok_or_else(|| HubError::Client("the token holds characters that none has".to_owned()))?;
            builder.read_timeout(READ).redirect(policy).build().map_err(|error| HubError::Client(chain(error)))
        };
        Ok(Hub { id, endpoint: &settings.endpoint, http: client(Policy::default())?, still: client(Policy::none())? })
    }

    /// The files of the revision that the id names, and its commit.
    pub(super) async fn listing(&self) -> Result<Listing, HubError> {
        let revision = self.id.revision().replace('/', "%2F");
        let url = self.url(&format!("api/models/{}/revision/{revision}", self.id.repo()))?;
        let read = async || {
            let body = self.accepted(self.http.get(url.clone()).send().await?)?.bytes().await?;
            serde_json::from_slice::<Revision>(&body).map_err(|error| self.nonsense(&url, format!("answers no list of files ({error})")))
        };
        let answer = self.persist(|| 0, read).await?;
        let files: Vec<String> = answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let inside = |file: &String| file.split('/').all(|part| !matches!(part, "" | "." | "..")) && !file.contains('\\');
        let commit = answer.sha;
        if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_hexdigit()) || !files.iter().all(inside) {
            return Err(self.answer(&url, "answers with names that are no commit or no files within it".to_owned()));
        }
        Ok(Listing { commit, files })
    }

    /// What a file of a commit is, without its contents.
    pub(super) async fn describe(&self, commit: &str, file: &str) -> Result<Remote, HubError> {
        let start = self.file(commit, file)?;
        self.persist(|| 0, async || self.head(start.clone(), file).await).await
    }

    async fn head(&self, start: Url, file: &str) -> Result<Remote, Trouble> {
        let mut url = start;
        for _ in 0..HOPS {
            let answer = self.still.request(Method::HEAD, url.clone()).send().await?;
            let text = |name: &str| Some(answer.headers().get(name)?.to_str().ok()?.to_owned());
            let linked = text("x-linked-etag");
            // The hub points to where a large file is; the file's identity is in the hub's own answer.
            let away = answer.status().is_redirection() && linked.is_none();
            if let Some(next) = text(LOCATION.as_str()).filter(|next| away && next.starts_with('/') && !next.starts_with("//")) {
                url = url.join(&next).map_err(|error| self.nonsense(&url, format!("leads to {next} ({error})")))?;
                continue;
            }
            if !answer.status().is_redirection() && !answer.status().is_success() {
                return Err(self.refusal(&answer));
            }
            let etag = linked.or_else(|| text(ETAG.as_str()));
            let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
            let etag = etag.filter(|etag| !etag.is_empty() && etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
            let size = text("x-linked-size").or_else(|| text(CONTENT_LENGTH.as_str())).and_then(|size| size.parse().ok());
            return match (etag, size) {
                (Some(etag), Some(size)) => Ok(Remote { name: file.to_owned(), etag, size }),
                _ => Err(self.nonsense(&url, "tells no ETag or no size of the file".to_owned())),
            };
        }
        Err(self.nonsense(&url, format!("leads on more than {HOPS} times")))
    }

    /// Downloads a file of a commit into `incomplete`, going on where that ends. `progress` hears of its length.
    pub(super) async fn download(&self, commit: &str, remote: &Remote, incomplete: &Path, progress: &dyn Fn(u64)) -> Result<(), HubError> {
        let url = self.file(commit, &remote.name)?;
        self.persist(|| length(incomplete), async || self.get(&url, remote, incomplete, progress).await).await
    }

    async fn get(&self, url: &Url, remote: &Remote, incomplete: &Path, progress: &dyn Fn(u64)) -> Result<(), Trouble> {
        let mut have = length(incomplete);
        if have > remote.size {
            have = 0;
        }
        let mut out = File::options().create(true).append(true).open(incomplete).map_err(|source| self.disk(incomplete, source))?;
        out.set_len(have).map_err(|source| self.disk(incomplete, source))?;
        if have == remote.size {
            return Ok(());
        }
        let request = self.http.get(url.clone());
        let request = if have > 0 { request.header(RANGE, format!("bytes={have}-")) } else { request };
        let mut answer = self.accepted(request.send().await?)?;
        let begins = answer.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).map(str::to_owned);
        if answer.status() != StatusCode::PARTIAL_CONTENT || !begins.is_some_and(|range| range.starts_with(&format!("bytes {have}-"))) {
            // The whole file comes, whatever was asked for.
            have = 0;
            out.set_len(0).map_err(|source| self.disk(incomplete, source))?;
        }
        while let Some(chunk) = answer.chunk().await? {
            out.write_all(&chunk).map_err(|source| self.disk(incomplete, source))?;
            have += chunk.len() as u64;
            progress(have);
        }
        if have == remote.size { Ok(()) } else { Err(Trouble::Passing(format!("{url} ended after {have} of {} bytes", remote.size))) }
    }

    /// The error of contents that are not those promised.
    pub(super) fn damaged(&self, remote: &Remote, found: String) -> HubError {
        HubError::Damaged { id: Box::new(self.id.clone()), file: remote.name.clone(), expected: remote.etag.clone(), found }
    }

    /// Tries until it succeeds, or fails for good, or comes no further (by `progress`) several times in a row.
    async fn persist<T>(&self, progress: impl Fn() -> u64, attempt: impl AsyncFn() -> Result<T, Trouble>) -> Result<T, HubError> {
        let mut failures = 0;
        loop {
            let before = progress();
            let reason = match attempt().await {
                Ok(value) => return Ok(value),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing(reason)) => reason,
            };
            failures = if progress() > before { 1 } else { failures + 1 };
            if failures >= ATTEMPTS {
                return Err(HubError::Unreachable { id: Box::new(self.id.clone()), endpoint: self.endpoint.to_owned(), reason });
            }
            tracing::debug!("{}: {reason}; trying again", self.id);
            tokio::time::sleep(PAUSE * 2u32.pow(failures - 1)).await;
        }
    }

    fn accepted(&self, answer: Response) -> Result<Response, Trouble> {
        if answer.status().is_success() { Ok(answer) } else { Err(self.refusal(&answer)) }
    }

    /// What an answer that is no success means.
    fn refusal(&self, answer: &Response) -> Trouble {
        let (id, endpoint) = (Box::new(self.id.clone()), self.endpoint.to_owned());
        let status = answer.status();
        let code = answer.headers().get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default();
        Trouble::Final(match (status.as_u16(), code) {
            (_, "RevisionNotFound") => HubError::NoRevision { id },
            (status @ (401 | 403), _) => HubError::Refused { id, endpoint, status },
            (404, _) => HubError::NoModel { id, endpoint },
            (408 | 429 | 500.., _) => return Trouble::Passing(format!("status {status}")),
            _ => self.answer(answer.url(), format!("answers with status {status}")),
        })
    }

    fn nonsense(&self, url: &Url, reason: String) -> Trouble {
        Trouble::Final(self.answer(url, reason))
    }

    fn answer(&self, url: &Url, reason: String) -> HubError {
        HubError::Answer { id: Box::new(self.id.clone()), url: url.to_string(), reason }
    }

    fn disk(&self, path: &Path, source: std::io::Error) -> Trouble {
        Trouble::Final(disk(path, source))
    }

    fn file(&self, commit: &str, file: &str) -> Result<Url, HubError> {
        self.url(&format!("{}/resolve/{commit}/{file}", self.id.repo()))
    }

    fn url(&self, path: &str) -> Result<Url, HubError> {
        let url = format!("{}/{path}", self.endpoint);
        let reason = |error| HubError::Answer { id: Box::new(self.id.clone()), url: url.clone(), reason: format!("is no URL ({error})") };
        Url::parse(&url).map_err(reason)
    }
}
