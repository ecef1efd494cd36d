//! A data set of 43 scenes in several shards, features and models: made once, by the library calls that the commands make.

use ella_coordinator::status::StatusReport;
use ella_dataset::order::{Order, OrderConfig};
use ella_dataset::scenes::{ScenesConfig, scene, write};
use ella_dataset::{DataSet, LatentEncoder, LatentSpec, PrepareOptions, Settings, Source, prepare};
use ella_model::presets::{Preset, init_base};
use ella_model::vae::Vae;
use ella_model::weights::Weights;
use ella_proto::config::{self, JobConfig, JobKind, JobTable, RunConfig};
use ella_store::Store;
use ella_worker::embed::{self, EmbedSettings};
use ella_worker::feed::{self, Captions, FeatureSource, Parts, Sources};
use ella_worker::job::run_local;
use ella_worker::models::{self, Loaded};
use half::f16;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// Neither lanes nor steps divide it: the last step of an epoch has lanes of 1, 1, 1 and 0 samples.
pub(crate) const SCENES: u64 = 43;
const SIDE: u32 = 32;
pub(crate) const LANES: u32 = 4;
pub(crate) const EPOCH: u64 = 6;

pub(crate) static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap());

/// Waits for a future, from inside the runtime too.
fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| RUNTIME.block_on(future))
}

static WORLD: OnceLock<PathBuf> = OnceLock::new();
static EMBEDDING: Mutex<()> = Mutex::new(());

/// A place in the world's folder.
pub(crate) fn path(name: &str) -> PathBuf {
    WORLD.get_or_init(make).join(name)
}

pub(crate) fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().display().to_string()
}

fn make() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("worker-plane");
    let _ = std::fs::remove_dir_all(&folder);
    let tars = folder.join("scenes");
    let config = ScenesConfig { count: SCENES, seed: 5, size: SIDE, per_tar: 20, ..ScenesConfig::default() };
    write(&tars, &config, &mut |_| {}).unwrap();
    let captions: Vec<String> = (0..SCENES).map(|index| scene(5, index).dense_caption()).collect();
    init_base(Preset::Nano, 1, &captions, &folder).unwrap();
    init_base(Preset::NanoSdxl, 1, &captions, &folder.join("sdxl")).unwrap();
    prepare_into(&tars, &folder.join("data"), None);
    let latents = VaeLatents::load(&folder.join("base/vae"));
    prepare_into(&tars, &folder.join("latents"), Some(Arc::new(latents)));
    folder
}

/// The setting that takes a base of SDXL's kind.
pub(crate) fn sdxl() -> String {
    format!("base.model={}", text(path("sdxl/base")))
}

/// A data set of eight pictures, by turns of 96 × 64 and 48 × 80 pixels.
pub(crate) fn oblong(folder: &Path) -> String {
    let mut tar = tar::Builder::new(Vec::new());
    for index in 0..8u8 {
        let (width, height) = if index % 2 == 0 { (96, 64) } else { (48, 80) };
        let mut png = std::io::Cursor::new(Vec::new());
        let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, index * 30]));
        picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
        for (name, bytes) in [("png", png.get_ref().as_slice()), ("txt", b"A picture that is no square.")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, format!("{index}.{name}"), bytes).unwrap();
        }
    }
    std::fs::write(folder.join("oblong.tar"), tar.into_inner().unwrap()).unwrap();
    prepare_into(folder, &folder.join("data"), None);
    format!("data.path={}", text(folder.join("data")))
}

/// A data set of eight pictures, of which every other one has a caption in the column `dense`.
pub(crate) fn half_captioned(folder: &Path) -> String {
    let mut tar = tar::Builder::new(Vec::new());
    for index in 0..8u8 {
        let mut png = std::io::Cursor::new(Vec::new());
        let picture = image::RgbImage::from_fn(SIDE, SIDE, |x, y| image::Rgb([x as u8, y as u8, index * 30]));
        picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
        let captions = [("txt", &b"A picture."[..]), ("dense.txt", b"A picture that is a square.")];
        let members = [("png", png.get_ref().as_slice())].into_iter().chain(captions);
        for (name, bytes) in members.take(if index % 2 == 0 { 3 } else { 2 }) {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, format!("{index}.{name}"), bytes).unwrap();
        }
    }
    std::fs::write(folder.join("half.tar"), tar.into_inner().unwrap()).unwrap();
    let captions = ["txt", "dense=dense.txt"].map(|column| column.parse().unwrap()).to_vec();
    let settings = Settings { captions, ..Settings::new(SIDE) };
    prepare_as(folder, &folder.join("data"), settings, None);
    format!("data.path={}", text(folder.join("data")))
}

fn prepare_into(tars: &Path, out: &Path, latents: Option<Arc<dyn LatentEncoder>>) {
    let settings = Settings { shard_bytes: 8 << 10, images: latents.is_none(), ..Settings::new(SIDE) };
    prepare_as(tars, out, settings, latents);
}

fn prepare_as(tars: &Path, out: &Path, settings: Settings, latents: Option<Arc<dyn LatentEncoder>>) {
    let out = Store::open(&text(out)).unwrap();
    let options = PrepareOptions { threads: 1, latents, ..PrepareOptions::default() };
    wait(async {
        let sources = Source::find(&text(tars)).await.unwrap();
        prepare(&sources, &out, &settings, &options).await.unwrap();
    });
}

/// The base's VAE, as `ella prepare --latents` has it.
struct VaeLatents(Mutex<Vae>, LatentSpec);

impl VaeLatents {
    fn load(folder: &Path) -> Self {
        let vae = Vae::load(folder, Kind::Float, Device::Cpu).unwrap();
        let model = Weights::open(folder).unwrap().digest().parse().unwrap();
        let downscale = vae.config().downscale() as u32;
        Self(Mutex::new(vae), LatentSpec { model, channels: 8, downscale })
    }
}

impl LatentEncoder for VaeLatents {
    fn spec(&self) -> LatentSpec {
        self.1.clone()
    }

    fn batch(&self) -> usize {
        8
    }

    fn encode(&self, rgb: &[u8], count: usize, (width, height): (u32, u32)) -> Result<Vec<f16>, Box<dyn std::error::Error + Send + Sync>> {
        let pictures = Tensor::from_slice(rgb).reshape([count as i64, height.into(), width.into(), 3]).permute([0, 3, 1, 2]);
        let vae = self.0.lock().unwrap();
        let (mean, logvar) = tch::no_grad(|| vae.encode(&(pictures.to_kind(Kind::Float) / 127.5 - 1.0)))?;
        Ok(Vec::try_from(Tensor::cat(&[mean, logvar], 1).to_kind(Kind::Half).flatten(0, -1))?)
    }
}

/// A run of 4 lanes of 2, with these further settings.
pub(crate) fn config(set: &[&str]) -> RunConfig {
    let at = |name: &str| text(path(name));
    let toml = format!(
        "[run]\noutput = \"unused\"\nseed = 3\n[base]\nmodel = \"{}\"\n[text]\nmodel = \"{}\"\nmax_tokens = 40\n[data]\npath = \"{}\"\n\
         window = 2\n[connector]\nlayers = 1\nlatents = 8\n[train]\nsteps = 20\nglobal_batch = 8\nmicro_batch = 2\neval_every = 0\n\
         caption_dropout = 0.25\n[workers]\ndevice = \"cpu\"\n",
        at("base"),
        at("text"),
        at("data"),
    );
    let set: Vec<String> = set.iter().map(|item| (*item).to_owned()).collect();
    RunConfig::parse(&toml, "test", &set).unwrap()
}

pub(crate) fn open(config: &RunConfig) -> DataSet {
    wait(DataSet::open(&config.data.path)).unwrap()
}

/// Embeds what is missing, as the config asks for it. What was counted meanwhile, by name.
pub(crate) fn embedded(config: &RunConfig) -> BTreeMap<String, u64> {
    embedded_by(config, 2)
}

/// The same, so many captions at once.
pub(crate) fn embedded_by(config: &RunConfig, batch: usize) -> BTreeMap<String, u64> {
    let _alone = EMBEDDING.lock().unwrap_or_else(PoisonError::into_inner);
    let config::Text { model, max_tokens, padding, layers, dtype, .. } = config.text.clone();
    let settings = EmbedSettings { text: model, max_tokens, padding, layers, dtype, batch, ..EmbedSettings::default() };
    let config = JobConfig::new(JobTable::new(JobKind::Embed, config.data.path.clone()), &settings).unwrap();
    let mut results = BTreeMap::new();
    wait(async {
        let made = config.clone();
        let job = tokio::task::spawn_blocking(move || embed::make(&made, config::Device::Cpu)).await.unwrap().unwrap();
        let mut watch = |status: &StatusReport| results = status.job.clone().unwrap_or_default().results;
        run_local(&config, job, 1, CancellationToken::new(), &mut watch).await.unwrap();
    });
    results
}

pub(crate) fn load(config: &RunConfig) -> Loaded {
    models::load(config, Device::Cpu).unwrap()
}

/// A GPU, if there is one that can be used.
pub(crate) fn gpu() -> Option<Device> {
    let found = ella_worker::device::set_up(config::Device::Cuda, 1);
    found.map_err(|error| println!("skipped: {error}")).ok()
}

/// What a feed of this run needs.
pub(crate) fn parts(config: &RunConfig) -> Parts {
    parts_on(config, Device::Cpu)
}

/// The same on a device.
pub(crate) fn parts_on(config: &RunConfig, device: Device) -> Parts {
    let Loaded { networks, vae, vae_weights, text, digest, .. } = models::load(config, device).unwrap();
    let data = open(config);
    let captions = Arc::new(wait(Captions::open(&data, &config.data.captions)).unwrap());
    if config.text.features == config::Features::Cached {
        embedded(config);
    }
    let data = Arc::new(data);
    let features = FeatureSource::open(config, (&data, &captions), (&text, device), RUNTIME.handle()).unwrap();
    Parts {
        config: Arc::new(config.clone()),
        data,
        captions,
        features,
        vae,
        vae_weights,
        timesteps: networks.schedule.config().num_train_timesteps as u32,
        device,
        runtime: RUNTIME.handle().clone(),
        models_digest: digest.to_string(),
    }
}

/// A running feed of some lanes and steps.
pub(crate) fn fed(config: &RunConfig, lanes: Range<u32>, steps: Range<u64>) -> feed::Feed {
    let sources = Sources::new(parts(config)).unwrap();
    let mut feed = feed::Feed::start(sources, steps.end, || ella_worker::device::set_threads(1), Arc::default()).unwrap();
    feed.deal(lanes, steps.start);
    feed
}

/// The run's order, and the key of every sample in manifest order.
pub(crate) fn order(config: &RunConfig) -> (Order, Vec<String>) {
    let data = open(config);
    let rows: Vec<u64> = data.manifest().shards.iter().map(|shard| shard.rows).collect();
    let (lanes, micro_batch) = (config.train.lanes() as u32, config.train.micro_batch as u32);
    let order = OrderConfig { seed: config.run.seed, lanes, micro_batch, window: config.data.window as u32 };
    let mut keys = Vec::new();
    for shard in 0..rows.len() {
        keys.extend(wait(data.shard(shard)).unwrap().iter().map(|row| row.key.to_owned()));
    }
    (Order::new(order, &rows).unwrap(), keys)
}

/// The largest difference between two tensors, relative to the second's largest element.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    (&a - &b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]).max(1e-300)
}

/// A copy of the run's data set, without features.
pub(crate) fn bare_copy(config: &RunConfig) -> tempfile::TempDir {
    let (from, to) = (PathBuf::from(&config.data.path), tempfile::tempdir().unwrap());
    std::fs::create_dir_all(to.path().join("shards")).unwrap();
    for name in open(config).manifest().shards.iter().map(|entry| entry.name.as_str()).chain(["manifest.json"]) {
        std::fs::copy(from.join(name), to.path().join(name)).unwrap();
    }
    to
}

/// A copy of the run's data set and its features in which a byte of one shard is flipped.
pub(crate) fn damaged_copy(config: &RunConfig, shard: usize) -> tempfile::TempDir {
    let to = bare_copy(config);
    // The features are of the whole data set, which has the same manifest.
    embedded(config);
    std::os::unix::fs::symlink(Path::new(&config.data.path).join("features"), to.path().join("features")).unwrap();
    let victim = to.path().join(&open(config).manifest().shards[shard].name);
    let mut bytes = std::fs::read(&victim).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(victim, bytes).unwrap();
    to
}
