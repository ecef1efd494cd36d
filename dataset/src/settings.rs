//! What decides a prepared data set's bytes, beside its sources.

use std::fmt;
use std::str::FromStr;

use ella_store::Digest;
use serde::{Deserialize, Serialize};

use crate::caption_set::check_name;
use crate::error::DataError;
use crate::picture::{Crop, Encoding, SDXL_BUCKETS, buckets};
use crate::source::{Field, Fields, Within};

/// Fields that hold a sample's caption where none is named, in this order.
pub(crate) const CAPTION_FIELDS: [&str; 3] = ["txt", "caption", "text"];

/// How samples are filtered, and what becomes of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Side of the square pictures, pixels: a multiple of 8, 8 to 8192. With buckets, pictures have at most a square's area.
    pub resolution: u32,
    /// Sizes other than the square. None: all pictures are square.
    pub buckets: Option<Buckets>,
    /// Which part of a picture is kept.
    pub crop: Crop,
    /// Which samples are kept.
    pub filters: Filters,
    /// The columns of captions, at least one.
    pub captions: Vec<CaptionColumn>,
    /// How pictures are stored.
    pub encoding: Encoding,
    /// Whether pictures are stored. Off makes sense only with latents.
    pub images: bool,
    /// What becomes of pictures that are there twice.
    pub duplicates: Duplicates,
    /// A shard is closed when its images, captions and latents reach this many bytes.
    pub shard_bytes: u64,
    /// Put the source's name (`photos-00000/`) before every key, for sources that number their samples alike.
    pub key_prefix: bool,
    /// Column of tables and lists that holds the picture or its name. None: found by name and type.
    pub image_column: Option<String>,
    /// Column of tables and lists that holds the key. None: found by name.
    pub key_column: Option<String>,
}

/// Sizes that pictures are cut to: the one of the nearest aspect ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Buckets {
    /// All sizes whose sides are multiples of a step, as large as the resolution's square allows.
    Step {
        /// Pixels.
        step: u32,
        /// Largest ratio of the longer side to the shorter.
        max_aspect: f64,
    },
    /// The 40 sizes of SDXL's paper (appendix I), for a resolution of 1024.
    Sdxl,
}

/// One column of captions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionColumn {
    /// The column's name in the data set.
    pub name: String,
    /// The sources' field, or the path of one within others (`conversations.1.value`). None: the first of `txt`, `caption` and `text` that a sample
    /// has.
    pub field: Option<String>,
    /// How often training takes it, relative to the other columns that a sample has; a run's config may say otherwise.
    pub weight: f64,
}

impl Default for CaptionColumn {
    /// The column `caption`, from the usual fields.
    fn default() -> CaptionColumn {
        CaptionColumn { name: "caption".into(), field: None, weight: 1.0 }
    }
}

impl FromStr for CaptionColumn {
    type Err = DataError;

    /// `FIELD`, `FIELD:WEIGHT`, `NAME=FIELD` or `NAME=FIELD:WEIGHT`; without a name, the field's.
    fn from_str(text: &str) -> Result<CaptionColumn, DataError> {
        let wrong = || DataError::Setting { field: "caption", rule: "[NAME=]FIELD[:WEIGHT], with a number", found: format!("{text:?}") };
        let (name, rest) = text.split_once('=').map_or((None, text), |(name, rest)| (Some(name), rest));
        let (field, weight) = match rest.rsplit_once(':') {
            Some((field, weight)) => (field, weight.trim().parse().map_err(|_| wrong())?),
            None => (rest, 1.0),
        };
        if field.is_empty() {
            return Err(wrong());
        }
        Ok(CaptionColumn { name: name.unwrap_or(field).to_owned(), field: Some(field.to_owned()), weight })
    }
}

/// What becomes of pictures that are there twice. The first, in the order of the sources, is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Duplicates {
    /// All are kept.
    Keep,
    /// Files of the same bytes are kept once.
    Exact,
    /// Also pictures that look alike: perceptual hashes that differ in at most so many of 64 bits.
    Near {
        /// 0 to [`Duplicates::MOST_BITS`].
        bits: u32,
    },
}

impl Duplicates {
    /// Beyond this, unrelated pictures begin to look alike.
    pub const MOST_BITS: u32 = 12;
}

/// Which samples are kept. What fails is refused, and counted by reason.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filters {
    /// Smallest length of an original's shorter side, pixels.
    pub min_edge: u32,
    /// Largest ratio of an original's longer side to the shorter.
    pub max_aspect: Option<f64>,
    /// Fewest pixels of an original.
    pub min_area: Option<u64>,
    /// Most pixels of an original.
    pub max_area: Option<u64>,
    /// Most pixels that are decoded: a bound against decompression bombs.
    pub max_pixels: u64,
    /// Fewest words in a caption.
    pub min_caption_words: u32,
    /// Most words in a caption.
    pub max_caption_words: Option<u32>,
    /// Bounds in a text encoder's own tokens.
    pub caption_tokens: Option<TokenRule>,
    /// What numbers among a sample's fields must satisfy.
    pub conditions: Vec<Condition>,
    /// Digest of the list of keys that alone are kept.
    pub allow: Option<Digest>,
    /// Digest of the list of keys that are not kept.
    pub deny: Option<Digest>,
}

/// Bounds on a caption's length in tokens, special tokens included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRule {
    /// Digest of the tokenizer.
    pub tokenizer: Digest,
    /// Fewest.
    pub min: u32,
    /// Most.
    pub max: Option<u32>,
}

/// A rule for a number among a sample's fields, such as `aesthetic>6`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Condition {
    field: String,
    relation: Relation,
    number: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    Less,
    AtMost,
    More,
    AtLeast,
    Equal,
    Unequal,
}

/// Signs of two characters first, so that they are found before their first characters are.
const SIGNS: [(&str, Relation); 6] = [
    ("<=", Relation::AtMost),
    (">=", Relation::AtLeast),
    ("!=", Relation::Unequal),
    ("<", Relation::Less),
    (">", Relation::More),
    ("=", Relation::Equal),
];

impl Condition {
    /// Whether a sample's fields satisfy it; none if it has no such number. Text that is a number counts as one.
    pub fn holds(&self, fields: &Fields) -> Option<bool> {
        let found = match fields.get(&self.field)? {
            Field::Number(found) => *found,
            Field::Text(text) => text.trim().parse().ok()?,
            _ => return None,
        };
        if found.is_nan() {
            return None;
        }
        Some(match self.relation {
            Relation::Less => found < self.number,
            Relation::AtMost => found <= self.number,
            Relation::More => found > self.number,
            Relation::AtLeast => found >= self.number,
            Relation::Equal => found == self.number,
            Relation::Unequal => found != self.number,
        })
    }

    /// The field.
    pub fn field(&self) -> &str {
        &self.field
    }
}

impl FromStr for Condition {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Condition, DataError> {
        let wrong = || {
            let rule = "FIELD, then one of < <= > >= = !=, then a number";
            DataError::Setting { field: "where", rule, found: format!("{text:?}") }
        };
        let places = SIGNS.iter().filter_map(|(sign, relation)| Some((text.find(sign)?, *sign, *relation)));
        // The leftmost sign; of two at one place the longer, which is listed first.
        let (at, sign, relation) = places.min_by_key(|(at, ..)| *at).ok_or_else(wrong)?;
        let (field, number) = (text[..at].trim(), text[at + sign.len()..].trim().parse::<f64>().map_err(|_| wrong())?);
        if field.is_empty() || !number.is_finite() {
            return Err(wrong());
        }
        Ok(Condition { field: field.to_owned(), relation, number })
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = SIGNS.iter().find(|(_, relation)| *relation == self.relation).map_or("", |(sign, _)| sign);
        write!(f, "{}{sign}{}", self.field, self.number)
    }
}

impl From<Condition> for String {
    fn from(condition: Condition) -> String {
        condition.to_string()
    }
}

impl TryFrom<String> for Condition {
    type Error = DataError;

    fn try_from(text: String) -> Result<Condition, DataError> {
        text.parse()
    }
}

impl Filters {
    /// The usual ones for a resolution: no picture is enlarged, any caption of one word or more.
    pub fn new(resolution: u32) -> Filters {
        Filters {
            min_edge: resolution,
            max_aspect: None,
            min_area: None,
            max_area: None,
            max_pixels: 1 << 27,
            min_caption_words: 1,
            max_caption_words: None,
            caption_tokens: None,
            conditions: Vec::new(),
            allow: None,
            deny: None,
        }
    }

    fn check(&self) -> Result<(), DataError> {
        rule(self.min_edge >= 1, "min_edge", "1 or more", self.min_edge)?;
        let aspect = self.max_aspect.unwrap_or(1.0);
        rule(aspect >= 1.0 && aspect.is_finite(), "max_aspect", "a number of 1 or more", aspect)?;
        let most = self.max_area.unwrap_or(u64::MAX);
        rule(most >= self.min_area.unwrap_or(1).max(1), "max_area", "1 or more, and not below min_area", most)?;
        let most = self.max_caption_words.unwrap_or(u32::MAX);
        rule(most >= self.min_caption_words.max(1), "max_caption_words", "1 or more, and not below min_caption_words", most)?;
        if let Some(TokenRule { min, max: Some(max), .. }) = self.caption_tokens {
            rule(max >= min.max(1), "max_caption_tokens", "1 or more, and not below min_caption_tokens", max)?;
        }
        rule((1..=1 << 30).contains(&self.max_pixels), "max_pixels", "1 to 2^30", self.max_pixels)
    }
}

impl Settings {
    /// The usual settings for a resolution: squares cut from the centre, quality 95, shards of 128 MiB, the same picture once.
    pub fn new(resolution: u32) -> Settings {
        Settings {
            resolution,
            buckets: None,
            crop: Crop::Centre,
            filters: Filters::new(resolution),
            captions: vec![CaptionColumn::default()],
            encoding: Encoding::Jpeg { quality: 95 },
            images: true,
            duplicates: Duplicates::Exact,
            shard_bytes: 128 << 20,
            key_prefix: false,
            image_column: None,
            key_column: None,
        }
    }

    /// The sizes that pictures are cut to: one square, or the buckets.
    pub fn sizes(&self) -> Vec<(u32, u32)> {
        match self.buckets {
            None => vec![(self.resolution, self.resolution)],
            Some(Buckets::Step { step, max_aspect }) => buckets(self.resolution, step, max_aspect),
            Some(Buckets::Sdxl) => SDXL_BUCKETS.to_vec(),
        }
    }

    /// The fields that are named by paths, if they lie within others.
    pub(crate) fn within(&self) -> Within {
        let captions = self.captions.iter().filter_map(|column| column.field.as_deref());
        let named = captions.chain(self.filters.conditions.iter().map(Condition::field));
        Within::Named(named.filter(|field| field.contains('.')).map(str::to_owned).collect())
    }

    /// Checks every field against its range.
    pub fn check(&self) -> Result<(), DataError> {
        let side = self.resolution;
        rule(side.is_multiple_of(8) && (8..=8192).contains(&side), "resolution", "a multiple of 8 from 8 to 8192", side)?;
        self.filters.check()?;
        self.check_buckets()?;
        self.check_captions()?;
        let (Encoding::Jpeg { quality } | Encoding::Webp { quality }) = self.encoding;
        rule((1..=100).contains(&quality), "quality", "1 to 100", quality)?;
        if let Duplicates::Near { bits } = self.duplicates {
            rule(bits <= Duplicates::MOST_BITS, "near_bits", "0 to 12 of the 64 bits", bits)?;
        }
        let bytes = self.shard_bytes;
        rule((1..=4 << 30).contains(&bytes), "shard_bytes", "1 byte to 4 GiB", bytes)
    }

    fn check_buckets(&self) -> Result<(), DataError> {
        match self.buckets {
            None => Ok(()),
            Some(Buckets::Sdxl) => rule(self.resolution == 1024, "resolution", "1024 for SDXL's buckets", self.resolution),
            Some(Buckets::Step { step, max_aspect }) => {
                rule(
                    step.is_multiple_of(8) && step >= 8 && step <= self.resolution,
                    "buckets",
                    "a multiple of 8, at most the resolution",
                    step,
                )?;
                rule((1.0..=16.0).contains(&max_aspect), "bucket aspect", "1 to 16", max_aspect)
            }
        }
    }

    fn check_captions(&self) -> Result<(), DataError> {
        rule(!self.captions.is_empty(), "caption", "one column or more", "none")?;
        for (i, column) in self.captions.iter().enumerate() {
            check_name(&column.name)?;
            rule(column.field.as_deref() != Some(""), "caption", "the name of a field", "an empty name")?;
            let weight = column.weight;
            rule(weight >= 0.0 && weight.is_finite(), "caption weight", "a number of 0 or more", weight)?;
            let again = self.captions[..i].iter().any(|earlier| earlier.name == column.name);
            rule(!again, "caption", "of another name in every column", &column.name)?;
        }
        rule(self.captions.iter().any(|column| column.weight > 0.0), "caption weight", "above 0 for one column or more", 0)
    }
}

fn rule(ok: bool, field: &'static str, rule: &'static str, found: impl ToString) -> Result<(), DataError> {
    if ok { Ok(()) } else { Err(DataError::Setting { field, rule, found: found.to_string() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(entries: &[(&str, Field)]) -> Fields {
        entries.iter().map(|(name, field)| ((*name).to_owned(), field.clone())).collect()
    }

    #[test]
    fn conditions_compare_numbers_and_text_that_is_one() {
        let sample = fields(&[("aesthetic", Field::Number(6.5)), ("score", Field::Text(" 7 ".into())), ("bad", Field::Other)]);
        for (text, expected) in [
            ("aesthetic>6", Some(true)),
            ("aesthetic > 6.5", Some(false)),
            ("aesthetic>=6.5", Some(true)),
            ("aesthetic<=6", Some(false)),
            ("aesthetic!=6", Some(true)),
            ("score=7", Some(true)),
            ("score<7", Some(false)),
            ("bad<7", None),
            ("none<7", None),
        ] {
            let condition: Condition = text.parse().unwrap();
            assert_eq!(condition.holds(&sample), expected, "{text}");
            assert_eq!(condition.to_string().parse::<Condition>().unwrap(), condition, "{text}");
        }
        for text in ["", "a", "a>", ">6", "a>b", "a=>6", "a>inf", "a>NaN"] {
            assert!(text.parse::<Condition>().is_err(), "{text}");
        }
    }

    #[test]
    fn caption_columns_are_read_with_name_field_and_weight() {
        let column = |name: &str, field: &str, weight| CaptionColumn { name: name.into(), field: Some(field.into()), weight };
        for (text, expected) in [
            ("dense", column("dense", "dense", 1.0)),
            ("dense:0.7", column("dense", "dense", 0.7)),
            ("caption=txt", column("caption", "txt", 1.0)),
            ("short=alt_text:3", column("short", "alt_text", 3.0)),
        ] {
            assert_eq!(text.parse::<CaptionColumn>().unwrap(), expected);
        }
        for text in ["", "a=", "a:b", ":1"] {
            assert!(text.parse::<CaptionColumn>().is_err(), "{text}");
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let settings = |change: fn(&mut Settings)| {
            let mut settings = Settings::new(512);
            change(&mut settings);
            settings.check().unwrap_err().to_string()
        };
        assert!(settings(|s| s.resolution = 100).contains("resolution"));
        assert!(settings(|s| s.captions.clear()).contains("caption"));
        assert!(settings(|s| s.captions.push(CaptionColumn::default())).contains("another name"));
        assert!(settings(|s| s.captions[0].weight = 0.0).contains("above 0"));
        assert!(settings(|s| s.buckets = Some(Buckets::Sdxl)).contains("1024"));
        assert!(settings(|s| s.buckets = Some(Buckets::Step { step: 12, max_aspect: 2.0 })).contains("multiple of 8"));
        assert!(settings(|s| s.encoding = Encoding::Webp { quality: 0 }).contains("quality"));
        assert!(settings(|s| s.duplicates = Duplicates::Near { bits: 30 }).contains("0 to 12 of the 64 bits"));
        assert!(settings(|s| s.filters.max_aspect = Some(0.5)).contains("max_aspect"));
        assert!(settings(|s| (s.filters.min_area, s.filters.max_area) = (Some(5), Some(4))).contains("max_area"));
        Settings::new(512).check().unwrap();
    }
}
