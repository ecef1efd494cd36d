//! How long a commit of the paper's connector (66.8 million parameters, with moments and moving average) holds up training: `make bench`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ella_worker::train::state::{Layout, Snapshot, TrainState, part_names};
use tch::{Device, Kind, Tensor};

const PARAMETERS: i64 = 66_800_000;
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let layout = Arc::new(Layout::new(vec![("all".into(), vec![PARAMETERS])]));
    let state = TrainState::fresh(layout, Tensor::f_rand([PARAMETERS], (Kind::Float, Device::Cpu))?)?;
    let (mut fresh, mut again, mut kept) = (Vec::new(), Vec::new(), Some(state.snapshot(None)?));
    for _ in 0..ROUNDS {
        fresh.push(timed(|| state.snapshot(None))?.1);
        let (snapshot, took) = timed(|| state.snapshot(kept.take()))?;
        again.push(took);
        kept = Some(snapshot);
    }
    let gigabytes = 16.0 * PARAMETERS as f64 / 1e9;
    let milliseconds = |times: &mut Vec<Duration>| {
        times.sort();
        times[ROUNDS / 2].as_secs_f64() * 1e3
    };
    let (fresh, again) = (milliseconds(&mut fresh), milliseconds(&mut again));
    println!("a commit of {gigabytes:.2} GB holds up training for {again:.0} ms, in memory that is kept; {fresh:.0} ms in new memory");
    let snapshot = kept.ok_or("no snapshot")?;
    let (_, digests) = timed(|| Ok::<_, tch::TchError>(digest(&snapshot)))?;
    println!("beside training, its digests take {:.0} ms: {:.1} GB/s", digests.as_secs_f64() * 1e3, gigabytes / digests.as_secs_f64());
    Ok(())
}

fn digest(snapshot: &Snapshot) -> Vec<(u64, blake3::Hash)> {
    (0..part_names().len()).map(|part| snapshot.digest(part)).collect()
}

fn timed<T, E>(work: impl FnOnce() -> Result<T, E>) -> Result<(T, Duration), E> {
    let begin = Instant::now();
    Ok((work()?, begin.elapsed()))
}
