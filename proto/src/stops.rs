//! What asks a process to stop, SIGTERM, SIGINT, and SIGHUP where a terminal is closed: one rule for all binaries of when two signals are two wishes.

use std::io;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

/// Signals that come within this of the first are the same wish. One to all processes of a group or a service comes to a worker itself, and again by
/// the process that watches it, or to a coordinator by the command that started it; and `timeout` signals its command twice.
pub const SAME_WISH: Duration = Duration::from_secs(1);

/// SIGTERM, SIGINT and SIGHUP of this process, which they end no more.
#[derive(Debug)]
pub struct Stops {
    term: Signal,
    int: Signal,
    /// None where it is ignored, as `nohup` has it: then the process is to outlive its terminal.
    hup: Option<Signal>,
    wishes: Wishes,
}

impl Stops {
    /// From now on they are caught.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn catch() -> io::Result<Self> {
        let ignored = std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores_hangups(&status));
        let hup = if ignored { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())?, hup, wishes: Wishes::default() })
    }

    /// Waits until it is wished, or wished again, that this process stops. By which signal.
    pub async fn next(&mut self) -> &'static str {
        loop {
            let name = tokio::select! {
                _ = self.term.recv() => "SIGTERM",
                _ = self.int.recv() => "SIGINT",
                () = hung_up(self.hup.as_mut()) => "SIGHUP",
            };
            if self.wishes.is_another(Instant::now()) {
                return name;
            }
        }
    }
}

async fn hung_up(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether a process ignores SIGHUP, the first of signals, by what the system says of it.
fn ignores_hangups(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
    mask.and_then(|mask| u64::from_str_radix(mask, 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// When the last one was first said.
#[derive(Debug, Default)]
struct Wishes(Option<Instant>);

impl Wishes {
    /// Whether a signal at this time is another wish than the last.
    fn is_another(&mut self, now: Instant) -> bool {
        let another = self.0.is_none_or(|first| now.saturating_duration_since(first) >= SAME_WISH);
        if another {
            self.0 = Some(now);
        }
        another
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_ignores_hangups_is_known() {
        let of = |mask: &str| format!("Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t{mask}\nSigCgt:\t0000000000000001\n");
        assert!(ignores_hangups(&of("0000000000001001")) && !ignores_hangups(&of("0000000000001000")) && !ignores_hangups("Name:\tx\n"));
    }

    #[test]
    fn signals_within_a_second_of_the_first_are_one_wish() {
        let (mut wishes, begin) = (Wishes::default(), Instant::now());
        let mut wished = |ms| wishes.is_another(begin + Duration::from_millis(ms));
        assert_eq!([0, 3, 999].map(&mut wished), [true, false, false]);
        // Who goes on asking is heard.
        assert_eq!([1_001, 1_500, 2_000, 2_002].map(&mut wished), [true, false, false, true]);
    }
}
