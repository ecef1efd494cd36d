//! Small tars and pictures made on the spot.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use std::path::Path;

use ella_dataset::{
    Crop, DataError, DataSet, Encoding, Picture, PictureRules, Piece, Preparation, PrepareOptions, Refusal, Report, Sample, Scratch,
    Settings, Source, cut, encode,
};
use ella_store::{Digest, Store};
use image::{DynamicImage, ExtendedColorType, ImageEncoder, ImageFormat, RgbImage, RgbaImage};
use tempfile::TempDir;

/// A smooth picture that differs from seed to seed.
pub fn rgb(width: u32, height: u32, seed: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 3 + seed * 40) as u8, (y * 2) as u8, (x + y + seed) as u8]))
}

/// Something like a photograph: waves of all lengths, in colours of their own, and an edge. Differs much from seed to seed.
pub fn photo(width: u32, height: u32, seed: u32) -> RgbImage {
    let mut state = u64::from(seed) * 2 + 1;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1u32 << 31)
    };
    let waves: Vec<[f64; 7]> = (0..14)
        .map(|i| {
            let (length, angle) = (1.3f64.powi(i), draw() * 6.3);
            [length * angle.cos() * 6.0, length * angle.sin() * 6.0, draw() * 6.3, draw(), draw(), draw(), 50.0 / length.sqrt()]
        })
        .collect();
    let edge = 0.2 + 0.6 * draw();
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (f64::from(x) / f64::from(width), f64::from(y) / f64::from(height));
        let base = if x + 0.3 * y < edge { 100.0 } else { 150.0 };
        let of = |c: usize| {
            let light: f64 = waves.iter().map(|w| (w[0] * x + w[1] * y + w[2]).sin() * (0.7 + 0.6 * w[3 + c]) * w[6]).sum();
            (base + light).clamp(0.0, 255.0) as u8
        };
        image::Rgb([of(0), of(1), of(2)])
    })
}

/// As PNG.
pub fn png(width: u32, height: u32, seed: u32) -> Vec<u8> {
    png_of(&rgb(width, height, seed))
}

/// Any picture as PNG.
pub fn png_of(picture: &RgbImage) -> Vec<u8> {
    let mut out = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut out);
    encoder.write_image(picture, picture.width(), picture.height(), ExtendedColorType::Rgb8).unwrap();
    out
}

/// Any picture as JPEG.
pub fn jpeg_of(picture: &RgbImage, quality: u8) -> Vec<u8> {
    encode(picture, picture.dimensions(), Encoding::Jpeg { quality }, &mut Scratch::default()).unwrap()
}

/// Squares of 32 pixels from any small picture.
pub const RULES: PictureRules = PictureRules {
    sizes: &[(32, 32)],
    crop: Crop::Centre,
    min_edge: 1,
    max_aspect: None,
    min_area: None,
    max_area: None,
    max_pixels: 1 << 20,
    phash: false,
};

/// Cuts a picture without a key.
pub fn cut_one(bytes: &[u8], rules: &PictureRules) -> Result<Picture, Refusal> {
    Scratch::of_thread(|scratch| cut(bytes, "", rules, scratch))
}

/// Mean absolute difference of two pictures of the same size.
pub fn mean_difference(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64
}

/// As lossless WebP.
pub fn webp(width: u32, height: u32, seed: u32) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    DynamicImage::ImageRgb8(rgb(width, height, seed)).write_to(&mut out, ImageFormat::WebP).unwrap();
    out.into_inner()
}

/// A square JPEG.
pub fn jpeg(side: u32, seed: u32) -> Vec<u8> {
    jpeg_of(&rgb(side, side, seed), 90)
}

/// A PNG with an alpha channel that is `alpha` everywhere.
pub fn png_alpha(side: u32, pixel: [u8; 4]) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    let picture = RgbaImage::from_pixel(side, side, image::Rgba(pixel));
    DynamicImage::ImageRgba8(picture).write_to(&mut out, ImageFormat::Png).unwrap();
    out.into_inner()
}

/// A tar with these members.
pub fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A tar of `count` good samples, 40 pixels and more at the short side, numbered from `from`.
pub fn good_tar(from: u32, count: u32) -> Vec<u8> {
    let mut members = Vec::new();
    for i in from..from + count {
        members.push((format!("{i:06}.jpg"), jpeg(40 + i % 9, i)));
        members.push((format!("{i:06}.txt"), format!("a picture with the number {i}").into_bytes()));
    }
    let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    tar_of(&members)
}

/// Settings for pictures of 32 pixels and shards of a few rows.
pub fn small() -> Settings {
    Settings { shard_bytes: 6000, ..Settings::new(32) }
}

/// Writes files into a folder and finds them as sources, in the order given.
pub async fn sources(folder: &Path, files: &[(&str, &[u8])]) -> Vec<Source> {
    let mut found = Vec::new();
    for (name, bytes) in files {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        found.extend(Source::find(path.to_str().unwrap()).await.unwrap());
    }
    found
}

/// All files below a folder with their bytes, sorted by name.
pub fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    fn walk(root: &Path, folder: &Path, out: &mut Vec<(String, Vec<u8>)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, out);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                out.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    let mut out = Vec::new();
    walk(folder, folder, &mut out);
    out.sort();
    out
}

/// Keys refused, as `reason: key key`.
pub fn refused(report: &Report) -> Vec<String> {
    report.refused.iter().map(|(why, keys)| format!("{why}: {}", keys.join(" "))).collect()
}

/// Writes a file into a folder and finds it as a source.
pub async fn source(folder: &Path, name: &str, bytes: &[u8]) -> Source {
    std::fs::create_dir_all(folder).unwrap();
    sources(folder, &[(name, bytes)]).await.remove(0)
}

/// Reads pieces of a source, one after another.
pub async fn read_pieces(source: &Source, pieces: &[Piece]) -> Result<(Vec<Sample>, Vec<Digest>), DataError> {
    let (source, pieces) = (source.clone(), pieces.to_vec());
    let reading = tokio::task::spawn_blocking(move || {
        let (mut samples, mut digests) = (Vec::new(), Vec::new());
        for piece in &pieces {
            let read = source.read(piece, &mut |sample| {
                samples.push(sample);
                true
            })?;
            let read = read.unwrap();
            assert_eq!(read.bytes, piece.bytes.end - piece.bytes.start);
            digests.push(read.blake3);
        }
        Ok((samples, digests))
    });
    reading.await.unwrap()
}

/// All samples of a source.
pub async fn read(source: &Source) -> Result<Vec<Sample>, DataError> {
    let pieces = source.pieces().await?;
    Ok(read_pieces(source, &pieces).await?.0)
}

/// A folder as a store.
pub fn store(dir: &TempDir) -> Store {
    Store::open(dir.path().to_str().unwrap()).unwrap()
}

/// Options with so many threads.
pub fn threads(threads: usize) -> PrepareOptions {
    PrepareOptions { threads, ..PrepareOptions::default() }
}

/// A sample's key, its picture, and its texts by ending.
pub type Texts<'a> = (&'a str, &'a [u8], &'a [(&'a str, &'a str)]);

/// A tar of samples: key, picture, and their other members by ending.
pub fn tar_of_samples(samples: &[Texts<'_>]) -> Vec<u8> {
    let mut members = Vec::new();
    for (key, image, others) in samples {
        members.push((format!("{key}.jpg"), *image));
        members.extend(others.iter().map(|(ending, text)| (format!("{key}.{ending}"), text.as_bytes())));
    }
    let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    tar_of(&members)
}

/// A sample of a prepared data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    pub key: String,
    pub captions: Vec<String>,
    pub original: (u32, u32),
    pub crop: (u32, u32),
    pub image: Option<Vec<u8>>,
    pub moments: Option<Vec<half::f16>>,
    pub shard: usize,
}

/// All samples of a prepared data set, shard by shard.
pub async fn prepared_rows(out: &TempDir) -> Vec<Prepared> {
    let data = DataSet::open_store(store(out), ella_dataset::CacheLimits::default()).await.unwrap();
    let mut rows = Vec::new();
    for shard in 0..data.manifest().shards.len() {
        let reader = data.shard(shard).await.unwrap();
        rows.extend(reader.iter().map(|row| Prepared {
            key: row.key.to_owned(),
            captions: (0..reader.layout().captions.len()).map(|column| row.caption_in(column).unwrap().to_owned()).collect(),
            original: row.original.unwrap(),
            crop: row.crop.unwrap(),
            image: row.image.map(<[u8]>::to_vec),
            moments: row.moments.map(<[half::f16]>::to_vec),
            shard,
        }));
    }
    rows
}

/// Keys and captions of a prepared data set.
pub async fn keys_and_captions(out: &TempDir) -> Vec<(String, Vec<String>)> {
    prepared_rows(out).await.into_iter().map(|row| (row.key, row.captions)).collect()
}

/// Does all steps of preparing, the parts of each in an order of the caller's, and every unit twice.
pub async fn prepare_in_order(
    sources: &[Source],
    out: &Store,
    settings: &Settings,
    options: &PrepareOptions,
    order: impl Fn(&mut Vec<usize>),
) -> Result<Report, DataError> {
    let new = || Preparation::new(sources.to_vec(), settings.clone(), options.clone(), out.clone());
    let mut parts = new()?.plan().await?.parts;
    order(&mut parts);
    for part in parts.iter().chain(&parts) {
        new()?.part(*part, Box::new(|_| {})).await?;
    }
    let mut parts = new()?.resolve().await?;
    assert_eq!(new()?.resolve().await?, parts);
    order(&mut parts);
    for part in parts.iter().chain(&parts) {
        new()?.again(*part, Box::new(|_| {})).await?;
    }
    new()?.finish().await
}

/// Every file below a folder: its bytes, and what tells whether it was written anew.
pub fn versions(folder: &Path) -> Vec<(String, u64, std::time::SystemTime, Vec<u8>)> {
    use std::os::unix::fs::MetadataExt;
    let version = |(name, bytes): (String, Vec<u8>)| {
        let meta = folder.join(&name).metadata().unwrap();
        (name, meta.ino(), meta.modified().unwrap(), bytes)
    };
    files(folder).into_iter().map(version).collect()
}

/// Files in a data set's folder that should not be there: shards and trees that no manifest names, and half-written ones.
pub async fn leftovers(out: &TempDir) -> Vec<String> {
    let manifest = ella_dataset::Manifest::load(&store(out)).await.unwrap();
    let named = |name: &str| manifest.shards.iter().any(|shard| name.contains(&shard.name));
    let names = files(out.path()).into_iter().map(|(name, _)| name);
    names.filter(|name| name.contains('#') || (name.contains("shards/") && !named(name))).collect()
}
