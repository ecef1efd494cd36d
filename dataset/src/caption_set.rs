//! Columns of captions that were added to a data set later, in sidecar files beside the shards ([`crate::sidecar`]), row for row:
//!
//! | column | |
//! |---|---|
//! | `caption` (utf8) | empty where none could be made |
//! | `outcome` (utf8) | `captioned`, `trimmed` (to its whole sentences), or `refused.<why>` |
//! | `said` (utf8) | of a refused one: what was said or found, in a line |
//! | `input_tokens`, `output_tokens` (uint64) | what it took |
//!
//! They lie in `captions/<column>/`; `report.json` there names every picture that was refused, by reason (KNOWN). A model may answer
//! otherwise each time, so all that is counted is counted from the file that stands. A data set's own columns and the added ones are named
//! and used alike.

use std::sync::Arc;

use arrow_array::builder::StringBuilder;
use arrow_array::{Array, ArrayRef, StringArray, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use ella_store::Store;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::content::Content;
use crate::error::DataError;
use crate::ipc::{self, BATCH_BYTES, BATCH_ROWS};
use crate::manifest::{Manifest, pretty};
use crate::plan::REPORT;
use crate::sidecar::{Counts, Declined, FileRecord, Kind, Sidecar, SidecarManifest, Told};

/// The folder of all added columns in a data set's.
const FOLDER: &str = "captions";
const COLUMN: &str = "caption";
const OUTCOME: &str = "outcome";
const SAID: &str = "said";
const TOKENS: [&str; 2] = ["input_tokens", "output_tokens"];
/// The outcome of a picture that has a caption.
const CAPTIONED: &str = "captioned";
/// The same, of a caption that was cut off and ends at its last whole sentence.
const TRIMMED: &str = "trimmed";
/// Before the reason why a picture has none.
const REFUSED: &str = "refused.";

/// What an added column is made by, as JSON: whatever decides its captions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionSpec {
    /// The column's name.
    pub column: String,
    /// The captioner: its model, prompt and limits.
    pub made_by: serde_json::Value,
}

impl Kind for CaptionSpec {
    const EXTRA: &'static [&'static str] = &[];
    const HINT: &'static str = "run `ella caption` again to complete them";

    // A model may answer otherwise each time: the first answer stands.
    fn stands(&self, file: &Bytes, rows: u64) -> bool {
        read_made("captions", file.clone()).is_ok_and(|made| made.len() as u64 == rows)
    }
}

/// What became of one picture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// The caption; empty where there is none.
    pub caption: String,
    /// Why there is none, in a word, and what was said of it.
    pub refused: Option<(String, String)>,
    /// The caption was cut off, and these are its whole sentences.
    pub trimmed: bool,
    /// Tokens read.
    pub input_tokens: u64,
    /// Tokens written.
    pub output_tokens: u64,
}

impl Made {
    fn outcome(&self) -> String {
        match &self.refused {
            Some((why, _)) => format!("{REFUSED}{why}"),
            None if self.trimmed => TRIMMED.to_owned(),
            None => CAPTIONED.to_owned(),
        }
    }
}

/// What `captions/<column>/report.json` says.
#[derive(Debug, Serialize)]
struct CaptionReport<'a> {
    captioned: u64,
    trimmed: u64,
    refused: &'a Declined,
}

/// What a file tells, whose rows have these keys.
fn told(file: &str, keys: &[String], bytes: Bytes) -> Result<Told, DataError> {
    let (mut counts, mut declined) = (Counts::new(), Declined::new());
    let mut count = |name: &str, n: u64| {
        if n > 0 {
            *counts.entry(name.to_owned()).or_default() += n;
        }
    };
    for (made, key) in read_made(file, bytes)?.into_iter().zip(keys) {
        count(TOKENS[0], made.input_tokens);
        count(TOKENS[1], made.output_tokens);
        count(TRIMMED, u64::from(made.trimmed));
        match made.refused {
            None => count(CAPTIONED, 1),
            Some((why, said)) => {
                count(&format!("{REFUSED}{why}"), 1);
                declined.entry(why).or_default().insert(key.clone(), said);
            }
        }
    }
    Ok(Told { counts, declined })
}

/// A whole added column.
pub type CaptionManifest = SidecarManifest<CaptionSpec>;

/// An added column of captions: being made, or whole.
#[derive(Clone, Debug)]
pub struct CaptionSet(Sidecar<CaptionSpec>);

impl CaptionSet {
    /// Begins, or goes on with, a column in a data set's folder. One that the data set has itself, or that is made otherwise, is refused.
    pub fn begin<'a>(store: &'a Store, data: &'a Arc<Manifest>, spec: CaptionSpec) -> BoxFuture<'a, Result<CaptionSet, DataError>> {
        Box::pin(async move {
            check_name(&spec.column)?;
            if data.captions.iter().any(|own| own.name == spec.column) {
                let (rule, found) = ("a name that no column of the data set has", spec.column);
                return Err(DataError::Setting { field: "column", rule, found });
            }
            let folder = format!("{FOLDER}/{}", spec.column);
            let begun = Sidecar::new(store, &folder, data, spec).begin().await;
            Ok(CaptionSet(begun.map_err(|error| match error {
                DataError::Other { file, field, expected, found } => {
                    let field = field.strip_prefix("spec.made_by.").map(str::to_owned).unwrap_or(field);
                    DataError::OtherColumn { file, field, expected, found }
                }
                error => error,
            })?))
        })
    }

    /// An added column that must be there, whole or not.
    pub fn find<'a>(store: &'a Store, data: &'a Arc<Manifest>, column: &'a str) -> BoxFuture<'a, Result<CaptionSet, DataError>> {
        Box::pin(async move {
            let folder = format!("{FOLDER}/{column}");
            let there = Sidecar::<CaptionSpec>::spec_in(&store.child(&folder)).await?;
            let spec = match there {
                Some(spec) => spec,
                None => return Err(missing(store, data, column).await?),
            };
            let set = Sidecar::new(store, &folder, data, spec);
            set.is_begun().await?;
            Ok(CaptionSet(set))
        })
    }

    /// Shards of the data set that have no captions in this column yet.
    pub fn missing(&self) -> BoxFuture<'_, Result<Vec<usize>, DataError>> {
        Box::pin(async move { Ok(self.0.missing().await?.0) })
    }

    /// Stores a shard's captions, once; `keys` are the shard's. If another attempt was first, its captions stay. Gives what the file that
    /// stands counts: `captioned`, of them `trimmed`, `refused.<why>`, and tokens.
    pub fn write<'a>(&'a self, shard: usize, keys: &'a [String], made: &'a [Made]) -> BoxFuture<'a, Result<Counts, DataError>> {
        Box::pin(async move {
            let file = write_made(made)?;
            let name = format!("{}/{}.arrow", self.0.folder.url(), self.0.stem(shard));
            Ok(self.0.write(shard, made.len() as u64, file, |file| told(&name, keys, file)).await?.counts)
        })
    }

    /// Fails unless every shard has its captions; then their report and manifest, which are written if they were not there.
    pub fn finish(&self) -> BoxFuture<'_, Result<CaptionManifest, DataError>> {
        Box::pin(async move {
            if self.0.manifest().await?.is_none() {
                let records = self.0.records().await?;
                let (counts, mut refused) = (FileRecord::total(&records), Declined::new());
                for (why, keys) in records.into_iter().flat_map(|record| record.declined) {
                    refused.entry(why).or_default().extend(keys);
                }
                let of = |name: &str| counts.get(name).copied().unwrap_or(0);
                let report = CaptionReport { captioned: of(CAPTIONED), trimmed: of(TRIMMED), refused: &refused };
                // Whoever does it too writes the same: it is made from the same records.
                self.0.folder.put(REPORT, pretty(&report)).await?;
            }
            self.0.finish().await
        })
    }

    /// The folder that the names of the manifest's entries are in.
    pub(crate) fn folder(&self) -> &Store {
        &self.0.folder
    }
}

/// The names of the added columns in a data set's folder.
pub async fn captions_in(store: &Store) -> Result<Vec<String>, DataError> {
    let folders = store.folders(FOLDER).await?;
    Ok(folders.iter().map(|folder| folder.rsplit('/').next().unwrap_or_default().to_owned()).collect())
}

async fn missing(store: &Store, data: &Manifest, column: &str) -> Result<DataError, DataError> {
    let own = data.captions.iter().map(|own| own.name.clone());
    let known: Vec<String> = own.chain(captions_in(store).await?).collect();
    Ok(DataError::ColumnMissing { data: store.url().to_owned(), column: column.to_owned(), known: known.join(", ") })
}

/// Names of columns become parts of file and Arrow column names.
pub(crate) fn check_name(name: &str) -> Result<(), DataError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(plain) {
        return Ok(());
    }
    Err(DataError::Setting { field: "caption column", rule: "1 to 64 letters, digits, '-', '_' or '.'", found: format!("{name:?}") })
}

fn write_made(made: &[Made]) -> Result<Bytes, DataError> {
    let texts = [COLUMN, OUTCOME, SAID].map(|name| Field::new(name, DataType::Utf8, false));
    let numbers = TOKENS.map(|name| Field::new(name, DataType::UInt64, false));
    let mut file = ipc::Writer::new(Arc::new(Schema::new(texts.into_iter().chain(numbers).collect::<Vec<_>>())))?;
    let mut left = made;
    while !left.is_empty() {
        let mut bytes = 0;
        let fits = |made: &&Made| {
            bytes += (made.caption.len() + made.refused.as_ref().map_or(0, |(_, said)| said.len())) as u64;
            bytes <= BATCH_BYTES
        };
        let count = left.iter().take(BATCH_ROWS).take_while(fits).count().max(1);
        let (batch, rest) = left.split_at(count);
        let [mut captions, mut outcomes, mut said] = [(); 3].map(|()| StringBuilder::new());
        for made in batch {
            captions.append_value(&made.caption);
            outcomes.append_value(made.outcome());
            said.append_value(made.refused.as_ref().map_or("", |(_, said)| said));
        }
        let input = UInt64Array::from_iter_values(batch.iter().map(|made| made.input_tokens));
        let output = UInt64Array::from_iter_values(batch.iter().map(|made| made.output_tokens));
        let texts = [captions, outcomes, said].map(|mut column| Arc::new(column.finish()) as ArrayRef);
        file.write(texts.into_iter().chain([Arc::new(input) as ArrayRef, Arc::new(output)]).collect())?;
        left = rest;
    }
    file.finish()
}

/// All that a file says, in order. `file` names it in errors.
fn read_made(file: &str, bytes: Bytes) -> Result<Vec<Made>, DataError> {
    let texts = [COLUMN, OUTCOME, SAID].map(|name| (name, DataType::Utf8));
    let columns: Vec<_> = texts.into_iter().chain(TOKENS.map(|name| (name, DataType::UInt64))).collect();
    let mut made = Vec::new();
    for batch in ipc::batches(&Content::good(file, bytes), &columns)? {
        let text = |name| ipc::column::<StringArray>(file, &batch, name);
        let number = |name| ipc::column::<UInt64Array>(file, &batch, name);
        let (captions, outcomes, said) = (text(COLUMN)?, text(OUTCOME)?, text(SAID)?);
        let (input, output) = (number(TOKENS[0])?, number(TOKENS[1])?);
        for row in 0..batch.num_rows() {
            let outcome = outcomes.value(row);
            let refused = outcome.strip_prefix(REFUSED).map(|why| (why.to_owned(), said.value(row).to_owned()));
            if refused.is_none() && outcome != CAPTIONED && outcome != TRIMMED {
                return Err(DataError::Arrow { file: file.to_owned(), what: format!("column {OUTCOME}: {outcome:?} is no outcome") });
            }
            made.push(Made {
                caption: captions.value(row).to_owned(),
                refused,
                trimmed: outcome == TRIMMED,
                input_tokens: input.value(row),
                output_tokens: output.value(row),
            });
        }
    }
    Ok(made)
}

/// The captions of one file, in order. `file` names it in errors.
pub(crate) fn read_captions(file: &str, bytes: Bytes) -> Result<Vec<String>, DataError> {
    let mut captions = Vec::new();
    for batch in ipc::batches(&Content::good(file, bytes), &[(COLUMN, DataType::Utf8)])? {
        let column: StringArray = ipc::column(file, &batch, COLUMN)?;
        captions.extend((0..column.len()).map(|row| column.value(row).to_owned()));
    }
    Ok(captions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_come_back_as_they_were_written() {
        for count in [0, 1, 255, 256, 257, 700] {
            let made: Vec<Made> = (0..count)
                .map(|i| match i % 7 {
                    3 => Made { refused: Some(("empty".into(), format!("{i}"))), input_tokens: i, ..Made::default() },
                    _ => {
                        Made { caption: format!("Bild № {i}"), trimmed: i % 2 == 0, input_tokens: 1, output_tokens: i, ..Made::default() }
                    }
                })
                .collect();
            let file = write_made(&made).unwrap();
            assert_eq!(read_made("x", file.clone()).unwrap(), made);
            let captions: Vec<_> = made.into_iter().map(|made| made.caption).collect();
            assert_eq!(read_captions("x", file).unwrap(), captions);
        }
    }

    #[test]
    fn names_that_would_be_paths_are_refused() {
        for name in ["", ".", "..", ".x", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["caption", "dense-2", "v1.5_short"] {
            check_name(name).unwrap();
        }
    }
}
