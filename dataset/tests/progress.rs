//! How far a data set's folder is, while it is made and after.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{good_tar, small, sources, store, tar_of, threads};
use ella_dataset::{
    CaptionSet, CaptionSpec, Counts, DataSet, FeatureDtype, FeatureLayers, FeatureSpec, FeatureWriter, Made, Padding, Preparation,
    Progress, progress,
};
use ella_store::Digest;
use tempfile::TempDir;

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

async fn of(out: &TempDir) -> Vec<Progress> {
    progress(&store(out), now()).await.unwrap().unwrap()
}

fn counts(counts: &[(&str, u64)]) -> Counts {
    counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

/// What does not depend on the clock.
fn told(progress: &Progress) -> (&str, &str, bool, (usize, usize), u64) {
    let Progress { kind, name, whole, units, units_done, samples, .. } = progress;
    (kind, name, *whole, (*units, *units_done), *samples)
}

#[tokio::test]
async fn a_folder_tells_how_far_its_preparation_is() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    assert_eq!(progress(&store(&out), now()).await.unwrap(), None);
    // The second holds one picture without a caption, and one that the first has too.
    let second = tar_of(&[
        ("x.jpg", &common::jpeg(41, 1)),
        ("x.txt", b"again"),
        ("y.jpg", &common::jpeg(60, 77)),
        ("y.txt", b"new"),
        ("z.jpg", &common::jpeg(60, 78)),
    ]);
    let files: [(&str, &[u8]); 3] = [("a.tar", &good_tar(0, 6)), ("b.tar", &second), ("c.tar", &good_tar(30, 5))];
    let sources = sources(dir.path(), &files).await;
    let preparation = Preparation::new(sources, small(), threads(1), store(&out)).unwrap();
    preparation.plan().await.unwrap();
    assert_eq!(told(&of(&out).await[0]), ("prepare", "", false, (3, 0), 0));
    assert_eq!(of(&out).await[0].units_per_second, None);

    preparation.part(1, Box::new(|_| {})).await.unwrap();
    let begun = of(&out).await.remove(0);
    assert_eq!(told(&begun), ("prepare", "", false, (3, 1), 3));
    assert_eq!(begun.counts, counts(&[("kept", 2), ("refused.caption_missing", 1)]));
    assert!(begun.bytes > 0 && begun.units_per_second.is_none() && begun.idle_seconds.unwrap() < 600.0, "{begun:?}");
    preparation.part(0, Box::new(|_| {})).await.unwrap();
    let more = progress(&store(&out), now() + 1000).await.unwrap().unwrap().remove(0);
    assert_eq!(told(&more), ("prepare", "", false, (3, 2), 9));
    let (rate, left) = (more.units_per_second.unwrap(), more.seconds_left.unwrap());
    assert!(rate > 0.0 && (left * rate - 1.0).abs() < 1e-9 && more.samples_per_second.unwrap() > rate, "{more:?}");

    preparation.part(2, Box::new(|_| {})).await.unwrap();
    let again = preparation.resolve().await.unwrap();
    assert_eq!(again, [1]);
    preparation.again(1, Box::new(|_| {})).await.unwrap();
    // A part that was prepared again counts once, and as it is now.
    let all = of(&out).await.remove(0);
    assert_eq!(told(&all), ("prepare", "", false, (3, 3), 14));
    assert_eq!(all.counts, counts(&[("kept", 12), ("refused.caption_missing", 1), ("refused.duplicate_image", 1)]));

    preparation.finish().await.unwrap();
    let whole = of(&out).await;
    assert_eq!(whole.len(), 1);
    assert_eq!(told(&whole[0]), ("prepare", "", true, (3, 3), 14));
    assert_eq!((&whole[0].counts, whole[0].bytes, whole[0].seconds_left), (&all.counts, all.bytes, None));
}

#[tokio::test]
async fn it_tells_of_features_and_added_captions_too() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 20))]).await;
    ella_dataset::prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let shards = data.manifest().shards.clone();
    let spec = FeatureSpec {
        weights_digest: Digest::of(b"weights"),
        tokenizer_digest: Digest::of(b"tokenizer"),
        max_tokens: 4,
        padding: Padding::None,
        layers: FeatureLayers::Last,
        dtype: FeatureDtype::F32,
        width: 1,
    };
    let rows = |rows: u64| {
        let mut writer = FeatureWriter::new(&spec).unwrap();
        (0..rows).for_each(|_| writer.push(&[1; 4], 1).unwrap());
        writer.finish().unwrap()
    };
    let features = data.begin_features(&spec, "caption").await.unwrap();
    features.write(1, shards[1].rows, rows(shards[1].rows), counts(&[("tokens", 9)])).await.unwrap();
    features.write_empty(rows(1)).await.unwrap();
    let made_by = serde_json::json!({});
    let captions = CaptionSet::begin(&store(&out), data.shared_manifest(), CaptionSpec { column: "dense".into(), made_by }).await.unwrap();
    let write = async |shard: usize| {
        let rows = shards[shard].rows as usize;
        let made = vec![Made { caption: "a cup".into(), ..Made::default() }; rows];
        captions.write(shard, &vec!["key".to_owned(); rows], &made).await.unwrap();
    };
    write(0).await;

    let work = of(&out).await;
    let name = format!("{} of caption", &spec.fingerprint().to_string()[..12]);
    // The empty caption's features are a unit, and no sample.
    assert_eq!(told(&work[1]), ("embed", name.as_str(), false, (shards.len() + 1, 2), shards[1].rows));
    assert_eq!(work[1].counts, counts(&[("tokens", 9)]));
    assert_eq!(told(&work[2]), ("caption", "dense", false, (shards.len(), 1), shards[0].rows));
    assert_eq!(work[2].counts, counts(&[("captioned", shards[0].rows)]));

    for shard in 1..shards.len() {
        write(shard).await;
    }
    assert!(!of(&out).await[2].whole);
    captions.finish().await.unwrap();
    let whole = &of(&out).await[2];
    assert_eq!(told(whole), ("caption", "dense", true, (shards.len(), shards.len()), 20));
    assert_eq!((&whole.counts, whole.seconds_left), (&counts(&[("captioned", 20)]), None));
}
