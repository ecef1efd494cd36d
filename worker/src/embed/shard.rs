//! The captions of one shard to its file of features: the unit of `ella embed`, and of a run that encodes ahead.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use ella_dataset::{Counts, DataError, FeatureSpec, FeatureSpool, FeatureWriter};
use ella_model::ModelError;
use ella_proto::config::Text;
use tch::{Device, Tensor};

use crate::device;
use crate::feed::{FeedError, stored_kind};
use crate::gpu::fault::{Fault, first_line};
use crate::gpu::pieces::in_pieces;
use crate::job::Tell;
use crate::text::{TextEncoder, TextOptions};

/// Most captions that go through the encoder at once, unless a job says otherwise.
pub const BATCH: usize = 32;

/// A caption's features as they are stored, and its tokens.
type Stored = (Vec<u8>, u32);

/// A text encoder that makes whole files of features.
#[derive(Debug)]
pub struct ShardEncoder {
    encoder: Mutex<TextEncoder>,
    spec: FeatureSpec,
    batch: usize,
    threads: usize,
    /// Whether a batch that a GPU's memory does not hold is halved.
    split: bool,
    /// The most captions that were found to fit.
    most: AtomicUsize,
}

impl ShardEncoder {
    /// Loads the encoder in a folder, whose features are `spec`. At most `batch` captions go through it at once, on so many threads.
    pub fn load(
        text: &Text,
        model: PathBuf,
        spec: FeatureSpec,
        device: Device,
        (batch, threads): (usize, usize),
    ) -> Result<Self, ModelError> {
        let Text { max_tokens, padding, layers, dtype, .. } = *text;
        let encoder = Mutex::new(TextEncoder::load(&TextOptions { model, max_tokens, padding, layers, dtype }, device)?);
        Ok(Self { encoder, spec, batch, threads, split: false, most: AtomicUsize::new(usize::MAX) })
    }

    /// The same, that halves batches for which a GPU's memory does not suffice, if `split`. A smaller batch may round elsewhere, so that the bytes
    /// depend on the GPU then.
    pub fn splitting(self, split: bool) -> Self {
        Self { split, ..self }
    }

    /// The feature file of some captions, in their order. Batches are of like length, so that little is computed for padding; which
    /// captions share one depends on the captions alone, so that the bytes do not depend on who computes them. `fits` is asked first, with the
    /// tokens of each caption that is there: whether the file can be stored.
    pub fn embed(
        &self,
        captions: &[String],
        fits: impl FnOnce(&[u32]) -> Result<(), DataError>,
        tell: &Tell,
    ) -> Result<(Bytes, Counts), FeedError> {
        let encoder = self.encoder();
        let there: Vec<usize> = (0..captions.len()).filter(|row| !captions[*row].is_empty()).collect();
        let texts: Vec<&str> = there.iter().map(|row| captions[*row].as_str()).collect();
        let lengths = if texts.is_empty() { Vec::new() } else { encoder.lengths(&texts)? };
        fits(&lengths.iter().map(|tokens| *tokens as u32).collect::<Vec<_>>())?;
        let mut by_length: Vec<(usize, usize)> = lengths.into_iter().zip(there).collect();
        by_length.sort_unstable();
        let mut spool = FeatureSpool::new(&self.spec, captions.len())?;
        let mut counts = Counts::from([("embedded".to_owned(), 0), ("absent".to_owned(), (captions.len() - by_length.len()) as u64)]);
        for group in by_length.chunks(self.batch.max(1)) {
            if tell.stopped() {
                return Err(FeedError::Died);
            }
            let texts: Vec<&str> = group.iter().map(|(_, row)| captions[*row].as_str()).collect();
            for ((_, row), (features, tokens)) in group.iter().zip(self.encode_within(&encoder, &texts, &mut counts)?) {
                spool.put(*row, &features, tokens)?;
            }
            tell.samples(group.len() as u64);
        }
        // Another thread's captions may be encoded while this file is put together.
        drop(encoder);
        Ok((spool.finish()?, counts))
    }

    /// The empty caption's feature file: for dropped captions in training, and for guidance without a negative prompt.
    pub fn embed_empty(&self) -> Result<Bytes, FeedError> {
        let mut writer = FeatureWriter::new(&self.spec)?;
        for (bytes, tokens) in self.encode(&self.encoder(), &[""], &mut Counts::new())? {
            writer.push(&bytes, tokens)?;
        }
        Ok(writer.finish()?)
    }

    fn encoder(&self) -> MutexGuard<'_, TextEncoder> {
        // The number of threads is the calling thread's own.
        device::set_threads(self.threads);
        self.encoder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stored features and tokens of some captions: as one batch, or as several where memory does not suffice (KNOWN) and that is allowed.
    fn encode_within(&self, encoder: &TextEncoder, texts: &[&str], counts: &mut Counts) -> Result<Vec<Stored>, FeedError> {
        let mut most = self.most.load(Relaxed);
        let pieces = in_pieces(texts.len(), &mut most, self.split, |piece| self.encode(encoder, &texts[piece], counts));
        self.most.store(most, Relaxed);
        let pieces = pieces.map_err(|error| match Fault::of(&error) {
            Some(Fault::OutOfMemory) => FeedError::Batch { said: first_line(&error), batch: texts.len().min(most) },
            _ => error,
        })?;
        if pieces.len() > 1 {
            *counts.entry("batches_split_for_memory".to_owned()).or_default() += 1;
        }
        Ok(pieces.into_iter().flatten().collect())
    }

    /// The stored features and tokens of some captions, as one batch.
    fn encode(&self, encoder: &TextEncoder, texts: &[&str], counts: &mut Counts) -> Result<Vec<Stored>, FeedError> {
        let rows = encoder.encode(texts)?;
        let kept: usize = rows.tokens.iter().sum();
        let computed = (rows.features.size()[0] * rows.features.size()[1]) as u64;
        for (name, count) in [
            ("embedded", texts.len() as u64),
            ("truncated", rows.truncated as u64),
            ("tokens_kept", kept as u64),
            ("tokens_computed", computed),
        ] {
            *counts.entry(name.to_owned()).or_default() += count;
        }
        let features = rows.features.f_to_kind(stored_kind(self.spec.dtype))?.f_to_device(Device::Cpu)?;
        let row = |(at, tokens): (usize, &usize)| {
            let tokens = *tokens as u32;
            Ok((row_bytes(&features.f_get(at as i64)?, tokens, &self.spec)?, tokens))
        };
        rows.tokens.iter().enumerate().map(row).collect()
    }
}

/// The positions that are stored of one caption's features `[S, E]`, little-endian.
fn row_bytes(row: &Tensor, tokens: u32, spec: &FeatureSpec) -> Result<Vec<u8>, tch::TchError> {
    let row = row.f_narrow(0, 0, i64::from(spec.stored_tokens(tokens)))?.f_contiguous()?;
    let mut bytes = vec![0u8; row.numel() * spec.dtype.bytes()];
    row.f_copy_data_u8(&mut bytes, row.numel())?;
    Ok(bytes)
}
