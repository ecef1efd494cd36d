//! A trial of the one thing that the run log asks of a store.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use bytes::Bytes;

use crate::error::StoreError;
use crate::store::Store;
use crate::write::Created;

/// Checks that the store really creates only if absent: writes an object twice, reads it, and deletes it.
///
/// # Errors
/// `Unsupported` if the second create replaces the first or the object can't be read back; else the error of the operation that failed.
pub async fn probe(store: &Store) -> Result<(), StoreError> {
    // The standard library seeds each of these anew, which is all the chance a name needs.
    let nonce = format!("{:016x}", RandomState::new().build_hasher().finish());
    let key = format!("probe.{nonce}");
    let tried = try_probe(store, &key, &nonce).await;
    let deleted = store.delete(&key).await;
    tried.and(deleted)
}

async fn try_probe(store: &Store, key: &str, nonce: &str) -> Result<(), StoreError> {
    let unsupported = |what: &str| StoreError::Unsupported {
        url: store.url().into(),
        what: format!("{what}, so a run's log would not be safe there; use a store with conditional writes"),
    };
    let first = Bytes::from(format!("first {nonce}"));
    if store.create(key, first.clone()).await? != Created::Yes {
        return Err(unsupported("create says that a new object exists already"));
    }
    if store.create(key, Bytes::from(format!("second {nonce}"))).await? != Created::AlreadyThere {
        return Err(unsupported("a second create of one object succeeded"));
    }
    if store.get(key).await? != first {
        return Err(unsupported("a second create of one object replaced it"));
    }
    match store.files("").await?.iter().any(|meta| meta.key == key) {
        true => Ok(()),
        false => Err(unsupported("list leaves out an object just written")),
    }
}
