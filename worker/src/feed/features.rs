//! Where a step's features come from: sidecars, or the encoder itself.

use super::FeedError;
use crate::text::{TextEncoder, TextIdentity};
use ella_dataset::{FeatureDtype, FeatureLayers, FeatureReader, FeatureSpec, Features, Padding as Stored};
use ella_proto::config::{Dtype, Layers, Padding, Text};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// The spec of the features that a text model gives under a run's settings.
pub fn spec(text: &Text, identity: &TextIdentity) -> Result<FeatureSpec, FeedError> {
    Ok(FeatureSpec {
        weights_digest: identity.weights_digest.parse()?,
        tokenizer_digest: identity.tokenizer_digest.parse()?,
        max_tokens: text.max_tokens as u32,
        padding: match text.padding {
            Padding::Fixed => Stored::Fixed,
            Padding::None => Stored::None,
        },
        layers: match text.layers {
            Layers::Last => FeatureLayers::Last,
            Layers::Average => FeatureLayers::Average,
        },
        dtype: match text.dtype {
            Dtype::Fp32 => FeatureDtype::F32,
            Dtype::Fp16 => FeatureDtype::F16,
            Dtype::Bf16 => FeatureDtype::Bf16,
        },
        width: identity.width as u32,
    })
}

/// The tensor kind of stored features.
pub fn stored_kind(dtype: FeatureDtype) -> Kind {
    match dtype {
        FeatureDtype::F16 => Kind::Half,
        FeatureDtype::F32 => Kind::Float,
        FeatureDtype::Bf16 => Kind::BFloat16,
    }
}

/// Features of one lane.
#[derive(Debug)]
pub struct LaneFeatures {
    /// `[b, S, E]`.
    pub features: Tensor,
    /// `[b, S]` bool, where rows are ragged.
    pub mask: Option<Tensor>,
    /// Captions cut at the token limit.
    pub truncated: i64,
}

/// One caption of a lane: its text, and where its features lie.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The caption; empty where it is dropped.
    pub caption: String,
    /// Shard and row, unless the caption is dropped.
    pub place: Option<(usize, usize)>,
}

/// Where features come from.
#[derive(Debug)]
pub enum FeatureSource {
    /// Complete sidecars, and the empty caption's features for dropped captions.
    Cached {
        /// The sidecars.
        features: Box<Features>,
        /// The empty caption's.
        empty: Arc<FeatureReader>,
    },
    /// Computed for every lane.
    Inline {
        /// The encoder.
        encoder: Box<TextEncoder>,
        /// Padding rule.
        padding: Padding,
    },
}

impl FeatureSource {
    /// The features of some captions, as one batch.
    pub fn lane(&self, wanted: &[Wanted], device: Device, runtime: &tokio::runtime::Handle) -> Result<LaneFeatures, FeedError> {
        match self {
            Self::Inline { encoder, padding } => {
                let captions: Vec<&str> = wanted.iter().map(|w| w.caption.as_str()).collect();
                let rows = encoder.encode(&captions)?;
                let mask = if *padding == Padding::None { Some(rows.mask()?) } else { None };
                Ok(LaneFeatures { features: rows.features, mask, truncated: rows.truncated as i64 })
            }
            Self::Cached { features, empty } => cached(features, empty, wanted, device, runtime),
        }
    }
}

fn cached(
    features: &Features,
    empty: &Arc<FeatureReader>,
    wanted: &[Wanted],
    device: Device,
    runtime: &tokio::runtime::Handle,
) -> Result<LaneFeatures, FeedError> {
    let spec = features.manifest().encoder.clone();
    let kind = stored_kind(spec.dtype);
    let mut rows = Vec::with_capacity(wanted.len());
    for want in wanted {
        let (reader, row) = match want.place {
            Some((shard, row)) => (runtime.block_on(features.shard(shard))?, row),
            None => (empty.clone(), 0),
        };
        let (bytes, tokens) = reader.row(row)?;
        let positions = i64::from(spec.stored_tokens(tokens));
        rows.push(Tensor::f_from_data_size(bytes, &[positions, i64::from(spec.width)], kind)?);
    }
    let longest = rows.iter().map(|r| r.size()[0]).max().unwrap_or(0);
    let lengths: Vec<i64> = rows.iter().map(|r| r.size()[0]).collect();
    let padded: Vec<Tensor> = rows.iter().map(|r| r.f_constant_pad_nd([0, 0, 0, longest - r.size()[0]])).collect::<Result<_, _>>()?;
    let mask = match spec.padding {
        Stored::Fixed => None,
        Stored::None => {
            let places = Tensor::f_arange(longest, (Kind::Int64, Device::Cpu))?.f_unsqueeze(0)?;
            Some(places.f_less_tensor(&Tensor::f_from_slice(&lengths)?.f_unsqueeze(1)?)?.f_to_device(device)?)
        }
    };
    Ok(LaneFeatures { features: Tensor::f_stack(&padded, 0)?.f_to_device(device)?, mask, truncated: 0 })
}
