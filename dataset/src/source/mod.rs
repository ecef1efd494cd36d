//! Sources: the files that samples come from, wherever they lie.
//!
//! A [`Source`] is one file: a WebDataset tar, a Parquet file, or a list (JSON, CSV) whose rows name picture files. It falls into
//! [`Piece`]s, which can be prepared apart; a piece is read sample by sample, in the order of the file. What is read depends on the
//! file's bytes only (and, for lists, on those of the pictures), never on how it was found or fetched.
//!
//! Memory while a piece is read: of a tar, one sample; of a list, sixteen pictures of which at most 8 MiB each are fetched before
//! they are wanted; of a Parquet file, some pages (larger ones lie in a temporary file), whatever the size of its row groups.

mod array;
mod braces;
mod columns;
mod fetch;
mod find;
mod list;
mod parquet;
pub(crate) mod rows;
mod sample;
mod tar;
#[cfg(test)]
mod tests;
mod within;

use std::ops::Range;

use ella_store::{Digest, Store};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

pub use self::rows::csv_records;
pub use self::sample::{Field, Fields, Member, Sample};
pub(crate) use self::within::Within;
use crate::error::DataError;

/// What a source is, by the ending of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// `.tar`: WebDataset.
    Tar,
    /// `.parquet`: pictures in it, or their paths.
    Parquet,
    /// `.jsonl`, `.ndjson`: an object a line, with the path of its picture.
    Jsonl,
    /// `.json`: an array of such objects.
    Json,
    /// `.csv`: names of columns, then rows, with the path of the picture.
    Csv,
}

/// How rows of Parquet files and lists are understood. Without names, columns are found by the usual ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SourceOptions {
    /// The column that holds the picture or its path. None: in Parquet the first that holds bytes of `image`, `jpg`, `jpeg`, `png`,
    /// `webp`, `gif`, `img`, `picture`, `image_bytes`, `bytes`; else the first of `file_name`, `image_path`, `image`, `path`, `object_key`,
    /// `url`, `image_file`, `filename`, `filepath`, `image_url`, `key`.
    pub image_column: Option<String>,
    /// The column that holds the sample's key. None: the first of `key`, `__key__`, `id`. Where a row has none, the key is its
    /// picture's path without the ending; where there is none either, the file's stem and the row's number.
    pub key_column: Option<String>,
}

/// One file that samples come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its folder: paths in its rows are relative to that.
    store: Store,
    key: String,
    name: String,
    bytes: u64,
    stamp: Option<String>,
    kind: SourceKind,
    options: SourceOptions,
    within: Within,
}

/// The part of a source that one unit of work prepares: a whole tar; row groups of a Parquet file, 256 MB or the first that is larger;
/// 2,000 rows of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Its rows; `0..0` for a tar, whose samples are not counted before it is read.
    pub rows: Range<u64>,
    /// Where in the file it lies.
    pub bytes: Range<u64>,
}

/// What reading a whole piece showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PieceRead {
    /// Bytes of the file that it takes up; pictures that lie elsewhere are not counted.
    pub bytes: u64,
    /// BLAKE3 of a tar's bytes; else of the samples in order: keys, pictures, fields.
    pub blake3: Digest,
    /// Members of a tar that no sample used: folders, links, hidden files, other kinds of file.
    pub ignored: u64,
}

/// A file's name without its ending.
pub(crate) fn stem(file_name: &str) -> &str {
    file_name.rsplit_once('.').map_or(file_name, |(stem, _)| stem)
}

impl Source {
    /// The source as messages name it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file's name without its folder.
    pub fn file_name(&self) -> &str {
        &self.key
    }

    /// The file's name without its folder and ending.
    pub fn stem(&self) -> &str {
        stem(&self.key)
    }

    /// The folders that it lies in, from the root of its store.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &str> {
        let url = self.store.url();
        let path = url.split_once("://").map_or(url, |(_, path)| path);
        path.split('/').filter(|folder| !folder.is_empty())
    }

    /// Size in bytes when it was found.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The same, with these fields within others.
    pub(crate) fn with(self, within: Within) -> Source {
        Source { within, ..self }
    }

    /// What kind of file it is.
    pub fn kind(&self) -> SourceKind {
        self.kind
    }

    /// Which version of the file was found: the store's entity tag, or the time of its last change where there is none.
    pub fn stamp(&self) -> Option<&str> {
        self.stamp.as_deref()
    }

    /// What it falls into, in the order of the file. A pure function of the file's content.
    ///
    /// # Errors
    /// `SourceCorrupt` for a file that is empty or not of its kind, `SourceColumns` if no column names a picture, `SourceLocation` for a field
    /// that is named and cannot be read, `Store`.
    pub async fn pieces(&self) -> Result<Vec<Piece>, DataError> {
        match self.kind {
            SourceKind::Tar => Ok(vec![Piece { rows: 0..0, bytes: 0..self.bytes }]),
            SourceKind::Parquet => parquet::pieces(self).await,
            SourceKind::Jsonl | SourceKind::Json | SourceKind::Csv => {
                let source = self.clone();
                let stopped = |e: tokio::task::JoinError| DataError::Stopped { source_name: self.name.clone(), what: e.to_string() };
                tokio::task::spawn_blocking(move || list::pieces(&source)).await.map_err(stopped)?
            }
        }
    }

    /// Reads a piece to its end and hands over each sample in turn; `each` returns false to stop early (then `None`). Blocks: must be
    /// called in a tokio runtime, but outside its async tasks.
    ///
    /// # Errors
    /// `SourceChanged` if the file is not the one that was found, `SourceCorrupt` naming the place, `Store`.
    pub fn read(&self, piece: &Piece, each: &mut dyn FnMut(Sample) -> bool) -> Result<Option<PieceRead>, DataError> {
        self.check_unchanged()?;
        match self.kind {
            SourceKind::Tar => tar::read(self, each),
            SourceKind::Parquet => parquet::read(self, piece, each),
            SourceKind::Jsonl | SourceKind::Json | SourceKind::Csv => list::read(self, piece, each),
        }
    }

    /// Whether any row of a list has any of these fields. Reads the list, and no pictures. Blocks, as [`Self::read`] does.
    pub(crate) fn has_field(&self, fields: &[String]) -> Result<bool, DataError> {
        list::has_field(self, fields)
    }

    fn check_unchanged(&self) -> Result<(), DataError> {
        let head = Handle::current().block_on(self.store.head(&self.key))?;
        let meta = head.ok_or_else(|| DataError::SourceMissing { source_name: self.name.clone() })?;
        if meta.bytes != self.bytes {
            return Err(self.changed(&format!("{} bytes", self.bytes), &format!("{}", meta.bytes)));
        }
        if meta.stamp != self.stamp {
            let version = |stamp: &Option<String>| format!("version {}", stamp.as_deref().unwrap_or("unknown"));
            return Err(self.changed(&version(&self.stamp), &version(&meta.stamp)));
        }
        Ok(())
    }

    fn changed(&self, expected: &str, found: &str) -> DataError {
        DataError::SourceChanged { source_name: self.name.clone(), expected: expected.to_owned(), found: found.to_owned() }
    }

    fn corrupt(&self, offset: u64, what: &str) -> DataError {
        DataError::SourceCorrupt { source_name: self.name.clone(), offset, what: what.to_owned() }
    }

    fn no_picture(&self, columns: &[&str]) -> DataError {
        let names = match &self.options.image_column {
            Some(name) => name.clone(),
            None if self.kind == SourceKind::Parquet => [&columns::BYTES[..], &columns::PATHS[..]].concat().join(", "),
            None => columns::PATHS.join(", "),
        };
        DataError::SourceColumns { source_name: self.name.clone(), expected: names, found: columns.join(", ") }
    }
}
