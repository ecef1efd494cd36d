//! Which column of a row is what, by name.
//!
//! The picture: the column that the options name, or else the first of these that is there. Encoded bytes are preferred to paths:
//! 1. in Parquet, bytes (a binary column, or a struct with binary `bytes` and perhaps a `path`, as `datasets` writes): `image`, `jpg`,
//!    `jpeg`, `png`, `webp`, `gif`, `img`, `picture`, `image_bytes`, `bytes`;
//! 2. a path or URL: `file_name`, `image_path`, `image`, `path`, `object_key`, `url`, `image_file`, `filename`, `filepath`, `image_url`, `key`.
//!
//! The key: the column that the options name, or else `key`, `__key__`, `id` (unless that is the picture's path); where a row has none,
//! its picture's path without the ending; where there is none either, the file's stem and the row's number.

use super::sample::key_of_path;

/// Columns of encoded pictures, the preferred first.
pub(super) const BYTES: [&str; 10] = ["image", "jpg", "jpeg", "png", "webp", "gif", "img", "picture", "image_bytes", "bytes"];
/// Columns of paths, the preferred first.
pub(super) const PATHS: [&str; 11] =
    ["file_name", "image_path", "image", "path", "object_key", "url", "image_file", "filename", "filepath", "image_url", "key"];
/// Columns of keys, the preferred first.
const KEYS: [&str; 3] = ["key", "__key__", "id"];

/// What a row offers as its key, the preferred first: its key columns or those given.
pub(super) fn keys<'a>(given: Option<&'a str>, picture: Option<&'a str>) -> impl Iterator<Item = &'a str> {
    let usual = KEYS.into_iter().filter(move |name| given.is_none() && picture != Some(name));
    given.into_iter().chain(usual)
}

/// The key of a row: what its key column holds, its picture's path, or its number in the file with this stem.
pub(super) fn key_of(column: Option<&[u8]>, path: Option<&[u8]>, stem: &str, row: u64) -> Vec<u8> {
    let filled = |bytes: &&[u8]| !bytes.is_empty();
    if let Some(key) = column.filter(filled) {
        return key.to_vec();
    }
    match path.filter(filled).map(std::str::from_utf8) {
        Some(Ok(path)) => key_of_path(path).as_bytes().to_vec(),
        Some(Err(_)) => path.unwrap_or_default().to_vec(),
        None => format!("{stem}/{row:09}").into_bytes(),
    }
}
