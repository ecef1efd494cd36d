//! What a connector's file tells: its kind and whether it has a pooled head, by the names of its tensors, its sizes, by their shapes, and its heads, by
//! its metadata.

use super::{ConnectorConfig, ConnectorKind, DEFAULT_HEADS, HEADS_FIELD};
use crate::error::{ModelError, Result};
use crate::weights::Weights;

/// The kind and sizes that a connector's file implies, where it is asked for so many heads.
pub(super) fn config_of(weights: &Weights, asked: Option<i64>) -> Result<ConnectorConfig> {
    let kind = kind_of(weights)?;
    let input = if kind == ConnectorKind::Mlp { "connector.linear_1.weight" } else { "connector.proj_in.weight" };
    let told = weights.told(HEADS_FIELD, "a whole number", |text| text.parse().ok())?;
    let heads = asked.or(told).unwrap_or(DEFAULT_HEADS);
    let mut config = ConnectorConfig { heads, ..ConnectorConfig::new(kind, 0, 0) };
    if kind != ConnectorKind::Mlp {
        config.latents = matrix(weights, "connector.latents")?.0;
        config.layers = layers(weights);
    }
    (config.width, config.text_width) = matrix(weights, input)?;
    if kind.is_timed() {
        (config.time_embed_dim, config.time_channel) = matrix(weights, "time_embedding.linear_1.weight")?;
    }
    if weights.names().any(|name| name.starts_with("pool.")) {
        config.pooled = Some(matrix(weights, "pool.c_proj.weight")?.0);
    }
    // Of as many heads as one likes it is a network, but another one.
    match told.filter(|told| config.attends() && *told != heads) {
        Some(told) => {
            let what = format!("{}: connector heads", weights.path().display());
            Err(ModelError::argument(what, format!("{told}, with which it was trained"), heads))
        }
        None => Ok(config),
    }
}

/// Told by groups of names rather than by one, so that of a file that lacks a tensor just that tensor is found missing.
fn kind_of(weights: &Weights) -> Result<ConnectorKind> {
    let any = |test: fn(&str) -> bool| weights.names().any(test);
    if any(|name| name.starts_with("connector.linear_")) {
        Ok(ConnectorKind::Mlp)
    } else if any(|name| name.starts_with("connector.perceiver_blocks.") && name.contains(".gate_linear.")) {
        Ok(ConnectorKind::TscZero)
    } else if any(|name| name.starts_with("time_embedding.") || name.starts_with("connector.time_aware_linear.")) {
        Ok(ConnectorKind::Tsc)
    } else if any(|name| name.starts_with("connector.")) {
        Ok(ConnectorKind::Resampler)
    } else {
        Err(ModelError::NotConnector { file: weights.path().into(), keys: weights.names().map(str::to_owned).collect() })
    }
}

fn matrix(weights: &Weights, name: &str) -> Result<(i64, i64)> {
    match *weights.describe(name)?.0 {
        [rows, columns] => Ok((rows, columns)),
        ref found => {
            Err(ModelError::WrongShape { file: weights.path().into(), key: name.into(), expected: vec![-1, -1], found: found.into() })
        }
    }
}

fn layers(weights: &Weights) -> i64 {
    let there = |n: &i64| weights.shape(&format!("connector.perceiver_blocks.{n}.attn.in_proj_weight")).is_some();
    (0..).take_while(there).count() as i64
}
