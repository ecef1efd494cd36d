//! What every store must do, as one suite to run on each kind.

use std::error::Error;

use bytes::Bytes;
use futures::{TryStreamExt, future};

use crate::digest::Digest;
use crate::error::StoreError;
use crate::probe::probe;
use crate::store::Store;
use crate::write::Created;

/// What the suite gives: the first rule that the store breaks.
pub type Verdict = Result<(), Box<dyn Error + Send + Sync>>;

/// Creates that race for one name.
const RACERS: usize = 16;

fn ensure(holds: bool, rule: &str) -> Verdict {
    if holds { Ok(()) } else { Err(format!("broken rule: {rule}").into()) }
}

/// Tries everything that a [`Store`] offers, in an empty folder of it, and leaves the folder empty.
///
/// # Errors
/// The first rule that the store breaks, or its error.
pub async fn conformance(store: &Store) -> Verdict {
    ensure(store.list("").await?.is_empty(), "a folder never written to lists as empty")?;
    objects(store).await?;
    keys(store).await?;
    large(store).await?;
    creates(store).await?;
    folders(store).await?;
    probe(store).await?;
    ensure(store.list("").await?.is_empty(), "what was deleted is gone")
}

async fn objects(store: &Store) -> Verdict {
    let key = "a/b.bin";
    ensure(store.head(key).await?.is_none(), "head of nothing is none")?;
    ensure(matches!(store.get(key).await, Err(StoreError::NotFound { .. })), "get of nothing is not found")?;
    store.delete(key).await?;
    store.put(key, Bytes::from_static(b"old")).await?;
    store.put(key, Bytes::from_static(b"0123456789")).await?;
    ensure(store.get(key).await? == "0123456789", "put replaces")?;
    ensure(store.get_range(key, 2..5).await? == "234", "a range is its bytes")?;
    ensure(store.get_range(key, 3..3).await?.is_empty(), "an empty range is empty")?;
    for beyond in [8..11, 10..11, 20..30] {
        ensure(matches!(store.get_range(key, beyond).await, Err(StoreError::Corrupt { .. })), "a range beyond the end is an error")?;
    }
    let meta = store.head(key).await?.ok_or("head finds what was put")?;
    ensure((meta.key.as_str(), meta.bytes) == (key, 10), "head gives key and size")?;
    ensure(meta.stamp.is_some(), "an object has a stamp")?;
    ensure(store.list("a").await? == [meta.clone()], "list gives the size and stamp that head gives")?;
    store.put(key, Bytes::from_static(b"9876543210")).await?;
    let replaced = store.head(key).await?.ok_or("head finds what was put again")?;
    ensure(replaced.stamp != meta.stamp, "an object of other bytes has another stamp")?;
    store.put(key, Bytes::from_static(b"0123456789")).await?;
    store.put("a/empty", Bytes::new()).await?;
    ensure(store.get("a/empty").await?.is_empty(), "an empty object is empty")?;
    ensure(store.stream("a/empty").try_collect::<Vec<_>>().await?.concat().is_empty(), "an empty object streams as nothing")?;
    let digest = Digest::of(b"0123456789");
    ensure(store.get_verified(key, &digest, 10).await? == "0123456789", "verified bytes are given")?;
    ensure(matches!(store.get_verified(key, &digest, 9).await, Err(StoreError::Corrupt { .. })), "a wrong size is corrupt")?;
    let other = Digest::of(b"other");
    ensure(matches!(store.get_verified(key, &other, 10).await, Err(StoreError::Corrupt { .. })), "a wrong digest is corrupt")?;
    store.delete_prefix("a").await?;
    store.delete_prefix("a").await?;
    ensure(store.head(key).await?.is_none(), "delete_prefix deletes")
}

async fn keys(store: &Store) -> Verdict {
    let odd = ["plain", "with space", "percent%41", "hash#x", "plus+and=", "umlaut-\u{e4}", "tilde~", "dots..in.name", "deep/er/still"];
    let below = store.child("odd");
    for key in odd {
        below.put(key, Bytes::from(key)).await?;
    }
    let mut listed: Vec<String> = below.list("").await?.into_iter().map(|meta| meta.key).collect();
    let mut sorted = odd.to_vec();
    sorted.sort_unstable();
    ensure(listed == sorted, "list gives the keys that were put, sorted, relative to the folder")?;
    for key in odd {
        ensure(below.get(key).await? == key, "an odd key leads to its own object")?;
    }
    listed = store.list("odd/deep").await?.into_iter().map(|meta| meta.key).collect();
    ensure(listed == ["odd/deep/er/still"], "list takes a folder")?;
    ensure(store.list("od").await?.is_empty(), "a folder's name is matched whole")?;
    for bad in ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\nb"] {
        let refused = store.put(bad, Bytes::new()).await;
        ensure(matches!(refused, Err(StoreError::BadKey { .. })), &format!("the key {bad:?} is refused"))?;
    }
    ensure(matches!(store.delete_prefix("").await, Err(StoreError::BadKey { .. })), "the whole folder is not deleted by an empty name")?;
    Ok(store.delete_prefix("odd").await?)
}

async fn large(store: &Store) -> Verdict {
    let bytes: Bytes = (0..(33_u32 << 20) / 4 + 3).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<u8>>().into();
    // The pieces end where no part does.
    let pieces = [bytes.slice(..7), Bytes::new(), bytes.slice(7..20 << 20), bytes.slice(20 << 20..)];
    store.upload("large", &pieces).await?;
    ensure(store.get("large").await? == bytes, "an object uploaded in parts is whole")?;
    ensure(store.stream("large").try_collect::<Vec<_>>().await?.concat() == bytes, "a stream gives all bytes in order")?;
    store.upload("large", &[Bytes::from_static(b"sm"), Bytes::from_static(b"all")]).await?;
    ensure(store.get("large").await? == "small", "an upload replaces")?;
    Ok(store.delete("large").await?)
}

async fn creates(store: &Store) -> Verdict {
    ensure(store.create("log/0", Bytes::from_static(b"mine")).await? == Created::Yes, "create makes what is absent")?;
    ensure(store.create("log/0", Bytes::from_static(b"other")).await? == Created::AlreadyThere, "create leaves what is there")?;
    ensure(store.create("log/0", Bytes::from_static(b"mine")).await? == Created::AlreadyThere, "create of equal bytes is no new object")?;
    ensure(store.get("log/0").await? == "mine", "the first create stands")?;
    for round in 1..=5 {
        let key = format!("log/{round}");
        let racers = (0..RACERS).map(|racer| store.create(&key, Bytes::from(format!("racer {racer}"))));
        let created = future::try_join_all(racers).await?;
        let winners: Vec<_> = (0..RACERS).filter(|&racer| created[racer] == Created::Yes).collect();
        ensure(winners.len() == 1, "of racing creates exactly one wins")?;
        ensure(store.get(&key).await? == format!("racer {}", winners[0]), "the winner's bytes stand")?;
    }
    Ok(store.delete_prefix("log").await?)
}

async fn folders(store: &Store) -> Verdict {
    for key in ["c/2.1/x", "c/10.1/y", "c/10.1/z/w", "c/file"] {
        store.put(key, Bytes::from_static(b"x")).await?;
    }
    ensure(store.folders("c").await? == ["c/10.1", "c/2.1"], "folders gives the folders directly below")?;
    ensure(store.folders("none").await?.is_empty(), "a missing folder has none")?;
    ensure(store.child("c").folders("").await? == ["10.1", "2.1"], "folders are relative to the store's folder")?;
    let files = store.files("c").await?;
    ensure(files.len() == 1 && files[0].key == "c/file", "files gives the objects directly in a folder")?;
    ensure(store.files("none").await?.is_empty(), "a missing folder has no files")?;
    Ok(store.delete_prefix("c").await?)
}
