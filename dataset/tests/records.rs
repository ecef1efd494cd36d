//! Shards, manifests and features: round trips, and what is said of damaged ones.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{files, good_tar, small, sources, store, threads};
use ella_dataset::{
    CacheLimits, Counts, DataError, DataSet, FeatureDtype, FeatureLayers, FeatureReader, FeatureSpec, FeatureWriter, Manifest, Padding,
    Refusal, Row, ShardLayout, ShardReader, ShardWriter, captions_from_txt, prepare, prepare_captions,
};
use ella_store::{Digest, Store};
use half::f16;
use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

/// A prepared data set of several shards.
async fn prepared() -> TempDir {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 30))]).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    out
}

fn spec(padding: Padding, dtype: FeatureDtype) -> FeatureSpec {
    let (weights_digest, tokenizer_digest) = (Digest::of(b"weights"), Digest::of(b"tokenizer"));
    FeatureSpec { weights_digest, tokenizer_digest, max_tokens: 6, padding, layers: FeatureLayers::Last, dtype, width: 3 }
}

/// A row's bytes, all different from row to row.
fn feature(spec: &FeatureSpec, row: usize, tokens: u32) -> Vec<u8> {
    let len = spec.stored_tokens(tokens) as usize * spec.token_bytes();
    (0..len).map(|i| (i * 7 + row * 31) as u8 & 0x3f).collect()
}

fn rows_strategy(columns: usize, moments: usize) -> impl Strategy<Value = Vec<Row>> {
    let row = (".{0,12}", vec(".{0,40}", columns), any::<[u32; 4]>(), vec(any::<u8>(), 0..200), vec(any::<u16>(), moments));
    let row = row.prop_map(|(key, captions, n, image, moments)| Row {
        key,
        captions,
        original: (n[0], n[1]),
        crop: (n[2], n[3]),
        image,
        moments: moments.into_iter().map(f16::from_bits).collect(),
    });
    vec(row, 1..600)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn shards_give_back_every_row_as_written(rows in rows_strategy(2, 5)) {
        let captions = vec!["caption".to_owned(), "short".to_owned()];
        let layout = ShardLayout { captions, pictures: true, images: true, moments: Some(5) };
        let mut writer = ShardWriter::new(layout.clone()).unwrap();
        for row in &rows {
            writer.push(row.clone()).unwrap();
        }
        prop_assert_eq!(writer.rows(), rows.len() as u64);
        let reader = ShardReader::open("shard", writer.finish().unwrap(), layout).unwrap();
        prop_assert_eq!(reader.rows(), rows.len());
        for (i, row) in rows.iter().enumerate() {
            let read = reader.row(i).unwrap();
            prop_assert_eq!((read.key, read.caption), (row.key.as_str(), row.captions[0].as_str()));
            prop_assert_eq!((read.caption_in(1), read.caption_in(2)), (Some(row.captions[1].as_str()), None));
            prop_assert_eq!(reader.caption(i, 1).unwrap(), &row.captions[1]);
            prop_assert_eq!((read.original, read.crop), (Some(row.original), Some(row.crop)));
            prop_assert_eq!(read.image, Some(row.image.as_slice()));
            let bits = |m: &[f16]| m.iter().map(|m| m.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(read.moments.unwrap()), bits(&row.moments));
        }
        let beyond = matches!(reader.row(rows.len()), Err(DataError::Row { .. }));
        prop_assert!(beyond);
    }

    #[test]
    fn features_give_back_every_row_as_written(tokens in vec(1u32..=6, 1..600), fixed: bool, kind in 0..3usize) {
        let padding = if fixed { Padding::Fixed } else { Padding::None };
        let spec = spec(padding, [FeatureDtype::F16, FeatureDtype::Bf16, FeatureDtype::F32][kind]);
        let mut writer = FeatureWriter::new(&spec).unwrap();
        for (row, &tokens) in tokens.iter().enumerate() {
            writer.push(&feature(&spec, row, tokens), tokens).unwrap();
        }
        let reader = FeatureReader::open("features", writer.finish().unwrap(), &spec).unwrap();
        prop_assert_eq!(reader.rows(), tokens.len());
        for (row, &tokens) in tokens.iter().enumerate() {
            let written = feature(&spec, row, tokens);
            prop_assert_eq!(reader.row(row).unwrap(), (written.as_slice(), tokens));
        }
        prop_assert!(reader.row(tokens.len()).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Without a digest to check first, a damaged shard is still an error or readable, never a crash.
    #[test]
    fn damaged_shards_never_crash(at in 0.0f64..1.0, to: u8, cut: bool) {
        let layout = ShardLayout { pictures: true, images: true, moments: Some(2), ..ShardLayout::default() };
        let mut writer = ShardWriter::new(layout.clone()).unwrap();
        for i in 0..5 {
            let text = |what: &str| format!("{what} {i}");
            let (key, captions, moments) = (text("key"), vec![text("caption")], vec![f16::ONE; 2]);
            writer.push(Row { key, captions, image: vec![i; 9], moments, ..Row::default() }).unwrap();
        }
        let mut bytes = writer.finish().unwrap().to_vec();
        let at = (at * bytes.len() as f64) as usize;
        if cut { bytes.truncate(at) } else { bytes[at] = to }
        if let Ok(reader) = ShardReader::open("shard", bytes.into(), layout) {
            for row in reader.iter() {
                prop_assert!(row.image.is_some());
            }
        }
    }
}

#[test]
fn equal_rows_make_equal_bytes() {
    let layout = ShardLayout { pictures: true, images: true, moments: Some(2), ..ShardLayout::default() };
    let file = || {
        let mut writer = ShardWriter::new(layout.clone()).unwrap();
        writer
            .push(Row { key: "a".into(), captions: vec![String::new()], image: vec![1, 2], moments: vec![f16::ONE; 2], ..Row::default() })
            .unwrap();
        writer.finish().unwrap()
    };
    assert_eq!(file(), file());
}

#[test]
fn moments_and_captions_of_a_wrong_number_are_refused() {
    let mut writer = ShardWriter::new(ShardLayout { moments: Some(2), ..ShardLayout::default() }).unwrap();
    let row = Row { key: "a".into(), captions: vec![String::new()], moments: vec![f16::ONE], ..Row::default() };
    let error = writer.push(row.clone()).unwrap_err();
    assert!(error.to_string().contains("moments of a: expected 2, found 1"), "{error}");
    let error = writer.push(Row { captions: Vec::new(), moments: vec![f16::ONE; 2], ..row }).unwrap_err();
    assert!(error.to_string().contains("captions of a: expected 1, found 0"), "{error}");
}

#[test]
fn a_shard_with_other_columns_is_refused_by_name() {
    let captions = ShardLayout::default();
    let mut writer = ShardWriter::new(captions.clone()).unwrap();
    writer.push(Row { captions: vec![String::new()], ..Row::default() }).unwrap();
    let bytes = writer.finish().unwrap();
    let open = |layout| ShardReader::open("x.arrow", bytes.clone(), layout).unwrap_err().to_string();
    assert!(open(ShardLayout { images: true, ..captions.clone() }).contains("x.arrow: not a usable Arrow file: column image is missing"));
    assert!(open(ShardLayout { moments: Some(4), ..captions.clone() }).contains("column moments is missing"));
    let named = ShardLayout { captions: vec!["dense".into()], ..captions.clone() };
    assert!(open(named).contains("column caption_dense is missing"));
    let error = ShardReader::open("x.arrow", bytes.slice(..bytes.len() / 2), captions.clone()).unwrap_err();
    assert!(matches!(error, DataError::Arrow { .. }), "{error}");
    assert!(ShardReader::open("x.arrow", bytes.slice(..5), captions).is_err());
}

#[tokio::test]
async fn a_flipped_byte_is_an_error_naming_the_shard_and_both_digests() {
    let out = prepared().await;
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let entry = data.manifest().shards[1].clone();
    let path = out.path().join(&entry.name);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    data.shard(0).await.unwrap();
    let error = data.shard(1).await.unwrap_err();
    let DataError::Digest { file, expected, found } = &error else { panic!("{error}") };
    assert!(file.ends_with(&entry.name));
    assert_eq!((*expected, *found), (entry.blake3, Digest::of(&bytes)));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(data.shard(1).await, Err(DataError::RecordMissing { .. })));
    assert!(matches!(data.shard(999).await, Err(DataError::Row { .. })));
}

#[tokio::test]
async fn shards_beyond_the_limit_are_closed_and_open_again() {
    let out = prepared().await;
    // The same files in memory: fetched, not mapped.
    let remote = Store::in_memory();
    for (name, bytes) in files(out.path()) {
        remote.put(&name, bytes.into()).await.unwrap();
    }
    for store in [store(&out), remote] {
        let limits = CacheLimits { shards: 2, bytes: 20_000 };
        let local = store.local_path().is_some();
        let data = DataSet::open_store(store, limits).await.unwrap();
        let count = data.manifest().shards.len();
        assert!(count > 3);
        let first = data.shard(0).await.unwrap();
        assert!(std::sync::Arc::ptr_eq(&first, &data.shard(0).await.unwrap()));
        for i in 0..count {
            data.shard(i).await.unwrap();
        }
        // One that is held stays in memory though it be closed: it is not closed, then.
        assert_eq!(std::sync::Arc::ptr_eq(&first, &data.shard(0).await.unwrap()), !local);
        assert!(data.memory().peak <= limits.bytes && (data.memory().held == 0) == local);
        let mut keys: Vec<_> = first.iter().map(|row| row.key.to_owned()).collect();
        for i in 1..count {
            keys.extend(data.shard(i).await.unwrap().iter().map(|row| row.key.to_owned()));
        }
        assert_eq!(keys, (0..30).map(|i| format!("{i:06}")).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn manifests_are_read_strictly() {
    let out = prepared().await;
    let store = store(&out);
    let manifest = Manifest::load(&store).await.unwrap();
    assert_eq!(manifest.digest(), Manifest::load(&store).await.unwrap().digest());
    let text = std::fs::read_to_string(out.path().join("manifest.json")).unwrap();
    let digest = manifest.shards[0].blake3.to_string();
    let rows = format!("\"rows\": {}", manifest.shards[0].rows);
    let bytes = format!("\"bytes\": {}", manifest.shards[0].bytes);
    let name = format!("\"name\": \"{}\"", manifest.shards[0].name);
    let cases = [
        ("\"schema\": 1", "\"schema\": 2", "schema: unknown version (expected 1, found 2)"),
        ("\"samples\"", "\"extra\": 0, \"samples\"", "unknown field `extra`"),
        ("\"min_edge\"", "\"min_egde\": 1, \"min_edge\"", "unknown field `min_egde`"),
        ("\"samples\": 30", "\"samples\": 31", "samples: must be the sum of the shards' rows (expected 30, found 31)"),
        (&format!("\"bytes\": {},", manifest.bytes), "\"bytes\": 1,", "bytes: must be the sum"),
        (&digest, "abc", "not a BLAKE3 digest"),
        (&rows, "\"rows\": 0", "shards[0].rows: must be 1 or more"),
        (&rows, &format!("\"rows\": {}", u64::MAX), "shards[1].rows: the sum up to here must be below 2^64"),
        (&bytes, &format!("\"bytes\": {}", u64::MAX), "shards[1].bytes: the sum up to here must be below 2^64"),
        (&name, "\"name\": \"../evil\"", "shards[0].name: must be a plain relative name"),
        ("\"resolution\": 32", "\"resolution\": 31", "settings.resolution: must be a multiple of 8"),
        ("\"samples\": 30,", "", "missing field `samples`"),
        ("{", "", "expected"),
    ];
    for (from, to, says) in cases {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        std::fs::write(out.path().join("manifest.json"), changed).unwrap();
        let error = Manifest::load(&store).await.unwrap_err().to_string();
        assert!(error.contains("manifest.json: ") && error.contains(says), "{from} -> {to}: {error}");
    }
    std::fs::remove_file(out.path().join("manifest.json")).unwrap();
    let error = DataSet::open(out.path().to_str().unwrap()).await.unwrap_err();
    assert!(matches!(error, DataError::RecordMissing { .. }), "{error}");
}

/// Writes the features of a shard.
async fn embed(data: &DataSet, spec: &FeatureSpec, shard: usize) -> Result<(), DataError> {
    let set = data.begin_features(spec, "caption").await?;
    let rows = data.shard(shard).await?.rows();
    let mut writer = FeatureWriter::new(spec)?;
    for row in 0..rows {
        let tokens = 1 + (row as u32 % 6);
        writer.push(&feature(spec, row, tokens), tokens)?;
    }
    set.write(shard, writer.rows(), writer.finish()?, Counts::new()).await?;
    let mut empty = FeatureWriter::new(spec)?;
    empty.push(&feature(spec, 0, 1), 1)?;
    set.write_empty(empty.finish()?).await.map(drop)
}

#[tokio::test]
async fn features_are_used_only_when_complete() {
    let out = prepared().await;
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let (spec, count) = (spec(Padding::None, FeatureDtype::F16), data.manifest().shards.len());
    for shard in 1..count {
        embed(&data, &spec, shard).await.unwrap();
    }
    assert_eq!(data.begin_features(&spec, "caption").await.unwrap().missing().await.unwrap(), [0]);
    let error = data.features(&spec, "caption").await.unwrap_err();
    let DataError::SidecarIncomplete { missing, missing_count: 1, total, .. } = &error else { panic!("{error}") };
    let stem = data.manifest().shards[0].name.trim_start_matches("shards/").trim_end_matches(".arrow").to_owned();
    assert_eq!((missing, *total), (&stem, count + 1));

    embed(&data, &spec, 0).await.unwrap();
    embed(&data, &spec, 0).await.unwrap();
    let features = data.features(&spec, "caption").await.unwrap();
    for shard in 0..count {
        let file = features.shard(shard).await.unwrap();
        assert_eq!(file.rows(), data.shard(shard).await.unwrap().rows());
        for row in 0..file.rows() {
            let tokens = 1 + (row as u32 % 6);
            assert_eq!(file.row(row).unwrap(), (feature(&spec, row, tokens).as_slice(), tokens));
        }
    }
    assert_eq!(features.empty().row(0).unwrap(), (feature(&spec, 0, 1).as_slice(), 1));
    let set = data.begin_features(&spec, "caption").await.unwrap();
    let manifest = set.finish().await.unwrap();
    assert_eq!(features.bytes(), manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>());

    // Without the empty caption's, dropped captions have no features: not complete either.
    let folder = out.path().join("features").join(spec.fingerprint().to_string()).join("caption");
    let hidden = ["manifest.json", "empty.json"].map(|name| folder.join(name));
    hidden.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    let error = data.features(&spec, "caption").await.unwrap_err();
    assert!(matches!(&error, DataError::SidecarIncomplete { missing, missing_count: 1, .. } if missing == "empty"), "{error}");
    embed(&data, &spec, 0).await.unwrap();

    let path = folder.join(&manifest.shards[0].name);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[600] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let anew = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let damaged = anew.features(&spec, "caption").await.unwrap();
    assert!(matches!(damaged.shard(0).await, Err(DataError::Digest { .. })));

    // What the error advises: delete the file, and embed again.
    std::fs::remove_file(&path).unwrap();
    let error = damaged.shard(0).await.unwrap_err().to_string();
    assert!(error.contains("not found") && error.contains("ella embed"), "{error}");
    let error = data.features(&spec, "caption").await.unwrap_err();
    assert!(matches!(&error, DataError::SidecarIncomplete { missing, missing_count: 1, .. } if missing == &stem), "{error}");
    embed(&data, &spec, 0).await.unwrap();
    data.features(&spec, "caption").await.unwrap().shard(0).await.unwrap();
}

#[tokio::test]
async fn a_stale_cache_is_not_taken_for_a_fresh_one() {
    let out = prepared().await;
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let there = spec(Padding::None, FeatureDtype::F16);
    let error = data.features(&there, "caption").await.unwrap_err().to_string();
    assert!(error.contains("there are none at all"), "{error}");
    for shard in 0..data.manifest().shards.len() {
        embed(&data, &there, shard).await.unwrap();
    }
    let wanted = FeatureSpec { max_tokens: 7, ..spec(Padding::Fixed, FeatureDtype::F16) };
    assert_ne!(wanted.fingerprint(), there.fingerprint());
    let error = data.features(&wanted, "caption").await.unwrap_err();
    let DataError::FeaturesMissing { found, .. } = &error else { panic!("{error}") };
    assert!(found.contains(&there.fingerprint().to_string()), "{error}");
    assert!(found.contains("max_tokens expected 7, found 6; padding expected \"fixed\", found \"none\""), "{error}");

    let average = FeatureSpec { layers: FeatureLayers::Average, ..there.clone() };
    let error = data.features(&average, "caption").await.unwrap_err().to_string();
    assert!(error.contains("layers expected \"average\", found \"last\""), "{error}");

    // Features of another data set, copied over: the spec says whose they are.
    let folder = out.path().join("features").join(there.fingerprint().to_string()).join("caption");
    let record = std::fs::read_to_string(folder.join("spec.json")).unwrap();
    let other = record.replace(&data.manifest().digest().to_string(), &Digest::of(b"other").to_string());
    std::fs::write(folder.join("spec.json"), other).unwrap();
    let error = data.features(&there, "caption").await.unwrap_err();
    assert!(matches!(&error, DataError::Other { field, .. } if field == "data"), "{error}");
}

#[tokio::test]
async fn wrong_features_are_refused() {
    let out = prepared().await;
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let spec = spec(Padding::None, FeatureDtype::F32);
    let mut writer = FeatureWriter::new(&spec).unwrap();
    for (bytes, tokens) in [(12 * 2, 3), (12, 0), (12 * 7, 7)] {
        assert!(matches!(writer.push(&vec![0; bytes], tokens), Err(DataError::FeatureRow { .. })), "{tokens}");
    }
    writer.push(&[0; 12], 1).unwrap();
    let (rows, file) = (writer.rows(), writer.finish().unwrap());
    let set = data.begin_features(&spec, "caption").await.unwrap();
    assert!(
        matches!(set.write(0, rows, file.clone(), Counts::new()).await, Err(DataError::Arrow { .. })),
        "a row count that is not the shard's"
    );
    let narrower = FeatureSpec { width: 2, ..spec.clone() };
    assert!(matches!(FeatureReader::open("f", file.clone(), &narrower), Err(DataError::Arrow { .. })));
    let half = FeatureSpec { dtype: FeatureDtype::F16, ..spec.clone() };
    assert!(FeatureReader::open("f", file, &half).unwrap_err().to_string().contains("column features: expected"));
    let error = data.begin_features(&FeatureSpec { width: 0, ..spec }, "caption").await.unwrap_err();
    assert!(matches!(error, DataError::Setting { field: "width", .. }));
}

#[tokio::test]
async fn a_folder_of_text_files_becomes_a_data_set_of_captions() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("2.txt", b"two dogs\n");
    write("10.txt", "zehn Äpfel".as_bytes());
    write("empty.txt", b"\n");
    write("latin.txt", b"caf\xe9");
    write("other.json", b"{}");
    std::os::unix::fs::symlink("nowhere", dir.path().join("broken.txt")).unwrap();
    std::fs::create_dir(dir.path().join("folder.txt")).unwrap();
    let captions = captions_from_txt(dir.path()).unwrap();
    let kept = [("10".to_owned(), "zehn Äpfel".to_owned()), ("2".to_owned(), "two dogs".to_owned())];
    assert_eq!(captions.kept, kept);
    let refused = [(Refusal::CaptionEmpty, "empty"), (Refusal::CaptionNotUtf8, "latin"), (Refusal::CaptionMissing, "broken")];
    assert_eq!(captions.refused, refused.map(|(why, key)| (why, vec![key.to_owned()])).into());

    let report = prepare_captions(captions.clone(), "prompts", &store(&out)).await.unwrap();
    assert_eq!((report.read, report.kept, report.adds_up()), (5, 2, true));
    let before = files(out.path());
    prepare_captions(captions.clone(), "prompts", &store(&out)).await.unwrap();
    assert_eq!(files(out.path()), before);

    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    assert!(!data.manifest().has_images() && data.manifest().resolution().is_none());
    let shard = data.shard(0).await.unwrap();
    let row = shard.row(0).unwrap();
    assert_eq!((row.key, row.caption, row.image, row.original), ("10", "zehn Äpfel", None, None));
    let spec = spec(Padding::Fixed, FeatureDtype::F32);
    embed(&data, &spec, 0).await.unwrap();
    assert_eq!(data.features(&spec, "caption").await.unwrap().shard(0).await.unwrap().rows(), 2);

    let fewer = ella_dataset::Captions { kept: kept[..1].to_vec(), ..captions };
    let error = prepare_captions(fewer, "prompts", &store(&out)).await.unwrap_err();
    assert!(matches!(error, DataError::Other { .. }), "{error}");
    let none = ella_dataset::Captions::default();
    assert!(matches!(prepare_captions(none, "prompts", &store(&out)).await, Err(DataError::NothingKept { .. })));
    assert!(matches!(captions_from_txt(&dir.path().join("none")), Err(DataError::Io { .. })));
}
