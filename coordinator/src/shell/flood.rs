//! How often each address has failed to show what lets it in.

use super::limits::{ADDRESSES, FAILURES, FORGIVEN};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A leaky bucket for each address.
#[derive(Debug, Default)]
pub(super) struct Flood(Mutex<HashMap<IpAddr, Level>>);

#[derive(Clone, Copy, Debug)]
struct Level {
    failures: f64,
    at: Instant,
}

impl Level {
    fn now(self, now: Instant) -> f64 {
        (self.failures - FORGIVEN * now.duration_since(self.at).as_secs_f64()).max(0.0)
    }
}

impl Flood {
    /// Notes a failure; whether it is answered as ever.
    pub(super) fn failed(&self, address: IpAddr, now: Instant) -> bool {
        let mut levels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if levels.len() >= ADDRESSES {
            levels.retain(|_, level| level.now(now) > 0.0);
        }
        let key = key(&levels, address);
        let before = levels.get(&key).map_or(0.0, |level| level.now(now));
        let failures = (before + 1.0).min(FAILURES);
        levels.insert(key, Level { failures, at: now });
        before + 1.0 <= FAILURES
    }

    /// Whether one more failure would be too many.
    pub(super) fn is_on(&self, address: IpAddr, now: Instant) -> bool {
        let levels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        levels.get(&key(&levels, address)).is_some_and(|level| level.now(now) + 1.0 > FAILURES)
    }
}

/// What an address is counted under: all that there is no more room for, under one.
fn key(levels: &HashMap<IpAddr, Level>, address: IpAddr) -> IpAddr {
    let own = host(address);
    if levels.len() >= ADDRESSES && !levels.contains_key(&own) { Ipv6Addr::UNSPECIFIED.into() } else { own }
}

/// Whom an address belongs to: of IPv6, whoever has one address has 2^64.
pub(super) fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    #[test]
    fn an_address_that_fails_too_often_is_put_off_and_others_are_not() {
        let (flood, begin) = (Flood::default(), Instant::now());
        let address = |n: u32| IpAddr::from(Ipv4Addr::from_bits(n));
        let answered = (0..100).filter(|_| flood.failed(address(1), begin)).count();
        assert_eq!(answered, FAILURES as usize);
        assert!(flood.is_on(address(1), begin) && !flood.is_on(address(2), begin) && flood.failed(address(2), begin));
        let later = begin + Duration::from_secs_f64(2.0 / FORGIVEN);
        assert_eq!((0..100).filter(|_| flood.failed(address(1), later)).count(), 2);
    }

    #[test]
    fn many_addresses_take_bounded_memory_and_share_one_count() {
        let (flood, now) = (Flood::default(), Instant::now());
        let answered = (0..2 * ADDRESSES as u32).filter(|n| flood.failed(Ipv4Addr::from_bits(*n).into(), now)).count();
        assert_eq!(answered, ADDRESSES + FAILURES as usize);
        assert!(flood.0.lock().is_ok_and(|levels| levels.len() <= ADDRESSES + 1));
        assert!(flood.is_on(Ipv4Addr::BROADCAST.into(), now), "one that never failed shares the count of those that have no room");
        let net = |low: u128| IpAddr::from(Ipv6Addr::from_bits(0x2001 << 112 | low));
        assert_eq!((host(net(1)), host(net(u128::from(u64::MAX)))), (net(0), net(0)));
    }
}
