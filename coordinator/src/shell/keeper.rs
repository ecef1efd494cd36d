//! The one task that writes the run's log, in the order in which it is asked to (TERM, COMMIT).

use super::RunError;
use super::driver::Input;
use super::start::unix_ms;
use crate::machine::Event;
use ella_proto::ids::Term;
use ella_store::{Body, Commit, Fault, LogError, RunLog, Store, StoreError, find_unseen, parse_folder, remove_leftovers};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// The pause between two tries of an append, each of which has the store's own retries and deadline within.
const PAUSE: Duration = Duration::from_secs(10);
/// How often a part is looked for, and the pause between: what another machine has just written into a shared folder may be seen a moment later.
const LOOKS: (usize, Duration) = (3, Duration::from_millis(300));

/// What the keeper is asked to do.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // some hundred bytes each, in a short queue
pub(super) enum Work {
    /// Append a record.
    Append(Body),
    /// Delete commit folders that the log gave up.
    Delete(Vec<String>),
}

/// A keeper of `log`, which tries each append for as long as `patience`, and where to send its work. It ends when the sender is dropped and all is
/// done.
pub(super) fn keeper(
    (log, patience): (RunLog, Duration),
    store: Store,
    inputs: mpsc::Sender<Input>,
) -> (mpsc::UnboundedSender<Work>, impl Future<Output = Result<(), RunError>>) {
    let (work, inbox) = mpsc::unbounded_channel();
    (work, keep((log, patience), store, inbox, inputs))
}

async fn keep(
    (mut log, patience): (RunLog, Duration),
    store: Store,
    mut inbox: mpsc::UnboundedReceiver<Work>,
    inputs: mpsc::Sender<Input>,
) -> Result<(), RunError> {
    let mut strays = Strays { term: log.term(), patience, recorded: BTreeSet::new(), since: BTreeMap::new() };
    while let Some(work) = inbox.recv().await {
        let event = match work {
            Work::Append(body) => append((&mut log, &store), body, patience).await,
            Work::Delete(folders) => {
                strays.recorded.retain(|folder| !folders.contains(folder));
                delete(store.clone(), folders).await;
                continue;
            }
        };
        let broken = matches!(event, Event::Superseded(_) | Event::AppendFailed(_) | Event::LogGone(_));
        let recorded = if let Event::Appended(Body::Commit(commit)) = &event { Some(commit.clone()) } else { None };
        // No receiver: the outcome was decided, and this was its record.
        let _ = inputs.send(Input::Event(event)).await;
        if broken {
            return Ok(());
        }
        if let Some(commit) = recorded {
            strays.sweep(&store, &commit).await;
        }
    }
    Ok(())
}

/// This term's commit folders that no record came to name, since their generation ended before: a gibibyte each, and more with every worker lost.
#[derive(Debug)]
struct Strays {
    term: u64,
    /// How long a worker may try to save what nobody waits for any more: it would fail if its folder went meanwhile.
    patience: Duration,
    /// Of this term, and not given up. A listing has no say in that: a folder that two machines share may be seen late.
    recorded: BTreeSet<String>,
    /// Those that are known, and since when.
    since: BTreeMap<String, Instant>,
}

impl Strays {
    /// Deletes those that have been known for long, after a commit's record.
    async fn sweep(&mut self, store: &Store, commit: &Commit) {
        self.recorded.insert(commit.folder.clone());
        match self.known(store, commit.step).await {
            Ok(folders) if folders.is_empty() => {}
            Ok(folders) => delete(store.clone(), folders).await,
            Err(error) => tracing::warn!("{error}; commits that came to nothing are looked for after the next one"),
        }
    }

    async fn known(&mut self, store: &Store, step: u64) -> Result<Vec<String>, StoreError> {
        let mut there = store.folders("commits").await?;
        let of_before = |folder: &String| parse_folder(folder).is_some_and(|(of, term)| term == self.term && of < step);
        there.retain(|folder| of_before(folder) && !self.recorded.contains(folder));
        self.since.retain(|folder, _| there.contains(folder));
        there.retain(|folder| self.since.entry(folder.clone()).or_insert_with(Instant::now).elapsed() > 2 * self.patience);
        Ok(there)
    }
}

/// Costs space only if it fails. The store's future is not `Send`, so it runs on a thread of its own.
pub(super) async fn delete(store: Store, folders: Vec<String>) {
    let handle = tokio::runtime::Handle::current();
    let deleted = tokio::task::spawn_blocking(move || handle.block_on(remove_leftovers(&store, &folders))).await;
    let problem = match deleted {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(broken) => broken.to_string(),
    };
    tracing::warn!("{problem}; the next coordinator deletes what is left");
}

/// As long as the workers try to save what a record is of: whoever gave up sooner would end the run for a store that comes back.
async fn append((log, store): (&mut RunLog, &Store), body: Body, patience: Duration) -> Event {
    let (began, pause) = (Instant::now(), PAUSE.min(patience / 20));
    let mut seen = false;
    loop {
        let tried = async {
            if !seen && let Some(unseen) = unseen(log, store, &body).await? {
                return Ok(unseen);
            }
            seen = true;
            log.append(body.clone(), unix_ms()).await.map(|_| Event::Appended(body.clone()))
        };
        match tried.await {
            Ok(event) => return event,
            Err(LogError::Superseded { by_term, .. }) => return Event::Superseded(Term(by_term)),
            // Whether it was written is unknown then; appending again is safe.
            Err(LogError::Store(error)) if error.is_retryable() && began.elapsed() + pause < patience => {
                tracing::warn!("{error}; appending again");
                tokio::time::sleep(pause).await;
            }
            Err(error @ LogError::Gone { .. }) => return Event::LogGone(error.to_string()),
            Err(error) => return Event::AppendFailed(error.to_string()),
        }
    }
}

/// COMMIT: that a part is not in the run's folder as it would be recorded, where a worker said that it had saved it. Once another has the run, or the
/// folder is gone, that says nothing about the worker.
async fn unseen(log: &RunLog, store: &Store, body: &Body) -> Result<Option<Event>, LogError> {
    let Body::Commit(commit) = body else { return Ok(None) };
    let mut looks = 1;
    loop {
        let Some((part, fault)) = find_unseen(store, commit).await? else { return Ok(None) };
        if looks == LOOKS.0 {
            log.check_held().await?;
            let there = if let Fault::Size { found, .. } = fault { format!("{found} bytes") } else { "nothing".to_owned() };
            let (url, folder, step) = (store.url(), &commit.folder, commit.step);
            let why = format!(
                "it saved {url}/{folder}/{} ({} bytes), and the coordinator finds {there} there: the two see different folders. All workers must see the \
                 coordinator's run.output: look at this machine's mounts, and at the endpoint of its store",
                part.name, part.bytes
            );
            return Ok(Some(Event::PartUnseen { step, part: part.name.clone(), why }));
        }
        looks += 1;
        tokio::time::sleep(LOOKS.1).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_store::{Commit, Digest, Part, Record, Term as TermRecord, commit_folder};

    /// A run's log, and its keeper at work.
    struct Bench {
        store: Store,
        work: mpsc::UnboundedSender<Work>,
        inputs: mpsc::Receiver<Input>,
    }

    fn term() -> TermRecord {
        TermRecord { host: "h".into(), version: "1".into(), config_digest: Digest::of(b"config") }
    }

    /// Of two parts, of five and of seven bytes.
    fn commit(step: u64) -> Commit {
        let part = |(name, bytes): (&str, &[u8])| Part { name: name.into(), bytes: bytes.len() as u64, blake3: Digest::of(bytes) };
        let digest = Digest::of(b"");
        Commit {
            step,
            generation: 1,
            world: 2,
            folder: commit_folder(step, 1, 1),
            parts: [("a", &b"first"[..]), ("b", b"another")].map(part).to_vec(),
            config_digest: digest,
            data_digest: digest,
            models_digest: digest,
            epoch: 0,
            step_in_epoch: step,
            ledger: Vec::new(),
            state_digest: digest,
            computed_with: Default::default(),
        }
    }

    impl Bench {
        async fn start() -> Self {
            let store = Store::in_memory();
            let (log, _) = RunLog::claim(&store, term(), "me", 1).await.unwrap();
            let (sender, inputs) = mpsc::channel(4);
            let (work, keeping) = keeper((log, Duration::from_secs(60)), store.clone(), sender);
            tokio::spawn(keeping);
            Self { store, work, inputs }
        }

        async fn put(&self, step: u64, name: &str, bytes: &'static [u8]) {
            self.store.put(&format!("{}/{name}", commit_folder(step, 1, 1)), bytes.into()).await.unwrap();
        }

        async fn append(&mut self, step: u64) -> Event {
            self.work.send(Work::Append(Body::Commit(commit(step)))).unwrap();
            match self.inputs.recv().await {
                Some(Input::Event(event)) => event,
                other => panic!("{other:?}"),
            }
        }

        async fn records(&self) -> Vec<Record> {
            RunLog::read(&self.store).await.unwrap()
        }
    }

    /// A worker whose disk is another one says that it has saved what nobody else will ever find.
    #[tokio::test(start_paused = true)]
    async fn a_commit_is_recorded_only_if_the_coordinator_sees_every_part_of_it() {
        let mut bench = Bench::start().await;
        bench.put(5, "a", b"first").await;
        let unseen = |event: Event| match event {
            Event::PartUnseen { step: 5, part, why } if part == "b" => why,
            other => panic!("{other:?}"),
        };
        let why = unseen(bench.append(5).await);
        let folder = commit_folder(5, 1, 1);
        assert!(
            why.contains(&format!("{folder}/b (7 bytes), and the coordinator finds nothing there")) && why.contains("run.output"),
            "{why}"
        );
        bench.put(5, "b", b"half").await;
        let why = unseen(bench.append(5).await);
        assert!(why.contains("finds 4 bytes there"), "{why}");
        assert_eq!(bench.records().await.len(), 1, "the term's");
        // It goes on to keep the log.
        for (name, bytes) in [("a", &b"first"[..]), ("b", b"another")] {
            bench.put(7, name, bytes).await;
        }
        assert_eq!(bench.append(7).await, Event::Appended(Body::Commit(commit(7))));
        assert_eq!(bench.records().await.last().unwrap().body, Body::Commit(commit(7)));
    }

    /// Else they pile up for as long as a coordinator lives, which on machines that come and go is long.
    #[tokio::test(start_paused = true)]
    async fn what_a_generation_that_ended_had_saved_is_deleted_once_nobody_can_be_at_it() {
        let mut bench = Bench::start().await;
        let whole = async |bench: &mut Bench, step: u64| {
            for (name, bytes) in [("a", &b"first"[..]), ("b", b"another")] {
                bench.put(step, name, bytes).await;
            }
            assert!(matches!(bench.append(step).await, Event::Appended(_)));
        };
        let there = async |bench: &Bench| bench.store.folders("commits").await.unwrap();
        // Of another term, of steps before, of a step to come.
        let others = [commit_folder(4, 9, 1), commit_folder(4, 1, 2), commit_folder(99, 1, 2)];
        for folder in &others {
            bench.store.put(&format!("{folder}/a"), (&b"first"[..]).into()).await.unwrap();
        }
        for step in [5, 6] {
            whole(&mut bench, step).await;
            tokio::time::sleep(Duration::from_secs(70)).await;
            assert_eq!(there(&bench).await.len(), 3 + step as usize - 4, "somebody may be at it");
        }
        whole(&mut bench, 7).await;
        // What is asked for next is done after it.
        whole(&mut bench, 8).await;
        let mut expected: Vec<_> = [5, 6, 7, 8].map(|step| commit_folder(step, 1, 1)).to_vec();
        expected.extend([others[0].clone(), others[2].clone()]);
        expected.sort();
        assert_eq!(there(&bench).await, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_recorded_commit_that_a_listing_lacks_for_a_while_stays() {
        let mut bench = Bench::start().await;
        let part = |step: u64| format!("{}/a", commit_folder(step, 1, 1));
        for step in [5, 6, 7, 8] {
            for (name, bytes) in [("a", &b"first"[..]), ("b", b"another")] {
                bench.put(step, name, bytes).await;
            }
            assert!(matches!(bench.append(step).await, Event::Appended(_)));
            match step {
                5 => bench.store.delete_prefix(&commit_folder(5, 1, 1)).await.unwrap(),
                6 => bench.store.put(&part(5), (&b"first"[..]).into()).await.unwrap(),
                _ => {}
            }
            tokio::time::sleep(Duration::from_secs(130)).await;
        }
        assert!(bench.store.head(&part(5)).await.unwrap().is_some());
    }

    /// A part that comes into sight late is no reason to let anybody go.
    #[tokio::test(start_paused = true)]
    async fn a_part_that_is_seen_a_moment_later_is_there() {
        let mut bench = Bench::start().await;
        bench.put(5, "a", b"first").await;
        let store = bench.store.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LOOKS.1).await;
            store.put(&format!("{}/b", commit_folder(5, 1, 1)), (&b"another"[..]).into()).await.unwrap();
        });
        assert!(matches!(bench.append(5).await, Event::Appended(_)));
    }

    /// The next coordinator deletes what was never recorded; a folder that was removed has nothing in it.
    #[tokio::test(start_paused = true)]
    async fn a_worker_is_not_blamed_for_what_became_of_the_run() {
        let mut bench = Bench::start().await;
        RunLog::claim(&bench.store, term(), "another", 2).await.unwrap();
        assert_eq!(bench.append(5).await, Event::Superseded(Term(2)));
        let mut bench = Bench::start().await;
        bench.store.delete(&ella_store::log::record_key(0)).await.unwrap();
        assert!(matches!(bench.append(5).await, Event::LogGone(_)));
    }
}
