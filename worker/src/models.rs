//! Loads what a run trains and what it trains through, and checks that the pieces fit each other.

use crate::device;
use crate::hub::{self, HubId};
use crate::text::{self, TextIdentity};
use crate::train::lane::Networks;
use crate::train::split::Split;
use crate::train::state::{Layout, TrainState};
use crate::trained::Trained;
use ella_cuda::speed;
use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind};
use ella_model::lora::Lora;
use ella_model::params::Compute;
use ella_model::schedule::Prediction;
use ella_model::unet::UNetConfig;
use ella_model::vae::{Vae, VaeConfig};
use ella_model::weights::Weights;
use ella_proto::config::{self, ConnectorDtype, ConnectorKind as Wanted, RunConfig};
use ella_store::{Digest, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind};

/// A run's networks and its fresh state.
#[derive(Debug)]
pub struct Loaded {
    /// What a step needs.
    pub networks: Networks,
    /// What is trained, at step 0.
    pub state: TrainState,
    /// Pictures to latents.
    pub vae: Vae,
    /// Which features the connector takes.
    pub text: TextIdentity,
    /// BLAKE3 of the VAE's weights, as data sets with latents name them.
    pub vae_weights: String,
    /// BLAKE3 over all frozen networks and the schedule: which models the run is bound to.
    pub digest: Digest,
}

/// Loads everything that `config` names onto `device`.
pub fn load(config: &RunConfig, device: Device) -> Result<Loaded, ModelError> {
    let base = Base::open(&locate("base.model", &config.base.model)?)?.predicting(predicts(config));
    let text_model = locate("text.model", &config.text.model)?;
    let text = text::identity(&text_model, config.text.max_tokens)?;
    let kind = device::kind(config.base.dtype);
    let loras = config.base.loras.iter().map(|named| lora("base.loras", named)).collect::<Result<Vec<_>, _>>()?;
    let (unet, vae, schedule) = (base.unet_with(&loras, kind, device)?, base.vae(kind, device)?, base.schedule(device)?);
    for found in speed::measured(kind) {
        tracing::info!("{found}");
    }
    if vae.kind() != kind {
        tracing::info!("the VAE computes in float32: its config.json has force_upcast, because float16 overflows in it");
    }
    check_latents(unet.config(), vae.config(), base.path())?;

    let sizes = connector_config(config, unet.config(), text.width)?;
    let trained = Trained::by(config, Some(text.weights_digest.clone()));
    let layout = Arc::new(Layout::new(Connector::layout(&sizes)?).telling(trained.fields()));
    let from = config.connector.from.as_ref().map(|file| connector_file(file)).transpose()?;
    let begun_from = from.as_ref().map(Weights::digest);
    let first = match from {
        Some(weights) => {
            for told in Trained::told(&weights)?.differences(&trained, &config.text.model) {
                tracing::warn!("connector.from: {} {told}", weights.path().display());
            }
            begun(&sizes, weights, device)?
        }
        None => Connector::init(&sizes, config.run.seed, device)?,
    };
    let values: Vec<_> = first.tensors().iter().map(|(_, t)| t.shallow_clone()).collect();
    let state = TrainState::fresh(layout.clone(), layout.gather(&values, device)?)?;
    let connector = Connector::from_tensors(&sizes, layout.views(&state.buffers.params)?, Compute::fastest(kind, device)?)?;
    let digest = models_digest(&base, &loras, &text, begun_from.as_deref())?;
    let train = &config.train;
    let checkpointing = train.gradient_checkpointing;
    let connector_kind = match config.connector_dtype() {
        ConnectorDtype::Fp32 => Kind::Float,
        ConnectorDtype::Bf16 => Kind::BFloat16,
    };
    let networks = Networks {
        connector,
        unet,
        kind,
        connector_kind,
        schedule,
        snr_gamma: train.snr_gamma,
        checkpointing,
        split: Split::new(config.workers.split_on_oom),
    };
    let vae_weights = base.vae_part()?.weights.digest();
    Ok(Loaded { networks, state, vae, text, vae_weights, digest })
}

/// Where a model is on this machine: the path that is there, or else what its hub id is a name for, downloaded if need be.
/// `key` is what names it, for errors. `models/x` is a slip in a path, and asked of no hub, where `models/` is there; a revision
/// (`org/name@main`) makes it an id all the same.
pub fn locate(key: &'static str, model: &str) -> Result<PathBuf, ModelError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let in_folder_here = path.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && folder.is_dir());
    match HubId::parse(model).filter(|_| !in_folder_here || model.contains('@')) {
        Some(id) => hub::fetch(&id).map_err(|error| ModelError::Unavailable { reason: format!("{key}: {error}"), passes: error.passes() }),
        None => {
            let expected = format!("a model's folder or file, or a hub id such as org/name, as {key} names it");
            Err(ModelError::MissingFile { file: path.to_owned(), expected })
        }
    }
}

/// What the base predicts, where the config says it.
pub(crate) fn predicts(config: &RunConfig) -> Option<Prediction> {
    config.base.prediction.map(prediction)
}

/// What a base predicts, by a config's name.
pub(crate) fn prediction(named: config::Prediction) -> Prediction {
    match named {
        config::Prediction::Epsilon => Prediction::Epsilon,
        config::Prediction::VPrediction => Prediction::Velocity,
        config::Prediction::Sample => Prediction::Sample,
    }
}

/// Opens one of the LoRAs that `key` names, and tells what of it is not used (KNOWN).
pub(crate) fn lora(key: &'static str, named: &config::Lora) -> Result<Lora, ModelError> {
    let lora = Lora::open(&locate(key, &named.file)?, named.weight)?;
    if let Some(unused) = lora.unused() {
        tracing::warn!("{unused}");
    }
    Ok(lora)
}

/// The connector's kind and sizes: the config's, completed by what the base and the text encoder ask for.
///
/// # Errors
/// `connector.width` is another than the base's.
pub fn connector_config(config: &RunConfig, unet: &UNetConfig, text_width: i64) -> Result<ConnectorConfig, ModelError> {
    let c = &config.connector;
    let wanted = unet.cross_attention_dim;
    let width = c.width.map_or(wanted, |w| w as i64);
    if width != wanted {
        let rule = format!("the base's cross_attention_dim, {wanted}; leave connector.width out to take it");
        return Err(ModelError::argument("connector.width", rule, width));
    }
    let kind = match c.kind {
        Wanted::Tsc => ConnectorKind::Tsc,
        Wanted::TscZero => ConnectorKind::TscZero,
        Wanted::Resampler => ConnectorKind::Resampler,
        Wanted::Mlp => ConnectorKind::Mlp,
    };
    let (layers, heads, latents) = (c.layers as i64, c.heads as i64, c.latents as i64);
    let pooled = unet.pooled_width()?;
    Ok(ConnectorConfig { layers, heads, latents, pooled, ..ConnectorConfig::new(kind, width, text_width) })
}

pub(crate) fn check_latents(unet: &UNetConfig, vae: &VaeConfig, base: &Path) -> Result<(), ModelError> {
    let latents = vae.latent_channels;
    let name = format!("{}: unet in_channels", base.display());
    if unet.in_channels != latents {
        return Err(ModelError::argument(
            name,
            format!("the VAE's latent_channels, {latents} (inpainting U-Nets are not supported)"),
            unet.in_channels,
        ));
    }
    if unet.out_channels != latents {
        let name = format!("{}: unet out_channels", base.display());
        return Err(ModelError::argument(name, format!("the VAE's latent_channels, {latents}"), unet.out_channels));
    }
    Ok(())
}

/// The file that `connector.from` names.
fn connector_file(named: &str) -> Result<Weights, ModelError> {
    let file = locate("connector.from", named)?;
    if file.is_dir() {
        let expected = "a connector's safetensors file, as connector.from names it, and not a folder".to_owned();
        return Err(ModelError::MissingFile { file, expected });
    }
    Weights::open(&file)
}

/// The connector of a file, which must be of the config's kind and sizes.
fn begun(sizes: &ConnectorConfig, weights: Weights, device: Device) -> Result<Connector, ModelError> {
    let found = ConnectorConfig::of_file(&weights, sizes.heads)?;
    if found.kind != sizes.kind {
        let name = format!("{}: connector.from", weights.path().display());
        let rule = format!("a connector of connector.kind = \"{}\"", sizes.kind.name());
        return Err(ModelError::argument(name, rule, found.kind.name()));
    }
    if let Some((name, wanted, found)) = sizes.difference(&found) {
        let what = format!("{}: the {name} of connector.from", weights.path().display());
        return Err(ModelError::argument(what, format!("{wanted}, as the config, the base and the text model have it"), found));
    }
    Connector::from_weights(weights, sizes.heads, Kind::Float, device)
}

fn models_digest(base: &Base, loras: &[Lora], text: &TextIdentity, from: Option<&str>) -> Result<Digest, ModelError> {
    let mut hasher = Hasher::new();
    for part in [base.unet_part()?, base.vae_part()?] {
        hasher.update(part.fingerprint().as_bytes());
    }
    hasher.update(base.scheduler()?.text().as_bytes());
    for lora in loras {
        hasher.update(lora.fingerprint().as_bytes());
    }
    hasher.update(text.weights_digest.as_bytes()).update(text.tokenizer_digest.as_bytes());
    if let Some(from) = from {
        hasher.update(from.as_bytes());
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_model::connector;
    use ella_model::weights::encode_telling;

    /// A connector of each kind, with a pooled head and without, begins a run of its sizes and of no other; what its kind does not have counts for nothing.
    #[test]
    fn a_connector_of_each_kind_begins_a_run_of_its_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("connector.safetensors");
        let kinds = [ConnectorKind::Tsc, ConnectorKind::TscZero, ConnectorKind::Resampler, ConnectorKind::Mlp];
        for (kind, pooled) in kinds.into_iter().flat_map(|kind| [(kind, None), (kind, Some(24))]) {
            let sizes = ConnectorConfig { layers: 2, heads: 4, latents: 3, pooled, ..ConnectorConfig::new(kind, 16, 12) };
            let made = Connector::init(&sizes, 1, Device::Cpu).unwrap();
            connector::save(&file, made.tensors(), Kind::Float).unwrap();
            let begun = |sizes: &ConnectorConfig| begun(sizes, Weights::open(&file).unwrap(), Device::Cpu);
            let found = begun(&sizes).unwrap();
            assert!(made.tensors().iter().zip(found.tensors()).all(|((a, x), (b, y))| a == b && x == y), "{kind:?}");

            let has_blocks = kind != ConnectorKind::Mlp;
            for other in [ConnectorConfig { layers: 1, ..sizes.clone() }, ConnectorConfig { latents: 5, ..sizes.clone() }] {
                assert_eq!(begun(&other).is_err(), has_blocks, "{kind:?}");
            }
            // Heads are told by the metadata alone, and count where there is attention.
            let told = [(connector::HEADS_FIELD.to_owned(), "4".to_owned())].into();
            std::fs::write(&file, encode_telling(&file, made.tensors(), &told).unwrap()).unwrap();
            begun(&sizes).unwrap();
            let other = begun(&ConnectorConfig { heads: 2, ..sizes.clone() });
            assert_eq!(other.is_err(), has_blocks || pooled.is_some(), "{kind:?}");
            if let Err(error) = other {
                assert!(error.to_string().contains("connector heads must be 4, with which it was trained (found 2)"), "{error}");
            }
            let pooled = if pooled.is_some() { None } else { Some(24) };
            for other in [ConnectorConfig { text_width: 13, ..sizes.clone() }, ConnectorConfig { pooled, ..sizes.clone() }] {
                let error = begun(&other).unwrap_err().to_string();
                assert!(error.contains("connector.safetensors: the ") && error.contains("of connector.from"), "{error}");
            }
            let kind = kinds[(kinds.iter().position(|each| *each == kind).unwrap() + 1) % kinds.len()];
            let error = begun(&ConnectorConfig { kind, ..sizes }).unwrap_err().to_string();
            assert!(error.contains(kind.name()) && error.contains("connector.kind"), "{error}");
        }
    }
}
