//! Who may speak to this coordinator at all: whoever shows its token, if it has one.
//!
//! Whoever does not is turned away before anything of the call is read, and counted here: a flood of strangers never reaches the driver.

use super::driver::Input;
use crate::core::Note;
use ella_proto::access::{NoEntry, Token};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// How long no more is told of an address than that its calls are counted.
const QUIET: Duration = Duration::from_secs(3600);
/// Of more addresses within that time nothing is told.
const MOST_ADDRESSES: usize = 64;

/// Strangers, as long as this coordinator runs.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    /// Calls that were turned away (KNOWN).
    calls: AtomicU64,
    /// Who was told of, and when. A host, not a port: every try comes from another one.
    told: Mutex<BTreeMap<IpAddr, Instant>>,
}

impl Strangers {
    /// Calls that were turned away, under their counter's name.
    pub(super) fn count(&self) -> (&'static str, u64) {
        ("refused_token", self.calls.load(Relaxed))
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

/// Stands before every call.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) token: Option<Token>,
    pub(super) strangers: Arc<Strangers>,
    pub(super) inputs: mpsc::Sender<Input>,
}

impl Guard {
    fn turn_away(&self, peer: Option<SocketAddr>, why: NoEntry) {
        self.strangers.calls.fetch_add(1, Relaxed);
        if let Some(peer) = peer
            && self.strangers.is_news(peer.ip(), Instant::now())
        {
            // A driver that is too busy to tell of it still counts it.
            let _ = self.inputs.try_send(Input::Note(Note::Stranger { peer: peer.to_string(), why: why.to_string() }));
        }
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(token) = &self.token else { return Ok(request) };
        token.check(request.metadata()).map_err(|why| {
            self.turn_away(request.remote_addr(), why);
            Status::unauthenticated(why.to_string())
        })?;
        Ok(request)
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
