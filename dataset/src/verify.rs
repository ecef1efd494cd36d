//! Reads every byte of a data set again: shards, features and added captions, against the digests in their manifests and records.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ella_store::{Hasher, Store, StoreError};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use crate::caption_set::{CaptionSpec, captions_in};
use crate::error::DataError;
use crate::features::{FeatureSpec, features_in};
use crate::manifest::{Manifest, ShardEntry, join};
use crate::plan::{SHARDS, UNITS};
use crate::sidecar::{Kind, Sidecar};
use crate::tree::TREES;

/// Files read at once.
const READ_AT_ONCE: usize = 4;
/// Where damaged files lie while they are made anew: beside what lists and leftovers are looked for in.
const ASIDE: &str = "damaged";

/// A file that is not what its record says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Key of the file in the data set's folder.
    pub file: String,
    /// What is wrong with it.
    pub what: String,
}

/// What reading a whole data set showed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Files read, or missed.
    pub files: usize,
    /// Bytes read.
    pub bytes: u64,
    /// Files that are not what they should be.
    pub damaged: Vec<Damage>,
    /// Files that belong to nothing: what a killed writer left half-written.
    pub stray: Vec<String>,
}

/// A data set's files as its manifest and its sidecars name them.
#[derive(Clone, Debug)]
pub struct Inventory {
    store: Store,
    files: Vec<ShardEntry>,
    /// Where writers may have left something half-written.
    folders: Vec<String>,
}

impl Inventory {
    /// Lists what there should be. Sidecars that are not whole yet count as far as they are.
    pub fn of(store: &Store) -> BoxFuture<'_, Result<Inventory, DataError>> {
        Box::pin(async move {
            let data = Arc::new(Manifest::load(store).await?);
            let mut files = data.shards.clone();
            let mut folders = vec![String::new(), UNITS.into(), SHARDS.into(), join(TREES, SHARDS)];
            for (spec, columns) in features_in(store).await? {
                for column in columns {
                    let folder = format!("features/{}/{column}", spec.fingerprint());
                    files.extend(sidecar::<FeatureSpec>(store, &folder, &data).await?);
                    folders.extend([join(&folder, TREES), folder]);
                }
            }
            for column in captions_in(store).await? {
                let folder = format!("captions/{column}");
                files.extend(sidecar::<CaptionSpec>(store, &folder, &data).await?);
                folders.extend([join(&folder, TREES), folder]);
            }
            Ok(Inventory { store: store.clone(), files, folders })
        })
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).fold(0, u64::saturating_add)
    }

    /// Reads all of them. `watch` is told of every piece that was read. A store that can't be read is an error; a file that is missing or
    /// has other bytes is damage.
    pub async fn verify(&self, watch: impl Fn(u64) + Sync) -> Result<Verified, DataError> {
        let bytes = AtomicU64::new(0);
        let told = |read: u64| {
            bytes.fetch_add(read, Ordering::Relaxed);
            watch(read);
        };
        let checks = self.files.iter().map(|file| self.check(file, &told));
        let found: Vec<Option<Damage>> = stream::iter(checks).buffered(READ_AT_ONCE).try_collect().await?;
        let damaged = found.into_iter().flatten().collect();
        Ok(Verified { files: self.files.len(), bytes: bytes.into_inner(), damaged, stray: self.stray().await? })
    }

    async fn check(&self, file: &ShardEntry, told: &(impl Fn(u64) + Sync)) -> Result<Option<Damage>, DataError> {
        let damage = |what: String| Ok(Some(Damage { file: file.name.clone(), what }));
        let mut hasher = Hasher::new();
        let mut chunks = std::pin::pin!(self.store.stream(&file.name));
        loop {
            match chunks.try_next().await {
                Ok(Some(chunk)) => {
                    hasher.update(&chunk);
                    told(chunk.len() as u64);
                }
                Ok(None) => break,
                Err(StoreError::NotFound { .. }) => return damage("it is missing".into()),
                Err(error) => return Err(error.into()),
            }
        }
        let (expected, found) = (file.blake3, hasher.finish());
        match hasher.bytes() {
            _ if found == expected => Ok(None),
            bytes if bytes != file.bytes => damage(format!("it has {bytes} bytes (expected {})", file.bytes)),
            _ => damage(format!("its BLAKE3 digest is wrong (expected {expected}, found {found})")),
        }
    }

    async fn stray(&self) -> Result<Vec<String>, DataError> {
        let mut stray = Vec::new();
        for folder in &self.folders {
            stray.extend(self.store.half_written(folder).await?);
        }
        Ok(stray)
    }

    /// Moves damaged files out of the way, so that they can be made anew, and back if they cannot ([`put_back`](Self::put_back)).
    ///
    /// # Errors
    /// If they can't be read or written. Then [`put_back`](Self::put_back) brings back what was moved already.
    pub async fn put_aside(&self, damaged: &[Damage]) -> Result<(), DataError> {
        for Damage { file, .. } in damaged {
            match self.store.get(file).await {
                Ok(bytes) => self.store.put(&join(ASIDE, file), bytes).await?,
                // It is what is wrong with it; or a repair that was killed had put it aside.
                Err(StoreError::NotFound { .. }) => continue,
                Err(error) => return Err(error.into()),
            }
            self.store.delete(file).await?;
        }
        Ok(())
    }

    /// Brings back files that were put aside, but for those that were made anew.
    ///
    /// # Errors
    /// If they can't be read or written; they are aside still.
    pub async fn put_back(&self, damaged: &[Damage]) -> Result<(), DataError> {
        for Damage { file, .. } in damaged {
            let aside = join(ASIDE, file);
            let bytes = match self.store.get(&aside).await {
                Ok(bytes) => bytes,
                Err(StoreError::NotFound { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            self.store.create(file, bytes).await?;
            self.store.delete(&aside).await?;
        }
        self.tidy().await
    }

    /// Deletes files that were put aside: they were made anew.
    ///
    /// # Errors
    /// If they can't be deleted.
    pub async fn forget(&self, damaged: &[Damage]) -> Result<(), DataError> {
        for Damage { file, .. } in damaged {
            self.store.delete(&join(ASIDE, file)).await?;
        }
        self.tidy().await
    }

    /// Removes the folder of what was put aside, once nothing is in it.
    async fn tidy(&self) -> Result<(), DataError> {
        if self.store.list(ASIDE).await?.is_empty() {
            self.store.delete_prefix(ASIDE).await?;
        }
        Ok(())
    }

    /// Deletes files, so that they can be made anew.
    pub async fn delete(&self, damaged: &[Damage]) -> Result<(), DataError> {
        for damage in damaged {
            self.store.delete(&damage.file).await?;
        }
        Ok(())
    }
}

async fn sidecar<K: Kind>(store: &Store, folder: &str, data: &Arc<Manifest>) -> Result<Vec<ShardEntry>, DataError> {
    let Some(spec) = Sidecar::<K>::spec_in(&store.child(folder)).await? else { return Ok(Vec::new()) };
    let sidecar = Sidecar::new(store, folder, data, spec);
    sidecar.is_begun().await?;
    let files = sidecar.recorded().await?;
    Ok(files.into_iter().map(|file| ShardEntry { name: join(folder, &file.name), ..file }).collect())
}
