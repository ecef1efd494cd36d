//! Attention by itself at each level of the U-Net, of pixels to themselves and to the text: libtorch's, and our own where it fits; forward, and there and back.

use crate::timing;
use crate::{Setting, networks};
use anyhow::Result;
use ella_cuda::fused::{self, Fused};
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
type Attend = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

pub(crate) fn run(setting: &Setting) -> Result<Value> {
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
    let there = Fused::ALL.on(setting.kind, setting.device);
    let own: Option<Attend> = match states {
        None if there.pixels && fused::fits_pixels(width) => Some(Box::new(move |x| Ok(fused::pixels(&x[0], heads)?))),
        Some(states) if there.cross && fused::fits_few_keys(states, width) => {
            Some(Box::new(move |x| Ok(fused::few_keys(&x[0], &x[1], heads)?)))
        }
        _ => None,
    };
    let libtorchs: Attend = Box::new(move |x| libtorchs(x, heads));
    let theirs = times(setting, shape, &libtorchs)?;
    let own = own.map(|own| times(setting, shape, &own)).transpose()?;
    let told = |[forward, both]: [f64; 2]| json!({ "forward_ms": 1e3 * forward, "both_ms": 1e3 * both });
    Ok(json!({
        "pixels": pixels, "keys": states.unwrap_or(pixels), "heads": heads, "width": width,
        "libtorch": told(theirs), "own": own.map(told), "libtorch_over_own": own.map(|own| theirs[1] / own[1]),
    }))
}

/// Seconds of the forward pass, and of both.
fn times(setting: &Setting, shape: Shape, attend: &Attend) -> Result<[f64; 2]> {
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
    let forward = timing::time(setting.device, setting.measure, || tch::no_grad(|| attend(&inputs).map(drop)))?;
    let both = timing::time(setting.device, setting.measure, || {
        let functional = attend(&inputs)?.f_mul(&slopes)?.f_sum(Kind::Float)?;
        let _ = Tensor::f_run_backward(&[functional], &inputs, false, false)?;
        Ok(())
    })?;
    Ok([forward.median(), both.median()])
}

fn libtorchs(x: &[Tensor], heads: i64) -> Result<Tensor> {
    let parts = match x {
        [all] => all.f_chunk(3, -1)?,
        _ => std::iter::once(x[0].shallow_clone()).chain(x[1].f_chunk(2, -1)?).collect(),
    };
    let [q, k, v] = [0, 1, 2].map(|i| parts[i].f_unflatten(-1, [heads, -1])?.f_transpose(1, 2));
    let y = Tensor::f_scaled_dot_product_attention(&q?, &k?, &v?, None::<&Tensor>, 0.0, false, None, false)?;
    Ok(y.f_transpose(1, 2)?.f_flatten(2, 3)?)
}
