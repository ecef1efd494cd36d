//! What became of every sample that was read (KNOWN).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Why a sample was not kept. As text: a name, and for some a `:` and what exactly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum Refusal {
    /// Fewer or more pixels than the settings allow.
    Area,
    /// Longer in one direction than the setting allows.
    Aspect,
    /// The caption is there, but has no words.
    CaptionEmpty,
    /// The caption is no text, the `.json` file that should hold it is not JSON, or its tokens can't be counted.
    CaptionInvalid,
    /// More words or tokens than the settings allow, or a caption file of more than a mebibyte.
    CaptionLong,
    /// None of the fields that hold captions; or a link that leads to no caption file.
    CaptionMissing,
    /// The caption is not UTF-8.
    CaptionNotUtf8,
    /// Fewer words or tokens than the settings ask for.
    CaptionShort,
    /// A number among the sample's fields does not satisfy this rule.
    Condition(String),
    /// The key is on the list of those that are not kept.
    Denied,
    /// An earlier sample has a picture of the same bytes.
    DuplicateImage,
    /// An earlier sample of the same source has this key.
    DuplicateKey,
    /// More than one picture in one file.
    ImageAnimated,
    /// No picture, or not there where it should be.
    ImageMissing,
    /// More pixels or bytes than are decoded.
    ImageTooLarge,
    /// Truncated, corrupt, or not a JPEG, PNG, WebP or GIF picture at all.
    ImageUndecodable,
    /// The key is not UTF-8.
    KeyNotUtf8,
    /// The shorter side is shorter than the setting asks for.
    MinEdge,
    /// An earlier sample's picture looks like this one's.
    NearDuplicate,
    /// The key is not on the list of those that alone are kept.
    NotAllowed,
    /// The sample has no number of this name, which a rule asks for.
    NumberMissing(String),
    /// A line of a list, or a row of a table, that can't be read.
    RowInvalid,
}

/// The names of reasons that say all by themselves.
const NAMES: [(&str, Refusal); 20] = [
    ("area", Refusal::Area),
    ("aspect", Refusal::Aspect),
    ("caption_empty", Refusal::CaptionEmpty),
    ("caption_invalid", Refusal::CaptionInvalid),
    ("caption_long", Refusal::CaptionLong),
    ("caption_missing", Refusal::CaptionMissing),
    ("caption_not_utf8", Refusal::CaptionNotUtf8),
    ("caption_short", Refusal::CaptionShort),
    ("denied", Refusal::Denied),
    ("duplicate_image", Refusal::DuplicateImage),
    ("duplicate_key", Refusal::DuplicateKey),
    ("image_animated", Refusal::ImageAnimated),
    ("image_missing", Refusal::ImageMissing),
    ("image_too_large", Refusal::ImageTooLarge),
    ("image_undecodable", Refusal::ImageUndecodable),
    ("key_not_utf8", Refusal::KeyNotUtf8),
    ("min_edge", Refusal::MinEdge),
    ("near_duplicate", Refusal::NearDuplicate),
    ("not_allowed", Refusal::NotAllowed),
    ("row_invalid", Refusal::RowInvalid),
];

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::Condition(rule) => write!(f, "condition:{rule}"),
            Refusal::NumberMissing(field) => write!(f, "number_missing:{field}"),
            other => f.write_str(NAMES.iter().find(|(_, refusal)| refusal == other).map_or("", |(name, _)| name)),
        }
    }
}

impl From<Refusal> for String {
    fn from(refusal: Refusal) -> String {
        refusal.to_string()
    }
}

impl TryFrom<String> for Refusal {
    type Error = String;

    fn try_from(text: String) -> Result<Refusal, String> {
        match text.split_once(':') {
            Some(("condition", rule)) => return Ok(Refusal::Condition(rule.to_owned())),
            Some(("number_missing", field)) => return Ok(Refusal::NumberMissing(field.to_owned())),
            _ => {}
        }
        let known = NAMES.iter().find(|(name, _)| *name == text);
        known.map(|(_, refusal)| refusal.clone()).ok_or_else(|| format!("unknown reason {text:?}"))
    }
}

/// Keys refused, by reason, in the order in which they were read.
pub type Refused = BTreeMap<Refusal, Vec<String>>;

/// Keys of one reason that a whole data set's report names: those of 10⁸ samples would fit into no memory.
pub const MOST_NAMED: usize = 100_000;

/// How many samples were read and kept, and which were refused why. `read = kept + all refused`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Samples read.
    pub read: u64,
    /// Samples in the prepared data set.
    pub kept: u64,
    /// Keys refused, by reason; of a whole data set the first [`MOST_NAMED`] of each.
    pub refused: Refused,
    /// How many more were refused for a reason than `refused` names. The records in `units` name them all.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub refused_unnamed: BTreeMap<Refusal, u64>,
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

    /// Adds what became of another source's samples, after this one's. At most [`MOST_NAMED`] keys of a reason stay named.
    pub fn merge(&mut self, other: Report) {
        self.read += other.read;
        self.kept += other.kept;
        for (why, keys) in other.refused {
            let named = self.refused.entry(why.clone()).or_default();
            let room = MOST_NAMED.saturating_sub(named.len());
            if keys.len() > room {
                *self.refused_unnamed.entry(why).or_default() += (keys.len() - room) as u64;
            }
            named.extend(keys.into_iter().take(room));
        }
        for (why, more) in other.refused_unnamed {
            *self.refused_unnamed.entry(why).or_default() += more;
        }
    }

    /// How many samples were refused, by reason.
    pub fn counts(&self) -> impl Iterator<Item = (&Refusal, u64)> {
        self.refused.iter().map(|(why, keys)| (why, keys.len() as u64 + self.refused_unnamed.get(why).copied().unwrap_or(0)))
    }

    /// Whether the counts add up: every sample read was kept or refused.
    pub fn adds_up(&self) -> bool {
        self.read == self.counts().map(|(_, count)| count).fold(self.kept, u64::saturating_add)
    }

    /// Counts by reason as one line, such as `7 min_edge, 1 image_missing`.
    pub fn refused_line(&self) -> String {
        let parts: Vec<_> = self.counts().map(|(why, count)| format!("{count} {why}")).collect();
        if parts.is_empty() { "none refused".into() } else { parts.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_reads_back_from_its_name() {
        let with = [Refusal::Condition("a>6".into()), Refusal::NumberMissing("a:b".into())];
        for refusal in NAMES.iter().map(|(_, refusal)| refusal.clone()).chain(with) {
            let text = refusal.to_string();
            assert!(!text.is_empty());
            assert_eq!(Refusal::try_from(text), Ok(refusal));
        }
        assert!(Refusal::try_from("no_such_reason".to_owned()).is_err());
    }

    #[test]
    fn of_very_many_the_first_are_named_and_all_are_counted() {
        let of = |from: usize, to: usize| {
            let mut report = Report::default();
            (from..to).for_each(|n| report.refuse(n.to_string(), Refusal::MinEdge));
            report.keep();
            report
        };
        let mut all = Report::default();
        for (from, to) in [(0, 1), (1, MOST_NAMED + 2), (MOST_NAMED + 2, MOST_NAMED + 5)] {
            all.merge(of(from, to));
        }
        let few = serde_json::to_value(of(0, 2)).unwrap();
        assert_eq!(few, serde_json::json!({ "read": 3, "kept": 1, "refused": { "min_edge": ["0", "1"] } }));
        let (named, read) = (&all.refused[&Refusal::MinEdge], MOST_NAMED as u64 + 8);
        assert_eq!((all.read, all.kept, all.adds_up(), all.refused_line()), (read, 3, true, format!("{} min_edge", read - 3)));
        assert!(named.len() == MOST_NAMED && named.iter().enumerate().all(|(n, key)| *key == n.to_string()));
        let json = serde_json::to_value(&all).unwrap();
        assert_eq!(json["refused_unnamed"], serde_json::json!({ "min_edge": 5 }));
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), all);
    }
}
