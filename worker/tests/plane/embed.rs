//! Embedding: resumable, the same bytes whoever does it, and bound to everything that changes a feature.

use crate::world::{SCENES, config, embedded, open, path};
use ella_dataset::DataError;
use ella_proto::config::RunConfig;
use ella_worker::embed::ShardEncoder;
use ella_worker::feed::spec;
use ella_worker::job::Tell;
use ella_worker::text::identity;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::Device;

pub(crate) fn folder(config: &RunConfig) -> PathBuf {
    let spec = spec(&config.text, &identity(Path::new(&config.text.model), config.text.max_tokens).unwrap()).unwrap();
    Path::new(&config.data.path).join("features").join(spec.fingerprint().to_string()).join("caption")
}

pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    entries.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap())).collect()
}

#[test]
fn an_interrupted_embedding_goes_on_and_ends_with_the_same_bytes() {
    for set in ["text.padding=none", "text.padding=fixed"] {
        // A length of their own, so that no other test meets them half-made.
        let config = config(&[set, "text.max_tokens=24"]);
        let first = embedded(&config);
        assert_eq!(first["embedded"], SCENES);
        assert!(first["truncated"] > 0 && first["tokens_kept"] <= first["tokens_computed"]);
        let folder = folder(&config);
        let whole = files(&folder);
        let rows = open(&config).manifest().shards[1].rows;

        let again = embedded(&config);
        assert_eq!(again.get("embedded"), None, "all of it was there: {again:?}");

        // Killed between a file and its record, and before the manifest.
        let victims = whole.keys().filter(|name| name.starts_with("00000-") && name.contains("-0001."));
        let victims: Vec<_> = victims.chain(["manifest.json".to_owned(), "empty.json".to_owned()].iter()).cloned().collect();
        assert_eq!(victims.len(), 4, "{:?}", whole.keys());
        for name in victims {
            std::fs::remove_file(folder.join(name)).unwrap();
        }
        assert_eq!(embedded(&config)["embedded"], rows);
        assert!(files(&folder) == whole);
    }
}

#[test]
fn what_changes_a_feature_changes_its_fingerprint() {
    let known = folder(&config(&[]));
    for other in ["text.padding=none", "text.dtype=bf16", "text.max_tokens=41", "text.layers=average"] {
        assert_ne!(folder(&config(&[other])), known, "{other}");
    }
    // Other weights, tokenizer or configuration under the same file names.
    let copy = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        std::fs::copy(path("text").join(file), copy.path().join(file)).unwrap();
    }
    let of_copy = || identity(copy.path(), 40).unwrap();
    let first = of_copy();
    assert_eq!(first, identity(&path("text"), 40).unwrap());
    let text = std::fs::read_to_string(copy.path().join("config.json")).unwrap();
    std::fs::write(
        copy.path().join("config.json"),
        text.replace("\"relative_attention_max_distance\":128", "\"relative_attention_max_distance\":64")
            .replace("\"relative_attention_max_distance\": 128", "\"relative_attention_max_distance\": 64"),
    )
    .unwrap();
    assert_ne!(of_copy().weights_digest, first.weights_digest);
}

/// The store is asked whether it takes the file while nothing is encoded yet, with the tokens that it will hold.
#[test]
fn a_shard_of_too_large_features_is_refused_before_any_caption_is_encoded() {
    let config = config(&["text.padding=none"]);
    let spec = spec(&config.text, &identity(Path::new(&config.text.model), config.text.max_tokens).unwrap()).unwrap();
    let encoder = ShardEncoder::load(&config.text, path("text"), spec, Device::Cpu, (2, 1)).unwrap();
    let captions = ["a red cube", "", "two blue balls on a table"].map(str::to_owned);
    let (mut told, tell) = (Vec::new(), Tell::default());
    let refuse = |tokens: &[u32]| {
        told = tokens.to_vec();
        Err(DataError::FeaturesTooLarge { file: "s3://b/f".into(), bytes: 2, most: 1, shard_mib: 3 })
    };
    let error = encoder.embed(&captions, refuse, &tell).unwrap_err();
    assert!(error.is_permanent() && error.to_string().contains("--shard-mib 3 or less"), "{error}");
    assert_eq!(tell.done(), 0);
    let (_, counts) = encoder.embed(&captions, |_| Ok(()), &tell).unwrap();
    assert_eq!((told.len() as u64, told.iter().map(|tokens| u64::from(*tokens)).sum::<u64>()), (counts["embedded"], counts["tokens_kept"]));
}
