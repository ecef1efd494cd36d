//! Sums of tensors in GPU memory, by NCCL; everything in host memory goes through another engine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use half::bf16;
use nccl_rs::cuda::{Device, Driver, Event, OwnedStream, Stream};
use nccl_rs::{Buffer, Communicator, Dtype, Library, UniqueId};
use tch::{Kind, Tensor};

use super::{AbortHandle, Collective, CollectiveError, DEFAULT_TIMEOUT, Result, tensor};

/// How long NCCL may take to abort. After that only the end of the process helps.
const ABORT: Duration = Duration::from_secs(10);

/// An engine for host memory, joined by NCCL for tensors on this rank's GPU.
///
/// NCCL works on a stream of its own, of the highest priority: events have it begin after what the calling thread's current stream had been given
/// before, and what is computed meanwhile goes on beside it.
#[derive(Debug)]
pub struct Nccl {
    host: Box<dyn Collective>,
    // Dropped before its stream.
    communicator: Communicator,
    stream: OwnedStream,
    device: Device,
    ordinal: u32,
    timeout: Duration,
    begun: Vec<Begun>,
    /// NCCL's abort did not come back: the GPU may be at its tensors still.
    hung: AtomicBool,
}

/// A sum under way.
#[derive(Debug)]
struct Begun {
    /// Nothing else may get its memory before the sum is done.
    _tensor: Tensor,
    from: Event,
    to: Event,
}

impl Nccl {
    /// Joins the ranks of `host` by NCCL, this one with the GPU `ordinal`. `host` is of no more use when this fails, and its peers find that out.
    ///
    /// # Errors
    /// [`CollectiveError::SharedGpu`] when two ranks are on one GPU; [`CollectiveError::Nccl`]; what `host` reports.
    pub fn connect(host: Box<dyn Collective>, library: &Library, ordinal: u32, timeout: Duration) -> Result<Self> {
        Self::connect_telling(host, library, ordinal, timeout, |_| ())
    }

    /// The same, where `begun` gets the handle that aborts both engines before NCCL waits for the other ranks.
    ///
    /// # Errors
    /// As for [`Nccl::connect`]; [`CollectiveError::Aborted`].
    pub fn connect_telling(
        mut host: Box<dyn Collective>,
        library: &Library,
        ordinal: u32,
        timeout: Duration,
        begun: impl FnOnce(AbortHandle),
    ) -> Result<Self> {
        let device = Driver::load()?.device(ordinal)?;
        device.make_current()?;
        refuse_shared_gpus(host.as_mut(), device.uuid())?;
        let id = agree_on_id(host.as_mut(), || library.unique_id())?;
        let (place, of_host) = ((host.rank(), host.world()), host.abort_handle());
        let communicator = Communicator::init_telling(library, &id, place, timeout, |nccl| begun(both(of_host, nccl)))?;
        let stream = device.urgent_stream()?;
        Ok(Self { host, communicator, stream, device, ordinal, timeout: DEFAULT_TIMEOUT, begun: Vec::new(), hung: AtomicBool::new(false) })
    }

    /// Puts a sum, or a copy of rank `root`'s, on NCCL's stream, behind what the stream `current` has been given so far.
    fn begin(&self, tensor: &Tensor, dtype: Dtype, current: Stream, root: Option<u32>) -> std::result::Result<[Event; 2], nccl_rs::Error> {
        self.device.make_current()?;
        let own = self.stream.stream();
        self.device.wait(own, &self.device.record(current)?)?;
        let from = self.device.record(own)?;
        let buffer = Buffer { ptr: tensor.data_ptr(), count: tensor.numel(), dtype };
        // SAFETY: the tensor is contiguous, of this type, and on the communicator's GPU (the caller checked). Its memory is kept until the event
        // is done or the communicator aborted. What was put on the current stream before is waited for there, and the caller touches the tensor no
        // more until `settle` has returned.
        unsafe {
            let deadline = Instant::now() + self.timeout;
            match root {
                None => self.communicator.all_reduce(buffer, own, deadline),
                Some(root) => self.communicator.broadcast(buffer, root, own, deadline),
            }
        }?;
        Ok([from, self.device.record(own)?])
    }

    /// The same with a tensor on this rank's GPU, until [`Collective::settle`].
    fn put(&mut self, tensor: Tensor, dtype: Dtype, root: Option<u32>) -> Result<()> {
        let place = tensor.device();
        if place != tch::Device::Cuda(self.ordinal as usize) {
            let found = format!("{place:?}, where this rank has GPU {}", self.ordinal);
            return Err(tensor::refused(&tensor, "a tensor on this rank's GPU", found));
        }
        match self.begin(&tensor, dtype, current_stream(place)?, root).map_err(|error| self.fail(error)) {
            Ok([from, to]) => self.begun.push(Begun { _tensor: tensor, from, to }),
            Err(error) => {
                if self.hung.load(Ordering::Relaxed) {
                    std::mem::forget(tensor);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Waits for the sums under way, on this thread: so that a peer's death, an abort and the deadline are seen (LIVE).
    fn wait(&self) -> std::result::Result<Duration, nccl_rs::Error> {
        let mut at_them = Duration::ZERO;
        for sum in &self.begun {
            self.communicator.wait(&sum.to, Instant::now() + self.timeout)?;
            at_them += sum.to.since(&sum.from)?;
        }
        Ok(at_them)
    }

    /// Ends everything after a failure, so that nothing is left running on anybody's memory.
    fn fail(&self, error: nccl_rs::Error) -> CollectiveError {
        match self.communicator.abort_handle().abort(ABORT) {
            // NCCL's abort came back and the failure was an abort: that is what happened.
            Ok(()) if matches!(error, nccl_rs::Error::Aborted { .. }) => CollectiveError::Aborted,
            Ok(()) => error.into(),
            Err(hung) => {
                self.hung.store(true, Ordering::Relaxed);
                hung.into()
            }
        }
    }
}

impl Drop for Nccl {
    /// Sums that nobody has waited for, because their step failed, must not outlive their memory.
    fn drop(&mut self) {
        let hung = self.hung.load(Ordering::Relaxed);
        if !self.begun.is_empty() && (hung || self.communicator.abort_handle().abort(ABORT).is_err()) {
            tracing::error!("NCCL's abort hangs; the memory of its sums is not given back");
            std::mem::forget(std::mem::take(&mut self.begun));
        }
    }
}

/// The stream on which libtorch puts this thread's work on `gpu`.
///
/// # Errors
/// CUDA's own.
pub(crate) fn current_stream(gpu: tch::Device) -> std::result::Result<Stream, ella_cuda::Error> {
    if !ella_cuda::is_loaded() {
        // Nobody can have set another than libtorch begins with.
        return Ok(Stream::DEFAULT);
    }
    let raw = ella_cuda::stream::Stream::current(gpu)?.raw()?;
    // SAFETY: a stream of libtorch's on that device; it keeps them for the life of the process.
    Ok(unsafe { Stream::from_raw(raw) })
}

impl Collective for Nccl {
    fn rank(&self) -> u32 {
        self.host.rank()
    }

    fn world(&self) -> u32 {
        self.host.world()
    }

    fn sum_i64(&mut self, data: &mut [i64]) -> Result<()> {
        self.host.sum_i64(data)
    }

    fn sum_f32(&mut self, data: &mut [f32]) -> Result<()> {
        self.host.sum_f32(data)
    }

    fn sum_bf16(&mut self, data: &mut [bf16]) -> Result<()> {
        self.host.sum_bf16(data)
    }

    fn broadcast(&mut self, root: u32, data: &mut [u8]) -> Result<()> {
        self.host.broadcast(root, data)
    }

    fn barrier(&mut self) -> Result<()> {
        self.host.barrier()
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
        self.host.set_timeout(timeout);
    }

    fn abort_handle(&self) -> AbortHandle {
        both(self.host.abort_handle(), self.communicator.abort_handle())
    }

    fn sum_tensor(&mut self, tensor: &mut Tensor) -> Result<()> {
        self.begin_sum(tensor.shallow_clone())?;
        self.settle().map(drop)
    }

    fn begin_sum(&mut self, mut tensor: Tensor) -> Result<()> {
        if !tensor.device().is_cuda() {
            return self.host.sum_tensor(&mut tensor);
        }
        tensor::check_sum(&tensor)?;
        let dtype = dtype(&tensor)?.unwrap_or(Dtype::F32);
        self.put(tensor, dtype, None)
    }

    fn broadcast_tensor(&mut self, root: u32, tensor: &mut Tensor) -> Result<()> {
        match dtype(tensor)? {
            Some(dtype) if tensor.device().is_cuda() && tensor.is_contiguous() => {
                self.put(tensor.shallow_clone(), dtype, Some(root))?;
                self.settle().map(drop)
            }
            _ => tensor::broadcast_in_host_memory(self, root, tensor),
        }
    }

    fn settle(&mut self) -> Result<Duration> {
        let at_them = self.wait().map_err(|error| self.fail(error))?;
        self.begun.clear();
        Ok(at_them)
    }
}

/// Aborts both engines.
fn both(host: AbortHandle, nccl: nccl_rs::AbortHandle) -> AbortHandle {
    AbortHandle::new(move || {
        host.abort()?;
        Ok(nccl.abort(ABORT)?)
    })
}

/// NCCL's name of a tensor's kind, for those that it is given.
fn dtype(tensor: &Tensor) -> Result<Option<Dtype>> {
    Ok(match tensor.f_kind()? {
        Kind::Float => Some(Dtype::F32),
        Kind::Int64 => Some(Dtype::I64),
        Kind::BFloat16 => Some(Dtype::Bf16),
        _ => None,
    })
}

/// Rank 0 makes the identifier, the others get it from there.
fn agree_on_id<E>(host: &mut dyn Collective, make: impl FnOnce() -> std::result::Result<UniqueId, E>) -> Result<UniqueId>
where
    CollectiveError: From<E>,
{
    let mut id = [0; 128];
    if host.rank() == 0 {
        id = make()?.0;
    }
    host.broadcast(0, &mut id)?;
    Ok(UniqueId(id))
}

/// Compares the GPUs of all ranks: each puts its own into its place of a sum.
fn refuse_shared_gpus(host: &mut dyn Collective, uuid: [u8; 16]) -> Result<()> {
    let mut all = vec![0_i64; 2 * host.world() as usize];
    let (halves, _) = uuid.as_chunks::<8>();
    let mine = 2 * host.rank() as usize;
    all[mine..mine + 2].copy_from_slice(&[0, 1].map(|i| i64::from_le_bytes(halves[i])));
    host.sum_i64(&mut all)?;
    let (all, _) = all.as_chunks::<2>();
    for (second, gpu) in all.iter().enumerate() {
        if let Some(first) = all[..second].iter().position(|earlier| earlier == gpu) {
            let uuid = gpu.iter().flat_map(|half| half.to_le_bytes()).map(|byte| format!("{byte:02x}")).collect();
            return Err(CollectiveError::SharedGpu { first: first as u32, second: second as u32, uuid });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reduce::InProcess;

    fn on_all<R: Send>(world: u32, work: impl Fn(&mut InProcess) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let work = &work;
            let started: Vec<_> = InProcess::group(world).into_iter().map(|mut rank| scope.spawn(move || work(&mut rank))).collect();
            started.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    #[test]
    fn two_ranks_on_one_gpu_are_refused_by_name_on_all_ranks() {
        let gpus = [[1; 16], [2; 16], [3; 16], [2; 16]];
        for result in on_all(4, |rank| {
            let gpu = gpus[rank.rank() as usize];
            refuse_shared_gpus(rank, gpu)
        }) {
            match result {
                Err(CollectiveError::SharedGpu { first: 1, second: 3, uuid }) => assert_eq!(uuid, "02".repeat(16)),
                other => panic!("expected ranks 1 and 3, found {other:?}"),
            }
        }
        for result in on_all(4, |rank| {
            let gpu = [rank.rank() as u8; 16];
            refuse_shared_gpus(rank, gpu)
        }) {
            result.expect("all differ");
        }
    }

    #[test]
    fn a_library_that_is_not_there_is_no_peers_fault() {
        let absent = nccl_rs::Error::Absent { library: "libnccl.so.2", tried: String::new() };
        assert!(!CollectiveError::from(absent).is_of_peers());
        assert!(CollectiveError::from(nccl_rs::Error::Aborted { call: "collective" }).is_of_peers());
    }

    #[test]
    fn all_ranks_get_the_identifier_that_rank_0_made() {
        for id in on_all(3, |rank| agree_on_id::<CollectiveError>(rank, || Ok(UniqueId([9; 128])))) {
            assert_eq!(id.expect("all take part"), UniqueId([9; 128]));
        }
    }

    #[test]
    fn a_rank_0_that_cannot_make_one_fails_the_others_at_once() {
        let absent = || nccl_rs::Error::Aborted { call: "ncclGetUniqueId" };
        let results = std::thread::scope(|scope| {
            let started: Vec<_> = InProcess::group(2)
                .into_iter()
                .map(|mut rank| scope.spawn(move || agree_on_id(&mut rank, || Err::<UniqueId, _>(absent()))))
                .collect();
            started.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert!(matches!(results[0], Err(CollectiveError::Nccl(_))), "{results:?}");
        assert!(matches!(results[1], Err(CollectiveError::PeerLost { rank: 0, .. })), "{results:?}");
    }
}
