//! Reading a run's past from its folder. A file that cannot be read, or a line that is none, is counted and passed over (KNOWN): what is shown
//! to people must not depend on every file of a long run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use ella_store::{Meta, Store, StoreError};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Faults, Past, Point, Timing};

/// Files that are read at once: a coordinator's hold up to 4,096 lines each, about 2 MB.
const AT_ONCE: usize = 4;
/// Larger files are not a coordinator's.
const LARGEST: u64 = 64 << 20;
/// Files of `timing/` and `events/` that are read, the newest: they fill what is kept of those.
const MOST_FILES: usize = 4_096;

/// How far reading is.
#[derive(Debug, Default)]
pub struct Gauge {
    /// Files that were read.
    pub done: AtomicU64,
    /// Files in all, as far as is known.
    pub total: AtomicU64,
}

/// Reads a run folder again and again: each time what is new.
#[derive(Debug)]
pub struct Reader {
    store: Store,
    /// Only terms below it, if one is given.
    below: Option<u64>,
    /// The newest file that was read, by folder.
    seen: BTreeMap<&'static str, String>,
    gauge: Arc<Gauge>,
}

impl Reader {
    /// Of the run in `store`; with `below`, only what coordinators of earlier terms wrote.
    pub fn new(store: Store, below: Option<u64>) -> Self {
        Self { store, below, seen: BTreeMap::new(), gauge: Arc::default() }
    }

    /// How far it is.
    pub fn gauge(&self) -> Arc<Gauge> {
        Arc::clone(&self.gauge)
    }

    /// Adds what is new to `past`.
    pub async fn read(&mut self, past: &mut Past) {
        self.folder("metrics", usize::MAX, past, |past, lines: Vec<Point>, term| {
            lines.into_iter().for_each(|point| past.measured(&Point { term, ..point }));
        })
        .await;
        self.folder("timing", MOST_FILES, past, |past, lines: Vec<Timing>, term| {
            lines.into_iter().for_each(|timing| past.timings.add(Timing { term, ..timing }));
        })
        .await;
        self.folder("events", MOST_FILES, past, |past, lines: Vec<Value>, term| {
            past.faults.damaged_lines += lines.into_iter().filter(|line| past.happened(term, line).is_none()).count() as u64;
        })
        .await;
    }

    async fn folder<T>(&mut self, folder: &'static str, most: usize, past: &mut Past, mut take: impl FnMut(&mut Past, Vec<T>, u64))
    where
        T: DeserializeOwned + Send + 'static,
    {
        let files = match self.files(folder, most).await {
            Ok(files) => files,
            Err(error) => {
                past.faults.unlisted.insert(folder, error.to_string());
                return;
            }
        };
        past.faults.unlisted.remove(folder);
        self.gauge.total.fetch_add(files.len() as u64, Relaxed);
        if let Some((_, newest)) = files.last() {
            self.seen.insert(folder, newest.key.clone());
        }
        let store = self.store.clone();
        let read = |(term, file): (u64, Meta)| {
            let store = store.clone();
            async move { (term, read::<T>(&store, &file).await) }
        };
        let mut files = futures::stream::iter(files).map(read).buffered(AT_ONCE);
        while let Some((term, read)) = files.next().await {
            self.gauge.done.fetch_add(1, Relaxed);
            match read {
                Ok((lines, faults)) => {
                    past.faults.add(faults);
                    take(past, lines, term);
                }
                Err(error) => unread(&mut past.faults, &error),
            }
        }
    }

    /// The files that were not read yet, with their terms, in order; at most so many, the newest.
    async fn files(&self, folder: &'static str, most: usize) -> Result<Vec<(u64, Meta)>, StoreError> {
        let seen = self.seen.get(folder);
        let files = self.store.files(folder).await?.into_iter().filter_map(|file| {
            let term = term_of(file.key.strip_prefix(folder)?.strip_prefix('/')?)?;
            Some((term, file))
        });
        let wanted = |(term, file): &(u64, Meta)| self.below.is_none_or(|below| *term < below) && seen.is_none_or(|seen| file.key > *seen);
        let mut files: Vec<_> = files.filter(wanted).collect();
        Ok(files.split_off(files.len().saturating_sub(most)))
    }
}

/// The term in a name like `000003-000001.jsonl`. Names of later terms sort later.
pub fn term_of(name: &str) -> Option<u64> {
    name.strip_suffix(".jsonl")?.split_once('-')?.0.parse().ok()
}

fn unread(faults: &mut Faults, error: &StoreError) {
    faults.unread_files += 1;
    faults.tell(|| error.to_string());
}

async fn read<T: DeserializeOwned + Send + 'static>(store: &Store, file: &Meta) -> Result<(Vec<T>, Faults), StoreError> {
    if file.bytes > LARGEST {
        let problem = format!("{}/{}: {} bytes, which no coordinator writes; it is not read", store.url(), file.key, file.bytes);
        return Ok((Vec::new(), Faults { unread_files: 1, problems: vec![problem], ..Faults::default() }));
    }
    let text = store.get(&file.key).await?;
    let place = format!("{}/{}", store.url(), file.key);
    // Parsing megabytes must not hold up what else runs on this thread.
    Ok(tokio::task::spawn_blocking(move || parse(&text, &place)).await.unwrap_or_default())
}

fn parse<T: DeserializeOwned>(text: &Bytes, place: &str) -> (Vec<T>, Faults) {
    let (mut lines, mut faults) = (Vec::new(), Faults::default());
    for (number, line) in text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(value) => lines.push(value),
            Err(error) => {
                faults.damaged_lines += 1;
                faults.tell(|| format!("{place}: line {} is passed over ({error})", number + 1));
            }
        }
    }
    (lines, faults)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_store::{Operation, faulty};

    fn metric(step: u64, loss: f64) -> String {
        format!(
            "{{\"at_unix_ms\":{step}000,\"step\":{step},\"samples\":4,\"loss\":{loss},\"lr\":0.1,\"parts\":null,\"skipped\":{{\"odd\":1}}}}\n"
        )
    }

    async fn put(store: &Store, key: &str, text: String) {
        store.put(key, text.into()).await.unwrap();
    }

    #[tokio::test]
    async fn a_folder_is_read_with_what_is_damaged_counted_and_then_what_is_new() {
        let store = Store::in_memory();
        put(&store, "metrics/000001-000001.jsonl", metric(1, 5.0) + "{\"step\":2,\n" + &metric(3, 3.0)).await;
        put(&store, "metrics/000002-000001.jsonl", metric(3, 2.0) + &metric(4, 1.0)).await;
        put(&store, "metrics/notes.txt", "hello".into()).await;
        put(&store, "events/000001-000001.jsonl", "{\"event\":\"lost\",\"worker\":\"w\"}\n{}\n".into()).await;
        let timing = "{\"rank\":0,\"generation\":1,\"worker\":\"w\",\"host\":\"h\",\"step\":64,\"steps\":64,\"seconds\":6.4,\"parts\":{\"forward\":3.2}}\n";
        put(&store, "timing/000001-000001.jsonl", timing.into()).await;
        let (mut reader, mut past) = (Reader::new(store.clone(), None), Past::default());
        reader.read(&mut past).await;
        let seen = past.curves.view(0, 9, 9).buckets;
        assert_eq!(seen.iter().map(|b| (b.index, b.loss.max)).collect::<Vec<_>>(), [(1, 5.0), (3, 2.0), (4, 1.0)]);
        assert_eq!((past.faults.damaged_lines, past.faults.unread_files), (2, 0));
        assert!(past.faults.problems[0].contains("metrics/000001-000001.jsonl: line 2"), "{:?}", past.faults);
        assert_eq!((past.events.others().count(), past.skipped.sums()["odd"]), (1, 3));
        assert_eq!(past.timings.ranks(u64::MAX, 64)[0].part("forward"), 0.05);

        put(&store, "metrics/000002-000002.jsonl", metric(5, 0.5)).await;
        reader.read(&mut past).await;
        assert_eq!((past.curves.last().unwrap().step, past.curves.view(0, 9, 9).buckets.len()), (5, 4));
        let mut before = Past::default();
        Reader::new(store, Some(2)).read(&mut before).await;
        assert_eq!(before.curves.last().unwrap().step, 3, "of earlier terms only");
    }

    #[tokio::test]
    async fn what_a_resume_undid_does_not_count() {
        let store = Store::in_memory();
        put(&store, "metrics/000001-000001.jsonl", (1..=150).map(|step| metric(step, 1.0)).collect()).await;
        put(&store, "events/000001-000001.jsonl", "{\"event\":\"generation\",\"from_step\":0,\"workers\":[]}\n".into()).await;
        let (mut reader, mut past) = (Reader::new(store.clone(), None), Past::default());
        reader.read(&mut past).await;
        assert_eq!((past.curves.last().unwrap().step, past.skipped.sums()["odd"]), (150, 150));
        // The coordinator of the second term knows of a commit of step 100 and has measured nothing yet.
        let begun = "{\"event\":\"generation\",\"from_step\":100,\"workers\":[]}\n";
        put(&store, "events/000002-000001.jsonl", begun.into()).await;
        reader.read(&mut past).await;
        assert_eq!((past.curves.last().unwrap().step, past.skipped.sums()["odd"]), (100, 100));
        put(&store, "metrics/000002-000001.jsonl", metric(101, 1.0) + &metric(102, 1.0)).await;
        reader.read(&mut past).await;
        assert_eq!((past.curves.last().unwrap().step, past.skipped.sums()["odd"]), (102, 102));
        // A third term ends before anything is measured: all that it does not know of is gone.
        put(&store, "events/000003-000001.jsonl", "{\"event\":\"ended\",\"step\":100}\n".into()).await;
        reader.read(&mut past).await;
        assert_eq!((past.curves.last().unwrap().step, past.curves.view(0, 999, 999).buckets.len()), (100, 100));
    }

    #[tokio::test]
    async fn what_was_before_is_joined_without_what_was_undone_since() {
        let point = |term, step| Point { term, step, samples: 4, skipped: [("odd".to_owned(), 1)].into(), ..Point::default() };
        let (mut before, mut begun, mut measured) = (Past::default(), Past::default(), Past::default());
        (1..=9).for_each(|step| before.measured(&point(1, step)));
        begun.happened(2, &serde_json::json!({"event": "generation", "from_step": 4})).unwrap();
        (6..=7).for_each(|step| measured.measured(&point(2, step)));
        for (later, step, odd) in [(begun, 4, 4), (measured, 7, 7)] {
            let mut past = before.clone();
            past.append(later);
            assert_eq!((past.curves.last().unwrap().step, past.skipped.sums()["odd"]), (step, odd));
        }
    }

    #[tokio::test]
    async fn a_store_that_fails_leaves_a_gap_that_is_told() {
        let faults = faulty::Faults::new();
        let store = faults.inject(&Store::in_memory());
        for file in 1..=3 {
            put(&store, &format!("metrics/000001-00000{file}.jsonl"), metric(file, 1.0)).await;
        }
        faults.push(Operation::Get, "metrics/000001-000002", faulty::Failure::Denied, 1);
        let mut past = Past::default();
        Reader::new(store, None).read(&mut past).await;
        assert_eq!(past.curves.view(0, 9, 9).buckets.len(), 2);
        assert!(past.faults.unread_files == 1 && past.faults.problems[0].contains("000001-000002"), "{:?}", past.faults);
    }

    #[tokio::test]
    async fn a_folder_that_is_not_listed_is_told_until_it_is() {
        let faults = faulty::Faults::new();
        let store = faults.inject(&Store::in_memory());
        put(&store, "metrics/000001-000001.jsonl", metric(1, 1.0)).await;
        faults.push(Operation::List, "metrics", faulty::Failure::Denied, 1);
        let (mut reader, mut past) = (Reader::new(store, None), Past::default());
        reader.read(&mut past).await;
        assert!(past.faults.unread_files == 0 && past.faults.unlisted["metrics"].contains("metrics"), "{:?}", past.faults);
        reader.read(&mut past).await;
        assert_eq!((past.faults, past.curves.last().unwrap().step), (Faults::default(), 1));
    }
}
