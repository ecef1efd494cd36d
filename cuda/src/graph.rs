//! Graphs: work that a GPU was given once, given again in one piece.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Result, gpu};

/// While it is held, nobody in this process records, or one does.
static RECORDING: Mutex<()> = Mutex::new(());

/// For what may wait for the whole device, which no thread may do while another records: cuDNN's search for the fastest algorithm. Nobody records as long as the
/// caller holds it; who does meanwhile is waited for.
pub fn unrecorded() -> MutexGuard<'static, ()> {
    RECORDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Recorded work. It reads and writes the tensors that it was recorded with; their memory stays its own until it is dropped.
#[derive(Debug)]
pub struct Graph {
    raw: *mut c_void,
}

// SAFETY: libtorch's graphs are bound to no thread; one thread at a time has it.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts the recorded work on this thread's current stream.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph is alive and whole: a recording gives it away when it has ended.
        gpu::call(|gpu| unsafe { (gpu.graph_replay)(self.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by a recording, and used no more.
            let _ = gpu::call(|gpu| unsafe { (gpu.graph_free)(self.raw) });
        }
    }
}

/// A graph that is being recorded: whatever this thread puts on its current stream, and the backward passes that it begins, go there. Dropped before
/// its end, it records nothing.
#[derive(Debug)]
#[must_use = "what is put on the stream is recorded, and not computed"]
pub struct Recording {
    graph: Option<Graph>,
    _alone: MutexGuard<'static, ()>,
}

impl Recording {
    /// From here on this thread's current stream, which must not be the default one, computes nothing: tensors that are made get memory, and their
    /// numbers when the graph is replayed. Until the end nobody may wait for the device in this process (see [`unrecorded`]), and on this thread nobody may
    /// copy from or to pageable memory, or do anything that was never done before (what libraries set up at first use cannot be recorded).
    ///
    /// `beside`: a graph whose memory this one shares. Tensors of the other's that are alive while this one is recorded stay apart from its own; others
    /// may lie in the same place, and are overwritten.
    ///
    /// # Errors
    /// CUDA's own, of a stream that cannot record.
    pub fn begin(beside: Option<&Graph>) -> Result<Self> {
        let alone = unrecorded();
        let mut graph = Graph { raw: std::ptr::null_mut() };
        let beside = beside.map_or(std::ptr::null_mut(), |graph| graph.raw);
        // SAFETY: the graph beside is alive or null; the pointer is to a live pointer, which the call fills with a graph that is this one's alone.
        gpu::call(|gpu| unsafe { (gpu.graph_begin)(beside, &raw mut graph.raw) })?;
        Ok(Self { graph: Some(graph), _alone: alone })
    }

    /// The graph, to be replayed.
    ///
    /// # Errors
    /// Something was done that cannot be recorded.
    pub fn end(mut self) -> Result<Graph> {
        let graph = self.graph.take().ok_or_else(|| crate::Error("a recording has ended already".into()))?;
        // SAFETY: the graph is alive, and recording.
        gpu::call(|gpu| unsafe { (gpu.graph_end)(graph.raw) })?;
        Ok(graph)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(graph) = &self.graph {
            // SAFETY: the graph is alive, and recording. Whoever gives up has the error that matters.
            let _ = gpu::call(|gpu| unsafe { (gpu.graph_end)(graph.raw) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_nothing_is_recorded() {
        if gpu::is_loaded() {
            println!("skipped: there is a GPU");
            return;
        }
        assert!(Recording::begin(None).unwrap_err().to_string().contains("no GPU here"));
    }
}
