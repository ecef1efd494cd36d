//! Random networks of true shapes, made on the device itself: values of a billion parameters from the processor would take a minute.

use crate::{Setting, TOKENS};
use anyhow::Result;
use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind};
use ella_model::params::{Compute, Params};
use ella_model::t5::T5;
use ella_model::text::Text;
use ella_model::unet::UNet;
use ella_model::vae::Vae;
use ella_worker::train::lane::{LaneBatch, Networks};
use ella_worker::train::split::Split;
use ella_worker::train::state::{Layout, TrainState};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// A dtype's name in results.
pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        Kind::Float => "fp32",
        _ => "other",
    }
}

/// Values of every parameter that `build` asks for, float32 on `device`: of PyTorch's initial size, so that activations stay in range.
pub(crate) fn values<T>(build: impl Fn(&Params) -> ella_model::Result<T>, device: Device) -> Result<Vec<(String, Tensor)>> {
    let shapes = Params::shapes();
    build(&shapes)?;
    let value = |(name, shape): (String, Tensor)| -> Result<(String, Tensor)> {
        let shape = shape.size();
        let random = Tensor::f_randn(&shape, (Kind::Float, device))?;
        let fan_in = shape.iter().skip(1).product::<i64>();
        let value = match (shape.len(), name.ends_with("weight")) {
            (1, true) => random.f_mul_scalar(0.1)?.f_add_scalar(1.0)?,
            (1, false) => random.f_mul_scalar(0.02)?,
            _ => random.f_mul_scalar((3.0 * fan_in as f64).powf(-0.5))?,
        };
        Ok((name, value))
    };
    shapes.taken().into_iter().map(value).collect()
}

/// A network over such values, as `kind` on `device`.
pub(crate) fn network<T>(
    build: impl Fn(&Params) -> ella_model::Result<T>,
    values: &[(String, Tensor)],
    (kind, device): (Kind, Device),
    compute: Compute,
) -> Result<T> {
    let given = values.iter().map(|(name, value)| Ok((name.clone(), value.f_to_device(device)?.f_to_kind(kind)?)));
    let p = Params::given(given.collect::<Result<Vec<_>>>()?);
    p.compute_by(compute);
    Ok(build(&p)?)
}

/// The same without values of their own, computing as it does when it is loaded.
pub(crate) fn random<T>(build: impl Fn(&Params) -> ella_model::Result<T>, setting: &Setting) -> Result<T> {
    let Setting { kind, device, .. } = *setting;
    network(&build, &values(&build, device)?, (kind, device), Compute::fastest(kind, device)?)
}

/// The frozen text encoder.
pub(crate) fn text(setting: &Setting) -> Result<Text> {
    let config = setting.text()?;
    Ok(Text::T5(random(|p| T5::new(&config, p), setting)?))
}

/// The frozen VAE.
pub(crate) fn vae(setting: &Setting) -> Result<Vae> {
    let config = setting.preset().vae()?;
    random(|p| Vae::new(&config, p), setting)
}

/// The connector's sizes.
pub(crate) fn connector_config(setting: &Setting) -> Result<ConnectorConfig> {
    Ok(ConnectorConfig::new(ConnectorKind::Tsc, setting.preset().unet()?.cross_attention_dim, setting.text()?.d_model))
}

/// What a step goes through, and what it trains, as a run's own loading puts them together.
pub(crate) fn step(setting: &Setting, seed: u64) -> Result<(Networks, TrainState)> {
    let device = setting.device;
    let config = setting.preset().unet()?;
    let unet = random(|p| UNet::new(&config, p), setting)?;
    let sizes = connector_config(setting)?;
    let layout = Arc::new(Layout::new(Connector::layout(&sizes)?));
    let first = Connector::init(&sizes, seed, device)?;
    let first: Vec<_> = first.tensors().iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    let state = TrainState::fresh(layout.clone(), layout.gather(&first, device)?)?;
    let compute = Compute::fastest(setting.kind, device)?;
    let connector = Connector::from_tensors(&sizes, layout.views(&state.buffers.params)?, compute)?;
    let schedule = setting.preset().schedule(device)?;
    let networks = Networks {
        connector,
        unet,
        kind: setting.kind,
        connector_kind: setting.kind,
        schedule,
        snr_gamma: None,
        checkpointing: false,
        split: Split::new(false),
    };
    Ok((networks, state))
}

/// Samples as a cache has them, in host memory: pinned where there is a GPU.
pub(crate) fn samples(setting: &Setting) -> Result<LaneBatch> {
    let (b, size, width) = (setting.micro_batch, setting.latent(), setting.text()?.d_model);
    let host = |tensor: Tensor| match setting.device.is_cuda() {
        true => tensor.f_internal_pin_memory(setting.device),
        false => Ok(tensor),
    };
    let random = |shape: &[i64]| Tensor::f_randn(shape, (Kind::Float, Device::Cpu));
    Ok(LaneBatch {
        latents: host(random(&[b, 4, size, size])?)?,
        noise: host(random(&[b, 4, size, size])?)?,
        timesteps: host(Tensor::f_randint(1000, [b], (Kind::Int64, Device::Cpu))?)?,
        features: host(random(&[b, TOKENS, width])?.f_to_kind(Kind::Half)?)?,
        mask: None,
        time_ids: host(random(&[b, 6])?)?,
    })
}

/// The same samples on the device.
pub(crate) fn to_device(batch: &LaneBatch, device: Device) -> Result<LaneBatch> {
    let moved = |tensor: &Tensor| tensor.f_to_device_(device, tensor.f_kind()?, true, false);
    Ok(LaneBatch {
        latents: moved(&batch.latents)?,
        noise: moved(&batch.noise)?,
        timesteps: moved(&batch.timesteps)?,
        features: moved(&batch.features)?,
        mask: None,
        time_ids: moved(&batch.time_ids)?,
    })
}

/// Token ids and a mask that hides none, `[B, S]`.
pub(crate) fn captions(setting: &Setting) -> Result<(Tensor, Tensor)> {
    let shape = [setting.micro_batch, TOKENS];
    let ids = Tensor::f_randint(setting.text()?.vocab_size, shape, (Kind::Int64, setting.device))?;
    let mask = Tensor::f_ones(shape, (Kind::Int64, setting.device))?;
    Ok((ids, mask))
}
