//! Opening a run: its config, its log, its newest commit; and claiming the next term (TERM).

use super::{RunError, keeper};
use crate::logs;
use ella_proto::config::RunConfig;
use ella_store::{
    Body, Commit, Created, Fault, Outcome, RunLog, RunState, Store, StoreError, Term, collect_leftovers, probe, verify_commit,
};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::{SystemTime, UNIX_EPOCH};

/// The effective config, in the run folder.
const RUN_TOML: &str = "run.toml";
/// What says that a folder is a data set's, or is to become one.
const OF_DATA: [&str; 2] = ["manifest.json", "plan.json"];

/// What a run folder holds.
pub(super) enum Run {
    /// A complete run.
    Done { step: u64, state: Box<RunState> },
    /// A run to begin or resume, in a term that is ours.
    Claimed { log: RunLog, state: Box<RunState>, given_up: GivenUp },
}

/// Commits that were given up as the run was opened.
#[derive(Debug, Default)]
pub(super) struct GivenUp {
    pub(super) damaged: Vec<Damaged>,
    /// Folders of those that the keep rule does not keep.
    pub(super) retired: Vec<String>,
}

/// A commit that was given up because a part of it is not what its record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Damaged {
    pub(super) step: u64,
    pub(super) folder: String,
    /// Which parts, and how.
    pub(super) what: String,
}

/// Opens the run. Nothing is written to it before its config and log have been found fit.
pub(super) async fn open_run(config: &RunConfig, store: &Store) -> Result<Run, RunError> {
    logs::in_run(store.url());
    let mut state = RunState::from_records(&RunLog::read(store).await?);
    let mut written = check_config(config, store, &state).await?;
    if written.is_none() {
        refuse_data(store).await?;
    }
    if let (None, Some(commit)) = (&written, state.last_commit().filter(|commit| commit.config_digest.to_string() != config.digest())) {
        return Err(RunError::OtherDigest { url: store.url().to_owned(), step: commit.step });
    }
    let mut damaged = damaged_commits(store, &mut state).await?;
    if damaged.is_empty()
        && let Some(step) = complete(&state, config)
    {
        if written.is_none() {
            store.put(RUN_TOML, config.to_toml().into()).await?;
        }
        return Ok(Run::Done { step, state: Box::new(state) });
    }
    if let Some(commit) = whole(&state, &damaged).filter(|commit| commit.step > config.train.steps) {
        return Err(RunError::FewerSteps { url: store.url().to_owned(), step: commit.step, steps: config.train.steps });
    }
    probe(store).await?;
    let effective = config.to_toml();
    // Before the term is claimed, and once: of coordinators that begin a run at the same time under unlike configs one is refused here.
    if written.is_none() {
        written = match store.create(RUN_TOML, effective.clone().into()).await? {
            Created::Yes => Some(effective.clone()),
            Created::AlreadyThere => check_config(config, store, &state).await?,
        };
    }
    let (mut log, records) = RunLog::claim(store, term(config)?, &nonce(), unix_ms()).await?;
    let before = state.last_commit().map(|commit| commit.step);
    let mut state = Box::new(RunState::from_records(&records));
    logs::in_term(log.term());
    tracing::info!(term = log.term(), commits = state.commits.len(), run = store.url(), "term claimed");
    if written.as_deref() != Some(&effective) {
        store.put(RUN_TOML, effective.into()).await?;
    }
    collect(store, &state, log.term()).await;
    if state.last_commit().map(|commit| commit.step) != before {
        // Another coordinator has committed since.
        damaged = damaged_commits(store, &mut state).await?;
    }
    if !damaged.is_empty() {
        let body = Body::Retire { commits: damaged.iter().map(|damaged| damaged.folder.clone()).collect() };
        log.append(body, unix_ms()).await?;
        state.commits.retain(|commit| damaged.iter().all(|damaged| damaged.folder != commit.folder));
    }
    let retired = keep(config, store, (&mut log, &mut state)).await?;
    let Some(commit) = state.last_commit() else { return Ok(Run::Claimed { log, state, given_up: GivenUp { damaged, retired } }) };
    for Damaged { step, folder, what } in &damaged {
        tracing::error!(step, folder, "a damaged commit is given up ({what}); training goes on from step {} instead", commit.step);
    }
    tracing::info!(step = commit.step, folder = commit.folder, "resuming from the last commit");
    if commit.step < config.train.steps {
        return Ok(Run::Claimed { log, state, given_up: GivenUp { damaged, retired } });
    }
    // The last coordinator was cut off between the last commit and its own end.
    let step = commit.step;
    log.append(Body::End { outcome: Outcome::Done, step, reason: String::new() }, unix_ms()).await?;
    state.term = log.term();
    Ok(Run::Done { step, state })
}

/// Gives up what the keep rule does not keep: it may have been lowered because the store is full, where no other commit comes to be before.
async fn keep(config: &RunConfig, store: &Store, (log, state): (&mut RunLog, &mut RunState)) -> Result<Vec<String>, RunError> {
    let surplus = state.commits.len().saturating_sub(config.checkpoint.keep.max(1));
    let folders: Vec<String> = state.commits.drain(..surplus).map(|commit| commit.folder).collect();
    if !folders.is_empty() {
        tracing::info!(?folders, "deleting commits beyond checkpoint.keep");
        log.append(Body::Retire { commits: folders.clone() }, unix_ms()).await?;
        keeper::delete(store.clone(), folders.clone()).await;
    }
    Ok(folders)
}

/// The newest commit that is not given up as damaged.
fn whole<'a>(state: &'a RunState, damaged: &[Damaged]) -> Option<&'a Commit> {
    state.commits.iter().rfind(|commit| damaged.iter().all(|damaged| damaged.folder != commit.folder))
}

/// The step at which the run was completed, if it was, its last commit was not given up since, and no further steps are asked for.
fn complete(state: &RunState, config: &RunConfig) -> Option<u64> {
    let ended = state.ended.as_ref().filter(|_| state.is_done())?;
    let held = state.last_commit().map_or(0, |commit| commit.step);
    (ended.step.min(held) >= config.train.steps).then_some(ended.step)
}

/// Refuses a config that would train other bits than the run's first (SAME). Gives the config that is there. A run that ended before its first commit
/// is not bound to anything.
async fn check_config(config: &RunConfig, store: &Store, state: &RunState) -> Result<Option<String>, RunError> {
    let bad = |reason: String| RunError::BadRunToml { reason };
    let bytes = match store.get(RUN_TOML).await {
        Err(StoreError::NotFound { .. }) => return Ok(None),
        read => read?,
    };
    let origin = format!("{}/{RUN_TOML}", store.url());
    let text = String::from_utf8(bytes.to_vec()).map_err(|_| bad(format!("{origin}: not UTF-8")));
    let parsed = text.and_then(|text| match RunConfig::parse(&text, &origin, &[]) {
        Ok(there) => Ok((text, there)),
        Err(error) => Err(bad(error.to_string())),
    });
    // Where no term was claimed, only a run that did not come so far has left one: in the form in which runs write it, or it is somebody's own.
    if state.term == 0 && !parsed.as_ref().is_ok_and(|(text, there)| there.to_toml() == *text) {
        return Err(RunError::OwnToml { file: origin });
    }
    let (text, there) = parsed?;
    let keys = config.binding_differences(&there);
    let bound = !state.commits.is_empty() || !state.is_over();
    if keys.is_empty() || !bound { Ok(Some(text)) } else { Err(RunError::OtherConfig { url: store.url().to_owned(), keys }) }
}

/// Refuses a folder that a data set is in.
async fn refuse_data(store: &Store) -> Result<(), RunError> {
    for file in OF_DATA {
        if store.head(file).await?.is_some() {
            return Err(RunError::HoldsData { url: store.url().to_owned(), file });
        }
    }
    Ok(())
}

/// Deletes what earlier terms left behind. It costs space only, so a failure is only told.
async fn collect(store: &Store, state: &RunState, term: u64) {
    match collect_leftovers(store, state, term).await {
        Ok(folders) if folders.is_empty() => {}
        Ok(folders) => {
            tracing::info!(?folders, "deleting commits that were given up or never recorded");
            keeper::delete(store.clone(), folders).await;
        }
        Err(error) => tracing::warn!("{error}; the next coordinator looks for leftovers again"),
    }
}

/// The newest commits up to one of which every byte is as recorded: those before that one, newest first. A store that cannot be read is an
/// error, and so is a run in which no commit is whole: nobody asked to begin anew. A coordinator that has the run still may give commits up, and delete
/// them, while they are looked at here: then `state` is what it has made of the log since.
async fn damaged_commits(store: &Store, state: &mut RunState) -> Result<Vec<Damaged>, RunError> {
    loop {
        let found = find_damaged(store, state).await;
        if matches!(&found, Ok(damaged) if damaged.is_empty()) {
            return found;
        }
        let now = RunState::from_records(&RunLog::read(store).await?);
        if now.commits == state.commits {
            return found;
        }
        *state = now;
    }
}

async fn find_damaged(store: &Store, state: &RunState) -> Result<Vec<Damaged>, RunError> {
    let mut damaged = Vec::new();
    for commit in state.commits.iter().rev() {
        let Err(mut problems) = verify_commit(store, commit).await else { return Ok(damaged) };
        if let Some(at) = problems.iter().position(|problem| matches!(problem.fault, Fault::Unreadable(_)))
            && let Fault::Unreadable(error) = problems.swap_remove(at).fault
        {
            return Err(error.into());
        }
        let what: Vec<String> = problems.iter().map(ToString::to_string).collect();
        damaged.push(Damaged { step: commit.step, folder: commit.folder.clone(), what: what.join("; ") });
    }
    match damaged.into_iter().next() {
        None => Ok(Vec::new()),
        Some(Damaged { step, what, .. }) => Err(RunError::DamagedCommits { url: store.url().to_owned(), step, what }),
    }
}

fn term(config: &RunConfig) -> Result<Term, RunError> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "unknown".into()).trim().to_owned();
    let config_digest = config.digest().parse().map_err(|e: ella_store::digest::BadDigest| RunError::Task(e.to_string()))?;
    Ok(Term { host, version: env!("CARGO_PKG_VERSION").into(), config_digest })
}

/// Unique to this incarnation: the standard library seeds each hasher from the system's randomness.
pub(super) fn nonce() -> String {
    let half = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", half(), half())
}

/// Bytes that nobody can guess.
pub(super) fn secret() -> Result<[u8; 16], RunError> {
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes));
    read.map_err(RunError::NoRandomness)?;
    Ok(bytes)
}

/// A number that no other process will have, never 0, and small enough that every reader of JSON takes it as it is.
pub(super) fn session() -> u64 {
    RandomState::new().build_hasher().finish() >> 11 | 1
}

/// Milliseconds since 1970, for people to read.
pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
