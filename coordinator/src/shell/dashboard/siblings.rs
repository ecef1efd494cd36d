//! The runs beside this one: folders beside its own that have a `run.toml`. What is read of them is bounded and kept for a while, for pages ask
//! often and stores answer slowly.

use axum::Json;
use axum::extract::State;
use ella_store::{Body, Outcome, Record, Store, StoreError, redacted};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::view::RunView;
use super::{Query, Refusal, Shared};
use crate::history::Point;
use crate::status::StatusReport;

const RUN_TOML: &str = "run.toml";
/// Folders that are looked at.
const MOST_RUNS: usize = 200;
/// Runs that are read at once.
const AT_ONCE: usize = 4;
/// How long a list of runs stays as it is.
const FRESH: Duration = Duration::from_secs(30);
/// Other runs whose past is kept, the newest asked for.
const MOST_VIEWS: usize = 2;
/// How long, once it is read.
const LIFE: Duration = Duration::from_secs(60);
/// The largest log record and file of measurements that is read.
const LARGEST: u64 = 64 << 20;
/// What of a larger file is read to find its last line.
const TAIL: u64 = 64 << 10;

/// The folder that this run's own lies in.
#[derive(Debug)]
pub(super) struct Siblings {
    parent: Option<Store>,
    own: String,
    listed: Mutex<Option<(Instant, Arc<Listing>)>>,
    views: Mutex<VecDeque<Kept>>,
}

/// Another run's past.
#[derive(Debug)]
struct Kept {
    name: String,
    view: Arc<RunView>,
    /// When it was read to its end: were its time counted from the beginning, one that takes longer would begin again and again.
    read: Arc<OnceLock<Instant>>,
    reading: AbortHandle,
}

impl Kept {
    /// Begins to read it, in the background.
    fn begin(name: &str, store: Store) -> Self {
        let (view, reader) = RunView::new(Some(store), None);
        let read = Arc::new(OnceLock::new());
        let (restored, done) = (Arc::clone(&view), Arc::clone(&read));
        let work = async move {
            if let Some(reader) = reader {
                restored.restore(reader).await;
            }
            let _ = done.set(Instant::now());
        };
        Self { name: name.to_owned(), view, read, reading: tokio::spawn(work).abort_handle() }
    }

    fn is_fresh(&self) -> bool {
        // Asked first: one that has ended without a time has failed.
        let over = self.reading.is_finished();
        self.read.get().map_or(!over, |at| at.elapsed() < LIFE)
    }
}

impl Drop for Kept {
    /// Nobody sees any more what would still be read.
    fn drop(&mut self) {
        self.reading.abort();
    }
}

#[derive(Clone, Debug, Default, Serialize)]
struct Listing {
    runs: Vec<Listed>,
    /// Folders that were not looked at, for there are too many.
    left_off: usize,
    /// Why the folder could not be listed.
    problem: Option<String>,
}

/// One run, briefly.
#[derive(Clone, Debug, Default, Serialize)]
struct Listed {
    name: String,
    /// This coordinator's.
    own: bool,
    /// `done`, `preempted` or `failed`, as its newest coordinator recorded it; `open` if it has not; of this one its phase.
    state: String,
    reason: String,
    term: u64,
    /// The newest step that was measured.
    step: u64,
    steps: Option<u64>,
    loss: Option<f64>,
    at_unix_ms: u64,
    /// What of it could not be read.
    problem: Option<String>,
}

/// The last part of a URL or path.
pub(super) fn name_of(url: &str) -> &str {
    url.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

/// A folder's name, and nothing that leads elsewhere.
fn is_name(name: &str) -> bool {
    let fits = !name.is_empty() && name.len() <= 255 && !name.starts_with('.');
    fits && !name.chars().any(|c| matches!(c, '/' | '\\') || c.is_control())
}

fn parent(store: &Store) -> Option<Store> {
    let url = match store.local_path() {
        Some(path) => path.parent()?.to_str()?.to_owned(),
        None => store.url().trim_end_matches('/').rsplit_once('/').map(|(parent, _)| parent.to_owned())?,
    };
    // Of a bucket's own URL nothing is left but the scheme.
    if url.ends_with('/') || url.ends_with(':') {
        return None;
    }
    Store::open(&url).ok()
}

/// The run of this name, opened as whoever trains it does: a folder's name on this machine may have any character.
fn beside(parent: &Store, name: &str) -> Result<Store, StoreError> {
    match parent.local_path().map(|path| path.join(name)) {
        Some(path) => Store::open(&path.to_string_lossy()),
        None => Ok(parent.child(name)),
    }
}

impl Siblings {
    pub(super) fn of(store: Option<&Store>) -> Self {
        let own = store.map_or_else(String::new, |store| name_of(store.url()).to_owned());
        Self { parent: store.and_then(parent), own, listed: Mutex::default(), views: Mutex::default() }
    }

    pub(super) fn is_own(&self, name: &str) -> bool {
        name == self.own
    }

    fn folder(&self, name: &str) -> Result<Store, Refusal> {
        if !is_name(name) {
            return Err(Refusal::bad("run: give the name of a folder beside this run's, as /api/v1/runs lists them"));
        }
        let parent = self.parent.as_ref().ok_or_else(|| Refusal::not_found("there is no folder of runs here"))?;
        Ok(beside(parent, name)?)
    }

    /// Another run's past, which is read in the background.
    pub(super) async fn view(&self, name: &str) -> Result<Arc<RunView>, Refusal> {
        let store = self.folder(name)?;
        let mut views = self.views.lock().await;
        views.retain(Kept::is_fresh);
        if let Some(kept) = views.iter().find(|kept| kept.name == name) {
            return Ok(Arc::clone(&kept.view));
        }
        if store.head(RUN_TOML).await?.is_none() {
            return Err(Refusal::not_found(format!("{name}: there is no such run beside this one")));
        }
        let kept = Kept::begin(name, store);
        let view = Arc::clone(&kept.view);
        views.push_back(kept);
        if views.len() > MOST_VIEWS {
            views.pop_front();
        }
        Ok(view)
    }

    /// Where another run is, by its folder.
    pub(super) async fn status(&self, view: &RunView) -> Result<StatusReport, Refusal> {
        let store = view.store().ok_or_else(|| Refusal::not_found("a job has no folder"))?;
        let listed = read(store).await?.ok_or_else(|| Refusal::not_found("there is no such run beside this one"))?;
        let Listed { state: phase, reason, term, step, steps, loss, .. } = listed;
        let steps = steps.unwrap_or(0);
        Ok(StatusReport { run_url: store.url().to_owned(), phase, reason, term, step, steps, loss, ..StatusReport::default() })
    }

    async fn list(&self) -> Arc<Listing> {
        let mut listed = self.listed.lock().await;
        if let Some((_, listing)) = listed.as_ref().filter(|(since, _)| since.elapsed() < FRESH) {
            return Arc::clone(listing);
        }
        let listing = Arc::new(match &self.parent {
            None => Listing::default(),
            Some(parent) => {
                self.look(parent).await.unwrap_or_else(|error| Listing { problem: Some(error.to_string()), ..Listing::default() })
            }
        });
        *listed = Some((Instant::now(), Arc::clone(&listing)));
        listing
    }

    async fn look(&self, parent: &Store) -> Result<Listing, StoreError> {
        let mut names: Vec<String> = parent.folders("").await?.into_iter().filter(|name| is_name(name) && !self.is_own(name)).collect();
        let left_off = names.len().saturating_sub(MOST_RUNS);
        names.truncate(MOST_RUNS);
        let one = |name: String| async move {
            let read = async { read(&beside(parent, &name)?).await };
            let listed = read.await.transpose()?.unwrap_or_else(|error| Listed { problem: Some(error.to_string()), ..Listed::default() });
            Some(Listed { name, ..listed })
        };
        let runs = futures::stream::iter(names).map(one).buffered(AT_ONCE).filter_map(std::future::ready).collect().await;
        Ok(Listing { runs, left_off, problem: None })
    }
}

/// What a run's folder says of it; none if it is no run's.
async fn read(store: &Store) -> Result<Option<Listed>, StoreError> {
    let Some(config) = config_of(store).await? else { return Ok(None) };
    let steps = config.get("train").and_then(|train| train.get("steps")).and_then(toml::Value::as_integer);
    let mut listed = Listed { steps: steps.and_then(|steps| u64::try_from(steps).ok()), state: "open".into(), ..Listed::default() };
    if let Some(record) = newest::<Record>(store, "log").await? {
        listed.term = record.term;
        if let Body::End { outcome, reason, step } = record.body {
            let state = match outcome {
                Outcome::Done => "done",
                Outcome::Preempted => "preempted",
                Outcome::Failed => "failed",
            };
            (listed.state, listed.reason, listed.step) = (state.into(), reason, step);
        }
    }
    // Beyond the step at which its last coordinator ended are steps that were undone.
    let counts = |point: &Point| listed.state == "open" || point.step <= listed.step;
    if let Some(point) = newest::<Point>(store, "metrics").await?.filter(counts) {
        (listed.step, listed.loss, listed.at_unix_ms) = (point.step, point.loss, point.at_unix_ms);
    }
    Ok(Some(listed))
}

/// What the last whole line of the newest file in `folder` says.
async fn newest<T: serde::de::DeserializeOwned>(store: &Store, folder: &str) -> Result<Option<T>, StoreError> {
    let files = store.files(folder).await?;
    let Some(file) = files.iter().rev().find(|file| file.key.contains(".json") && file.bytes <= LARGEST) else { return Ok(None) };
    let tail = store.get_range(&file.key, file.bytes.saturating_sub(TAIL)..file.bytes).await?;
    let found = last(&tail);
    if found.is_some() || file.bytes <= TAIL {
        return Ok(found);
    }
    Ok(last(&store.get(&file.key).await?))
}

/// What the whole text says, or else its last line that says anything. The end of a line alone does not: more is closed in it than is opened.
fn last<T: serde::de::DeserializeOwned>(text: &[u8]) -> Option<T> {
    let whole = serde_json::from_slice(text).ok();
    whole.or_else(|| text.rsplit(|byte| *byte == b'\n').find_map(|line| serde_json::from_slice(line).ok()))
}

async fn config_of(store: &Store) -> Result<Option<toml::Table>, StoreError> {
    let Some(file) = store.head(RUN_TOML).await? else { return Ok(None) };
    let corrupt = |found: String| StoreError::Corrupt {
        url: store.url().to_owned(),
        key: RUN_TOML.to_owned(),
        expected: "a run's config".to_owned(),
        found,
    };
    if file.bytes > 1 << 20 {
        return Err(corrupt(format!("{} bytes", file.bytes)));
    }
    let text = store.get(RUN_TOML).await?;
    let text = std::str::from_utf8(&text).map_err(|_| corrupt("no UTF-8".to_owned()))?;
    text.parse().map(Some).map_err(|error: toml::de::Error| corrupt(error.message().to_owned()))
}

/// Lists this run and those beside it.
pub(super) async fn runs(State(dashboard): Shared) -> Result<Json<impl Serialize>, Refusal> {
    let status = dashboard.status().await?;
    let mut listing = Listing::clone(&*dashboard.siblings.list().await);
    let own = Listed {
        name: name_of(&status.run_url).to_owned(),
        own: true,
        state: status.phase,
        reason: status.reason,
        term: status.term,
        step: status.step,
        steps: Some(status.steps),
        loss: status.loss,
        ..Listed::default()
    };
    listing.runs.insert(0, own);
    Ok(Json(listing))
}

#[derive(Debug, Deserialize)]
pub(super) struct Pair {
    run: Option<String>,
    with: Option<String>,
}

/// A run's config by key, and another's beside it.
#[derive(Debug, Serialize)]
struct Compared {
    run: String,
    with: Option<String>,
    keys: Vec<Key>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Key {
    key: String,
    /// As in TOML; null: the key is not there.
    value: Option<String>,
    other: Option<String>,
    differs: bool,
}

/// Gives a run's config by key, beside that of another.
pub(super) async fn config(State(dashboard): Shared, Query(pair): Query<Pair>) -> Result<Json<impl Serialize>, Refusal> {
    let siblings = &dashboard.siblings;
    let of = async |name: &str| {
        let own = dashboard.own.store().filter(|_| name.is_empty() || siblings.is_own(name));
        let store = own.map_or_else(|| siblings.folder(name), |store| Ok(store.clone()))?;
        config_of(&store).await?.ok_or_else(|| Refusal::not_found(format!("{name}: there is no such run beside this one")))
    };
    let run = pair.run.unwrap_or_else(|| siblings.own.clone());
    let other = match &pair.with {
        Some(with) => Some(of(with).await?),
        None => None,
    };
    let keys = compared(&of(&run).await?, other.as_ref());
    Ok(Json(Compared { run, with: pair.with, keys }))
}

/// Every key of either, in order.
fn compared(one: &toml::Table, other: Option<&toml::Table>) -> Vec<Key> {
    let (mut keys, mut others) = (BTreeMap::new(), BTreeMap::new());
    flatten("", one, &mut keys);
    other.into_iter().for_each(|other| flatten("", other, &mut others));
    let names: std::collections::BTreeSet<String> = keys.keys().chain(others.keys()).cloned().collect();
    let key = |key: String| {
        let (value, beside) = (keys.get(&key).cloned(), others.get(&key).cloned());
        let differs = other.is_some() && value != beside;
        Key { key, value, other: beside, differs }
    };
    names.into_iter().map(key).collect()
}

fn flatten(prefix: &str, table: &toml::Table, into: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(table) => flatten(&key, table, into),
            value => {
                let mut value = value.clone();
                redact(&mut value);
                into.insert(key, value.to_string());
            }
        }
    }
}

/// Leaves of URLs what is no secret. ella keeps no config with others, but what lies beside a run may be from elsewhere.
fn redact(value: &mut toml::Value) {
    match value {
        toml::Value::String(text) if text.split_once("://").is_some_and(|(scheme, _)| !scheme.contains(char::is_whitespace)) => {
            let bare = redacted(text);
            if bare != text.trim_end_matches('/') {
                *text = bare;
            }
        }
        toml::Value::Array(values) => values.iter_mut().for_each(redact),
        toml::Value::Table(table) => table.iter_mut().for_each(|(_, value)| redact(value)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_store::{Operation, faulty};
    use tokio::time::{sleep, timeout};

    /// Runs of these names, in a store that fails as the script says.
    async fn beside_own(names: &[&str]) -> (Siblings, faulty::Faults) {
        let faults = faulty::Faults::new();
        let runs = faults.inject(&Store::in_memory());
        for name in names {
            runs.put(&format!("{name}/run.toml"), "[train]\nsteps = 9\n".into()).await.unwrap();
        }
        (Siblings { parent: Some(runs), own: "own".into(), listed: Mutex::default(), views: Mutex::default() }, faults)
    }

    #[tokio::test(start_paused = true)]
    async fn a_past_is_kept_for_a_while_after_it_was_read_however_long_that_took() {
        let (siblings, faults) = beside_own(&["a"]).await;
        faults.push(Operation::List, "a/metrics", faulty::Failure::Slow(LIFE + Duration::from_secs(10)), 1);
        let first = siblings.view("a").await.unwrap();
        for (seconds, same) in [(65, true), (10, true), (50, true), (20, false)] {
            sleep(Duration::from_secs(seconds)).await;
            assert_eq!(Arc::ptr_eq(&first, &siblings.view("a").await.unwrap()), same, "after {seconds} s more");
        }
    }

    #[tokio::test]
    async fn a_past_that_is_let_go_is_read_no_further() {
        let (siblings, faults) = beside_own(&["a", "b", "c"]).await;
        faults.push(Operation::List, "a/metrics", faulty::Failure::Hang, u32::MAX);
        let first = siblings.view("a").await.unwrap();
        for name in ["b", "c"] {
            siblings.view(name).await.unwrap();
        }
        let let_go = async {
            while Arc::strong_count(&first) > 1 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), let_go).await.unwrap();
    }

    #[tokio::test]
    async fn of_a_large_file_the_last_line_is_found() {
        let store = Store::in_memory();
        let line = |step: u64| format!("{{\"at_unix_ms\":7,\"step\":{step},\"samples\":4,\"loss\":0.5}}\n");
        let many: String = (1..=3_000).map(line).collect();
        assert!(many.len() as u64 > 2 * TAIL);
        store.put("metrics/000001-000001.jsonl", (many.clone() + "{\"step\":").into()).await.unwrap();
        assert_eq!(newest::<Point>(&store, "metrics").await.unwrap().map(|point| point.step), Some(3_000));
        store.put("metrics/000001-000002.jsonl", (line(1) + &" ".repeat(many.len())).into()).await.unwrap();
        assert_eq!(newest::<Point>(&store, "metrics").await.unwrap().map(|point| point.step), Some(1));
    }

    #[test]
    fn a_urls_secrets_are_not_shown() {
        let text = "[data]\npath = \"s3://user:word@bucket/set?sig=word#word\"\n\
                    [base]\nmodel = \"s3://bucket/model/\"\nloras = [{ file = \"https://h/a?token=word\", weight = 1.0 }]\n\
                    [sample]\nprompts = [\"which sign? http://\"]\n";
        let keys = compared(&text.parse().unwrap(), None);
        let values: Vec<_> = keys.iter().filter_map(|key| key.value.as_deref()).collect();
        assert!(values.iter().all(|value| !value.contains("word")), "{values:?}");
        assert!(values[0].contains("https://h/a") && values[0].contains("1.0"), "{values:?}");
        assert_eq!(values[1..3], ["\"s3://bucket/model/\"", "\"s3://bucket/set\""]);
        assert!(values[3].contains("which sign? http://"), "{values:?}");
    }

    #[test]
    fn configs_are_compared_by_key() {
        let one: toml::Table = "[train]\nsteps = 5\nlr = 1e-4\n[train.schedule]\nkind = \"cosine\"\n".parse().unwrap();
        let two: toml::Table = "[train]\nsteps = 6\nlr = 0.0001\n[run]\nseed = 1\n".parse().unwrap();
        let keys = compared(&one, Some(&two));
        let seen: Vec<_> = keys.iter().map(|k| (k.key.as_str(), k.value.as_deref(), k.other.as_deref(), k.differs)).collect();
        assert_eq!(
            seen,
            [
                ("run.seed", None, Some("1"), true),
                ("train.lr", Some("0.0001"), Some("0.0001"), false),
                ("train.schedule.kind", Some("\"cosine\""), None, true),
                ("train.steps", Some("5"), Some("6"), true),
            ]
        );
        assert!(compared(&one, None).iter().all(|key| !key.differs && key.other.is_none()));
    }

    #[test]
    fn only_a_folders_own_name_is_one() {
        assert!(["mine", "a b", "<script>", "x..y"].iter().all(|name| is_name(name)));
        assert!(["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\nb"].iter().all(|name| !is_name(name)));
        assert_eq!(["s3://b/runs/a", "/x/y/", "memory:///", "a"].map(name_of), ["a", "y", "memory:", "a"]);
        let parent = |store: Store| parent(&store).map(|store| store.url().to_owned());
        let local = Store::open("/tmp/runs/a").unwrap();
        assert_eq!((parent(local).as_deref(), parent(Store::in_memory())), (Some("/tmp/runs"), None));
    }

    #[tokio::test]
    async fn runs_are_listed_with_state_step_and_loss_whatever_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Store::open(dir.path().to_str().unwrap()).unwrap();
        let put = async |key: &str, text: &str| runs.put(key, text.to_owned().into()).await.unwrap();
        for name in ["own", "done", "open", "<b>odd"] {
            put(&format!("{name}/run.toml"), "[train]\nsteps = 9\n").await;
        }
        put("data/manifest.json", "{}").await;
        put("broken/run.toml", "[run").await;
        let end = r#"{"seq":1,"term":3,"nonce":"n","at_unix_ms":1,"body":{"kind":"end","outcome":"done","step":9,"reason":""}}"#;
        put("done/log/000000000001.json", end).await;
        let line = r#"{"at_unix_ms":7,"step":8,"samples":4,"loss":0.5}"#;
        put("done/metrics/000003-000001.jsonl", &format!("{line}\n{line}\n{{\"step\":9,")).await;
        put("open/metrics/000001-000001.jsonl", "no line at all\n").await;
        let siblings = Siblings::of(Some(&runs.child("own")));
        let listing = siblings.list().await;
        let seen: Vec<_> = listing.runs.iter().map(|r| (r.name.as_str(), r.state.as_str(), r.step, r.loss, r.problem.is_some())).collect();
        assert_eq!(
            seen,
            [
                ("<b>odd", "open", 0, None, false),
                ("broken", "", 0, None, true),
                ("done", "done", 8, Some(0.5), false),
                ("open", "open", 0, None, false)
            ]
        );
        assert_eq!((listing.runs[2].steps, listing.runs[2].term), (Some(9), 3));
        assert!(siblings.view("data").await.is_err() && siblings.view("../x").await.is_err());
        let done = siblings.view("done").await.unwrap();
        assert_eq!(siblings.status(&done).await.unwrap().phase, "done");
        assert!(Arc::ptr_eq(&done, &siblings.view("done").await.unwrap()), "it is kept");
    }
}
