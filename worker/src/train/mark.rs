//! Moments in the order of what the device computes. The processor only hands out work to a GPU and runs far ahead of it: its own clock tells nothing
//! of where the time goes there.

use super::TrainError;
use crate::reduce::current_stream;
use nccl_rs::cuda::{self, Driver, Event};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tch::Device;

/// Between two looks at a GPU that is still at work: little beside a step, and much beside a look.
const LOOK: Duration = Duration::from_micros(50);

/// A moment.
#[derive(Debug)]
pub(super) enum Mark {
    /// By the processor's clock, where it computes itself.
    Host(Instant),
    /// When a GPU has done what this thread had handed to it so far.
    Gpu(Event),
}

impl Mark {
    /// Now, in the order of the device's work. Nothing is waited for.
    pub(super) fn now(device: Device) -> Result<Self, TrainError> {
        let Device::Cuda(ordinal) = device else { return Ok(Self::Host(Instant::now())) };
        let gpu = gpu(ordinal)?;
        gpu.make_current()?;
        Ok(Self::Gpu(gpu.record(current_stream())?))
    }

    /// Waits until the device is there.
    pub(super) fn wait(&self) -> Result<(), TrainError> {
        if let Self::Gpu(event) = self {
            while !event.is_done()? {
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// The time from `earlier` on; the device must be past both.
    pub(super) fn since(&self, earlier: &Self) -> Result<Duration, TrainError> {
        match (self, earlier) {
            (Self::Host(now), Self::Host(then)) => Ok(now.saturating_duration_since(*then)),
            (Self::Gpu(now), Self::Gpu(then)) => Ok(now.since(then)?),
            // Of one process, whose device stays.
            _ => Ok(Duration::ZERO),
        }
    }
}

/// The driver's handle of a GPU; a worker has one.
fn gpu(ordinal: usize) -> Result<&'static cuda::Device, TrainError> {
    static GPU: OnceLock<cuda::Device> = OnceLock::new();
    if let Some(gpu) = GPU.get() {
        return Ok(gpu);
    }
    let found = Driver::load()?.device(u32::try_from(ordinal).unwrap_or(u32::MAX))?;
    Ok(GPU.get_or_init(|| found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_on_a_processor_are_its_clock_s() {
        let (first, second) = (Mark::now(Device::Cpu).unwrap(), Mark::now(Device::Cpu).unwrap());
        second.wait().unwrap();
        assert!(second.since(&first).unwrap() < Duration::from_secs(60));
        assert_eq!(first.since(&second).unwrap(), Duration::ZERO);
    }
}
