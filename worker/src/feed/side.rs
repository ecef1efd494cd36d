//! The stream on which the feed works, beside the step's.
//!
//! On a GPU, what a step needs next is made while the step computes: input is copied there, pictures and captions are encoded. That goes to a
//! stream of low priority, whose kernels the GPU begins only where the step's leave room; none of them stands before a kernel of the step, or an
//! all-reduce. The two meet once in a step: the step's stream waits, on the device, for the event behind its input. Neither side's thread
//! waits for the other's stream.
//!
//! Tensors that are made on one stream and used on another must be told to the allocator, or their memory could be given away while they are
//! still read. Here that is each batch, once, when it is handed over.

use crate::train::lane::LaneBatch;
use ella_cuda::Error;
use ella_cuda::stream::{Entered, Event, Priority, Stream};
use tch::Device;

/// A stream for work ahead; none on the processor, where threads do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side(Option<Stream>);

impl Side {
    /// A stream of low priority. Its work comes after all that the calling thread has put on its own: the loading of models.
    pub(super) fn new(device: Device) -> Result<Self, Error> {
        if !device.is_cuda() {
            return Ok(Self(None));
        }
        let side = Stream::new(device, Priority::Low)?;
        side.wait(&Stream::current(device)?.record()?)?;
        Ok(Self(Some(side)))
    }

    /// This thread's operations go there, until what is returned is dropped.
    pub(super) fn enter(self) -> Result<Option<Entered>, Error> {
        self.0.map(Stream::enter).transpose()
    }

    /// The point behind all that is there now.
    pub(super) fn mark(self) -> Result<Mark, Error> {
        self.0.map(Stream::record).transpose().map(Mark)
    }
}

/// A point in the work on the feed's stream.
#[derive(Debug, Default)]
pub struct Mark(Option<Event>);

impl Mark {
    /// Whether it is passed, without waiting: always where there is no stream.
    pub(super) fn wait(&self) -> Result<(), Error> {
        self.0.as_ref().map_or(Ok(()), Event::synchronize)
    }

    /// Has the calling thread's stream wait for it, on the device, before it reads these batches; their memory stays theirs until that stream has
    /// done with them.
    pub(super) fn hand_over<'a>(&self, batches: impl Iterator<Item = &'a LaneBatch>) -> Result<(), Error> {
        let Some(event) = &self.0 else { return Ok(()) };
        let mut step = None;
        for tensor in batches.flat_map(LaneBatch::tensors) {
            let stream = match step {
                Some(stream) => stream,
                None => {
                    let stream = Stream::current(tensor.device())?;
                    stream.wait(event)?;
                    *step.insert(stream)
                }
            };
            stream.keep(tensor)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_processor_nothing_is_waited_for() {
        let side = Side::new(Device::Cpu).unwrap();
        assert!(side.enter().unwrap().is_none());
        let mark = side.mark().unwrap();
        mark.wait().unwrap();
        mark.hand_over(std::iter::empty()).unwrap();
    }
}
