//! Pictures of several sizes: a shard for each, and a bound on what is open of all.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::{jpeg_of, leftovers, photo, prepared_rows, rgb, sources, store, tar_of, threads};
use ella_dataset::{Buckets, DataSet, Filters, LatentEncoder, LatentSpec, Manifest, PrepareOptions, Settings, Source, decode_rgb, prepare};
use ella_store::Digest;
use half::f16;
use tempfile::TempDir;

const SHARD_BYTES: u64 = 40_000;

fn settings() -> Settings {
    let filters = Filters { min_edge: 16, ..Filters::new(64) };
    Settings { buckets: Some(Buckets::Step { step: 16, max_aspect: 2.0 }), filters, shard_bytes: SHARD_BYTES, ..Settings::new(64) }
}

/// Width and height of the picture of that number.
fn original(number: u32) -> (u32, u32) {
    (40 + number * 37 % 90, 40 + number * 53 % 90)
}

async fn pictures(dir: &TempDir, count: u32) -> Vec<Source> {
    let mut members = Vec::new();
    for i in 0..count {
        let (width, height) = original(i);
        members.push((format!("{i:04}.jpg"), jpeg_of(&photo(width, height, i), 90)));
        members.push((format!("{i:04}.txt"), format!("{i}").into_bytes()));
    }
    let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    sources(dir.path(), &[("s.tar", &tar_of(&members))]).await
}

/// Moments that tell which picture they were made of: its mean brightness, everywhere.
#[derive(Default)]
struct Mean {
    batches: Mutex<Vec<(usize, (u32, u32))>>,
}

fn mean(rgb: &[u8]) -> f32 {
    rgb.iter().map(|&byte| f32::from(byte)).sum::<f32>() / rgb.len() as f32
}

impl LatentEncoder for Mean {
    fn spec(&self) -> LatentSpec {
        LatentSpec { model: Digest::of(b"mean"), channels: 2, downscale: 8 }
    }

    fn batch(&self) -> usize {
        4
    }

    fn encode(&self, rgb: &[u8], count: usize, size: (u32, u32)) -> Result<Vec<f16>, Box<dyn std::error::Error + Send + Sync>> {
        self.batches.lock().unwrap().push((count, size));
        assert_eq!(rgb.len(), count * (size.0 * size.1 * 3) as usize);
        let numbers = self.spec().numbers(size);
        Ok(rgb.chunks_exact(rgb.len() / count).flat_map(|picture| vec![f16::from_f32(mean(picture)); numbers]).collect())
    }
}

/// The most bytes that shards held at once, at the least: from each one's first row to its last. Keys are in the order of the source.
async fn open_at_once(out: &TempDir) -> u64 {
    let mut rows = prepared_rows(out).await;
    rows.sort_by(|a, b| a.key.cmp(&b.key));
    let mut last = BTreeMap::new();
    for (at, row) in rows.iter().enumerate() {
        last.insert(row.shard, at);
    }
    let (mut open, mut most) = (BTreeMap::<usize, u64>::new(), 0);
    for (at, row) in rows.iter().enumerate() {
        let texts: usize = row.captions.iter().map(String::len).sum();
        let bytes = row.key.len() + texts + row.image.as_ref().map_or(0, Vec::len) + 2 * row.moments.as_ref().map_or(0, Vec::len);
        *open.entry(row.shard).or_default() += bytes as u64;
        most = most.max(open.values().sum());
        if last[&row.shard] == at {
            open.remove(&row.shard);
        }
    }
    most
}

#[tokio::test]
async fn every_shard_has_pictures_of_one_size_and_says_which() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = pictures(&dir, 120).await;
    let encoder = Arc::new(Mean::default());
    let options = PrepareOptions { latents: Some(encoder.clone()), ..threads(2) };
    let report = prepare(&sources, &store(&out), &settings(), &options).await.unwrap();
    assert_eq!((report.read, report.kept), (120, 120));

    let manifest = Manifest::load(&store(&out)).await.unwrap();
    let sizes = settings().sizes();
    let used: Vec<_> = manifest.shards.iter().map(|shard| shard.size.unwrap()).collect();
    assert!(used.iter().all(|size| sizes.contains(size)));
    let distinct: std::collections::BTreeSet<_> = used.iter().collect();
    assert!(distinct.len() > 2 && used.len() > distinct.len(), "several sizes, and several shards of some: {used:?}");

    for row in prepared_rows(&out).await {
        let size = manifest.shards[row.shard].size.unwrap();
        let original = original(row.key.parse().unwrap());
        assert_eq!(row.original, original);
        // The picture is scaled to cover its size, and cropped in the middle of what is over.
        let scale = f64::max(f64::from(size.0) / f64::from(original.0), f64::from(size.1) / f64::from(original.1));
        let over = |side: u32, cut: u32| (f64::from(side) * scale - f64::from(cut)) / 2.0;
        let expected = (over(original.0, size.0), over(original.1, size.1));
        assert!((f64::from(row.crop.0) - expected.0).abs() <= 1.0 && (f64::from(row.crop.1) - expected.1).abs() <= 1.0, "{row:?}");
        let (rgb, width, height) = decode_rgb(&row.image.unwrap()).unwrap();
        let moments = row.moments.unwrap();
        assert_eq!(((width, height), moments.len()), (size, 2 * (size.0 / 8 * (size.1 / 8)) as usize));
        assert!((mean(&rgb) - moments[0].to_f32()).abs() < 1.0 && moments.iter().all(|moment| *moment == moments[0]));
    }
    let batches = encoder.batches.lock().unwrap().clone();
    assert!(batches.iter().all(|(count, size)| (1..=4).contains(count) && sizes.contains(size)));
    assert_eq!(batches.iter().map(|(count, _)| count).sum::<usize>(), 120);
    assert!(batches.iter().filter(|(count, _)| *count < 4).count() <= distinct.len(), "only each size's last batch is not full");
    assert_eq!(leftovers(&out).await, Vec::<String>::new());
}

#[tokio::test]
async fn open_shards_never_hold_more_than_one_may() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = pictures(&dir, 200).await;
    prepare(&sources, &store(&out), &settings(), &threads(2)).await.unwrap();
    let most = open_at_once(&out).await;
    let rows = prepared_rows(&out).await;
    let largest = rows.iter().map(|row| row.image.as_ref().unwrap().len() as u64).max().unwrap();
    assert!(SHARD_BYTES / 2 < most && most <= SHARD_BYTES + largest + 8, "{most} bytes of {SHARD_BYTES}");
}

#[tokio::test]
async fn the_nearest_aspect_ratio_decides() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sizes = [(100, 100), (200, 100), (90, 180), (128, 96)];
    let members: Vec<_> =
        sizes.iter().map(|(width, height)| (format!("{width}x{height}"), jpeg_of(&rgb(*width, *height, *width), 90))).collect();
    let names: Vec<_> = members.iter().map(|(key, _)| (format!("{key}.jpg"), format!("{key}.txt"))).collect();
    let members = names.iter().zip(&members).flat_map(|((jpg, txt), (_, image))| [(jpg.as_str(), image.as_slice()), (txt, &b"a"[..])]);
    let sources = sources(dir.path(), &[("s.tar", &tar_of(&members.collect::<Vec<_>>()))]).await;
    prepare(&sources, &store(&out), &settings(), &threads(1)).await.unwrap();
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let mut found: Vec<_> =
        prepared_rows(&out).await.iter().map(|row| (row.key.clone(), data.manifest().shards[row.shard].size.unwrap())).collect();
    found.sort();
    let size = |key: &str, width, height| (key.to_owned(), (width, height));
    // 4096 pixels: 64², 80 × 48 (5:3) and 64 × 64 are the nearest to their originals' shapes among multiples of 16.
    let ratio = |(width, height): (u32, u32)| f64::from(width) / f64::from(height);
    for (key, size) in &found {
        let original: Vec<u32> = key.split('x').map(|side| side.parse().unwrap()).collect();
        let wanted = ratio((original[0], original[1])).ln();
        let distance = |size: (u32, u32)| (ratio(size).ln() - wanted).abs();
        assert!(settings().sizes().iter().all(|other| distance(*size) <= distance(*other) + 1e-9), "{key} became {size:?}");
    }
    assert!(found.contains(&size("100x100", 64, 64)));
}
