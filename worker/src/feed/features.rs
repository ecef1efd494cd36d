//! Where a step's features come from: sidecars, or the encoder itself.

use super::staging::{Input, Staging};
use super::{Captions, Encoding, FeedError};
use crate::embed::{BATCH, ShardEncoder};
use crate::models;
use crate::text::{TextEncoder, TextIdentity, TextOptions};
use ella_dataset::order::SampleRef;
use ella_dataset::{DataError, DataSet, FeatureDtype, FeatureLayers, FeatureSet, FeatureSpec, Features, Padding as Stored};
use ella_proto::config::{Dtype, Features as Choice, Layers, Padding, RunConfig, Text};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

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
pub(super) struct LaneFeatures {
    /// `[b, S, E]`.
    pub features: Tensor,
    /// `[b, S]` bool, where rows are ragged.
    pub mask: Option<Tensor>,
    /// Captions cut at the token limit.
    pub truncated: i64,
}

/// One caption of a lane: its text, and where its features lie.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// The caption; empty where it is dropped.
    pub caption: String,
    /// The sample, unless the caption is dropped.
    pub place: Option<SampleRef>,
    /// The column that the caption is from, among those that are trained on.
    pub column: usize,
}

/// Where features come from.
#[derive(Debug)]
pub enum FeatureSource {
    /// Complete sidecars of every column, with the empty caption's features for dropped captions.
    Cached(Vec<Arc<Features>>),
    /// Sidecars that are made ahead of the steps.
    Ahead(Arc<Encoding>),
    /// Computed for every lane.
    Inline {
        /// The encoder.
        encoder: Box<TextEncoder>,
        /// Padding rule.
        padding: Padding,
    },
}

impl FeatureSource {
    /// Where a run takes its features from. Blocks; call it outside of the runtime.
    ///
    /// # Errors
    /// If they must be there and are not, or the encoder is needed and cannot be loaded.
    pub fn open(
        config: &RunConfig,
        (data, captions): (&Arc<DataSet>, &Arc<Captions>),
        (identity, device): (&TextIdentity, Device),
        runtime: &Handle,
    ) -> Result<Self, FeedError> {
        let (text, spec) = (&config.text, spec(&config.text, identity)?);
        let model = || models::locate("text.model", &text.model);
        match text.features {
            Choice::Cached => {}
            Choice::Inline => {
                let Text { max_tokens, padding, layers, dtype, .. } = *text;
                let options = TextOptions { model: model()?, max_tokens, padding, layers, dtype };
                return Ok(Self::Inline { encoder: Box::new(TextEncoder::load(&options, device)?), padding });
            }
            Choice::Ahead => {
                let sets = runtime.block_on(begin(data, captions, &spec))?;
                if !runtime.block_on(are_whole(&sets))? {
                    let encoder = ShardEncoder::load(text, model()?, spec, device, (BATCH, config.workers.threads))?
                        .splitting(config.workers.split_on_oom);
                    return Ok(Self::Ahead(Arc::new(Encoding::open((data, captions), sets, encoder, runtime)?)));
                }
            }
        }
        let whole = captions.names().map(|column| Ok(Arc::new(runtime.block_on(data.features(&spec, column))?)));
        Ok(Self::Cached(whole.collect::<Result<_, FeedError>>()?))
    }

    /// The features of some captions, as one batch.
    pub(super) fn lane(&self, wanted: &[Wanted], staging: &mut Staging, runtime: &Handle) -> Result<LaneFeatures, FeedError> {
        match self {
            Self::Inline { encoder, padding } => {
                let captions: Vec<&str> = wanted.iter().map(|w| w.caption.as_str()).collect();
                let rows = encoder.encode(&captions)?;
                let mask = if *padding == Padding::None { Some(rows.mask()?) } else { None };
                Ok(LaneFeatures { features: rows.features, mask, truncated: rows.truncated as i64 })
            }
            Self::Cached(_) | Self::Ahead(_) => cached(self.sidecars(), wanted, staging, runtime),
        }
    }

    /// The sidecars, if there are any.
    pub(super) fn sidecars(&self) -> &[Arc<Features>] {
        match self {
            Self::Cached(features) => features,
            Self::Ahead(encoding) => encoding.features(),
            Self::Inline { .. } => &[],
        }
    }

    /// What encodes ahead, if anything does.
    pub(super) fn encoding(&self) -> Option<&Arc<Encoding>> {
        if let Self::Ahead(encoding) = self { Some(encoding) } else { None }
    }
}

/// The sidecars of every column, begun if they were not.
async fn begin(data: &DataSet, captions: &Captions, spec: &FeatureSpec) -> Result<Vec<FeatureSet>, DataError> {
    let mut sets = Vec::new();
    for column in captions.names() {
        sets.push(data.begin_features(spec, column).await?);
    }
    Ok(sets)
}

async fn are_whole(sets: &[FeatureSet]) -> Result<bool, DataError> {
    for set in sets {
        if set.empty().await?.is_none() || !set.missing().await?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where rows lie; none is the empty caption's.
type Places = Vec<Option<SampleRef>>;
/// Which parts of a batch they fill.
type Parts = Vec<usize>;

fn cached(columns: &[Arc<Features>], wanted: &[Wanted], staging: &mut Staging, runtime: &Handle) -> Result<LaneFeatures, FeedError> {
    let Some(first) = columns.first() else { return Err(FeedError::NoColumn) };
    let spec = first.spec();
    // Where each column's rows lie, and which parts of the batch they fill.
    let rows: Vec<(&Features, Places, Parts)> = columns
        .iter()
        .enumerate()
        .map(|(column, features)| {
            let (parts, at) = wanted.iter().enumerate().filter(|(_, w)| w.column == column).map(|(i, w)| (i, w.place)).unzip();
            (&**features, at, parts)
        })
        .collect();
    let mut positions = vec![0; wanted.len()];
    for (features, at, parts) in &rows {
        for (part, count) in parts.iter().zip(runtime.block_on(features.positions(at))?) {
            positions[*part] = count;
        }
    }
    let longest = positions.iter().max().copied().unwrap_or(0);
    let shape = [wanted.len() as i64, longest as i64, i64::from(spec.width)];
    let part = longest * spec.token_bytes();
    let copy = |bytes: &mut [u8]| {
        for (features, at, parts) in &rows {
            runtime.block_on(features.copy(at, parts, part, bytes))?;
        }
        Ok(())
    };
    let rows = staging.assemble(Input::Features, (&shape, stored_kind(spec.dtype)), copy)?;
    let mask = match spec.padding {
        Stored::Fixed => None,
        Stored::None => {
            let places = Tensor::f_arange(longest as i64, (Kind::Int64, Device::Cpu))?.f_unsqueeze(0)?;
            let lengths: Vec<i64> = positions.iter().map(|count| *count as i64).collect();
            let mask = places.f_less_tensor(&Tensor::f_from_slice(&lengths)?.f_unsqueeze(1)?)?;
            Some(mask.f_to_device(rows.device())?)
        }
    };
    Ok(LaneFeatures { features: rows, mask, truncated: 0 })
}
