//! Samples of a run on their way to its folder (`ella_proto::samples`). They pass through the committing thread, one after the other and before the
//! next commit: so a commit stands only after all pictures of earlier steps, and who goes on from it has none to make up for but its own step's.
//!
//! Nothing that fails here ends anything: what cannot be stored is given up, counted and told.

use crate::control::{Era, Outbox};
use ella_proto::samples::{self, Index};
use ella_proto::v1::{Progress, from_worker};
use ella_store::{Store, StoreError};
use futures::future::join_all;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// How long a picture may take to be stored.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a look into the store may take while training waits.
const LOOK: Duration = Duration::from_secs(5);
/// Pictures that are deleted at once.
const AT_ONCE: usize = 16;
/// Most bytes of pictures that wait to be stored.
pub(crate) const MOST_WAITING: u64 = 64 << 20;

/// A picture.
#[derive(Debug)]
pub(crate) struct Page {
    /// Which drawing it is of: of one that failed to be stored the rest is not tried.
    pub(crate) sheet: u64,
    /// The step that it shows.
    pub(crate) step: u64,
    /// Its place among the step's pictures.
    pub(crate) number: usize,
    /// Its file.
    pub(crate) png: Vec<u8>,
    /// With the last one that this rank draws of the step: what is to be written once all of them are there.
    pub(crate) index: Option<Index>,
}

/// What became of pictures (KNOWN).
#[derive(Debug, Default)]
pub(crate) struct Counts {
    saved: AtomicU64,
    given_up: AtomicU64,
    /// Bytes that wait to be stored.
    pub(crate) waiting: AtomicU64,
}

impl Counts {
    pub(crate) fn give_up(&self, pictures: usize) {
        self.given_up.fetch_add(pictures as u64, Ordering::Relaxed);
    }

    /// By name, since the last call.
    pub(crate) fn news(&self) -> HashMap<String, u64> {
        let all = [("pictures_saved", &self.saved), ("pictures_given_up", &self.given_up)];
        let news = all.map(|(name, count)| (name.to_owned(), count.swap(0, Ordering::Relaxed)));
        news.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    /// Tells the coordinator of that news, beside the report of any step.
    pub(crate) fn tell(&self, outbox: &Outbox, era: Era, step: u64) {
        let read = self.news();
        if !read.is_empty() {
            outbox.send(era, from_worker::Body::Progress(Progress { step, read, ..Progress::default() }));
        }
    }
}

/// Stores pictures.
#[derive(Debug)]
pub(crate) struct Album {
    pub(crate) store: Store,
    pub(crate) runtime: Handle,
    /// The drawing of which a picture could not be stored.
    failed: Option<u64>,
}

impl Album {
    pub(crate) fn new(store: Store, runtime: Handle) -> Self {
        Self { store, runtime, failed: None }
    }

    /// Stores a picture; with a rank's last one of a step the index too, if all other ranks' are there. Whoever is the last to look finds them
    /// all, and two that do write the same.
    pub(crate) fn keep(&mut self, page: Page, counts: &Counts) {
        counts.waiting.fetch_sub(page.png.len() as u64, Ordering::Relaxed);
        if self.failed == Some(page.sheet) {
            return counts.give_up(1);
        }
        let Page { sheet, step, number, png, index } = page;
        let folder = self.store.child(&samples::folder(step));
        let stored = self.within(PATIENCE, folder.put(&samples::file(number), png.into()));
        match stored {
            Ok(()) => counts.saved.fetch_add(1, Ordering::Relaxed),
            Err(why) => {
                tracing::warn!(step, number, "a sample cannot be stored, and the others of its step are given up: {why}");
                self.failed = Some(sheet);
                return counts.give_up(1);
            }
        };
        if let Some(index) = index
            && let Err(why) = self.within(PATIENCE, complete(&folder, &index))
        {
            tracing::warn!(step, "the index of the step's samples cannot be stored, without which they are not shown: {why}");
        }
    }

    fn within<T>(&self, limit: Duration, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, String> {
        let late = |_| format!("it took more than {} s", limit.as_secs());
        self.runtime.block_on(async { timeout(limit, work).await }).map_err(late)?.map_err(|error| error.to_string())
    }
}

/// Whether all pictures of a step are there, as this index has them. If the store does not answer soon: no.
pub(crate) fn is_there(store: &Store, runtime: &Handle, index: &Index) -> bool {
    let key = format!("{}/{}", samples::folder(index.step), samples::INDEX);
    let read = runtime.block_on(async { timeout(LOOK, store.get(&key)).await });
    read.is_ok_and(|read| read.is_ok_and(|there| there == bytes(index)))
}

/// Makes room for a step's pictures, before any rank draws one: what was drawn of it with other settings goes, first its index, so that no index
/// stands beside pictures that it does not tell of. Those of the same settings stay, which are replaced by the same ones.
pub(crate) fn clear(store: &Store, runtime: &Handle, index: &Index) {
    let folder = store.child(&samples::folder(index.step));
    let why = match runtime.block_on(async { timeout(LOOK, make_room(&folder, index)).await }) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it took more than {} s", LOOK.as_secs()),
    };
    tracing::warn!(step = index.step, "what was drawn of the step before cannot be deleted, and stays until it is replaced: {why}");
}

async fn make_room(folder: &Store, index: &Index) -> Result<(), StoreError> {
    let there = folder.files("").await?;
    if there.iter().any(|meta| meta.key == samples::INDEX) {
        if folder.get(samples::INDEX).await? == bytes(index) {
            return Ok(());
        }
        folder.delete(samples::INDEX).await?;
    }
    let old: Vec<&str> = there.iter().map(|meta| meta.key.as_str()).filter(|key| key.ends_with(".png")).collect();
    for some in old.chunks(AT_ONCE) {
        join_all(some.iter().map(|key| folder.delete(key))).await.into_iter().collect::<Result<(), StoreError>>()?;
    }
    Ok(())
}

fn bytes(index: &Index) -> Vec<u8> {
    serde_json::to_vec_pretty(index).unwrap_or_default()
}

/// Writes the index if all its pictures are there. What a kill left half-written beside them goes then.
async fn complete(folder: &Store, index: &Index) -> Result<(), StoreError> {
    let there = folder.files("").await?;
    let has = |file: &str| there.iter().any(|meta| meta.key == file);
    if index.images.iter().all(|image| has(&image.file)) {
        folder.put(samples::INDEX, bytes(index).into()).await?;
        if let Err(error) = folder.sweep("").await {
            tracing::warn!(step = index.step, "what was left half-written beside the step's samples cannot be deleted: {error}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_proto::samples::Image;
    use ella_store::Operation;
    use ella_store::faulty::{Failure, Faults};

    fn index(step: u64, prompt: &str) -> Index {
        let image = |number| Image { file: samples::file(number), prompt: prompt.into(), seed: number as u64 };
        let images = (0..3).map(image).collect();
        Index { step, images, sampler: "ddim".into(), steps: 2, guidance: 3.0, size: "8x8".into(), negative: None, average: true }
    }

    fn page(sheet: u64, step: u64, number: usize, last: bool) -> Page {
        Page { sheet, step, number, png: vec![number as u8; 4], index: last.then(|| index(step, "a")) }
    }

    /// Two ranks, of which one has two pictures and the other one: whoever comes last writes the index, and nobody earlier.
    #[test]
    fn the_index_is_written_when_all_pictures_of_all_ranks_are_there() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let store = Store::in_memory();
        let (counts, ranks) = (Counts::default(), [0, 1].map(|_| Album::new(store.clone(), runtime.handle().clone())));
        counts.waiting.store(100, Ordering::Relaxed);
        let [mut one, mut two] = ranks;
        let there = || is_there(&store, runtime.handle(), &index(4, "a"));
        one.keep(page(1, 4, 0, false), &counts);
        two.keep(page(1, 4, 1, true), &counts);
        assert!(!there());
        one.keep(page(1, 4, 2, true), &counts);
        assert!(there() && !is_there(&store, runtime.handle(), &index(4, "another prompt")));
        let names: Vec<_> = runtime.block_on(store.list("samples")).unwrap().into_iter().map(|meta| meta.key).collect();
        assert_eq!(names, ["000.png", "001.png", "002.png", "index.json"].map(|name| format!("samples/000000000004/{name}")));
        assert_eq!(counts.news(), [("pictures_saved".to_owned(), 3)].into());
        assert_eq!((counts.news().len(), counts.waiting.load(Ordering::Relaxed)), (0, 88));
    }

    #[test]
    fn what_a_kill_left_half_written_goes_when_the_step_is_complete() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().to_str().unwrap()).unwrap();
        let (counts, mut album) = (Counts::default(), Album::new(store.clone(), runtime.handle().clone()));
        counts.waiting.store(100, Ordering::Relaxed);
        let left = || runtime.block_on(store.half_written(&samples::folder(4))).unwrap().len();
        album.keep(page(1, 4, 0, false), &counts);
        std::fs::write(dir.path().join(samples::folder(4)).join("001.png#7"), "half").unwrap();
        album.keep(page(1, 4, 1, false), &counts);
        assert_eq!(left(), 1, "others may draw yet");
        album.keep(page(1, 4, 2, true), &counts);
        assert!(left() == 0 && is_there(&store, runtime.handle(), &index(4, "a")));
    }

    #[test]
    fn what_other_settings_drew_of_a_step_goes_before_it_is_drawn_again() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let store = Store::in_memory();
        let (counts, mut album) = (Counts::default(), Album::new(store.clone(), runtime.handle().clone()));
        counts.waiting.store(100, Ordering::Relaxed);
        for number in 0..3 {
            album.keep(page(1, 4, number, number == 2), &counts);
        }
        let files = || runtime.block_on(store.list("samples")).unwrap().len();
        clear(&store, runtime.handle(), &index(4, "a"));
        assert_eq!(files(), 4, "the same settings draw the same");
        clear(&store, runtime.handle(), &index(4, "b"));
        assert_eq!(files(), 0);
        // The other rank is killed before its pictures are there.
        album.keep(Page { index: Some(index(4, "b")), ..page(2, 4, 0, false) }, &counts);
        assert!(!is_there(&store, runtime.handle(), &index(4, "b")));
        // Without an index nobody knows what these are of.
        clear(&store, runtime.handle(), &index(4, "b"));
        assert_eq!(files(), 0);
    }

    #[test]
    fn what_cannot_be_stored_is_given_up_with_the_rest_of_its_drawing_and_counted() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let faults = Faults::new();
        let store = faults.inject(&Store::in_memory());
        faults.push(Operation::Put, "000.png", Failure::Denied, 1);
        let (counts, mut album) = (Counts::default(), Album::new(store.clone(), runtime.handle().clone()));
        counts.waiting.store(100, Ordering::Relaxed);
        for number in 0..3 {
            album.keep(page(1, 4, number, number == 2), &counts);
        }
        assert_eq!(counts.news(), [("pictures_given_up".to_owned(), 3)].into());
        // The next drawing is tried again.
        for number in 0..3 {
            album.keep(page(2, 4, number, number == 2), &counts);
        }
        assert_eq!(counts.news(), [("pictures_saved".to_owned(), 3)].into());
        assert!(is_there(&store, runtime.handle(), &index(4, "a")));
    }
}
