//! The settings of a prepare job, as people type them and as its config carries them.

use clap::{Args, Parser, ValueEnum};
use ella_dataset::{Buckets, CaptionColumn, Condition, Crop, Duplicates, Encoding, Filters, Settings};
use serde::{Deserialize, Serialize};

use super::PrepareError;

/// The largest shards.
const MOST_SHARD_MIB: u64 = 4096;
/// Most threads: more than any machine has, and fewer than a system refuses to start.
const MOST_THREADS: usize = 1024;

/// Which part of a picture is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CropAt {
    /// The middle
    #[default]
    Centre,
    /// A place drawn for each sample by --seed
    Random,
}

/// How pictures are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// JPEG
    #[default]
    Jpeg,
    /// WebP, lossy
    Webp,
    /// Not at all: latents only
    None,
}

/// What becomes of pictures that are there twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Twice {
    /// All are kept
    Keep,
    /// Files of the same bytes are kept once
    #[default]
    Exact,
    /// So are pictures that look alike
    Near,
}

/// The settings of a prepare job: `[prepare]`, and the options of `ella prepare`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrepareSettings {
    /// WebDataset tars, Parquet files, lists (.jsonl, .json, .csv), folders of tars or Parquet files or with a metadata file: paths, URLs, globs, {0..9} ranges
    #[arg(value_name = "SRC")]
    pub sources: Vec<String>,
    /// Side of the square pictures, in pixels; with --buckets, pictures have at most a square's area
    #[arg(long, default_value_t = 512, value_name = "PIXELS")]
    pub resolution: u32,
    /// Keep aspect ratios: sizes that are multiples of so many pixels, or `sdxl` for SDXL's 40 sizes
    #[arg(long, value_name = "STEP|sdxl")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub buckets: Option<String>,
    /// Largest aspect ratio of --buckets STEP
    #[arg(long, default_value_t = 2.0, value_name = "RATIO")]
    pub bucket_aspect: f64,
    /// Which part of a picture is kept
    #[arg(long, value_enum, default_value_t)]
    pub crop: CropAt,
    /// Draws the places of random crops
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Smallest accepted length of an original's shorter side [default: the resolution, so that nothing is enlarged]
    #[arg(long, value_name = "PIXELS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_edge: Option<u32>,
    /// Largest accepted ratio of an original's longer side to the shorter
    #[arg(long, value_name = "RATIO")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_aspect: Option<f64>,
    /// Fewest pixels of an original
    #[arg(long, value_name = "PIXELS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_area: Option<u64>,
    /// Most pixels of an original
    #[arg(long, value_name = "PIXELS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_area: Option<u64>,
    /// Most pixels that are decoded: a bound against decompression bombs
    #[arg(long, default_value_t = 1 << 27, value_name = "PIXELS")]
    pub max_pixels: u64,
    /// A field that holds captions, as NAME=FIELD:WEIGHT or parts of it (within others by its path, as conversations.1.value); once for each column [default: txt, caption or text]
    #[arg(long = "caption", value_name = "FIELD")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub captions: Vec<String>,
    /// Fewest words in a caption
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub min_caption_words: u32,
    /// Most words in a caption
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_caption_words: Option<u32>,
    /// The text model whose tokens --min-caption-tokens and --max-caption-tokens count: a folder, or a hub id
    #[arg(long, value_name = "MODEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Fewest tokens in a caption
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_caption_tokens: Option<u32>,
    /// Most tokens in a caption
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_caption_tokens: Option<u32>,
    /// A rule for a number among the fields, as 'aesthetic>6'; may be given more than once
    #[arg(long = "where", value_name = "RULE")]
    #[serde(rename = "where", skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<String>,
    /// A file with the keys that alone are kept, one a line
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow: Option<String>,
    /// A file with keys that are not kept
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny: Option<String>,
    /// What becomes of pictures that are there twice
    #[arg(long, value_enum, default_value_t)]
    pub duplicates: Twice,
    /// How many of 64 bits may differ between the perceptual hashes of pictures that look alike: 0 to 12
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub near_bits: u32,
    /// How pictures are stored
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Quality of the stored pictures, 1 to 100
    #[arg(long, default_value_t = 95, value_name = "N")]
    pub quality: u8,
    /// Also store latents, made by this base model's VAE: a folder, a single file, or a hub id
    #[arg(long, value_name = "MODEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latents: Option<String>,
    /// A shard is closed at this size
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    pub shard_mib: u64,
    /// Put the source's name before every key, for sources that number their samples alike; after its folders where names repeat
    #[arg(long)]
    pub key_prefix: bool,
    /// Column of tables and lists that holds the picture or its name [default: found by name and type]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_column: Option<String>,
    /// Column of tables and lists that holds the key [default: found by name]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_column: Option<String>,
    /// Threads that decode and encode pictures [default: one for every core]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub threads: usize,
}

impl Default for PrepareSettings {
    /// What the command line leaves out.
    fn default() -> Self {
        #[derive(Parser)]
        struct Bare {
            #[command(flatten)]
            settings: PrepareSettings,
        }
        Bare::parse_from(["prepare"]).settings
    }
}

impl PrepareSettings {
    /// Settings in which every key is there: they say which keys exist.
    pub fn full() -> Self {
        let (text, number) = (Some(String::new()), Some(1));
        Self {
            buckets: text.clone(),
            min_edge: number,
            max_aspect: Some(1.0),
            min_area: Some(1),
            max_area: Some(1),
            captions: vec![String::new()],
            max_caption_words: number,
            tokenizer: text.clone(),
            min_caption_tokens: number,
            max_caption_tokens: number,
            conditions: vec![String::new()],
            allow: text.clone(),
            deny: text.clone(),
            latents: text.clone(),
            image_column: text.clone(),
            key_column: text,
            ..Self::default()
        }
    }

    /// Checks what can be checked without reading anything.
    ///
    /// # Errors
    /// If what was given does not go together, or is out of its range.
    pub fn check(&self) -> Result<(), PrepareError> {
        self.check_tokens()?;
        if self.sources.is_empty() {
            return Err(PrepareError::Usage("no source was given; name tars, Parquet files, lists or folders of them".into()));
        }
        if !(1..=MOST_SHARD_MIB).contains(&self.shard_mib) {
            return Err(PrepareError::Usage(format!("--shard-mib must be 1 to {MOST_SHARD_MIB} (found {})", self.shard_mib)));
        }
        if self.threads > MOST_THREADS {
            return Err(PrepareError::Usage(format!("--threads must be at most {MOST_THREADS} (found {})", self.threads)));
        }
        if self.format == Format::None && self.latents.is_none() {
            return Err(PrepareError::Usage("--format none stores no pictures: give --latents, or another format".into()));
        }
        Ok(self.settings()?.check()?)
    }

    /// Refuses an option that was given and would change nothing. A data set's own settings may have such.
    ///
    /// # Errors
    /// Which, and what it goes with.
    pub fn check_used(&self) -> Result<(), PrepareError> {
        let usual = Self::default();
        let steps = self.buckets.as_ref().is_some_and(|buckets| buckets != "sdxl");
        let unused = [
            (self.bucket_aspect != usual.bucket_aspect && !steps, "--bucket-aspect goes with --buckets STEP"),
            (self.seed != usual.seed && self.crop != CropAt::Random, "--seed goes with --crop random: nothing else is drawn"),
            (self.near_bits != usual.near_bits && self.duplicates != Twice::Near, "--near-bits goes with --duplicates near"),
        ];
        match unused.into_iter().find(|(is_unused, _)| *is_unused) {
            Some((_, why)) => Err(PrepareError::Usage(why.to_owned())),
            None => Ok(()),
        }
    }

    /// What the options say, without what is read from files.
    pub(super) fn settings(&self) -> Result<Settings, PrepareError> {
        let encoding = match self.format {
            Format::Webp => Encoding::Webp { quality: self.quality },
            Format::Jpeg | Format::None => Encoding::Jpeg { quality: self.quality },
        };
        let captions: Vec<CaptionColumn> = self.captions.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let usual = Settings::new(self.resolution);
        Ok(Settings {
            buckets: self.buckets()?,
            crop: if self.crop == CropAt::Random { Crop::Random { seed: self.seed } } else { Crop::Centre },
            filters: self.filters()?,
            captions: if captions.is_empty() { usual.captions } else { captions },
            encoding,
            images: self.format != Format::None,
            duplicates: match self.duplicates {
                Twice::Keep => Duplicates::Keep,
                Twice::Exact => Duplicates::Exact,
                Twice::Near => Duplicates::Near { bits: self.near_bits },
            },
            // What is too large to be bytes is refused as out of range.
            shard_bytes: self.shard_mib.saturating_mul(1 << 20),
            key_prefix: self.key_prefix,
            image_column: self.image_column.clone(),
            key_column: self.key_column.clone(),
            ..usual
        })
    }

    fn buckets(&self) -> Result<Option<Buckets>, PrepareError> {
        let Some(text) = &self.buckets else { return Ok(None) };
        if text == "sdxl" {
            return Ok(Some(Buckets::Sdxl));
        }
        let wrong = |_| PrepareError::Usage(format!("--buckets must be a number of pixels, or `sdxl` (found {text:?})"));
        Ok(Some(Buckets::Step { step: text.parse().map_err(wrong)?, max_aspect: self.bucket_aspect }))
    }

    fn filters(&self) -> Result<Filters, PrepareError> {
        let usual = Filters::new(self.resolution);
        // Buckets have shorter sides than the square.
        let shortest = |buckets: Buckets| {
            let sizes = Settings { buckets: Some(buckets), ..Settings::new(self.resolution) }.sizes();
            sizes.into_iter().map(|(width, height)| width.min(height)).min()
        };
        let least = self.buckets()?.and_then(shortest).unwrap_or(usual.min_edge);
        Ok(Filters {
            min_edge: self.min_edge.unwrap_or(least),
            max_aspect: self.max_aspect,
            min_area: self.min_area,
            max_area: self.max_area,
            max_pixels: self.max_pixels,
            min_caption_words: self.min_caption_words,
            max_caption_words: self.max_caption_words,
            conditions: self.conditions.iter().map(|text| text.parse()).collect::<Result<Vec<Condition>, _>>()?,
            ..usual
        })
    }

    fn check_tokens(&self) -> Result<(), PrepareError> {
        let bounded = self.min_caption_tokens.is_some() || self.max_caption_tokens.is_some();
        let why = "--tokenizer goes with --min-caption-tokens or --max-caption-tokens, and they with it";
        if bounded == self.tokenizer.is_some() { Ok(()) } else { Err(PrepareError::Usage(why.into())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_read_back_from_toml_and_what_is_left_out_is_as_on_the_command_line() {
        for settings in [PrepareSettings::default(), PrepareSettings::full()] {
            let text = toml_of(&settings);
            assert_eq!(serde_json::from_value::<PrepareSettings>(text).unwrap(), settings);
        }
        let empty: PrepareSettings = serde_json::from_str("{}").unwrap();
        assert_eq!(empty, PrepareSettings::default());
        assert_eq!(empty.settings().unwrap(), Settings::new(512));
    }

    fn toml_of(settings: &PrepareSettings) -> serde_json::Value {
        serde_json::to_value(settings).unwrap()
    }

    #[test]
    fn what_does_not_go_together_is_said() {
        let error = |change: fn(&mut PrepareSettings)| {
            let mut settings = PrepareSettings::default();
            change(&mut settings);
            settings.sources.push("x.tar".into());
            settings.check().unwrap_err()
        };
        assert!(error(|s| s.buckets = Some("many".into())).to_string().contains("--buckets"));
        assert!(error(|s| s.shard_mib = 0).to_string().contains("--shard-mib must be 1 to 4096 (found 0)"));
        assert!(error(|s| s.threads = 100_000).to_string().contains("--threads must be at most 1024 (found 100000)"));
        assert!(error(|s| s.format = Format::None).to_string().contains("--format none"));
        assert!(error(|s| s.min_caption_tokens = Some(3)).to_string().contains("--tokenizer"));
        assert!(error(|s| s.conditions.push("a".into())).is_usage());
        let unused = |change: fn(&mut PrepareSettings)| {
            let mut settings = PrepareSettings::default();
            change(&mut settings);
            settings.check_used().map_err(|error| error.to_string())
        };
        assert!(unused(|s| s.seed = 3).unwrap_err().contains("--crop random"));
        assert!(unused(|s| (s.bucket_aspect, s.buckets) = (3.0, Some("sdxl".into()))).unwrap_err().contains("--buckets STEP"));
        assert!(unused(|s| s.near_bits = 4).unwrap_err().contains("--duplicates near"));
        assert!(unused(|s| (s.seed, s.crop, s.bucket_aspect, s.buckets) = (3, CropAt::Random, 3.0, Some("8".into()))).is_ok());
        assert!(error(|s| s.captions.push("a:b".into())).is_usage());
    }
}
