//! Windows of time on a device that works behind the program's back.

use crate::gpu;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use tch::{Cuda, Device};

/// Windows that a median is made of, at least.
pub(crate) const WINDOWS: usize = 5;

/// Calls before them, at least: the first ones choose kernels, take memory, and are recorded.
const WARM_UP: usize = 4;

/// Waits for the device.
pub(crate) fn wait(device: Device) {
    if let Device::Cuda(ordinal) = device {
        Cuda::synchronize(ordinal as i64);
    }
}

/// How long a piece of work takes.
#[derive(Clone, Debug)]
pub(crate) struct Timed {
    /// Seconds of one call in each window.
    pub(crate) windows: Vec<f64>,
    /// Calls in each window.
    pub(crate) calls: usize,
}

impl Timed {
    /// In the median of windows.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.windows.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    /// (max − min) / median.
    pub(crate) fn spread(&self) -> f64 {
        let bounds = self.windows.iter().fold((f64::INFINITY, 0.0f64), |(low, high), each| (low.min(*each), high.max(*each)));
        (bounds.1 - bounds.0) / self.median()
    }
}

/// Times `work`: a warm-up, then [`WINDOWS`] windows that together take about `measure`. The device is waited for at a window's end only.
pub(crate) fn time(device: Device, measure: Duration, mut work: impl FnMut() -> Result<()>) -> Result<Timed> {
    let mut window = |calls: usize| -> Result<f64> {
        let begin = Instant::now();
        (0..calls).try_for_each(|_| work())?;
        wait(device);
        Ok(begin.elapsed().as_secs_f64() / calls as f64)
    };
    window(WARM_UP)?;
    // What choosing kernels took is not the work's.
    gpu::reset_peak(device);
    let one = window(1)?;
    let calls = ((measure.as_secs_f64() / WINDOWS as f64 / one) as usize).max(1);
    let windows = (0..WINDOWS).map(|_| window(calls)).collect::<Result<Vec<_>>>()?;
    ensure!(windows.iter().all(|seconds| *seconds > 0.0), "a window took no time");
    Ok(Timed { windows, calls })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_at_least_five_and_their_median_stands() {
        let mut calls = 0;
        let timed = time(Device::Cpu, Duration::from_millis(20), || {
            calls += 1;
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        });
        let timed = timed.unwrap();
        assert_eq!(timed.windows.len(), WINDOWS);
        assert_eq!(calls, WARM_UP + 1 + WINDOWS * timed.calls);
        let timed = Timed { windows: vec![3.0, 1.0, 2.0, 9.0, 2.5], calls: 1 };
        assert_eq!((timed.median(), timed.spread()), (2.5, 3.2));
    }
}
