//! The client: asks an endpoint for captions, so many at once and so fast as it may, and again where it failed in passing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use super::config::CaptionConfig;
use super::counts::CaptionCounts;
use super::error::{CaptionFailure, CaptionRefusal, Detail, EndpointError, Passing, Refused};
use super::estimate::text_tokens;
use super::pace::Pace;
use super::prompt::fill;
use super::reply::{Reply, Usage, detail, names};
use super::request;
use crate::http::{chain, client};

/// The largest answer that is read, in bytes: hundreds of captions.
const LARGEST: usize = 1 << 20;
/// The pause before the first retry; it doubles, with jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The longest wait that an endpoint may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// How often an endpoint is tried that never answered: its address is more likely wrong than its server away.
const FIRST_CONTACT: u64 = 3;
/// So many pictures in a row that are no request's fault, but are refused as such, are the request's fault.
const ROW: u32 = 16;

/// A picture's caption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captioned {
    /// One paragraph, single spaces.
    pub caption: String,
    /// It was cut off, and these are its whole sentences.
    pub trimmed: bool,
    /// Tokens used.
    pub usage: Usage,
}

/// What one request showed before all others are made.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// The caption, or why there is none.
    pub outcome: Result<Captioned, Refused>,
    /// How long it took, with nothing else asked meanwhile.
    pub elapsed: Duration,
}

impl Probe {
    /// Tokens used.
    pub fn usage(&self) -> Usage {
        self.outcome.as_ref().map_or_else(|refused| refused.usage, |captioned| captioned.usage)
    }
}

/// A client of one endpoint.
pub struct CaptionClient {
    config: CaptionConfig,
    http: Client,
    /// The base URL, without a slash at its end.
    endpoint: String,
    key: Option<String>,
    slots: Semaphore,
    pace: Pace,
    counts: Mutex<CaptionCounts>,
    /// Failures in passing that were told of.
    told: Mutex<BTreeMap<String, u64>>,
    /// Whether it ever answered.
    met: AtomicBool,
    /// Completions that came.
    served: AtomicU64,
    /// Pictures refused in a row for what is likelier the request's fault.
    row: AtomicU32,
}

impl fmt::Debug for CaptionClient {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaptionClient").field("endpoint", &self.endpoint).field("model", &self.config.model).finish_non_exhaustive()
    }
}

/// Why an attempt failed.
enum Trouble {
    /// Another may succeed.
    Passing(Passing),
    Final(CaptionFailure),
}

impl From<reqwest::Error> for Trouble {
    fn from(error: reqwest::Error) -> Self {
        let connect = error.is_connect();
        let reason = chain(error);
        Trouble::Passing(if connect { Passing::Unreachable(reason) } else { Passing::BrokeOff(reason) })
    }
}

impl From<EndpointError> for Trouble {
    fn from(error: EndpointError) -> Self {
        Trouble::Final(error.into())
    }
}

impl CaptionClient {
    /// A client with the key that the environment holds, if it holds one.
    ///
    /// # Errors
    /// The config names a variable that is not set; the key is no header's value; no HTTPS on this machine.
    pub fn new(config: CaptionConfig) -> Result<Self, EndpointError> {
        let key = std::env::var(config.key_env()).ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty());
        if key.is_none() && config.api_key_env.is_some() {
            return Err(EndpointError::Key { variable: config.key_env().to_owned(), fault: "is not set" });
        }
        Self::with_key(config, key)
    }

    /// A client with this key.
    ///
    /// # Errors
    /// The key is no header's value; no HTTPS on this machine.
    pub fn with_key(config: CaptionConfig, key: Option<String>) -> Result<Self, EndpointError> {
        let fault = || EndpointError::Key { variable: config.key_env().to_owned(), fault: "holds characters that no key has" };
        let builder = client(key.as_deref()).ok_or_else(fault)?;
        // A redirect would turn the request into another; the error says where it leads.
        let http = builder.redirect(Policy::none()).build().map_err(|error| EndpointError::Client(chain(error)))?;
        Ok(Self {
            http,
            endpoint: config.endpoint.trim_end_matches('/').to_owned(),
            key,
            slots: Semaphore::new(config.concurrency),
            pace: Pace::new(&config),
            counts: Mutex::default(),
            told: Mutex::default(),
            met: AtomicBool::new(false),
            served: AtomicU64::new(0),
            row: AtomicU32::new(0),
            config,
        })
    }

    /// The config.
    pub fn config(&self) -> &CaptionConfig {
        &self.config
    }

    /// What became of the pictures so far.
    pub fn counts(&self) -> CaptionCounts {
        self.with_counts(|counts| counts.clone())
    }

    /// Attempts that failed in passing since the last call, by kind. They stay in [`Self::counts`].
    pub fn take_passing(&self) -> BTreeMap<String, u64> {
        let told = &mut *self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.counts().passing;
        let before = std::mem::replace(told, now.clone());
        now.into_iter()
            .map(|(kind, count)| (count - before.get(&kind).copied().unwrap_or(0), kind))
            .filter(|(new, _)| *new > 0)
            .map(|(new, kind)| (kind, new))
            .collect()
    }

    fn with_counts<T>(&self, act: impl FnOnce(&mut CaptionCounts) -> T) -> T {
        act(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A caption for a picture (JPEG, PNG or WebP), whose `existing` one the prompt may show. Any number of calls may wait at once: no more
    /// than `concurrency` are asked, in their order.
    ///
    /// # Errors
    /// [`CaptionFailure::Refused`]: this picture is to have none. [`CaptionFailure::Endpoint`]: none can have one now.
    pub async fn caption(&self, image: &[u8], existing: &str) -> Result<Captioned, CaptionFailure> {
        // It is never closed, so it always gives a slot.
        let _slot = self.slots.acquire().await;
        let outcome = match request::body(&self.config, image, existing) {
            Ok(body) => self.ask(body, self.tokens(existing)).await.and_then(|reply| self.judge(&reply)),
            Err(refused) => Err(refused.into()),
        };
        self.with_counts(|counts| counts.note(&outcome));
        self.watch(outcome)
    }

    /// One request before all others: it shows what the endpoint says, how many tokens that takes, and how long.
    ///
    /// # Errors
    /// The endpoint's.
    pub async fn probe(&self, image: &[u8], existing: &str) -> Result<Probe, EndpointError> {
        let begun = Instant::now();
        let outcome = match self.caption(image, existing).await {
            Ok(captioned) => Ok(captioned),
            Err(CaptionFailure::Refused(refused)) => Err(refused),
            Err(CaptionFailure::Endpoint(error)) => return Err(error),
        };
        Ok(Probe { outcome, elapsed: begun.elapsed() })
    }

    /// Tokens that a request may take, in and out.
    fn tokens(&self, existing: &str) -> u64 {
        let Self { config, .. } = self;
        let text = [config.system.as_deref().unwrap_or_default(), &fill(&config.prompt, existing)].map(text_tokens);
        config.image_tokens + text.iter().sum::<u64>() + config.max_tokens
    }

    /// Asks until there is an answer, or a failure that stays.
    async fn ask(&self, body: Bytes, tokens: u64) -> Result<Reply, CaptionFailure> {
        let (begun, served) = (Instant::now(), self.served.load(Ordering::Relaxed));
        let pauses = ExponentialBuilder::default().with_min_delay(FIRST_PAUSE).with_max_delay(LONGEST_PAUSE).with_jitter();
        let mut pauses = pauses.with_max_times(self.config.retries as usize).build();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let passing = match self.attempt(body.clone(), tokens).await {
                Ok(reply) => return Ok(reply),
                Err(Trouble::Final(failure)) => return Err(failure),
                Err(Trouble::Passing(passing)) => passing,
            };
            self.with_counts(|counts| counts.note_passing(&passing));
            let wait = passing.after().unwrap_or_default();
            let stranger = matches!(passing, Passing::Unreachable(_)) && !self.met.load(Ordering::Relaxed);
            let hopeless = wait > LONGEST_WAIT || (stranger && attempts >= FIRST_CONTACT);
            let Some(pause) = pauses.next().filter(|_| !hopeless) else {
                return Err(self.give_up(passing, attempts, begun.elapsed(), served));
            };
            tracing::debug!(%passing, ?wait, ?pause, "{}: trying again", self.endpoint);
            self.pace.hold(wait);
            sleep(wait + pause).await;
        }
    }

    async fn attempt(&self, body: Bytes, tokens: u64) -> Result<Reply, Trouble> {
        self.pace.turn(tokens).await;
        self.with_counts(|counts| counts.requests += 1);
        let limit = self.config.timeout.duration();
        let reply = timeout(limit, self.exchange(body)).await.unwrap_or(Err(Trouble::Passing(Passing::Silent(limit))))?;
        self.served.fetch_add(1, Ordering::Relaxed);
        self.row.store(0, Ordering::Relaxed);
        let used = reply.usage.input_tokens + reply.usage.output_tokens;
        self.pace.settle(tokens, if used > 0 { used } else { tokens });
        Ok(reply)
    }

    async fn exchange(&self, body: Bytes) -> Result<Reply, Trouble> {
        let request = self.http.post(format!("{}/chat/completions", self.endpoint)).header(CONTENT_TYPE, "application/json");
        let mut answer = request.body(body).send().await?;
        self.met.store(true, Ordering::Relaxed);
        let (body, whole) = read(&mut answer).await?;
        if !answer.status().is_success() {
            return Err(self.failure(answer.status(), answer.headers(), &self.clean(&body)));
        }
        if !whole {
            let detail = format!("the answer is larger than {LARGEST} bytes{}", detail(&self.clean(&body)));
            return Err(refused(CaptionRefusal::Rambled, detail));
        }
        Reply::read(&body).map_err(|error| {
            let error = format!("{error}{}", detail(&self.clean(&body)));
            Trouble::Passing(Passing::Nonsense(String::from_utf8_lossy(&self.clean(error.as_bytes())).into_owned()))
        })
    }

    /// What an answer means that is no success.
    fn failure(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Trouble {
        let (endpoint, said, after) = (self.endpoint.clone(), detail(body), retry_after(headers, SystemTime::now()));
        let status = status.as_u16();
        match status {
            400 if names(body, &["content_filter", "content_policy_violation"]) => refused(CaptionRefusal::ContentFilter, said.0),
            400 | 413 | 422 => refused(CaptionRefusal::BadRequest, format!("status {status}{said}")),
            401 | 403 => {
                let (variable, sent) = (self.config.key_env().to_owned(), self.key.is_some());
                EndpointError::NotAllowed { endpoint, status, detail: said, variable, sent }.into()
            }
            404 => EndpointError::NotFound { endpoint, model: self.config.model.clone(), detail: said }.into(),
            429 if names(body, &["insufficient_quota"]) => EndpointError::NoQuota { endpoint, detail: said }.into(),
            429 => Trouble::Passing(Passing::Busy { detail: said, after }),
            408 | 409 | 425 | 500.. => Trouble::Passing(Passing::Failing { status, detail: said, after }),
            _ => {
                let leads = headers.get(LOCATION).and_then(|to| to.to_str().ok()).map(|to| Detail(format!("see {to}")));
                EndpointError::Unexpected { endpoint, status, detail: leads.unwrap_or(said) }.into()
            }
        }
    }

    /// What was said, without the key: some servers repeat it.
    fn clean(&self, said: &[u8]) -> Vec<u8> {
        match &self.key {
            Some(key) => String::from_utf8_lossy(said).replace(key.as_str(), "[key]").into_bytes(),
            None => said.to_vec(),
        }
    }

    fn judge(&self, reply: &Reply) -> Result<Captioned, CaptionFailure> {
        let usage = reply.usage;
        match reply.caption(&self.config) {
            Ok(caption) => Ok(Captioned { caption, trimmed: reply.is_cut(), usage }),
            Err((why, detail)) => Err(Refused { why, detail, usage }.into()),
        }
    }

    /// The end of retries: the picture's fault if the endpoint served others meanwhile, and else the endpoint's.
    fn give_up(&self, last: Passing, attempts: u64, elapsed: Duration, served: u64) -> CaptionFailure {
        if last.may_be_the_pictures() && self.served.load(Ordering::Relaxed) > served {
            let detail = format!("the endpoint {last}, after {attempts} attempts");
            return Refused { why: CaptionRefusal::Unanswered, detail, usage: Usage::default() }.into();
        }
        EndpointError::GaveUp { endpoint: self.endpoint.clone(), attempts, elapsed, last }.into()
    }

    /// Turns a refusal into the endpoint's error where one picture after the other is refused alike.
    fn watch(&self, outcome: Result<Captioned, CaptionFailure>) -> Result<Captioned, CaptionFailure> {
        match outcome {
            Err(CaptionFailure::Refused(last)) if matches!(last.why, CaptionRefusal::BadRequest | CaptionRefusal::Rambled) => {
                let pictures = self.row.fetch_add(1, Ordering::Relaxed) + 1;
                if pictures < ROW {
                    return Err(last.into());
                }
                Err(EndpointError::RefusesAll { endpoint: self.endpoint.clone(), pictures, last }.into())
            }
            outcome => outcome,
        }
    }
}

fn refused(why: CaptionRefusal, detail: String) -> Trouble {
    Trouble::Final(Refused { why, detail, usage: Usage::default() }.into())
}

/// An answer's body up to [`LARGEST`] bytes, and whether that is all.
async fn read(answer: &mut Response) -> Result<(Vec<u8>, bool), reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if body.len() + chunk.len() > LARGEST {
            return Ok((body, false));
        }
        body.extend_from_slice(&chunk);
    }
    Ok((body, true))
}

/// How long an endpoint asks one to wait: `retry-after-ms`, or `retry-after` in seconds or as a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let seconds = |number: &str, unit: f64| Duration::try_from_secs_f64(number.parse::<f64>().ok()? * unit).ok();
    if let Some(pause) = text("retry-after-ms").and_then(|millis| seconds(millis, 1e-3)) {
        return Some(pause);
    }
    let after = text("retry-after")?;
    seconds(after, 1.0).or_else(|| Some(httpdate::parse_http_date(after).ok()?.duration_since(now).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::{HeaderName, HeaderValue};

    #[test]
    fn waits_that_are_asked_for_are_read_in_every_form() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2026 07:28:00 GMT").unwrap();
        for (headers, expected) in [
            (vec![("retry-after", "7")], Some(7_000)),
            (vec![("retry-after", " 1.5 ")], Some(1_500)),
            (vec![("retry-after", "20"), ("retry-after-ms", "250")], Some(250)),
            (vec![("retry-after", "20"), ("retry-after-ms", "soon")], Some(20_000)),
            (vec![("retry-after", "Wed, 21 Oct 2026 07:28:30 GMT")], Some(30_000)),
            (vec![("retry-after", "Wed, 21 Oct 2026 07:27:00 GMT")], Some(0)),
            (vec![("retry-after", "-3")], None),
            (vec![("retry-after", "inf")], None),
            (vec![("retry-after", "later")], None),
            (vec![], None),
        ] {
            let map = headers.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect();
            assert_eq!(retry_after(&map, now).map(|pause| pause.as_millis()), expected, "{headers:?}");
        }
    }
}
