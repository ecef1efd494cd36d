//! What became of every sample that was read (KNOWN).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Why a sample was not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Refusal {
    /// The caption is there, but has no words.
    CaptionEmpty,
    /// The caption is null, a number, a list or the like; or the `.json` file that should hold it is not a JSON object.
    CaptionJsonInvalid,
    /// More words than the setting allows, or a caption file of more than a mebibyte.
    CaptionLong,
    /// There is no such field: no `.txt`, no such entry or column.
    CaptionMissing,
    /// The caption is not UTF-8.
    CaptionNotUtf8,
    /// Fewer words than the setting asks for.
    CaptionShort,
    /// An earlier sample of the same source has this key.
    DuplicateKey,
    /// No jpg, jpeg, png or webp in a tar; no file of that name; null.
    ImageMissing,
    /// More pixels or bytes than are decoded.
    ImageTooLarge,
    /// Truncated, corrupt, or not a JPEG, PNG or WebP picture at all.
    ImageUndecodable,
    /// The name in the tar, or the key of the row, is not UTF-8.
    KeyNotUtf8,
    /// The shorter side is shorter than the setting asks for.
    MinEdge,
    /// A line of a list that is no JSON object or no whole CSV row, is longer than 4 MiB, or names its picture by what is no path.
    RowInvalid,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// Keys refused, by reason, in the order in which they were read.
pub type Refused = BTreeMap<Refusal, Vec<String>>;

/// How many samples were read and kept, and which were refused why. `read = kept + all refused`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Samples read.
    pub read: u64,
    /// Samples in the prepared data set.
    pub kept: u64,
    /// Keys refused, by reason.
    pub refused: Refused,
}

impl Report {
    /// Counts a sample that was kept.
    pub fn keep(&mut self) {
        self.read += 1;
        self.kept += 1;
    }

    /// Counts a sample that was refused.
    pub fn refuse(&mut self, key: String, why: Refusal) {
        self.read += 1;
        self.refused.entry(why).or_default().push(key);
    }

    /// Adds what became of another source's samples, after this one's.
    pub fn merge(&mut self, other: Report) {
        self.read += other.read;
        self.kept += other.kept;
        for (why, keys) in other.refused {
            self.refused.entry(why).or_default().extend(keys);
        }
    }

    /// Whether the counts add up: every sample read was kept or refused.
    pub fn adds_up(&self) -> bool {
        self.read == self.kept + self.refused.values().map(|keys| keys.len() as u64).sum::<u64>()
    }

    /// Counts by reason as one line, such as `7 min_edge, 1 image_missing`.
    pub fn refused_line(&self) -> String {
        let parts: Vec<_> = self.refused.iter().map(|(why, keys)| format!("{} {why}", keys.len())).collect();
        if parts.is_empty() { "none refused".into() } else { parts.join(", ") }
    }
}
