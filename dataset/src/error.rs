//! What can go wrong with data, by what the reader of the message can do about it.
//!
//! One bad sample among many is not an error: it is a [`Refusal`](crate::Refusal), counted in the report (KNOWN).

use std::io;
use std::path::PathBuf;

use ella_store::{Digest, StoreError};

/// An error of the data plane. Every message names the file, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The object store failed: unreachable, refused, full.
    #[error(transparent)]
    Store(#[from] StoreError),

    /// A file on this machine could not be read.
    #[error("{}: cannot be read ({source}); check the path and its permissions", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A temporary file could not be written or read.
    #[error("{}: a temporary file cannot be used ({source}); free some room there, or point TMPDIR at a disk that has it", folder.display())]
    Temporary {
        /// The folder for temporary files.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A source was named that is not there.
    #[error(
        "{source_name}: no source is there (expected a .tar, .parquet, .jsonl, .json or .csv file, or a folder of tars or Parquet \
         files, or with a metadata.jsonl, .csv or .parquet); check the path, and name other lists themselves"
    )]
    SourceMissing {
        /// The source as it was given.
        source_name: String,
    },

    /// What a location names cannot be a source.
    #[error("{location}: {what}")]
    SourceLocation {
        /// The location as it was given, or a file that it names.
        location: String,
        /// What is wrong with it, and what to do.
        what: String,
    },

    /// A set of prompts cannot be used.
    #[error("{location}: {what}")]
    Prompts {
        /// The set as it was given, or a file of it.
        location: String,
        /// What is wrong with it, and where in it.
        what: String,
    },

    /// No sample of a source has any of the fields that were named for captions, or of the usual ones.
    #[error(
        "{source_name}: no sample has a field of captions ({fields}); its samples have: {found}; name one of these, of texts (--caption)"
    )]
    CaptionField {
        /// The source as it was given.
        source_name: String,
        /// Those that were looked for.
        fields: String,
        /// The fields that the first samples have, some of them; of those within others the paths of texts.
        found: String,
    },

    /// No column of a source holds pictures or their paths.
    #[error("{source_name}: no column of pictures (expected one of: {expected}; found: {found}); name it with --image-column")]
    SourceColumns {
        /// The source as it was given.
        source_name: String,
        /// The columns looked for.
        expected: String,
        /// The columns that are there.
        found: String,
    },

    /// A source is not the one that was found.
    #[error("{source_name}: the file changed meanwhile (expected {expected}, found {found}); run the same command again")]
    SourceChanged {
        /// The source as it was given.
        source_name: String,
        /// What it was.
        expected: String,
        /// What it is.
        found: String,
    },

    /// A source is not a whole, readable file of its kind.
    #[error("{source_name}: {what} (at byte {offset}); fetch or make this file again, then run the same command to go on")]
    SourceCorrupt {
        /// The source as it was given.
        source_name: String,
        /// Where in the file reading stopped.
        offset: u64,
        /// What is wrong there.
        what: String,
    },

    /// A source is not what was prepared.
    #[error(
        "{source_name}: changed since it was prepared ({expected} bytes then, {found} now, or others of as many, in it or in a file that it \
         names); bring the old file back, or prepare into a new destination"
    )]
    SourceReplaced {
        /// The source as it was given.
        source_name: String,
        /// Bytes that were read then.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },

    /// A picture that a row names could not be fetched, and may be later; or its store refuses them.
    #[error("{source_name}: row {key:?}: {source}; run the same command again to go on, or take the row out of the list")]
    Picture {
        /// The list as it was given.
        source_name: String,
        /// The row's key.
        key: String,
        /// What its store said.
        source: Box<StoreError>,
    },

    /// Pictures that a list names are not what was prepared.
    #[error(
        "{pictures}: changed since the list was prepared, or gone (list: {source_name}); bring back the old, or prepare into a new destination"
    )]
    PicturesReplaced {
        /// The list as it was given.
        source_name: String,
        /// Where the pictures are, the first of them.
        pictures: String,
    },

    /// There is no such column of captions.
    #[error("{data}: no captions of the name {column:?} (there are: {known})")]
    ColumnMissing {
        /// The data set.
        data: String,
        /// The name asked for.
        column: String,
        /// The names there are.
        known: String,
    },

    /// A setting is out of its range.
    #[error("{field}: must be {rule} (found {found})")]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// The rule it breaks.
        rule: &'static str,
        /// The value given.
        found: String,
    },

    /// The destination holds another data set, or features made otherwise.
    #[error(
        "{file}: holds something else: {field} differs (expected {expected}, found {found}); choose another destination, or empty this one"
    )]
    Other {
        /// The file that says what the destination holds.
        file: String,
        /// The first field that differs.
        field: String,
        /// What this command would write.
        expected: String,
        /// What is there.
        found: String,
    },

    /// The destination is a run's folder.
    #[error("{folder}: holds something else: a run ({file} is there); choose another destination")]
    HoldsRun {
        /// The destination.
        folder: String,
        /// What says so.
        file: &'static str,
    },

    /// An added column of captions is made by other settings.
    #[error(
        "{file}: the column is made otherwise: {field} differs (expected {expected}, found {found}); choose another --column, or delete its \
         folder"
    )]
    OtherColumn {
        /// The file that says how it is made.
        file: String,
        /// The first setting that differs.
        field: String,
        /// What this command would write.
        expected: String,
        /// What is there.
        found: String,
    },

    /// A record (manifest, plan, unit, features) cannot be understood.
    #[error("{file}: {what}; the file was written by another version of ella, or was changed: prepare the data again")]
    Record {
        /// The file.
        file: String,
        /// The field and the rule it breaks.
        what: String,
    },

    /// A record that should be there is not.
    #[error("{file}: not found; {hint}")]
    RecordMissing {
        /// The file.
        file: String,
        /// What to do.
        hint: &'static str,
    },

    /// A file's bytes are not those that its manifest names.
    #[error(
        "{file}: damaged: its BLAKE3 digest is wrong (expected {expected}, found {found}); restore it from a copy, or delete it and run the same `ella prepare` (`ella embed` for features) again"
    )]
    Digest {
        /// The file.
        file: String,
        /// The digest in the manifest.
        expected: Digest,
        /// The digest of the bytes read.
        found: Digest,
    },

    /// A file that was lost was made again with other bytes than its record names.
    #[error(
        "{file}: was made again, but with other bytes than its record names (expected BLAKE3 {expected}, found {found}): from a source \
         that changed, on another kind of processor, or by a model that answers anew; restore it from a copy, or make all of it anew in another destination"
    )]
    MadeOtherwise {
        /// The file.
        file: String,
        /// The digest in the record.
        expected: Digest,
        /// The digest of what was made.
        found: Digest,
    },

    /// An Arrow file does not hold what it should.
    #[error("{file}: not a usable Arrow file: {what}; prepare the data again")]
    Arrow {
        /// The file.
        file: String,
        /// The column or part, and the rule it breaks.
        what: String,
    },

    /// Two samples of different sources have the same key.
    #[error("{second}: key {key:?} is already taken by a sample of {first}; {hint}")]
    DuplicateKey {
        /// The key.
        key: String,
        /// The source that came first.
        first: String,
        /// The source that repeats it.
        second: String,
        /// What to do.
        hint: &'static str,
    },

    /// Nothing was left after the filters.
    #[error("no sample was kept of {read} read ({refused}); loosen the filters, or check the sources")]
    NothingKept {
        /// Samples read.
        read: u64,
        /// Counts by reason, as text.
        refused: String,
    },

    /// A row that a shard does not have was asked for.
    #[error("{file}: row {row} was asked for, but it has {rows}")]
    Row {
        /// The shard.
        file: String,
        /// The row asked for.
        row: usize,
        /// Rows there are.
        rows: usize,
    },

    /// Readers hold so much fetched data that no more fits into memory.
    #[error(
        "{file}: no room for its {bytes} bytes: other fetched files in use fill the {limit} bytes there are for them (data.memory_bytes); raise it"
    )]
    Crowded {
        /// The file that was wanted.
        file: String,
        /// Its size.
        bytes: u64,
        /// The bound.
        limit: u64,
    },

    /// There are no features of the wanted encoder.
    #[error("{folder}: no features of this encoder; there {found}; run `ella embed` with this text encoder and these settings")]
    FeaturesMissing {
        /// Where the wanted ones would lie: their folder is named by the encoder's fingerprint.
        folder: String,
        /// Which fingerprints exist, and how each differs.
        found: String,
    },

    /// The features of a shard would be more than their store takes.
    #[error(
        "{file}: the features of its captions would be {bytes} bytes, of which this store takes {most} in one request; prepare the data set with \
         smaller shards (--shard-mib {shard_mib} or less), or store less of each caption (--max-tokens, --dtype fp16)"
    )]
    FeaturesTooLarge {
        /// The shard.
        file: String,
        /// What they would be.
        bytes: u64,
        /// What the store takes.
        most: u64,
        /// Size of shards whose features it would take, MiB.
        shard_mib: u64,
    },

    /// Features, or added captions, lack some files.
    #[error("{folder}: {missing_count} of {total} files are not there ({missing}); {hint}")]
    SidecarIncomplete {
        /// The folder.
        folder: String,
        /// How many are missing.
        missing_count: usize,
        /// How many files there should be: one for every shard, and such as the empty caption's.
        total: usize,
        /// The first missing ones, by name.
        missing: String,
        /// What to do.
        hint: &'static str,
    },

    /// A row of features has the wrong size.
    #[error("features row {row}: {what}")]
    FeatureRow {
        /// The row in its shard.
        row: usize,
        /// What is wrong.
        what: String,
    },

    /// The latent encoder failed.
    #[error("encoding latents failed: {0}")]
    Latents(#[source] Box<dyn std::error::Error + Send + Sync>),

    /// A worker thread died or was stopped.
    #[error("preparing {source_name} stopped: {what}; run the same command again to go on")]
    Stopped {
        /// The source being prepared.
        source_name: String,
        /// Why.
        what: String,
    },
}

impl DataError {
    /// Whether a setting is at fault, whatever the data are.
    pub fn is_usage(&self) -> bool {
        matches!(self, DataError::Setting { .. } | DataError::Store(StoreError::BadUrl { .. } | StoreError::Unsupported { .. }))
    }

    /// Whether it would come again wherever and whenever the same is tried: input or settings that can't be used. Else it may pass.
    pub fn is_permanent(&self) -> bool {
        match self {
            DataError::Store(error) => error.is_permanent(),
            DataError::Picture { source, .. } => source.is_permanent(),
            DataError::Io { source, .. } => is_refused(source) || is_none(source),
            DataError::Temporary { source, .. } => is_refused(source),
            DataError::Latents(_) | DataError::Stopped { .. } | DataError::Crowded { .. } => false,
            _ => true,
        }
    }
}

fn is_refused(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// Whether what was named is not there, or is something else.
fn is_none(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound};
    [InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound].contains(&error.kind()) || is_link_loop(error)
}

/// Whether links lead in a circle. The kind has no stable name, but its text.
pub(crate) fn is_link_loop(error: &io::Error) -> bool {
    format!("{:?}", error.kind()) == "FilesystemLoop"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_not_tried_again() {
        let io = |source: io::Error| DataError::Io { path: "/nope".into(), source };
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory, io::ErrorKind::IsADirectory, io::ErrorKind::InvalidInput] {
            assert!(io(kind.into()).is_permanent(), "{kind}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("round", dir.path().join("round")).unwrap();
        assert!(io(std::fs::read(dir.path().join("round")).unwrap_err()).is_permanent());
        assert!(!io(io::ErrorKind::Interrupted.into()).is_permanent() && !io(io::ErrorKind::StorageFull.into()).is_permanent());
    }
}
