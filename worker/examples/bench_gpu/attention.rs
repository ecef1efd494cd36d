//! Attention by itself at each level of the U-Net, of pixels to themselves and to the text: libtorch's, and our own where it fits; forward, and there and back.

use crate::timing;
use crate::{Setting, networks};
use anyhow::Result;
use ella_cuda::fused::Fused;
use ella_cuda::speed;
use ella_model::params::Compute;
use ella_worker::precision::Precision;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// One level's attention.
#[derive(Clone, Copy, Debug)]
struct Shape {
    pixels: i64,
    /// States of the text that they attend to; none: to themselves.
    states: Option<i64>,
    heads: i64,
    width: i64,
}

/// Makes of queries, keys and values in one tensor, or of queries and both others, what an attention mixes.
type Attend = fn(&[Tensor], i64) -> ella_cuda::Result<Tensor>;

pub(crate) fn run(setting: &Setting) -> Result<Value> {
    // As a run has it: what breaks at these sizes is timed there first, and told by its name.
    Precision { tf32: false, deterministic: false }.set(setting.device)?;
    Compute::fastest(setting.kind, setting.device)?;
    let (config, states) = (setting.preset().unet()?, networks::connector_config(setting)?.latents);
    let mut rows = Vec::new();
    for (level, (channels, heads)) in config.block_out_channels.iter().zip(&config.heads).enumerate() {
        let pixels = (setting.latent() >> level).max(1).pow(2);
        for states in [None, Some(states)] {
            rows.push(row(setting, Shape { pixels, states, heads: *heads, width: channels / heads })?);
        }
    }
    Ok(json!({ "micro_batch": setting.micro_batch, "attentions": rows }))
}

fn row(setting: &Setting, shape: Shape) -> Result<Value> {
    let Shape { pixels, states, heads, width } = shape;
    // All that there are, however fast, but for what is left out.
    let there = Fused { timed: false, ..Fused::from_env()?.unwrap_or(Fused::ALL) }.on(setting.kind, setting.device);
    let fits = match states {
        None => there.takes_pixels(width, setting.kind),
        Some(states) => there.takes_few_keys(states, width, setting.kind),
    };
    let theirs = times(setting, shape, speed::libtorchs_attention)?;
    let own = fits.then(|| times(setting, shape, speed::own_attention)).transpose()?;
    let told = |[forward, both]: [f64; 2]| json!({ "forward_ms": 1e3 * forward, "both_ms": 1e3 * both });
    Ok(json!({
        "pixels": pixels, "keys": states.unwrap_or(pixels), "heads": heads, "width": width,
        "libtorch": told(theirs), "own": own.map(told), "libtorch_over_own": own.map(|own| theirs[1] / own[1]),
    }))
}

/// Seconds of the forward pass, and of both.
fn times(setting: &Setting, shape: Shape, attend: Attend) -> Result<[f64; 2]> {
    let channels = shape.heads * shape.width;
    let leaf = |tokens, channels| -> Result<Tensor> {
        let x = Tensor::f_randn([setting.micro_batch, tokens, channels], (Kind::Float, setting.device))?.f_to_kind(setting.kind)?;
        Ok(x.f_set_requires_grad(true)?)
    };
    let inputs = match shape.states {
        None => vec![leaf(shape.pixels, 3 * channels)?],
        Some(states) => vec![leaf(shape.pixels, channels)?, leaf(states, 2 * channels)?],
    };
    let slopes = leaf(shape.pixels, channels)?.detach();
    let forward = timing::time(setting.device, setting.measure, || tch::no_grad(|| Ok(attend(&inputs, shape.heads).map(drop)?)))?;
    let both = timing::time(setting.device, setting.measure, || {
        let functional = attend(&inputs, shape.heads)?.f_mul(&slopes)?.f_sum(Kind::Float)?;
        let _ = Tensor::f_run_backward(&[functional], &inputs, false, false)?;
        Ok(())
    })?;
    Ok([forward.median(), both.median()])
}
