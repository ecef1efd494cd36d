//! `ella prepare` beside Python peers that do the same work, in one run: `make bench-prepare`.
//!
//! JPEG 1024 × 768 of quality 90 to 512 × 512 of quality 95. All take turns on the same pictures. What counts is CPU time, so that others on the
//! machine disturb little; ella's start-up (a run on one picture) is measured and taken off, as Python's is. Then ella's peak memory, alone:
//! `bench_prepare memory` does only this.

mod memory;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use ella_dataset::{DataSet, Encoding, Scratch, decode_rgb, encode};
use fast_image_resize::images::TypedImage;
use fast_image_resize::pixels::F32x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use rayon::prelude::*;
use serde::Deserialize;

const IMAGES: usize = 400;
const ROUNDS: usize = 3;
const WIDTH: u32 = 1024;
const HEIGHT: u32 = 768;
const SIDE: u32 = 512;

/// Pictures as encoded bytes, by key.
type Pictures = BTreeMap<String, Vec<u8>>;

/// What one of those who do the work needed for an image, CPU milliseconds.
#[derive(Clone, Debug, Default)]
struct Times {
    all: Vec<f64>,
    decoding: Vec<f64>,
}

impl Times {
    /// The round that others disturbed least.
    fn best(&self) -> f64 {
        self.all.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

#[derive(Debug, Deserialize)]
struct PeerReport {
    version: String,
    images: usize,
    cpu_seconds: f64,
    decode_cpu_seconds: f64,
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    if std::env::args().nth(1).is_some_and(|part| part == "memory") {
        return memory::measure(folder.path());
    }
    let at = |name: &str| folder.path().join(name);
    let originals = pictures()?;
    let bytes: usize = originals.values().map(Vec::len).sum();
    println!("{IMAGES} JPEGs of {WIDTH} × {HEIGHT}, quality 90, {} kB each → {SIDE} × {SIDE}, quality 95", bytes / IMAGES / 1000);
    write_tar(&at("photos.tar"), "jpg", &originals)?;
    write_tar(&at("one.tar"), "jpg", &originals.iter().take(1).map(|(key, bytes)| (key.clone(), bytes.clone())).collect())?;

    let peers = ["cv2", "pil"];
    let (mut ella, mut others, mut start) = (Times::default(), vec![Times::default(); peers.len()], f64::INFINITY);
    for round in 0..ROUNDS {
        let began = ella_prepare(&at("one.tar"), &at(&format!("one-{round}")))?;
        let seconds = ella_prepare(&at("photos.tar"), &at(&format!("ella-{round}")))?;
        start = start.min(began);
        ella.all.push((seconds - began) * 1000.0 / (IMAGES - 1) as f64);
        ella.decoding.push(decode_all(&originals)?);
        for (peer, times) in peers.iter().zip(&mut others) {
            let report = run_peer(peer, &at("photos.tar"), &at(&format!("{peer}.tar")))?;
            times.all.push(report.cpu_seconds * 1000.0 / IMAGES as f64);
            times.decoding.push(report.decode_cpu_seconds * 1000.0 / IMAGES as f64);
        }
    }

    let references = references(&originals)?;
    show("ella", &ella, &ella_output(&at("ella-0"))?, &references)?;
    println!("       start-up {start:.2} s of CPU, taken off");
    for (peer, times) in peers.iter().zip(&others) {
        show(peer, times, &read_tar(&at(&format!("{peer}.tar")))?, &references)?;
    }
    for (peer, times) in peers.iter().zip(&others) {
        let mut ratios: Vec<f64> = times.all.iter().zip(&ella.all).map(|(theirs, ours)| theirs / ours).collect();
        ratios.sort_by(f64::total_cmp);
        println!("ella / {peer}: {:.2} (best rounds), {:.2} (median of rounds)", times.best() / ella.best(), ratios[ROUNDS / 2]);
    }
    memory::measure(folder.path())
}

fn show(name: &str, times: &Times, output: &Pictures, references: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    let decoding = times.decoding.iter().copied().fold(f64::INFINITY, f64::min);
    let size = output.values().map(Vec::len).sum::<usize>() / output.len().max(1);
    println!(
        "{name:6} {:6.1} images per core-second ({:.2} ms; the decoder alone {decoding:.2} ms); {:.1} kB an image, {:.2}/255 from the reference",
        1000.0 / times.best(),
        times.best(),
        size as f64 / 1000.0,
        difference(output, references)?,
    );
    Ok(())
}

/// The pictures to prepare, the same in every run.
fn pictures() -> Result<Pictures> {
    let make = |i: usize| {
        let rgb = noise(WIDTH, HEIGHT, i as u64)?;
        let quality = Encoding::Jpeg { quality: 90 };
        let bytes = Scratch::of_thread(|scratch| encode(&rgb, (WIDTH, HEIGHT), quality, scratch)).map_err(anyhow::Error::msg)?;
        Ok((format!("{i:06}"), bytes))
    };
    (0..IMAGES).into_par_iter().map(make).collect()
}

/// Noise on ever finer grids, ever fainter, and grain: like photographs in what they cost to decode and encode.
fn noise(width: u32, height: u32, seed: u64) -> Result<Vec<u8>> {
    let mut sum = vec![128.0; (width * height * 3) as usize];
    let mut resizer = Resizer::new();
    for octave in 0..8 {
        let strength = 100.0 * 0.62f32.powi(octave);
        let (columns, rows) = ((4 << octave) + 1, (3 << octave) + 1);
        let mut draw = Dice(seed << 8 | octave as u64);
        // Mostly light and shade, which all channels share, and some colour.
        let grid = (0..columns * rows).flat_map(|_| {
            let shade = draw.next();
            [0; 3].map(|_| (strength * (0.75 * shade + 0.35 * draw.next())).to_ne_bytes()).concat()
        });
        let whole = resized((grid.collect(), columns, rows), (width, height), FilterType::CatmullRom, &mut resizer)?;
        sum.iter_mut().zip(floats(&whole)).for_each(|(sum, value)| *sum += value);
    }
    let mut draw = Dice(seed << 8 | 0xff);
    let grain = |pixel: &[f32]| {
        let grain = 9.0 * draw.next();
        [0, 1, 2].map(|c| (pixel[c] + grain).clamp(0.0, 255.0) as u8)
    };
    Ok(sum.chunks_exact(3).flat_map(grain).collect())
}

/// Pixels of three float32, as bytes, resized. Their type is known here, so that resizing is compiled for no other.
fn resized((mut bytes, width, height): (Vec<u8>, u32, u32), to: (u32, u32), filter: FilterType, resizer: &mut Resizer) -> Result<Vec<u8>> {
    let mut made = vec![0; to.0 as usize * to.1 as usize * 12];
    let from = TypedImage::<F32x3>::from_buffer(width, height, &mut bytes)?;
    let mut into = TypedImage::<F32x3>::from_buffer(to.0, to.1, &mut made)?;
    resizer.resize_typed(&from, &mut into, &ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)))?;
    Ok(made)
}

/// Random numbers (SplitMix64).
struct Dice(u64);

impl Dice {
    /// −1 to 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ bits >> 31) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|four| f32::from_ne_bytes(*four))
}

fn write_tar(path: &Path, kind: &str, pictures: &Pictures) -> Result<()> {
    let mut tar = tar::Builder::new(std::fs::File::create(path)?);
    for (key, bytes) in pictures {
        for (name, bytes) in
            [(format!("{key}.{kind}"), bytes.as_slice()), (format!("{key}.txt"), b"waves of noise in many colours".as_slice())]
        {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, bytes)?;
        }
    }
    tar.finish()?;
    Ok(())
}

fn read_tar(path: &Path) -> Result<Pictures> {
    let mut pictures = Pictures::new();
    for member in tar::Archive::new(std::fs::File::open(path)?).entries()? {
        let mut member = member?;
        let name = member.path()?.display().to_string();
        if let Some(key) = name.strip_suffix(".jpg") {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut member, &mut bytes)?;
            pictures.insert(key.to_owned(), bytes);
        }
    }
    Ok(pictures)
}

/// CPU seconds of `ella prepare`.
fn ella_prepare(tar: &Path, out: &Path) -> Result<f64> {
    let (ella, side) = (ella_tests::binary("ella")?, SIDE.to_string());
    let before = children_seconds()?;
    let output =
        Command::new(ella).arg("prepare").arg(tar).arg("--out").arg(out).args(["--resolution", &side, "--threads", "1"]).output()?;
    ensure!(output.status.success(), "ella prepare failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(children_seconds()? - before)
}

/// User and system time of the processes that have been waited for.
fn children_seconds() -> Result<f64> {
    // SAFETY: plain numbers, for which zeroes are sound.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes to `usage`.
    ensure!(unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) } == 0, "no rusage");
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok(seconds(usage.ru_utime) + seconds(usage.ru_stime))
}

/// CPU milliseconds an image of ella's decoder on whole pictures: the floor under what preparing can take.
fn decode_all(pictures: &Pictures) -> Result<f64> {
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes to `time`.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
    };
    let began = now();
    for bytes in pictures.values() {
        decode_rgb(bytes).map_err(anyhow::Error::msg)?;
    }
    Ok((now() - began) / pictures.len() as f64)
}

fn run_peer(peer: &str, tar: &Path, out: &Path) -> Result<PeerReport> {
    let python = std::env::var("PEERS_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../bench/prepare_peer.py");
    let output = Command::new(&python).arg(script).arg(peer).arg(tar).arg(out).arg(SIDE.to_string()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: PeerReport = serde_json::from_slice(&output.stdout)?;
    ensure!(report.images == IMAGES, "{peer} {} made {} images", report.version, report.images);
    Ok(report)
}

/// The pictures of a prepared data set by key.
fn ella_output(folder: &Path) -> Result<Pictures> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let data = DataSet::open(&folder.display().to_string()).await?;
        let mut pictures = Pictures::new();
        for shard in 0..data.manifest().shards.len() {
            for row in data.shard(shard).await?.iter() {
                pictures.insert(row.key.to_owned(), row.image.context("no image")?.to_vec());
            }
        }
        Ok(pictures)
    })
}

/// Every picture resized in floating point by Lanczos and cropped, 8-bit RGB.
fn references(originals: &Pictures) -> Result<BTreeMap<String, Vec<u8>>> {
    originals.par_iter().map(|(key, bytes)| Ok((key.clone(), reference(bytes)?))).collect()
}

fn reference(bytes: &[u8]) -> Result<Vec<u8>> {
    let (rgb, width, height) = decode_rgb(bytes).map_err(anyhow::Error::msg)?;
    let raw: Vec<u8> = rgb.iter().flat_map(|&value| f32::from(value).to_ne_bytes()).collect();
    let scale = f64::from(SIDE) / f64::from(width.min(height));
    let covering = |edge: u32| (f64::from(edge) * scale).round() as u32;
    let (wide, high) = (covering(width), covering(height));
    let covered = resized((raw, width, height), (wide, high), FilterType::Lanczos3, &mut Resizer::new())?;
    let (left, top) = ((wide - SIDE) / 2, (high - SIDE) / 2);
    let rows = covered.chunks_exact(wide as usize * 12).skip(top as usize).take(SIDE as usize);
    let window = rows.flat_map(|row| floats(&row[left as usize * 12..][..SIDE as usize * 12]));
    Ok(window.map(|value| value.round().clamp(0.0, 255.0) as u8).collect())
}

/// Mean absolute difference of pictures from their references.
fn difference(output: &Pictures, references: &BTreeMap<String, Vec<u8>>) -> Result<f64> {
    ensure!(output.keys().eq(references.keys()), "not the same pictures");
    let apart = |(bytes, reference): (&Vec<u8>, &Vec<u8>)| -> Result<f64> {
        let (rgb, ..) = decode_rgb(bytes).map_err(anyhow::Error::msg)?;
        ensure!(rgb.len() == reference.len(), "not of the same size");
        Ok(rgb.iter().zip(reference).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / rgb.len() as f64)
    };
    let all: Vec<f64> = output.values().zip(references.values()).map(apart).collect::<Result<_>>()?;
    Ok(all.iter().sum::<f64>() / all.len() as f64)
}
