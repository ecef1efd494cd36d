//! Columns of captions that were added to a data set later, in sidecar files beside the shards ([`crate::sidecar`]): one Arrow column
//! `caption` (utf8), row for row; an empty one where none could be made.
//!
//! They lie in `captions/<column>/`. A data set's own columns and the added ones are named and used alike.

use std::sync::Arc;

use arrow_array::builder::StringBuilder;
use arrow_array::{Array, ArrayRef, StringArray};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use ella_store::Store;
use serde::{Deserialize, Serialize};

use crate::content::Content;
use crate::error::DataError;
use crate::ipc::{self, BATCH_BYTES, BATCH_ROWS};
use crate::manifest::Manifest;
use crate::sidecar::{Counts, Kind, Sidecar, SidecarManifest};

/// The folder of all added columns in a data set's.
const FOLDER: &str = "captions";
const COLUMN: &str = "caption";

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
        read_captions("captions", file.clone()).is_ok_and(|captions| captions.len() as u64 == rows)
    }
}

/// A whole added column.
pub type CaptionManifest = SidecarManifest<CaptionSpec>;

/// An added column of captions: being made, or whole.
#[derive(Clone, Debug)]
pub struct CaptionSet(Sidecar<CaptionSpec>);

impl CaptionSet {
    /// Begins, or goes on with, a column in a data set's folder. One that the data set has itself, or that is made otherwise, is refused.
    pub async fn begin(store: &Store, data: &Arc<Manifest>, spec: CaptionSpec) -> Result<CaptionSet, DataError> {
        check_name(&spec.column)?;
        if data.captions.iter().any(|own| own.name == spec.column) {
            let (rule, found) = ("a name that no column of the data set has", spec.column);
            return Err(DataError::Setting { field: "column", rule, found });
        }
        let folder = format!("{FOLDER}/{}", spec.column);
        Ok(CaptionSet(Sidecar::new(store, &folder, data, spec).begin().await?))
    }

    /// An added column that must be there, whole or not.
    pub async fn find(store: &Store, data: &Arc<Manifest>, column: &str) -> Result<CaptionSet, DataError> {
        let folder = format!("{FOLDER}/{column}");
        let there = Sidecar::<CaptionSpec>::spec_in(&store.child(&folder)).await?;
        let spec = match there {
            Some(spec) => spec,
            None => return Err(missing(store, data, column).await?),
        };
        let set = Sidecar::new(store, &folder, data, spec);
        set.is_begun().await?;
        Ok(CaptionSet(set))
    }

    /// Shards of the data set that have no captions in this column yet.
    pub async fn missing(&self) -> Result<Vec<usize>, DataError> {
        Ok(self.0.missing().await?.0)
    }

    /// Stores a shard's captions, once, with what was counted. If another worker was first, its captions stay.
    pub async fn write(&self, shard: usize, captions: &[String], counts: Counts) -> Result<(), DataError> {
        let file = write_captions(captions)?;
        self.0.write(shard, captions.len() as u64, file, counts).await.map(|_| ())
    }

    /// Fails unless every shard has its captions; then their manifest, which is written if it was not there.
    pub async fn finish(&self) -> Result<CaptionManifest, DataError> {
        self.0.finish().await
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

fn write_captions(captions: &[String]) -> Result<Bytes, DataError> {
    let schema = Schema::new(vec![Field::new(COLUMN, DataType::Utf8, false)]);
    let mut file = ipc::Writer::new(Arc::new(schema))?;
    let mut left = captions;
    while !left.is_empty() {
        let mut bytes = 0;
        let fits = |caption: &&String| {
            bytes += caption.len() as u64;
            bytes <= BATCH_BYTES
        };
        let count = left.iter().take(BATCH_ROWS).take_while(fits).count().max(1);
        let (batch, rest) = left.split_at(count);
        let mut column = StringBuilder::new();
        batch.iter().for_each(|caption| column.append_value(caption));
        file.write(vec![Arc::new(column.finish()) as ArrayRef])?;
        left = rest;
    }
    file.finish()
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
            let captions: Vec<String> = (0..count).map(|i| if i % 7 == 3 { String::new() } else { format!("Bild № {i}") }).collect();
            assert_eq!(read_captions("x", write_captions(&captions).unwrap()).unwrap(), captions);
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
