//! One part of a plan on its way into shards.
//!
//! One thread reads the source, all cores decode and encode pictures, one thread writes rows in the order of the source, and the shard
//! before is stored meanwhile. Memory: one batch of samples waiting, one in work, the open shards (together at most one shard's bytes), and
//! the one being stored. The bytes that come out do not depend on the number of threads.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use ella_store::Store;
use rayon::prelude::*;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::judge::{Judge, Kept};
use super::{LatentEncoder, PrepareOptions, UnitWatch};
use crate::error::DataError;
use crate::manifest::{SCHEMA, ShardEntry, SourceEntry};
use crate::picture::Scratch;
use crate::plan::{Plan, SHARDS, UnitRecord, create_file, restore_file};
use crate::report::{Refusal, Report};
use crate::settings::CAPTION_FIELDS;
use crate::shard::{Row, RowRef, ShardLayout, ShardReader, ShardWriter};
use crate::source::{Member, Piece, PieceRead, Sample, Source, SourceKind, Within};

/// A batch of samples is handed to the cores at this many encoded bytes.
const BATCH_BYTES: usize = 32 << 20;
/// Samples of a batch for every thread.
const BATCH_PER_THREAD: usize = 16;
/// Fields of samples that an error names.
const FIELDS_NAMED: usize = 24;
/// Of fewer samples without a caption nothing is concluded.
const FEW_SAMPLES: usize = 16;
/// Pictures of all sizes that wait for their latents take at most this, and one more.
const WAITING_BYTES: usize = 64 << 20;

type Size = (u32, u32);

/// What a unit of work is.
pub(super) struct Work<'a> {
    pub(super) plan: &'a Plan,
    /// The name of its files.
    pub(super) unit: String,
    pub(super) source: &'a Source,
    pub(super) piece: Piece,
    pub(super) judge: Judge,
    /// What was done before, if a shard of it was lost.
    pub(super) there: Option<UnitRecord>,
}

/// Prepares one part and writes its record.
pub(super) async fn run(work: Work<'_>, out: &Store, options: &PrepareOptions, watch: UnitWatch) -> Result<UnitRecord, DataError> {
    let source = work.source;
    let stopped = |what: String| DataError::Stopped { source_name: source.name().to_owned(), what };
    let threads = options.threads();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| stopped(e.to_string()))?;
    let stop = Arc::new(AtomicBool::new(false));
    // Dropping this future (a signal, an error beside it) ends the threads at their next batch.
    let _guard = StopOnDrop(Arc::clone(&stop));

    let (to_cores, from_source) = sync_channel(0);
    let (reading, piece) = (source.clone(), work.piece.clone());
    let unseen = Unseen::of(work.plan);
    let read = tokio::task::spawn_blocking(move || read_source(&reading, &piece, unseen, &to_cores, threads * BATCH_PER_THREAD));
    let mut unit = Unit::new(&work, out, options, pool);
    let rows = tokio::task::spawn_blocking(move || {
        unit.run(&work.judge, &from_source, &stop, |report| watch(report))?;
        Ok(unit)
    });
    let unit: Result<Unit, DataError> = rows.await.map_err(|e| stopped(e.to_string()))?;
    let read: Result<(), DataError> = read.await.map_err(|e| stopped(e.to_string()))?;
    // A unit that failed stops its reader, so its error comes first; a broken source ends its unit early, but well.
    let unit = unit?;
    read?;
    unit.record(source, &work.piece, out).await
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Fields that were named for captions (or the usual ones, where there is one source only), while no sample had any of them.
struct Unseen {
    fields: Vec<String>,
    /// Whether samples had others instead.
    others: bool,
    samples: usize,
    /// There is no other source.
    alone: bool,
}

impl Unseen {
    fn of(plan: &Plan) -> Unseen {
        let alone = plan.sources.len() == 1;
        let usual = || CAPTION_FIELDS.map(str::to_owned).to_vec();
        let named = plan.settings.captions.iter().map(|column| match &column.field {
            Some(field) => Some(vec![field.clone()]),
            None => alone.then(usual),
        });
        let fields = named.collect::<Option<Vec<_>>>().unwrap_or_default().concat();
        Unseen { fields, others: false, samples: 0, alone }
    }

    /// Costs nothing once one was seen, as mostly in the first sample.
    fn look(&mut self, sample: &Sample) {
        if self.fields.is_empty() {
            return;
        }
        self.samples += 1;
        if self.fields.iter().any(|field| sample.fields.contains_key(field)) {
            return self.fields.clear();
        }
        self.others |= !sample.fields.is_empty();
    }

    /// Where no sample of a whole source has any, that is an error of whoever named them: refusing all samples one by one would not tell.
    /// A small tar or list among others may be just a bad one. Parts of a list of JSON may differ, so then the others are looked at.
    fn judge(self, source: &Source, piece: &Piece) -> Result<(), DataError> {
        let has_columns = matches!(source.kind(), SourceKind::Parquet | SourceKind::Csv);
        let few = !(has_columns || self.alone) && self.samples < FEW_SAMPLES;
        if self.fields.is_empty() || !self.others || few {
            return Ok(());
        }
        let of_json = matches!(source.kind(), SourceKind::Jsonl | SourceKind::Json);
        if of_json && piece.bytes != (0..source.bytes()) && source.has_field(&self.fields)? {
            return Ok(());
        }
        let found = fields_of(source.clone(), piece)?;
        Err(DataError::CaptionField { source_name: source.name().to_owned(), fields: self.fields.join(", "), found })
    }
}

/// The fields that the first samples of a source have, those within others too; as much as a message holds.
pub(super) fn fields_of(source: Source, piece: &Piece) -> Result<String, DataError> {
    let (mut found, mut samples) = (BTreeSet::new(), 0);
    source.with(Within::Texts).read(piece, &mut |sample| {
        samples += 1;
        let room = FIELDS_NAMED - found.len().min(FIELDS_NAMED);
        found.extend(sample.fields.into_keys().take(room));
        samples < FEW_SAMPLES || found.is_empty()
    })?;
    Ok(found.into_iter().collect::<Vec<String>>().join(", "))
}

fn read_source(
    source: &Source,
    piece: &Piece,
    mut unseen: Unseen,
    to: &SyncSender<FromSource>,
    batch_samples: usize,
) -> Result<(), DataError> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    let read = source.read(piece, &mut |sample| {
        unseen.look(&sample);
        bytes += if let Member::Data(image) = &sample.image { image.len() } else { 0 };
        batch.push(sample);
        if batch.len() < batch_samples && bytes < BATCH_BYTES {
            return true;
        }
        bytes = 0;
        to.send(FromSource::Samples(std::mem::take(&mut batch))).is_ok()
    })?;
    if let Some(read) = read {
        unseen.judge(source, piece)?;
        // Nobody listens any more only where the unit has failed, and says so itself.
        let _ = to.send(FromSource::Samples(batch)).and_then(|()| to.send(FromSource::End(read)));
    }
    Ok(())
}

/// What the source's thread hands over. Without an end the source was broken, or reading was stopped.
enum FromSource {
    Samples(Vec<Sample>),
    End(PieceRead),
}

/// One part on its way into shards.
struct Unit {
    name: String,
    shard_bytes: u64,
    layout: ShardLayout,
    out: Store,
    encoder: Option<Arc<dyn LatentEncoder>>,
    pool: rayon::ThreadPool,
    /// Samples whose latents are still to be made, by the size of their pictures.
    waiting: BTreeMap<Size, Vec<Kept>>,
    open: BTreeMap<Size, ShardWriter>,
    storing: Option<JoinHandle<Result<ShardEntry, DataError>>>,
    closed: usize,
    shards: Vec<ShardEntry>,
    /// The shards that a record names, if one is there: one that was lost must become the same again.
    recorded: Vec<ShardEntry>,
    seen: HashSet<String>,
    keys: Vec<String>,
    contents: Vec<String>,
    looks: Vec<String>,
    report: Report,
    read: Option<PieceRead>,
}

impl Unit {
    fn new(work: &Work<'_>, out: &Store, options: &PrepareOptions, pool: rayon::ThreadPool) -> Unit {
        let settings = &work.plan.settings;
        let captions = settings.captions.iter().map(|column| column.name.clone()).collect();
        Unit {
            name: work.unit.clone(),
            shard_bytes: settings.shard_bytes,
            layout: ShardLayout { captions, pictures: true, images: settings.images, moments: None },
            out: out.clone(),
            encoder: options.latents.clone(),
            pool,
            waiting: BTreeMap::new(),
            open: BTreeMap::new(),
            storing: None,
            closed: 0,
            shards: Vec::new(),
            recorded: work.there.iter().flat_map(|record| record.shards.clone()).collect(),
            seen: HashSet::new(),
            keys: Vec::new(),
            contents: Vec::new(),
            looks: Vec::new(),
            report: Report::default(),
            read: None,
        }
    }

    fn run(&mut self, judge: &Judge, from: &Receiver<FromSource>, stop: &AtomicBool, watch: impl Fn(&Report)) -> Result<(), DataError> {
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
            let each = |scratch: &mut Scratch, sample| judge.judge(sample, scratch);
            let judged: Vec<_> = self.pool.install(|| samples.into_par_iter().map_init(Scratch::default, each).collect());
            for (key, result) in judged {
                self.take(key, result)?;
            }
            watch(&self.report);
        }
        // Rows of a source that was not read to its end must not become a shard: the whole one would make another of its name.
        if self.read.is_some() {
            let sizes: Vec<Size> = self.waiting.keys().copied().collect();
            sizes.into_iter().try_for_each(|size| self.encode_waiting(size))?;
            while let Some(size) = self.open.keys().next().copied() {
                self.close_shard(size)?;
            }
        }
        self.stored()
    }

    fn take(&mut self, key: String, result: Result<Kept, Refusal>) -> Result<(), DataError> {
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
        self.keys.push(key);
        self.contents.extend(kept.content.take());
        self.looks.extend(kept.look.take());
        let size = kept.size;
        match self.encoder.as_ref().map(|encoder| encoder.batch().max(1)) {
            None => self.push(size, kept.row),
            Some(batch) => {
                let waiting = self.waiting.entry(size).or_default();
                waiting.push(kept);
                if waiting.len() < batch { self.bound_waiting() } else { self.encode_waiting(size) }
            }
        }
    }

    /// With many sizes, batches that never fill would hold much: the largest is encoded as it is.
    fn bound_waiting(&mut self) -> Result<(), DataError> {
        let bytes = |waiting: &Vec<Kept>| waiting.iter().map(|kept| kept.rgb.len()).sum::<usize>();
        if self.waiting.values().map(bytes).sum::<usize>() <= WAITING_BYTES {
            return Ok(());
        }
        let largest = self.waiting.iter().max_by_key(|(_, waiting)| bytes(waiting)).map(|(size, _)| *size);
        largest.map_or(Ok(()), |size| self.encode_waiting(size))
    }

    fn encode_waiting(&mut self, size: Size) -> Result<(), DataError> {
        let waiting = self.waiting.remove(&size).unwrap_or_default();
        let Some(encoder) = self.encoder.clone().filter(|_| !waiting.is_empty()) else { return Ok(()) };
        let rgb: Vec<u8> = waiting.iter().flat_map(|kept| kept.rgb.iter().copied()).collect();
        let len = encoder.spec().numbers(size);
        let moments = encoder.encode(&rgb, waiting.len(), size).map_err(DataError::Latents)?;
        if len == 0 || moments.len() != waiting.len() * len {
            let what = format!("expected {} × {len} numbers, found {}", waiting.len(), moments.len());
            return Err(DataError::Latents(what.into()));
        }
        for (mut kept, moments) in waiting.into_iter().zip(moments.chunks_exact(len)) {
            kept.row.moments = moments.to_vec();
            self.push(size, kept.row)?;
        }
        Ok(())
    }

    fn layout(&self, size: Size) -> ShardLayout {
        ShardLayout { moments: self.encoder.as_ref().map(|encoder| encoder.spec().numbers(size)), ..self.layout.clone() }
    }

    fn push(&mut self, size: Size, row: Row) -> Result<(), DataError> {
        if !self.open.contains_key(&size) {
            let shard = ShardWriter::new(self.layout(size))?;
            self.open.insert(size, shard);
        }
        if let Some(shard) = self.open.get_mut(&size) {
            shard.push(row)?;
        }
        // All open shards together hold as much as one may: the largest is closed.
        let open: u64 = self.open.values().map(ShardWriter::bytes).sum();
        if open < self.shard_bytes {
            return Ok(());
        }
        let largest = self.open.iter().max_by_key(|(_, shard)| shard.bytes()).map(|(size, _)| *size);
        largest.map_or(Ok(()), |size| self.close_shard(size))
    }

    /// Finishes a shard and stores it while the next one fills.
    fn close_shard(&mut self, size: Size) -> Result<(), DataError> {
        let Some(shard) = self.open.remove(&size) else { return Ok(()) };
        let rows = shard.rows();
        let file = shard.finish()?;
        let name = format!("{SHARDS}/{}-{:04}.arrow", self.name, self.closed);
        let entry = ShardEntry { size: Some(size), ..ShardEntry::of(name, rows, &file) };
        self.stored()?;
        let recorded = self.recorded.get(self.closed).cloned();
        self.closed += 1;
        let (out, layout) = (self.out.clone(), self.layout(size));
        self.storing = Some(Handle::current().spawn(async move {
            if let Some(recorded) = recorded {
                return restore_file(&out, &recorded, file).await.map(|()| recorded);
            }
            let ours = file.clone();
            create_file(&out, entry, file, move |there| same_samples(&ours, there, &layout)).await
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

    /// Writes the record of what was done.
    async fn record(self, source: &Source, piece: &Piece, out: &Store) -> Result<UnitRecord, DataError> {
        let stopped = |what: String| DataError::Stopped { source_name: source.name().to_owned(), what };
        let read = self.read.ok_or_else(|| stopped("interrupted".into()))?;
        let whole = source.kind() == SourceKind::Tar;
        if whole && read.bytes != source.bytes() {
            return Err(stopped(format!("the file changed meanwhile (expected {} bytes, found {})", source.bytes(), read.bytes)));
        }
        let entry = SourceEntry {
            name: source.file_name().to_owned(),
            rows: (!whole).then(|| piece.rows.clone()),
            bytes: read.bytes,
            blake3: read.blake3,
            read: self.report.read,
            kept: self.report.kept,
            ignored: read.ignored,
        };
        let record = UnitRecord {
            schema: SCHEMA,
            source: entry,
            stamp: source.stamp().map(str::to_owned),
            shards: self.shards,
            keys: self.keys,
            contents: self.contents,
            looks: self.looks,
            report: self.report,
        };
        record.write(&self.name, out).await?;
        Ok(record)
    }
}

/// Whether two shards hold the same samples, even if another machine's arithmetic made other bytes of their pictures.
fn same_samples(a: &Bytes, b: &Bytes, layout: &ShardLayout) -> bool {
    let open = |bytes: &Bytes| ShardReader::open("shard", bytes.clone(), layout.clone());
    let (Ok(a), Ok(b)) = (open(a), open(b)) else { return false };
    let same_row = |(a, b): (RowRef<'_>, RowRef<'_>)| {
        let captions = (0..layout.captions.len()).all(|column| a.caption_in(column) == b.caption_in(column));
        captions && (a.key, a.original, a.crop) == (b.key, b.original, b.crop)
    };
    a.rows() == b.rows() && a.iter().zip(b.iter()).all(same_row)
}
