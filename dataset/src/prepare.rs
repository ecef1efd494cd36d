//! From sources to prepared shards.
//!
//! Per source: one thread reads it, all cores decode and encode pictures, one thread writes rows in the order of the source,
//! and the shard before is stored meanwhile. Memory: one batch of samples waiting, one in work, two shards. The bytes that come
//! out do not depend on the number of threads.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use ella_store::{Digest, Hasher, Store};
use fast_image_resize::Resizer;
use half::f16;
use rayon::prelude::*;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::caption;
use crate::error::DataError;
use crate::manifest::{LatentSpec, SCHEMA, Settings, ShardEntry, SourceEntry};
use crate::picture::{self, PictureRules};
use crate::plan::{KeyIndex, Plan, UnitRecord, create_file};
use crate::report::{Refusal, Report};
use crate::shard::{Row, ShardLayout, ShardReader, ShardWriter};
use crate::source::{Member, Piece, PieceRead, Sample, Source};

/// A batch of samples is handed to the cores at this many encoded bytes.
const BATCH_BYTES: usize = 64 << 20;
/// Samples of a batch for every thread.
const BATCH_PER_THREAD: usize = 16;

/// Turns pictures into VAE moments. Implemented where the networks are.
pub trait LatentEncoder: Send + Sync {
    /// Which network this is, and the shape of what it makes.
    fn spec(&self) -> LatentSpec;
    /// Pictures encoded at once; a unit's last batch may have fewer.
    fn batch(&self) -> usize;
    /// Encodes `count` pictures: 8-bit RGB `[count, side, side, 3]` to moments `[count, channels, height, width]`.
    fn encode(&self, rgb: &[u8], count: usize, side: u32) -> Result<Vec<f16>, Box<dyn std::error::Error + Send + Sync>>;
}

/// How far preparing has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Sources finished.
    pub sources_done: usize,
    /// Sources in all.
    pub sources: usize,
    /// Bytes of the sources that are finished.
    pub bytes_done: u64,
    /// Bytes of all sources.
    pub bytes: u64,
    /// Samples read so far.
    pub read: u64,
    /// Samples kept so far.
    pub kept: u64,
}

/// Is told of progress.
pub type Watch = Arc<dyn Fn(&Progress) + Send + Sync>;

/// What does not change the result: threads, and who watches. And the encoder, which does.
#[derive(Clone, Default)]
pub struct PrepareOptions {
    /// Threads that decode and encode pictures; 0: one for every core.
    pub threads: usize,
    /// Makes latents.
    pub latents: Option<Arc<dyn LatentEncoder>>,
    /// Called after every batch of samples.
    pub progress: Option<Watch>,
}

impl fmt::Debug for PrepareOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let latents = self.latents.as_ref().map(|encoder| encoder.spec());
        f.debug_struct("PrepareOptions").field("threads", &self.threads).field("latents", &latents).finish_non_exhaustive()
    }
}

/// Prepares sources into a data set. Finished sources are skipped, so that the same call after an interruption goes on,
/// and makes the same bytes. Must run in a tokio runtime.
pub async fn prepare(sources: &[Source], out: &Store, settings: &Settings, options: &PrepareOptions) -> Result<Report, DataError> {
    let plan = Plan::new(settings, options.latents.as_ref().map(|encoder| encoder.spec()), sources)?;
    plan.claim(out).await?;
    let bytes = sources.iter().map(Source::bytes).sum();
    let mut progress = Progress { sources: sources.len(), bytes, ..Progress::default() };
    let mut keys = KeyIndex::default();
    for (index, source) in sources.iter().enumerate() {
        let record = prepare_unit(&plan, index, source, out, Work { options, progress: progress.clone() }).await?;
        keys.add(&plan, index, &record, out).await?;
        progress.sources_done += 1;
        progress.bytes_done += source.bytes();
        progress.read += record.report.read;
        progress.kept += record.report.kept;
        if let Some(watch) = &options.progress {
            watch(&progress);
        }
    }
    plan.finish(out).await
}

/// How a unit is to be done, and what was done before it.
#[derive(Debug)]
pub struct Work<'a> {
    /// Threads, encoder, watcher.
    pub options: &'a PrepareOptions,
    /// Progress of earlier units; this unit's samples are added for the watcher.
    pub progress: Progress,
}

/// Prepares one source of a plan and writes its record, unless that is already there with all its shards.
pub async fn prepare_unit(plan: &Plan, index: usize, source: &Source, out: &Store, work: Work<'_>) -> Result<UnitRecord, DataError> {
    if let Some(record) = plan.record(index, out).await?
        && record.is_whole(out).await?
    {
        return Ok(record);
    }
    let stopped = |what: String| DataError::Stopped { source_name: source.name().to_owned(), what };
    let threads = match work.options.threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| stopped(e.to_string()))?;
    let stop = Arc::new(AtomicBool::new(false));
    // Dropping this future (a signal, an error beside it) ends the threads at their next batch.
    let _guard = StopOnDrop(Arc::clone(&stop));

    let (to_cores, from_source) = sync_channel(0);
    let (pieces, reading) = (source.pieces().await?, source.clone());
    let batch_samples = threads * BATCH_PER_THREAD;
    let reader = tokio::task::spawn_blocking(move || read_source(&reading, &pieces, &to_cores, batch_samples));

    let encoder = work.options.latents.clone();
    let layout =
        ShardLayout { pictures: true, images: plan.settings.images, moments: encoder.as_ref().map(|encoder| encoder.spec().len()) };
    let mut unit = Unit {
        name: plan.unit(index),
        prefix: prefix(&plan.settings, source),
        settings: plan.settings.clone(),
        out: out.clone(),
        encoder,
        layout,
        pool,
        waiting: Vec::new(),
        shard: None,
        storing: None,
        closed: 0,
        shards: Vec::new(),
        keys: Vec::new(),
        seen: HashSet::new(),
        report: Report::default(),
        read: None,
    };
    let (watch, mut progress) = (work.options.progress.clone(), work.progress);
    let before = (progress.read, progress.kept);
    let rows = tokio::task::spawn_blocking(move || {
        unit.run(&from_source, &stop, |report| {
            (progress.read, progress.kept) = (before.0 + report.read, before.1 + report.kept);
            if let Some(watch) = &watch {
                watch(&progress);
            }
        })?;
        Ok(unit)
    });
    let unit: Result<Unit, DataError> = rows.await.map_err(|e| stopped(e.to_string()))?;
    let reader: Result<(), DataError> = reader.await.map_err(|e| stopped(e.to_string()))?;
    // A unit that failed stops its reader, so its error comes first; a broken source ends its unit early, but well.
    let mut unit = unit?;
    reader?;
    let whole = unit.read.take().ok_or_else(|| stopped("interrupted".into()))?;
    let Report { read, kept, .. } = unit.report;
    let name = source.file_name().to_owned();
    let entry = SourceEntry { name, bytes: source.bytes(), blake3: whole.blake3, read, kept, ignored: whole.ignored };
    let record = UnitRecord { schema: SCHEMA, source: entry, shards: unit.shards, keys: unit.keys, report: unit.report };
    record.write(&unit.name, out).await?;
    Ok(record)
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn prefix(settings: &Settings, source: &Source) -> String {
    if settings.key_prefix { format!("{}/", source.stem()) } else { String::new() }
}

/// Reads a source piece by piece.
fn read_source(source: &Source, pieces: &[Piece], to: &SyncSender<FromSource>, batch_samples: usize) -> Result<(), DataError> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    let mut each = |sample: Sample| {
        bytes += if let Member::Data(image) = &sample.image { image.len() } else { 0 };
        batch.push(sample);
        if batch.len() < batch_samples && bytes < BATCH_BYTES {
            return true;
        }
        bytes = 0;
        to.send(FromSource::Samples(std::mem::take(&mut batch))).is_ok()
    };
    let mut reads = Vec::new();
    for piece in pieces {
        let Some(read) = source.read(piece, &mut each)? else { return Ok(()) };
        reads.push(read);
    }
    // Nobody listens any more only where the unit has failed, and says so itself.
    let _ = to.send(FromSource::Samples(batch)).and_then(|()| to.send(FromSource::End(whole(reads))));
    Ok(())
}

/// What reading all pieces of a source showed.
fn whole(reads: Vec<PieceRead>) -> PieceRead {
    let (mut hash, mut all) = (Hasher::new(), PieceRead { bytes: 0, blake3: Digest::of(b""), ignored: 0 });
    for read in &reads {
        hash.update(read.blake3.as_bytes());
        all = PieceRead { bytes: all.bytes + read.bytes, blake3: hash.finish(), ignored: all.ignored + read.ignored };
    }
    if let [one] = &reads[..] { one.clone() } else { all }
}

/// What the reader's thread hands over. Without an end the source was broken, or reading was stopped.
enum FromSource {
    Samples(Vec<Sample>),
    End(PieceRead),
}

/// A sample that passed the filters.
struct Kept {
    row: Row,
    /// `[side, side, 3]`, only where latents are made.
    rgb: Vec<u8>,
}

/// One source on its way into shards.
struct Unit {
    name: String,
    prefix: String,
    settings: Settings,
    out: Store,
    encoder: Option<Arc<dyn LatentEncoder>>,
    layout: ShardLayout,
    pool: rayon::ThreadPool,
    /// Rows whose latents are still to be made.
    waiting: Vec<Kept>,
    shard: Option<ShardWriter>,
    storing: Option<JoinHandle<Result<ShardEntry, DataError>>>,
    closed: usize,
    shards: Vec<ShardEntry>,
    keys: Vec<String>,
    seen: HashSet<String>,
    report: Report,
    read: Option<PieceRead>,
}

impl Unit {
    fn run(&mut self, from: &Receiver<FromSource>, stop: &AtomicBool, mut watch: impl FnMut(&Report)) -> Result<(), DataError> {
        while let Ok(received) = from.recv() {
            let samples = match received {
                FromSource::Samples(samples) => samples,
                FromSource::End(read) => {
                    self.read = Some(read);
                    break;
                }
            };
            if stop.load(Ordering::Relaxed) {
                return Err(DataError::Stopped { source_name: self.name.clone(), what: "interrupted".into() });
            }
            let (settings, latents) = (&self.settings, self.encoder.is_some());
            let judged: Vec<_> = self.pool.install(|| {
                let each = |resizer: &mut Resizer, sample| judge(sample, settings, latents, resizer);
                samples.into_par_iter().map_init(Resizer::new, each).collect()
            });
            for (key, result) in judged {
                self.take(key, result)?;
            }
            watch(&self.report);
        }
        // Rows of a source that was not read to its end must not become a shard: the whole one would make another of its name.
        if self.read.is_some() {
            self.encode_waiting()?;
            self.close_shard()?;
        }
        self.stored()
    }

    fn take(&mut self, key: String, result: Result<Kept, Refusal>) -> Result<(), DataError> {
        let key = format!("{}{key}", self.prefix);
        if !self.seen.insert(key.clone()) {
            self.report.refuse(key, Refusal::DuplicateKey);
            return Ok(());
        }
        let mut kept = match result {
            Ok(kept) => kept,
            Err(why) => {
                self.report.refuse(key, why);
                return Ok(());
            }
        };
        self.report.keep();
        kept.row.key = key;
        match self.encoder.as_ref().map(|encoder| encoder.batch().max(1)) {
            None => self.push(kept.row),
            Some(batch) => {
                self.waiting.push(kept);
                if self.waiting.len() < batch { Ok(()) } else { self.encode_waiting() }
            }
        }
    }

    fn encode_waiting(&mut self) -> Result<(), DataError> {
        let waiting = std::mem::take(&mut self.waiting);
        let Some(encoder) = self.encoder.clone().filter(|_| !waiting.is_empty()) else { return Ok(()) };
        let rgb: Vec<u8> = waiting.iter().flat_map(|kept| kept.rgb.iter().copied()).collect();
        let len = encoder.spec().len();
        let moments = encoder.encode(&rgb, waiting.len(), self.settings.resolution).map_err(DataError::Latents)?;
        if len == 0 || moments.len() != waiting.len() * len {
            let what = format!("expected {} × {len} numbers, found {}", waiting.len(), moments.len());
            return Err(DataError::Latents(what.into()));
        }
        for (mut kept, moments) in waiting.into_iter().zip(moments.chunks_exact(len)) {
            kept.row.moments = moments.to_vec();
            self.push(kept.row)?;
        }
        Ok(())
    }

    fn push(&mut self, row: Row) -> Result<(), DataError> {
        let mut shard = match self.shard.take() {
            Some(shard) => shard,
            None => ShardWriter::new(self.layout)?,
        };
        self.keys.push(row.key.clone());
        shard.push(row)?;
        let full = shard.bytes() >= self.settings.shard_bytes;
        self.shard = Some(shard);
        if full { self.close_shard() } else { Ok(()) }
    }

    /// Finishes the shard and stores it while the next one fills.
    fn close_shard(&mut self) -> Result<(), DataError> {
        let Some(shard) = self.shard.take() else { return Ok(()) };
        let rows = shard.rows();
        let file = shard.finish()?;
        let name = format!("shards/{}-{:04}.arrow", self.name, self.closed);
        let entry = ShardEntry::of(name, rows, &file);
        self.stored()?;
        self.closed += 1;
        let (out, layout) = (self.out.clone(), self.layout);
        self.storing = Some(Handle::current().spawn(async move {
            let ours = file.clone();
            create_file(&out, entry, file, move |there| same_samples(&ours, there, layout)).await
        }));
        Ok(())
    }

    /// Waits until the shard before is stored. The store's own deadlines bound this.
    fn stored(&mut self) -> Result<(), DataError> {
        let Some(storing) = self.storing.take() else { return Ok(()) };
        let stopped = |e: tokio::task::JoinError| DataError::Stopped { source_name: self.name.clone(), what: e.to_string() };
        self.shards.push(Handle::current().block_on(storing).map_err(stopped)??);
        Ok(())
    }
}

/// Whether two shards hold the same samples, even if another machine's arithmetic made other bytes of their pictures.
fn same_samples(a: &Bytes, b: &Bytes, layout: ShardLayout) -> bool {
    let open = |bytes: &Bytes| ShardReader::open("shard", bytes.clone(), layout);
    let (Ok(a), Ok(b)) = (open(a), open(b)) else { return false };
    a.iter().map(|row| (row.key, row.caption)).eq(b.iter().map(|row| (row.key, row.caption)))
}

/// Filters one sample and makes its picture. Pure: this is what runs on all cores.
fn judge(sample: Sample, settings: &Settings, latents: bool, resizer: &mut Resizer) -> (String, Result<Kept, Refusal>) {
    let kept = try_keep(&sample, settings, latents, resizer);
    (sample.key, kept)
}

fn try_keep(sample: &Sample, settings: &Settings, latents: bool, resizer: &mut Resizer) -> Result<Kept, Refusal> {
    if let Some(why) = sample.refused {
        return Err(why);
    }
    if !sample.key_is_utf8 {
        return Err(Refusal::KeyNotUtf8);
    }
    let bytes = match &sample.image {
        Member::Absent => return Err(Refusal::ImageMissing),
        Member::TooLarge => return Err(Refusal::ImageTooLarge),
        Member::Data(bytes) => bytes,
    };
    let caption = caption::of_sample(sample, settings)?;
    let rules = PictureRules { resolution: settings.resolution, min_edge: settings.min_edge, max_pixels: settings.max_pixels };
    let picture = picture::cut(bytes, &rules, resizer)?;
    let image = if settings.images { picture::encode_jpeg(&picture.rgb, settings.resolution, settings.jpeg_quality)? } else { Vec::new() };
    let row = Row { caption, original: picture.original, crop: picture.crop, image, ..Row::default() };
    Ok(Kept { row, rgb: if latents { picture.rgb } else { Vec::new() } })
}
