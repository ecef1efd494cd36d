//! Models by their ids on the hub: downloaded once into the cache that Hugging Face's tools share, and found there ever after.
//!
//! Only what ella reads is downloaded (`choice`). The environment is that of huggingface_hub: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`,
//! `HF_TOKEN` (or the file that `hf auth login` writes) and `HF_HUB_OFFLINE`.

mod cache;
mod choice;
mod client;
mod error;
mod id;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use sha2::{Digest, Sha256};

pub use self::error::HubError;
pub use self::id::HubId;

use self::cache::{Cache, disk, length, make_parent};
use self::client::{Hub, Remote};
use crate::meter::{Meter, note};

/// The hub, unless `HF_ENDPOINT` names a mirror.
const ENDPOINT: &str = "https://huggingface.co";

/// Bytes of a megabyte, in which progress is shown.
const MB: u64 = 1_000_000;

/// Where models come from and go to.
#[derive(Debug)]
struct Settings {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
}

impl Settings {
    fn from_env() -> Result<Self, HubError> {
        let set = |name: &str| std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let below = |name: &str, folder: &str| set(name).map(|home| PathBuf::from(home).join(folder));
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| below("XDG_CACHE_HOME", "huggingface"));
        let home = home.or_else(|| below("HOME", ".cache/huggingface")).ok_or(HubError::NoHome)?;
        let file = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let kept = || std::fs::read_to_string(file).ok().map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let truth = |value: String| ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str());
        Ok(Settings {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()).trim_end_matches('/').to_owned(),
            cache: set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: set("HF_TOKEN").or_else(kept),
            offline: set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE")).is_some_and(truth),
        })
    }
}

/// Where the model `id` is on this machine, after a download if need be: the snapshot's folder, or the file that the id names.
///
/// # Errors
/// It is not on the hub, not open to this user, or holds no model; no network, and not in the cache; the cache cannot be written.
pub fn fetch(id: &HubId) -> Result<PathBuf, HubError> {
    let settings = Settings::from_env()?;
    let cache = Cache::new(&settings.cache, id.repo());
    if settings.offline {
        return cache.find(id);
    }
    // On a thread of its own: callers may be in a runtime, which would let no other begin, nor end.
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|error| HubError::Client(error.to_string()))?.block_on(download(id, &settings, &cache))
    };
    let fetched = std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    or_cached(fetched, id, &cache)
}

/// Where the hub cannot be reached, what was downloaded before, as huggingface_hub has it: a run must not wait for the hub to go on. If that is another
/// revision than the run was begun with, the models' digest tells.
fn or_cached(fetched: Result<PathBuf, HubError>, id: &HubId, cache: &Cache) -> Result<PathBuf, HubError> {
    match (fetched, cache.find(id)) {
        (Err(HubError::Unreachable { endpoint, reason, .. }), Ok(found)) => {
            note(format_args!("{id}: the hub cannot be reached ({endpoint}: {reason}); it is taken as it was downloaded before"));
            Ok(found)
        }
        (fetched, _) => fetched,
    }
}

async fn download(id: &HubId, settings: &Settings, cache: &Cache) -> Result<PathBuf, HubError> {
    let hub = Hub::new(id, settings)?;
    let listing = hub.listing().await?;
    let snapshot = cache.snapshot(&listing.commit);
    let wanted = wanted(id, &listing.files)?;
    let missing = wanted.iter().filter(|file| !snapshot.join(file).exists());
    let mut remotes = Vec::new();
    for file in missing {
        remotes.push(hub.describe(&listing.commit, file).await?);
    }
    if !remotes.is_empty() {
        transfer(&hub, &listing.commit, &remotes, cache).await?;
    }
    let links: Vec<(String, String)> = remotes.into_iter().map(|remote| (remote.name, remote.etag)).collect();
    cache.publish(&listing.commit, id.revision(), &links)?;
    Ok(id.file().map_or_else(|| snapshot.clone(), |file| snapshot.join(file)))
}

/// Downloads contents, and shows how far it is.
async fn transfer(hub: &Hub<'_>, commit: &str, remotes: &[Remote], cache: &Cache) -> Result<(), HubError> {
    let total: u64 = remotes.iter().map(|remote| remote.size).sum();
    note(format_args!("{hub}: downloading {} files, {} MB", remotes.len(), total.div_ceil(MB)));
    let meter = Mutex::new(Meter::new("download", total.div_ceil(MB)));
    let mut done = 0;
    for remote in remotes {
        let show = |length: u64| {
            if let Ok(mut meter) = meter.lock() {
                meter.at((done + length) / MB, &format!("MB  {}", remote.name));
            }
        };
        blob(hub, (commit, remote), cache, &show).await?;
        done += remote.size;
    }
    Ok(())
}

/// The files that are to be had.
fn wanted(id: &HubId, all: &[String]) -> Result<Vec<String>, HubError> {
    let some = |end: &str| all.iter().filter(|file| file.ends_with(end)).take(5).cloned().collect::<Vec<_>>().join(", ");
    let not = |rule: String, found: String, instead| {
        let found = if found.is_empty() { "nothing of the kind".to_owned() } else { found };
        HubError::NotModel { id: Box::new(id.clone()), rule, found, instead }
    };
    match id.file() {
        Some(file) if all.iter().any(|known| known == file) => Ok(vec![file.to_owned()]),
        Some(file) => Err(not(format!("expected {file} in the repository"), some(".safetensors"), "name a file that is there")),
        None => choice::choose(all).map_err(|rule| {
            let instead = "take a repository or a revision with safetensors, or name a single file as ORG/NAME/FILE.safetensors";
            let found = [".safetensors", ".ckpt", ".bin"].map(some).into_iter().find(|found| !found.is_empty());
            not(rule, found.unwrap_or_default(), instead)
        }),
    }
}

/// Has a file's contents in the cache, whole and as the hub promised them.
async fn blob(hub: &Hub<'_>, (commit, remote): (&str, &Remote), cache: &Cache, show: &dyn Fn(u64)) -> Result<(), HubError> {
    let (path, incomplete) = (cache.blob(&remote.etag), cache.blob(&format!("{}.incomplete", remote.etag)));
    make_parent(&path)?;
    let _lock = cache.lock(&remote.etag, &incomplete)?;
    if length(&path) == remote.size && path.exists() {
        return Ok(());
    }
    hub.download(commit, remote, &incomplete, show).await?;
    // Large files are named by their SHA-256; git's names of the others count the file's header in.
    if remote.etag.len() == 64 {
        let found = sha256(&incomplete)?;
        if found != remote.etag {
            let _ = std::fs::remove_file(&incomplete);
            return Err(hub.damaged(remote, found));
        }
    }
    std::fs::rename(&incomplete, &path).map_err(|source| disk(&path, source))
}

fn sha256(file: &Path) -> Result<String, HubError> {
    let mut hasher = Sha256::new();
    let mut open = File::open(file).map_err(|source| disk(file, source))?;
    std::io::copy(&mut open, &mut hasher).map_err(|source| disk(file, source))?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_downloaded_before_is_taken_where_the_hub_cannot_be_reached() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, id) = (Cache::new(folder.path(), "org/name"), HubId::parse("org/name").unwrap());
        let boxed = || Box::new(id.clone());
        let away = || Err(HubError::Unreachable { id: boxed(), endpoint: "http://h".into(), reason: "status 429".into() });
        assert!(matches!(or_cached(away(), &id, &cache), Err(HubError::Unreachable { .. })));
        let snapshot = cache.snapshot("abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        cache.publish("abc", "main", &[]).unwrap();
        assert_eq!(or_cached(away(), &id, &cache).unwrap(), snapshot);
        // What the hub says itself holds.
        let refused = Err(HubError::NoRevision { id: boxed() });
        assert!(matches!(or_cached(refused, &id, &cache), Err(HubError::NoRevision { .. })));
    }
}
