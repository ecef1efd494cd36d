//! What is trained, as flat buffers, and its files: connector, moving average and optimizer, each one safetensors file whose data
//! is the flat buffer itself.

use super::optimizer::Buffers;
use crate::reduce::{Collective, CollectiveError};
use bytes::Bytes;
use ella_dataset::ledger::Ledger;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// The weights, in the official key layout.
pub const CONNECTOR_FILE: &str = "connector.safetensors";
/// The moving average of the weights, in the official key layout.
pub const EMA_FILE: &str = "ema.safetensors";
/// AdamW's moments: `exp_avg.NAME` and `exp_avg_sq.NAME`. Its header's `updates` is their number.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// Elements that are summed at once: libtorch makes 64-bit integers of them before.
const PIECE: i64 = 1 << 24;

/// Why a commit's file does not fit what is trained.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not a safetensors file.
    #[error("{file}: not a safetensors file ({message})")]
    NotSafetensors {
        /// The file.
        file: String,
        /// The parser's words.
        message: String,
    },
    /// A tensor is missing, or has another shape or format.
    #[error("{file}: tensor `{key}` is {found}, expected {expected}; the commit belongs to another connector config")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor's name.
        key: String,
        /// What the layout says.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// The header lacks the number of updates.
    #[error("{OPTIMIZER_FILE}: its header does not say of how many updates it is; the commit is of another version")]
    NoUpdates,
    /// The commit record does not name this file.
    #[error("its record names no {file}; the record is of another version")]
    NoPart {
        /// The file.
        file: &'static str,
    },
    /// libtorch's own error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// One parameter's place in the flat buffers.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its first element's index.
    pub offset: i64,
    /// Its number of elements.
    pub len: i64,
}

/// The places of all parameters.
#[derive(Debug)]
pub struct Layout {
    entries: Vec<Entry>,
    total: i64,
    /// What connector files tell of how they were trained.
    trained: BTreeMap<String, String>,
}

impl Layout {
    /// Lays parameters out one after the other.
    pub fn new(shapes: Vec<(String, Vec<i64>)>) -> Self {
        let mut total = 0;
        let mut entries = Vec::with_capacity(shapes.len());
        for (name, shape) in shapes {
            let len: i64 = shape.iter().product();
            entries.push(Entry { name, shape, offset: total, len });
            total += len;
        }
        Self { entries, total, trained: BTreeMap::new() }
    }

    /// With these fields in the metadata of connector and moving average.
    pub fn telling(self, trained: BTreeMap<String, String>) -> Self {
        Self { trained, ..self }
    }

    /// Number of elements in all.
    pub fn total(&self) -> i64 {
        self.total
    }

    /// The parameters in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Gathers named tensors into one flat `[P]` float32 buffer on `device`.
    pub fn gather(&self, tensors: &[Tensor], device: Device) -> Result<Tensor, tch::TchError> {
        let flat: Vec<Tensor> = tensors.iter().map(|t| t.f_detach()?.f_to_kind(Kind::Float)?.f_reshape([-1])).collect::<Result<_, _>>()?;
        Tensor::f_cat(&flat, 0)?.f_to_device(device)
    }

    /// Views into a flat buffer, each a leaf that takes gradients. They share its storage: an update in place is seen at once.
    pub fn views(&self, flat: &Tensor) -> Result<Vec<(String, Tensor)>, tch::TchError> {
        let view = |e: &Entry| {
            let tensor = flat.f_narrow(0, e.offset, e.len)?.f_view(e.shape.as_slice())?.f_detach()?;
            Ok((e.name.clone(), tensor.set_requires_grad(true)))
        };
        self.entries.iter().map(view).collect()
    }

    /// The header of a safetensors file that holds one flat buffer per prefix, in this layout's order.
    fn header(&self, prefixes: &[&str], metadata: &BTreeMap<String, String>) -> Vec<u8> {
        let mut json = format!("{{\"__metadata__\":{}", serde_json::json!(metadata));
        for (index, prefix) in prefixes.iter().enumerate() {
            let base = index as i64 * self.total;
            for e in &self.entries {
                let (begin, end) = (4 * (base + e.offset), 4 * (base + e.offset + e.len));
                let name = serde_json::json!(format!("{prefix}{}", e.name));
                let shape = serde_json::json!(e.shape);
                let _ = write!(json, ",{name}:{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}");
            }
        }
        json.push('}');
        while !json.len().is_multiple_of(8) {
            json.push(' ');
        }
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes
    }
}

/// Everything a resume needs.
#[derive(Debug)]
pub struct TrainState {
    /// Steps done, those that were left out among them.
    pub step: u64,
    /// Where each parameter lies.
    pub layout: Arc<Layout>,
    /// Weights, moments, average.
    pub buffers: Buffers,
    /// What was trained on (ONCE).
    pub ledger: Ledger,
}

impl TrainState {
    /// A fresh state from the connector's first values.
    pub fn fresh(layout: Arc<Layout>, params: Tensor) -> Result<Self, tch::TchError> {
        let [exp_avg, exp_avg_sq] = [params.f_zeros_like()?, params.f_zeros_like()?];
        let buffers = Buffers { exp_avg, exp_avg_sq, ema: copy(&params)?, params, updates: 0 };
        Ok(Self { step: 0, layout, buffers, ledger: Ledger::default() })
    }

    /// Replaces the buffers' contents by those of a commit's three files, in the order of [`part_names`].
    pub fn restore(&mut self, files: &[Bytes; 3]) -> Result<(), StateError> {
        let b = &mut self.buffers;
        fill(&mut b.params, &self.layout, "", CONNECTOR_FILE, &files[0])?;
        fill(&mut b.ema, &self.layout, "", EMA_FILE, &files[1])?;
        fill(&mut b.exp_avg, &self.layout, "exp_avg.", OPTIMIZER_FILE, &files[2])?;
        fill(&mut b.exp_avg_sq, &self.layout, "exp_avg_sq.", OPTIMIZER_FILE, &files[2])?;
        b.updates = updates(&files[2])?;
        Ok(())
    }

    /// Replaces the state by that of rank `root`, which holds one; every rank takes part. If it fails the state is torn, but for ranks that held the
    /// same one before.
    ///
    /// # Errors
    /// See [`CollectiveError`]; [`CollectiveError::Torn`] where something else has arrived.
    pub fn copy_from(&mut self, collective: &mut dyn Collective, root: u32) -> Result<(), CollectiveError> {
        let _no_grad = tch::no_grad_guard();
        let mut words = [0; 3];
        let mut ledger = serde_json::to_vec(&self.ledger).unwrap_or_default();
        if collective.rank() == root {
            words = [self.step, self.buffers.updates, ledger.len() as u64];
        }
        collective.broadcast(root, bytemuck::bytes_of_mut(&mut words))?;
        let [step, updates, length] = words;
        ledger.resize(length as usize, 0);
        collective.broadcast(root, &mut ledger)?;
        let b = &mut self.buffers;
        for buffer in [&mut b.params, &mut b.exp_avg, &mut b.exp_avg_sq, &mut b.ema] {
            collective.broadcast_tensor(root, buffer)?;
        }
        (self.step, self.buffers.updates) = (step, updates);
        if collective.rank() != root {
            let garbled =
                |error: serde_json::Error| CollectiveError::Io { what: "the ledger of the rank to copy from", source: error.into() };
            self.ledger = serde_json::from_slice(&ledger).map_err(garbled)?;
        }
        // Else the next commit would find it, and end the run.
        let mine = self.sums()?;
        let mut roots = mine;
        collective.broadcast(root, bytemuck::bytes_of_mut(&mut roots))?;
        if mine == roots { Ok(()) } else { Err(CollectiveError::Torn { root }) }
    }

    /// By which a copy is told from another state: of each buffer a sum of its words, made where it lies; and of the rest a digest.
    fn sums(&self) -> Result<[i64; 5], tch::TchError> {
        let b = &self.buffers;
        let mut sums = [0_i64; 5];
        for (sum, buffer) in sums.iter_mut().zip([&b.params, &b.exp_avg, &b.exp_avg_sq, &b.ema]) {
            for piece in buffer.f_view_dtype(Kind::Int)?.f_split(PIECE, 0)? {
                *sum = sum.wrapping_mul(31).wrapping_add(piece.f_sum(Kind::Int64)?.f_int64_value(&[])?);
            }
        }
        let rest = serde_json::to_vec(&(self.step, b.updates, &self.ledger)).unwrap_or_default();
        sums[4] = i64::from_le_bytes(*blake3::hash(&rest).as_bytes().first_chunk().unwrap_or(&[0; 8]));
        Ok(sums)
    }

    /// A copy in host memory, from which files and digests are made while training goes on.
    ///
    /// It is made in the memory of `kept`, an older one that nobody needs any more: new memory costs more than the copy, for the system clears
    /// each page of it first. If an upload still reads that one, it is made in new memory all the same.
    pub fn snapshot(&self, kept: Option<Snapshot>) -> Result<Snapshot, tch::TchError> {
        let b = &self.buffers;
        let [params, ema, exp_avg, exp_avg_sq] = kept.and_then(Snapshot::into_memory).map(|memory| memory.map(Some)).unwrap_or_default();
        Ok(Snapshot {
            step: self.step,
            updates: b.updates,
            layout: self.layout.clone(),
            params: copy_into(params, &b.params)?,
            ema: copy_into(ema, &b.ema)?,
            exp_avg: copy_into(exp_avg, &b.exp_avg)?,
            exp_avg_sq: copy_into(exp_avg_sq, &b.exp_avg_sq)?,
            ledger: self.ledger.clone(),
            readers: Arc::default(),
        })
    }
}

/// A copy in host memory, in that of `kept` if it has the same shape.
fn copy_into(kept: Option<Tensor>, tensor: &Tensor) -> Result<Tensor, tch::TchError> {
    let tensor = tensor.f_detach()?;
    match kept.filter(|kept| kept.size() == tensor.size()) {
        Some(mut kept) if is_host_memory(&tensor) => {
            copy_bytes(host_bytes(&tensor), host_bytes_mut(&mut kept));
            Ok(kept)
        }
        Some(mut kept) => {
            kept.f_copy_(&tensor)?;
            Ok(kept)
        }
        None => tensor.f_to_device_(Device::Cpu, Kind::Float, false, true),
    }
}

fn copy(tensor: &Tensor) -> Result<Tensor, tch::TchError> {
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// The files of a commit, in order: a part's index decides which rank uploads it.
pub fn part_names() -> [&'static str; 3] {
    [CONNECTOR_FILE, EMA_FILE, OPTIMIZER_FILE]
}

fn fill(target: &mut Tensor, layout: &Layout, prefix: &str, file: &str, bytes: &[u8]) -> Result<(), StateError> {
    let tensors =
        SafeTensors::deserialize(bytes).map_err(|e| StateError::NotSafetensors { file: file.to_owned(), message: e.to_string() })?;
    for e in layout.entries() {
        let key = format!("{prefix}{}", e.name);
        let wrong =
            |found: String| StateError::Tensor { file: file.to_owned(), key: key.clone(), expected: format!("F32 {:?}", e.shape), found };
        let view = tensors.tensor(&key).map_err(|_| wrong("missing".to_owned()))?;
        let shape: Vec<i64> = view.shape().iter().map(|d| *d as i64).collect();
        if view.dtype() != Dtype::F32 || shape != e.shape {
            return Err(wrong(format!("{:?} {shape:?}", view.dtype())));
        }
        let source = Tensor::f_from_data_size(view.data(), &[e.len], Kind::Float)?;
        tch::no_grad(|| target.f_narrow(0, e.offset, e.len)?.f_copy_(&source))?;
    }
    Ok(())
}

/// Of how many updates the moments of an optimizer's file are.
fn updates(file: &[u8]) -> Result<u64, StateError> {
    let wrong = |e: safetensors::SafeTensorError| StateError::NotSafetensors { file: OPTIMIZER_FILE.to_owned(), message: e.to_string() };
    let (_, header) = SafeTensors::read_metadata(file).map_err(wrong)?;
    let said = header.metadata().as_ref().and_then(|told| told.get("updates"));
    said.and_then(|count| count.parse().ok()).ok_or(StateError::NoUpdates)
}

/// A state in host memory.
#[derive(Debug)]
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// What was trained on.
    pub ledger: Ledger,
    updates: u64,
    layout: Arc<Layout>,
    params: Tensor,
    ema: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// Held by every piece of a file that lies in the buffers.
    readers: Arc<()>,
}

impl Snapshot {
    /// The buffers, unless a piece of a file is still there: an upload's attempt that took too long may go on reading after the next one
    /// has succeeded.
    fn into_memory(self) -> Option<[Tensor; 4]> {
        Arc::into_inner(self.readers)?;
        Some([self.params, self.ema, self.exp_avg, self.exp_avg_sq])
    }

    /// What one file consists of: the header, then flat buffers.
    fn content(&self, part: usize) -> (Vec<u8>, Vec<&Tensor>) {
        let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), ("step".to_owned(), self.step.to_string())]);
        if part_names()[part] != OPTIMIZER_FILE {
            metadata.extend(self.layout.trained.clone());
        }
        match part {
            0 => (self.layout.header(&[""], &metadata), vec![&self.params]),
            1 => (self.layout.header(&[""], &metadata), vec![&self.ema]),
            _ => {
                metadata.insert("updates".to_owned(), self.updates.to_string());
                (self.layout.header(&["exp_avg.", "exp_avg_sq."], &metadata), vec![&self.exp_avg, &self.exp_avg_sq])
            }
        }
    }

    /// Size and BLAKE3 of one file.
    pub fn digest(&self, part: usize) -> (u64, blake3::Hash) {
        let mut hasher = blake3::Hasher::new();
        self.file(part).iter().for_each(|piece| _ = hasher.update(piece));
        (hasher.count(), hasher.finalize())
    }

    /// One file, in pieces that follow each other. All but the first, its header, are the snapshot's own memory: no copy is made.
    pub fn file(&self, part: usize) -> Vec<Bytes> {
        let (header, buffers) = self.content(part);
        let piece = |buffer: &Tensor| Bytes::from_owner(Piece { tensor: buffer.shallow_clone(), _reader: self.readers.clone() });
        std::iter::once(header.into()).chain(buffers.into_iter().map(piece)).collect()
    }

    /// The digest that all ranks must agree on: of the three files, the step and the ledger.
    pub fn state_digest(&self, parts: &[(u64, blake3::Hash)]) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.step.to_le_bytes());
        for (_, hash) in parts {
            hasher.update(hash.as_bytes());
        }
        hasher.update(&serde_json::to_vec(&self.ledger).unwrap_or_default());
        hasher.finalize().to_hex().to_string()
    }
}

/// A buffer of a snapshot, as the bytes of a file.
struct Piece {
    tensor: Tensor,
    // Dropped after the tensor: the buffer is free when nobody counts as a reader.
    _reader: Arc<()>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        host_bytes(&self.tensor)
    }
}

/// Copies with as many threads as libtorch may use, up to what saturates the memory. libtorch's own copy takes longer: it has the memory that
/// it overwrites read first, where memcpy, of pieces as large as these, does not.
fn copy_bytes(from: &[u8], to: &mut [u8]) {
    let threads = tch::get_num_threads().clamp(1, 4) as usize;
    let piece = from.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let pieces = from.chunks(piece).zip(to.chunks_mut(piece));
        pieces.for_each(|(from, to)| _ = scope.spawn(|| to.copy_from_slice(from)));
    });
}

fn is_host_memory(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous()
}

/// The memory of a contiguous float32 tensor on the host, which nobody else has.
fn host_bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    debug_assert!(is_host_memory(tensor));
    // SAFETY: as in `host_bytes`; it was written to when it was made, and `into_memory` gives it only if nobody reads it.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr() as *mut u8, 4 * tensor.numel()) }
}

/// The memory of a contiguous float32 tensor on the host.
fn host_bytes(tensor: &Tensor) -> &[u8] {
    debug_assert!(is_host_memory(tensor));
    // SAFETY: the tensor is contiguous float32 in host memory (made so by `snapshot`, or looked at), holds `numel` elements of 4 bytes, and
    // outlives the slice, which borrows it; nobody writes to a snapshot while it has readers (`into_memory`).
    unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, 4 * tensor.numel()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(seed: i64) -> TrainState {
        tch::manual_seed(seed);
        let layout = Arc::new(Layout::new(vec![("a.weight".into(), vec![3, 4]), ("b".into(), vec![5])]));
        let mut state = TrainState::fresh(layout, Tensor::randn([17], (Kind::Float, Device::Cpu))).unwrap();
        state.buffers.exp_avg = Tensor::randn([17], (Kind::Float, Device::Cpu));
        state.buffers.exp_avg_sq = Tensor::rand([17], (Kind::Float, Device::Cpu));
        (state.step, state.buffers.updates) = (9, 7);
        state
    }

    fn files(snapshot: &Snapshot) -> [Bytes; 3] {
        [0, 1, 2].map(|part| snapshot.file(part).concat().into())
    }

    #[test]
    fn a_state_reads_back_from_its_files_bit_for_bit() {
        let one = state(1);
        let written = one.snapshot(None).unwrap();
        let mut other = state(2);
        other.buffers.updates = 0;
        other.restore(&files(&written)).unwrap();
        let again = other.snapshot(None).unwrap();
        assert_eq!(other.buffers.updates, 7);
        // In the memory of another one, whose numbers are gone then.
        let kept = one.snapshot(Some(state(3).snapshot(None).unwrap())).unwrap();
        assert_eq!(files(&kept), files(&written));
        assert_eq!(files(&written), files(&again));
        for (part, file) in files(&written).iter().enumerate() {
            assert_eq!(written.digest(part), (file.len() as u64, blake3::hash(file)));
        }
        let [file, ..] = files(&written);
        let read = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("a.weight").unwrap().shape(), [3, 4]);
        assert_eq!(read.names().len(), 2);
    }

    /// An attempt to write a file may go on after it was given up, and a later one has succeeded.
    #[test]
    fn memory_that_is_still_read_is_not_written_to() {
        let (one, other) = (state(1), state(2));
        let written = one.snapshot(None).unwrap();
        let (memory, file) = (written.params.data_ptr(), written.file(0));
        let bytes = file.concat();
        assert_eq!(file[1].as_ptr() as usize, memory as usize, "nothing is copied");
        let next = other.snapshot(Some(written)).unwrap();
        assert!(next.params.data_ptr() != memory && file.concat() == bytes);
        let memory = next.params.data_ptr();
        assert_eq!(one.snapshot(Some(next)).unwrap().params.data_ptr(), memory);
    }

    #[test]
    fn a_state_is_copied_from_the_rank_that_has_it_bit_for_bit() {
        let mut source = state(1);
        source.ledger.add_tally(0, &ella_dataset::ledger::Tally { samples: 7, hash: 1 << 100 });
        let expected = files(&source.snapshot(None).unwrap());
        let ranks = crate::reduce::InProcess::group(3).into_iter().zip([state(2), source, state(3)]);
        let copies: Vec<TrainState> = std::thread::scope(|scope| {
            let copying: Vec<_> = ranks
                .map(|(mut ranks, mut state)| {
                    scope.spawn(move || {
                        state.step += u64::from(ranks.rank() != 1);
                        state.buffers.updates += u64::from(ranks.rank() != 1);
                        state.copy_from(&mut ranks, 1).unwrap();
                        state
                    })
                })
                .collect();
            copying.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for copy in copies {
            assert_eq!((copy.step, copy.buffers.updates, files(&copy.snapshot(None).unwrap())), (9, 7, expected.clone()));
            assert_eq!(copy.ledger.epochs().map(|(epoch, tally)| (epoch, tally.samples)).collect::<Vec<_>>(), [(0, 7)]);
        }
    }

    /// It loses a part of each tensor that it gets.
    #[derive(Debug)]
    struct Lossy(crate::reduce::InProcess);

    impl Collective for Lossy {
        fn rank(&self) -> u32 {
            self.0.rank()
        }
        fn world(&self) -> u32 {
            self.0.world()
        }
        fn sum_i64(&mut self, data: &mut [i64]) -> crate::reduce::Result<()> {
            self.0.sum_i64(data)
        }
        fn sum_f32(&mut self, data: &mut [f32]) -> crate::reduce::Result<()> {
            self.0.sum_f32(data)
        }
        fn sum_bf16(&mut self, data: &mut [half::bf16]) -> crate::reduce::Result<()> {
            self.0.sum_bf16(data)
        }
        fn broadcast(&mut self, root: u32, data: &mut [u8]) -> crate::reduce::Result<()> {
            self.0.broadcast(root, data)
        }
        fn barrier(&mut self) -> crate::reduce::Result<()> {
            self.0.barrier()
        }
        fn set_timeout(&mut self, timeout: std::time::Duration) {
            self.0.set_timeout(timeout);
        }
        fn abort_handle(&self) -> crate::reduce::AbortHandle {
            self.0.abort_handle()
        }
        fn broadcast_tensor(&mut self, root: u32, tensor: &mut Tensor) -> crate::reduce::Result<()> {
            self.0.broadcast_tensor(root, tensor)?;
            let _ = tensor.f_narrow(0, 9, 1)?.f_zero_()?;
            Ok(())
        }
    }

    #[test]
    fn a_copy_that_is_not_what_was_sent_is_not_trained_on() {
        let mut ranks = crate::reduce::InProcess::group(2);
        let (mut torn, mut root) = (Lossy(ranks.remove(1)), ranks.remove(0));
        let (sent, copied) = std::thread::scope(|scope| {
            let copying = scope.spawn(move || state(2).copy_from(&mut torn, 0));
            (scope.spawn(move || state(1).copy_from(&mut root, 0)).join().unwrap(), copying.join().unwrap())
        });
        assert!(sent.is_ok(), "{sent:?}");
        let error = copied.unwrap_err();
        assert!(matches!(error, CollectiveError::Torn { root: 0 }) && !error.is_of_peers(), "{error}");
    }

    #[test]
    fn the_number_of_updates_is_in_the_optimizers_header() {
        let file = |told: &[(&str, &str)]| {
            let metadata = told.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            Layout::new(Vec::new()).header(&[], &metadata)
        };
        assert_eq!(updates(&file(&[("step", "9"), ("updates", "7")])).unwrap(), 7);
        for told in [&[][..], &[("step", "9")], &[("updates", "many")]] {
            assert!(updates(&file(told)).unwrap_err().to_string().contains("another version"));
        }
    }

    #[test]
    fn views_share_the_buffers_storage() {
        let mut state = state(3);
        let views = state.layout.views(&state.buffers.params).unwrap();
        let _ = state.buffers.params.fill_(2.0);
        assert!(views.iter().all(|(_, v)| v.requires_grad() && v.min().double_value(&[]) == 2.0));
    }

    #[test]
    fn files_of_another_layout_are_refused_by_name() {
        let files = files(&state(1).snapshot(None).unwrap());
        let mut other = TrainState::fresh(
            Arc::new(Layout::new(vec![("a.weight".into(), vec![4, 3]), ("b".into(), vec![5])])),
            Tensor::zeros([17], (Kind::Float, Device::Cpu)),
        )
        .unwrap();
        let error = other.restore(&files).unwrap_err().to_string();
        assert!(error.contains("connector.safetensors") && error.contains("`a.weight`") && error.contains("[4, 3]"), "{error}");
        let mut garbage = files.clone();
        garbage[0] = Bytes::from_static(b"not a file at all");
        assert!(matches!(state(1).restore(&garbage), Err(StateError::NotSafetensors { .. })));
        let mut swapped = files;
        swapped[2] = swapped[0].clone();
        assert!(state(1).restore(&swapped).unwrap_err().to_string().contains("exp_avg.a.weight"));
    }
}
