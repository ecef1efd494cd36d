//! Who may speak to this coordinator, and do what: its rules, applied to what a caller shows.
//!
//! Whoever may not is turned away before anything of the call is read, and counted here: a flood of strangers never reaches the driver.

use super::access::AccessControl;
use super::cluster::Reviewed;
use super::door::Peer;
use super::driver::Input;
use super::flood::Flood;
use super::review::Reviews;
use crate::core::Note;
use ella_proto::access::Role;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long no more is told of an address than that its calls are counted.
const QUIET: Duration = Duration::from_secs(3600);
/// Of more addresses within that time nothing is told.
const MOST_ADDRESSES: usize = 64;

/// Why something of a peer was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A call showed nothing that lets it in.
    Token,
    /// A call's role is too small for what it asks for.
    Role,
    /// The cluster's API could not say whose a token is.
    Review,
    /// A call came from an address of which too many have failed.
    Flood,
    /// A TLS handshake failed.
    Handshake,
    /// Too many connections are open.
    Crowd,
    /// A connection showed for too long nothing that lets it in.
    Silent,
    /// Too many streams were open on one connection.
    Streams,
    /// A request's headers were too long.
    Headers,
    /// A message was too long.
    Oversized,
}

impl Refusal {
    const NAMES: [&str; 10] = [
        "refused_token",
        "refused_role",
        "refused_review",
        "refused_flood",
        "refused_handshake",
        "refused_crowd",
        "refused_silent",
        "refused_streams",
        "refused_headers",
        "refused_oversized",
    ];
}

/// Who was turned away, as long as this coordinator runs.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    /// By reason (KNOWN).
    refused: [AtomicU64; Refusal::NAMES.len()],
    /// Who was told of, and when. A host, not a port: every try comes from another one.
    told: Mutex<BTreeMap<IpAddr, Instant>>,
    /// Files of secrets and certificates that had become such that will not do.
    reloads: Mutex<Vec<Reloads>>,
}

/// Counts files that will not do any more.
type Count = Box<dyn Fn() -> u64 + Send>;

struct Reloads(Count);

impl std::fmt::Debug for Reloads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reloads")
    }
}

impl Strangers {
    /// What was refused, under its counters' names.
    pub(super) fn counts(&self) -> Vec<(&'static str, u64)> {
        let reloads = self.reloads.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|count| (count.0)()).sum();
        let refused = Refusal::NAMES.iter().zip(&self.refused).map(|(name, count)| (*name, count.load(Relaxed)));
        refused.chain([("failed_reloads", reloads)]).collect()
    }

    pub(super) fn count(&self, refusal: Refusal) {
        self.refused[refusal as usize].fetch_add(1, Relaxed);
    }

    /// Has these failed reloads counted too.
    pub(super) fn watch(&self, count: impl Fn() -> u64 + Send + 'static) {
        self.reloads.lock().unwrap_or_else(PoisonError::into_inner).push(Reloads(Box::new(count)));
    }

    /// Whether people are to be told of this address now.
    fn is_news(&self, address: IpAddr, now: Instant) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| now.duration_since(*at) < QUIET);
        if told.len() >= MOST_ADDRESSES || told.contains_key(&address) {
            return false;
        }
        told.insert(address, now);
        true
    }
}

/// Why a caller may not do what it asks for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    #[error("the coordinator asks for a token or a certificate; {0}")]
    Missing(String),
    #[error("the token is not the coordinator's ({0}); {1}")]
    Wrong(String, String),
    #[error("this needs the role {needed}, and what was shown has the role {role}")]
    Role { role: Role, needed: Role },
    #[error("the token cannot be reviewed now: {0}; try again")]
    Unreviewed(String),
    #[error("too many calls from this address have shown what is not the coordinator's; try again in a minute")]
    Flood,
}

impl Denied {
    fn refusal(&self) -> Refusal {
        match self {
            Self::Missing(_) | Self::Wrong(..) => Refusal::Token,
            Self::Role { .. } => Refusal::Role,
            Self::Unreviewed(_) => Refusal::Review,
            Self::Flood => Refusal::Flood,
        }
    }
}

/// Stands before every call.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) access: Arc<AccessControl>,
    pub(super) strangers: Arc<Strangers>,
    pub(super) flood: Arc<Flood>,
    pub(super) inputs: mpsc::Sender<Input>,
}

impl Guard {
    pub(super) fn new(access: AccessControl, strangers: Arc<Strangers>, inputs: mpsc::Sender<Input>) -> Self {
        Self { access: Arc::new(access), strangers, flood: Arc::default(), inputs }
    }

    /// Whether this peer, with the secret that its call shows, may do what takes this role.
    pub(super) async fn admit(&self, peer: &Peer, secret: Option<&[u8]>, needed: Role) -> Result<(), Denied> {
        let judged = if self.access.is_on() { self.judge(peer, secret, needed).await } else { Ok(()) };
        match &judged {
            Ok(()) => peer.is_known(),
            Err(why) => self.turn_away(peer.address, why.refusal(), &why.to_string()),
        }
        judged
    }

    async fn judge(&self, peer: &Peer, secret: Option<&[u8]>, needed: Role) -> Result<(), Denied> {
        let by_certificate = peer.names.as_deref().and_then(|names| self.access.of_certificate(names));
        let mut role = by_certificate.max(secret.and_then(|secret| self.access.of_secret(secret)));
        let mut why = "it has another".to_owned();
        if let (true, Some(secret), Some(reviews)) = (role < Some(needed), secret, self.access.reviews())
            && Reviews::concerns(secret)
        {
            match self.review(peer, reviews, secret).await? {
                Reviewed::ServiceAccount { namespace, name } => {
                    let of_account = self.access.of_account((&namespace, &name));
                    why = format!("no rule names the service account {namespace}/{name}");
                    role = role.max(of_account);
                }
                Reviewed::Nobody(reason) => why = reason,
            }
        }
        match role {
            Some(role) if role >= needed => Ok(()),
            Some(role) => Err(Denied::Role { role, needed }),
            None if !self.flood.failed(peer.address.ip(), Instant::now()) => Err(Denied::Flood),
            None if secret.is_some() => Err(Denied::Wrong(why, self.access.advice())),
            None => Err(Denied::Missing(self.access.advice())),
        }
    }

    /// Of strangers that fail again and again the cluster is not asked.
    async fn review(&self, peer: &Peer, reviews: &Reviews, secret: &[u8]) -> Result<Reviewed, Denied> {
        if let Some(known) = reviews.known(secret) {
            return Ok(known);
        }
        if self.flood.is_on(peer.address.ip(), Instant::now()) {
            return Err(Denied::Flood);
        }
        reviews.ask(secret).await.map_err(Denied::Unreviewed)
    }

    /// Counts what was refused, and tells of it, now and then.
    pub(super) fn turn_away(&self, peer: SocketAddr, refusal: Refusal, why: &str) {
        self.strangers.count(refusal);
        if self.strangers.is_news(peer.ip(), Instant::now()) {
            // A driver that is too busy to tell of it still counts it.
            let _ = self.inputs.try_send(Input::Note(Note::Stranger { peer: peer.to_string(), why: why.to_owned() }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_of_once_an_hour_and_so_many_at_most() {
        let (strangers, begin) = (Strangers::default(), Instant::now());
        let address = |n: u32| IpAddr::from(std::net::Ipv4Addr::from_bits(n));
        assert!(strangers.is_news(address(1), begin) && !strangers.is_news(address(1), begin));
        let news = (0..1000).filter(|n| strangers.is_news(address(*n), begin)).count();
        assert_eq!(news, MOST_ADDRESSES - 1);
        assert!(strangers.is_news(address(1), begin + QUIET) && strangers.is_news(address(999), begin + QUIET));
    }
}
