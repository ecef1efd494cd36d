//! Graphs: work that a GPU was given once, given again in one piece.

use std::ffi::c_void;

use crate::{Error, Result, gpu};

/// Recorded work. It reads and writes the tensors that it was recorded with; their memory stays its own until it is dropped.
#[derive(Debug)]
pub struct Graph {
    raw: *mut c_void,
}

// SAFETY: libtorch's graphs are bound to no thread; one thread at a time has it.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` puts on this thread's current stream, which must not be the default one. Nothing of it is computed yet: what it returns are
    /// the tensors that [`Graph::replay`] fills. `work` must not wait for the device, copy from or to pageable memory, or do anything that it has
    /// never done before (what libraries set up at first use cannot be recorded).
    ///
    /// # Errors
    /// What `work` returns; what cannot be recorded. Nothing is recorded then.
    pub fn capture<T, E: From<Error>>(work: impl FnOnce() -> std::result::Result<T, E>) -> std::result::Result<(Self, T), E> {
        let mut graph = Self { raw: std::ptr::null_mut() };
        // SAFETY: the pointer is to a live pointer, which the call fills with a graph that is this one's alone.
        gpu::call(|gpu| unsafe { (gpu.graph_begin)(&raw mut graph.raw) })?;
        let result = work();
        // SAFETY: the graph is alive, and recording. It must end even if the work has failed.
        let ended = gpu::call(|gpu| unsafe { (gpu.graph_end)(graph.raw) });
        let made = result?;
        ended?;
        Ok((graph, made))
    }

    /// Puts the recorded work on this thread's current stream.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph is alive and whole.
        gpu::call(|gpu| unsafe { (gpu.graph_replay)(self.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by `capture`, and used no more.
            let _ = gpu::call(|gpu| unsafe { (gpu.graph_free)(self.raw) });
        }
    }
}
