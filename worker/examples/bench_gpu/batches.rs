//! A step's samples, which come to the device as a worker's feed has them come: on a stream of their own, while the step before computes.

use crate::{Setting, networks};
use anyhow::Result;
use ella_cuda::stream::{Event, Priority, Stream};
use ella_worker::train::lane::LaneBatch;
use tch::Device;

/// Batches in host memory, taken in turn.
const CACHED: usize = 4;

/// A batch on its way to the device, and when it is there.
type Uploaded = (LaneBatch, Option<Event>);

pub(crate) struct Batches {
    host: Vec<LaneBatch>,
    device: Device,
    /// None on a processor.
    side: Option<Stream>,
    /// How many uploads were begun.
    begun: usize,
    ahead: Option<Uploaded>,
}

impl Batches {
    pub(crate) fn new(setting: &Setting) -> Result<Self> {
        let host = (0..CACHED).map(|_| networks::samples(setting)).collect::<Result<Vec<_>>>()?;
        let side = setting.device.is_cuda().then(|| Stream::new(setting.device, Priority::Low)).transpose()?;
        Ok(Self { host, device: setting.device, side, begun: 0, ahead: None })
    }

    /// The next batch, on the device, for the calling thread's stream. The one after it is on its way from here on.
    pub(crate) fn next(&mut self) -> Result<LaneBatch> {
        let (batch, there) = match self.ahead.take() {
            Some(uploaded) => uploaded,
            None => self.upload()?,
        };
        if let Some(event) = there {
            let step = Stream::current(self.device)?;
            step.wait(&event)?;
            batch.tensors().try_for_each(|tensor| step.keep(tensor))?;
        }
        self.ahead = Some(self.upload()?);
        Ok(batch)
    }

    fn upload(&mut self) -> Result<Uploaded> {
        let _entered = self.side.map(Stream::enter).transpose()?;
        let batch = networks::to_device(&self.host[self.begun % self.host.len()], self.device)?;
        self.begun += 1;
        Ok((batch, self.side.map(Stream::record).transpose()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn batches_come_in_turn_and_the_one_after_is_on_its_way() {
        let setting = Setting::nano(Duration::ZERO);
        let mut batches = Batches::new(&setting).unwrap();
        for number in 0..2 * CACHED {
            let batch = batches.next().unwrap();
            let host = &batches.host[number % CACHED];
            assert!(batch.tensors().zip(host.tensors()).all(|(one, other)| one.equal(other)));
            assert!(batches.ahead.is_some() && batches.begun == number + 2);
        }
        assert!(!batches.host[0].latents.equal(&batches.host[1].latents));
    }
}
