//! Makes a step's input from the data set: which samples (ORDER), their latents, features and noise (NOISE).

use super::encoding::EncodingAhead;
use super::features::{LaneFeatures, Wanted};
use super::side::Side;
use super::staging::{Input, Staging};
use super::{Captions, Encoding, FeatureSource, FeedError, Identity, LaneInput, StepInput};
use crate::noise::{HELD_OUT, SampleNoise, Stream};
use crate::train::lane::LaneBatch;
use ella_dataset::ledger::{KeyHash, Tally};
use ella_dataset::order::{BucketOrder, OrderConfig, SampleRef, open_bytes};
use ella_dataset::{Ahead, DataSet, Reading, RowRef, decode_rgb};
use ella_model::vae::Vae;
use ella_proto::config::RunConfig;
use half::slice::HalfFloatSliceExt as _;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

/// What a feed reads, and what it encodes with.
#[derive(Debug)]
pub struct Parts {
    /// The run's config.
    pub config: Arc<RunConfig>,
    /// The prepared data set.
    pub data: Arc<DataSet>,
    /// The columns of captions that are trained on.
    pub captions: Arc<Captions>,
    /// Captions to features: of these columns, in their order.
    pub features: FeatureSource,
    /// Pictures to latents.
    pub vae: Vae,
    /// BLAKE3 of its weights: stored latents must be its own.
    pub vae_weights: String,
    /// Timesteps of the diffusion schedule.
    pub timesteps: u32,
    /// Where lanes are computed.
    pub device: Device,
    /// For reading.
    pub runtime: Handle,
    /// Digest of the frozen models.
    pub models_digest: String,
}

/// Everything that a step's input is made from.
#[derive(Debug)]
pub struct Sources {
    parts: Parts,
    order: Arc<BucketOrder>,
    identity: Identity,
    side: Side,
    staging: Staging,
    ahead: Option<Ahead>,
    encoding: Option<EncodingAhead>,
    /// The held-out batches, once they have been made.
    held_out: Option<Vec<LaneBatch>>,
    /// A sample without a caption was warned of.
    told_of_absent: bool,
}

/// One sample's row, without its picture.
struct Picked {
    at: SampleRef,
    key: String,
    /// One for each column.
    captions: Vec<String>,
    noise: SampleNoise,
    /// Width and height of the original, left and top of the crop.
    sizes: Option<[u32; 4]>,
}

/// The pictures of several samples.
enum Pictures {
    /// `[b, 2c, h, w]` on the device: means and log-variances.
    Moments(Tensor),
    /// `[b, 3, H, W]` float32 in −1…1, on the device.
    Rgb(Tensor),
}

/// What a run's order depends on besides its data set.
pub fn order_config(config: &RunConfig) -> OrderConfig {
    // The config's own rules keep all three within 32 bits.
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (train, window) = (&config.train, number(config.data.window));
    OrderConfig { seed: config.run.seed, lanes: number(train.lanes()), micro_batch: number(train.micro_batch), window }
}

impl Sources {
    /// Fixes the order, and checks that the data set suits the networks.
    pub fn new(parts: Parts) -> Result<Self, FeedError> {
        check_suited(&parts)?;
        let patience = LOOK.min(parts.config.workers.step_timeout.duration());
        parts.runtime.block_on(check_there(&parts.data, patience))?;
        let manifest = parts.data.manifest();
        let order = Arc::new(BucketOrder::new(order_config(&parts.config), &manifest.order_shards())?);
        let identity = Identity { data: parts.captions.identity(&parts.data), models: parts.models_digest.clone() };
        // All models are loaded by now.
        let side = Side::new(parts.device)?;
        let staging = Staging::new(parts.device, side);
        Ok(Self { parts, order, identity, side, staging, ahead: None, encoding: None, held_out: None, told_of_absent: false })
    }

    /// Begins to read ahead of a step, for these lanes and no others any more.
    pub(super) fn start_ahead(&mut self, lanes: &Range<u32>, step: u64) -> Result<(), FeedError> {
        let reading = Reading {
            data: Arc::clone(&self.parts.data),
            features: self.parts.features.sidecars().to_vec(),
            order: Arc::clone(&self.order),
            lanes: lanes.clone(),
        };
        self.warn_of_crowding(lanes);
        match (self.parts.features.encoding(), &self.encoding) {
            (Some(_), Some(ahead)) => ahead.turn_to(reading.clone(), step),
            (Some(encoding), None) => {
                self.encoding = Some(EncodingAhead::start(encoding, self.parts.device, reading.clone(), step)?);
            }
            (None, _) => {}
        }
        self.ahead = Some(Ahead::start(&self.parts.runtime, reading, step));
        self.held_out = None;
        Ok(())
    }

    /// Says so where the windows of these lanes do not fit into what there is for fetched files, for then they are fetched again and again.
    fn warn_of_crowding(&self, lanes: &Range<u32>) {
        let Parts { config, data, features, .. } = &self.parts;
        let sidecars: u64 = features.sidecars().iter().map(|features| features.bytes()).sum();
        let bytes = data.manifest().shards.iter().map(|shard| shard.bytes).sum::<u64>().saturating_add(sidecars);
        let needed = open_bytes(bytes, data.manifest().shards.len(), lanes.len(), config.data.window);
        let (key, limit) = match data.cache() {
            Some(_) => ("data.cache_bytes", config.data.cache_bytes),
            None => ("data.memory_bytes", config.data.memory_bytes),
        };
        if data.store().local_path().is_none() && needed > limit {
            let data = data.store().url();
            tracing::warn!(
                data,
                needed,
                limit,
                "the shards that this worker's lanes read at once do not fit into {key} and are fetched repeatedly; raise it, lower data.window, or copy \
                 the data set to this machine"
            );
        }
    }

    /// The stream that the thread which makes steps is to be on.
    pub(super) fn side(&self) -> Side {
        self.side
    }

    /// What encodes captions ahead, if anything does.
    pub(super) fn encoding(&self) -> Option<&Arc<Encoding>> {
        self.parts.features.encoding()
    }

    pub(super) fn data(&self) -> &Arc<DataSet> {
        &self.parts.data
    }

    pub(super) fn order(&self) -> Arc<BucketOrder> {
        self.order.clone()
    }

    pub(super) fn patience(&self) -> Duration {
        self.parts.config.workers.step_timeout.duration()
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The input of the step after `step` applied ones, for some lanes.
    pub(super) fn step(&mut self, step: u64, lanes: &Range<u32>) -> Result<StepInput, FeedError> {
        self.ahead.iter().for_each(|ahead| ahead.at(step));
        self.encoding.iter().for_each(|encoding| encoding.at(step));
        let epoch = self.order.position(step).epoch;
        let mut encode = Duration::ZERO;
        let mut inputs = Vec::with_capacity(lanes.len());
        for lane in lanes.clone() {
            inputs.push(self.lane(step, lane, epoch, &mut encode)?);
        }
        let held_out = if self.measures(step) { self.held_out(lanes)? } else { Vec::new() };
        let step_samples = self.order.batch_len(step);
        let made = self.side.mark()?;
        Ok(StepInput { step, epoch, step_samples, lanes: inputs, held_out, encode, waited: Duration::ZERO, made })
    }

    fn measures(&self, step: u64) -> bool {
        let train = &self.parts.config.train;
        train.eval_every > 0 && (step.is_multiple_of(train.eval_every) || step + 1 == train.steps)
    }

    fn lane(&mut self, step: u64, lane: u32, epoch: u64, encode: &mut Duration) -> Result<LaneInput, FeedError> {
        let samples = self.order.lane(step, lane);
        let mut tally = Tally::default();
        if samples.is_empty() {
            return Ok(LaneInput { lane, batch: None, keys: Vec::new(), tally, dropped: 0, absent: 0, truncated: 0 });
        }
        let (picked, pictures) = self.pick(&samples, epoch)?;
        for sample in &picked {
            tally.add(KeyHash::of(&sample.key));
        }
        let dropout = self.parts.config.train.caption_dropout;
        let wanted: Vec<Wanted> = picked.iter().map(|p| self.wanted(p, p.noise.dropped(dropout))).collect();
        let absent: Vec<&Picked> = picked.iter().filter(|p| self.parts.captions.choose(&p.captions, &p.noise).is_none()).collect();
        if let Some(first) = absent.first()
            && !std::mem::replace(&mut self.told_of_absent, true)
        {
            let (data, key) = (self.parts.data.store().url(), &first.key);
            let columns = self.parts.captions.names().collect::<Vec<_>>().join(", ");
            tracing::warn!(
                data,
                key,
                columns,
                "a sample has no caption in the columns that are trained on, and is trained on the empty one; all such are counted as captions_absent"
            );
        }
        let absent = absent.len() as i64;
        let dropped = wanted.iter().filter(|w| w.place.is_none()).count() as i64 - absent;
        let (batch, truncated) = self.batch(&picked, pictures, &wanted, encode)?;
        let keys = picked.into_iter().map(|sample| sample.key).collect();
        Ok(LaneInput { lane, batch: Some(batch), keys, tally, dropped, absent, truncated })
    }

    /// The first samples of the data set under noise that no epoch has; each lane's share of them.
    fn held_out(&mut self, lanes: &Range<u32>) -> Result<Vec<LaneBatch>, FeedError> {
        if self.held_out.is_none() {
            self.held_out = Some(self.make_held_out(lanes)?);
        }
        Ok(self.held_out.iter().flatten().map(LaneBatch::shallow_clone).collect())
    }

    fn make_held_out(&mut self, lanes: &Range<u32>) -> Result<Vec<LaneBatch>, FeedError> {
        let (micro_batch, all_lanes) = (self.parts.config.train.micro_batch, self.parts.config.train.lanes());
        let count = (self.parts.config.train.eval_samples as u64).min(self.order.samples());
        let all: Vec<SampleRef> = (0..count).filter_map(|index| self.order.sample_at(index)).collect();
        let mut batches = Vec::new();
        // A batch has pictures of one size.
        let size = |at: &SampleRef| self.parts.data.manifest().shards.get(at.shard as usize).and_then(|shard| shard.size);
        let groups: Vec<&[SampleRef]> = all.chunk_by(|a, b| size(a) == size(b)).flat_map(|group| group.chunks(micro_batch)).collect();
        for (group, samples) in groups.into_iter().enumerate() {
            if !lanes.contains(&((group % all_lanes) as u32)) {
                continue;
            }
            let (picked, pictures) = self.pick(samples, HELD_OUT)?;
            let wanted: Vec<Wanted> = picked.iter().map(|p| self.wanted(p, false)).collect();
            batches.push(self.batch(&picked, pictures, &wanted, &mut Duration::default())?.0);
        }
        Ok(batches)
    }

    /// The rows of some samples, in their order, and their pictures. Each row is copied once, into the batch.
    fn pick(&mut self, samples: &[SampleRef], epoch: u64) -> Result<(Vec<Picked>, Pictures), FeedError> {
        if let Some(encoding) = self.parts.features.encoding() {
            // Of dropped captions too: after an epoch every shard has its features.
            samples.iter().try_for_each(|at| encoding.have(at.shard))?;
        }
        let mut picked: Vec<Option<Picked>> = samples.iter().map(|_| None).collect();
        let (seed, parts) = (self.parts.config.run.seed, &self.parts);
        let mut note = |i: usize, row: &RowRef<'_>| {
            let noise = SampleNoise::new(seed, epoch, KeyHash::of(row.key).0 as u64);
            let sizes = row.original.zip(row.crop).map(|(original, crop)| [original.0, original.1, crop.0, crop.1]);
            picked[i] = Some(Picked { at: samples[i], key: row.key.to_owned(), captions: parts.captions.of_row(row), noise, sizes });
        };
        let pictures = match &parts.data.manifest().latents {
            Some(spec) => {
                let size = samples.first().and_then(|at| parts.data.manifest().shards.get(at.shard as usize)?.size).unwrap_or_default();
                let [channels, height, width] = spec.shape(size).map(|side| side as i64);
                let shape = [samples.len() as i64, channels, height, width];
                let copy = |bytes: &mut [u8]| copy_moments(parts, samples, bytes, &mut note);
                Pictures::Moments(self.staging.assemble(Input::Moments, (&shape, Kind::Half), copy)?)
            }
            None => Pictures::Rgb(decode(parts, samples, &mut self.staging, &mut note)?),
        };
        let mut picked: Vec<Picked> = picked.into_iter().flatten().collect();
        for sample in &mut picked {
            parts.runtime.block_on(parts.captions.fill(sample.at, &mut sample.captions))?;
        }
        Ok((picked, pictures))
    }

    /// The caption that is taken of a sample; a dropped one, and a sample that has none, is the empty caption.
    fn wanted(&self, sample: &Picked, dropped: bool) -> Wanted {
        match self.parts.captions.choose(&sample.captions, &sample.noise).filter(|_| !dropped) {
            Some(column) => Wanted { caption: sample.captions[column].clone(), place: Some(sample.at), column },
            None => Wanted { caption: String::new(), place: None, column: 0 },
        }
    }

    fn batch(
        &mut self,
        picked: &[Picked],
        pictures: Pictures,
        wanted: &[Wanted],
        encode: &mut Duration,
    ) -> Result<(LaneBatch, i64), FeedError> {
        let begin = Instant::now();
        let device = self.parts.device;
        let latents = self.latents(picked, pictures)?;
        let features = self.parts.features.lane(wanted, &mut self.staging, &self.parts.runtime)?;
        *encode += begin.elapsed();
        let noise = self.normals(picked, Stream::Noise, &latents.size())?;
        let timesteps: Vec<i64> = picked.iter().map(|p| p.noise.timestep(self.parts.timesteps)).collect();
        let timesteps = Tensor::f_from_slice(&timesteps)?.f_to_device(device)?;
        let time_ids = self.time_ids(picked, &latents)?;
        let LaneFeatures { features, mask, truncated } = features;
        Ok((LaneBatch { latents, noise, timesteps, features, mask, time_ids }, truncated))
    }

    /// SDXL's micro-conditioning `[b, 6]`, as diffusers' `train_text_to_image_sdxl.py` has it: the original's size, and the crop in pixels of
    /// the resized picture, height before width. A dropped caption's sample keeps its own.
    fn time_ids(&self, picked: &[Picked], latents: &Tensor) -> Result<Tensor, FeedError> {
        let (_, _, height, width) = latents.size4()?;
        let downscale = self.parts.vae.config().downscale();
        let target = [height * downscale, width * downscale];
        let mut ids = Vec::with_capacity(6 * picked.len());
        for sample in picked {
            let [width, height, left, top] = sample.sizes.ok_or_else(|| bad_row(&self.parts, &sample.key, "it has no size and crop"))?;
            ids.extend([height, width, top, left].map(i64::from));
            ids.extend(target);
        }
        Ok(Tensor::f_from_slice(&ids)?.f_reshape([-1, 6])?.f_to_kind(Kind::Float)?.f_to_device(self.parts.device)?)
    }

    /// Scaled latents `[b, 4, h, w]` float32, drawn from the VAE's posterior (paper §2: latents are samples, not means).
    fn latents(&mut self, picked: &[Picked], pictures: Pictures) -> Result<Tensor, FeedError> {
        let (mean, logvar) = match pictures {
            Pictures::Moments(both) => {
                let half = both.size()[1] / 2;
                (both.f_narrow(1, 0, half)?, both.f_narrow(1, half, half)?)
            }
            Pictures::Rgb(images) => {
                // A new size may have cuDNN search, which waits for the device.
                let _unrecorded = ella_cuda::graph::unrecorded();
                tch::no_grad(|| self.parts.vae.encode(&images))?
            }
        };
        let (mean, logvar) = (mean.f_to_kind(Kind::Float)?, logvar.f_to_kind(Kind::Float)?);
        let noise = self.normals(picked, Stream::Posterior, &mean.size())?;
        let sample = mean.f_add(&logvar.f_mul_scalar(0.5)?.f_exp()?.f_mul(&noise)?)?;
        Ok(self.parts.vae.scale(&sample)?)
    }

    /// Each sample's own normal numbers, `[b, ...]` float32 on the device.
    fn normals(&mut self, picked: &[Picked], stream: Stream, shape: &[i64]) -> Result<Tensor, FeedError> {
        let each = shape[1..].iter().product::<i64>() as usize;
        self.staging.assemble(Input::Normals, (shape, Kind::Float), |bytes| {
            let numbers: &mut [f32] = bytemuck::cast_slice_mut(bytes);
            for (sample, slot) in picked.iter().zip(numbers.chunks_mut(each.max(1))) {
                sample.noise.normals(stream, slot);
            }
            Ok(())
        })
    }
}

/// Copies the samples' moments into `out`, one after the other, and shows each row to `note`.
fn copy_moments(parts: &Parts, samples: &[SampleRef], out: &mut [u8], note: &mut impl FnMut(usize, &RowRef<'_>)) -> Result<(), FeedError> {
    let each = out.len() / samples.len().max(1);
    parts.runtime.block_on(parts.data.rows(samples, |i, row| {
        let moments = row.moments.ok_or_else(|| bad_row(parts, row.key, "it has no moments"))?;
        let bytes: &[u8] = bytemuck::cast_slice(moments.reinterpret_cast());
        let slot = out.get_mut(i * each..(i + 1) * each).filter(|slot| slot.len() == bytes.len());
        slot.ok_or_else(|| bad_row(parts, row.key, "its moments have another shape"))?.copy_from_slice(bytes);
        note(i, &row);
        Ok(())
    }))
}

/// The samples' pictures `[b, 3, H, W]` float32 in −1…1, on the device; each row is shown to `note`.
fn decode(
    parts: &Parts,
    samples: &[SampleRef],
    staging: &mut Staging,
    note: &mut impl FnMut(usize, &RowRef<'_>),
) -> Result<Tensor, FeedError> {
    let mut pictures: Vec<(Vec<u8>, [i64; 3])> = samples.iter().map(|_| Default::default()).collect();
    parts.runtime.block_on(parts.data.rows(samples, |i, row| {
        let bytes = row.image.ok_or_else(|| bad_row(parts, row.key, "it has no picture"))?;
        let (rgb, width, height) = decode_rgb(bytes).map_err(|refusal| bad_row(parts, row.key, &format!("its picture is {refusal}")))?;
        pictures[i] = (rgb, [i64::from(height), i64::from(width), 3]);
        note(i, &row);
        Ok::<_, FeedError>(())
    }))?;
    let [height, width, channels] = pictures.first().map_or([0; 3], |(_, shape)| *shape);
    let shape = [pictures.len() as i64, height, width, channels];
    // As bytes, which are a quarter of what they become there.
    let pixels = staging.assemble(Input::Pictures, (&shape, Kind::Uint8), |bytes| {
        let each = (bytes.len() / pictures.len().max(1)).max(1);
        for ((rgb, found), slot) in pictures.iter().zip(bytes.chunks_mut(each)) {
            if rgb.len() != slot.len() || *found != [height, width, channels] {
                let what = format!("pictures of one lane have several sizes ({found:?} and {:?})", [height, width, channels]);
                return Err(FeedError::Unsuited { data: parts.data.store().url().to_owned(), what });
            }
            slot.copy_from_slice(rgb);
        }
        Ok(())
    })?;
    Ok(pixels.f_permute([0, 3, 1, 2])?.f_contiguous()?.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1.0)?)
}

fn bad_row(parts: &Parts, key: &str, what: &str) -> FeedError {
    FeedError::Row { data: parts.data.store().url().to_owned(), key: key.to_owned(), what: what.to_owned() }
}

/// How long a shard that is not as it should be may take to be read before the first step.
const LOOK: Duration = Duration::from_secs(5);

/// Fails for a shard that is not there, or not whole: better now than hours into training, when its step comes.
/// A store that is not listed, as a web server's files are not, or does not answer within `patience`, tells of it only then.
async fn check_there(data: &DataSet, patience: Duration) -> Result<(), FeedError> {
    let Ok(found) = data.store().list("shards").await else { return Ok(()) };
    let found: HashMap<String, u64> = found.into_iter().map(|file| (file.key, file.bytes)).collect();
    for (index, shard) in data.manifest().shards.iter().enumerate() {
        if found.get(&shard.name) != Some(&shard.bytes) {
            let Ok(looked) = tokio::time::timeout(patience, data.shard(index)).await else { return Ok(()) };
            looked?;
        }
    }
    Ok(())
}

/// Refuses a data set that these networks cannot be trained on.
fn check_suited(parts: &Parts) -> Result<(), FeedError> {
    let manifest = parts.data.manifest();
    let refuse = |what: String| Err(FeedError::Unsuited { data: parts.data.store().url().to_owned(), what });
    let vae = parts.vae.config();
    let downscale = vae.downscale() as u32;
    let mut sizes = manifest.shards.iter().filter_map(|shard| shard.size);
    let odd = sizes.find(|(width, height)| !width.is_multiple_of(downscale) || !height.is_multiple_of(downscale));
    match (odd, &manifest.latents) {
        (_, Some(latents)) if latents.model.to_string() != parts.vae_weights => {
            let (expected, found) = (&parts.vae_weights, latents.model);
            refuse(format!("its latents are another VAE's (expected {expected}, found {found}); prepare it with --latents of base.model"))
        }
        (_, Some(latents)) if i64::from(latents.channels) != 2 * vae.latent_channels => {
            let (expected, found) = (2 * vae.latent_channels, latents.channels);
            refuse(format!("its latents have the wrong number of channels (expected {expected}, found {found}); prepare it again"))
        }
        (Some((width, height)), None) => {
            refuse(format!("pictures of {width}×{height} pixels are no multiple of the VAE's {downscale}; prepare with another resolution"))
        }
        (_, None) if !manifest.has_images() => {
            refuse("it has captions only, and training needs pictures; prepare one from pictures with captions".to_owned())
        }
        _ => Ok(()),
    }
}
