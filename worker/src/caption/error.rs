//! Why a picture has no caption: something about the picture or its caption, or about the endpoint.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::reply::Usage;

/// Why a picture has no caption.
#[derive(Debug, thiserror::Error)]
pub enum CaptionFailure {
    /// It is to have none: count it, and go on with the next.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// No picture can have one now: stop.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}

/// A picture that is to have no caption, and what it cost to learn that.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{why}: {detail}")]
pub struct Refused {
    /// The reason.
    pub why: CaptionRefusal,
    /// What was said or found, in a line.
    pub detail: String,
    /// Tokens used.
    pub usage: Usage,
}

/// The reasons why a picture has no caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CaptionRefusal {
    /// The endpoint takes no such request: status 400, 413 or 422.
    BadRequest,
    /// The endpoint's filter stopped the picture or the answer.
    ContentFilter,
    /// The answer ended at `max_tokens` (and, with `cut = "trim"`, before its first sentence did).
    Cut,
    /// The answer has no words.
    Empty,
    /// The bytes are no JPEG, PNG or WebP picture.
    NotPicture,
    /// The answer is larger than any caption.
    Rambled,
    /// The model declined.
    Refused,
    /// More words than `max_words`.
    TooLong,
    /// Fewer words than `min_words`.
    TooShort,
    /// The endpoint failed on this picture again and again, and served others meanwhile.
    Unanswered,
}

impl fmt::Display for CaptionRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What is wrong with an endpoint, or with what is asked of it. Keys are in none of these.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EndpointError {
    /// The HTTP client cannot be set up.
    #[error("HTTPS cannot be set up ({0}); check the machine's certificates")]
    Client(String),
    /// The config names a variable that is not set, or that holds no key.
    #[error("{variable} (api_key_env) {fault}; set it to the endpoint's key")]
    Key {
        /// The environment variable.
        variable: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// Status 401 or 403.
    #[error("{endpoint}: refuses the request (status {status}{detail}); {}", key_advice(variable, *sent))]
    NotAllowed {
        /// The endpoint.
        endpoint: String,
        /// HTTP's status.
        status: u16,
        /// What it said.
        detail: Detail,
        /// The environment variable that holds the key.
        variable: String,
        /// Whether a key was sent.
        sent: bool,
    },
    /// Status 404: of the model, or of the path.
    #[error(
        "{endpoint}: knows no model `{model}`, or is not the base URL of an OpenAI-compatible endpoint (status 404{detail}); \
         {endpoint}/models lists its models; check `model` and `endpoint`"
    )]
    NotFound {
        /// The endpoint.
        endpoint: String,
        /// The model.
        model: String,
        /// What it said.
        detail: Detail,
    },
    /// The account has nothing left: waiting does not help.
    #[error("{endpoint}: the account's quota is used up{detail}; raise it, or take another key or endpoint")]
    NoQuota {
        /// The endpoint.
        endpoint: String,
        /// What it said.
        detail: Detail,
    },
    /// A status that no such endpoint answers with.
    #[error("{endpoint}: answers with status {status}{detail}; check that `endpoint` is the base URL of an OpenAI-compatible endpoint")]
    Unexpected {
        /// The endpoint.
        endpoint: String,
        /// HTTP's status.
        status: u16,
        /// What it said, or where it points to.
        detail: Detail,
    },
    /// One picture after the other is refused in the same way: the request is wrong, not the pictures.
    #[error(
        "{endpoint}: has refused {pictures} pictures in a row, the last: {last}; check that `model` takes pictures, and `max_tokens`, \
         `image_detail` and `extra`"
    )]
    RefusesAll {
        /// The endpoint.
        endpoint: String,
        /// How many.
        pictures: u32,
        /// What became of the last.
        last: Refused,
    },
    /// It fails in passing, again and again.
    #[error("{endpoint}: {last}, after {attempts} attempts in {} s; {}", elapsed.as_secs(), last.advice())]
    GaveUp {
        /// The endpoint.
        endpoint: String,
        /// How often it was asked.
        attempts: u64,
        /// From the first attempt to the end of the last.
        elapsed: Duration,
        /// The last failure.
        last: Passing,
    },
}

impl EndpointError {
    /// Whether the same may work at another time, with nothing changed.
    pub fn passes(&self) -> bool {
        matches!(self, Self::GaveUp { .. })
    }
}

fn key_advice(variable: &str, sent: bool) -> String {
    let fault = if sent { "the key is not accepted: check" } else { "no key was sent: set" };
    format!("{fault} {variable} (`api_key_env` may name another variable)")
}

/// A failure after which another attempt may succeed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Passing {
    /// No connection.
    #[error("cannot be reached ({0})")]
    Unreachable(String),
    /// A connection that broke off.
    #[error("broke off ({0})")]
    BrokeOff(String),
    /// No whole answer in time.
    #[error("has not answered in {} s", .0.as_secs_f64())]
    Silent(Duration),
    /// Status 429.
    #[error("is asked too often (status 429{detail}{})", after.map(|after| format!(", wait {} s", after.as_secs_f64())).unwrap_or_default())]
    Busy {
        /// What it said.
        detail: Detail,
        /// How long it asks one to wait.
        after: Option<Duration>,
    },
    /// A status of 500 or more, or another that passes.
    #[error("fails (status {status}{detail})")]
    Failing {
        /// HTTP's status.
        status: u16,
        /// What it said.
        detail: Detail,
        /// How long it asks one to wait.
        after: Option<Duration>,
    },
    /// An answer that is no completion.
    #[error("answers no completion ({0})")]
    Nonsense(String),
}

impl Passing {
    /// Its name in counts.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::BrokeOff(_) => "broke_off",
            Self::Silent(_) => "silent",
            Self::Busy { .. } => "busy",
            Self::Failing { .. } => "failing",
            Self::Nonsense(_) => "nonsense",
        }
    }

    /// How long the endpoint asks one to wait.
    pub(super) fn after(&self) -> Option<Duration> {
        match self {
            Self::Busy { after, .. } | Self::Failing { after, .. } => *after,
            _ => None,
        }
    }

    /// Whether it may be the picture's fault: a bug that it meets, or an answer without end. A gateway's statuses tell of the endpoint alone.
    pub(super) fn may_be_the_pictures(&self) -> bool {
        matches!(self, Self::Silent(_) | Self::Nonsense(_) | Self::BrokeOff(_) | Self::Failing { status: 500, .. })
    }

    fn advice(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "check `endpoint`, and that its server runs",
            Self::Silent(_) => "raise `timeout`, or lower `concurrency` or `max_tokens`",
            Self::Busy { .. } => "lower `concurrency`, or set `requests_per_minute` or `tokens_per_minute`; and run it again",
            Self::BrokeOff(_) | Self::Failing { .. } | Self::Nonsense(_) => "see its server's log, and run it again",
        }
    }
}

/// What an endpoint said of its failure, in a line; empty where it said nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail(pub(super) String);

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}
