//! Captions: where they are, and which are accepted.

use std::collections::HashSet;
use std::path::Path;

use ella_store::{Hasher, Store};
use futures::future::BoxFuture;

use crate::error::DataError;
use crate::manifest::{Manifest, ShardEntry, SourceEntry};
use crate::prepare::TokenCounter;
use crate::report::{Refusal, Refused, Report};
use crate::settings::{CAPTION_FIELDS, Filters, Settings};
use crate::shard::{Row, ShardLayout, ShardWriter};
use crate::source::{Field, Fields};

/// Files larger than this are not captions.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A sample's captions, one for each column of the settings, without white space around them; empty where it has none that is accepted.
/// If it has none at all, the first column's reason is given.
pub(crate) fn of_sample(fields: &Fields, settings: &Settings, tokens: Option<&dyn TokenCounter>) -> Result<Vec<String>, Refusal> {
    let filters = &settings.filters;
    let each = settings.captions.iter().map(|column| {
        let caption = of_field(fields, column.field.as_deref())?;
        judge_length(caption, filters, tokens).map(|()| caption)
    });
    let captions: Vec<Result<&str, Refusal>> = each.collect();
    match captions.iter().find_map(|caption| caption.as_ref().err()) {
        Some(why) if captions.iter().all(Result::is_err) => Err(why.clone()),
        _ => Ok(captions.into_iter().map(|caption| caption.unwrap_or_default().to_owned()).collect()),
    }
}

fn of_field<'a>(fields: &'a Fields, name: Option<&str>) -> Result<&'a str, Refusal> {
    let usual = || CAPTION_FIELDS.iter().find_map(|name| fields.get(*name));
    match name.map_or_else(usual, |name| fields.get(name)) {
        Some(Field::Text(text)) => trimmed(text),
        Some(Field::NotUtf8) => Err(Refusal::CaptionNotUtf8),
        Some(Field::TooLong) => Err(Refusal::CaptionLong),
        Some(Field::Number(_) | Field::Other) => Err(Refusal::CaptionInvalid),
        None if matches!(fields.get("json"), Some(Field::Other)) => Err(Refusal::CaptionInvalid),
        None if matches!(fields.get("json"), Some(Field::TooLong)) => Err(Refusal::CaptionLong),
        None if matches!(fields.get("json"), Some(Field::NotUtf8)) => Err(Refusal::CaptionNotUtf8),
        None => Err(Refusal::CaptionMissing),
    }
}

fn judge_length(caption: &str, filters: &Filters, tokens: Option<&dyn TokenCounter>) -> Result<(), Refusal> {
    let words = caption.split_whitespace().count();
    if words < filters.min_caption_words as usize {
        return Err(Refusal::CaptionShort);
    }
    if filters.max_caption_words.is_some_and(|most| words > most as usize) {
        return Err(Refusal::CaptionLong);
    }
    let Some((rule, counter)) = filters.caption_tokens.as_ref().zip(tokens) else { return Ok(()) };
    let count = counter.count(caption).ok_or(Refusal::CaptionInvalid)?;
    if count < rule.min as usize {
        return Err(Refusal::CaptionShort);
    }
    if rule.max.is_some_and(|most| count > most as usize) { Err(Refusal::CaptionLong) } else { Ok(()) }
}

fn trimmed(text: &str) -> Result<&str, Refusal> {
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() { Err(Refusal::CaptionEmpty) } else { Ok(text) }
}

fn text_of(bytes: &[u8]) -> Result<String, Refusal> {
    let text = std::str::from_utf8(bytes).map_err(|_| Refusal::CaptionNotUtf8)?;
    trimmed(text).map(str::to_owned)
}

/// Captions of a folder, and what was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captions {
    /// Key (file name without `.txt`) and caption, by key.
    pub kept: Vec<(String, String)>,
    /// Keys refused, by reason.
    pub refused: Refused,
}

/// Reads every `.txt` file directly in a local folder, in the order of their names. Empty files, files that are
/// not UTF-8, links that lead nowhere and what is no file (a pipe) are refused and counted; a file that cannot be read is an error. Folders are no
/// captions, whatever their names.
pub fn captions_from_txt(folder: &Path) -> Result<Captions, DataError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| DataError::Io { path, source }
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("txt")) && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    let mut captions = Captions::default();
    let mut seen = HashSet::new();
    for path in files {
        let stem = path.file_stem().unwrap_or_default();
        let key = stem.to_string_lossy().into_owned();
        let caption = if stem.to_str().is_none() {
            Err(Refusal::KeyNotUtf8)
        } else if !seen.insert(key.clone()) {
            Err(Refusal::DuplicateKey)
        } else if !path.is_file() {
            Err(Refusal::CaptionMissing)
        } else if path.metadata().map_err(io(&path))?.len() > MAX_FILE_BYTES {
            Err(Refusal::CaptionLong)
        } else {
            text_of(&std::fs::read(&path).map_err(io(&path))?)
        };
        match caption {
            Ok(caption) => captions.kept.push((key, caption)),
            Err(why) => captions.refused.entry(why).or_default().push(key),
        }
    }
    Ok(captions)
}

/// Writes a data set of captions only, for features without pictures. The same captions make the same bytes; a
/// destination that holds another data set is refused.
pub fn prepare_captions<'a>(captions: Captions, name: &'a str, out: &'a Store) -> BoxFuture<'a, Result<Report, DataError>> {
    Box::pin(async move {
        let kept = captions.kept.len() as u64;
        let mut report = Report { kept, refused: captions.refused, ..Report::default() };
        report.read = kept + report.counts().map(|(_, count)| count).sum::<u64>();
        if kept == 0 {
            return Err(DataError::NothingKept { read: report.read, refused: report.refused_line() });
        }
        let mut hash = Hasher::new();
        for (key, caption) in &captions.kept {
            // Lengths make the digest unambiguous.
            for text in [key, caption] {
                hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
            }
        }
        let blake3 = hash.finish();
        let unit = crate::plan::unit_name(0, &blake3);
        let bytes = captions.kept.iter().map(|(key, caption)| (key.len() + caption.len()) as u64).sum();
        let source = SourceEntry { name: name.to_owned(), rows: None, bytes, blake3, read: report.read, kept, ignored: 0 };

        let mut shards: Vec<(ShardEntry, _)> = Vec::new();
        for (part, rows) in captions.kept.chunks(CAPTIONS_PER_SHARD).enumerate() {
            let mut writer = ShardWriter::new(ShardLayout::default())?;
            for (key, caption) in rows {
                writer.push(Row { key: key.clone(), captions: vec![caption.clone()], ..Row::default() })?;
            }
            let file = writer.finish()?;
            let entry = ShardEntry::of(format!("shards/{unit}-{part:04}.arrow"), rows.len() as u64, &file);
            shards.push((entry, file));
        }
        let entries = shards.iter().map(|(entry, _)| entry.clone()).collect();
        let manifest = Manifest::new(None, None, vec![source], entries);
        crate::plan::refuse_run(out).await?;
        crate::plan::refuse_other(out, &manifest).await?;
        for (entry, file) in shards {
            crate::plan::create_file(out, entry, file, |_| false).await?;
        }
        crate::plan::publish(out, &manifest, &report).await?;
        Ok(report)
    })
}

/// Small enough that the features of a shard fit in memory (0.5 MiB a row for 128 positions of width 2048 in half precision).
const CAPTIONS_PER_SHARD: usize = 512;
