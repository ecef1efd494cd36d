//! Many small tars, some of which hold a picture of the one before.

use crate::Size;
use anyhow::{Context as _, Result};
use ella_tests::ella;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use tar::{Archive, Builder, Header};

/// Every so many tars one holds a duplicate: its part is prepared twice, and what the first time made is deleted.
const REPEATS: usize = 20;
/// Width and height of pictures.
pub(crate) const PIXELS: &str = "64";

/// Writes tars into a folder, and gives how many of the samples are no duplicates.
pub(crate) fn write(folder: &Path, size: &Size) -> Result<u64> {
    let (count, per_tar) = ((size.tars * size.samples).to_string(), size.samples.to_string());
    let out = folder.display().to_string();
    ella(&["scenes", "--out", &out, "--count", &count, "--per-tar", &per_tar, "--size", PIXELS, "--seed", "5"])?;
    let tars = tars(folder)?;
    for at in (1..tars.len()).step_by(REPEATS) {
        repeat(&tars[at - 1], &tars[at], at)?;
    }
    Ok((size.tars * size.samples) as u64)
}

/// The tars in a folder, in order.
pub(crate) fn tars(folder: &Path) -> Result<Vec<PathBuf>> {
    let paths = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut tars = paths.filter(|path: &Result<PathBuf>| path.as_ref().is_ok_and(|p| p.extension().is_some_and(|e| e == "tar")));
    let mut tars: Vec<PathBuf> = tars.by_ref().collect::<Result<_>>()?;
    tars.sort();
    Ok(tars)
}

/// Appends the first sample of one tar to another, under a key of its own.
fn repeat(from: &Path, to: &Path, at: usize) -> Result<()> {
    let (first, mut files) = (files(from)?, files(to)?);
    let stem = |name: &str| name.split_once('.').map(|(stem, ending)| (stem.to_owned(), ending.to_owned()));
    let (key, _) = stem(&first.first().context("an empty tar")?.0).context("a file without an ending")?;
    let same = first.into_iter().filter_map(|(name, bytes)| Some((stem(&name).filter(|(other, _)| *other == key)?.1, bytes)));
    files.extend(same.map(|(ending, bytes)| (format!("repeat-{at}.{ending}"), bytes)));
    let mut tar = Builder::new(File::create(to)?);
    for (name, bytes) in files {
        let mut header = Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &*bytes)?;
    }
    Ok(tar.finish()?)
}

fn files(tar: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let file = |entry: std::io::Result<tar::Entry<'_, File>>| {
        let mut entry = entry?;
        let (name, mut bytes) = (entry.path()?.display().to_string(), Vec::new());
        entry.read_to_end(&mut bytes)?;
        Ok((name, bytes))
    };
    Archive::new(File::open(tar)?).entries()?.map(file).collect()
}
