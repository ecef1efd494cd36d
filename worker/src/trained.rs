//! How a connector was trained, as far as it decides how the connector is to be used: fields `ella.*` in the metadata of its file, which
//! other programs pass over. They follow from a run's config and the contents of its models alone, so they are the same whoever trains (SAME).

use std::collections::BTreeMap;

use ella_model::ModelError;
use ella_model::connector::HEADS_FIELD;
use ella_model::weights::Weights;
use ella_proto::config::{Dtype, Layers, Padding, RunConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::draw::Reading;

const PADDING: &str = "ella.padding";
const MAX_TOKENS: &str = "ella.max_tokens";
const LAYERS: &str = "ella.layers";
const TEXT: &str = "ella.text";
const TEXT_DTYPE: &str = "ella.text_dtype";

/// How a connector was trained, or is to be used; none: that is not known, or not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trained {
    /// Its attention heads.
    pub heads: Option<i64>,
    /// What becomes of the positions after a text's end.
    pub padding: Option<Padding>,
    /// The longest text in tokens.
    pub max_tokens: Option<usize>,
    /// Which of the text encoder's layers are taken.
    pub layers: Option<Layers>,
    /// The text encoder: [`crate::text::TextIdentity::weights_digest`].
    pub text: Option<String>,
    /// What the text encoder computed in.
    pub text_dtype: Option<Dtype>,
}

/// How texts are read before a connector.
#[derive(Clone, Copy, Debug)]
pub struct Reads {
    /// Prompts.
    pub prompt: Reading,
    /// The negative prompt.
    pub negative: Reading,
    /// Which of the text encoder's layers are taken.
    pub layers: Layers,
    /// What the text encoder computes in.
    pub dtype: Dtype,
}

impl Trained {
    /// By a run, and the text encoder of this fingerprint.
    pub fn by(config: &RunConfig, text: Option<String>) -> Self {
        let (heads, read) = (config.connector.heads as i64, &config.text);
        let (padding, layers, text_dtype) = (Some(read.padding), Some(read.layers), Some(read.dtype));
        Self { heads: Some(heads), padding, max_tokens: Some(read.max_tokens), layers, text, text_dtype }
    }

    /// As a connector's file tells. The authors' files tell nothing.
    ///
    /// # Errors
    /// A field of the file's metadata holds what it cannot.
    pub fn told(weights: &Weights) -> Result<Self, ModelError> {
        Ok(Self {
            heads: weights.told(HEADS_FIELD, "a whole number", |text| text.parse().ok())?,
            padding: weights.told(PADDING, "fixed or none", meant)?,
            max_tokens: weights.told(MAX_TOKENS, "a whole number", |text| text.parse().ok())?,
            layers: weights.told(LAYERS, "last or average", meant)?,
            text: weights.metadata(TEXT).map(str::to_owned),
            text_dtype: weights.told(TEXT_DTYPE, "fp32, fp16 or bf16", meant)?,
        })
    }

    /// The fields of metadata that tell it.
    pub fn fields(&self) -> BTreeMap<String, String> {
        let fields = [
            (HEADS_FIELD, self.heads.map(|heads| heads.to_string())),
            (PADDING, self.padding.map(word)),
            (MAX_TOKENS, self.max_tokens.map(|most| most.to_string())),
            (LAYERS, self.layers.map(word)),
            (TEXT, self.text.clone()),
            (TEXT_DTYPE, self.text_dtype.map(word)),
        ];
        fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }

    /// How texts are read: as it is asked for, or else as in training, or else as the released connectors were trained. The text encoder takes
    /// `longest` tokens; the negative prompt may be read by a padding rule of its own; `dtype` is what the other networks compute in.
    pub fn reads(&self, asked: &Self, negative: Option<Padding>, longest: Option<i64>, dtype: Dtype) -> Reads {
        let padding = asked.padding.or(self.padding).unwrap_or_default();
        let reading = |padding| Reading::new(padding, asked.max_tokens.or(self.max_tokens), longest);
        let layers = asked.layers.or(self.layers).unwrap_or_default();
        let dtype = asked.text_dtype.or(self.text_dtype).unwrap_or(dtype);
        Reads { prompt: reading(padding), negative: reading(negative.unwrap_or(padding)), layers, dtype }
    }

    /// What of the reading of texts is asked for otherwise than it was trained, a line each. Heads are not among it: a network of others is
    /// another one, and refused; nor the text encoder's dtype, which changes what it says by less than another wording does. `model` names the text encoder that is asked for.
    pub fn differences(&self, asked: &Self, model: &str) -> Vec<String> {
        let texts = |(trained, asked): (String, String)| (short(&trained).to_owned(), format!("{} ({model})", short(&asked)));
        let differences = [
            ("padding", unlike(&self.padding, &asked.padding).map(|(trained, asked)| (word(trained), word(asked)))),
            ("max_tokens", unlike(&self.max_tokens, &asked.max_tokens).map(|(trained, asked)| (trained.to_string(), asked.to_string()))),
            ("layers", unlike(&self.layers, &asked.layers).map(|(trained, asked)| (word(trained), word(asked)))),
            ("the text encoder of fingerprint", unlike(&self.text, &asked.text).map(texts)),
        ];
        let line = |(name, both): (&str, Option<(String, String)>)| {
            both.map(|(trained, asked)| format!("was trained with {name} {trained}, and not {asked}: it may follow texts less well"))
        };
        differences.into_iter().filter_map(line).collect()
    }
}

/// What is known of both, and not the same.
fn unlike<T: Clone + PartialEq>(one: &Option<T>, other: &Option<T>) -> Option<(T, T)> {
    one.clone().zip(other.clone()).filter(|(one, other)| one != other)
}

/// As much of a digest as people compare.
fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// A value's name in a config.
fn word(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The value of a name.
fn meant<T: DeserializeOwned>(word: &str) -> Option<T> {
    serde_json::from_value(Value::String(word.to_owned())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_model::weights::encode_telling;
    use std::path::Path;
    use tch::Tensor;

    fn trained() -> Trained {
        Trained {
            heads: Some(4),
            padding: Some(Padding::None),
            max_tokens: Some(96),
            layers: Some(Layers::Average),
            text: Some("3f2a91c0d4e5b6a7".to_owned()),
            text_dtype: Some(Dtype::Fp16),
        }
    }

    fn file(fields: &BTreeMap<String, String>) -> (tempfile::TempDir, Weights) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        let tensors = [("a".to_owned(), Tensor::from_slice(&[1f32, 2.0, 3.0]))];
        std::fs::write(&path, encode_telling(Path::new("c"), &tensors, fields).unwrap()).unwrap();
        let weights = Weights::open(&path).unwrap();
        (folder, weights)
    }

    #[test]
    fn what_a_file_is_told_it_tells() {
        for trained in [trained(), Trained { padding: Some(Padding::Fixed), layers: Some(Layers::Last), ..trained() }, Trained::default()] {
            let (_folder, weights) = file(&trained.fields());
            assert_eq!(Trained::told(&weights).unwrap(), trained);
            assert_eq!(weights.metadata("format"), Some("pt"), "transformers asks for it");
        }
        for (field, rule) in [
            (PADDING, "fixed or none"),
            (MAX_TOKENS, "a whole number"),
            (LAYERS, "last or average"),
            (HEADS_FIELD, "a whole number"),
            (TEXT_DTYPE, "fp32, fp16 or bf16"),
        ] {
            let (_folder, weights) = file(&BTreeMap::from([(field.to_owned(), "many".to_owned())]));
            let error = Trained::told(&weights).unwrap_err().to_string();
            assert!(error.contains("c.safetensors") && error.contains(field) && error.contains(rule) && error.contains("many"), "{error}");
        }
    }

    #[test]
    fn texts_are_read_as_in_training_unless_it_is_said_otherwise() {
        let read = |trained: &Trained, asked: Trained, negative| {
            let Reads { prompt, negative, layers, dtype } = trained.reads(&asked, negative, Some(512), Dtype::Bf16);
            (prompt.padding, prompt.most, negative.padding, layers, dtype)
        };
        let (fixed, none) = (Padding::Fixed, Padding::None);
        assert_eq!(read(&trained(), Trained::default(), None), (none, 96, none, Layers::Average, Dtype::Fp16));
        assert_eq!(read(&trained(), Trained::default(), Some(fixed)), (none, 96, fixed, Layers::Average, Dtype::Fp16));
        let (layers, text_dtype) = (Some(Layers::Last), Some(Dtype::Fp32));
        let asked = || Trained { padding: Some(fixed), max_tokens: Some(40), layers, text_dtype, ..Trained::default() };
        assert_eq!(read(&trained(), asked(), None), (fixed, 40, fixed, Layers::Last, Dtype::Fp32));
        // A file that does not tell is used as the released ones.
        assert_eq!(read(&Trained::default(), Trained::default(), None), (fixed, 128, fixed, Layers::Last, Dtype::Bf16));

        assert_eq!(trained().differences(&trained(), "t5"), [""; 0]);
        assert_eq!(trained().differences(&Trained::default(), "t5"), [""; 0]);
        assert_eq!(Trained::default().differences(&trained(), "t5"), [""; 0]);
        let lines = trained().differences(&Trained { text: Some("0".repeat(64)), ..asked() }, "models/t5");
        let words = [
            "padding none, and not fixed",
            "max_tokens 96, and not 40",
            "layers average, and not last",
            "3f2a91c0d4e5, and not 000000000000 (models/t5)",
        ];
        assert!(lines.len() == 4 && lines.iter().zip(words).all(|(line, words)| line.contains(words)), "{lines:?}");
    }
}
