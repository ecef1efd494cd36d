//! Whether the models that draw belong together, and what a config calls their samplers.

use std::path::Path;

use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::connector::ConnectorConfig;
use ella_model::sampler::Method;
use ella_model::text::TextConfig;
use ella_model::unet::UNetConfig;
use ella_proto::config::Sampler;

/// Refuses a connector that was made for another base, or another text encoder. Each comes with where it was read.
///
/// # Errors
/// [`ModelError::Mismatch`], which names both.
pub fn check_fit(
    (file, connector): (&Path, &ConnectorConfig),
    (base, unet): (&Base, &UNetConfig),
    (model, text): (&Path, &TextConfig),
) -> Result<(), ModelError> {
    let fits = |what: &'static str, found: i64, other: &Path, expected: i64| match found == expected {
        true => Ok(()),
        false => Err(ModelError::Mismatch { file: file.to_owned(), what, found, other: other.display().to_string(), expected }),
    };
    fits("the connector's width", connector.width, base.path(), unet.cross_attention_dim)?;
    let (pooled, wanted) = (connector.pooled.unwrap_or(0), unet.pooled_width()?.unwrap_or(0));
    fits("the width of the connector's pooled text (0: none)", pooled, base.path(), wanted)?;
    fits("the connector's text width", connector.text_width, model, text.width())
}

/// The sampler of a config's name.
pub fn method(sampler: Sampler) -> Method {
    match sampler {
        Sampler::Ddim => Method::Ddim,
        Sampler::Euler => Method::Euler,
        Sampler::EulerAncestral => Method::EulerAncestral,
        Sampler::Dpm2M => Method::Dpm2M,
        Sampler::Dpm2MKarras => Method::Dpm2MKarras,
    }
}
