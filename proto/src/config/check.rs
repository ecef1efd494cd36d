//! The rules for values, which types cannot hold. Each is checked once, and named with its file and key.

use super::sample::MOST_PICTURES;
use super::{Bytes, Compression, ConfigError, ConnectorKind, Dtype, Features, LONGEST_SIDE, Millis, Padding, Reduction, RunConfig};
use std::ops::RangeInclusive;

/// Most threads of a worker: more than any machine has, and fewer than a system refuses to start.
const MOST_THREADS: u64 = 1024;
/// Most positions of a caption: sizes that text encoders have, with room.
const MOST_TOKENS: u64 = 1 << 16;
/// Most steps from noise to picture: as many as diffusion schedules have.
const MOST_SAMPLER_STEPS: u64 = 1000;
/// Most samples of a step; and of a lane, which one device takes at once. Products of sizes have room below them.
const MOST_BATCH: u64 = 1 << 20;
const MOST_LANE: u64 = 1 << 16;
/// Most shards that 32 bits number.
const MOST_SHARDS: u64 = u32::MAX as u64;
/// Most steps: with as many samples in each, 64 bits count them.
const MOST_STEPS: u64 = 1 << 40;
/// Most of what a connector has: far more than any has.
const MOST_BLOCKS: u64 = 1 << 10;
const MOST_LATENTS: u64 = 1 << 12;
const MOST_CHANNELS: u64 = 1 << 16;
/// Least memory of a GPU that anything can be computed in: CUDA's own libraries take about as much.
const LEAST_GPU_MEMORY: Bytes = Bytes(1 << 30);

/// Refuses the first value outside its rule. `origin` is the file, as errors name it.
pub(super) fn values(config: &RunConfig, origin: &str) -> Result<(), ConfigError> {
    let check = Check { config, origin };
    check.places()?;
    check.sizes()?;
    check.rates()?;
    check.captions()?;
    check.memory()?;
    check.sample()?;
    check.padding()?;
    check.ahead()?;
    check.compression()
}

/// What a URL that is kept and shown must be.
pub(super) const BARE: &str = "a URL in a config must have no user, password, query or fragment; give credentials in the environment";

/// A URL without user, password, query and fragment; what is no URL as it is. Of one whose password may go on behind a `/`, `?` or `#` that
/// should have been escaped, only the scheme is left.
pub(super) fn bare(place: &str) -> String {
    let Some((scheme, rest)) = place.split_once("://") else { return place.to_owned() };
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let path = tail.split(['?', '#']).next().unwrap_or_default();
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let has_port = authority.rsplit_once(':').is_none_or(|(_, port)| port.ends_with(']') || is_port(port));
    match authority.rsplit_once('@') {
        Some((_, host)) if !tail.contains('@') => format!("{scheme}://{host}{path}"),
        None if has_port || !tail.contains('@') => format!("{scheme}://{authority}{path}"),
        _ => format!("{scheme}://"),
    }
}

struct Check<'a> {
    config: &'a RunConfig,
    origin: &'a str,
}

impl Check<'_> {
    /// A config is kept in the run's folder, shown and logged: no secret may stand in it.
    fn places(&self) -> Result<(), ConfigError> {
        let RunConfig { run, data, .. } = self.config;
        for (key, place) in [("run.output", &run.output), ("data.path", &data.path)] {
            if place.is_empty() {
                return Err(self.wrong(key, "\"\"", "it must be a path or a URL".to_owned()));
            }
        }
        for (key, place) in [("run.output", run.output.as_str()), ("data.path", &data.path)].into_iter().chain(self.config.models()) {
            let bare = bare(place);
            if bare != place {
                return Err(self.wrong(key, format!("{bare} and more"), BARE.to_owned()));
            }
        }
        Ok(())
    }

    fn sizes(&self) -> Result<(), ConfigError> {
        let RunConfig { text, data, connector, train, checkpoint, workers, .. } = self.config;
        let any = u64::MAX;
        self.within("text.max_tokens", text.max_tokens as u64, 1..=MOST_TOKENS)?;
        self.within("workers.threads", workers.threads as u64, 1..=MOST_THREADS)?;
        for (key, found, most) in [
            ("data.window", data.window as u64, MOST_SHARDS),
            ("data.memory_bytes", data.memory_bytes, any),
            ("connector.width", connector.width.unwrap_or(1) as u64, MOST_CHANNELS),
            ("connector.layers", connector.layers as u64, MOST_BLOCKS),
            ("connector.heads", connector.heads as u64, MOST_BLOCKS),
            ("connector.latents", connector.latents as u64, MOST_LATENTS),
            ("train.steps", train.steps, MOST_STEPS),
            ("train.global_batch", train.global_batch as u64, MOST_BATCH),
            ("train.micro_batch", train.micro_batch as u64, MOST_LANE),
            ("train.eval_samples", train.eval_samples as u64, MOST_BATCH),
            ("checkpoint.every", checkpoint.every.unwrap_or(1), any),
            ("checkpoint.keep", checkpoint.keep as u64, any),
            ("workers.count", workers.count as u64, any),
            ("workers.min", workers.min as u64, any),
        ] {
            self.within(key, found, 1..=most)?;
        }
        for (key, found) in [
            ("checkpoint.max_lost_work", checkpoint.max_lost_work.unwrap_or(Millis(1))),
            ("workers.lease", workers.lease),
            ("workers.orphan_timeout", workers.orphan_timeout),
            ("workers.step_timeout", workers.step_timeout),
            ("workers.start_timeout", workers.start_timeout),
        ] {
            if found.0 == 0 {
                return Err(self.wrong(key, format!("\"{found}\""), "it must be 1ms or more".to_owned()));
            }
        }
        if data.cache.as_ref().is_some_and(|folder| folder.as_os_str().is_empty()) {
            return Err(self.wrong("data.cache", "\"\"", "it must be a folder; data.cache_bytes = 0 is for no cache".to_owned()));
        }
        self.lanes()
    }

    fn lanes(&self) -> Result<(), ConfigError> {
        let (train, count) = (&self.config.train, self.config.workers.count);
        if !train.global_batch.is_multiple_of(train.micro_batch) {
            let rule = format!("it must be a multiple of train.micro_batch = {} (lanes are global_batch / micro_batch)", train.micro_batch);
            return Err(self.wrong("train.global_batch", train.global_batch, rule));
        }
        if count > train.lanes() {
            let rule =
                format!("there are only {} lanes (train.global_batch / train.micro_batch), and each worker needs one", train.lanes());
            return Err(self.wrong("workers.count", count, rule));
        }
        let workers = &self.config.workers;
        if workers.min > count {
            let rule = format!("it must be at most workers.count = {count}, with which a run begins");
            return Err(self.wrong("workers.min", workers.min, rule));
        }
        if let Some(max) = workers.max.filter(|max| *max < count) {
            return Err(self.wrong("workers.max", max, format!("it must be at least workers.count = {count}")));
        }
        Ok(())
    }

    fn rates(&self) -> Result<(), ConfigError> {
        let train = &self.config.train;
        let optimizer = &train.optimizer;
        let below_one = |x: f64| (0.0..1.0).contains(&x);
        let fraction = |x: f64| (0.0..=1.0).contains(&x);
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        let positive = |x: f64| x > 0.0 && x.is_finite();
        self.holds("train.caption_dropout", train.caption_dropout, fraction, "it must lie from 0 to 1")?;
        self.holds("train.grad_clip", train.grad_clip, not_negative, "it must be 0 (off) or more")?;
        self.holds("train.ema_decay", train.ema_decay, fraction, "it must lie from 0 to 1")?;
        self.holds("train.optimizer.lr", optimizer.lr, not_negative, "it must be a number of 0 or more")?;
        self.holds("train.optimizer.weight_decay", optimizer.weight_decay, not_negative, "it must be a number of 0 or more")?;
        for lora in &self.config.base.loras {
            self.holds("base.loras", lora.weight, f64::is_finite, "weights must be finite numbers")?;
        }
        for beta in optimizer.betas {
            self.holds("train.optimizer.betas", beta, below_one, "each must be at least 0 and below 1")?;
        }
        self.holds("train.optimizer.eps", optimizer.eps, positive, "it must be a number above 0")?;
        train.snr_gamma.map_or(Ok(()), |gamma| self.holds("train.snr_gamma", gamma, positive, "it must be a number above 0"))
    }

    fn captions(&self) -> Result<(), ConfigError> {
        let captions = &self.config.data.captions;
        for (i, choice) in captions.iter().enumerate() {
            self.holds("data.captions", choice.weight, |w| w >= 0.0 && w.is_finite(), "weights must be numbers of 0 or more")?;
            if choice.column.is_empty() || captions[..i].iter().any(|earlier| earlier.column == choice.column) {
                let rule = "each must name a column of its own".to_owned();
                return Err(self.wrong("data.captions", format!("{:?}", choice.column), rule));
            }
        }
        let sum: f64 = captions.iter().map(|choice| choice.weight).sum();
        let some = |sum: f64| captions.is_empty() || sum > 0.0;
        self.holds("data.captions", sum, some, "one weight or more must be above 0")
    }

    fn memory(&self) -> Result<(), ConfigError> {
        let workers = &self.config.workers;
        if let Some(most) = workers.gpu_memory.filter(|most| *most < LEAST_GPU_MEMORY) {
            return Err(self.wrong("workers.gpu_memory", format!("\"{most}\""), format!("it must be {LEAST_GPU_MEMORY} or more")));
        }
        if workers.split_on_oom && self.config.train.reduction == Reduction::Exact {
            let rule = "the halves of a lane are rounded elsewhere than the whole, so that train.reduction = \"exact\" would give other bits on a \
                        smaller GPU; use \"fast\", or a smaller train.micro_batch";
            return Err(self.wrong("workers.split_on_oom", true, rule.to_owned()));
        }
        Ok(())
    }

    fn sample(&self) -> Result<(), ConfigError> {
        let sample = &self.config.sample;
        self.within("sample.images", sample.images.into(), 1..=MOST_PICTURES)?;
        self.within("sample.steps", sample.steps.into(), 1..=MOST_SAMPLER_STEPS)?;
        self.holds("sample.guidance", sample.guidance, f64::is_finite, "it must be a finite number")?;
        if let Some(size) = sample.size.filter(|size| [size.width, size.height].iter().any(|side| !(1..=LONGEST_SIDE).contains(side))) {
            let rule = format!("width and height must lie from 1 to {LONGEST_SIDE} pixels");
            return Err(self.wrong("sample.size", format!("\"{size}\""), rule));
        }
        if sample.every > 0 && sample.prompts.is_empty() {
            let rule = "sample.every asks for pictures; give what to draw, or sample.prompts_file".to_owned();
            return Err(self.wrong("sample.prompts", "[]", rule));
        }
        let pictures = sample.prompts.len() as u64 * u64::from(sample.images);
        if pictures > MOST_PICTURES {
            let rule = format!("that is {pictures} pictures with sample.prompts, and there may be {MOST_PICTURES}");
            return Err(self.wrong("sample.images", sample.images, rule));
        }
        Ok(())
    }

    fn padding(&self) -> Result<(), ConfigError> {
        let RunConfig { text, connector, .. } = self.config;
        if text.padding == Padding::None && connector.kind == ConnectorKind::Mlp {
            let rule = "connector.kind = \"mlp\" makes a state of every position, and a U-Net attends to all of them; use \"fixed\"";
            return Err(self.wrong("text.padding", "\"none\"", rule.to_owned()));
        }
        Ok(())
    }

    fn ahead(&self) -> Result<(), ConfigError> {
        let RunConfig { text, workers, .. } = self.config;
        if text.features == Features::Ahead && text.dtype == Dtype::Fp32 && workers.tf32 {
            let rule = "features that are made ahead stay with the data set as float32, for runs that round nothing to 10 bits too; use \"inline\", \
                        another text.dtype, or `ella embed` and \"cached\"";
            return Err(self.wrong("workers.tf32", true, rule.to_owned()));
        }
        Ok(())
    }

    fn compression(&self) -> Result<(), ConfigError> {
        let train = &self.config.train;
        if train.compression != Compression::None && train.reduction == Reduction::Exact {
            let rule = "an exact sum is not rounded on its way; use \"none\", or train.reduction = \"fast\"";
            return Err(self.wrong("train.compression", "\"bf16\"", rule.to_owned()));
        }
        Ok(())
    }

    fn within(&self, key: &'static str, found: u64, range: RangeInclusive<u64>) -> Result<(), ConfigError> {
        if range.contains(&found) {
            return Ok(());
        }
        let (low, high) = (range.start(), range.end());
        let rule = if *high == u64::MAX { format!("it must be {low} or more") } else { format!("it must lie from {low} to {high}") };
        Err(self.wrong(key, found, rule))
    }

    fn holds(&self, key: &'static str, found: f64, holds: impl Fn(f64) -> bool, rule: &str) -> Result<(), ConfigError> {
        if holds(found) { Ok(()) } else { Err(self.wrong(key, found, rule.to_owned())) }
    }

    fn wrong(&self, key: &'static str, found: impl ToString, rule: String) -> ConfigError {
        ConfigError::Value { origin: self.origin.to_owned(), key, rule, found: found.to_string() }
    }
}
