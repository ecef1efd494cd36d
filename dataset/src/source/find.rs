//! From paths, URLs, folders, globs and brace ranges to sources.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use ella_store::{Meta, Store, redacted};
use futures::{StreamExt, TryStreamExt, stream};
use glob::{MatchOptions, Pattern};

use super::{Source, SourceKind, SourceOptions, Within, braces};
use crate::error::DataError;
use crate::verify::Damage;

/// Names looked up at once.
const HEADS: usize = 32;
/// Of this many names in one folder, a listing is asked rather than each of them.
const LIST_FROM: usize = 256;
/// Files that make a folder one source, with pictures in files of their own.
const METADATA: [&str; 3] = ["metadata.csv", "metadata.jsonl", "metadata.parquet"];
const ACCEPTED: &str = "expected a .tar, .parquet, .jsonl, .ndjson, .json or .csv file";
/// As a shell matches: `*` does not cross folders, and hidden files must be named.
const MATCH: MatchOptions = MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

impl Source {
    /// The sources that a location names, sorted by name. A location is a path or URL (`file://`, `s3://`, `gs://`, `az://`,
    /// `http(s)://`) of
    /// - a file: `.tar`, `.parquet`, `.jsonl`, `.ndjson`, `.json` or `.csv`;
    /// - a folder: all tars and Parquet files directly in it that are not hidden (but no Parquet file beside a tar of the same name: that
    ///   is what img2dataset says of the tar); or, if it holds `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, that list of
    ///   pictures (`imagefolder`); not both;
    /// - several by a glob (`*`, `?`, `[a-z]`, `**` for folders however deep) and braces (`{000..099}`, `{a,b}`). What is there under
    ///   the very name is taken first. Over HTTP, which has no listing, files and braces only.
    ///
    /// # Errors
    /// `SourceMissing` naming what matches nothing, `SourceLocation` for what cannot be a source, `Store`.
    pub async fn find(location: &str) -> Result<Vec<Source>, DataError> {
        Source::find_with(location, &SourceOptions::default()).await
    }

    /// The same, with what is said of its columns.
    ///
    /// # Errors
    /// Those of [`Source::find`].
    pub async fn find_with(location: &str, options: &SourceOptions) -> Result<Vec<Source>, DataError> {
        Source::find_all(&[location], options).await
    }

    /// The sources of several locations, in the order given. The same file twice is an error.
    ///
    /// # Errors
    /// Those of [`Source::find`].
    pub async fn find_all<L: AsRef<str>>(locations: &[L], options: &SourceOptions) -> Result<Vec<Source>, DataError> {
        let (mut sources, mut seen) = (Vec::new(), HashSet::new());
        for location in locations {
            let location = location.as_ref();
            let mut found = in_location(location, options).await?;
            found.sort_by(|a, b| a.name.cmp(&b.name));
            for source in &found {
                if !seen.insert((source.store.url().to_owned(), source.key.clone())) {
                    return Err(refused(&source.name, "is named twice; name every file once"));
                }
            }
            sources.extend(found);
        }
        Ok(sources)
    }

    /// Those that are there of the sources of several locations, in the order given, and what is wrong with the others.
    ///
    /// # Errors
    /// A store's that may pass.
    pub async fn find_there<L: AsRef<str>>(locations: &[L], options: &SourceOptions) -> Result<(Vec<Source>, Vec<Damage>), DataError> {
        let (mut sources, mut gone) = (Vec::new(), Vec::new());
        for location in locations {
            let mut there = Vec::new();
            let mut lacking = |name: &str, error: DataError| {
                if !error.is_permanent() {
                    return Err(error);
                }
                gone.push(Damage { file: shown(name), what: error.to_string() });
                Ok(())
            };
            match places_in(location.as_ref()).await {
                Err(error) => lacking(location.as_ref(), error)?,
                Ok((places, listings)) => {
                    let lookups = stream::iter(&places).map(|place| place.sources(&listings, options)).buffered(HEADS);
                    for (place, found) in places.iter().zip(lookups.collect::<Vec<_>>().await) {
                        match found {
                            Ok(found) => there.extend(found),
                            Err(error) => lacking(&place.name, error)?,
                        }
                    }
                }
            }
            there.sort_by(|a: &Source, b: &Source| a.name.cmp(&b.name));
            sources.extend(there);
        }
        Ok((sources, gone))
    }
}

async fn in_location(location: &str, options: &SourceOptions) -> Result<Vec<Source>, DataError> {
    let (places, listings) = places_in(location).await?;
    let lookups = stream::iter(&places).map(|place| place.sources(&listings, options)).buffered(HEADS);
    lookups.try_concat().await
}

/// What a location stands for, and the folders that are listed for it.
async fn places_in(location: &str) -> Result<(Vec<Place>, Listings), DataError> {
    if location.is_empty() {
        return Err(missing(location));
    }
    let there = !location.contains("://") && Path::new(location).exists();
    let names = if there { vec![location.to_owned()] } else { braces::expand(location).map_err(|what| refused(location, &what))? };
    let places: Vec<Place> = names.into_iter().map(|name| Place::of(name, there)).collect();
    let listings = listings(&places).await?;
    Ok((places, listings))
}

fn missing(location: &str) -> DataError {
    DataError::SourceMissing { source_name: shown(location) }
}

fn refused(location: &str, what: &str) -> DataError {
    DataError::SourceLocation { location: shown(location), what: what.to_owned() }
}

/// A location as errors name it: of a signed URL, or one with a password, without the secret. A `?` alone is a pattern's.
fn shown(location: &str) -> String {
    let is_signed = location.split_once('?').is_some_and(|(_, query)| query.contains('='));
    let told = redacted(location);
    // Besides a query and a fragment only a user and a password are left out.
    let has_user = told != location.split(['?', '#']).next().unwrap_or_default().trim_end_matches('/');
    if is_signed || has_user { told } else { location.to_owned() }
}

/// The kind of file that a name's ending tells.
fn kind(name: &str) -> Result<SourceKind, String> {
    let lower = name.to_ascii_lowercase();
    let packed = [".gz", ".zst", ".xz", ".bz2", ".lz4", ".tgz", ".zip"].iter().any(|ending| lower.ends_with(ending));
    match lower.rsplit_once('.').map(|(_, ending)| ending) {
        Some("tar") => Ok(SourceKind::Tar),
        Some("parquet") => Ok(SourceKind::Parquet),
        Some("jsonl" | "ndjson") => Ok(SourceKind::Jsonl),
        Some("json") => Ok(SourceKind::Json),
        Some("csv") => Ok(SourceKind::Csv),
        _ if packed => Err(format!("is compressed ({ACCEPTED}); unpack it first: pictures are compressed already")),
        _ => Err(format!("is no source ({ACCEPTED})")),
    }
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// One name after its braces are expanded: a folder as it was typed, and what is meant in it.
struct Place {
    name: String,
    folder: String,
    /// Components below the folder; none means the folder itself.
    below: Vec<String>,
    /// Whether the components are names, whatever they look like.
    literal: bool,
}

impl Place {
    /// `literal`: it is there under this very name, on this machine.
    fn of(name: String, literal: bool) -> Place {
        let place = |folder: &str, below: &str| Place {
            name: name.clone(),
            folder: folder.to_owned(),
            below: below.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect(),
            literal,
        };
        let local_folder = literal && Path::new(&name).is_dir();
        if local_folder || !literal && !is_pattern(&name) && kind(&name).is_err() {
            return place(&name, "");
        }
        let pattern = if literal { None } else { name.find(['*', '?', '[']) };
        let scheme = name.find("://").map_or(0, |at| at + 3);
        match name[..pattern.unwrap_or(name.len())].rfind('/').filter(|&slash| slash >= scheme) {
            Some(0) => place("/", &name[1..]),
            Some(slash) => place(&name[..slash], &name[slash + 1..]),
            None if scheme > 0 => place(&name, ""),
            None => place(".", &name),
        }
    }

    /// The name of a file in its folder, if that is what it is.
    fn file(&self) -> Option<&str> {
        match &self.below[..] {
            [file] if self.literal || !is_pattern(file) => Some(file),
            _ => None,
        }
    }

    fn is_http(&self) -> bool {
        self.folder.starts_with("http://") || self.folder.starts_with("https://")
    }

    async fn sources(&self, listings: &Listings, options: &SourceOptions) -> Result<Vec<Source>, DataError> {
        if self.is_http() && self.file().is_none() {
            return Err(refused(&self.name, "has no listing over HTTP; name the files, or use a brace range such as {000..099}.tar"));
        }
        let store = Store::open(&self.folder)?;
        let found = match self.file() {
            Some(file) => match listings.get(&self.folder) {
                Some(listing) => listing.get(file).cloned(),
                None => store.head(file).await?,
            }
            .into_iter()
            .collect(),
            None if self.below.is_empty() => in_folder(&self.name, store.files("").await?)?,
            None => matching(&self.name, &store, &self.below).await?,
        };
        if found.is_empty() {
            return Err(missing(&self.name));
        }
        let literal = self.file().is_some();
        found.into_iter().map(|meta| self.source(&store, meta, literal, options)).collect()
    }

    fn source(&self, store: &Store, meta: Meta, literal: bool, options: &SourceOptions) -> Result<Source, DataError> {
        let name = match &self.folder[..] {
            _ if literal => self.name.clone(),
            "." => meta.key.clone(),
            folder => format!("{}/{}", folder.trim_end_matches('/'), meta.key),
        };
        let kind = kind(&meta.key).map_err(|what| refused(&name, &what))?;
        let (folder, key) = meta.key.rsplit_once('/').unwrap_or(("", &meta.key));
        let (store, key) = (store.child(folder), key.to_owned());
        let (options, within) = (options.clone(), Within::default());
        Ok(Source { store, key, name, bytes: meta.bytes, stamp: meta.stamp, kind, options, within })
    }
}

/// Listings of folders, by the folder as it was typed.
type Listings = HashMap<String, HashMap<String, Meta>>;

/// Lists the folders of which very many files are named.
async fn listings(places: &[Place]) -> Result<Listings, DataError> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for place in places.iter().filter(|place| place.file().is_some() && !place.is_http()) {
        *counts.entry(&place.folder).or_default() += 1;
    }
    let mut listings = Listings::new();
    for (folder, _) in counts.into_iter().filter(|(_, count)| *count >= LIST_FROM) {
        let files = Store::open(folder)?.files("").await?;
        listings.insert(folder.to_owned(), files.into_iter().map(|meta| (meta.key.clone(), meta)).collect());
    }
    Ok(listings)
}

/// What of a folder's files are sources.
fn in_folder(name: &str, files: Vec<Meta>) -> Result<Vec<Meta>, DataError> {
    let (metadata, others): (Vec<_>, Vec<_>) = files.into_iter().partition(|meta| METADATA.contains(&meta.key.as_str()));
    let tars: HashSet<String> = others.iter().filter_map(|meta| meta.key.strip_suffix(".tar").map(str::to_owned)).collect();
    let is_source = |key: &str| match kind(key) {
        _ if key.starts_with('.') => false,
        Ok(SourceKind::Tar) => true,
        Ok(SourceKind::Parquet) => !key.strip_suffix(".parquet").is_some_and(|stem| tars.contains(stem)),
        _ => false,
    };
    let data: Vec<_> = others.into_iter().filter(|meta| is_source(&meta.key)).collect();
    match (&metadata[..], &data[..]) {
        ([], _) => Ok(data),
        ([_], []) => Ok(metadata),
        ([first, ..], rest) => {
            let other = rest.first().or(metadata.get(1)).map_or("", |meta| &meta.key);
            let what = format!("holds both {} and {other}; say which is meant: name that file, or use a glob such as *.tar", first.key);
            Err(refused(name, &what))
        }
    }
}

/// The files that match a pattern, given by its components; folders are listed one by one as far as names are given.
async fn matching(name: &str, store: &Store, below: &[String]) -> Result<Vec<Meta>, DataError> {
    let Some((last, folders)) = below.split_last() else { return Ok(Vec::new()) };
    let mut there = vec![String::new()];
    for (depth, part) in folders.iter().enumerate() {
        let mut deeper = Vec::new();
        for folder in &there {
            match &part[..] {
                "**" => return all_below(name, store, folder, &below[depth..]).await,
                part if is_pattern(part) => {
                    let pattern = pattern(name, part)?;
                    let found = store.folders(folder).await?;
                    deeper.extend(found.into_iter().filter(|found| pattern.matches_with(base(found), MATCH)));
                }
                part => deeper.push(join(folder, part)),
            }
        }
        there = deeper;
    }
    let mut found = Vec::new();
    for folder in &there {
        if last == "**" {
            found.extend(all_below(name, store, folder, &below[folders.len()..]).await?);
        } else if is_pattern(last) {
            let pattern = pattern(name, last)?;
            found.extend(store.files(folder).await?.into_iter().filter(|meta| pattern.matches_with(base(&meta.key), MATCH)));
        } else {
            found.extend(store.head(&join(folder, last)).await?);
        }
    }
    Ok(found)
}

/// The files however deep below a folder that match the rest of a pattern.
async fn all_below(name: &str, store: &Store, folder: &str, rest: &[String]) -> Result<Vec<Meta>, DataError> {
    let pattern = pattern(name, &rest.join("/"))?;
    let below = |key: &str| key[folder.len()..].trim_start_matches('/').to_owned();
    Ok(store.list(folder).await?.into_iter().filter(|meta| pattern.matches_with(&below(&meta.key), MATCH)).collect())
}

fn pattern(name: &str, text: &str) -> Result<Pattern, DataError> {
    Pattern::new(text).map_err(|error| refused(name, &format!("is no pattern ({error} in {text:?})")))
}

fn base(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

fn join(folder: &str, part: &str) -> String {
    if folder.is_empty() { part.to_owned() } else { format!("{folder}/{part}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store with empty files, listed as a cloud's would be.
    async fn store(keys: &[&str]) -> Store {
        let store = Store::in_memory();
        for key in keys {
            store.put(key, (*key).to_owned().into()).await.unwrap();
        }
        store
    }

    async fn matched(store: &Store, below: &str) -> String {
        let below: Vec<String> = below.split('/').map(str::to_owned).collect();
        let mut found: Vec<_> = matching("x", store, &below).await.unwrap().into_iter().map(|meta| meta.key).collect();
        found.sort();
        found.join(" ")
    }

    #[tokio::test]
    async fn globs_match_as_in_a_shell() {
        let store =
            store(&["a/0.tar", "a/1.tar", "a/.h.tar", "a/x/2.tar", "b/3.tar", "b/x/y/4.tar", "b/.h/5.tar", "6.tar", "a/n.txt"]).await;
        for (pattern, expected) in [
            ("*.tar", "6.tar"),
            ("*/*.tar", "a/0.tar a/1.tar b/3.tar"),
            ("a/?.tar", "a/0.tar a/1.tar"),
            ("a/[!0].tar", "a/1.tar"),
            ("*/3.tar", "b/3.tar"),
            ("a/.*.tar", "a/.h.tar"),
            ("**/*.tar", "6.tar a/0.tar a/1.tar a/x/2.tar b/3.tar b/x/y/4.tar"),
            ("b/**/4.tar", "b/x/y/4.tar"),
            ("a/**", "a/0.tar a/1.tar a/n.txt a/x/2.tar"),
            ("*/x/*.tar", "a/x/2.tar"),
            ("none/*.tar", ""),
        ] {
            assert_eq!(matched(&store, pattern).await, expected, "{pattern}");
        }
    }

    #[tokio::test]
    async fn a_folder_is_its_tars_and_parquets_or_a_list_of_pictures() {
        let folder = async |keys: &[&str]| in_folder("x", store(keys).await.files("").await.unwrap());
        let found = async |keys: &[&str]| folder(keys).await.unwrap().into_iter().map(|meta| meta.key).collect::<Vec<_>>().join(" ");
        assert_eq!(found(&["b.parquet", "a.tar", "c.csv", "d/e.tar", "._a.tar"]).await, "a.tar b.parquet");
        assert_eq!(found(&["0.tar", "0.parquet", "1.parquet", "0_stats.json"]).await, "0.tar 1.parquet");
        for metadata in METADATA {
            assert_eq!(found(&[metadata, "1.jpg"]).await, metadata);
            for other in ["a.tar", "a.parquet", "metadata.jsonl", "metadata.csv"] {
                if other != metadata {
                    let error = folder(&[metadata, other]).await.unwrap_err().to_string();
                    assert!(error.contains("holds both") && error.contains(other), "{error}");
                }
            }
        }
        assert_eq!(found(&["a.txt"]).await, "");
    }

    #[test]
    fn a_location_falls_into_a_folder_and_what_is_meant_there() {
        for (name, folder, below) in [
            ("a.tar", ".", "a.tar"),
            ("x/a.tar", "x", "a.tar"),
            ("/a.tar", "/", "a.tar"),
            ("x/*/b?.tar", "x", "*/b?.tar"),
            ("*/b.tar", ".", "*/b.tar"),
            ("s3://b/x/a.parquet", "s3://b/x", "a.parquet"),
            ("s3://b/a.parquet", "s3://b", "a.parquet"),
            ("s3://b/x*/a.parquet", "s3://b", "x*/a.parquet"),
            ("s3://b/x", "s3://b/x", ""),
            ("s3://b", "s3://b", ""),
            ("gs://b/**/*.tar", "gs://b", "**/*.tar"),
        ] {
            let place = Place::of(name.to_owned(), false);
            assert_eq!((&place.folder[..], place.below.join("/")), (folder, below.to_owned()), "{name}");
        }
    }

    #[test]
    fn a_location_is_told_without_its_secrets() {
        for (location, told) in [
            ("https://host/a?X-Amz-Signature=hunter2", "https://host/a"),
            ("s3://user:hunter2@bucket/a/", "s3://bucket/a"),
            ("https://hunter2@host", "https://host"),
            ("s3://user:hunter2/x@bucket/a", "s3://"),
            ("s3://user:hunter2?x@bucket/a", "s3://"),
            ("s3://bucket/part-?.tar", "s3://bucket/part-?.tar"),
            ("pictures/a@b/c?.tar", "pictures/a@b/c?.tar"),
        ] {
            assert_eq!(shown(location), told);
        }
    }
}
