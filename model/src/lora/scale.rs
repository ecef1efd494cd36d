//! The scale of a LoRA's layers: alpha / rank, where alpha may be a tensor, or lie in what diffusers and PEFT write beside the tensors.

use std::path::PathBuf;

use serde_json::{Map, Value};
use tch::{Device, Kind};

use super::Layer;
use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::weights::Weights;

/// The header's entry in which diffusers keeps PEFT's settings (`LORA_ADAPTER_METADATA_KEY`).
const METADATA: &str = "lora_adapter_metadata";

/// PEFT's file of settings, beside `adapter_model.safetensors`.
const ADAPTER: &str = "adapter_config.json";

/// The settings that hold where a layer has no alpha of its own.
#[derive(Clone, Debug, Default)]
pub(super) struct Scale {
    /// Alpha of all layers; none: the rank, for a scale of 1.
    alpha: Option<f64>,
    /// Alpha of layers by the end of their names.
    by_layer: Vec<(String, f64)>,
    /// Divide by √rank ("rank-stabilized").
    root: bool,
}

impl Scale {
    /// Reads the settings of a LoRA file, if it has any.
    pub(super) fn read(weights: &Weights) -> Result<Self> {
        match settings(weights)? {
            None => Ok(Scale::default()),
            Some(config) => Self::parse(&config),
        }
    }

    fn parse(config: &ConfigFile) -> Result<Self> {
        let number = "a finite number";
        for field in ["use_dora", "lora_bias"] {
            config.only(field, &[false.into()])?;
        }
        let alpha: Option<f64> = config.get("lora_alpha", number)?;
        let patterns: Map<String, Value> = config.optional("alpha_pattern", "an object of numbers by layer", Map::new())?;
        let mut by_layer = Vec::new();
        for (layer, alpha) in patterns {
            // PEFT takes them for regular expressions; what diffusers writes is names.
            let plain = layer.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
            let alpha = alpha.as_f64().filter(|_| plain);
            by_layer.push((layer, alpha.ok_or_else(|| config.refuse("alpha_pattern", "an object of numbers by the layers' plain names"))?));
        }
        Ok(Scale { alpha, by_layer, root: config.optional("use_rslora", "true or false", false)? })
    }

    /// What a layer's up · down is multiplied by; `name` is the layer's in diffusers' naming.
    pub(super) fn of(&self, layer: &Layer, name: &str, rank: i64, weights: &Weights) -> Result<f64> {
        let alpha = match &layer.alpha {
            Some(key) => Some(number(weights, key)?),
            None => self.by_layer.iter().find(|(end, _)| ends(name, end)).map(|(_, alpha)| *alpha).or(self.alpha),
        };
        let rank = rank as f64;
        Ok(alpha.map_or(1.0, |alpha| alpha / if self.root { rank.sqrt() } else { rank }))
    }
}

/// Whether a layer's name is `end`, or ends in it as a whole part.
fn ends(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// The settings in the file's header, or beside the file if it is PEFT's own.
fn settings(weights: &Weights) -> Result<Option<ConfigFile>> {
    if let Some(text) = weights.metadata(METADATA) {
        let label = PathBuf::from(format!("{}: {METADATA}", weights.path().display()));
        let Ok(Value::Object(fields)) = serde_json::from_str(text) else {
            return Err(ModelError::NotConfig { file: label, reason: "is not a JSON object".into() });
        };
        let unet = fields.into_iter().filter_map(|(name, value)| Some((name.strip_prefix("unet.")?.to_owned(), value)));
        return Ok(Some(ConfigFile::from_map(&label, unet.collect())));
    }
    match weights.names().any(|name| name.starts_with("base_model.model.")) {
        true => ConfigFile::open(&weights.path().with_file_name(ADAPTER)).map(Some),
        false => Ok(None),
    }
}

/// A tensor of one finite number.
fn number(weights: &Weights, key: &str) -> Result<f64> {
    let (shape, _) = weights.describe(key)?;
    let shape = shape.to_vec();
    let refuse = |found: String| {
        let expected = "one finite number".to_owned();
        ModelError::LoraMismatch { file: weights.path().into(), key: key.into(), expected, found }
    };
    if shape.iter().product::<i64>() != 1 {
        return Err(refuse(format!("shape {shape:?}")));
    }
    let value = f64::try_from(weights.load(key, &shape, Kind::Double, Device::Cpu)?.f_reshape([1i64; 0])?)?;
    if value.is_finite() { Ok(value) } else { Err(refuse(value.to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<Scale> {
        match value {
            Value::Object(fields) => Scale::parse(&ConfigFile::from_map("x".as_ref(), fields)),
            other => panic!("not an object: {other}"),
        }
    }

    #[test]
    fn settings_are_read_or_refused_by_name() {
        let scale = parse(json!({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}, "use_rslora": true, "use_dora": false})).unwrap();
        assert_eq!((scale.alpha, scale.root), (Some(8.0), true));
        assert!(ends("a.to_q", &scale.by_layer[0].0) && ends("to_q", "to_q") && !ends("a.into_q", "to_q"));
        for (field, value) in [("use_dora", json!(true)), ("lora_bias", json!(true)), ("alpha_pattern", json!({"to_.*": 1}))] {
            let error = parse(json!({ field: value })).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
