//! How fast requests may go: limits on requests and tokens a minute, and pauses that the endpoint asks for.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::config::CaptionConfig;

/// Seconds of a limit's minute.
const MINUTE: f64 = 60.0;

/// When the next request may go.
#[derive(Debug)]
pub(super) struct Pace {
    limits: Mutex<Limits>,
}

#[derive(Debug)]
struct Limits {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    /// No request goes before.
    held: Instant,
}

impl Pace {
    pub(super) fn new(config: &CaptionConfig) -> Self {
        let now = Instant::now();
        let bucket = |per_minute: Option<u64>| per_minute.map(|limit| Bucket::new(limit as f64 / MINUTE, now));
        let (requests, tokens) = (bucket(config.requests_per_minute), bucket(config.tokens_per_minute));
        Self { limits: Mutex::new(Limits { requests, tokens, held: now }) }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Limits) -> T) -> T {
        act(&mut self.limits.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until a request of so many tokens may go. Its place is fixed at once, so nobody overtakes.
    pub(super) async fn turn(&self, tokens: u64) {
        let now = Instant::now();
        let mut at = self.with(|limits| {
            let requests = limits.requests.as_mut().map_or(Duration::ZERO, |bucket| bucket.take(1.0, now));
            let tokens = limits.tokens.as_mut().map_or(Duration::ZERO, |bucket| bucket.take(tokens as f64, now));
            limits.held.max(now + requests.max(tokens))
        });
        while at > Instant::now() {
            sleep_until(at).await;
            // A pause may have been asked for meanwhile.
            at = self.with(|limits| limits.held);
        }
    }

    /// Puts right how many tokens a request took, when that is known.
    pub(super) fn settle(&self, reserved: u64, used: u64) {
        self.with(|limits| limits.tokens.iter_mut().for_each(|bucket| bucket.put(reserved as f64 - used as f64)));
    }

    /// Lets no request go for so long.
    pub(super) fn hold(&self, pause: Duration) {
        self.with(|limits| limits.held = limits.held.max(Instant::now() + pause));
    }
}

/// A token bucket. It holds a second's worth: endpoints count parts of a minute, too.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    burst: f64,
    /// Below 0: what is owed.
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_second: f64, now: Instant) -> Self {
        let burst = per_second.max(1.0);
        Self { per_second, burst, level: burst, at: now }
    }

    /// Takes so much, and says when it may be used. What is more than the bucket holds is taken from a full one, and owed by whoever comes next.
    fn take(&mut self, amount: f64, now: Instant) -> Duration {
        self.level = (self.level + now.duration_since(self.at).as_secs_f64() * self.per_second).min(self.burst);
        self.at = now;
        let lacking = amount.min(self.burst) - self.level;
        self.level -= amount;
        Duration::from_secs_f64(lacking.max(0.0) / self.per_second)
    }

    fn put(&mut self, amount: f64) {
        self.level = (self.level + amount).min(self.burst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn a_bucket_lets_a_second_go_at_once_and_the_rest_at_its_rate() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(2.0, begun);
        let waits: Vec<_> = (0..6).map(|_| bucket.take(1.0, begun).as_millis()).collect();
        assert_eq!(waits, [0, 0, 500, 1000, 1500, 2000]);
        // Two seconds are owed; what is given back shortens the wait.
        bucket.put(3.0);
        assert_eq!(bucket.take(1.0, begun).as_millis(), 1000);
    }

    #[test]
    fn what_is_larger_than_the_bucket_goes_and_is_owed() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(100.0, begun);
        assert_eq!(bucket.take(700.0, begun).as_secs_f64(), 0.0);
        assert_eq!(bucket.take(700.0, begun).as_secs_f64(), 7.0);
    }

    proptest! {
        #[test]
        fn no_minute_has_more_than_its_limit_and_a_second_more(per_minute in 1u64..2000, gaps in vec(0u64..3000, 1..200)) {
            let begun = Instant::now();
            let mut bucket = Bucket::new(per_minute as f64 / MINUTE, begun);
            let mut now = begun;
            let mut sent = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                sent.push(now + bucket.take(1.0, now));
            }
            prop_assert!(sent.is_sorted());
            for (first, start) in sent.iter().enumerate() {
                let within = sent[first..].iter().take_while(|at| at.duration_since(*start).as_secs_f64() < MINUTE).count();
                prop_assert!(within as f64 <= per_minute as f64 + bucket.burst + 1.0, "{within} in a minute");
            }
        }
    }
}
