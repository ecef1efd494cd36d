//! Whether the sources of a data set are what was prepared.

use std::collections::HashMap;

use ella_store::{Digest, Store};
use futures::future::BoxFuture;

use super::{of_another, piece_of};
use crate::error::DataError;
use crate::manifest::at;
use crate::plan::{PLAN, Part, Plan, UNITS, UnitRecord};
use crate::source::{Member, Sample, Source, SourceKind};
use crate::verify::Damage;

/// Pictures that an error names.
const PICTURES_NAMED: usize = 5;

/// Reads the sources of a data set again, and the pictures that their rows name: each one, whatever became of the others. Gives those that are not
/// what was prepared, after those already known to be `gone`. `watch` is told how many parts of how many are done.
///
/// # Errors
/// What may pass, of the sources or the data set's store; and if there is no plan to compare them with.
pub fn originals<'a>(
    out: &'a Store,
    found: Vec<Source>,
    gone: Vec<Damage>,
    watch: &'a (dyn Fn(usize, usize) + Sync),
) -> BoxFuture<'a, Result<Vec<Damage>, DataError>> {
    Box::pin(async move {
        let missing = || DataError::RecordMissing { file: at(out, PLAN), hint: "the data set was not made by `ella prepare`" };
        let plan = Plan::load(out).await?.ok_or_else(missing)?;
        let records = out.list(UNITS).await?;
        let mut changed = gone;
        let found = found.into_iter().map(|source| source.with(plan.settings.within())).collect();
        let mut there = paired(&plan, found, &mut changed);
        let parts: Vec<Part<'_>> = plan.parts().collect();
        for (index, part) in parts.iter().enumerate() {
            watch(index, parts.len());
            let Some(source) = there.get(part.source).cloned().flatten() else { continue };
            let mut tell = |what: String| changed.push(Damage { file: source.name().to_owned(), what });
            let first = index == 0 || parts[index - 1].source != part.source;
            if first && part.piece.is_some() {
                let other = || format!("{}: its rows are not those that were prepared ({} has them)", source.name(), at(out, PLAN));
                let what = match lasting(source.pieces().await)? {
                    Ok(pieces) => (pieces != plan.sources[part.source].pieces).then(other),
                    Err(what) => Some(what),
                };
                if let Some(what) = what {
                    tell(what);
                    there[part.source] = None;
                    continue;
                }
            }
            let unit = plan.unit(index, part, source.bytes(), &[]);
            let checked = match UnitRecord::load(&unit, out).await? {
                Some(record) => check(out, &plan, (index, part), &source, record).await,
                None => match of_another(index, &records, out).await? {
                    Some(expected) => {
                        Err(DataError::SourceReplaced { source_name: source.name().to_owned(), expected, found: source.bytes() })
                    }
                    None => Ok(()),
                },
            };
            if let Err(what) = lasting(checked)? {
                tell(what);
            }
        }
        watch(parts.len(), parts.len());
        Ok(changed)
    })
}

/// What lasts of errors, as text; the others are errors still.
fn lasting<T>(result: Result<T, DataError>) -> Result<Result<T, String>, DataError> {
    match result {
        Err(error) if !error.is_permanent() => Err(error),
        result => Ok(result.map_err(|error| error.to_string())),
    }
}

/// The sources in the order of the plan, by their names; what has no pair is told.
fn paired(plan: &Plan, found: Vec<Source>, changed: &mut Vec<Damage>) -> Vec<Option<Source>> {
    let (mut found, mut pairs) = (found.into_iter().peekable(), Vec::new());
    let mut left: HashMap<String, usize> = HashMap::new();
    plan.sources.iter().for_each(|planned| *left.entry(planned.name.clone()).or_default() += 1);
    let mut strangers = Vec::new();
    for planned in &plan.sources {
        // What comes before it is another's, or nobody's.
        while let Some(stranger) = found.next_if(|source| left.get(source.file_name()).is_none_or(|left| *left == 0)) {
            strangers.push(stranger);
        }
        let pair = found.next_if(|source| source.file_name() == planned.name);
        left.entry(planned.name.clone()).and_modify(|left| *left -= 1);
        if pair.is_none() && !changed.iter().any(|damage| damage.file.ends_with(&planned.name)) {
            let what = format!("{}: it was prepared from this, but it is not among the sources; bring it back", planned.name);
            changed.push(Damage { file: planned.name.clone(), what });
        }
        pairs.push(pair);
    }
    for stranger in strangers.into_iter().chain(found) {
        let what = format!("{}: is among the sources, but was not prepared", stranger.name());
        changed.push(Damage { file: stranger.name().to_owned(), what });
    }
    pairs
}

/// Reads a part's source again, and the pictures that its rows name: they must be those that the record tells of. Of a source that only looks
/// newer, its new look is noted.
pub(super) async fn check(
    out: &Store,
    plan: &Plan,
    (index, part): (usize, &Part<'_>),
    source: &Source,
    record: UnitRecord,
) -> Result<(), DataError> {
    let (source_name, piece, stamp) = (source.name().to_owned(), piece_of(source, part), source.stamp().map(str::to_owned));
    let stopped = |what: String| DataError::Stopped { source_name: source_name.clone(), what };
    let (reading, mut pictures) = (source.clone(), Pictures::of(&record, plan.key_prefix(part), source.kind()));
    let reading = tokio::task::spawn_blocking(move || {
        let read = reading.read(&piece, &mut |sample| {
            pictures.look(&sample);
            true
        });
        read.map(|read| (read, pictures))
    });
    let (read, pictures) = reading.await.map_err(|e| stopped(e.to_string()))??;
    let Some(read) = read else { return Err(stopped("reading ended early".into())) };
    if read.blake3 == record.source.blake3 {
        let unit = plan.unit(index, part, source.bytes(), &[]);
        return if stamp == record.stamp { Ok(()) } else { record.seen_as(&unit, stamp.as_deref(), out).await };
    }
    match pictures.told() {
        Some(pictures) => Err(DataError::PicturesReplaced { source_name, pictures }),
        None => Err(DataError::SourceReplaced { source_name, expected: record.source.bytes, found: read.bytes }),
    }
}

/// Finds out which pictures beside a list changed.
struct Pictures {
    prefix: String,
    /// Halves of the digests of the pictures that were kept, by key; of those that were not looked at yet.
    expected: HashMap<String, String>,
    changed: Vec<String>,
    count: usize,
}

impl Pictures {
    fn of(record: &UnitRecord, prefix: String, kind: SourceKind) -> Pictures {
        let kept = record.keys.iter().cloned().zip(record.contents.iter().cloned());
        let expected = if kind == SourceKind::Tar { HashMap::new() } else { kept.collect() };
        Pictures { prefix, expected, changed: Vec::new(), count: 0 }
    }

    fn look(&mut self, sample: &Sample) {
        let (Some(place), false) = (&sample.place, self.expected.is_empty()) else { return };
        let Some(expected) = self.expected.remove(&format!("{}{}", self.prefix, sample.key)) else { return };
        if matches!(&sample.image, Member::Data(bytes) if Digest::of(bytes).to_string()[..32] == *expected) {
            return;
        }
        self.count += 1;
        if self.changed.len() < PICTURES_NAMED {
            self.changed.push(place.clone());
        }
    }

    fn told(self) -> Option<String> {
        let more = self.count - self.changed.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (self.count > 0).then(|| self.changed.join(", ") + &more)
    }
}
