//! Streams of a GPU, libtorch's own, and events on them.

use std::ffi::{c_int, c_void};

use tch::{Device, Tensor};

use crate::{Error, Result, gpu};

/// Which stream's work a GPU takes first where several wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// After all others: what is made ahead.
    Low,
    /// The step.
    Normal,
    /// Before all others: what other ranks wait for.
    High,
}

impl Priority {
    /// CUDA's own: lower comes first, and 0 is last.
    fn level(self) -> c_int {
        match self {
            Self::Low => 0,
            Self::Normal => -1,
            Self::High => -2,
        }
    }
}

/// A stream of a device. Cheap to copy; libtorch keeps it for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    device: c_int,
    id: i64,
}

impl Stream {
    /// One of libtorch's streams of a priority. It has 32 of each and gives them out in turn.
    ///
    /// # Errors
    /// `device` is no GPU; the GPU's part is not loaded; CUDA's own.
    pub fn new(device: Device, priority: Priority) -> Result<Self> {
        let mut stream = Self { device: gpu::ordinal(device)?, id: 0 };
        // SAFETY: the pointer is to a live integer, which the call fills.
        gpu::call(|gpu| unsafe { (gpu.stream_new)(stream.device, priority.level(), &raw mut stream.id) })?;
        Ok(stream)
    }

    /// The stream that this thread's operations on `device` go to.
    ///
    /// # Errors
    /// As for [`Stream::new`].
    pub fn current(device: Device) -> Result<Self> {
        let mut stream = Self { device: gpu::ordinal(device)?, id: 0 };
        // SAFETY: the pointer is to a live integer, which the call fills.
        gpu::call(|gpu| unsafe { (gpu.stream_current)(stream.device, &raw mut stream.id) })?;
        Ok(stream)
    }

    /// From here on this thread's operations on the device go to this stream, until what is returned is dropped.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn enter(self) -> Result<Entered> {
        let before = Self { id: self.current_id()?, ..self };
        self.make_current()?;
        Ok(Entered { before })
    }

    fn current_id(self) -> Result<i64> {
        let mut id = 0;
        // SAFETY: the pointer is to a live integer, which the call fills.
        gpu::call(|gpu| unsafe { (gpu.stream_current)(self.device, &raw mut id) })?;
        Ok(id)
    }

    fn make_current(self) -> Result<()> {
        // SAFETY: takes numbers that libtorch gave.
        gpu::call(|gpu| unsafe { (gpu.stream_enter)(self.device, self.id) })
    }

    /// CUDA's handle, `cudaStream_t` and `CUstream`.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn raw(self) -> Result<*mut c_void> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a live pointer, which the call fills.
        gpu::call(|gpu| unsafe { (gpu.stream_raw)(self.device, self.id, &raw mut raw) })?;
        Ok(raw)
    }

    /// Waits until all its work so far is done.
    ///
    /// # Errors
    /// What went wrong on the device before.
    pub fn synchronize(self) -> Result<()> {
        // SAFETY: takes numbers that libtorch gave.
        gpu::call(|gpu| unsafe { (gpu.stream_synchronize)(self.device, self.id) })
    }

    /// An event behind its work so far.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn record(self) -> Result<Event> {
        let mut event = Event { device: self.device, raw: std::ptr::null_mut() };
        // SAFETY: the pointer is to a live pointer, which the call fills with an event that is this one's alone.
        gpu::call(|gpu| unsafe { (gpu.event_record)(self.device, self.id, &raw mut event.raw) })?;
        Ok(event)
    }

    /// Has its later work wait for `event` on the device; this thread goes on.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn wait(self, event: &Event) -> Result<()> {
        // SAFETY: the event is alive while it is borrowed, and CUDA keeps what it needs of it.
        gpu::call(|gpu| unsafe { (gpu.event_wait)(self.device, self.id, event.raw) })
    }

    /// Has the allocator give the memory of `tensor`, which was made on another stream, to nobody before this stream's work on it so far is done.
    ///
    /// # Errors
    /// The tensor is not on a GPU.
    pub fn keep(self, tensor: &Tensor) -> Result<()> {
        if !tensor.device().is_cuda() {
            return Err(Error(format!("a tensor on {:?} is on no stream", tensor.device())));
        }
        // SAFETY: the tensor is alive while it is borrowed.
        gpu::call(|gpu| unsafe { (gpu.stream_keep)(self.device, self.id, tensor.as_ptr()) })
    }
}

/// Gives this thread its stream back when it is dropped.
#[derive(Debug)]
#[must_use = "the stream is left as soon as this is dropped"]
pub struct Entered {
    before: Stream,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // It was this thread's stream already, so that nothing is left to fail.
        let _ = self.before.make_current();
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    device: c_int,
    raw: *mut c_void,
}

// SAFETY: CUDA takes events from any thread.
unsafe impl Send for Event {}
// SAFETY: as above; nothing here changes one.
unsafe impl Sync for Event {}

impl Event {
    /// Whether the work before it is done.
    ///
    /// # Errors
    /// What went wrong on the device before.
    pub fn is_done(&self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: the event is alive; the pointer is to a live integer, which the call fills.
        gpu::call(|gpu| unsafe { (gpu.event_done)(self.raw, &raw mut done) })?;
        Ok(done != 0)
    }

    /// Waits until it is.
    ///
    /// # Errors
    /// What went wrong on the device before.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the event is alive.
        gpu::call(|gpu| unsafe { (gpu.event_synchronize)(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by `record`, and used no more. On a device that is lost nothing can be given back.
            let _ = gpu::call(|gpu| unsafe { (gpu.event_free)(self.device, self.raw) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_has_no_streams() {
        let error = Stream::new(Device::Cpu, Priority::Low).unwrap_err().to_string();
        assert_eq!(error, "Cpu is no GPU");
        if !gpu::is_loaded() {
            assert!(Stream::current(Device::Cuda(0)).unwrap_err().to_string().contains("no GPU here"));
        }
    }
}
