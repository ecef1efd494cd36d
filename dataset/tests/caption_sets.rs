//! Columns of captions that are added later.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{good_tar, small, sources, store, threads};
use ella_dataset::{
    CaptionSet, CaptionSpec, Counts, DataError, DataSet, FeatureDtype, FeatureLayers, FeatureSpec, FeatureWriter, Made, Padding,
    captions_in, prepare,
};
use ella_store::Digest;
use serde_json::json;
use tempfile::TempDir;

async fn prepared() -> (TempDir, DataSet) {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 20))]).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    assert!(data.manifest().shards.len() > 2);
    (out, data)
}

fn spec(model: &str) -> CaptionSpec {
    CaptionSpec { column: "dense".into(), made_by: json!({"model": model, "limit": 200}) }
}

fn counts(counts: &[(&str, u64)]) -> Counts {
    counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

fn keys(captions: &[String]) -> Vec<String> {
    (0..captions.len()).map(|row| format!("key {row}")).collect()
}

/// Captions as a captioner makes them: an empty one was declined.
fn made(captions: &[String]) -> Vec<Made> {
    let one = |caption: &String| match caption.as_str() {
        "" => Made { refused: Some(("empty".into(), "stop".into())), input_tokens: 3, ..Made::default() },
        caption => Made { caption: caption.to_owned(), input_tokens: 3, output_tokens: 2, ..Made::default() },
    };
    captions.iter().map(one).collect()
}

async fn write(set: &CaptionSet, shard: usize, captions: &[String]) -> Result<Counts, DataError> {
    set.write(shard, &keys(captions), &made(captions)).await
}

/// Captions of a shard; of every third row there is none.
fn captions(data: &DataSet, shard: usize) -> Vec<String> {
    let rows = data.manifest().shards[shard].rows;
    (0..rows).map(|row| if row % 3 == 2 { String::new() } else { format!("shard {shard}, row {row}") }).collect()
}

#[tokio::test]
async fn a_column_is_written_shard_by_shard_and_read_like_the_own_ones() {
    let (out, data) = prepared().await;
    let shards = data.manifest().shards.len();
    let set = CaptionSet::begin(&store(&out), data.shared_manifest(), spec("m")).await.unwrap();
    assert_eq!(set.missing().await.unwrap(), (0..shards).collect::<Vec<_>>());
    for shard in (1..shards).rev() {
        write(&set, shard, &captions(&data, shard)).await.unwrap();
    }
    // Whoever goes on finds what is there; it is not whole yet.
    let set = CaptionSet::begin(&store(&out), data.shared_manifest(), spec("m")).await.unwrap();
    assert_eq!(set.missing().await.unwrap(), [0]);
    for error in [set.finish().await.unwrap_err(), data.added_captions("dense").await.unwrap_err()] {
        assert!(matches!(&error, DataError::SidecarIncomplete { missing_count: 1, .. }), "{error}");
        assert!(error.to_string().contains("ella caption"), "{error}");
    }
    write(&set, 0, &captions(&data, 0)).await.unwrap();
    let manifest = set.finish().await.unwrap();
    let all: Vec<String> = (0..shards).flat_map(|shard| captions(&data, shard)).collect();
    let (total, none) = (all.len() as u64, all.iter().filter(|caption| caption.is_empty()).count() as u64);
    let expected =
        counts(&[("captioned", total - none), ("refused.empty", none), ("input_tokens", 3 * total), ("output_tokens", 2 * (total - none))]);
    assert_eq!((manifest.shards.len(), &manifest.counts), (shards, &expected));
    assert_eq!(set.finish().await.unwrap(), manifest);

    let added = data.added_captions("dense").await.unwrap();
    assert_eq!(added.manifest(), &manifest);
    for shard in 0..shards {
        assert_eq!(added.shard(shard).await.unwrap().to_vec(), captions(&data, shard));
        assert_eq!(data.captions("dense", shard).await.unwrap(), captions(&data, shard));
    }
    let own = data.captions("caption", 0).await.unwrap();
    assert_eq!((own.len() as u64, own[0].as_str()), (data.manifest().shards[0].rows, "a picture with the number 0"));
    assert_eq!(captions_in(&store(&out)).await.unwrap(), ["dense"]);
    let error = data.captions("short", 0).await.unwrap_err();
    assert!(matches!(&error, DataError::ColumnMissing { known, .. } if known == "caption, dense"), "{error}");
}

#[tokio::test]
async fn a_column_made_otherwise_or_of_a_taken_name_is_refused() {
    let (out, data) = prepared().await;
    CaptionSet::begin(&store(&out), data.shared_manifest(), spec("m")).await.unwrap();
    let error = CaptionSet::begin(&store(&out), data.shared_manifest(), spec("other")).await.unwrap_err();
    let DataError::OtherColumn { field, expected, found, .. } = &error else { panic!("{error}") };
    assert_eq!((field.as_str(), expected.as_str(), found.as_str()), ("model", "\"other\"", "\"m\""));
    assert!(error.to_string().contains("--column"), "{error}");
    for column in ["caption", "", "../x", "a/b", ".hidden"] {
        let spec = CaptionSpec { column: column.into(), ..spec("m") };
        let error = CaptionSet::begin(&store(&out), data.shared_manifest(), spec).await.unwrap_err();
        assert!(matches!(error, DataError::Setting { .. }), "{column}: {error}");
    }
    assert_eq!(captions_in(&store(&out)).await.unwrap(), ["dense"]);
}

#[tokio::test]
async fn the_first_answer_stands_and_a_lost_one_is_not_replaced_by_another() {
    let (out, data) = prepared().await;
    let set = CaptionSet::begin(&store(&out), data.shared_manifest(), spec("m")).await.unwrap();
    let error = write(&set, 0, &["one".to_owned()]).await.unwrap_err();
    assert!(matches!(&error, DataError::Arrow { what, .. } if what.contains("rows, as in its shard")), "{error}");
    let (first, second) = (captions(&data, 0), vec!["another answer".to_owned(); captions(&data, 0).len()]);
    write(&set, 0, &first).await.unwrap();
    write(&set, 0, &second).await.unwrap();
    for shard in 1..data.manifest().shards.len() {
        write(&set, shard, &captions(&data, shard)).await.unwrap();
    }
    let manifest = set.finish().await.unwrap();
    assert_eq!(data.captions("dense", 0).await.unwrap(), first);

    let path = out.path().join("captions/dense").join(&manifest.shards[0].name);
    std::fs::remove_file(&path).unwrap();
    let error = write(&set, 0, &second).await.unwrap_err();
    assert!(matches!(&error, DataError::MadeOtherwise { file, .. } if file.ends_with(&manifest.shards[0].name)), "{error}");
    assert!(!path.exists());
    write(&set, 0, &first).await.unwrap();
    let anew = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    assert_eq!(anew.captions("dense", 0).await.unwrap(), first);
}

/// Killed between the file and its record: the captions that stand are the first attempt's, and so is what is counted.
#[tokio::test]
async fn what_is_counted_is_counted_from_the_file_that_stands() {
    let (out, data) = prepared().await;
    let set = CaptionSet::begin(&store(&out), data.shared_manifest(), spec("m")).await.unwrap();
    let rows = data.manifest().shards[0].rows as usize;
    let said = |text: &str| Some(("refused".to_owned(), text.to_owned()));
    let mut first = made(&vec!["a cut one".to_owned(); rows]);
    first[0] = Made { refused: said("I cannot."), caption: String::new(), input_tokens: 7, ..Made::default() };
    first[1].trimmed = true;
    let told = set.write(0, &keys(&captions(&data, 0)), &first).await.unwrap();
    let left = rows as u64 - 1;
    let expected =
        [("captioned", left), ("trimmed", 1), ("refused.refused", 1), ("input_tokens", 7 + 3 * left), ("output_tokens", 2 * left)];
    assert_eq!(told, counts(&expected));

    let record = std::fs::read_dir(out.path().join("captions/dense")).unwrap().map(|entry| entry.unwrap().path());
    let record = record.filter(|path| path.extension().is_some_and(|e| e == "json") && !path.ends_with("spec.json")).collect::<Vec<_>>();
    assert_eq!(record.len(), 1);
    let written = std::fs::read(&record[0]).unwrap();
    std::fs::remove_file(&record[0]).unwrap();
    assert_eq!(set.missing().await.unwrap()[0], 0);
    let another = vec!["another".to_owned(); rows];
    assert_eq!(write(&set, 0, &another).await.unwrap(), told, "the second attempt's own counts are of captions that do not stand");
    assert_eq!(std::fs::read(&record[0]).unwrap(), written);

    for shard in 1..data.manifest().shards.len() {
        set.write(shard, &keys(&captions(&data, shard)), &made(&vec!["a good one".into(); captions(&data, shard).len()])).await.unwrap();
    }
    let manifest = set.finish().await.unwrap();
    assert_eq!((manifest.counts["refused.refused"], manifest.counts["trimmed"]), (1, 1));
    assert_eq!(data.captions("dense", 0).await.unwrap()[..2], [String::new(), "a cut one".to_owned()]);
    // Every refused key is named with its reason, and what was said.
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(out.path().join("captions/dense/report.json")).unwrap()).unwrap();
    let samples: u64 = data.manifest().samples;
    assert_eq!(report, json!({ "captioned": samples - 1, "trimmed": 1, "refused": { "refused": { "key 0": "I cannot." } } }));
}

#[tokio::test]
async fn features_of_an_added_column_lie_beside_those_of_the_own() {
    let (out, data) = prepared().await;
    let (weights_digest, tokenizer_digest) = (Digest::of(b"weights"), Digest::of(b"tokenizer"));
    let (padding, layers, dtype) = (Padding::None, FeatureLayers::Last, FeatureDtype::F32);
    let encoder = FeatureSpec { weights_digest, tokenizer_digest, max_tokens: 4, padding, layers, dtype, width: 1 };
    let error = data.begin_features(&encoder, "dense").await.unwrap_err();
    assert!(matches!(&error, DataError::ColumnMissing { column, .. } if column == "dense"), "{error}");
    let set = CaptionSet::begin(&store(&out), data.shared_manifest(), spec("m")).await.unwrap();
    write(&set, 0, &captions(&data, 0)).await.unwrap();
    let error = data.begin_features(&encoder, "dense").await.unwrap_err();
    assert!(matches!(&error, DataError::SidecarIncomplete { .. }), "{error}");
    for shard in 1..data.manifest().shards.len() {
        write(&set, shard, &captions(&data, shard)).await.unwrap();
    }
    for (column, mark) in [("caption", 1u8), ("dense", 2)] {
        let features = data.begin_features(&encoder, column).await.unwrap();
        for (shard, entry) in data.manifest().shards.iter().enumerate() {
            let mut writer = FeatureWriter::new(&encoder).unwrap();
            for caption in data.captions(column, shard).await.unwrap() {
                // A caption that is not there has no tokens, and no features.
                let tokens = u32::from(!caption.is_empty());
                writer.push(&[mark; 4][..4 * tokens as usize], tokens).unwrap();
            }
            features.write(shard, entry.rows, writer.finish().unwrap(), Counts::new()).await.unwrap();
        }
        let mut empty = FeatureWriter::new(&encoder).unwrap();
        empty.push(&[mark; 4], 1).unwrap();
        features.write_empty(empty.finish().unwrap()).await.unwrap();
    }
    for (column, mark) in [("caption", 1), ("dense", 2)] {
        let features = data.features(&encoder, column).await.unwrap();
        assert_eq!(features.shard(1).await.unwrap().row(0).unwrap(), (&[mark; 4][..], 1));
        assert_eq!(features.shard(1).await.unwrap().row(2).unwrap().1, u32::from(column == "caption"));
    }
    let error = data.features(&encoder, "short").await.unwrap_err();
    assert!(matches!(&error, DataError::FeaturesMissing { found, .. } if found.contains("caption, dense")), "{error}");
}
