//! Whose a service account's token is: the cluster's API is asked, and its answer kept for a short time.

use super::cluster::{Cluster, Reviewed};
use super::limits::{REJECTED, REVIEWED, REVIEWING, REVIEWS};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How long a token may wait to be reviewed.
const TURN: Duration = Duration::from_secs(10);

/// Asks whose tokens are.
#[derive(Debug)]
pub(super) struct Reviews {
    cluster: Cluster,
    audience: String,
    /// By the token's digest, and until when it counts.
    known: Mutex<HashMap<blake3::Hash, (Reviewed, Instant)>>,
    turns: Semaphore,
}

impl Reviews {
    pub(super) fn new(cluster: Cluster, audience: &str) -> Self {
        Self { cluster, audience: audience.to_owned(), known: Mutex::default(), turns: Semaphore::new(REVIEWING) }
    }

    /// Whether it may be a service account's token at all: those are signed JWTs.
    pub(super) fn concerns(secret: &[u8]) -> bool {
        secret.split(|byte| *byte == b'.').filter(|part| !part.is_empty()).count() == 3
    }

    /// What was found of this token a short time ago.
    pub(super) fn known(&self, secret: &[u8]) -> Option<Reviewed> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&blake3::hash(secret)).filter(|(_, until)| Instant::now() < *until).map(|(reviewed, _)| reviewed.clone())
    }

    /// Asks the cluster. The error says why it could not be asked: nothing is known of the token then, and it may be tried again.
    pub(super) async fn ask(&self, secret: &[u8]) -> Result<Reviewed, String> {
        let token = String::from_utf8_lossy(secret);
        let Ok(Ok(_turn)) = tokio::time::timeout(TURN, self.turns.acquire()).await else {
            return Err("too many others are being reviewed".to_owned());
        };
        let reviewed = self.cluster.review(&token, &self.audience).await.map_err(|error| error.to_string())?;
        self.keep(blake3::hash(secret), reviewed.clone());
        Ok(reviewed)
    }

    fn keep(&self, digest: blake3::Hash, reviewed: Reviewed) {
        let now = Instant::now();
        let until = now + if matches!(reviewed, Reviewed::ServiceAccount { .. }) { REVIEWED } else { REJECTED };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REVIEWS {
            known.retain(|_, (_, until)| now < *until);
        }
        // What has no room is asked again: never is one that counts pushed out by strangers.
        if known.len() < REVIEWS {
            known.insert(digest, (reviewed, until));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Many workers that come back at once are no strangers: who waits too long for its turn is not told that its token is nobody's.
    #[tokio::test(start_paused = true)]
    async fn a_token_that_does_not_get_its_turn_is_not_taken_for_nobodys() {
        let reviews = Reviews::new(Cluster::at("http://127.0.0.1:1", std::path::Path::new("none")), "ella");
        let turns = reviews.turns.acquire_many(REVIEWING as u32).await.unwrap();
        assert!(reviews.ask(b"a.b.c").await.unwrap_err().contains("too many others"));
        assert_eq!(reviews.known(b"a.b.c"), None);
        drop(turns);
    }
}
