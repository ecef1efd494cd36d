//! `ella embed`: features of every caption of a data set, into sidecars. Each shard is one unit: written once, and skipped if it is
//! there, so that an interrupted run goes on where it was.

use crate::feed::{FeedError, stored_kind};
use crate::text::TextEncoder;
use ella_dataset::{DataSet, FeatureSpec, FeatureWriter};
use std::time::{Duration, Instant};
use tch::{Device, Tensor};
use tokio::runtime::Handle;

/// What an embedding run did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EmbedReport {
    /// Captions in the data set.
    pub captions: u64,
    /// Captions embedded now; the others had their features already.
    pub embedded: u64,
    /// Captions cut at the token limit, among those embedded now.
    pub truncated: u64,
    /// Tokens of the captions themselves.
    pub tokens_kept: u64,
    /// Tokens that went through the encoder, padding of batches included.
    pub tokens_computed: u64,
    /// Time of the encoder and the writing.
    pub took: Duration,
}

/// Embeds what has no features yet, in batches of at most `batch` captions of like length. `progress` hears how many captions are done.
pub fn embed(
    data: &DataSet,
    encoder: &TextEncoder,
    spec: &FeatureSpec,
    batch: usize,
    (runtime, progress): (&Handle, &mut dyn FnMut(u64)),
) -> Result<EmbedReport, FeedError> {
    let begin = Instant::now();
    let set = runtime.block_on(data.begin_features(spec))?;
    let missing = runtime.block_on(set.missing())?;
    let rows = |shard: usize| data.manifest().shards.get(shard).map_or(0, |s| s.rows);
    let todo: u64 = missing.iter().map(|shard| rows(*shard)).sum();
    let mut report = EmbedReport { captions: data.manifest().samples, ..EmbedReport::default() };
    let mut done = report.captions - todo;
    progress(done);
    for shard in missing {
        let reader = runtime.block_on(data.shard(shard))?;
        let captions: Vec<&str> = reader.iter().map(|row| row.caption).collect();
        let encoded = embed_captions(encoder, spec, &captions, batch, &mut report, &mut |more| {
            done += more;
            progress(done);
        })?;
        runtime.block_on(set.write(shard, captions.len() as u64, encoded))?;
        report.embedded += captions.len() as u64;
    }
    if !runtime.block_on(set.has_empty())? {
        // For dropped captions in training, and for guidance without a negative prompt.
        let file = embed_captions(encoder, spec, &[""], 1, &mut EmbedReport::default(), &mut |_| {})?;
        runtime.block_on(set.write_empty(file))?;
    }
    runtime.block_on(set.finish())?;
    report.took = begin.elapsed();
    Ok(report)
}

/// The feature file of some captions, in their order. Batches are of like length, so that little is computed for padding; which
/// captions share one depends on the captions alone, so that the bytes do not depend on who computes them.
fn embed_captions(
    encoder: &TextEncoder,
    spec: &FeatureSpec,
    captions: &[&str],
    batch: usize,
    report: &mut EmbedReport,
    progress: &mut dyn FnMut(u64),
) -> Result<bytes::Bytes, FeedError> {
    let lengths = encoder.lengths(captions)?;
    let mut by_length: Vec<usize> = (0..captions.len()).collect();
    by_length.sort_by_key(|row| (lengths[*row], *row));
    let mut stored: Vec<(Vec<u8>, u32)> = vec![(Vec::new(), 0); captions.len()];
    for group in by_length.chunks(batch.max(1)) {
        let texts: Vec<&str> = group.iter().map(|row| captions[*row]).collect();
        let rows = encoder.encode(&texts)?;
        report.truncated += rows.truncated as u64;
        report.tokens_kept += rows.tokens.iter().map(|t| *t as u64).sum::<u64>();
        report.tokens_computed += (rows.features.size()[0] * rows.features.size()[1]) as u64;
        let features = rows.features.f_to_kind(stored_kind(spec.dtype))?.f_to_device(Device::Cpu)?;
        for ((at, row), tokens) in group.iter().enumerate().zip(&rows.tokens) {
            let tokens = *tokens as u32;
            stored[*row] = (row_bytes(&features.f_get(at as i64)?, tokens, spec)?, tokens);
        }
        progress(group.len() as u64);
    }
    let mut writer = FeatureWriter::new(spec)?;
    // Each row is let go as it is written: a shard's features are large.
    for (bytes, tokens) in stored {
        writer.push(&bytes, tokens)?;
    }
    Ok(writer.finish()?)
}

/// The positions that are stored of one caption's features `[S, E]`, little-endian.
fn row_bytes(row: &Tensor, tokens: u32, spec: &FeatureSpec) -> Result<Vec<u8>, tch::TchError> {
    let row = row.f_narrow(0, 0, i64::from(spec.stored_tokens(tokens)))?.f_contiguous()?;
    let mut bytes = vec![0u8; row.numel() * spec.dtype.bytes()];
    row.f_copy_data_u8(&mut bytes, row.numel())?;
    Ok(bytes)
}
