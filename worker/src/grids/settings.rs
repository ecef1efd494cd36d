//! The settings of a draw job, as its config carries them.

use ella_proto::config::{ConfigError, Dtype, Layers, Lora, Padding, Prediction, Sampler, Size};
use serde::{Deserialize, Serialize};

use super::grid::TILES;

/// The settings of a draw job: `[draw]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DrawSettings {
    /// What to draw: a folder of `.txt` files, a prompt each, or a `.csv` file with the columns `item_id` and `text`; a path or URL.
    pub prompts: String,
    /// The diffusion model: a folder, a single-file checkpoint, or a hub id.
    pub base: String,
    /// LoRA files that are merged into its U-Net.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<Lora>,
    /// The trained connector: a safetensors file, or `org/name/file.safetensors` on the hub; left out: the base draws by its own CLIP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connector: Option<String>,
    /// The connector's attention heads; left out: as its file says, or 8 if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<u32>,
    /// The text encoder that the connector was trained with: a folder, or a hub id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Beside the connector's states, let the U-Net attend to those of the base's own CLIP.
    pub with_clip: bool,
    /// What becomes of the positions after a prompt's end; left out: as the connector's file says that it was trained, or fixed if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub padding: Option<Padding>,
    /// The same for the negative prompt; left out: as `padding`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_padding: Option<Padding>,
    /// Longest prompt in tokens; left out: as the connector's file says; if it does not, 128 with padding fixed, and with none as long as the text
    /// encoder takes, up to 2048.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// Which of the text encoder's layers are taken; left out: as the connector's file says, or the last one if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// What the text encoder computes in; left out: as the connector's file says, or as `dtype` if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_dtype: Option<Dtype>,
    /// What not to draw; left out: the empty text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative: Option<String>,
    /// What each tile's own seed follows from, with its prompt's name and its place.
    pub seed: u64,
    /// Of one tile, which must be square; left out: the base's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// How to step from noise to picture.
    pub sampler: Sampler,
    /// Steps from noise to picture.
    pub steps: u32,
    /// How much the prompt counts beside the negative one; 1: no guidance.
    pub guidance: f64,
    /// What the base predicts; left out: what its files say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// Tiles that are drawn at once: from 8 on, of several prompts.
    pub batch: usize,
    /// What the frozen networks compute in.
    pub dtype: Dtype,
    /// Threads that compute.
    pub threads: usize,
}

impl Default for DrawSettings {
    fn default() -> Self {
        Self {
            prompts: String::new(),
            base: String::new(),
            loras: Vec::new(),
            connector: None,
            heads: None,
            text: None,
            with_clip: false,
            padding: None,
            negative_padding: None,
            max_tokens: None,
            layers: None,
            text_dtype: None,
            negative: None,
            seed: 0,
            size: None,
            sampler: Sampler::Ddim,
            steps: 50,
            guidance: 7.5,
            prediction: None,
            batch: TILES,
            dtype: Dtype::Fp32,
            threads: 1,
        }
    }
}

impl DrawSettings {
    /// Settings in which every key is there.
    pub(crate) fn full() -> Self {
        Self {
            loras: vec![Lora { file: String::new(), weight: 1.0 }],
            connector: Some(String::new()),
            heads: Some(1),
            text: Some(String::new()),
            padding: Some(Padding::Fixed),
            negative_padding: Some(Padding::Fixed),
            max_tokens: Some(1),
            layers: Some(Layers::Last),
            text_dtype: Some(Dtype::Fp32),
            negative: Some(String::new()),
            size: Some(Size { width: 8, height: 8 }),
            prediction: Some(Prediction::Epsilon),
            ..Self::default()
        }
    }

    /// Refuses the first value outside its rule. `origin` names where they were given.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(&self, origin: &str) -> Result<(), ConfigError> {
        let wrong =
            |key, found: String, rule: &str| Err(ConfigError::Value { origin: origin.to_owned(), key, found, rule: rule.to_owned() });
        let counts =
            [("heads", self.heads.unwrap_or(1) as usize), ("steps", self.steps as usize), ("batch", self.batch), ("threads", self.threads)];
        if let Some((key, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return wrong(key, "0".to_owned(), "it must be 1 or more");
        }
        match (&self.connector, &self.text, self.size) {
            (Some(_), None, _) => wrong("text", "left out".to_owned(), "a connector needs the text encoder that it was trained with"),
            (None, Some(_), _) => wrong("connector", "left out".to_owned(), "a text encoder is of use to a connector only"),
            (None, _, _) if self.with_clip => {
                wrong("connector", "left out".to_owned(), "with_clip sets CLIP's states beside a connector's")
            }
            (_, _, Some(size)) if size.width != size.height => {
                wrong("size", size.to_string(), "tiles must be square: one number tells a scorer where to cut a grid")
            }
            _ if !self.guidance.is_finite() => wrong("guidance", self.guidance.to_string(), "it must be a finite number"),
            _ => Ok(()),
        }
    }

    /// How many prompts are drawn together, all tiles of each: a function of the settings, so that the pictures that share a batch, on which
    /// their last bits depend, are the same whoever draws them (SAME).
    pub(super) fn prompts_at_once(&self) -> usize {
        (self.batch / TILES).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_proto::config::{JobConfig, JobKind, JobTable};

    #[test]
    fn settings_read_back_from_a_jobs_config() {
        for settings in [DrawSettings::default(), DrawSettings { seed: i64::MAX as u64, ..DrawSettings::full() }] {
            let config = JobConfig::new(JobTable::new(JobKind::Draw, "out".to_owned()), &settings).unwrap();
            let read = JobConfig::parse(&config.to_toml(), "job.toml", &[]).unwrap();
            assert_eq!(read.settings::<DrawSettings>(&DrawSettings::full()).unwrap(), settings);
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_key() {
        let connector = || DrawSettings { connector: Some("c".into()), text: Some("t".into()), ..DrawSettings::default() };
        connector().check("x").unwrap();
        DrawSettings::default().check("x").unwrap();
        for (settings, words) in [
            (DrawSettings { text: None, ..connector() }, "x: `text` is left out"),
            (DrawSettings { connector: None, ..connector() }, "x: `connector` is left out"),
            (DrawSettings { with_clip: true, ..DrawSettings::default() }, "x: `connector` is left out"),
            (DrawSettings { size: "64x32".parse().ok(), ..connector() }, "x: `size` is 64x32, but tiles must be square"),
            (DrawSettings { guidance: f64::NAN, ..connector() }, "x: `guidance` is NaN"),
            (DrawSettings { batch: 0, ..connector() }, "x: `batch` is 0"),
            (DrawSettings { threads: 0, ..connector() }, "x: `threads` is 0"),
        ] {
            let error = settings.check("x").unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
        let at_once = |batch| DrawSettings { batch, ..DrawSettings::default() }.prompts_at_once();
        assert_eq!([1, 4, 7, 8, 33].map(at_once), [1, 1, 1, 2, 8]);
    }
}
