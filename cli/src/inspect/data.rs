//! What a prepared data set is: from its manifest, its report and its sidecars, and a sample of its rows.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ella_dataset::{
    CaptionManifest, CaptionSet, CaptionStats, DataSet, Encoding, FeatureManifest, FeatureSet, MANIFEST, PLAN, REPORT, Report, Tokens,
    captions_in, features_in,
};
use ella_model::text::TextConfig;
use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_store::Store;
use ella_worker::models;
use serde::Serialize;

use crate::caption::column_stats;
use crate::run::RUN_TOML;
use crate::ui::{Fail, bytes, count};

/// Rows that are looked at for histograms.
const ROWS: usize = 20_000;
/// More tokens than these are not told apart: no encoder takes so many.
const MOST_TOKENS: usize = 1 << 16;
/// Shards that are looked into.
const SHARDS: usize = 64;
/// Pictures of a contact sheet.
pub(super) const PICTURES: usize = 60;

/// A prepared data set.
#[derive(Debug, Serialize)]
pub(super) struct DataFacts {
    pub(super) data: String,
    pub(super) digest: String,
    pub(super) samples: u64,
    pub(super) shards: usize,
    pub(super) bytes: u64,
    pub(super) sources: usize,
    /// Samples by size of the picture, as `512×512`.
    pub(super) sizes: BTreeMap<String, u64>,
    /// How pictures are stored, if they are.
    pub(super) images: Option<String>,
    /// The VAE whose latents are stored.
    pub(super) latents: Option<String>,
    /// Columns of captions, with what is known of each.
    pub(super) captions: Vec<String>,
    /// Encoders whose features are there, and how far.
    pub(super) features: Vec<String>,
    /// Samples read, and refused by reason, when it was prepared.
    pub(super) read: Option<u64>,
    pub(super) refused: BTreeMap<String, u64>,
    /// What the captions of every column are like, if that was asked.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) stats: BTreeMap<String, CaptionStats>,
}

/// Whether a path or URL is a prepared data set's.
pub(super) async fn is_data(path: &str) -> Result<bool, Fail> {
    if !path.contains("://") && !std::path::Path::new(path).is_dir() {
        return Ok(false);
    }
    Ok(Store::open(path)?.head(MANIFEST).await?.is_some())
}

/// Refuses what is neither a model nor whole, but known all the same.
pub(super) async fn refuse_others(path: &str) -> Result<(), Fail> {
    if !path.contains("://") && !std::path::Path::new(path).is_dir() {
        return Ok(());
    }
    let store = Store::open(path)?;
    if store.head(RUN_TOML).await?.is_some() {
        return Err(Fail::lasting(format_args!(
            "{path}: a run; `ella status` says what became of it, and `ella export` takes its connector out"
        )));
    }
    if store.head(PLAN).await?.is_some() {
        return Err(Fail::lasting(format_args!(
            "{path}: a data set whose preparing did not finish; the same `ella prepare` goes on with it"
        )));
    }
    Ok(())
}

impl DataFacts {
    pub(super) async fn of(set: &DataSet) -> Result<Self, Fail> {
        let (store, manifest) = (set.store(), set.manifest());
        let mut sizes = BTreeMap::new();
        for shard in &manifest.shards {
            if let Some((width, height)) = shard.size {
                *sizes.entry(format!("{width}×{height}")).or_default() += shard.rows;
            }
        }
        let report: Option<Report> = match store.head(REPORT).await? {
            Some(_) => serde_json::from_slice(&store.get(REPORT).await?).ok(),
            None => None,
        };
        let refused = report.iter().flat_map(Report::counts).map(|(why, count)| (why.to_string(), count)).collect();
        let images = manifest.settings.as_ref().filter(|settings| settings.images).map(|settings| match settings.encoding {
            Encoding::Jpeg { quality } => format!("JPEG of quality {quality}"),
            Encoding::Webp { quality } => format!("WebP of quality {quality}"),
        });
        Ok(Self {
            data: store.url().to_owned(),
            digest: manifest.digest().to_string(),
            samples: manifest.samples,
            shards: manifest.shards.len(),
            bytes: manifest.bytes,
            sources: manifest.sources.len(),
            sizes,
            images,
            latents: manifest
                .latents
                .as_ref()
                .map(|latents| format!("{} channels, {}", latents.channels, short(&latents.model.to_string()))),
            captions: captions(set).await?,
            features: features(set).await?,
            read: report.as_ref().map(|report| report.read),
            refused,
            stats: BTreeMap::new(),
        })
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![
            format!("{}: a prepared data set, {}", self.data, short(&self.digest)),
            format!(
                "{} in {}, {}, from {}",
                count(self.samples as usize, "sample"),
                count(self.shards, "shard"),
                bytes(self.bytes),
                count(self.sources, "source")
            ),
        ];
        let sizes: Vec<String> = self.sizes.iter().map(|(size, samples)| format!("{size}: {samples}")).collect();
        let mut say = |name: &str, what: String| {
            if !what.is_empty() {
                lines.push(format!("  {name:9} {what}"));
            }
        };
        say("pictures", sizes.join(", "));
        say(
            "stored",
            self.images.clone().into_iter().chain(self.latents.iter().map(|l| format!("latents ({l})"))).collect::<Vec<_>>().join(", "),
        );
        self.captions.iter().for_each(|column| say("captions", column.clone()));
        self.features.iter().for_each(|encoder| say("features", encoder.clone()));
        let refused: Vec<String> = self.refused.iter().map(|(why, count)| format!("{count} {why}")).collect();
        if let Some(read) = self.read {
            say(
                "refused",
                format!(
                    "{} of {read} read{}",
                    self.refused.values().sum::<u64>(),
                    if refused.is_empty() { String::new() } else { format!(": {}", refused.join(", ")) }
                ),
            );
        }
        let stats = self.stats.iter().map(|(column, stats)| format!("\n\ncaptions of {column}\n{stats}"));
        lines.join("\n") + &stats.collect::<String>()
    }
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

async fn captions(set: &DataSet) -> Result<Vec<String>, Fail> {
    let weighted = |column: &ella_dataset::CaptionColumn| format!("{}, weight {}", column.name, column.weight);
    let mut columns: Vec<String> = set.manifest().captions.iter().map(weighted).collect();
    for name in captions_in(set.store()).await? {
        let added = CaptionSet::find(set.store(), set.shared_manifest(), &name).await?;
        let missing = added.missing().await?.len();
        let state = if missing == 0 {
            let CaptionManifest { counts, .. } = added.finish().await?;
            let told = counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ");
            let report =
                if counts.keys().any(|name| name.starts_with("refused.")) { format!(" (captions/{name}/{REPORT})") } else { String::new() };
            told + &report
        } else {
            format!("{} of {} shards are done", set.manifest().shards.len() - missing, set.manifest().shards.len())
        };
        columns.push(format!("{name}, added: {state}"));
    }
    Ok(columns)
}

/// What the captions of every whole column are like.
pub(super) async fn stats(set: &DataSet, tokenizer: Option<&str>) -> Result<BTreeMap<String, CaptionStats>, Fail> {
    let load = |model| -> Result<TextTokenizer, Fail> {
        let folder = models::locate("--tokenizer", model)?;
        Ok(TextTokenizer::load(&folder, &TextConfig::load(&folder)?)?)
    };
    let tokenizer = tokenizer.map(load).transpose()?;
    let count = tokenizer.as_ref().map(|tokenizer| {
        // A caption that cannot be cut into tokens has none.
        move |caption: &str| tokenizer.encode(&[caption], MOST_TOKENS, Padding::None).map_or(0, |encoded| encoded.lengths[0])
    });
    let count = count.as_ref().map(|count| count as Tokens<'_>);
    let own = set.manifest().captions.iter().map(|column| column.name.clone());
    let mut stats = BTreeMap::new();
    for column in own.chain(whole(set).await?) {
        let counted = column_stats(set, &column, count).await?;
        stats.insert(column, counted);
    }
    Ok(stats)
}

/// The added columns that are whole.
async fn whole(set: &DataSet) -> Result<Vec<String>, Fail> {
    let mut whole = Vec::new();
    for name in captions_in(set.store()).await? {
        if CaptionSet::find(set.store(), set.shared_manifest(), &name).await?.missing().await?.is_empty() {
            whole.push(name);
        }
    }
    Ok(whole)
}

async fn features(set: &DataSet) -> Result<Vec<String>, Fail> {
    let mut found = Vec::new();
    for (spec, columns) in features_in(set.store()).await? {
        for column in columns {
            let features = FeatureSet::find(set.store(), set.shared_manifest(), &spec, &column).await?;
            let missing = features.missing().await?.len();
            let total = set.manifest().shards.len();
            let state = if missing > 0 || features.empty().await?.is_none() {
                format!("{} of {total} shards are done", total - missing)
            } else {
                let FeatureManifest { shards, .. } = features.finish().await?;
                bytes(shards.iter().map(|shard| shard.bytes).sum())
            };
            let (padding, dtype) = (format!("{:?}", spec.padding).to_lowercase(), format!("{:?}", spec.dtype).to_lowercase());
            let encoder = short(&spec.fingerprint().to_string()).to_owned();
            found.push(format!(
                "{encoder} of {column}: width {}, {} tokens, padding {padding}, {dtype}: {state}",
                spec.width, spec.max_tokens
            ));
        }
    }
    Ok(found)
}

/// One picture of a contact sheet.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) key: String,
    pub(super) captions: Vec<String>,
    pub(super) original: Option<(u32, u32)>,
    pub(super) size: Option<(u32, u32)>,
    /// A `data:` URL.
    pub(super) picture: Option<String>,
}

/// Numbers of some rows, for histograms.
#[derive(Debug, Default)]
pub(super) struct Looked {
    pub(super) rows: usize,
    pub(super) words: Vec<f64>,
    pub(super) widths: Vec<f64>,
    pub(super) heights: Vec<f64>,
    pub(super) aspects: Vec<f64>,
    pub(super) shown: Vec<Shown>,
}

/// Looks at rows of shards that are spread evenly over the data set.
pub(super) async fn look(set: &DataSet) -> Result<Looked, Fail> {
    let manifest = set.manifest();
    let total = manifest.shards.len();
    let taken = total.min(SHARDS);
    let each_shown = PICTURES.div_ceil(taken.max(1));
    let mut looked = Looked::default();
    let mut added = Vec::new();
    for column in whole(set).await? {
        added.push(set.added_captions(&column).await?);
    }
    for number in 0..taken {
        let index = number * total / taken;
        let shard = set.shard(index).await?;
        let mut more = Vec::new();
        for column in &added {
            more.push(column.shard(index).await?);
        }
        let rows = shard.rows();
        let spread = (0..each_shown.min(rows)).map(|i| i * rows / each_shown.min(rows));
        for row in spread.take(PICTURES.saturating_sub(looked.shown.len())) {
            let read = shard.row(row)?;
            let own = (0..manifest.captions.len()).map(|column| shard.caption(row, column).map(str::to_owned));
            let captions = own.chain(more.iter().map(|column| Ok(column[row].clone()))).collect::<Result<_, _>>()?;
            looked.shown.push(Shown {
                key: read.key.to_owned(),
                captions,
                original: read.original,
                size: manifest.shards[index].size,
                picture: read.image.map(data_url),
            });
        }
        for read in shard.iter().take(ROWS.div_ceil(taken)) {
            looked.rows += 1;
            looked.words.push(read.caption.split_whitespace().count() as f64);
            if let Some((width, height)) = read.original {
                looked.widths.push(width.into());
                looked.heights.push(height.into());
                looked.aspects.push(f64::from(width) / f64::from(height.max(1)));
            }
        }
    }
    Ok(looked)
}

fn data_url(image: &[u8]) -> String {
    let kind = if image.starts_with(b"RIFF") { "webp" } else { "jpeg" };
    format!("data:image/{kind};base64,{}", STANDARD.encode(image))
}
