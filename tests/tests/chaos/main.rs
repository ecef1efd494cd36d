//! Leased work under everything at once: workers killed at random, their coordinator too, and a store that fails. What comes out has the
//! bytes of a calm run, nothing is done twice, and nothing is left over.
//!
//! `ELLA_CHAOS=full` is the size that the numbers in `make chaos` are of. `ELLA_CHAOS_SEED` draws other moments and faults; every failure
//! names the seed.

mod check;
mod cloud;
mod cluster;
#[path = "../../../store/tests/support/emulator.rs"]
mod emulator;
mod kills;
mod local;
mod proxy;
mod report;
mod sources;
mod trial;

use std::process::Command;

/// How much is done, and how badly it is disturbed.
#[derive(Clone, Copy, Debug)]
struct Size {
    tars: usize,
    /// Samples in a tar.
    samples: usize,
    workers: usize,
    /// Workers that are killed while they prepare, and while they embed.
    kills: [usize; 2],
}

impl Size {
    const FULL: Self = Self { tars: 200, samples: 8, workers: 4, kills: [30, 10] };
    const SMALL: Self = Self { tars: 40, kills: [8, 3], ..Self::FULL };

    fn asked() -> Self {
        if std::env::var("ELLA_CHAOS").is_ok_and(|size| size == "full") { Self::FULL } else { Self::SMALL }
    }
}

fn seed() -> u64 {
    std::env::var("ELLA_CHAOS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// This program, to run one of its tests in a process of its own.
fn anew(test: &str) -> std::io::Result<Command> {
    let mut process = Command::new(std::env::current_exe()?);
    process.args(["--exact", test, "--nocapture"]);
    Ok(process)
}
