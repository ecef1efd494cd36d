//! What became of the pictures, and what it took (KNOWN).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::client::Captioned;
use super::error::{CaptionFailure, CaptionRefusal, Passing};

/// What became of the pictures that a client was asked about, and what it took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionCounts {
    /// Pictures with a caption.
    pub captioned: u64,
    /// Pictures that are to have none, by reason.
    pub refused: BTreeMap<CaptionRefusal, u64>,
    /// Pictures that the endpoint failed.
    pub failed: u64,
    /// Requests made, retries among them.
    pub requests: u64,
    /// Attempts that failed in passing, by what happened ([`Passing::kind`]).
    pub passing: BTreeMap<String, u64>,
    /// Tokens read, as the endpoint counts them.
    pub input_tokens: u64,
    /// Tokens written.
    pub output_tokens: u64,
}

impl CaptionCounts {
    /// Counts what became of a picture.
    pub(super) fn note(&mut self, outcome: &Result<Captioned, CaptionFailure>) {
        let usage = match outcome {
            Ok(caption) => {
                self.captioned += 1;
                caption.usage
            }
            Err(CaptionFailure::Refused(refused)) => {
                *self.refused.entry(refused.why).or_default() += 1;
                refused.usage
            }
            Err(CaptionFailure::Endpoint(_)) => {
                self.failed += 1;
                return;
            }
        };
        self.input_tokens += usage.input_tokens;
        self.output_tokens += usage.output_tokens;
    }

    /// Counts an attempt that failed in passing.
    pub(super) fn note_passing(&mut self, what: &Passing) {
        *self.passing.entry(what.kind().to_owned()).or_default() += 1;
    }
}
