//! What the connector that training begins from tells of its own training.

use std::path::Path;

use ella_model::ModelError;
use ella_model::connector::Connector;
use ella_model::part::Part;
use ella_proto::config::RunConfig;
use ella_worker::models::locate;
use ella_worker::trained::Trained;

use crate::ui::note;

/// Warns of what it was trained with otherwise than the config has it: the workers say so in their logs alone. What keeps it from being read
/// they refuse, in words.
pub(super) fn tell(config: &RunConfig) {
    let Some(Ok(file)) = config.connector.from.as_ref().map(|named| locate("connector.from", named)) else { return };
    for told in otherwise(config, &file).unwrap_or_default() {
        note(format_args!("WARNING: connector.from: {} {told}", file.display()));
    }
}

fn otherwise(config: &RunConfig, file: &Path) -> Result<Vec<String>, ModelError> {
    let trained = Trained::told(&Connector::open(file)?)?;
    let model = &config.text.model;
    // Whoever has nothing to compare it with need not read all of the text encoder's bytes.
    let text = trained.text.as_ref().map(|_| Part::open(&locate("text.model", model)?).map(|part| part.fingerprint())).transpose()?;
    Ok(trained.differences(&Trained::by(config, text), model))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_model::weights::encode_telling;
    use ella_proto::config::Padding;
    use tch::Tensor;

    #[test]
    fn a_connector_that_was_trained_otherwise_is_told_of_and_one_that_tells_nothing_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let config = "[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\npadding='fixed'\n[data]\npath='d'\n";
        let config = RunConfig::parse(config, "x", &[]).unwrap();
        let told = |trained: Trained| {
            let file = dir.path().join("c.safetensors");
            let tensors = [("a".to_owned(), Tensor::from_slice(&[1f32]))];
            std::fs::write(&file, encode_telling(Path::new("c"), &tensors, &trained.fields()).unwrap()).unwrap();
            otherwise(&config, &file).unwrap()
        };
        assert_eq!(told(Trained::default()), [""; 0]);
        let none = told(Trained { padding: Some(Padding::None), ..Trained::default() });
        assert!(matches!(&none[..], [line] if line.starts_with("was trained with padding none, and not fixed")), "{none:?}");
    }
}
