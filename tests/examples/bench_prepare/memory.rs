//! The most memory that `ella prepare` takes, on pictures of 12 million pixels that all differ.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use ella_dataset::{Encoding, Scratch, encode};
use image::ImageEncoder as _;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use rayon::prelude::*;

use super::{Pictures, noise, write_tar};

const WIDTH: u32 = 4000;
const HEIGHT: u32 = 3000;
/// Of a kind.
const IMAGES: usize = 32;
/// How often a process is asked for the most that it has had so far.
const LOOK: Duration = Duration::from_millis(10);
/// What `ella prepare` promises, MB.
const BOUND: f64 = 600.0;

/// Prepares them in several ways, and prints the most memory that each took.
pub(super) fn measure(folder: &Path) -> Result<()> {
    let rgb = noise(WIDTH, HEIGHT, 77)?;
    for kind in ["jpg", "png"] {
        write_tar(&folder.join(format!("large-{kind}.tar")), kind, &pictures(&rgb, kind)?)?;
    }
    println!("most memory for {IMAGES} pictures of {WIDTH} × {HEIGHT}, within {BOUND} MB:");
    for (kind, side, format, threads) in [
        ("jpg", 512, "jpeg", 2),
        ("jpg", 512, "jpeg", 16),
        ("png", 512, "jpeg", 2),
        ("png", 512, "jpeg", 16),
        ("jpg", 1024, "webp", 16),
        ("png", 1024, "webp", 16),
    ] {
        let peak = prepare(folder, kind, side, (format, threads))?;
        println!("  {kind} to {side} × {side} {format} on {threads:2} threads: {peak:.0} MB");
        ensure!(peak < BOUND, "more than {BOUND} MB");
    }
    Ok(())
}

/// The same picture again and again, each time with other rows on top.
fn pictures(rgb: &[u8], kind: &str) -> Result<Pictures> {
    let picture = |i: usize| {
        let mut rows = rgb.to_vec();
        rows.rotate_left(i * 3 * WIDTH as usize * 31);
        let bytes = if kind == "jpg" {
            let quality = Encoding::Jpeg { quality: 90 };
            Scratch::of_thread(|scratch| encode(&rows, (WIDTH, HEIGHT), quality, scratch)).map_err(anyhow::Error::msg)?
        } else {
            let mut png = Vec::new();
            let encoder = PngEncoder::new_with_quality(&mut png, CompressionType::Fast, FilterType::Up);
            encoder.write_image(&rows, WIDTH, HEIGHT, image::ExtendedColorType::Rgb8)?;
            png
        };
        Ok((format!("{i:06}"), bytes))
    };
    (0..IMAGES).into_par_iter().map(picture).collect()
}

/// Megabytes.
fn prepare(folder: &Path, kind: &str, side: u32, (format, threads): (&str, usize)) -> Result<f64> {
    let out = folder.join(format!("{kind}-{side}-{format}-{threads}"));
    let mut command = Command::new(ella_tests::binary("ella")?);
    command.arg("prepare").arg(folder.join(format!("large-{kind}.tar"))).arg("--out").arg(&out);
    command.args(["--resolution", &side.to_string(), "--format", format, "--threads", &threads.to_string()]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // The system's own account of a process that has ended includes what its parent had when it was started.
    let mut peak: f64 = 0.0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        peak = high_water(child.id()).map_or(peak, |now| peak.max(now));
        std::thread::sleep(LOOK);
    };
    ensure!(status.success(), "{command:?} ended with {status}");
    std::fs::remove_dir_all(out)?;
    Ok(peak)
}

/// The most memory that a process has had so far, MB; none once it has ended.
fn high_water(process: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0 / 1e6)
}
