//! What the run log's records hold. Unknown fields are refused: a record that this version does not understand must not be guessed at.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// One record of the run log: `log/000000000042.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its number: contiguous from 0, equal to the file's name.
    pub seq: u64,
    /// The term of the coordinator that wrote it.
    pub term: u64,
    /// That coordinator's own mark: unique to the incarnation.
    pub nonce: String,
    /// When it was written, in milliseconds since 1970. For people; nothing is decided by it.
    pub at_unix_ms: u64,
    /// What it says.
    pub body: Body,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Body {
    /// A coordinator begins: the first record of each term.
    Term(Term),
    /// A checkpoint exists.
    Commit(Commit),
    /// The keep rule gives up these commits; their folders are about to be deleted.
    Retire {
        /// Folders, as in [`Commit::folder`].
        commits: Vec<String>,
    },
    /// The coordinator ends.
    End {
        /// How.
        outcome: Outcome,
        /// The last applied step.
        step: u64,
        /// In words, for people.
        reason: String,
    },
}

/// Who begins a term.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    /// The machine's name.
    pub host: String,
    /// The program's version.
    pub version: String,
    /// The digest of the run's effective config.
    pub config_digest: Digest,
}

/// How a coordinator ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The run is complete.
    Done,
    /// Told to leave; the run can be resumed.
    Preempted,
    /// It could not go on.
    Failed,
}

/// A checkpoint: everything that a resume needs, bound together (COMMIT).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// Applied optimizer steps.
    pub step: u64,
    /// The generation that trained it.
    pub generation: u64,
    /// How many ranks that generation had.
    pub world: u32,
    /// Where the parts lie, relative to the run: `commits/000000012000.7` (step.term).
    pub folder: String,
    /// Every file in it.
    pub parts: Vec<Part>,
    /// The digest of the run's effective config.
    pub config_digest: Digest,
    /// The digest of the data set's manifest.
    pub data_digest: Digest,
    /// The digest of the frozen models: base, schedule, text encoder and tokenizer.
    pub models_digest: Digest,
    /// The epoch of the next step, from 0.
    pub epoch: u64,
    /// Steps of that epoch already taken.
    pub step_in_epoch: u64,
    /// What was used so far, by epoch (ONCE). One that is not listed, between two that are, is as the first of these: finished epochs are alike.
    pub ledger: Vec<LedgerEpoch>,
    /// The digest of weights, optimizer and EMA, on which all ranks agreed.
    pub state_digest: Digest,
    /// What rank 0 computed with, by name: `device` is `cpu` or `cuda`. A run goes on with that kind of device, unless its config names the other.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub computed_with: BTreeMap<String, String>,
}

impl Commit {
    /// What was used of an epoch, if anything was.
    pub fn of_epoch(&self, epoch: u64) -> Option<&LedgerEpoch> {
        let after = self.ledger.partition_point(|entry| entry.epoch <= epoch);
        let entry = self.ledger.get(after.checked_sub(1)?)?;
        (entry.epoch == epoch || after < self.ledger.len()).then_some(entry)
    }

    /// Samples used, of all epochs together.
    pub fn samples(&self) -> u64 {
        let alike = self.ledger.windows(2).map(|pair| pair[0].samples.saturating_mul(pair[1].epoch.saturating_sub(pair[0].epoch)));
        alike.chain(self.ledger.last().map(|last| last.samples)).fold(0, u64::saturating_add)
    }
}

/// One file of a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The file's name in the commit's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its digest.
    pub blake3: Digest,
}

/// The samples used in one epoch (ONCE).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerEpoch {
    /// The epoch, from 0.
    pub epoch: u64,
    /// How many samples.
    pub samples: u64,
    /// The sum of their keys' hashes: 32 hex digits.
    pub hash: String,
}
